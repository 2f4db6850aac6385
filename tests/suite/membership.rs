//! Fleets with a roster: only members write, and only members read.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use dim_model::ident::{GroupName, IpnsName, Topic};
use dim_model::time::Timestamp;
use dim_network::reliable_topics::FleetState;
use dim_store::effect::Publish;
use dim_tests::{Kubo, Setup, SupervisedHost, TestHost, eventually, eventually_within};
use dim_topics::identity::WriterId;
use dim_topics::membership::roster::{Group, MemberRow, Roster, SignedRoster};
use ed25519_dalek::SigningKey;
use futures::StreamExt as _;
use serde_json::{Value, json};

use crate::reliable_topics::{ARRIVAL, received};

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

/// A text that stands in every event.
const MARK: &str = "a mark that nobody else may read";

fn topic() -> Topic {
    "probe.in".parse().unwrap()
}

fn group() -> GroupName {
    "all".parse().unwrap()
}

fn setup(fleet: &str) -> Setup {
    let grants = json!({ "config": { "topics": ["probe.in"] } });
    let yaml = format!(
        "fleet: {{ name: {fleet} }}\ntopics: {{ probe.*: {{ delivery: reliable, encrypt: true }} }}\n"
    );
    Setup::default().and_probe("probe", grants).yaml(&yaml)
}

async fn fleet(host: &TestHost) -> FleetState {
    host.host.exchange.links.reliable.fleet().await.expect("a fleet with a roster")
}

fn row(state: &FleetState, label: &str, is_keeper: bool, since: u64) -> (WriterId, MemberRow) {
    let row = MemberRow {
        label: label.parse().unwrap(),
        sealing: state.sealing.parse().unwrap(),
        peers: BTreeSet::new(),
        addresses: Vec::new(),
        groups: [group()].into(),
        is_keeper,
        since,
    };
    (WriterId::of_name(&state.id).unwrap(), row)
}

fn signed(roster: Roster, admin: &SigningKey) -> SignedRoster {
    let mut draft = roster.draft().unwrap();
    draft.sign(admin);
    draft
}

async fn offer(host: &TestHost, roster: &SignedRoster) -> Result<u64, String> {
    host.host.exchange.links.reliable.offer_roster(roster.to_block()).await.unwrap()
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

fn contains_mark(bytes: &[u8]) -> bool {
    bytes.windows(MARK.len()).any(|window| window == MARK.as_bytes())
}

/// All blocks of a daemon.
async fn blocks(api: &str) -> Vec<Bytes> {
    let client = reqwest::Client::new();
    let post = async |path: &str| client.post(format!("{api}/api/v0/{path}")).send().await.unwrap();
    let listed = post("refs/local").await.text().await.unwrap();
    let mut blocks = Vec::new();
    for row in listed.lines() {
        let row: Value = serde_json::from_str(row).unwrap();
        let cid = row["Ref"].as_str().unwrap();
        blocks.push(post(&format!("block/get?arg={cid}&offline=true")).await.bytes().await.unwrap());
    }
    blocks
}

#[tokio::test(flavor = "multi_thread")]
async fn members_read_what_a_plain_daemon_with_all_blocks_cannot_and_removed_ones_no_longer() {
    let Some((near, far)) = Kubo::start_pair() else { return };
    let admin = SigningKey::from_bytes(&[5; 32]);
    let first = Roster::first(&admin, Timestamp(u64::MAX));
    let name = first.fleet.clone();
    let one = setup(&name).on_kubo(near.api()).start().await;
    let other = setup(&name).on_kubo(far.api()).start().await;
    // What is published before there is a key waits for it.
    publish(&one, 0).await;
    let (states, mut roster) = ([fleet(&one).await, fleet(&other).await], first);
    roster.groups.insert(group(), Group { rekeyed: 1, history: false });
    roster.members = [row(&states[0], "one", true, 1), row(&states[1], "other", false, 1)].into();
    let roster = signed(roster, &admin);

    // A program that only has a daemon hears everything.
    let channel = one.host.exchange.links.reliable.channels.of(&topic());
    let stream = other.host.exchange.links.backend.pubsub.subscribe(&channel).await.unwrap();
    let heard = tokio::spawn(async move {
        let mut heard = Vec::new();
        let mut stream = Box::pin(stream.take_until(tokio::time::sleep(Duration::from_secs(20))));
        while let Some(Ok(message)) = stream.next().await {
            heard.push(message.data);
        }
        heard
    });
    assert_eq!(offer(&one, &roster).await, Ok(1));
    for number in 1..200 {
        publish(&one, number).await;
    }
    eventually_within(ARRIVAL, "all events have arrived", async || numbers(&other).len() == 200).await;
    assert_eq!(numbers(&other), (0..200).collect::<Vec<_>>());
    assert!(fleet(&other).await.epochs.iter().any(|(name, epoch)| *name == group() && epoch.is_some()));
    let heard = heard.await.unwrap();
    assert!(!heard.is_empty(), "the program has heard bundles");
    assert!(!heard.iter().any(|message| contains_mark(message)), "a message shows an event");
    for api in [near.url(), far.url()] {
        let blocks = blocks(&api).await;
        assert!(blocks.len() > 2, "{} blocks", blocks.len());
        assert!(!blocks.iter().any(|block| contains_mark(block)), "a block shows an event");
    }

    // Who is removed reads nothing that is written from then on, and nothing that it writes is taken.
    let gone = WriterId::of_name(&states[1].id).unwrap();
    let mut next = roster.next();
    next.remove(&gone, BTreeMap::new());
    let next = signed(next, &admin);
    assert_eq!(offer(&one, &next).await, Ok(2));
    eventually_within(Duration::from_secs(5), "the removed host knows it", async || {
        !fleet(&other).await.roster.unwrap().roster.members.contains_key(&gone)
    })
    .await;
    publish(&other, 1_000).await;
    for number in 200..220 {
        publish(&one, number).await;
    }
    eventually("the keeper has published with a new key", async || {
        let logs = one.host.exchange.links.reliable.writers(&topic()).await.unwrap();
        logs.iter().filter(|log| log.is_own).map(|log| log.end).sum::<u64>() == 220
    })
    .await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(numbers(&other).len(), 200, "a removed host reads an event");
    assert_eq!(numbers(&one), Vec::<usize>::new(), "an event of a removed host is taken");
    one.stop().await;
    other.stop().await;
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

    let host = SupervisedHost::start(&setup(&name)).await;
    let api = format!("unix:{}", host.serve_owner().await.display());
    let fails = |args: &[&str]| {
        let output = in_dir(&[args, &["--api", &api]].concat());
        assert!(!output.status.success(), "{args:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let text = |args: &[&str]| text(&[args, &["--api", &api]].concat());
    let other_fleet = WriterId([9; 32]).name().to_string();
    assert!(fails(&["fleet", "join", &other_fleet]).contains("set `fleet: { name:"));
    let keys = text(&["fleet", "join", &name]);
    assert!(fails(&["fleet", "add", &keys, "--name", "one"]).contains("--first"));
    let added = text(&["fleet", "add", &keys, "--name", "one", "--keeper", "--first"]);
    assert!(added.starts_with("roster 1 "), "{added}");
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
        let state = host.host().unwrap().exchange.links.reliable.fleet().await.unwrap();
        state.epochs.iter().any(|(_, epoch)| epoch.is_some())
    })
    .await;
    text(&["fleet", "remove", "two"]);
    assert!(fails(&["fleet", "remove", "two"]).contains("no member two"));
    assert_eq!(json(&["fleet", "ls"]).as_array().unwrap().len(), 1);
    let renewed = json(&["fleet", "renew", "--valid", "1d"]);
    assert_eq!(renewed["version"], 5);
    // Another key changes nothing.
    text(&["fleet", "init", "other"]);
    let other_key = dir.path().join("other.fleet-key");
    let refused = fails(&["fleet", "renew", "--admin-key", other_key.to_str().unwrap()]);
    assert!(refused.contains("no admin key"), "{refused}");
}
