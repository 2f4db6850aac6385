//! Two hosts, each on its own daemon: a writer without plugins, and a reader with the node registry.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use dim_ipfs::Backend;
use dim_model::entry::Offset;
use dim_model::ident::Topic;
use dim_store::effect::Publish;
use dim_tests::fleet::{FleetAdmin, keys_of};
use dim_tests::{FaultProxy, Kubo, Setup, TestHost, eventually_within};

/// The number of nodes whose heartbeats are published.
const NODES: u64 = 1_000;

/// The hosts and their daemons.
pub struct Pair {
    /// The daemons. They end with the pair.
    pub _daemons: (Kubo, Kubo),
    /// The way of the reader to its daemon.
    pub proxy: FaultProxy,
    /// The host that publishes.
    pub writer: TestHost,
    /// The host that handles what the other one publishes.
    pub reader: TestHost,
}

/// The topic of the heartbeats.
pub fn topic() -> Topic {
    "dim.nodes.heartbeat".parse().expect("a topic")
}

/// The heartbeat with a number, of about 300 bytes.
pub fn heartbeat(number: u64) -> Bytes {
    let (node, free) = (number % NODES, number % 63 + 1);
    Bytes::from(format!(
        "{{\"node_id\":\"node-{node:06}\",\"timestamp\":\"2026-01-01T00:00:00.000000\",\"status\":\"online\",\
         \"resources\":{{\"cpu_available\":{free},\"memory_available\":{free}.5,\"gpu_available\":1}},\
         \"cached_models\":[\"llama-3-8b-instruct\",\"mistral-7b-instruct-v0.3\"],\"number\":{number}}}"
    ))
}

/// The config: the heartbeats are on a reliable topic, of which a host that joins late wants everything.
pub const TOPICS: &str = "topics: { dim.nodes.*: { delivery: reliable, from: earliest } }\n";

/// The config of a host with the node registry alone.
pub const REGISTRY: &str =
    "plugins: { job-tracker: { disabled: true }, heartbeat-watchdog: { disabled: true } }\n";

/// The maximum time of a start.
const START: Duration = Duration::from_secs(60);

/// Starts two connected daemons.
pub fn daemons() -> (Kubo, Kubo) {
    Kubo::start_pair().expect("a Kubo")
}

/// Starts the host that publishes.
pub async fn writer(near: &Kubo) -> TestHost {
    writer_with(near, TOPICS).await
}

async fn writer_with(near: &Kubo, config: &str) -> TestHost {
    Setup::default().yaml(config).on_kubo(near.api()).start().await
}

/// Starts the host that handles the events, and its way to the daemon.
pub async fn reader(far: &Kubo) -> (FaultProxy, TestHost) {
    reader_with(far, TOPICS).await
}

async fn reader_with(far: &Kubo, config: &str) -> (FaultProxy, TestHost) {
    let target: SocketAddr = far.url().trim_start_matches("http://").parse().expect("an address");
    let proxy = FaultProxy::start(target, 7).await;
    let reader = Setup::bundled().yaml(config).yaml(REGISTRY).on_kubo(&proxy.api()).start().await;
    (proxy, reader)
}

/// Publishes a heartbeat. It is durable at the end.
pub async fn publish(writer: &TestHost, number: u64) {
    let storage = &writer.host.storage;
    let publish = Publish { topic: topic(), data: heartbeat(number) };
    storage.commit.publish(publish, storage.log.now()).await.expect("the writer commits");
}

impl Pair {
    /// Starts all.
    pub async fn start() -> Self {
        Self::start_with(TOPICS).await
    }

    /// Starts all in a fleet with a roster, with an encrypted topic.
    pub async fn start_encrypted() -> Self {
        let admin = FleetAdmin::new(5);
        let pair = Self::start_with(&format!(
            "fleet: {{ name: {} }}\ntopics: {{ dim.nodes.*: {{ delivery: reliable, from: earliest, encrypt: true }} }}\n",
            admin.fleet()
        ))
        .await;
        let [writer, reader] = [&pair.writer, &pair.reader].map(keys_of);
        let admin = admin.with_members(&[(&writer, "writer", true), (&reader, "reader", false)]);
        admin.offer(&pair.writer).await.expect("a valid roster");
        pair
    }

    async fn start_with(config: &str) -> Self {
        let (near, far) = daemons();
        let writer = writer_with(&near, config).await;
        let (proxy, reader) = reader_with(&far, config).await;
        let channel = reader.host.exchange.links.reliable.channels().of(&topic());
        let publisher: &Backend = &writer.host.exchange.links.backend;
        eventually_within(START, "the reader is heard on the topic", async || {
            publisher.pubsub.peers(&channel).await.is_ok_and(|peers| !peers.is_empty())
        })
        .await;
        Self { _daemons: (near, far), proxy, writer, reader }
    }

    /// Publishes a heartbeat. It is durable at the end.
    pub async fn publish(&self, number: u64) {
        publish(&self.writer, number).await;
    }

    /// Waits until the plugin of the reader has handled everything before an entry.
    pub async fn handled(&self, next: Offset) {
        let plugins = self.reader.host.plugins.all();
        while plugins.values().any(|plugin| plugin.handle.status().cursor < next.0) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// The number of bundles that the reader had to fetch.
    pub async fn repaired(&self) -> u64 {
        let logs = self.reader.host.exchange.links.reliable.writers(&topic()).await.expect("it runs");
        logs.first().map_or(0, |log| log.counters.repaired)
    }

    /// Stops the hosts. A checker may still hold the store of the reader.
    pub async fn stop(self) {
        self.writer.host.shutdown().await;
        self.reader.host.shutdown().await;
    }
}
