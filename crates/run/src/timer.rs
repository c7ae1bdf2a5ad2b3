//! The texts that make a machine call sprat: four systemd units, or one file for cron.
//!
//! `sprat run --scheduled` is called every 15 minutes and does what is due. `sprat status --alert` is
//! called every hour and reports what is overdue, even if `run` never starts again.

use std::path::Path;

/// `sprat run` is called every so many minutes.
pub(crate) const RUN_EVERY_MINUTES: u8 = 15;
/// The alert comes so many minutes after a run. Most runs have ended by then.
const ALERT_MINUTES_LATER: u8 = 10;

/// What the units of a package start.
pub const PACKAGED_PROGRAM: &str = "/usr/bin/sprat";

/// The timers, which are enabled. They start the services of the same names.
pub const TIMERS: [&str; 2] = ["sprat.timer", "sprat-alert.timer"];

/// The file of cron. Debian's cron reads no name with a dot.
pub const CRON_FILE: &str = "sprat";

/// The names of all files that may be there: whole units, the minute where a package has brought the
/// units, and the file of cron.
pub const FILE_NAMES: [&str; 7] = [
    "sprat.service",
    "sprat.timer",
    "sprat-alert.service",
    "sprat-alert.timer",
    "sprat.timer.d/minute.conf",
    "sprat-alert.timer.d/minute.conf",
    CRON_FILE,
];

/// The first words of a file that [`signed`] made. `#` begins a comment for systemd and for cron.
const SIGNATURE: &str = "# Written by `sprat schedule install`";

/// The minute of the quarter of an hour at which this machine runs: 0 to 14. So a server does not meet
/// all of its machines at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Minute(u8);

impl Minute {
    /// Of a machine. `machine` identifies it: the content of `/etc/machine-id`.
    #[must_use]
    pub fn of(machine: &str) -> Self {
        let hash = openssl::sha::sha256(format!("sprat timer {}", machine.trim()).as_bytes());
        Self(hash[0] % RUN_EVERY_MINUTES)
    }

    /// When `sprat run` is called, as minutes of an hour.
    #[must_use]
    pub fn of_runs(self) -> [u8; 4] {
        [0, 1, 2, 3].map(|quarter| self.0 + quarter * RUN_EVERY_MINUTES)
    }

    /// When `sprat status --alert` is called, as the minute of each hour.
    #[must_use]
    pub fn of_alert(self) -> u8 {
        self.0 + ALERT_MINUTES_LATER
    }
}

/// One file: its name below its folder, and its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimerFile {
    /// Such as `sprat.timer`, or `sprat.timer.d/minute.conf`.
    pub name: &'static str,
    /// The text.
    pub text: String,
}

/// The program's path as units and cron need it.
///
/// # Errors
/// The path is relative, or has characters that systemd or cron would read as something else. The text
/// says which.
pub fn program_path(program: &Path) -> Result<&str, String> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._+-".contains(c);
    match program.to_str() {
        Some(text) if text.starts_with('/') && text.chars().all(is_plain) => Ok(text),
        _ => Err(format!(
            "the path {} can't be written into a unit or a crontab: it may have letters, digits and \
             / . _ + - only",
            program.display()
        )),
    }
}

/// The four units.
#[must_use]
pub fn units(program: &str, minute: Minute) -> [TimerFile; 4] {
    [
        ("sprat.service", run_service(program)),
        ("sprat.timer", run_timer(minute)),
        ("sprat-alert.service", alert_service(program)),
        ("sprat-alert.timer", alert_timer(minute)),
    ]
    .map(|(name, text)| TimerFile { name, text })
}

/// The units as packages ship them: all machines would run in the same minute, and none is enabled.
#[must_use]
pub fn packaged_units() -> [TimerFile; 4] {
    units(PACKAGED_PROGRAM, Minute(0))
}

/// What sets this machine's minute where a package has brought the units.
#[must_use]
pub fn minute_drop_ins(minute: Minute) -> [TimerFile; 2] {
    let text = |when: String| {
        format!(
            "# The minute of this machine, in place of the packaged unit's.\n\
             [Timer]\nOnCalendar=\nOnCalendar={when}\n"
        )
    };
    [
        ("sprat.timer.d/minute.conf", text(runs_when(minute))),
        ("sprat-alert.timer.d/minute.conf", text(alert_when(minute))),
    ]
    .map(|(name, text)| TimerFile { name, text })
}

/// `/etc/cron.d/sprat`.
#[must_use]
pub fn cron(program: &str, minute: Minute) -> TimerFile {
    let runs = minute.of_runs().map(|minute| minute.to_string()).join(",");
    let alert = minute.of_alert();
    let text = format!(
        "\
# Starts sprat where PID 1 is not systemd. cron mails what the commands print: problems only.
SHELL=/bin/sh
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

# Does what is due. Other programs come first.
{runs} * * * * root nice -n 10 {program} run --scheduled -q
# Reports what is overdue, even if the line above no longer works.
{alert} * * * * root {program} status --alert --offline -q
"
    );
    TimerFile {
        name: CRON_FILE,
        text,
    }
}

/// When a file for cron calls `sprat run`, as minutes of an hour; `None`: it does not.
#[must_use]
pub fn cron_minutes(content: &str) -> Option<Vec<u8>> {
    let runs = |line: &&str| !line.starts_with('#') && line.contains(" run --scheduled");
    let minutes = content.lines().find(runs)?.split(' ').next()?;
    let parsed: Result<_, _> = minutes.split(',').map(str::parse).collect();
    parsed.ok()
}

fn runs_when(minute: Minute) -> String {
    format!("*:{:02}/{RUN_EVERY_MINUTES}", minute.0)
}

fn alert_when(minute: Minute) -> String {
    format!("*:{:02}", minute.of_alert())
}

fn run_service(program: &str) -> String {
    format!(
        "\
[Unit]
Description=Make the backups that are due (sprat)
# Only an order: a machine that is offline does not wait here. A server that is not reached is tried again.
After=network-online.target time-sync.target

[Service]
Type=oneshot
ExecStart={program} run --scheduled -q
# Locked by another session (11), server not reached (14): tried again, and reported once a backup is overdue.
SuccessExitStatus=11 14
# A first backup takes as long as it takes.
TimeoutStartSec=infinity
# Stopping: only sprat gets SIGTERM. It ends rsync, runs the hooks `after` and `finally`, and closes the container.
KillMode=mixed
TimeoutStopSec=5min
# Other programs come first.
Nice=10
CPUWeight=20
IOWeight=20
# Hardening that lets FUSE, loop devices, mounts and hooks work.
LockPersonality=yes
RestrictRealtime=yes
SystemCallArchitectures=native
KeyringMode=private
# Left out on purpose:
# - Protect..., Private...: they make a mount namespace, and what a hook mounts there would vanish with it.
# - NoNewPrivileges: sendmail could not write to its queue.
# - RestrictSUIDSGID: a backup could not store setuid files.
# - ProtectClock, DevicePolicy: they hide /dev/fuse.
# - ConditionACPower: it would skip without a reason in `sprat status`. The config has only_on_ac.
"
    )
}

fn run_timer(minute: Minute) -> String {
    let when = runs_when(minute);
    format!(
        "\
[Unit]
Description=Start sprat every {RUN_EVERY_MINUTES} minutes

[Timer]
# sprat itself knows what is due and what was missed. So there is no Persistent and no RandomizedDelaySec: they
# delay or bunch runs after boot and sleep.
OnCalendar={when}

[Install]
WantedBy=timers.target
"
    )
}

fn alert_service(program: &str) -> String {
    format!(
        "\
[Unit]
Description=Report backups that are overdue (sprat)
After=time-sync.target

[Service]
Type=oneshot
# Needs neither a server nor the end of a run. The unit fails while something is wrong: `systemctl --failed` shows it.
ExecStart={program} status --alert --offline -q
TimeoutStartSec=15min
Nice=10
CPUWeight=20
IOWeight=20
# No more than sprat.service has, and for the same reasons.
LockPersonality=yes
RestrictRealtime=yes
SystemCallArchitectures=native
KeyringMode=private
"
    )
}

fn alert_timer(minute: Minute) -> String {
    let when = alert_when(minute);
    format!(
        "\
[Unit]
Description=Check every hour for overdue backups (sprat)

[Timer]
# A unit of its own: it reports what is overdue, even if sprat.service never starts again.
OnCalendar={when}

[Install]
WantedBy=timers.target
"
    )
}

/// The text with a first line that says who wrote it, and by which it can be seen whether the rest was
/// changed since.
#[must_use]
pub fn signed(text: &str) -> String {
    let digest = digest(text);
    format!(
        "{SIGNATURE} ({digest}). `sprat schedule remove` deletes it, unless it was changed.\n{text}"
    )
}

/// Who wrote a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Author {
    /// sprat, and nobody changed it.
    Sprat,
    /// sprat, and somebody changed it.
    Edited,
    /// Somebody else.
    Other,
}

/// Who wrote a file with this content.
#[must_use]
pub fn author(content: &str) -> Author {
    let Some((first, rest)) = content.split_once('\n') else {
        return Author::Other;
    };
    match first.strip_prefix(SIGNATURE) {
        Some(line) if line.starts_with(&format!(" ({})", digest(rest))) => Author::Sprat,
        Some(_) => Author::Edited,
        None => Author::Other,
    }
}

/// 32 bits are enough: this finds a change, and nobody wants to hide one.
fn digest(text: &str) -> String {
    let hash = openssl::sha::sha256(text.as_bytes());
    hash[..4].iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
