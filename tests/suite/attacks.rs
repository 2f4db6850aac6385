//! Plugins that want the worst, one for each way of attack and named after it, beside honest ones, in rounds (ten in the exhaustive tier), after
//! which the host is alive, holds no more memory than before, honest state is what it is without them, and the operator
//! can see each attack.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use dim_client::{Address, Client, JobUpdate};
use dim_tests::{HOSTILE, PROBE, Program, eventually_within, script, tier};
use reqwest::Method;
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

/// How often all attack.
fn rounds() -> usize {
    tier::repeats(1, 20)
}

/// How the operator sees an attack.
#[derive(Clone, Copy)]
enum Sign {
    /// As a limit that it has met, or what it is not granted.
    Met(&'static str),
    /// As a dead letter with this in its reason.
    Letter(&'static str),
    /// As a plugin that is failing or quarantined, with this as the reason.
    Stopped(&'static str),
    /// As an answer to whoever gives the order or asks the question.
    Answer(&'static str),
}

use Sign::{Answer, Letter, Met, Stopped};

/// The ways of attack.
const ATTACKS: &[(&str, Sign)] = &[
    ("loop", Met("call-cpu-ms")),
    ("wait-for-the-clock", Met("call-cpu-ms")),
    ("sleep", Letter("a plugin cannot wait")),
    ("call-the-host-without-end", Met("host-calls")),
    ("scan-without-end", Met("host-calls")),
    ("allocate", Met("memory")),
    ("hoard", Met("memory")),
    ("recurse", Letter("call stack exhausted")),
    ("ask-for-random-without-end", Letter("")),
    ("hold-on-to-resources", Letter("")),
    ("trap", Letter("it wants to")),
    ("abort", Letter("unreachable")),
    ("exit", Letter("exit")),
    ("start-loop", Stopped("CPU time")),
    ("start-trap", Stopped("it wants to")),
    ("start-fail", Stopped("it does not want to")),
    ("retry-for-ever", Letter("still not handled after")),
    ("reject-with-a-novel", Letter("never never")),
    ("flood-outbox", Met("publishes-per-second")),
    ("publish-too-much-at-once", Met("effect-bytes")),
    ("publish-a-huge-message", Met("message-bytes")),
    ("send-a-flood-over-the-border", Met("border-bytes")),
    ("answer-with-a-novel", Answer("went over the plugin's border")),
    ("speak-on-a-topic-of-others", Met("grants")),
    ("smuggle-a-line-into-a-topic", Letter("InvalidArgument")),
    ("listen-to-others", Met("grants")),
    ("toggle-a-subscription", Met("effects")),
    ("listen-to-everything", Met("topics")),
    ("fill-state", Met("effect-bytes")),
    ("write-a-million-keys", Met("effects")),
    ("write-a-huge-value", Met("value-bytes")),
    ("write-a-long-key", Met("key-bytes")),
    ("set-timers-without-end", Met("timers")),
    ("set-timers-in-the-past", Letter("a thousand are due at once")),
    ("take-the-key-of-others", Met("grants")),
    ("read-what-is-not-granted", Met("grants")),
    ("publish-a-huge-document", Met("document-bytes")),
    ("publish-documents-without-end", Met("effect-bytes")),
    ("log-without-end", Met("log-lines")),
    ("print-without-end", Met("call-cpu-ms")),
    ("draw-on-the-terminal", Letter("nothing to see")),
    ("read-files", Letter("a file")),
    ("write-files", Letter("a file")),
    ("connect", Letter("a connection")),
    ("listen-on-a-port", Letter("a port")),
    ("read-the-environment", Letter("the environment is empty")),
    ("make-a-thread", Letter("a thread")),
];

fn is_stopped(plugin: &Value) -> bool {
    ["failing", "quarantined"].contains(&plugin["state"].as_str().unwrap())
}

/// A host with the honest plugins, and with the hostile ones or not.
struct Field {
    host: Program,
    client: Client,
}

impl Field {
    fn start(dir: &Path, attacks: &[(&str, Sign)]) -> Self {
        let mut plugins = serde_json::Map::new();
        let honest = json!({
            "file": PROBE, "config": { "topics": ["honest.in"] },
            "grants": { "subscribe": ["honest.in"], "publish": ["honest.out"], "write": ["honest-key"] },
        });
        plugins.insert("honest".to_owned(), honest);
        for (attack, _) in attacks {
            let (topics, keys) = (
                vec!["hostile.in"],
                if attack.starts_with("publish-") { vec!["hostile-key"] } else { vec![] },
            );
            let section = json!({
                "file": HOSTILE,
                "config": { "attack": attack, "topics": topics, "keys": keys },
                "grants": {
                    "publish": ["hostile.out"], "subscribe": ["hostile.*"], "write": keys, "share": keys,
                },
            });
            plugins.insert((*attack).to_owned(), section);
        }
        // As tight as honest plugins bear it, so that a round takes some seconds.
        let limits = json!({
            "call-cpu-ms": 200, "start-cpu-ms": 500, "memory": 64 << 20, "state-bytes": 8 << 20, "timers": 2_000,
            "host-calls": 20_000, "effects": 5_000, "retries": 1, "restarts": 2, "publishes-per-second": 100,
        });
        // What is held in memory anyway is little, and full soon.
        let store = json!({ "memory_bytes": 4 << 20, "log": { "max_bytes": 4 << 20 } });
        let config = json!({ "plugins": plugins, "limits": { "default": limits }, "store": store });
        let file = dir.join("config.yaml");
        std::fs::write(&file, config.to_string()).unwrap();
        let state = dir.join("state");
        std::fs::create_dir(&state).unwrap();
        dim_tests::warm(&state);
        let args = ["--embedded", "--config", file.to_str().unwrap()];
        let host = tokio::task::block_in_place(|| Program::start(Path::new(PROGRAM), &state, &args));
        let client = Client::new(Address::in_state_dir(&state)).unwrap();
        Self { host, client }
    }

    async fn get(&self, path: &[&str]) -> Value {
        self.client.http().get(path, &[]).await.unwrap()
    }

    /// The plugins by their names.
    async fn plugins(&self) -> BTreeMap<String, Value> {
        let plugins = self.get(&["plugins"]).await;
        let named = plugins.as_array().unwrap().iter();
        named.map(|plugin| (plugin["name"].as_str().unwrap().to_owned(), plugin.clone())).collect()
    }

    /// Waits until each has handled what is in the log, or is stopped.
    async fn settled(&self) {
        let mut behind = Vec::new();
        for _ in 0..6_000 {
            let plugins = self.plugins().await.into_iter();
            behind = plugins.filter(|(_, it)| it["behind"] != 0 && !is_stopped(it)).collect();
            if behind.is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("not all have come to an end: {behind:#?}");
    }

    /// What an honest fleet says in a round.
    async fn honest_round(&self, round: usize) {
        let fleet = self.client.fleet();
        let add = script(json!([{ "do": "add", "key": "count" }])).to_string();
        for number in 0..20 {
            let job = format!("job-{round}-{number}");
            for event in ["queued", "running", "completed"] {
                fleet.update_job_status(&job, &JobUpdate::new(event)).await.unwrap();
            }
            let beat =
                json!({ "node_id": format!("n{}", number % 5), "status": "online", "cached_models": [job] });
            self.client.pubsub().publish("dim.nodes.heartbeat", beat.to_string()).await.unwrap();
            self.client.pubsub().publish("honest.in", add.clone()).await.unwrap();
        }
    }

    /// What the honest plugins know, without times.
    async fn known(&self) -> Value {
        let count = self.client.http().send(
            self.client
                .http()
                .request(Method::POST, &["plugins", "honest", "queries", "run"])
                .unwrap()
                .json(&script(json!([{ "do": "get", "key": "count" }]))),
        );
        let count: Value = serde_json::from_slice(&count.await.unwrap().bytes().await.unwrap()).unwrap();
        let pick = |rows: Value, members: &[&str]| -> Vec<Value> {
            let rows = rows.as_array().unwrap().clone().into_iter();
            rows.map(|row| members.iter().map(|member| row[*member].clone()).collect()).collect()
        };
        json!({
            "count": count,
            "jobs": pick(self.get(&["jobs"]).await, &["job_id", "status"]),
            "nodes": pick(self.get(&["nodes"]).await, &["node_id", "status", "cached_models"]),
        })
    }

    /// Bytes of memory that the host holds.
    fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.host.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_attack_takes_the_host_down_changes_what_others_know_or_hides() {
    assert!(ATTACKS.len() >= 40);
    let (peace, war) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let alone = Field::start(peace.path(), &[]);
    let field = Field::start(war.path(), ATTACKS);
    eventually_within(Duration::from_secs(600), "all are there", async || {
        field.plugins().await.len() == ATTACKS.len() + 4
    })
    .await;
    field.settled().await;
    let mut resident = Vec::new();
    let mut answers = BTreeMap::new();
    // The two before the first fill what is kept in memory: caches, and the machine code of each attack.
    for round in 0..rounds() + 2 {
        field.client.pubsub().publish("hostile.in", "go").await.unwrap();
        field.honest_round(round).await;
        alone.honest_round(round).await;
        for attack in ["loop", "allocate", "trap", "answer-with-a-novel"] {
            for way in ["commands", "queries"] {
                let request =
                    field.client.http().request(Method::POST, &["plugins", attack, way, "any"]).unwrap();
                let answer = field.client.http().send(request.json(&json!({}))).await;
                answers
                    .insert((attack, way), answer.map_or_else(|error| error.to_string(), |_| String::new()));
            }
        }
        field.settled().await;
        if round > 0 {
            resident.push(field.resident());
        }
    }
    println!("resident memory, in MiB: {:?}", resident.iter().map(|bytes| bytes >> 20).collect::<Vec<_>>());
    alone.settled().await;
    assert_eq!(field.known().await, alone.known().await, "what honest plugins know");

    let (plugins, mut hidden) = (field.plugins().await, Vec::new());
    for (attack, sign) in ATTACKS {
        let plugin = &plugins[*attack];
        let query = [("plugin", (*attack).to_owned())];
        let letters: Value = field.client.http().get(&["dead-letters"], &query).await.unwrap();
        let reasons: Vec<&str> =
            letters.as_array().unwrap().iter().map(|letter| letter["reason"].as_str().unwrap()).collect();
        let is_seen = match sign {
            Met(limit) => plugin["met"][*limit].as_u64().is_some_and(|times| times > 0),
            Letter(words) => {
                reasons.iter().any(|reason| reason.contains(words))
                    && !reasons.iter().any(|reason| reason.contains("went well"))
            }
            Stopped(words) => {
                is_stopped(plugin) && plugin["reason"].as_str().is_some_and(|reason| reason.contains(words))
            }
            Answer(words) => answers[&(*attack, "commands")].contains(words),
        };
        if !is_seen {
            hidden.push(format!(
                "{attack}: {} met {} because of {}, letters {:.300?}",
                plugin["state"],
                plugin["met"],
                plugin["reason"],
                reasons.first()
            ));
        }
    }
    assert!(hidden.is_empty(), "{hidden:#?}");
    let health = field.host.dim(&["status"]);
    let health = String::from_utf8_lossy(&health.stdout).into_owned();
    for stopped in ["start-loop", "start-trap", "start-fail"] {
        assert!(health.contains(stopped), "{health}");
    }
    // Nothing of it reaches the operator's terminal as it is.
    let log = field.host.log();
    let drawn: Vec<&str> = log.lines().filter(|line| line.contains("all is lost")).collect();
    assert!(!drawn.is_empty(), "it is told");
    for line in drawn {
        assert!(line.contains("owned") && !line.contains(['\u{1b}', '\u{7}']), "{line:?}");
    }
    let letters = field.host.dim(&["dead", "ls", "--plugin", "draw-on-the-terminal"]);
    assert!(!String::from_utf8_lossy(&letters.stdout).contains('\u{1b}'));
    assert!(!Path::new("/tmp/hostile").exists());

    let (start, last) = (resident[0], resident[resident.len() - 1]);
    assert!(last <= start + start / 10, "{start} bytes at the start, {last} at the end");
    // What grows slowly shows after some rounds only, when the caches and the allocator have what they keep.
    if let Some(tenth) = resident.get(10) {
        assert!(last <= tenth + tenth / 50, "{tenth} bytes after ten rounds, {last} at the end");
    }
}
