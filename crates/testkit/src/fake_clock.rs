//! A clock of the test's own for whole unmodified programs: the wall clock, the clocks since the boot, which
//! boot it is, and whether a time service keeps the clock.
//!
//! The clocks since the boot are those of a time namespace (time_namespaces(7)). The rest is a library that
//! the program preloads (`shim.c`). Between two commands the time stands still; while a command runs, it goes
//! on as ever. Times that the kernel writes, such as those of files, are the real ones.

#![allow(clippy::unwrap_used, reason = "a failing test kit panics")]

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

use crate::machine::TestMachine;
use crate::{needs, program};

/// A machine has been up so long when a boot begins.
const BOOT: Duration = Duration::from_secs(60);

/// What is missing for it.
#[must_use]
pub fn missing() -> Option<String> {
    let there = needs::root().or_else(|| needs::program("cc"));
    there.or_else(|| {
        let all = ["--time", "--fork", "--monotonic", "1000000", "true"];
        let made = Command::new("unshare").args(all).output();
        let works = made.is_ok_and(|made| made.status.success());
        (!works).then(|| "unshare makes no time namespace here".to_owned())
    })
}

/// The clock of a machine.
#[derive(Debug)]
pub struct FakeClock {
    shim: PathBuf,
    boot_id: PathBuf,
    boots: u64,
    now_s: i64,
    /// The machine's wall clock is so far ahead of the true time, in seconds.
    pub error_s: i64,
    /// A time service keeps the machine's wall clock.
    pub synchronised: bool,
    monotonic: Duration,
    boottime: Duration,
}

impl FakeClock {
    /// A clock that is right and kept right; `folder` is for its files.
    ///
    /// # Panics
    /// When the library can't be built.
    #[must_use]
    pub fn new(folder: &Path, now_s: i64) -> Self {
        let (source, shim) = (folder.join("shim.c"), folder.join("shim.so"));
        fs::write(&source, include_str!("fake_clock/shim.c")).unwrap();
        let words = ["-O1", "-shared", "-fPIC", "-o"].map(AsRef::as_ref);
        let paths = [shim.as_os_str(), source.as_os_str()];
        program::system("cc", &[&words[..], &paths].concat());
        let mut clock = Self {
            shim,
            boot_id: folder.join("boot_id"),
            boots: 0,
            now_s,
            error_s: 0,
            synchronised: true,
            monotonic: BOOT,
            boottime: BOOT,
        };
        clock.boot();
        clock
    }

    /// The true time.
    #[must_use]
    pub fn now_s(&self) -> i64 {
        self.now_s
    }

    /// What the machine's wall clock shows.
    #[must_use]
    pub fn shown_s(&self) -> i64 {
        self.now_s + self.error_s
    }

    /// The machine runs until then.
    pub fn awake_until(&mut self, now_s: i64) {
        let passed = self.pass(now_s);
        self.monotonic += passed;
    }

    /// It sleeps until then.
    pub fn asleep_until(&mut self, now_s: i64) {
        self.pass(now_s);
    }

    /// It is switched off, and has just been started again then.
    pub fn off_until(&mut self, now_s: i64) {
        self.pass(now_s);
        self.boot();
    }

    fn pass(&mut self, now_s: i64) -> Duration {
        let passed = Duration::from_secs(u64::try_from(now_s - self.now_s).unwrap());
        self.now_s = now_s;
        self.boottime += passed;
        passed
    }

    fn boot(&mut self) {
        self.boots += 1;
        let id = format!("{:08x}-0000-4000-8000-{:012x}\n", self.boots, self.boots);
        fs::write(&self.boot_id, id).unwrap();
        (self.monotonic, self.boottime) = (BOOT, BOOT);
    }

    /// sprat with the settings of `machine` and this clock.
    #[must_use]
    pub fn command(&self, machine: &TestMachine, arguments: &[&str]) -> Command {
        let mut command = self.command_of(machine, program::sprat());
        command.args(arguments);
        command
    }

    /// The same with another program.
    pub fn command_of(&self, machine: &TestMachine, program: impl AsRef<OsStr>) -> Command {
        let offset = |clock, wanted: Duration| {
            let real = clock_gettime(clock).tv_sec;
            (i64::try_from(wanted.as_secs()).unwrap() - real).to_string()
        };
        let mut command = machine.command_of("unshare");
        command
            .args(["--time", "--kill-child"])
            .arg(format!(
                "--monotonic={}",
                offset(ClockId::Monotonic, self.monotonic)
            ))
            .arg(format!(
                "--boottime={}",
                offset(ClockId::Boottime, self.boottime)
            ))
            .arg(program)
            .env("LD_PRELOAD", &self.shim)
            .env("TEST_CLOCK_SHIFT_S", shift(self.shown_s()))
            .env(
                "TEST_CLOCK_SYNCHRONISED",
                u8::from(self.synchronised).to_string(),
            )
            .env("TEST_CLOCK_BOOT_ID", &self.boot_id);
        command
    }
}

/// How far the clock that shows `wanted_s` is ahead of the real one.
fn shift(wanted_s: i64) -> String {
    let real = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    (wanted_s - i64::try_from(real.as_secs()).unwrap()).to_string()
}
