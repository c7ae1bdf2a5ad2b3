//! Adds and removes key slots, with an interruption after each step.

use std::time::Instant;

use sprat_luks::{
    CopyState, Extent, FormatOptions, Header, HeaderWrite, LuksError, Secret, SectorCipher,
    SlotKind, Turn,
};

use crate::stock::{
    FIRST, Files, Ours, apply, cryptsetup, cryptsetup_is_here, cryptsetup_ok, opens,
};

const FAST: FormatOptions = FormatOptions {
    uuid: None,
    label: None,
    fast_kdf_for_tests: true,
};

fn secret(text: &str) -> Secret {
    Secret::passphrase(text.to_owned())
}

#[test]
fn an_added_slot_opens_here_and_with_cryptsetup_and_can_be_removed() {
    let ours = Ours::make();
    let mut bytes = ours.bytes();
    let header = Header::load(&bytes.as_slice()).unwrap();
    let key = header.unlock(&bytes.as_slice(), &ours.key()).unwrap();
    let writes = header
        .add_slot(&key, &secret("new"), SlotKind::Passphrase, &FAST, FIRST)
        .unwrap();
    apply(&writes, writes.len(), &mut bytes);
    let changed = Header::load(&bytes.as_slice()).unwrap();
    changed.check_pins(&ours.made.pins).unwrap();
    let step = changed.sequence_id() - header.sequence_id();
    assert!((256..512).contains(&step), "{step}");
    assert_eq!(changed.slots().len(), 3);
    for secret in [secret("new"), ours.key(), ours.recovery.secret()] {
        assert!(opens(&bytes, &secret));
    }
    if cryptsetup_is_here() {
        let path = Files::new();
        let file = path.holding("changed", &bytes);
        let name = file.to_str().unwrap();
        let output = cryptsetup(&["open", "--test-passphrase", name], b"new\n");
        assert!(output.status.success());
    }
    let writes = changed.remove_slot(0, FIRST).unwrap();
    apply(&writes, writes.len(), &mut bytes);
    assert!(!opens(&bytes, &ours.key()));
    assert!(opens(&bytes, &secret("new")));
    assert!(opens(&bytes, &ours.recovery.secret()));
}

#[test]
fn a_change_interrupted_after_any_step_opens_with_every_key_that_stays() {
    let ours = Ours::make();
    let bytes = ours.bytes();
    let header = Header::load(&bytes.as_slice()).unwrap();
    let key = header.unlock(&bytes.as_slice(), &ours.key()).unwrap();
    let added = header
        .add_slot(&key, &secret("new"), SlotKind::Passphrase, &FAST, FIRST)
        .unwrap();
    let removed = header.remove_slot(1, FIRST).unwrap();
    for writes in [added, removed] {
        for (step, write) in writes.iter().enumerate() {
            let mut state = bytes.clone();
            apply(&writes, step, &mut state);
            // A torn write of this step: half new, half old.
            if let HeaderWrite::Write(extent) = write {
                let half = extent.bytes.len() / 2;
                state[extent.offset as usize..][..half].copy_from_slice(&extent.bytes[..half]);
            }
            assert!(opens(&state, &ours.key()), "after {step} steps");
            let header = Header::load(&state.as_slice()).unwrap();
            let repair = header.repair().unwrap();
            apply(&repair, repair.len(), &mut state);
            let repaired = Header::load(&state.as_slice()).unwrap();
            assert!(repaired.copies().both_good(), "after {step} steps");
            assert!(opens(&state, &ours.key()), "after {step} steps");
        }
    }
}

/// The writes of a change, without its barriers.
fn extents(writes: Vec<HeaderWrite>) -> Vec<Extent> {
    let extents = writes.into_iter().filter_map(|write| match write {
        HeaderWrite::Write(extent) => Some(extent),
        HeaderWrite::Barrier => None,
    });
    extents.collect()
}

fn write(bytes: &mut [u8], extent: &Extent) {
    bytes[extent.offset as usize..][..extent.bytes.len()].copy_from_slice(&extent.bytes);
}

/// One machine goes to sleep in the middle of a change, with one write in its connection. Another
/// machine takes the container over, repairs the header, adds a recovery key and proves it. Then the
/// write arrives.
#[test]
fn a_late_write_of_a_change_damages_no_newer_key() {
    let ours = Ours::make();
    let before = ours.bytes();
    let header = Header::load(&before.as_slice()).unwrap();
    let key = header.unlock(&before.as_slice(), &ours.key()).unwrap();
    let add = |bytes: &[u8], text: &str, turn| {
        let header = Header::load(&bytes).unwrap();
        header.add_slot(&key, &secret(text), SlotKind::Passphrase, &FAST, turn)
    };
    // The sleeping machine itself may have taken over from another one.
    for after_takeover in [false, true] {
        let sleeper = Turn {
            lease: 12,
            after_takeover,
        };
        let taker = Turn {
            lease: 13,
            after_takeover: true,
        };
        let added = add(&before, "asleep", sleeper).unwrap();
        let removed = header.remove_slot(1, sleeper).unwrap();
        for writes in [extents(added), extents(removed)] {
            for (late, held) in writes.iter().enumerate() {
                let mut bytes = before.clone();
                writes[..late]
                    .iter()
                    .for_each(|extent| write(&mut bytes, extent));
                let present = Header::load(&bytes.as_slice()).unwrap();
                let repair = extents(present.repair().unwrap());
                repair.iter().for_each(|extent| write(&mut bytes, extent));
                let made = extents(add(&bytes, "made meanwhile", taker).unwrap());
                made.iter().for_each(|extent| write(&mut bytes, extent));
                let there = Header::load(&bytes.as_slice()).unwrap();
                write(&mut bytes, held);
                let what = format!("write {late}, {sleeper:?}");
                let now = Header::load(&bytes.as_slice()).unwrap();
                assert_eq!(now.sequence_id(), there.sequence_id(), "{what}");
                assert_eq!(now.slots(), there.slots(), "{what}");
                let copies = [&now.copies().primary, &now.copies().secondary];
                let stale = |copy: &&CopyState| matches!(copy, CopyState::Stale { .. });
                let expected = usize::from(held.offset < 32768);
                let found = copies.into_iter().filter(stale).count();
                assert_eq!(found, expected, "{what}");
                for key in [secret("made meanwhile"), ours.key()] {
                    assert!(opens(&bytes, &key), "{what}");
                }
                if cryptsetup_is_here() {
                    let files = Files::new();
                    let file = files.holding("met", &bytes);
                    let name = file.to_str().unwrap();
                    cryptsetup_ok(&["open", "--test-passphrase", name], b"made meanwhile\n");
                }
            }
        }
    }
}

#[test]
fn a_change_writes_little_and_orders_each_copy() {
    let ours = Ours::make();
    let bytes = ours.bytes();
    let header = Header::load(&bytes.as_slice()).unwrap();
    let writes = header.remove_slot(1, FIRST).unwrap();
    let shape: Vec<Option<u64>> = writes
        .iter()
        .map(|write| match write {
            HeaderWrite::Write(extent) => Some(extent.offset),
            HeaderWrite::Barrier => None,
        })
        .collect();
    assert_eq!(
        shape,
        [
            Some(32768 + 258_048),
            None,
            Some(16384),
            None,
            Some(0),
            None
        ]
    );
    let sent: usize = ours.made.header.iter().map(|e| e.bytes.len()).sum();
    assert_eq!(sent, 2 * 258_048 + 2 * 16384);
}

#[test]
fn invalid_changes_are_refused() {
    let ours = Ours::make();
    let mut bytes = ours.bytes();
    let header = Header::load(&bytes.as_slice()).unwrap();
    let refused = |error: LuksError| matches!(error, LuksError::Argument { .. });
    assert!(refused(header.remove_slot(9, FIRST).unwrap_err()));
    let foreign = Ours::make().made.volume_key;
    let error = header.add_slot(&foreign, &secret("x"), SlotKind::Passphrase, &FAST, FIRST);
    assert!(refused(error.unwrap_err()));
    let writes = header.remove_slot(0, FIRST).unwrap();
    apply(&writes, writes.len(), &mut bytes);
    let last = Header::load(&bytes.as_slice()).unwrap();
    assert!(refused(last.remove_slot(1, FIRST).unwrap_err()));
    // A damaged copy is repaired first.
    bytes[4100] ^= 1;
    let damaged = Header::load(&bytes.as_slice()).unwrap();
    assert!(refused(damaged.remove_slot(1, FIRST).unwrap_err()));
    for (secrets, options) in [
        (vec![], FAST),
        (vec![(secret(""), SlotKind::Passphrase)], FAST),
        (
            vec![(secret("x"), SlotKind::KeyFile)],
            FormatOptions {
                uuid: Some("no".to_owned()),
                ..FAST
            },
        ),
        (
            vec![(secret("x"), SlotKind::KeyFile)],
            FormatOptions {
                label: Some("x".repeat(48)),
                ..FAST
            },
        ),
    ] {
        assert!(refused(sprat_luks::format(&secrets, &options).unwrap_err()));
    }
}

#[test]
fn headers_are_loaded_and_unlocked_from_many_threads() {
    let ours = Ours::make();
    let bytes = ours.bytes();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert!(opens(&bytes, &ours.key())));
        }
    });
}

/// With the costs of real containers, and their duration. `SPRAT_MEASURE=1` adds a passphrase, which
/// needs a gigabyte of memory and some seconds.
#[test]
fn a_container_with_real_costs_opens_here_and_with_cryptsetup() {
    let recovery = sprat_luks::RecoveryKey::generate().unwrap();
    let mut secrets = vec![
        (Secret::key_file(vec![7; 4096]), SlotKind::KeyFile),
        (recovery.secret(), SlotKind::Recovery),
    ];
    if std::env::var_os("SPRAT_MEASURE").is_some() {
        secrets.push((secret("correct horse"), SlotKind::Passphrase));
    }
    let from = Instant::now();
    let made = sprat_luks::format(&secrets, &FormatOptions::default()).unwrap();
    println!("format: {:?}", from.elapsed());
    let ours = Ours {
        made,
        ..Ours::make()
    };
    let bytes = ours.bytes();
    let header = Header::load(&bytes.as_slice()).unwrap();
    for (secret, kind) in &secrets {
        let from = Instant::now();
        let key = header.unlock(&bytes.as_slice(), secret).unwrap();
        println!("unlock, {kind:?}: {:?}", from.elapsed());
        let cipher = SectorCipher::new(&key, &header).unwrap();
        let mut data = vec![1; 64 << 20];
        let from = Instant::now();
        cipher.encrypt(0, &mut data).unwrap();
        println!("encrypt 64 MiB: {:?}", from.elapsed());
    }
    if cryptsetup_is_here() {
        let files = Files::new();
        let path = files.holding("real", &bytes);
        let args = ["open", "--test-passphrase", path.to_str().unwrap()];
        let output = cryptsetup(&args, format!("{}\n", recovery.text()).as_bytes());
        assert!(output.status.success());
    }
}
