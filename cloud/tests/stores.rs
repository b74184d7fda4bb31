//! Instance stores, as the type has them, on the simulated host.

mod common;

use common::{ACCOUNT, World, in_memory};
use hutch_cloud::model::{InstanceState, Volume};
use hutch_cloud::region::{Attribute, DeviceAsk, Launch};

fn run(world: &World, kind: &str, devices: Vec<DeviceAsk>) -> String {
    let launch = Launch { instance_type: kind.into(), devices, ..world.launch(1) };
    let id = world.region.run_instances(ACCOUNT, &launch).unwrap().remove(0).id;
    world.wait(&id, InstanceState::Running);
    id
}

fn ephemeral(name: &str, device: &str) -> DeviceAsk {
    DeviceAsk { name: device.into(), ephemeral: Some(name.into()), ..DeviceAsk::default() }
}

/// The sizes of what its machine has, and what it is told that they are called.
fn told(world: &World, id: &str) -> (Vec<u64>, Vec<(String, String)>) {
    let machine = world.host.told(id).unwrap();
    let mut names = machine.metadata.block_device_mapping;
    names.retain(|(name, _)| name.starts_with("ephemeral"));
    (machine.stores, names)
}

fn named(names: &[(&str, &str)]) -> Vec<(String, String)> {
    names.iter().map(|(name, device)| ((*name).into(), (*device).into())).collect()
}

#[test]
fn an_instance_has_its_types_stores_whatever_is_mapped() {
    let world = in_memory();
    let _reconciler = world.reconcile();
    let plain = run(&world, "t3.micro", vec![ephemeral("ephemeral0", "/dev/sdb")]);
    assert_eq!(told(&world, &plain), (vec![], vec![]));
    let one = run(&world, "m5d.large", vec![]);
    assert_eq!(told(&world, &one), (vec![75_000_000_000], named(&[("ephemeral0", "sdb")])));
    let two = run(&world, "m5d.4xlarge", vec![ephemeral("ephemeral1", "/dev/sdx")]);
    let names = named(&[("ephemeral0", "sdb"), ("ephemeral1", "sdx")]);
    assert_eq!(told(&world, &two), (vec![300_000_000_000; 2], names));
    // No volume is made for one.
    assert_eq!(world.region.all::<Volume>().unwrap().len(), 3);
    // They go with the type.
    world.region.stop_instances(ACCOUNT, std::slice::from_ref(&one), false).unwrap();
    world.wait(&one, InstanceState::Stopped);
    let change = Attribute::InstanceType("c5d.large".into());
    world.region.modify_instance(ACCOUNT, &one, &change).unwrap();
    world.region.start_instances(ACCOUNT, std::slice::from_ref(&one)).unwrap();
    world.wait(&one, InstanceState::Running);
    assert_eq!(told(&world, &one).0, [50_000_000_000]);
}
