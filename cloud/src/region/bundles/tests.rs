use super::*;
use crate::host::Host;
use crate::region::testing::World;

const PREFIX: &str = "web";

/// With a volume.
fn world() -> World {
    let world = World::new();
    world.host.create_volume("vol-1", 1 << 30, &Source::Empty, None).unwrap();
    world
}

impl World {
    /// One that is asked for.
    fn asked(&self) -> BundleTask {
        let id = id::new("bun");
        let task = BundleTask {
            account: "000000000001".into(),
            instance: None,
            source: Source::Snapshot(id::of("snap", &id)),
            volume: Some("vol-1".into()),
            kernel: None,
            ramdisk: None,
            bucket: "bundles".into(),
            prefix: PREFIX.into(),
            started: now(),
            updated: now(),
            state: BundleState::Pending,
            parts: 0,
            written: false,
            failed: None,
            id,
        };
        self.put(&task);
        task
    }

    fn get(&self, task: &BundleTask) -> BundleTask {
        self.region.get(&task.id).unwrap().unwrap()
    }

    fn end(&self, task: &BundleTask) -> BundleTask {
        while self.region.step_bundle(&task.id).unwrap().is_some() {}
        assert!(matches!(self.host.content(&task.source), Err(HostError::Missing(_))), "it is kept still");
        self.get(task)
    }

    fn has(&self, name: &str) -> bool {
        self.objects.read("bundles", &format!("{PREFIX}{name}")).is_ok()
    }
}

#[test]
fn one_that_is_written_stays_though_nobody_wrote_that_down() {
    let world = world();
    let task = world.asked();
    let done = world.end(&task);
    assert_eq!((done.state, done.written), (BundleState::Complete, true));
    // As a kill between leaves it; and its volume is gone by now.
    world.host.delete_volume("vol-1").unwrap();
    for kept in [true, false] {
        if kept {
            world.host.create_volume("vol-2", 1 << 30, &Source::Empty, None).unwrap();
            let Source::Snapshot(id) = &task.source else { unreachable!() };
            world.host.create_snapshots(&[(id, "vol-2")]).unwrap();
        }
        world.put(&BundleTask { state: BundleState::Storing, written: false, ..done.clone() });
        assert_eq!(world.end(&task).state, BundleState::Complete);
        assert!(world.has(MANIFEST) && world.has(".part.0"));
    }
    // Written down as written, it is not to be cancelled.
    world.put(&BundleTask { state: BundleState::Storing, ..done });
    assert_eq!(world.region.cancel_bundle(&task.account, &task.id).unwrap_err().code, "IncorrectState");
    assert_eq!(world.end(&task).state, BundleState::Complete);
}

#[test]
fn its_disk_is_of_one_instant() {
    let world = world();
    let task = world.asked();
    // What was kept went though the bundle is not written: the volume is another one by now.
    world.put(&BundleTask { state: BundleState::Storing, ..task.clone() });
    let done = world.end(&task);
    assert_eq!(done.state, BundleState::Failed);
    assert!(!world.has(MANIFEST) && !world.has(".part.0"));
}

#[test]
fn of_one_that_is_cancelled_nothing_stays_whenever_it_is_killed() {
    let world = world();
    let task = world.asked();
    let done = world.end(&task);
    for index in [1, 63, 64, 150] {
        world.objects.put("bundles", &format!("{PREFIX}.part.{index}"), vec![1]).unwrap();
    }
    // A removal that was killed left gaps.
    world.objects.delete("bundles", &format!("{PREFIX}.part.0")).unwrap();
    let cancelled = BundleTask { state: BundleState::Cancelling, written: false, parts: 192, ..done };
    world.put(&cancelled);
    // By and by: others have a turn between.
    assert_eq!(world.region.step_bundle(&task.id).unwrap(), Some(Duration::ZERO));
    assert_eq!(world.get(&task).parts, 128);
    assert!(!world.has(MANIFEST) && !world.has(".part.150") && world.has(".part.64"));
    let failed = world.end(&task);
    assert_eq!((failed.state, failed.parts), (BundleState::Failed, 0));
    assert_eq!(failed.failed.unwrap().code, "Client.Cancelled");
    assert!(![1, 63, 64, 150].iter().any(|index| world.has(&format!(".part.{index}"))));
}

#[test]
fn what_another_task_wrote_stays() {
    let world = world();
    let first = world.asked();
    world.end(&first);
    for state in [BundleState::Pending, BundleState::Cancelling] {
        let second = world.asked();
        world.put(&BundleTask { state, parts: 64, ..second.clone() });
        assert_eq!(world.end(&second).state, BundleState::Failed);
        assert!(world.has(MANIFEST) && world.has(".part.0"), "{state:?}");
    }
}

#[test]
fn two_regions_do_not_write_one_bundle() {
    let world = world();
    let (first, second) = (world.asked(), world.asked());
    // As the other region has it while it writes.
    let claim = world.objects.claim("bundles", &parts_of(PREFIX)).unwrap();
    let failed = world.end(&first);
    assert_eq!(failed.state, BundleState::Failed);
    assert!(failed.failed.unwrap().message.contains("is being written by another task"));
    // One that wrote some of it waits until it may remove that.
    world.put(&BundleTask { state: BundleState::Cancelling, parts: 64, ..second.clone() });
    assert_eq!(world.region.step_bundle(&second.id).unwrap(), Some(WAIT));
    drop(claim);
    assert_eq!(world.end(&second).state, BundleState::Failed);
    let third = world.asked();
    assert_eq!(world.end(&third).state, BundleState::Complete);
}
