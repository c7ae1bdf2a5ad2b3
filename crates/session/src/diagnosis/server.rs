//! Checks a container and its server without a key.

use std::path::Path;

use sprat_luks::Copies;
use sprat_store::{Access, FileStat, Store, StoreError, lock};

use super::finding::{Finding, State};
use crate::address::{Location, Target};
use crate::state::history::History;
use crate::state::paths::StatePaths;
use crate::state::{identity, missing, reserved_names};
use crate::volume_process::reserve::{FREE_TIMES, name as reserve_name};
use crate::volume_process::space_monitor::LOW_BYTES;
use crate::{Failure, IdentityPolicy, SshOptions, connect, generations, text};

/// What is checked.
#[derive(Debug, Clone, Copy)]
pub struct ServerCheck<'c> {
    /// The container's name.
    pub name: &'c str,
    /// Its location.
    pub target: &'c Target,
    /// How its server is reached.
    pub ssh: &'c SshOptions,
    /// The state folder of this machine.
    pub state_dir: &'c Path,
    /// The fingerprint that the container must have.
    pub fingerprint: Option<&'c str>,
    /// Writing without fsync is allowed.
    pub allow_no_fsync: bool,
    /// Most connections of one session.
    pub connections: usize,
    /// Size of the reserve.
    pub reserve_bytes: u64,
}

/// Checks a container and its server, as far as that is possible without a key.
#[must_use]
pub fn server(checked: &ServerCheck<'_>) -> Vec<Finding> {
    let name = checked.name;
    let store = match connect::connect(checked.target, checked.ssh) {
        Ok(store) => store,
        Err(error) => {
            let what = format!("{name}: server");
            return vec![Finding::failed(what, &Failure::from(error))];
        }
    };
    let what = format!("{name}: server");
    let mut findings = vec![Finding::new(what, State::Fine, store.describe())];
    let second = connect::zfs_snapshots(checked.target, checked.ssh);
    findings.extend(connections(checked, second.as_ref().err()));
    findings.extend(
        second
            .ok()
            .flatten()
            .map(|folder| server_snapshots(name, &folder)),
    );
    findings.extend(past_states(name, checked, &*store));
    findings.push(fsync(name, checked, &*store));
    findings.extend(removal(name, checked, &*store));
    let stat = store.stat(&checked.target.name).ok();
    findings.push(space(name, stat.as_ref(), &*store));
    if stat.is_some() {
        findings.extend(reserve(checked, &*store));
    }
    findings.extend(volume(checked));
    findings.push(lock_state(name, checked, &*store));
    findings.push(container(checked, &*store));
    findings
}

/// What the last session of this machine saw free in the volume.
fn volume(checked: &ServerCheck<'_>) -> Option<Finding> {
    let policy = identity::policy(checked.state_dir, checked.target, None).ok()?;
    let IdentityPolicy::Known(pins) = policy else {
        return None;
    };
    let seen = History::load(&StatePaths::new(
        checked.state_dir,
        &pins.uuid,
        checked.target,
    ))
    .room?;
    let room = seen.room;
    let what = format!("{}: volume", checked.name);
    let detail = format!(
        "{} were free at the end of the last session",
        room.free_text()
    );
    let state = match room.is_full() {
        true => State::Missing,
        false if room.is_low() => State::Weak,
        false => return Some(Finding::new(what, State::Fine, detail)),
    };
    Some(Finding::new(what, state, detail).hint("`sprat prune` removes snapshots; `sprat grow`"))
}

/// How many connections a session may have; a local folder has none.
fn connections(checked: &ServerCheck<'_>, second: Option<&StoreError>) -> Option<Finding> {
    if !matches!(checked.target.location, Location::Ssh(_)) {
        return None;
    }
    let what = format!("{}: connections", checked.name);
    if let Some(error) = second.filter(|_| checked.connections > 1) {
        let detail = format!("the server refuses a second connection: {error}");
        let hint = "put connections = 1 into the container's table of the config";
        return Some(Finding::new(what, State::Weak, detail).hint(hint));
    }
    let detail = match checked.connections {
        1 => "1".to_owned(),
        most => format!("1; up to {most} when there is much data to send or read"),
    };
    Some(Finding::new(what, State::Fine, detail))
}

/// Older states of the container, which nobody can change who has only the account's login.
fn server_snapshots(name: &str, folder: &str) -> Finding {
    let what = format!("{name}: snapshots of the server");
    let detail = format!("in {folder}: `sprat restore` reads the container there, too");
    Finding::new(what, State::Fine, detail)
}

/// The past states that an agent on the server keeps.
fn past_states(name: &str, checked: &ServerCheck<'_>, store: &dyn Store) -> Option<Finding> {
    let what = format!("{name}: past states");
    match store.past_states(&checked.target.name) {
        Ok(None) => None,
        Ok(Some(states)) => Some(Finding::new(
            what,
            State::Fine,
            generations::kept_in_words(&states),
        )),
        Err(error) => Some(Finding::failed(what, &Failure::from(error))),
    }
}

fn fsync(name: &str, checked: &ServerCheck<'_>, store: &dyn Store) -> Finding {
    let what = format!("{name}: fsync");
    if store.capabilities().durable_flush {
        return Finding::new(what, State::Fine, "writes can be made durable");
    }
    let state = if checked.allow_no_fsync {
        State::Weak
    } else {
        State::Missing
    };
    Finding::new(what, state, "the server can't make writes durable").hint(
        "use an OpenSSH server (fsync@openssh.com). With --allow-no-fsync sprat writes anyway, but a \
         crash of the server can destroy the container",
    )
}

/// An account that may not remove files; one that may is not worth a line.
fn removal(name: &str, checked: &ServerCheck<'_>, store: &dyn Store) -> Option<Finding> {
    if !reserved_names::may_not_remove(store, &checked.target.name) {
        return None;
    }
    let finding = Finding::new(
        format!("{name}: removal"),
        State::Weak,
        "this account may not remove files",
    );
    Some(finding.hint(reserved_names::WITHOUT_REMOVING))
}

fn space(name: &str, container: Option<&FileStat>, store: &dyn Store) -> Finding {
    let what = format!("{name}: space");
    match store.free_space() {
        Ok(space) if space.read_only => {
            Finding::new(what, State::Weak, "the server's file system is read-only")
                .hint("`restore` and `mount` work; `backup` does not")
        }
        Ok(space) => {
            let mut detail = format!(
                "{} of {} free",
                text::bytes(space.available_bytes),
                text::bytes(space.total_bytes)
            );
            // SFTP tells a file's length only, which is what it may become.
            if let Some(container) = container {
                let limit = text::bytes(container.len);
                detail.push_str(&match container.allocated_bytes {
                    Some(taken) => {
                        format!("; the container takes {} of {limit}", text::bytes(taken))
                    }
                    None => format!("; the container can grow to {limit}"),
                });
            }
            if space.available_bytes < LOW_BYTES {
                return Finding::new(what, State::Weak, detail)
                    .hint("free space on the server, or run `sprat prune` and `sprat trim`");
            }
            Finding::new(what, State::Fine, detail)
        }
        Err(StoreError::Unsupported { .. }) => Finding::new(
            what,
            State::Weak,
            "the server doesn't report its free space (no statvfs@openssh.com)",
        )
        .hint(
            "sprat can't warn before the disk is full: monitor the free space on the server in \
               another way",
        ),
        Err(error) => Finding::failed(what, &Failure::from(error)),
    }
}

/// The file beside the container that pruning gives up on a full disk. Before there is a container there
/// is nothing to keep room for.
fn reserve(checked: &ServerCheck<'_>, store: &dyn Store) -> Option<Finding> {
    let wanted_bytes = checked.reserve_bytes;
    let container = &checked.target.name;
    if wanted_bytes == 0 {
        return None;
    }
    let what = format!("{}: reserve", checked.name);
    let found = reserve_name(container).and_then(|name| match store.stat(&name) {
        Ok(stat) => Ok(Some(stat.len)),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(Failure::from(error)),
    });
    let size = text::bytes(wanted_bytes);
    let missing = match found {
        Err(failure) => return Some(Finding::failed(what, &failure)),
        Ok(Some(len)) if len >= wanted_bytes => {
            let detail = format!("{size} are reserved, so that `sprat prune` works on a full disk");
            return Some(Finding::new(what, State::Fine, detail));
        }
        Ok(Some(len)) => format!("only {} of {size} are reserved", text::bytes(len)),
        Ok(None) => "missing: on a full disk even `sprat prune` may not work".to_owned(),
    };
    Some(Finding::new(what, State::Weak, missing).hint(format!(
        "the next backup creates it at the end, if {} are free on the server",
        text::bytes(wanted_bytes.saturating_mul(FREE_TIMES))
    )))
}

fn lock_state(name: &str, checked: &ServerCheck<'_>, store: &dyn Store) -> Finding {
    let what = format!("{name}: lock");
    match lock::inspect(store, &checked.target.name, None).map(|found| found.held) {
        Ok(None) => Finding::new(what, State::Fine, "not locked"),
        Ok(Some(info)) => Finding::new(what, State::Weak, format!("locked by {}", info.file)).hint(
            "either a backup is running, or it died. If it died on this machine, the next run takes \
             over; if it died elsewhere, run `sprat unlock`",
        ),
        Err(error) => Finding::failed(what, &Failure::from(&error)),
    }
}

/// The container's header, as far as it can be judged without a key.
fn container(checked: &ServerCheck<'_>, store: &dyn Store) -> Finding {
    let what = format!("{}: container", checked.name);
    let file = match store.open(&checked.target.name, Access::ReadOnly) {
        Ok(file) => file,
        Err(StoreError::NotFound { .. }) => {
            let hint = missing::hint(checked.state_dir, checked.target);
            return Finding::new(what, State::Missing, "not there").hint(hint);
        }
        Err(error) => return Finding::failed(what, &Failure::from(error)),
    };
    let judged = (|| {
        let (header, kernel_only) = connect::any_header(&*file, checked.state_dir, checked.target)?;
        let fingerprint = checked.fingerprint;
        let known = match identity::policy(checked.state_dir, checked.target, fingerprint)? {
            IdentityPolicy::Known(pins) => {
                header.check_pins(&pins)?;
                "known to this machine"
            }
            IdentityPolicy::Expect(typed) => {
                header.check_fingerprint(&typed)?;
                "equal to the given fingerprint"
            }
            IdentityPolicy::TrustOnce => "not yet known to this machine",
        };
        Ok::<_, Failure>((header, known, kernel_only))
    })();
    match judged {
        Err(failure) => Finding::failed(what, &failure),
        Ok((header, known, kernel_only)) => {
            let pins = header.pins();
            let kind = if header.copies().is_some() {
                "LUKS2"
            } else {
                "LUKS1"
            };
            let detail = format!(
                "{kind}, UUID {}, fingerprint {}, {known}",
                pins.uuid,
                pins.fingerprint()
            );
            if let Some(why) = kernel_only {
                return Finding::new(what, State::Weak, format!("{detail}; {why}")).hint(
                    "use this container on a machine where the line \"dm-crypt\" above shows kernel \
                     mode, without --mode user",
                );
            }
            if header.copies().is_none_or(Copies::both_good) {
                return Finding::new(what, State::Fine, detail);
            }
            Finding::new(
                what,
                State::Weak,
                format!("{detail}; one header copy is damaged"),
            )
            .hint("the data is complete. To repair the header, run `sprat key header-restore`")
        }
    }
}
