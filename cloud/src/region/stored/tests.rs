use std::io::Write as _;

use super::*;
use crate::host::{Host, Simulated};
use crate::region::testing::{ACCOUNT, OTHER, World, region};

fn device(name: &str, gib: u64, disk: bool) -> StoredDevice {
    let snapshot = StoredSnapshot { gib, description: String::new(), tags: Tags::new() };
    let device = ImageDevice {
        name: name.into(),
        snapshot: None,
        gib,
        kind: "gp3".into(),
        iops: None,
        delete_on_termination: true,
        encrypted: false,
    };
    StoredDevice { device, snapshot: disk.then_some(snapshot) }
}

/// How somebody would have it say something else.
type Change = fn(&mut StoredImage);

#[test]
fn an_image_of_somebody_else_is_one_that_could_be_ours() {
    let image = StoredImage {
        id: "ami-1".into(),
        name: "web".into(),
        description: String::new(),
        kernel: None,
        ramdisk: None,
        root_device: "/dev/xvda".into(),
        ena_support: true,
        devices: vec![
            device("/dev/xvda", 2, true),
            device("/dev/sdf", 1, false),
            device("/dev/sdg", 1, true),
        ],
        tags: Tags::new(),
    };
    check_said(&image, &[2 * GIB, 512]).unwrap();
    for sizes in [&[2 * GIB][..], &[2 * GIB, 512, 512], &[2 * GIB + 512, 512], &[]] {
        assert!(check_said(&image, sizes).is_err(), "{sizes:?}");
    }
    let changes: [Change; 10] = [
        |image| image.name = "a/../b\n".into(),
        |image| drop(image.tags.insert("aws:own".into(), String::new())),
        |image| image.root_device = "/dev/sdg".into(),
        |image| image.devices.swap(0, 1),
        |image| image.devices[1].device.name = "/dev/xvda".into(),
        |image| image.devices[1].device.name.clear(),
        |image| image.devices[1].device.gib = u64::MAX,
        |image| image.devices[1].device.kind = "none".into(),
        |image| image.devices[1].device.snapshot = Some("snap-12345678".into()),
        |image| image.devices[2].device.encrypted = true,
    ];
    for (index, change) in changes.iter().enumerate() {
        let mut other = image.clone();
        change(&mut other);
        assert!(check_said(&other, &[2 * GIB, 512]).is_err(), "{index}");
    }
}

fn image(kernel: Option<&str>) -> StoredImage {
    StoredImage {
        id: "ami-1".into(),
        name: "web".into(),
        description: String::new(),
        kernel: kernel.map(str::to_owned),
        ramdisk: None,
        root_device: "/dev/xvda".into(),
        ena_support: true,
        devices: vec![device("/dev/xvda", 1, true), device("/dev/sdg", 1, true)],
        tags: Tags::new(),
    }
}

/// An object of an image, in a bucket of the account; what asks for the image of it.
fn stored(world: &World, image: &StoredImage) -> RestoreAsk {
    world.objects.take("images", ACCOUNT).unwrap();
    world.host.create_volume("vol-1", GIB, &Source::Empty, None).unwrap();
    world.host.create_snapshots(&[("snap-of", "vol-1")]).unwrap();
    let disk = world.host.read(&Source::Snapshot("snap-of".into())).unwrap().disk;
    let mut to = world.objects.write("images", "a.bin", GIB, std::iter::empty()).unwrap();
    archive::write(&mut to, image, &[&*disk, &*disk], &mut |_| true).unwrap();
    to.flush().unwrap();
    to.finish().unwrap();
    RestoreAsk { bucket: "images".into(), key: "a.bin".into(), ..RestoreAsk::default() }
}

#[test]
fn an_image_that_fails_stays_failed_though_undoing_it_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::on(Simulated::open(dir.path().to_path_buf(), Duration::ZERO).unwrap());
    let ask = stored(&world, &image(None));
    let id = world.region.create_restore_task(ACCOUNT, &ask).unwrap();
    let task = world.region.get::<RestoreTask>(&id).unwrap().unwrap();
    let [first, second] = [&task.disks[0].snapshot, &task.disks[1].snapshot];
    // The second disk can be neither kept nor removed.
    let place = dir.path().join("snapshots").join(second);
    std::fs::create_dir(&place).unwrap();
    assert!(world.region.step_restore(&id).is_err());
    let gone =
        |id: &str| matches!(world.host.content(&Source::Snapshot(id.into())), Err(HostError::Missing(_)));
    assert!(gone(first));
    // It could be kept now: too late.
    std::fs::remove_dir(&place).unwrap();
    world.region.step_restore(&id).unwrap();
    let image = world.region.get::<Image>(&id).unwrap().unwrap();
    assert!(!image.pending && image.failed.is_some(), "{image:?}");
    assert!(image.devices.iter().all(|device| device.snapshot.is_none()));
    assert_eq!(world.region.all::<Snapshot>().unwrap(), []);
    assert_eq!(world.region.all::<RestoreTask>().unwrap(), []);
    assert!(gone(first) && gone(second));
}

#[test]
fn an_object_gives_nobody_the_kernel_of_another_account() {
    let world = World::new();
    let kernel = |id: &str, kind, account| Image { kind, ..images::blank(id, account, id) };
    world.put(&kernel("aki-12345678", ImageKind::Kernel, OTHER));
    world.put(&kernel("ari-12345678", ImageKind::Ramdisk, ACCOUNT));
    for (id, code) in [
        ("aki-12345678", "InvalidAMIID.NotFound"),
        ("aki-00000000", "InvalidAMIID.NotFound"),
        ("ari-12345678", "InvalidAMIID.Malformed"),
        ("aki/../x", "InvalidAMIID.Malformed"),
    ] {
        let ask = stored(&world, &image(Some(id)));
        assert_eq!(world.region.create_restore_task(ACCOUNT, &ask).unwrap_err().code, code, "{id}");
        assert_eq!(world.region.all::<RestoreTask>().unwrap(), []);
    }
    world.put(&Image { public: true, ..kernel("aki-12345678", ImageKind::Kernel, OTHER) });
    let ask = stored(&world, &image(Some("aki-12345678")));
    world.region.create_restore_task(ACCOUNT, &ask).unwrap();
}

#[test]
fn two_regions_do_not_write_one_object() {
    let world = World::new();
    let (other, _host) = region("home-2", Simulated::memory(Duration::ZERO), &world.objects);
    for region in [&world.region, &other] {
        region.adopt_templates().unwrap();
    }
    let image = other.all::<Image>().unwrap().remove(0).id;
    assert!(world.region.get::<Image>(&image).unwrap().is_some(), "a template has one id in all regions");
    let ask = StoreAsk { image: image.clone(), bucket: "images".into(), ..StoreAsk::default() };
    let key = world.region.create_store_task(ACCOUNT, &ask).unwrap();
    let writer = world.objects.write("images", &key, 1, std::iter::empty()).unwrap();
    assert_eq!(other.create_store_task(ACCOUNT, &ask).unwrap_err().code, "IncorrectState");
    let id = world.region.all::<StoreTask>().unwrap().remove(0).id;
    world.region.step_store(&id).unwrap();
    let failed = world.region.get::<StoreTask>(&id).unwrap().unwrap();
    assert_eq!(failed.state, StoreState::Failed);
    assert!(failed.failed.unwrap().contains("is being written by another task"));
    drop(writer);
    other.create_store_task(ACCOUNT, &ask).unwrap();
}
