//! The config file: what is read from it, what is said of it, and how a running host reads it again.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::mpsc;
use std::time::Duration;

use dim::backend::embedded::new_peer;
use dim::ident::{IpnsName, PeerName};
use dim_tests::{Program, Setup, eventually, soon};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

/// A peer id in the forms of a CID: `k51…` and `bafz…`.
fn as_cids(peer: &PeerName) -> [String; 2] {
    let name: IpnsName = peer.as_str().parse().unwrap();
    let cid = cid::Cid::try_from(name.as_str()).unwrap();
    [name.to_string(), cid.to_string()]
}

#[tokio::test(flavor = "multi_thread")]
async fn no_and_false_are_what_the_documentation_says_of_bind_nodes() {
    for no in ["no", "No", "false", "off", "'no'", ""] {
        let yaml = format!(
            "plugins:\n  node-registry:\n    config:\n      bind_nodes: {no}\n  heartbeat-watchdog: {{ config: {{ bind_nodes: {no} }} }}\n"
        );
        let yaml = yaml.replace("bind_nodes:  }", "bind_nodes: ~ }");
        let host = Setup::bundled().yaml(&yaml).start().await;
        assert_eq!(host.host.not_loaded(), [], "{no}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_is_the_same_in_every_form_wherever_the_config_names_one() {
    let (friend, own) = (new_peer(), new_peer());
    let [base36, base32] = as_cids(&friend);
    assert!(base36.starts_with("k51") && base32.starts_with("bafz"), "{base36} {base32}");
    let trusts = json!({ "config": { "trusted_observers": [base36, base32, friend.to_string()] } });
    let node_peers: Vec<String> = as_cids(&own).iter().map(|peer| format!("n1={peer}")).collect();
    let binds = json!({ "config": { "node_peers": node_peers } });
    let plugins = json!({ "job-tracker": trusts, "node-registry": trusts, "heartbeat-watchdog": binds });
    let topics = json!({ "dim.nodes.*": { "peers": [base32, as_cids(&own)[0]] } });
    let host = Setup::bundled().yaml(&format!("plugins: {plugins}\ntopics: {topics}\n")).start().await;
    assert_eq!(host.host.not_loaded(), []);
    let says = async |peer: &PeerName, topic: &str, message: Value| {
        let topic = topic.parse().unwrap();
        host.listening(&topic).await;
        host.host.bus.as_ref().unwrap().publish_as(peer, &topic, message.to_string().into()).await;
    };
    says(&own, "dim.nodes.heartbeat", json!({ "node_id": "n1", "status": "online" })).await;
    says(&friend, "dim.nodes.heartbeat", json!({ "node_id": "n1", "status": "online" })).await;
    eventually("the watchdog has set aside what another peer says of the node", async || {
        host.dead_letters().len() == 1
    })
    .await;
    let now = jiff::Timestamp::now();
    let verdict =
        json!({ "node_id": "n1", "status": "dead", "observer": "f", "timestamp": now, "last_seen": now });
    says(&friend, "dim.nodes.status", verdict).await;
    eventually("its verdict is believed", async || {
        let node = host.query("node-registry", "get", json!({ "node_id": "n1" })).await;
        node.is_ok_and(|node| node["status"] == "dead")
    })
    .await;
    for wrong in
        ["", "12D3KooWnobody", "/ipns/k51", "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"]
    {
        let trusts = json!({ "job-tracker": { "config": { "trusted_observers": [wrong] } } });
        let host = Setup::bundled().yaml(&format!("plugins: {trusts}\n")).start().await;
        let refused = host.host.not_loaded();
        assert_eq!(refused.len(), 1, "{wrong}");
        assert!(refused[0].reason.contains("config value \"trusted_observers\": peer id"), "{refused:?}");
    }
}
