//! The store of one machine: SQLite, write-ahead log, every commit synced.

use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, OptionalExtension, Row, TransactionBehavior, params};

use super::{
    Change, Entry, LeaseId, MAX_KEY, MAX_VALUE, Outcome, Result, Revision, Store, StoreError, Transaction,
    Write,
};

/// "htch": whose database this is (SQLite's application_id).
const APPLICATION: i64 = 0x6874_6368;
/// What makes version n of version n - 1. Never changed, only added to.
const MIGRATIONS: [&str; 1] = ["
    CREATE TABLE entries (key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL, lease INTEGER) WITHOUT ROWID;
    CREATE INDEX entries_by_lease ON entries (lease) WHERE lease IS NOT NULL;
    CREATE TABLE changes (revision INTEGER NOT NULL, number INTEGER NOT NULL, key TEXT NOT NULL, value BLOB,
        PRIMARY KEY (revision, number)) WITHOUT ROWID;
    CREATE TABLE leases (id INTEGER PRIMARY KEY AUTOINCREMENT, ttl INTEGER NOT NULL, ends INTEGER NOT NULL);
    CREATE TABLE state (revision INTEGER NOT NULL, oldest INTEGER NOT NULL);
    INSERT INTO state VALUES (0, 1);
"];
/// The version of the stores that are written here.
pub const VERSION: i64 = MIGRATIONS.len() as i64;
/// Transactions whose changes are kept, and how many more may gather before the older ones go.
const KEPT: u64 = 10_000;
const SLACK: u64 = 1_000;

/// A store in one file, or in memory.
pub struct Sqlite {
    path: String,
    connection: Mutex<Connection>,
    committed: Condvar,
}

impl Sqlite {
    /// Opens the store in the file `path`, made when it is not there, and brings it to this version.
    ///
    /// # Errors
    /// [`StoreError::Newer`], [`StoreError::Foreign`], [`StoreError::Database`].
    pub fn open(path: &Path) -> Result<Sqlite> {
        Sqlite::on(path.display().to_string(), Connection::open(path))
    }

    /// A store that is gone with the process.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub fn memory() -> Result<Sqlite> {
        Sqlite::on("in memory".into(), Connection::open_in_memory())
    }

    fn on(path: String, connection: rusqlite::Result<Connection>) -> Result<Sqlite> {
        let failed =
            |source: rusqlite::Error| StoreError::Database { path: path.clone(), source: source.into() };
        let mut connection = connection.map_err(failed)?;
        let number = |connection: &Connection, pragma: &str| {
            connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0))
        };
        let prepare = |connection: &Connection| -> rusqlite::Result<(i64, i64, i64)> {
            connection.busy_timeout(Duration::from_secs(5))?;
            connection.pragma_update(None, "foreign_keys", true)?;
            Ok((
                number(connection, "application_id")?,
                number(connection, "user_version")?,
                number(connection, "schema_version")?,
            ))
        };
        let (application, version, schema) = prepare(&connection).map_err(failed)?;
        // A new file has neither an owner nor a schema.
        if application != APPLICATION && (application, schema) != (0, 0) {
            return Err(StoreError::Foreign(path));
        }
        if version > VERSION {
            return Err(StoreError::Newer { path, found: version, known: VERSION });
        }
        let migrate = |connection: &mut Connection| -> rusqlite::Result<()> {
            // What is committed is on the disk.
            connection.pragma_update(None, "journal_mode", "wal")?;
            connection.pragma_update(None, "synchronous", "full")?;
            for (index, statements) in
                MIGRATIONS.iter().enumerate().skip(usize::try_from(version).unwrap_or(0))
            {
                let step = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
                step.execute_batch(statements)?;
                step.pragma_update(None, "application_id", APPLICATION)?;
                step.pragma_update(None, "user_version", index as i64 + 1)?;
                step.commit()?;
            }
            Ok(())
        };
        migrate(&mut connection).map_err(failed)?;
        Ok(Sqlite { path, connection: Mutex::new(connection), committed: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, source: rusqlite::Error) -> StoreError {
        StoreError::Database { path: self.path.clone(), source: source.into() }
    }

    /// Reads.
    fn run<T>(&self, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T> {
        self.expire()?;
        work(&self.lock()).map_err(|e| self.failed(e))
    }

    /// Writes: all of `work`, or, when it returns `None` or fails, nothing.
    fn write<T>(
        &self,
        work: impl FnOnce(&rusqlite::Transaction<'_>) -> rusqlite::Result<Option<T>>,
    ) -> Result<Option<T>> {
        let mut connection = self.lock();
        let done = (|| {
            let step = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let done = work(&step)?;
            if done.is_some() {
                step.commit()?;
            }
            Ok(done)
        })();
        drop(connection);
        self.committed.notify_all();
        done.map_err(|e| self.failed(e))
    }

    /// Ends the leases whose time is over, one transaction each.
    fn expire(&self) -> Result<()> {
        loop {
            let over = "SELECT id FROM leases WHERE ends <= ?1 LIMIT 1";
            let over = self.lock().query_row(over, [now()], |row| row.get::<_, LeaseId>(0)).optional();
            let Some(id) = over.map_err(|e| self.failed(e))? else { return Ok(()) };
            // It may have been renewed just now.
            self.write(|step| {
                let still = "SELECT 1 FROM leases WHERE id = ?1 AND ends <= ?2";
                let still = step.query_row(still, params![id, now()], |_| Ok(())).optional()?;
                still.map(|()| end(step, id)).transpose()
            })?;
        }
    }
}

/// Removes a lease and what is under it.
fn end(step: &rusqlite::Transaction<'_>, id: LeaseId) -> rusqlite::Result<()> {
    let mut keys = step.prepare_cached("SELECT key FROM entries WHERE lease = ?1")?;
    let keys = keys.query_map([id], |row| row.get(0))?.collect::<rusqlite::Result<Vec<String>>>()?;
    if !keys.is_empty() {
        let writes: Vec<_> = keys.into_iter().map(|key| Write::Delete { key }).collect();
        apply(step, &writes)?;
    }
    step.execute("DELETE FROM leases WHERE id = ?1", [id])?;
    Ok(())
}

/// Does the writes as the next transaction.
fn apply(step: &rusqlite::Transaction<'_>, writes: &[Write]) -> rusqlite::Result<Revision> {
    let (revision, oldest): (Revision, Revision) =
        step.query_row("SELECT revision, oldest FROM state", [], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let revision = revision + 1;
    let mut put = step.prepare_cached("INSERT OR REPLACE INTO entries VALUES (?1, ?2, ?3, ?4)")?;
    let mut delete = step.prepare_cached("DELETE FROM entries WHERE key = ?1")?;
    let mut tell = step.prepare_cached("INSERT INTO changes VALUES (?1, ?2, ?3, ?4)")?;
    // Of several writes to a key the last counts, and only that one is told.
    let last = |index: usize, key: &str| !writes.iter().skip(index + 1).any(|write| key_of(write) == key);
    for (number, write) in writes.iter().enumerate().filter(|(index, write)| last(*index, key_of(write))) {
        match write {
            Write::Put { key, value, lease } => {
                put.execute(params![key, value, revision, lease])?;
                tell.execute(params![revision, number, key, value])?;
            }
            Write::Delete { key } => {
                if delete.execute([key])? > 0 {
                    tell.execute(params![revision, number, key, None::<Vec<u8>>])?;
                }
            }
        }
    }
    let mut oldest = oldest;
    if revision >= oldest + KEPT + SLACK {
        oldest = revision - KEPT;
        step.execute("DELETE FROM changes WHERE revision < ?1", [oldest])?;
    }
    step.execute("UPDATE state SET revision = ?1, oldest = ?2", params![revision, oldest])?;
    Ok(revision)
}

fn key_of(write: &Write) -> &str {
    match write {
        Write::Put { key, .. } | Write::Delete { key } => key,
    }
}

/// Milliseconds since 1970.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// The first text behind all those that begin with `prefix`; `None` where there is none.
fn behind(prefix: &str) -> Option<String> {
    let mut chars: Vec<char> = prefix.chars().collect();
    while let Some(last) = chars.pop() {
        // UTF-8 is ordered as its characters are; there are none between the surrogates.
        let next = if last == '\u{d7ff}' { Some('\u{e000}') } else { char::from_u32(last as u32 + 1) };
        if let Some(next) = next {
            chars.push(next);
            return Some(chars.into_iter().collect());
        }
    }
    None
}

fn entry(row: &Row<'_>) -> rusqlite::Result<Entry> {
    Ok(Entry { key: row.get(0)?, value: row.get(1)?, revision: row.get(2)? })
}

impl Store for Sqlite {
    fn backup(&self, to: &Path) -> Result<()> {
        self.run(|connection| {
            connection.execute("VACUUM INTO ?1", params![to.display().to_string()]).map(|_| ())
        })
    }

    fn get(&self, key: &str) -> Result<Option<Entry>> {
        let query = "SELECT key, value, revision FROM entries WHERE key = ?1";
        self.run(|connection| connection.prepare_cached(query)?.query_row([key], entry).optional())
    }

    fn range(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<Entry>> {
        let query = "SELECT key, value, revision FROM entries
            WHERE key >= ?1 AND (?2 IS NULL OR key < ?2) AND (?3 IS NULL OR key > ?3) ORDER BY key LIMIT ?4";
        self.run(|connection| {
            let mut query = connection.prepare_cached(query)?;
            let rows = query.query_map(params![prefix, behind(prefix), after, limit as i64], entry)?;
            rows.collect()
        })
    }

    fn commit(&self, transaction: &Transaction) -> Result<Outcome> {
        for write in &transaction.writes {
            let key = key_of(write);
            let value = if let Write::Put { value, .. } = write { value.len() } else { 0 };
            if key.is_empty() || key.len() > MAX_KEY || value > MAX_VALUE {
                return Err(StoreError::TooLarge { key: key.chars().take(80).collect() });
            }
        }
        self.expire()?;
        let mut conflict = None;
        let mut no_lease = None;
        let committed = self.write(|step| {
            let mut revision = step.prepare_cached("SELECT revision FROM entries WHERE key = ?1")?;
            for (key, wanted) in &transaction.checks {
                if revision.query_row([key], |row| row.get(0)).optional()? != *wanted {
                    conflict = Some(key.clone());
                    return Ok(None);
                }
            }
            let mut lease = step.prepare_cached("SELECT 1 FROM leases WHERE id = ?1")?;
            for write in &transaction.writes {
                if let Write::Put { lease: Some(id), .. } = write
                    && !lease.exists([id])?
                {
                    no_lease = Some(*id);
                    return Ok(None);
                }
            }
            apply(step, &transaction.writes).map(Some)
        })?;
        match (committed, conflict, no_lease) {
            (Some(revision), _, _) => Ok(Outcome::Committed(revision)),
            (None, Some(key), _) => Ok(Outcome::Conflict(key)),
            (None, None, id) => Err(StoreError::NoSuchLease(id.unwrap_or_default())),
        }
    }

    fn revision(&self) -> Result<Revision> {
        self.run(|connection| connection.query_row("SELECT revision FROM state", [], |row| row.get(0)))
    }

    fn changes(&self, prefix: &str, after: Revision, limit: usize) -> Result<Vec<Change>> {
        let oldest = "SELECT oldest FROM state";
        let query = "SELECT revision, key, value FROM changes
            WHERE revision > ?1 AND key >= ?2 AND (?3 IS NULL OR key < ?3) ORDER BY revision, number";
        let (oldest, changes) = self.run(|connection| {
            let oldest: Revision = connection.query_row(oldest, [], |row| row.get(0))?;
            let mut query = connection.prepare_cached(query)?;
            let mut rows = query.query(params![after, prefix, behind(prefix)])?;
            let mut changes: Vec<Change> = Vec::new();
            while let Some(row) = rows.next()? {
                let revision = row.get(0)?;
                if changes.len() >= limit && changes.last().is_none_or(|last| last.revision != revision) {
                    break;
                }
                changes.push(Change { revision, key: row.get(1)?, value: row.get(2)? });
            }
            Ok((oldest, changes))
        })?;
        if after + 1 < oldest {
            return Err(StoreError::Compacted { oldest });
        }
        Ok(changes)
    }

    fn wait(&self, after: Revision, limit: Duration) -> Result<Revision> {
        let deadline = Instant::now() + limit;
        loop {
            let revision = self.revision()?;
            let left = deadline.saturating_duration_since(Instant::now());
            if revision > after || left.is_zero() {
                return Ok(revision);
            }
            let connection = self.lock();
            // Somebody may have committed in between; leases end without anybody.
            let again: rusqlite::Result<Revision> =
                connection.query_row("SELECT revision FROM state", [], |row| row.get(0));
            if again.map_err(|e| self.failed(e))? <= after {
                let left = left.min(Duration::from_millis(500));
                drop(self.committed.wait_timeout(connection, left).unwrap_or_else(PoisonError::into_inner));
            }
        }
    }

    fn grant(&self, ttl: Duration) -> Result<LeaseId> {
        let ttl = i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX / 2);
        let granted = self.write(|step| {
            step.execute(
                "INSERT INTO leases (ttl, ends) VALUES (?1, ?2)",
                params![ttl, now().saturating_add(ttl)],
            )?;
            Ok(Some(step.last_insert_rowid()))
        })?;
        Ok(granted.unwrap_or_default())
    }

    fn renew(&self, lease: LeaseId) -> Result<()> {
        self.expire()?;
        let renewed = self.write(|step| {
            let count =
                step.execute("UPDATE leases SET ends = ?2 + ttl WHERE id = ?1", params![lease, now()])?;
            Ok((count > 0).then_some(()))
        })?;
        renewed.ok_or(StoreError::NoSuchLease(lease))
    }

    fn revoke(&self, lease: LeaseId) -> Result<()> {
        self.expire()?;
        let revoked = self.write(|step| {
            let known =
                step.query_row("SELECT 1 FROM leases WHERE id = ?1", [lease], |_| Ok(())).optional()?;
            known.map(|()| end(step, lease)).transpose()
        })?;
        revoked.ok_or(StoreError::NoSuchLease(lease))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_where_the_next_text_begins() {
        for (prefix, next) in
            [("a", Some("b")), ("a/", Some("a0")), ("é", Some("ê")), ("a\u{10ffff}", Some("b"))]
        {
            assert_eq!(behind(prefix).as_deref(), next);
        }
        assert_eq!((behind(""), behind("\u{10ffff}")), (None, None));
        assert_eq!(behind("\u{d7ff}").as_deref(), Some("\u{e000}"));
    }

    #[test]
    fn old_changes_are_forgotten_and_that_is_said() {
        let store = Sqlite::memory().unwrap();
        for n in 0..KEPT + SLACK + 1 {
            store.commit(&Transaction::new().put("k", n.to_string())).unwrap();
        }
        assert!(matches!(store.changes("", 0, 10), Err(StoreError::Compacted { oldest }) if oldest > 1));
        let latest = store.revision().unwrap();
        assert_eq!(store.changes("", latest - 5, 10).unwrap().len(), 5);
    }

    #[test]
    fn a_newer_store_and_anothers_database_are_refused_untouched() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        drop(Sqlite::open(&path).unwrap());
        Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
        assert!(matches!(Sqlite::open(&path), Err(StoreError::Newer { found: 99, known: 1, .. })));
        let other = dir.path().join("other");
        Connection::open(&other).unwrap().execute_batch("CREATE TABLE t (x)").unwrap();
        let before = std::fs::read(&other).unwrap();
        assert!(matches!(Sqlite::open(&other), Err(StoreError::Foreign(_))));
        assert_eq!(std::fs::read(&other).unwrap(), before);
        std::fs::write(dir.path().join("text"), "no database, but long enough to be one".repeat(9)).unwrap();
        assert!(matches!(Sqlite::open(&dir.path().join("text")), Err(StoreError::Database { .. })));
    }
}
