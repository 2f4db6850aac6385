//! What nodes say of themselves, and what a watchdog makes of their silence.

use heartbeat_watchdog::Watchdog;
use node_registry::NodeRegistry;

use crate::fleet::Fleet;

const WATCHDOG: &str = r#"{"heartbeat_topic":"heartbeats","status_topic":"status","observer":"me",
    "suspect_after_ms":60000,"dead_after_ms":120000,"mass_silence_min":3,"forget_after_days":7,
    "bind_nodes":"first","node_peers":["n9=12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"]}"#;

const REGISTRY: &str = r#"{"heartbeat_topic":"heartbeats","status_topic":"status","ipns_key_name":"key",
    "registry_ipns":"other","trusted_observers":[],"publish_every_ms":200,"forget_after_days":7,
    "bind_nodes":"first","node_peers":["n9=12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"]}"#;

/// Tells both the same.
pub fn run(data: &[u8]) {
    let topics = [(b'h', "heartbeats"), (b's', "status")];
    let commands = [(b'U', "unbind"), (b'P', "put")];
    let mut watchdog: Fleet<Watchdog> = Fleet::new(WATCHDOG);
    watchdog.run(data, &topics[..1], &commands);
    for verdict in watchdog.host.take_published() {
        let verdict: serde_json::Value = serde_json::from_slice(&verdict.data).expect("a verdict is JSON");
        assert!(verdict["node_id"].is_string() && verdict["status"].is_string(), "{verdict}");
    }
    let known = watchdog.query("list", "{}");
    let timers = watchdog.host.timers();
    for node in known.as_array().expect("a list") {
        let id = node["node_id"].as_str().expect("an id");
        assert!(timers.contains_key(id), "nobody looks at {id} any more");
    }
    let mut registry: Fleet<NodeRegistry> = Fleet::new(REGISTRY);
    registry.run(data, &topics, &commands);
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

/// Nodes that come, fall silent, come back and are spoken for by others.
pub fn seeds() -> Vec<Vec<u8>> {
    super::texts([
        "h2{\"node_id\":\"a\",\"timestamp\":\"2026-01-01T00:00:00Z\",\"gpu\":true,\"memory\":8,\"cached_models\":[\"m\"]}\n\
         h3{\"node_id\":\"a\"}\n+70\n+70\nh2{\"node_id\":\"a\"}\n@\n~300\n+30",
        "h2{\"node_id\":\"a\"}\nh2{\"node_id\":\"b\"}\nh4{\"node_id\":\"c\"}\n+61\n+200\n+130\n+700000\n\
         s1{\"node_id\":\"a\",\"status\":\"dead\",\"observer\":\"o\",\"timestamp\":\"2026-01-01T00:01:00Z\"}\n\
         U{\"node_id\":\"b\"}\nh3{\"node_id\":\"b\"}",
        "h3{\"node_id\":\"n9\"}\nh2{\"node_id\":\"n9\"}\nP[{\"node_id\":\"x\",\"status\":\"alive\"},{\"node_id\":\"y\"}]\n+3600",
    ])
}
