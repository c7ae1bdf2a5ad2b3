//! Sectors against the stock `cryptsetup`, which encrypts and decrypts whole files by itself
//! (`reencrypt`), without the kernel's dm-crypt.

use std::{fs, os::unix::fs::FileExt};

use sprat_luks::{Header, Secret, SectorCipher};

use crate::stock::{Files, Ours, cryptsetup_is_here, cryptsetup_ok};

const CHEAP: [&str; 4] = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];

fn plain(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 4096 * 13) as u8).collect()
}

#[test]
fn sectors_encrypted_by_cryptsetup_are_decrypted() {
    if !cryptsetup_is_here() {
        return;
    }
    for (sector, bits) in [
        ("512", "512"),
        ("1024", "512"),
        ("2048", "256"),
        ("4096", "512"),
    ] {
        let files = Files::new();
        let expected = plain(1 << 20);
        let path = files.holding("plain", &expected);
        let file = fs::File::options()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        file.set_len(40 << 20).unwrap();
        let key_file = files.holding("key", b"secret");
        let mut args = vec!["reencrypt", "--encrypt", "--type", "luks2", "--batch-mode"];
        args.extend(["--disable-locks", "--reduce-device-size", "32M"]);
        args.extend(["--cipher", "aes-xts-plain64", "--key-size", bits]);
        args.extend([
            "--sector-size",
            sector,
            "--key-file",
            key_file.to_str().unwrap(),
        ]);
        args.extend(CHEAP);
        args.push(path.to_str().unwrap());
        cryptsetup_ok(&args, b"");
        let header = Header::load(&file).unwrap();
        let key = header
            .unlock(&file, &Secret::key_file(b"secret".to_vec()))
            .unwrap();
        let payload = header.geometry(file.metadata().unwrap().len()).unwrap();
        assert_eq!(payload.sector_bytes.to_string(), sector);
        let cipher = SectorCipher::new(&key, &header).unwrap();
        let mut data = vec![0; expected.len()];
        file.read_exact_at(&mut data, payload.offset_bytes).unwrap();
        assert!(data != expected, "encrypted");
        cipher.decrypt(0, &mut data).unwrap();
        assert!(data == expected, "sector size {sector}");
    }
}

#[test]
fn sectors_encrypted_by_us_are_decrypted_by_cryptsetup() {
    if !cryptsetup_is_here() {
        return;
    }
    let files = Files::new();
    let ours = Ours::make();
    let path = ours.file(&files);
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let header = Header::load(&file).unwrap();
    let cipher = SectorCipher::new(&ours.made.volume_key, &header).unwrap();
    let expected = plain(crate::stock::PAYLOAD_BYTES as usize);
    let mut sealed = expected.clone();
    cipher.encrypt(0, &mut sealed).unwrap();
    file.write_all_at(&sealed, header.pins().payload_offset_bytes)
        .unwrap();
    let key_file = files.holding("key", &ours.key_file);
    let detached = files.path("detached");
    cryptsetup_ok(
        &[
            "reencrypt",
            "--decrypt",
            "--force-offline-reencrypt",
            "--batch-mode",
            "--disable-locks",
            "--header",
            detached.to_str().unwrap(),
            "--key-file",
            key_file.to_str().unwrap(),
            path.to_str().unwrap(),
        ],
        b"",
    );
    let found = fs::read(&path).unwrap();
    assert!(found[..expected.len()] == expected, "decrypted");
}
