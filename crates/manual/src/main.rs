//! Writes the man pages of sprat into a folder, with a date: one for each command, from its help, `sprat.toml(5)` from
//! `docs/config.md`, and `sprat-agent(8)` from `docs/agent.md`. `make packages` runs it; it never ships.
#![forbid(unsafe_code)]

mod commands;
mod markdown;

use std::path::Path;
use std::process::ExitCode;
use std::{fs, io};

/// The page of the config.
const CONFIG: &str = include_str!("../../../docs/config.md");
/// The page of the agent.
const AGENT: &str = include_str!("../../../docs/agent.md");

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let written = match arguments.as_slice() {
        [folder, date] => write(Path::new(folder), &date.to_string_lossy()),
        _ => Err(io::Error::other("usage: sprat-manual FOLDER YYYY-MM-DD")),
    };
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            #[expect(clippy::print_stderr, reason = "a program for developers")]
            {
                eprintln!("sprat-manual: {error}");
            }
            ExitCode::FAILURE
        }
    }
}

/// Writes each page as `man1/NAME.1`, and so in `man5` and `man8`, below `folder`.
fn write(folder: &Path, date: &str) -> io::Result<()> {
    let [man1, man5, man8] = ["man1", "man5", "man8"].map(|section| folder.join(section));
    for section in [&man1, &man5, &man8] {
        fs::create_dir_all(section)?;
    }
    for (name, page) in commands::pages(date)? {
        fs::write(man1.join(format!("{name}.1")), page)?;
    }
    fs::write(man5.join("sprat.toml.5"), config_page(date))?;
    fs::write(man8.join("sprat-agent.8"), agent_page(date))
}

fn agent_page(date: &str) -> String {
    let title = commands::title("SPRAT-AGENT", "8", date);
    let name = ".SH NAME\nsprat\\-agent \\- past states of container files that a hacked client cannot destroy\n";
    let see_also = ".SH SEE ALSO\n.BR sprat (1),\n.BR sshd_config (5)\n";
    let sections = format!("{name}{}{see_also}", markdown::to_man(AGENT));
    commands::page_of(&title, &sections)
}

fn config_page(date: &str) -> String {
    let title = commands::title("SPRAT.TOML", "5", date);
    let name = ".SH NAME\nsprat.toml \\- the config of sprat\n";
    let see_also = ".SH SEE ALSO\n.BR sprat (1),\n.BR sprat\\-config (1)\n";
    let sections = format!("{name}{}{see_also}", markdown::to_man(CONFIG));
    commands::page_of(&title, &sections)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sprat_testkit::{needs, requires};
    use std::process::Command;

    const DATE: &str = "2026-11-28";

    fn written() -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        write(folder.path(), DATE).expect("the pages");
        folder
    }

    fn pages(folder: &Path) -> Vec<std::path::PathBuf> {
        ["man1", "man5", "man8"]
            .iter()
            .flat_map(|section| fs::read_dir(folder.join(section)).expect("a section"))
            .map(|entry| entry.expect("a page").path())
            .collect()
    }

    fn output(command: &mut Command) -> String {
        let output = command.output().expect("it runs");
        let said = [output.stdout, output.stderr].concat();
        String::from_utf8_lossy(&said).into_owned()
    }

    #[test]
    fn mandoc_finds_no_fault() {
        requires!(needs::program("mandoc"));
        let folder = written();
        for page in pages(folder.path()) {
            let said = output(
                Command::new("mandoc")
                    .args(["-Tlint", "-Wwarning"])
                    .arg(&page),
            );
            assert_eq!(said, "", "{}", page.display());
        }
    }

    #[test]
    fn man_shows_every_page_without_a_warning() {
        requires!(needs::program("man"));
        let folder = written();
        let pages = pages(folder.path());
        assert!(pages.len() > 30, "{pages:?}");
        for page in pages {
            let mut man = Command::new("man");
            man.env("MANWIDTH", "80")
                .args(["--warnings", "-E", "UTF-8", "-l"]);
            let said = output(man.arg(&page));
            assert!(!said.contains("warning:"), "{}: {said}", page.display());
            let name = page
                .file_stem()
                .expect("a name")
                .to_string_lossy()
                .into_owned();
            assert!(said.contains(&name), "{name}: {said}");
        }
    }

    /// The commands that the help lists, with their full names.
    fn listed(command: &clap::Command, name: &str) -> Vec<(String, String)> {
        let mut found = Vec::new();
        for below in command
            .get_subcommands()
            .filter(|below| !below.is_hide_set())
        {
            let name = format!("{name}-{}", below.get_name());
            let about = below.get_about().expect("a first line").to_string();
            found.extend(listed(below, &name));
            found.push((name, about));
        }
        found
    }

    #[test]
    fn no_command_lacks_a_page() {
        let pages = commands::pages(DATE).expect("the pages");
        let commands = listed(&sprat::grammar(), "sprat");
        assert!(commands.len() > 30, "{commands:?}");
        assert_eq!(pages.len(), commands.len() + 1);
        for (name, about) in commands {
            let page = pages.iter().find(|(found, _)| *found == name);
            let page = &page.unwrap_or_else(|| panic!("no page {name}")).1;
            let first = about.split(['-', '\'', '`']).next().expect("a text");
            assert!(page.contains(first), "{name}: {first}: {page}");
        }
    }

    #[test]
    fn every_command_has_a_page_with_its_help() {
        let pages = commands::pages(DATE).expect("the pages");
        let page = |wanted: &str| {
            let found = pages.iter().find(|(name, _)| name == wanted);
            found.map_or_else(|| panic!("no page {wanted}"), |(_, page)| page.as_str())
        };
        for part in [
            "sprat\\-backup(1)",
            "sprat\\-key(1)",
            "\\-\\-ssh\\-command",
            "SPRAT_LOG",
            "14",
        ] {
            assert!(page("sprat").contains(part), "{part}: {}", page("sprat"));
        }
        let restore = page("sprat-restore");
        for part in [
            "EXAMPLES",
            "sprat restore home www",
            "\\-\\-verify",
            "SEE ALSO",
        ] {
            assert!(restore.contains(part), "{part}: {restore}");
        }
        assert!(
            !restore.contains("ssh\\-command"),
            "global options are in sprat(1)"
        );
        assert!(page("sprat-key-add").contains("sprat key add"));
        let names: Vec<_> = pages.iter().map(|(name, _)| name.as_str()).collect();
        assert!(
            !names
                .iter()
                .any(|name| name.contains("worker") || name.contains("help")),
            "{names:?}"
        );
        let hidden = pages.iter().find(|(_, page)| page.contains("for\\-tests"));
        assert!(hidden.is_none(), "{hidden:?}");
    }

    #[test]
    fn the_page_of_the_config_has_every_setting() {
        let page = config_page(DATE);
        for part in [
            ".SH JOB.NAME",
            "keep_daily",
            "upload_limit",
            "healthchecks",
            ".EX\n",
        ] {
            assert!(page.contains(part), "{part}: {page}");
        }
        // The keys of the tables, each in its first cell.
        let keys = CONFIG.lines().filter_map(|line| line.strip_prefix("| `"));
        let keys: Vec<&str> = keys.filter_map(|line| line.split('`').next()).collect();
        assert!(keys.len() > 70, "{keys:?}");
        for key in keys {
            let line = format!("\n\\fB{}", key.replace('-', "\\-"));
            assert!(page.contains(&line), "{key}: {page}");
        }
        assert!(!page.contains("]("), "no link of Markdown is left");
    }
}
