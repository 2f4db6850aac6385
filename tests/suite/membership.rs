//! Fleets with a roster: only members write, and only members read.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dim_ipfs::keys::Key;
use dim_model::entry::{Event as EntryEvent, Kind, Origin};
use dim_model::ident::{IpnsName, Topic};
use dim_model::time::Timestamp;
use dim_network::reliable_topics::{FleetProblem, FleetState, Refusal};
use dim_store::effect::Publish;
use dim_tests::alone::replace;
use dim_tests::component::probe;
use dim_tests::fleet::{FleetAdmin, keys_of};
use dim_tests::{Agent, Kubo, Setup, SupervisedHost, TestHost, directly, eventually, eventually_within};
use dim_topics::bundle::{Bundle, Event, Header, Sealing};
use dim_topics::identity::{Digest, Incarnation, WriterId};
use dim_topics::membership::encryption::Secret;
use ed25519_dalek::SigningKey;
use futures::StreamExt as _;
use libp2p_identity::Keypair;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::reliable_topics::{ARRIVAL, copy_of, received};

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

/// A text that stands in every event and document.
pub const MARK: &str = "a mark that nobody else may read";

fn topic() -> Topic {
    "probe.in".parse().unwrap()
}

fn setup(fleet: &str) -> Setup {
    let grants = json!({ "config": { "topics": ["probe.in"] } });
    let yaml = format!(
        "fleet: {{ name: {fleet} }}\ntopics: {{ probe.*: {{ delivery: reliable, encrypt: true }} }}\n"
    );
    Setup::default().and_probe("probe", grants).yaml(&yaml)
}

/// The fleet as a host knows it.
pub async fn fleet(host: &TestHost) -> FleetState {
    host.host.exchange.links.reliable.fleet().await.expect("a fleet with a roster")
}

async fn publish(host: &TestHost, number: usize) {
    let data = Bytes::from(format!("{MARK}: {number}"));
    let publish = Publish { topic: topic(), data };
    host.host.storage.commit.publish(publish, host.host.storage.log.now()).await.unwrap();
}

/// The numbers of the events that a host has received.
fn numbers(host: &TestHost) -> Vec<usize> {
    let number = |data: &Bytes| std::str::from_utf8(data).unwrap().rsplit(' ').next()?.parse().ok();
    received(host).iter().map(|(_, data)| number(data).unwrap()).collect()
}

/// The events of members in the log of a host on one topic.
fn received_on(host: &TestHost, topic: &str) -> Vec<Bytes> {
    let entries = host.entries();
    let data = |kind: &Kind| match kind {
        Kind::Event(EntryEvent::Message { topic: of, data, origin: Origin::Member(_) })
            if of.as_str() == topic =>
        {
            Some(data.clone())
        }
        _ => None,
    };
    entries.iter().filter_map(|entry| data(&entry.kind)).collect()
}

/// Whether bytes contain the mark.
pub fn contains_mark(bytes: &[u8]) -> bool {
    bytes.windows(MARK.len()).any(|window| window == MARK.as_bytes())
}

/// Whether someone without keys finds the mark in bytes, also in what is only compressed.
fn shows_mark(bytes: &[u8]) -> bool {
    const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
    let decompressed = |at: usize| {
        let mut text = Vec::new();
        // What follows the frame is no frame.
        let _ = zstd::Decoder::new(&bytes[at..]).and_then(|mut decoder| decoder.read_to_end(&mut text));
        text
    };
    let frames = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(&ZSTD));
    contains_mark(bytes) || frames.into_iter().any(|at| contains_mark(&decompressed(at)))
}

/// All blocks of a daemon, by their CIDs.
pub async fn blocks(daemon: &Kubo) -> BTreeMap<String, Bytes> {
    let (client, api) = (reqwest::Client::new(), daemon.url());
    let post = async |path: &str| client.post(format!("{api}/api/v0/{path}")).send().await.unwrap();
    let listed = post("refs/local").await.text().await.unwrap();
    let mut blocks = BTreeMap::new();
    for row in listed.lines() {
        let row: Value = serde_json::from_str(row).unwrap();
        let cid = row["Ref"].as_str().unwrap();
        let block = post(&format!("block/get?arg={cid}&offline=true")).await.bytes().await.unwrap();
        blocks.insert(cid.to_owned(), block);
    }
    blocks
}

/// A program that has a daemon and no keys, and collects what it hears.
struct Eavesdropper {
    heard: Arc<Mutex<Vec<Bytes>>>,
    task: JoinHandle<()>,
}

impl Eavesdropper {
    async fn of(daemon: &Kubo, channels: &[Topic]) -> Self {
        let backend = directly(daemon);
        let streams = channels.iter().map(|channel| backend.pubsub.subscribe(channel));
        let mut streams = futures::stream::select_all(futures::future::try_join_all(streams).await.unwrap());
        let heard = Arc::<Mutex<Vec<Bytes>>>::default();
        let into = heard.clone();
        let task = tokio::spawn(async move {
            while let Some(Ok(message)) = streams.next().await {
                into.lock().unwrap().push(message.data);
            }
        });
        Self { heard, task }
    }

    fn end(self) -> Vec<Bytes> {
        self.task.abort();
        std::mem::take(&mut self.heard.lock().unwrap())
    }
}

/// The pubsub topics of some topics of a host, and that of its heads.
fn channels(host: &TestHost, topics: &[&str]) -> Vec<Topic> {
    let channels = host.host.exchange.links.reliable.channels();
    let of = topics.iter().map(|topic| channels.of(&topic.parse().unwrap()));
    of.chain([channels.heads.clone()]).collect()
}

fn connect_all(daemons: &[&Kubo]) {
    for (index, one) in daemons.iter().enumerate() {
        for other in &daemons[index + 1..] {
            let addresses = other.ipfs(&["id", "-f", "<addrs>"]);
            one.ipfs(&["swarm", "connect", addresses.lines().next().unwrap()]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_host_says_so_reads_nothing_new_and_nothing_of_it_is_taken_backdated_or_not() {
    let Some((near, far)) = Kubo::start_pair() else { return };
    let third = tokio::task::block_in_place(Kubo::start).unwrap();
    tokio::task::block_in_place(|| connect_all(&[&near, &far, &third]));
    let admin = FleetAdmin::new(5);
    let name = admin.fleet();
    let one = setup(&name).on_kubo(near.api()).start().await;
    let other = setup(&name).on_kubo(far.api()).start().await;
    // It is no keeper, so it writes with the new key only after it has received it.
    let simple = setup(&name).on_kubo(third.api()).start().await;
    // What is published before there is a key waits for it.
    publish(&one, 0).await;
    let lines = [keys_of(&one), keys_of(&other), keys_of(&simple)];
    let mut admin = admin.with_members(&[
        (&lines[0], "one", true),
        (&lines[1], "other", false),
        (&lines[2], "simple", false),
    ]);
    assert_eq!(admin.offer(&one).await, Ok(1));
    for number in 1..50 {
        publish(&one, number).await;
        publish(&other, number).await;
    }
    for host in [&one, &other] {
        eventually_within(ARRIVAL, "all events have arrived", async || numbers(host).len() >= 49).await;
    }
    eventually_within(ARRIVAL, "the first one, too", async || numbers(&other).len() == 50).await;
    eventually_within(ARRIVAL, "and all at the third host", async || numbers(&simple).len() == 99).await;
    let state = fleet(&one).await;
    let gone = WriterId::of_name(&fleet(&other).await.id).unwrap();
    assert!(state.observed[&gone].heard.is_some(), "{:?}", state.observed);
    assert_eq!(state.observed[&gone].epochs.len(), 1);
    assert_eq!(state.problems(Timestamp::wall()), []);

    let (begun, key_before) = (Instant::now(), fleet(&simple).await.epochs);
    admin.remove(&gone, BTreeMap::new());
    assert_eq!(admin.offer(&one).await, Ok(2));
    eventually_within(Duration::from_secs(5), "the removed host knows it", async || {
        fleet(&other).await.problems(Timestamp::wall()) == [FleetProblem::Removed(2)]
    })
    .await;
    println!("the removed host knows it after {:?}", begun.elapsed());
    let since_removal = Duration::from_secs(5).saturating_sub(begun.elapsed());
    eventually_within(since_removal, "the third host writes with the new key", async || {
        let state = fleet(&simple).await;
        state.roster.is_some_and(|it| it.roster.version == 2) && state.epochs != key_before
    })
    .await;

    // It continues with its old key, also with bundles that look older than its removal.
    publish(&other, 1_000).await;
    let Some(Key::Own(pair)) = other.host.storage.keys.get(&"dim-writer".parse().unwrap()) else {
        panic!("its key")
    };
    let secret = Keypair::clone(&pair).try_into_ed25519().unwrap().secret();
    let key = SigningKey::from_bytes(secret.as_ref().try_into().unwrap());
    let logs = one.host.exchange.links.reliable.writers(&topic()).await.unwrap();
    let log = logs.iter().find(|log| !log.is_own).unwrap();
    let (earlier, files) = (Timestamp::wall().0 - 3_600_000_000_000, epochs_of(&other, &name));
    let (epoch, secret) = files.first().unwrap();
    for (incarnation, first) in [(log.incarnation, log.end), (Incarnation([7; 16]), 0)] {
        let header = Header {
            topic: topic(),
            writer: gone,
            incarnation,
            began: Timestamp(earlier - 1),
            first,
            recent: Vec::new(),
            start: None,
        };
        let event = Event { time: Timestamp(earlier), data: Bytes::from(format!("{MARK}: 2000")) };
        let sealing = Sealing { epoch: *epoch, secret: Secret::new(*secret), nonce: [9; 24] };
        let bundle = Bundle::form(&name, header, &[event], &key, Some(&sealing));
        let backend = directly(&far);
        backend.content.put_block(&bundle.digest.cid(), bundle.block.clone()).await.unwrap();
        backend.pubsub.publish(&channels(&one, &["probe.in"])[0], bundle.block).await.unwrap();
    }
    for number in 50..70 {
        publish(&one, number).await;
        publish(&simple, number + 20).await;
    }
    eventually("the keeper has published with a new key", async || {
        let logs = one.host.exchange.links.reliable.writers(&topic()).await.unwrap();
        logs.iter().filter(|log| log.is_own).map(|log| log.end).sum::<u64>() == 70
    })
    .await;
    eventually("the messages of the removed host are refused", async || {
        fleet(&one).await.refused.get(&Refusal::Removed).is_some_and(|refused| refused.count >= 2)
    })
    .await;
    eventually_within(ARRIVAL, "members read each other", async || {
        numbers(&one).len() >= 69 && numbers(&simple).len() >= 119
    })
    .await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(numbers(&other).len(), 50, "a removed host reads an event");
    let members: Vec<_> = (1..50).chain(70..90).collect();
    assert_eq!(numbers(&one), members, "an event of a removed host is taken");
    let mut at_third = numbers(&simple);
    at_third.sort_unstable();
    let mut expected: Vec<_> = (0..70).chain(1..50).collect();
    expected.sort_unstable();
    assert_eq!(at_third, expected, "an event of a removed host is taken");
    for host in [one, other, simple] {
        host.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn publishes_of_code_that_was_rolled_back_are_never_sent_although_they_waited_for_a_key() {
    let Some((near, far)) = Kubo::start_pair() else { return };
    let admin = FleetAdmin::new(5);
    let name = admin.fleet();
    let probation = "replacement:\n  probation: { seconds: 600, max_seconds: 600 }\n";
    let writer = setup(&name).yaml(probation).on_kubo(near.api()).start().await;
    let yaml = format!(
        "fleet: {{ name: {name} }}\ntopics: {{ probe.*: {{ delivery: reliable, encrypt: true }} }}\n"
    );
    let listens = json!({ "config": { "topics": ["probe.out"] } });
    let reader = Setup::default().and_probe("probe", listens).yaml(&yaml).on_kubo(far.api()).start().await;
    let publishing = |data: &str| json!([{ "do": "publish", "topic": "probe.out", "data": data }]);
    // There is no roster, so nothing can be encrypted yet.
    writer.run(publishing("before")).await;
    replace(&writer, probe("2.0.0", &publishing("void"))).await.unwrap();
    // The old code handles this command again.
    writer.run(publishing("again")).await;
    writer.host.roll_back(&"probe".parse().unwrap(), None, "the test").await.unwrap();
    writer.settled().await;
    writer.run(publishing("after")).await;

    let lines = [keys_of(&writer), keys_of(&reader)];
    let admin = admin.with_members(&[(&lines[0], "writer", true), (&lines[1], "reader", false)]);
    assert_eq!(admin.offer(&writer).await, Ok(1));
    eventually_within(ARRIVAL, "the events that waited have arrived", async || {
        received_on(&reader, "probe.out").iter().any(|data| data == "after")
    })
    .await;
    assert_eq!(received_on(&reader, "probe.out"), ["before", "again", "after"]);
    let sequences: Vec<_> = received(&reader).into_iter().map(|(event, _)| event.sequence).collect();
    assert_eq!(sequences, [0, 1, 2], "what is void has no sequence");
    writer.stop().await;
    reader.stop().await;
}

/// The identities and secrets of the key epochs in the files of a host.
fn epochs_of(host: &TestHost, fleet: &str) -> Vec<([u8; 16], [u8; 32])> {
    let files = host.host.storage.keys.private_files(&format!(".fleet-{fleet}")).unwrap();
    let epoch = |(name, bytes): (String, Vec<u8>)| {
        let id = name.strip_prefix("epoch.all.")?.split('.').nth(1)?.to_owned();
        let id = u128::from_str_radix(&id, 16).ok()?.to_be_bytes();
        Some((id, bytes[16..].try_into().ok()?))
    };
    files.all().unwrap().into_iter().filter_map(epoch).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn three_hosts_and_two_agents_read_what_a_program_with_all_messages_and_blocks_cannot() {
    let Some((one, other)) = tokio::task::block_in_place(Kubo::start_pair) else { return };
    let third = tokio::task::block_in_place(Kubo::start).unwrap();
    let daemons = [&one, &other, &third];
    tokio::task::block_in_place(|| connect_all(&daemons));
    let admin = FleetAdmin::new(5);
    let name = admin.fleet();
    const TOPICS: [&str; 3] = ["probe.in", "dim.jobs.updates", "dim.nodes.heartbeat"];
    let yaml = format!(
        "fleet: {{ name: {name} }}\ntopics: {{ probe.*: {{ delivery: reliable, encrypt: true }}, dim.*: {{ delivery: reliable, encrypt: true }} }}\n"
    );
    let grants = json!({ "config": { "topics": TOPICS }, "grants": { "subscribe": ["probe.*", "dim.*"] } });
    let mut hosts = Vec::new();
    for daemon in daemons {
        let setup = Setup::default().and_probe("probe", grants.clone()).yaml(&yaml);
        hosts.push(setup.on_kubo(daemon.api()).start().await);
    }
    // The agents use the daemons of two hosts.
    let place = tempfile::tempdir().unwrap();
    let config = place.path().join("fleet.yaml");
    std::fs::write(&config, &yaml).unwrap();
    let agent_dirs = ["a1", "a2"].map(|agent| place.path().join(agent));
    let mut lines: Vec<String> = hosts.iter().map(keys_of).collect();
    lines.extend(agent_dirs.iter().map(|dir| {
        let args = ["fleet", "join", &name, "--agent-dir", dir.to_str().unwrap()];
        let output = tokio::task::block_in_place(|| Command::new(PROGRAM).args(args).output().unwrap());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }));
    let names = ["h1", "h2", "h3", "a1", "a2"];
    let members: Vec<_> = lines
        .iter()
        .zip(names)
        .map(|(line, name)| (line.as_str(), name, name == "h1" || name == "h2"))
        .collect();
    admin.with_members(&members).offer(&hosts[0]).await.unwrap();

    let eavesdropper = Eavesdropper::of(&third, &channels(&hosts[0], &TOPICS)).await;
    let agents: Vec<Agent> = agent_dirs
        .iter()
        .zip([&one, &other])
        .map(|(dir, daemon)| {
            let config = config.to_str().unwrap();
            let args = ["--kubo", daemon.api(), "--config", config, "--every", "10s"];
            tokio::task::block_in_place(|| Agent::start(Path::new(PROGRAM), dir, &args))
        })
        .collect();
    let count = 10_000;
    for (number, agent) in agents.iter().enumerate() {
        let (job, data) = (format!("{MARK}-{number}").replace(' ', "-"), json!({ "text": MARK }).to_string());
        let output = tokio::task::block_in_place(|| agent.dim(&["running", &job, "--data", &data]));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    for (index, host) in hosts.iter().enumerate() {
        let numbers = (0..count).filter(|number| number % hosts.len() == index);
        for group in numbers.collect::<Vec<_>>().chunks(20) {
            futures::future::join_all(group.iter().map(|number| publish(host, *number))).await;
        }
    }
    for (index, host) in hosts.iter().enumerate() {
        let own = (0..count).filter(|number| number % hosts.len() == index).count();
        eventually_within(ARRIVAL * 2, "a host has read all events", async || {
            received_on(host, "probe.in").len() == count - own
        })
        .await;
        eventually_within(ARRIVAL, "and those of the agents", async || {
            let events = received_on(host, "dim.jobs.updates");
            events.iter().filter(|event| contains_mark(event)).count() == agents.len()
        })
        .await;
        assert!(received_on(host, "probe.in").iter().all(|event| contains_mark(event)));
    }

    // The search would find a text that is only compressed.
    let sealed_for_nobody = {
        let header = Header {
            topic: topic(),
            writer: WriterId([1; 32]),
            incarnation: Incarnation([1; 16]),
            began: Timestamp(1),
            first: 0,
            recent: Vec::new(),
            start: None,
        };
        let event = Event { time: Timestamp(2), data: MARK.repeat(9).into() };
        Bundle::form(&name, header, &[event], &SigningKey::from_bytes(&[1; 32]), None).block
    };
    assert!(shows_mark(&sealed_for_nobody));
    let heard = eavesdropper.end();
    let bundles =
        heard.iter().filter(|message| Bundle::open_of_any_fleet((*message).clone()).is_ok()).count();
    assert!(bundles > 10, "the program has heard {bundles} bundles");
    assert!(!heard.iter().any(|message| shows_mark(message)), "a message shows an event");
    let http = reqwest::Client::new();
    for daemon in daemons {
        let blocks = blocks(daemon).await;
        assert!(blocks.len() > 10, "{} blocks", blocks.len());
        assert!(!blocks.values().any(|block| shows_mark(block)), "a block shows an event");
        let answers = blocks.keys().map(async |cid| {
            let url = format!("{}/ipfs/{cid}?format=raw", daemon.gateway());
            http.get(url).send().await.unwrap().bytes().await.unwrap()
        });
        let mut answers = futures::stream::iter(answers).buffer_unordered(8);
        while let Some(answer) = answers.next().await {
            assert!(!shows_mark(&answer), "the gateway shows an event");
        }
    }
    println!("{count} events of 3 hosts; {} messages and {bundles} bundles heard", heard.len());
    drop(agents);
    for host in hosts {
        host.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_and_a_copied_host_use_no_nonce_twice_and_have_their_keys() {
    let Some((near, far)) = Kubo::start_pair() else { return };
    let third = tokio::task::block_in_place(Kubo::start).unwrap();
    tokio::task::block_in_place(|| connect_all(&[&near, &far, &third]));
    let admin = FleetAdmin::new(5);
    let name = admin.fleet();
    let writer = setup(&name).on_kubo(near.api()).start().await;
    let reader = setup(&name).on_kubo(far.api()).start().await;
    let lines = [keys_of(&writer), keys_of(&reader)];
    admin
        .with_members(&[(&lines[0], "writer", true), (&lines[1], "reader", false)])
        .offer(&writer)
        .await
        .unwrap();
    let eavesdropper = Eavesdropper::of(&far, &channels(&writer, &["probe.in"])).await;
    let mut count = 0;
    let publish_some = async |host: &TestHost, count: &mut usize| {
        for _ in 0..20 {
            publish(host, *count).await;
            *count += 1;
        }
        eventually_within(ARRIVAL, "the reader has them", async || numbers(&reader).len() >= *count).await;
    };
    publish_some(&writer, &mut count).await;
    let passphrase = dim_server::backup::Passphrase::new("long enough".to_owned()).unwrap();
    let (mut backup, storage) = (Vec::new(), &writer.host.storage);
    dim_server::backup::write(&storage.store, &storage.keys, passphrase.clone(), &mut backup).unwrap();
    publish_some(&writer, &mut count).await;
    let dir = writer.stop().await;
    let copy = copy_of(dir.path());

    let place = tempfile::tempdir().unwrap();
    dim_server::backup::restore(backup.as_slice(), passphrase, place.path()).unwrap();
    let files = place.path().join(format!("keys/.fleet-{name}"));
    let files: Vec<String> = std::fs::read_dir(files)
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(files.iter().any(|file| file == "roster"), "{files:?}");
    assert!(files.iter().any(|file| file.starts_with("epoch.all.")), "{files:?}");
    let restored = setup(&name).on_kubo(near.api()).start_in(place).await;
    publish_some(&restored, &mut count).await;
    restored.stop().await;

    let original = setup(&name).on_kubo(near.api()).start_in(dir).await;
    let copied = setup(&name).on_kubo(third.api()).start_in(copy).await;
    publish_some(&original, &mut count).await;
    publish_some(&copied, &mut count).await;

    let mut found: BTreeMap<Digest, Bundle> = BTreeMap::new();
    let mut all = eavesdropper.end();
    for daemon in [&near, &far, &third] {
        all.extend(blocks(daemon).await.into_values());
    }
    for bytes in all {
        if let Ok(bundle) = Bundle::open_of_any_fleet(bytes) {
            found.insert(bundle.digest, bundle);
        }
    }
    // The key is that of an epoch, a topic, a writer and a process start.
    let nonces: Vec<_> = found
        .values()
        .filter_map(|it| Some((*it.epoch()?, it.header.writer, it.header.incarnation, *it.nonce()?)))
        .collect();
    let processes: BTreeSet<_> = nonces.iter().map(|(_, writer, process, _)| (writer, process)).collect();
    assert_eq!(processes.len(), 4, "the writer, its backup, and two that run at once");
    assert_eq!(nonces.iter().collect::<BTreeSet<_>>().len(), nonces.len(), "a nonce was used twice");
    println!("{} bundles of {} process starts, each with a nonce of its own", nonces.len(), processes.len());
    for host in [original, copied, reader] {
        host.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_admin_manages_the_members_of_a_fleet_at_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let in_dir = |args: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.args(args).current_dir(dir.path()).env("DIM_FLEET_KEY", dir.path().join("lab.fleet-key"));
        tokio::task::block_in_place(|| command.output().unwrap())
    };
    let text = |args: &[&str]| {
        let output = in_dir(args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {error}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let name = text(&["fleet", "init", "lab"]);
    name.parse::<IpnsName>().unwrap();
    assert!(!in_dir(&["fleet", "init", "lab"]).status.success(), "a key is not replaced");

    let grants = json!({ "config": { "topics": ["probe.in"] } });
    let topics = "topics: { probe.*: { delivery: reliable, encrypt: true } }\n";
    let host = SupervisedHost::start(&Setup::default().and_probe("probe", grants).yaml(topics)).await;
    let api = format!("unix:{}", host.serve_owner().await.display());
    let fails = |args: &[&str]| {
        let output = in_dir(&[args, &["--api", &api]].concat());
        assert!(!output.status.success(), "{args:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let text = |args: &[&str]| text(&[args, &["--api", &api]].concat());
    // Without a fleet nothing is written on an encrypted topic.
    text(&["topic", "pub", "probe.in", "early"]);
    let written = async || {
        let reliable = &host.host().unwrap().exchange.links.reliable;
        reliable.writers(&topic()).await.unwrap().iter().map(|log| log.end).sum::<u64>()
    };
    assert!(fails(&["fleet", "ls"]).contains("dim fleet join"));
    assert_eq!(written().await, 0);
    // The host joins a fleet while it runs.
    let keys = text(&["fleet", "join", &name]);
    assert_eq!(text(&["fleet", "join", &name]), keys);
    let state = async || host.host().unwrap().exchange.links.reliable.fleet().await.unwrap();
    assert_eq!(state().await.problems(Timestamp::wall()), [FleetProblem::NoRoster]);
    assert!(text(&["status"]).contains("no roster of its fleet yet"));
    assert!(fails(&["fleet", "add", &keys, "--name", "one"]).contains("--first"));
    let added = text(&["fleet", "add", &keys, "--name", "one", "--keeper", "--first"]);
    assert!(added.starts_with("roster 1 "), "{added}");
    eventually("the early event is written", async || written().await == 1).await;
    let stranger = format!("{}:{}", WriterId([8; 32]).name(), keys.split_once(':').unwrap().1);
    text(&["fleet", "add", &stranger, "--name", "two"]);
    assert!(fails(&["fleet", "add", &stranger, "--name", "one"]).contains("another member"));
    text(&["fleet", "rekey", "--all"]);
    let json = |args: &[&str]| -> Value {
        serde_json::from_str(&text(&[args, &["--output", "json"]].concat())).unwrap()
    };
    let members = json(&["fleet", "ls"]);
    let members: Vec<_> = members.as_array().unwrap().iter().map(|it| it["name"].as_str().unwrap()).collect();
    assert_eq!(BTreeSet::from_iter(members), ["one", "two"].into());
    eventually("the keeper has made a key for the newest roster", async || {
        state().await.epochs.iter().any(|(_, epoch)| epoch.is_some())
    })
    .await;
    text(&["fleet", "remove", "two"]);
    assert!(fails(&["fleet", "remove", "two"]).contains("no member two"));
    assert_eq!(json(&["fleet", "ls"]).as_array().unwrap().len(), 1);
    let renewed = json(&["fleet", "renew", "--valid", "1d"]);
    assert_eq!(renewed["version"], 5);
    assert!(text(&["status"]).contains("the roster of the fleet expires at"));

    // Another key changes nothing.
    let second = text(&["fleet", "admin", "key", "second"]);
    let file = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (lab_key, second_key) = (file("lab.fleet-key"), file("second.fleet-key"));
    let refused = fails(&["fleet", "renew", "--admin-key", &second_key]);
    assert!(refused.contains("no admin key"), "{refused}");
    // Its admin is appointed. From then on both must sign.
    let draft = text(&["fleet", "admin", "add", &second, "--threshold", "2"]);
    assert!(draft.contains("dim fleet sign roster-6.draft"), "{draft}");
    let sign = |key: &str| text(&["fleet", "sign", "roster-6.draft", "--yes", "--admin-key", key]);
    let asked = fails(&["fleet", "sign", "roster-6.draft", "--admin-key", &second_key]);
    assert!(asked.contains("it adds admin") && asked.contains("--yes"), "{asked}");
    assert!(sign(&second_key).contains(&name), "the first admin must sign the roster, too");
    assert!(sign(&lab_key).starts_with("roster 6 "));
    let admins = json(&["fleet", "admin", "ls"]);
    let ids: BTreeSet<_> =
        admins.as_array().unwrap().iter().map(|admin| admin["id"].as_str().unwrap()).collect();
    assert_eq!((ids, &admins[0]["threshold"]), ([name.as_str(), &second].into(), &json!(2)));
    assert!(text(&["fleet", "renew"]).contains("roster-7.draft"));
    assert!(fails(&["fleet", "renew"]).contains("roster-7.draft exists"));
    let both = ["--admin-key", &lab_key, "--admin-key", &second_key];
    text(&[&["fleet", "rekey", "--all"][..], &both].concat());
    // Only the first admin signs for the name of the fleet.
    assert!(
        fails(&["fleet", "publish-name", "--admin-key", &second_key]).contains("not that of the first admin")
    );
    assert!(text(&["fleet", "publish-name", "--admin-key", &lab_key]).contains("points to roster 7 until"));
    let late = fails(&["fleet", "sign", "roster-7.draft", "--admin-key", &second_key]);
    assert!(late.contains("make the change again"), "{late}");
    text(&[&["fleet", "admin", "remove", &second, "--threshold", "1"][..], &both].concat());
    assert!(fails(&["fleet", "remove", "one"]).contains("--without-keeper"));
    text(&["fleet", "remove", "one", "--without-keeper"]);
    assert_eq!(state().await.problems(Timestamp::wall()), [FleetProblem::Removed(9)]);
    let status = in_dir(&["status", "--api", &api]);
    assert!(String::from_utf8_lossy(&status.stdout).contains("was removed from its fleet with version 9"));
    assert!(!status.status.success(), "it is an error");

    // A host leaves a fleet only if it is told to.
    let kept = fails(&["fleet", "join", &second]);
    assert!(kept.contains("--leave"), "{kept}");
    text(&["fleet", "join", &second, "--leave"]);
    assert_eq!(state().await.problems(Timestamp::wall()), [FleetProblem::NoRoster]);

    // The config of a host decides, where it names a fleet.
    let configured = SupervisedHost::start(&setup(&name)).await;
    let api = format!("unix:{}", configured.serve_owner().await.display());
    let other = in_dir(&["fleet", "join", &second, "--api", &api]);
    assert!(String::from_utf8_lossy(&other.stderr).contains("remove `fleet.name`"));
    host.stop().await;
    configured.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_finds_the_roster_under_the_name_of_its_fleet() {
    let Some((near, far)) = Kubo::start_pair() else { return };
    let dir = tempfile::tempdir().unwrap();
    let dim = |args: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.args(args).current_dir(dir.path()).env("DIM_FLEET_KEY", dir.path().join("lab.fleet-key"));
        let output = tokio::task::block_in_place(|| command.output().unwrap());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {error}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let name = dim(&["fleet", "init", "lab"]);
    let one = SupervisedHost::start(&setup(&name).on_kubo(near.api())).await;
    let api = format!("unix:{}", one.serve_owner().await.display());
    let keys = dim(&["fleet", "join", &name, "--api", &api]);
    dim(&["fleet", "add", &keys, "--name", "one", "--keeper", "--first", "--api", &api]);
    eventually_within(ARRIVAL, "the name of the fleet resolves to the roster", async || {
        let resolved = far.try_ipfs(&["name", "resolve", "--nocache", &name]);
        resolved.is_ok_and(|path| path.trim().starts_with("/ipfs/bafyrei"))
    })
    .await;
    // The first host is gone, and so are its heads.
    one.stop().await;
    let other = setup(&name).on_kubo(far.api()).start().await;
    eventually_within(ARRIVAL, "it has the roster", async || fleet(&other).await.roster.is_some()).await;
    assert_eq!(fleet(&other).await.problems(Timestamp::wall()), [FleetProblem::NoMember]);
    other.stop().await;
}
