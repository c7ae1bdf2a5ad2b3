//! `sprat status`: shows each copy, free space and the lock, without a key and without opening anything.

use clap::Args;
use jiff::Timestamp;
use serde_json::{Value, json};
use sprat_run::config::{Container, Copy, Named};
use sprat_run::notify::{Events, Notifier};
use sprat_run::public_status::PublicStatus;
use sprat_run::run_history::RunHistory;
use sprat_run::watch::{
    ContainerReport, ContainerView, CopyView, Ended, HistoryOfCopy, Now, Watch, WatchView,
    event_json, worst,
};
use sprat_session::status::ContainerStatus;

use super::context::{CommandArgs, Context, Resolved};
use crate::output::result_json;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat status
  sprat status home --json
  sprat status home@nas --history";

pub(super) const NOTES: &str = "\
sprat status needs no key. Free space in the volume and the state of jobs are from the last session
of this machine. The rest comes from the server. Users who are not root and have no config see what
the last run of root published.";

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// Containers, jobs (JOB) and copies (JOB@CONTAINER); the default is all of the config
    #[arg(value_name = "TARGET|COPY")]
    words: Vec<String>,
    /// List the attempts at each copy
    #[arg(long, conflicts_with = "alert")]
    history: bool,
    /// Check for overdue backups and other problems, and send notices; print only errors
    #[arg(long, conflicts_with = "words")]
    alert: bool,
    /// Show only what this machine knows; do not connect to a server
    #[arg(long)]
    offline: bool,
}

/// What is shown of a container.
struct Chosen<'c> {
    resolved: Resolved,
    container: Option<&'c Container>,
    /// Only these jobs; `None`: all.
    jobs: Option<Vec<String>>,
}

impl CommandArgs for StatusArgs {
    fn accepts_mistakes(&self) -> bool {
        self.alert
    }

    fn state_when_interrupted(&self) -> Option<&'static str> {
        Some("nothing was changed")
    }

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        refuse_what_opens(context)?;
        if self.alert {
            return self.check_and_send(context);
        }
        if !context.environment.root
            && context.config.files.is_empty()
            && let Some(exit) = self.public(context)?
        {
            return Ok(exit);
        }
        let chosen = self.chosen(context)?;
        if chosen.is_empty() && context.config.watches.is_empty() {
            let failure = Failure::usage("nothing to show: the config has no container");
            return Err(context
                .config
                .placed(failure)
                .with_hint("name a container: sprat status TARGET"));
        }
        if self.history {
            return self.show_history(context, &chosen);
        }
        // A word names a container or a copy.
        let watches = match self.words.as_slice() {
            [] => WatchView::all(&context.watched(), Timestamp::now()),
            _ => Vec::new(),
        };
        let mut notifier = Notifier::new(&context.state_dir());
        let events = notifier.events.read();
        let unread = notifier.take_problems();
        let reports = self.reports(context, chosen, &events)?;
        show(context, &reports, &watches, unread)
    }
}

impl StatusArgs {
    /// What the words name; all containers of the config if there are none.
    fn chosen<'c>(&self, context: &'c Context) -> Result<Vec<Chosen<'c>>, Failure> {
        let config = &context.config;
        let mut all: Vec<Chosen<'c>> = Vec::new();
        if self.words.is_empty() {
            for container in &config.containers {
                all.push(Chosen::of(context, container, None)?);
            }
        }
        for word in &self.words {
            match config.named(word)? {
                Some(Named::Container(container)) => {
                    all.push(Chosen::of(context, container, None)?);
                }
                Some(Named::Copies(copies)) => {
                    for Copy { job, container } in copies {
                        let job = job.name.to_string();
                        all.push(Chosen::of(context, container, Some(vec![job]))?);
                    }
                }
                None => {
                    let resolved = context.resolve(word)?;
                    let mut known = config.containers.iter();
                    all.push(Chosen {
                        container: known.find(|known| known.target == resolved.target),
                        resolved,
                        jobs: None,
                    });
                }
            }
        }
        Ok(all)
    }

    fn reports(
        &self,
        context: &Context,
        chosen: Vec<Chosen<'_>>,
        events: &Events,
    ) -> Result<Vec<ContainerReport>, Failure> {
        let state_dir = context.state_dir();
        let watched = context.watched();
        let now = Timestamp::now();
        let mut reports = Vec::new();
        for Chosen {
            resolved,
            container,
            jobs,
        } in chosen
        {
            context.interrupt.check()?;
            let server = (!self.offline).then_some(&resolved.ssh);
            let of_config = context.config.jobs_of(&resolved.config_name);
            let mut status = ContainerStatus::read(&state_dir, &resolved.target, of_config, server);
            let mut copies = container.map_or_else(Vec::new, |container| {
                CopyView::in_container(&watched, &container.name, now)
            });
            if let Some(jobs) = jobs {
                copies.retain(|copy| jobs.contains(&copy.copy.job));
                status.only(&jobs);
            }
            reports.push(ContainerReport {
                events: ContainerView::events(&resolved.config_name, events),
                name: resolved.name,
                target: resolved.target,
                status,
                copies,
                min_free: container.map_or(0, |container| container.min_free),
            });
        }
        Ok(reports)
    }

    /// What root published, for a user without a config; `None`: nothing is published.
    fn public(&self, context: &Context) -> Result<Option<Exit>, Failure> {
        let read = PublicStatus::read(&context.state_dir());
        let read = read.map_err(|error| {
            Failure::failed("the published status can't be read").caused_by(&error)
        })?;
        let now = Timestamp::now();
        let Some(status) = read.map(|status| status.at_time(now, &self.words)) else {
            return Ok(None);
        };
        if self.history {
            return Err(
                Failure::usage("--history needs root: attempts are not published")
                    .with_hint("nothing was shown. Run it with sudo or as root"),
            );
        }
        if status.is_old(now) {
            context.output.warning(
                "nothing has published a status for more than 3 hours: the timers of sprat don't run",
            );
        }
        let exit = status.exit();
        let json = serde_json::to_value(&status).unwrap_or_default();
        let text = status.text(&context.shown());
        context
            .output
            .listing(&text, &result_json("status", exit, json))?;
        Ok(Some(exit))
    }

    fn show_history(&self, context: &Context, chosen: &[Chosen<'_>]) -> Result<Exit, Failure> {
        let history = RunHistory::new(&context.state_dir());
        let mut all = Vec::new();
        for one in chosen {
            let jobs = context.config.jobs_of(&one.resolved.config_name);
            let is_meant = |job: &String| one.jobs.as_ref().is_none_or(|jobs| jobs.contains(job));
            for job in jobs.iter().filter(|job| is_meant(job)) {
                let found = HistoryOfCopy::load(&history, job, &one.resolved.config_name);
                all.push(found.map_err(|error| {
                    Failure::failed(format!("the history of job {job} can't be read"))
                        .caused_by(&error)
                })?);
            }
        }
        let shown = context.shown();
        let text: Vec<String> = all.iter().map(|one| one.text(&shown)).collect();
        let json: Vec<Value> = all.iter().map(HistoryOfCopy::json).collect();
        let json = result_json("status", Exit::Done, json!({ "history": json }));
        context.output.listing(&text.join("\n"), &json)?;
        Ok(Exit::Done)
    }

    /// Checks, and sends what is to be reported. A server that is asked reports its free space.
    fn check_and_send(&self, context: &Context) -> Result<Exit, Failure> {
        for container in context.config.containers.iter().filter(|_| !self.offline) {
            context.interrupt.check()?;
            let resolved = context.resolve_container(container)?;
            let (state_dir, jobs) = (context.state_dir(), Vec::new());
            let status =
                ContainerStatus::read(&state_dir, &resolved.target, jobs, Some(&resolved.ssh));
            match (&status.server, status.known()) {
                (Some(Ok(server)), Some(known)) => {
                    let free = server.available_bytes;
                    context.note_history(&known.uuid, &resolved.target, |history| {
                        history.saw_server(Timestamp::now(), free);
                    });
                }
                (Some(Err(failure)), _) => context.warn(failure),
                _ => {}
            }
        }
        let mut watch = Watch::new(context.watched(), context.environment.network());
        let now = Now::read(context.environment.trust_clock);
        let findings = watch.ended(&Ended::default(), &now);
        for problem in &findings.problems {
            context.output.warning(problem);
        }
        let exit = worst([findings.status, findings.exit].into_iter());
        let failed = findings.failed.iter();
        let failed = failed.map(|(channel, why)| json!({ "channel": channel, "why": why }));
        let json = json!({
            "at": now.moment.wall,
            "events": findings.open.iter().map(event_json).collect::<Vec<_>>(),
            "delivered": findings.delivered,
            "failed": failed.collect::<Vec<_>>(),
            "problems": findings.problems,
        });
        context
            .output
            .listing("", &result_json("status", exit, json))?;
        Ok(exit)
    }
}

impl<'c> Chosen<'c> {
    fn of(
        context: &Context,
        container: &'c Container,
        jobs: Option<Vec<String>>,
    ) -> Result<Self, Failure> {
        Ok(Self {
            resolved: context.resolve_container(container)?,
            container: Some(container),
            jobs,
        })
    }
}

fn show(
    context: &Context,
    reports: &[ContainerReport],
    watches: &[WatchView],
    mut unread: Vec<String>,
) -> Result<Exit, Failure> {
    let shown = context.shown();
    let copies = reports.iter().flat_map(|report| &report.copies);
    unread.extend(copies.filter_map(|copy| copy.unread.clone()));
    // What can't be read may be a failure.
    let of_unread = (!unread.is_empty()).then_some(Exit::Failed);
    let exits = reports.iter().map(|report| report.exit(shown.now));
    let exit = worst(
        exits
            .chain(watches.iter().map(WatchView::exit))
            .chain(of_unread),
    );
    let containers: Vec<Value> = reports
        .iter()
        .map(|report| report.json(shown.now))
        .collect();
    let fields = json!({
        "at": shown.now,
        "containers": containers,
        "watches": watches.iter().map(WatchView::json).collect::<Vec<_>>(),
    });
    let json = result_json("status", exit, fields);
    let text = reports.iter().map(|report| report.text(&shown));
    let watches = watches.iter().map(|watch| watch.text(&shown));
    let text: Vec<String> = text.chain(watches).collect();
    context.output.listing(&text.join("\n"), &json)?;
    for problem in &unread {
        context.output.warning(problem);
    }
    for failure in reports.iter().filter_map(|report| report.status.failure()) {
        context.output.failure(&failure);
    }
    if let Some(warning) = context.config.no_channel() {
        context.output.warning(&warning.what);
    }
    Ok(exit)
}

/// Refuses options that a status ignores: a user who gives a key may think that it was tried.
fn refuse_what_opens(context: &Context) -> Result<(), Failure> {
    let global = &context.global;
    let given = [
        ("--key-file", global.key_file.is_some()),
        ("--passphrase-file", global.passphrase_file.is_some()),
        ("--passphrase-command", global.passphrase_command.is_some()),
        ("--fingerprint", global.fingerprint.is_some()),
    ];
    let Some((option, _)) = given.iter().find(|(_, given)| *given) else {
        return Ok(());
    };
    Err(Failure::usage(format!(
        "`sprat status` opens no container, so it can't use {option}"
    ))
    .with_hint(
        "nothing was done. Omit the option. `sprat key rehearse` tests a key and a fingerprint",
    ))
}
