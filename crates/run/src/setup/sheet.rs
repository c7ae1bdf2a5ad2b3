//! The container, and the proof that a person has its recovery sheet.

use std::path::Path;

use sprat_luks::{RecoveryKey, Secret};
use sprat_session::address::Target;
use sprat_session::closed_container::ClosedContainer;
use sprat_session::state::history::History;
use sprat_session::state::key_notes::KeyKind;
use sprat_session::state::paths::StatePaths;
use sprat_session::state::{identity, missing};
use sprat_session::{Exit, Failure, IdentityPolicy, SshOptions, trusted_file};
use std::io::Read as _;

use super::answers::Plan;
use super::place::Place;
use super::progress::{self, Progress};
use super::server::Reached;
use super::{ContainerWish, Setup, TRIES};
use crate::recovery_sheet::SheetJob;

/// The groups of the recovery key that are asked for, counted from 1.
const GROUPS: [usize; 2] = [3, 7];

/// Whether this machine made a snapshot of the job in that container.
pub(super) fn has_snapshot(state_dir: &Path, target: &Target, job: &str) -> bool {
    let Ok(IdentityPolicy::Known(pins)) = identity::policy(state_dir, target, None) else {
        return false;
    };
    let history = History::load(&StatePaths::new(state_dir, &pins.uuid, target));
    let job = history.jobs.get(job);
    job.is_some_and(|job| job.last_snapshot.is_some())
}

impl Setup<'_> {
    /// Makes the container if there is none, and has its sheet confirmed.
    pub(super) fn container(
        &mut self,
        place: &Place,
        plan: &Plan,
        reached: Reached,
        progress: &mut Progress,
    ) -> Result<(), Failure> {
        let ssh = self.ssh_options(reached.command.clone());
        if reached.survey.has_container {
            drop(reached);
            return self.container_is_there(place, &ssh, progress);
        }
        let state_dir = &self.machine.state_dir;
        if let IdentityPolicy::Known(_) = identity::policy(state_dir, &place.target, None)? {
            return Err(missing::no_container(state_dir, &place.target));
        }
        self.check_plan(plan)?;
        let notes = progress.read();
        if notes.making {
            self.host.note("an earlier setup was interrupted while it made the container: a sheet that it showed opens nothing");
        }
        if let Some(sheet) = &self.request.sheet
            && progress::remove_void_sheet(&notes, sheet)
        {
            self.host.note(&format!(
                "removed the sheet {} of the interrupted setup",
                sheet.display()
            ));
        }
        progress.note(|notes| {
            notes.making = true;
            notes.sheet.clone_from(&self.request.sheet);
        });
        let command = reached.command.clone();
        drop(reached);
        let wish = ContainerWish {
            target: &place.target,
            ssh_command: &command,
            sheet: self.request.sheet.as_deref(),
            jobs: self.sheet_jobs(place, plan),
        };
        let recovery = self.host.make_container(wish)?;
        self.did_something = true;
        progress.note(|notes| {
            notes.making = false;
            notes.unconfirmed = !self.request.yes;
        });
        if !self.request.yes {
            self.confirm_groups(place, &ssh, &recovery)?;
            progress.note(|notes| notes.unconfirmed = false);
        }
        Ok(())
    }

    fn sheet_jobs(&self, place: &Place, plan: &Plan) -> Vec<SheetJob> {
        let mut jobs = SheetJob::of_container(&self.config, &place.name);
        jobs.extend(plan.job.iter().map(|(name, what, _)| {
            SheetJob {
                name: name.clone(),
                sources: what
                    .sources
                    .iter()
                    .map(|path| path.display().to_string())
                    .collect(),
            }
        }));
        jobs
    }

    fn container_is_there(
        &mut self,
        place: &Place,
        ssh: &SshOptions,
        progress: &mut Progress,
    ) -> Result<(), Failure> {
        let container = ClosedContainer::open(self.machine.state_dir.clone(), &place.target, ssh)?;
        let (header, _) = container.header(None)?;
        if let Some(secret) = self.own_key(place)? {
            header
                .unlock(&container.bytes(), &secret)
                .map_err(|error| {
                    Failure::from(error).with_more_hint(
                        "It may be another machine's. Name another container with --name",
                    )
                })?;
        }
        // It may have got its name just before the interruption.
        progress.note(|notes| notes.unconfirmed |= std::mem::take(&mut notes.making));
        if !progress.read().unconfirmed {
            return Ok(());
        }
        if !self.request.yes {
            self.confirm_key(&container, &header)?;
        }
        progress.note(|notes| notes.unconfirmed = false);
        Ok(())
    }

    /// The key file of this machine; `None`: the config names another kind of key.
    fn own_key(&self, place: &Place) -> Result<Option<Secret>, Failure> {
        let mut containers = self.config.containers.iter();
        let configured = containers.find(|one| place.configured && one.name == place.name);
        if configured
            .is_some_and(|one| one.passphrase_file.is_some() || one.passphrase_command.is_some())
        {
            return Ok(None);
        }
        let folder = self.machine.places.folder.clone().unwrap_or_default();
        let default = folder.join(format!("keys/{}.key", place.name));
        let path = configured
            .and_then(|one| one.key_file.clone())
            .unwrap_or(default);
        let mut bytes = Vec::new();
        let read = trusted_file::open(&path).and_then(|file| {
            // No key file is longer, and what is too long opens nothing.
            file.take(Secret::LEN_MAX as u64).read_to_end(&mut bytes)
        });
        read.map_err(|error| {
            Failure::failed(format!(
                "there is a container {} already, and this machine has no key for it",
                place.target
            ))
            .because(format!("{}: {error}", path.display()))
            .with_hint(
                "nothing was changed. Copy the key file back from your copy of it, or name \
                     another container with --name",
            )
        })?;
        Ok(Some(Secret::key_file(bytes)))
    }

    /// Asks for two groups of the key, which is known, and then proves that it opens the container.
    fn confirm_groups(
        &mut self,
        place: &Place,
        ssh: &SshOptions,
        recovery: &RecoveryKey,
    ) -> Result<(), Failure> {
        let groups: Vec<&str> = recovery.text().split('-').collect();
        let wanted: String = GROUPS.iter().map(|number| groups[number - 1]).collect();
        let prompt = format!(
            "Type groups {} and {} of the recovery key on the sheet: ",
            GROUPS[0], GROUPS[1]
        );
        for left in (0..TRIES).rev() {
            let typed = zeroize::Zeroizing::new(self.host.ask(&prompt)?);
            let mut typed = typed.chars().filter(char::is_ascii_alphanumeric);
            if typed
                .by_ref()
                .map(|c| c.to_ascii_lowercase())
                .eq(wanted.chars())
            {
                let container =
                    ClosedContainer::open(self.machine.state_dir.clone(), &place.target, ssh)?;
                let (header, _) = container.header(None)?;
                return prove(&container, &header, recovery);
            }
            if left > 0 {
                self.host
                    .show("that is not on the sheet: a group has four characters");
            }
        }
        Err(wrong_sheet())
    }

    /// After an interruption the key is no longer known: all of it is asked for.
    fn confirm_key(
        &mut self,
        container: &ClosedContainer,
        header: &sprat_luks::Header,
    ) -> Result<(), Failure> {
        self.host
            .show("the container is made, but its recovery sheet was not checked yet");
        for _ in 0..TRIES {
            let typed = self
                .host
                .ask_secret("Type the recovery key on the sheet: ")?;
            match RecoveryKey::parse(&typed) {
                Ok(recovery) => return prove(container, header, &recovery),
                Err(error) => self.host.show(&error.to_string()),
            }
        }
        Err(wrong_sheet())
    }
}

fn prove(
    container: &ClosedContainer,
    header: &sprat_luks::Header,
    recovery: &RecoveryKey,
) -> Result<(), Failure> {
    let slot = container.rehearse(header, &recovery.secret(), false, false)?;
    container.note_proof(header, slot, KeyKind::Recovery);
    Ok(())
}

fn wrong_sheet() -> Failure {
    Failure::new(
        Exit::WrongKey,
        "what was typed is not on the recovery sheet",
    )
    .with_hint(
        "the container is made, but nothing is backed up yet. Run the same command again with the \
         sheet at hand. If it is lost: `sprat key add TARGET --new-recovery` makes a new one",
    )
}
