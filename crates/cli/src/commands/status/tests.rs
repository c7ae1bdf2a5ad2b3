//! Tests of what `status` shows.

use std::path::Path;

use sprat_session::address::Target;
use sprat_session::state::checks::{KeptCheck, KeptChecks};
use sprat_session::state::history::{History, MadeSnapshot, Run, SeenRoom};
use sprat_session::status::LockStatus;
use sprat_session::{CONNECTIONS, SshOptions, VolumeRoom};

use super::*;
use crate::secrets::SecretSource;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_795_600_000 + second).unwrap()
}

fn found(server: Option<Result<ServerStatus, Failure>>, known: Option<LocalStatus>) -> Shown {
    Shown {
        resolved: Resolved {
            name: "laptop".to_owned(),
            target: Target::parse("host:x.luks", Path::new("/")).unwrap(),
            ssh: SshOptions::default(),
            secret: SecretSource::Terminal,
            own_secret: SecretSource::Terminal,
            default_key_file: None,
            allow_no_fsync: false,
            connections: CONNECTIONS,
        },
        status: ContainerStatus {
            known: Ok(known),
            jobs: None,
            server,
        },
    }
}

#[test]
fn what_is_in_order_and_what_is_not_are_both_told() {
    let mut history = History {
        room: Some(SeenRoom {
            at: at(0),
            room: VolumeRoom {
                total_bytes: 5 << 40,
                available_bytes: 1 << 30,
                inodes: 1000,
                free_inodes: 900,
            },
        }),
        ..History::default()
    };
    let run = |failure: Option<&str>| Run {
        at: at(3600),
        exit: Exit::Done,
        failure: failure.map(str::to_owned),
    };
    let made = MadeSnapshot {
        at: at(0),
        name: "2026-11-25T13-21-01Z".to_owned(),
        complete: false,
        missing: Vec::new(),
    };
    let kept = |exit, finished| KeptCheck {
        at: at(0),
        exit,
        finished,
        result: Value::Null,
    };
    history.ran("home", run(None), Some(made));
    history.ran("www", run(Some("no \u{1b}[2Jline")), None);
    let known = LocalStatus {
        uuid: "u".to_owned(),
        history,
        checks: KeptChecks {
            quick: Some(kept(Exit::Done, true)),
            read_data: Some(kept(Exit::Damaged, false)),
            ..KeptChecks::default()
        },
        proved: None,
        written_bytes: Some(WRITTEN_MANY_BYTES - 1),
    };
    let server = ServerStatus {
        available_bytes: Some(1 << 20),
        total_bytes: Some(1 << 40),
        container_bytes: 5 << 40,
        allocated_bytes: None,
        reserve_bytes: 0,
        locked: Some(LockStatus {
            file: "x.luks.lock.3".to_owned(),
            since: Some(at(3000)),
            renewed: None,
        }),
    };
    let mut all = found(Some(Ok(server)), Some(known));
    insta::assert_snapshot!(all.text(at(7200)), @r"
    laptop: host:./x.luks
      server     1.0 MiB of 1.0 TiB free; LOW: make room there, or with `sprat prune` and `sprat trim`
      container  may grow to 5.0 TiB; the server can't report what it takes now
      reserve    none: on a full disk even pruning may not work
      lock       locked since 2026-11-25 10:36 UTC, 1 h 10 min ago (x.luks.lock.3): a session runs, or one died
      volume     1.0 GiB of 5.0 TiB and 900 files free (2026-11-25 09:46 UTC, 2 h 0 min ago); NEARLY FULL: `sprat prune`, or `sprat grow`
      checks     quick: whole, 2 h 0 min ago; --read-data: DAMAGED, 2 h 0 min ago
      keys       never rehearsed here: `sprat key rehearse` proves that the sheet opens it
      job home   last snapshot 2026-11-25T13-21-01Z, some files unread, 2 h 0 min ago
      job www    no snapshot by this machine yet; last run FAILED 1 h 0 min ago: no \u{1b}[2Jline
    ");
    if let Ok(Some(known)) = &mut all.status.known {
        known.written_bytes = Some(WRITTEN_MANY_BYTES);
        let text = all.text(at(7200));
        assert!(
            text.contains("1.0 TiB were written under one volume key"),
            "{text}"
        );
    }
    // The damage that a check found comes first; then what failed; then what is missing.
    assert_eq!(all.status.exit(), Exit::Damaged);
    if let Ok(Some(known)) = &mut all.status.known {
        known.checks = KeptChecks {
            quick: Some(kept(Exit::Done, true)),
            ..KeptChecks::default()
        };
    }
    assert_eq!(all.status.exit(), Exit::Failed);
    if let (Ok(Some(known)), Some(Ok(server))) = (&mut all.status.known, &mut all.status.server) {
        known.history.room = None;
        server.available_bytes = Some(1 << 40);
    }
    assert_eq!(all.status.exit(), Exit::Failed, "the job www");
    all.status.jobs = Some(vec!["home".to_owned()]);
    assert_eq!(all.status.exit(), Exit::Unread, "of the job home");
    assert!(
        all.text(at(7200))
            .contains("job www    not in the config; no snapshot")
    );
    let gone = Failure::new(Exit::Unreachable, "the server was not reached");
    let gone = found(Some(Err(gone)), None);
    assert_eq!(gone.status.exit(), Exit::Unreachable);
    insta::assert_snapshot!(gone.text(at(7200)), @r"
    laptop: host:./x.luks
      server      the server was not reached
      known here  nothing: no session of this machine yet
    ");
}
