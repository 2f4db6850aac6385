//! What a fleet has published under a name is never replaced by what a host does not know, and what a host has published
//! is there, whatever becomes of the daemon.

use dim_ipfs::keys::TakeKeyError;
use dim_model::ident::KeyName;
use dim_server::host::{AdoptError, Adoption};
use dim_store::names::{Cause, Hold, Known, known};
use dim_tests::{Kubo, Program, Setup, TestHost, eventually, soon};
use serde_json::{Value, json};

/// A file that is on every daemon: its content is its CID.
const ELSEWHERE: &str = "/ipfs/bafkqaaa";

fn key() -> KeyName {
    "probe-key".parse().unwrap()
}

fn row(host: &TestHost) -> Option<Known> {
    known(&host.host.storage.store.snapshot().unwrap(), &key()).unwrap()
}

fn hold(host: &TestHost) -> Option<Hold> {
    row(host)?.hold
}

async fn held(host: &TestHost) -> Hold {
    eventually("the name is on hold", async || hold(host).is_some()).await;
    hold(host).unwrap()
}

async fn update(host: &TestHost, data: &str) {
    let answers = host.run(json!([{ "do": "update-state", "key": "probe-key", "data": data }])).await;
    assert_eq!(answers[0], json!({ "ok": null }));
}

async fn publish(host: &TestHost, data: &str) {
    update(host, data).await;
    published(host).await;
}

async fn published(host: &TestHost) {
    eventually("the name is published", async || row(host).is_some_and(|known| known.is_published())).await;
}

/// What any reader finds under the name.
fn read(kubo: &Kubo, host: &TestHost) -> String {
    let name = host.host.storage.keys.name(&key()).unwrap();
    let path = format!("/ipns/{name}");
    // A daemon that does not know a name yet waits a minute for it.
    let quickly = |args: &[&str]| kubo.try_ipfs(&[&["--timeout=2s"], args].concat());
    let Ok(target) = quickly(&["name", "resolve", "--nocache", &path]) else { return String::new() };
    quickly(&["cat", &target]).unwrap_or_default()
}

/// Puts a file on the daemon; returns its path.
fn add(kubo: &Kubo, content: &str) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), content).unwrap();
    let cid = kubo.ipfs(&["add", "--quieter", "--cid-version=1", file.path().to_str().unwrap()]);
    format!("/ipfs/{cid}")
}

/// A daemon on which a fleet has published `document` under the probe's key, from another program.
fn with_a_fleet(document: &str) -> Option<(Kubo, String)> {
    let kubo = Kubo::start()?;
    let path = add(&kubo, document);
    kubo.ipfs(&["key", "gen", "--type=ed25519", "probe-key"]);
    kubo.ipfs(&["name", "publish", "--key=probe-key", "--resolve=false", &path]);
    Some((kubo, path))
}

fn explained(host: &TestHost) -> String {
    hold(host).unwrap().explain(&key(), host.host.key_use(&key()))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_host_publishes_nothing_over_what_a_fleet_has_published() {
    let Some((kubo, path)) = with_a_fleet(r#"{"jobs":2500}"#) else { return };
    let host = Setup::probe().on_kubo(kubo.api()).start().await;
    let held = held(&host).await;
    assert_eq!((held.cause, held.path.as_str()), (Cause::NeverPublished, path.as_str()));
    update(&host, r#"{"jobs":0}"#).await;
    host.host.storage.commit.names.notify_one();
    // It has come to the publisher: a name after it is published.
    let other = json!([{ "do": "update-state", "key": "probe-other", "data": "beside it" }]);
    host.run(other).await;
    let beside =
        || known(&host.host.storage.store.snapshot().unwrap(), &"probe-other".parse().unwrap()).unwrap();
    eventually("another name is published", async || beside().is_some_and(|known| known.is_published()))
        .await;
    assert_eq!(read(&kubo, &host), r#"{"jobs":2500}"#);
    assert!(explained(&host).contains("dim ipns adopt probe-key import"), "{}", explained(&host));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleets_document_is_imported_before_the_host_publishes() {
    let Some((kubo, _)) = with_a_fleet(r#"{"jobs":2500}"#) else { return };
    let host = Setup::probe().on_kubo(kubo.api()).start().await;
    held(&host).await;
    update(&host, "made before the import").await;
    let adopted = host.host.adopt(&key(), Adoption::Import).await.unwrap();
    assert_eq!(adopted.imported_by, ["probe".parse().unwrap()]);
    published(&host).await;
    let document: Value = serde_json::from_str(&read(&kubo, &host)).unwrap();
    assert_eq!(document, json!({ "was": { "jobs": 2500 }, "now": "imported" }));
    assert_eq!(host.state_of("probe", "imported").await, json!({ "jobs": 2500 }));
    publish(&host, "what came next").await;
    assert_eq!(read(&kubo, &host), "what came next");
    let again = host.host.adopt(&key(), Adoption::Import).await;
    assert!(matches!(again, Err(AdoptError::NotHeld(_))), "{again:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleets_document_is_replaced_once_the_operator_says_so() {
    let Some((kubo, _)) = with_a_fleet("no JSON at all") else { return };
    let host = Setup::probe().on_kubo(kubo.api()).start().await;
    held(&host).await;
    update(&host, "the host's own").await;
    let refused = host.host.adopt(&key(), Adoption::Import).await;
    assert!(matches!(refused, Err(AdoptError::NotJson { .. })), "{refused:?}");
    assert!(hold(&host).is_some(), "a failed import decides nothing");
    host.host.adopt(&key(), Adoption::Replace).await.unwrap();
    published(&host).await;
    assert_eq!(read(&kubo, &host), "the host's own");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_with_adopt_import_takes_a_fleet_over_by_itself() {
    let Some((kubo, _)) = with_a_fleet(r#"{"jobs":2500}"#) else { return };
    let host = Setup::probe().yaml("ipfs:\n  adopt: import\n").on_kubo(kubo.api()).start().await;
    eventually("the fleet's document is imported", async || {
        serde_json::from_str::<Value>(&read(&kubo, &host)).is_ok_and(|document| document["now"] == "imported")
    })
    .await;
    assert_eq!(hold(&host), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_writer_on_a_name_stops_the_host_until_the_operator_decides() {
    let Some(kubo) = Kubo::start() else { return };
    let host = Setup::probe().on_kubo(kubo.api()).start().await;
    publish(&host, "first").await;
    publish(&host, "second").await;
    assert_eq!(hold(&host), None);
    let theirs = add(&kubo, r#"{"theirs":true}"#);
    kubo.ipfs(&["name", "publish", "--key=probe-key", "--resolve=false", &theirs]);
    update(&host, "third").await;
    let held = held(&host).await;
    assert_eq!((held.cause, held.path.as_str()), (Cause::OtherWriter, theirs.as_str()));
    assert_eq!(read(&kubo, &host), r#"{"theirs":true}"#);
    assert!(explained(&host).contains("another writer"), "{}", explained(&host));
    host.host.adopt(&key(), Adoption::Import).await.unwrap();
    published(&host).await;
    let document: Value = serde_json::from_str(&read(&kubo, &host)).unwrap();
    assert_eq!(document["was"], json!({ "theirs": true }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_was_killed_while_it_published_knows_its_own_record() {
    let Some(kubo) = Kubo::start() else { return };
    let host = Setup::probe().on_kubo(kubo.api()).start().await;
    publish(&host, "first").await;
    // As if the daemon had accepted the second value and the host had been killed before it heard of that.
    let second = add(&kubo, "second");
    let path = second.parse().unwrap();
    host.host
        .storage
        .commit
        .write(move |write| dim_store::names::attempt(write, &key(), &path))
        .await
        .unwrap();
    kubo.ipfs(&["name", "publish", "--key=probe-key", "--resolve=false", &second]);
    publish(&host, "third").await;
    assert_eq!(hold(&host), None);
    assert_eq!(read(&kubo, &host), "third");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_emptied_daemon_has_lost_is_published_again() {
    let Some(mut kubo) = Kubo::start() else { return };
    let host = Setup::probe().on_kubo(kubo.api()).start().await;
    publish(&host, "of the fleet").await;
    kubo.replace_by_an_empty_one();
    eventually("the record and the document are back", async || read(&kubo, &host) == "of the fleet").await;
    published(&host).await;
    assert_eq!(hold(&host), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_a_pin_and_a_record_that_a_daemon_has_lost_are_put_again_after_it_was_away() {
    let Some(mut kubo) = Kubo::start() else { return };
    let host = Setup::probe().on_kubo(kubo.api()).start().await;
    publish(&host, "of the fleet").await;
    let path = row(&host).unwrap().path;
    kubo.ipfs(&["key", "rm", "probe-key"]);
    kubo.ipfs(&["pin", "rm", path.as_str()]);
    kubo.kill();
    kubo.restart();
    eventually("the key and the pin are back", async || {
        let keys = kubo.try_ipfs(&["key", "list"]).unwrap_or_default();
        keys.contains("probe-key") && kubo.try_ipfs(&["pin", "ls", "--type=recursive", path.as_str()]).is_ok()
    })
    .await;
    assert_eq!(read(&kubo, &host), "of the fleet");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_embedded_backend_has_accepted_is_published_on_a_daemon() {
    let Some(kubo) = Kubo::start() else { return };
    let host = Setup::probe().start().await;
    publish(&host, "without a daemon").await;
    let dir = host.stop().await;
    let host = Setup::probe().on_kubo(kubo.api()).start_in(dir).await;
    eventually("the daemon has it", async || read(&kubo, &host) == "without a daemon").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_below_a_name_leads_below_what_the_name_points_to() {
    let Some(kubo) = Kubo::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    std::fs::write(dir.path().join("sub/x.json"), r#"{"below":true}"#).unwrap();
    std::fs::create_dir(dir.path().join("v1")).unwrap();
    std::fs::copy(dim_tests::PROBE, dir.path().join("v1/p.wasm")).unwrap();
    let root = kubo.ipfs(&["add", "-r", "--quieter", "--cid-version=1", dir.path().to_str().unwrap()]);
    kubo.ipfs(&["key", "gen", "--type=ed25519", "other"]);
    kubo.ipfs(&["name", "publish", "--key=other", &format!("/ipfs/{root}")]);
    let keys = kubo.ipfs(&["key", "list", "-l", "--ipns-base=base36"]);
    let other = keys.lines().find(|line| line.ends_with("other")).unwrap().split_whitespace().next().unwrap();
    let host = Setup::probe().on_kubo(kubo.api()).start().await;
    let below = format!("/ipns/{other}/sub/x.json").parse().unwrap();
    let path = host.host.exchange.links.backend.end_of_chain(below).await.unwrap();
    assert_eq!(path.as_str(), format!("/ipfs/{root}/sub/x.json"));
    let (_, file) = host.host.exchange.links.backend.content.file(&path, 1 << 20).await.unwrap();
    assert_eq!(&file[..], br#"{"below":true}"#);
    let component = format!("/ipns/{other}/v1/p.wasm").parse().unwrap();
    assert_eq!(host.host.fetch(&component).await.unwrap(), std::fs::read(dim_tests::PROBE).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_points_to_a_domain_is_read_as_plain_ipfs_reads_it() {
    let records = format!("fleet.example.org:{ELSEWHERE}");
    let Some(kubo) = Kubo::start_with_dnslink(&records) else { return };
    let host = Setup::probe().on_kubo(kubo.api()).start().await;
    kubo.ipfs(&["key", "gen", "--type=ed25519", "other"]);
    kubo.ipfs(&["name", "publish", "--key=other", "--resolve=false", "/ipns/fleet.example.org"]);
    let keys = kubo.ipfs(&["key", "list", "-l", "--ipns-base=base36"]);
    let other = keys.lines().find(|line| line.ends_with("other")).unwrap().split_whitespace().next().unwrap();
    let record = host.host.exchange.links.backend.record(&other.parse().unwrap()).await.unwrap();
    assert_eq!(record.path.as_str(), "/ipns/fleet.example.org");
    let path = host.host.exchange.links.backend.end_of_chain(record.path).await.unwrap();
    assert_eq!(path.as_str(), ELSEWHERE);
    let unknown = "/ipns/nowhere.example.org".parse().unwrap();
    assert!(host.host.exchange.links.backend.end_of_chain(unknown).await.is_err());
    // Without a network there is a clear refusal.
    let embedded = Setup::probe().start().await;
    let refused =
        embedded.host.exchange.links.backend.end_of_chain("/ipns/fleet.example.org".parse().unwrap()).await;
    assert!(refused.unwrap_err().to_string().contains("DNSLink"));
}

/// The state of a fleet of plain Kubo programs, which keep all of it in one document.
const FLEET: &str = r#"{"nodes":[{"node_id":"n1","status":"online","last_seen":"2026-01-01T00:00:00Z","resources":null,"rack":"r7"},{"status":"no id"}],"jobs":{"j1":{"state":"running","node_id":"n1","progress":0.10,"data":{"e":1E5,"b":1,"a":2,"b":3}},"j2":{"state":"COMPLETED"},"j3":{"state":"paused"},"x":{"state":"running","job_id":"y"}},"fleet":"north","updated_at":"2026-01-01T00:00:00Z"}"#;

/// A daemon with that state, and an empty host of the bundled plugins on it.
fn fleet_and_host() -> Option<(Kubo, Program, tempfile::TempDir)> {
    let kubo = Kubo::start()?;
    let path = add(&kubo, FLEET);
    kubo.ipfs(&["key", "gen", "--type=ed25519", "dim-state-key"]);
    kubo.ipfs(&["name", "publish", "--key=dim-state-key", "--resolve=false", &path]);
    let dir = tempfile::tempdir().unwrap();
    let host = Program::start(DIM.as_ref(), &dir.path().join("state"), &["--kubo", kubo.api()]);
    Some((kubo, host, dir))
}

const DIM: &str = env!("CARGO_BIN_EXE_dim-under-test");

fn fleets_document(kubo: &Kubo) -> Value {
    let keys = kubo.ipfs(&["key", "list", "-l", "--ipns-base=base36"]);
    let line = keys.lines().find(|line| line.split_whitespace().nth(1) == Some("dim-state-key")).unwrap();
    let name = line.split_whitespace().next().unwrap();
    let target = kubo.ipfs(&["name", "resolve", "--nocache", name]);
    serde_json::from_str(&kubo.ipfs(&["cat", &target])).unwrap()
}

#[test]
fn the_jobs_and_nodes_of_a_fleet_survive_an_empty_host_and_its_import() {
    let Some((kubo, host, dir)) = fleet_and_host() else { return };
    let status = || host.dim(&["status"]);
    soon(|| String::from_utf8_lossy(&status().stdout).contains("on hold"));
    let heartbeat = |node: &str| {
        let heartbeat = format!(r#"{{"node_id":"{node}","status":"online"}}"#);
        assert!(host.dim(&["topic", "pub", "dim.nodes.heartbeat", &heartbeat]).status.success());
    };
    heartbeat("n2");
    soon(|| host.json(&["node", "ls"]).as_array().is_some_and(|nodes| nodes.len() == 1));
    assert_eq!(fleets_document(&kubo)["fleet"], "north", "the registry without its nodes is not published");
    // What is shown is what the name points to, and not what is held back.
    let shown = host.dim(&["ipns", "get-state", "dim-state-key"]).stdout;
    assert_eq!(serde_json::from_slice::<Value>(&shown).unwrap()["fleet"], "north");
    let names = host.json(&["status"])["names"].clone();
    let name = names.as_array().unwrap().iter().find(|name| name["key"] == "dim-state-key").unwrap();
    assert_eq!(host.json(&["ipns", "resolve", "dim-state-key"])["path"], name["hold"]["path"]);

    // What a plugin writes, nobody writes by accident.
    let file = dir.path().join("file");
    std::fs::write(&file, "{}").unwrap();
    let file = file.to_str().unwrap();
    let refused = host.dim(&["ipns", "update-state", "dim-state-key", file]);
    assert!(!refused.status.success());
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(error.contains("node-registry") && error.contains("--force"), "{error}");
    let refused = host.dim(&["ipns", "publish", "dim-state-key", ELSEWHERE]);
    assert!(!refused.status.success());

    let adopted = host.dim(&["ipns", "adopt", "dim-state-key", "import", "--output", "json"]);
    // A row without an id is counted by the registry and the watchdog; two jobs cannot be read.
    let warning = String::from_utf8_lossy(&adopted.stderr);
    assert!(warning.contains("4 rows cannot be read and are left out; /ipfs/"), "{warning}");
    let adopted: Value = serde_json::from_slice(&adopted.stdout).unwrap();
    let counts = (&adopted["refused"], &adopted["answers"]["job-tracker"]["refused"]);
    assert_eq!(counts, (&json!(4), &json!(2)));
    let told = String::from_utf8_lossy(&status().stdout).into_owned();
    assert!(told.contains("could not be read and are left out: 4"), "{told}");
    let importers = ["heartbeat-watchdog", "job-tracker", "node-registry"];
    assert_eq!(adopted["imported_by"], json!(importers));
    soon(|| fleets_document(&kubo)["nodes"].as_array().is_some_and(|nodes| nodes.len() == 2));
    let document = fleets_document(&kubo);
    assert_eq!(document["fleet"], "north");
    let node = document["nodes"].as_array().unwrap().iter().find(|node| node["node_id"] == "n1").unwrap();
    assert_eq!((&node["rack"], &node["status"]), (&json!("r7"), &json!("online")));
    assert_eq!(host.json(&["job", "get", "j1"])["node_id"], "n1");
    assert_eq!(host.json(&["job", "get", "j2"])["status"], "completed");
    soon(|| fleets_document(&kubo)["active_jobs"]["j1"]["progress"] == 0.1);
    let text = String::from_utf8(host.dim(&["ipns", "get-state", "dim-state-key"]).stdout).unwrap();
    assert!(text.contains(r#"{"e":1E5,"b":1,"a":2,"b":3}"#), "to the letter: {text}");
    let status = status();
    assert!(!String::from_utf8_lossy(&status.stdout).contains("on hold"));

    let forced = host.dim(&["ipns", "update-state", "dim-state-key", file, "--force"]);
    assert!(forced.status.success(), "{forced:?}");
}

#[test]
fn a_value_for_a_name_that_is_then_on_hold_is_told_as_that() {
    let Some((kubo, _path)) = with_a_fleet("{}") else { return };
    let dir = tempfile::tempdir().unwrap();
    let host = Program::start(DIM.as_ref(), &dir.path().join("state"), &["--kubo", kubo.api()]);
    let file = dir.path().join("file");
    std::fs::write(&file, "mine").unwrap();
    let set = host.dim(&["ipns", "update-state", "probe-key", file.to_str().unwrap()]);
    let warning = String::from_utf8_lossy(&set.stderr);
    assert!(warning.contains("on hold") && warning.contains("dim ipns adopt probe-key"), "{warning}");
    assert!(!warning.contains("keeps trying"), "{warning}");
}

#[test]
fn a_second_empty_host_on_a_daemon_does_not_replace_the_state_of_the_first() {
    let Some(kubo) = Kubo::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let first = Program::start(DIM.as_ref(), &dir.path().join("first"), &["--kubo", kubo.api()]);
    let heartbeat = |host: &Program, node: &str| {
        let heartbeat = format!(r#"{{"node_id":"{node}"}}"#);
        assert!(host.dim(&["topic", "pub", "dim.nodes.heartbeat", &heartbeat]).status.success());
    };
    for node in ["n1", "n2", "n3"] {
        heartbeat(&first, node);
    }
    let names = |host: &Program| host.json(&["status"])["names"].clone();
    let of_nodes = |host: &Program| {
        names(host).as_array().and_then(|all| all.iter().find(|name| name["key"] == "dim-state-key").cloned())
    };
    soon(|| of_nodes(&first).is_some_and(|name| name["published"] == true));
    soon(|| fleets_document(&kubo)["nodes"].as_array().is_some_and(|nodes| nodes.len() == 3));
    let second = Program::start(DIM.as_ref(), &dir.path().join("second"), &["--kubo", kubo.api()]);
    soon(|| of_nodes(&second).is_some_and(|name| name["hold"]["cause"] == "never-published"));
    heartbeat(&second, "n4");
    soon(|| of_nodes(&second).is_some_and(|name| name["published"] == false));
    assert!(fleets_document(&kubo)["nodes"].as_array().is_some_and(|nodes| nodes.len() >= 3));
    assert!(of_nodes(&first).is_some_and(|name| name["hold"].is_null()));
}

/// The trouble of a kind, if `/healthz` tells of one.
fn trouble(host: &Program, code: &str) -> Option<Value> {
    let troubles = host.json(&["status"])["trouble_details"].clone();
    troubles.as_array()?.iter().find(|trouble| trouble["code"] == code).cloned()
}

#[test]
fn a_name_that_can_never_be_published_is_an_error_at_once_however_often_its_value_changes() {
    let Some((kubo, host, _dir)) = fleet_and_host() else { return };
    soon(|| trouble(&host, "name-on-hold").is_some());
    host.json(&["ipns", "adopt", "dim-state-key", "replace"]);
    let heartbeat = |node: &str| {
        let heartbeat = format!(r#"{{"node_id":"{node}","status":"online"}}"#);
        assert!(host.dim(&["topic", "pub", "dim.nodes.heartbeat", &heartbeat]).status.success());
    };
    heartbeat("n1");
    soon(|| fleets_document(&kubo)["nodes"].as_array().is_some_and(|nodes| !nodes.is_empty()));
    assert_eq!(trouble(&host, "name-late"), None);
    kubo.ipfs(&["key", "rm", "dim-state-key"]);
    heartbeat("n2");
    soon(|| trouble(&host, "name-late").is_some());
    let first = trouble(&host, "name-late").unwrap();
    assert_eq!((&first["severity"], &first["subject"]), (&json!("error"), &json!("dim-state-key")));
    let message = first["message"].as_str().unwrap();
    assert!(message.contains("ipfs key import dim-state-key"), "it says why and what to do: {message}");
    let sequence = |host: &Program| {
        let names = host.json(&["status"])["names"].clone();
        let of_nodes = |name: &&Value| name["key"] == "dim-state-key";
        names.as_array().unwrap().iter().find(of_nodes).unwrap()["sequence"].as_u64().unwrap()
    };
    let before = sequence(&host);
    heartbeat("n3");
    soon(|| sequence(&host) > before);
    let later = trouble(&host, "name-late").unwrap();
    assert_eq!(later["since"], first["since"], "a newer value has waited no shorter");
    let waits = "dim_name_waiting_seconds{key=\"dim-state-key\"} ";
    let metrics = host.metrics();
    let waited = metrics.lines().find_map(|line| line.strip_prefix(waits)).unwrap();
    assert!(waited.parse::<f64>().unwrap() > 0.0, "{waited}");
}

#[test]
fn a_daemon_with_another_key_of_the_name_is_an_error_at_once() {
    let Some(mut kubo) = Kubo::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let host = Program::start(DIM.as_ref(), &dir.path().join("state"), &["--kubo", kubo.api()]);
    assert!(host.dim(&["topic", "pub", "dim.nodes.heartbeat", r#"{"node_id":"n1"}"#]).status.success());
    soon(|| kubo.ipfs(&["key", "list"]).contains("dim-state-key"));
    soon(|| fleets_document(&kubo)["nodes"].as_array().is_some_and(|nodes| !nodes.is_empty()));
    kubo.kill();
    kubo.ipfs(&["key", "rm", "dim-state-key"]);
    kubo.ipfs(&["key", "gen", "--type=ed25519", "dim-state-key"]);
    kubo.restart();
    soon(|| trouble(&host, "name-late").is_some());
    let told = trouble(&host, "name-late").unwrap()["message"].clone();
    assert!(told.as_str().unwrap().contains("another key of the name dim-state-key"), "{told}");
}

/// A daemon with the probe's key, under which a fleet has published `document` with a record that has expired.
fn with_an_expired_record(document: &str) -> Option<(Kubo, String)> {
    let kubo = Kubo::start()?;
    let path = add(&kubo, document);
    kubo.ipfs(&["key", "gen", "--type=ed25519", "probe-key"]);
    kubo.ipfs(&["name", "publish", "--key=probe-key", "--resolve=false", "--lifetime=2s", &path]);
    let listed = kubo.ipfs(&["key", "list", "-l", "--ipns-base=base36"]);
    let name = listed.lines().find(|line| line.ends_with("probe-key")).unwrap().split_whitespace().next();
    let name = name.unwrap().to_owned();
    soon(|| kubo.try_ipfs(&["--timeout=2s", "name", "get", &name]).is_err());
    Some((kubo, path))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adopted_key_whose_record_has_expired_is_on_hold_until_the_record_is_back() {
    let Some((mut kubo, path)) = with_an_expired_record(r#"{"jobs":2500}"#) else { return };
    let host = Setup::probe().on_kubo(kubo.api()).start().await;
    update(&host, r#"{"jobs":0}"#).await;
    let without = held(&host).await;
    assert_eq!((without.cause, without.sequence), (Cause::NoRecord, None));
    assert_eq!(without.path.as_str(), format!("/ipns/{}", host.host.storage.keys.name(&key()).unwrap()));
    assert!(explained(&host).contains("dim ipns adopt probe-key replace"), "{}", explained(&host));
    let refused = host.host.adopt(&key(), Adoption::Import).await;
    assert!(matches!(refused, Err(AdoptError::NoRecord(_))), "{refused:?}");
    assert_eq!(read(&kubo, &host), "", "nothing was published over the record");
    // As the daemon does by itself a minute after its start.
    kubo.ipfs(&["name", "publish", "--key=probe-key", "--resolve=false", &path]);
    kubo.kill();
    kubo.restart();
    eventually("the record is seen", async || {
        hold(&host).is_some_and(|hold| hold.cause == Cause::NeverPublished && hold.path.as_str() == path)
    })
    .await;
    let adopted = host.host.adopt(&key(), Adoption::Import).await.unwrap();
    assert_eq!(adopted.imported_by, ["probe".parse().unwrap()]);
    published(&host).await;
    let document: Value = serde_json::from_str(&read(&kubo, &host)).unwrap();
    assert_eq!(document["was"], json!({ "jobs": 2500 }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_with_adopt_replace_publishes_under_a_key_without_a_record() {
    let Some((kubo, _)) = with_an_expired_record("expired") else { return };
    let host = Setup::probe().yaml("ipfs:\n  adopt: replace\n").on_kubo(kubo.api()).start().await;
    publish(&host, "the host's own").await;
    assert_eq!(read(&kubo, &host), "the host's own");
    publish(&host, "and what came next").await;
    assert_eq!(hold(&host), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_with_adopt_import_waits_for_a_record_that_has_expired() {
    let Some((mut kubo, path)) = with_an_expired_record(r#"{"jobs":2500}"#) else { return };
    let host = Setup::probe().yaml("ipfs:\n  adopt: import\n").on_kubo(kubo.api()).start().await;
    update(&host, "made before the import").await;
    assert_eq!(held(&host).await.cause, Cause::NoRecord);
    kubo.ipfs(&["name", "publish", "--key=probe-key", "--resolve=false", &path]);
    kubo.kill();
    kubo.restart();
    eventually("the fleet's document is imported", async || {
        serde_json::from_str::<Value>(&read(&kubo, &host)).is_ok_and(|document| document["now"] == "imported")
    })
    .await;
    assert_eq!(hold(&host), None);
}

/// What `dim ipns ls` shows of a key.
fn listed(host: &Program, key: &str) -> Option<Value> {
    host.json(&["ipns", "ls"]).as_array().unwrap().iter().find(|row| row["key"] == key).cloned()
}

/// The first host of a daemon, which publishes nodes under `dim-state-key`, and the name's target.
fn first_host(kubo: &Kubo, dir: &std::path::Path) -> Program {
    let host = Program::start(DIM.as_ref(), &dir.join("first"), &["--kubo", kubo.api()]);
    assert!(host.dim(&["topic", "pub", "dim.nodes.heartbeat", r#"{"node_id":"n1"}"#]).status.success());
    soon(|| listed(&host, "dim-state-key").is_some_and(|row| row["published"] == true));
    host
}

#[test]
fn another_hosts_key_that_was_only_asked_for_is_no_error_and_can_be_forgotten() {
    let Some(kubo) = Kubo::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let first = first_host(&kubo, dir.path());
    let config = dir.path().join("config.yaml");
    std::fs::write(&config, "ipfs: { ipns_key_name: mine }").unwrap();
    let args = ["--kubo", kubo.api(), "--config", config.to_str().unwrap()];
    let second = Program::start(DIM.as_ref(), &dir.path().join("second"), &args);
    second.json(&["ipns", "key-id", "dim-state-key"]);
    soon(|| listed(&second, "dim-state-key").is_some_and(|row| row["hold"]["cause"] == "never-published"));
    let row = listed(&second, "dim-state-key").unwrap();
    assert_eq!((&row["held_by"], &row["used_by"]), (&json!("daemon"), &json!([])));
    assert_eq!(listed(&second, "mine").unwrap()["held_by"], "host");
    assert_eq!(trouble(&second, "name-on-hold"), None, "it keeps nothing of this host back");
    let refused = second.dim(&["ipns", "adopt", "dim-state-key", "import"]);
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(error.contains("dim ipns forget dim-state-key"), "{error}");
    let forgotten = second.json(&["ipns", "forget", "dim-state-key"]);
    assert_eq!((&forgotten["name"], &forgotten["deleted_key"]), (&row["name"], &json!(false)));
    assert_eq!(listed(&second, "dim-state-key"), None);
    assert_eq!(second.dim(&["ipns", "forget", "dim-state-key"]).status.code(), Some(3));
    // What runs has its key, and another host its record.
    let refused = second.dim(&["ipns", "forget", "mine"]);
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && error.contains("node-registry"), "{error}");
    assert!(kubo.ipfs(&["key", "list"]).contains("dim-state-key"));
    assert_eq!(fleets_document(&kubo)["nodes"][0]["node_id"], "n1");
    assert_eq!(listed(&first, "dim-state-key").unwrap()["hold"], Value::Null);
}

#[test]
fn a_key_that_the_config_named_by_mistake_is_forgotten_without_touching_its_record() {
    let Some(kubo) = Kubo::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let _first = first_host(&kubo, dir.path());
    let state = dir.path().join("second");
    let mistaken = Program::start(DIM.as_ref(), &state, &["--kubo", kubo.api()]);
    assert!(mistaken.dim(&["topic", "pub", "dim.nodes.heartbeat", r#"{"node_id":"n2"}"#]).status.success());
    soon(|| trouble(&mistaken, "name-on-hold").is_some());
    let refused = mistaken.dim(&["ipns", "forget", "dim-state-key"]);
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(error.contains("plugin") && error.contains("ipns_key_name"), "{error}");
    mistaken.interrupt();
    mistaken.wait();
    let config = dir.path().join("config.yaml");
    std::fs::write(&config, "ipfs: { ipns_key_name: mine }").unwrap();
    let args = ["--kubo", kubo.api(), "--config", config.to_str().unwrap()];
    let mended = Program::start(DIM.as_ref(), &state, &args);
    soon(|| trouble(&mended, "name-on-hold").is_some_and(|it| it["subject"] == "dim-state-key"));
    let told = trouble(&mended, "name-on-hold").unwrap()["message"].clone();
    let told = told.as_str().unwrap();
    assert!(told.contains("dim ipns forget dim-state-key") && !told.contains("import"), "{told}");
    mended.json(&["ipns", "forget", "dim-state-key"]);
    assert_eq!(trouble(&mended, "name-on-hold"), None);
    assert_eq!(fleets_document(&kubo)["nodes"][0]["node_id"], "n1");
    mended.interrupt();
    mended.wait();
    let again = Program::start(DIM.as_ref(), &state, &args);
    assert_eq!(listed(&again, "dim-state-key"), None, "it stays forgotten");
}

#[test]
fn a_key_that_the_host_made_is_forgotten_only_with_its_private_half() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let host = Program::start(DIM.as_ref(), &state, &["--embedded"]);
    host.json(&["ipns", "publish", "old-name", ELSEWHERE]);
    let refused = host.dim(&["ipns", "forget", "old-name"]);
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(5) && error.contains("--delete-key"), "{error}");
    assert!(state.join("keys/old-name").exists());
    let forgotten = host.json(&["ipns", "forget", "old-name", "--delete-key"]);
    assert_eq!(forgotten["deleted_key"], true);
    assert!(!state.join("keys/old-name").exists());
    assert!(!host.dim(&["ipns", "resolve", "old-name"]).status.success());
}

#[test]
fn a_host_that_has_just_started_adopts_what_its_names_point_to() {
    let Some((kubo, host, _dir)) = fleet_and_host() else { return };
    let adopted = host.json(&["ipns", "adopt", "dim-state-key", "import"]);
    assert_eq!(adopted["imported_by"], json!(["heartbeat-watchdog", "job-tracker", "node-registry"]));
    soon(|| fleets_document(&kubo)["active_jobs"]["j1"]["progress"] == 0.1);
    // One that has nothing to adopt is told so.
    assert_eq!(host.dim(&["ipns", "adopt", "dim-state-key", "import"]).status.code(), Some(5));
}

#[test]
fn a_host_that_is_ready_tells_of_the_names_on_hold() {
    let Some((_kubo, host, _dir)) = fleet_and_host() else { return };
    let ready = || {
        let curl = std::process::Command::new("curl")
            .args(["--silent", "--fail", "--unix-socket"])
            .arg(host.socket())
            .arg("http://dim.localhost/readyz")
            .output();
        curl.unwrap().status.success()
    };
    soon(ready);
    assert!(trouble(&host, "name-on-hold").is_some());
}

/// A file with what `ipfs key export` writes of a key.
fn exported(kubo: &Kubo, key: &str, options: &[&str]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    kubo.ipfs(&[&["key", "export", "-o", path], options, &[key]].concat());
    file
}

#[test]
fn the_exported_key_of_a_daemon_becomes_the_hosts_own_and_survives_an_emptied_daemon() {
    let Some((mut kubo, host, dir)) = fleet_and_host() else { return };
    host.json(&["ipns", "adopt", "dim-state-key", "import"]);
    soon(|| listed(&host, "dim-state-key").is_some_and(|row| row["published"] == true));
    let file = exported(&kubo, "dim-state-key", &[]);
    let import = |key: &str, file: &tempfile::NamedTempFile| {
        host.dim(&["ipns", "import-key", key, file.path().to_str().unwrap()])
    };
    kubo.ipfs(&["key", "gen", "--type=ed25519", "other"]);
    let refused = import("dim-state-key", &exported(&kubo, "other", &[]));
    assert_eq!(refused.status.code(), Some(5), "it is the key of another name");
    assert_eq!(listed(&host, "dim-state-key").unwrap()["held_by"], "daemon");
    assert!(import("dim-state-key", &file).status.success());
    let row = listed(&host, "dim-state-key").unwrap();
    assert_eq!(row["held_by"], "host");
    let kept = std::fs::metadata(dir.path().join("state/keys/dim-state-key")).unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&kept.permissions()) & 0o777, 0o600);
    let secret = std::fs::read(file.path()).unwrap();
    assert!(!host.log().as_bytes().windows(16).any(|part| part == &secret[4..20]), "it is not logged");
    kubo.replace_by_an_empty_one();
    soon(|| kubo.ipfs(&["key", "list"]).contains("dim-state-key"));
    soon(|| kubo.try_ipfs(&["--timeout=2s", "name", "get", row["name"].as_str().unwrap()]).is_ok());
    assert_eq!(fleets_document(&kubo)["fleet"], "north");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_in_pem_is_the_same_key_and_what_is_no_key_is_refused() {
    let Some(kubo) = Kubo::start() else { return };
    kubo.ipfs(&["key", "gen", "--type=ed25519", "probe-key"]);
    let host = Setup::probe().on_kubo(kubo.api()).start().await;
    let name = host.host.storage.keys.name(&key()).unwrap();
    let refused = host.host.storage.keys.take_private(&key(), b"no key");
    assert!(matches!(refused, Err(TakeKeyError::Exported(_))), "{refused:?}");
    let file = exported(&kubo, "probe-key", &["--format=pem-pkcs8-cleartext"]);
    let pem = std::fs::read(file.path()).unwrap();
    assert_eq!(host.host.storage.keys.take_private(&key(), &pem).unwrap(), name);
    // There may be a record of it that has expired, whoever has the private half.
    update(&host, "under the key of another").await;
    assert_eq!(held(&host).await.cause, Cause::NoRecord);
    let host = Setup::probe().on_kubo(kubo.api()).start_in(host.stop().await).await;
    assert!(matches!(host.host.storage.keys.get(&key()), Some(dim_ipfs::keys::Key::Own(_))));
    assert!(host.host.storage.keys.is_foreign(&key()));
    kubo.ipfs(&["key", "gen", "--type=rsa", "--size=2048", "of-rsa"]);
    let rsa = std::fs::read(exported(&kubo, "of-rsa", &[]).path()).unwrap();
    let refused = host.host.storage.keys.take_private(&key(), &rsa).unwrap_err().to_string();
    assert!(refused.contains("RSA"), "{refused}");
}

#[test]
fn a_backup_names_the_keys_that_are_in_the_daemon_alone() {
    let Some((kubo, host, dir)) = fleet_and_host() else { return };
    std::fs::write(dir.path().join("passphrase"), "correct horse battery staple").unwrap();
    let passphrase = dir.path().join("passphrase");
    let backup = |name: &str| {
        let file = dir.path().join(name);
        let args = ["backup", file.to_str().unwrap(), "--passphrase-file", passphrase.to_str().unwrap()];
        host.dim(&[&args[..], &["--output", "json"]].concat())
    };
    let made = backup("first");
    let warning = String::from_utf8_lossy(&made.stderr);
    assert!(made.status.success() && warning.contains("ipfs key export -o FILE dim-state-key"), "{warning}");
    let told: Value = serde_json::from_slice(&made.stdout).unwrap();
    assert_eq!(told["keys_not_in_backup"], json!(["dim-state-key"]));
    let file = exported(&kubo, "dim-state-key", &[]);
    host.json(&["ipns", "import-key", "dim-state-key", file.path().to_str().unwrap()]);
    let made = backup("second");
    assert_eq!(String::from_utf8_lossy(&made.stderr), "");
    let told: Value = serde_json::from_slice(&made.stdout).unwrap();
    assert_eq!(told["keys_not_in_backup"], json!([]));
}
