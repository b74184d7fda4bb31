//! An instance's life on the simulated host, and what is left of it.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{ACCOUNT, OTHER, in_directory, in_memory, settings, world_of};
use hutch_cloud::host::{End, Host, Simulated};
use hutch_cloud::model::{
    Address, AttachmentState, Image, Instance, InstanceState, Interface, Peer, Rule, Tags, Volume,
    VolumeState,
};
use hutch_cloud::region::{
    Algorithm, Attribute, DeviceAsk, ImageCopy, Launch, NewImage, NewVolume, Settings, SnapshotCopy,
};
use hutch_cloud::store::Sqlite;
use hutch_netfw::groups;

fn one(id: &str) -> Vec<String> {
    vec![id.to_owned()]
}

#[test]
fn an_instance_runs_stops_starts_and_goes() {
    let world = in_memory();
    let reconciler = world.reconcile();
    let id = &world.run(1)[0];
    let running = world.wait(id, InstanceState::Running);
    assert_eq!(world.host.machines().unwrap().len(), 1);
    assert_eq!(world.host.volumes(), [running.devices[0].volume.clone()]);

    world.region.stop_instances(ACCOUNT, &one(id), false).unwrap();
    let stopped = world.wait(id, InstanceState::Stopped);
    assert_eq!(stopped.reason.unwrap().code, "Client.UserInitiatedShutdown");
    assert!(world.host.machines().unwrap()[0].end.is_some());
    assert_eq!(world.host.volumes().len(), 1, "a stopped instance keeps its volume");
    assert_eq!(stopped.interfaces, running.interfaces, "and its address");

    world.region.modify_instance(ACCOUNT, id, &Attribute::InstanceType("t3.large".into())).unwrap();
    world.region.start_instances(ACCOUNT, &one(id)).unwrap();
    assert_eq!(world.wait(id, InstanceState::Running).run, 2);
    world.region.reboot_instances(ACCOUNT, &one(id)).unwrap();
    assert!(reconciler.quiet(std::time::Duration::from_secs(20)));
    assert!(world.host.starts(id) == (2, 1), "{:?}", world.host.starts(id));

    world.region.terminate_instances(ACCOUNT, &one(id)).unwrap();
    world.wait(id, InstanceState::Terminated);
    world.region.terminate_instances(ACCOUNT, &one(id)).unwrap();
    assert!(reconciler.quiet(std::time::Duration::from_secs(20)));
    assert_eq!(world.host.machines().unwrap(), []);
    assert_eq!(world.host.volumes(), [] as [String; 0]);
    assert_eq!(world.region.all::<Interface>().unwrap(), []);
    assert_eq!(world.region.all::<Address>().unwrap(), []);
    assert_eq!(world.region.all::<Volume>().unwrap(), []);
    assert_eq!(world.region.all::<Instance>().unwrap().len(), 1, "it is remembered");
}

#[test]
fn a_machine_is_told_what_changes_while_it_runs() {
    let world = in_memory();
    let reconciler = world.reconcile();
    let id = &world.run(1)[0];
    let instance = world.wait(id, InstanceState::Running);
    // The rules of its groups that name addresses, and the members of all of them.
    let told = || {
        assert!(reconciler.quiet(std::time::Duration::from_secs(20)));
        let own = &world.host.told(id).unwrap().interfaces[0].groups;
        let mut groups = world.host.groups();
        groups.retain(|group| own.contains(&group.id.to_string()));
        let rules = groups.iter().flat_map(|group| &group.rules).filter(|rule| !rule.egress);
        let rules = rules.filter(|rule| matches!(rule.peer, groups::Peer::Net(_)));
        let members = groups.iter().flat_map(|group| group.members.iter().copied());
        (rules.map(|rule| rule.protocol).collect::<Vec<_>>(), members.collect::<Vec<_>>())
    };
    let interface = world.region.get::<Interface>(&instance.interfaces[0]).unwrap().unwrap();
    let everyone = Peer::Ipv4("0.0.0.0/0".parse().unwrap());
    let rule =
        Rule { egress: false, protocol: "tcp".into(), from: 80, to: 90, peer: everyone, description: None };
    let group = &interface.groups[0];
    world.region.authorize(ACCOUNT, group, std::slice::from_ref(&rule), &Tags::new()).unwrap();
    let ip = std::net::IpAddr::V4(interface.ip);
    assert_eq!(told(), (vec![groups::Protocol::Tcp(80, 90)], vec![ip]));
    world.region.revoke(ACCOUNT, group, false, &[rule], &[]).unwrap();
    assert_eq!(told(), (vec![], vec![ip]));
    // The default group names itself: who comes is one of it, who goes is not.
    let other = &world.run(1)[0];
    let other = world.wait(other, InstanceState::Running);
    let second = world.region.get::<Interface>(&other.interfaces[0]).unwrap().unwrap();
    assert_eq!(told().1, [ip, std::net::IpAddr::V4(second.ip)]);
    world.region.terminate_instances(ACCOUNT, &one(&other.id)).unwrap();
    world.wait(&other.id, InstanceState::Terminated);
    assert_eq!(told().1, [ip]);
}

#[test]
fn what_ran_when_the_host_went_down_starts_again_where_that_is_asked_for() {
    for resume in [false, true] {
        let host = Arc::new(Simulated::memory(Duration::ZERO));
        let settings = Settings { resume, ..settings() };
        let world = world_of(settings, host, Sqlite::memory().unwrap());
        let _reconciler = world.reconcile();
        let id = &world.run(1)[0];
        world.wait(id, InstanceState::Running);
        world.host.end(id, End::HostDown).unwrap();
        if resume {
            let until = std::time::Instant::now() + Duration::from_secs(20);
            while world.host.starts(id).0 < 2 || world.instance(id).state != InstanceState::Running {
                assert!(std::time::Instant::now() < until, "it is not started again");
                std::thread::sleep(Duration::from_millis(5));
            }
        } else {
            let stopped = world.wait(id, InstanceState::Stopped);
            assert!(stopped.reason.unwrap().message.contains("the host went down"));
            assert_eq!(world.host.starts(id).0, 1);
        }
    }
}

#[test]
fn each_state_allows_what_ec2_allows() {
    let world = in_memory();
    let id = &world.run(1)[0];
    let code = |result: Result<Vec<_>, hutch_cloud::fault::Fault>| {
        result.map_err(|fault| fault.code.into_owned()).map(drop)
    };
    let wrong = Err("IncorrectInstanceState".to_owned());
    let region = &world.region;
    // pending: nobody reconciles
    assert_eq!(code(region.start_instances(ACCOUNT, &one(id))), Ok(()));
    assert_eq!(code(region.stop_instances(ACCOUNT, &one(id), false)), wrong);
    assert_eq!(region.reboot_instances(ACCOUNT, &one(id)).unwrap_err().code, "IncorrectInstanceState");
    let new = NewImage { instance: id.clone(), name: "image".into(), ..NewImage::default() };
    assert_eq!(region.create_image(ACCOUNT, &new).unwrap_err().code, "IncorrectState");
    assert_eq!(code(region.stop_instances(OTHER, &one(id), false)), Err("InvalidInstanceID.NotFound".into()));
    assert_eq!(
        code(region.stop_instances(ACCOUNT, &one("i-x"), false)),
        Err("InvalidInstanceID.Malformed".into())
    );
    // stopping
    let reconciler = world.reconcile();
    world.wait(id, InstanceState::Running);
    let kind = Attribute::InstanceType("t3.large".into());
    assert_eq!(region.modify_instance(ACCOUNT, id, &kind).unwrap_err().code, "IncorrectInstanceState");
    drop(reconciler);
    region.stop_instances(ACCOUNT, &one(id), false).unwrap();
    assert_eq!(code(region.start_instances(ACCOUNT, &one(id))), wrong);
    assert_eq!(code(region.stop_instances(ACCOUNT, &one(id), false)), Ok(()));
    // one that cannot leaves the other as it is
    let two = [world.run(1)[0].clone(), id.clone()];
    let before = world.instance(&two[1]);
    assert_eq!(code(region.stop_instances(ACCOUNT, &two, false)), wrong);
    assert_eq!(world.instance(&two[1]), before);
    // protected
    region.modify_instance(ACCOUNT, id, &Attribute::TerminationProtection(true)).unwrap();
    assert_eq!(code(region.terminate_instances(ACCOUNT, &one(id))), Err("OperationNotPermitted".into()));
    region.modify_instance(ACCOUNT, id, &Attribute::TerminationProtection(false)).unwrap();
    // shutting down
    region.terminate_instances(ACCOUNT, &one(id)).unwrap();
    assert_eq!(code(region.start_instances(ACCOUNT, &one(id))), wrong);
    assert_eq!(code(region.terminate_instances(ACCOUNT, &one(id))), Ok(()));
}

#[test]
fn what_ends_by_itself_is_noticed() {
    let world = in_memory();
    let _reconciler = world.reconcile();
    let ids = world.run(3);
    for id in &ids {
        world.wait(id, InstanceState::Running);
    }
    world.region.modify_instance(ACCOUNT, &ids[1], &Attribute::ShutdownTerminates(true)).unwrap();
    world.host.end(&ids[0], End::PowerOff).unwrap();
    world.host.end(&ids[1], End::PowerOff).unwrap();
    world.host.end(&ids[2], End::Failed("the kernel panicked".into())).unwrap();
    let stopped = world.wait(&ids[0], InstanceState::Stopped);
    assert_eq!(stopped.reason.unwrap().code, "Client.InstanceInitiatedShutdown");
    world.wait(&ids[1], InstanceState::Terminated);
    let failed = world.wait(&ids[2], InstanceState::Stopped);
    assert!(failed.reason.unwrap().message.contains("panicked"));
}

#[test]
fn a_launch_is_checked_whole() {
    let world = in_memory();
    let region = &world.region;
    let revision = |w: &common::World| {
        w.region.ensure_account(ACCOUNT).unwrap();
        w.region.store().revision().unwrap()
    };
    let before = revision(&world);
    let device = |name: &str, ask: DeviceAsk| vec![DeviceAsk { name: name.into(), ..ask }];
    let good = world.launch(1);
    for (code, launch) in [
        ("InvalidAMIID.Malformed", {
            let mut l = good.clone();
            l.image = "x".into();
            l
        }),
        ("InvalidAMIID.NotFound", {
            let mut l = good.clone();
            l.image = "ami-12345678".into();
            l
        }),
        ("InvalidParameterValue", {
            let mut l = good.clone();
            l.instance_type = "t3.huge".into();
            l
        }),
        ("InvalidParameterValue", {
            let mut l = good.clone();
            l.min = 2;
            l
        }),
        ("InvalidParameterValue", {
            let mut l = good.clone();
            l.min = 0;
            l
        }),
        ("InstanceLimitExceeded", {
            let mut l = good.clone();
            l.max = 1001;
            l
        }),
        ("InvalidKeyPair.NotFound", {
            let mut l = good.clone();
            l.key_name = Some("none".into());
            l
        }),
        ("InvalidGroup.NotFound", {
            let mut l = good.clone();
            l.groups = vec!["sg-12345678".into()];
            l
        }),
        ("InvalidGroup.NotFound", {
            let mut l = good.clone();
            l.group_names = vec!["none".into()];
            l
        }),
        ("InvalidSubnetID.NotFound", {
            let mut l = good.clone();
            l.subnet = Some("subnet-12345678".into());
            l
        }),
        ("InvalidParameterValue", {
            let mut l = good.clone();
            l.zone = Some("home-1z".into());
            l
        }),
        ("InvalidParameterValue", {
            let mut l = good.clone();
            l.user_data = Some(vec![0; 16385]);
            l
        }),
        ("InvalidParameterValue", {
            let mut l = good.clone();
            l.private_ip = Some([10, 0, 0, 1].into());
            l
        }),
        ("InvalidParameterValue", {
            let mut l = good.clone();
            l.tags = [("instance".into(), [("aws:x".into(), String::new())].into())].into();
            l
        }),
        ("InvalidBlockDeviceMapping", {
            let mut l = good.clone();
            l.devices = device("/dev/xvda", DeviceAsk { gib: Some(1), ..DeviceAsk::default() });
            l
        }),
        ("InvalidBlockDeviceMapping", {
            let mut l = good.clone();
            l.devices = device("/dev/xvda", DeviceAsk { none: true, ..DeviceAsk::default() });
            l
        }),
        ("InvalidBlockDeviceMapping", {
            let mut l = good.clone();
            l.devices = device("/dev/sdb", DeviceAsk { ephemeral: Some("x".into()), ..DeviceAsk::default() });
            l
        }),
        ("MissingParameter", {
            let mut l = good.clone();
            l.devices = device("/dev/sdb", DeviceAsk::default());
            l
        }),
        ("InvalidSnapshot.NotFound", {
            let mut l = good.clone();
            l.devices = device(
                "/dev/sdb",
                DeviceAsk { snapshot: Some("snap-12345678".into()), ..DeviceAsk::default() },
            );
            l
        }),
    ] {
        let fault = region.run_instances(ACCOUNT, &launch).unwrap_err();
        assert_eq!(fault.code, code, "{fault}");
        assert_eq!(revision(&world), before, "{fault}: something was written");
    }
    let mut whole = good;
    whole.devices = device(
        "/dev/sdf",
        DeviceAsk {
            gib: Some(3),
            kind: Some("gp3".into()),
            delete_on_termination: Some(false),
            ..DeviceAsk::default()
        },
    );
    whole.private_ip = Some([172, 31, 0, 77].into());
    let made = region.run_instances(ACCOUNT, &whole).unwrap();
    assert_eq!(made[0].devices.len(), 2);
    assert_eq!(
        region.get::<Interface>(&made[0].interfaces[0]).unwrap().unwrap().ip.to_string(),
        "172.31.0.77"
    );
    assert_eq!(region.run_instances(ACCOUNT, &whole).unwrap_err().code, "InvalidIPAddress.InUse");
}

#[test]
fn a_client_token_makes_one_launch_of_many_calls() {
    let world = in_memory();
    let mut launch = world.launch(2);
    launch.client_token = Some("once".into());
    let first = world.region.run_instances(ACCOUNT, &launch).unwrap();
    let again = world.region.run_instances(ACCOUNT, &launch).unwrap();
    assert_eq!(first, again);
    launch.request = "another".into();
    let fault = world.region.run_instances(ACCOUNT, &launch).unwrap_err();
    assert_eq!(fault.code, "IdempotentParameterMismatch");
    assert_eq!(world.region.all::<Instance>().unwrap().len(), 2);
}

#[test]
fn volumes_come_and_go_while_an_instance_runs() {
    let world = in_memory();
    let reconciler = world.reconcile();
    let quiet = || assert!(reconciler.quiet(std::time::Duration::from_secs(20)));
    let id = world.region.run_instances(ACCOUNT, &world.launch(1)).unwrap()[0].id.clone();
    let root = world.wait(&id, InstanceState::Running).devices[0].volume.clone();
    let new = NewVolume { zone: "home-1a".into(), gib: Some(2), ..NewVolume::default() };
    let data = world.region.create_volume(ACCOUNT, &new).unwrap().id;
    quiet();
    let attach = || world.region.attach_volume(ACCOUNT, &data, &id, "/dev/sdg");
    let detach = |volume: &str| {
        world.region.detach_volume(ACCOUNT, volume, Some(&id), None, false).map(|(_, was)| was)
    };
    let instance = || world.region.get::<Instance>(&id).unwrap().unwrap();
    assert_eq!(attach().unwrap().state, AttachmentState::Attaching);
    quiet();
    assert_eq!(instance().devices[1].state, AttachmentState::Attached);
    assert_eq!(world.host.told(&id).unwrap().volumes, [root.clone(), data.clone()]);
    assert_eq!(detach(&root).unwrap_err().code, "OperationNotPermitted");
    assert_eq!(world.region.delete_volume(ACCOUNT, &data).unwrap_err().code, "VolumeInUse");
    assert_eq!(detach(&data).unwrap().state, AttachmentState::Detaching);
    quiet();
    assert_eq!((instance().devices.len(), world.host.told(&id).unwrap().volumes), (1, vec![root]));
    assert_eq!(world.region.get::<Volume>(&data).unwrap().unwrap().instance, None);
    assert_eq!(detach(&data).unwrap_err().code, "IncorrectState");

    // What was on its way when the instance stopped is there, or gone, then.
    drop(reconciler);
    attach().unwrap();
    world.region.stop_instances(ACCOUNT, &one(&id), true).unwrap();
    let reconciler = world.reconcile();
    world.wait(&id, InstanceState::Stopped);
    assert_eq!(instance().devices[1].state, AttachmentState::Attached);
    world.region.start_instances(ACCOUNT, &one(&id)).unwrap();
    world.wait(&id, InstanceState::Running);
    drop(reconciler);
    detach(&data).unwrap();
    world.region.stop_instances(ACCOUNT, &one(&id), true).unwrap();
    let _reconciler = world.reconcile();
    world.wait(&id, InstanceState::Stopped);
    assert_eq!(instance().devices.len(), 1);
    assert_eq!(world.region.get::<Volume>(&data).unwrap().unwrap().instance, None);

    // As many as the largest of EC2's types have, the interface among them, here and from the start.
    let more = (1..).find_map(|n| {
        let volume = world.region.create_volume(ACCOUNT, &new).unwrap().id;
        while world.region.get::<Volume>(&volume).unwrap().unwrap().state != VolumeState::Ready {
            std::thread::yield_now();
        }
        let attached = world.region.attach_volume(ACCOUNT, &volume, &id, &format!("/dev/sd{n}"));
        attached.err().map(|fault| (n, fault.code))
    });
    assert_eq!(more.unwrap(), (127, "AttachmentLimitExceeded".into()));
    let with = |count: usize| {
        let device = |n| DeviceAsk { name: format!("/dev/sd{n}"), gib: Some(1), ..DeviceAsk::default() };
        let devices = (0..count).map(device).collect();
        world.region.run_instances(ACCOUNT, &Launch { devices, ..world.launch(1) })
    };
    assert_eq!(with(127).unwrap_err().code, "AttachmentLimitExceeded");
    assert_eq!(with(126).unwrap()[0].devices.len(), 127);
}

#[test]
fn volumes_go_and_stay_as_they_are_told() {
    let world = in_memory();
    let reconciler = world.reconcile();
    let mut launch = world.launch(1);
    launch.devices = vec![DeviceAsk {
        name: "/dev/sdf".into(),
        gib: Some(1),
        delete_on_termination: Some(false),
        ..DeviceAsk::default()
    }];
    let id = world.region.run_instances(ACCOUNT, &launch).unwrap()[0].id.clone();
    let instance = world.wait(&id, InstanceState::Running);
    let (root, data) = (instance.devices[0].volume.clone(), instance.devices[1].volume.clone());
    let fault = world.region.delete_volume(ACCOUNT, &data).unwrap_err();
    assert_eq!(fault.code, "VolumeInUse");
    world.region.stop_instances(ACCOUNT, &one(&id), true).unwrap();
    world.wait(&id, InstanceState::Stopped);
    let new = NewVolume { zone: "home-1a".into(), gib: Some(2), ..NewVolume::default() };
    let third = world.region.create_volume(ACCOUNT, &new).unwrap().id;
    assert!(reconciler.quiet(std::time::Duration::from_secs(20)));
    world.region.attach_volume(ACCOUNT, &third, &id, "/dev/sdg").unwrap();
    let fault = world.region.attach_volume(ACCOUNT, &third, &id, "/dev/sdh").unwrap_err();
    assert_eq!(fault.code, "VolumeInUse");
    world.region.detach_volume(ACCOUNT, &data, Some(&id), None, false).unwrap();
    let elsewhere = NewVolume { zone: "home-1b".into(), gib: Some(2), ..NewVolume::default() };
    let elsewhere = world.region.create_volume(ACCOUNT, &elsewhere).unwrap().id;
    assert!(reconciler.quiet(std::time::Duration::from_secs(20)));
    let fault = world.region.attach_volume(ACCOUNT, &elsewhere, &id, "/dev/sdi").unwrap_err();
    assert_eq!(fault.code, "InvalidVolume.ZoneMismatch");
    world.region.terminate_instances(ACCOUNT, &one(&id)).unwrap();
    world.wait(&id, InstanceState::Terminated);
    assert!(reconciler.quiet(std::time::Duration::from_secs(20)));
    let volumes = world.host.volumes();
    assert!(!volumes.contains(&root) && volumes.contains(&data) && volumes.contains(&third), "{volumes:?}");
    let volume = world.region.get::<Volume>(&third).unwrap().unwrap();
    assert_eq!((volume.state, volume.instance), (VolumeState::Ready, None));
}

#[test]
fn an_image_of_an_instance_is_launched_again() {
    let world = in_memory();
    let reconciler = world.reconcile();
    let id = world.run(1)[0].clone();
    world.wait(&id, InstanceState::Running);
    let new = NewImage { instance: id, name: "mine".into(), ..NewImage::default() };
    let image = world.region.create_image(ACCOUNT, &new).unwrap();
    assert_eq!(world.region.create_image(ACCOUNT, &new).unwrap_err().code, "InvalidAMIName.Duplicate");
    let mut launch = world.launch(1);
    launch.image = image.clone();
    assert!(reconciler.quiet(std::time::Duration::from_secs(20)));
    assert_eq!(world.region.run_instances(OTHER, &launch).unwrap_err().code, "InvalidAMIID.NotFound");
    let again = world.region.run_instances(ACCOUNT, &launch).unwrap()[0].clone();
    world.wait(&again.id, InstanceState::Running);
    let snapshot = world.region.get::<Volume>(&again.devices[0].volume).unwrap().unwrap().snapshot.unwrap();
    assert_eq!(world.region.delete_snapshot(ACCOUNT, &snapshot).unwrap_err().code, "InvalidSnapshot.InUse");
    world.region.deregister_image(ACCOUNT, &image).unwrap();
    world.region.delete_snapshot(ACCOUNT, &snapshot).unwrap();
    assert!(reconciler.quiet(std::time::Duration::from_secs(20)));
    assert_eq!(world.instance(&again.id).state, InstanceState::Running, "instances outlive their image");
}

#[test]
fn copies_are_for_whom_their_originals_are() {
    let world = in_memory();
    let region = &world.region;
    let reconciler = world.reconcile();
    let quiet = || assert!(reconciler.quiet(std::time::Duration::from_secs(20)));
    let id = world.run(1)[0].clone();
    let instance = world.wait(&id, InstanceState::Running);
    let new = NewImage { instance: id, name: "mine".into(), ..NewImage::default() };
    let image = region.create_image(ACCOUNT, &new).unwrap();
    let copy = |name: &str| ImageCopy { image: image.clone(), name: name.into(), ..ImageCopy::default() };
    quiet();
    // Who may launch an image may copy it where its snapshot is shared too.
    assert_eq!(region.copy_image(OTHER, region, &copy("first")).unwrap_err().code, "InvalidAMIID.NotFound");
    let share = |image: &mut Image| {
        image.launch.push(OTHER.into());
        Ok(())
    };
    region.modify_image(ACCOUNT, &image, share).unwrap();
    assert_eq!(region.copy_image(OTHER, region, &copy("first")).unwrap_err().code, "InvalidRequest");
    let snapshot = region.get::<Image>(&image).unwrap().unwrap().devices[0].snapshot.clone().unwrap();
    let alone = SnapshotCopy { snapshot: snapshot.clone(), ..SnapshotCopy::default() };
    assert_eq!(region.copy_snapshot(OTHER, region, &alone).unwrap_err().code, "InvalidSnapshot.NotFound");
    region.modify_snapshot(ACCOUNT, &snapshot, |snapshot| snapshot.shared.push(OTHER.into())).unwrap();
    let theirs = region.copy_image(OTHER, region, &copy("first")).unwrap();
    region.copy_snapshot(OTHER, region, &alone).unwrap();
    let same = ImageCopy { client_token: Some("t".into()), ..copy("second") };
    let again = region.copy_image(OTHER, region, &same).unwrap();
    assert_eq!(region.copy_image(OTHER, region, &same).unwrap(), again);
    assert_eq!(
        region.copy_image(OTHER, region, &copy("first")).unwrap_err().code,
        "InvalidAMIName.Duplicate"
    );
    quiet();
    // It is its owner's alone, and needs nothing of the original.
    region.deregister_image(ACCOUNT, &image).unwrap();
    assert_eq!(region.copy_image(OTHER, region, &same).unwrap(), again);
    region.delete_snapshot(ACCOUNT, &snapshot).unwrap();
    quiet();
    let copied = region.get::<Image>(&theirs).unwrap().unwrap();
    assert_eq!((copied.account.as_str(), copied.launch.len(), copied.failed), (OTHER, 0, None));
    let mut launch = world.launch(1);
    launch.image = theirs;
    assert_eq!(region.run_instances(ACCOUNT, &launch).unwrap_err().code, "InvalidAMIID.NotFound");
    let made = region.run_instances(OTHER, &launch).unwrap()[0].clone();
    world.wait(&made.id, InstanceState::Running);
    assert_eq!(made.devices.len(), instance.devices.len());
}

#[test]
fn a_daemon_that_comes_back_carries_on() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = {
        let world = in_directory(dir.path());
        let ids = world.run(2);
        let reconciler = world.reconcile();
        world.wait(&ids[0], InstanceState::Running);
        drop(reconciler);
        // Asked for, and not done.
        let _ = world.region.stop_instances(ACCOUNT, &ids[..1], false);
        (ids[0].clone(), ids[1].clone())
    };
    let world = in_directory(dir.path());
    let _reconciler = world.reconcile();
    world.wait(&first, InstanceState::Stopped);
    world.wait(&second, InstanceState::Running);
    assert_eq!((world.host.starts(&first).0, world.host.starts(&second).0), (1, 1), "nothing is done twice");
}

#[test]
fn key_pairs_have_ec2s_fingerprints() {
    let world = in_memory();
    let region = &world.region;
    for (algorithm, begin) in [
        (Algorithm::Rsa, "-----BEGIN RSA PRIVATE KEY-----"),
        (Algorithm::Ed25519, "-----BEGIN OPENSSH PRIVATE KEY-----"),
    ] {
        let name = format!("{algorithm:?}");
        let made = region.create_key(ACCOUNT, &name, algorithm, &Default::default()).unwrap();
        assert!(made.material.starts_with(begin));
        assert!(!serde_json::to_string(&made.pair).unwrap().contains("PRIVATE"));
        let fault = region.create_key(ACCOUNT, &name, algorithm, &Default::default()).map(drop).unwrap_err();
        assert_eq!(fault.code, "InvalidKeyPair.Duplicate");
        // ssh-keygen is another's implementation of it all.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, &made.material).unwrap();
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        let out = std::process::Command::new("ssh-keygen").arg("-yf").arg(&path).output().unwrap();
        let public = String::from_utf8(out.stdout).unwrap();
        let words = |line: &str| line.split(' ').take(2).map(|w| w.trim().to_owned()).collect::<Vec<_>>();
        assert_eq!(words(&public), words(&made.pair.public));
        let imported =
            region.import_key(ACCOUNT, &format!("{name}-again"), public.as_bytes(), &Default::default());
        let imported = imported.unwrap();
        if algorithm == Algorithm::Ed25519 {
            assert_eq!(imported.fingerprint, made.pair.fingerprint);
        } else {
            assert_eq!((made.pair.fingerprint.len(), imported.fingerprint.len()), (59, 47), "SHA-1 and MD5");
        }
    }
    for bad in ["", "ssh-rsa AAAA", "hello", "ssh-dss AAAAB3NzaC1kc3MAAACB"] {
        let fault = region.import_key(ACCOUNT, "bad", bad.as_bytes(), &Default::default()).unwrap_err();
        assert_eq!(fault.code, "InvalidKey.Format", "{bad}");
    }
}
