//! Kernels and RAM disks as images, on the simulated host: which the host has, and which an instance boots.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::{ACCOUNT, OTHER, World, settings, world_of};
use hutch_cloud::fault::Fault;
use hutch_cloud::host::Simulated;
use hutch_cloud::model::{Image, ImageKind, InstanceState};
use hutch_cloud::region::{Attribute, Launch, Settings};
use hutch_cloud::store::Sqlite;
use hutch_imagestore::kernels::import;
use hutch_imagestore::store::Store;

/// A region that is kept in `dir`, on a host with the images of `dir`.
fn world(dir: &Path) -> World {
    let images = Store::open(dir).unwrap();
    let host = Simulated::open(dir.join("host"), Duration::ZERO).unwrap().with_images(images);
    world_of(settings(), Arc::new(host), Sqlite::open(&dir.join("store.db")).unwrap())
}

fn add(dir: &Path, kind: ImageKind, name: &str) -> String {
    let file = dir.join("file");
    std::fs::write(&file, format!("070701 of {name}")).unwrap();
    let (images, file) = (Store::open(dir).unwrap(), std::fs::File::open(file).unwrap());
    import(&images, &file, kind, name, &|_| Ok(()), &mut |_, _| {}).unwrap().record.id
}

fn boots(world: &World, id: &str) -> (Option<String>, Option<String>) {
    let instance = world.instance(id);
    (instance.kernel, instance.ramdisk)
}

fn code<T: std::fmt::Debug>(result: Result<T, Fault>) -> String {
    result.expect_err("it is refused").code.into_owned()
}

#[test]
fn what_the_host_has_are_images_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = add(dir.path(), ImageKind::Kernel, "mainline");
    let first = world(dir.path());
    let image = first.region.get::<Image>(&kernel).unwrap().unwrap();
    assert_eq!((image.kind, &*image.name, &*image.account), (ImageKind::Kernel, "mainline", ACCOUNT));
    first
        .region
        .create_tags(ACCOUNT, std::slice::from_ref(&kernel), &[("a".into(), "b".into())].into())
        .unwrap();
    drop(first);
    // The same for every daemon, with what its owner has said of it.
    let world = world(dir.path());
    assert_eq!(world.region.get::<Image>(&kernel).unwrap().unwrap().tags["a"], "b");
    let region = &world.region;
    assert_eq!(code(region.deregister_image(OTHER, &kernel)), "AuthFailure");
    region.deregister_image(ACCOUNT, &kernel).unwrap();
    assert_eq!(code(region.deregister_image(ACCOUNT, &kernel)), "InvalidAMIID.NotFound");
    assert_eq!(region.adopt_templates().unwrap(), Vec::<String>::new(), "it does not come back by itself");
    // Imported anew it is one again; a second later, so that it is known to be anew.
    Store::open(dir.path()).unwrap().remove("mainline").unwrap();
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(add(dir.path(), ImageKind::Kernel, "mainline"), kernel);
    assert_eq!(region.adopt_templates().unwrap(), std::slice::from_ref(&kernel));
    Store::open(dir.path()).unwrap().remove("mainline").unwrap();
    region.adopt_templates().unwrap();
    assert_eq!(region.get::<Image>(&kernel).unwrap(), None, "nobody could boot it");
}

#[test]
fn what_is_not_asked_for_is_the_images_and_a_ramdisk_goes_with_its_kernel() {
    let dir = tempfile::tempdir().unwrap();
    let [kernel, other] =
        ["one", "two"].map(|name| add(dir.path(), ImageKind::Kernel, &format!("kernel {name}")));
    let [ramdisk, second] =
        ["one", "two"].map(|name| add(dir.path(), ImageKind::Ramdisk, &format!("ramdisk {name}")));
    let world = world(dir.path());
    let _reconciler = world.reconcile();
    let region = &world.region;
    let run =
        |account: &str, launch: Launch| region.run_instances(account, &launch).map(|made| made[0].id.clone());
    let ask = |kernel: Option<&String>, ramdisk: Option<&String>| Launch {
        kernel: kernel.cloned(),
        ramdisk: ramdisk.cloned(),
        ..world.launch(1)
    };
    let some = |id: &String| Some(id.clone());
    let plain = run(ACCOUNT, ask(None, None)).unwrap();
    assert_eq!(boots(&world, &plain), (None, None));
    let id = run(ACCOUNT, ask(Some(&kernel), Some(&ramdisk))).unwrap();
    world.wait(&id, InstanceState::Running);
    let told = world.host.told(&id).unwrap();
    assert_eq!((told.kernel, told.ramdisk), (some(&kernel), some(&ramdisk)));
    assert_eq!(told.metadata.kernel_id, kernel);

    // An image of it boots the same; with another kernel, its RAM disk stays away.
    let new = hutch_cloud::region::NewImage {
        instance: id.clone(),
        name: "own kernel".into(),
        ..Default::default()
    };
    let image = region.create_image(ACCOUNT, &new).unwrap();
    let done = || region.get::<Image>(&image).unwrap().is_some_and(|image| !image.pending);
    while !done() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let of_image = |launch: Launch| Launch { image: image.clone(), ..launch };
    let choices = [
        (ask(None, None), (some(&kernel), some(&ramdisk))),
        (ask(Some(&kernel), None), (some(&kernel), some(&ramdisk))),
        (ask(Some(&other), None), (some(&other), None)),
        (ask(None, Some(&second)), (some(&kernel), some(&second))),
    ];
    for (launch, expected) in choices {
        assert_eq!(boots(&world, &run(ACCOUNT, of_image(launch)).unwrap()), expected);
    }

    // The image's own come with the right to launch it; others have to be had.
    region
        .modify_image(ACCOUNT, &image, |image| {
            image.launch = vec![OTHER.into()];
            Ok(())
        })
        .unwrap();
    for id in [&kernel, &other] {
        region
            .modify_image(ACCOUNT, id, |image| {
                image.public = false;
                Ok(())
            })
            .unwrap();
    }
    let theirs = |launch| Launch { groups: Vec::new(), ..of_image(launch) };
    assert_eq!(boots(&world, &run(OTHER, theirs(ask(None, None))).unwrap()), (some(&kernel), some(&ramdisk)));
    assert_eq!(code(run(OTHER, theirs(ask(Some(&other), None)))), "InvalidAMIID.NotFound");
    assert_eq!(code(run(ACCOUNT, ask(Some(&ramdisk), None))), "InvalidAMIID.Malformed");
    assert_eq!(
        code(run(ACCOUNT, ask(None, Some(&"ari-0123456789abcdef0".to_owned())))),
        "InvalidAMIID.NotFound"
    );
    region.disable_image(ACCOUNT, &second, true).unwrap();
    assert_eq!(code(run(ACCOUNT, ask(None, Some(&second)))), "InvalidAMIID.Unavailable");
    region.disable_image(ACCOUNT, &second, false).unwrap();

    // It changes while it is stopped, and is as its image says again.
    let set = |id: &str, kind, value: Option<&String>| {
        region.modify_instance(ACCOUNT, id, &Attribute::Boots(kind, value.cloned()))
    };
    assert_eq!(code(set(&id, ImageKind::Kernel, Some(&other))), "IncorrectInstanceState");
    region.stop_instances(ACCOUNT, std::slice::from_ref(&id), true).unwrap();
    world.wait(&id, InstanceState::Stopped);
    assert_eq!(code(set(&id, ImageKind::Kernel, Some(&ramdisk))), "InvalidAMIID.Malformed");
    set(&id, ImageKind::Kernel, Some(&other)).unwrap();
    set(&id, ImageKind::Ramdisk, Some(&second)).unwrap();
    assert_eq!(boots(&world, &id), (some(&other), some(&second)));
    // One that is gone before it was ever started with it is said to be missing; one that it ran with it has still.
    Store::open(dir.path()).unwrap().remove("ramdisk two").unwrap();
    region.adopt_templates().unwrap();
    region.start_instances(ACCOUNT, std::slice::from_ref(&id)).unwrap();
    let stopped = world.wait(&id, InstanceState::Stopped);
    let why = stopped.reason.expect("a reason").message;
    assert!(why.contains(&second) && why.contains("import it again"), "{why}");
    for kind in [ImageKind::Kernel, ImageKind::Ramdisk] {
        set(&id, kind, None).unwrap();
    }
    assert_eq!(boots(&world, &id), (None, None), "what its own image says");
    let of = run(ACCOUNT, of_image(ask(None, None))).unwrap();
    world.wait(&of, InstanceState::Running);
    region.stop_instances(ACCOUNT, std::slice::from_ref(&of), true).unwrap();
    world.wait(&of, InstanceState::Stopped);
    for name in ["kernel one", "ramdisk one"] {
        Store::open(dir.path()).unwrap().remove(name).unwrap();
    }
    region.adopt_templates().unwrap();
    region.start_instances(ACCOUNT, std::slice::from_ref(&of)).unwrap();
    world.wait(&of, InstanceState::Running);
    assert_eq!(code(run(ACCOUNT, of_image(ask(None, None)))), "InvalidAMIID.NotFound", "the image's kernel");
}

#[test]
fn an_image_goes_only_where_its_kernel_is() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = add(dir.path(), ImageKind::Kernel, "mainline");
    let here = world(dir.path());
    let _reconciler = here.reconcile();
    let id = here.region.run_instances(ACCOUNT, &Launch { kernel: Some(kernel.clone()), ..here.launch(1) });
    let id = id.unwrap().remove(0).id;
    here.wait(&id, InstanceState::Running);
    let new = hutch_cloud::region::NewImage { instance: id, name: "own kernel".into(), ..Default::default() };
    let image = here.region.create_image(ACCOUNT, &new).unwrap();
    while here.region.get::<Image>(&image).unwrap().is_some_and(|image| image.pending) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let images = Store::open(dir.path()).unwrap();
    let there = |has: bool| {
        let host = Simulated::memory(Duration::ZERO);
        let host = if has { host.with_images(images.clone()) } else { host };
        let settings = Settings { name: "home-2".into(), ..settings() };
        world_of(settings, Arc::new(host), Sqlite::memory().unwrap())
    };
    let ask = hutch_cloud::region::ImageCopy { image, name: "copy".into(), ..Default::default() };
    assert_eq!(code(there(false).region.copy_image(ACCOUNT, &here.region, &ask)), "InvalidRequest");
    let with = there(true);
    let copy = with.region.copy_image(ACCOUNT, &here.region, &ask).unwrap();
    assert_eq!(with.region.get::<Image>(&copy).unwrap().unwrap().kernel, Some(kernel));
}
