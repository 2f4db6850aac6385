//! A version with another layout of its state takes over: the job tracker's version 2 on a store that version
//! 1 has written, and back.

use dim_server::host::Grant;
use dim_store::change::State;
use dim_store::change_history;
use dim_tests::alone::proposal;
use dim_tests::{Setup, TestHost, eventually};
use serde_json::{Value, json};

const YAML: &str = "replacement:\n  probation: { seconds: 600, max_seconds: 600 }\n";

async fn update(host: &TestHost, job: &str, event: &str, node: &str) {
    let update = json!({ "job_id": job, "event_type": event, "data": { "node_id": node } });
    host.command("job-tracker", "update", update).await.unwrap();
}

async fn jobs(host: &TestHost) -> Vec<Value> {
    host.query("job-tracker", "list", json!({})).await.unwrap().as_array().unwrap().clone()
}

/// The keys of the tracker's state.
fn keys(host: &TestHost) -> Vec<String> {
    use redb::ReadableTable as _;
    let table = host.host.storage.store.snapshot().unwrap().table(dim_store::STATE).unwrap();
    let keys = table.iter().unwrap().map(|row| row.unwrap().0.value()[4..].to_vec());
    keys.map(|key| String::from_utf8_lossy(&key).into_owned()).collect()
}

async fn install(host: &TestHost) {
    let proposal = proposal("job-tracker", std::fs::read(dim_tests::TRACKER_2).unwrap());
    let change = host.host.install(proposal, Grant::AsBefore).await.unwrap();
    let layouts = (change.before.unwrap().state_version, change.after.unwrap().state_version);
    assert_eq!(layouts, (Some(1), Some(2)));
}

/// A store that version 1 has written.
async fn written_by_version_1() -> tempfile::TempDir {
    let host = Setup::bundled().yaml(YAML).start().await;
    for number in 0..30 {
        let job = format!("j{number:02}");
        update(&host, &job, "running", &format!("n{}", number % 3)).await;
        if number % 2 == 0 {
            update(&host, &job, "completed", &format!("n{}", number % 3)).await;
        }
    }
    host.settled().await;
    host.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn version_2_of_the_job_tracker_takes_over_a_store_of_version_1() {
    let host = Setup::bundled().yaml(YAML).start_in(written_by_version_1().await).await;
    let before = jobs(&host).await;
    assert!(keys(&host).iter().any(|key| key.starts_with("active/")));
    install(&host).await;
    assert_eq!(jobs(&host).await, before);
    let old = |key: &String| key.starts_with("active/") || key.starts_with("finished/");
    assert_eq!(keys(&host).into_iter().filter(old).collect::<Vec<_>>(), [""; 0]);
    // It goes on with them, and so it does after a restart.
    update(&host, "j01", "failed", "n1").await;
    let setup = Setup::bundled().yaml(YAML);
    let host = setup.start_in(host.stop().await).await;
    update(&host, "j03", "completed", "n0").await;
    let verdict = json!({ "node_id": "n2", "status": "dead", "observer": "the test" });
    let publish = dim_store::effect::Publish {
        topic: "dim.nodes.status".parse().unwrap(),
        data: verdict.to_string().into(),
    };
    host.host.storage.commit.publish(publish, host.host.storage.log.now()).await.unwrap();
    eventually("the jobs of a dead node are marked", async || {
        let job = host.query("job-tracker", "get", json!({ "job_id": "j05" })).await.unwrap();
        job["node_dead"].is_object()
    })
    .await;
    let running = |job: &&Value| job["status"] == "running";
    assert_eq!(jobs(&host).await.iter().filter(running).count(), 13);
}

#[tokio::test(flavor = "multi_thread")]
async fn and_is_rolled_back_with_what_came_since() {
    let setup = Setup::bundled().yaml(YAML);
    let host = setup.start_in(written_by_version_1().await).await;
    install(&host).await;
    update(&host, "j01", "failed", "n1").await;
    update(&host, "new", "running", "n1").await;
    let with_version_2 = jobs(&host).await;
    let name = "job-tracker".parse().unwrap();
    let back = host.host.roll_back(&name, None, "the test").await.unwrap();
    assert_eq!((back.before.state_version, back.after.state_version), (Some(2), Some(1)));
    host.settled().await;
    // Version 1 has handled what came since, and says the same of it.
    assert_eq!(jobs(&host).await, with_version_2);
    let new = |key: &String| key.starts_with("job/") || key.starts_with("open/");
    assert_eq!(keys(&host).into_iter().filter(new).collect::<Vec<_>>(), [""; 0]);
    let newest =
        change_history::of(&host.host.storage.store.snapshot().unwrap(), &name, 1).unwrap().remove(0);
    assert_eq!(newest.state, State::RolledBack);
    let host = setup.start_in(host.stop().await).await;
    assert_eq!(host.plugin("job-tracker").handle.code().source, "bundled");
    assert_eq!(jobs(&host).await, with_version_2);
}
