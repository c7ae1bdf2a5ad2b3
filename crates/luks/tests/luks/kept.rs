//! Backups and restores of headers, with an interruption after each step.

use sprat_luks::{
    FormatOptions, Header, HeaderBackup, HeaderWrite, LuksError, Secret, SlotKind, Turn,
};

use crate::stock::{
    FIRST, Files, Ours, apply, cryptsetup_is_here, cryptsetup_ok, opens, their_container,
};

const FAST: FormatOptions = FormatOptions {
    uuid: None,
    label: None,
    fast_kdf_for_tests: true,
};

fn secret(text: &str) -> Secret {
    Secret::passphrase(text.to_owned())
}

fn kept(bytes: &[u8]) -> Vec<u8> {
    let backup = Header::load(&bytes).unwrap().backup(&bytes).unwrap();
    in_file(&backup)
}

fn in_file(backup: &HeaderBackup) -> Vec<u8> {
    let mut file = vec![0; backup.len_bytes as usize];
    for extent in &backup.extents {
        file[extent.offset as usize..][..extent.bytes.len()].copy_from_slice(&extent.bytes);
    }
    file
}

fn change(bytes: &mut [u8], writes: &[HeaderWrite]) {
    apply(writes, writes.len(), bytes);
}

fn add(bytes: &mut [u8], by: &Secret, text: &str) {
    let header = Header::load(&&*bytes).unwrap();
    let key = header.unlock(&&*bytes, by).unwrap();
    let writes = header
        .add_slot(&key, &secret(text), SlotKind::Passphrase, &FAST, FIRST)
        .unwrap();
    change(bytes, &writes);
}

/// Adds a slot at a given place in the space for key slots. One of eight places is chosen at random.
fn add_at(bytes: &mut [u8], by: &Secret, text: &str, place: u64) {
    let header = Header::load(&&*bytes).unwrap();
    let key = header.unlock(&&*bytes, by).unwrap();
    let turn = Turn {
        lease: place,
        after_takeover: false,
    };
    for _ in 0..1000 {
        let writes = header
            .add_slot(&key, &secret(text), SlotKind::Passphrase, &FAST, turn)
            .unwrap();
        if matches!(&writes[0], HeaderWrite::Write(area) if area.offset == 32768 + place * 258_048)
        {
            return change(bytes, &writes);
        }
    }
    panic!("place {place} was never chosen");
}

fn remove(bytes: &mut [u8], number: u32) {
    let header = Header::load(&&*bytes).unwrap();
    let writes = header.remove_slot(number, FIRST).unwrap();
    change(bytes, &writes);
}

fn restore(bytes: &[u8], kept: &[u8], proof: &Secret) -> Result<Vec<HeaderWrite>, LuksError> {
    let present = Header::load(&bytes).unwrap();
    Header::load(&kept)?.restore(&kept, Some((&present, &bytes)), 0, proof, &[], FIRST)
}

/// A container in which every slot was replaced after the backup of its header, with areas reused.
fn replaced() -> (Ours, Vec<u8>, Vec<u8>) {
    let ours = Ours::make();
    let mut bytes = ours.bytes();
    let kept = kept(&bytes);
    remove(&mut bytes, 0);
    add_at(&mut bytes, &ours.recovery.secret(), "new one", 0);
    remove(&mut bytes, 1);
    add_at(&mut bytes, &secret("new one"), "new two", 1);
    assert_eq!(Header::load(&bytes.as_slice()).unwrap().slots().len(), 2);
    (ours, bytes, kept)
}

#[test]
fn a_restored_header_opens_with_its_keys_and_no_others() {
    let (ours, mut bytes, kept) = replaced();
    let before = Header::load(&bytes.as_slice()).unwrap();
    let writes = restore(&bytes, &kept, &ours.key()).unwrap();
    change(&mut bytes, &writes);
    let header = Header::load(&bytes.as_slice()).unwrap();
    assert!(header.copies().both_good());
    let step = header.sequence_id() - before.sequence_id();
    assert!((256..512).contains(&step), "{step}");
    header.check_pins(&before.pins()).unwrap();
    assert!(opens(&bytes, &ours.key()));
    assert!(opens(&bytes, &ours.recovery.secret()));
    assert!(!opens(&bytes, &secret("new one")));
    assert!(!opens(&bytes, &secret("new two")));
    // Areas that no slot points to are overwritten with noise, so the previous header opens nothing.
    let mut old_copies = bytes.clone();
    for extent in before.backup(&bytes.as_slice()).unwrap().extents {
        if extent.offset < 32768 {
            old_copies[extent.offset as usize..][..extent.bytes.len()]
                .copy_from_slice(&extent.bytes);
        }
    }
    assert!(!opens(&old_copies, &secret("new one")));
    if cryptsetup_is_here() {
        let files = Files::new();
        let file = files.holding("restored", &bytes);
        let name = file.to_str().unwrap();
        let typed = format!("{}\n", ours.recovery.text());
        cryptsetup_ok(&["open", "--test-passphrase", name], typed.as_bytes());
        cryptsetup_ok(&["luksDump", name], b"");
    }
}

#[test]
fn a_restore_interrupted_after_any_step_opens_with_either_keys() {
    let (ours, bytes, kept) = replaced();
    let old = [ours.key(), ours.recovery.secret()];
    let new = [secret("new one"), secret("new two")];
    let writes = restore(&bytes, &kept, &ours.key()).unwrap();
    for (step, write) in writes.iter().enumerate() {
        for torn in [false, true] {
            let mut state = bytes.clone();
            apply(&writes, step, &mut state);
            if let (true, HeaderWrite::Write(extent)) = (torn, write) {
                let half = extent.bytes.len() / 2;
                state[extent.offset as usize..][..half].copy_from_slice(&extent.bytes[..half]);
            }
            let all = |keys: &[Secret]| keys.iter().all(|key| opens(&state, key));
            assert!(all(&old) || all(&new), "after {step} steps, torn: {torn}");
            // And it can be restored again from there.
            let again = restore(&state, &kept, &ours.key()).unwrap();
            change(&mut state, &again);
            assert!(
                old.iter().all(|key| opens(&state, key)),
                "after {step} steps"
            );
            assert!(
                Header::load(&state.as_slice())
                    .unwrap()
                    .copies()
                    .both_good()
            );
        }
    }
}

#[test]
fn a_power_cut_during_a_restore_leaves_either_keys() {
    let (ours, bytes, kept) = replaced();
    let writes = restore(&bytes, &kept, &ours.key()).unwrap();
    let mut durable = bytes;
    for epoch in writes.split(|write| *write == HeaderWrite::Barrier) {
        // Any write that no barrier covers may have arrived, without the others.
        for subset in 0..1_u32 << epoch.len() {
            let mut state = durable.clone();
            for (index, write) in epoch.iter().enumerate() {
                if subset >> index & 1 == 1 {
                    apply(std::slice::from_ref(write), 1, &mut state);
                }
            }
            let both = |one: &Secret, other: &Secret| opens(&state, one) && opens(&state, other);
            assert!(
                both(&ours.key(), &ours.recovery.secret())
                    || both(&secret("new one"), &secret("new two")),
                "{subset:b} of {}",
                epoch.len()
            );
        }
        apply(epoch, epoch.len(), &mut durable);
    }
    assert!(opens(&durable, &ours.key()));
}

#[test]
fn a_header_is_restored_after_both_copies_are_destroyed() {
    let ours = Ours::make();
    let mut bytes = ours.bytes();
    let kept = kept(&bytes);
    bytes[..1 << 20].fill(0xa5);
    assert!(Header::load(&bytes.as_slice()).is_err());
    let from = Header::load(&kept.as_slice()).unwrap();
    let writes = from
        .restore(&kept.as_slice(), None, 7, &ours.key(), &[], FIRST)
        .unwrap();
    change(&mut bytes, &writes);
    let header = Header::load(&bytes.as_slice()).unwrap();
    // Another machine may know a newer header, which is lost.
    let step = header.sequence_id() - 7 - (1 << 27);
    assert!((256..512).contains(&step), "{step}");
    assert!(opens(&bytes, &ours.key()));
    assert!(opens(&bytes, &ours.recovery.secret()));
}

#[test]
fn a_damaged_copy_is_written_before_the_good_one() {
    let (ours, mut bytes, kept) = replaced();
    bytes[4100] ^= 1;
    let writes = restore(&bytes, &kept, &ours.key()).unwrap();
    let copies: Vec<u64> = writes
        .iter()
        .filter_map(|write| match write {
            HeaderWrite::Write(extent) if extent.offset < 32768 => Some(extent.offset),
            _ => None,
        })
        .collect();
    assert_eq!(copies, [0, 16384]);
}

#[test]
fn a_header_of_another_container_and_one_that_the_key_does_not_open_are_refused() {
    let (ours, bytes, kept) = replaced();
    let foreign = Ours::make();
    let error = restore(&foreign.bytes(), &kept, &ours.key()).unwrap_err();
    assert!(matches!(error, LuksError::Pin { .. }), "{error}");
    let error = restore(&bytes, &kept, &secret("new one")).unwrap_err();
    assert!(matches!(error, LuksError::WrongSecret { .. }), "{error}");
}

#[test]
fn a_restore_interrupted_before_the_noise_is_finished_by_the_next() {
    let (ours, bytes, kept) = replaced();
    let before = Header::load(&bytes.as_slice()).unwrap();
    let writes = restore(&bytes, &kept, &ours.key()).unwrap();
    let copies =
        |write: &HeaderWrite| matches!(write, HeaderWrite::Write(extent) if extent.offset < 32768);
    let last = writes.iter().rposition(copies).unwrap();
    assert!(
        last + 2 < writes.len(),
        "something is overwritten afterwards"
    );
    let mut state = bytes.clone();
    apply(&writes, last + 2, &mut state);
    let present = Header::load(&state.as_slice()).unwrap();
    let from = Header::load(&kept.as_slice()).unwrap();
    let there: (&Header, &dyn sprat_luks::HeaderRead) = (&present, &state.as_slice());
    let again = from
        .restore(
            &kept.as_slice(),
            Some(there),
            0,
            &ours.key(),
            &before.areas(),
            FIRST,
        )
        .unwrap();
    change(&mut state, &again);
    assert!(opens(&state, &ours.key()) && opens(&state, &ours.recovery.secret()));
    // A copy of an earlier header finds none of its slots.
    state[..32768].copy_from_slice(&bytes[..32768]);
    for gone in ["new one", "new two"] {
        assert!(!opens(&state, &secret(gone)), "{gone}");
    }
}

#[test]
fn a_slot_whose_area_changed_is_detected() {
    let ours = Ours::make();
    let mut bytes = ours.bytes();
    let kept = kept(&bytes);
    add(&mut bytes, &ours.key(), "later");
    let earlier = Header::load(&kept.as_slice()).unwrap();
    let differ = |bytes: &[u8]| {
        let header = Header::load(&bytes).unwrap();
        let now = header.backup(&bytes).unwrap();
        header
            .slots_that_differ(&now, &earlier, &kept.as_slice())
            .unwrap()
    };
    assert_eq!(differ(&bytes), Vec::<u32>::new());
    let area = earlier.areas()[1].start as usize;
    bytes[area + 100] ^= 1;
    assert_eq!(differ(&bytes), [1]);
}

#[test]
fn header_backups_are_exchanged_with_cryptsetup() {
    if !cryptsetup_is_here() {
        return;
    }
    let files = Files::new();
    // cryptsetup's backup of its container, restored by us.
    let theirs = their_container(&files, b"theirs", &[]);
    let name = theirs.to_str().unwrap();
    let kept_by_them = files.path("kept-by-them");
    let backup = ["luksHeaderBackup", name, "--header-backup-file"];
    cryptsetup_ok(
        &[&backup[..], &[kept_by_them.to_str().unwrap()]].concat(),
        b"",
    );
    let mut bytes = std::fs::read(&theirs).unwrap();
    add(&mut bytes, &secret("theirs"), "later");
    let kept_bytes = std::fs::read(&kept_by_them).unwrap();
    let writes = restore(&bytes, &kept_bytes, &secret("theirs")).unwrap();
    change(&mut bytes, &writes);
    assert!(opens(&bytes, &secret("theirs")));
    assert!(!opens(&bytes, &secret("later")));
    // Our backup of our container, restored by cryptsetup.
    let ours = Ours::make();
    let mut bytes = ours.bytes();
    let file = files.holding("kept-by-us", &kept(&bytes));
    bytes[..40960].fill(0);
    let container = files.holding("ours", &bytes);
    let restore = [
        "luksHeaderRestore",
        "--batch-mode",
        container.to_str().unwrap(),
        "--header-backup-file",
        file.to_str().unwrap(),
    ];
    cryptsetup_ok(&restore, b"");
    assert!(opens(&std::fs::read(&container).unwrap(), &ours.key()));
}
