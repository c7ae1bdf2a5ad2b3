//! Changes a record that the agent keeps in two slots, as another time or another history would have left it.

use std::os::unix::fs::FileExt;

use crate::client::Served;

const SLOT: usize = 512;

/// The newer slot of a file: its sequence number and text.
fn newer(bytes: &[u8]) -> (u64, String) {
    let slots = bytes.chunks_exact(SLOT).filter_map(|slot| {
        let sequence = u64::from_le_bytes(slot[..8].try_into().unwrap());
        let len = usize::try_from(u32::from_le_bytes(slot[8..12].try_into().unwrap())).unwrap();
        let whole = crc32fast::hash(&slot[..SLOT - 4]).to_le_bytes() == slot[SLOT - 4..];
        (whole && sequence > 0).then(|| {
            let text = String::from_utf8(slot[12..12 + len].to_vec()).unwrap();
            (sequence, text)
        })
    });
    slots.max_by_key(|(sequence, _)| *sequence).unwrap()
}

fn read(file: &std::fs::File) -> (u64, String) {
    let mut bytes = [0; 2 * SLOT];
    let len = file.read_at(&mut bytes, 0).unwrap();
    newer(&bytes[..len / SLOT * SLOT])
}

fn open(served: &Served, name: &str) -> std::fs::File {
    let mut options = std::fs::File::options();
    let path = served.path(&format!(".sprat-agent/{name}"));
    options.read(true).write(true).open(path).unwrap()
}

/// What a record says.
pub fn text(served: &Served, name: &str) -> String {
    read(&open(served, name)).1
}

/// Sets `key` in a record of the folder `.sprat-agent`, such as `clock` or `x.luks/state`. Nobody writes it meanwhile.
pub fn set(served: &Served, name: &str, key: &str, value: i64) {
    let file = open(served, name);
    let (sequence, text) = read(&file);
    let line = |line: &str| match line.split_once(' ') {
        Some((name, _)) if name == key => format!("{key} {value}\n"),
        _ => format!("{line}\n"),
    };
    let text: String = text.lines().map(line).collect();
    assert!(text.contains(&format!("{key} {value}\n")), "{text}");
    let mut slot = [0; SLOT];
    let sequence = sequence + 1;
    slot[..8].copy_from_slice(&sequence.to_le_bytes());
    slot[8..12].copy_from_slice(&u32::try_from(text.len()).unwrap().to_le_bytes());
    slot[12..12 + text.len()].copy_from_slice(text.as_bytes());
    let crc = crc32fast::hash(&slot[..SLOT - 4]);
    slot[SLOT - 4..].copy_from_slice(&crc.to_le_bytes());
    let at = sequence % 2 * SLOT as u64;
    file.write_all_at(&slot, at).unwrap();
}
