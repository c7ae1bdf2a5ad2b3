//! The steps with a person who answers from a list, and a container that can't be made.

use std::collections::VecDeque;

use sprat_testkit::{needs, requires};

use super::*;

#[derive(Default)]
struct Person {
    answers: VecDeque<&'static str>,
    asked: Vec<String>,
    said: Vec<String>,
    /// Sheet and jobs of the container that was to be made.
    wished: Option<(Option<PathBuf>, Vec<SheetJob>)>,
}

impl Host for Person {
    fn show(&mut self, text: &str) {
        self.said.push(text.to_owned());
    }
    fn ask(&mut self, prompt: &str) -> Result<String, Failure> {
        self.asked.push(prompt.to_owned());
        let answer = self.answers.pop_front();
        Ok(answer
            .unwrap_or_else(|| panic!("asked {prompt}"))
            .to_owned())
    }
    fn ask_secret(&mut self, prompt: &str) -> Result<Zeroizing<String>, Failure> {
        self.ask(prompt).map(Zeroizing::new)
    }
    fn note(&mut self, text: &str) {
        self.said.push(text.to_owned());
    }
    fn warn(&mut self, text: &str) {
        self.said.push(format!("warning: {text}"));
    }
    fn check_interrupt(&self) -> Result<(), Failure> {
        Ok(())
    }
    fn make_container(&mut self, wish: ContainerWish<'_>) -> Result<RecoveryKey, Failure> {
        self.wished = Some((wish.sheet.map(Path::to_owned), wish.jobs));
        Err(Failure::failed("no container today"))
    }
    fn back_up(&mut self, _: &CopyName) -> Result<Exit, Failure> {
        panic!("nothing is set up")
    }
}

struct Scene {
    folder: tempfile::TempDir,
    machine: Machine,
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config", "store", "src"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        std::fs::write(folder.path().join("src/a"), "a").unwrap();
        let machine = Machine {
            host: "laptop.example.org".to_owned(),
            places: ConfigPlaces {
                root: false,
                home: None,
                folder: Some(folder.path().join("config")),
            },
            current_dir: folder.path().to_owned(),
            state_dir: folder.path().join("state"),
            answer_timeout: None,
            network: Network::default(),
            program: "/bin/true".into(),
            schedule: Err("not in a test"),
        };
        Self { folder, machine }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, request: &Request, person: &mut Person) -> Failure {
        run(request, &self.machine, person).unwrap_err()
    }

    fn setup<'s>(&'s self, request: &'s Request, person: &'s mut Person) -> Setup<'s> {
        Setup {
            request,
            machine: &self.machine,
            config: load_config(&self.machine, None).unwrap(),
            host: person,
            did_something: false,
            is_unfinished: false,
        }
    }
}

fn missing() -> Option<String> {
    let programs = ["rsync", "mkfs.ext4"];
    needs::root()
        .or_else(|| programs.into_iter().find_map(needs::program))
        .or_else(needs::devices)
}

#[test]
fn what_is_not_given_is_asked_in_order_and_bad_answers_again() {
    requires!(missing());
    let scene = Scene::new();
    let mut person = Person {
        answers: ["nowhere", "store", "/not/there", "src", "weekly", "none"].into(),
        ..Person::default()
    };
    let failure = scene.run(&Request::default(), &mut person);
    assert_eq!(failure.what, "no container today");
    assert!(person.answers.is_empty());
    let first: Vec<&str> = person
        .asked
        .iter()
        .map(|one| one.split('?').next().unwrap())
        .collect();
    let (to, what, report) = (
        "Where shall the backups go",
        "What shall be backed up",
        "Where shall problems be reported",
    );
    assert_eq!(first, [to, to, what, what, report, report]);
    let (sheet, jobs) = person.wished.unwrap();
    assert_eq!(sheet, None);
    assert_eq!(jobs[0].sources, [scene.path("src").display().to_string()]);
    // Nothing is written before the container is there.
    assert!(!scene.path("config/conf.d").exists());

    // The next setup knows the place.
    let mut person = Person {
        answers: ["src", "none"].into(),
        ..Person::default()
    };
    scene.run(&Request::default(), &mut person);
    assert_eq!(person.asked.len(), 2);

    // Three answers that can't be used end it.
    let mut person = Person {
        answers: ["1 2", "", "/not/there"].into(),
        ..Person::default()
    };
    std::fs::remove_dir_all(scene.path("state")).unwrap();
    let request = Request {
        target: Some("store".to_owned()),
        what: vec!["src".to_owned()],
        notify: None,
        ..Request::default()
    };
    let failure = scene.run(&request, &mut person);
    assert_eq!(failure.exit, Exit::Usage, "{failure:?}");
}

#[test]
fn without_questions_everything_that_has_no_default_must_be_given() {
    let scene = Scene::new();
    let sheet = Some(scene.path("sheet.txt"));
    for (target, sheet, notify, lacks) in [
        (None, &sheet, Some("none"), "TARGET"),
        (Some("store"), &None, Some("none"), "--sheet"),
        (Some("store"), &sheet, None, "--notify"),
        (Some("store"), &sheet, Some("pigeon"), "pigeon"),
    ] {
        if lacks == "--notify" && desktop_is_used() {
            continue;
        }
        let request = Request {
            target: target.map(str::to_owned),
            sheet: sheet.clone(),
            notify: notify.map(str::to_owned),
            yes: true,
            ..Request::default()
        };
        let failure = scene.run(&request, &mut Person::default());
        assert_eq!(failure.exit, Exit::Usage, "{failure:?}");
        assert!(failure.what.contains(lacks), "{failure:?}");
        assert!(!scene.path("state").exists());
    }
}

#[test]
fn file_of_setup_that_was_changed_is_shown_and_left() {
    requires!(missing());
    let scene = Scene::new();
    std::fs::create_dir(scene.path("config/conf.d")).unwrap();
    let file = scene.path("config/conf.d/setup-laptop.toml");
    std::fs::write(&file, "# mine\n").unwrap();
    let request = Request {
        target: Some("store".to_owned()),
        what: vec!["src".to_owned()],
        notify: Some("none".to_owned()),
        ..Request::default()
    };
    let mut person = Person::default();
    let failure = scene.run(&request, &mut person);
    assert!(failure.what.contains("never changes it"), "{failure:?}");
    assert!(
        failure.causes[0].contains("[container.laptop]"),
        "{failure:?}"
    );
    assert!(person.wished.is_none(), "a container was made");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "# mine\n");
}

#[test]
fn answer_that_the_config_refuses_is_never_written() {
    let scene = Scene::new();
    let (request, mut person) = (Request::default(), Person::default());
    let mut setup = scene.setup(&request, &mut person);
    let mut progress = Progress::of(&scene.machine.state_dir, "laptop").unwrap();
    // The container is there already, so nothing has checked the plan.
    let plan = Plan {
        name: "laptop".to_owned(),
        container: None,
        job: None,
        report: Some(answers::report("mail:a@b.example,c@d.example").unwrap()),
    };
    let failure = setup.write_config(&plan, &mut progress).unwrap_err();
    assert_eq!(failure.exit, Exit::Usage, "{failure:?}");
    assert!(!scene.path("config/conf.d/setup-laptop.toml").exists());
    load_config(&scene.machine, None).unwrap();
}

#[test]
fn schedule_is_installed_once_and_a_failure_stops_nothing() {
    let mut scene = Scene::new();
    let root = scene.path("root");
    scene.machine.schedule = Ok(schedule::Places::below(&root));
    let request = Request {
        schedule: true,
        ..Request::default()
    };
    let install = |cron: bool| {
        if cron {
            std::fs::create_dir_all(root.join("etc/cron.d")).unwrap();
        }
        let mut person = Person::default();
        let mut setup = scene.setup(&request, &mut person);
        setup.install_schedule();
        (setup.did_something, setup.is_unfinished)
    };
    assert_eq!(install(false), (false, true));
    assert_eq!(install(true), (true, false));
    assert_eq!(install(true), (false, false));
    let cron = std::fs::read_to_string(root.join("etc/cron.d/sprat")).unwrap();
    assert!(cron.contains("/bin/true run --scheduled"), "{cron}");
}
