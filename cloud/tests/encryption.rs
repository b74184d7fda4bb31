//! Which volumes are encrypted, and what comes of them, on the simulated host.

mod common;

use std::time::{Duration, Instant};

use common::{ACCOUNT, World, in_memory};
use hutch_cloud::fault::Fault;
use hutch_cloud::model::{Snapshot, Volume, VolumeState};
use hutch_cloud::region::{Encryption, NewVolume, SnapshotCopy};

fn eventually(what: &str, check: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !check() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn asked(encrypted: Option<bool>, key: Option<&str>) -> Encryption {
    Encryption { encrypted, key: key.map(str::to_owned) }
}

fn volume(world: &World, snapshot: Option<&str>, encryption: Encryption) -> Result<Volume, Fault> {
    let new = NewVolume {
        zone: "home-1a".into(),
        gib: Some(1),
        snapshot: snapshot.map(str::to_owned),
        encryption,
        ..NewVolume::default()
    };
    let made = world.region.create_volume(ACCOUNT, &new)?;
    eventually("it is made", || {
        world.region.get::<Volume>(&made.id).unwrap().is_some_and(|volume| volume.state == VolumeState::Ready)
    });
    Ok(made)
}

fn complete(world: &World, id: &str) -> Snapshot {
    let get = || world.region.get::<Snapshot>(id).unwrap().expect("the snapshot");
    eventually("it is complete", || get().complete);
    get()
}

fn copy(world: &World, snapshot: &str, encryption: Encryption) -> Result<Snapshot, Fault> {
    let ask = SnapshotCopy { snapshot: snapshot.into(), encryption, ..SnapshotCopy::default() };
    Ok(complete(world, &world.region.copy_snapshot(ACCOUNT, &world.region, &ask)?.id))
}

#[test]
fn what_comes_of_something_encrypted_is_encrypted() {
    let world = in_memory();
    let _reconciler = world.reconcile();
    let [key] = world.region.host().keys().try_into().unwrap();
    let (plain, yes) = (asked(None, None), asked(Some(true), None));
    let open = volume(&world, None, plain.clone()).unwrap();
    let secret = volume(&world, None, yes.clone()).unwrap();
    assert_eq!(
        (world.host.volume_key(&open.id), world.host.volume_key(&secret.id)),
        (None, Some(key.clone()))
    );
    let snapshot = |volume: &Volume| {
        let taken = world.region.create_snapshot(ACCOUNT, &volume.id, "", &Default::default()).unwrap();
        complete(&world, &taken.id)
    };
    let (of_open, of_secret) = (snapshot(&open), snapshot(&secret));
    assert_eq!((&of_open.key, of_secret.key.as_ref()), (&None, Some(&key)));
    // A volume of it, whatever is said; only what is plain may be either.
    assert_eq!(volume(&world, Some(&of_secret.id), plain.clone()).unwrap().key, Some(key.clone()));
    let refused = volume(&world, Some(&of_secret.id), asked(Some(false), None)).unwrap_err();
    assert_eq!(refused.code, "InvalidParameterValue");
    assert_eq!(volume(&world, Some(&of_open.id), plain.clone()).unwrap().key, None);
    assert_eq!(volume(&world, Some(&of_open.id), yes.clone()).unwrap().key, Some(key.clone()));
    // Copies encrypt, and do not decrypt.
    assert_eq!(copy(&world, &of_open.id, plain.clone()).unwrap().key, None);
    assert_eq!(copy(&world, &of_open.id, yes).unwrap().key, Some(key.clone()));
    assert_eq!(copy(&world, &of_secret.id, plain).unwrap().key, Some(key.clone()));
    let refused = copy(&world, &of_secret.id, asked(Some(false), None)).unwrap_err();
    assert_eq!(refused.code, "InvalidParameterValue");
    // Not for everyone.
    let public = world.region.modify_snapshot(ACCOUNT, &of_secret.id, |s| s.public = true).unwrap_err();
    assert_eq!(public.code, "OperationNotPermitted");
    world.region.modify_snapshot(ACCOUNT, &of_open.id, |s| s.public = true).unwrap();
}

#[test]
fn keys_are_named_in_ec2s_ways_or_refused() {
    let world = in_memory();
    let _reconciler = world.reconcile();
    let [key] = world.region.host().keys().try_into().unwrap();
    let arn = world.region.key_arn(ACCOUNT, &key);
    for named in [&key, &arn, "alias/aws/ebs", &format!("arn:aws:kms:home-1:{ACCOUNT}:alias/aws/ebs")] {
        assert_eq!(
            volume(&world, None, asked(Some(true), Some(named))).unwrap().key,
            Some(key.clone()),
            "{named}"
        );
    }
    let count = || world.region.all::<Volume>().unwrap().len();
    let had = count();
    let missing = volume(&world, None, asked(Some(true), Some("alias/mine"))).unwrap_err();
    let alone = volume(&world, None, asked(None, Some(&key))).unwrap_err();
    assert_eq!((&*missing.code, &*alone.code), ("InvalidKmsKey.NotFound", "InvalidParameterDependency"));
    assert_eq!(count(), had, "nothing was made");
    // By default, whatever is said.
    world.region.modify_account_settings(ACCOUNT, |settings| settings.encrypt = true).unwrap();
    for said in [None, Some(false)] {
        assert_eq!(volume(&world, None, asked(said, None)).unwrap().key, Some(key.clone()));
    }
    // The key of the default is gone: said before anything is made.
    let gone =
        |settings: &mut hutch_cloud::region::AccountSettings| settings.default_key = Some("gone".into());
    world.region.modify_account_settings(ACCOUNT, gone).unwrap();
    assert_eq!(volume(&world, None, asked(None, None)).unwrap_err().code, "InvalidKmsKey.NotFound");
}
