//! The work on a container that does not open: which copies end how, and which hooks run.

use sprat_session::check::Checked;
use sprat_session::drill::Drilled;
use sprat_session::{TrimReport, Worthwhile};
use sprat_testkit::test_folder::TestFolder;
use sprat_testkit::tmpfs::Tmpfs;
use sprat_testkit::{needs, requires};

use super::super::{Selected, Slice};
use super::*;
use crate::config::{Config, ConfigPlaces, load};
use crate::copy_name::CopyName;

/// Opens nothing.
struct Closed {
    exit: Exit,
    opened: usize,
    begun: Vec<String>,
}

impl Closed {
    fn with(exit: Exit) -> Self {
        Self {
            exit,
            opened: 0,
            begun: Vec::new(),
        }
    }
}

impl Front for Closed {
    fn open(&mut self, _: &str) -> Result<Session, Failure> {
        self.opened += 1;
        Err(Failure::new(self.exit, "closed"))
    }

    fn begins(&mut self, copy: &CopyName) {
        self.begun.push(copy.to_string());
    }

    fn check_slice(&mut self, _: &str, _: &Slice, _: &Interrupt) -> Result<Checked, Failure> {
        unreachable!("nothing is opened")
    }

    fn drill(&mut self, _: &str, _: &Interrupt) -> Result<Drilled, Failure> {
        unreachable!("nothing is opened")
    }

    fn trim(&mut self, _: &str, _: Worthwhile, _: &Interrupt) -> Result<TrimReport, Failure> {
        unreachable!("nothing is opened")
    }

    fn observer(&mut self, _: &str) -> &mut dyn Observer {
        unreachable!("nothing is opened")
    }
}

struct Scene {
    folder: TestFolder,
    config: Config,
    interrupt: Interrupt,
}

impl Scene {
    /// Two jobs in one container; every hook of the first one writes a line to `log`.
    fn new(more: &str) -> Self {
        let folder = TestFolder::new("sprat-run-");
        let at = folder.path().display().to_string();
        let hook = format!("sh -c 'echo $SPRAT_HOOK $SPRAT_EXIT >> {at}/log'");
        let text = format!(
            "[container.x]\ntarget = \"{at}/x.luks\"\nlock_wait = \"0 s\"\n\
             [job_defaults]\n{more}\
             [job.a]\ncontainer = \"x\"\nsources = \"/home\"\n\
             before = \"{hook}\"\nafter = \"{hook}\"\nfailed = \"{hook}\"\nfinally = \"{hook}\"\n\
             [job.b]\ncontainer = \"x\"\nsources = \"/home\"\n"
        );
        Self::of(folder, &text)
    }

    /// One job in one container, whose hooks write a line to `log`.
    fn with_container_hooks() -> Self {
        let folder = TestFolder::new("sprat-run-");
        let at = folder.path().display().to_string();
        let hook = format!("sh -c 'echo $SPRAT_HOOK $SPRAT_EXIT >> {at}/log'");
        let text = format!(
            "[container.x]\ntarget = \"{at}/x.luks\"\nbefore = \"{hook}\"\nfinally = \"{hook}\"\n\
             [job.a]\ncontainer = \"x\"\nsources = \"/home\"\n"
        );
        Self::of(folder, &text)
    }

    fn of(folder: TestFolder, text: &str) -> Self {
        let path = folder.path().join("sprat.toml");
        std::fs::write(&path, text).unwrap();
        let loaded = load(&[path], &ConfigPlaces::default());
        Self {
            config: loaded.without_mistakes().unwrap(),
            interrupt: Interrupt::never().unwrap(),
            folder,
        }
    }

    fn runner(&self) -> Runner<'_> {
        let at = |name: &str| self.folder.path().join(name);
        let (state, run) = (at("state"), at("run"));
        Runner::new(&self.config, state, run, &self.interrupt, By::Run)
    }

    fn work(&self) -> ContainerWork<'_> {
        let container = &self.config.containers[0];
        ContainerWork {
            name: container.name.clone(),
            target: container.target.clone(),
            container: Some(container),
            copies: self.config.copies().map(CopyWork::of).collect(),
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

fn ends(done: &ContainerDone) -> Vec<&End> {
    done.outcomes.iter().map(|outcome| &outcome.end).collect()
}

#[test]
fn sources_that_a_hook_may_mount_are_not_read_ahead() {
    let scene = Scene::new("");
    let work = scene.work();
    let ready: Vec<_> = ready(&work).map(|spec| spec.job.to_string()).collect();
    assert_eq!(ready, ["b"]);
}

#[test]
fn conditions_are_checked_again_before_each_container() {
    let scene = Scene::new("only_on_ac = true\n");
    let mut runner = scene.runner();
    let battery = scene.folder.path().join("sys/class/power_supply/BAT0");
    std::fs::create_dir_all(&battery).unwrap();
    for (name, value) in [
        ("type", "Battery"),
        ("status", "Discharging"),
        ("capacity", "5"),
    ] {
        std::fs::write(battery.join(name), value).unwrap();
    }
    runner.machine.sys = scene.folder.path().join("sys");
    let mut front = Closed::with(Exit::Failed);
    let done = runner.work_on(&scene.work(), &mut front);
    for end in ends(&done) {
        assert!(matches!(end, End::Skipped { why, stopped: false } if why.contains("battery")));
    }
    assert_eq!(
        (front.opened, done.exit(), scene.log()),
        (0, Exit::Done, String::new())
    );
    let copy = scene.config.copies().next().unwrap();
    let skipped = runner.state(&copy.name()).skipped.unwrap();
    assert!(skipped.reason.contains("battery"), "{skipped:?}");

    // They also stop a copy that is under way.
    let sent = AtomicU64::new(0);
    assert!(
        runner.checks(copy, &sent, TURN_MAX)()
            .unwrap()
            .contains("5 %")
    );
    // A person who wants the copy now has it.
    runner.anyway = true;
    assert_eq!(runner.checks(copy, &sent, TURN_MAX)(), None);
    assert_eq!(
        runner.work_on(&scene.work(), &mut front).exit(),
        Exit::Failed
    );
    assert_eq!(front.opened, 1);
}

#[test]
fn hooks_of_a_failure_wait_until_it_is_more_than_a_server_that_is_away() {
    requires!(needs::root());
    for (exit, hooks) in [
        (Exit::Unreachable, ""),
        (Exit::Locked, ""),
        (Exit::WrongKey, "failed 12\nfinally 12\n"),
        (Exit::Failed, "failed 1\nfinally 1\n"),
    ] {
        let scene = Scene::new("");
        let mut front = Closed::with(exit);
        let done = scene.runner().work_on(&scene.work(), &mut front);
        assert_eq!((done.exit(), &*scene.log()), (exit, hooks));
        assert_eq!(front.begun, ["a@x", "b@x"]);
    }
}

#[test]
fn interrupt_leaves_the_copies_that_did_not_begin_named_and_unchanged() {
    let scene = Scene::new("");
    scene.interrupt.request();
    let mut front = Closed::with(Exit::Failed);
    let done = scene.runner().work_on(&scene.work(), &mut front);
    assert_eq!((done.exit(), done.outcomes.len()), (Exit::Interrupted, 2));
    assert_eq!((front.opened, scene.log()), (0, String::new()));
    assert!(front.begun.is_empty());
    assert!(super::super::attempts(done.outcomes.iter(), By::Run).is_empty());
    assert!(!scene.folder.path().join("state").exists());
}

#[test]
fn job_without_a_success_knows_the_disk_by_the_other_jobs() {
    requires!(needs::root());
    let scene = Scene::new("");
    let disk_at = scene.folder.path().join("disk");
    std::fs::create_dir(&disk_at).unwrap();
    let seen = {
        let _disk = Tmpfs::mount(&disk_at, 1);
        sprat_snapshot::FileSystem::holding(&disk_at)
    };
    let runner = scene.runner();
    let is_tried = |runner: &Runner<'_>| {
        let copies: Vec<_> = scene.config.copies().collect();
        let plan = runner.plan(&copies, Timestamp::now());
        plan.copies
            .iter()
            .map(Selected::is_tried)
            .collect::<Vec<_>>()
    };
    assert_eq!(is_tried(&runner), [true, true]);
    runner.change(&CopyName::new("b", "x"), |state| state.file_system = seen);
    assert_eq!(is_tried(&runner), [false, false]);
    let mut front = Closed::with(Exit::NoContainer);
    let done = runner.work_on(&scene.work(), &mut front);
    assert_eq!((front.opened, done.exit()), (0, Exit::Done));
    assert_eq!(scene.log(), "");
}

#[test]
fn hooks_owed_by_a_job_that_left_the_config_are_reported_once_and_owed_until_it_is_back() {
    let scene = Scene::new("");
    let runner = scene.runner();
    let copy = scene.config.copies().next().unwrap();
    let name = copy.name();
    let mut without = Scene::new("");
    without.config.jobs.retain(|job| job.name.as_str() != "a");
    let later = Runner {
        config: &without.config,
        ..scene.runner()
    };
    let around = Around::of_copy(&runner, copy.job, &name, Timestamp::now()).unwrap();
    assert!(around.as_ref().unwrap().before().is_ok());
    // The process that has begun them lives.
    assert_eq!(later.report_unknown_hooks().len(), 0);
    drop(around);
    let reported = later.report_unknown_hooks();
    let texts: Vec<&str> = reported.iter().map(|one| &*one.failure.what).collect();
    assert_eq!(
        texts,
        [
            "the last run of job a was killed, and its `after` and `finally` hooks did not run: the job is not \
             in the config"
        ]
    );
    assert_eq!(later.report_unknown_hooks().len(), 0);
    assert_eq!(scene.log(), "before\n");
    // It is back.
    assert_eq!(runner.pay_all_owed_hooks().len(), 0);
    assert_eq!(scene.log(), "before\nafter 137\nfinally 137\n");
    assert_eq!(later.report_unknown_hooks().len(), 0);
}

#[test]
fn hooks_owed_by_a_container_that_left_the_config_are_reported_once() {
    let scene = Scene::with_container_hooks();
    // Before the lock of the hooks is acquired: each scene starts a process, which has a copy of the lock's file
    // for a moment.
    let mut without = Scene::with_container_hooks();
    without.config.jobs.clear();
    let mut empty = Scene::with_container_hooks();
    empty.config.jobs.clear();
    empty.config.containers.clear();
    let runner = scene.runner();
    let container = &scene.config.containers[0];
    let around = Around::of_container(&runner, container, Timestamp::now());
    assert!(around.as_ref().unwrap().as_ref().unwrap().before().is_ok());
    let without_jobs = Runner {
        config: &without.config,
        ..scene.runner()
    };
    assert_eq!(without_jobs.report_unknown_hooks().len(), 0);
    let later = Runner {
        config: &empty.config,
        ..scene.runner()
    };
    assert_eq!(later.report_unknown_hooks().len(), 0, "the process lives");
    drop(around);
    let reported = later.report_unknown_hooks();
    assert_eq!(reported.len(), 1);
    assert_eq!(
        reported[0].failure.what,
        "the last run of container x was killed, and its `finally` hooks did not run: the container is not in \
         the config"
    );
    assert_eq!(later.report_unknown_hooks().len(), 0);
    // It is back, and no job uses it.
    assert_eq!(without_jobs.pay_all_owed_hooks().len(), 0);
    assert_eq!(
        (scene.log(), without.log()),
        ("before\n".into(), "finally 137\n".into())
    );
}

#[test]
fn copy_that_gave_way_after_its_turn_comes_after_the_other_container() {
    let folder = TestFolder::new("sprat-run-");
    let at = folder.path().display();
    let text = format!(
        "[container.slow]\ntarget = \"{at}/slow.luks\"\n[container.fast]\ntarget = \"{at}/fast.luks\"\n\
         [job.a]\ncontainer = [\"slow\", \"fast\"]\nsources = \"/home\"\n"
    );
    let scene = Scene::of(folder, &text);
    let runner = scene.runner();
    let copies: Vec<_> = scene.config.copies().collect();
    let order = || {
        let plan = runner.plan(&copies, Timestamp::now());
        let work = plan.work().into_iter();
        work.map(|work| work.name).collect::<Vec<_>>()
    };
    assert_eq!(order(), ["slow", "fast"]);
    let sent = AtomicU64::new(0);
    assert_eq!(runner.checks(copies[0], &sent, TURN_MAX)(), None);
    let reason = runner.checks(copies[0], &sent, Duration::ZERO)().unwrap();
    assert!(reason.contains("another container is due"), "{reason}");
    assert_eq!(order(), ["fast", "slow"]);

    let now = Timestamp::now();
    let ended = |exit| {
        let attempt = crate::copy_state::Attempt {
            run: "r".to_owned(),
            started: now,
            ended: now,
            exit,
            reason: None,
            inputs: String::new(),
        };
        runner.change(&copies[0].name(), |state| state.attempted(attempt));
    };
    // Interrupted again, it has not had its turn.
    ended(Exit::Interrupted);
    assert_eq!(order(), ["fast", "slow"]);
    ended(Exit::Unreachable);
    assert_eq!(order(), ["slow", "fast"]);
}

#[test]
fn clock_in_doubt_is_reported_when_it_begins() {
    let scene = Scene::new("");
    let at = |wall: &str, ran: u64| crate::clock::Moment {
        wall: wall.parse().unwrap(),
        monotonic: Duration::from_secs(ran),
        boottime: Duration::from_secs(ran),
        boot_id: "boot".to_owned(),
    };
    let warning = |moment, trusted| {
        let mut runner = scene.runner();
        runner.begin(&moment, false, trusted);
        runner.take_clock_warning()
    };
    assert_eq!(warning(at("2026-11-28T09:00:00Z", 100), false), None);
    let jumped = || at("2026-11-28T07:30:00Z", 1000);
    assert_eq!(warning(jumped(), true), None);
    let said = warning(jumped(), false).unwrap();
    assert!(
        said.starts_with("this machine's clock was set back by 1 h 45 min. Copies are made, but nothing is pruned"),
        "{said}"
    );
    assert_eq!(warning(jumped(), false), None);
}

#[test]
fn copy_whose_name_is_a_mistake_writes_no_file() {
    let scene = Scene::new("");
    let runner = scene.runner();
    let record = |job: &str, container: &str| {
        let copy = CopyName::new(job, container);
        runner.record_stopped(&copy, &[], Timestamp::now());
        runner.take_problems()
    };
    let (job, container) = ("j".repeat(128), "c".repeat(122));
    for (job, container) in [
        ("../../out", "x"),
        ("a", "../../out"),
        ("a/b", "x"),
        (&*job, &*container),
    ] {
        assert_eq!(record(job, container), [""; 0], "{job}@{container}");
    }
    let names = || {
        let files = std::fs::read_dir(scene.folder.path()).unwrap();
        files
            .map(|file| file.unwrap().file_name())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(), ["sprat.toml"]);
    // The longest names that a config may have.
    assert_eq!(record(&job, &container[..64]), [""; 0]);
    for folder in ["state/schedule", "state/runs"] {
        assert!(scene.folder.path().join(folder).read_dir().unwrap().count() > 0);
    }
}
