//! A server that replaces or rewrites the header. This must be detected before any key or plaintext
//! could be sent.

use proptest::prelude::*;
use serde_json::{Value, json};
use sprat_luks::{
    FormatOptions, Header, HeaderRead, LuksError, LuksErrorKind, Pins, Secret, SectorCipher,
    SlotKind, UnlockOptions, format,
};

use crate::{
    forge::{COPIES, SIZE, replace_text, rewrite, rewrite_binary, seal, text},
    stock::{Files, Ours, cryptsetup, cryptsetup_is_here, cryptsetup_ok, opens, their_container},
};

/// Loads a header and compares it with the pins, as a session does.
fn check(bytes: &[u8], pins: &Pins) -> Result<Header, LuksError> {
    let header = Header::load(&bytes)?;
    header.check_pins(pins)?;
    Ok(header)
}

#[test]
fn the_container_itself_passes_and_its_pins_can_be_stored() {
    let ours = Ours::make();
    let stored = serde_json::to_string(&ours.made.pins).unwrap();
    let pins: Pins = serde_json::from_str(&stored).unwrap();
    let header = check(&ours.bytes(), &pins).unwrap();
    assert_eq!(header.pins(), ours.made.pins);
    header.check_fingerprint(&pins.fingerprint()).unwrap();
    let typed = pins.fingerprint().to_lowercase().replace('-', " ");
    header.check_fingerprint(&typed).unwrap();
    let error = header
        .check_fingerprint("0000-0000-0000-0000-0000")
        .unwrap_err();
    assert!(matches!(error, LuksError::Fingerprint { .. }), "{error}");
}

#[test]
fn a_null_cipher_with_a_right_checksum_is_refused() {
    let bytes = Ours::make().bytes();
    for cipher in [
        "cipher_null-ecb",
        "cipher_null",
        "null",
        "aes-ecb",
        "",
        "capi:ecb(cipher_null)",
    ] {
        let swapped = rewrite(&bytes, |m| m["segments"]["0"]["encryption"] = json!(cipher));
        let error = Header::load(&swapped.as_slice()).unwrap_err();
        assert!(
            matches!(error, LuksError::Refused { .. }),
            "{cipher}: {error}"
        );
        let slot = rewrite(&bytes, |m| {
            m["keyslots"]["0"]["area"]["encryption"] = json!(cipher);
        });
        let error = Header::load(&slot.as_slice()).unwrap_err();
        assert!(
            matches!(error, LuksError::Refused { .. }),
            "{cipher}: {error}"
        );
    }
}

/// The reason for the rule: cryptsetup's own check accepts what we refuse.
#[test]
fn cryptsetup_alone_would_accept_the_null_cipher() {
    if !cryptsetup_is_here() {
        return;
    }
    let files = Files::new();
    let ours = Ours::make();
    let swapped = rewrite(&ours.bytes(), |m| {
        m["segments"]["0"]["encryption"] = json!("cipher_null-ecb");
    });
    let path = files.holding("swapped", &swapped);
    let key = files.holding("key", &ours.key_file);
    let output = cryptsetup(
        &[
            "open",
            "--test-passphrase",
            "--key-file",
            key.to_str().unwrap(),
            path.to_str().unwrap(),
        ],
        b"",
    );
    assert!(
        output.status.success(),
        "the forged header is not well-formed"
    );
}

#[test]
fn the_pins_detect_every_changed_field() {
    let ours = Ours::make();
    let bytes = ours.bytes();
    let segment = |name: &str, value: Value| rewrite(&bytes, |m| m["segments"]["0"][name] = value);
    let salt = |m: &mut Value| {
        let one = m["keyslots"]["0"]["kdf"]["salt"].clone();
        m["digests"]["0"]["salt"] = one;
    };
    let other_uuid = b"00000000-1111-4222-8333-444444444444";
    let swaps = [
        ("payload offset", segment("offset", json!("33554432"))),
        ("sector size", segment("sector_size", json!(512))),
        ("IV tweak", segment("iv_tweak", json!("8"))),
        ("volume key digest", rewrite(&bytes, salt)),
        (
            "volume key digest",
            rewrite(&bytes, |m| m["digests"]["0"]["iterations"] = json!(1001)),
        ),
        ("UUID", rewrite_binary(&bytes, 168, other_uuid)),
        (
            "key size in bits",
            rewrite(&bytes, |m| {
                for slot in ["0", "1"] {
                    m["keyslots"][slot]["key_size"] = json!(32);
                }
            }),
        ),
    ];
    for (field, swapped) in swaps {
        match check(&swapped, &ours.made.pins).unwrap_err() {
            LuksError::Pin { field: found, .. } => assert_eq!(found, field),
            error => panic!("{field}: {error}"),
        }
        let header = Header::load(&swapped.as_slice()).unwrap();
        assert_ne!(header.pins().fingerprint(), ours.made.pins.fingerprint());
    }
}

#[test]
fn another_container_with_the_same_uuid_is_detected() {
    let ours = Ours::make();
    let options = FormatOptions {
        uuid: Some(ours.made.pins.uuid.clone()),
        fast_kdf_for_tests: true,
        ..FormatOptions::default()
    };
    let made = format(&[(ours.key(), SlotKind::KeyFile)], &options).unwrap();
    assert_eq!(made.pins.uuid, ours.made.pins.uuid);
    let error = made.pins.clone();
    let forged = Ours {
        made,
        ..Ours::make()
    }
    .bytes();
    assert_ne!(error.fingerprint(), ours.made.pins.fingerprint());
    match check(&forged, &ours.made.pins).unwrap_err() {
        LuksError::Pin { field, .. } => assert_eq!(field, "volume key digest"),
        error => panic!("{error}"),
    }
}

#[test]
fn slots_of_another_container_never_yield_their_key() {
    // The server knows the secret of its own container, and copies a slot of it into ours.
    let (ours, servers) = (Ours::make(), Ours::make());
    let graft: Value = serde_json::from_str(&text(&servers.bytes())).unwrap();
    let mut bytes = rewrite(&ours.bytes(), |m| m["keyslots"] = graft["keyslots"].clone());
    let areas = 2 * SIZE..2 * SIZE + 2 * 258_048;
    bytes[areas.clone()].copy_from_slice(&servers.bytes()[areas]);
    let header = check(&bytes, &ours.made.pins).unwrap();
    let error = header
        .unlock(&bytes.as_slice(), &servers.key())
        .unwrap_err();
    assert!(matches!(error, LuksError::WrongSecret { .. }), "{error}");
}

#[test]
fn an_old_header_is_detected_if_a_newer_one_was_seen() {
    let ours = Ours::make();
    let mut pins = ours.made.pins.clone();
    pins.sequence_id += 1;
    match check(&ours.bytes(), &pins).unwrap_err() {
        LuksError::OlderHeader { known, found } => assert_eq!(known, found + 1),
        error => panic!("{error}"),
    }
    // The fingerprint stays the same: it is printed once, and keys change.
    assert_eq!(pins.fingerprint(), ours.made.pins.fingerprint());
}

#[test]
fn unfinished_re_encryption_and_unknown_requirements_are_refused() {
    let bytes = Ours::make().bytes();
    let forged: Vec<(&str, Vec<u8>)> = vec![
        (
            "requirement",
            rewrite(&bytes, |m| {
                m["config"]["requirements"] = json!({"mandatory": ["online-reencrypt-v2"]});
            }),
        ),
        (
            "unknown requirement",
            rewrite(&bytes, |m| {
                m["config"]["requirements"] = json!({"mandatory": ["quantum"]});
            }),
        ),
        (
            "unknown kind of requirement",
            rewrite(&bytes, |m| {
                m["config"]["requirements"] = json!({"new": ["x"]});
            }),
        ),
        (
            "backup segment",
            rewrite(&bytes, |m| {
                let mut backup = m["segments"]["0"].clone();
                backup["flags"] = json!(["backup-previous"]);
                m["segments"]["1"] = backup;
            }),
        ),
        (
            "flag",
            rewrite(&bytes, |m| {
                m["segments"]["0"]["flags"] = json!(["in-reencryption"]);
            }),
        ),
        (
            "reencrypt slot",
            rewrite(&bytes, |m| {
                m["keyslots"]["2"] = json!({"type": "reencrypt", "key_size": 1,
                    "area": {"type": "none", "offset": "1000000", "size": "4096"}});
            }),
        ),
        (
            "two digests",
            rewrite(&bytes, |m| m["digests"]["1"] = m["digests"]["0"].clone()),
        ),
    ];
    for (what, bytes) in forged {
        let error = Header::load(&bytes.as_slice()).unwrap_err();
        assert!(
            matches!(error, LuksError::Refused { .. }),
            "{what}: {error}"
        );
    }
}

#[test]
fn a_container_in_the_middle_of_re_encryption_by_cryptsetup_is_refused() {
    if !cryptsetup_is_here() {
        return;
    }
    let files = Files::new();
    let ours = Ours::make();
    let path = ours.file(&files);
    let key = files.holding("key", &ours.key_file);
    let mut args = vec![
        "reencrypt",
        "--init-only",
        "--batch-mode",
        "--disable-locks",
    ];
    args.extend(["--force-offline-reencrypt", "--key-slot", "0"]);
    args.extend(["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]);
    args.extend(["--key-file", key.to_str().unwrap(), path.to_str().unwrap()]);
    let output = cryptsetup(&args, b"");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let bytes = std::fs::read(&path).unwrap();
    let error = Header::load(&bytes.as_slice()).unwrap_err();
    assert!(error.to_string().contains("re-encryption"), "{error}");
}

#[test]
fn integrity_and_unknown_ciphers_are_reported() {
    let bytes = Ours::make().bytes();
    let segment = |name: &str, value: Value| rewrite(&bytes, |m| m["segments"]["0"][name] = value);
    for forged in [
        segment("integrity", json!({"type": "hmac(sha256)"})),
        segment("encryption", json!("aes-cbc-essiv:sha256")),
        segment("encryption", json!("serpent-xts-plain64")),
        segment("encryption", json!("aes-xts-plain64 ")),
        segment("encryption", json!("AES-XTS-PLAIN64")),
        segment("type", json!("linear")),
        segment("type", json!("hw-opal-crypt")),
        segment("size", json!("1048576")),
        segment("opal_key_size", json!(32)),
        segment("offset", json!("0")),
        segment("offset", json!("16777728")),
        segment("offset", json!("18446744073709551615")),
    ] {
        let error = Header::load(&forged.as_slice()).unwrap_err();
        assert_eq!(error.kind(), LuksErrorKind::Unsupported, "{error}");
    }
}

#[test]
fn too_expensive_key_derivations_are_refused() {
    let ours = Ours::make();
    let argon = |memory: u64, time: u64, cpus: u64| json!({"type": "argon2id", "memory": memory, "time": time, "cpus": cpus});
    let pbkdf2 = json!({"type": "pbkdf2", "hash": "sha256", "iterations": 4_000_000_000_u64});
    for bomb in [
        argon(4 << 20, 1, 1),
        argon(u64::from(u32::MAX), 4, 1),
        argon(1 << 20, 1000, 1),
        argon(32, u64::from(u32::MAX), 1),
        argon(65536, 4, 1_000_000),
        pbkdf2,
    ] {
        let bytes = rewrite(&ours.bytes(), |m| {
            let salt = m["keyslots"]["0"]["kdf"]["salt"].clone();
            m["keyslots"]["0"]["kdf"] = bomb.clone();
            m["keyslots"]["0"]["kdf"]["salt"] = salt;
        });
        let header = check(&bytes, &ours.made.pins).unwrap();
        let error = header.unlock(&bytes.as_slice(), &ours.key()).unwrap_err();
        assert!(
            matches!(error, LuksError::KdfTooCostly { slot: 0, .. }),
            "{error}"
        );
        // The slot beside it still opens.
        assert!(opens(&bytes, &ours.recovery.secret()));
    }
    let digest = rewrite(&ours.bytes(), |m| {
        m["digests"]["0"]["iterations"] = json!(2_000_000_000);
    });
    let error = Header::load(&digest.as_slice()).unwrap_err();
    assert!(matches!(error, LuksError::Refused { .. }), "{error}");
}

/// Counts the key slot areas that are fetched: one for each slot that is tried.
struct Counting<'b> {
    bytes: &'b [u8],
    areas: std::cell::Cell<usize>,
}

impl HeaderRead for Counting<'_> {
    fn len(&self) -> std::io::Result<u64> {
        Ok(self.bytes.len() as u64)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        if offset >= 2 * SIZE as u64 {
            self.areas.set(self.areas.get() + 1);
        }
        self.bytes.read_at(offset, buf)
    }
}

#[test]
fn all_key_slots_of_one_opening_share_one_budget() {
    if !cryptsetup_is_here() {
        return;
    }
    // As many slots as LUKS2 allows, made by cryptsetup: 32 MiB of work each.
    let (memory_kib, passes) = (8192, 4);
    let argon = [
        "--pbkdf",
        "argon2id",
        "--pbkdf-memory",
        "8192",
        "--pbkdf-parallel",
        "1",
    ];
    let argon: Vec<&str> = argon
        .into_iter()
        .chain(["--pbkdf-force-iterations", "4"])
        .collect();
    let files = Files::new();
    let path = their_container(&files, b"key 0", &argon);
    let first = files.holding("first", b"key 0");
    for number in 1..32 {
        let key = files.holding("next", format!("key {number}").as_bytes());
        let mut add = vec![
            "luksAddKey",
            "--batch-mode",
            "--key-file",
            first.to_str().unwrap(),
        ];
        add.extend(&argon);
        add.extend([path.to_str().unwrap(), key.to_str().unwrap()]);
        cryptsetup_ok(&add, b"");
    }
    let bytes = std::fs::read(&path).unwrap();
    let source = Counting {
        bytes: &bytes,
        areas: 0.into(),
    };
    let header = Header::load(&source).unwrap();
    assert_eq!(header.slots().len(), 32);
    let secret = Secret::key_file(b"key 20".to_vec());
    let unlock = |options: &UnlockOptions| {
        source.areas.set(0);
        let opened = header.unlock_within(&source, &secret, options);
        (opened.map(|(slot, _)| slot), source.areas.get())
    };
    let usual = UnlockOptions::default();
    let four = UnlockOptions {
        work_kib_max: 4 * memory_kib * passes,
        ..usual
    };
    let (opened, tried) = unlock(&four);
    assert!(
        matches!(&opened, Err(LuksError::KdfBudget { slots_tried: 4, left_out }) if left_out.len() == 28),
        "{opened:?}"
    );
    assert_eq!(opened.unwrap_err().kind(), LuksErrorKind::WrongSecret);
    assert_eq!(tried, 4);
    // The slot that opened last time comes first, whatever the budget.
    for work_kib_max in [four.work_kib_max, 0] {
        let options = UnlockOptions {
            first: Some(20),
            work_kib_max,
            ..usual
        };
        let (opened, tried) = unlock(&options);
        assert_eq!((opened.unwrap(), tried), (20, 1));
    }
    // A wrong first slot does not prevent the others from being tried.
    let options = UnlockOptions {
        first: Some(31),
        ..usual
    };
    let (opened, tried) = unlock(&options);
    assert_eq!((opened.unwrap(), tried), (20, 22));
    let small = UnlockOptions {
        memory_kib_max: memory_kib - 1,
        ..usual
    };
    let (opened, tried) = unlock(&small);
    assert!(
        matches!(opened, Err(LuksError::NoMemory { .. })),
        "{opened:?}"
    );
    assert_eq!(tried, 0);
    let (opened, _) = unlock(&usual);
    assert_eq!(opened.unwrap(), 20);
}

#[test]
fn a_sequence_too_high_for_key_changes_is_refused() {
    let ours = Ours::make();
    let with = |sequence: u64| rewrite_binary(&ours.bytes(), 16, &sequence.to_be_bytes());
    let known = ours.made.pins.sequence_id;
    for sequence in [u64::MAX, u64::MAX - 1, 1 << 49] {
        let error = check(&with(sequence), &ours.made.pins).unwrap_err();
        assert_eq!(error.kind(), LuksErrorKind::Damaged, "{error}");
        assert!(
            error.to_string().contains("implausible sequence"),
            "{error}"
        );
    }
    // A legal one that neither key changes nor a new container reach.
    for sequence in [1 << 48, (1 << 40) + 1] {
        let bytes = with(sequence);
        let error = check(&bytes, &ours.made.pins).unwrap_err();
        assert!(matches!(error, LuksError::Sequence { .. }), "{error}");
        let header = Header::load(&bytes.as_slice()).unwrap();
        let error = header.pins().check_first().unwrap_err();
        assert!(
            matches!(error, LuksError::Sequence { known: 0, .. }),
            "{error}"
        );
    }
    // The restore of a header increases it that much.
    for sequence in [known, known + 1, known + (1 << 20)] {
        check(&with(sequence), &ours.made.pins).unwrap();
        Header::load(&with(sequence).as_slice())
            .unwrap()
            .pins()
            .check_first()
            .unwrap();
    }
}

#[test]
fn missing_and_changed_slots_are_reported_and_moved_areas_are_not() {
    let ours = Ours::make();
    let bytes = ours.bytes();
    let earlier = Header::load(&bytes.as_slice()).unwrap();
    let went = |change: &dyn Fn(&mut Value)| {
        let bytes = rewrite(&bytes, change);
        Header::load(&bytes.as_slice())
            .unwrap()
            .slots_missing_of(&earlier)
    };
    assert!(went(&|_| {}).is_empty());
    let removed = |m: &mut Value| {
        m["keyslots"].as_object_mut().unwrap().remove("1");
        m["digests"]["0"]["keyslots"] = json!(["0"]);
    };
    assert_eq!(went(&removed), [1]);
    assert_eq!(went(&|m| m["keyslots"]["1"]["kdf"]["time"] = json!(5)), [1]);
    let moved = |m: &mut Value| {
        let offset = m["keyslots"]["1"]["area"]["offset"].as_str().unwrap();
        let moved = offset.parse::<u64>().unwrap() + (1 << 20);
        m["keyslots"]["1"]["area"]["offset"] = json!(moved.to_string());
    };
    assert!(went(&moved).is_empty());
}

#[test]
fn areas_outside_of_their_space_overlapping_or_huge_are_invalid() {
    let bytes = Ours::make().bytes();
    let area = |name: &str, value: &str| {
        rewrite(&bytes, |m| m["keyslots"]["0"]["area"][name] = json!(value))
    };
    for forged in [
        area("offset", "0"),
        area("offset", "16384"),
        area("offset", "16777216"),
        area("offset", "16773120"),
        area("offset", "18446744073709551615"),
        area("offset", "18446744073709547520"),
        area("offset", "32769"),
        area("offset", "290816"),
        area("offset", "-1"),
        area("offset", "+32768"),
        area("size", "0"),
        area("size", "4096"),
        area("size", "16000000"),
        area("size", "18446744073709551615"),
        rewrite(&bytes, |m| {
            m["config"]["keyslots_size"] = json!("17179869184");
        }),
        rewrite(&bytes, |m| m["config"]["json_size"] = json!("16384")),
        rewrite(&bytes, |m| m["keyslots"]["0"]["key_size"] = json!(0)),
        rewrite(&bytes, |m| {
            m["keyslots"]["0"]["key_size"] = json!(4_294_967_295_u32);
        }),
        rewrite(&bytes, |m| m["keyslots"]["0"]["key_size"] = json!(32)),
        rewrite(&bytes, |m| m["keyslots"]["0"]["af"]["stripes"] = json!(1)),
        rewrite(&bytes, |m| m["keyslots"]["0"]["kdf"]["salt"] = json!("!!")),
        rewrite(&bytes, |m| m["keyslots"]["00"] = m["keyslots"]["0"].clone()),
        rewrite(&bytes, |m| m["keyslots"]["32"] = m["keyslots"]["0"].clone()),
        rewrite(&bytes, |m| m["digests"]["0"]["digest"] = json!("AAAA")),
        rewrite(&bytes, |m| m["digests"]["0"]["keyslots"] = json!([])),
        rewrite(&bytes, |m| m["digests"]["0"]["keyslots"] = json!(["7"])),
        rewrite(&bytes, |m| m["digests"]["0"]["segments"] = json!([])),
        rewrite(&bytes, |m| m["segments"]["0"]["sector_size"] = json!(8192)),
        rewrite(&bytes, |m| m["segments"]["0"]["iv_tweak"] = json!("1")),
        rewrite(&bytes, |m| m["segments"]["0"]["iv_tweak"] = json!(0)),
        rewrite_binary(&bytes, 168, b"../../../../etc/passwd\0\0"),
    ] {
        let error = Header::load(&forged.as_slice()).unwrap_err();
        assert!(matches!(error, LuksError::Invalid { .. }), "{error}");
    }
}

#[test]
fn text_that_two_parsers_understand_differently_is_damage() {
    let bytes = Ours::make().bytes();
    let good = text(&bytes);
    let again = "\"segments\":{\"0\":{\"type\":\"crypt\"}},";
    for forged in [
        good.replacen('{', &format!("{{{again}"), 1),
        good.replacen('{', "{\"segments\\u0000\":{},", 1),
        good.replacen('{', "{\"new\":{\"a\":1,\"a\":2},", 1),
        good.replacen("dynamic", "dynamic\\u0000", 1),
        good.replacen('{', "{/* comment */", 1),
        good.replacen('{', " {", 1),
        good.replace('"', "'"),
        format!("{good} trailing"),
        "{".repeat(12_000),
        String::new(),
        "[]".to_owned(),
        "{\"a\":1e999}".to_owned(),
    ] {
        let error = Header::load(&replace_text(&bytes, &forged).as_slice()).unwrap_err();
        let start: String = forged.chars().take(60).collect();
        assert!(
            matches!(error, LuksError::HeaderDamaged { .. }),
            "{start}: {error}"
        );
    }
}

#[test]
fn text_from_a_header_is_escaped_and_shortened_in_messages() {
    let evil = format!("\u{1b}[2J{}", "x".repeat(5000));
    let bytes = rewrite(&Ours::make().bytes(), |m| {
        m["segments"]["0"]["encryption"] = json!(evil);
    });
    let said = Header::load(&bytes.as_slice()).unwrap_err().to_string();
    assert!(!said.contains('\u{1b}') && said.len() < 200, "{said}");
}

#[test]
fn no_error_or_debug_text_shows_a_secret() {
    let ours = Ours::make();
    let wrong = Secret::passphrase("hunter2 hunter2".to_owned());
    let bytes = ours.bytes();
    let header = Header::load(&bytes.as_slice()).unwrap();
    let error = header.unlock(&bytes.as_slice(), &wrong).unwrap_err();
    let shown = format!(
        "{error} {error:?} {wrong:?} {:?} {header:?}",
        ours.made.volume_key
    );
    assert!(!shown.contains("hunter2"), "{shown}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever a server writes into a header, loading it and reading its pins terminates.
    #[test]
    fn mutated_headers_never_panic_and_never_pass_unnoticed(
        places in prop::collection::vec((0_usize..2 * SIZE, any::<u8>()), 1..6),
        in_text in prop::collection::vec((0_usize..1800, any::<u8>()), 0..4),
        sealed in any::<bool>(),
        cut in prop::option::of(0_usize..3 * SIZE),
    ) {
        // One container for all cases.
        static OURS: std::sync::LazyLock<(Pins, Vec<u8>)> = std::sync::LazyLock::new(|| {
            let ours = Ours::make();
            (ours.made.pins.clone(), ours.bytes()[..3 * SIZE].to_vec())
        });
        let (pins, good) = &*OURS;
        let mut bytes = good.clone();
        for (at, value) in places {
            bytes[at] = value;
        }
        for copy in COPIES {
            for (at, value) in &in_text {
                bytes[copy + 4096 + at] = *value;
            }
            if sealed {
                seal(&mut bytes, copy);
            }
        }
        bytes.truncate(cut.unwrap_or(bytes.len()));
        if let Ok(header) = Header::load(&bytes.as_slice()) {
            let same = header.pins().fingerprint() == pins.fingerprint();
            prop_assert_eq!(header.check_pins(pins).is_ok(), same
                && header.sequence_id() >= pins.sequence_id);
            let _ = (header.slots(), header.geometry(1 << 40), format!("{header:?}"));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Metadata of the right form with other numbers. What our parser accepts is passed to
    /// libcryptsetup, and the result is an error or the true key.
    #[test]
    fn metadata_with_other_digits_never_panic_and_never_yield_another_key(
        changes in prop::collection::vec((any::<prop::sample::Index>(), b'0'..=b'9'), 1..4),
    ) {
        static OURS: std::sync::LazyLock<(Ours, Vec<u8>)> = std::sync::LazyLock::new(|| {
            let ours = Ours::make();
            let bytes = ours.bytes()[..2 * SIZE + 2 * 258_048].to_vec();
            (ours, bytes)
        });
        let (ours, good) = &*OURS;
        let mut text = text(good).into_bytes();
        let digits: Vec<usize> = (0..text.len()).filter(|&i| text[i].is_ascii_digit()).collect();
        for (index, digit) in &changes {
            text[*index.get(&digits)] = *digit;
        }
        let bytes = replace_text(good, &String::from_utf8(text).unwrap());
        let Ok(header) = Header::load(&bytes.as_slice()) else { return Ok(()) };
        let opened = header.unlock(&bytes.as_slice(), &ours.key());
        if header.check_pins(&ours.made.pins).is_ok() && let Ok(key) = opened {
            let seal = |key| {
                let mut data = vec![1; 4096];
                SectorCipher::new(key, &header).unwrap().encrypt(0, &mut data).unwrap();
                data
            };
            prop_assert_eq!(seal(&key), seal(&ours.made.volume_key));
        }
    }
}
