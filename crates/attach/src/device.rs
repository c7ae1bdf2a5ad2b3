//! The block device that is served: the contract between the volume process and this crate.

use std::io;

/// The device's block: every offset and length at this edge is a multiple of it.
pub const BLOCK_BYTES: u64 = 4096;

/// [`BLOCK_BYTES`] in the width that system structures have.
pub(crate) const BLOCK_BYTES_U32: u32 = 4096;

/// A block device that the volume process offers to the kernel.
///
/// - Offsets and lengths are multiples of [`BLOCK_BYTES`] and lie inside `0..len()`; the caller
///   has checked both. Requests are at most 1 MiB.
/// - Every method may block and is called from many threads at once. Requests that overlap in
///   time and place are never both writes (the file system above sees to that).
/// - `flush` covers every write that had *returned* when it was called.
/// - Whatever the error, the kernel sees EIO: no other errno means the same to FUSE, loop and ext4.
pub trait BlockDevice: Send + Sync + 'static {
    /// The length in bytes: a positive multiple of [`BLOCK_BYTES`] that never changes.
    fn len(&self) -> u64;
    /// Whether the device has no bytes. Never true for one that is served.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Fills `buf` from `offset` on, whole or not at all.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Stores `data` at `offset`, whole or not at all.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Takes note that the file system needs nothing of a range any more, where the session
    /// collects that; changes no byte. False where it doesn't, or where the range may have been
    /// meant to be zeroed: the two can't be told apart.
    fn note_unneeded(&self, offset: u64, len: u64) -> bool {
        let _ = (offset, len);
        false
    }
    /// Orders (or makes durable, as the session chose) everything written before.
    fn flush(&self) -> io::Result<()>;
}
