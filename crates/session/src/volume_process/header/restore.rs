//! Restores a kept header over the current one, or over whatever is in its place.

use std::path::{Path, PathBuf};

use sprat_luks::{Header, HeaderRead, LuksErrorKind, Secret, SectorCipher};

use crate::file_system::{file_system_bytes, read_stamp_block};
use crate::settings::IdentityPolicy;
use crate::state::headers;
use crate::volume_process::header::edit::{EditOutcome, HeaderEdit};
use crate::{Exit, Failure};

impl HeaderEdit<'_> {
    pub(crate) fn put_back(
        &self,
        path: &Path,
        shown: Option<u64>,
        proof: &Secret,
    ) -> Result<EditOutcome, Failure> {
        let kept = headers::open(path)?;
        let from = headers::load(&kept, path)?;
        self.start.settings.pins.fits(&from).map_err(|error| {
            Failure::from(&error)
                .context("the saved header belongs to another container")
                .with_hint("nothing was changed")
        })?;
        let current_header = self.current_header()?;
        let present = current_header.as_ref();
        if present.map(Header::sequence_id) != shown {
            return Err(
                Failure::failed("the header was changed in the meantime").with_hint(
                    "nothing was changed by this run. Run the command again and check what \
                    it shows",
                ),
            );
        }
        let key = from.unlock(&kept, proof).map_err(|error| {
            Failure::from(&error).context("the key does not open the saved header")
        })?;
        let cipher = SectorCipher::new(&key, &from)?;
        drop(key);
        if present.is_none() && matches!(self.start.settings.pins, IdentityPolicy::TrustOnce) {
            self.check_fits(&from, &cipher)?;
        }
        self.recover(&from)?;
        let known = match &self.start.settings.pins {
            IdentityPolicy::Known(pins) => pins.sequence_id,
            _ => 0,
        };
        let bytes = self.bytes();
        let there = present.map(|present| (present, &bytes as &dyn HeaderRead));
        // An interrupted restore may have written both copies and nothing more.
        let gone: Vec<_> = headers::replaced(self.state_dir(), from.uuid())
            .iter()
            .filter(|earlier| self.start.settings.pins.fits(earlier).is_ok())
            .flat_map(Header::areas)
            .collect();
        let writes = from
            .restore(&kept, there, known, proof, &gone, self.lease.turn())
            .map_err(|error| {
                Failure::from(&error).context("the saved header can't be restored here")
            })?;
        let replaced = self.keep_replaced(&from, present)?;
        self.stop.check()?;
        self.write(&writes)?;
        Ok(EditOutcome::put_back(replaced))
    }

    /// Keeps a copy of what is in the header's place. It does not replace the newest kept header,
    /// which may be the one that is restored.
    fn keep_replaced(&self, from: &Header, present: Option<&Header>) -> Result<PathBuf, Failure> {
        let (paths, bytes) = (self.paths(from), self.bytes());
        match present {
            Some(present) => headers::keep_replaced(&paths, present, &bytes),
            None => headers::keep_foreign(&paths, &bytes),
        }
    }

    /// The current header, if it belongs to this container by what this machine knows. Another
    /// container's header, LUKS1 or no header at all give `None`. If nothing is known, any readable
    /// header counts as this container's, and the restored one must be of the same container.
    fn current_header(&self) -> Result<Option<Header>, Failure> {
        match Header::load(&self.bytes()) {
            Ok(present) if self.start.settings.pins.fits(&present).is_ok() => Ok(Some(present)),
            Err(error) if error.kind() == LuksErrorKind::Read => Err(error.into()),
            // The kept header is for this case.
            Ok(_) | Err(_) => Ok(None),
        }
    }

    /// Without pins and without a header to compare with, the volume itself must fit the key.
    fn check_fits(&self, from: &Header, cipher: &SectorCipher) -> Result<(), Failure> {
        let (block, _) = read_stamp_block(&*self.file, from, cipher)?;
        if file_system_bytes(&block).is_some() {
            return Ok(());
        }
        Err(Failure::new(
            Exit::Damaged,
            "the key of the saved header does not fit this container's volume",
        )
        .with_hint(
            "nothing was changed. If the header belongs to this container nevertheless, give \
             --fingerprint from its recovery sheet",
        ))
    }
}
