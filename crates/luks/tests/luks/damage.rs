//! Header copies damaged one at a time, both, and files cut short.

use sprat_luks::{CopyFault, CopyState, Header, HeaderWrite, LuksError, LuksErrorKind};

use crate::{
    forge::{COPIES, SIZE, seal, set_text, text},
    stock::{Files, Ours, apply, cryptsetup_is_here, cryptsetup_ok, opens},
};

type Damage = (&'static str, fn(&mut [u8], usize), fn(&CopyFault) -> bool);

/// Each kind of byte in a copy, what a damage does to it, and the fault it must be named as.
const DAMAGES: &[Damage] = &[
    ("magic", |b, at| b[at + 2] ^= 1, |f| *f == CopyFault::Magic),
    (
        "version",
        |b, at| b[at + 7] = 1,
        |f| *f == CopyFault::Version(1),
    ),
    (
        "size",
        |b, at| b[at + 14] ^= 1,
        |f| matches!(f, CopyFault::Size(_)),
    ),
    (
        "sequence",
        |b, at| b[at + 23] ^= 1,
        |f| *f == CopyFault::Checksum,
    ),
    (
        "label",
        |b, at| b[at + 30] ^= 1,
        |f| *f == CopyFault::Checksum,
    ),
    (
        "checksum kind",
        |b, at| b[at + 72] ^= 1,
        |f| matches!(f, CopyFault::ChecksumKind(_)),
    ),
    (
        "salt",
        |b, at| b[at + 110] ^= 1,
        |f| *f == CopyFault::Checksum,
    ),
    (
        "uuid",
        |b, at| b[at + 170] ^= 1,
        |f| *f == CopyFault::Checksum,
    ),
    (
        "offset",
        |b, at| b[at + 260] ^= 1,
        |f| matches!(f, CopyFault::Offset(_)),
    ),
    (
        "padding",
        |b, at| b[at + 300] ^= 1,
        |f| *f == CopyFault::Checksum,
    ),
    (
        "checksum",
        |b, at| b[at + 448] ^= 1,
        |f| *f == CopyFault::Checksum,
    ),
    (
        "checksum's end",
        |b, at| b[at + 511] ^= 1,
        |f| *f == CopyFault::Checksum,
    ),
    (
        "binary's end",
        |b, at| b[at + 4095] ^= 1,
        |f| *f == CopyFault::Checksum,
    ),
    (
        "metadata",
        |b, at| b[at + 4100] ^= 1,
        |f| *f == CopyFault::Checksum,
    ),
    (
        "metadata's end",
        |b, at| b[at + SIZE - 1] ^= 1,
        |f| *f == CopyFault::Checksum,
    ),
    (
        "everything",
        |b, at| b[at..at + SIZE].fill(0xa5),
        |f| *f == CopyFault::Magic,
    ),
    (
        "a hole",
        |b, at| b[at..at + SIZE].fill(0),
        |f| *f == CopyFault::Magic,
    ),
    (
        "metadata with a right checksum",
        |b, at| {
            b[at + 4096] = b'?';
            seal(b, at);
        },
        |f| matches!(f, CopyFault::Metadata(_)),
    ),
];

#[test]
fn one_damaged_copy_is_named_and_the_container_opens_and_is_repaired() {
    let ours = Ours::make();
    let bytes = ours.bytes();
    for (what, damage, fits) in DAMAGES {
        for copy in COPIES {
            let mut broken = bytes.clone();
            damage(&mut broken, copy);
            let header = Header::load(&broken.as_slice()).unwrap();
            let copies = header.copies();
            let (bad, good) = if copy == 0 {
                (&copies.primary, &copies.secondary)
            } else {
                (&copies.secondary, &copies.primary)
            };
            assert_eq!(*good, CopyState::Good, "{what} at {copy}");
            let CopyState::Damaged(fault) = bad else {
                panic!("{what} at {copy}: {bad}");
            };
            assert!(fits(fault), "{what} at {copy}: {fault}");
            header.check_pins(&ours.made.pins).unwrap();
            header.unlock(&broken.as_slice(), &ours.key()).unwrap();
            let writes = header.repair().unwrap();
            assert_eq!(writes.len(), 2);
            assert_eq!(writes[1], HeaderWrite::Barrier);
            apply(&writes, writes.len(), &mut broken);
            let repaired = Header::load(&broken.as_slice()).unwrap();
            assert!(repaired.copies().both_good(), "{what} at {copy}");
            repaired.check_pins(&ours.made.pins).unwrap();
            let other = SIZE - copy;
            assert!(
                broken[other..other + SIZE] == bytes[other..other + SIZE],
                "the good copy was touched"
            );
        }
    }
}

#[test]
fn both_copies_damaged_is_an_error_that_names_both() {
    let bytes = Ours::make().bytes();
    for (first, damage_first, _) in DAMAGES {
        for (second, damage_second, _) in DAMAGES {
            let mut broken = bytes.clone();
            damage_first(&mut broken, 0);
            damage_second(&mut broken, SIZE);
            let error = Header::load(&broken.as_slice()).unwrap_err();
            let expected = match &error {
                LuksError::HeaderDamaged { .. } => true,
                // Nothing tells these from a file that never was a container.
                LuksError::NotLuks => {
                    ["magic", "everything", "a hole"].contains(first)
                        && ["magic", "everything", "a hole"].contains(second)
                }
                LuksError::Luks1 => *first == "version",
                _ => false,
            };
            assert!(expected, "{first}, {second}: {error}");
        }
    }
}

#[test]
fn an_interrupted_change_of_keys_goes_by_the_newer_copy() {
    let ours = Ours::make();
    let bytes = ours.bytes();
    for copy in COPIES {
        let mut newer = bytes.clone();
        newer[copy + 23] += 1;
        seal(&mut newer, copy);
        let header = Header::load(&newer.as_slice()).unwrap();
        let sequence_id = ours.made.pins.sequence_id;
        assert_eq!(header.sequence_id(), sequence_id + 1);
        let stale = CopyState::Stale { sequence_id };
        let found = header.copies();
        let (old, new) = if copy == 0 {
            (&found.secondary, &found.primary)
        } else {
            (&found.primary, &found.secondary)
        };
        assert_eq!((old, new), (&stale, &CopyState::Good));
        let writes = header.repair().unwrap();
        apply(&writes, writes.len(), &mut newer);
        let repaired = Header::load(&newer.as_slice()).unwrap();
        assert!(repaired.copies().both_good());
        assert_eq!(repaired.sequence_id(), sequence_id + 1);
    }
}

#[test]
fn copies_that_contradict_each_other_are_refused() {
    let bytes = Ours::make().bytes();
    for copy in COPIES {
        let mut swapped = bytes.clone();
        let other = text(&bytes).replace("\"sector_size\":4096", "\"sector_size\":512");
        set_text(&mut swapped, copy, &other);
        let error = Header::load(&swapped.as_slice()).unwrap_err();
        assert!(matches!(error, LuksError::CopiesDisagree { .. }), "{error}");
    }
}

#[test]
fn a_repaired_header_satisfies_cryptsetup() {
    if !cryptsetup_is_here() {
        return;
    }
    let files = Files::new();
    let ours = Ours::make();
    let mut bytes = ours.bytes();
    bytes[4100] ^= 1;
    let writes = Header::load(&bytes.as_slice()).unwrap().repair().unwrap();
    apply(&writes, writes.len(), &mut bytes);
    let path = files.holding("repaired", &bytes);
    let name = path.to_str().unwrap();
    let key = files.holding("key", &ours.key_file);
    let open = ["open", "--test-passphrase", "--key-file"];
    cryptsetup_ok(&[&open[..], &[key.to_str().unwrap(), name]].concat(), b"");
    cryptsetup_ok(&["repair", "--batch-mode", name], b"");
    assert!(
        std::fs::read(&path).unwrap() == bytes,
        "nothing left to repair"
    );
}

#[test]
fn files_cut_short_are_told_from_other_files() {
    let ours = Ours::make();
    let bytes = ours.bytes();
    let load = |len: usize| Header::load(&&bytes[..len]);
    for len in [0, 1, 5] {
        let error = load(len).unwrap_err();
        assert_eq!(error.kind(), LuksErrorKind::NoContainer, "{len}: {error}");
    }
    for len in [6, 100, 4095, 4096, SIZE - 1] {
        let error = load(len).unwrap_err();
        assert!(
            matches!(error, LuksError::Truncated { .. }),
            "{len}: {error}"
        );
    }
    // One copy is whole; the keys are not there.
    for len in [SIZE, SIZE + 1, 2 * SIZE - 1, 2 * SIZE, 3 * SIZE] {
        let header = load(len).unwrap();
        let error = header.unlock(&&bytes[..len], &ours.key()).unwrap_err();
        assert!(
            matches!(error, LuksError::Truncated { .. }),
            "{len}: {error}"
        );
    }
    // The keys are there, the payload is not.
    let len = bytes.len() as u64;
    let header = load(bytes.len()).unwrap();
    let offset = ours.made.payload_offset_bytes;
    for cut in [0, offset, offset + 4095] {
        let error = header.geometry(cut).unwrap_err();
        assert!(
            matches!(error, LuksError::Truncated { .. }),
            "{cut}: {error}"
        );
    }
    let payload = header.geometry(len + 4095).unwrap();
    assert_eq!(payload.offset_bytes, offset);
    assert_eq!(payload.len_bytes, len - offset);
    assert_eq!(payload.sector_bytes, 4096);
}

#[test]
fn other_files_are_not_luks() {
    for bytes in [vec![0; 1 << 20], vec![0xff; 5], b"LUKS".repeat(10_000)] {
        let error = Header::load(&bytes.as_slice()).unwrap_err();
        assert!(matches!(error, LuksError::NotLuks), "{error}");
    }
}

#[test]
fn a_damaged_key_slot_is_a_wrong_key_and_the_other_slot_still_opens() {
    let ours = Ours::make();
    let mut bytes = ours.bytes();
    bytes[2 * SIZE + 1000] ^= 1;
    let header = Header::load(&bytes.as_slice()).unwrap();
    let error = header.unlock(&bytes.as_slice(), &ours.key()).unwrap_err();
    assert!(matches!(error, LuksError::WrongSecret { .. }), "{error}");
    assert!(opens(&bytes, &ours.recovery.secret()));
}
