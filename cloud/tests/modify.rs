//! Volumes that change, and snapshots of one instant, on the simulated host.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{ACCOUNT, OTHER, World, in_directory, in_memory, settings, world_of};
use hutch_cloud::fault::Fault;
use hutch_cloud::host::{Host, Simulated, Source};
use hutch_cloud::model::{Image, InstanceState, Progress, Snapshot, Tags, Volume, VolumeState};
use hutch_cloud::region::{NewImage, NewSnapshots, NewVolume, VolumeChange, lifecycle};
use hutch_cloud::store::Sqlite;
use hutch_vmm::config::Rate;

const GIB: u64 = 1 << 30;

fn eventually(what: &str, check: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !check() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn volume(world: &World, id: &str) -> Volume {
    world.region.get(id).unwrap().expect("the volume")
}

fn make(world: &World, gib: u64, kind: &str) -> String {
    let new =
        NewVolume { zone: "home-1a".into(), gib: Some(gib), kind: Some(kind.into()), ..NewVolume::default() };
    let id = world.region.create_volume(ACCOUNT, &new).unwrap().id;
    eventually("it is made", || volume(world, &id).state == VolumeState::Ready);
    id
}

fn grow(id: &str, gib: u64) -> VolumeChange {
    VolumeChange { volume: id.into(), gib: Some(gib), ..VolumeChange::default() }
}

fn progress(world: &World, id: &str) -> Progress {
    volume(world, id).modification.expect("a change").progress
}

fn code(result: Result<Volume, Fault>) -> String {
    result.expect_err("it is refused").code.into_owned()
}

#[test]
fn a_volume_grows_and_gets_faster_and_its_host_knows() {
    let world = in_memory();
    let _reconciler = world.reconcile();
    let id = make(&world, 1, "gp2");
    let (bytes, rate) = world.host.volume(&id).unwrap();
    assert_eq!((bytes, rate.ops[0].per_second), (GIB, 100));
    let change = VolumeChange { kind: Some("gp3".into()), iops: Some(4000), ..grow(&id, 8) };
    let asked = world.region.modify_volume(ACCOUNT, &change).unwrap();
    assert_eq!((asked.gib, asked.pending().unwrap().target.gib), (1, 8), "it is not done yet");
    eventually("it is done", || progress(&world, &id) == Progress::Optimizing);
    let now = volume(&world, &id);
    assert_eq!((now.gib, now.kind.as_str(), now.iops, now.throughput), (8, "gp3", Some(4000), Some(125)));
    let (bytes, rate) = world.host.volume(&id).unwrap();
    assert_eq!((bytes, rate.ops[0].per_second), (8 * GIB, 4000));
    assert_eq!(code(world.region.modify_volume(ACCOUNT, &grow(&id, 9))), "IncorrectModificationState");
    eventually("it is over", || progress(&world, &id) == Progress::Completed);
    assert_eq!(code(world.region.modify_volume(ACCOUNT, &grow(&id, 7))), "InvalidParameterValue");
    let nothing = VolumeChange { volume: id.clone(), ..VolumeChange::default() };
    assert_eq!(code(world.region.modify_volume(ACCOUNT, &nothing)), "InvalidParameterCombination");
    assert_eq!(code(world.region.modify_volume(OTHER, &grow(&id, 9))), "InvalidVolume.NotFound");
    assert_eq!(volume(&world, &id).modified.len(), 1, "what is refused does not count");
}

#[test]
fn a_volume_is_changed_so_often_a_day_and_no_more() {
    let mut settings = settings();
    settings.limits.changes_per_volume = 2;
    let host = Arc::new(Simulated::memory(Duration::ZERO));
    let world = world_of(settings, host, Sqlite::memory().unwrap());
    let _reconciler = world.reconcile();
    let id = make(&world, 1, "gp2");
    for gib in [2, 3] {
        world.region.modify_volume(ACCOUNT, &grow(&id, gib)).unwrap();
        eventually("it is over", || progress(&world, &id) == Progress::Completed);
    }
    assert_eq!(code(world.region.modify_volume(ACCOUNT, &grow(&id, 4))), "VolumeModificationRateExceeded");
    assert_eq!(volume(&world, &id).gib, 3);
}

#[test]
fn a_change_that_cannot_be_fails_and_the_volume_is_as_it_was() {
    let world = in_memory();
    let _reconciler = world.reconcile();
    let id = make(&world, 1, "gp2");
    world.host.delete_volume(&id).unwrap();
    world.region.modify_volume(ACCOUNT, &grow(&id, 2)).unwrap();
    eventually("it fails", || progress(&world, &id) == Progress::Failed);
    let now = volume(&world, &id);
    assert_eq!(now.gib, 1);
    assert!(now.modification.unwrap().failed.unwrap().contains(&id));
}

#[test]
fn a_change_goes_on_where_the_daemon_was_killed() {
    let dir = tempfile::tempdir().unwrap();
    let world = in_directory(dir.path());
    let reconciler = world.reconcile();
    let id = make(&world, 1, "gp2");
    drop(reconciler);
    world.region.modify_volume(ACCOUNT, &grow(&id, 2)).unwrap();
    drop(world);
    // It was asked for, or the host did it and that was not recorded: either way it is done, once.
    for done in [false, true] {
        let world = in_directory(dir.path());
        if done {
            world.region.modify_volume(ACCOUNT, &grow(&id, 3)).unwrap();
            world.host.modify_volume(&id, 3 * GIB, &Rate::default()).unwrap();
        }
        let _reconciler = world.reconcile();
        eventually("it is over", || progress(&world, &id) == Progress::Completed);
        let gib = if done { 3 } else { 2 };
        assert_eq!(volume(&world, &id).gib, gib);
        let (bytes, rate) = world.host.volume(&id).unwrap();
        assert_eq!((bytes, rate.ops[0].per_second), (gib * GIB, 100));
    }
}

#[test]
fn an_owner_may_have_everything_as_fast_as_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let open = |speed: bool| {
        let mut settings = settings();
        settings.limits.speed = speed;
        let host = Simulated::open(dir.path().join("host"), Duration::ZERO).unwrap();
        world_of(settings, Arc::new(host), Sqlite::open(&dir.path().join("store.db")).unwrap())
    };
    let world = open(true);
    let reconciler = world.reconcile();
    let id = world.run(1).remove(0);
    let root = world.wait(&id, InstanceState::Running).devices[0].volume.clone();
    let limited = |world: &World| {
        let machine = world.host.told(&id).unwrap();
        let volume = world.host.volume(&root).unwrap().1;
        [machine.speed.volumes, machine.speed.network, volume].map(|rate| rate != Rate::default())
    };
    assert_eq!(limited(&world), [true; 3]);
    drop((reconciler, world));
    for speed in [false, true] {
        let world = open(speed);
        let _reconciler = world.reconcile();
        eventually("what is there is told, too", || limited(&world) == [speed; 3]);
    }
}

#[test]
fn the_root_is_no_hard_disk() {
    let world = in_memory();
    let _reconciler = world.reconcile();
    let id = world.run(1).remove(0);
    let root = world.wait(&id, InstanceState::Running).devices[0].volume.clone();
    let slow = VolumeChange { kind: Some("st1".into()), ..grow(&root, 125) };
    assert_eq!(code(world.region.modify_volume(ACCOUNT, &slow)), "InvalidParameterValue");
    world.region.modify_volume(ACCOUNT, &grow(&root, 125)).unwrap();
    eventually("it is over", || progress(&world, &root) == Progress::Completed);
}

/// A running instance with a root and two data volumes.
fn with_data(world: &World) -> (String, Vec<String>) {
    let id = world.run(1).remove(0);
    world.wait(&id, InstanceState::Running);
    world.region.stop_instances(ACCOUNT, std::slice::from_ref(&id), false).unwrap();
    world.wait(&id, InstanceState::Stopped);
    for device in ["/dev/sdf", "/dev/sdg"] {
        let volume = make(world, 1, "gp3");
        world.region.attach_volume(ACCOUNT, &volume, &id, device).unwrap();
    }
    let volumes = world.instance(&id).devices.into_iter().map(|device| device.volume).collect();
    (id, volumes)
}

#[test]
fn snapshots_of_an_instance_are_of_one_instant() {
    let world = in_memory();
    let _reconciler = world.reconcile();
    let (instance, volumes) = with_data(&world);
    let ask = NewSnapshots { instance, ..NewSnapshots::default() };
    let all = world.region.create_snapshots(ACCOUNT, &ask).unwrap();
    assert_eq!(all.iter().map(|s| s.volume.clone()).collect::<Vec<_>>(), volumes);
    let complete = |id: &String| world.region.get::<Snapshot>(id).unwrap().unwrap().complete;
    eventually("they are complete", || all.iter().all(|s| complete(&s.id)));
    for snapshot in &all {
        assert!(world.host.content(&Source::Snapshot(snapshot.id.clone())).is_ok());
        assert_eq!(snapshot.together.len(), 3);
    }
    let data = NewSnapshots { without_root: true, without: vec![volumes[2].clone()], ..ask.clone() };
    let made = world.region.create_snapshots(ACCOUNT, &data).unwrap();
    assert_eq!(made.iter().map(|s| &s.volume).collect::<Vec<_>>(), [&volumes[1]]);
    for without in [vec![volumes[0].clone()], vec!["vol-0123456789abcdef0".into()], volumes[1..].to_vec()] {
        let bad = NewSnapshots { without_root: true, without, ..ask.clone() };
        let fault = world.region.create_snapshots(ACCOUNT, &bad).unwrap_err();
        assert_eq!(fault.code, "InvalidParameterValue");
    }
}

#[test]
fn one_of_them_can_be_deleted_before_they_are_taken() {
    for (deleted, kept) in [(0, [1, 2]), (1, [0, 2])] {
        let world = in_memory();
        let reconciler = world.reconcile();
        let (instance, _) = with_data(&world);
        drop(reconciler);
        let ask = NewSnapshots { instance, ..NewSnapshots::default() };
        let all = world.region.create_snapshots(ACCOUNT, &ask).unwrap();
        world.region.delete_snapshot(ACCOUNT, &all[deleted].id).unwrap();
        let _reconciler = world.reconcile();
        let found = |i: usize| world.region.get::<Snapshot>(&all[i].id).unwrap();
        eventually("it goes", || found(deleted).is_none());
        eventually("the others come", || kept.iter().all(|i| found(*i).unwrap().complete));
        let held = |i: usize| world.host.content(&Source::Snapshot(all[i].id.clone())).is_ok();
        assert!(!held(deleted) && kept.iter().all(|i| held(*i)));
    }
}

#[test]
fn snapshots_take_their_volumes_tags_and_an_images_are_of_one_instant() {
    let world = in_memory();
    let _reconciler = world.reconcile();
    let (instance, volumes) = with_data(&world);
    let tag = |key: &str, value: &str| Tags::from([(key.to_owned(), value.to_owned())]);
    world.region.create_tags(ACCOUNT, &volumes[1..2], &tag("Name", "data")).unwrap();
    let ask = NewSnapshots {
        instance: instance.clone(),
        copy_tags: true,
        tags: tag("by", "night"),
        ..NewSnapshots::default()
    };
    let all = world.region.create_snapshots(ACCOUNT, &ask).unwrap();
    assert_eq!(all[0].tags, tag("by", "night"));
    assert_eq!(all[1].tags.get("Name").map(String::as_str), Some("data"));
    let new = NewImage { instance, name: "made".into(), ..NewImage::default() };
    let image = world.region.create_image(ACCOUNT, &new).unwrap();
    let found = || world.region.get::<Image>(&image).unwrap().unwrap();
    eventually("it is made", || !found().pending);
    assert_eq!(found().failed, None);
    for device in found().devices {
        let snapshot = world.region.get::<Snapshot>(&device.snapshot.unwrap()).unwrap().unwrap();
        assert_eq!(snapshot.together.len(), 3);
    }
}

#[test]
fn a_policys_snapshots_are_taken_in_time_once_and_so_many_are_kept() {
    let world = in_memory();
    let _reconciler = world.reconcile();
    let policies = lifecycle::read(
        "[nightly]\ntags = { Backup = \"daily\" }\nevery = 24\nat = \"03:00\"\nkeep = 2\ncopy-tags = true\n\
         [together]\ntags = { Backup = \"daily\" }\nof = \"instances\"\nevery = 24\nkeep = 1\nwithout-root = true",
    )
    .unwrap();
    let tagged: Tags = [("Backup".to_owned(), "daily".to_owned())].into();
    let (kept, other) = (make(&world, 1, "gp2"), make(&world, 1, "gp2"));
    world.region.create_tags(ACCOUNT, std::slice::from_ref(&kept), &tagged).unwrap();
    let (instance, mut data) = with_data(&world);
    let root = data.remove(0);
    world.region.create_tags(ACCOUNT, std::slice::from_ref(&instance), &tagged).unwrap();
    let of = |volume: &str| {
        let mut all: Vec<Snapshot> = world.region.all().unwrap();
        all.retain(|snapshot| snapshot.volume == volume && !snapshot.deleting);
        all.sort_by_key(|snapshot| snapshot.started);
        all
    };
    let complete = |volume: &str| eventually("they are made", || of(volume).iter().all(|s| s.complete));
    let day = |n: i64| jiff::Timestamp::now() + jiff::SignedDuration::from_hours(24 * n);
    // Today's time was before they were there.
    world.region.follow(&policies, jiff::Timestamp::now()).unwrap();
    assert!(of(&kept).is_empty());
    for n in 1..=4 {
        for _ in 0..2 {
            world.region.follow(&policies, day(n)).unwrap();
            complete(&kept);
            data.iter().for_each(|volume| complete(volume));
        }
    }
    world.region.follow(&policies, day(4)).unwrap();
    eventually("old ones are gone", || of(&kept).len() == 2);
    let newest = of(&kept).pop().unwrap();
    assert!(newest.started > day(4) - jiff::SignedDuration::from_hours(1));
    assert_eq!(newest.tags["Backup"], "daily");
    assert_eq!(newest.tags["aws:dlm:lifecycle-policy-id"], "nightly");
    assert!(of(&other).is_empty() && of(&root).is_empty());
    for volume in &data {
        eventually("one is kept", || of(volume).len() == 1);
        let one = of(volume).pop().unwrap();
        assert_eq!((one.tags["instance-id"].as_str(), one.together.len()), (instance.as_str(), data.len()));
    }
    // One that is the owner's stays, and one that an image needs.
    let own = world.region.create_snapshot(ACCOUNT, &kept, "", &Tags::new()).unwrap().id;
    complete(&kept);
    for n in 5..=6 {
        world.region.follow(&policies, day(n)).unwrap();
        complete(&kept);
    }
    world.region.follow(&policies, day(6)).unwrap();
    eventually("old ones are gone", || of(&kept).len() == 3);
    assert!(of(&kept).iter().any(|snapshot| snapshot.id == own));
}
