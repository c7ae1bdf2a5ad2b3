//! The texts themselves, and systemd's own judgement of them.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use insta::assert_snapshot;
use sprat_testkit::{needs, requires};

use super::*;

const PROGRAM: &str = "/usr/local/bin/sprat";

fn minute_of(minute: u8) -> Minute {
    Minute(minute)
}

fn unit(name: &str) -> String {
    let mut units = units(PROGRAM, minute_of(7)).into_iter();
    units.find(|unit| unit.name == name).unwrap().text
}

/// The directives, without comments.
fn directives(text: &str) -> Vec<&str> {
    let lines = text.lines();
    let is_directive = |line: &&str| line.contains('=') && !line.starts_with('#');
    lines.filter(is_directive).collect()
}

#[test]
fn service_of_runs_allows_fuse_mounts_and_hooks() {
    assert_snapshot!(directives(&unit("sprat.service")).join("\n"), @r"
    Description=Make the backups that are due (sprat)
    After=network-online.target time-sync.target
    Type=oneshot
    ExecStart=/usr/local/bin/sprat run --scheduled -q
    SuccessExitStatus=11 14
    TimeoutStartSec=infinity
    KillMode=mixed
    TimeoutStopSec=5min
    Nice=10
    CPUWeight=20
    IOWeight=20
    LockPersonality=yes
    RestrictRealtime=yes
    SystemCallArchitectures=native
    KeyringMode=private
    ");
}

#[test]
fn service_of_alerts_needs_no_network() {
    assert_snapshot!(directives(&unit("sprat-alert.service")).join("\n"), @r"
    Description=Report backups that are overdue (sprat)
    After=time-sync.target
    Type=oneshot
    ExecStart=/usr/local/bin/sprat status --alert --offline -q
    TimeoutStartSec=15min
    Nice=10
    CPUWeight=20
    IOWeight=20
    LockPersonality=yes
    RestrictRealtime=yes
    SystemCallArchitectures=native
    KeyringMode=private
    ");
}

#[test]
fn timers_neither_delay_nor_bunch_runs() {
    let timers = TIMERS.map(unit).join("\n");
    assert_snapshot!(timers, @r"
    [Unit]
    Description=Start sprat every 15 minutes

    [Timer]
    # sprat itself knows what is due and what was missed. So there is no Persistent and no RandomizedDelaySec: they
    # delay or bunch runs after boot and sleep.
    OnCalendar=*:07/15

    [Install]
    WantedBy=timers.target

    [Unit]
    Description=Check every hour for overdue backups (sprat)

    [Timer]
    # A unit of its own: it reports what is overdue, even if sprat.service never starts again.
    OnCalendar=*:17

    [Install]
    WantedBy=timers.target
    ");
}

#[test]
fn minute_of_machine_replaces_the_one_of_the_package() {
    let drop_ins = minute_drop_ins(minute_of(7));
    assert_snapshot!(drop_ins.map(|file| file.text).join("\n"), @r"
    # The minute of this machine, in place of the packaged unit's.
    [Timer]
    OnCalendar=
    OnCalendar=*:07/15

    # The minute of this machine, in place of the packaged unit's.
    [Timer]
    OnCalendar=
    OnCalendar=*:17
    ");
}

#[test]
fn cron_file_has_both_commands() {
    assert_snapshot!(cron(PROGRAM, minute_of(7)).text, @r"
    # Starts sprat where PID 1 is not systemd. cron mails what the commands print: problems only.
    SHELL=/bin/sh
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

    # Does what is due. Other programs come first.
    7,22,37,52 * * * * root nice -n 10 /usr/local/bin/sprat run --scheduled -q
    # Reports what is overdue, even if the line above no longer works.
    17 * * * * root /usr/local/bin/sprat status --alert --offline -q
    ");
}

/// Each of these was tried by others, and breaks a backup.
#[test]
fn units_have_nothing_that_breaks_fuse_mounts_mail_or_setuid_files() {
    for unit in units(PROGRAM, minute_of(0)) {
        for line in directives(&unit.text) {
            for bad in [
                "Protect",
                "Private",
                "ReadOnlyPaths",
                "ReadWritePaths",
                "InaccessiblePaths",
                "TemporaryFileSystem",
                "DynamicUser",
                "RootDirectory",
                "NoNewPrivileges",
                "RestrictSUIDSGID",
                "RestrictNamespaces",
                "Device",
                "ConditionACPower",
                "Persistent",
                "RandomizedDelaySec",
                "CapabilityBoundingSet",
            ] {
                assert!(!line.starts_with(bad), "{}: {line}", unit.name);
            }
        }
    }
}

#[test]
fn packaged_units_are_these_texts() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../contrib/systemd");
    let units = packaged_units();
    for unit in &units {
        let packaged = fs::read_to_string(folder.join(unit.name)).unwrap_or_default();
        assert!(
            packaged == unit.text,
            "contrib/systemd/{} differs from crates/run/src/timer.rs; it must be:\n{}",
            unit.name,
            unit.text
        );
    }
    assert_eq!(fs::read_dir(folder).unwrap().count(), units.len());
}

/// Runs `systemd-analyze verify` on units in a folder. systemd wants to find the program that they start.
fn verify(units: &[TimerFile]) -> (bool, String) {
    let folder = tempfile::tempdir().unwrap();
    let paths = units.iter().map(|unit| {
        let path = folder.path().join(unit.name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, signed(&unit.text)).unwrap();
        path
    });
    let paths: Vec<_> = paths
        .filter(|path| !path.ends_with("minute.conf"))
        .collect();
    let ran = Command::new("systemd-analyze")
        .args(["--man=no", "--recursive-errors=no", "verify"])
        .args(&paths)
        .output()
        .unwrap();
    let said = [ran.stdout, ran.stderr].concat();
    (ran.status.success(), String::from_utf8(said).unwrap())
}

#[test]
fn systemd_verifies_the_units() {
    requires!(needs::program("systemd-analyze"));
    let sound = units("/bin/true", minute_of(7));
    assert_eq!(verify(&sound), (true, String::new()));
    let drop_ins = minute_drop_ins(minute_of(14)).to_vec();
    let with_drop_ins = [sound.to_vec(), drop_ins].concat();
    assert_eq!(verify(&with_drop_ins), (true, String::new()));
    // A mistake would be reported.
    for (right, wrong) in [
        ("\nLockPersonality=", "\nLockPersonalty="),
        ("\nLockPersonality=yes", "\nLockPersonality=maybe"),
        ("\nOnCalendar=*:07/15", "\nOnCalendar=*:77/15"),
        ("ExecStart=/bin/true", "ExecStart=/no/such/program"),
    ] {
        let mut units = sound.clone();
        for unit in &mut units {
            unit.text = unit.text.replace(right, wrong);
        }
        assert_ne!(units, sound, "{right}");
        let (_, said) = verify(&units);
        assert!(!said.is_empty(), "{wrong}");
    }
    let mut wrong = minute_drop_ins(minute_of(0)).to_vec();
    wrong[0].text = wrong[0].text.replace("OnCalendar=*:00", "OnCalendar=*:99");
    let (_, said) = verify(&[sound.to_vec(), wrong].concat());
    assert!(said.contains("minute.conf"), "{said}");
}

/// Of crontab(5), as Debian's cron, cronie and busybox read a file in cron.d.
#[test]
fn cron_file_is_in_the_form_that_every_cron_reads() {
    for minute in 0..RUN_EVERY_MINUTES {
        let file = cron(PROGRAM, minute_of(minute));
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
        assert!(file.name.chars().all(is_plain), "{}", file.name);
        let text = signed(&file.text);
        // Without a newline at its end the last line is ignored. `%` would end a command.
        assert!(text.ends_with('\n') && !text.contains(['%', '\t', '\r']));
        let mut commands = 0;
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let is_setting = line.starts_with("SHELL=") || line.starts_with("PATH=");
            if line.is_empty() || is_setting {
                continue;
            }
            let words: Vec<&str> = line.split(' ').collect();
            for minute in words[0].split(',') {
                assert!(minute.parse::<u8>().unwrap() < 60, "{line}");
            }
            assert_eq!(words[1..6], ["*", "*", "*", "*", "root"], "{line}");
            assert!(words[6..].contains(&PROGRAM), "{line}");
            assert_eq!(words.last(), Some(&"-q"), "{line}");
            commands += 1;
        }
        assert_eq!(commands, 2);
        let runs = minute_of(minute).of_runs();
        assert_eq!(cron_minutes(&text), Some(runs.to_vec()));
    }
    assert_eq!(
        cron_minutes("# */15 * * * * root sprat run --scheduled\n"),
        None
    );
}

#[test]
fn machines_are_spread_over_the_quarter_of_an_hour() {
    let minutes = (0..200).map(|machine| Minute::of(&format!("machine {machine}")).0);
    let minutes: BTreeSet<u8> = minutes.collect();
    assert_eq!(minutes, (0..RUN_EVERY_MINUTES).collect());
    let id = "3d1219c7c4c5404aaa1f6d2a48adfda4";
    assert_eq!(Minute::of(&format!("{id}\n")), Minute::of(id));
    assert!(minute_of(14).of_alert() < 60 && minute_of(14).of_runs()[3] < 60);
}

#[test]
fn change_of_an_installed_file_is_noticed() {
    let text = signed("[Timer]\nOnCalendar=*:07/15\n");
    assert_eq!(author(&text), Author::Sprat);
    assert_eq!(author(&text.replace("07", "08")), Author::Edited);
    assert_eq!(author(&format!("{text}Persistent=true\n")), Author::Edited);
    for other in ["", "[Timer]\nOnCalendar=hourly\n", "# Written by hand\n"] {
        assert_eq!(author(other), Author::Other, "{other:?}");
    }
}

#[test]
fn paths_that_systemd_or_cron_would_misread_are_refused() {
    for good in ["/usr/local/bin/sprat", "/opt/sprat-1.0_a+b/sprat"] {
        assert_eq!(program_path(Path::new(good)), Ok(good));
    }
    for bad in [
        "sprat",
        "/opt/my sprat",
        "/opt/%h/sprat",
        "/opt/$x/sprat",
        "/a/sprat (deleted)",
    ] {
        assert!(program_path(Path::new(bad)).is_err(), "{bad}");
    }
}
