//! The contract of a store, as one suite that every store passes.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use hutch_cloud::store::{Outcome, Revision, Sqlite, Store, StoreError, Transaction};
use proptest::prelude::*;

/// Runs a part of the suite on a fresh store of each kind.
fn on_each(test: impl Fn(Arc<dyn Store>)) {
    test(Arc::new(Sqlite::memory().expect("a store in memory")));
    let dir = tempfile::tempdir().expect("a directory");
    test(Arc::new(Sqlite::open(&dir.path().join("store")).expect("a store in a file")));
}

fn put(key: &str, value: &str) -> Transaction {
    Transaction::new().put(key, value)
}

fn done(store: &dyn Store, transaction: &Transaction) -> Revision {
    match store.commit(transaction) {
        Ok(Outcome::Committed(revision)) => revision,
        other => panic!("{transaction:?}: {other:?}"),
    }
}

fn keys(store: &dyn Store, prefix: &str) -> Vec<String> {
    store.range(prefix, None, 1000).expect("a range").into_iter().map(|entry| entry.key).collect()
}

#[test]
fn what_is_written_is_read_in_order() {
    on_each(|store| {
        assert_eq!((store.get("a").unwrap(), store.revision().unwrap()), (None, 0));
        assert_eq!(done(&*store, &put("b/2", "two").put("b/1", "one").put("c", "")), 1);
        assert_eq!(done(&*store, &put("b", "x")), 2);
        let entry = store.get("b/1").unwrap().unwrap();
        assert_eq!((entry.value.as_slice(), entry.revision), (&b"one"[..], 1));
        assert_eq!(keys(&*store, "b"), ["b", "b/1", "b/2"]);
        assert_eq!(keys(&*store, "b/"), ["b/1", "b/2"]);
        assert_eq!(keys(&*store, ""), ["b", "b/1", "b/2", "c"]);
        let page = store.range("b", Some("b/1"), 1).unwrap();
        assert_eq!(page.iter().map(|e| e.key.as_str()).collect::<Vec<_>>(), ["b/2"]);
        done(&*store, &Transaction::new().delete("b").delete("nothing"));
        assert_eq!(keys(&*store, "b"), ["b/1", "b/2"]);
    });
}

#[test]
fn a_transaction_is_whole_or_not_at_all() {
    on_each(|store| {
        done(&*store, &put("a", "1").put("b", "1"));
        let (a, b) = (store.get("a").unwrap().unwrap(), store.get("b").unwrap().unwrap());
        done(&*store, &put("b", "2"));
        let both = Transaction::new().unchanged(&a).unchanged(&b).put("a", "3").put("new", "3");
        assert_eq!(store.commit(&both).unwrap(), Outcome::Conflict("b".into()));
        assert_eq!(store.get("a").unwrap().unwrap(), a);
        assert_eq!(store.commit(&put("c", "").absent("a")).unwrap(), Outcome::Conflict("a".into()));
        assert_eq!(
            (store.get("new").unwrap(), store.get("c").unwrap(), store.revision().unwrap()),
            (None, None, 2)
        );
        done(&*store, &Transaction::new().unchanged(&a).absent("new").put("new", "4").delete("a"));
        // A key that went and came again is not the one that was read.
        done(&*store, &put("a", "1"));
        assert_eq!(store.commit(&put("x", "").unchanged(&a)).unwrap(), Outcome::Conflict("a".into()));
        for bad in
            [put("", "x"), put(&"k".repeat(1025), "x"), Transaction::new().put("k", vec![0; (1 << 20) + 1])]
        {
            let bad = bad.put("beside", "x");
            assert!(matches!(store.commit(&bad), Err(StoreError::TooLarge { .. })));
        }
        assert_eq!(store.get("beside").unwrap(), None);
    });
}

#[test]
fn changes_come_once_in_order_and_whole() {
    on_each(|store| {
        done(&*store, &put("a/1", "x").put("b", "y").put("a/2", "z"));
        done(&*store, &Transaction::new().delete("a/1").delete("absent"));
        done(&*store, &put("a/2", "first").put("a/2", "last"));
        let told = |prefix, after, limit| -> Vec<(Revision, String, Option<String>)> {
            let changes = store.changes(prefix, after, limit).unwrap();
            let text = |v: Vec<u8>| String::from_utf8(v).unwrap();
            changes.into_iter().map(|c| (c.revision, c.key, c.value.map(text))).collect()
        };
        let change =
            |revision, key: &str, value: Option<&str>| (revision, key.to_owned(), value.map(str::to_owned));
        let all = [
            change(1, "a/1", Some("x")),
            change(1, "a/2", Some("z")),
            change(2, "a/1", None),
            change(3, "a/2", Some("last")),
        ];
        assert_eq!(told("a/", 0, 100), all);
        assert_eq!(told("a/", 2, 100), all[3..]);
        assert_eq!(told("a/", 0, 1), all[..2], "a transaction's changes come together");
        assert_eq!(told("", 3, 100), []);
    });
}

#[test]
fn who_waits_is_woken_by_a_commit() {
    on_each(|store| {
        assert_eq!(store.wait(0, Duration::from_millis(20)).unwrap(), 0);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| store.wait(0, Duration::from_secs(30)).unwrap());
            std::thread::sleep(Duration::from_millis(50));
            done(&*store, &put("a", ""));
            assert_eq!(waiter.join().unwrap(), 1);
        });
        assert_eq!(store.wait(0, Duration::from_secs(30)).unwrap(), 1, "what was before is not waited for");
    });
}

#[test]
fn what_is_under_a_lease_goes_with_it() {
    on_each(|store| {
        let short = store.grant(Duration::from_millis(300)).unwrap();
        let long = store.grant(Duration::from_secs(3600)).unwrap();
        done(&*store, &Transaction::new().put_leased("host/a", "", short).put_leased("host/b", "", long));
        // Written without it, a key is free of its lease.
        done(&*store, &Transaction::new().put_leased("host/c", "", short));
        done(&*store, &put("host/c", ""));
        assert!(store.wait(3, Duration::from_secs(30)).unwrap() > 3, "the end of a lease is a change");
        assert_eq!(keys(&*store, "host/"), ["host/b", "host/c"]);
        assert!(store.changes("host/a", 3, 10).unwrap()[0].value.is_none());
        assert!(matches!(store.renew(short), Err(StoreError::NoSuchLease(_))));
        let late = Transaction::new().put_leased("host/a", "", short);
        assert!(matches!(store.commit(&late), Err(StoreError::NoSuchLease(_))));
        store.renew(long).unwrap();
        store.revoke(long).unwrap();
        assert_eq!(keys(&*store, "host/"), ["host/c"]);
        assert!(matches!(store.revoke(long), Err(StoreError::NoSuchLease(_))));
    });
}

#[test]
fn many_at_once_lose_no_update() {
    on_each(|store| {
        done(&*store, &put("count", "0"));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let mut left = 50;
                    while left > 0 {
                        let entry = store.get("count").unwrap().unwrap();
                        let count: u64 = std::str::from_utf8(&entry.value).unwrap().parse().unwrap();
                        let next = Transaction::new().unchanged(&entry).put("count", (count + 1).to_string());
                        left -= i32::from(matches!(store.commit(&next).unwrap(), Outcome::Committed(_)));
                    }
                });
            }
        });
        assert_eq!(store.get("count").unwrap().unwrap().value, b"400");
        assert_eq!(store.changes("count", 0, 1000).unwrap().len(), 401);
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    /// Against a map: any writes and deletions, then every prefix.
    #[test]
    fn random_work_agrees_with_a_map(work in prop::collection::vec(("[a-cé/]{1,4}", prop::option::of("[a-z]{0,3}")), 1..60)) {
        let store = Sqlite::memory().unwrap();
        let mut map = BTreeMap::new();
        for (key, value) in &work {
            let transaction = match value {
                Some(value) => { map.insert(key.clone(), value.clone()); put(key, value) }
                None => { map.remove(key); Transaction::new().delete(key.clone()) }
            };
            done(&store, &transaction);
        }
        for prefix in ["", "a", "é", "a/", "b", "zz"] {
            let expected: Vec<_> = map.keys().filter(|key| key.starts_with(prefix)).cloned().collect();
            prop_assert_eq!(keys(&store, prefix), expected);
        }
    }
}

/// The child of the test below: commits numbers for ever and says each when it is done.
#[test]
#[ignore = "a part of the next test"]
fn commits_for_ever() {
    let store = Sqlite::open(std::env::var("STORE").unwrap().as_ref()).unwrap();
    for n in 0_u64.. {
        done(&store, &put("n", &n.to_string()).put("twin", n.to_string()));
        println!("DONE {n}");
    }
}

#[test]
fn what_was_committed_survives_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    for round in 0..6 {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "commits_for_ever", "--ignored", "--nocapture"]).env("STORE", &path);
        let mut child = child.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
        let number = |line: String| line.split_once("DONE ").and_then(|(_, n)| n.trim().parse::<u64>().ok());
        let reached = 20 + round * 17;
        let last = said.by_ref().filter_map(|line| number(line.unwrap())).find(|n| *n >= reached).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let last = said.filter_map(|line| number(line.ok()?)).last().unwrap_or(last);
        let store = Sqlite::open(&path).unwrap();
        let value = |key| -> u64 {
            String::from_utf8(store.get(key).unwrap().unwrap().value).unwrap().parse().unwrap()
        };
        assert!(value("n") >= last && value("n") <= last + 1, "{} after {last}", value("n"));
        assert_eq!(value("n"), value("twin"), "half a transaction");
    }
}

#[test]
fn a_backup_is_the_store_at_one_moment() {
    let dir = tempfile::tempdir().unwrap();
    let (path, copy) = (dir.path().join("store"), dir.path().join("it's a copy"));
    let store = Sqlite::open(&path).unwrap();
    done(&store, &put("a", "before"));
    store.backup(&copy).unwrap();
    done(&store, &put("a", "after"));
    let restored = Sqlite::open(&copy).unwrap();
    assert_eq!(restored.get("a").unwrap().unwrap().value, b"before");
    assert_eq!(restored.revision().unwrap(), 1);
    assert!(store.backup(&copy).is_err(), "a backup is not written over");
}
