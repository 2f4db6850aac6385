//! Fuzzes the watchdog and the node registry with heartbeats, verdicts and commands.

use heartbeat_watchdog::Watchdog;
use node_registry::NodeRegistry;

use crate::fleet::Fleet;

const WATCHDOG: &str = r#"{"heartbeat_topic":"heartbeats","status_topic":"status","observer":"me",
    "suspect_after_ms":60000,"dead_after_ms":120000,"mass_silence_min":3,"forget_after_days":7,
    "bind_nodes":"first","node_peers":["n9=12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"]}"#;

const REGISTRY: &str = r#"{"heartbeat_topic":"heartbeats","status_topic":"status","ipns_key_name":"key",
    "registry_ipns":"other","trusted_observers":[],"publish_every_ms":200,"forget_after_days":7,
    "bind_nodes":"first","node_peers":["n9=12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"]}"#;

/// Runs the same steps on both plugins.
pub fn run(data: &[u8]) {
    let topics = [(b'h', "heartbeats"), (b's', "status")];
    let commands = [(b'U', "unbind"), (b'P', "put"), (b'R', "remove")];
    let mut watchdog: Fleet<Watchdog> = Fleet::new(WATCHDOG);
    watchdog.run(data, &topics[..1], &commands);
    for verdict in watchdog.host.take_published() {
        let verdict: serde_json::Value = serde_json::from_slice(&verdict.data).expect("a verdict is JSON");
        assert!(verdict["node_id"].is_string() && verdict["status"].is_string(), "{verdict}");
    }
    let known = watchdog.query("list", "{}");
    speak_for(&mut watchdog);
    falls_silent(&mut watchdog);
    let timers = watchdog.host.timers();
    for node in known.as_array().expect("a list") {
        let id = node["node_id"].as_str().expect("an id");
        assert!(timers.contains_key(id), "node {id} has no timer");
    }
    let mut registry: Fleet<NodeRegistry> = Fleet::new(REGISTRY);
    registry.run(data, &topics, &commands);
    speak_for(&mut registry);
    let listed = registry.query("list", "{}");
    for node in listed.as_array().expect("a list") {
        let id = &node["node_id"];
        let one = registry.query("get", &serde_json::json!({ "node_id": id }).to_string());
        assert_eq!(one["node_id"], *id);
    }
    if let Some(document) = registry.document("key") {
        assert!(document.is_object(), "{document}");
    }
}

/// Checks the bindings of nodes after any input: only the configured peer may publish for a node with one, and only the
/// first peer for a new node.
fn speak_for<P: dim_guest::Plugin>(fleet: &mut Fleet<P>) {
    let mut beat =
        |node: &str, who: u8| fleet.hear("heartbeats", who, format!("{{\"node_id\":{node:?}}}").as_bytes());
    assert!(
        !beat("n9", b'2') && beat("n9", b'3') && !beat("n9", b'4'),
        "only its configured peer may publish for n9"
    );
    let new = "a node that nobody has heard of";
    assert!(
        beat(new, b'4') && !beat(new, b'3') && beat(new, b'4'),
        "only the first peer may publish for a new node"
    );
}

/// Checks the verdicts after any input: a silent node becomes dead, and a node with heartbeats does not.
fn falls_silent(watchdog: &mut Fleet<Watchdog>) {
    let beat = |watchdog: &mut Fleet<Watchdog>, node: &str| {
        assert!(watchdog.hear("heartbeats", b'5', format!("{{\"node_id\":{node:?}}}").as_bytes()));
    };
    let (silent, heard) = ("one that falls silent", "one that does not");
    beat(watchdog, silent);
    watchdog.host.take_published();
    for _ in 0..20 {
        beat(watchdog, heard);
        watchdog.pass(std::time::Duration::from_secs(30));
    }
    let said: Vec<_> = watchdog.host.take_published();
    let of = |node: &str| {
        let mut verdicts =
            said.iter().map(|said| serde_json::from_slice::<serde_json::Value>(&said.data).expect("JSON"));
        verdicts.rfind(|verdict| verdict["node_id"] == node).map(|verdict| verdict["status"].clone())
    };
    assert_eq!(of(silent), Some("dead".into()));
    assert_eq!(of(heard), None);
}

/// Returns inputs with nodes that start, fall silent, recover, and have heartbeats of several peers.
pub fn seeds() -> Vec<Vec<u8>> {
    super::texts([
        "h2{\"node_id\":\"a\",\"timestamp\":\"2026-01-01T00:00:00Z\",\"gpu\":true,\"memory\":8,\"cached_models\":[\"m\"]}\n\
         h3{\"node_id\":\"a\"}\n+70\n+70\nh2{\"node_id\":\"a\"}\n@\n~300\n+30",
        "h2{\"node_id\":\"a\"}\nh2{\"node_id\":\"b\"}\nh4{\"node_id\":\"c\"}\n+61\n+200\n+130\n+700000\n\
         s1{\"node_id\":\"a\",\"status\":\"dead\",\"observer\":\"o\",\"timestamp\":\"2026-01-01T00:01:00Z\"}\n\
         U{\"node_id\":\"b\"}\nh3{\"node_id\":\"b\"}",
        "h2{\"node_id\":\"a\",\"timestamp\":1767268800000,\"instance\":\"x\",\"every_ms\":300000}\n\
         h2{\"node_id\":\"a\",\"instance\":\"y\",\"resources\":{\"gpu_available\":[[[1.50]]]}}\nh2{\"node_id\":\"a\",\"instance\":\"x\"}\n\
         h2{\"node_id\":\"a\",\"instance\":\"y\"}\nR{\"node_id\":\"a\"}\nh2{\"node_id\":\"a\"}\n+70\n+70\nR{\"node_id\":\"a\"}\n+9",
        "h3{\"node_id\":\"n9\"}\nh2{\"node_id\":\"n9\"}\nP[{\"node_id\":\"x\",\"status\":\"alive\"},{\"node_id\":\"y\"}]\n+3600",
    ])
}
