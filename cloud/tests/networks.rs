//! Networks beside the default one: what of them is true on which host.

mod common;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use common::{ACCOUNT, OTHER, World, in_memory, settings, world_of};
use hutch_cloud::host::Simulated;
use hutch_cloud::model::{Gateway, Group, InstanceState, Interface, RouteTable, Subnet, Tags, Target, Vpc};
use hutch_cloud::region::{InterfaceAttribute, Launch, NewInterface, NewSubnet, Region, RouteChange};
use hutch_cloud::store::{Sqlite, Store, Transaction};

fn vpc(region: &Region, account: &str, cidr: &str) -> Vpc {
    region.create_vpc(account, cidr.parse().unwrap(), &Tags::new()).unwrap()
}

fn subnet(region: &Region, vpc: &Vpc, cidr: &str) -> Subnet {
    let ask = NewSubnet { vpc: vpc.id.clone(), cidr: cidr.parse().unwrap(), zone: None, tags: Tags::new() };
    region.create_subnet(&vpc.account, &ask).unwrap()
}

fn interface(region: &Region, subnet: &Subnet, ip: Option<Ipv4Addr>) -> Result<Interface, String> {
    let new = NewInterface { subnet: subnet.id.clone(), private_ip: ip, ..NewInterface::default() };
    region.create_interface(&subnet.account, &new).map_err(|fault| fault.code.into_owned())
}

fn limited() -> World {
    let host = Simulated::memory(Duration::ZERO).with_default_networks_only();
    world_of(settings(), Arc::new(host), Sqlite::memory().unwrap())
}

#[test]
fn a_host_with_default_networks_only_pretends_nothing() {
    let world = limited();
    let region = &world.region;
    let own = vpc(region, ACCOUNT, "10.0.0.0/16");
    let inside = subnet(region, &own, "10.0.1.0/24");
    let launch = |subnet: &Subnet| {
        let launch = Launch { subnet: Some(subnet.id.clone()), ..world.launch(1) };
        region.run_instances(ACCOUNT, &launch).map_err(|fault| fault.code.into_owned())
    };
    assert_eq!(launch(&inside).unwrap_err(), "Unsupported");
    // A subnet of one's own in the default network is as good as any.
    let default: Vpc = region.get(&region.default_vpc(ACCOUNT)).unwrap().unwrap();
    let small = subnet(region, &default, "172.31.200.0/28");
    let made = launch(&small).unwrap();
    let mine: Interface = region.get(&made[0].interfaces[0]).unwrap().unwrap();
    assert!(small.cidr.contains(&mine.ip), "{}", mine.ip);
    // And so is an interface that was made before; but only one.
    let first = interface(region, &small, None).unwrap();
    let launch = Launch { interface: Some(first.id.clone()), ..world.launch(1) };
    let instance = region.run_instances(ACCOUNT, &launch).unwrap()[0].clone();
    assert_eq!(instance.interfaces, [first.id]);
    let second = interface(region, &small, None).unwrap();
    let code = |result: Result<(), hutch_cloud::fault::Fault>| result.unwrap_err().code.into_owned();
    let attached = region.attach_interface(ACCOUNT, &second.id, &instance.id, 1).map(drop);
    assert_eq!(code(attached), "UnsupportedOperation");
    // Guests reach what the host reaches: routes cannot say otherwise.
    let tables = region.all::<RouteTable>().unwrap();
    let table = tables.iter().find(|table| table.vpc == default.id).unwrap();
    let gateway = region.all::<Gateway>().unwrap().into_iter().find(|g| g.vpc.is_some()).unwrap();
    let everywhere = "0.0.0.0/0".parse().unwrap();
    let associated = region.create_route_table(ACCOUNT, &default.id, &Tags::new(), (None, "")).unwrap();
    for refused in [
        region.detach_gateway(ACCOUNT, &gateway.id, &default.id),
        region.delete_route(ACCOUNT, &table.id, everywhere),
        region.route(
            ACCOUNT,
            &table.id,
            "10.0.0.0/8".parse().unwrap(),
            &Target::Interface(second.id.clone()),
            RouteChange::Create,
        ),
        region.associate_route_table(ACCOUNT, &associated.id, &small.id).map(drop),
    ] {
        assert_eq!(code(refused), "UnsupportedOperation");
    }
    // In a network where nothing runs they are what its owner writes down.
    let igw = region.create_gateway(ACCOUNT, &Tags::new()).unwrap().id;
    region.attach_gateway(ACCOUNT, &igw, &own.id).unwrap();
    let table = region.create_route_table(ACCOUNT, &own.id, &Tags::new(), (None, "")).unwrap();
    region.route(ACCOUNT, &table.id, everywhere, &Target::Gateway(igw.clone()), RouteChange::Create).unwrap();
    region.associate_route_table(ACCOUNT, &table.id, &inside.id).unwrap();
    region.detach_gateway(ACCOUNT, &igw, &own.id).unwrap();
}

#[test]
fn each_network_has_its_own_addresses_and_the_default_ones_share_theirs() {
    let world = in_memory();
    let region = &world.region;
    let [a, b] = [ACCOUNT, OTHER].map(|account| vpc(region, account, "10.0.0.0/16"));
    let [a, b] = [&a, &b].map(|vpc| subnet(region, vpc, "10.0.0.0/28"));
    let ip = Some(Ipv4Addr::new(10, 0, 0, 5));
    let one = interface(region, &a, ip).unwrap();
    let other = interface(region, &b, ip).unwrap();
    assert_ne!(one.mac, other.mac);
    assert_eq!(interface(region, &a, ip).unwrap_err(), "InvalidIPAddress.InUse");
    region.delete_interface(ACCOUNT, &one.id).unwrap();
    assert_eq!(interface(region, &b, ip).unwrap_err(), "InvalidIPAddress.InUse");
    // Sixteen addresses, of which EC2 keeps five.
    for _ in 0..11 {
        interface(region, &a, None).unwrap();
    }
    assert_eq!(interface(region, &a, None).unwrap_err(), "InsufficientFreeAddressesInSubnet");
    let default = |account| {
        region.ensure_account(account).unwrap();
        let all = region.all::<Subnet>().unwrap();
        all.into_iter().find(|subnet| subnet.account == account && subnet.default).unwrap()
    };
    let ip = Some(Ipv4Addr::new(172, 31, default(ACCOUNT).cidr.network().octets()[2], 9));
    assert_eq!(default(ACCOUNT).cidr, default(OTHER).cidr);
    interface(region, &default(ACCOUNT), ip).unwrap();
    assert_eq!(interface(region, &default(OTHER), ip).unwrap_err(), "InvalidIPAddress.InUse");
}

#[test]
fn interfaces_come_and_go_while_an_instance_is_stopped() {
    let world = in_memory();
    let region = &world.region;
    let _reconciler = world.reconcile();
    let own = vpc(region, ACCOUNT, "10.0.0.0/16");
    let inside = subnet(region, &own, "10.0.1.0/24");
    let first = interface(region, &inside, None).unwrap();
    let launch = Launch { interface: Some(first.id.clone()), ..world.launch(1) };
    let id = region.run_instances(ACCOUNT, &launch).unwrap()[0].id.clone();
    world.wait(&id, InstanceState::Running);
    let more: Vec<_> = (0..2).map(|_| interface(region, &inside, None).unwrap().id).collect();
    let attach = |interface: &str, index| {
        region.attach_interface(ACCOUNT, interface, &id, index).map_err(|fault| fault.code.into_owned())
    };
    assert_eq!(attach(&more[0], 1).unwrap_err(), "UnsupportedOperation");
    region.stop_instances(ACCOUNT, std::slice::from_ref(&id), false).unwrap();
    world.wait(&id, InstanceState::Stopped);
    // In the order of their numbers, whatever the order they come in.
    let last = attach(&more[1], 5).unwrap();
    attach(&more[0], 2).unwrap();
    assert_eq!(world.instance(&id).interfaces, [first.id.clone(), more[0].clone(), more[1].clone()]);
    assert_eq!(attach(&more[0], 3).unwrap_err(), "InvalidNetworkInterface.InUse");
    region.start_instances(ACCOUNT, std::slice::from_ref(&id)).unwrap();
    world.wait(&id, InstanceState::Running);
    assert_eq!(world.host.told(&id).unwrap().interfaces.len(), 3);
    let detach = |id: &str| region.detach_interface(ACCOUNT, id).map_err(|fault| fault.code.into_owned());
    assert_eq!(detach(&last).unwrap_err(), "UnsupportedOperation");
    let goes = InterfaceAttribute::DeleteOnTermination(last.clone(), true);
    region.modify_interface(ACCOUNT, &more[1], &goes).unwrap();
    let check = InterfaceAttribute::SourceDestCheck(false);
    region.modify_interface(ACCOUNT, &first.id, &check).unwrap();
    assert!(!world.instance(&id).source_dest_check);
    region.terminate_instances(ACCOUNT, std::slice::from_ref(&id)).unwrap();
    world.wait(&id, InstanceState::Terminated);
    // What was made before stays, but for what was told to go.
    let mut left: Vec<_> = region.all::<Interface>().unwrap().into_iter().map(|e| e.id).collect();
    left.sort();
    let mut stays = vec![first.id, more[0].clone()];
    stays.sort();
    assert_eq!(left, stays);
}

#[test]
fn a_network_from_before_routes_were_records_gets_those_it_told() {
    let store = Sqlite::memory().unwrap();
    let region = in_memory().region;
    let id = region.default_vpc(ACCOUNT);
    let parts = serde_json::json!({
        "dhcp_options": region.dhcp_options(ACCOUNT), "network_acl": "acl-00000000000000001",
        "route_table": "rtb-00000000000000002", "route_table_association": "rtbassoc-00000000000000003",
        "internet_gateway": "igw-00000000000000004", "cidr_association": "vpc-cidr-assoc-00000000000000005",
    });
    let old = serde_json::json!({
        "id": id, "account": ACCOUNT, "cidr": "172.31.0.0/16", "default": true, "parts": parts, "tags": {"kept": "yes"},
    });
    let key = format!("vpc/{id}");
    store.commit(&Transaction::new().put(key, old.to_string().into_bytes())).unwrap();
    let world = world_of(settings(), Arc::new(Simulated::memory(Duration::ZERO)), store);
    let region = &world.region;
    region.ensure_account(ACCOUNT).unwrap();
    let vpc: Vpc = region.get(&id).unwrap().unwrap();
    assert_eq!((vpc.tags["kept"].as_str(), vpc.dns_hostnames), ("yes", true));
    let tables = region.all::<RouteTable>().unwrap();
    let gateways = region.all::<Gateway>().unwrap();
    assert_eq!((tables.len(), gateways.len()), (1, 1));
    assert!(tables[0].is_main() && tables[0].vpc == id && gateways[0].vpc.as_ref() == Some(&id));
    // Its subnets and its group were there: they are not made again.
    assert!(region.all::<Subnet>().unwrap().is_empty() && region.all::<Group>().unwrap().is_empty());
    // And once it is deleted, it is not there because somebody looks.
    region.detach_gateway(ACCOUNT, &gateways[0].id, &id).unwrap();
    region.delete_vpc(ACCOUNT, &id).unwrap();
    region.ensure_account(ACCOUNT).unwrap();
    assert!(region.get::<Vpc>(&id).unwrap().is_none());
    assert_eq!(region.run_instances(ACCOUNT, &world.launch(1)).unwrap_err().code, "VPCIdNotSpecified");
    region.create_default_vpc(ACCOUNT).unwrap();
    assert_eq!(region.run_instances(ACCOUNT, &world.launch(1)).unwrap()[0].vpc, id);
}
