//! `sprat mount` and `sprat umount`: a volume in the caller's namespace, served in the background.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime};

use sprat_attach::{
    AttachError, MountState, holders_of, mount_state, unmount_dead, unmount_only, volume_id,
};
use sprat_luks::Secret;

use crate::interrupt::Interrupt;
use crate::protocol::messages::{BackgroundMount, VolumeOrder, WorkerOrder};
use crate::protocol::reports::{ClosedReport, ContainerFacts, Observer, Phase};
use crate::protocol::spawn::Role;
use crate::settings::{Access, SessionSettings};
use crate::state::paths::StatePaths;
use crate::state::{KnownState, snapshots};
use crate::supervisor::background::{self, MountRecord, OpenRecord, record_path};
use crate::supervisor::{Shape, Supervisor, Watch};
use crate::{Exit, Failure, text};

/// How long `umount` waits for other users of the volume after the unmount.
const HOLDER_WAIT_MAX: Duration = Duration::from_secs(10);

/// Time between two checks for such users. A check reads a file of each process.
const HOLDER_INTERVAL: Duration = Duration::from_secs(1);

/// Mounts the volume at `dir` for all users. It stays mounted when the command ends. It is read-only unless
/// `settings.access` says otherwise. Then every fsync waits for the server's fsync.
pub fn mount(
    settings: &SessionSettings,
    secret: &Secret,
    dir: &Path,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<ContainerFacts, Failure> {
    let dir = mount_point(dir)?;
    let mut watch = Watch::new(observer, interrupt);
    let record = record_path(&settings.runtime_dir, &dir);
    let (mut supervisor, facts) =
        Supervisor::start(settings, Shape::Background, &[secret], &mut watch)?;
    supervisor.attach(Role::Keeper, &mut watch)?;
    let order = WorkerOrder::Mount {
        file_system: facts.file_system,
        at: OsString::from(&dir),
        read_only: settings.access == Access::ReadOnly,
        browse: true,
        grow: false,
        expected: supervisor.expected.clone(),
        remembered: supervisor.remembered.clone(),
    };
    supervisor.call::<()>(&order, &mut watch)?;
    supervisor.may_send();
    interrupt.check()?;
    let background = BackgroundMount {
        dir: OsString::from(&dir),
        record: OsString::from(&record),
    };
    background::write_record(
        &record,
        &MountRecord {
            dir: OsString::from(&dir),
            target: settings.target.to_string(),
            access: settings.access,
            since: SystemTime::now(),
            volume: volume_id(&dir)?,
            facts: Some(Box::new(facts.clone())),
        },
    )?;
    if settings.access == Access::ReadWrite {
        let paths = StatePaths::new(&settings.state_dir, &facts.uuid, &settings.target);
        KnownState::load(&paths).forget_newest(&paths)?;
        let noted = paths
            .forget_costs()
            .and_then(|()| snapshots::note_edited(&paths));
        noted.map_err(|error| {
            Failure::failed("can't note that files in snapshots may change").caused_by(&error)
        })?;
    }
    leave(&mut supervisor, background, &mut watch)?;
    supervisor.leave();
    Ok(facts)
}

/// Lets V run without this process. The keeper watches it.
fn leave(
    supervisor: &mut Supervisor,
    background: BackgroundMount,
    watch: &mut Watch<'_>,
) -> Result<(), Failure> {
    supervisor.call::<()>(&VolumeOrder::Detach(background.clone()), watch)?;
    let control = supervisor.volume().control()?;
    if let Some(keeper) = supervisor.worker() {
        sprat_attach::send_fd(keeper.descriptors(), control.as_fd())?;
    }
    supervisor.call(&WorkerOrder::Keep(background), watch)
}

fn mount_point(dir: &Path) -> Result<PathBuf, Failure> {
    let refused = |why: &str| Failure::usage(format!("can't mount at {}: {why}", dir.display()));
    match mount_state(dir) {
        Ok(MountState::Alive) => {
            return Err(refused("a container is mounted there already"));
        }
        Ok(MountState::Dead) => {
            return Err(refused("a mount of a dead session is there")
                .with_hint(format!("run `sprat umount {}` first", text::quoted(dir))));
        }
        _ => {}
    }
    let real = std::fs::canonicalize(dir).map_err(|error| refused(&error.to_string()))?;
    if !real.is_dir() {
        return Err(refused("it is not a folder"));
    }
    Ok(real)
}

/// Unmounts `dir` and waits until its volume process has ended; returns its result.
pub fn unmount(
    runtime_dir: &Path,
    dir: &Path,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<ClosedReport, Failure> {
    // A dead mount can't be read, so its path is used as it is.
    let dir = std::fs::canonicalize(dir)
        .or_else(|_| std::path::absolute(dir))
        .map_err(|error| Failure::usage(format!("{}: {error}", dir.display())))?;
    observer.phase(Phase::Unmounting);
    let volume = volume_id(&dir)?;
    let record = background::find(runtime_dir, &dir, volume.as_deref());
    if volume.is_none() && record.is_none() {
        let failure = Failure::failed(format!("no container is mounted at {}", dir.display()));
        let mounted = background::mounts(runtime_dir);
        return Err(if mounted.is_empty() {
            failure
        } else {
            let each = mounted.iter().map(|mount| {
                let dir = text::quoted(Path::new(&mount.dir));
                format!("{} at {dir}", mount.target)
            });
            let each: Vec<String> = each.collect();
            failure.with_hint(format!(
                "give the folder of the mount. Mounted: {}",
                each.join(", ")
            ))
        });
    }
    // If its process runs, the device is not read: a read could wait for a lost connection, and would
    // keep the device in use.
    let state = if record.as_ref().is_some_and(|record| !record.has_ended()) {
        MountState::Alive
    } else {
        mount_state(&dir)?
    };
    match state {
        MountState::Alive if volume.is_some() => {
            unmount_interruptibly(&dir, record.is_some(), interrupt)?;
        }
        MountState::Dead => unmount_dead(&dir)?,
        _ => {}
    }
    observer.phase(Phase::Syncing);
    let held = |record: &OpenRecord| record.record.volume.clone();
    let volume = volume.or_else(|| record.as_ref().and_then(held));
    let mut held_until = Instant::now() + HOLDER_WAIT_MAX;
    let mut checked_at = Instant::now();
    loop {
        if record.as_ref().is_some_and(OpenRecord::has_ended) {
            break;
        }
        if interrupt.requested() {
            return Err(goes_on(&dir));
        }
        std::thread::sleep(Duration::from_millis(50));
        // Without a record only the device shows whether the volume process can end.
        if record.is_some() && checked_at.elapsed() < HOLDER_INTERVAL {
            continue;
        }
        checked_at = Instant::now();
        let holders = volume.as_deref().map(holders_of).unwrap_or_default();
        if holders.is_empty() && record.is_none() {
            break;
        }
        if holders.is_empty() {
            held_until = Instant::now() + HOLDER_WAIT_MAX;
        } else if Instant::now() > held_until {
            return Err(still_held(&dir, &holders));
        }
    }
    match record {
        Some(record) => record.take_result(),
        None if state == MountState::Dead => Err(background::died()),
        None => Err(Failure::failed(format!(
            "{} is unmounted, but sprat does not know how its volume process ends: the record of the \
             process is missing",
            dir.display()
        ))
        .with_hint(
            "the process still sends data. Wait until no `sprat volume-process` runs for this \
             container, then run `sprat check`",
        )),
    }
}

fn still_held(dir: &Path, holders: &[String]) -> Failure {
    Failure::failed(format!(
        "{} is unmounted, but the volume is still in use: {}",
        dir.display(),
        holders.join(", ")
    ))
    .with_hint(format!(
        "the session continues: files that are written there still reach the server. Unmount the volume \
         there with `umount DIR` (in another mount namespace: `nsenter -t PID -m umount DIR`). Then run \
         `sprat umount {}` again for the result",
        text::quoted(dir)
    ))
}

/// The unmount waits until everything is written, also while the connection is down. After an
/// interrupt it goes on by itself. `may_be_gone`: another `umount` may have been faster.
fn unmount_interruptibly(
    dir: &Path,
    may_be_gone: bool,
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    let (done, result) = mpsc::channel();
    let unmounted = dir.to_owned();
    std::thread::Builder::new()
        .name("unmount".to_owned())
        .spawn(move || {
            let _ = done.send(unmount_only(&unmounted));
        })
        .map_err(|error| Failure::failed("can't start a thread").caused_by(&error))?;
    loop {
        match result.recv_timeout(Duration::from_millis(100)) {
            Ok(Err(AttachError::NotMounted { .. })) if may_be_gone => return Ok(()),
            Ok(unmounted) => return Ok(unmounted?),
            Err(RecvTimeoutError::Timeout) if interrupt.requested() => return Err(goes_on(dir)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Failure::failed("the unmount ended without a result"));
            }
        }
    }
}

fn goes_on(dir: &Path) -> Failure {
    Failure::new(Exit::Interrupted, "interrupted while unmounting").with_hint(format!(
        "the unmount continues in the background. Run `sprat umount {}` again: it waits for the end and \
         shows the result",
        text::quoted(dir)
    ))
}
