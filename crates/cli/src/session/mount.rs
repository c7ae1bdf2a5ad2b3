//! `sprat mount` and `sprat umount`: a volume in the caller's namespace, served in the background.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, SystemTime};

use sprat_attach::{AttachError, MountState, mount_state, unmount_at, unmount_dead};
use sprat_luks::Secret;

use super::background::{self, MountRecord, record_path};
use super::child::Role;
use super::crew::{Crew, Heard, OnInterrupt, Shape, Watch};
use super::options::{Access, ClosedReport, ContainerFacts, Observer, Phase, SessionOptions};
use super::protocol::{BackgroundMount, VolumeOrder, VolumeReply, WorkerOrder, WorkerReply};
use crate::interrupt::Interrupt;
use crate::{Exit, Failure};

/// Mounts the volume at `dir` for everybody; it stays when the command ends. Reads only, unless
/// `options.access` says otherwise; then every fsync waits for the server's.
#[expect(
    clippy::needless_pass_by_value,
    reason = "as in `Session::open`: the options are the session's"
)]
pub fn mount(
    options: SessionOptions,
    secret: &Secret,
    dir: &Path,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<ContainerFacts, Failure> {
    let dir = mount_point(dir)?;
    let mut watch = Watch {
        observer,
        interrupt,
    };
    let record = record_path(&options.runtime_dir, &dir);
    let (mut crew, facts) = Crew::start(&options, Shape::Background, &[secret], &mut watch)?;
    crew.attach(Role::Keeper, &mut watch)?;
    crew.order(&WorkerOrder::Mount {
        at: OsString::from(&dir),
        read_only: options.access == Access::ReadOnly,
        browse: true,
        grow: false,
    });
    let mounted = crew.wait_worker(&mut watch, OnInterrupt::Finish, |reply| {
        matches!(reply, WorkerReply::Mounted).then_some(())
    });
    if let Err(failure) = mounted {
        return Err(crew.fail(failure));
    }
    if interrupt.requested() {
        return Err(crew.fail(Failure::interrupted()));
    }
    let background = BackgroundMount {
        dir: OsString::from(&dir),
        record: OsString::from(&record),
    };
    let written = background::write_record(
        &record,
        &MountRecord {
            dir: OsString::from(&dir),
            target: options.target.to_string(),
            access: options.access,
            since: SystemTime::now(),
        },
    );
    if let Err(failure) = written {
        return Err(crew.fail(failure));
    }
    let left = leave(&mut crew, background, &mut watch);
    if let Err(failure) = left {
        return Err(crew.fail(failure));
    }
    crew.leave();
    Ok(facts)
}

/// V goes on by itself, watched by the keeper.
fn leave(
    crew: &mut Crew,
    background: BackgroundMount,
    watch: &mut Watch<'_>,
) -> Result<(), Failure> {
    crew.order_volume(&VolumeOrder::Detach(background.clone()));
    crew.wait(watch, OnInterrupt::Finish, |heard| {
        matches!(heard, Heard::Volume(VolumeReply::Detached)).then_some(())
    })?;
    let control = crew.volume().control()?;
    if let Some(keeper) = crew.worker() {
        sprat_attach::send_fd(keeper.descriptors(), control.as_fd())?;
    }
    crew.order(&WorkerOrder::Keep(background));
    crew.wait_worker(watch, OnInterrupt::Finish, |reply| {
        matches!(reply, WorkerReply::Kept).then_some(())
    })
}

fn mount_point(dir: &Path) -> Result<PathBuf, Failure> {
    let refused = |why: &str| Failure::usage(format!("can't mount at {}: {why}", dir.display()));
    match mount_state(dir) {
        Ok(MountState::Alive) => {
            return Err(refused("a container is mounted there already"));
        }
        Ok(MountState::Dead) => {
            return Err(refused("a dead mount is there")
                .with_hint(format!("run `sprat umount {}` first", dir.display())));
        }
        _ => {}
    }
    let real = std::fs::canonicalize(dir).map_err(|error| refused(&error.to_string()))?;
    if !real.is_dir() {
        return Err(refused("it is no folder"));
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
    // A dead mount can't be looked into, so its name is taken as it is.
    let dir = std::fs::canonicalize(dir)
        .or_else(|_| std::path::absolute(dir))
        .map_err(|error| Failure::usage(format!("{}: {error}", dir.display())))?;
    let record = record_path(runtime_dir, &dir);
    observer.phase(Phase::Unmounting);
    let known = background::read_record(&record).is_some();
    // Its process lives: asking the device would wait for a line that is away, and hold the device.
    let state = if known && !background::has_ended(&record) {
        MountState::Alive
    } else {
        mount_state(&dir)?
    };
    match state {
        MountState::Alive => match unmount_watching(&dir, interrupt)? {
            // It is ending already.
            Err(AttachError::NotMounted { .. }) if known => {}
            unmounted => unmounted?,
        },
        MountState::Dead => unmount_dead(&dir)?,
        _ if !known => {
            return Err(Failure::failed(format!(
                "no container is mounted at {}",
                dir.display()
            )));
        }
        _ => {}
    }
    observer.phase(Phase::Syncing);
    while !background::has_ended(&record) {
        if interrupt.requested() {
            return Err(goes_on(&dir));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    background::take_result(&record)
}

/// The unmount waits for everything to be written, for as long as a line is away; an interrupt
/// leaves it to itself.
fn unmount_watching(dir: &Path, interrupt: &Interrupt) -> Result<Result<(), AttachError>, Failure> {
    let (done, result) = mpsc::channel();
    let unmounted = dir.to_owned();
    std::thread::Builder::new()
        .name("unmount".to_owned())
        .spawn(move || {
            let _ = done.send(unmount_at(&unmounted));
        })
        .map_err(|error| Failure::failed("can't start a thread").caused_by(&error))?;
    loop {
        match result.recv_timeout(Duration::from_millis(100)) {
            Ok(unmounted) => return Ok(unmounted),
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
        "it goes on in the background; `sprat umount {}` again waits for its end and tells the \
         result",
        dir.display()
    ))
}
