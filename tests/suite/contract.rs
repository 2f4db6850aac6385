//! A component that was built against an earlier contract goes on working. `tests/contract/VERSION`
//! holds one for each; none is ever built again.

use dim_tests::{Setup, eventually, script};
use serde_json::{Value, json};
use wit_bindgen_core::wit_parser::Resolve;
use wit_bindgen_core::{Files, WorldGenerator as _};

#[tokio::test(flavor = "multi_thread")]
async fn a_component_of_each_contract_so_far_loads_and_works() {
    let versions: Vec<_> = std::fs::read_dir(dim_tests::data("contract")).unwrap().flatten().collect();
    assert!(!versions.is_empty());
    for version in versions {
        let file = version.path().join("probe.wasm");
        every_import_and_event(&json!({ "file": file })).await;
    }
}

async fn every_import_and_event(section: &Value) {
    let mut section = section.clone();
    section["config"] = json!({ "on_start": "[{\"do\":\"follow\",\"name\":\"probe-key\"}]" });
    let host = Setup::default().and_probe("probe", section).start().await;
    let steps = [
        json!({ "do": "set", "key": "a", "value": "1" }),
        json!({ "do": "get", "key": "a" }),
        json!({ "do": "scan", "prefix": "", "limit": 10 }),
        json!({ "do": "delete", "key": "a" }),
        json!({ "do": "timer", "key": "soon", "in": 1_000_000 }),
        json!({ "do": "timer", "key": "late", "in": 3_600_000_000_000_u64 }),
        json!({ "do": "timer-at", "key": "late" }),
        json!({ "do": "clear", "key": "late" }),
        json!({ "do": "subscribe", "topic": "probe.more" }),
        json!({ "do": "publish", "topic": "probe.more", "data": "x" }),
        json!({ "do": "peers", "topic": "probe.in" }),
        json!({ "do": "heard", "topic": "probe.in", "since": 0 }),
        json!({ "do": "unsubscribe", "topic": "probe.more" }),
        json!({ "do": "update-state", "key": "probe-key", "data": "news" }),
        json!({ "do": "get-state", "name": "probe-key" }),
        json!({ "do": "resolve", "name": "probe-key" }),
        json!({ "do": "key-id", "key": "probe-key" }),
        json!({ "do": "follow", "name": "probe-other" }),
        json!({ "do": "unfollow", "name": "probe-other" }),
        json!({ "do": "publish-name", "key": "probe-other", "path": "/ipfs/bafkqaaa" }),
    ];
    for (step, answer) in steps.iter().zip(host.run(json!(steps)).await) {
        assert!(answer.get("ok").is_some(), "{step}: {answer}");
    }
    let others = host.run(json!([{ "do": "topics" }, { "do": "log", "text": "x" }, { "do": "now" }])).await;
    assert!(others[0].as_array().is_some_and(|topics| topics.contains(&json!("probe.in"))), "{}", others[0]);
    host.from_peer("probe.in", script(json!([{ "do": "note", "key": "heard", "what": 1 }])).to_string())
        .await;
    eventually("a message, a timer and a change of a name have come", async || {
        let mut come = 0;
        for key in ["heard", "fired", "changed"] {
            come += host.state_of("probe", key).await.as_array().map_or(0, |noted| noted.len().min(1));
        }
        come == 3
    })
    .await;
    // A start that says which state it found, and a failure in each way.
    let mut failing = script(json!([]));
    failing["then"] = json!("reject");
    host.from_peer("probe.in", failing.to_string()).await;
    host.from_peer("probe.in", script(json!([{ "do": "trap" }])).to_string()).await;
    eventually("both are set aside", async || host.dead_letters().len() == 2).await;
    let calls = host.query("probe", "calls", Value::Null).await.unwrap();
    assert!(calls.is_u64(), "{calls}");
}

/// The bindings of the Rust SDK, as `wit-bindgen` generates them from the contract.
fn generated_bindings() -> String {
    let mut resolve = Resolve::default();
    let (package, _) = resolve.push_path(dim_tests::data("../wit")).unwrap();
    let world = resolve.select_world(&[package], Some("plugin")).unwrap();
    let options = wit_bindgen_rust::Opts {
        format: true,
        pub_export_macro: true,
        export_macro_name: Some("export_component".to_owned()),
        default_bindings_module: Some("dim_guest::macro_support".to_owned()),
        ..wit_bindgen_rust::Opts::default()
    };
    let mut files = Files::default();
    options.build().generate(&mut resolve, world, &mut files).unwrap();
    let (_, source) = files.iter().next().expect("one file");
    String::from_utf8(source.to_vec()).unwrap()
}

#[test]
fn the_bindings_of_the_sdk_are_those_of_the_contract() {
    let path = dim_tests::data("../guest/src/bindings/generated.rs");
    let generated = generated_bindings();
    if std::env::var_os("DIM_WRITE_BINDINGS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &generated).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == generated, "the contract or wit-bindgen has changed: see guest/src/bindings.rs");
}
