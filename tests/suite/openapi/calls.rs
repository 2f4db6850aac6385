//! A call of each operation for each status that it describes, and who makes them.

use std::path::Path;
use std::time::Duration;

use dim_tests::eventually;
use reqwest::{Client, Method, RequestBuilder, Response};
use serde_json::Value;

use super::document::Document;

/// One call.
pub struct Call {
    pub operation: &'static str,
    pub path: String,
    pub body: Vec<u8>,
    /// What it answers.
    pub status: u16,
}

pub fn call(operation: &'static str, path: impl Into<String>, body: impl Into<Vec<u8>>, status: u16) -> Call {
    Call { operation, path: path.into(), body: body.into(), status }
}

/// Which key `held` is.
const HELD: u8 = 7;

/// A private key as `ipfs key export` writes it.
fn exported(seed: u8) -> Vec<u8> {
    let pair = libp2p_identity::Keypair::ed25519_from_bytes([seed; 32]).expect("a key");
    pair.to_protobuf_encoding().expect("it has this form")
}

/// Makes a state directory in which the name of the key `held` is on hold.
pub async fn hold_a_name_in(state: &Path) {
    let host = dim_tests::Setup::default().start().await;
    let key: dim_model::ident::KeyName = "held".parse().expect("a key");
    let file = dim_ipfs::keys::KeyFile { is_adopted: false, bytes: exported(HELD) };
    host.host.storage.keys.import(&key, &file).expect("the key is stored");
    let name = host.host.storage.keys.name(&key).expect("a key");
    let value = dim_store::effect::NameValue::document("its own".into());
    let update = dim_store::effect::NameUpdate { name, value, lifetime: dim_store::effect::LIFETIME };
    let change = dim_store::commit::NameChange::Own { key: key.clone(), update };
    host.host.storage.commit.change_name(change).await.expect("the host commits");
    let theirs =
        dim_ipfs::Current { path: "/ipfs/bafkqaaa".parse().expect("a path"), sequence: Some(1 << 40) };
    let hold = move |write: &redb::WriteTransaction| {
        dim_store::names::hold(write, &key, &theirs, dim_model::time::Timestamp::wall())
    };
    assert!(host.host.storage.commit.write(hold).await.expect("the host commits"));
    std::fs::rename(host.stop().await.keep(), state).expect("the state directory is moved");
}

/// The key of the admin of the fleet of a sound host.
fn admin() -> ed25519_dalek::SigningKey {
    ed25519_dalek::SigningKey::from_bytes(&[5; 32])
}

/// The name of the fleet of a sound host.
pub fn fleet() -> String {
    dim_topics::identity::WriterId::of(&admin().verifying_key()).name().to_string()
}

/// The first roster of the fleet.
fn roster() -> Vec<u8> {
    let roster =
        dim_topics::membership::roster::Roster::first(&admin(), dim_model::time::Timestamp(u64::MAX));
    let mut draft = roster.draft().expect("a small roster");
    draft.sign(&admin());
    draft.to_block().to_vec()
}

/// The record with which the name of the fleet points to the first roster.
fn record() -> Vec<u8> {
    let pair = dim_ipfs::keys::ed25519_pair(admin().as_bytes());
    let path = format!("/ipfs/{}", dim_topics::identity::Digest::of(&roster()));
    let path = path.parse().expect("a CID makes a path");
    let validity = dim_model::time::Timestamp(u64::MAX / 2);
    dim_ipfs::ipns_record::Record::sign(&pair, &path, 1, validity, std::time::Duration::from_secs(60)).bytes
}

/// The name of a fleet to which no host belongs.
fn other_fleet() -> String {
    dim_topics::identity::WriterId([9; 32]).name().to_string()
}

/// Calls in an order in which they answer so, after [`prepare`].
pub fn of_a_sound_host() -> Vec<Call> {
    let (message, document) = ("x".repeat((60 << 10) + 1), "x".repeat((16 << 20) + 1));
    // More than one value of the state may have.
    let too_much = format!(r#"{{"job_id":"j9","event_type":"queued","data":"{}"}}"#, "x".repeat(2 << 20));
    let remove = "/v1/plugins/job-tracker/commands/remove";
    let probe = std::fs::read(dim_tests::PROBE).expect("the probe is built");
    let newer = dim_tests::component::probe_with(
        "0.2.0",
        &[("[\"probe.in\"]", "[]"), ("[\"probe.out\"]", "[]"), ("[\"probe-key\"]", "[]")],
    );
    let path = dim_store::effect::NameValue::document(probe.clone().into()).path();
    let trust = dim_model::ident::Digest::of(&probe);
    let fetch =
        serde_json::json!({ "from": path, "trust": trust, "name": "fetched", "grant": true }).to_string();
    let taken =
        serde_json::json!({ "from": path, "trust": trust, "name": "fourth", "grant": true }).to_string();
    let other = dim_tests::component::probe_with("0.3.0", &[("probe-key", "other-key")]);
    vec![
        // Until it is decided the host is not well.
        call("update_state", "/v1/keys/held/state", "{}", 409),
        call("publish_path", "/v1/keys/dim-state-key/path", PATH, 409),
        call("adopt_name", "/v1/keys/held/adopt", r#"{"how":"import"}"#, 422),
        call("adopt_name", "/v1/keys/held/adopt", r#"{"how":"replace"}"#, 200),
        call("adopt_name", "/v1/keys/held/adopt", r#"{"how":"replace"}"#, 409),
        call("adopt_name", "/v1/keys/held/adopt", "{", 400),
        call("get_status", "/v1/status", "", 200),
        call("acknowledge_past_events", "/v1/status/acknowledge", "", 200),
        call("get_health", "/healthz", "", 200),
        call("get_liveness", "/livez", "", 200),
        call("get_readiness", "/readyz", "", 200),
        call("get_metrics", "/metrics", "", 200),
        call("get_openapi", "/v1/openapi.json", "", 200),
        call("make_backup", "/v1/backup", r#"{"passphrase":"correct horse battery staple"}"#, 200),
        call("make_backup", "/v1/backup", r#"{"passphrase":""}"#, 400),
        call("make_backup", "/v1/backup", "{}", 422),
        call("reload_config", "/v1/config/reload", "", 200),
        call("export_events", "/v1/events", "", 200),
        call("export_events", "/v1/events?plugin=job-tracker&since=2020-01-01T00:00:00Z", "", 200),
        call("export_events", "/v1/events?topic=dim.jobs.updates", "", 200),
        call("export_events", "/v1/events?plugin=nobody", "", 404),
        call("export_events", "/v1/events?since=yesterday", "", 400),
        call("list_dead_letters", "/v1/dead-letters?plugin=job-tracker&after=0&limit=10", "", 200),
        call("list_dead_letters", "/v1/dead-letters?after=x", "", 400),
        call(
            "list_dead_letters",
            "/v1/dead-letters?topic=dim.jobs.updates&since=2020-01-01T00:00:00Z",
            "",
            200,
        ),
        call("replay_dead_letters", "/v1/dead-letters/replay?plugin=probe", "", 202),
        call("replay_dead_letters", "/v1/dead-letters/replay?since=yesterday", "", 400),
        call("replay_dead_letters", "/v1/dead-letters/replay?plugin=nobody", "", 400),
        call("list_dead_letters", "/v1/dead-letters?plugin=nobody", "", 400),
        call("list_jobs", "/v1/jobs?status=exploded", "", 400),
        call("list_nodes", "/v1/nodes?status=onlin", "", 400),
        call("drop_dead_letters", "/v1/dead-letters?topic=other&since=2020-01-01T00:00:00Z", "", 200),
        call("drop_dead_letters", "/v1/dead-letters?typo=1", "", 400),
        call("get_dead_letter", "/v1/dead-letters/1", "", 200),
        call("get_dead_letter", "/v1/dead-letters/77", "", 404),
        call("get_dead_letter", "/v1/dead-letters/x", "", 400),
        call("replay_dead_letter", "/v1/dead-letters/1/replay", "", 202),
        call("replay_dead_letter", "/v1/dead-letters/77/replay", "", 404),
        call("replay_dead_letter", "/v1/dead-letters/x/replay", "", 400),
        call("drop_dead_letter", "/v1/dead-letters/2", "", 204),
        call("drop_dead_letter", "/v1/dead-letters/77", "", 404),
        call("drop_dead_letter", "/v1/dead-letters/x", "", 400),
        call("list_plugins", "/v1/plugins", "", 200),
        call("fetch_plugin", "/v1/plugins", r#"{"from":"/ipns/policy"}"#, 422),
        call("update_state", "/v1/keys/parts/state", probe.clone(), 200),
        call("fetch_plugin", "/v1/plugins", fetch, 200),
        call("fetch_plugin", "/v1/plugins", taken, 409),
        call("fetch_plugin", "/v1/plugins", "{", 400),
        call("get_grants", "/v1/plugins/fetched/grants", "", 200),
        call("get_grants", "/v1/plugins/nobody/grants", "", 404),
        call("get_grants", "/v1/plugins/No_Name/grants", "", 400),
        call("change_grants", "/v1/plugins/fetched/grants", r#"{"allow":{"publish":["a.*"]}}"#, 200),
        call("change_grants", "/v1/plugins/nobody/grants", "{}", 404),
        call("change_grants", "/v1/plugins/fetched/grants", r#"{"allow":{"write":["dim-state-key"]}}"#, 409),
        call("change_grants", "/v1/plugins/fetched/grants", "{", 400),
        call("change_grants", "/v1/plugins/fetched/grants", r#"{"allow":{"limits":{"typo":1}}}"#, 422),
        call("fetch_plugin", "/v1/plugins", r#"{"from":"somewhere"}"#, 422),
        call("get_plugin", "/v1/plugins/job-tracker", "", 200),
        call("get_plugin", "/v1/plugins/nobody", "", 404),
        call("get_plugin", "/v1/plugins/No_Name", "", 400),
        call("install_plugin", "/v1/plugins/probe/component?source=here", probe.clone(), 200),
        call("install_plugin", "/v1/plugins/other/component?grant=true", other, 200),
        call("install_plugin", "/v1/plugins/third/component", probe.clone(), 422),
        call("install_plugin", "/v1/plugins/third/component?grant=true", probe, 409),
        call("install_plugin", "/v1/plugins/No_Name/component", "", 400),
        call("install_plugin", "/v1/plugins/probe/component", "no component", 422),
        call("install_plugin", "/v1/plugins/probe/component?grant=perhaps", "no component", 400),
        call("plugin_history", "/v1/plugins/probe/history?limit=1", "", 200),
        call("plugin_history", "/v1/plugins/No_Name/history", "", 400),
        call("install_plugin", "/v1/plugins/probe/component", newer, 200),
        call("roll_back_plugin", "/v1/plugins/probe/rollback?to=9.9.9", "", 409),
        call("roll_back_plugin", "/v1/plugins/probe/rollback", "", 200),
        call("roll_back_plugin", "/v1/plugins/nobody/rollback", "", 404),
        call("roll_back_plugin", "/v1/plugins/No_Name/rollback", "", 400),
        call("restore_plugin", "/v1/plugins/job-tracker/restore", "", 200),
        call("restore_plugin", "/v1/plugins/nobody/restore", "", 422),
        call("restore_plugin", "/v1/plugins/No_Name/restore", "", 400),
        call("pause_plugin", "/v1/plugins/probe/pause", "", 200),
        call("pause_plugin", "/v1/plugins/nobody/pause", "", 404),
        call("pause_plugin", "/v1/plugins/No_Name/pause", "", 400),
        call("resume_plugin", "/v1/plugins/probe/resume", "", 200),
        call("resume_plugin", "/v1/plugins/nobody/resume", "", 404),
        call("resume_plugin", "/v1/plugins/No_Name/resume", "", 400),
        call("remove_plugin", "/v1/plugins/other?purge=true", "", 200),
        call("remove_plugin", "/v1/plugins/nobody", "", 404),
        call("remove_plugin", "/v1/plugins/No_Name", "", 400),
        call("watch_changes", "/v1/changes", "", 200),
        call("watch_log", "/v1/plugins/fetched/log", "", 200),
        call("watch_log", "/v1/plugins/No_Name/log", "", 400),
        call("query_plugin", "/v1/plugins/job-tracker/queries/list", "", 200),
        call("query_plugin", "/v1/plugins/job-tracker/queries/get", r#"{"job_id":"j1"}"#, 200),
        call("query_plugin", "/v1/plugins/job-tracker/queries/nothing", "{}", 404),
        call("query_plugin", "/v1/plugins/job-tracker/queries/list", "{", 400),
        call("command_plugin", remove, r#"{"job_id":"j2"}"#, 200),
        call("command_plugin", remove, r#"{"job_id":"j2"}"#, 404),
        call("command_plugin", remove, "{", 400),
        call("command_plugin", "/v1/plugins/job-tracker/commands/update", too_much, 422),
        call("update_job", "/v1/jobs/j3/events", r#"{"event_type":"queued"}"#, 200),
        call("update_job", "/v1/jobs/j3/events", r#"{"event_type":"completed","result":{"frames":12}}"#, 200),
        call("update_job", "/v1/jobs/j3/events", r#"{"event_type":"running","data":1,"node_id":"n1"}"#, 409),
        call("update_job", "/v1/jobs/j3/events", "{", 400),
        call("update_job", "/v1/jobs/j3/events", r#"{"event_kind":"running"}"#, 422),
        call(
            "command_plugin",
            "/v1/plugins/job-tracker/commands/update",
            r#"{"job_id":"j3","event_type":"running"}"#,
            409,
        ),
        call("list_jobs", "/v1/jobs", "", 200),
        call("list_jobs", "/v1/jobs?status=running&node_id=n1&after=a&limit=10", "", 200),
        call("list_jobs", "/v1/jobs?typo=1", "", 400),
        call("get_job", "/v1/jobs/j1", "", 200),
        call("get_job", "/v1/jobs/nothing", "", 404),
        call("get_job", "/v1/jobs/%00", "", 400),
        call("watch_jobs", "/v1/watch/jobs", "", 200),
        call("remove_job", "/v1/jobs/j3", "", 200),
        call("remove_job", "/v1/jobs/j3", "", 404),
        call("remove_job", "/v1/jobs/%FF", "", 400),
        call("list_nodes", "/v1/nodes", "", 200),
        call(
            "list_nodes",
            "/v1/nodes?status=online&cached_model=m&min_memory=1.5&gpu=true&after=a&limit=1",
            "",
            200,
        ),
        call("list_nodes", "/v1/nodes?gpu=perhaps", "", 400),
        call("get_node", "/v1/nodes/n2", "", 200),
        call("get_node", "/v1/nodes/nobody", "", 404),
        call("get_node", "/v1/nodes/%00", "", 400),
        call("replace_nodes", "/v1/nodes", r#"[{"node_id":"n1","resources":{"cpu_available":1}}]"#, 200),
        call("replace_nodes", "/v1/nodes", "[", 400),
        call("remove_node", "/v1/nodes/n1", "", 200),
        call("remove_node", "/v1/nodes/n1", "", 404),
        call("remove_node", "/v1/nodes/merged", "", 409),
        call("remove_node", "/v1/nodes/%00", "", 400),
        call("get_merged_registry", "/v1/merged-registry", "", 200),
        call("get_merged_jobs", "/v1/merged-jobs", "", 200),
        call("list_topics", "/v1/topics", "", 200),
        call("subscribe_topic", "/v1/topics/fleet.talk/messages", "", 200),
        call("subscribe_topic", "/v1/topics/%00/messages", "", 400),
        call("publish_message", "/v1/topics/fleet.talk/messages", "hello", 202),
        call("publish_message", "/v1/topics/%00/messages", "hello", 400),
        call("publish_message", "/v1/topics/fleet.talk/messages", message, 413),
        call("list_peers", "/v1/topics/fleet.talk/peers", "", 200),
        call("list_peers", "/v1/topics/%00/peers", "", 400),
        call("list_writers", "/v1/topics/fleet.reliable/writers", "", 200),
        call("get_roster", "/v1/fleet/roster", "", 404),
        call("put_roster", "/v1/fleet/roster", roster(), 200),
        call("put_roster", "/v1/fleet/roster", "no roster", 400),
        call("put_roster", "/v1/fleet/roster", document.clone(), 413),
        call("get_roster", "/v1/fleet/roster", "", 200),
        call("join_fleet", "/v1/fleet/join", format!(r#"{{"fleet":"{}"}}"#, fleet()), 200),
        call("join_fleet", "/v1/fleet/join", format!(r#"{{"fleet":"{}"}}"#, other_fleet()), 409),
        call("join_fleet", "/v1/fleet/join", r#"{"fleet":"dim"}"#, 400),
        call("put_fleet_record", "/v1/fleet/record", record(), 204),
        call("put_fleet_record", "/v1/fleet/record", "no record", 400),
        call("show_fleet", "/v1/fleet", "", 200),
        call("list_member_logs", format!("/v1/fleet/members/{}/logs", fleet()), "", 200),
        call("list_member_logs", "/v1/fleet/members/nobody/logs", "", 400),
        call("list_writers", "/v1/topics/%00/writers", "", 400),
        call("list_alarms", "/v1/alarms?topic=fleet.reliable", "", 200),
        call("list_alarms", "/v1/alarms?topic=%00", "", 400),
        call("list_writers", "/v1/topics/fleet.talk/writers", "", 404),
        call("get_key", "/v1/keys/policy", "", 404),
        call("make_key", "/v1/keys/policy", "", 200),
        call("make_key", "/v1/keys/self", "", 400),
        call("get_key", "/v1/keys/policy", "", 200),
        call("get_key", "/v1/keys/self", "", 400),
        call("update_state", "/v1/keys/policy/state?lifetime_seconds=3600", "the policy", 200),
        call("update_state", "/v1/keys/policy/state?lifetime_seconds=1", "the policy", 400),
        call("update_state", "/v1/keys/policy/state", document, 413),
        call("update_state", "/v1/keys/dim-state-key/state", "{}", 409),
        call("publish_path", "/v1/keys/other/path?lifetime_seconds=3600", PATH, 200),
        call("publish_path", "/v1/keys/other/path", "{", 400),
        call("publish_path", "/v1/keys/other/path", r#"{"path":"nowhere"}"#, 422),
        call("list_keys", "/v1/keys", "", 200),
        call("make_key", "/v1/keys/mistaken", "", 200),
        call("import_key", "/v1/keys/mistaken/private", exported(8), 409),
        call("import_key", "/v1/keys/mistaken/private", "no key", 422),
        call("import_key", "/v1/keys/nobody/private", "no key", 404),
        call("import_key", "/v1/keys/self/private", "no key", 400),
        call("import_key", "/v1/keys/held/private", exported(HELD), 200),
        call("forget_key", "/v1/keys/mistaken", "", 409),
        call("forget_key", "/v1/keys/mistaken?delete_key=true", "", 200),
        call("forget_key", "/v1/keys/mistaken", "", 404),
        call("forget_key", "/v1/keys/self", "", 400),
        call("forget_key", "/v1/keys/dim-state-key?delete_key=true", "", 409),
        call("resolve_name", "/v1/names/policy", "", 200),
        call("resolve_name", "/v1/names/nobody", "", 404),
        call("resolve_name", "/v1/names/x%2Fy", "", 400),
        call("get_state", "/v1/names/policy/state", "", 200),
        call("get_state", "/v1/names/nobody/state", "", 404),
        call("get_state", "/v1/names/x%2Fy/state", "", 400),
        call("get_status", "/v1/status", "", 200),
    ]
}

const LOG: &str = r#"{"script":[{"do":"log","line":"hello"}]}"#;

const PATH: &str = r#"{"path":"/ipfs/bafkreiaew4yc5xnkbux25pla4xjujaozonb7ql2k3pkdxxyk74pttv7gj4"}"#;

/// Calls of a host whose job tracker has left a dead letter and is disabled, with a plugin that is not there.
pub fn of_an_unsound_host() -> Vec<Call> {
    vec![
        call("get_health", "/healthz", "", 503),
        // It was started without a file.
        call("reload_config", "/v1/config/reload", "", 409),
        call("list_plugins", "/v1/plugins", "", 200),
        call("get_job", "/v1/jobs/j1", "", 404),
        call("replay_dead_letter", "/v1/dead-letters/1/replay", "", 409),
        // Its fleet has no roster.
        call("show_fleet", "/v1/fleet", "", 404),
        call("put_roster", "/v1/fleet/roster", roster(), 404),
        call("put_fleet_record", "/v1/fleet/record", record(), 404),
    ]
}

/// Calls of a host whose config file has an error by now.
pub fn of_a_host_with_a_wrong_config() -> Vec<Call> {
    vec![call("reload_config", "/v1/config/reload", "", 422)]
}

/// Calls of a host that has failed and does not start again yet.
pub fn of_a_host_that_is_down() -> Vec<Call> {
    vec![call("get_liveness", "/livez", "", 200), call("get_readiness", "/readyz", "", 503)]
}

/// What a stream tells of once it is open.
fn to_be_told(operation: &str) -> Call {
    match operation {
        "watch_jobs" => call("update_job", "/v1/jobs/watched/events", r#"{"event_type":"queued"}"#, 200),
        "watch_log" => call("command_plugin", "/v1/plugins/fetched/commands/run", LOG, 200),
        "watch_changes" => call("pause_plugin", "/v1/plugins/probe/pause", "", 200),
        "subscribe_topic" => call("publish_message", "/v1/topics/fleet.talk/messages", "hello", 202),
        other => panic!("suite/openapi/calls.rs does not say what the stream {other} tells of"),
    }
}

/// Two dead letters, a node, and a job with all that a job may have.
pub async fn prepare(caller: &Caller) {
    let running = r#"{"event_type":"running","data":{"node_id":"n1"},"result":1}"#;
    let job = call("update_job", "/v1/jobs/j1/events", running, 200);
    assert_eq!(caller.send(&job, &Method::POST).await.status, 200);
    let job = call("update_job", "/v1/jobs/j2/events", running, 200);
    assert_eq!(caller.send(&job, &Method::POST).await.status, 200);
    for (topic, message) in [
        ("dim.jobs.updates", "no job event"),
        ("dim.jobs.updates", "nor this"),
        ("dim.results.ready", r#"{"job_id":"j1","result_cid":"bafkqaaa"}"#),
        ("dim.nodes.status", r#"{"node_id":"n1","status":"dead","observer":"a watchdog"}"#),
        (
            "dim.nodes.heartbeat",
            r#"{"node_id":"n2","timestamp":"2026-01-01T00:00:00Z","cached_models":["m"]}"#,
        ),
    ] {
        let publish = call("publish_message", format!("/v1/topics/{topic}/messages"), message, 202);
        assert_eq!(caller.send(&publish, &Method::POST).await.status, 202);
    }
    let nodes = r#"{"nodes":[{"node_id":"merged"}]}"#;
    let registry = call("update_state", "/v1/keys/other-registry/state", nodes, 200);
    assert_eq!(caller.send(&registry, &Method::PUT).await.status, 200);
    eventually("all of it is known", async || {
        let get = async |path: &str| caller.send(&call("", path, "", 200), &Method::GET).await;
        let (job, letters) = (get("/v1/jobs/j1").await.value(), get("/v1/dead-letters").await.value());
        job["node_dead"].is_object()
            && job["result_cid"].is_string()
            && letters.as_array().is_some_and(|letters| letters.len() == 2)
            && get("/v1/nodes/n2").await.status == 200
            && get("/v1/nodes/merged").await.status == 200
    })
    .await;
}

/// What was answered; of a stream its first event.
pub struct Answer {
    pub status: u16,
    /// Without its parameters.
    pub content_type: String,
    pub body: String,
}

impl Answer {
    /// The body as JSON; text is a string.
    pub fn value(&self) -> Value {
        let text = || Value::String(self.body.clone());
        match self.content_type.as_str() {
            "text/event-stream" => {
                let data = self.body.lines().find_map(|line| line.strip_prefix("data: "));
                serde_json::from_str(data.expect("an event has data")).expect("the data is JSON")
            }
            // Each line is JSON.
            "application/x-ndjson" => text(),
            json if json.ends_with("json") => serde_json::from_str(&self.body).expect("the body is JSON"),
            _ => text(),
        }
    }
}

/// Who makes calls.
pub struct Caller {
    http: Client,
    base: String,
}

impl Caller {
    pub fn unix(socket: &Path) -> Self {
        dim_client::install_tls();
        let http = Client::builder().unix_socket(socket).no_proxy().build().unwrap();
        Self { http, base: "http://dim".to_owned() }
    }

    pub fn tcp(base: &str) -> Self {
        Self { http: dim_tests::with_token(), base: base.to_owned() }
    }

    /// Makes a call, and checks that call and answer are as the document describes them.
    pub async fn check(&self, document: &Document, call: &Call) {
        let operations = document.operations();
        let operation = operations.iter().find(|operation| operation.id == call.operation);
        let operation = operation.unwrap_or_else(|| panic!("{} is not described", call.operation));
        assert!(operation.fits(&call.path), "{} is not a path of {}", call.path, call.operation);
        if (200..300).contains(&call.status) {
            document.check_request(operation, &call.path, &String::from_utf8_lossy(&call.body));
        }
        let answer = self.send(call, &operation.method).await;
        assert_eq!(answer.status, call.status, "{} {}: {}", call.operation, call.path, answer.body);
        document.check_answer(operation, &answer);
    }

    /// Makes a call.
    pub async fn send(&self, call: &Call, method: &Method) -> Answer {
        let request = self.request(method, &call.path).body(call.body.clone());
        let response = request.header("content-type", "application/json").send().await.expect("an answer");
        let is_stream = content_type(&response) == "text/event-stream";
        if is_stream {
            let told = to_be_told(call.operation);
            let told = self.request(&Method::POST, &told.path).body(told.body);
            told.header("content-type", "application/json").send().await.expect("an answer");
        }
        answer(response, is_stream).await
    }

    /// What a web page that calls is answered.
    pub async fn of_a_page(&self, path: &str, method: &Method) -> Answer {
        let request = self.request(method, path).header("origin", "https://page.example");
        answer(request.send().await.expect("an answer"), false).await
    }

    fn request(&self, method: &Method, path: &str) -> RequestBuilder {
        self.http.request(method.clone(), format!("{}{path}", self.base))
    }
}

fn content_type(response: &Response) -> String {
    let value = response.headers().get("content-type").map(|value| value.to_str().expect("text"));
    value.unwrap_or_default().split(';').next().unwrap_or_default().trim().to_owned()
}

async fn answer(mut response: Response, is_stream: bool) -> Answer {
    let (status, content_type) = (response.status().as_u16(), content_type(&response));
    let mut body = Vec::new();
    let read = async {
        while let Some(piece) = response.chunk().await.expect("a body") {
            body.extend_from_slice(&piece);
            // An id alone is no event.
            let is_told = body.windows(6).any(|field| field == b"event:");
            if is_stream && is_told && body.ends_with(b"\n\n") {
                break;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), read).await.expect("a body within 30 seconds");
    Answer { status, content_type, body: String::from_utf8_lossy(&body).into_owned() }
}
