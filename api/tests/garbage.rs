//! Whatever is asked: an answer, or one of EC2's errors and nothing changed.

use std::sync::Arc;
use std::time::Duration;

use hutch_api::ec2::{Regions, serve, served};
use hutch_api::query::{Call, Identity, Params};
use hutch_cloud::addresses::Pool;
use hutch_cloud::host::Simulated;
use hutch_cloud::limits::Limits;
use hutch_cloud::region::{Region, Settings};
use hutch_cloud::store::Sqlite;
use hutch_cloud::types::Table;
use proptest::prelude::*;

const ACCOUNT: &str = "000000000001";

fn regions() -> Regions {
    let settings = Settings {
        name: "home-1".into(),
        zones: vec!['a'],
        types: Table::built_in(),
        limits: Limits::default(),
        addresses: Pool::default(),
        owner: ACCOUNT.into(),
        resume: false,
        import_dir: None,
    };
    let store = Arc::new(Sqlite::memory().expect("a store"));
    let region = Region::new(settings, store, Arc::new(Simulated::memory(Duration::ZERO)));
    region.adopt_templates().expect("templates");
    region.ensure_account(ACCOUNT).expect("an account");
    [("home-1".to_owned(), Arc::new(region))].into()
}

fn call(action: &str, params: Params) -> Call {
    Call {
        service: "ec2".into(),
        region: "home-1".into(),
        identity: Identity { access_key: "AKID".into(), account: ACCOUNT.into() },
        action: action.into(),
        params,
        request_id: "1".into(),
    }
}

/// An operation, and names of its parameters, with some that it does not have.
fn names() -> impl Strategy<Value = (&'static str, Vec<String>)> {
    let action = proptest::sample::select(served().collect::<Vec<_>>());
    action.prop_flat_map(|action| {
        let own = [hutch_api::query::table::names(action), vec!["Nothing.1".into()]].concat();
        let own = proptest::sample::select(own);
        (Just(action), proptest::collection::vec(own, 0..12))
    })
}

fn text() -> impl Strategy<Value = String> {
    let ids =
        ["i-0123456789abcdef0", "ami-12345678", "vol-", "sg-0", "snap-x", "eni-12345678", "subnet-12345678"];
    let words = [
        "true",
        "false",
        "",
        "0",
        "-1",
        "1",
        "99999999999999999999",
        "tcp",
        "10.0.0.0/8",
        "all",
        "default",
        "*",
    ];
    prop_oneof![
        proptest::sample::select([&ids[..], &words].concat()).prop_map(str::to_owned),
        "\\PC{0,20}",
        Just("x".repeat(70_000)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn garbage_changes_nothing(
        (action, names) in names(),
        texts in proptest::collection::vec(text(), 12),
    ) {
        let regions = regions();
        let store = regions["home-1"].store().clone();
        let escape = |text: &str| text.bytes().map(|byte| format!("%{byte:02x}")).collect::<String>();
        let form: Vec<_> = names.iter().zip(&texts).map(|(name, value)| format!("{name}={}", escape(value))).collect();
        if let Ok(params) = Params::parse(&form.join("&")) {
            let before = store.revision().unwrap();
            if let Err(fault) = serve(&regions, &call(action, params)) {
                prop_assert_ne!(&fault.code, "InternalError", "{}: {}", action, fault.message);
                prop_assert_eq!(store.revision().unwrap(), before, "{}: {}", action, fault);
            }
        }
    }
}

#[test]
fn each_operation_answers_an_empty_call() {
    let regions = regions();
    let mut answered = 0;
    for action in served() {
        match serve(&regions, &call(action, Params::default())) {
            Ok(_) => answered += 1,
            Err(fault) => assert!(
                matches!(
                    fault.code.as_ref(),
                    "MissingParameter" | "InvalidParameterCombination" | "DefaultVpcAlreadyExists"
                ),
                "{action}: {fault}"
            ),
        }
    }
    assert!(answered >= 30, "{answered}");
    let unknown = Params::parse("Nothing=1").unwrap();
    let fault = serve(&regions, &call("DescribeInstances", unknown)).unwrap_err();
    assert_eq!(fault.code, "UnknownParameter");
    let fault = serve(&regions, &call("NoSuchThing", Params::default())).unwrap_err();
    assert_eq!(fault.code, "InvalidAction");
}
