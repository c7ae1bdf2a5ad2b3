//! Interoperation with the stock `cryptsetup` command, in both directions.

use std::fs::File;

use sprat_luks::{Header, LuksError, Secret};

use crate::stock::{Files, Ours, cryptsetup, cryptsetup_is_here, cryptsetup_ok, their_container};

const PASSPHRASE: &[u8] = b"correct horse battery staple";

fn theirs_opens(extra: &[&str]) -> Option<Header> {
    if !cryptsetup_is_here() {
        return None;
    }
    let files = Files::new();
    let path = their_container(&files, PASSPHRASE, extra);
    let file = File::open(&path).unwrap();
    let header = Header::load(&file).unwrap();
    assert!(header.copies().both_good());
    let uuid = cryptsetup_ok(&["luksUUID", path.to_str().unwrap()], b"");
    assert_eq!(header.uuid(), uuid.trim());
    let secret = Secret::key_file(PASSPHRASE.to_vec());
    let key = header.unlock(&file, &secret).unwrap();
    assert_eq!(key.bits(), header.pins().key_bits as usize);
    let wrong = Secret::key_file(b"incorrect horse".to_vec());
    let refused = header.unlock(&file, &wrong).unwrap_err();
    assert!(
        matches!(refused, LuksError::WrongSecret { slots_tried: 1 }),
        "{refused}"
    );
    Some(header)
}

#[test]
fn a_stock_container_with_all_defaults_opens() {
    let Some(header) = theirs_opens(&[]) else {
        return;
    };
    let pins = header.pins();
    assert_eq!(pins.key_bits, 512);
    assert_eq!(pins.payload_offset_bytes, 16 << 20);
    assert_eq!(pins.iv_tweak, 0);
}

#[test]
fn a_stock_container_with_each_sector_size_opens() {
    for sector in ["512", "1024", "2048", "4096"] {
        let Some(header) = theirs_opens(&["--sector-size", sector]) else {
            return;
        };
        assert_eq!(header.pins().sector_bytes.to_string(), sector);
    }
}

#[test]
fn a_stock_container_with_a_256_bit_key_opens() {
    let Some(header) = theirs_opens(&["--cipher", "aes-xts-plain64", "--key-size", "256"]) else {
        return;
    };
    assert_eq!(header.pins().key_bits, 256);
}

#[test]
fn a_stock_container_with_argon2_opens() {
    for kind in ["argon2i", "argon2id"] {
        let costs = ["--pbkdf-force-iterations", "4", "--pbkdf-memory", "32"];
        let mut extra = vec!["--pbkdf", kind, "--pbkdf-parallel", "1"];
        extra.extend(costs);
        let Some(header) = theirs_opens(&extra) else {
            return;
        };
        assert_eq!(
            header.slots()[0].kdf,
            format!("{kind}, 32 KiB, 4 passes, 1 threads")
        );
    }
}

#[test]
fn a_stock_container_with_other_hashes_opens() {
    for hash in ["sha1", "sha512"] {
        if theirs_opens(&["--hash", hash]).is_none() {
            return;
        }
    }
}

#[test]
fn a_stock_container_with_other_header_sizes_opens() {
    for (metadata, keyslots, offset) in [
        ("32k", "512k", "4096"),
        ("64k", "1m", "8192"),
        ("1m", "16m", "65536"),
        ("4m", "16m", "65536"),
    ] {
        let Some(header) = theirs_opens(&[
            "--luks2-metadata-size",
            metadata,
            "--luks2-keyslots-size",
            keyslots,
            "--offset",
            offset,
        ]) else {
            return;
        };
        let sectors = header.pins().payload_offset_bytes / 512;
        assert_eq!(sectors.to_string(), offset);
    }
}

#[test]
fn a_stock_container_opens_with_any_of_its_slots() {
    if !cryptsetup_is_here() {
        return;
    }
    let files = Files::new();
    let path = their_container(&files, PASSPHRASE, &["--label", "backup of 1999"]);
    let name = path.to_str().unwrap();
    let first = files.holding("first", PASSPHRASE);
    let first = first.to_str().unwrap();
    for second in ["second", "third"] {
        let cheap = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
        let mut args = vec!["luksAddKey", "--batch-mode", "--key-file", first];
        args.extend(cheap);
        args.extend([name, "-"]);
        cryptsetup_ok(&args, second.as_bytes());
    }
    cryptsetup_ok(
        &[
            "luksKillSlot",
            "--batch-mode",
            "--key-file",
            first,
            name,
            "1",
        ],
        b"",
    );
    let file = File::open(&path).unwrap();
    let header = Header::load(&file).unwrap();
    assert_eq!(header.label(), "backup of 1999");
    let numbers: Vec<u32> = header.slots().iter().map(|slot| slot.number).collect();
    assert_eq!(numbers, [0, 2]);
    let unlock = |text: &str| header.unlock(&file, &Secret::passphrase(text.to_owned()));
    assert!(unlock("correct horse battery staple").is_ok());
    assert!(unlock("third").is_ok());
    assert!(matches!(
        unlock("second").unwrap_err(),
        LuksError::WrongSecret { slots_tried: 2 }
    ));
}

#[test]
fn containers_that_only_the_kernel_opens_are_refused_with_the_reason() {
    if !cryptsetup_is_here() {
        return;
    }
    let cases: &[(&[&str], &str)] = &[
        (
            &["--cipher", "aes-cbc-essiv:sha256"],
            "aes-cbc-essiv:sha256",
        ),
        (
            &["--cipher", "aes-ecb", "--key-size", "256"],
            "protects nothing",
        ),
    ];
    for (extra, said) in cases {
        let files = Files::new();
        // An unusual slot is accepted.
        let slot = [
            "--keyslot-cipher",
            "aes-xts-plain64",
            "--keyslot-key-size",
            "512",
        ];
        let path = their_container(&files, PASSPHRASE, &[*extra, &slot].concat());
        let error = Header::load(&File::open(&path).unwrap()).unwrap_err();
        assert!(error.to_string().contains(said), "{error}");
    }
    let files = Files::new();
    let path = files.sparse("luks1", 32 << 20);
    let args = [
        "luksFormat",
        "--type",
        "luks1",
        "--batch-mode",
        "--pbkdf-force-iterations",
        "1000",
    ];
    let mut args = args.to_vec();
    args.extend([path.to_str().unwrap(), "-"]);
    cryptsetup_ok(&args, PASSPHRASE);
    let error = Header::load(&File::open(&path).unwrap()).unwrap_err();
    assert!(matches!(error, LuksError::Luks1), "{error}");
}

#[test]
fn our_container_is_accepted_by_cryptsetup() {
    if !cryptsetup_is_here() {
        return;
    }
    let files = Files::new();
    let ours = Ours::make();
    let path = ours.file(&files);
    let name = path.to_str().unwrap();
    cryptsetup_ok(&["isLuks", "--type", "luks2", name], b"");
    let uuid = cryptsetup_ok(&["luksUUID", name], b"");
    assert_eq!(uuid.trim(), ours.made.pins.uuid);
    let dump = cryptsetup_ok(&["luksDump", name], b"");
    for line in [
        "Version:       \t2",
        "Metadata area: \t16384 [bytes]",
        "offset: 16777216 [bytes]",
        "cipher: aes-xts-plain64",
        "sector: 4096 [bytes]",
        "Key:        512 bits",
        "PBKDF:      pbkdf2",
        "PBKDF:      argon2id",
    ] {
        assert!(dump.contains(line), "{line} in {dump}");
    }
    let test = |args: &[&str], input: &[u8]| {
        let mut all = vec!["open", "--test-passphrase", "--disable-locks"];
        all.extend(args);
        all.push(name);
        cryptsetup(&all, input).status.success()
    };
    let key_file = files.holding("key", &ours.key_file);
    let key_file = key_file.to_str().unwrap();
    assert!(test(&["--key-file", key_file], b""));
    // As a user does: types what the sheet shows, and Enter.
    assert!(test(&[], format!("{}\n", ours.recovery.text()).as_bytes()));
    assert!(!test(&[], b"something else\n"));
    // With the data device instead of the file, nothing needs repair.
    let before = std::fs::read(&path).unwrap();
    cryptsetup_ok(&["repair", "--batch-mode", name], b"");
    assert!(before == std::fs::read(&path).unwrap(), "repair changed it");
}

#[test]
fn stock_commands_change_the_keys_of_our_container() {
    if !cryptsetup_is_here() {
        return;
    }
    let files = Files::new();
    let ours = Ours::make();
    let path = ours.file(&files);
    let name = path.to_str().unwrap();
    let key_file = files.holding("key", &ours.key_file);
    let cheap = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    let mut args = vec!["luksAddKey", "--batch-mode", "--key-file"];
    args.push(key_file.to_str().unwrap());
    args.extend(cheap);
    args.extend([name, "-"]);
    cryptsetup_ok(&args, b"added by stock tools");
    let file = File::open(&path).unwrap();
    let header = Header::load(&file).unwrap();
    header.check_pins(&ours.made.pins).unwrap();
    assert!(header.sequence_id() > ours.made.pins.sequence_id);
    let added = Secret::passphrase("added by stock tools".to_owned());
    header.unlock(&file, &added).unwrap();
}
