//! Streams of server-sent events: whoever was cut off goes on after the id that it had last, and is told when it has
//! missed something.

use std::collections::BTreeSet;
use std::time::Duration;

use dim_model::entry::{Event, Kind};
use dim_tests::{Kubo, Setup, SupervisedHost, TestHost, downtime, eventually, script, with_token};
use reqwest::{Client, Method, Response};
use serde_json::{Value, json};

use crate::reliable_topics;

/// An API that is called over TCP.
struct Api {
    http: Client,
    url: String,
}

/// An event of a stream.
#[derive(Debug)]
struct Told {
    kind: String,
    data: Value,
}

/// A stream, and the id that it had last.
struct Stream {
    response: Response,
    text: String,
    last: Option<String>,
}

impl Api {
    async fn of(host: &SupervisedHost) -> Self {
        Self { http: with_token(), url: host.serve().await }
    }

    async fn send(&self, method: Method, path: &str, body: impl Into<reqwest::Body>) -> Value {
        let request = self.http.request(method, format!("{}{path}", self.url)).body(body);
        let answer = request.header("content-type", "application/json").send().await.unwrap();
        assert!(answer.status().is_success(), "{path}: {}", answer.text().await.unwrap());
        answer.json().await.unwrap_or_default()
    }

    async fn publish(&self, topic: &str, data: impl ToString) {
        self.send(Method::POST, &format!("/v1/topics/{topic}/messages"), data.to_string()).await;
    }

    /// Opens a stream; a caller that was cut off had an id last.
    async fn stream(&self, path: &str, last: Option<&str>) -> Stream {
        let mut request = self.http.get(format!("{}{path}", self.url));
        if let Some(last) = last {
            request = request.header("Last-Event-ID", last);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        Stream { response, text: String::new(), last: last.map(str::to_owned) }
    }
}

impl Stream {
    async fn next(&mut self) -> Told {
        tokio::time::timeout(Duration::from_secs(30), self.read()).await.expect("an event within 30 seconds")
    }

    async fn read(&mut self) -> Told {
        loop {
            while let Some((event, rest)) = self.text.split_once("\n\n") {
                let (event, rest) = (event.to_owned(), rest.to_owned());
                self.text = rest;
                let of = |name: &str| {
                    let line = event.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
                    line.map(str::to_owned)
                };
                self.last = of("id").or_else(|| self.last.take());
                if let (Some(kind), Some(data)) = (of("event"), of("data")) {
                    return Told { kind, data: serde_json::from_str(&data).unwrap() };
                }
            }
            let piece = self.response.chunk().await.unwrap().expect("the stream goes on");
            self.text += std::str::from_utf8(&piece).unwrap();
        }
    }

    /// What a member of the next event says, which is of a kind.
    async fn says(&mut self, kind: &str, member: &str) -> Value {
        let told = self.next().await;
        assert_eq!(told.kind, kind, "{told:?}");
        told.data[member].clone()
    }

    /// How many events were missed, as the next event says.
    async fn lagged(&mut self) -> Value {
        let told = self.next().await;
        assert_eq!(told.kind, "lagged", "{told:?}");
        told.data
    }

    /// The caller is cut off; returns the id that it had last.
    fn cut(self) -> String {
        self.last.expect("every stream has ids")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topics_stream_goes_on_after_the_last_message() {
    let host = SupervisedHost::start(&Setup::default()).await;
    let (api, path) = (Api::of(&host).await, "/v1/topics/talk/messages");
    // Cut off before anything came, it has an id all the same.
    let opened = {
        let mut stream = api.stream(path, None).await;
        api.publish("talk", 1).await;
        assert_eq!(stream.says("message", "data").await, "1");
        let first = stream.last.clone().unwrap();
        api.publish("talk", 2).await;
        assert_eq!(stream.says("message", "data").await, "2");
        assert_ne!(stream.cut(), first);
        first
    };
    api.publish("other", "not this").await;
    api.publish("talk", 3).await;
    let mut stream = api.stream(path, Some(&opened)).await;
    assert_eq!(stream.says("message", "data").await, "2");
    assert_eq!(stream.says("message", "data").await, "3");
    api.publish("talk", 4).await;
    assert_eq!(stream.says("message", "data").await, "4");
    for strange in ["99999999999", "none of it"] {
        let mut stream = api.stream(path, Some(strange)).await;
        assert!(!stream.response.chunk().await.unwrap().unwrap().starts_with(b"id:"), "it is told first");
        let mut stream = api.stream(path, Some(strange)).await;
        assert_eq!(stream.lagged().await, Value::Null, "{strange}");
        api.publish("talk", 5).await;
        assert_eq!(stream.says("message", "data").await, "5");
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_a_reliable_topic_goes_on_with_what_came_while_nobody_listened() {
    let Some((near, far)) = Kubo::start_pair() else { return };
    let writer = reliable_topics::setup(near.api()).start().await;
    let reader =
        SupervisedHost::start(&Setup::default().yaml(reliable_topics::RELIABLE).on_kubo(far.api())).await;
    let (api, path) = (Api::of(&reader).await, "/v1/topics/probe.in/messages");
    let mut stream = api.stream(path, None).await;
    reliable_topics::publish(&writer, "1").await;
    assert_eq!(stream.says("message", "data").await, "1");
    let last = stream.cut();
    let is_wanted = || {
        let host = reader.host().unwrap();
        host.exchange.links.interest.topics().iter().any(|topic| topic.as_str() == "probe.in")
    };
    eventually("nobody listens", async || !is_wanted()).await;
    reliable_topics::publish(&writer, "2").await;
    reliable_topics::publish(&writer, "3").await;
    let mut stream = api.stream(path, Some(&last)).await;
    assert_eq!(stream.says("message", "data").await, "2");
    assert_eq!(stream.says("message", "data").await, "3");
    reliable_topics::publish(&writer, "4").await;
    assert_eq!(stream.says("message", "data").await, "4");
    writer.stop().await;
    reader.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_goes_on_after_a_restart_and_says_how_much_the_log_has_lost() {
    let setup = Setup::default();
    let host = setup.start().await;
    let publish = async |host: &TestHost, text: &str| {
        let topic = "talk".parse().unwrap();
        let publish = dim_store::effect::Publish { topic, data: text.to_owned().into() };
        host.host.storage.commit.publish(publish, host.host.storage.log.now()).await.unwrap();
    };
    publish(&host, "before").await;
    let host = SupervisedHost::start_in(host.stop().await, &setup).await;
    let api = Api::of(&host).await;
    let mut stream = api.stream("/v1/topics/talk/messages", Some("0")).await;
    let head = host.host().unwrap().storage.log.head().0;
    api.publish("talk", "after").await;
    loop {
        let told = stream.says("message", "data").await;
        assert!(["before", "after"].contains(&told.as_str().unwrap()));
        if told == "after" {
            break;
        }
    }
    assert!(stream.cut().parse::<u64>().unwrap() >= head);
    host.stop().await;

    let host = setup.start().await;
    for number in 0..20 {
        publish(&host, &format!("{number}").repeat(5_000)).await;
        host.settled().await;
    }
    let head = host.host.storage.log.head().0;
    let tiny = Setup::default().yaml("store:\n  log:\n    max_bytes: 1\n");
    let host = SupervisedHost::start_in(host.stop().await, &tiny).await;
    let start =
        async || host.host().unwrap().storage.store.log_start().unwrap().map_or(head, |start| start.0);
    eventually("the log is trimmed", async || start().await > 10).await;
    let api = Api::of(&host).await;
    let mut stream = api.stream("/v1/topics/talk/messages", Some("2")).await;
    let missed = stream.lagged().await.as_u64().unwrap();
    assert!((8..=head).contains(&missed), "{missed} of {head}");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_of_the_log_reads_a_bounded_number_of_bytes_at_a_time() {
    let host = Setup::probe().start().await;
    let from = host.host.storage.log.head();
    for _ in 0..60 {
        host.from_peer("probe.in", vec![b'x'; 50_000]).await;
    }
    host.settled().await;
    let (mut follower, mut messages) = (host.host.storage.log.follow(Some(from)), 0);
    while messages < 60 {
        let read = follower.read().await.unwrap();
        let sizes = read.entries.iter().filter_map(|entry| match &entry.kind {
            Kind::Event(Event::Message { data, .. }) => Some(data.len()),
            _ => None,
        });
        let sizes: Vec<_> = sizes.collect();
        assert!(sizes.iter().sum::<usize>() <= (1 << 20) + 50_000, "{sizes:?}");
        assert_eq!(read.missed, 0);
        messages += sizes.len();
    }
    assert_eq!(messages, 60);
    drop(follower);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_jobs_goes_on_with_what_has_changed() {
    let host = SupervisedHost::start(&Setup::bundled()).await;
    let (api, path) = (Api::of(&host).await, "/v1/watch/jobs");
    let update = async |job: &str, event: &str| {
        let body = json!({ "event_type": event, "node_id": "n1" }).to_string();
        api.send(Method::POST, &format!("/v1/jobs/{job}/events"), body).await;
    };
    let mut stream = api.stream(path, None).await;
    update("a", "running").await;
    assert_eq!(stream.says("job", "job_id").await, "a");
    let last = stream.cut();
    update("b", "running").await;
    update("a", "completed").await;
    // A verdict concerns all jobs of a node: whoever is cut off between them gets all of them.
    update("c", "running").await;
    api.publish("dim.nodes.status", json!({ "node_id": "n1", "status": "dead", "observer": "w" })).await;
    eventually("the verdict is known", async || {
        api.send(Method::GET, "/v1/jobs/c", "").await["node_dead"].is_object()
    })
    .await;
    let mut stream = api.stream(path, Some(&last)).await;
    let mut told = std::collections::BTreeMap::new();
    while told.len() < 3 {
        let job = stream.next().await;
        assert_eq!(job.kind, "job");
        let how = format!("{} {}", job.data["status"].as_str().unwrap(), job.data["node_dead"].is_object());
        told.insert(job.data["job_id"].as_str().unwrap().to_owned(), how);
    }
    let told: Vec<_> = told.into_iter().collect();
    let expected = [("a", "completed false"), ("b", "running true"), ("c", "running true")];
    assert_eq!(told, expected.map(|(job, how)| (job.to_owned(), how.to_owned())));
    let mut stream = api.stream(path, Some("99999999999")).await;
    assert_eq!(stream.lagged().await, Value::Null);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_jobs_asks_about_nodes_for_verdicts_alone() {
    let host = SupervisedHost::start(&Setup::bundled()).await;
    let api = Api::of(&host).await;
    let running = json!({ "event_type": "running", "node_id": "n1" }).to_string();
    api.send(Method::POST, "/v1/jobs/a/events", running.clone()).await;
    let mut stream = api.stream("/v1/watch/jobs", None).await;
    let tell = async |topic: &str, status: Value| {
        api.publish(topic, json!({ "node_id": "n1", "status": status, "observer": "w" })).await;
    };
    tell("dim.jobs.updates", Value::Null).await;
    tell("dim.jobs.updates", json!("dead")).await;
    tell("dim.results.ready", json!("dead")).await;
    tell("dim.nodes.status", json!("busy")).await;
    tell("dim.nodes.status", json!(7)).await;
    api.send(Method::POST, "/v1/jobs/b/events", running.clone()).await;
    assert_eq!(stream.says("job", "job_id").await, "b", "nothing was said of the node");
    tell("dim.nodes.status", json!("dead")).await;
    assert_eq!(stream.says("job", "job_id").await, "a");
    assert_eq!(stream.says("job", "job_id").await, "b");
    // Verdicts on more nodes than are asked about one by one.
    api.send(Method::POST, "/v1/plugins/job-tracker/pause", "").await;
    for node in 0..150 {
        api.publish("dim.nodes.status", json!({ "node_id": format!("z{node}"), "status": "dead" })).await;
    }
    api.send(Method::POST, "/v1/plugins/job-tracker/resume", "").await;
    assert_eq!(stream.lagged().await, Value::Null);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_large_jobs_of_a_node_are_told_in_parts() {
    let host = SupervisedHost::start(&Setup::bundled()).await;
    let api = Api::of(&host).await;
    let mut stream = api.stream("/v1/watch/jobs", None).await;
    let large = |job: usize| {
        let data = vec![1; 20_000];
        json!({ "job_id": format!("j{job:03}"), "event_type": "running", "node_id": "n1", "data": data })
    };
    // Together they are more than is told at a time, and more than are asked for at a time.
    for job in 0..110 {
        api.publish("dim.jobs.updates", large(job)).await;
    }
    let last = async |stream: &mut Stream| {
        let mut told = BTreeSet::new();
        while told.len() < 110 {
            let job = stream.next().await;
            assert_eq!(job.kind, "job");
            assert_eq!(job.data["data"].as_array().map(Vec::len), Some(20_000));
            told.insert(job.data["job_id"].as_str().unwrap().to_owned());
        }
    };
    last(&mut stream).await;
    api.publish("dim.nodes.status", json!({ "node_id": "n1", "status": "dead", "observer": "w" })).await;
    last(&mut stream).await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changed_while_the_tracker_was_paused_is_told_when_it_goes_on() {
    let host = SupervisedHost::start(&Setup::bundled()).await;
    let api = Api::of(&host).await;
    let mut stream = api.stream("/v1/watch/jobs", None).await;
    api.send(Method::POST, "/v1/plugins/job-tracker/pause", "").await;
    let event = json!({ "job_id": "j", "event_type": "running", "timestamp": "2026-01-01T00:00:00Z" });
    api.publish("dim.jobs.updates", event).await;
    // Longer than a watch ever waited.
    downtime(Duration::from_secs(6)).await;
    api.send(Method::POST, "/v1/plugins/job-tracker/resume", "").await;
    assert_eq!(stream.says("job", "job_id").await, "j");
    // Nor is a tracker forgotten that is away for a time.
    api.send(Method::DELETE, "/v1/plugins/job-tracker", "").await;
    api.publish("dim.jobs.updates", json!({ "job_id": "k", "event_type": "running" })).await;
    api.send(Method::POST, "/v1/plugins/job-tracker/restore", "").await;
    api.send(Method::POST, "/v1/jobs/k/events", r#"{"event_type":"completed"}"#).await;
    assert_eq!(stream.says("job", "job_id").await, "k");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_changes_goes_on_until_the_host_is_started_again() {
    let setup = Setup::probe();
    let host = SupervisedHost::start(&setup).await;
    let (api, path) = (Api::of(&host).await, "/v1/changes");
    let turn = async |how: &str| api.send(Method::POST, &format!("/v1/plugins/probe/{how}"), "").await;
    let mut stream = api.stream(path, None).await;
    turn("pause").await;
    assert_eq!(stream.says("change", "state").await, "paused");
    let last = stream.cut();
    turn("resume").await;
    turn("pause").await;
    let mut stream = api.stream(path, Some(&last)).await;
    assert_eq!(stream.says("change", "state").await, "resumed");
    assert_eq!(stream.says("change", "state").await, "paused");
    // 256 are kept.
    for _ in 0..150 {
        turn("resume").await;
        turn("pause").await;
    }
    let mut stream = api.stream(path, Some(&last)).await;
    assert_eq!(stream.lagged().await, 2 + 300 - 256);
    assert_eq!(stream.says("change", "state").await, "resumed");
    let mut stream = api.stream(path, Some("1")).await;
    assert_eq!(stream.lagged().await, Value::Null, "it is of an earlier start");
    assert_eq!(stream.says("change", "state").await, "resumed", "all that is kept came after it");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_lines_goes_on_after_the_last_line() {
    let limits = json!({ "limits": { "log-lines": 1_000, "log-lines-per-second": 10_000 } });
    let setup = Setup::default().and_probe("probe", limits.clone()).and_probe("other", limits);
    let host = SupervisedHost::start(&setup).await;
    let (api, path) = (Api::of(&host).await, "/v1/plugins/probe/log");
    let log = async |plugin: &str, lines: &[&str]| {
        let steps: Vec<Value> = lines.iter().map(|line| json!({ "do": "log", "line": line })).collect();
        let body = script(json!(steps)).to_string();
        api.send(Method::POST, &format!("/v1/plugins/{plugin}/commands/run"), body).await;
    };
    let mut stream = api.stream(path, None).await;
    log("probe", &["one"]).await;
    assert_eq!(stream.says("line", "text").await, "one");
    let last = stream.cut();
    log("other", &["another's"]).await;
    log("probe", &["two", "three"]).await;
    let mut stream = api.stream(path, Some(&last)).await;
    assert_eq!(stream.says("line", "text").await, "two");
    assert_eq!(stream.says("line", "text").await, "three");
    log("other", &["x"; 600]).await;
    let mut stream = api.stream(path, Some(&last)).await;
    assert_eq!(stream.lagged().await, 603 - 512, "of all plugins");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_come_from_another_host_are_told_to_who_watches_jobs() {
    // What another plugin publishes stands for the document of another host.
    let yaml = "plugins:\n  job-tracker:\n    config: { jobs_ipns: [probe-key] }\n";
    let host = SupervisedHost::start(&Setup::bundled().yaml(yaml).and_probe("probe", json!({}))).await;
    let api = Api::of(&host).await;
    let document = |jobs: Value| {
        let document = json!({ "active_jobs": jobs, "updated_at": "2026-01-01T00:00:00Z" }).to_string();
        json!([{ "do": "update-state", "key": "probe-key", "data": document }])
    };
    host.works("probe").await;
    let mut jobs = api.stream("/v1/watch/jobs", None).await;
    let job = json!({ "job_id": "far", "status": "running", "updated_at": "2026-01-01T00:00:00Z" });
    host.try_run("probe", document(json!({ "far": job }))).await.unwrap();
    assert_eq!(jobs.lagged().await, Value::Null);
    assert_eq!(api.send(Method::GET, "/v1/jobs/far", "").await["status"], "running");
    // The same once more is no news.
    let more = json!({ "far": job, "bad": { "job_id": "other" } });
    host.try_run("probe", document(more)).await.unwrap();
    eventually("it is merged", async || {
        api.send(Method::GET, "/v1/merged-jobs", "").await[0]["refused"] == 1
    })
    .await;
    let near = json!({ "event_type": "running" }).to_string();
    api.send(Method::POST, "/v1/jobs/near/events", near).await;
    assert_eq!(jobs.next().await.data["job_id"], "near");
    host.stop().await;
}
