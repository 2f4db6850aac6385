//! A daemon that is away, frozen, refuses, cuts, dawdles or is cut off: nothing committed is lost, nobody
//! is accused, and who really died is found. The benchmark `operation` has each for a minute, with figures.

use std::time::Duration;

use dim_tests::endurance::{Endurance, HealthFinding, TROUBLES, endure};
use dim_tests::tier;

/// How much longer than on an idle machine anything may take.
const BUSY: Duration = Duration::from_secs(30);

async fn is_endured(trouble: HealthFinding) {
    let what = Endurance {
        trouble,
        length: Duration::from_secs(8),
        dead_after: Duration::from_secs(4),
        pace: Duration::from_millis(20),
        seed: tier::seed("the proxy"),
    };
    let Some(endured) = endure(what).await else { return };
    println!("{trouble:?}: {} commands before, {} meanwhile", endured.before.len(), endured.during.len());
    assert_eq!(endured.failed, 0, "commands go on");
    assert!(endured.during.len() > 50, "there was load");
    assert_eq!(endured.lost, [] as [u64; 0], "each committed publish was accepted");
    // Who has died is silent for this long before it is called dead, and it takes as long again to listen for certain.
    let found_within = what.dead_after * 3 + BUSY;
    assert!(endured.found_after < found_within, "found after {:?}", endured.found_after);
    assert!(endured.drained_after < BUSY, "all was sent after {:?}", endured.drained_after);
    for (node, said) in &endured.accused {
        assert!(!said.iter().any(|word| word == "dead"), "{node}, which lived: {said:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_daemon_is_endured() {
    is_endured(TROUBLES[0]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_daemon_is_endured() {
    is_endured(TROUBLES[1]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_restarts_again_and_again_is_endured() {
    is_endured(TROUBLES[2]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_answers_500_is_endured() {
    is_endured(TROUBLES[3]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_cuts_its_streams_is_endured() {
    is_endured(TROUBLES[4]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_daemon_is_endured() {
    is_endured(TROUBLES[5]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_loses_its_peers_is_endured() {
    is_endured(TROUBLES[6]).await;
}
