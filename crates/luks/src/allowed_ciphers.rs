//! Which ciphers are accepted: in user mode, and by the kernel's dm-crypt.

use crate::{LuksError, text::shown};

/// The one cipher of user mode.
pub(crate) const CIPHER: &str = "aes-xts-plain64";
/// Block ciphers that dm-crypt has and that are sound; the rest of the kernel's list is not for
/// a server to choose from.
const KERNEL_CIPHERS: [&str; 8] = [
    "aes",
    "serpent",
    "twofish",
    "camellia",
    "aria",
    "sm4",
    "xchacha12,aes",
    "xchacha20,aes",
];
/// Modes with an IV of each sector's own (linux/drivers/md/dm-crypt.c).
const KERNEL_MODES: [&str; 7] = [
    "xts-plain64",
    "xts-plain",
    "cbc-plain64",
    "cbc-plain",
    "cbc-essiv:sha256",
    "cbc-essiv:sha512",
    "adiantum-plain64",
];

/// Who decrypts the sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenedBy {
    /// sprat itself: aes-xts-plain64 only.
    Sprat,
    /// The kernel's dm-crypt: any sound cipher that it has.
    Kernel,
}

/// Judges a cipher in dm-crypt's words; what the kernel alone opens is said so.
pub(crate) fn check_cipher(encryption: &str, opened_by: OpenedBy) -> Result<(), LuksError> {
    let name = encryption.to_ascii_lowercase();
    let kernel_opens = encryption.split_once('-').is_some_and(|(cipher, mode)| {
        KERNEL_CIPHERS.contains(&cipher) && KERNEL_MODES.contains(&mode)
    });
    if encryption == CIPHER || (kernel_opens && opened_by == OpenedBy::Kernel) {
        Ok(())
    } else if kernel_opens {
        Err(LuksError::KernelOnly {
            what: format!("the cipher {}", shown(encryption)),
        })
    } else if name.is_empty() || name.contains("null") || name.contains("ecb") {
        Err(LuksError::refused(format!(
            "the cipher {}, which protects nothing",
            shown(encryption)
        )))
    } else {
        Err(LuksError::unsupported(format!(
            "the cipher {}",
            shown(encryption)
        )))
    }
}
