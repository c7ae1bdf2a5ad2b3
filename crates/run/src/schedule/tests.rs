//! Install, remove and show below a scratch root, with a stand-in for systemctl that keeps notes.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use insta::assert_snapshot;
use tempfile::TempDir;

use super::*;

/// What `systemctl show` prints, once the timers are enabled and before.
const SYSTEMCTL: &str = r#"#!/bin/sh
echo "$*" >>"$ROOT/calls"
case $1 in
show)
    state=disabled active=inactive next=
    if [ -e "$ROOT/enabled" ]; then
        state=enabled active=active next="Sun 2026-11-29 09:52:00 UTC"
    fi
    for timer in sprat sprat-alert; do
        loaded=not-found
        for folder in etc usr/lib; do
            [ ! -e "$ROOT/$folder/systemd/system/$timer.timer" ] || loaded=loaded
        done
        printf 'Result=success\nNextElapseUSecRealtime=%s\nId=%s\nLoadState=%s\n' "$next" "$timer.timer" "$loaded"
        printf 'ActiveState=%s\nUnitFileState=%s\n\n' "$active" "$state"
    done
    printf 'Result=exit-code\nExecMainStartTimestamp=Sun 2026-11-29 09:37:00 UTC\nExecMainStatus=4\n'
    printf 'Id=sprat.service\nLoadState=loaded\nActiveState=failed\n\n'
    printf 'Result=success\nExecMainStartTimestamp=\nExecMainStatus=0\nId=sprat-alert.service\nActiveState=inactive\n'
    ;;
enable) [ ! -e "$ROOT/broken" ] || { echo "Unit is masked." >&2; exit 1; }; touch "$ROOT/enabled" ;;
disable) rm "$ROOT/enabled" ;;
esac
"#;

struct Machine {
    root: TempDir,
}

impl Machine {
    /// With systemd as PID 1, or with cron.
    fn new(scheduler: Scheduler) -> Self {
        let machine = Self {
            root: tempfile::tempdir().unwrap(),
        };
        let sprat = machine.write("usr/local/bin/sprat", "the program");
        let systemctl = SYSTEMCTL.replace("$ROOT", &machine.root.path().display().to_string());
        let systemctl = machine.write("systemctl", &systemctl);
        for program in [sprat, systemctl] {
            fs::set_permissions(program, Permissions::from_mode(0o755)).unwrap();
        }
        machine.write("etc/machine-id", "3d1219c7c4c5404aaa1f6d2a48adfda4\n");
        if scheduler == Scheduler::Systemd {
            fs::create_dir_all(machine.path("run/systemd/system")).unwrap();
        } else {
            fs::create_dir_all(machine.path("etc/cron.d")).unwrap();
            machine.write("proc/711/comm", "cron\n");
        }
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    fn add_packaged_units(&self) {
        for unit in timer::packaged_units() {
            self.write(&format!("usr/lib/systemd/system/{}", unit.name), &unit.text);
        }
    }

    fn schedule(&self) -> Schedule {
        let mut places = Places::below(self.root.path());
        places.systemctl = self.path("systemctl").into();
        Schedule::new(places)
    }

    /// The scratch program lies in a folder that only its user can write.
    fn install(&self) -> Result<Changes, Failure> {
        self.schedule().install(&self.program())
    }

    /// The path as the texts have it: without characters of the scratch folder's name.
    fn program(&self) -> PathBuf {
        self.path("usr/local/bin/sprat")
    }

    fn remove(&self) -> Changes {
        self.schedule().remove().unwrap()
    }

    fn shown(&self, schedule: &Installed) -> String {
        let text = serde_json::to_string_pretty(schedule).unwrap();
        text.replace(&*self.root.path().to_string_lossy(), "")
    }

    /// All files below `etc`.
    fn files(&self) -> Vec<String> {
        fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    walk(&path, found);
                }
                found.push(path);
            }
        }
        let mut found = Vec::new();
        walk(&self.path("etc"), &mut found);
        found.sort();
        let names = found.iter().map(|path| self.name(path));
        names.filter(|name| name != "etc/machine-id").collect()
    }

    fn name(&self, path: &Path) -> String {
        path.strip_prefix(self.root.path())
            .unwrap()
            .display()
            .to_string()
    }

    fn names(&self, paths: &[PathBuf]) -> Vec<String> {
        paths.iter().map(|path| self.name(path)).collect()
    }

    /// What systemctl was called for since the last question, without `show`.
    fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.path("calls")).unwrap_or_default();
        let _ = fs::remove_file(self.path("calls"));
        let changing = calls.lines().filter(|line| !line.starts_with("show "));
        changing.map(str::to_owned).collect()
    }
}

const UNITS: [&str; 4] = [
    "etc/systemd/system/sprat-alert.service",
    "etc/systemd/system/sprat-alert.timer",
    "etc/systemd/system/sprat.service",
    "etc/systemd/system/sprat.timer",
];
const DROP_INS: [&str; 2] = [
    "etc/systemd/system/sprat.timer.d/minute.conf",
    "etc/systemd/system/sprat-alert.timer.d/minute.conf",
];
const ENABLE: &str = "enable --now sprat.timer sprat-alert.timer";
const DISABLE: &str = "disable --now sprat.timer sprat-alert.timer";

#[test]
fn install_writes_whole_units_and_enables_both_timers() {
    let machine = Machine::new(Scheduler::Systemd);
    let changes = machine.install().unwrap();
    let mut written = machine.names(&changes.written);
    written.sort();
    assert_eq!(written, UNITS);
    assert_eq!(machine.calls(), ["daemon-reload", ENABLE]);
    let service = machine.read("etc/systemd/system/sprat.service");
    let start = format!(
        "\nExecStart={} run --scheduled -q\n",
        machine.program().display()
    );
    assert!(service.contains(&start), "{service}");
    let mode = fs::metadata(machine.path(UNITS[0])).unwrap().permissions();
    assert_eq!(mode.mode() & 0o7777, 0o644);
    // The second time there is nothing to do.
    assert_eq!(machine.install().unwrap(), Changes::default());
    assert_eq!(machine.calls(), [""; 0]);
    let changes = machine.remove();
    assert_eq!((changes.deleted.len(), changes.left.len()), (4, 0));
    assert_eq!(machine.calls(), [DISABLE, "daemon-reload"]);
    assert_eq!(machine.files(), ["etc/systemd", "etc/systemd/system"]);
    assert_eq!(machine.remove(), Changes::default());
    assert_eq!(machine.calls(), [""; 0]);
}

#[test]
fn install_sets_only_the_minute_of_packaged_units() {
    let machine = Machine::new(Scheduler::Systemd);
    // Whole units from before the package would hide the package's.
    machine.install().unwrap();
    machine.add_packaged_units();
    let changes = machine.install().unwrap();
    assert_eq!(machine.names(&changes.written), DROP_INS);
    assert_eq!(changes.deleted.len(), 4);
    let expected = Minute::of("3d1219c7c4c5404aaa1f6d2a48adfda4").of_runs()[0];
    let drop_in = machine.read(DROP_INS[0]);
    let when = format!("[Timer]\nOnCalendar=\nOnCalendar=*:{expected:02}/15\n");
    assert!(drop_in.ends_with(&when), "{drop_in}");
    assert_eq!(machine.install().unwrap(), Changes::default());
    let changes = machine.remove();
    assert_eq!(machine.names(&changes.deleted), DROP_INS);
    assert_eq!(machine.calls().last().unwrap(), "daemon-reload");
    // The folders for drop-ins went, too; the package's units stay.
    assert_eq!(machine.files(), ["etc/systemd", "etc/systemd/system"]);
    assert!(machine.path("usr/lib/systemd/system/sprat.timer").exists());
}

#[test]
fn file_of_cron_is_installed_without_systemd() {
    let machine = Machine::new(Scheduler::Cron);
    let changes = machine.install().unwrap();
    assert_eq!(machine.names(&changes.written), ["etc/cron.d/sprat"]);
    assert_eq!(machine.install().unwrap(), Changes::default());
    let now = "2026-11-29T09:58:30Z".parse().unwrap();
    let installed = machine.schedule().installed(now).unwrap();
    assert_snapshot!(machine.shown(&installed), @r#"
    {
      "scheduler": "cron",
      "active": true,
      "files": [
        {
          "path": "/etc/cron.d/sprat",
          "state": "unchanged"
        }
      ],
      "timers": [],
      "cron_next": "2026-11-29T10:09:00Z",
      "cron_runs": true
    }
    "#);
    // The machine gets systemd: the file of cron goes.
    fs::create_dir_all(machine.path("run/systemd/system")).unwrap();
    let changes = machine.install().unwrap();
    assert_eq!(machine.names(&changes.deleted), ["etc/cron.d/sprat"]);
    assert_eq!(changes.written.len(), 4);
    machine.remove();
    assert_eq!(machine.calls().last().unwrap(), "daemon-reload");
    assert_eq!(
        machine.files(),
        ["etc/cron.d", "etc/systemd", "etc/systemd/system"]
    );
}

#[test]
fn machine_without_systemd_and_cron_gets_a_hint() {
    let machine = Machine::new(Scheduler::Cron);
    fs::remove_dir(machine.path("etc/cron.d")).unwrap();
    let failure = machine.install().unwrap_err();
    assert!(
        failure.what.contains("neither systemd nor a cron"),
        "{failure:?}"
    );
    assert!(!machine.path("etc/cron.d").exists());
    // A cron.d that no daemon reads.
    let machine = Machine::new(Scheduler::Cron);
    machine.install().unwrap();
    machine.write("proc/711/comm", "bash\n");
    let installed = machine.schedule().installed(Timestamp::now()).unwrap();
    assert_eq!(
        (installed.active, installed.cron_runs),
        (false, Some(false))
    );
}

#[test]
fn changed_files_are_left_and_named() {
    let machine = Machine::new(Scheduler::Systemd);
    machine.install().unwrap();
    let name = "etc/systemd/system/sprat.timer";
    let edited = machine.read(name).replace("/15", "/30");
    machine.write(name, &edited);
    let changes = machine.install().unwrap();
    assert!(changes.is_nothing());
    assert_eq!(machine.names(&changes.left), [name]);
    let changes = machine.remove();
    assert_eq!(machine.names(&changes.left), [name]);
    assert_eq!((changes.deleted.len(), changes.timers.len()), (3, 2));
    assert_eq!(machine.read(name), edited);
}

#[test]
fn file_of_an_older_release_is_replaced() {
    let machine = Machine::new(Scheduler::Systemd);
    machine.install().unwrap();
    machine.write(
        UNITS[2],
        &timer::signed("[Service]\nExecStart=/bin/sprat old\n"),
    );
    let changes = machine.install().unwrap();
    assert_eq!(machine.names(&changes.written), [UNITS[2]]);
    assert!(machine.read(UNITS[2]).contains("run --scheduled"));
}

#[test]
fn units_of_somebody_else_are_neither_overwritten_nor_disabled() {
    let machine = Machine::new(Scheduler::Systemd);
    let own = machine.write(UNITS[3], "[Timer]\nOnCalendar=daily\n");
    let failure = machine.install().unwrap_err();
    assert!(failure.what.contains("sprat.timer"), "{failure:?}");
    assert_eq!(machine.files().len(), 3, "{:?}", machine.files());
    machine.write("enabled", "");
    let changes = machine.remove();
    assert_eq!(changes.timers, ["sprat-alert.timer"]);
    assert_eq!(changes.left, [own]);
    // A masked unit is a link to /dev/null.
    let machine = Machine::new(Scheduler::Systemd);
    fs::create_dir_all(machine.path("etc/systemd/system")).unwrap();
    symlink("/dev/null", machine.path(UNITS[3])).unwrap();
    machine.install().unwrap_err();
    assert_eq!(machine.calls(), [""; 0]);
}

#[test]
fn program_that_others_can_replace_is_refused() {
    let machine = Machine::new(Scheduler::Systemd);
    let folder = machine.path("usr/local/bin");
    fs::set_permissions(&folder, Permissions::from_mode(0o775)).unwrap();
    let failure = machine.install().unwrap_err();
    assert_eq!(failure.exit, sprat_session::Exit::Usage);
    assert!(
        failure.what.contains("others can write to the folder"),
        "{failure:?}"
    );
    fs::set_permissions(&folder, Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(machine.program(), Permissions::from_mode(0o757)).unwrap();
    machine.install().unwrap_err();
    assert_eq!(machine.files(), [""; 0]);
    assert_eq!(machine.calls(), [""; 0]);
}

#[test]
fn what_systemctl_says_reaches_the_admin_and_the_next_call_goes_on() {
    let machine = Machine::new(Scheduler::Systemd);
    machine.write("broken", "");
    let failure = machine.install().unwrap_err();
    assert_eq!(failure.what, "systemctl enable failed: exit status: 1");
    assert_eq!(failure.causes, ["Unit is masked."]);
    fs::remove_file(machine.path("broken")).unwrap();
    let changes = machine.install().unwrap();
    assert_eq!((changes.written.len(), changes.timers.len()), (0, 2));
}

#[test]
fn show_has_state_next_run_and_result_of_the_last() {
    let machine = Machine::new(Scheduler::Systemd);
    let now = Timestamp::UNIX_EPOCH;
    let before = machine.schedule().installed(now).unwrap();
    assert!(!before.active && before.files.is_empty() && before.timers.is_empty());
    machine.install().unwrap();
    let installed = machine.schedule().installed(now).unwrap();
    assert_snapshot!(machine.shown(&installed), @r#"
    {
      "scheduler": "systemd",
      "active": true,
      "files": [
        {
          "path": "/etc/systemd/system/sprat.service",
          "state": "unchanged"
        },
        {
          "path": "/etc/systemd/system/sprat.timer",
          "state": "unchanged"
        },
        {
          "path": "/etc/systemd/system/sprat-alert.service",
          "state": "unchanged"
        },
        {
          "path": "/etc/systemd/system/sprat-alert.timer",
          "state": "unchanged"
        }
      ],
      "timers": [
        {
          "unit": "sprat.timer",
          "enabled": true,
          "active": true,
          "next": "2026-11-29T09:52:00Z",
          "last_start": "2026-11-29T09:37:00Z",
          "last_result": "exit-code",
          "last_code": 4
        },
        {
          "unit": "sprat-alert.timer",
          "enabled": true,
          "active": true,
          "next": "2026-11-29T09:52:00Z",
          "last_start": null,
          "last_result": null,
          "last_code": null
        }
      ],
      "cron_next": null,
      "cron_runs": null
    }
    "#);
}
