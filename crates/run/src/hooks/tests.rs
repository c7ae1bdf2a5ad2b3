//! Hooks and pipelines with real programs: those that fail, hang, or leave children behind.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Instant;

use sprat_testkit::{needs, requires};

use super::pipeline::Pipeline;
use super::*;

/// Instead of the 10 s after SIGTERM.
const SOON: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(60);

fn context() -> Context {
    Context {
        job: Some("home".to_owned()),
        container: "nas".to_owned(),
        run: "0123".to_owned(),
        started: "2026-11-28T02:30:00Z".parse().unwrap(),
        result: None,
        note: None,
    }
}

fn hook(words: &[&str], timeout: Duration) -> Hook {
    Hook {
        words: words.iter().map(OsString::from).collect(),
        timeout,
        user: None,
    }
}

fn shell(script: &str, timeout: Duration) -> Hook {
    hook(&["sh", "-c", script], timeout)
}

fn report(hook: &Hook) -> HookReport {
    run_within(hook, Kind::Before, &context(), None, SOON)
}

fn text(report: &HookReport) -> String {
    String::from_utf8(report.output.clone()).unwrap()
}

fn why(report: &HookReport) -> String {
    match &report.end {
        HookEnd::Failed(failure) => failure.in_one_line(),
        other => panic!("{other:?}"),
    }
}

fn is_gone(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
    // If no process waits for it, it stays a zombie.
    stat.map_or(true, |stat| stat.contains(") Z "))
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn exit_status_decides_and_75_means_not_now() {
    assert_eq!(report(&hook(&["true"], LONG)).end, HookEnd::Done);
    assert_eq!(report(&shell("exit 75", LONG)).end, HookEnd::NotNow);
    let failed = report(&shell("echo a; echo b >&2; exit 3", LONG));
    assert!(why(&failed).contains("exit status: 3"), "{failed:?}");
    assert_eq!(text(&failed), "a\nb\n");
    let killed = report(&shell("kill -9 $$", LONG));
    assert!(why(&killed).contains("signal: 9"), "{killed:?}");
}

#[test]
fn environment_is_exactly_the_promised_one() {
    let mut context = context();
    context.result = Some(Outcome {
        code: 3,
        snapshot: Some("2026-11-28T02-30-00Z".to_owned()),
        error: Some("a\0b; rm -rf $HOME".to_owned()),
    });
    let env = run_within(&hook(&["env"], LONG), Kind::Failed, &context, None, SOON);
    let home = nix::unistd::User::from_uid(nix::unistd::geteuid()).unwrap();
    let home = home.unwrap().dir;
    let mut lines: Vec<String> = text(&env).lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(
        lines,
        [
            format!("HOME={}", home.display()),
            "LANG=C.UTF-8".to_owned(),
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
            "SPRAT_CONTAINER=nas".to_owned(),
            "SPRAT_ERROR=ab; rm -rf $HOME".to_owned(),
            "SPRAT_EXIT=3".to_owned(),
            "SPRAT_HOOK=failed".to_owned(),
            "SPRAT_JOB=home".to_owned(),
            "SPRAT_RUN=0123".to_owned(),
            "SPRAT_SNAPSHOT=2026-11-28T02-30-00Z".to_owned(),
            "SPRAT_STARTED=2026-11-28T02:30:00Z".to_owned(),
        ]
    );
    context.job = None;
    context.result = Some(Outcome::killed());
    let env = run_within(&hook(&["env"], LONG), Kind::Finally, &context, None, SOON);
    let text = text(&env);
    assert!(
        text.contains("SPRAT_EXIT=137\n") && !text.contains("SPRAT_JOB"),
        "{text}"
    );
}

#[test]
fn hook_runs_in_root_with_no_input_a_group_of_its_own_and_a_tight_umask() {
    let script = "pwd; umask; cat; cut -d' ' -f5 /proc/self/stat; echo $$";
    let text = text(&report(&shell(script, LONG)));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(&lines[..2], ["/", "0077"]);
    // The process group is that of the shell.
    assert_eq!((lines.len(), lines[2]), (4, lines[3]));
}

#[test]
fn words_are_not_seen_by_a_shell() {
    let words = ["printf", "[%s]", "$HOME", "a b", "`id`", "*", "", ";"];
    assert_eq!(
        text(&report(&hook(&words, LONG))),
        "[$HOME][a b][`id`][*][][;]"
    );
}

#[test]
fn user_runs_the_hook_with_all_of_his_groups_and_no_others() {
    requires!(needs::root());
    let as_user = Hook {
        user: Some("nobody".to_owned()),
        ..shell("id -u; id -G; echo $HOME; touch /sprat-test", LONG)
    };
    let report = report(&as_user);
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    let text = text(&report);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], nobody.uid.to_string());
    assert_eq!(lines[1], nobody.gid.to_string());
    assert_eq!(lines[2], nobody.dir.display().to_string());
    assert!(why(&report).contains("exit status") && !Path::new("/sprat-test").exists());
    let unknown = Hook {
        user: Some("no-such-user".to_owned()),
        ..hook(&["true"], LONG)
    };
    let failed = run_within(&unknown, Kind::Before, &context(), None, SOON);
    assert!(
        why(&failed).contains("there is no user \"no-such-user\""),
        "{failed:?}"
    );
}

#[test]
fn a_hook_that_hangs_is_ended_with_all_of_its_group() {
    let folder = tempfile::tempdir().unwrap();
    let pid = folder.path().join("pid");
    let script = format!(
        "trap '' TERM; sh -c 'trap \"\" TERM; echo $$ > {0}.new; mv {0}.new {0}; sleep 600' & wait; sleep 600",
        pid.display()
    );
    let begun = Instant::now();
    let report = report(&shell(&script, Duration::from_millis(500)));
    assert!(why(&report).contains("did not end within"), "{report:?}");
    assert!(
        begun.elapsed() >= Duration::from_millis(800),
        "SIGKILL came too early"
    );
    let child = std::fs::read_to_string(&pid).unwrap();
    until("a child is left", || is_gone(&child));
}

#[test]
fn a_hook_that_ends_at_sigterm_is_not_waited_for_any_longer() {
    let begun = Instant::now();
    let hook = shell(
        "trap 'echo bye; exit 0' TERM; sleep 600 & wait",
        Duration::from_millis(200),
    );
    let report = run_within(&hook, Kind::Before, &context(), None, LONG);
    assert!(begun.elapsed() < Duration::from_secs(20));
    // It has failed, although it ended in order.
    assert!(why(&report).contains("did not end within"), "{report:?}");
    assert_eq!(text(&report), "bye\n");
}

#[test]
fn a_child_that_keeps_the_output_open_is_not_waited_for_and_lives() {
    let folder = tempfile::tempdir().unwrap();
    let pid = folder.path().join("pid");
    let begun = Instant::now();
    let script = format!("sleep 600 & echo $! > {}; echo started", pid.display());
    let report = report(&shell(&script, LONG));
    assert!(begun.elapsed() < Duration::from_secs(20));
    assert_eq!(
        (&report.end, text(&report).as_str()),
        (&HookEnd::Done, "started\n")
    );
    let child = std::fs::read_to_string(&pid).unwrap();
    assert!(!is_gone(&child), "a service that a hook starts must stay");
    let child = rustix::process::Pid::from_raw(child.trim().parse().unwrap()).unwrap();
    rustix::process::kill_process(child, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn the_last_64_kib_of_the_output_are_kept() {
    let report = report(&shell("seq 1 200000; echo end >&2", LONG));
    assert_eq!(report.end, HookEnd::Done);
    assert_eq!(report.output.len(), crate::program::tail::TAIL_BYTES_MAX);
    assert!(text(&report).ends_with("199999\n200000\nend\n"));
}

#[test]
fn a_program_that_others_can_write_is_not_run() {
    let folder = tempfile::tempdir().unwrap();
    let ran = folder.path().join("ran");
    let file = folder.path().join("hook");
    std::fs::write(&file, format!("#!/bin/sh\ntouch {}\n", ran.display())).unwrap();
    let mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    for open in [0o777, 0o720, 0o702] {
        mode(&file, open);
        let failed = report(&hook(&[file.to_str().unwrap()], LONG));
        assert!(
            why(&failed).contains("others can write to it"),
            "{failed:?}"
        );
    }
    mode(&file, 0o700);
    mode(folder.path(), 0o777);
    assert!(why(&report(&hook(&[file.to_str().unwrap()], LONG))).contains("the folder"));
    assert!(!ran.exists());
    mode(folder.path(), 0o700);
    assert_eq!(
        report(&hook(&[file.to_str().unwrap()], LONG)).end,
        HookEnd::Done
    );
    assert!(ran.exists());
    let missing = report(&hook(&["no-such-program-of-sprat"], LONG));
    assert!(
        why(&missing).contains("there is no such program"),
        "{missing:?}"
    );
}

#[test]
fn an_interrupt_ends_before_hooks_and_leaves_the_others_running() {
    let folder = tempfile::tempdir().unwrap();
    let begun = folder.path().join("begun");
    let script = format!("touch {}; exec sleep 600", begun.display());
    let interrupt = Interrupt::never().unwrap();
    let reports = std::thread::scope(|scope| {
        let running = scope.spawn(|| {
            let hooks = [shell(&script, LONG), hook(&["true"], LONG)];
            run_before(&hooks, &context(), &interrupt)
        });
        until("the hook does not begin", || begun.exists());
        interrupt.request();
        running.join().unwrap()
    });
    assert_eq!(reports.len(), 1);
    assert_eq!(reports[0].end, HookEnd::Interrupted);
    let hooks = [hook(&["false"], LONG), hook(&["true"], LONG)];
    let reports = run_all(&hooks, Kind::After, &context());
    assert!(why(&reports[0]).contains("the after hook \"false\" failed"));
    assert_eq!(reports[1].end, HookEnd::Done);
}

#[test]
fn before_stops_at_the_first_hook_that_fails_or_says_not_now() {
    let interrupt = Interrupt::never().unwrap();
    for second in ["exit 75", "exit 1"] {
        let hooks = [
            shell("exit 0", LONG),
            shell(second, LONG),
            shell("exit 0", LONG),
        ];
        let reports = run_before(&hooks, &context(), &interrupt);
        assert_eq!(reports.len(), 2, "{second}");
        assert_ne!(reports[1].end, HookEnd::Done);
    }
}

#[test]
fn run_and_backup_are_refused_inside_a_hook() {
    assert!(refuse_inside_hook(None).is_ok());
    let failure = refuse_inside_hook(Some(OsStr::new("0123"))).unwrap_err();
    assert_eq!(
        (failure.exit, failure.what.as_str()),
        (Exit::Usage, "called from its own run")
    );
}

fn pipeline(stages: &[&str], timeout: Duration) -> Pipeline {
    let words = |script: &&str| ["sh", "-c", script].map(OsString::from).to_vec();
    Pipeline {
        stages: stages.iter().map(words).collect(),
        timeout,
        user: None,
    }
}

/// The output, or why it does not count; and what the stages wrote to stderr.
fn dump(pipeline: &Pipeline) -> (Result<Vec<u8>, String>, String) {
    let mut output = Vec::new();
    let interrupt = Interrupt::never().unwrap();
    let report = pipeline::run_within(pipeline, &context(), &mut output, &interrupt, SOON);
    let log = String::from_utf8(report.log).unwrap();
    match report.end {
        Ok(bytes) => {
            assert_eq!(bytes, output.len() as u64);
            (Ok(output), log)
        }
        Err(failure) => (Err(failure.in_one_line()), log),
    }
}

#[test]
fn a_pipeline_streams_from_stage_to_stage() {
    let (output, log) = dump(&pipeline(
        &["seq 1 300000", "echo working >&2; cat", "tail -n 2; true"],
        LONG,
    ));
    assert_eq!(output.unwrap(), b"299999\n300000\n");
    assert_eq!(log, "working\n");
    let (output, _) = dump(&pipeline(&["head -c 5000000 /dev/zero"], LONG));
    assert_eq!(output.unwrap().len(), 5_000_000);
    let (output, _) = dump(&pipeline(&["echo $SPRAT_HOOK $SPRAT_JOB; cat"], LONG));
    assert_eq!(output.unwrap(), b"command home\n");
}

#[test]
fn output_counts_only_if_every_stage_ended_with_0() {
    let (failed, log) = dump(&pipeline(
        &["echo part; echo lost >&2; exit 4", "cat"],
        LONG,
    ));
    assert!(failed.unwrap_err().contains("exit status: 4"));
    assert_eq!(log, "lost\n");
    assert!(
        dump(&pipeline(&["echo all", "cat >/dev/null; exit 5"], LONG))
            .0
            .is_err()
    );
    // SIGPIPE.
    let (failed, _) = dump(&pipeline(&["exec yes", "head -n 1"], LONG));
    assert!(failed.unwrap_err().contains("signal: 13"));
    let (failed, _) = dump(&pipeline(&["kill -9 $$", "cat"], LONG));
    assert!(failed.unwrap_err().contains("signal: 9"));
    let mut missing = pipeline(&["exec sleep 600", "cat"], LONG);
    missing.stages[1] = vec!["no-such-program-of-sprat".into()];
    let begun = Instant::now();
    assert!(
        dump(&missing)
            .0
            .unwrap_err()
            .contains("there is no such program")
    );
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_pipeline_that_takes_too_long_is_ended() {
    let folder = tempfile::tempdir().unwrap();
    let pid = folder.path().join("pid");
    let first = format!("echo $$ > {}; exec sleep 600", pid.display());
    let (failed, _) = dump(&pipeline(&[&first, "cat"], Duration::from_millis(500)));
    assert!(failed.unwrap_err().contains("did not end within"));
    let child = std::fs::read_to_string(&pid).unwrap();
    until("a stage is left", || is_gone(&child));
}

#[test]
fn a_child_of_the_last_stage_that_keeps_the_output_open_is_not_waited_for() {
    let begun = Instant::now();
    let (output, _) = dump(&pipeline(&["echo all; sleep 30 &"], LONG));
    assert_eq!(output.unwrap(), b"all\n");
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_full_volume_and_an_interrupt_end_the_pipeline() {
    struct Full;
    impl std::io::Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let interrupt = Interrupt::never().unwrap();
    let endless = pipeline(&["exec yes"], LONG);
    let report = pipeline::run_within(&endless, &context(), &mut Full, &interrupt, SOON);
    assert!(
        report
            .end
            .unwrap_err()
            .what
            .contains("can't write the output")
    );
    interrupt.request();
    let silent = pipeline(&["exec sleep 600"], LONG);
    let report = pipeline::run_within(&silent, &context(), &mut Vec::new(), &interrupt, SOON);
    assert_eq!(report.end.unwrap_err().exit, Exit::Interrupted);
}

/// The run that started it was killed.
#[test]
fn hook_that_outlived_its_run_is_ended_with_all_of_its_group_and_no_other_process_is() {
    let folder = tempfile::tempdir().unwrap();
    let (note, pids) = (folder.path().join("note"), folder.path().join("pids"));
    let script = format!(
        "sleep 600 & echo $$ $! > {0}.new; mv {0}.new {0}; wait",
        pids.display()
    );
    let context = Context {
        note: Some(note.clone()),
        ..context()
    };
    std::thread::scope(|scope| {
        let running = scope.spawn(|| run(&shell(&script, LONG), Kind::Before, &context, None));
        until("the hook does not begin", || pids.exists() && note.exists());
        let noted = std::fs::read_to_string(&note).unwrap();
        // Another process with its number, as after a restart.
        std::fs::write(&note, format!("{}1", noted.trim())).unwrap();
        left::end(&note, SOON);
        let pids = std::fs::read_to_string(&pids).unwrap();
        assert!(pids.split_whitespace().all(|pid| !is_gone(pid)));
        std::fs::write(&note, noted).unwrap();
        left::end(&note, SOON);
        for pid in pids.split_whitespace() {
            until("the hook is not ended", || is_gone(pid));
        }
        assert!(why(&running.join().unwrap()).contains("signal"));
    });
    assert!(!note.exists());
    assert_eq!(
        run(&shell("exit 0", LONG), Kind::Before, &context, None).end,
        HookEnd::Done
    );
    assert!(!note.exists());
}
