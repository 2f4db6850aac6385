//! The HTTP API against its description: every operation is called, and what it answers is what is described.

mod calls;
mod document;
mod generators;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use dim_tests::{FailingDisk, Program, Setup, SupervisedHost, eventually};
use reqwest::Method;
use serde_json::{Value, json};

use calls::{Call, Caller, call};
use document::{Document, Operation};

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

/// The description as the program prints it, which takes no host.
fn printed() -> String {
    let output = Command::new(PROGRAM).arg("openapi").output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

fn described() -> Document {
    Document::new(serde_json::from_str(&printed()).unwrap())
}

#[test]
fn the_description_in_the_repository_is_the_programs() {
    let kept = std::fs::read_to_string(dim_tests::data("../docs/openapi.json")).unwrap_or_default();
    assert!(kept == printed(), "renew it: cargo run -- openapi > docs/openapi.json");
}

#[test]
fn the_description_is_whole() {
    let document = described();
    assert!(document.value["openapi"].as_str().unwrap().starts_with("3.1."));
    document.check_references();
    assert_eq!(document.value["components"]["securitySchemes"]["token"]["scheme"], "bearer");
    assert_eq!(document.value["security"], json!([{}, { "token": [] }]));
    let operations = document.operations();
    let ids: BTreeSet<&str> = operations.iter().map(|operation| operation.id.as_str()).collect();
    assert_eq!(ids.len(), operations.len(), "operation ids are unique");
    let tags: Vec<&Value> =
        document.value["tags"].as_array().unwrap().iter().map(|tag| &tag["name"]).collect();
    for operation in &operations {
        operation.check_parameters();
        let Operation { id, value, .. } = operation;
        assert!(value["summary"].as_str().is_some_and(|summary| !summary.is_empty()), "{id} has no summary");
        assert!(
            value["tags"].as_array().is_some_and(|all| all.len() == 1 && tags.contains(&&all[0])),
            "{id}"
        );
        let other = value["responses"]["default"]["$ref"].as_str();
        assert_eq!(other, Some("#/components/responses/Failure"), "{id} says how it fails");
    }
}

#[test]
fn every_operation_has_a_call_for_each_status() {
    let calls: BTreeSet<(&str, String)> = (calls::of_a_sound_host().iter())
        .chain(&calls::of_an_unsound_host())
        .chain(&calls::of_a_host_with_a_wrong_config())
        .chain(&calls::of_a_host_that_is_down())
        .map(|call| (call.operation, call.status.to_string()))
        .collect();
    for operation in described().operations() {
        for status in operation.statuses() {
            let there = calls.contains(&(operation.id.as_str(), status.to_owned()));
            assert!(there, "suite/openapi/calls.rs needs a call of {} that answers {status}", operation.id);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_operation_answers_as_described() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    calls::hold_a_name_in(&state).await;
    let config = dir.path().join("config.yaml");
    let probe = json!({ "file": dim_tests::PROBE });
    let registry = json!({ "config": { "registry_ipns": "other-registry" } });
    std::fs::write(&config, json!({ "plugins": { "probe": probe, "node-registry": registry }, "fleet": { "name": calls::fleet() }, "topics": { "fleet.reliable": { "delivery": "reliable" } } }).to_string())
        .unwrap();
    let args = ["--embedded", "--config", config.to_str().unwrap()];
    let program = tokio::task::block_in_place(|| Program::start(Path::new(PROGRAM), &state, &args));
    let caller = Caller::unix(&program.socket());
    let served = caller.send(&call("get_openapi", "/v1/openapi.json", "", 200), &Method::GET).await;
    assert_eq!(served.body, printed().trim_end(), "what is served is what is printed");
    let document = described();
    calls::prepare(&caller).await;
    for call in calls::of_a_sound_host() {
        caller.check(&document, &call).await;
    }
    std::fs::write(&config, "store: { max_byte: 1 }").unwrap();
    for call in calls::of_a_host_with_a_wrong_config() {
        caller.check(&document, &call).await;
    }
    for operation in document.operations() {
        let forbidden = caller.of_a_page(&operation.example_path(), &operation.method).await;
        assert_eq!(forbidden.status, 403, "{}", operation.id);
        document.check_answer(&operation, &forbidden);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_not_well_answers_as_described() {
    let setup = Setup::bundled();
    let host = setup.start().await;
    host.from_peer("dim.jobs.updates", "no job event").await;
    eventually("there is a dead letter", async || host.dead_letters().len() == 1).await;
    let dir = host.stop().await;
    let unsound = "plugins:\n  job-tracker: { disabled: true }\n  gone: { file: /nowhere/gone.wasm }\n";
    let disk = FailingDisk::default();
    let setup = setup.yaml(unsound).on_disk(disk.clone());
    let host = SupervisedHost::start_in(dir, &setup).await;
    let caller = Caller::tcp(&host.serve().await);
    let document = described();
    for call in calls::of_an_unsound_host() {
        caller.check(&document, &call).await;
    }
    disk.set_broken(true);
    let health = call("get_health", "/healthz", "", 503);
    eventually("the host is down", async || {
        let _ = host.try_command("node-registry", "put", json!([])).await;
        caller.send(&health, &Method::GET).await.body.starts_with("down since")
    })
    .await;
    for call in calls::of_a_host_that_is_down() {
        caller.check(&document, &call).await;
    }
    for Call { operation, path, body, status } in calls::of_a_sound_host() {
        let status = match operation {
            "get_openapi" | "get_liveness" => 200,
            _ if (200..300).contains(&status) => 503,
            _ => continue,
        };
        caller.check(&document, &Call { operation, path, body, status }).await;
    }
    disk.set_broken(false);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_described_is_not_there() {
    let host = SupervisedHost::start(&Setup::default()).await;
    let caller = Caller::tcp(&host.serve().await);
    let document = described();
    for path in ["/", "/v1", "/v1/nothing", "/v1/jobs/", "/v1/jobs/a/b", "/jobs", "/openapi.json"] {
        let answer = caller.send(&call("", path, "", 404), &Method::GET).await;
        assert_eq!(answer.status, 404, "{path}");
        document.check_problem(&answer);
    }
    let operations = document.operations();
    for operation in &operations {
        for method in [Method::GET, Method::PUT, Method::POST, Method::PATCH, Method::DELETE] {
            let same = |other: &&Operation| other.template == operation.template && other.method == method;
            if operations.iter().find(same).is_none() {
                let answer = caller.send(&call("", operation.example_path(), "", 405), &method).await;
                assert_eq!(answer.status, 405, "{method} {}", operation.template);
                document.check_problem(&answer);
            }
        }
    }
    host.stop().await;
}

#[test]
fn an_answer_that_is_not_as_described_is_noticed() {
    let document = described();
    let job = json!({ "job_id": "a", "status": "running", "updated_at": "2026-11-24T08:00:00Z" });
    let schema = json!({ "$ref": "#/components/schemas/Job" });
    let with = |member: &str, value: Value| {
        let mut job = job.clone();
        job[member] = value;
        job
    };
    assert_eq!(document.errors(&schema, &job), Vec::<String>::new());
    let mut lacking = job.clone();
    lacking.as_object_mut().unwrap().remove("status");
    for wrong in [
        lacking,
        with("status", json!("exploded")),
        with("job_id", json!(7)),
        with("updated_at", json!("yesterday")),
        with("node_id", Value::Null),
        with("node_dead", json!({ "observer": "x" })),
        with("undescribed", json!(1)),
    ] {
        assert!(!document.errors(&schema, &wrong).is_empty(), "{wrong}");
    }
}

#[test]
fn the_documentation_lists_what_is_described() {
    let page = std::fs::read_to_string(dim_tests::data("../docs/http-api.md")).unwrap();
    let table = page.split("| path | |").nth(1).and_then(|rest| rest.split("\n\n").next());
    let mut listed = BTreeSet::new();
    // Every second piece is code: methods, then a path whose words in capitals are parameters.
    for code in table.expect("the table of paths").split('`').skip(1).step_by(2) {
        if let Some((methods, path)) = code.rsplit_once(' ') {
            let is_parameter = |part: &&str| part.bytes().all(|byte| byte.is_ascii_uppercase());
            let parts =
                path.split('/').map(|part| if part.is_empty() || !is_parameter(&part) { part } else { "{}" });
            let path = parts.collect::<Vec<_>>().join("/");
            listed.extend(methods.split(' ').map(|method| format!("{method} {path}")));
        }
    }
    let described: BTreeSet<String> = (described().operations().iter())
        .map(|operation| format!("{} {}", operation.method, operation.shape()))
        .collect();
    assert_eq!(listed, described);
}
