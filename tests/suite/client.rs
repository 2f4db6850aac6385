//! The client library, against a host that is a program of its own.

use std::path::Path;
use std::time::Duration;

use dim_client::{Beginning, Client, ClientError, JobUpdate, Message, Node, Origin};
use dim_tests::{Program, eventually};
use serde_json::json;

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

fn host() -> (tempfile::TempDir, Program, Client) {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let program = tokio::task::block_in_place(|| Program::start(Path::new(PROGRAM), &state, &["--embedded"]));
    let client = Client::new(dim_client::Address::in_state_dir(&state)).unwrap();
    (dir, program, client)
}

async fn soon<R>(what: impl Future<Output = R>) -> R {
    tokio::time::timeout(Duration::from_secs(30), what).await.expect("within 30 seconds")
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_published_resolved_and_read() {
    let (_dir, _program, client) = host();
    let ipns = client.ipns();
    let hour = Duration::from_secs(3_600);
    let set = ipns.update_state("policy", "the policy", Some(hour)).await.unwrap();
    assert!(set.published);
    assert_eq!(ipns.get_key_id("policy").await.unwrap(), set.name);
    let known = ipns.resolve(&format!("/ipns/{}", set.name)).await.unwrap();
    assert_eq!((&known.path, known.sequence), (&set.path, 1));
    assert!(known.valid_until < jiff::Timestamp::now() + Duration::from_secs(3_700));
    assert_eq!(&ipns.get_state("policy").await.unwrap()[..], b"the policy");
    let other = ipns.publish("other", &set.path, None).await.unwrap();
    assert_eq!(other.path, set.path);
    assert!(ipns.resolve("nobody").await.unwrap_err().is_not_found());
    let too_long = ipns.update_state("policy", "x", Some(Duration::from_secs(1))).await.unwrap_err();
    assert!(matches!(&too_long, ClientError::Problem(problem) if problem.status == 400), "{too_long}");
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_are_published_and_heard_until_the_client_stops() {
    let (_dir, _program, client) = host();
    let pubsub = client.pubsub();
    let mut messages = pubsub.subscribe("fleet.talk").await.unwrap();
    let mut ended = pubsub.subscribe("fleet.talk").await.unwrap();
    let topics = pubsub.list_topics().await.unwrap();
    assert!(topics.iter().any(|topic| topic.topic == "fleet.talk"), "{topics:?}");
    assert!(pubsub.list_peers("fleet.talk").await.unwrap().is_empty());
    // Text and what is none.
    for data in [&b"hello"[..], b"\xff\0 \n\n"] {
        pubsub.publish("fleet.talk", data).await.unwrap();
        let message = soon(messages.next()).await.unwrap().unwrap();
        assert_eq!((&message.data[..], &message.origin), (data, &Origin::Host));
    }
    messages.unsubscribe();
    client.stop();
    // What had come by then, and then the end.
    while soon(ended.next()).await.is_some() {}
    eventually("nobody listens to the topic any more", async || {
        pubsub.list_topics().await.unwrap().iter().all(|topic| topic.topic != "fleet.talk")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_and_nodes_are_changed_and_watched() {
    let (_dir, _program, client) = host();
    let fleet = client.fleet();
    let mut updates = fleet.subscribe_to_job_updates().await.unwrap();
    let running = JobUpdate::new("running").data(json!({ "node_id": "n1" }));
    let job = fleet.update_job_status("render/7 ü", &running).await.unwrap();
    assert_eq!((job.status.as_str(), job.node_id.as_deref()), ("running", Some("n1")));
    assert_eq!(soon(updates.next()).await.unwrap().unwrap(), job);
    let completed = JobUpdate::new("completed").result(json!({ "frames": 12 }));
    fleet.publish_job_event("dim.jobs.updates", "render/7 ü", &completed).await.unwrap();
    let job = soon(updates.next()).await.unwrap().unwrap();
    assert_eq!((job.status.as_str(), job.result), ("completed", Some(json!({ "frames": 12 }))));
    let again = fleet.update_job_status("render/7 ü", &running).await.unwrap_err();
    assert!(matches!(&again, ClientError::Problem(problem) if problem.status == 409), "{again}");
    assert_eq!(fleet.get_job("render/7 ü").await.unwrap().status, "completed");

    let node = Node { node_id: "n1".into(), status: "online".into(), ..Node::default() };
    fleet.update_node_registry(&[node]).await.unwrap();
    let nodes = fleet.get_node_registry().await.unwrap();
    assert_eq!((nodes.len(), nodes[0].node_id.as_str()), (1, "n1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_not_there_is_told() {
    let client = Client::new("unix:/nowhere/api.sock".parse().unwrap()).unwrap();
    let error = client.fleet().get_node_registry().await.unwrap_err();
    assert!(matches!(&error, ClientError::Unreachable { address, .. } if address.contains("/nowhere")));
    assert!(client.pubsub().subscribe("t").await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_begins_where_the_caller_says_and_resumes_after_a_message() {
    let (_dir, _program, client) = host();
    let pubsub = client.pubsub();
    // Somebody listens, so that the log has the messages.
    let _first = pubsub.subscribe("fleet.talk").await.unwrap();
    for number in 0..5 {
        pubsub.publish("fleet.talk", number.to_string()).await.unwrap();
    }
    let read = async |beginning: Beginning, count: usize| {
        let mut messages = pubsub.subscribe_from("fleet.talk", beginning).await.unwrap();
        let mut all = Vec::new();
        while all.len() < count {
            all.push(soon(messages.next()).await.unwrap().unwrap());
        }
        all
    };
    let texts = |messages: &[Message]| -> Vec<String> {
        messages.iter().map(|it| String::from_utf8_lossy(&it.data).into_owned()).collect()
    };
    let all = read(Beginning::Earliest, 5).await;
    assert_eq!(texts(&all), ["0", "1", "2", "3", "4"]);
    assert_eq!(all[0].event, None, "it is no event of a member");
    assert_eq!(texts(&read(Beginning::After(all[2].id.clone()), 2).await), ["3", "4"]);
    assert_eq!(read(Beginning::Time(all[3].time), 1).await[0].time, all[3].time);
    let tomorrow = jiff::Timestamp::now() + jiff::SignedDuration::from_hours(24);
    let mut later = pubsub.subscribe_from("fleet.talk", Beginning::Time(tomorrow)).await.unwrap();
    pubsub.publish("fleet.talk", "5").await.unwrap();
    assert_eq!(texts(&[soon(later.next()).await.unwrap().unwrap()]), ["5"], "it is the next one");
}
