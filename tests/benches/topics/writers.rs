//! Many writers with few events each: the CPU time of a host that reads them all.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use dim_ipfs::Backend;
use dim_model::time::Timestamp;
use dim_network::reliable_topics::Channels;
use dim_tests::{Program, directly, eventually_within};
use dim_topics::action::Action;
use dim_topics::head::Head;
use dim_topics::identity::Incarnation;
use dim_topics::member::{Member, Setup};
use dim_topics::own_log::Author;
use dim_topics::time::{Moment, Now};
use ed25519_dalek::SigningKey;

use crate::pair::{self, heartbeat, topic};
use crate::rate::cpu_time;

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

/// The time between two events of a writer.
const PERIOD: Duration = Duration::from_secs(5);

/// The name of the fleet.
const FLEET: &str = "dim";

/// The maximum time until the last events have arrived.
const PATIENCE: Duration = Duration::from_secs(120);

pub async fn run(count: usize, seconds: u64) {
    let (near, far) = pair::daemons();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (state, config) = (dir.path().join("state"), dir.path().join("config.yaml"));
    std::fs::create_dir(&state).expect("a directory");
    std::fs::write(&config, [pair::TOPICS, pair::REGISTRY].concat()).expect("a config");
    let args = ["--kubo", far.api(), "--config", config.to_str().expect("a path")];
    let host = tokio::task::block_in_place(|| Program::start(Path::new(PROGRAM), &state, &args));
    let backend = directly(&near);
    let channel = Channels::new(FLEET).of(&topic());
    eventually_within(PATIENCE, "the host is heard on the topic", async || {
        backend.pubsub.peers(&channel).await.is_ok_and(|peers| !peers.is_empty())
    })
    .await;
    let (cpu, begun) = (cpu_time(host.pid()), Instant::now());
    let mut writers = Writers::new(backend, count);
    let published = writers.run(Duration::from_secs(seconds)).await;
    let share = (cpu_time(host.pid()) - cpu).as_secs_f64() / begun.elapsed().as_secs_f64();
    let received = || {
        let writers = host.json(&["topic", "writers", topic().as_str()]);
        let logs = writers.as_array().expect("a list").iter();
        logs.filter_map(|log| log["received"].as_u64()).sum::<u64>()
    };
    let ended = Instant::now();
    // The last messages may be lost, and heads tell of them.
    while tokio::task::block_in_place(received) < published {
        assert!(ended.elapsed() < PATIENCE, "{} of {published} events have arrived", received());
        writers.act().await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    println!("| {count} writers, an event every {} s each, for {seconds} s | |", PERIOD.as_secs());
    println!("|---|---|");
    println!("| events | {published} |");
    println!("| heads a second | {:.1} |", writers.heads as f64 / seconds as f64);
    println!("| CPU of the host, of one core | {:.1} % |", share * 100.0);
}

/// Members without plugins and stores, at one daemon.
struct Writers {
    backend: Backend,
    channels: Channels,
    begun: Instant,
    members: Vec<Member>,
    heads: u64,
}

impl Writers {
    fn new(backend: Backend, count: usize) -> Self {
        let begun = Instant::now();
        let member = |_| {
            let key = SigningKey::from_bytes(&rand::random());
            let author = Author {
                fleet: FLEET.to_owned(),
                key,
                incarnation: Incarnation(rand::random()),
                began: Timestamp::wall(),
            };
            let setup = Setup {
                author,
                past: BTreeMap::new(),
                logs: BTreeMap::new(),
                topics: BTreeMap::new(),
                checkpoints: Vec::new(),
                alarmed: Default::default(),
                seed: rand::random(),
                exchange: None,
            };
            Member::new(setup, Now { moment: Moment::default(), wall: Timestamp::wall() })
        };
        let members = (0..count).map(member).collect();
        Self { backend, channels: Channels::new(FLEET), begun, members, heads: 0 }
    }

    fn now(&self) -> Now {
        Now { moment: Moment(self.begun.elapsed()), wall: Timestamp::wall() }
    }

    /// Publishes for a time. Returns the number of events.
    async fn run(&mut self, length: Duration) -> u64 {
        let mut tick = tokio::time::interval(PERIOD / self.members.len() as u32);
        let mut published = 0;
        let begun = Instant::now();
        while begun.elapsed() < length {
            tick.tick().await;
            let index = published as usize % self.members.len();
            let now = self.now();
            let member = &mut self.members[index];
            let bundle =
                member.form(&topic(), &[(now.wall, heartbeat(index as u64))], now).expect("a plain text");
            member.stored(bundle, now);
            published += 1;
            self.act().await;
        }
        published
    }

    /// Sends what the members want to send, one message after the other.
    async fn act(&mut self) {
        let now = self.now();
        let mut blocks: Vec<(bool, Bytes)> = Vec::new();
        for member in &mut self.members {
            if member.deadline() <= now.moment {
                member.wake(now);
            }
            for action in member.take_actions() {
                match action {
                    Action::Publish { bundle, .. } => {
                        let block = bundle.block.clone();
                        self.backend
                            .content
                            .put_block(&bundle.digest.cid(), block.clone())
                            .await
                            .expect("a daemon");
                        blocks.push((false, block));
                    }
                    Action::PublishHead(head) => blocks.push((true, head)),
                    // The daemon has all of them.
                    Action::Resend(_) => {}
                    other => panic!("a member that reads nothing wants {other:?}"),
                }
            }
        }
        for (is_head, block) in blocks {
            let channel = if is_head { self.channels.heads.clone() } else { self.channels.of(&topic()) };
            self.backend.pubsub.publish(&channel, block.clone()).await.expect("a daemon");
            if is_head {
                self.heads += 1;
                let head = Head::open(&block, FLEET).expect("a head of a member");
                let now = self.now();
                for member in &mut self.members {
                    member.receive_head(head.clone(), now);
                }
            }
        }
    }
}
