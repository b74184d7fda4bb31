//! Roots on instance store, on the simulated host: they end with their run, however that ends.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{ACCOUNT, OTHER, World, settings};
use hutch_cloud::host::{End, Simulated};
use hutch_cloud::model::{BundleState, BundleTask, InstanceState};
use hutch_cloud::objects::Objects;
use hutch_cloud::region::{BundleAsk, Launch, Region, Registration, Settings};
use hutch_cloud::store::Sqlite;

fn world(objects: Objects) -> World {
    let host = Arc::new(Simulated::memory(Duration::ZERO));
    let store = Arc::new(Sqlite::memory().unwrap());
    let settings = Settings { resume: true, ..settings() };
    let region = Arc::new(Region::new(settings, store, host.clone()).with_objects(Arc::new(objects)));
    region.adopt_templates().unwrap();
    World { region, host }
}

#[test]
fn a_root_on_instance_store_ends_with_its_run() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let world = world(Objects::memory(runtime.handle().clone()));
    let _reconciler = world.reconcile();
    let region = &world.region;
    let ask = BundleAsk {
        image: Some(world.image()),
        bucket: "bundles".into(),
        prefix: "debian".into(),
        ..BundleAsk::default()
    };
    let task = region.bundle(ACCOUNT, &ask).unwrap();
    while region.get::<BundleTask>(&task.id).unwrap().unwrap().state != BundleState::Complete {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(region.bundle(OTHER, &ask).unwrap_err().code, "AccessDenied");
    assert_eq!(region.bundle(ACCOUNT, &ask).unwrap_err().code, "InvalidParameterValue", "it is there");
    let new = Registration {
        name: "on instance store".into(),
        location: Some("bundles/debian.manifest.xml".into()),
        ..Registration::default()
    };
    assert_eq!(region.register_image(OTHER, &new).unwrap_err().code, "AccessDenied");
    let image = region.register_image(ACCOUNT, &new).unwrap();
    let run = || {
        let launch = Launch { image: image.clone(), ..world.launch(1) };
        let id = region.run_instances(ACCOUNT, &launch).unwrap().remove(0).id;
        world.wait(&id, InstanceState::Running);
        id
    };
    // Its guest's own end, its failure, a host that went down (though others are started again then), and a call.
    for end in [Some(End::PowerOff), Some(End::Failed("it failed".into())), Some(End::HostDown), None] {
        let id = run();
        let root = format!("eph-{}", id.trim_start_matches("i-"));
        let told = world.host.told(&id).unwrap();
        assert_eq!(told.volumes, std::slice::from_ref(&root));
        assert_eq!(told.metadata.ami_manifest_path, "bundles/debian.manifest.xml");
        assert_eq!(world.host.volume(&root).unwrap().0, 2 << 30);
        match &end {
            Some(end) => world.host.end(&id, end.clone()).unwrap(),
            None => drop(region.terminate_instances(ACCOUNT, std::slice::from_ref(&id)).unwrap()),
        }
        world.wait(&id, InstanceState::Terminated);
        assert!(!world.host.volumes().contains(&root), "{end:?}");
        assert_eq!(world.host.starts(&id), (0, 0), "it is forgotten");
    }
}
