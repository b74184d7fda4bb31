//! Regions whose hosts are one machine: what they share, and what is apart.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{ACCOUNT, OTHER, World, settings, world_of};
use hutch_cloud::fault::Fault;
use hutch_cloud::host::{OneMachine, Simulated};
use hutch_cloud::model::{
    Address, Instance, InstanceState, Interface, RouteTable, Subnet, Tags, Target, Vpc,
};
use hutch_cloud::region::{Allocation, Launch, NewInterface, NewSubnet, Region, RouteChange, Settings};
use hutch_cloud::store::Sqlite;

type Worlds = BTreeMap<String, World>;

fn world(dir: &Path, machine: &Arc<OneMachine>, name: &str, zones: &str) -> World {
    let settings = Settings { name: name.into(), zones: zones.chars().collect(), ..settings() };
    let host = Simulated::open(dir.join(name), Duration::ZERO).unwrap().on(machine);
    world_of(settings, Arc::new(host), Sqlite::open(&dir.join(format!("{name}.db"))).unwrap())
}

fn met(dir: &Path, names: &[(&str, &str)]) -> Result<Worlds, Fault> {
    let machine = Arc::new(OneMachine::default());
    let worlds: Worlds =
        names.iter().map(|(name, zones)| ((*name).to_owned(), world(dir, &machine, name, zones))).collect();
    let regions = worlds.iter().map(|(name, world)| (name.clone(), world.region.clone())).collect();
    Region::meet(&regions)?;
    Ok(worlds)
}

/// The third bytes of an account's default subnets, in the order of their zones.
fn subnets(region: &Region, account: &str) -> Vec<u8> {
    region.ensure_account(account).unwrap();
    let all = region.all::<Subnet>().unwrap().into_iter();
    let mut own: Vec<_> = all.filter(|s| s.account == account && s.default).collect();
    own.sort_by(|a, b| a.zone.cmp(&b.zone));
    own.iter().map(|subnet| subnet.cidr.network().octets()[2]).collect()
}

fn code<T: std::fmt::Debug>(result: Result<T, Fault>) -> String {
    result.unwrap_err().code.into_owned()
}

fn vpc(region: &Region, cidr: &str) -> Vpc {
    region.create_vpc(ACCOUNT, cidr.parse().unwrap(), &Tags::new()).unwrap()
}

fn subnet(region: &Region, vpc: &str, cidr: &str) -> Result<Subnet, Fault> {
    let ask = NewSubnet { vpc: vpc.into(), cidr: cidr.parse().unwrap(), zone: None, tags: Tags::new() };
    region.create_subnet(ACCOUNT, &ask)
}

#[test]
fn default_subnets_are_apart_and_stay_where_they_are() {
    let dir = tempfile::tempdir().unwrap();
    // As one that was served before there could be a second.
    let old = world(dir.path(), &Arc::default(), "home-1", "ab");
    assert_eq!(subnets(&old.region, ACCOUNT), [0, 16]);
    drop(old);
    let worlds = met(dir.path(), &[("home-1", "ab"), ("home-2", "ab")]).unwrap();
    let of =
        |worlds: &Worlds, name: &str| [ACCOUNT, OTHER].map(|account| subnets(&worlds[name].region, account));
    assert_eq!(of(&worlds, "home-1"), [[0, 16]; 2]);
    assert_eq!(of(&worlds, "home-2"), [[32, 48]; 2]);
    drop(worlds);
    // One that comes before them in the order of names, one that is away, one more zone.
    let worlds = met(dir.path(), &[("attic-1", "a"), ("home-2", "abc")]).unwrap();
    assert_eq!(of(&worlds, "home-2"), [[32, 48]; 2], "what an account began with stays");
    let third = worlds["home-2"].region.create_default_subnet(ACCOUNT, "home-2c").unwrap();
    assert_eq!(third.cidr.network().octets()[2], 16);
    assert_eq!(of(&worlds, "attic-1"), [[0]; 2]);
    drop(worlds);
    // Which has the addresses that another began with while it was away.
    let fault = met(dir.path(), &[("attic-1", "a"), ("home-1", "ab")]).err().expect("a clash");
    assert!(fault.message.contains("172.31.0.0/20") && fault.message.contains("attic-1"), "{fault}");
    let too_many = met(tempfile::tempdir().unwrap().path(), &[("a", "abcdefghij"), ("b", "abcdefg")]);
    assert!(too_many.err().expect("too many").message.contains("16 subnets"));
}

#[test]
fn no_address_is_given_twice() {
    let dir = tempfile::tempdir().unwrap();
    let worlds = met(dir.path(), &[("home-1", "a"), ("home-2", "a")]).unwrap();
    let regions = ["home-1", "home-2"].map(|name| worlds[name].region.clone());
    let _reconcilers = worlds.values().map(World::reconcile).collect::<Vec<_>>();
    let mut ips = BTreeSet::new();
    for world in worlds.values() {
        for id in world.run(3) {
            let instance = world.wait(&id, InstanceState::Running);
            let interface: Interface = world.region.get(&instance.interfaces[0]).unwrap().unwrap();
            assert!(ips.insert(interface.ip), "{}", interface.ip);
        }
    }
    // Whatever of the default network's range another has is not to be had.
    let default = regions.clone().map(|region| region.default_vpc(ACCOUNT));
    assert_eq!(code(subnet(&regions[0], &default[0], "172.31.16.0/24")), "InvalidSubnet.Conflict");
    subnet(&regions[0], &default[0], "172.31.64.0/24").unwrap();
    assert_eq!(code(subnet(&regions[1], &default[1], "172.31.64.0/20")), "InvalidSubnet.Conflict");
    // In a network of one's own it is.
    for region in &regions {
        subnet(region, &vpc(region, "10.0.0.0/16").id, "10.0.1.0/24").unwrap();
    }
    // Public addresses are of one pool.
    let mut given = BTreeSet::new();
    let threads = regions.clone().map(|region| {
        std::thread::spawn(move || {
            let one = |_| region.allocate_address(ACCOUNT, &Allocation::default()).unwrap().ip;
            (0..4).map(one).collect::<Vec<_>>()
        })
    });
    for ip in threads.into_iter().flat_map(|thread| thread.join().unwrap()) {
        assert!(given.insert(ip), "{ip}");
    }
    let ip = regions[0].all::<hutch_cloud::model::Elastic>().unwrap()[0].ip;
    let same = Allocation { ip: Some(ip), ..Allocation::default() };
    assert_eq!(code(regions[1].allocate_address(ACCOUNT, &same)), "InvalidIPAddress.InUse");
}

fn eventually(what: &str, holds: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn instances_run_in_networks_of_ones_own_with_their_routes() {
    let dir = tempfile::tempdir().unwrap();
    let worlds = met(dir.path(), &[("home-1", "a"), ("home-2", "a")]).unwrap();
    let _reconcilers = worlds.values().map(World::reconcile).collect::<Vec<_>>();
    let world = &worlds["home-1"];
    let region = &world.region;
    let launch = |world: &World, subnet: &Subnet| {
        let launch = Launch { subnet: Some(subnet.id.clone()), ..world.launch(1) };
        world.region.run_instances(ACCOUNT, &launch).map(|made| made[0].id.clone())
    };
    let own = vpc(region, "10.0.0.0/16");
    let inside = subnet(region, &own.id, "10.0.1.0/24").unwrap();
    let id = launch(world, &inside).unwrap();
    world.wait(&id, InstanceState::Running);
    let told = || world.host.told(&id).unwrap().interfaces[0].clone();
    assert_eq!(told().subnet, Some(inside.cidr));
    assert_eq!((told().network.id.to_string(), told().network.cidr), (own.id.clone(), own.cidr));
    assert!(inside.cidr.contains(&told().ip) && told().network.routes.is_empty());

    // Its routes are told as they are: by the main table, by its own, and without the gateway none.
    let igw = region.create_gateway(ACCOUNT, &Tags::new()).unwrap().id;
    region.attach_gateway(ACCOUNT, &igw, &own.id).unwrap();
    let main = region.all::<RouteTable>().unwrap().into_iter().find(|table| table.vpc == own.id).unwrap().id;
    let route = |table: &str, to: &str| {
        let gateway = Target::Gateway(igw.clone());
        region.route(ACCOUNT, table, to.parse().unwrap(), &gateway, RouteChange::Create).unwrap();
    };
    let routes =
        |to: &[&str]| told().network.routes == to.iter().map(|n| n.parse().unwrap()).collect::<Vec<_>>();
    route(&main, "0.0.0.0/0");
    eventually("the main table", || routes(&["0.0.0.0/0"]));
    let table = region.create_route_table(ACCOUNT, &own.id, &Tags::new(), (None, "")).unwrap().id;
    route(&table, "198.51.100.0/24");
    let association = region.associate_route_table(ACCOUNT, &table, &inside.id).unwrap();
    eventually("its own table", || routes(&["198.51.100.0/24"]));
    region.disassociate_route_table(ACCOUNT, &association).unwrap();
    eventually("the main table again", || routes(&["0.0.0.0/0"]));
    region.detach_gateway(ACCOUNT, &igw, &own.id).unwrap();
    eventually("a black hole", || routes(&[]));
    region.attach_gateway(ACCOUNT, &igw, &own.id).unwrap();
    region.delete_route(ACCOUNT, &main, "0.0.0.0/0".parse().unwrap()).unwrap();
    let new = NewInterface { subnet: inside.id.clone(), ..NewInterface::default() };
    let other = Target::Interface(region.create_interface(ACCOUNT, &new).unwrap().id);
    let by_guest = region.route(ACCOUNT, &main, "0.0.0.0/0".parse().unwrap(), &other, RouteChange::Create);
    assert_eq!(code(by_guest), "UnsupportedOperation");

    // What has its addresses elsewhere on this machine cannot run meanwhile, and leaves nothing.
    let far = &worlds["home-2"];
    for cidr in ["10.0.0.0/20", "172.31.32.0/20", "198.19.0.0/24"] {
        let clash = subnet(&far.region, &vpc(&far.region, cidr).id, &cidr.replace("/20", "/24")).unwrap();
        assert_eq!(code(launch(far, &clash)), "Unsupported", "{cidr}");
    }
    let count = |region: &Region| {
        let [instances, interfaces] =
            [region.all::<Instance>().unwrap().len(), region.all::<Interface>().unwrap().len()];
        (instances, interfaces, region.all::<Address>().unwrap().len())
    };
    assert_eq!(count(&far.region), (0, 0, 0));
    // Nor one that is to start again.
    let fine = subnet(&far.region, &vpc(&far.region, "10.7.0.0/16").id, "10.7.0.0/24").unwrap();
    let later = launch(far, &fine).unwrap();
    far.wait(&later, InstanceState::Running);
    region.stop_instances(ACCOUNT, std::slice::from_ref(&id), false).unwrap();
    world.wait(&id, InstanceState::Stopped);
    region.start_instances(ACCOUNT, std::slice::from_ref(&id)).unwrap();
    world.wait(&id, InstanceState::Running);
    assert_eq!(told().ip.octets()[..2], Ipv4Addr::new(10, 0, 0, 0).octets()[..2]);
}
