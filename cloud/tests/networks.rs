//! Networks beside the default one: what of them is true on which host.

mod common;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use common::{ACCOUNT, OTHER, in_memory, settings, world_of};
use hutch_cloud::host::Simulated;
use hutch_cloud::model::{Gateway, Group, InstanceState, Interface, RouteTable, Subnet, Tags, Vpc};
use hutch_cloud::region::{
    InterfaceAsk, InterfaceAttribute, Launch, NewInterface, NewSubnet, Region, Secondary,
};
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

fn fails<T: std::fmt::Debug>(result: Result<T, hutch_cloud::fault::Fault>) -> String {
    result.unwrap_err().code.into_owned()
}

#[test]
fn an_instance_begins_with_several_interfaces() {
    let world = in_memory();
    let region = &world.region;
    let _reconciler = world.reconcile();
    let own = vpc(region, ACCOUNT, "10.0.0.0/16");
    let (front, back) = (subnet(region, &own, "10.0.1.0/24"), subnet(region, &own, "10.0.2.0/28"));
    let made_before = interface(region, &back, None).unwrap();
    let ask = |index, subnet: &Subnet| InterfaceAsk {
        index,
        subnet: Some(subnet.id.clone()),
        more: Secondary { count: 2, ..Secondary::default() },
        ..InterfaceAsk::default()
    };
    let before =
        InterfaceAsk { index: 1, interface: Some(made_before.id.clone()), ..InterfaceAsk::default() };
    let launch = |count, others: Vec<InterfaceAsk>| Launch {
        subnet: Some(front.id.clone()),
        others,
        ..world.launch(count)
    };
    let made = region.run_instances(ACCOUNT, &launch(1, vec![ask(3, &back), before.clone()])).unwrap();
    let id = made[0].id.clone();
    world.wait(&id, InstanceState::Running);
    let told = world.host.told(&id).unwrap();
    let has: Vec<_> = told.interfaces.iter().map(|e| (e.subnet.unwrap(), e.more.len())).collect();
    assert_eq!(has, [(front.cidr, 0), (back.cidr, 0), (back.cidr, 2)], "in the order of their numbers");
    let cards: Vec<_> = told.metadata.cards.iter().map(|c| (c.device_number, c.local_ipv4s.len())).collect();
    assert_eq!(cards, [(0, 1), (1, 1), (3, 3)]);
    assert_eq!(told.metadata.mac, told.interfaces[0].mac);

    let count = |region: &Region| region.all::<Interface>().unwrap().len();
    let was = count(region);
    let other = subnet(region, &vpc(region, ACCOUNT, "10.1.0.0/16"), "10.1.0.0/24");
    let same = |ask: &InterfaceAsk| Launch {
        interface: Some(made_before.id.clone()),
        ..launch(1, vec![ask.clone()])
    };
    let free = interface(region, &back, None).unwrap();
    let named = InterfaceAsk { index: 1, interface: Some(free.id.clone()), ..InterfaceAsk::default() };
    for (code, launch) in [
        ("InvalidNetworkInterface.InUse", launch(1, vec![before.clone()])),
        ("InvalidNetworkInterface.InUse", same(&before)),
        ("InvalidParameterCombination", launch(1, vec![ask(1, &back), ask(1, &back)])),
        ("InvalidParameterCombination", launch(1, vec![ask(0, &back)])),
        ("InvalidParameterCombination", launch(1, vec![ask(1, &other)])),
        ("InvalidParameterCombination", launch(2, vec![named])),
        ("InvalidParameterCombination", Launch { public_ip: Some(true), ..launch(1, vec![ask(1, &back)]) }),
        ("AttachmentLimitExceeded", launch(1, (1..9).map(|n| ask(n, &front)).collect())),
    ] {
        assert_eq!(fails(region.run_instances(ACCOUNT, &launch)), code);
    }
    assert_eq!(count(region), was + 1, "nothing is left of what was refused");
    // The subnet has room for two more that have three addresses: fewer than were asked for will do.
    let some = Launch { min: 1, ..launch(5, vec![ask(1, &back)]) };
    let made = region.run_instances(ACCOUNT, &some).unwrap();
    assert_eq!((made.len(), count(region)), (2, was + 5));
    for instance in made {
        region.terminate_instances(ACCOUNT, std::slice::from_ref(&instance.id)).unwrap();
        world.wait(&instance.id, InstanceState::Terminated);
    }
    region.terminate_instances(ACCOUNT, std::slice::from_ref(&id)).unwrap();
    world.wait(&id, InstanceState::Terminated);
    // All addresses are given back, but those of interfaces that stay.
    assert_eq!(count(region), 2);
    assert_eq!(region.all::<hutch_cloud::model::Address>().unwrap().len(), 2);
}

#[test]
fn secondary_addresses_come_and_go_while_an_instance_runs() {
    let world = in_memory();
    let region = &world.region;
    let reconciler = world.reconcile();
    let own = vpc(region, ACCOUNT, "10.0.0.0/16");
    let inside = subnet(region, &own, "10.0.1.0/24");
    let made: Vec<_> = (0..2)
        .map(|_| {
            let launch = Launch { subnet: Some(inside.id.clone()), ..world.launch(1) };
            let id = region.run_instances(ACCOUNT, &launch).unwrap()[0].id.clone();
            let instance = world.wait(&id, InstanceState::Running);
            (id, instance.interfaces[0].clone())
        })
        .collect();
    let ip = |last| Ipv4Addr::new(10, 0, 1, last);
    let told = |n: usize| {
        assert!(reconciler.quiet(Duration::from_secs(20)));
        let machine = world.host.told(&made[n].0).unwrap();
        assert_eq!(machine.metadata.cards[0].local_ipv4s[1..], machine.interfaces[0].more);
        machine.interfaces[0].more.clone()
    };
    let assign = |n: usize, ask: &Secondary| region.assign_addresses(ACCOUNT, &made[n].1, ask);
    let named = |ips: &[Ipv4Addr]| Secondary { ips: ips.to_vec(), ..Secondary::default() };
    assert_eq!(assign(0, &named(&[ip(50), ip(51)])).unwrap(), [ip(50), ip(51)]);
    assert_eq!(assign(0, &named(&[ip(50)])).unwrap(), [ip(50)], "once more is no more");
    assert_eq!(told(0), [ip(50), ip(51)]);
    assert_eq!(assign(1, &Secondary { count: 2, ..Secondary::default() }).unwrap().len(), 2);
    assert_eq!(told(1).len(), 2);
    let first = region.get::<Interface>(&made[0].1).unwrap().unwrap().ip;
    for (code, ask) in [
        ("InvalidParameterValue", named(&[ip(50)])),
        ("InvalidParameterValue", named(&[ip(60), ip(60)])),
        ("InvalidParameterValue", named(&[ip(60), ip(2)])),
        ("InvalidParameterValue", named(&[Ipv4Addr::new(10, 0, 2, 60)])),
        ("InvalidParameterValue", Secondary { reassign: true, ..named(&[first]) }),
        ("PrivateIpAddressLimitExceeded", Secondary { count: 28, ..Secondary::default() }),
    ] {
        assert_eq!(fails(assign(1, &ask)), code, "{ask:?}");
    }
    assert_eq!(told(1).len(), 2, "nothing of it is done");
    assert_eq!(interface(region, &inside, Some(ip(60))).unwrap().ip, ip(60));
    // It is moved.
    assign(1, &Secondary { reassign: true, ..named(&[ip(50)]) }).unwrap();
    assert_eq!(told(0), [ip(51)]);
    assert!(told(1).contains(&ip(50)));
    let unassign = |n: usize, ips: &[Ipv4Addr]| region.unassign_addresses(ACCOUNT, &made[n].1, ips);
    for ips in [vec![ip(50)], vec![ip(51), ip(52)], vec![first]] {
        assert_eq!(fails(unassign(0, &ips)), "InvalidParameterValue", "{ips:?}");
    }
    unassign(0, &[ip(51)]).unwrap();
    assert_eq!(told(0), [] as [Ipv4Addr; 0]);
    assert_eq!(interface(region, &inside, Some(ip(51))).unwrap().ip, ip(51), "it is free");
    let others = region.assign_addresses(OTHER, &made[0].1, &named(&[ip(70)]));
    assert_eq!(fails(others), "InvalidNetworkInterfaceID.NotFound");
    let id = made[1].0.clone();
    region.terminate_instances(ACCOUNT, std::slice::from_ref(&id)).unwrap();
    world.wait(&id, InstanceState::Terminated);
    assert_eq!(
        interface(region, &inside, Some(ip(50))).unwrap().ip,
        ip(50),
        "and so are those of who is gone"
    );
}
