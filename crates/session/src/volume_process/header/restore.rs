//! Puts a kept header back in the place of the one that lies there, or of what does.

use std::path::{Path, PathBuf};

use sprat_luks::{Header, HeaderRead, LuksErrorKind, Secret, SectorCipher};
use sprat_store::ReadClass;

use crate::file_system::ext4::ext4_bytes;
use crate::settings::IdentityPolicy;
use crate::state::headers;
use crate::volume_process::header::edit::{Done, Work};
use crate::{Exit, Failure};

impl Work<'_> {
    pub(crate) fn put_back(
        &self,
        path: &Path,
        shown: Option<u64>,
        proof: &Secret,
    ) -> Result<Done, Failure> {
        let kept = headers::open(path)?;
        let from = headers::load(&kept, path)?;
        self.start.pins.fits(&from).map_err(|error| {
            Failure::from(&error)
                .context("the kept header is not this container's")
                .with_hint("nothing was changed")
        })?;
        let lies_there = self.lies_there()?;
        let present = lies_there.as_ref();
        if present.map(Header::sequence_id) != shown {
            return Err(Failure::failed("the header was changed in the meantime")
                .with_hint("nothing was changed by this run. Look again and decide anew"));
        }
        let key = from
            .unlock(&kept, proof)
            .map_err(|error| Failure::from(&error).context("the kept header does not open"))?;
        let cipher = SectorCipher::new(&key, &from)?;
        drop(key);
        if present.is_none() && matches!(self.start.pins, IdentityPolicy::TrustOnce) {
            self.check_fits(&from, &cipher)?;
        }
        self.settle(&from)?;
        let known = match &self.start.pins {
            IdentityPolicy::Known(pins) => pins.sequence_id,
            _ => 0,
        };
        let bytes = self.bytes();
        let there = present.map(|present| (present, &bytes as &dyn HeaderRead));
        // A restore that was cut off may have come no further than to both copies.
        let gone: Vec<_> = headers::replaced(&self.state_dir(), from.uuid())
            .iter()
            .filter(|earlier| self.start.pins.fits(earlier).is_ok())
            .flat_map(Header::areas)
            .collect();
        let writes = from
            .restore(&kept, there, known, proof, &gone, self.lease.turn())
            .map_err(|error| {
                Failure::from(&error).context("the kept header can't be put back here")
            })?;
        let replaced = self.keep_what_goes(&from, present)?;
        self.stop.check()?;
        self.write(&writes)?;
        Ok(Done::put_back(replaced))
    }

    /// What lies in the header's place; the newest one kept may be what is put back, so it is not
    /// replaced.
    fn keep_what_goes(&self, from: &Header, present: Option<&Header>) -> Result<PathBuf, Failure> {
        let (paths, bytes) = (self.paths(from), self.bytes());
        match present {
            Some(present) => headers::keep_replaced(&paths, present, &bytes),
            None => headers::keep_foreign(&paths, &bytes),
        }
    }

    /// The header that lies there, where it is this container's by what is known of it. Another
    /// one's, LUKS1 and what is no header count as none. Where nothing is known a header that can
    /// be read counts as its own, and what is put back must be of the same container.
    fn lies_there(&self) -> Result<Option<Header>, Failure> {
        match Header::load(&self.bytes()) {
            Ok(present) if self.start.pins.fits(&present).is_ok() => Ok(Some(present)),
            Err(error) if error.kind() == LuksErrorKind::Read => Err(error.into()),
            // That is what the kept one is for.
            Ok(_) | Err(_) => Ok(None),
        }
    }

    /// With neither pins nor a header to compare with, the volume itself must fit the key.
    fn check_fits(&self, from: &Header, cipher: &SectorCipher) -> Result<(), Failure> {
        let payload = from.geometry(self.file.len()?)?;
        let mut block = [0; 4096];
        self.file
            .read_at(payload.offset_bytes, &mut block, ReadClass::Demand)?;
        cipher.decrypt(0, &mut block)?;
        if ext4_bytes(&block[1024..2048]).is_some() {
            return Ok(());
        }
        Err(Failure::new(
            Exit::Damaged,
            "the kept header's key does not fit this container's volume",
        )
        .with_hint(
            "nothing was changed. If it is this container's all the same, give --fingerprint from \
             its recovery sheet",
        ))
    }
}
