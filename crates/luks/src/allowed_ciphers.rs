//! The ciphers that are accepted in user mode and for the kernel's dm-crypt.

use crate::{LuksError, text::shown};

/// The one cipher of user mode.
pub(crate) const CIPHER: &str = "aes-xts-plain64";
/// Secure block ciphers of dm-crypt. A server must not be able to select any other cipher of the kernel.
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
/// Modes in which each sector has its own IV (linux/drivers/md/dm-crypt.c).
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
    /// The kernel's dm-crypt: any secure cipher that it has.
    Kernel,
}

/// Checks a cipher, written as in dm-crypt. The error says if only the kernel can open it.
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
