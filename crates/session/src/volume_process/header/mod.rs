//! Writes the LUKS2 header: of a new container, for changed keys, and from a kept copy.

pub(crate) mod create;
pub(crate) mod edit;
pub(crate) mod restore;

use sprat_luks::Extent;
use sprat_store::{ReadClass, StoreError, StoreFile};

use crate::{Exit, Failure};

/// Reads a written part of the header back. Returns a failure if it differs.
fn differs(file: &dyn StoreFile, extent: &Extent) -> Result<Option<Failure>, StoreError> {
    let mut found = vec![0; extent.bytes.len()];
    file.read_at(extent.offset, &mut found, ReadClass::Demand)?;
    let offset = extent.offset;
    let what = format!("the header does not read back as it was written (offset {offset})");
    Ok((found != extent.bytes).then(|| Failure::new(Exit::Damaged, what)))
}
