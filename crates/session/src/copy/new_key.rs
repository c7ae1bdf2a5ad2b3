//! A copy with a volume key of its own: its header, and the source as the copy stores it.
//!
//! The header is made once and kept beside the copy's note. Every run that continues the copy
//! therefore encrypts with the same key. The file is what the server gets, too: it has the volume
//! key only wrapped in the key slots. All cryptography is `sprat_luks`'s, as for `init` and for a
//! session.

use std::io::{self, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sprat_luks::{
    Extent, FormatOptions, Header, LuksError, Pins, RecoveryKey, Secret, SectorCipher, SlotKind,
    UnlockOptions, format,
};
use sprat_snapshot::local_file;
use sprat_store::{FileStat, ReadClass, StoreError, StoreFile, hex};

use crate::connect::HeaderBytes;
use crate::copy::endpoint::Source;
use crate::copy::{CopyObserver, Job};
use crate::file_system::{FileSystemState, read_stamp_block};
use crate::state::{self, headers};
use crate::{Exit, Failure};

/// Block size of the volume. A block of zeros, before decryption, was never written: it is a hole.
const BLOCK_BYTES: usize = 4096;

/// How a copy gets a volume key of its own.
#[derive(Debug, Clone, Copy)]
pub struct NewKeyOptions {
    /// The kind of the source's key. The copy gets a slot for it, and a slot for a new recovery
    /// key.
    pub kind: SlotKind,
    /// Weak key derivation.
    pub fast_kdf_for_tests: bool,
}

/// The header of a copy with another key.
pub(super) struct NewHeader {
    /// The beginning of the file up to the last byte that is used. Zeros follow up to the payload.
    image: Vec<u8>,
    pub pins: Pins,
    /// SHA-256 of `image`, hexadecimal digits.
    pub digest: String,
}

/// What converts the source's bytes to the copy's.
pub(super) struct NewKey {
    /// The source that the old key opened.
    source: Pins,
    header: Arc<NewHeader>,
    old: Arc<SectorCipher>,
    new: SectorCipher,
}

/// The source as the copy stores it. Read-only.
struct WithNewKey {
    file: Arc<dyn StoreFile>,
    key: Arc<NewKey>,
}

impl NewHeader {
    fn new(image: Vec<u8>) -> Result<Self, LuksError> {
        let pins = Header::load(&&image[..])?.pins();
        let digest = hex(&openssl::sha::sha256(&image));
        Ok(Self {
            image,
            pins,
            digest,
        })
    }

    /// The kept header, if it has this digest.
    fn load(path: &Path, digest: &str) -> Option<Self> {
        let kept = Self::new(std::fs::read(path).ok()?).ok()?;
        (kept.digest == digest).then_some(kept)
    }

    fn header(&self) -> Result<Header, LuksError> {
        Header::load(&&self.image[..])
    }

    /// The range that holds data.
    pub(super) fn used(&self) -> Range<u64> {
        0..self.image.len() as u64
    }
}

impl NewKey {
    /// Re-encrypts a piece of the payload, `offset` bytes into it, from the old key to the new one.
    fn change(&self, offset: u64, bytes: &mut [u8]) -> Result<(), LuksError> {
        let mut at = 0;
        while at < bytes.len() {
            let is_hole = |at: usize| bytes[at..at + BLOCK_BYTES].iter().all(|byte| *byte == 0);
            let hole = is_hole(at);
            let mut end = at + BLOCK_BYTES;
            while end < bytes.len() && is_hole(end) == hole {
                end += BLOCK_BYTES;
            }
            if !hole {
                let offset = offset + at as u64;
                self.old.decrypt(offset, &mut bytes[at..end])?;
                self.new.encrypt(offset, &mut bytes[at..end])?;
            }
            at = end;
        }
        Ok(())
    }
}

impl WithNewKey {
    fn refused(op: &'static str) -> StoreError {
        StoreError::Unsupported {
            op,
            object: "the source".to_owned(),
            reason: "it is only read".to_owned(),
        }
    }
}

impl StoreFile for WithNewKey {
    fn len(&self) -> Result<u64, StoreError> {
        self.file.len()
    }

    fn stat(&self) -> Result<FileStat, StoreError> {
        self.file.stat()
    }

    /// Panics if a range of the payload is not made of whole blocks of 4096 bytes.
    fn read_at(&self, offset: u64, buf: &mut [u8], class: ReadClass) -> Result<(), StoreError> {
        let header = &self.key.header;
        let payload_at = header.pins.payload_offset_bytes;
        let of_header = payload_at.saturating_sub(offset).min(buf.len() as u64);
        let (head, payload) = buf.split_at_mut(usize::try_from(of_header).unwrap_or(usize::MAX));
        head.fill(0);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        if let Some(there) = header.image.get(from..) {
            let len = there.len().min(head.len());
            head[..len].copy_from_slice(&there[..len]);
        }
        if payload.is_empty() {
            return Ok(());
        }
        let at = offset.max(payload_at);
        self.file.read_at(at, payload, class)?;
        let changed = self.key.change(at - payload_at, payload);
        changed.map_err(|error| StoreError::Io {
            op: "encrypt with the new key",
            object: "the source".to_owned(),
            source: io::Error::other(error),
        })
    }

    fn write_at(&self, _: u64, _: &[u8]) -> Result<(), StoreError> {
        Err(Self::refused("write to"))
    }

    fn flush(&self) -> Result<(), StoreError> {
        Err(Self::refused("flush"))
    }

    fn discard(&self, _: u64, _: u64) -> Result<(), StoreError> {
        Err(Self::refused("make a hole in"))
    }

    fn resize(&self, _: u64) -> Result<(), StoreError> {
        Err(Self::refused("resize"))
    }
}

impl Job<'_> {
    /// Prepares the key of a copy that gets its own: loads the header that an earlier run of this
    /// copy made, or makes a new one and shows its sheet.
    pub(super) fn prepare_new_key(
        &mut self,
        source: Option<&Source>,
        copy_is_there: bool,
        observer: &mut dyn CopyObserver,
    ) -> Result<(), Failure> {
        let Some(options) = self.options.new_key else {
            return Ok(());
        };
        if self.new_header.is_none() {
            let noted = self.note.as_ref();
            let digest = noted.and_then(|note| note.identity().new_header.as_deref());
            let kept = digest.and_then(|digest| NewHeader::load(&self.header_path(), digest));
            self.new_header = kept.map(Arc::new);
        }
        if copy_is_there && self.new_header.is_none() {
            // A file with another header is not the copy.
            return Err(self.with_final_hint(self.exists_already()));
        }
        let Some(source) = source else { return Ok(()) };
        if let Some(key) = &self.new_key {
            if key.source == source.pins {
                return Ok(());
            }
            let failure = Failure::new(
                Exit::Damaged,
                format!(
                    "{} is not the container with which this copy began",
                    self.options.source.target
                ),
            );
            return Err(self.with_final_hint(failure.with_hint(
                "nothing was removed, and the copy is unfinished. Another file replaced the source \
                 while the connection was lost. Find out why before you run the command again",
            )));
        }
        let Some(secret) = &self.options.source_key else {
            return Err(Failure::usage("a new key needs the source's key"));
        };
        check_geometry(source)?;
        let old = self.opened(source, secret)?;
        let header = match &self.new_header {
            Some(header) => Arc::clone(header),
            None => Arc::new(self.make_header(source, secret, options, observer)?),
        };
        let note_path = self.note_path();
        let opened = header.header()?.unlock(&&header.image[..], secret);
        let key = opened.map_err(|error| {
            Failure::from(&error)
                .context("the new key of this copy was made with another key of the source")
                .with_hint(format!(
                    "nothing was changed. Use the key with which the copy began. Or delete the \
                     unfinished file and {}, and run the command again",
                    note_path.display()
                ))
        })?;
        let new = SectorCipher::new(&key, &header.header()?)?;
        self.new_header = Some(Arc::clone(&header));
        self.new_key = Some(Arc::new(NewKey {
            source: source.pins.clone(),
            header,
            old,
            new,
        }));
        Ok(())
    }

    /// The source's cipher.
    fn opened(&mut self, source: &Source, secret: &Secret) -> Result<Arc<SectorCipher>, Failure> {
        if let Some(cipher) = self.cipher_of(&source.pins) {
            return Ok(cipher);
        }
        let from = &self.options.source;
        let last = state::opened_last(&from.state_dir, &from.target, &source.pins.uuid);
        let (bytes, last) = (
            HeaderBytes(&*source.file),
            UnlockOptions::beginning_with(last),
        );
        let (_, key) = source.header.unlock_within(&bytes, secret, &last)?;
        let cipher = Arc::new(SectorCipher::new(&key, &source.header)?);
        self.cipher = Some((source.pins.clone(), Arc::clone(&cipher)));
        Ok(cipher)
    }

    /// The cipher of a source with these pins, if a key has opened it.
    pub(super) fn cipher_of(&self, source: &Pins) -> Option<Arc<SectorCipher>> {
        let (pins, cipher) = self.cipher.as_ref()?;
        (pins == source).then(|| Arc::clone(cipher))
    }

    /// Makes a header, shows its sheet, and keeps it. The sheet comes first: there must be no copy
    /// whose recovery key nobody saw.
    fn make_header(
        &mut self,
        source: &Source,
        secret: &Secret,
        options: NewKeyOptions,
        observer: &mut dyn CopyObserver,
    ) -> Result<NewHeader, Failure> {
        self.interrupt.check()?;
        if self.header_path().exists() {
            observer.tell(
                "discard the sheet that an earlier, unfinished run of this copy showed: its key does \
                 not open this copy",
                true,
            );
        }
        let recovery = RecoveryKey::generate()
            .map_err(|error| Failure::from(&error).context("can't create a recovery key"))?;
        let secrets = [
            (Secret::key_file(secret.expose().to_vec()), options.kind),
            (recovery.secret(), SlotKind::Recovery),
        ];
        let label = source.header.label();
        let made = format(
            &secrets,
            &FormatOptions {
                uuid: None,
                label: (!label.is_empty()).then(|| label.to_owned()),
                fast_kdf_for_tests: options.fast_kdf_for_tests,
            },
        )?;
        let header = NewHeader::new(image(&made.header)?)?;
        self.interrupt.check()?;
        let shown = observer.new_key(&header.pins, &recovery);
        shown.map_err(|failure| {
            self.with_final_hint(
                failure.with_more_hint("Nothing was copied, and no key was changed"),
            )
        })?;
        let path = self.header_path();
        local_file::replace(&path, |file| file.write_all(&header.image)).map_err(|error| {
            Failure::failed(format!("can't save the new header in {}", path.display()))
                .caused_by(&error)
                .with_hint(
                    "free space on the disk of the state folder, or make the folder writable. Discard \
                     the sheet that was shown: its key opens nothing",
                )
        })?;
        Ok(header)
    }

    pub(super) fn header_path(&self) -> PathBuf {
        self.note_path().with_extension("header")
    }

    /// The source, or a file that was the source, as the copy stores it.
    pub(super) fn as_copied(&self, file: &Arc<dyn StoreFile>) -> Arc<dyn StoreFile> {
        let file = Arc::clone(file);
        match &self.new_key {
            Some(key) => Arc::new(WithNewKey {
                file,
                key: Arc::clone(key),
            }),
            None => file,
        }
    }

    /// The pins that the copy of a source has.
    pub(super) fn pins_of_copy(&self, source: &Source) -> Pins {
        match &self.new_header {
            Some(header) => header.pins.clone(),
            None => source.pins.clone(),
        }
    }

    /// Before the copy gets its name: checks that the header on the destination opens with the key,
    /// and that it opens to the source's file system. The header is kept, and this machine's state
    /// about the source is recorded for the copy.
    pub(super) fn prove_new_key(
        &mut self,
        file: &dyn StoreFile,
        source: &Source,
        observer: &mut dyn CopyObserver,
    ) -> Result<(), Failure> {
        let (Some(key), Some(secret)) = (self.new_key.clone(), &self.options.source_key) else {
            return Ok(());
        };
        let bytes = HeaderBytes(file);
        let header = Header::load(&bytes)?;
        let cipher = SectorCipher::new(&header.unlock(&bytes, secret)?, &header)?;
        let (there, _) = read_stamp_block(file, &header, &cipher)?;
        let (here, file_bytes) = read_stamp_block(&*source.file, &source.header, &key.old)?;
        // Two wrong ciphers may agree, too.
        if there != here || FileSystemState::read(&here, file_bytes).is_none() {
            let failure = Failure::new(
                Exit::Damaged,
                "the file system in the copy is not the one in the source",
            );
            return Err(self.with_final_hint(failure.with_hint(
                "the copy is unfinished, and the source is unchanged. This machine's memory or the \
                 server may be faulty. Check both, delete the unfinished file and run the same command \
                 again",
            )));
        }
        let [from, to] = [&self.options.source, &self.options.destination];
        let known = state::KnownState::load(&self.paths(from, &source.pins));
        let paths = self.paths(to, &header.pins());
        let kept = headers::keep_newest(&paths, &header, &bytes, None).map(drop);
        let noted = known.with_new_key(&paths, &here, file_bytes, header.slot_digests());
        // If this fails nothing is lost: the next session records both.
        for failure in [kept, noted].into_iter().filter_map(Result::err) {
            observer.tell(&failure.in_one_line(), true);
        }
        Ok(())
    }
}

/// The header is like that of `init`. So the payload of the copy must begin where the source's
/// does.
fn check_geometry(source: &Source) -> Result<(), Failure> {
    /// The same value as in `sprat_luks::format`.
    const PAYLOAD_OFFSET_BYTES: u64 = 16 << 20;
    let payload = source.header.geometry(source.stat.len)?;
    let whole = payload.offset_bytes + payload.len_bytes == source.stat.len;
    if payload.offset_bytes == PAYLOAD_OFFSET_BYTES && whole {
        return Ok(());
    }
    Err(Failure::failed(
        "this container can't be copied with a new key: sprat did not create it, and its data begins at \
         another offset or does not end with a full block of 4096 bytes",
    )
    .with_hint("nothing was changed. Create a new container with `sprat init`, and back up into it"))
}

/// The beginning of the file up to the last byte that is used.
fn image(extents: &[Extent]) -> Result<Vec<u8>, Failure> {
    let mut image = Vec::new();
    for extent in extents {
        let start = usize::try_from(extent.offset)
            .map_err(|_| Failure::failed("the new header is too long for this machine"))?;
        let end = start + extent.bytes.len();
        if image.len() < end {
            image.resize(end, 0);
        }
        image[start..end].copy_from_slice(&extent.bytes);
    }
    Ok(image)
}

#[cfg(test)]
mod tests {
    use sprat_store::copy::DataMap;
    use sprat_store::{FileName, LocalStore, Store};

    use super::*;

    fn header() -> (NewHeader, sprat_luks::VolumeKey) {
        let options = FormatOptions {
            fast_kdf_for_tests: true,
            ..FormatOptions::default()
        };
        let secret = Secret::key_file(vec![7; 4096]);
        let made = format(&[(secret, SlotKind::KeyFile)], &options).unwrap();
        let header = NewHeader::new(image(&made.header).unwrap()).unwrap();
        (header, made.volume_key)
    }

    #[test]
    fn payload_gets_the_new_key_and_holes_stay() {
        let dir = tempfile::tempdir().unwrap();
        let store = LocalStore::open(dir.path()).unwrap();
        let name = FileName::new("x.luks").unwrap();
        let file = store.create_new(&name).unwrap();
        let (source, old_key) = header();
        let (copy, new_key) = header();
        assert_ne!(source.pins, copy.pins);
        let cipher =
            |header: &NewHeader, key| SectorCipher::new(key, &header.header().unwrap()).unwrap();
        let offset = source.pins.payload_offset_bytes;
        let plain: Vec<u8> = (0..=250).cycle().take(8 * BLOCK_BYTES).collect();
        let old = cipher(&source, &old_key);
        let mut stored = plain.clone();
        old.encrypt(0, &mut stored).unwrap();
        let holes = [1, 2, 5];
        let block = |n: usize| n * BLOCK_BYTES..(n + 1) * BLOCK_BYTES;
        for hole in holes {
            stored[block(hole)].fill(0);
        }
        file.write_at(0, &source.image).unwrap();
        file.write_at(offset, &stored).unwrap();
        let with = WithNewKey {
            file,
            key: Arc::new(NewKey {
                source: source.pins.clone(),
                header: Arc::new(copy),
                old: Arc::new(old),
                new: cipher(&source, &new_key),
            }),
        };
        // Over the end of the header, as one piece.
        let len = usize::try_from(offset).unwrap() + stored.len();
        let mut all = vec![1; len];
        with.read_at(0, &mut all, ReadClass::Ahead).unwrap();
        let (head, payload) = all.split_at_mut(len - stored.len());
        let image = &with.key.header.image;
        assert!(head.starts_with(image));
        assert!(head[image.len()..].iter().all(|byte| *byte == 0));
        for hole in holes {
            assert!(payload[block(hole)].iter().all(|byte| *byte == 0), "{hole}");
        }
        let mut part = vec![0; 2 * BLOCK_BYTES];
        let at = offset + 3 * BLOCK_BYTES as u64;
        with.read_at(at, &mut part, ReadClass::Ahead).unwrap();
        assert_eq!(part, payload[3 * BLOCK_BYTES..5 * BLOCK_BYTES]);
        assert_ne!(part, stored[3 * BLOCK_BYTES..5 * BLOCK_BYTES]);
        let opened = with.key.header.header().unwrap();
        let new = SectorCipher::new(&new_key, &opened).unwrap();
        new.decrypt(0, payload).unwrap();
        for n in (0..8).filter(|n| !holes.contains(n)) {
            assert_eq!(payload[block(n)], plain[block(n)], "{n}");
        }
        assert!(DataMap::of(&with).is_err() && with.write_at(0, &[0]).is_err());
    }

    #[test]
    fn kept_header_is_complete_and_identified_by_its_digest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("copies/x.header");
        let (made, key) = header();
        local_file::replace(&path, |file| file.write_all(&made.image)).unwrap();
        let kept = NewHeader::load(&path, &made.digest).unwrap();
        assert_eq!((&kept.pins, &kept.image), (&made.pins, &made.image));
        let secret = Secret::key_file(vec![7; 4096]);
        let opened = kept.header().unwrap().unlock(&&kept.image[..], &secret);
        assert_eq!(opened.unwrap().expose(), key.expose());
        let (other, _) = header();
        assert!(NewHeader::load(&path, &other.digest).is_none());
        let last = made.image.len() - 1;
        std::fs::write(&path, &made.image[..last]).unwrap();
        assert!(NewHeader::load(&path, &made.digest).is_none());
    }
}
