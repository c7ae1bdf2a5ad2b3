//! V, the hidden `volume-process` command: connection, lease, key, volume, and the FUSE server.
//!
//! It never opens a file on the volume and has no mount of it.

mod cache;
mod crypt_device;
mod cut;
mod extend_file;
pub(crate) mod header;
mod identity_check;
mod knowledge;
mod late;
mod lease;
pub(crate) mod open;
pub(crate) mod reserve;
pub(crate) mod rewrite;
mod shutdown;
pub(crate) mod sleep;
pub(crate) mod space_monitor;
#[cfg(test)]
pub(crate) mod tests;
mod trim;
mod watch;

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, SystemTime};

use sprat_attach::{CryptMapping, ServeOptions, Serving};
use sprat_luks::{Secret, VolumeKey};
use sprat_store::{IgnorePoison, LockError};
use sprat_volume::{ClosedCache, Flush, Volume};

use crate::protocol::frames::{Receiver, Sender};
use crate::protocol::messages::{
    AbortReport, BackgroundMount, ChangeStart, VolumeOrder, VolumeReply, VolumeStart,
};
use crate::protocol::reports::{
    ClosedReport, ContainerFacts, Finished, Notice, Phase, VolumeStats,
};
use crate::protocol::spawn::{Role, leave_signals_to_the_session, take_sockets};
use crate::settings::Access;
use crate::supervisor::background;
use crate::volume_process::crypt_device::CryptDevice;
use crate::volume_process::header::create::NewContainer;
use crate::volume_process::knowledge::Knowledge;
use crate::volume_process::lease::ContainerLease;
use crate::volume_process::open::{Decryption, Opened};
use crate::volume_process::shutdown::{EventSender, StopFlag};
use crate::volume_process::watch::ConnectionReport;
use crate::{Exit, Failure};

/// Runs V. Its standard input is the control socket.
pub fn run() -> Exit {
    // As `top` and `ps -e` show it; otherwise they show "exe".
    let _ = rustix::thread::set_name(Role::Volume.title());
    // First, while there is one thread and no child: both inherit these settings. Each is best
    // effort; `sprat doctor` reports which of them this machine allows.
    let _ = sprat_attach::become_io_flusher();
    let _ = sprat_attach::hide_from_debuggers();
    let _ = sprat_attach::lock_memory();
    // The parent of a background mount's process does not make it a session leader.
    let _ = rustix::process::setsid();
    leave_signals_to_the_session();
    let Ok((control, descriptors)) = take_sockets() else {
        return Exit::Usage;
    };
    let Ok(sending) = control.try_clone() else {
        return Exit::Failed;
    };
    let events = EventSender(Sender::new(sending));
    match converse(Receiver::new(control), &descriptors, &events) {
        Ok(()) => Exit::Done,
        Err(failure) => {
            tracing::debug!(?failure, "volume process failed");
            let exit = failure.exit;
            events.reply(&VolumeReply::Failed(failure));
            exit
        }
    }
}

fn converse(
    mut receiver: Receiver,
    descriptors: &UnixStream,
    events: &EventSender,
) -> Result<(), Failure> {
    let broken = |error: std::io::Error| {
        Failure::failed("the volume process can't read its orders").caused_by(&error)
    };
    let Some(VolumeOrder::Start(start)) = receiver.receive().map_err(broken)? else {
        return Err(Failure::failed(
            "the volume process got no order to open a container",
        ));
    };
    let settings = &start.settings;
    let _span =
        tracing::info_span!("session", target = %settings.target, access = ?settings.access)
            .entered();
    let mut secrets = Vec::new();
    for _ in 0..start.secrets {
        let bytes = receiver.receive_secret().map_err(broken)?;
        let bytes = bytes.ok_or_else(Failure::interrupted)?;
        secrets.push(Secret::key_file(bytes.to_vec()));
    }
    let stop = Arc::new(StopFlag::default());
    let orders = hear_orders(receiver, &stop)?;
    if let Some(change) = &start.change {
        return change_header(&start, change, &secrets, &stop, events, &orders);
    }
    let opened = open_or_make(&start, secrets, &stop, events);
    match opened {
        Ok((opened, new_container)) => {
            space_monitor::watch(
                &start,
                opened.available_bytes,
                &opened.volume,
                &opened.lease,
                events,
            );
            let interval = start.settings.stats_interval;
            Served::new(&start, opened, new_container, stop, events.clone()).run(
                &orders,
                descriptors,
                interval,
            )
        }
        Err(failure) => {
            fail(failure, events, &orders);
            Ok(())
        }
    }
}

/// Reports why there is nothing to serve, and waits until the session process has read it.
fn fail(failure: Failure, events: &EventSender, orders: &mpsc::Receiver<VolumeOrder>) {
    events.reply(&VolumeReply::Failed(failure));
    wait_for_abort(orders);
    events.reply(&VolumeReply::Aborted(AbortReport::default()));
}

fn change_header(
    start: &VolumeStart,
    change: &ChangeStart,
    secrets: &[Secret],
    stop: &Arc<StopFlag>,
    events: &EventSender,
    orders: &mpsc::Receiver<VolumeOrder>,
) -> Result<(), Failure> {
    match header::edit::change(start, change, secrets, stop, events) {
        Ok(changed) => events.reply(&VolumeReply::Changed(Box::new(changed))),
        Err(failure) => fail(failure, events, orders),
    }
    Ok(())
}

fn open_or_make(
    start: &VolumeStart,
    mut secrets: Vec<Secret>,
    stop: &Arc<StopFlag>,
    events: &EventSender,
) -> Result<(Opened, Option<NewContainer>), Failure> {
    match &start.create {
        Some(create) => {
            let (opened, new_container) =
                header::create::make(start, create, secrets, stop, events)?;
            Ok((opened, Some(new_container)))
        }
        None => {
            let secret = secrets
                .pop()
                .ok_or_else(|| Failure::failed("no secret was given"))?;
            Ok((open::open(start, &secret, stop, events)?, None))
        }
    }
}

/// Reads orders on its own thread, so that an abort arrives while another thread is blocked. The
/// end of the socket means that the session is dead. Nothing may be sent for it any more, not even
/// buffered writes, so this process ends at once. The volume's epochs make that harmless.
fn hear_orders(
    mut receiver: Receiver,
    stop: &Arc<StopFlag>,
) -> Result<mpsc::Receiver<VolumeOrder>, Failure> {
    let (queue, orders) = mpsc::channel();
    let stop = Arc::clone(stop);
    std::thread::Builder::new()
        .name("orders".to_owned())
        .spawn(move || {
            while let Ok(Some(order)) = receiver.receive() {
                match order {
                    VolumeOrder::Abort => {
                        stop.request();
                        if !stop.cleanup_duty() {
                            end_at_once();
                        }
                    }
                    VolumeOrder::Detach(_) => {
                        let _ = queue.send(order);
                        return;
                    }
                    _ => {}
                }
                let _ = queue.send(order);
            }
            end_at_once();
        })
        .map_err(|error| Failure::failed("can't start a thread").caused_by(&error))?;
    Ok(orders)
}

/// Ends this process and with it every ssh that it started: each sees the end of its input.
fn end_at_once() {
    use rustix::process::{Signal, getpgrp, getpid, kill_current_process_group, kill_process};
    if getpgrp() == getpid() {
        let _ = kill_current_process_group(Signal::KILL);
    }
    let _ = kill_process(getpid(), Signal::KILL);
}

fn wait_for_abort(orders: &mpsc::Receiver<VolumeOrder>) {
    while let Ok(order) = orders.recv() {
        if matches!(order, VolumeOrder::Abort) {
            return;
        }
    }
}

/// An open container, and what is to be done with it.
struct Served {
    access: Access,
    reserve_bytes: u64,
    lease: Arc<ContainerLease>,
    volume: Arc<Volume>,
    device: Arc<CryptDevice>,
    /// For the kernel, until it is handed over.
    key: Option<VolumeKey>,
    volume_closed: bool,
    facts: ContainerFacts,
    knowledge: Knowledge,
    as_opened: identity_check::Opened,
    durable: bool,
    new_container: Option<NewContainer>,
    stop: Arc<StopFlag>,
    events: EventSender,
    connection: Arc<Mutex<ConnectionReport>>,
    serving: Option<Serving>,
}

impl Served {
    fn new(
        start: &VolumeStart,
        opened: Opened,
        new_container: Option<NewContainer>,
        stop: Arc<StopFlag>,
        events: EventSender,
    ) -> Self {
        let (cipher, key) = match opened.decryption {
            Decryption::InProcess(cipher) => (Some(cipher), None),
            Decryption::InKernel(key) => (None, Some(key)),
        };
        let device = Arc::new(CryptDevice::new(
            Arc::clone(&opened.volume),
            cipher,
            opened.flush,
            opened.facts.file_system,
        ));
        let connection = ConnectionReport::new(opened.lease.quiet_time());
        Self {
            access: start.settings.access,
            reserve_bytes: start.settings.reserve_bytes,
            lease: opened.lease,
            volume: opened.volume,
            knowledge: opened.knowledge,
            volume_closed: false,
            device,
            key,
            as_opened: identity_check::Opened {
                target: start.settings.target.clone(),
                inode: identity_check::Inode::of(&start.settings.target),
                file_bytes: opened.facts.file_bytes,
            },
            facts: opened.facts,
            durable: opened.durable,
            new_container,
            stop,
            events,
            connection: Arc::new(Mutex::new(connection)),
            serving: None,
        }
    }

    /// Carries out orders until one says close or abort.
    fn run(
        mut self,
        orders: &mpsc::Receiver<VolumeOrder>,
        descriptors: &UnixStream,
        stats_interval: Duration,
    ) -> Result<(), Failure> {
        // A request that arrived before also comes as an order.
        let _ = self.stop.begin_cleanup_duty();
        self.events.reply(&VolumeReply::Ready(self.facts.clone()));
        watch::watch(
            &self.volume,
            &self.lease,
            &self.connection,
            &self.events,
            stats_interval,
        )?;
        while let Ok(order) = orders.recv() {
            let reply = match order {
                VolumeOrder::Start(_) | VolumeOrder::MakeReserve => continue,
                VolumeOrder::Serve => self.serve(descriptors).map(|()| VolumeReply::Done),
                VolumeOrder::GiveKey => self.give_key(descriptors).map(VolumeReply::KeyGiven),
                VolumeOrder::Collect => self.collect().map(|()| VolumeReply::Done),
                VolumeOrder::Trim(how) => {
                    let done = self.trim(how);
                    done.map(|done| VolumeReply::Trimmed(Box::new(done)))
                }
                VolumeOrder::Cut { file_bytes } => self.cut(file_bytes).map(|()| VolumeReply::Done),
                VolumeOrder::Detach(mount) => return self.run_detached(&mount),
                VolumeOrder::Close(finished) => match self.close(finished) {
                    Ok((report, reserve_missing)) => {
                        self.events
                            .reply(&VolumeReply::Closed(report, reserve_missing));
                        if reserve_missing && matches!(orders.recv(), Ok(VolumeOrder::MakeReserve))
                        {
                            reserve::make_if_missing(self.reserve_bytes, &self.lease);
                            self.events.reply(&VolumeReply::Done);
                        }
                        return Ok(());
                    }
                    Err(failure) => Err(failure),
                },
                VolumeOrder::MaySend { gone } => {
                    self.knowledge.has_searched(gone);
                    self.volume.may_send();
                    continue;
                }
                VolumeOrder::Abort => {
                    let report = self.give_up();
                    self.events.reply(&VolumeReply::Aborted(report));
                    return Ok(());
                }
            };
            let reply = reply.unwrap_or_else(VolumeReply::Failed);
            self.events.reply(&reply);
        }
        Ok(())
    }

    fn serve(&mut self, descriptors: &UnixStream) -> Result<(), Failure> {
        let fuse = sprat_attach::receive_fd(descriptors)?;
        let device = Arc::clone(&self.device);
        self.serving = Some(sprat_attach::serve(fuse, device, &ServeOptions::default())?);
        Ok(())
    }

    /// Hands the volume key to the process that maps the device, through a pipe. A pipe's memory is
    /// never swapped out, and ends with the pipe. This process drops the key.
    fn give_key(&mut self, descriptors: &UnixStream) -> Result<CryptMapping, Failure> {
        let failed = |error: std::io::Error| {
            Failure::failed("can't hand over the volume key").caused_by(&error)
        };
        let key = self.key.take();
        let key = key.ok_or_else(|| Failure::failed("there is no volume key to hand over"))?;
        let (given, mut giving) = std::io::pipe().map_err(failed)?;
        giving.write_all(key.expose()).map_err(failed)?;
        drop(giving);
        sprat_attach::send_fd(descriptors, given.as_fd())?;
        let pins = &self.facts.pins;
        Ok(CryptMapping {
            uuid: pins.uuid.clone(),
            cipher: pins.cipher.clone(),
            sector_bytes: pins.sector_bytes,
            iv_tweak: pins.iv_tweak,
        })
    }

    /// Everything above is closed. Sends the rest, waits for the server's fsync, releases the
    /// lease. Also returns whether the reserve beside the container is missing.
    fn close(&mut self, finished: Option<Finished>) -> Result<(ClosedReport, bool), Failure> {
        if let Some(serving) = self.serving.take() {
            serving.wait()?;
        }
        self.events.phase(Phase::Syncing);
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        if self.access == Access::ReadOnly {
            self.lease.was_undisturbed()?;
        }
        // A rewrite measures by the server's free space what it has freed.
        let keeps_reserve =
            self.access == Access::ReadWrite && self.reserve_bytes > 0 && !self.volume_closed;
        // This adds a question while the session waits for the connection anyway.
        let asked = keeps_reserve.then(|| {
            let (bytes, lease) = (self.reserve_bytes, Arc::clone(&self.lease));
            std::thread::spawn(move || reserve::is_there(bytes, &lease))
        });
        let prepared = (self.access == Access::ReadWrite).then(|| {
            let lease = Arc::clone(&self.lease);
            std::thread::spawn(move || lease.prepare_release())
        });
        // A rewrite has put another file there itself, and a new container has no name yet.
        let identity = (self.access == Access::ReadWrite
            && !self.volume_closed
            && self.new_container.is_none())
        .then(|| {
            let (opened, lease) = (self.as_opened.clone(), Arc::clone(&self.lease));
            std::thread::spawn(move || identity_check::check(&opened, &lease))
        });
        let cache = self.close_volume()?;
        if let Some(Ok(found)) = identity.map(std::thread::JoinHandle::join) {
            found?;
        }
        if let Some(new_container) = &self.new_container {
            new_container.publish(&self.lease, &self.stop, &self.events)?;
        }
        let reserve_missing = asked.is_some_and(|asked| !asked.join().unwrap_or(false));
        let noted = self.note_end(finished);
        self.lease.leave_written_list(&self.events);
        if let Some(prepared) = prepared {
            let _ = prepared.join();
        }
        self.release()?;
        // A session that acquired the lease before may have written what the cache has in an older state.
        if let Some(cache) = cache.filter(|_| self.lease.was_released_alone()) {
            cache.keep();
        }
        noted?;
        let mut volume = figures(&self.volume);
        volume.written_bytes += self
            .new_container
            .as_ref()
            .map_or(0, |new_container| new_container.header_bytes);
        let report = ClosedReport {
            volume,
            durable: self.durable,
            differing_blocks: self.volume.differing_blocks(),
            // The session knows it: it has unmounted the file system.
            room: None,
        };
        Ok((report, reserve_missing))
    }

    /// Records the state in which the session leaves the container.
    fn note_end(&mut self, finished: Option<Finished>) -> Result<(), Failure> {
        if self.access == Access::ReadOnly {
            if self.volume.differing_blocks() == 0 {
                self.knowledge.end_reading(&self.events);
            }
            return Ok(());
        }
        let kind = self.facts.file_system;
        let stamp_block = self.device.stamp_block().map(|block| (kind, block));
        let file_bytes = self.facts.file_bytes;
        self.knowledge
            .end_writing(stamp_block, file_bytes, finished, &self.events)
    }

    /// Closes the volume once. A rewrite of the container has closed it before.
    fn close_volume(&mut self) -> Result<Option<ClosedCache>, Failure> {
        if std::mem::replace(&mut self.volume_closed, true) {
            return Ok(None);
        }
        let closed = self.volume.close_without_cache();
        // A loss at the end, which the watching thread may have missed.
        let mut connection = self.connection.lock().ignore_poison();
        connection.report(&self.volume, &self.events);
        closed.map_err(|error| self.lease.lost().unwrap_or_else(|| Failure::from(&error)))
    }

    fn failure(&self) -> Option<Failure> {
        failure_of(&self.volume, &self.lease)
    }

    /// Releases the lease. Everything is durable by now. It is a success only after a check that no
    /// other session came between the last check and the end: that one may have written over it.
    fn release(&self) -> Result<(), Failure> {
        match self.lease.release() {
            Ok(true) => {
                if let Some(reason) = self.lease.left_locked() {
                    self.events.notice(Notice::LockLeft { reason });
                }
                Ok(())
            }
            // Found after the last bytes were sent: another session may have written over them.
            Ok(false) => self.lease.lost().map_or(Ok(()), Err),
            Err(error @ LockError::Store { .. }) => Err(lease::reading::not_known(
                &error,
                "everything is \
                on the server's disk. If another machine took the container over just now, it may \
                have written over a part. The lock stays, and the next run on this machine takes it \
                over. Run the same command again",
            )),
            Err(error) => Err(Failure::from(&error)),
        }
    }

    /// Sends nothing more. The lease stays if writes are unresolved: the next session on this host
    /// takes it over and recovers them.
    fn give_up(&mut self) -> AbortReport {
        self.stop.request();
        let mut report = AbortReport::default();
        if let Some(new_container) = &self.new_container {
            report.lock_released = header::create::undo(&self.lease).is_ok();
            // A lost connection gets no further question.
            if report.lock_released {
                let named = new_container.is_named(&self.lease);
                report.made = named == Some(true);
                report.removed = named == Some(false);
            }
        } else if self.access == Access::ReadWrite {
            report.lock_released = self.lease.give_up(&self.events);
        }
        report
    }

    /// Runs on without the session until everything above is unmounted.
    fn run_detached(mut self, mount: &BackgroundMount) -> Result<(), Failure> {
        let record = match background::hold_record(mount) {
            Ok(record) => record,
            Err(failure) => {
                self.events.reply(&VolumeReply::Failed(failure.clone()));
                return Err(failure);
            }
        };
        background::leave_terminal();
        if self.access == Access::ReadOnly {
            // The volume is mounted, so its journal is replayed.
            self.device.refuse_writes();
        }
        self.events.reply(&VolumeReply::Done);
        // The reserve is left to the next session. Nobody could stop the work here, and it would
        // keep the container from that session.
        let result = self.close(None).map(|(report, _)| report);
        if result.is_err() {
            self.give_up();
        }
        background::report(&record, &result);
        Ok(())
    }
}

fn failure_of(volume: &Volume, lease: &ContainerLease) -> Option<Failure> {
    let failed = volume.failure()?;
    // Why the lease was lost says more than that the volume was stopped because of it.
    Some(lease.lost().unwrap_or_else(|| Failure::from(&*failed)))
}

fn figures(volume: &Volume) -> VolumeStats {
    let stats = volume.stats();
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    VolumeStats {
        read_bytes: stats.wire_read_bytes,
        written_bytes: stats.wire_written_bytes,
        read_requests: stats.wire_read_requests,
        write_requests: stats.wire_write_requests,
        dirty_bytes: stats.dirty_bytes,
        unsynced_bytes: stats.unsynced_bytes,
        losses: stats.losses,
        reconnecting_ms: stats
            .reconnecting_since
            .map(|since| millis(SystemTime::now().duration_since(since).unwrap_or_default())),
        round_trip_us: stats
            .round_trip
            .map(|trip| u64::try_from(trip.as_micros()).unwrap_or(u64::MAX)),
    }
}

/// The kind of flush with which this session answers.
fn flush_kind(start: &VolumeStart) -> Flush {
    if start.durable_flush {
        Flush::Durable
    } else {
        Flush::Ordered
    }
}
