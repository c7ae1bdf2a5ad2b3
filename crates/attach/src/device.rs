//! The block device that is served: the contract between the volume process and this crate.

use std::io;

/// The block size of the device: every offset and length is a multiple of it.
pub const BLOCK_BYTES: u64 = 4096;

/// [`BLOCK_BYTES`] in the width of the kernel's structures.
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
    /// The length in bytes, a positive multiple of [`BLOCK_BYTES`]. It never changes.
    fn len(&self) -> u64;
    /// Whether the device has no bytes. Always false for a device that is served.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Reads `buf.len()` bytes at `offset`, all or none.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Writes `data` at `offset`, all or nothing.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Records that the file system doesn't use a range, if the session collects such ranges. Changes no
    /// byte. Returns false if it doesn't record it, or if the request may have meant to zero the range:
    /// the two can't be distinguished.
    fn note_unneeded(&self, offset: u64, len: u64) -> bool {
        let _ = (offset, len);
        false
    }
    /// Orders all earlier writes before all later ones, or makes them durable, as the session chose.
    fn flush(&self) -> io::Result<()>;
}
