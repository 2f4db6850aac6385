//! Plugins come, go and rest while the host runs, by whatever way: the command line, the API, a folder, a URL,
//! a CID and an IPNS name end in the same states.

use std::path::Path;
use std::time::Duration;

use dim_model::entry::{Event, Kind};
use dim_model::ident::Topic;
use dim_server::host::Grant;
use dim_store::change::{Change, State};
use dim_store::change_history;
use dim_tests::alone::proposal;
use dim_tests::component::probe;
use dim_tests::{
    Kubo, Program, Setup, SupervisedHost, TestHost, begin_request, directly, downtime, eventually, script,
    tier, with_token,
};
use serde_json::{Value, json};

mod folder;

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

fn changes(host: &TestHost, plugin: &str) -> Vec<Change> {
    let snapshot = host.host.storage.store.snapshot().unwrap();
    change_history::of(&snapshot, &plugin.parse().unwrap(), 100).unwrap()
}

fn states(host: &TestHost, plugin: &str) -> Vec<State> {
    changes(host, plugin).iter().map(|change| change.state).collect()
}

fn version(host: &TestHost, plugin: &str) -> Option<String> {
    Some(host.host.plugins.get(plugin)?.version().version)
}

async fn runs(host: &TestHost, plugin: &str, wanted: &str) {
    let what = format!("{plugin} {wanted} runs");
    eventually(&what, async || version(host, plugin).as_deref() == Some(wanted)).await;
}

fn count() -> String {
    script(json!([{ "do": "add", "key": "count" }])).to_string()
}

/// What a probe is busy with for a while.
fn busy() -> String {
    script(json!([{ "do": "burn", "steps": 10_000_000 }])).to_string()
}

/// The grants of a plugin that only the config knows of, until it comes.
const SECTION: &str = r#"
plugins:
  late: { grants: { subscribe: ["probe.*"], publish: ["probe.*"], write: [probe-key], read: [], share: [probe-key] } }
"#;

/// The probe under the name of that plugin.
fn late(version: &str) -> Vec<u8> {
    named("late", version)
}

fn named(name: &str, version: &str) -> Vec<u8> {
    dim_tests::component::probe_with(version, &[("name = \"probe\"", &format!("name = {name:?}"))])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_plugin_has_what_it_is_granted_and_keeps_it() {
    let host = Setup::default().start().await;
    let name: dim_model::ident::PluginName = "other".parse().unwrap();
    let proposal = || proposal("other", probe("1.0.0", &json!([])));
    let why = host.host.install(proposal(), Grant::AsBefore).await.unwrap_err().to_string();
    assert!(why.contains("it asks to publish on probe.out, subscribe to probe.in"), "{why}");
    assert!(why.contains("--grant"), "{why}");
    let change = host.host.install(proposal(), Grant::AllThatIsAsked).await.unwrap();
    assert_eq!(change.state, State::Installed);
    host.from_peer("probe.in", count()).await;
    eventually("it hears", async || host.state_of("other", "count").await == 1).await;
    let host = Setup::default().start_in(host.stop().await).await;
    host.from_peer("probe.in", count()).await;
    eventually("it hears still", async || host.state_of("other", "count").await == 2).await;
    // Purged, it is new.
    host.host.remove(&name, true, "the test").await.unwrap();
    assert!(host.host.plugins.get("other").is_none());
    host.host.install(proposal(), Grant::AllThatIsAsked).await.unwrap();
    assert_eq!(host.state_of("other", "count").await, Value::Null);
    let told = [State::Installed, State::Purged, State::Installed, State::Refused];
    assert_eq!(states(&host, "other"), told);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_is_paused_answers_questions_and_goes_on_where_it_was() {
    let setup = Setup::probe();
    let host = setup.start().await;
    let name = "probe".parse().unwrap();
    host.run(json!([{ "do": "add", "key": "count" }])).await;
    host.host.pause(&name, true, "the test").await.unwrap();
    host.from_peer("probe.in", count()).await;
    let received = &host.host.exchange.received.received;
    eventually("it is in the log", async || received.load(std::sync::atomic::Ordering::Relaxed) == 1).await;
    assert_eq!(host.state_of("probe", "count").await, 1);
    let refused = host.command("probe", "run", script(json!([]))).await.unwrap_err();
    assert!(refused.to_string().contains("it is paused"), "{refused}");
    let host = setup.start_in(host.stop().await).await;
    assert_eq!(host.state_of("probe", "count").await, 1);
    eventually("it is paused still", async || host.plugin("probe").handle.status().state == "paused").await;
    host.host.pause(&name, false, "the test").await.unwrap();
    eventually("it goes on", async || host.state_of("probe", "count").await == 2).await;
    assert_eq!(states(&host, "probe"), [State::Resumed, State::Paused]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundled_plugin_is_replaced_removed_and_restored() {
    let setup = Setup::bundled();
    let host = setup.start().await;
    let name: dim_model::ident::PluginName = "job-tracker".parse().unwrap();
    host.command("job-tracker", "update", json!({ "job_id": "j1", "event_type": "running" })).await.unwrap();
    let bundled = host.plugin("job-tracker").version();
    host.host.remove(&name, false, "the test").await.unwrap();
    let host = setup.start_in(host.stop().await).await;
    assert!(host.host.plugins.get("job-tracker").is_none(), "it stays away over a restart");
    host.host.restore(&name, "the test").await.unwrap();
    assert_eq!(host.plugin("job-tracker").version(), bundled);
    let job = host.query("job-tracker", "get", json!({ "job_id": "j1" })).await.unwrap();
    assert_eq!(job["status"], "running");
    let host = setup.start_in(host.stop().await).await;
    assert_eq!(host.plugin("job-tracker").handle.code().source, "bundled");
    // Replaced by a version of it, it is restored while it runs.
    let other = dim_tests::component::with_manifest(
        &std::fs::read(host.host.storage.store.path().join(format!("components/{}.wasm", bundled.digest)))
            .unwrap(),
        &include_str!("../../plugins/job-tracker/plugin.toml").replace("\"0.1.0\"", "\"0.9.0\""),
    );
    let install = async |component: Vec<u8>, grant| {
        host.host.install(proposal("job-tracker", component), grant).await.unwrap().state
    };
    assert_eq!(install(other, Grant::AsBefore).await, State::OnProbation);
    assert_eq!(host.host.restore(&name, "the test").await.unwrap().state, State::OnProbation);
    assert_eq!(host.plugin("job-tracker").version(), bundled);
    // What comes under its name with grants of its own does not keep it from coming back with its own.
    host.host.remove(&name, false, "the test").await.unwrap();
    let stranger =
        dim_tests::component::probe_with("1.0.0", &[("name = \"probe\"", "name = \"job-tracker\"")]);
    assert_eq!(install(stranger, Grant::AllThatIsAsked).await, State::Installed);
    assert_eq!(host.host.restore(&name, "the test").await.unwrap().state, State::OnProbation);
    assert_eq!(host.plugin("job-tracker").version(), bundled);
    let update = json!({ "job_id": "j1", "event_type": "completed" });
    assert_eq!(host.command("job-tracker", "update", update).await.unwrap()["status"], "completed");
    let host = setup.start_in(host.stop().await).await;
    assert_eq!(host.plugin("job-tracker").version(), bundled);
    let why = host.host.restore(&"nobody".parse().unwrap(), "the test").await.unwrap_err().to_string();
    assert!(why.contains("there is nothing to restore"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_installed_while_the_plugin_is_removed_comes_after_it() {
    let host = Setup::default().yaml(SECTION).start().await;
    let name: dim_model::ident::PluginName = "late".parse().unwrap();
    let install =
        async |component: Vec<u8>| host.host.install(proposal("late", component), Grant::AsBefore).await;
    install(late("1.0.0")).await.unwrap();
    host.listening(&"probe.in".parse().unwrap()).await;
    // It has something to do for a while.
    let messages = tier::repeats(40, 200) as u64;
    for _ in 0..messages {
        host.from_peer("probe.in", busy()).await;
    }
    let received = &host.host.exchange.received.received;
    let all = async || received.load(std::sync::atomic::Ordering::Relaxed) == messages;
    eventually("all messages are in the log", all).await;
    let removing = host.host.remove(&name, false, "the test");
    let installing = async {
        downtime(Duration::from_millis(300)).await;
        let order = host.command("late", "run", script(json!([]))).await.unwrap_err();
        assert!(order.to_string().contains("it is being removed"), "{order}");
        install(late("2.0.0")).await
    };
    let (removed, installed) = tokio::join!(removing, installing);
    assert_eq!(removed.unwrap().state, State::Removed);
    assert_eq!(installed.unwrap().state, State::Installed);
    assert_eq!(version(&host, "late").as_deref(), Some("2.0.0"));
    // The probation of what is removed ends with it, also on record.
    install(late("3.0.0")).await.unwrap();
    host.host.remove(&name, false, "the test").await.unwrap();
    let told = [State::Removed, State::Removed, State::Removed, State::Installed, State::Installed];
    let mut found = states(&host, "late");
    found.sort();
    assert_eq!(found[..2], told[3..]);
    assert_eq!(found.iter().filter(|state| **state == State::Removed).count(), 3, "{found:?}");
    // What is so already is not put on record again.
    let before = states(&host, "late").len();
    assert!(host.host.remove(&name, false, "the test").await.is_err());
    host.host.remove(&name, true, "the test").await.unwrap();
    assert!(host.host.remove(&name, true, "the test").await.is_err());
    assert_eq!(states(&host, "late").len(), before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_code_that_a_start_finds_under_the_config_is_on_record() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("probe.wasm");
    let setup = Setup::default().and_probe("probe", json!({ "file": file }));
    std::fs::write(&file, probe("1.0.0", &json!([]))).unwrap();
    let host = setup.start().await;
    let host = setup.start_in(host.stop().await).await;
    assert_eq!(changes(&host, "probe"), [], "what comes first, or stays, is no change");
    let state = host.stop().await;
    std::fs::write(&file, probe("2.0.0", &json!([]))).unwrap();
    let host = setup.start_in(state).await;
    let [change] = changes(&host, "probe").try_into().unwrap();
    let versions = [change.before, change.after].map(|version| version.unwrap().version);
    assert_eq!((change.state, change.by.as_str()), (State::Installed, "a start of the host"));
    assert_eq!(versions, ["1.0.0", "2.0.0"]);
}

/// Publishes a component under the host's own name of another; returns the name.
async fn publish(host: &TestHost, component: Vec<u8>) -> dim_model::ident::IpnsName {
    let key = "probe-other".parse().unwrap();
    let name = host.host.storage.keys.get_or_create(&key).unwrap().name();
    let update = dim_store::effect::NameUpdate {
        name: name.clone(),
        value: dim_store::effect::NameValue::document(component.into()),
        lifetime: dim_store::effect::LIFETIME,
    };
    host.host.storage.commit.change_name(dim_store::commit::NameChange::Own { key, update }).await.unwrap();
    name
}

#[tokio::test(flavor = "multi_thread")]
async fn a_component_comes_by_a_name_and_follows_it_as_far_as_it_is_trusted() {
    // The publisher and the follower are one host here; on two daemons see `kubo_pair`.
    let config = format!("ipfs: {{ follow_every: 1 }}\n{SECTION}");
    let host = Setup::probe().yaml(&config).start().await;
    let name = publish(&host, late("1.0.0")).await;
    let from: dim_model::ident::ContentPath = format!("/ipns/{name}").parse().unwrap();
    let install = async |trust| {
        let by = "the test".to_owned();
        host.host.install_from(from.clone(), trust, None, Grant::AsBefore, by).await
    };
    eventually("it is published", async || host.host.fetch(&from).await.is_ok()).await;
    let why = install(None).await.unwrap_err().to_string();
    let digest = dim_model::ident::Digest::of(&late("1.0.0"));
    assert!(why.contains(&format!("--trust {digest}")), "{why}");
    let why = install(Some(dim_model::ident::Digest::of(b"another"))).await.unwrap_err().to_string();
    assert!(why.contains(&format!("is {digest}, not ")), "{why}");
    install(Some(digest)).await.unwrap();
    runs(&host, "late", "1.0.0").await;
    // What it points to now is not what was trusted.
    publish(&host, late("2.0.0")).await;
    downtime(Duration::from_secs(4)).await;
    assert_eq!(version(&host, "late").as_deref(), Some("1.0.0"));
    let dir = host.stop().await;
    let trusted = format!("{config}replacement: {{ trusted: [/ipns/{name}] }}\n");
    let host = Setup::probe().yaml(&trusted).start_in(dir).await;
    runs(&host, "late", "2.0.0").await;
    let told =
        [State::OnProbation, State::Refused, State::Installed, State::Refused, State::Refused].as_slice();
    eventually("it is on record", async || states(&host, "late") == told).await;
    // Another plugin does not come in its place, whoever has made it.
    publish(&host, named("another", "3.0.0")).await;
    let refused = async || {
        let last = changes(&host, "late").swap_remove(0);
        last.reason.is_some_and(|why| why.contains("it is another, and late runs here"))
    };
    eventually("it is refused", refused).await;
    assert_eq!(version(&host, "late").as_deref(), Some("2.0.0"));
}

/// The number of messages of a topic in the log of a host.
fn heard(host: &TestHost, topic: &Topic) -> usize {
    let entries = host.entries();
    let is_heard = |kind: &Kind| matches!(kind, Kind::Event(Event::Message { topic: of, .. }) if of == topic);
    entries.iter().filter(|entry| is_heard(&entry.kind)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_a_third_party_moves_replaces_the_plugin_on_two_hosts_without_a_message_lost() {
    let Some((one, other)) = Kubo::start_pair() else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("late.wasm");
    let name = one.ipfs(&["key", "gen", "third-party"]).trim().to_owned();
    let publish = |component: &[u8]| {
        std::fs::write(&file, component).unwrap();
        let cid = one.ipfs(&["add", "-Q", "--cid-version=1", "--raw-leaves", file.to_str().unwrap()]);
        one.ipfs(&[
            "name",
            "publish",
            "--key=third-party",
            "--lifetime=1h",
            &format!("/ipfs/{}", cid.trim()),
        ]);
    };
    tokio::task::block_in_place(|| publish(&late("1.0.0")));
    let from: dim_model::ident::ContentPath = format!("/ipns/{name}").parse().unwrap();
    let yaml = format!("ipfs: {{ follow_every: 1 }}\nreplacement: {{ trusted: [/ipns/{name}] }}\n{SECTION}");
    let mut hosts = Vec::new();
    for kubo in [&one, &other] {
        let host = Setup::default().yaml(&yaml).on_kubo(kubo.api()).start().await;
        // The other daemon has to hear of the name first.
        eventually("the name is found", async || host.host.fetch(&from).await.is_ok()).await;
        let by = "the test".to_owned();
        host.host.install_from(from.clone(), None, None, Grant::AsBefore, by).await.unwrap();
        assert_eq!(version(&host, "late").as_deref(), Some("1.0.0"));
        hosts.push(host);
    }
    let topic: Topic = "probe.in".parse().unwrap();
    let speaker = directly(&other);
    for host in &hosts {
        host.listening(&topic).await;
    }
    let both_listen = async || speaker.pubsub.peers(&topic).await.is_ok_and(|peers| !peers.is_empty());
    eventually("the daemons know of each other's topics", both_listen).await;
    let messages = 600;
    let load = async {
        for number in 0..messages {
            // Each is another message: equal ones may be told apart by no one.
            let script = json!({ "script": [{ "do": "add", "key": "count" }], "number": number });
            // A daemon that is told something by two at once refuses one of them.
            let publish = async || speaker.pubsub.publish(&topic, script.to_string().into()).await.is_ok();
            eventually("the daemon takes it", publish).await;
            downtime(Duration::from_millis(10)).await;
        }
    };
    let moving = async {
        downtime(Duration::from_secs(1)).await;
        tokio::task::block_in_place(|| publish(&late("2.0.0")));
        for host in &hosts {
            runs(host, "late", "2.0.0").await;
        }
    };
    tokio::join!(load, moving);
    for host in &hosts {
        // The network may lose plain messages, most of all on a busy machine; what a host has heard is in its log.
        let most_are_heard = async || heard(host, &topic) >= messages * 9 / 10;
        eventually("nearly all messages are heard", most_are_heard).await;
        eventually("each message that was heard was handled once", async || {
            host.state_of("late", "count").await == heard(host, &topic)
        })
        .await;
        let told = [State::OnProbation, State::Installed];
        eventually("it is on record", async || states(host, "late") == told).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn plugins_that_are_still_compiled_at_a_start_do_not_hold_up_those_that_are_ready() {
    let dir = tempfile::tempdir().unwrap();
    let mut setup = Setup::default().and_probe("zz-ready", json!({}));
    let count = tier::repeats(12, 60);
    for number in 0..count {
        // Components that nobody has compiled before.
        let file = dir.path().join(format!("{number}.wasm"));
        let steps = json!([{ "do": "set", "key": "unique", "value": file.display().to_string() }]);
        std::fs::write(&file, probe(&format!("0.{number}.9"), &steps)).unwrap();
        setup = setup.and_probe(&format!("aa-{number}"), json!({ "file": file }));
    }
    // The one that is ready was compiled by an earlier host.
    let warm = Setup::probe().start().await.stop().await;
    let host = SupervisedHost::begin_in(warm, &setup).await;
    let others = host.host().unwrap().loading().len();
    assert!(others > 0, "it answers while others are compiled");
    assert_eq!(host.try_run("zz-ready", json!([{ "do": "add", "key": "count" }])).await.unwrap().len(), 1);
    let running = host.host().unwrap();
    running.all_loaded().await;
    assert_eq!((running.plugins.all().len(), running.not_loaded()), (count + 1, vec![]));
    drop(running);
    host.stop().await;
}

#[test]
fn a_plugin_that_is_on_its_way_is_listed_with_how_far_it_has_come() {
    use std::io::{BufRead as _, BufReader, Write as _};
    let dir = tempfile::tempdir().unwrap();
    let host = Program::start(Path::new(PROGRAM), &dir.path().join("state"), &["--embedded"]);
    let (component, socket) = (late("1.0.0"), host.socket());
    let install = "PUT /v1/plugins/late/component?grant=true";
    let half = component.len() / 2;
    let mut stream = begin_request(&socket, install, component.len());
    stream.write_all(&component[..half]).unwrap();
    let listed = || {
        let all = host.json(&["plugin", "ls"]);
        all.as_array().unwrap().iter().find(|plugin| plugin["name"] == "late").cloned().unwrap_or_default()
    };
    dim_tests::soon(|| listed()["change"]["received"] == half);
    assert_eq!((&listed()["state"], &listed()["change"]["state"]), (&json!("loading"), &json!("fetching")));
    stream.write_all(&component[half..]).unwrap();
    dim_tests::soon(|| listed()["state"] == "running");
    // Who listens hears the end of one that is broken off, too.
    let changes = begin_request(&socket, "GET /v1/changes", 0);
    let mut told = BufReader::new(changes).lines().map(Result::unwrap);
    told.find(|line| line.is_empty()).unwrap();
    let broken = begin_request(&socket, install, component.len());
    told.find(|line| line.contains("\"state\":\"fetching\"")).unwrap();
    drop(broken);
    told.find(|line| line.contains("\"state\":\"refused\"")).unwrap();
}

/// Sends a request to a host; the answer must be a success.
fn request(host: &Program, line: &str, body: &[u8]) {
    use std::io::{BufRead as _, BufReader, Write as _};
    let mut stream = begin_request(&host.socket(), line, body.len());
    stream.write_all(body).unwrap();
    let answer = BufReader::new(stream).lines().next().unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[test]
fn the_folder_the_command_line_and_the_api_end_in_the_same_states() {
    let dir = tempfile::tempdir().unwrap();
    let trap = json!({ "do": "trap", "from": 1 }).to_string();
    let (name, step) = ("name = \"late\"", format!("default = {trap:?}"));
    let changes = [("name = \"probe\"", name), ("default = \"null\"", step.as_str())];
    let bad = dim_tests::component::probe_with("3.0.0", &changes);
    // What comes, and what then becomes of it: the last one fails, and the plugin goes.
    let steps = [(late("1.0.0"), "1.0.0"), (late("2.0.0"), "2.0.0"), (bad, "2.0.0")];
    let ends = ["folder", "command line", "api"].map(|way| {
        let place = dir.path().join(way);
        let folder = place.join("plugins");
        std::fs::create_dir_all(&folder).unwrap();
        let file = if way == "folder" { folder.join("late.wasm") } else { place.join("late.wasm") };
        let config = place.join("config.yaml");
        let quick = "replacement: { probation: { seconds: 0, events: 1, max_seconds: 60 } }\n";
        std::fs::write(&config, format!("plugins_dir: {:?}\n{SECTION}{quick}", folder.display())).unwrap();
        let args = ["--embedded", "--config", config.to_str().unwrap()];
        let host = Program::start(Path::new(PROGRAM), &place.join("state"), &args);
        let history = || host.json(&["plugin", "history", "late"]);
        for (count, (component, ends_with)) in steps.iter().enumerate() {
            match way {
                "api" => request(&host, "PUT /v1/plugins/late/component", component),
                _ => std::fs::write(&file, component).unwrap(),
            }
            if way == "command line" {
                host.json(&["plugin", "install", file.to_str().unwrap()]);
            }
            dim_tests::soon(|| history().as_array().unwrap().len() == count + 1);
            let _ = host.dim(&["plugin", "command", "late", "run", "{}"]);
            let ends = ["installed", "confirmed", "taken-back"];
            dim_tests::soon(|| history()[0]["state"] == ends[count]);
            dim_tests::soon(|| host.json(&["plugin", "inspect", "late"])["version"] == *ends_with);
        }
        let running = host.json(&["plugin", "inspect", "late"]);
        match way {
            "folder" => {
                // With no file at all nothing would be unloaded.
                std::fs::write(folder.join("broken.wasm"), b"no component").unwrap();
                std::fs::remove_file(&file).unwrap();
            }
            "api" => request(&host, "DELETE /v1/plugins/late", b""),
            _ => drop(host.json(&["plugin", "remove", "late"])),
        }
        dim_tests::soon(|| history().as_array().unwrap().len() == 4);
        let all = history();
        let told = all.as_array().unwrap().iter().map(|change| {
            let steps = change["steps"].as_array().unwrap().iter().map(|step| step["state"].clone());
            // How it came is told; what became of it is the same.
            let steps: Vec<_> = steps.filter(|state| *state != "fetching").collect();
            json!([change["state"], change["before"], change["after"], change["reason"], steps])
        });
        let told: Vec<_> = told.collect();
        (running["digest"].clone(), running["state"].clone(), running["inspection"].clone(), told)
    });
    assert_eq!(ends[0].3.len(), 4);
    assert_eq!(ends[0], ends[1]);
    assert_eq!(ends[0], ends[2]);
}

#[test]
fn a_url_needs_a_digest_and_states_are_told_on_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.yaml");
    std::fs::write(&config, SECTION).unwrap();
    let host = Program::start(
        Path::new(PROGRAM),
        &dir.path().join("state"),
        &["--embedded", "--config", config.to_str().unwrap()],
    );
    let component = late("1.0.0");
    let url = serve_once_each(component.clone());
    let refused = host.dim(&["plugin", "install", &url]);
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    let digest = dim_model::ident::Digest::of(&component).to_string();
    assert!(!refused.status.success() && error.contains(&format!("--trust {digest}")), "{error}");
    let wrong = host.dim(&["plugin", "install", &url, "--trust", &"0".repeat(64)]);
    assert!(!wrong.status.success());
    let told = host.dim(&["plugin", "install", &url, "--trust", &digest]);
    let error = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(told.status.success(), "{error}");
    for state in ["judging", "compiling", "rehearsing", "installed"] {
        assert!(error.contains(&format!("late 1.0.0: {state}")) || state == "judging", "{state}: {error}");
    }
    let file = dir.path().join("late.wasm");
    std::fs::write(&file, late("2.0.0")).unwrap();
    let told = host.dim(&["plugin", "install", file.to_str().unwrap()]);
    let error = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(error.contains("late 2.0.0: on probation"), "{error}");
    let listed = host.json(&["plugin", "ls"]);
    let late = listed.as_array().unwrap().iter().find(|plugin| plugin["name"] == "late").unwrap();
    assert_eq!(late["change"]["state"], "on-probation", "{late}");
    assert!(late["change"]["steps"].as_array().unwrap().len() >= 5, "{late}");
    let history = host.json(&["plugin", "history", "late"]);
    let by = history[0]["by"].as_str().unwrap();
    assert!(by.starts_with("the API, user "), "{by}");
    let back = host.json(&["plugin", "rollback", "late"]);
    assert_eq!(back["after"]["version"], "1.0.0");
    assert_eq!(host.json(&["plugin", "pause", "late"])["state"], "paused");
    assert_eq!(host.json(&["plugin", "resume", "late"])["state"], "resumed");
    assert_eq!(host.json(&["plugin", "remove", "late", "--purge"])["state"], "purged");
    assert_eq!(host.dim(&["plugin", "remove", "nobody"]).status.code(), Some(3));
    let metrics = host.metrics();
    assert!(metrics.contains("dim_plugin_changes_total{state=\"on-probation\"} 1"), "{metrics}");
    assert!(metrics.contains("dim_plugin_pause_seconds_count 1"), "{metrics}");
}

#[test]
fn whoever_waits_hears_how_a_probation_ended() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.yaml");
    let quick = "replacement: { probation: { seconds: 0, events: 1, max_seconds: 60 } }\n";
    std::fs::write(&config, format!("{SECTION}{quick}")).unwrap();
    let host = Program::start(
        Path::new(PROGRAM),
        &dir.path().join("state"),
        &["--embedded", "--config", config.to_str().unwrap()],
    );
    let file = dir.path().join("late.wasm");
    let path = file.to_str().unwrap().to_owned();
    std::fs::write(&file, late("1.0.0")).unwrap();
    host.json(&["plugin", "install", &path]);
    for (version, step, ends) in
        [("2.0.0", json!(null), "confirmed"), ("3.0.0", json!({ "do": "trap", "from": 1 }), "told to trap")]
    {
        let step = format!("default = {:?}", step.to_string());
        let changes = [("name = \"probe\"", "name = \"late\""), ("default = \"null\"", step.as_str())];
        std::fs::write(&file, dim_tests::component::probe_with(version, &changes)).unwrap();
        let (host, path) = (&host, &path);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(move || host.dim(&["plugin", "install", path, "--wait"]));
            dim_tests::soon(|| host.json(&["plugin", "inspect", "late"])["version"] == version);
            let _ = host.dim(&["plugin", "command", "late", "run", "{}"]);
            let ended = waiting.join().unwrap();
            let error = String::from_utf8_lossy(&ended.stderr).into_owned();
            assert!(error.contains(ends), "{error}");
            assert_eq!(ended.status.success(), ends == "confirmed", "{error}");
        });
    }
}

/// Serves bytes over HTTP, whatever is asked for; returns the URL.
pub fn serve_once_each(bytes: Vec<u8>) -> String {
    use std::io::{Read as _, Write as _};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/late.wasm", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let _ = stream.read(&mut [0; 4096]);
            let head =
                format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", bytes.len());
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&bytes));
        }
    });
    url
}

/// The plugin of the README, which says on each message what it has seen.
fn write_plugin(dir: &Path, version: &str, body: &str) {
    let sdk = dim_tests::data("../guest").canonicalize().unwrap();
    let manifest = format!(
        "[package]\nname = \"greeter\"\nversion = \"{version}\"\nedition = \"2024\"\n\n[lib]\ncrate-type = [\"cdylib\"]\n\n[dependencies]\ndim-guest = {{ path = {sdk:?} }}\n\n[workspace]\n"
    );
    let plugin =
        format!("name = \"greeter\"\nversion = \"{version}\"\n\n[topics]\nsubscribe = [\"greetings\"]\n");
    let source = format!(
        "use dim_guest::{{Event, Failure, NoConfig, Plugin, export_plugin, log, state}};\n\nstruct Greeter;\n\nimpl Plugin for Greeter {{\n    type Config = NoConfig;\n\n    fn start(_: NoConfig, _: Option<u32>) -> Result<Self, String> {{\n        Ok(Greeter)\n    }}\n\n    fn handle(&mut self, _: Event) -> Result<(), Failure> {{\n        {body}\n    }}\n}}\n\nexport_plugin!(Greeter, manifest: \"../plugin.toml\");\n"
    );
    std::fs::create_dir_all(dir.join("src")).unwrap();
    std::fs::write(dir.join("Cargo.toml"), manifest).unwrap();
    std::fs::write(dir.join("plugin.toml"), plugin).unwrap();
    std::fs::write(dir.join("src/lib.rs"), source).unwrap();
    // What is built for the tests already need not be fetched.
    std::fs::copy(dim_tests::data("../Cargo.lock"), dir.join("Cargo.lock")).unwrap();
}

#[test]
fn an_author_sees_each_change_of_a_source_run_and_a_mistake_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let plugin = dir.path().join("greeter");
    let host = Program::start(Path::new(PROGRAM), &dir.path().join("state"), &["--embedded"]);
    let hello = |word: &str| {
        format!(
            "let seen: u64 = state::get_json(b\"seen\")?.unwrap_or(0);\n        state::set_json(b\"seen\", &(seen + 1))?;\n        log::line(log::Level::Info, &format!(\"{word} {{seen}}\"), &[]);\n        Ok(())"
        )
    };
    write_plugin(&plugin, "0.1.0", &hello("hello"));
    let output = dir.path().join("output");
    let file = std::fs::File::create(&output).unwrap();
    let mut command = std::process::Command::new(PROGRAM);
    command.args(["plugin", "dev", "--grant"]).arg(&plugin).arg("--state-dir").arg(dir.path().join("state"));
    // Beside what was built for the tests.
    command.env("CARGO_TARGET_DIR", dim_tests::data("../target/dev-test"));
    command.stdout(file.try_clone().unwrap()).stderr(file);
    let mut child = command.spawn().unwrap();
    let shows = |what: &str| {
        let deadline = std::time::Instant::now() + Duration::from_secs(240);
        loop {
            let text = std::fs::read_to_string(&output).unwrap();
            if text.contains(what) {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "{what} does not come: {text}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    shows("greeter 0.1.0: installed");
    shows("waiting for a change");
    let greet = || assert!(host.dim(&["topic", "pub", "greetings", "x"]).status.success());
    // Its log is listened to in a moment.
    dim_tests::soon(|| {
        greet();
        std::fs::read_to_string(&output).unwrap().contains("hello 0")
            || std::fs::read_to_string(&output).unwrap().contains("hello 1")
    });
    write_plugin(&plugin, "0.2.0", "this is no Rust");
    shows("the build failed; the running version continues");
    assert_eq!(host.json(&["plugin", "inspect", "greeter"])["version"], "0.1.0");
    write_plugin(&plugin, "0.3.0", &hello("good day"));
    shows("greeter 0.3.0: on probation");
    greet();
    shows("good day");
    write_plugin(&plugin, "0.4.0", "panic!(\"a mistake\")");
    shows("greeter 0.4.0: on probation");
    greet();
    shows("greeter 0.4.0: taken back");
    shows("a mistake");
    child.kill().unwrap();
    child.wait().unwrap();
    // What was confirmed last: 0.3.0 was on probation, too.
    assert_eq!(host.json(&["plugin", "inspect", "greeter"])["version"], "0.1.0");
}

#[tokio::test(flavor = "multi_thread")]
async fn where_a_component_came_from_is_said_in_few_bytes() {
    let host = SupervisedHost::start(&Setup::default()).await;
    let (http, url) = (with_token(), host.serve().await);
    let install = async |bytes: usize| {
        let url = format!("{url}/v1/plugins/zz/component?source={}", "s".repeat(bytes));
        let answer = http.put(url).body("no component").send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    let record = || {
        let host = host.host().unwrap();
        change_history::of(&host.storage.store.snapshot().unwrap(), &"zz".parse().unwrap(), 10).unwrap()
    };
    let (status, why) = install(2_049).await;
    assert_eq!(status, 400);
    assert!(why.contains("`source` has 2049 bytes; it may have 2048"), "{why}");
    assert_eq!(record(), []);
    assert_eq!(install(2_048).await.0, 422);
    let [change] = record().try_into().unwrap();
    assert_eq!(change.source.len(), 2_048);
    assert!(change.reason.unwrap().len() <= 4_096);
    host.stop().await;
}
