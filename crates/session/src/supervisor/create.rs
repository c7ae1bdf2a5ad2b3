//! `sprat init`: makes a container that gets its name only when it is complete.

use crate::Failure;
use crate::interrupt::Interrupt;
use crate::protocol::messages::{CreateStart, WorkerOrder};
use crate::protocol::reports::{ContainerFacts, Created, Observer, Phase};
use crate::protocol::spawn::Role;
use crate::settings::{Access, CreateOptions};
use crate::supervisor::{Shape, Supervisor, Watch};

/// Shows the sheet of a new container; called at most once.
pub type Show<'s> = &'s mut dyn FnMut(&ContainerFacts) -> Result<(), Failure>;

/// No container was made, or it is unknown whether one was.
#[derive(Debug)]
pub struct NotCreated {
    /// Why.
    pub failure: Failure,
    /// The container may exist, and then the sheet that was shown is valid.
    pub may_be_made: bool,
}

impl From<Failure> for NotCreated {
    fn from(failure: Failure) -> Self {
        Self {
            failure,
            may_be_made: false,
        }
    }
}

/// Makes a container: file, header, key slots, file system. It gets its name only when it is complete and
/// durable, and never replaces a file. After a failure it is removed.
pub fn create(
    options: CreateOptions,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<Created, Failure> {
    create_and_show(options, None, observer, interrupt).map_err(|not| not.failure)
}

/// As [`create`]. Calls `show` before the container gets its name: there must be no container whose
/// recovery key was never shown. If `show` fails, nothing is made.
pub fn create_and_show(
    options: CreateOptions,
    show: Option<Show<'_>>,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<Created, NotCreated> {
    if options.secrets.is_empty() {
        return Err(Failure::usage("a container needs at least one key").into());
    }
    let mut watch = Watch::new(observer, interrupt);
    let slots = options.secrets.iter().map(|(_, kind)| *kind);
    let shape = Shape::Create(CreateStart {
        file_system: options.file_system,
        size_bytes: options.size_bytes,
        slots: slots.collect(),
        uuid: options.uuid.clone(),
        fast_kdf_for_tests: options.fast_kdf_for_tests,
    });
    let secrets: Vec<_> = options.secrets.iter().map(|(secret, _)| secret).collect();
    let mut settings = options.settings;
    settings.access = Access::ReadWrite;
    let (mut supervisor, facts) = Supervisor::start(&settings, shape, &secrets, &mut watch)?;
    let mut shown = false;
    let made = make_file_system(&mut supervisor, options.label, options.inodes, &mut watch)
        .and_then(|()| supervisor.detach(&mut watch))
        .and_then(|()| interrupt.check())
        .and_then(|()| match show {
            Some(show) => show(&facts).map(|()| shown = true),
            None => Ok(()),
        })
        .and_then(|()| supervisor.close(&mut watch));
    match made {
        Ok(report) => {
            supervisor.finish();
            Ok(Created {
                facts,
                sent_bytes: report.volume.written_bytes,
            })
        }
        Err(failure) => {
            let failure = supervisor.fail(failure);
            let naming = supervisor.aborted().made || supervisor.may_be_named();
            let state = if naming {
                let is = match supervisor.aborted().made {
                    true => "is",
                    false => "may be",
                };
                if shown {
                    format!(
                        "the container {is} complete. Keep the sheet that was shown: its key opens the \
                         container. If `sprat key list TARGET` reports that there is no container, \
                         discard that sheet and run `sprat init` again"
                    )
                } else {
                    format!(
                        "the container {is} complete, but no sheet was shown. Run `sprat key add TARGET \
                         --new-recovery`: it creates another recovery key and shows the sheet. If it \
                         reports that there is no container, run `sprat init` again"
                    )
                }
            } else {
                let left = if supervisor.aborted().removed {
                    "sprat removed the unfinished container from the server".to_owned()
                } else {
                    format!(
                        "a file {}.new-… may be left on the server; the next `sprat init` removes it",
                        settings.target.name
                    )
                };
                match shown {
                    true => {
                        format!("{left}. Discard the sheet that was shown: its key opens nothing")
                    }
                    false => left,
                }
            };
            let failure = match naming {
                // The failure's own advice to run the same command again is right only without a name.
                false => failure.with_state(&state),
                true => failure.with_hint(state),
            };
            Err(NotCreated {
                failure,
                may_be_made: naming,
            })
        }
    }
}

fn make_file_system(
    supervisor: &mut Supervisor,
    label: Option<String>,
    inodes: Option<u64>,
    watch: &mut Watch<'_>,
) -> Result<(), Failure> {
    supervisor.attach(Role::Worker, watch)?;
    watch.observer.phase(Phase::MakingFileSystem);
    let order = WorkerOrder::MakeFileSystem {
        file_system: supervisor.file_system,
        label,
        inodes,
    };
    supervisor.call(&order, watch)
}
