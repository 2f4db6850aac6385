//! Fuzzes the job tracker with job events, results, verdicts and commands.

use std::collections::BTreeSet;

use job_tracker::JobTracker;
use serde_json::Value;

use crate::fleet::Fleet;

const CONFIG: &str = r#"{"updates_topic":"updates","results_topic":"results","status_topic":"status",
    "ipns_key_name":"key","trusted_observers":["12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"],
    "publish_every_ms":200,"keep_finished":3,"keep_finished_days":1,
    "remember_removed_days":1,"jobs_ipns":["other"]}"#;

/// Runs the steps on a tracker and checks that its state is consistent.
pub fn run(data: &[u8]) {
    let mut fleet: Fleet<JobTracker> = Fleet::new(CONFIG);
    fleet.run(
        data,
        &[(b'u', "updates"), (b'r', "results"), (b's', "status")],
        &[(b'U', "update"), (b'R', "remove")],
    );
    let listed = fleet.query("list", "{}");
    let listed: BTreeSet<&str> =
        listed.as_array().expect("a list").iter().map(|job| job["job_id"].as_str().expect("an id")).collect();
    for id in &listed {
        let job = fleet.query("get", &serde_json::json!({ "job_id": id }).to_string());
        assert_eq!(job["job_id"], *id);
    }
    // The indices have exactly one entry for each finished job and for each running job with a node.
    let state = fleet.host.state();
    let under = |prefix: &str| {
        let keys = state.keys().filter_map(|key| key.strip_prefix(prefix.as_bytes()));
        keys.map(|key| String::from_utf8_lossy(key).into_owned()).collect::<Vec<_>>()
    };
    let record = |key: String| -> Value { serde_json::from_slice(&state[key.as_bytes()]).expect("a record") };
    let (active, finished) = (under("active/"), under("finished/"));
    assert_eq!(
        active.len() + finished.len(),
        listed.len(),
        "a job is listed that is not kept, or the reverse"
    );
    assert_eq!(under("age/").len(), finished.len(), "an index does not fit");
    let running = active.iter().map(|id| record(format!("active/{id}")));
    let on_nodes = running.filter(|job| job["status"] == "running" && job["node_id"].is_string()).count();
    assert_eq!(under("node/").len(), on_nodes, "an index does not fit");
    if let Some(document) = fleet.document("key-jobs") {
        assert!(document["active_jobs"].is_object() && document["finished_jobs"].is_object());
    }
}

/// Returns the events of a job, and of a job whose node dies.
pub fn seeds() -> Vec<Vec<u8>> {
    super::texts([
        "u2{\"job_id\":\"j\",\"event_type\":\"queued\",\"timestamp\":\"2026-01-01T00:00:00Z\",\"data\":{\"a\":1}}\n\
         u2{\"job_id\":\"j\",\"event_type\":\"running\",\"node_id\":\"n\"}\n\
         s1{\"node_id\":\"n\",\"status\":\"dead\",\"observer\":\"o\",\"timestamp\":1767225601.5}\n\
         s1{\"node_id\":\"n\",\"status\":\"recovered\"}\n@\n\
         r2{\"job_id\":\"j\",\"result_cid\":\"bafy\"}\nu2{\"job_id\":\"j\",\"event_type\":\"completed\",\"result\":[1]}\n\
         +100000\n+90000",
        "U{\"job_id\":\"k\",\"event_type\":\"failed\"}\nR{\"job_id\":\"k\"}\nR{\"job_id\":\"none\"}",
        "s3{\"node_id\":\"n\",\"status\":\"dead\"}\nu0{\"job_id\":\"a\",\"event_type\":\"started\",\"data\":{\"node_id\":\"n\"}}\n\
         u0{\"job_id\":\"a\",\"event_type\":\"progress\",\"timestamp\":\"2026-01-01T01:00:00\"}\n\
         u0{\"job_id\":\"b\",\"event_type\":\"canceled\"}\nu0{\"job_id\":\"c\",\"event_type\":\"error\"}\n\
         u0{\"job_id\":\"d\",\"event_type\":\"succeeded\"}\nu0{\"job_id\":\"e\",\"event_type\":\"failed\"}\n+61",
    ])
}
