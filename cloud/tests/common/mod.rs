//! A region on the simulated host.
#![allow(dead_code, reason = "each test program uses a part of this")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hutch_cloud::addresses::Pool;
use hutch_cloud::host::Simulated;
use hutch_cloud::limits::Limits;
use hutch_cloud::model::{Image, Instance, InstanceState};
use hutch_cloud::region::{Launch, Reconciler, Region, Settings};
use hutch_cloud::store::Sqlite;
use hutch_cloud::types::Table;

pub const ACCOUNT: &str = "000000000001";
pub const OTHER: &str = "000000000002";

pub struct World {
    pub region: Arc<Region>,
    pub host: Arc<Simulated>,
}

pub fn settings() -> Settings {
    let zones = vec!['a', 'b'];
    Settings {
        name: "home-1".into(),
        zones,
        types: Table::built_in(),
        limits: Limits::default(),
        addresses: Pool::default(),
        owner: ACCOUNT.into(),
        resume: false,
        import_dir: None,
    }
}

/// Nothing of it outlives the test.
pub fn in_memory() -> World {
    let host = Arc::new(Simulated::memory(Duration::ZERO));
    world(host, Sqlite::memory().expect("a store"))
}

/// What is in `dir`, as a daemon finds it that was killed.
pub fn in_directory(dir: &Path) -> World {
    let host = Simulated::open(dir.join("host"), Duration::from_millis(1)).expect("a host");
    world(Arc::new(host), Sqlite::open(&dir.join("store.db")).expect("a store"))
}

fn world(host: Arc<Simulated>, store: Sqlite) -> World {
    world_of(settings(), host, store)
}

pub fn world_of(settings: Settings, host: Arc<Simulated>, store: Sqlite) -> World {
    let region = Arc::new(Region::new(settings, Arc::new(store), host.clone()));
    region.adopt_templates().expect("templates");
    World { region, host }
}

impl World {
    pub fn reconcile(&self) -> Reconciler {
        Reconciler::start(self.region.clone()).expect("threads")
    }

    pub fn image(&self) -> String {
        let images = self.region.all::<Image>().expect("the store");
        images.into_iter().find(|image| image.name == "debian-12").expect("a template").id
    }

    pub fn launch(&self, count: u32) -> Launch {
        Launch {
            image: self.image(),
            min: count,
            max: count,
            instance_type: "t3.micro".into(),
            request: "r".into(),
            ..Launch::default()
        }
    }

    pub fn run(&self, count: u32) -> Vec<String> {
        let made = self.region.run_instances(ACCOUNT, &self.launch(count)).expect("a launch");
        made.into_iter().map(|instance| instance.id).collect()
    }

    pub fn instance(&self, id: &str) -> Instance {
        self.region.get(id).expect("the store").expect("the instance")
    }

    pub fn wait(&self, id: &str, state: InstanceState) -> Instance {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            let instance = self.instance(id);
            if instance.state == state {
                return instance;
            }
            assert!(Instant::now() < until, "{id} is {:?}, not {state:?}", instance.state);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
