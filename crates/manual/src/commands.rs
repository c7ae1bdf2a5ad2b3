//! The pages of the commands, from the grammar and the texts of the help.

use std::io;

use clap::{ArgAction, Command};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};
use sprat::Exit;

/// How the generator writes apostrophes: `\*(Aq`.
const PREAMBLE: &str = ".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n";

/// The title line. `date` is that of the commit, so two builds of one commit are the same.
pub fn title(name: &str, section: &str, date: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let name = name.replace('-', "\\-");
    format!(".TH {name} {section} \"{date}\" \"sprat {version}\" \"sprat\"\n")
}

/// Each page with its name, such as `sprat-key-add`.
pub fn pages(date: &str) -> io::Result<Vec<(String, String)>> {
    let mut grammar = sprat::grammar()
        .disable_help_subcommand(true)
        .override_usage("sprat [OPTIONS] COMMAND")
        .subcommand_help_heading("COMMANDS");
    grammar.build();
    let mut pages = vec![("sprat".to_owned(), top_page(&grammar, date)?)];
    add_pages(&grammar, date, &mut pages)?;
    Ok(pages)
}

fn shown(command: &Command) -> impl Iterator<Item = &Command> {
    command
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
}

fn add_pages(command: &Command, date: &str, pages: &mut Vec<(String, String)>) -> io::Result<()> {
    for command in shown(command) {
        let name = command.get_display_name().unwrap_or_default().to_owned();
        pages.push((name, page(command, date)?));
        add_pages(command, date, pages)?;
    }
    Ok(())
}

fn top_page(grammar: &Command, date: &str) -> io::Result<String> {
    let man = Man::new(grammar.clone());
    let mut page = Vec::new();
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_subcommands_section(&mut page)?;
    let mut roff = Roff::new();
    roff.control("SH", ["GLOBAL OPTIONS"]);
    roff.text([roman("Every command has these options.")]);
    page.extend(roff.to_roff().into_bytes());
    page.extend(options(&man)?);
    let mut roff = Roff::new();
    literal(&mut roff, "ENVIRONMENT", sprat::ENVIRONMENT);
    roff.control("SH", ["EXIT STATUS"]);
    for exit in Exit::ALL {
        roff.control("TP", []);
        roff.text([bold(exit.code().to_string())]);
        roff.text([roman(exit.meaning())]);
    }
    roff.control("SH", ["FILES"]);
    for (file, what) in [
        ("/etc/sprat/sprat.toml", "The config of root."),
        (
            "/etc/sprat/keys/",
            "The key files. Save each key elsewhere, too.",
        ),
        (
            "/var/lib/sprat/",
            "What this machine knows of each container.",
        ),
        ("/var/cache/sprat/", "Caches of encrypted blocks."),
        ("/usr/share/sprat/exclude/", "Samples of exclude patterns."),
    ] {
        roff.control("TP", []);
        roff.text([bold(file)]);
        roff.text([roman(what)]);
    }
    see_also(&mut roff, &["sprat.toml(5)", "rsync(1)", "cryptsetup(8)"]);
    page.extend(roff.to_roff().into_bytes());
    Ok(page_of(&title("SPRAT", "1", date), &text(page)?))
}

fn page(command: &Command, date: &str) -> io::Result<String> {
    // Global options are in sprat(1); the help shows them on a page of their own, too.
    let is_global = |arg: &clap::Arg| arg.is_global_set();
    let command = command.clone().mut_args(|arg| {
        let hide = arg.is_hide_set() || is_global(&arg);
        let prints_help = matches!(
            arg.get_action(),
            ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong
        );
        arg.hide(hide || prints_help)
    });
    let name = command.get_display_name().unwrap_or_default().to_owned();
    let man = Man::new(command.clone());
    let mut page = Vec::new();
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    let options = options(&man)?;
    if !options.is_empty() {
        page.extend(b".SH OPTIONS\n");
        page.extend(options);
    }
    if shown(&command).next().is_some() {
        man.render_subcommands_section(&mut page)?;
    }
    let mut roff = Roff::new();
    if let Some(notes) = command.get_after_help() {
        roff.control("SH", ["NOTES"]);
        paragraphs(&mut roff, &notes.to_string());
    }
    if let Some(examples) = command.get_before_help() {
        let examples = examples.to_string();
        let (_, commands) = examples.split_once('\n').unwrap_or(("", &examples));
        literal(&mut roff, "EXAMPLES", commands);
    }
    see_also(&mut roff, &["sprat(1)", "sprat.toml(5)"]);
    page.extend(roff.to_roff().into_bytes());
    let title = title(&name.to_uppercase(), "1", date);
    Ok(page_of(&title, &text(page)?))
}

/// The options without their heading: the generator's own headings follow those of the help.
fn options(man: &Man) -> io::Result<Vec<u8>> {
    let mut section = Vec::new();
    man.render_options_section(&mut section)?;
    let section = text(section)?;
    let lines = section.lines().filter(|line| !line.starts_with(".SH"));
    let lines: Vec<&str> = lines.collect();
    let has_any = lines.iter().any(|line| line.starts_with(".TP"));
    Ok(match has_any {
        true => (lines.join("\n") + "\n").into_bytes(),
        false => Vec::new(),
    })
}

/// Paragraphs of the help; lines that begin with blanks stay as they are.
fn paragraphs(roff: &mut Roff, notes: &str) {
    for (number, paragraph) in notes.split("\n\n").enumerate() {
        if number > 0 {
            roff.control("PP", []);
        }
        let is_table = paragraph.lines().any(|line| line.starts_with(' '));
        if is_table {
            roff.control("EX", []);
        }
        for line in paragraph.lines() {
            roff.text([roman(line)]);
        }
        if is_table {
            roff.control("EE", []);
        }
    }
}

/// A section whose lines stay as they are.
fn literal(roff: &mut Roff, heading: &str, lines: &str) {
    roff.control("SH", [heading]);
    roff.control("EX", []);
    for line in lines.lines() {
        roff.text([roman(line)]);
    }
    roff.control("EE", []);
}

fn see_also(roff: &mut Roff, pages: &[&str]) {
    roff.control("SH", ["SEE ALSO"]);
    roff.text([roman(pages.join(", "))]);
}

/// A page from its sections. The generator writes a preamble before each, and paragraphs without text.
pub fn page_of(title: &str, sections: &str) -> String {
    let sections = sections.replace(PREAMBLE, "");
    let lines: Vec<&str> = sections.lines().filter(|line| !line.is_empty()).collect();
    let begins = |line: &str| {
        [".SH", ".SS", ".PP", ".TP", ".IP"]
            .iter()
            .any(|start| line.starts_with(start))
    };
    let mut page = format!("{PREAMBLE}{title}");
    let mut last = "";
    for (number, line) in lines.iter().enumerate() {
        let next = lines.get(number + 1).copied().unwrap_or(".SH");
        let is_empty = *line == ".PP" && (last.starts_with(".S") || begins(next));
        let is_double = *line == ".br" && last == ".br";
        if !is_empty && !is_double {
            page.push_str(line);
            page.push('\n');
            last = line;
        }
    }
    page
}

fn text(bytes: Vec<u8>) -> io::Result<String> {
    String::from_utf8(bytes).map_err(io::Error::other)
}
