//! The log and the documents of its time are kept for those who have yet to read them, and not for
//! ever.

use dim_model::entry::Offset;
use dim_store::documents;
use dim_store::plugin_registry;
use dim_tests::{Setup, TestHost, eventually, script};
use serde_json::{Value, json};

/// A probe that follows the other's name and reads the document of each change.
fn reader() -> Value {
    json!({ "config": { "on_start": "[{\"do\":\"follow\",\"name\":\"probe-key\"}]" } })
}

async fn update(host: &TestHost, data: &str) {
    host.run(json!([{ "do": "update-state", "key": "probe-key", "data": data }])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_lags_reads_the_documents_of_its_time() {
    // Nothing is kept that no one has yet to read.
    let yaml = "store:\n  log:\n    max_document_bytes: 0\n";
    let mut patient = reader();
    patient["limits"] = json!({ "call-cpu-ms": 5_000 });
    let host = Setup::probe().and_probe("reader", patient).yaml(yaml).start().await;
    host.settled().await;
    let busy = host.plugin("reader").handle.clone();
    let busy = tokio::spawn(async move {
        busy.command("run".to_owned(), script(json!([{ "do": "loop" }])).to_string()).await
    });
    for number in 0..20 {
        update(&host, &format!("document {number}")).await;
    }
    assert!(!busy.is_finished(), "the reader was busy all the time");
    busy.await.unwrap().unwrap_err();
    host.settled().await;
    let changes = host.state_of("reader", "changed").await;
    let read: Vec<_> = changes.as_array().unwrap().iter().map(|change| change["document"].clone()).collect();
    let written: Vec<_> = (0..20).map(|number| json!({ "ok": format!("document {number}") })).collect();
    assert_eq!(read, written);
    eventually("no document is kept that everyone has read", async || {
        documents::superseded(&host.host.storage.store.snapshot().unwrap()).unwrap().next().is_none()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_are_kept_up_to_a_limit() {
    // One that none of it concerns holds nothing up.
    let idle = json!({ "grants": {} });
    let yaml = "store:\n  log:\n    max_document_bytes: 50000\n";
    let host = Setup::probe().and_probe("idle", idle).yaml(yaml).start().await;
    for number in 0..20 {
        update(&host, &format!("{number}").repeat(10_000)).await;
    }
    let kept = || -> Vec<_> {
        let snapshot = host.host.storage.store.snapshot().unwrap();
        let kept: Vec<_> = documents::superseded(&snapshot).unwrap().map(Result::unwrap).collect();
        let bytes = kept.iter().map(|document| document.bytes).sum::<u64>();
        assert_eq!(documents::superseded_bytes(&snapshot).unwrap(), bytes, "counted along");
        kept
    };
    eventually("the oldest go", async || kept().iter().map(|document| document.bytes).sum::<u64>() <= 50_000)
        .await;
    assert_eq!(kept().last().unwrap().bytes, 20_000, "the newest stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_waits_for_a_plugin_that_cannot_be_loaded_and_not_for_one_that_is_disabled() {
    let two = || Setup::probe().and_probe("other", json!({}));
    let host = two().start().await;
    host.settled().await;
    // Its cursor is stored behind the first row, whose entries need not be its own.
    host.command("other", "run", script(json!([]))).await.unwrap();
    let dir = host.stop().await;
    let tiny = "store:\n  log:\n    max_bytes: 1\n";
    let broken = Setup::probe().yaml(tiny).and_probe("other", json!({ "file": "/dev/null" }));
    let host = broken.start_in(dir).await;
    host.from_peer("probe.in", script(json!([{ "do": "add", "key": "count" }])).to_string()).await;
    eventually("it is in the log", async || host.state_of("probe", "count").await == 1).await;
    host.settled().await;
    // The log is looked at when a host starts.
    let host = broken.start_in(host.stop().await).await;
    eventually("the log is trimmed", async || first(&host) > Offset(0)).await;
    assert!(first(&host) <= cursor_of_other(&host), "and never past a plugin of the config");
    let dir = host.stop().await;

    let disabled = Setup::probe().yaml(tiny).and_probe("other", json!({ "disabled": true }));
    let host = disabled.start_in(dir).await;
    eventually("the log is trimmed further", async || first(&host) > cursor_of_other(&host)).await;
    let dir = host.stop().await;

    // What is left begins where the disabled host's log begins.
    let host = two().start_in(dir).await;
    let left = host.host.storage.store.read_log(Offset(0), 1).unwrap()[0].time;
    eventually("it is told until when it has missed something", async || {
        let gaps = host.state_of("other", "gaps").await;
        gaps.as_array().is_some_and(|gaps| gaps.iter().any(|gap| gap["until"] == left.0))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_does_not_wait_for_a_plugin_that_is_too_far_behind_and_tells_it_what_it_has_missed() {
    let yaml = "limits: { queue-bytes: 50000 }\nstore: { log: { max_bytes: 20000 } }\n";
    let setup = Setup::probe().and_probe("other", json!({})).yaml(yaml);
    let host = setup.start().await;
    host.settled().await;
    let other: dim_model::ident::PluginName = "other".parse().unwrap();
    host.host.pause(&other, true, "the test").await.unwrap();
    let before = cursor_of_other(&host);
    let add = || json!({ "script": [{ "do": "add", "key": "count" }], "x": "y".repeat(1_000) }).to_string();
    for _ in 0..30 {
        host.from_peer("probe.in", add()).await;
    }
    host.settled_but("other").await;
    // The log is looked at when a host starts; this is within the queue.
    let host = setup.start_in(host.stop().await).await;
    host.settled_but("other").await;
    assert!(first(&host) <= before, "the log waits");
    for _ in 0..100 {
        host.from_peer("probe.in", add()).await;
    }
    host.settled_but("other").await;
    eventually("the log waits no more", async || first(&host) > before).await;
    let kept = host.host.storage.log.head().0 - first(&host).0;
    // A host that runs on has the end of the log in memory still.
    let host = setup.start_in(host.stop().await).await;
    host.host.pause(&other, false, "the test").await.unwrap();
    host.settled().await;
    eventually("it is told", async || {
        host.state_of("other", "gaps").await.as_array().is_some_and(|gaps| gaps[0]["topic"] == "probe.in")
    })
    .await;
    // Of none, if none is left.
    let count = host.state_of("other", "count").await.as_u64().unwrap_or_default();
    assert_eq!(host.state_of("probe", "count").await, 130, "whoever keeps up misses nothing");
    assert!(count < 130 && count <= kept, "{count} of {kept}");
    let status = host.plugin("other").handle.status();
    assert_eq!(status.met.get("queue-bytes"), Some(&1), "{status:?}");
    // It hears what comes from now on.
    host.from_peer("probe.in", add()).await;
    eventually("it goes on", async || host.state_of("other", "count").await == count + 1).await;
}

fn first(host: &TestHost) -> Offset {
    host.host.storage.store.log_start().unwrap().expect("the log is never empty again")
}

fn cursor_of_other(host: &TestHost) -> Offset {
    plugin_registry::known(&host.host.storage.store.snapshot().unwrap(), &"other".parse().unwrap())
        .unwrap()
        .unwrap()
        .1
}
