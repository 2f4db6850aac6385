//! The agent of a node, as a program of its own: nothing that it is told is lost on the way.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use dim_client::Client;
use dim_tests::{
    Agent, Fault, FaultProxy, Kubo, Link, Program, downtime, eventually, eventually_within, tier,
};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");
const CID: &str = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy";

/// A machine with a directory for the agent and one for the host.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        std::fs::create_dir(place.state()).unwrap();
        place
    }

    fn state(&self) -> PathBuf {
        self.0.path().join("state")
    }

    fn agent_dir(&self) -> PathBuf {
        self.0.path().join("agent")
    }

    fn host(&self, args: &[&str]) -> Program {
        tokio::task::block_in_place(|| Program::start(Path::new(PROGRAM), &self.state(), args))
    }

    /// An agent that tells the host of this place.
    fn agent(&self) -> Node {
        let state = self.state();
        self.agent_with(&["--state-dir", state.to_str().unwrap()])
    }

    fn agent_with(&self, args: &[&str]) -> Node {
        self.agent_by(args, 1)
    }

    /// An agent on whose clock `rate` seconds pass in a second.
    fn agent_by(&self, args: &[&str], rate: u32) -> Node {
        dim_client::install_tls();
        let start = || Agent::start_by(Path::new(PROGRAM), &self.agent_dir(), args, rate);
        let agent = tokio::task::block_in_place(start);
        let builder = reqwest::Client::builder().unix_socket(agent.socket().as_path()).no_proxy();
        Node { agent, http: builder.build().unwrap() }
    }

    /// Writes the config of the fleet. Returns its path.
    fn config(&self, yaml: &str) -> String {
        let path = self.0.path().join("fleet.yaml");
        std::fs::write(&path, yaml).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn client(&self) -> Client {
        Client::new(dim_client::Address::in_state_dir(&self.state())).unwrap()
    }

    /// When the host has heard the node last, if it knows it.
    async fn last_seen(&self) -> Option<jiff::Timestamp> {
        let nodes = self.client().fleet().get_node_registry().await.unwrap();
        nodes.into_iter().find(|node| node.node_id == "n1")?.last_seen
    }
}

/// A running agent, and the node's daemon that talks to it.
struct Node {
    agent: Agent,
    http: reqwest::Client,
}

impl Node {
    async fn send(&self, body: impl Into<reqwest::Body>) -> (u16, Value) {
        let answer = self.http.post("http://agent/v1/notices").body(body).send().await.unwrap();
        let status = answer.status().as_u16();
        (status, serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap())
    }

    async fn give(&self, notice: Value) {
        let (status, answer) = self.send(notice.to_string()).await;
        assert_eq!(status, 202, "{answer}");
    }

    /// Says that a job runs, that its result lies somewhere, and that it is done.
    async fn give_life_of(&self, job: &str) {
        self.give(json!({ "job_id": job, "event_type": "running" })).await;
        self.give(json!({ "job_id": job, "result_cid": CID })).await;
        self.give(json!({ "job_id": job, "event_type": "completed", "result": { "loss": 0.1 } })).await;
    }

    async fn status(&self) -> Value {
        let answer = self.http.get("http://agent/v1/status").send().await.unwrap();
        serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap()
    }

    async fn waiting(&self) -> u64 {
        self.status().await["notices"]["waiting"].as_u64().unwrap()
    }

    /// Waits until so many notices were taken, and none is left or was refused.
    async fn all_taken(&self, count: u64) {
        eventually("no notice waits", async || self.waiting().await == 0).await;
        let notices = self.status().await["notices"].clone();
        assert_eq!((&notices["taken"], &notices["refused"]), (&json!(count), &json!(0)), "{notices}");
    }
}

/// Whether the host knows all of a job's life, from this node.
async fn is_complete(client: &Client, job: &str) -> bool {
    client.fleet().get_job(job).await.is_ok_and(|job| {
        job.status == "completed"
            && job.node_id.as_deref() == Some("n1")
            && job.result_cid.as_deref() == Some(CID)
            && job.result == Some(json!({ "loss": 0.1 }))
    })
}

/// Waits until it does. A taken notice is on the host's disk; one that went by a topic is handled later.
async fn becomes_complete(client: &Client, job: &str) {
    eventually(&format!("{job} is known whole"), async || is_complete(client, job).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn notices_given_while_the_host_is_away_arrive_with_the_time_when_they_were_given() {
    let place = Place::new();
    let node = place.agent();
    for job in 0..10 {
        node.give_life_of(&format!("j{job}")).await;
    }
    eventually("the agent knows that it is cut off", async || {
        node.status().await["notices"]["contact"]["state"] == "offline"
    })
    .await;
    assert_eq!(node.waiting().await, 30);
    let status = node.agent.dim(&["status"]);
    let shown = String::from_utf8(status.stdout).unwrap();
    assert!(shown.contains("! notices are not delivered since"), "{shown}");
    assert_eq!(status.status.code(), Some(1));
    // Those that come at once bear times a millisecond apart, so that their order can be told.
    let given = jiff::Timestamp::now() + Duration::from_millis(30);
    let _host = place.host(&["--embedded"]);
    node.all_taken(30).await;
    let client = place.client();
    for job in 0..10 {
        let job = format!("j{job}");
        becomes_complete(&client, &job).await;
        let told = client.fleet().get_job(&job).await.unwrap().updated_at;
        assert!(told <= given, "{job} is of {told}, it was given before {given}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_of_the_agent_loses_no_notice_and_keeps_their_order() {
    let place = Place::new();
    let node = place.agent();
    for number in 0..40 {
        node.give(json!({ "job_id": format!("j{}", number % 7), "event_type": "running", "data": number }))
            .await;
    }
    node.agent.kill();
    let _host = place.host(&["--embedded"]);
    let mut messages = place.client().pubsub().subscribe("dim.jobs.updates").await.unwrap();
    let node = place.agent();
    for number in 0..40 {
        let message = tokio::time::timeout(Duration::from_secs(20), messages.next()).await.unwrap();
        let event: Value = serde_json::from_slice(&message.unwrap().unwrap().data).unwrap();
        assert_eq!((&event["data"], &event["node_id"]), (&json!(number), &json!("n1")));
    }
    node.all_taken(40).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_killed_and_frozen_amid_notices_gets_all_of_them() {
    let place = Place::new();
    let mut host = place.host(&["--embedded"]);
    let node = place.agent();
    for round in 0..3 {
        for job in 0..10 {
            node.give_life_of(&format!("j{round}-{job}")).await;
        }
        host.kill();
        node.give_life_of(&format!("while-away-{round}")).await;
        host = place.host(&["--embedded"]);
        host.freeze();
        node.give_life_of(&format!("while-frozen-{round}")).await;
        host.thaw();
    }
    node.all_taken(3 * 12 * 3).await;
    let jobs = host.json(&["job", "ls", "--status", "completed"]);
    assert_eq!(jobs.as_array().unwrap().len(), 36);
    assert_eq!(host.json(&["dead", "ls"]), json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_host_knows_already_is_taken_and_what_contradicts_it_is_set_aside_with_the_reason() {
    let place = Place::new();
    let host = place.host(&["--embedded"]);
    // As if the agent had said it and not heard the answer.
    let ours = json!({ "event_type": "completed", "node_id": "n1", "result": { "loss": 0.1 } });
    let http = place.client().http().clone();
    for job in ["known", "otherwise"] {
        let segments = ["jobs", job, "events"];
        http.send_json::<Value>(reqwest::Method::POST, &segments, &[], &ours).await.unwrap();
    }
    host.json(&["job", "update", "cancelled", "cancelled"]);
    let node = place.agent();
    let completed = |job: &str, loss: f64| json!({ "job_id": job, "event_type": "completed", "result": { "loss": loss } });
    node.give(completed("known", 0.1)).await;
    node.give(completed("otherwise", 0.2)).await;
    node.give(completed("cancelled", 0.1)).await;
    node.give(completed("fine", 0.1)).await;
    eventually("no notice waits", async || node.waiting().await == 0).await;
    let status = node.status().await;
    assert_eq!((&status["notices"]["taken"], &status["notices"]["refused"]), (&json!(2), &json!(2)));
    let refused = status["refused"].as_array().unwrap();
    assert_eq!(refused[0]["job_id"], "otherwise");
    assert!(refused[1]["reason"].as_str().unwrap().contains("job cancelled is cancelled"), "{refused:?}");
    let shown = String::from_utf8(node.agent.dim(&["status"]).stdout).unwrap();
    assert!(shown.contains("which completed does not change"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn time_without_a_link_to_the_host_loses_no_notice() {
    let seconds = tier::repeats(6, 60);
    let place = Place::new();
    let host = place.host(&["--embedded", "--listen", "127.0.0.1:0"]);
    let url = host.url();
    let link = Link::to(url.strip_prefix("http://").unwrap().parse().unwrap()).await;
    let (api, token) = (format!("http://{}", link.address), place.state().join(dim_client::TOKEN));
    let token = token.to_str().unwrap();
    let node = place.agent_with(&["--api", &api, "--token-file", token, "--every", "1s"]);
    node.give_life_of("before").await;
    node.all_taken(3).await;
    eventually("a heartbeat comes", async || place.last_seen().await.is_some()).await;
    link.cut();
    for second in 0..seconds {
        node.give_life_of(&format!("j{second}")).await;
        downtime(Duration::from_secs(1)).await;
    }
    assert_eq!(node.waiting().await, 3 * seconds as u64, "nothing comes through");
    assert_eq!(node.status().await["heartbeats"]["contact"]["state"], "offline");
    let heard = place.last_seen().await;
    link.mend();
    node.all_taken(3 + 3 * seconds as u64).await;
    for second in 0..seconds {
        becomes_complete(&place.client(), &format!("j{second}")).await;
    }
    // The heart beats again; what it missed is not made up for.
    eventually("a heartbeat comes", async || place.last_seen().await > heard).await;
}

/// Daemons whose only way to each other is a link: the agent's and the host's.
async fn linked() -> Option<(Kubo, Kubo, Link, String)> {
    let (ours, theirs) = tokio::task::block_in_place(|| Some((Kubo::start()?, Kubo::start()?)))?;
    let addresses = theirs.ipfs(&["id", "-f", "<addrs>"]);
    let tcp = addresses.lines().find(|address| address.starts_with("/ip4/127.0.0.1/tcp/")).unwrap();
    let parts: Vec<&str> = tcp.split('/').collect();
    let (port, peer) = (parts[4], parts[6].to_owned());
    let link = Link::to(format!("127.0.0.1:{port}").parse::<SocketAddr>().unwrap()).await;
    let through = format!("/ip4/{}/tcp/{}/p2p/{peer}", link.address.ip(), link.address.port());
    // They tell each other where they are: neither way around the link is open.
    ours.ipfs(&["swarm", "filters", "add", "/ip4/127.0.0.1/ipcidr/32"]);
    ours.ipfs(&["swarm", "connect", &through]);
    Some((ours, theirs, link, through))
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "exhaustive tier: a daemon takes a minute to find out that a connection is dead"]
async fn a_minute_without_a_link_between_two_daemons_loses_no_notice() {
    let seconds = 60;
    let Some((ours, theirs, link, through)) = linked().await else { return };
    let place = Place::new();
    let _host = place.host(&["--kubo", theirs.api()]);
    let node = place.agent_with(&["--kubo", ours.api(), "--every", "1s"]);
    let client = place.client();
    eventually("a heartbeat comes", async || place.last_seen().await.is_some()).await;
    link.cut();
    // The daemon takes these, for it does not know yet.
    for second in 0..seconds {
        node.give_life_of(&format!("j{second}")).await;
        downtime(Duration::from_secs(1)).await;
    }
    assert!(client.fleet().get_job("j0").await.is_err(), "nothing comes through");
    link.mend();
    eventually("the daemons know each other again", async || {
        ours.try_ipfs(&["swarm", "connect", &through]).is_ok()
    })
    .await;
    for second in 0..seconds {
        let job = format!("j{second}");
        // A burst may lose notices. The agent tells them again.
        let patience = Duration::from_secs(120);
        eventually_within(patience, &job, async || is_complete(&client, &job).await).await;
    }
    // None of the repeats was a dead letter.
    assert_eq!(client.http().get::<Value>(&["dead-letters"], &[]).await.unwrap(), json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn over_a_daemon_nothing_is_said_to_nobody_and_what_is_repeated_changes_nothing() {
    let Some(kubo) = tokio::task::block_in_place(Kubo::start) else { return };
    let place = Place::new();
    let node = place.agent_by(&["--kubo", kubo.api(), "--every", "10s"], 10);
    node.give_life_of("early").await;
    eventually("the agent knows that nobody listens", async || {
        let why = node.status().await["notices"]["contact"]["why"].clone();
        why.as_str().is_some_and(|why| why.contains("nobody listens on dim.jobs.updates"))
    })
    .await;
    // A host at the same daemon is no peer of it, and listens all the same.
    let host = place.host(&["--kubo", kubo.api()]);
    let client = place.client();
    let mut updates = client.pubsub().subscribe("dim.jobs.updates").await.unwrap();
    becomes_complete(&client, "early").await;
    let job = client.fleet().get_job("early").await.unwrap();
    // Its events come again after ten seconds.
    let mut again = Vec::new();
    while again.len() < 2 {
        let message = tokio::time::timeout(Duration::from_secs(30), updates.next()).await.unwrap();
        let event: Value = serde_json::from_slice(&message.unwrap().unwrap().data).unwrap();
        again.push(event["event_type"].as_str().unwrap().to_owned());
        if again.ends_with(&["completed".to_owned()]) && again.len() < 2 {
            again.clear();
        }
    }
    assert_eq!(again, ["running", "completed"]);
    assert_eq!(client.fleet().get_job("early").await.unwrap(), job);
    assert_eq!(host.json(&["dead", "ls"]), json!([]));
    assert_eq!(node.waiting().await, 3, "they are told twice more");
}

#[tokio::test(flavor = "multi_thread")]
async fn on_reliable_topics_a_notice_waits_until_a_host_has_it_over_losses_and_kills_of_both() {
    let Some((ours, theirs)) = tokio::task::block_in_place(Kubo::start_pair) else { return };
    let target: SocketAddr = theirs.url().trim_start_matches("http://").parse().unwrap();
    let proxy = FaultProxy::start(target, tier::seed("the proxy")).await;
    let place = Place::new();
    let config = place.config("topics: { dim.*: { delivery: reliable } }\n");
    let host = || place.host(&["--kubo", &proxy.api(), "--config", &config]);
    // The clock of the agent runs faster, so that it notices the missing acknowledgement soon.
    let agent = || place.agent_by(&["--kubo", ours.api(), "--config", &config, "--every", "10s"], 10);
    let (client, first) = (place.client(), host());
    let node = agent();
    node.give_life_of("early").await;
    becomes_complete(&client, "early").await;
    eventually("a heartbeat comes", async || place.last_seen().await.is_some()).await;
    node.all_taken(3).await;
    proxy.set(Fault::Losing);
    for number in 0..10 {
        node.give_life_of(&format!("lossy-{number}")).await;
    }
    first.kill();
    for number in 10..20 {
        node.give_life_of(&format!("lossy-{number}")).await;
    }
    eventually("the agent knows that nobody acknowledges", async || {
        let why = node.status().await["notices"]["contact"]["why"].clone();
        why.as_str().is_some_and(|why| why.contains("no host has acknowledged a notice"))
    })
    .await;
    assert!(node.waiting().await >= 3 * 10, "the host has heard the first ones at most");
    node.agent.kill();
    let node = agent();
    let second = host();
    let patience = Duration::from_secs(120);
    eventually_within(patience, "no notice waits", async || node.waiting().await == 0).await;
    for number in 0..20 {
        becomes_complete(&client, &format!("lossy-{number}")).await;
    }
    let notices = node.status().await["notices"].clone();
    assert_eq!((&notices["taken"], &notices["refused"]), (&json!(63), &json!(0)), "{notices}");
    assert_eq!(second.json(&["dead", "ls"]), json!([]));
    assert!(node.agent.dim(&["status"]).status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_bear_the_figures_of_this_machine() {
    let place = Place::new();
    let host = place.host(&["--embedded"]);
    let state = place.state();
    let args = ["--state-dir", state.to_str().unwrap(), "--every", "1s", "--model", "m1", "--model", "m2"];
    let node = place.agent_with(&args);
    eventually("the node is known", async || host.dim(&["node", "get", "n1"]).status.success()).await;
    let known = host.json(&["node", "get", "n1"]);
    assert_eq!((&known["status"], &known["cached_models"]), (&json!("online"), &json!(["m1", "m2"])));
    let memory_of = |what: &str| {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        let line = text.lines().find(|line| line.starts_with(what)).unwrap();
        let kib: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kib / f64::from(1 << 20)
    };
    let figure = |name: &str| known["resources"][name].as_f64().unwrap();
    // A container may have less than the machine.
    assert!(figure("memory_available") > 0.0 && figure("memory_available") <= memory_of("MemTotal"));
    if !Path::new("/sys/fs/cgroup/memory.max").exists() && !Path::new("/sys/fs/cgroup/memory").exists() {
        let difference = (figure("memory_available") - memory_of("MemAvailable")).abs();
        assert!(difference < memory_of("MemTotal") / 4.0, "{known}");
    }
    let cores = std::thread::available_parallelism().unwrap().get() as f64;
    assert!((0.0..=cores).contains(&figure("cpu_available")), "{known}");
    assert!(figure("gpu_available") >= 0.0, "{known}");
    assert_eq!(host.json(&["node", "ls", "--min-memory", "0.01"])[0]["node_id"], "n1");
    eventually("the agent has heard of it", async || {
        node.status().await["heartbeats"]["contact"]["state"] == "online"
    })
    .await;
    let said = node.status().await["heartbeats"]["last"]["resources"].clone();
    // A quota is a fraction, and counts as a whole core there.
    assert!((0.01..=cores).contains(&said["cpu_total"].as_f64().unwrap()), "{said}");
    let total = said["memory_total"].as_f64().unwrap();
    assert!(total <= memory_of("MemTotal") + 0.01 && total >= figure("memory_available"), "{said}");
    // The newest replaces the one before.
    let first = known["sent_at"].clone();
    eventually("another comes", async || host.json(&["node", "get", "n1"])["sent_at"] != first).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_agents_with_one_node_id_are_named_where_nodes_are_listed() {
    let place = Place::new();
    let host = place.host(&["--embedded"]);
    let state = place.state();
    let args = ["--state-dir", state.to_str().unwrap(), "--every", "1s"];
    let first = place.agent_with(&args);
    let elsewhere = Place::new();
    let second = elsewhere.agent_with(&args);
    let notes = || String::from_utf8_lossy(&host.dim(&["node", "ls"]).stderr).into_owned();
    eventually("the conflict is shown", async || notes().contains("n1: several agents have this id since"))
        .await;
    let known = host.json(&["node", "get", "n1"]);
    let instances = [first.status().await, second.status().await].map(|status| status["instance"].clone());
    for instance in &instances {
        assert!(
            known["conflict"]["instances"].as_array().unwrap().contains(instance),
            "{known} {instances:?}"
        );
    }
    let nodes = place.client().fleet().get_node_registry().await.unwrap();
    assert_eq!(nodes[0].conflict.as_ref().unwrap().instances.len(), 2);
    assert!(host.log().contains("several agents send heartbeats under one node id"), "{}", host.log());
    // An order removes what is known of it.
    let removed = place.client().fleet().remove_node("n1").await.unwrap();
    assert!(removed.conflict.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_slower_than_the_watchdog_waits_is_named() {
    let place = Place::new();
    let config = place.0.path().join("config.yaml");
    let quick =
        "plugins: { heartbeat-watchdog: { config: { suspect_after_ms: 400, dead_after_ms: 800 } } }\n";
    std::fs::write(&config, quick).unwrap();
    let host = place.host(&["--embedded", "--config", config.to_str().unwrap()]);
    let state = place.state();
    let _agent = place.agent_with(&["--state-dir", state.to_str().unwrap(), "--every", "1m"]);
    let notes = || String::from_utf8_lossy(&host.dim(&["node", "ls"]).stderr).into_owned();
    let hint = "the node sends a heartbeat every 60s and is dead after 800ms of silence";
    eventually("the hint is shown", async || notes().contains(hint)).await;
    let watched = host.json(&["plugin", "query", "heartbeat-watchdog", "list"]);
    assert!(watched[0]["hint"].as_str().unwrap().contains(hint), "{watched}");
    assert!(host.log().contains("a node sends heartbeats too rarely"), "{}", host.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_agent_in_one_directory_is_refused_with_the_holder() {
    let place = Place::new();
    let node = place.agent();
    let second = Command::new(PROGRAM)
        .args(["agent", "--node-id", "n2", "--agent-dir"])
        .arg(place.agent_dir())
        .output();
    let second = second.unwrap();
    let error = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(1));
    assert!(error.contains(&format!("is in use by dim 0.1.0 (pid {})", node.agent.pid())), "{error}");
    assert!(error.contains("--agent-dir"), "{error}");
    // The first one is as it was, and another begins when it has ended.
    node.give_life_of("j").await;
    let log = node.agent.interrupt();
    assert!(log.contains("waiting=3"), "{log}");
    assert_eq!(place.agent().waiting().await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_spool_says_so_and_has_room_again_when_the_host_is_back() {
    let place = Place::new();
    let node = place.agent();
    let large = "x".repeat(59 << 10);
    let mut given = 0;
    let refused = loop {
        let notice = json!({ "job_id": format!("j{given}"), "event_type": "running", "data": large });
        match node.send(notice.to_string()).await {
            (202, _) => given += 1,
            other => break other,
        }
    };
    assert!((270..=280).contains(&given), "{given}");
    assert_eq!((refused.0, &refused.1["type"]), (503, &json!("unavailable")));
    assert!(refused.1["detail"].as_str().unwrap().contains("the spool is full"), "{}", refused.1);
    let said = node.agent.dim(&["failed", "k", "--reason", &"y".repeat(50_000)]);
    assert_eq!(said.status.code(), Some(1));
    assert_eq!(node.waiting().await, given);
    let _host = place.host(&["--embedded"]);
    node.all_taken(given).await;
    node.give(json!({ "job_id": "k", "event_type": "failed" })).await;
    node.all_taken(given + 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_writes_nonsense_to_the_socket_is_told_what_is_wrong() {
    use std::os::unix::fs::PermissionsExt as _;
    let place = Place::new();
    let node = place.agent();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&node.agent.socket()), mode(&place.agent_dir())), (0o600, 0o700));
    let deep = format!(
        "{{\"job_id\":\"j\",\"event_type\":\"failed\",\"data\":{}1{}}}",
        "[".repeat(500),
        "]".repeat(500)
    );
    for (body, status, why) in [
        ("{".to_owned(), 400, "EOF"),
        ("\u{0}".to_owned(), 400, "expected value"),
        ("[]".to_owned(), 400, "this is no notice"),
        ("{\"job_id\":\"a\\u0007b\",\"event_type\":\"failed\"}".to_owned(), 400, "control character"),
        ("{\"job_id\":\"..\",\"event_type\":\"failed\"}".to_owned(), 400, "cannot be part of a URL"),
        (format!("{{\"job_id\":\"{}\",\"event_type\":\"failed\"}}", "x".repeat(129)), 400, "too long"),
        ("{\"job_id\":\"j\",\"event_type\":\"cancelled\"}".to_owned(), 400, "unknown variant"),
        ("{\"job_id\":\"j\",\"result_cid\":\"nothing\"}".to_owned(), 400, "cannot be read"),
        (deep, 400, "recursion"),
        (
            json!({ "job_id": "j", "event_type": "failed", "data": "x".repeat(61_440) }).to_string(),
            413,
            "61440",
        ),
        ("x".repeat(1 << 20), 413, "61440"),
    ] {
        let (code, problem) = node.send(body.clone()).await;
        assert_eq!((code, &problem["status"]), (status, &json!(status)), "{problem}");
        assert!(problem["detail"].as_str().unwrap().contains(why), "{problem}");
    }
    // Who sends far too much still reads why, and is not cut off.
    for _ in 0..50 {
        assert_eq!(node.send("x".repeat(16 << 20)).await.0, 413);
    }
    let text = node.http.post("http://agent/v1/notices").body(vec![0xff, 0xfe]).send().await.unwrap();
    assert_eq!(text.status(), 400);
    for (path, status) in [("/v1/nothing", 404), ("/v1/notices", 405)] {
        let answer = node.http.get(format!("http://agent{path}")).send().await.unwrap();
        assert_eq!(answer.status(), status, "{path}");
    }
    // A page in a browser of this machine.
    let page = node.http.get("http://agent/v1/status").header("origin", "http://evil.example").send().await;
    assert_eq!(page.unwrap().status(), 403);
    assert_eq!(node.waiting().await, 0);
    // From the command line: what is wrong at once, what the agent refuses, and no agent.
    for (args, code) in [
        (&["completed", "a\nb"][..], 2),
        (&["completed", "j", "--result", "{"][..], 2),
        (&["result", "j", "nothing"][..], 2),
        (&["failed", "j", "--reason", "x", "--data", "1"][..], 2),
    ] {
        assert_eq!(node.agent.dim(args).status.code(), Some(code), "{args:?}");
    }
    let reason = "x".repeat(61_440);
    assert_eq!(node.agent.dim(&["failed", "j", "--reason", &reason]).status.code(), Some(5));
    let nowhere =
        Command::new(PROGRAM).args(["agent", "status", "--agent-dir", "/nowhere"]).output().unwrap();
    let error = String::from_utf8_lossy(&nowhere.stderr).into_owned();
    assert_eq!((nowhere.status.code(), error.contains("Is an agent running?")), (Some(4), true), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_says_what_happened_to_a_job() {
    let place = Place::new();
    let host = place.host(&["--embedded"]);
    let node = place.agent();
    let file = place.0.path().join("result.json");
    std::fs::write(&file, "{\"frames\":12}").unwrap();
    let say = |args: &[&str]| node.agent.json(args)["number"].as_u64().unwrap();
    assert_eq!(say(&["running", "done", "--data", "{\"step\":1}"]), 1);
    assert_eq!(say(&["completed", "done", "--result", &format!("@{}", file.display())]), 2);
    assert_eq!(say(&["result", "done", CID]), 3);
    assert_eq!(say(&["failed", "not-done", "--reason", "no disk"]), 4);
    node.all_taken(4).await;
    eventually("the result is known", async || host.json(&["job", "get", "done"])["result_cid"] == CID).await;
    let done = host.json(&["job", "get", "done"]);
    assert_eq!((&done["status"], &done["result"]), (&json!("completed"), &json!({ "frames": 12 })));
    assert_eq!((&done["node_id"], &done["data"]), (&json!("n1"), &json!({ "step": 1 })));
    let failed = host.json(&["job", "get", "not-done"]);
    assert_eq!((&failed["status"], &failed["data"]), (&json!("failed"), &json!({ "reason": "no disk" })));
}
