//! What is wrong with a real container is reported once to a real server, and a person accepts it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;

use serde_json::Value;
use sprat_testkit::machine::{CONTAINER, TestMachine};
use sprat_testkit::notice_servers::{NoticeServer, Wire, python_module_missing};
use sprat_testkit::{needs, program, requires};

/// Kind and state of each notice that the server received.
fn notices(server: &NoticeServer) -> Vec<String> {
    let received = server.received();
    let sent = received.iter().filter(|request| request["path"] == "/hook");
    let short = |request: &Value| {
        let body = request["body"].as_str().unwrap();
        let notice: Value = serde_json::from_str(body).unwrap();
        let field = |name: &str| notice[name].as_str().unwrap().to_owned();
        format!("{} {}", field("kind"), field("state"))
    };
    sent.map(short).collect()
}

/// The pings that the server received, without their ids.
fn pings(server: &NoticeServer) -> Vec<String> {
    let received = server.received();
    let paths = received
        .iter()
        .map(|request| request["path"].as_str().unwrap());
    let paths = paths.filter(|path| path.starts_with("/ping"));
    paths
        .map(|path| path.split('?').next().unwrap().to_owned())
        .collect()
}

/// A config with a copy that reports to the server. `job` and `notify` are further lines of these tables.
fn config(machine: &TestMachine, server: &NoticeServer, job: &str, notify: &str) -> String {
    format!(
        "[container.nas]\ntarget = \"{}\"\nkey_file = \"{}\"\n\
         [job.home]\ncontainer = \"nas\"\nsources = \"{}\"\n{job}\
         [notify]\nwebhook = \"http://127.0.0.1:{}/hook\"\n{notify}",
        machine.path(CONTAINER).display(),
        machine.path("config/keys/x.key").display(),
        machine.path("src").display(),
        server.port,
    )
}

#[test]
fn damage_that_a_restore_finds_is_reported_once_until_it_is_accepted() {
    requires!(needs::root(), python_module_missing("http.server"));
    let server = NoticeServer::http(Wire::Plain);
    let machine = TestMachine::with_container();
    let config = config(&machine, &server, "", "");
    machine.write("config/sprat.toml", &config);
    machine.ok(&["backup", "home"]);
    std::fs::copy(machine.path(CONTAINER), machine.path("older")).unwrap();
    machine.write("src/b", "b");
    machine.ok(&["backup", "home"]);
    let status = ["status", "--offline"];
    machine.ok(&status);
    // The server shows a state from before the last backup.
    std::fs::rename(machine.path("older"), machine.path(CONTAINER)).unwrap();
    let back = machine.path("back").display().to_string();
    let restore = ["restore", "nas", "home", "--to", &back];
    machine.sprat(&restore).failed_with(13);
    machine.sprat(&restore).failed_with(13);
    assert_eq!(notices(&server), ["damage opened"]);
    machine.sprat(&status).failed_with(13);
    // A check of the structure alone does not say that the data is good.
    let check = ["check", "nas", "--accept-older-state"];
    machine.ok(&check);
    let alert = ["status", "--alert", "--offline"];
    machine.sprat(&alert).failed_with(13);
    assert_eq!(notices(&server), ["damage opened"]);
    machine.ok(&["accept", "nas"]);
    machine.ok(&alert);
    machine.ok(&status);
    assert_eq!(notices(&server), ["damage opened", "recovered closed"]);
    machine.nothing_is_left();
}

#[test]
fn failed_run_is_reported_by_mail_over_smtp() {
    requires!(needs::root(), python_module_missing("aiosmtpd"));
    let server = NoticeServer::smtp(Wire::Tls, Some(("me", "hush hush")));
    let machine = TestMachine::new();
    let certificate = machine.write("cert.pem", server.certificate());
    machine.write("password", "hush hush\n");
    machine.write("x.key", "key");
    machine.write("src/a", "alpha");
    let config = format!(
        "[container.nas]\ntarget = \"{}\"\nkey_file = \"{}\"\n\
         [job.home]\ncontainer = \"nas\"\nsources = \"{}\"\n\
         [notify]\nmail = {{ to = [\"anna@example.org\", \"bob@example.org\"], \
         from = \"sprat@example.org\", smtp = \"smtps://me@localhost:{}\", \
         password_file = \"{}\" }}\n",
        machine.path(CONTAINER).display(),
        machine.path("x.key").display(),
        machine.path("src").display(),
        server.port,
        machine.path("password").display(),
    );
    machine.write("config/sprat.toml", &config);
    let sprat = |trusts: bool, arguments: &[&str]| {
        let mut command = machine.command_of(program::sprat());
        // OpenSSL reads it in place of the system's certificates.
        if trusts {
            command.env("SSL_CERT_FILE", &certificate);
        }
        machine.run(command.args(arguments))
    };
    let refused = sprat(false, &["notify", "test"]);
    assert_eq!(refused.code, 1, "{}", refused.whole());
    assert!(!refused.whole().contains("hush"), "{}", refused.whole());
    assert!(server.received().is_empty());
    // There is no container.
    assert_eq!(sprat(true, &["run", "--now"]).code, 10);
    let received = server.received();
    let to: Vec<&Value> = received.iter().map(|mail| &mail["to"][0]).collect();
    assert_eq!(to, ["anna@example.org", "bob@example.org"]);
    let content = received[0]["content"].as_str().unwrap();
    assert!(
        content.contains("home@nas: the backup failed (code 10)"),
        "{content}"
    );
    assert_eq!(sprat(true, &["notify", "flush"]).code, 0);
    assert_eq!(server.received().len(), 2, "a mail came twice");
    machine.nothing_is_left();
}

/// Far more to upload waits for a person, and so does the removal of what was there before far more changed.
#[test]
fn growth_and_change_are_alarms_before_it_is_too_late() {
    requires!(needs::root(), python_module_missing("http.server"));
    let server = NoticeServer::http(Wire::Plain);
    let machine = TestMachine::with_container();
    let job = "growth = \"stop\"\ngrowth_limit = \"1 MiB\"\nkeep_last = 2\nprune_every = \"0 s\"\n";
    let config = config(&machine, &server, job, "");
    machine.write("config/sprat.toml", &config);
    for number in 0..1200 {
        machine.write(&format!("src/many/{number}"), "before");
    }
    let run = || machine.ok(&["run", "--now"]);
    let snapshots = || {
        let listed = machine.ok(&["snapshots", "nas", "--json"]).json();
        listed["snapshots"].as_array().unwrap().len()
    };
    for _ in 0..5 {
        run();
    }
    assert_eq!(snapshots(), 2);
    assert!(notices(&server).is_empty());

    // Twice the limit: nothing is copied, and the dry run shows what it is.
    std::fs::write(machine.path("src/video"), vec![7; 2 << 20]).unwrap();
    let preview = machine.ok(&["backup", "home", "--dry-run"]).stdout;
    let what = "since the last snapshot: 1 file with 2.0 MiB are new or changed";
    assert!(preview.contains(what), "{preview}");
    for _ in 0..2 {
        let held = run();
        assert!(held.whole().contains("held"), "{}", held.whole());
    }
    assert_eq!(notices(&server), ["growth opened"]);
    let status = machine
        .ok(&["status", "home@nas", "--offline", "--json"])
        .json();
    let held = &status["containers"][0]["jobs"]["home"]["held"]["reason"];
    let reason = held.as_str().unwrap();
    assert!(reason.contains("video (2.0 MiB)"), "{reason}");
    machine.ok(&["accept", "home@nas"]);
    run();
    let files = machine.ok(&[
        "restore",
        "nas",
        "home",
        "--to",
        machine.path("back").to_str().unwrap(),
    ]);
    let back = machine
        .path("back")
        .join(machine.path("src/video").strip_prefix("/").unwrap());
    assert!(back.exists(), "{}", files.whole());
    run();
    assert_eq!(notices(&server), ["growth opened", "recovered closed"]);

    // Nearly every file is another one, as after ransomware. The copy is made, and the old ones stay.
    for number in 0..1100 {
        machine.write(&format!("src/many/{number}"), "encrypted");
    }
    for _ in 0..3 {
        run();
    }
    assert_eq!(notices(&server)[2..], ["change opened"]);
    // The two from before, and of the three later ones the two that the rules keep.
    assert_eq!(snapshots(), 4);
    // Later changes move nothing.
    for number in 0..1100 {
        machine.write(&format!("src/many/{number}"), "encrypted again");
    }
    run();
    assert_eq!(snapshots(), 4);
    machine.ok(&["prune", "nas", "--job", "home"]);
    assert_eq!(snapshots(), 4);
    // Nor by another path to the container.
    std::os::unix::fs::symlink(machine.path("store"), machine.path("link")).unwrap();
    machine.ok(&["prune", "link/x.luks", "--job", "home", "--keep-last", "2"]);
    assert_eq!(snapshots(), 4);
    let accepted = machine.ok(&["accept", "home@nas"]).stdout;
    assert!(accepted.contains("1,100 of the 1,203 files"), "{accepted}");
    run();
    assert_eq!(snapshots(), 2);
    assert_eq!(notices(&server)[3..], ["recovered closed"]);

    // `backup` may run from a script: nothing waits, but a mass change keeps the old ones as in a run.
    for number in 0..1100 {
        machine.write(&format!("src/many/{number}"), "by hand");
    }
    std::fs::write(machine.path("src/more"), vec![8; 2 << 20]).unwrap();
    let said = machine.ok(&["backup", "home"]).stderr;
    assert!(said.contains("changed or are gone"), "{said}");
    assert!(said.contains("`sprat accept home@nas`"), "{said}");
    run();
    run();
    assert_eq!(snapshots(), 4);
    assert_eq!(notices(&server)[4..], ["change opened"]);
    machine.ok(&["accept", "home@nas"]);
    run();
    assert_eq!(snapshots(), 2);
    machine.nothing_is_left();
}

#[test]
fn failure_and_damage_are_reported_once_and_anybody_sees_the_status() {
    requires!(needs::root(), python_module_missing("http.server"));
    let server = NoticeServer::http(Wire::Plain);
    let machine = TestMachine::with_container();
    let notify = format!(
        "healthchecks = \"http://127.0.0.1:{}/ping\"\nmetrics = \"{}\"\n",
        server.port,
        machine.path("sprat.prom").display(),
    );
    let config = config(&machine, &server, "", &notify);
    machine.write("config/sprat.toml", &config);
    let tested = machine.ok(&["notify", "test"]);
    assert_eq!(tested.stdout, "webhook  delivered\n");
    assert_eq!(notices(&server), ["digest test"]);
    machine.ok(&["backup", "home"]);
    // A run that fails is reported, and the next one that works.
    std::fs::rename(machine.path("src"), machine.path("away")).unwrap();
    machine.sprat(&["run", "--now"]).failed_with(1);
    std::fs::rename(machine.path("away"), machine.path("src")).unwrap();
    machine.ok(&["run", "--now"]);
    assert_eq!(
        notices(&server)[1..],
        ["failure opened", "recovered closed"]
    );
    assert_eq!(
        pings(&server),
        ["/ping/start", "/ping/fail", "/ping/start", "/ping"]
    );
    // A hook that says "not now" is no attempt.
    let not_now = config.replace("[notify]", "before = \"sh -c 'exit 75'\"\n[notify]");
    machine.write("config/sprat.toml", not_now);
    machine.ok(&["run", "--now"]);
    machine.write("config/sprat.toml", &config);
    assert_eq!(pings(&server).len(), 4);
    let metrics = std::fs::read_to_string(machine.path("sprat.prom")).unwrap();
    let code = "sprat_last_attempt_code{job=\"home\",container=\"nas\"} 0";
    assert!(metrics.contains(code), "{metrics}");
    let alert = ["status", "--alert", "--offline"];
    assert_eq!(machine.ok(&alert).whole(), machine.ok(&alert).whole());
    let seen = machine.ok(&["status", "home@nas", "--json"]).json();
    let job = &seen["containers"][0]["jobs"]["home"];
    assert_eq!(
        (&job["overdue"], &job["in_config"]),
        (&false.into(), &true.into())
    );
    machine.ok(&["status", "home", "--history"]);
    assert_eq!(notices(&server).len(), 3);

    // In the second copy of the header: a check finds it.
    let file = File::options().write(true).open(machine.path(CONTAINER));
    file.unwrap().write_all_at(&[0; 64], 20_490).unwrap();
    machine.sprat(&["check", "nas"]).failed_with(13);
    machine.sprat(&alert).failed_with(13);
    machine.sprat(&alert).failed_with(13);
    assert_eq!(notices(&server)[3..], ["damage opened"]);
    let listed = machine.ok(&["notify", "list"]).stdout;
    assert!(listed.contains("nas: damage was found"), "{listed}");
    assert!(listed.contains("webhook: delivered 2"), "{listed}");

    // Without root and without a config.
    let nobody = || {
        machine.sprat_as_nobody(&["--version"]);
        let mut command = machine.command_of(machine.path("sprat"));
        command.env("SPRAT_CONFIG_DIR", machine.path("none"));
        machine.run(command.args(["status"]).uid(65534).gid(65534))
    };
    let public = nobody();
    assert_eq!(public.code, 13, "{}", public.whole());
    assert!(public.stdout.contains("home@nas"), "{}", public.whole());
    assert!(!public.stdout.contains('/'), "{}", public.whole());

    let accepted = machine.ok(&["accept", "nas"]).stdout;
    assert!(
        accepted.contains("The check (quick) found damage."),
        "{accepted}"
    );
    assert!(accepted.contains("1 event accepted"), "{accepted}");
    let nothing = machine.ok(&["accept", "home@nas"]).stdout;
    assert_eq!(nothing, "home@nas has no event that waits for you\n");
    // What the check found stays known, and is not reported again.
    machine.sprat(&alert).failed_with(13);
    assert_eq!(notices(&server)[4..], ["recovered closed"]);

    // A mistake in the config silences nothing, and the next one that sends reports it.
    machine.write("config/sprat.toml", format!("{config}ntfi = \"x\"\n"));
    machine.sprat(&["status"]).failed_with(2);
    machine.sprat(&alert).failed_with(13);
    assert_eq!(notices(&server)[5..], ["config opened"]);
    machine.nothing_is_left();
}

#[test]
fn backup_into_another_container_of_that_name_closes_no_alarm() {
    requires!(needs::root(), python_module_missing("http.server"));
    let server = NoticeServer::http(Wire::Plain);
    let machine = TestMachine::with_container();
    let notify = format!("healthchecks = \"http://127.0.0.1:{}/ping\"\n", server.port);
    machine.write("config/sprat.toml", config(&machine, &server, "", &notify));
    let key = machine.path("config/keys/x.key").display().to_string();
    std::fs::create_dir(machine.path("usb")).unwrap();
    std::fs::rename(machine.path(CONTAINER), machine.path("usb/nas.luks")).unwrap();
    machine.sprat(&["run", "--now"]).failed_with(10);
    assert_eq!(notices(&server), ["failure opened"]);
    let before = pings(&server);
    // Its file has the name of the config's container, and its job the name of the config's job.
    let by_hand = [
        "backup",
        "usb/nas.luks",
        "--name",
        "home",
        "src",
        "--key-file",
        &key,
    ];
    machine.ok(&by_hand);
    assert_eq!(notices(&server), ["failure opened"]);
    assert_eq!(pings(&server), before);
    std::fs::rename(machine.path("usb/nas.luks"), machine.path(CONTAINER)).unwrap();
    machine.ok(&["run", "--now"]);
    assert_eq!(notices(&server)[1..], ["recovered closed"]);
}
