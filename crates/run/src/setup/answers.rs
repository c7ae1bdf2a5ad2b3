//! The answers to what, when and where to report, as keys of the config.

use std::path::{Path, PathBuf};

use sprat_session::Failure;
use sprat_session::address::Target;

use crate::config::{Config, Notify, Words, join_words};
use crate::notify::PrivateText;
use crate::notify::channels::check_url;

/// What is backed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct What {
    /// The job's name, if it is free.
    pub(super) job: &'static str,
    /// Absolute.
    pub(super) sources: Vec<PathBuf>,
    /// The sample of excludes.
    sample: Option<&'static str>,
}

impl What {
    /// The sources for a person.
    pub(super) fn shown(&self) -> String {
        let sources = self.sources.iter().map(|path| path.display().to_string());
        sources.collect::<Vec<_>>().join(", ")
    }
}

/// Reads the words of `--what`, or of the answer: `home` or 1, `system` or 2, or folders.
pub(super) fn what(words: &[String], current_dir: &Path) -> Result<What, Failure> {
    match words {
        [] => Err(refused("nothing was given")),
        [one] if ["1", "home"].contains(&one.as_str()) => home(Path::new("/")),
        [one] if ["2", "system"].contains(&one.as_str()) => Ok(What {
            job: "system",
            sources: vec!["/".into()],
            sample: Some("system"),
        }),
        folders => {
            let sources: Vec<PathBuf> = folders.iter().map(|one| current_dir.join(one)).collect();
            for source in &sources {
                sprat_snapshot::check_source(source, false)
                    .map_err(|error| refused(&error.to_string()))?;
            }
            Ok(What {
                job: "files",
                sources,
                // Who names a folder wants all that is in it.
                sample: None,
            })
        }
    }
}

/// The home folders and /etc, as far as there is something in them.
fn home(root: &Path) -> Result<What, Failure> {
    let folders = ["home", "root", "etc"].map(|name| root.join(name));
    let is_useful = |path: &PathBuf| sprat_snapshot::check_source(path, false).is_ok();
    let sources: Vec<PathBuf> = folders.into_iter().filter(is_useful).collect();
    if sources.is_empty() {
        return Err(refused("/home, /root and /etc are empty"));
    }
    Ok(What {
        job: "home",
        sources,
        sample: Some("home"),
    })
}

fn refused(why: &str) -> Failure {
    Failure::usage("that can't be backed up")
        .because(why.to_owned())
        .with_hint("nothing was changed. Give home, system, or folders that are there")
}

/// Reads `--when` as lines of a job.
pub(super) fn when(text: Option<&str>) -> Result<String, Failure> {
    let two_digits = |part: &str, max: u8| {
        let number = part.parse::<u8>().ok();
        part.len() == 2 && number.is_some_and(|number| number <= max)
    };
    match text.unwrap_or("daily") {
        "daily" => Ok("every = \"1 day\"\n".to_owned()),
        // Else all but the newest would go at the end of each day.
        "hourly" => Ok("every = \"1 h\"\nkeep_hourly = 24\n".to_owned()),
        time if time
            .split_once(':')
            .is_some_and(|(hour, minute)| two_digits(hour, 23) && two_digits(minute, 59)) =>
        {
            Ok(format!("at = \"{time}\"\n"))
        }
        other => Err(Failure::usage(format!("{other:?} is no time for backups"))
            .with_hint("nothing was changed. Give --when daily, hourly or HH:MM")),
    }
}

/// Where problems are reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Report {
    Mail(String),
    Ntfy(String),
    Desktop,
    Nobody,
}

/// Reads `--notify`, or the answer.
pub(super) fn report(text: &str) -> Result<Report, Failure> {
    let refused = |why: &str| {
        Failure::usage(format!("{text:?} is no place for reports"))
            .because(why.to_owned())
            .with_hint("nothing was changed. Give mail:ADDRESS, ntfy:URL, desktop or none")
    };
    let url = |url: &str| match check_url(url) {
        Ok(()) => Ok(Report::Ntfy(url.to_owned())),
        Err(why) => Err(refused(&why)),
    };
    match text.trim() {
        "desktop" => Ok(Report::Desktop),
        "none" => Ok(Report::Nobody),
        text => match text.split_once(':') {
            Some(("ntfy", rest)) => url(rest),
            Some(("http" | "https", _)) => url(text),
            _ => {
                let address = text.strip_prefix("mail:").unwrap_or(text);
                match address.contains('@') && !address.contains(char::is_whitespace) {
                    true => Ok(Report::Mail(address.to_owned())),
                    false => Err(refused("it is neither an address nor a URL")),
                }
            }
        },
    }
}

/// Whether `[notify]` has this already.
pub(super) fn is_in(report: &Report, notify: &Notify) -> bool {
    match report {
        Report::Mail(to) => notify
            .mail
            .as_ref()
            .is_some_and(|mail| mail.to.contains(to)),
        Report::Ntfy(url) => match &notify.ntfy {
            Some(PrivateText::Text(known)) => **known == *url,
            _ => false,
        },
        Report::Desktop => notify.desktop,
        Report::Nobody => !notify.has_channel(),
    }
}

/// All that setup writes into a config file.
#[derive(Debug)]
pub(super) struct Plan {
    /// The container's name.
    pub(super) name: String,
    /// The container, if it is not in the config.
    pub(super) container: Option<NewContainer>,
    /// The job's name and content, if the container has none.
    pub(super) job: Option<(String, What, String)>,
    /// Where problems are reported, if the config does not say it.
    pub(super) report: Option<Report>,
}

/// The keys of a container's table.
#[derive(Debug)]
pub(super) struct NewContainer {
    pub(super) target: Target,
    /// `None`: as the config or ssh itself has it.
    pub(super) ssh_command: Option<Words>,
    pub(super) allow_no_fsync: bool,
    /// The server lets only one connection in.
    pub(super) one_connection: bool,
}

impl Plan {
    /// Whether the config has everything.
    pub(super) fn is_nothing(&self) -> bool {
        self.container.is_none() && self.job.is_none() && self.report.is_none()
    }

    /// The content of the file.
    pub(super) fn text(&self) -> String {
        let mut text = "# Written by `sprat setup`, which never changes it again. `sprat config \
                        show` shows all settings.\n"
            .to_owned();
        let quoted = |text: &str| toml::Value::String(text.to_owned()).to_string();
        if let Some(container) = &self.container {
            // `bob@nas:./x.luks` as people write it.
            let target = container.target.to_string().replacen(":./", ":", 1);
            let target = quoted(&target);
            text.push_str(&format!(
                "\n[container.{}]\ntarget = {target}\n",
                key(&self.name)
            ));
            let words = container.ssh_command.iter();
            let words = words.map(|words| quoted(&join_words(words)));
            text.extend(words.map(|words| format!("ssh_command = {words}\n")));
            if container.allow_no_fsync {
                text.push_str("allow_no_fsync = true\n");
            }
            if container.one_connection {
                text.push_str("connections = 1\n");
            }
        }
        if let Some((name, what, when)) = &self.job {
            let sources = what
                .sources
                .iter()
                .map(|path| quoted(&path.to_string_lossy()));
            let sources: Vec<String> = sources.collect();
            text.push_str(&format!(
                "\n[job.{}]\ncontainer = {}\nsources = [{}]\n",
                key(name),
                quoted(&self.name),
                sources.join(", ")
            ));
            let sample = what.sample.iter();
            text.extend(sample.map(|sample| format!("exclude_sample = \"{sample}\"\n")));
            text.push_str("exclude_caches = true\n");
            text.push_str(when);
            text.push_str("keep_daily = 14\nkeep_weekly = 8\nkeep_monthly = 12\nkeep_yearly = 3\n");
        }
        if let Some(report) = &self.report {
            let line = match report {
                Report::Mail(to) => format!("mail = {{ to = {} }}", quoted(to)),
                Report::Ntfy(url) => format!("ntfy = {}", quoted(url)),
                Report::Desktop => "desktop = true".to_owned(),
                Report::Nobody => "desktop = false".to_owned(),
            };
            text.push_str(&format!("\n[notify]\n{line}\n"));
        }
        text
    }
}

/// A name of a table. A dot in it would begin another table.
fn key(name: &str) -> String {
    match name.contains('.') {
        true => toml::Value::String(name.to_owned()).to_string(),
        false => name.to_owned(),
    }
}

/// A name for a job that nothing in the config has. A bare word means a container or a job, never both.
pub(super) fn free_job_name(config: &Config, wanted: &str, container: &str) -> String {
    let is_free = |name: &str| {
        let taken = config.jobs.iter().any(|job| job.name.as_str() == name)
            || config.stopped.iter().any(|copy| copy.job == name)
            || config.containers.iter().any(|one| one.name == name);
        !taken && name != container
    };
    let more = (2..).map(|number| format!("{wanted}-{container}-{number}"));
    let first = [wanted.to_owned(), format!("{wanted}-{container}")];
    let mut names = first.into_iter().chain(more);
    names.find(|name| is_free(name)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;
    use crate::config::{ConfigPlaces, load};
    use crate::due::Schedule;

    #[test]
    fn written_config_is_read_as_it_was_meant() {
        let folder = tempfile::tempdir().unwrap();
        let odd = folder.path().join("odd \"name\" of anna's");
        std::fs::create_dir(&odd).unwrap();
        std::fs::write(odd.join("a"), "a").unwrap();
        let words: Words = ["ssh", "-i", "/etc/my key", "-o", "A=b"]
            .map(OsString::from)
            .into();
        let what = what(&[odd.to_string_lossy().into_owned()], Path::new("/")).unwrap();
        let plan = Plan {
            name: "nas.2".to_owned(),
            container: Some(NewContainer {
                target: Target::parse("bob@nas:x.luks", Path::new("/")).unwrap(),
                ssh_command: Some(words.clone()),
                allow_no_fsync: true,
                one_connection: true,
            }),
            job: Some(("files".to_owned(), what, when(Some("02:30")).unwrap())),
            report: Some(report("a@b.example").unwrap()),
        };
        let file = folder.path().join("setup.toml");
        std::fs::write(&file, plan.text()).unwrap();
        let config = load(&[file], &ConfigPlaces::default());
        let config = config.without_mistakes().unwrap_or_else(|failure| {
            panic!("{failure:?}\n{}", plan.text());
        });
        let container = config.container("nas.2").unwrap();
        assert_eq!(container.target.to_string(), "bob@nas:./x.luks");
        assert_eq!(container.ssh_command, Some(words));
        assert!(container.allow_no_fsync && container.connections == 1);
        let job = config.job("files").unwrap();
        assert_eq!(job.local_sources(), [odd]);
        assert!(job.filters.exclude_caches && job.is_in("nas.2"));
        assert!(
            matches!(job.schedule, Schedule::At(_)),
            "{:?}",
            job.schedule
        );
        assert_eq!(config.notify.mail.unwrap().to, ["a@b.example"]);
    }

    #[test]
    fn answers_are_read_and_bad_ones_refused() {
        for (text, expected) in [
            ("desktop", Report::Desktop),
            ("none", Report::Nobody),
            ("mail:a@b", Report::Mail("a@b".to_owned())),
            (" a@b ", Report::Mail("a@b".to_owned())),
            (
                "ntfy:https://ntfy.sh/x",
                Report::Ntfy("https://ntfy.sh/x".to_owned()),
            ),
            (
                "https://ntfy.sh/x",
                Report::Ntfy("https://ntfy.sh/x".to_owned()),
            ),
        ] {
            assert_eq!(report(text).unwrap(), expected, "{text}");
        }
        for wrong in ["", "anna", "ntfy:x", "http://ntfy.sh/x", "mail:a b@c"] {
            assert!(report(wrong).is_err(), "{wrong}");
        }
        for wrong in ["2:30", "24:00", "02:60", "weekly", ""] {
            assert!(when(Some(wrong)).is_err(), "{wrong}");
        }
        for wrong in [vec![], vec!["/not/there".to_owned()]] {
            assert!(what(&wrong, Path::new("/")).is_err(), "{wrong:?}");
        }
        assert_eq!(
            what(&["2".to_owned()], Path::new("/")).unwrap().sources,
            [Path::new("/")]
        );
    }

    #[test]
    fn home_is_what_is_there_of_the_home_folders_and_etc() {
        let root = tempfile::tempdir().unwrap();
        assert!(home(root.path()).is_err());
        for folder in ["home", "etc"] {
            std::fs::create_dir(root.path().join(folder)).unwrap();
        }
        std::fs::write(root.path().join("etc/hosts"), "x").unwrap();
        assert_eq!(
            home(root.path()).unwrap().sources,
            [root.path().join("etc")]
        );
    }

    #[test]
    fn job_gets_a_name_that_nothing_else_has() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("sprat.toml");
        let text = "[container.nas]\ntarget = \"nas:x.luks\"\n\
                    [job.home]\ncontainer = \"nas\"\nsources = [\"/etc\"]\n";
        std::fs::write(&file, text).unwrap();
        let config = load(&[file], &ConfigPlaces::default())
            .without_mistakes()
            .unwrap();
        let free = |wanted: &str, container: &str| free_job_name(&config, wanted, container);
        assert_eq!(free("system", "usb"), "system");
        assert_eq!(free("home", "usb"), "home-usb");
        assert_eq!(free("nas", "usb"), "nas-usb");
        assert_eq!(free("system", "system"), "system-system");
    }
}
