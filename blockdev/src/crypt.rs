//! AES-256-XTS (IEEE 1619) over sectors of 512 bytes. The tweak is the number of the *guest's* sector, so that a cluster may
//! be moved within a file, and between files of one key, as it is.
//!
//! XTS hides what is written, and nothing more: who sees the file twice sees which 16 bytes changed, who writes to it
//! can bring back old ones or spoil them unnoticed, and what is empty is seen to be empty.
//!
//! The cipher is RustCrypto's `aes`, which takes the processor's instructions where it finds them. The mode around it is here,
//! because `xts-mode` works block by block, and at 0.3 against 5.6 GB/s in one thread would be what a guest waits for; the tests
//! hold one against the other.

use std::fmt;

use aes::Aes256;
use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use zeroize::Zeroizing;

use crate::SECTOR;

/// Bytes of a key: the first half for the data, the second for the tweaks.
pub const KEY_LEN: usize = 64;
/// Bytes of a block.
const BLOCK: usize = 16;
/// Blocks of a sector.
const BLOCKS: usize = SECTOR as usize / BLOCK;
/// Sectors that are worked on at once: enough to keep the widest instructions busy.
const GROUP: usize = 8;
/// What a key makes of this, where no sector can be, tells it from others.
const KNOWN: &[u8; BLOCK] = b"hutch layer key\n";

/// The key of a layer. It is gone from memory when it is dropped, and never shown.
#[derive(Clone)]
pub struct Key(Zeroizing<[[u8; KEY_LEN / 2]; 2]>);

impl Key {
    /// A key of these bytes; `None` when there are not [`KEY_LEN`], or both halves are the same, which XTS must not be given.
    pub fn new(bytes: &[u8]) -> Option<Key> {
        match bytes.as_chunks() {
            (&[data, tweak], []) if data != tweak => Some(Key(Zeroizing::new([data, tweak]))),
            _ => None,
        }
    }

    /// Its bytes, for who wraps it or hands it on.
    pub fn bytes(&self) -> &[u8] {
        self.0.as_flattened()
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(…)")
    }
}

/// A key, ready for use.
pub(crate) struct Cipher {
    data: Aes256,
    tweak: Aes256,
}

impl Cipher {
    pub(crate) fn new(key: &Key) -> Cipher {
        let [data, tweak] = &*key.0;
        Cipher { data: Aes256::new(data.into()), tweak: Aes256::new(tweak.into()) }
    }

    /// Tells this key from another, and nothing about it.
    pub(crate) fn check(&self) -> [u8; BLOCK] {
        let mut block = *KNOWN;
        let mut tweak = Array([0xff; BLOCK]);
        self.tweak.encrypt_block(&mut tweak);
        xor(std::slice::from_mut(&mut block), &[u128::from_le_bytes(tweak.0)]);
        self.data.encrypt_block((&mut block).into());
        xor(std::slice::from_mut(&mut block), &[u128::from_le_bytes(tweak.0)]);
        block
    }

    /// Encrypts whole sectors, the first of which is the guest's sector `first`.
    pub(crate) fn encrypt(&self, first: u64, bytes: &mut [u8]) {
        self.each(first, bytes, |blocks| self.data.encrypt_blocks(blocks));
    }

    /// Decrypts whole sectors.
    pub(crate) fn decrypt(&self, first: u64, bytes: &mut [u8]) {
        self.each(first, bytes, |blocks| self.data.decrypt_blocks(blocks));
    }

    fn each(&self, first: u64, bytes: &mut [u8], work: impl Fn(&mut [aes::Block])) {
        debug_assert!(bytes.len().is_multiple_of(SECTOR as usize), "whole sectors");
        let mut sector = u128::from(first);
        for group in bytes.chunks_mut(GROUP * SECTOR as usize) {
            let mut starts = [[0; BLOCK]; GROUP];
            for start in &mut starts {
                *start = sector.to_le_bytes();
                sector += 1;
            }
            self.tweak.encrypt_blocks(Array::cast_slice_from_core_mut(&mut starts));
            let mut tweaks = [[0; BLOCKS]; GROUP];
            for (start, tweaks) in starts.iter().zip(&mut tweaks) {
                let mut tweak = u128::from_le_bytes(*start);
                for place in tweaks {
                    *place = tweak;
                    tweak = times_x(tweak);
                }
            }
            let blocks = group.as_chunks_mut().0;
            xor(blocks, tweaks.as_flattened());
            work(Array::cast_slice_from_core_mut(blocks));
            xor(blocks, tweaks.as_flattened());
        }
    }
}

/// A tweak for the next block (IEEE 1619, 5.2: multiplication by the primitive element of GF(2^128)).
fn times_x(tweak: u128) -> u128 {
    let carry = if tweak >> 127 == 1 { 0x87 } else { 0 };
    tweak << 1 ^ carry
}

fn xor(blocks: &mut [[u8; BLOCK]], tweaks: &[u128]) {
    for (block, tweak) in blocks.iter_mut().zip(tweaks) {
        *block = (u128::from_le_bytes(*block) ^ tweak).to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(seed: u8) -> Key {
        Key::new(&std::array::from_fn::<u8, KEY_LEN, _>(|i| seed.wrapping_mul(37).wrapping_add(i as u8)))
            .unwrap()
    }

    fn unhex(text: &str) -> Vec<u8> {
        let pairs: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        let digit = |d: u8| char::from(d).to_digit(16).unwrap() as u8;
        pairs.as_chunks::<2>().0.iter().map(|[high, low]| digit(*high) << 4 | digit(*low)).collect()
    }

    /// IEEE 1619-2007, annex B, vector 10: XTS-AES-256, data unit 0xff, 512 bytes.
    #[test]
    fn agrees_with_the_standard() {
        let halves = [
            "2718281828459045235360287471352662497757247093699959574966967627",
            "3141592653589793238462643383279502884197169399375105820974944592",
        ];
        let key = Key::new(&unhex(&halves.concat())).unwrap();
        let plain: Vec<u8> = (0..512).map(|i| i as u8).collect();
        let mut bytes = plain.clone();
        Cipher::new(&key).encrypt(0xff, &mut bytes);
        assert_eq!(bytes[..32], unhex("1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b"));
        assert_eq!(bytes[496..], unhex("c4f36ffda9fcea70b9c6e693e148c151")[..]);
        Cipher::new(&key).decrypt(0xff, &mut bytes);
        assert_eq!(bytes, plain);
    }

    #[test]
    fn agrees_with_xts_mode() {
        let key = key(1);
        let half = |half: &[u8]| Aes256::new(half.try_into().unwrap());
        let (data, tweak) = key.bytes().split_at(32);
        let other = xts_mode::Xts128::new(half(data), half(tweak));
        for (first, sectors) in
            [(0, 1), (7, 8), (1, 9), (u64::from(u32::MAX) - 3, 21), ((64 << 40) / 512 - 128, 128)]
        {
            let plain: Vec<u8> = (0..sectors * 512).map(|i| (i * 31 + i / 512 * 7) as u8).collect();
            let (mut ours, mut theirs) = (plain.clone(), plain.clone());
            Cipher::new(&key).encrypt(first, &mut ours);
            other.encrypt_area(&mut theirs, 512, first.into(), xts_mode::get_tweak_default);
            assert!(ours == theirs && ours != plain, "{sectors} sectors from {first}");
            Cipher::new(&key).decrypt(first, &mut ours);
            assert!(ours == plain, "{sectors} sectors from {first}, back");
        }
    }

    #[test]
    fn a_key_has_two_halves_and_shows_neither() {
        assert!(Key::new(&[1; 64]).is_none() && Key::new(&[]).is_none());
        let key2 = key(2);
        let bytes = key2.bytes();
        assert!(Key::new(&bytes[..63]).is_none() && Key::new(&[bytes, &[0]].concat()).is_none());
        assert_eq!(format!("{:?}", key(2)), "Key(…)");
        assert_eq!(Cipher::new(&key(2)).check(), Cipher::new(&key(2)).check());
        assert_ne!(Cipher::new(&key(2)).check(), Cipher::new(&key(3)).check());
    }
}
