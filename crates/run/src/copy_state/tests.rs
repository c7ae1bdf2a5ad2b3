//! What is kept of copies, and what a torn file costs.

use super::*;

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn attempt(exit: Exit, started: &str) -> Attempt {
    Attempt {
        run: "r".to_owned(),
        started: at(started),
        ended: at(started),
        exit,
        reason: None,
        inputs: "i".to_owned(),
    }
}

#[test]
fn failures_count_until_the_next_success_and_interruptions_do_not() {
    let mut state = CopyState::default();
    let started = "2026-11-28T09:00Z";
    for (exit, failures, failed, unreached) in [
        (Exit::Failed, 1, 1, false),
        (Exit::Unreachable, 2, 1, true),
        (Exit::Interrupted, 2, 1, true),
        (Exit::Locked, 3, 1, true),
        (Exit::Failed, 4, 2, false),
        (Exit::Damaged, 5, 2, false),
        (Exit::Unread, 0, 0, false),
        (Exit::Failed, 1, 1, false),
        (Exit::Done, 0, 0, false),
    ] {
        state.attempted(attempt(exit, started));
        let found = (
            state.failures_since,
            state.failed_in_a_row,
            state.not_reached_since.is_some(),
        );
        assert_eq!(found, (failures, failed, unreached), "{exit:?}");
    }
}

#[test]
fn an_incomplete_snapshot_is_a_success_but_not_a_complete_one() {
    let mut state = CopyState::default();
    state.attempted(attempt(Exit::Done, "2026-11-27T09:00Z"));
    state.attempted(attempt(Exit::Unread, "2026-11-28T09:00Z"));
    assert_eq!(state.last_complete, Some(at("2026-11-27T09:00Z")));
    assert_eq!(state.last_success, Some(at("2026-11-28T09:00Z")));
}

#[test]
fn state_of_copies_is_kept_apart_and_torn_files_count_as_unknown() {
    let folder = tempfile::tempdir().unwrap();
    let state_dir = folder.path();
    assert_eq!(known_copies(state_dir).unwrap(), []);
    let (home, www) = (CopyName::new("home", "nas"), CopyName::new("www", "nas"));
    let load = |copy: &CopyName| copy_file(state_dir, copy).read();
    assert_eq!(load(&home), CopyState::default());
    let now = at("2026-11-28T09:00Z");
    copy_file(state_dir, &home).change(|state| state.seen(now));
    copy_file(state_dir, &www).change(|state| state.skip(now, "metered".to_owned()));
    let begun = BegunHooks {
        run: "r".to_owned(),
        started: now,
        after: false,
        finally: true,
        reported: false,
    };
    container_file(state_dir, "nas").change(|state| state.begun = Some(begun.clone()));
    assert_eq!(load(&home).first_seen, Some(now));
    assert!(
        load(&www)
            .skipped
            .is_some_and(|skipped| skipped.reason == "metered")
    );
    assert_eq!(container_file(state_dir, "nas").read().begun, Some(begun));
    assert_eq!(known_copies(state_dir).unwrap(), [home.clone(), www]);
    let path = state_dir.join("schedule/home@nas.json");
    let text = std::fs::read(&path).unwrap();
    for torn in [&text[..text.len() / 2], b"", b"{", b"\0\0\0\0"] {
        std::fs::write(&path, torn).unwrap();
        let mut file = copy_file(state_dir, &home);
        let state = file.read();
        assert_eq!((state.first_seen, state.last_success), (None, None));
        assert!(!file.take_problems().is_empty());
    }
    // A field of a later release does not hide the others.
    std::fs::write(&path, r#"{"failures_since": 3, "later": {}}"#).unwrap();
    assert_eq!(load(&home).failures_since, 3);
}

#[test]
fn accepted_prune_passes_although_copies_are_made_before_it() {
    let mut state = CopyState {
        released: Some(at("2026-11-28T09:00Z")),
        ..CopyState::default()
    };
    state.passed(false, true);
    assert!(state.released.is_some());
    state.passed(true, true);
    assert_eq!(state.released, None);
}

#[test]
fn prune_by_hand_releases_only_what_holds_the_prune() {
    let policy = KeepPolicy {
        rules: sprat_snapshot::KeepRules::default(),
        time_zone: "local".to_owned(),
    };
    for (what, held) in [(HeldWhat::Copy, true), (HeldWhat::Prune, false)] {
        let mut state = CopyState {
            held: Some(Held {
                what,
                since: at("2026-11-28T09:00Z"),
                reason: "r".to_owned(),
            }),
            ..CopyState::default()
        };
        state.pruned_by_hand(policy.clone());
        assert_eq!(state.held.is_some(), held);
        assert_eq!(state.pruned_by.as_ref(), Some(&policy));
    }
}

#[test]
fn each_version_of_a_file_that_changed_silently_is_kept() {
    let version = |file: &str| -> OldContent {
        let json = serde_json::json!({
            "path": "/photo", "bytes": 1, "modified": "2026-11-28T10:00:00Z", "file": file,
        });
        serde_json::from_value(json).unwrap()
    };
    let (first, second) = (version("0000000000000001"), version("0000000000000002"));
    let mut state = CopyState::default();
    for file in [&first, &second, &first] {
        state.changed_silently(Timestamp::UNIX_EPOCH, vec![file.clone()]);
    }
    assert_eq!(state.old_content(), [first, second]);
    assert_eq!(state.silent.as_ref().unwrap().count, 2);
}

#[test]
fn files_beyond_those_with_a_name_are_counted_once_and_keep_all_snapshots() {
    let file = |number: usize| -> OldContent {
        let json = serde_json::json!({
            "path": format!("/{number:05}"), "bytes": 1, "modified": "2026-11-28T10:00:00Z",
            "file": format!("{number:016x}"),
        });
        serde_json::from_value(json).unwrap()
    };
    let now = Timestamp::UNIX_EPOCH;
    let mut state = CopyState::default();
    state.changed_silently(now, (0..SILENT_FILES_MAX).map(file).collect());
    assert_eq!(state.kept_before(), None);
    // Found again and again.
    for _ in 0..3 {
        state.changed_silently(
            now,
            vec![file(SILENT_FILES_MAX), file(SILENT_FILES_MAX + 1)],
        );
        let silent = state.silent.as_ref().unwrap();
        assert_eq!(silent.count, SILENT_FILES_MAX as u64 + 1);
        assert!(silent.reason().starts_with("more than 1,000 source files"));
        assert_eq!(state.kept_before(), Some(Timestamp::MAX));
    }
    // Those with a name are right again. Nothing is known of the others.
    state.right_again(|_| true);
    assert_eq!(state.kept_before(), Some(Timestamp::MAX));
    state.changed_silently(now, vec![file(7)]);
    assert_eq!(state.kept_before(), Some(Timestamp::MAX));
    state.accept(now);
    assert_eq!(state.kept_before(), None);
}

#[test]
fn state_that_can_not_be_read_keeps_all_snapshots_until_a_person_accepts_that() {
    let folder = tempfile::tempdir().unwrap();
    let file = || copy_file(folder.path(), &CopyName::new("home", "nas"));
    assert_eq!(file().read().kept_before(), None, "no file is no loss");
    file().change(|state| state.seen(Timestamp::UNIX_EPOCH));
    let path = folder.path().join(FOLDER).join("home@nas.json");
    std::fs::write(&path, "{\"first_seen\":").unwrap();
    assert_eq!(file().read().kept_before(), Some(Timestamp::MAX));
    // The next run writes it, and knows it from then on.
    file().change(|state| state.seen(Timestamp::UNIX_EPOCH));
    let policy = KeepPolicy {
        rules: sprat_snapshot::KeepRules::default(),
        time_zone: "UTC".to_owned(),
    };
    file().change(|state| state.pruned_by_hand(policy));
    let mut known = file();
    let state = known.read();
    assert_eq!(known.take_problems(), [""; 0]);
    assert_eq!(state.kept_before(), Some(Timestamp::MAX));
    let held = state.held.unwrap();
    assert_eq!(held.what, HeldWhat::Prune);
    assert!(held.reason.contains("could not be read"));
    file().change(|state| state.accept(Timestamp::UNIX_EPOCH));
    let state = file().read();
    assert_eq!((state.kept_before(), state.held), (None, None));
}
