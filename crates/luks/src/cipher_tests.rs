//! Known answers of the sector cipher, and its properties.
//!
//! The vectors were made once with Python's `cryptography` 48.0.0 (which has its own binding and build
//! of the cipher) as `Cipher(algorithms.AES(key), modes.XTS((sector * (bytes // 512)).to_bytes(8,
//! "little") + bytes(8)))`, from the key and the plaintext of [`key`] and [`plain`].

use openssl::sha::sha256;
use proptest::prelude::*;

use super::SectorCipher;
use crate::{secret::VolumeKey, text::hex};

/// Bits of the key, bytes of a sector, number of the sector (in sectors), SHA-256 of its ciphertext.
const KNOWN: &[(usize, usize, u64, &str)] = &[
    (
        256,
        512,
        0,
        "672626616753ce6593188017f28ecd0e2f69d3f62e98242e3209bc6b90883352",
    ),
    (
        256,
        512,
        1,
        "791cc92136d8377d929746ac7194aa508fb29c4a88d5103866a6d861301548ce",
    ),
    (
        256,
        512,
        4294967295,
        "d08ceb2f2328f6b50ab93c4a73ec851fb27a456fed6bfc839b5ff1d98ed7ff98",
    ),
    (
        256,
        512,
        4294967296,
        "6b7c72ea8bddec42573c03c024188af6a52c62b258454612257d56ddd9045460",
    ),
    (
        256,
        512,
        4294967297,
        "c0c9991bfc10423df5cb77390e93cd1d2c1258d5baab8c9f1b0639f68662be24",
    ),
    (
        256,
        1024,
        0,
        "6b50fb17c47ba6130661551e8bce3ef6576d282596945800a7dcccc2637da1bc",
    ),
    (
        256,
        1024,
        1,
        "00964edc22e296a319df74255137ee6a8ad804b89e82156169c87e47b711f8a9",
    ),
    (
        256,
        1024,
        4294967295,
        "05dc4c44e158a642e7e76d96fd7ce6fd7da35f276c737b52c0c04e8376107445",
    ),
    (
        256,
        1024,
        4294967296,
        "1f0d6f7731a5b0ec030bf1c7d69b50efd896c3116b5b33cbaac1f81abf51329b",
    ),
    (
        256,
        1024,
        4294967297,
        "34570508d7c34a35357032ef89bb06abb4c167a7066d692223ec44078ada51f5",
    ),
    (
        256,
        2048,
        0,
        "60e80ede40a2bbb5b3a06f4cecea16b2752b5afe3ddcab804ccced5f9372901b",
    ),
    (
        256,
        2048,
        1,
        "6f612c1b19586b16f70d486868c6f13e021785dff316c4c51a7eb3674a7d1d24",
    ),
    (
        256,
        2048,
        4294967295,
        "6fac829770c1c0c1cb4ce71839f8cf9fb3d0a1af82a0ee56cf00f04d14edd5d6",
    ),
    (
        256,
        2048,
        4294967296,
        "36af92f4074f65678433157ada7b5583da545c2c1c5395ac22d9ab9b6068a163",
    ),
    (
        256,
        2048,
        4294967297,
        "4c285f0296e7d72af589ba51dd589e4f97c1687ad664497ec1610cea9fa9cf42",
    ),
    (
        256,
        4096,
        0,
        "85ff5fd7f4c4ac183e834d5e51f9c4dbe028ed1d1bf2c9ddafdfe12078f8af15",
    ),
    (
        256,
        4096,
        1,
        "ddfac50c72d75c0925e7a9ea875916e8c9d605c0114f0815efc4e38c340faf3a",
    ),
    (
        256,
        4096,
        4294967295,
        "29694beb91c4c36f1de3c98331e0603ae75ec54e33e8d4c8867366b269fc48c9",
    ),
    (
        256,
        4096,
        4294967296,
        "3dc1907ed2ce5a468b6a511424b33fcf0ff72c77045a7ff573518b1be458d530",
    ),
    (
        256,
        4096,
        4294967297,
        "72ac6ca1d8c70fc6aaef445e4090512844977238e48924ce9628f0ee5cf8ed42",
    ),
    (
        512,
        512,
        0,
        "abb4f10049b791641a0492daa0832db08284987fdc0ad75443c4d17f843ca639",
    ),
    (
        512,
        512,
        1,
        "3c44accbe03f37946d9bf54ba5d24c390604c7c682efc1d85c1fe2fafba2124b",
    ),
    (
        512,
        512,
        4294967295,
        "c67bd72e98c800c43228d986501dac91677e15335bbc3c6813d7cf2ef94fbea1",
    ),
    (
        512,
        512,
        4294967296,
        "633b7725b792d0aecb5e0d76ce0ade2b630b1decb71b29eb40176320f259cffc",
    ),
    (
        512,
        512,
        4294967297,
        "d8f3c5c52b650fc4f8d7eb437942e66f615f093da00f7aa8dae1c41c6a9cd831",
    ),
    (
        512,
        1024,
        0,
        "b1991bae2f202f8299a8b84c83fed3ef7b997c23c0a54f2876dbb784648d1069",
    ),
    (
        512,
        1024,
        1,
        "aa3842f400caf6001a3c94c692cc196916dae5464e8ab3c91866bd01ba2a8af6",
    ),
    (
        512,
        1024,
        4294967295,
        "e082caa620830be558216b28aa745e8fcd46de65df7d37164208cfd7bfac8ccf",
    ),
    (
        512,
        1024,
        4294967296,
        "566ddfe9791cc6906507d6a61796ee84ca346616459b4b5fdac69760083207ac",
    ),
    (
        512,
        1024,
        4294967297,
        "a6805ab40ecd5dae4c877bc494667745f59018b26b2c05f4c30152df723d5c32",
    ),
    (
        512,
        2048,
        0,
        "02e0bcc86e4076f649d1f6d5daee9b009e7d19cfde159dec4184b3352270631a",
    ),
    (
        512,
        2048,
        1,
        "2b8067d351827d1c8bf0eec88456c9b26d60c4eb06b768adc5489d8945a964c8",
    ),
    (
        512,
        2048,
        4294967295,
        "771846a6e3a689419ad231bc94f3586718f8fdb20fe9ec704d2d5dc387b2700c",
    ),
    (
        512,
        2048,
        4294967296,
        "e056d6673e5ad9353b54abfa6c486b95a79eba14c10d747a34bca39ef7b6fa94",
    ),
    (
        512,
        2048,
        4294967297,
        "be46d183060813c52b2bc99a6db8f1f8aa81a4c9695792af8d32bae6f8b99eae",
    ),
    (
        512,
        4096,
        0,
        "ab4d6423dee7ed7272d8d245fb14ed43a6d02ad1a97c60076af433f8dc17fdf7",
    ),
    (
        512,
        4096,
        1,
        "6ab4ae38a80a8bdcfdffd54048d6bb127471467d5e802dc583b94c973038aa6c",
    ),
    (
        512,
        4096,
        4294967295,
        "05bc56dfcc9b38e4ac78640e3a1af00d82ae5761dbca4d5f8ae5bd4bf5ed6e9d",
    ),
    (
        512,
        4096,
        4294967296,
        "4142eb6ddc00888eabfa158e0ba30480d36a009748dbef27e943a9e4f41ef1cf",
    ),
    (
        512,
        4096,
        4294967297,
        "236fb3412b651bcb8425e087d48d9335ff4a2243c833f5c9ec4928121464724c",
    ),
];

fn key(bits: usize) -> VolumeKey {
    let bytes: Vec<u8> = (0..64_usize).map(|i| ((i * 11 + 5) % 256) as u8).collect();
    VolumeKey::copy_of(if bits == 512 { &bytes } else { &bytes[16..48] })
}

fn plain(bytes: usize, sector: u64) -> Vec<u8> {
    (0..bytes as u64)
        .map(|i| ((i * 7 + i / 256 + sector) % 256) as u8)
        .collect()
}

#[test]
fn known_answers_hold_in_both_directions() {
    for &(bits, bytes, sector, known) in KNOWN {
        let cipher = SectorCipher::with_geometry(&key(bits), bytes, 0).unwrap();
        let offset = sector * bytes as u64;
        let mut data = plain(bytes, sector);
        cipher.encrypt(offset, &mut data).unwrap();
        assert_eq!(hex(&sha256(&data)), known, "{bits} bits, {bytes}, {sector}");
        cipher.decrypt(offset, &mut data).unwrap();
        assert_eq!(data, plain(bytes, sector));
    }
}

#[test]
fn the_iv_tweak_counts_in_units_of_512_bytes_and_wraps() {
    let shifted = SectorCipher::with_geometry(&key(512), 4096, u64::MAX - 7).unwrap();
    let plainly = SectorCipher::with_geometry(&key(512), 4096, 0).unwrap();
    let (mut data, mut same) = (plain(4096, 0), plain(4096, 0));
    shifted.encrypt(4096, &mut data).unwrap();
    plainly.encrypt(0, &mut same).unwrap();
    assert_eq!(data, same);
}

#[test]
fn many_threads_share_one_cipher() {
    let cipher = SectorCipher::with_geometry(&key(512), 512, 0).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8_u64 {
            let cipher = &cipher;
            scope.spawn(move || {
                for round in 0..50 {
                    let sector = thread * 1000 + round;
                    let mut data = plain(4096, sector);
                    cipher.encrypt(sector * 512, &mut data).unwrap();
                    cipher.decrypt(sector * 512, &mut data).unwrap();
                    assert_eq!(data, plain(4096, sector));
                }
            });
        }
    });
}

#[test]
#[should_panic(expected = "not made of whole sectors")]
fn a_torn_sector_is_a_bug_of_the_caller() {
    let cipher = SectorCipher::with_geometry(&key(512), 4096, 0).unwrap();
    let _ = cipher.encrypt(512, &mut [0; 4096]);
}

#[test]
fn debug_shows_no_key() {
    let cipher = SectorCipher::with_geometry(&key(512), 4096, 0).unwrap();
    assert_eq!(
        format!("{cipher:?}"),
        "SectorCipher(4096 bytes a sector, ..)"
    );
    assert_eq!(format!("{:?}", key(512)), "VolumeKey(512 bits, ..)");
}

proptest! {
    #[test]
    fn decrypting_undoes_encrypting_and_pieces_equal_the_whole(
        size in 0_usize..4,
        sectors in 1_usize..9,
        first in 0_u64..(1 << 43),
        cut in 0_usize..9,
        seed in any::<u64>(),
    ) {
        let bytes = 512 << size;
        let cipher = SectorCipher::with_geometry(&key(512), bytes, 0).unwrap();
        let offset = first * bytes as u64;
        let data = plain(bytes * sectors, seed >> 1);
        let mut whole = data.clone();
        cipher.encrypt(offset, &mut whole).unwrap();
        let mut pieces = data.clone();
        let at = cut.min(sectors) * bytes;
        let (left, right) = pieces.split_at_mut(at);
        cipher.encrypt(offset, left).unwrap();
        cipher.encrypt(offset + at as u64, right).unwrap();
        prop_assert_eq!(&whole, &pieces);
        prop_assert_ne!(&whole, &data);
        cipher.decrypt(offset, &mut whole).unwrap();
        prop_assert_eq!(whole, data);
    }
}
