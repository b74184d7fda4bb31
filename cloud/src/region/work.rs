//! A unit of work on a region's store: what it reads has to hold still until it is committed.

use std::collections::BTreeMap;

use crate::fault::{Fault, Result};
use crate::model::Record;
use crate::store::{Entry, Outcome, Store, Transaction};

/// How often a unit of work is tried when others change what it read.
const TRIES: usize = 50;
/// Entries read at a time.
const PAGE: usize = 1000;

/// What is read and to be written, together.
pub struct Work<'a> {
    store: &'a dyn Store,
    /// What was read: `None`: it was not there.
    read: BTreeMap<String, Option<Entry>>,
    writes: BTreeMap<String, Option<Vec<u8>>>,
}

/// The key of a record.
pub fn key<T: Record>(id: &str) -> String {
    format!("{}/{id}", T::KIND)
}

fn decode<T: Record>(key: &str, value: &[u8]) -> Result<T> {
    serde_json::from_slice(value)
        .map_err(|e| Fault::internal(format!("the record {key} cannot be read: {e}")))
}

impl<'a> Work<'a> {
    /// Does `job` and commits what it wrote; again, when what it read has changed meanwhile.
    ///
    /// # Errors
    /// The job's, and nothing is changed; the store's.
    pub fn on<R>(store: &'a dyn Store, mut job: impl FnMut(&mut Work<'a>) -> Result<R>) -> Result<R> {
        for _ in 0..TRIES {
            let mut work = Work { store, read: BTreeMap::new(), writes: BTreeMap::new() };
            let result = job(&mut work)?;
            if work.writes.is_empty() {
                return Ok(result);
            }
            let mut transaction = Transaction::new();
            for (key, entry) in &work.read {
                transaction = match entry {
                    Some(entry) => transaction.unchanged(entry),
                    None => transaction.absent(key),
                };
            }
            for (key, value) in work.writes {
                transaction = match value {
                    Some(value) => transaction.put(key, value),
                    None => transaction.delete(key),
                };
            }
            if let Outcome::Committed(_) = store.commit(&transaction)? {
                return Ok(result);
            }
        }
        Err(Fault::new("Unavailable", "Others change the same resources all the time; try again"))
    }

    /// The record of this id.
    ///
    /// # Errors
    /// The store's.
    pub fn get<T: Record>(&mut self, id: &str) -> Result<Option<T>> {
        let key = key::<T>(id);
        if let Some(value) = self.writes.get(&key) {
            return value.as_deref().map(|value| decode(&key, value)).transpose();
        }
        if !self.read.contains_key(&key) {
            let entry = self.store.get(&key)?;
            self.read.insert(key.clone(), entry);
        }
        let entry = self.read.get(&key).and_then(Option::as_ref);
        entry.map(|entry| decode(&key, &entry.value)).transpose()
    }

    /// Writes a record, new or changed.
    ///
    /// # Errors
    /// It cannot be written down.
    pub fn put<T: Record>(&mut self, record: &T) -> Result<()> {
        let value = serde_json::to_vec(record).map_err(Fault::internal)?;
        self.writes.insert(key::<T>(record.id()), Some(value));
        Ok(())
    }

    /// Removes a record.
    pub fn delete<T: Record>(&mut self, id: &str) {
        self.writes.insert(key::<T>(id), None);
    }

    /// All records of a kind whose ids begin with `prefix`, as they are in the store. They need not hold still.
    ///
    /// # Errors
    /// The store's.
    pub fn all<T: Record>(&self, prefix: &str) -> Result<Vec<T>> {
        all(self.store, prefix)
    }
}

/// All records of a kind whose ids begin with `prefix`.
///
/// # Errors
/// The store's.
pub fn all<T: Record>(store: &dyn Store, prefix: &str) -> Result<Vec<T>> {
    let mut found = Vec::new();
    let prefix = key::<T>(prefix);
    let mut after = None;
    loop {
        let page = store.range(&prefix, after.as_deref(), PAGE)?;
        for entry in &page {
            found.push(decode(&entry.key, &entry.value)?);
        }
        match page.last() {
            Some(last) if page.len() == PAGE => after = Some(last.key.clone()),
            _ => return Ok(found),
        }
    }
}

/// Up to `limit` records of a kind behind the one of the id `after`, in the order of their ids.
///
/// # Errors
/// The store's.
pub fn page<T: Record>(store: &dyn Store, after: &str, limit: usize) -> Result<Vec<T>> {
    let page = store.range(&key::<T>(""), Some(&key::<T>(after)), limit)?;
    page.iter().map(|entry| decode(&entry.key, &entry.value)).collect()
}

/// The record of this id.
///
/// # Errors
/// The store's.
pub fn get<T: Record>(store: &dyn Store, id: &str) -> Result<Option<T>> {
    let key = key::<T>(id);
    let entry = store.get(&key)?;
    entry.map(|entry| decode(&key, &entry.value)).transpose()
}
