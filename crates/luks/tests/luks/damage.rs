//! Damage to one or both header copies, and truncated files.

use std::cell::RefCell;

use sprat_luks::{
    CopyFault, CopyState, Header, HeaderRead, HeaderWrite, LuksError, LuksErrorKind, Secret,
};

use crate::{
    forge::{COPIES, SIZE, seal, set_text, text},
    stock::{Files, Ours, apply, cryptsetup_is_here, cryptsetup_ok, opens, their_container},
};

type Damage = (&'static str, fn(&mut [u8], usize), fn(&CopyFault) -> bool);

/// Each kind of byte in a copy, the effect of damage to it, and the fault that must be reported.
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
fn one_damaged_copy_is_reported_and_repaired_and_the_container_opens() {
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
fn damage_to_both_copies_is_an_error_that_reports_both() {
    let bytes = Ours::make().bytes();
    for (first, damage_first, _) in DAMAGES {
        for (second, damage_second, _) in DAMAGES {
            let mut broken = bytes.clone();
            damage_first(&mut broken, 0);
            damage_second(&mut broken, SIZE);
            let error = Header::load(&broken.as_slice()).unwrap_err();
            let expected = match &error {
                LuksError::HeaderDamaged { .. } => true,
                // These can't be distinguished from a file that never was a container.
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
fn after_an_interrupted_change_of_keys_the_newer_copy_counts() {
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
fn of_contradicting_copies_the_primary_is_used_and_the_other_reported() {
    let bytes = Ours::make().bytes();
    let secondary = COPIES[1];
    let mut swapped = bytes.clone();
    let other = text(&bytes).replace("\"sector_size\":4096", "\"sector_size\":512");
    set_text(&mut swapped, secondary, &other);
    let header = Header::load(&swapped.as_slice()).unwrap();
    let of_bytes = Header::load(&bytes.as_slice()).unwrap();
    let sequence_id = of_bytes.sequence_id();
    assert_eq!(
        header.copies().secondary,
        CopyState::Contradicts { sequence_id }
    );
    header.check_pins(&of_bytes.pins()).unwrap();
    // Both are equal after a repair.
    let writes = header.repair().unwrap();
    apply(&writes, writes.len(), &mut swapped);
    assert!(
        Header::load(&swapped.as_slice())
            .unwrap()
            .copies()
            .both_good()
    );
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
fn truncated_containers_are_distinguished_from_other_files() {
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
    // One copy is intact. The keys are missing.
    for len in [SIZE, SIZE + 1, 2 * SIZE - 1, 2 * SIZE, 3 * SIZE] {
        let header = load(len).unwrap();
        let error = header.unlock(&&bytes[..len], &ours.key()).unwrap_err();
        assert!(
            matches!(error, LuksError::Truncated { .. }),
            "{len}: {error}"
        );
    }
    // The keys are there. The payload is missing.
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

/// Counts the reads.
struct Counting<'a> {
    bytes: &'a [u8],
    reads: RefCell<Vec<(u64, usize)>>,
}

impl HeaderRead for Counting<'_> {
    fn len(&self) -> std::io::Result<u64> {
        HeaderRead::len(&self.bytes)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.reads.borrow_mut().push((offset, buf.len()));
        self.bytes.read_at(offset, buf)
    }
}

#[test]
fn only_what_is_needed_is_fetched() {
    let ours = Ours::make();
    let bytes = ours.bytes();
    let reads = RefCell::default();
    let source = Counting {
        bytes: &bytes,
        reads,
    };
    let header = Header::load(&source).unwrap();
    assert_eq!(source.reads.take(), [(0, 2 * SIZE)]);
    // With the cheap costs of tests, argon2id is the cheapest: that slot is tried first.
    header.unlock(&source, &ours.recovery.secret()).unwrap();
    assert_eq!(source.reads.take(), [(2 * SIZE as u64 + 258_048, 258_048)]);
}

#[test]
fn a_failed_fetch_reports_the_range() {
    struct Broken;
    impl HeaderRead for Broken {
        fn len(&self) -> std::io::Result<u64> {
            Ok(1 << 40)
        }
        fn read_at(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> {
            Err(std::io::ErrorKind::ConnectionReset.into())
        }
    }
    let error = Header::load(&Broken).unwrap_err();
    assert_eq!(error.kind(), LuksErrorKind::Read);
    assert!(error.to_string().contains("32768 bytes"), "{error}");
}

#[test]
fn the_secondary_copy_is_found_at_every_legal_offset() {
    if !cryptsetup_is_here() {
        return;
    }
    for (metadata, keyslots) in [("16k", "1m"), ("32k", "1m"), ("512k", "1m"), ("4m", "8m")] {
        let files = Files::new();
        let mut extra = vec!["--luks2-metadata-size", metadata, "--offset", "65536"];
        extra.extend(["--luks2-keyslots-size", keyslots]);
        let path = their_container(&files, b"secret", &extra);
        let mut bytes = std::fs::read(&path).unwrap();
        let pins = Header::load(&bytes.as_slice()).unwrap().pins();
        bytes[..4096].fill(0);
        let header = Header::load(&bytes.as_slice()).unwrap();
        header.check_pins(&pins).unwrap();
        assert_eq!(
            header.copies().primary,
            CopyState::Damaged(CopyFault::Magic)
        );
        assert!(opens(&bytes, &Secret::key_file(b"secret".to_vec())));
        let writes = header.repair().unwrap();
        apply(&writes, writes.len(), &mut bytes);
        std::fs::write(&path, &bytes).unwrap();
        let name = path.to_str().unwrap();
        cryptsetup_ok(&["open", "--test-passphrase", name], b"secret\n");
        cryptsetup_ok(&["repair", "--batch-mode", name], b"");
        assert!(std::fs::read(&path).unwrap() == bytes, "{metadata}");
    }
}
