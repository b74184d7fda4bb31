//! A region for the tests beside the code: its steps are those that a test takes, one by one.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Runtime;

use super::{Region, Settings};
use crate::addresses::Pool;
use crate::host::Simulated;
use crate::limits::Limits;
use crate::model::Record;
use crate::objects::Objects;
use crate::store::Sqlite;
use crate::types::Table;

pub const ACCOUNT: &str = "000000000001";
pub const OTHER: &str = "000000000002";

pub struct World {
    pub region: Region,
    pub host: Arc<Simulated>,
    pub objects: Arc<Objects>,
    _runtime: Runtime,
}

impl World {
    pub fn new() -> World {
        World::on(Simulated::memory(Duration::ZERO))
    }

    pub fn on(host: Simulated) -> World {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.unwrap();
        let objects = Arc::new(Objects::memory(runtime.handle().clone()));
        let (region, host) = region("home-1", host, &objects);
        World { region, host, objects, _runtime: runtime }
    }

    pub fn put<T: Record>(&self, record: &T) {
        self.region.transact(|work| work.put(record)).unwrap();
    }
}

/// A region with an object store.
pub fn region(name: &str, host: Simulated, objects: &Arc<Objects>) -> (Region, Arc<Simulated>) {
    let (host, store) = (Arc::new(host), Arc::new(Sqlite::memory().unwrap()));
    let settings = Settings {
        name: name.into(),
        zones: vec!['a'],
        types: Table::built_in(),
        limits: Limits::default(),
        addresses: Pool::default(),
        owner: ACCOUNT.into(),
        resume: false,
        import_dir: None,
    };
    (Region::new(settings, store, host.clone()).with_objects(objects.clone()), host)
}
