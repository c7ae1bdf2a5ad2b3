//! Both timers in the foreground, for containers without systemd and cron: `sprat run --loop`.
//!
//! Each call is a process of its own, as a timer starts it. So each reads the config again, and nothing of a
//! long life adds up.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rustix::process::{Pid, Signal, kill_process};
use sprat_session::interrupt::Interrupt;
use sprat_session::{Exit, Failure};

use crate::timer::Minute;

/// How often the clock and the processes are checked.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The same after a request to end.
const END_INTERVAL: Duration = Duration::from_millis(50);

/// What is called.
#[derive(Debug)]
pub struct Calls {
    /// This program.
    pub program: PathBuf,
    /// The arguments of a run.
    pub run: Vec<OsString>,
    /// The arguments of the check for overdue copies.
    pub alert: Vec<OsString>,
    /// The minute of the quarter of an hour.
    pub minute: Minute,
}

/// A call that is repeated.
struct Repeated<'c> {
    program: &'c PathBuf,
    arguments: &'c [OsString],
    /// At these minutes of an hour.
    minutes: Vec<u8>,
    child: Option<Child>,
}

impl Repeated<'_> {
    /// Starts it, unless the last one still works.
    fn start(&mut self) -> io::Result<()> {
        if self.is_running()? {
            return Ok(());
        }
        let mut command = Command::new(self.program);
        // A Ctrl-C on the terminal reaches it through this process, and once.
        command
            .args(self.arguments)
            .stdin(Stdio::null())
            .process_group(0);
        self.child = Some(command.spawn()?);
        Ok(())
    }

    fn is_running(&mut self) -> io::Result<bool> {
        let Some(child) = &mut self.child else {
            return Ok(false);
        };
        let is_running = child.try_wait()?.is_none();
        if !is_running {
            self.child = None;
        }
        Ok(is_running)
    }

    fn signal(&self) {
        if let Some(child) = &self.child {
            // It may have ended by itself.
            let _ = kill_process(Pid::from_child(child), Signal::TERM);
        }
    }
}

impl Calls {
    /// Calls both at once, and then at their minutes, until `interrupt` is requested. Then ends what runs, and
    /// waits for it.
    ///
    /// # Errors
    /// A process can't be started.
    pub fn repeat(&self, interrupt: &Interrupt) -> Result<Exit, Failure> {
        let cannot = |error: io::Error| {
            Failure::failed(format!("can't run {}", self.program.display())).caused_by(&error)
        };
        // A run that ends has time limits of its own.
        let _hold = interrupt.hold();
        let repeated = |arguments, minutes| Repeated {
            program: &self.program,
            arguments,
            minutes,
            child: None,
        };
        let mut all = [
            repeated(&self.run, self.minute.of_runs().to_vec()),
            repeated(&self.alert, vec![self.minute.of_alert()]),
        ];
        for one in &mut all {
            one.start().map_err(cannot)?;
        }
        let mut minute = minute_of(Timestamp::now());
        while interrupt
            .wait_until(Instant::now() + CHECK_INTERVAL)
            .is_ok()
        {
            let now = minute_of(Timestamp::now());
            let is_new = now != std::mem::replace(&mut minute, now);
            for one in &mut all {
                if is_new && one.minutes.contains(&now) {
                    one.start().map_err(cannot)?;
                }
                one.is_running().map_err(cannot)?;
            }
        }
        let mut sent = 0;
        loop {
            while sent < interrupt.requests() {
                all.iter().for_each(Repeated::signal);
                sent += 1;
            }
            let mut is_running = false;
            for one in &mut all {
                is_running |= one.is_running().map_err(cannot)?;
            }
            if !is_running {
                return Ok(Exit::Done);
            }
            std::thread::sleep(END_INTERVAL);
        }
    }
}

/// The minute of the hour. Every time zone differs from UTC by a multiple of 15 minutes, and so do the runs.
fn minute_of(now: Timestamp) -> u8 {
    let minute = now.as_second().div_euclid(60).rem_euclid(60);
    u8::try_from(minute).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_are_called_at_once_and_a_request_ends_what_runs() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let script = at.join("program");
        let text = "#!/bin/sh\ntrap 'echo ended >> \"$1.end\"; exit 130' TERM\n\
                    echo begun >> \"$1\"\nwhile [ \"$2\" = stays ]; do sleep 0.05; done\n";
        std::fs::write(&script, text).unwrap();
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
        let calls = Calls {
            program: script,
            run: vec![at.join("run").into(), "stays".into()],
            alert: vec![at.join("alert").into()],
            minute: Minute::of("machine"),
        };
        let interrupt = Interrupt::never().unwrap();
        std::thread::scope(|scope| {
            let looping = scope.spawn(|| calls.repeat(&interrupt).unwrap());
            let read = |name: &str| std::fs::read_to_string(at.join(name)).unwrap_or_default();
            let end = Instant::now() + Duration::from_secs(30);
            while read("run").is_empty() || read("alert").is_empty() {
                assert!(Instant::now() < end, "they were not called");
                std::thread::sleep(Duration::from_millis(10));
            }
            interrupt.request();
            assert_eq!(looping.join().unwrap(), Exit::Done);
            assert_eq!(
                (read("run.end"), read("alert.end")),
                ("ended\n".to_owned(), String::new())
            );
        });
    }
}
