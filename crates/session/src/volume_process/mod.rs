//! V, the hidden `volume-process` command: connection, lock, key, volume, and the FUSE server.
//!
//! It never touches a file on the volume, and holds no mount of it.

mod cache;
pub(crate) mod connection;
mod crypt_device;
mod extend_file;
pub(crate) mod header;
mod identity_check;
mod knowledge;
mod late;
mod lease;
pub(crate) mod open;
pub(crate) mod ranges;
pub(crate) mod reserve;
pub(crate) mod rewrite;
mod shutdown;
pub(crate) mod sleep;
pub(crate) mod space_monitor;
#[cfg(test)]
pub(crate) mod tests;
mod trim;

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant, SystemTime};

use sprat_attach::{ServeOptions, Serving};
use sprat_luks::{Secret, VolumeKey};
use sprat_store::LockError;
use sprat_volume::{Flush, Volume};

use crate::protocol::frames::{Receiver, Sender};
use crate::protocol::messages::{
    AbortReport, BackgroundMount, ChangeStart, Mapping, VolumeOrder, VolumeReply, VolumeStart,
};
use crate::protocol::spawn::{leave_signals_to_the_session, take_sockets};
use crate::settings::{Access, ClosedReport, ContainerFacts, Notice, Phase, VolumeStats};
use crate::supervisor::background;
use crate::volume_process::crypt_device::CryptDevice;
use crate::volume_process::header::create::Making;
use crate::volume_process::knowledge::Knowledge;
use crate::volume_process::lease::ContainerLease;
use crate::volume_process::open::{Edge, Opened};
use crate::volume_process::shutdown::{EventSender, StopFlag};
use crate::{Exit, Failure};

/// How often a failure below is looked for.
const FAILURE_INTERVAL: Duration = Duration::from_millis(50);

/// Runs V; its standard input is the control socket.
pub fn run() -> Exit {
    // First, while there is one thread and no child: both inherit it. Each is best effort;
    // `sprat doctor` tells which of them this machine allows.
    let _ = sprat_attach::become_io_flusher();
    let _ = sprat_attach::hide_from_debuggers();
    let _ = sprat_attach::lock_memory();
    // A background mount's process is not made a session's leader by its parent.
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
            "the volume process was not told what to open",
        ));
    };
    let _span =
        tracing::info_span!("session", target = %start.target, access = ?start.access).entered();
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
        Ok((opened, making)) => {
            space_monitor::watch(
                &start,
                opened.available_bytes,
                &opened.volume,
                &opened.lease,
                events,
            );
            let interval = Duration::from_millis(start.stats_interval_ms);
            Served::new(&start, opened, making, stop, events.clone()).run(
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

/// Tells why there is nothing to serve, and waits until that was heard.
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
) -> Result<(Opened, Option<Making>), Failure> {
    match &start.create {
        Some(create) => {
            let (opened, making) = header::create::make(start, create, secrets, stop, events)?;
            Ok((opened, Some(making)))
        }
        None => {
            let secret = secrets
                .pop()
                .ok_or_else(|| Failure::failed("no secret was given"))?;
            Ok((open::open(start, &secret, stop, events)?, None))
        }
    }
}

/// Reads orders on a thread of its own, so that an abort is heard whatever else blocks. The end
/// of the socket means that the session is dead: nothing may be sent for it any more, not even
/// what is buffered, so this process ends on the spot. The volume's epochs make that harmless.
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
                        if !stop.holding() {
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

/// Ends this process, and with it every ssh that it started: their shells see it end.
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

/// A container that is open, and what is to be done with it.
struct Served {
    access: Access,
    reserve_bytes: u64,
    lease: Arc<ContainerLease>,
    volume: Arc<Volume>,
    device: Arc<CryptDevice>,
    /// For the kernel, until it is given away.
    key: Option<VolumeKey>,
    volume_closed: bool,
    facts: ContainerFacts,
    knowledge: Knowledge,
    as_opened: identity_check::Opened,
    durable: bool,
    making: Option<Making>,
    stop: Arc<StopFlag>,
    events: EventSender,
    serving: Option<Serving>,
}

impl Served {
    fn new(
        start: &VolumeStart,
        opened: Opened,
        making: Option<Making>,
        stop: Arc<StopFlag>,
        events: EventSender,
    ) -> Self {
        let (cipher, key) = match opened.edge {
            Edge::Sprat(cipher) => (Some(cipher), None),
            Edge::Kernel(key) => (None, Some(key)),
        };
        let device = Arc::new(CryptDevice::new(
            Arc::clone(&opened.volume),
            cipher,
            opened.flush,
        ));
        Self {
            access: start.access,
            reserve_bytes: start.reserve_bytes,
            lease: opened.lease,
            volume: opened.volume,
            knowledge: opened.knowledge,
            volume_closed: false,
            device,
            key,
            as_opened: identity_check::Opened {
                target: start.target.clone(),
                inode: identity_check::Inode::of(&start.target),
                file_bytes: opened.facts.file_bytes,
            },
            facts: opened.facts,
            durable: opened.durable,
            making,
            stop,
            events,
            serving: None,
        }
    }

    /// Does what it is told until it is told to close or abort.
    fn run(
        mut self,
        orders: &mpsc::Receiver<VolumeOrder>,
        descriptors: &UnixStream,
        stats_interval: Duration,
    ) -> Result<(), Failure> {
        // A request that came already arrives as an order, too.
        let _ = self.stop.begin_holding();
        self.events.reply(&VolumeReply::Ready(self.facts.clone()));
        watch(&self.volume, &self.lease, &self.events, stats_interval)?;
        while let Ok(order) = orders.recv() {
            match order {
                VolumeOrder::Start(_) | VolumeOrder::MakeReserve => {}
                VolumeOrder::Serve => match self.serve(descriptors) {
                    Ok(()) => self.events.reply(&VolumeReply::Serving),
                    Err(failure) => self.events.reply(&VolumeReply::Failed(failure)),
                },
                VolumeOrder::GiveKey => match self.give_key(descriptors) {
                    Ok(mapping) => self.events.reply(&VolumeReply::KeyGiven(mapping)),
                    Err(failure) => self.events.reply(&VolumeReply::Failed(failure)),
                },
                VolumeOrder::Collect => match self.collect() {
                    Ok(()) => self.events.reply(&VolumeReply::Collecting),
                    Err(failure) => self.events.reply(&VolumeReply::Failed(failure)),
                },
                VolumeOrder::Trim(how) => match self.trim(how) {
                    Ok(done) => self.events.reply(&VolumeReply::Trimmed(Box::new(done))),
                    Err(failure) => self.events.reply(&VolumeReply::Failed(failure)),
                },
                VolumeOrder::Detach(mount) => return self.run_detached(&mount),
                VolumeOrder::Close(newest) => match self.close(newest) {
                    Ok((report, reserve_missing)) => {
                        self.events
                            .reply(&VolumeReply::Closed(report, reserve_missing));
                        if reserve_missing && matches!(orders.recv(), Ok(VolumeOrder::MakeReserve))
                        {
                            reserve::make_if_missing(self.reserve_bytes, &self.lease);
                            self.events.reply(&VolumeReply::ReserveMade);
                        }
                        return Ok(());
                    }
                    Err(failure) => self.events.reply(&VolumeReply::Failed(failure)),
                },
                VolumeOrder::MaySend => self.volume.may_send(),
                VolumeOrder::Abort => {
                    let report = self.give_up();
                    self.events.reply(&VolumeReply::Aborted(report));
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn serve(&mut self, descriptors: &UnixStream) -> Result<(), Failure> {
        let fuse = sprat_attach::receive_fd(descriptors)?;
        let device = Arc::clone(&self.device);
        self.serving = Some(sprat_attach::serve(fuse, device, &ServeOptions::default())?);
        Ok(())
    }

    /// Gives the volume key to whoever maps the device, through a pipe: its memory is never swapped
    /// out, and ends with it. It is kept here no longer.
    fn give_key(&mut self, descriptors: &UnixStream) -> Result<Mapping, Failure> {
        let failed = |error: std::io::Error| {
            Failure::failed("can't give the volume key away").caused_by(&error)
        };
        let key = self.key.take();
        let key = key.ok_or_else(|| Failure::failed("there is no volume key to give"))?;
        let (given, mut giving) = std::io::pipe().map_err(failed)?;
        giving.write_all(key.expose()).map_err(failed)?;
        drop(giving);
        sprat_attach::send_fd(descriptors, given.as_fd())?;
        let pins = &self.facts.pins;
        Ok(Mapping {
            uuid: pins.uuid.clone(),
            cipher: pins.cipher.clone(),
            sector_bytes: pins.sector_bytes,
            iv_tweak: pins.iv_tweak,
        })
    }

    /// Everything above is down: sends the rest, waits for the server's fsync, lets go. Also returns
    /// whether the reserve beside the container is missing.
    fn close(
        &mut self,
        newest: Option<BTreeMap<String, String>>,
    ) -> Result<(ClosedReport, bool), Failure> {
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
        // A rewrite tells by the server's free space what it gave back.
        let keeps_reserve =
            self.access == Access::ReadWrite && self.reserve_bytes > 0 && !self.volume_closed;
        // A question more while the line is waited for anyway.
        let asked = keeps_reserve.then(|| {
            let (bytes, lease) = (self.reserve_bytes, Arc::clone(&self.lease));
            std::thread::spawn(move || reserve::is_there(bytes, &lease))
        });
        // A rewrite has put another file there by itself, and a new container has no name yet.
        let looked =
            (self.access == Access::ReadWrite && !self.volume_closed && self.making.is_none())
                .then(|| {
                    let (opened, lease) = (self.as_opened.clone(), Arc::clone(&self.lease));
                    std::thread::spawn(move || identity_check::check(&opened, &lease))
                });
        self.close_volume()?;
        if let Some(Ok(found)) = looked.map(std::thread::JoinHandle::join) {
            found?;
        }
        if let Some(making) = &self.making {
            making.publish(&self.lease, &self.stop, &self.events)?;
        }
        let reserve_missing = asked.is_some_and(|asked| !asked.join().unwrap_or(false));
        let noted = self.note_end(newest);
        self.lease.leave_written_list(&self.events);
        self.release()?;
        noted?;
        let mut volume = figures(&self.volume);
        volume.written_bytes += self.making.as_ref().map_or(0, |making| making.header_bytes);
        let report = ClosedReport {
            volume,
            durable: self.durable,
            differing_blocks: self.volume.differing_blocks(),
            // Known to the session, which unmounted it.
            room: None,
        };
        Ok((report, reserve_missing))
    }

    /// Notes the state that the container is left in.
    fn note_end(&mut self, newest: Option<BTreeMap<String, String>>) -> Result<(), Failure> {
        if self.access == Access::ReadOnly {
            if self.volume.differing_blocks() == 0 {
                self.knowledge.end_reading();
            }
            return Ok(());
        }
        let first_block = self.device.first_block();
        let file_bytes = self.facts.file_bytes;
        self.knowledge
            .end_writing(first_block, file_bytes, newest, &self.events)
    }

    /// Once; a rewrite of the container has closed it before.
    fn close_volume(&mut self) -> Result<(), Failure> {
        if std::mem::replace(&mut self.volume_closed, true) {
            return Ok(());
        }
        self.volume
            .close()
            .map_err(|error| self.lease.lost().unwrap_or_else(|| Failure::from(&error)))
    }

    fn failure(&self) -> Option<Failure> {
        failure_of(&self.volume, &self.lease)
    }

    /// Gives the lock back. Everything is durable by now: a line that is lost here leaves the lock
    /// to the next session of this machine, and takes nothing from the success.
    fn release(&self) -> Result<(), Failure> {
        match self.lease.release() {
            Ok(_) => Ok(()),
            Err(LockError::Store { source, .. }) => {
                self.events.notice(Notice::LockLeft {
                    reason: source.to_string(),
                });
                Ok(())
            }
            Err(error) => Err(Failure::from(&error)),
        }
    }

    /// Sends nothing more. A lock stays where bytes are unsettled: whoever comes next on this
    /// host takes it over and settles them.
    fn give_up(&mut self) -> AbortReport {
        self.stop.request();
        let mut report = AbortReport::default();
        if let Some(making) = &self.making {
            report.lock_released = header::create::undo(&self.lease).is_ok();
            // A line that is lost isn't asked once more.
            if report.lock_released {
                let named = making.is_named(&self.lease);
                report.made = named == Some(true);
                report.removed = named == Some(false);
            }
        } else if self.access == Access::ReadWrite {
            if !self.lease.answer_takeover(&self.events) {
                self.lease.leave_written_list(&self.events);
            }
            report.lock_released = matches!(self.lease.release(), Ok(true));
        }
        report
    }

    /// Lives on without the session: until everything above is unmounted, by whomever.
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
            // It is mounted by now, and so its journal is replayed.
            self.device.refuse_writes();
        }
        self.events.reply(&VolumeReply::Detached);
        // The reserve is left to the next session: nobody could stop it here, and it would keep the
        // container from that session.
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
    // Why the container was lost says more than that the volume was stopped because of it.
    Some(lease.lost().unwrap_or_else(|| Failure::from(&*failed)))
}

/// Tells the figures now and then, a lost line, and once the volume's failure.
fn watch(
    volume: &Arc<Volume>,
    lease: &Arc<ContainerLease>,
    events: &EventSender,
    stats_interval: Duration,
) -> Result<(), Failure> {
    let quiet_time = lease.quiet_time();
    let (volume, lease, events) = (
        Arc::downgrade(volume),
        Arc::downgrade(lease),
        events.clone(),
    );
    std::thread::Builder::new()
        .name("watch".to_owned())
        .spawn(move || {
            let mut told = Instant::now();
            let mut last = VolumeStats::default();
            let mut line = Line::new(quiet_time);
            while let (Some(volume), Some(lease)) = (volume.upgrade(), lease.upgrade()) {
                if let Some(failure) = failure_of(&volume, &lease) {
                    events.reply(&VolumeReply::Failed(failure));
                    return;
                }
                line.tell(&volume, &events);
                if told.elapsed() >= stats_interval {
                    told = Instant::now();
                    let now = figures(&volume);
                    if now != last {
                        events.reply(&VolumeReply::Figures(now));
                        last = now;
                    }
                }
                drop((volume, lease));
                std::thread::sleep(FAILURE_INTERVAL.min(stats_interval));
            }
        })
        .map(drop)
        .map_err(|error| Failure::failed("can't start a thread").caused_by(&error))
}

/// What was said of the connection last.
struct Line {
    quiet_time: Duration,
    losses: u64,
    lost_since: Option<Instant>,
    /// Each reason once for each loss.
    reasons: Vec<String>,
}

/// Most reasons that are said for one loss.
const REASONS_MAX: usize = 5;

impl Line {
    fn new(quiet_time: Duration) -> Self {
        Self {
            quiet_time,
            losses: 0,
            lost_since: None,
            reasons: Vec::new(),
        }
    }

    /// Says each loss, however short, and what is waited for.
    fn tell(&mut self, volume: &Volume, events: &EventSender) {
        let stats = volume.stats();
        if stats.losses > self.losses {
            self.losses = stats.losses;
            self.lost_since.get_or_insert_with(Instant::now);
            self.reasons.clear();
            if stats.lost_because.is_none() {
                let reason = "it is back already".to_owned();
                events.notice(Notice::LineLost { reason });
            }
        }
        if let Some(reason) = stats.lost_because
            && self.reasons.len() < REASONS_MAX
            && !self.reasons.contains(&reason)
        {
            self.reasons.push(reason.clone());
            events.notice(Notice::LineLost { reason });
        }
        if stats.reconnecting_since.is_none()
            && let Some(since) = self.lost_since.take()
        {
            events.notice(Notice::LineBack {
                away_s: since.elapsed().as_secs(),
            });
            if stats.in_doubt_blocks > 0 && !self.quiet_time.is_zero() {
                events.notice(Notice::LateWrites {
                    wait_s: self.quiet_time.as_secs(),
                });
            }
        }
    }
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

/// How a session's flushes are answered.
fn flush_kind(start: &VolumeStart) -> Flush {
    if start.durable_flush {
        Flush::Durable
    } else {
        Flush::Ordered
    }
}
