//! `sprat config`: checks the config, and shows what is in effect.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use sprat_run::config::{self, Config, Job, Loaded, Mistake, Named, Setting};
use sprat_session::text;

use crate::args::GlobalArgs;
use crate::environment::Environment;
use crate::output::{Output, path_json, result_json};
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat config check
  sprat config check new.toml
  sprat config show home@nas";

#[derive(Debug, Args)]
pub(super) struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Check the config: report each mistake and each doubtful setting, with file and line
    Check {
        /// Check these files together, instead of the config
        #[arg(value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Show the settings in effect, and where each is set; secrets are shown as ***
    Show {
        /// Show only this container, job (JOB) or copy (JOB@CONTAINER)
        #[arg(value_name = "COPY")]
        copy: Option<String>,
    },
}

/// Runs the command. It needs no right but to read the config.
pub(super) fn run(
    args: &ConfigArgs,
    global: &GlobalArgs,
    environment: &Environment,
    output: Output,
) -> Result<Exit, Failure> {
    let places = environment.config_places();
    let named = global.config.as_ref();
    let named = named.map(|path| environment.absolute(path));
    match &args.command {
        ConfigCommand::Check { files } => {
            let files = match (files.is_empty(), named) {
                (false, _) => files
                    .iter()
                    .map(|file| environment.absolute(file))
                    .collect(),
                (true, named) => config::files_of(named.as_deref(), &places),
            };
            let mut loaded = config::load(&files, &places);
            loaded.warnings.extend(loaded.config.exposed_keys(&places));
            loaded.warnings.extend(loaded.config.no_channel());
            check(&loaded, output)
        }
        ConfigCommand::Show { copy } => {
            let config = Config::load(named.as_deref(), &places)?;
            show(&tables(&config, copy.as_deref())?, &config, output)
        }
    }
}

fn check(loaded: &Loaded, output: Output) -> Result<Exit, Failure> {
    let exit = match loaded.mistakes.is_empty() {
        true => Exit::Done,
        false => Exit::Usage,
    };
    let mut shown = String::new();
    for mistake in &loaded.mistakes {
        shown.push_str(&text::harmless(&mistake.to_string()));
        shown.push('\n');
    }
    for warning in &loaded.warnings {
        let warning = Mistake {
            what: format!("warning: {}", warning.what),
            ..warning.clone()
        };
        shown.push_str(&text::harmless(&warning.to_string()));
        shown.push('\n');
    }
    let config = &loaded.config;
    let last = match (config.files.is_empty(), loaded.mistakes.len()) {
        (true, _) => "there is no config".to_owned(),
        (false, 0) => format!(
            "no mistake: {}, {}",
            text::counted(config.containers.len() as u64, "container", "containers"),
            text::counted(config.jobs.len() as u64, "job", "jobs")
        ),
        (false, mistakes) => text::counted(mistakes as u64, "mistake", "mistakes"),
    };
    shown.push_str(&last);
    shown.push('\n');
    let files: Vec<String> = config.files.iter().map(|file| path_json(file)).collect();
    let fields = json!({
        "files": files,
        "mistakes": loaded.mistakes.iter().map(mistake_json).collect::<Vec<_>>(),
        "warnings": loaded.warnings.iter().map(mistake_json).collect::<Vec<_>>(),
    });
    output.listing(&shown, &result_json("config check", exit, fields))?;
    Ok(exit)
}

fn mistake_json(mistake: &Mistake) -> Value {
    json!({
        "file": path_json(&mistake.file),
        "line": mistake.line,
        "what": mistake.what,
        "likely": mistake.likely,
        "stops": mistake.stops.to_string(),
    })
}

/// A table's title, and its settings.
type Table<'c> = (String, &'c [Setting]);

/// The tables that a word names, or all.
fn tables<'c>(config: &'c Config, word: Option<&str>) -> Result<Vec<Table<'c>>, Failure> {
    let job = |job: &'c Job| (format!("[job.{}]", job.name), &*job.settings);
    let containers = |is_shown: &dyn Fn(&str) -> bool| -> Vec<Table<'c>> {
        let shown = config.containers.iter().filter(|one| is_shown(&one.name));
        shown
            .map(|one| (format!("[container.{}]", one.name), &*one.settings))
            .collect()
    };
    let Some(word) = word else {
        let mut tables = vec![(String::new(), &*config.settings)];
        tables.extend(containers(&|_| true));
        tables.extend(config.jobs.iter().map(job));
        tables.push(("[notify]".to_owned(), &*config.notify.settings));
        let watches = config.watches.iter();
        tables.extend(watches.map(|one| (format!("[watch.{}]", one.name), &*one.settings)));
        return Ok(tables);
    };
    let copies = match config.named(word)? {
        Some(Named::Container(_)) => return Ok(containers(&|name| name == word)),
        Some(Named::Copies(copies)) => copies,
        None => {
            let mut known = config.containers.iter();
            let found = known.find(|known| known.target.to_string() == word);
            match found {
                Some(found) => return Ok(containers(&|name| name == found.name)),
                None => config.copies_of(word)?,
            }
        }
    };
    let mut tables = containers(&|name| copies.iter().any(|copy| copy.container.name == name));
    tables.extend(copies.first().map(|copy| job(copy.job)));
    Ok(tables)
}

/// The columns that a setting takes before its origin is shown behind it.
const SETTING_COLUMNS: usize = 44;

fn show(tables: &[Table<'_>], config: &Config, output: Output) -> Result<Exit, Failure> {
    let mut shown = String::new();
    for (title, settings) in tables {
        if !title.is_empty() {
            shown.push_str(&format!("\n{title}\n"));
        }
        for setting in *settings {
            let line = text::harmless(&format!("{} = {}", setting.key, setting.value));
            let origin = match &setting.origin {
                Some(origin) => format!("{}:{}", origin.file.display(), origin.line),
                None => "default".to_owned(),
            };
            let origin = match setting.in_effect {
                true => text::harmless(&origin),
                false => format!("{}, not yet in effect", text::harmless(&origin)),
            };
            shown.push_str(&format!("{line:<SETTING_COLUMNS$} # {origin}\n"));
        }
    }
    let json: Vec<Value> = tables.iter().map(table_json).collect();
    let files: Vec<String> = config.files.iter().map(|file| path_json(file)).collect();
    let fields = json!({ "files": files, "tables": json });
    let shown = shown.trim_start_matches('\n');
    output.listing(shown, &result_json("config show", Exit::Done, fields))?;
    Ok(Exit::Done)
}

fn table_json((title, settings): &Table<'_>) -> Value {
    let setting = |setting: &Setting| {
        let origin = setting.origin.as_ref();
        json!({
            "key": setting.key,
            "value": setting.value,
            "file": origin.map(|origin| path_json(&origin.file)),
            "line": origin.map(|origin| origin.line),
            "in_effect": setting.in_effect,
        })
    };
    json!({
        "table": title,
        "settings": settings.iter().map(setting).collect::<Vec<_>>(),
    })
}
