//! The same suite on both backends, and what they promise each other.

use std::time::Duration;

use bytes::Bytes;
use dim_ipfs::ipns_record::Record;
use dim_ipfs::keys::{Key, name_of};
use dim_ipfs::{Backend, BackendError, Publication, unixfs};
use dim_model::ident::{ContentPath, KeyName, Topic};
use dim_model::time::{Timestamp, nanoseconds};
use dim_server::host::Adoption;
use dim_store::names::Cause;
use dim_store::{NAMES, names};
use dim_tests::{Kubo, Setup, TestHost, eventually, script};
use futures::StreamExt as _;
use libp2p_identity::Keypair;
use redb::ReadableTable as _;
use serde_json::json;

const DAY: Duration = Duration::from_secs(86_400);

/// A probe that may publish documents as large as there are.
fn probe() -> Setup {
    let limits = json!({ "document-bytes": 16 << 20, "effect-bytes": 24 << 20 });
    Setup::default().and_probe("probe", json!({ "limits": limits }))
}

/// A host on the embedded backend.
async fn embedded() -> TestHost {
    probe().start().await
}

/// A daemon and a host on it.
async fn on_kubo() -> Option<(Kubo, TestHost)> {
    let kubo = Kubo::start()?;
    let host = probe().on_kubo(kubo.api()).start().await;
    Some((kubo, host))
}

/// What every backend does for a host.
async fn suite(host: &TestHost) {
    a_document_is_published_and_read_back(host).await;
    a_large_document_is_published_and_read_back(host).await;
    a_new_value_has_a_higher_sequence(host).await;
    a_record_is_renewed_at_half_of_its_lifetime(host).await;
    a_shorter_lifetime_has_a_higher_sequence(host).await;
    what_is_not_there_is_not_found(&host.host.exchange.links.backend).await;
    a_message_comes_back_from_the_topic(&host.host.exchange.links.backend).await;
}

async fn publish(host: &TestHost, data: &str, repeat: u64) -> (String, u64) {
    let update = json!({ "do": "update-state", "key": "probe-key", "data": data, "repeat": repeat });
    let resolve = json!({ "do": "resolve", "name": "probe-key" });
    let answers = host.run(json!([update, resolve])).await;
    assert_eq!(answers[0], json!({ "ok": null }));
    let sequence = answers[1]["ok"]["sequence"].as_u64().unwrap();
    published(host).await;
    (answers[1]["ok"]["path"].as_str().unwrap().to_owned(), sequence)
}

async fn published(host: &TestHost) {
    let key: KeyName = "probe-key".parse().unwrap();
    eventually("the backend accepts the name", async || {
        let known = dim_store::names::known(&host.host.storage.store.snapshot().unwrap(), &key).unwrap();
        known.is_some_and(|known| known.is_published())
    })
    .await;
}

/// The record that the backend has now, checked.
async fn record(host: &TestHost) -> Record {
    let name = host.host.storage.keys.name(&"probe-key".parse().unwrap()).unwrap();
    let bytes = host.host.exchange.links.backend.names.record(&name).await.unwrap();
    Record::verify(&bytes, &name, Timestamp::wall()).unwrap()
}

async fn a_document_is_published_and_read_back(host: &TestHost) {
    let (path, _) = publish(host, "a small document", 1).await;
    let path: ContentPath = path.parse().unwrap();
    assert_eq!(record(host).await.path, path);
    let (cid, data) = host.host.exchange.links.backend.content.file(&path, 1 << 20).await.unwrap();
    assert_eq!(&data[..], b"a small document");
    assert_eq!(cid, unixfs::file_cid(&data));
}

async fn a_large_document_is_published_and_read_back(host: &TestHost) {
    let (path, _) = publish(host, "x", (5 << 20) + 3).await;
    let path: ContentPath = path.parse().unwrap();
    let (_, data) = host.host.exchange.links.backend.content.file(&path, 16 << 20).await.unwrap();
    assert_eq!(data.len(), (5 << 20) + 3);
    let too_large = host.host.exchange.links.backend.content.file(&path, 5 << 20).await.unwrap_err();
    assert!(matches!(too_large, BackendError::TooLarge { limit, .. } if limit == 5 << 20), "{too_large}");
}

async fn a_new_value_has_a_higher_sequence(host: &TestHost) {
    let before = record(host).await;
    publish(host, "another value", 1).await;
    let after = record(host).await;
    assert!(after.sequence > before.sequence, "{} after {}", after.sequence, before.sequence);
    assert_ne!(after.path, before.path);
}

/// Lets the last publish of the name be longer ago than it was.
async fn age(host: &TestHost, by: Duration) {
    let write = move |write: &redb::WriteTransaction| {
        let mut table = write.open_table(NAMES)?;
        let row = table.get("probe-key")?.expect("it was published").value().to_vec();
        let mut known: names::Known = serde_json::from_slice(&row).expect("a name");
        known.published.as_mut().expect("it was accepted").at -= nanoseconds(by);
        table.insert("probe-key", serde_json::to_vec(&known).expect("plain data").as_slice())?;
        Ok(())
    };
    host.host.storage.commit.write(write).await.unwrap();
    host.host.storage.commit.names.notify_one();
}

async fn a_record_is_renewed_at_half_of_its_lifetime(host: &TestHost) {
    publish(host, "kept for long", 1).await;
    let before = record(host).await;
    age(host, DAY / 2).await;
    eventually("it is signed anew", async || record(host).await.validity > before.validity).await;
    let after = record(host).await;
    assert_eq!(after.path, before.path);
    assert!(after.sequence >= before.sequence, "{} after {}", after.sequence, before.sequence);
}

/// Of two records with one sequence the one that is valid for longer counts.
async fn a_shorter_lifetime_has_a_higher_sequence(host: &TestHost) {
    publish(host, "valid for a day", 1).await;
    let before = record(host).await;
    let hour = 3_600_000_000_000_u64;
    let shorter =
        json!({ "do": "update-state", "key": "probe-key", "data": "valid for a day", "lifetime": hour });
    host.run(json!([shorter])).await;
    eventually("it is signed anew", async || record(host).await.validity < before.validity).await;
    let after = record(host).await;
    assert_eq!(after.path, before.path);
    assert_eq!(after.compare(&before), std::cmp::Ordering::Greater);
}

async fn what_is_not_there_is_not_found(backend: &Backend) {
    let nobody = name_of(&Keypair::generate_ed25519());
    let error = backend.names.record(&nobody).await.unwrap_err();
    assert!(matches!(error, BackendError::NotFound(_)), "{error}");
}

async fn a_message_comes_back_from_the_topic(backend: &Backend) {
    let topic: Topic = "probe.bus".parse().unwrap();
    let mut messages = backend.pubsub.subscribe(&topic).await.unwrap();
    // Bytes that are no text, and a name that is no plain word.
    let data = Bytes::from_static(b"\0\xff \n\r\n--boundary");
    backend.pubsub.publish(&topic, data.clone()).await.unwrap();
    let message =
        tokio::time::timeout(Duration::from_secs(10), messages.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(message.data, data);
    assert_eq!(message.from, backend.swarm.identity().await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_embedded_backend_passes_the_suite() {
    suite(&embedded().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kubo_passes_the_suite() {
    let Some((_kubo, host)) = on_kubo().await else { return };
    suite(&host).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_have_the_cids_that_kubo_gives_them() {
    let Some(kubo) = Kubo::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    for len in [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5 << 20, 16 << 20] {
        let data: Vec<u8> = (0..len).map(|index| (index % 251) as u8).collect();
        let file = dir.path().join("file");
        std::fs::write(&file, &data).unwrap();
        let args = ["add", "--cid-version=1", "--raw-leaves", "--chunker=size-1048576", "-Q"];
        let cid = kubo.ipfs(&[args.as_slice(), &[file.to_str().unwrap()]].concat());
        assert_eq!(unixfs::file_cid(&data).to_string(), cid, "{len} bytes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kubo_accepts_our_records_and_we_accept_kubos() {
    let Some(kubo) = Kubo::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let pair = Keypair::generate_ed25519();
    let name = name_of(&pair);
    let path = ContentPath::of(&unixfs::raw_cid(b"ours"));
    let record = Record::sign(&pair, &path, 7, Timestamp::wall().after(DAY), Duration::from_secs(60));
    let file = dir.path().join("record");
    std::fs::write(&file, &record.bytes).unwrap();
    let file = file.to_str().unwrap();
    // `name inspect --verify` judges the signature.
    let verdict = kubo.ipfs(&["name", "inspect", "--enc=json", "--verify", name.as_str(), file]);
    let verdict: serde_json::Value = serde_json::from_str(&verdict).unwrap();
    assert_eq!(verdict["Validation"]["Valid"], true, "{verdict}");
    assert_eq!(verdict["Entry"]["Sequence"], 7, "{verdict}");
    // `name put` takes it in, and `name get` gives it back, byte for byte.
    kubo.ipfs(&["name", "put", "--allow-offline", name.as_str(), file]);
    let settings = dim_ipfs::kubo::Settings { address: kubo.api().parse().unwrap(), authorization: None };
    let backend = dim_ipfs::kubo::backend(&settings).unwrap();
    assert_eq!(backend.names.record(&name).await.unwrap(), record.bytes);
    assert_eq!(kubo.ipfs(&["name", "resolve", "--nocache", name.as_str()]), path.as_str());
    // And the other way: a record that Kubo signed, under a key that was imported and one of its own.
    let imported: KeyName = "imported".parse().unwrap();
    let key = Key::Own(std::sync::Arc::new(pair));
    assert_eq!(backend.names.prepare(&imported, &key).await.unwrap(), dim_ipfs::Prepared::Ready);
    let publication = Publication {
        key_name: imported,
        key: key.clone(),
        path: ContentPath::of(&unixfs::raw_cid(b"theirs")),
        sequence: 9,
        current: None,
        lifetime: DAY,
        ttl: Duration::from_secs(60),
    };
    let published = backend.names.publish(&publication).await.unwrap();
    let bytes = backend.names.record(&name).await.unwrap();
    let theirs = Record::verify(&bytes, &name, Timestamp::wall()).unwrap();
    assert_eq!((theirs.path, theirs.sequence), (publication.path, published.sequence));
    assert!(theirs.sequence > 7, "the sequence never goes back: {}", theirs.sequence);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_goes_through_the_gateways_routing_both_ways() {
    let Some(kubo) = Kubo::start() else { return };
    let gateway = std::fs::read_to_string(kubo.repo().join("gateway")).unwrap();
    let pair = Keypair::generate_ed25519();
    let name = name_of(&pair);
    let path = ContentPath::of(&unixfs::raw_cid(b"routed"));
    let record = Record::sign(&pair, &path, 3, Timestamp::wall().after(DAY), Duration::from_secs(60));
    let url = format!("{}/routing/v1/ipns/{name}", gateway.trim());
    dim_client::install_tls();
    let http = reqwest::Client::new();
    let kind = "application/vnd.ipfs.ipns-record";
    let put = http.put(&url).header("Content-Type", kind).body(record.bytes.clone()).send().await.unwrap();
    assert!(put.status().is_success(), "{}", put.status());
    let got = http.get(&url).header("Accept", kind).send().await.unwrap().bytes().await.unwrap();
    assert_eq!(Record::verify(&got, &name, Timestamp::wall()).unwrap(), record);
}

/// Waits until the probe's name is on hold because there is no record of its key, and has the host publish.
async fn replaced(host: &TestHost) {
    let key = "probe-key".parse().unwrap();
    let hold =
        || names::known(&host.host.storage.store.snapshot().unwrap(), &key).unwrap().and_then(|it| it.hold);
    eventually("the name is on hold", async || hold().is_some_and(|hold| hold.cause == Cause::NoRecord))
        .await;
    host.host.adopt(&key, Adoption::Replace).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_kubo_has_already_is_adopted() {
    let Some(kubo) = Kubo::start() else { return };
    kubo.ipfs(&["key", "gen", "--type=ed25519", "probe-key"]);
    let listed = kubo.ipfs(&["key", "list", "-l", "--ipns-base=base36"]);
    let there =
        listed.lines().find(|line| line.ends_with("probe-key")).unwrap().split_whitespace().next().unwrap();
    let host = Setup::probe().on_kubo(kubo.api()).start().await;
    let key = "probe-key".parse().unwrap();
    assert_eq!(host.host.storage.keys.name(&key).unwrap().as_str(), there);
    host.run(json!([{ "do": "update-state", "key": "probe-key", "data": "under the adopted key" }])).await;
    replaced(&host).await;
    published(&host).await;
    assert_eq!(kubo.ipfs(&["cat", &format!("/ipns/{there}")]), "under the adopted key");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_a_daemon_that_was_away_at_the_first_start_is_adopted_on_its_return() {
    let Some(mut kubo) = Kubo::start() else { return };
    kubo.ipfs(&["key", "gen", "--type=ed25519", "probe-key"]);
    let listed = kubo.ipfs(&["key", "list", "-l", "--ipns-base=base36"]);
    let there =
        listed.lines().find(|line| line.ends_with("probe-key")).unwrap().split_whitespace().next().unwrap();
    kubo.kill();
    let host = Setup::probe().on_kubo(kubo.api()).start().await;
    let key = "probe-key".parse().unwrap();
    assert_ne!(host.host.storage.keys.name(&key).unwrap().as_str(), there);
    host.run(json!([{ "do": "update-state", "key": "probe-key", "data": "made without it" }])).await;
    kubo.restart();
    replaced(&host).await;
    published(&host).await;
    assert_eq!(host.host.storage.keys.name(&key).unwrap().as_str(), there);
    assert_eq!(kubo.ipfs(&["cat", &format!("/ipns/{there}")]), "made without it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_superseded_document_is_unpinned() {
    let Some((kubo, host)) = on_kubo().await else { return };
    let (first, _) = publish(&host, "the first", 1).await;
    publish(&host, "the second", 1).await;
    let cid = first.trim_start_matches("/ipfs/").to_owned();
    eventually("the first is unpinned", async || kubo.try_ipfs(&["pin", "ls", &cid]).is_err()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kubo_away_blocks_nothing_and_everything_drains_on_its_return() {
    let Some((mut kubo, host)) = on_kubo().await else { return };
    publish(&host, "before", 1).await;
    kubo.kill();
    let answers = host
        .run(json!([
            { "do": "update-state", "key": "probe-key", "data": "while it was away" },
            { "do": "publish", "topic": "probe.out", "data": "while it was away" },
            { "do": "get-state", "name": "probe-key" },
        ]))
        .await;
    assert_eq!(answers[2], json!({ "ok": "while it was away" }));
    host.query("probe", "run", script(json!([]))).await.unwrap();
    assert_eq!(dim_store::outbox::waiting(&host.host.storage.store).unwrap().0, 1);
    kubo.restart();
    eventually("the outbox drains", async || {
        dim_store::outbox::waiting(&host.host.storage.store).unwrap().0 == 0
    })
    .await;
    published(&host).await;
    let name = host.host.storage.keys.name(&"probe-key".parse().unwrap()).unwrap();
    assert_eq!(kubo.ipfs(&["cat", &format!("/ipns/{name}")]), "while it was away");
    // The streams come back too: a message from the daemon reaches the plugin.
    host.listening(&"probe.in".parse().unwrap()).await;
    let add = script(json!([{ "do": "add", "key": "heard" }])).to_string();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), add).unwrap();
    kubo.ipfs(&["pubsub", "pub", "probe.in", file.path().to_str().unwrap()]);
    eventually("the message is heard", async || host.state_of("probe", "heard").await == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_echo_of_what_the_host_published_is_dropped_and_another_programs_is_not() {
    let Some((kubo, host)) = on_kubo().await else { return };
    let host_topic: Topic = "probe.in".parse().unwrap();
    host.listening(&host_topic).await;
    let add = script(json!([{ "do": "add", "key": "heard" }])).to_string();
    host.run(json!([{ "do": "publish", "topic": "probe.in", "data": add }])).await;
    eventually("the echo comes", async || {
        host.host.exchange.received.echoes.load(std::sync::atomic::Ordering::Relaxed) == 1
    })
    .await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &add).unwrap();
    kubo.ipfs(&["pubsub", "pub", "probe.in", file.path().to_str().unwrap()]);
    eventually("the other program is heard", async || host.state_of("probe", "heard").await == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_on_a_unix_socket_is_as_good() {
    let Some(kubo) = Kubo::start_on_a_socket() else { return };
    assert!(kubo.api().starts_with("/unix/"), "{}", kubo.api());
    let host = Setup::probe().on_kubo(kubo.api()).start().await;
    publish(&host, "through a socket", 1).await;
    let name = host.host.storage.keys.name(&"probe-key".parse().unwrap()).unwrap();
    assert_eq!(kubo.ipfs(&["cat", &format!("/ipns/{name}")]), "through a socket");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_runs_offline_publishes_names_and_the_operator_is_told_what_it_lacks() {
    let Some(kubo) = Kubo::start_offline() else { return };
    let host = Setup::probe().on_kubo(kubo.api()).start().await;
    let name = host.host.storage.keys.name(&"probe-key".parse().unwrap()).unwrap();
    let key = "probe-key".parse().unwrap();
    let accepted = || {
        let known = names::known(&host.host.storage.store.snapshot().unwrap(), &key).unwrap().unwrap();
        known.published.unwrap()
    };
    for data in ["one", "two", "three"] {
        publish(&host, data, 1).await;
        assert_eq!(kubo.ipfs(&["cat", &format!("/ipns/{name}")]), data);
    }
    // It shows no record of its own, and takes none with the number that it has.
    let before = accepted();
    age(&host, DAY / 2).await;
    eventually("it is signed anew", async || accepted().at > before.at).await;
    assert_eq!(kubo.ipfs(&["cat", &format!("/ipns/{name}")]), "three");
    eventually("the reason is told", async || {
        let listening_records = host.host.exchange.links.listening_records.all();
        let deaf = listening_records.values().find_map(|hearing| hearing.deaf.clone());
        deaf.is_some_and(|why| why.contains("ipfs config --json Pubsub.Enabled true"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_daemon_is_not_listened_to_and_the_time_is_a_gap() {
    let Some((kubo, host)) = on_kubo().await else { return };
    let topic: Topic = "probe.in".parse().unwrap();
    let proven = || {
        host.host.exchange.links.listening_records.all().get(&topic).and_then(|hearing| hearing.proven_until)
    };
    eventually("listening is proven", async || proven().is_some()).await;
    kubo.freeze();
    let frozen_at = host.host.storage.log.now();
    dim_tests::downtime(Duration::from_secs(7)).await;
    assert!(proven() <= Some(frozen_at), "its sockets are open, and that proves nothing");
    kubo.thaw();
    eventually("the gap is told", async || host.state_of("probe", "gaps").await.is_array()).await;
    let gap = host.state_of("probe", "gaps").await[0].clone();
    assert!(gap["since"].as_u64() <= Some(frozen_at.0), "it begins at the last proof: {gap}");
    assert!(gap["until"].as_u64() >= Some(frozen_at.after(Duration::from_secs(7)).0), "{gap}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_knows_whether_it_is_cut_off() {
    let Some((mut one, other)) = Kubo::start_pair() else { return };
    let settings = dim_ipfs::kubo::Settings { address: other.api().parse().unwrap(), authorization: None };
    let swarm = dim_ipfs::kubo::backend(&settings).unwrap().swarm;
    assert!(swarm.is_connected().await.unwrap());
    one.kill();
    eventually("the other one is alone", async || !swarm.is_connected().await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_graph_is_stored_and_pinned_in_one_step_or_not_at_all() {
    use dim_topics::bundle::Listed;
    use dim_topics::identity::{Digest, Incarnation};
    use dim_topics::index::{BundlePlace, IndexBuilder};
    let Some(kubo) = Kubo::start() else { return };
    let settings = dim_ipfs::kubo::Settings { address: kubo.api().parse().unwrap(), authorization: None };
    let content = dim_ipfs::kubo::backend(&settings).unwrap().content;
    // Numbers of 16 bits in CBOR.
    let bundles: Vec<Bytes> =
        (1_000..1_300_u16).map(|it| [&[0x19][..], &it.to_be_bytes()].concat().into()).collect();
    let mut index = IndexBuilder::default();
    for (first, bundle) in bundles.iter().enumerate() {
        let (time, digest) = (dim_model::time::Timestamp(first as u64), Digest::of(bundle));
        let listed = Listed { first: first as u64, count: 1, time, digest };
        index.add(BundlePlace { incarnation: Incarnation([1; 16]), listed });
    }
    let nodes = index.root().unwrap();
    let (root, count) = (nodes.root.cid(), nodes.blocks.len());
    let blocks = |left_out: usize| -> dim_ipfs::Blocks {
        let bundles = bundles.clone().into_iter().skip(left_out).map(|it| (Digest::of(&it), it));
        let all: Vec<_> = nodes.blocks.clone().into_iter().chain(bundles).collect();
        Box::new(all.into_iter().map(|(digest, block)| Ok((digest.cid(), block))))
    };
    // It waits for the missing one.
    content.import_graph(&root, blocks(1), Duration::from_secs(2)).await.unwrap_err();
    assert!(!content.is_pinned(&root).await.unwrap());
    let broken = BackendError::Store("the disk is broken".to_owned());
    let broken: dim_ipfs::Blocks = Box::new(blocks(0).take(100).chain([Err(broken)]));
    content.import_graph(&root, broken, Duration::from_secs(20)).await.unwrap_err();
    assert!(!content.is_pinned(&root).await.unwrap());
    content.import_graph(&root, blocks(0), Duration::from_secs(20)).await.unwrap();
    kubo.ipfs(&["repo", "gc"]);
    assert!(content.is_pinned(&root).await.unwrap());
    let below = kubo.ipfs(&["refs", "--recursive", "--unique", &root.to_string()]);
    assert_eq!(below.lines().count(), count - 1 + bundles.len());
    // A larger one than a piece of the request.
    let large: Vec<(cid::Cid, Bytes)> = (0..20_u32)
        .map(|number| {
            let data = number.to_be_bytes().repeat(10_000);
            (unixfs::raw_cid(&data), data.into())
        })
        .collect();
    let root = large[0].0;
    let blocks: dim_ipfs::Blocks = Box::new(large.clone().into_iter().map(Ok));
    content.import_graph(&root, blocks, Duration::from_secs(20)).await.unwrap();
    for (cid, data) in large {
        assert_eq!(content.block(&cid, 1 << 20, Duration::from_secs(5)).await.unwrap(), data);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_of_kubo_are_understood() {
    let Some(kubo) = Kubo::start() else { return };
    let address =
        |text: String| dim_ipfs::kubo::Settings { address: text.parse().unwrap(), authorization: None };
    // With and without `/api/v0`, as multiaddr and as URL.
    for text in [kubo.api().to_owned(), kubo.url(), format!("{}/api/v0", kubo.url())] {
        let backend = dim_ipfs::kubo::backend(&address(text)).unwrap();
        assert_eq!(backend.swarm.identity().await.unwrap().to_string(), kubo.ipfs(&["id", "-f", "<id>"]));
    }
    let backend = dim_ipfs::kubo::backend(&address(kubo.url())).unwrap();
    let missing = ContentPath::of(&unixfs::raw_cid(b"nobody has this")).as_str().parse().unwrap();
    let started = std::time::Instant::now();
    let error = backend.content.file(&missing, 100).await.unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(40), "bounded");
    assert!(matches!(error, BackendError::Refused { .. } | BackendError::Timeout(_)), "{error}");
    let nowhere = dim_ipfs::kubo::backend(&address("/ip4/127.0.0.1/tcp/9".to_owned())).unwrap();
    let error = nowhere.swarm.identity().await.unwrap_err();
    assert!(
        matches!(&error, BackendError::Unreachable { what, .. } if what.contains("127.0.0.1:9")),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_that_someone_else_made_stays() {
    let Some(kubo) = Kubo::start() else { return };
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "theirs").unwrap();
    let theirs = kubo.ipfs(&["add", "-Q", "--cid-version=1", "--raw-leaves", &file.path().to_string_lossy()]);
    let host = Setup::probe().on_kubo(kubo.api()).start().await;
    let key = "probe-key".parse().unwrap();
    for data in ["theirs", "ours", "newest"] {
        host.run(json!([{ "do": "update-state", "key": "probe-key", "data": data }])).await;
        eventually("it is published", async || {
            let known = dim_store::names::known(&host.host.storage.store.snapshot().unwrap(), &key).unwrap();
            known.is_some_and(|known| known.is_published())
        })
        .await;
    }
    let pins = || kubo.ipfs(&["pin", "ls", "--type=recursive", "-q"]);
    let ours = dim_ipfs::unixfs::file_cid(b"ours").to_string();
    eventually("the superseded one is unpinned", async || !pins().contains(&ours)).await;
    assert!(pins().contains(theirs.trim()), "theirs stays");
    assert!(pins().contains(&dim_ipfs::unixfs::file_cid(b"newest").to_string()));
}
