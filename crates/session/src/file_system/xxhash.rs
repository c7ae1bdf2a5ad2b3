//! xxHash64, the checksum of the btrfs volumes that sprat makes.

const PRIME: [u64; 5] = [
    0x9E37_79B1_85EB_CA87,
    0xC2B2_AE3D_27D4_EB4F,
    0x1656_67B1_9E37_79F9,
    0x85EB_CA77_C2B2_AE63,
    0x27D4_EB2F_1656_67C5,
];

/// The hash of `bytes` with seed 0 (xxhash's doc/xxhash_spec.md, XXH64).
pub(super) fn xxhash64(bytes: &[u8]) -> u64 {
    let (stripes, rest) = bytes.as_chunks::<32>();
    let mut hash = match stripes.is_empty() {
        true => PRIME[4],
        false => converged(stripes),
    };
    hash = hash.wrapping_add(bytes.len() as u64);
    let (words, rest) = rest.as_chunks::<8>();
    for word in words {
        hash ^= round(0, u64::from_le_bytes(*word));
        hash = hash.rotate_left(27).wrapping_mul(PRIME[0]);
        hash = hash.wrapping_add(PRIME[3]);
    }
    let (halves, rest) = rest.as_chunks::<4>();
    for half in halves {
        hash ^= u64::from(u32::from_le_bytes(*half)).wrapping_mul(PRIME[0]);
        hash = hash.rotate_left(23).wrapping_mul(PRIME[1]);
        hash = hash.wrapping_add(PRIME[2]);
    }
    for byte in rest {
        hash ^= u64::from(*byte).wrapping_mul(PRIME[4]);
        hash = hash.rotate_left(11).wrapping_mul(PRIME[0]);
    }
    hash = (hash ^ (hash >> 33)).wrapping_mul(PRIME[1]);
    hash = (hash ^ (hash >> 29)).wrapping_mul(PRIME[2]);
    hash ^ (hash >> 32)
}

/// Takes in whole stripes, and joins the four sums.
fn converged(stripes: &[[u8; 32]]) -> u64 {
    let mut sums = [
        PRIME[0].wrapping_add(PRIME[1]),
        PRIME[1],
        0,
        0_u64.wrapping_sub(PRIME[0]),
    ];
    for stripe in stripes {
        let (words, _) = stripe.as_chunks::<8>();
        for (sum, word) in sums.iter_mut().zip(words) {
            *sum = round(*sum, u64::from_le_bytes(*word));
        }
    }
    let rotations = [1, 7, 12, 18];
    let mut hash = sums.iter().zip(rotations).fold(0_u64, |hash, (sum, by)| {
        hash.wrapping_add(sum.rotate_left(by))
    });
    for sum in sums {
        hash = (hash ^ round(0, sum))
            .wrapping_mul(PRIME[0])
            .wrapping_add(PRIME[3]);
    }
    hash
}

fn round(sum: u64, word: u64) -> u64 {
    sum.wrapping_add(word.wrapping_mul(PRIME[1]))
        .rotate_left(31)
        .wrapping_mul(PRIME[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_at_each_length_of_rest() {
        // Published with xxHash and its bindings.
        assert_eq!(xxhash64(b""), 0xEF46_DB37_51D8_E999);
        assert_eq!(xxhash64(b"a"), 0xD24E_C4F1_A98C_6E5B);
        assert_eq!(xxhash64(b"abc"), 0x44BC_2CF5_AD77_0999);
        assert_eq!(
            xxhash64(b"Nobody inspects the spammish repetition"),
            0xFBCE_A83C_8A37_8BF1
        );
    }
}
