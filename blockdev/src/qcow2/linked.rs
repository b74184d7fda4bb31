//! Which clusters of a file something links to.

use std::collections::BTreeMap;

use super::check::Checked;
use super::layout::CLUSTER;

/// Words that are kept together: memory is taken for what is linked, not for what a file's size claims.
const WORDS: usize = 64;

/// A bit for each cluster that something links to.
#[derive(Clone)]
pub(super) struct Linked {
    bits: BTreeMap<u64, [u64; WORDS]>,
    /// How many clusters there can be.
    clusters: u64,
    /// The file's size.
    size: u64,
}

/// What a link is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Link {
    Good,
    /// Where nothing can be.
    Outside,
    /// Something else's, too.
    Taken,
}

impl Linked {
    pub(super) fn new(clusters: u64, size: u64) -> Linked {
        Linked { bits: BTreeMap::new(), clusters, size }
    }

    /// Notes a link; says what is wrong with it.
    pub(super) fn add(&mut self, offset: u64, what: &str, found: &mut Checked) -> Link {
        let number = offset / CLUSTER;
        if !offset.is_multiple_of(CLUSTER) || number >= self.clusters {
            let why = match offset.is_multiple_of(CLUSTER) && offset < self.size {
                true => "is cut off: the file ends within it",
                false => "is outside of the file",
            };
            found.fault(format!("{what} at {offset:#x} {why}"));
            return Link::Outside;
        }
        let (word, bit) = (number / 64, 1_u64 << (number % 64));
        let words = self.bits.entry(word / WORDS as u64).or_insert([0; WORDS]);
        match words.get_mut(word as usize % WORDS) {
            Some(word) if *word & bit == 0 => {
                *word |= bit;
                Link::Good
            }
            _ => {
                found.fault(format!("{what} at {offset:#x} is another's, too"));
                Link::Taken
            }
        }
    }

    /// 64 clusters, the first in the lowest bit.
    pub(super) fn word(&self, word: u64) -> u64 {
        let words = self.bits.get(&(word / WORDS as u64));
        words.and_then(|words| words.get(word as usize % WORDS)).copied().unwrap_or(0)
    }

    pub(super) fn has(&self, number: u64) -> bool {
        self.word(number / 64) >> (number % 64) & 1 == 1
    }

    /// The number behind the last.
    pub(super) fn end(&self) -> u64 {
        self.bits.last_key_value().map_or(0, |(first, words)| {
            let word = words.iter().rposition(|word| *word != 0).unwrap_or(0);
            let top = 64 - u64::from(words.get(word).map_or(64, |word| word.leading_zeros()));
            (first * WORDS as u64 + word as u64) * 64 + top
        })
    }
}
