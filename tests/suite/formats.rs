//! Stores of older and of newer hosts.

use std::path::Path;

use dim_server::host::{Host, Options};
use dim_store::topic_rows::TopicState;
use dim_store::{FORMAT, META, Usage};
use dim_tests::{Setup, TestHost};
use redb::ReadableDatabase as _;
use serde_json::json;
use tempfile::TempDir;

/// A copy of a state directory that is kept among the tests.
fn kept(name: &str) -> TempDir {
    fn copy(from: &Path, to: &Path) {
        std::fs::create_dir_all(to).unwrap();
        for file in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
            let target = to.join(file.file_name());
            if file.path().is_dir() {
                copy(&file.path(), &target);
            } else {
                std::fs::copy(file.path(), target).unwrap();
            }
        }
    }
    let dir = tempfile::tempdir().unwrap();
    copy(&dim_tests::data("stores").join(name), dir.path());
    dir
}

fn format_of(dir: &Path) -> Vec<u8> {
    let database = redb::Database::open(dir.join("dim.redb")).unwrap();
    let read = database.begin_read().unwrap();
    read.open_table(META).unwrap().get("format").unwrap().unwrap().value().to_vec()
}

fn usage(host: &TestHost) -> Usage {
    Usage::of(&host.host.storage.store.snapshot().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_of_format_2_is_brought_up_to_date_with_all_that_is_in_it() {
    is_brought_up_to_date(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_of_format_3_is_brought_up_to_date_with_all_that_is_in_it() {
    is_brought_up_to_date(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_of_format_4_is_brought_up_to_date_with_all_that_is_in_it() {
    is_brought_up_to_date(4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_of_format_5_is_brought_up_to_date_with_all_that_is_in_it() {
    is_brought_up_to_date(5).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_of_format_6_is_brought_up_to_date_with_all_that_is_in_it() {
    is_brought_up_to_date(6).await;
}

/// The kept stores become older every day: nothing in them may be removed because of its age.
const FOR_EVER: &str = "\
store:
  log: { max_age: 36500d }
  dead_letters: { max_age: 36500d }
plugins:
  job-tracker: { config: { keep_finished_days: 36500, remember_removed_days: 36500 } }
  node-registry: { config: { forget_after_days: 36500 } }
  heartbeat-watchdog: { config: { forget_after_days: 36500 } }
";

/// The kept stores of all formats hold the same. That of format 6 has a bundle of a reliable topic and two publishes that
/// wait for the next one, too.
async fn is_brought_up_to_date(format: u64) {
    let dir = kept(&format!("format-{format}"));
    assert_eq!(format_of(dir.path()), format.to_be_bytes());
    let setup = Setup::bundled().yaml(FOR_EVER).on_kubo("/ip4/127.0.0.1/tcp/9");
    let host = setup.start_in(dir).await;
    let jobs = host.query("job-tracker", "list", json!({})).await.unwrap();
    let jobs: Vec<_> = jobs.as_array().unwrap().iter().map(|job| (&job["job_id"], &job["status"])).collect();
    assert_eq!(jobs.len(), 5);
    assert_eq!(jobs[0], (&json!("job-1"), &json!("completed")));
    assert_eq!(jobs[4], (&json!("job-5"), &json!("running")));
    let nodes = host.query("node-registry", "list", json!({})).await.unwrap();
    assert_eq!(nodes.as_array().unwrap().len(), 3);
    assert_eq!(host.dead_letters().len(), 1);
    // Beside what is told of bundled plugins that are others by now.
    let changes = ["job-tracker", "node-registry", "heartbeat-watchdog"].map(|name| {
        let snapshot = host.host.storage.store.snapshot().unwrap();
        dim_store::change_history::of(&snapshot, &name.parse().unwrap(), 10).unwrap().len() as u64
    });
    let waiting = dim_store::outbox::waiting(&host.host.storage.store).unwrap().0;
    let of_reliable_topics = if format == 6 { 2 } else { 0 };
    assert_eq!(waiting, 10 + of_reliable_topics + changes.iter().sum::<u64>());
    let topics = TopicState::read(&host.host.storage.store.snapshot().unwrap()).unwrap();
    let places = topics.places.iter().flat_map(|(topic, places)| places.iter().map(move |it| (topic, it)));
    let places: Vec<_> = places.map(|(topic, it)| (topic.as_str(), it.listed.count)).collect();
    assert_eq!(places, if format == 6 { vec![("probe.in", 1)] } else { vec![] });
    // What format 3 counts along.
    let (counted, documents) = (usage(&host), host.host.storage.store.snapshot().unwrap());
    let documents = documents.table(dim_store::DOCUMENTS).unwrap();
    let held: usize =
        redb::ReadableTable::iter(&documents).unwrap().map(|row| row.unwrap().1.value().len()).sum();
    assert_eq!(counted.documents, held as u64);
    assert!(counted.outbox > 10 * 20, "{counted:?}");
    let name = host.host.storage.keys.name(&"fleet-policy".parse().unwrap()).unwrap();
    assert_eq!(name.as_str(), "k51qzi5uqu5dhmk3w70cq87tb99lt7klvfugbhx763twk3aab6pmlil771g9we");
    // It goes on.
    host.command("job-tracker", "update", json!({ "job_id": "job-5", "event_type": "completed" }))
        .await
        .unwrap();
    let dir = host.stop().await;
    assert_eq!(format_of(dir.path()), FORMAT.to_be_bytes());
    let host = setup.start_in(dir).await;
    let job = host.query("job-tracker", "get", json!({ "job_id": "job-5" })).await.unwrap();
    assert_eq!(job["status"], "completed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_of_another_format_is_refused_as_it_is() {
    for (format, told) in [(FORMAT + 1, "newer dim"), (1, "before the first release")] {
        let dir = Setup::probe().start().await.stop().await;
        let database = redb::Database::create(dir.path().join("dim.redb")).unwrap();
        let write = database.begin_write().unwrap();
        write.open_table(META).unwrap().insert("format", format.to_be_bytes().as_slice()).unwrap();
        write.commit().unwrap();
        drop(database);
        let options = Options::new(Setup::probe().config(), dir.path());
        let error = Host::start(options).await.unwrap_err().to_string();
        assert!(error.contains(told), "{error}");
        assert_eq!(format_of(dir.path()), format.to_be_bytes());
    }
}

/// What is written today must be readable tomorrow: this is how a store for the tests is made.
#[tokio::test(flavor = "multi_thread")]
async fn there_is_a_kept_store_of_every_format_before_this_one() {
    for format in 2..FORMAT {
        assert!(dim_tests::data("stores").join(format!("format-{format}")).join("dim.redb").exists());
    }
}
