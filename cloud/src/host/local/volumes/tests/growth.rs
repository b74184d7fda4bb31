//! Volumes that become larger and faster, also while a machine has them.

use super::*;

fn rate(per_second: u64) -> Rate {
    Rate { ops: vec![Flow { per_second, burst: 1 }], bytes: vec![] }
}

fn record(home: &tempfile::TempDir, id: &str) -> Record {
    serde_json::from_slice(&fs::read(home.path().join(format!("volumes/{id}.json"))).unwrap()).unwrap()
}

#[test]
fn a_volume_grows_where_it_lies_and_keeps_what_it_may_do() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", 4 * MIB, &Source::Template("micro".into()), None).unwrap();
    assert_eq!(volumes.ready("vol-a").unwrap().1, Rate::default());
    for bytes in [8 * MIB, 8 * MIB, MIB] {
        volumes.modify("vol-a", bytes, &rate(5), None).unwrap();
        let disk = disk(&volumes, "vol-a");
        assert_eq!((disk.size(), start_of(&*disk)), (8 * MIB, "template".into()));
    }
    assert_eq!(open(&home).ready("vol-a").unwrap().1, rate(5));
    assert_eq!(record(&home, "vol-a").growing, None);
    assert!(matches!(volumes.modify("vol-none", MIB, &rate(1), None), Err(HostError::Missing(_))));
    // Larger than its tables reach: it is as it was.
    let huge = volumes.modify("vol-a", 1 << 50, &rate(6), None);
    assert!(matches!(huge, Err(HostError::NoRoom(_))), "{huge:?}");
    let kept = record(&home, "vol-a");
    assert_eq!((kept.size, kept.growing, kept.rate), (8 * MIB, None, rate(5)));
    assert_eq!(disk(&volumes, "vol-a").size(), 8 * MIB);
}

#[test]
fn a_growth_that_was_cut_short_goes_on() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", 4 * MIB, &Source::Empty, None).unwrap();
    let half = Record { size: 8 * MIB, growing: Some(4 * MIB), ..record(&home, "vol-a") };
    for finish in [0, 1] {
        // The record was written, and then the process was killed.
        volumes.put("vol-a", &Record { size: half.size << finish, ..half.clone() }).unwrap();
        let volumes = open(&home);
        match finish {
            0 => volumes.modify("vol-a", 8 * MIB, &Rate::default(), None).unwrap(),
            _ => drop(volumes.ready("vol-a").unwrap()),
        }
        assert_eq!(disk(&volumes, "vol-a").size(), (8 * MIB) << finish);
        assert_eq!(record(&home, "vol-a").growing, None);
    }
}

#[test]
fn a_machine_that_has_the_volume_is_told_once_and_does_it_itself() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", 4 * MIB, &Source::Empty, None).unwrap();
    let asked = Mutex::new(Vec::new());
    let obeys = |size: u64, rate: &Rate| {
        asked.lock().unwrap().push((size, rate.clone()));
        Ok(())
    };
    let silent = |_: u64, _: &Rate| Err(HostError::Failed("it does not answer".into()));
    let refuses = |_: u64, _: &Rate| Err(HostError::NoRoom("it refuses".into()));
    // While it does not answer, what is meant stays recorded.
    assert!(volumes.modify("vol-a", 8 * MIB, &rate(5), Some(&silent)).is_err());
    assert_eq!(record(&home, "vol-a").growing, Some(4 * MIB));
    for _ in 0..2 {
        volumes.modify("vol-a", 8 * MIB, &rate(5), Some(&obeys)).unwrap();
    }
    volumes.modify("vol-a", 8 * MIB, &rate(6), Some(&obeys)).unwrap();
    // The next daemon cannot know whether it was told.
    for _ in 0..2 {
        open(&home).modify("vol-a", 8 * MIB, &rate(6), Some(&obeys)).unwrap();
    }
    let told = [(8 * MIB, rate(5)), (8 * MIB, rate(6)), (8 * MIB, rate(6)), (8 * MIB, rate(6))];
    assert_eq!(*asked.lock().unwrap(), told);
    assert!(volumes.modify("vol-a", 16 * MIB, &rate(7), Some(&refuses)).is_err());
    let kept = record(&home, "vol-a");
    assert_eq!((kept.size, kept.growing, kept.rate), (8 * MIB, None, rate(6)), "as it was");
    assert_eq!(disk(&volumes, "vol-a").size(), 4 * MIB, "only the machine writes to it");
}
