//! Containers that only the kernel opens (LUKS1 and other ciphers). They are checked, unlocked and
//! pinned here.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use sprat_luks::{AnyHeader, LuksError, LuksErrorKind, OpenedBy, Secret};

use crate::stock::{Files, cryptsetup_is_here, cryptsetup_ok, their_container};

const PASSPHRASE: &[u8] = b"correct horse battery staple";

fn luks1(files: &Files, extra: &[&str]) -> PathBuf {
    let path = files.sparse("luks1", 32 << 20);
    let mut args = vec!["luksFormat", "--type", "luks1", "--batch-mode"];
    args.extend(["--pbkdf-force-iterations", "1000"]);
    args.extend(extra);
    args.extend([path.to_str().unwrap(), "-"]);
    cryptsetup_ok(&args, PASSPHRASE);
    path
}

#[test]
fn a_luks1_container_opens_for_the_kernel_with_any_of_its_slots() {
    if !cryptsetup_is_here() {
        return;
    }
    let files = Files::new();
    let path = luks1(
        &files,
        &["--cipher", "aes-xts-plain64", "--key-size", "512"],
    );
    let name = path.to_str().unwrap();
    let first = files.holding("first", PASSPHRASE);
    let add = [
        "luksAddKey",
        "--batch-mode",
        "--pbkdf-force-iterations",
        "1000",
    ];
    let add = [
        &add[..],
        &["--key-file", first.to_str().unwrap(), name, "-"],
    ]
    .concat();
    cryptsetup_ok(&add, b"second");
    let file = File::open(&path).unwrap();
    let header = AnyHeader::load(&file, OpenedBy::Kernel).unwrap();
    let pins = header.pins();
    assert_eq!(
        (pins.cipher.as_str(), pins.key_bits),
        ("aes-xts-plain64", 512)
    );
    assert_eq!(
        (pins.sector_bytes, pins.payload_offset_bytes),
        (512, 2 << 20)
    );
    assert_eq!(pins.uuid, cryptsetup_ok(&["luksUUID", name], b"").trim());
    assert_eq!(header.geometry(32 << 20).unwrap().len_bytes, 30 << 20);
    let unlock = |secret: &[u8]| header.unlock(&file, &Secret::key_file(secret.to_vec()));
    assert_eq!(unlock(PASSPHRASE).unwrap().bits(), 512);
    assert_eq!(unlock(b"second").unwrap().bits(), 512);
    let refused = unlock(b"third").unwrap_err();
    assert!(
        matches!(refused, LuksError::WrongSecret { slots_tried: 2 }),
        "{refused}"
    );
}

#[test]
fn other_ciphers_open_for_the_kernel_and_are_pinned() {
    if !cryptsetup_is_here() {
        return;
    }
    // The slots' own cipher is the usual one. Whether the kernel has another is not our concern.
    let slot = [
        "--keyslot-cipher",
        "aes-xts-plain64",
        "--keyslot-key-size",
        "512",
    ];
    let cases: [(&[&str], &str, u32); 3] = [
        (
            &["--cipher", "aes-cbc-essiv:sha256", "--key-size", "256"],
            "aes-cbc-essiv:sha256",
            256,
        ),
        (
            &["--cipher", "aes-cbc-plain64", "--key-size", "128"],
            "aes-cbc-plain64",
            128,
        ),
        (
            &["--cipher", "aes-cbc-plain64", "--key-size", "192"],
            "aes-cbc-plain64",
            192,
        ),
    ];
    for (extra, cipher, bits) in cases {
        let files = Files::new();
        let file = File::open(their_container(
            &files,
            PASSPHRASE,
            &[extra, &slot].concat(),
        ))
        .unwrap();
        let refused = AnyHeader::load(&file, OpenedBy::Sprat).unwrap_err();
        assert_eq!(refused.kind(), LuksErrorKind::Unsupported);
        assert!(
            refused.to_string().ends_with("opens in kernel mode only"),
            "{refused}"
        );
        let header = AnyHeader::load(&file, OpenedBy::Kernel).unwrap();
        assert_eq!(
            (header.pins().cipher.as_str(), header.pins().key_bits),
            (cipher, bits)
        );
        let key = header
            .unlock(&file, &Secret::key_file(PASSPHRASE.to_vec()))
            .unwrap();
        assert_eq!(key.bits(), bits as usize);
        let mut other = header.pins();
        other.cipher = "aes-xts-plain64".to_owned();
        other.key_bits = 512;
        let pinned = header.check_pins(&other).unwrap_err();
        assert!(matches!(pinned, LuksError::Pin { .. }), "{pinned}");
    }
}

#[test]
fn ciphers_that_protect_nothing_are_refused_for_the_kernel_too() {
    if !cryptsetup_is_here() {
        return;
    }
    let files = Files::new();
    let ecb = their_container(
        &files,
        PASSPHRASE,
        &["--cipher", "aes-ecb", "--key-size", "256"],
    );
    let error = AnyHeader::load(&File::open(ecb).unwrap(), OpenedBy::Kernel).unwrap_err();
    assert!(matches!(error, LuksError::Refused { .. }), "{error}");
    let ecb = luks1(&files, &["--cipher", "aes-ecb", "--key-size", "256"]);
    let error = AnyHeader::load(&File::open(&ecb).unwrap(), OpenedBy::Kernel).unwrap_err();
    assert!(matches!(error, LuksError::Refused { .. }), "{error}");
    let error = AnyHeader::load(&File::open(&ecb).unwrap(), OpenedBy::Sprat).unwrap_err();
    assert!(matches!(error, LuksError::Luks1), "{error}");
}

#[test]
fn no_byte_of_a_luks1_header_can_cause_damage() {
    if !cryptsetup_is_here() {
        return;
    }
    let files = Files::new();
    let whole = std::fs::read(luks1(&files, &["--key-size", "512"])).unwrap();
    let pins = AnyHeader::load(&&whole[..], OpenedBy::Kernel)
        .unwrap()
        .pins();
    for at in 0..592 {
        for value in [0, 1, b'/', 0x7f, 0xff, whole[at] ^ 1] {
            let mut changed = whole[..592].to_vec();
            changed[at] = value;
            let same = changed == whole[..592];
            // Key slots may change, and free ones are ignored. Any other change is refused or visible in
            // the pins.
            match AnyHeader::load(&&changed[..], OpenedBy::Kernel) {
                Ok(header) => assert!(
                    same || at >= 208 || header.check_pins(&pins).is_err(),
                    "byte {at} as {value}"
                ),
                Err(error) => assert_ne!(error.kind(), LuksErrorKind::Failed, "{error}"),
            }
        }
    }
    for len in [0, 6, 591] {
        assert!(AnyHeader::load(&&whole[..len], OpenedBy::Kernel).is_err());
    }
    let gone = AnyHeader::load(&Unreadable, OpenedBy::Kernel).unwrap_err();
    assert_eq!(gone.kind(), LuksErrorKind::Read);
}

struct Unreadable;

impl sprat_luks::HeaderRead for Unreadable {
    fn len(&self) -> io::Result<u64> {
        Ok(32 << 20)
    }

    fn read_at(&self, _offset: u64, _buf: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::ConnectionReset.into())
    }
}
