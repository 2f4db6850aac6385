//! What a folder says comes, is replaced and goes.

use std::path::Path;
use std::time::Duration;

use dim_store::change::State;
use dim_tests::{Setup, downtime, eventually, script};
use serde_json::json;

use super::{SECTION, busy, changes, count, late, named, runs, states, version};

/// The grants of another plugin that comes.
const OTHER: &str = "  other: { grants: { subscribe: [\"probe.*\"], publish: [\"probe.*\"], write: [probe-key], read: [], share: [probe-key] } }\n";

/// A host that follows a folder.
fn following(folder: &Path) -> Setup {
    Setup::default().yaml(&format!("plugins_dir: {}\n{SECTION}", folder.display()))
}

fn put(folder: &Path, name: &str, component: &[u8]) {
    std::fs::write(folder.join(name), component).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_the_folder_is_installed_replaced_and_unloaded_with_its_state_kept() {
    let folder = tempfile::tempdir().unwrap();
    let setup = following(folder.path());
    let host = setup.start().await;
    // One of several that goes is removed; the last one is not, for its folder may only be away.
    put(folder.path(), "broken.wasm", b"no component");
    // What leads nowhere holds up no other file.
    std::os::unix::fs::symlink("loop.wasm", folder.path().join("loop.wasm")).unwrap();
    put(folder.path(), "late.wasm", &late("1.0.0"));
    runs(&host, "late", "1.0.0").await;
    host.from_peer("probe.in", count()).await;
    put(folder.path(), "late.wasm", &late("2.0.0"));
    runs(&host, "late", "2.0.0").await;
    host.from_peer("probe.in", count()).await;
    eventually("its state is there", async || host.state_of("late", "count").await == 2).await;
    // It is not installed again by a restart.
    let host = setup.start_in(host.stop().await).await;
    assert_eq!(version(&host, "late").as_deref(), Some("2.0.0"));
    std::fs::remove_file(folder.path().join("late.wasm")).unwrap();
    eventually("it is unloaded", async || version(&host, "late").is_none()).await;
    eventually("it is on record", async || states(&host, "late").first() == Some(&State::Removed)).await;
    let publish = dim_store::effect::Publish { topic: "probe.in".parse().unwrap(), data: count().into() };
    host.host.storage.commit.publish(publish, host.host.storage.log.now()).await.unwrap();
    put(folder.path(), "late.wasm", &late("3.0.0"));
    runs(&host, "late", "3.0.0").await;
    // With its state, and with what it missed meanwhile, for the log holds it.
    eventually("its state is there", async || host.state_of("late", "count").await == 3).await;
    // The second one was on probation still.
    let told = [State::Installed, State::Removed, State::Removed, State::Installed];
    assert_eq!(states(&host, "late"), told);
    // And one that goes while no host runs.
    let dir = host.stop().await;
    std::fs::remove_file(folder.path().join("late.wasm")).unwrap();
    let host = setup.start_in(dir).await;
    eventually("it is unloaded", async || version(&host, "late").is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_half_written_is_not_loaded_early() {
    let folder = tempfile::tempdir().unwrap();
    let host = following(folder.path()).start().await;
    let whole = late("1.0.0");
    let half = whole.len() / 2;
    put(folder.path(), "late.wasm", &whole[..half]);
    downtime(Duration::from_secs(3)).await;
    assert_eq!((version(&host, "late"), states(&host, "late")), (None, vec![State::Refused]));
    put(folder.path(), "late.wasm", &whole);
    runs(&host, "late", "1.0.0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_failed_is_not_tried_again_until_it_changes() {
    let folder = tempfile::tempdir().unwrap();
    let host = following(folder.path()).start().await;
    put(folder.path(), "late.wasm", &late("1.0.0"));
    runs(&host, "late", "1.0.0").await;
    let trap = json!({ "do": "trap", "from": 1 }).to_string();
    let bad = dim_tests::component::probe_with(
        "2.0.0",
        &[("name = \"probe\"", "name = \"late\""), ("default = \"null\"", &format!("default = {trap:?}"))],
    );
    put(folder.path(), "late.wasm", &bad);
    runs(&host, "late", "2.0.0").await;
    host.from_peer("probe.in", count()).await;
    runs(&host, "late", "1.0.0").await;
    // The same bytes once more.
    put(folder.path(), "late.wasm", &bad);
    downtime(Duration::from_secs(3)).await;
    assert_eq!(states(&host, "late"), [State::TakenBack, State::Installed]);
    assert_eq!(host.state_of("late", "count").await, 1);
    put(folder.path(), "late.wasm", &late("3.0.0"));
    runs(&host, "late", "3.0.0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_replaced_by_removing_it_first_is_not_gone() {
    let folder = tempfile::tempdir().unwrap();
    let host = following(folder.path()).start().await;
    put(folder.path(), "late.wasm", &late("1.0.0"));
    runs(&host, "late", "1.0.0").await;
    std::fs::remove_file(folder.path().join("late.wasm")).unwrap();
    downtime(Duration::from_millis(600)).await;
    put(folder.path(), "late.wasm", &late("2.0.0"));
    runs(&host, "late", "2.0.0").await;
    let told = [State::OnProbation, State::Installed];
    eventually("it is on record", async || states(&host, "late") == told).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_removed_by_hand_stays_away_until_its_file_changes() {
    let folder = tempfile::tempdir().unwrap();
    let setup = following(folder.path());
    let host = setup.start().await;
    for purge in [false, true] {
        let version = if purge { "2.0.0" } else { "1.0.0" };
        put(folder.path(), "late.wasm", &late(version));
        runs(&host, "late", version).await;
        host.host.remove(&"late".parse().unwrap(), purge, "the test").await.unwrap();
        downtime(Duration::from_secs(2)).await;
        assert!(host.host.plugins.get("late").is_none());
    }
    let host = setup.start_in(host.stop().await).await;
    downtime(Duration::from_secs(3)).await;
    assert!(host.host.plugins.get("late").is_none(), "nor does a restart bring it back");
    // Gone and back again it is new.
    std::fs::remove_file(folder.path().join("late.wasm")).unwrap();
    let name = "late".parse().unwrap();
    let forgotten = async || {
        let row = dim_store::plugin_registry::known_row(&host.host.storage.store.snapshot().unwrap(), &name)
            .unwrap();
        row.unwrap().follows.is_none()
    };
    eventually("it is gone", forgotten).await;
    put(folder.path(), "late.wasm", &late("2.0.0"));
    runs(&host, "late", "2.0.0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_files_of_a_plugin_one_is_refused_and_a_file_may_come_to_hold_another_plugin() {
    let folder = tempfile::tempdir().unwrap();
    let setup = following(folder.path()).yaml(OTHER);
    let host = setup.start().await;
    put(folder.path(), "zz.wasm", &late("1.0.0"));
    runs(&host, "late", "1.0.0").await;
    put(folder.path(), "aa.wasm", &late("2.0.0"));
    put(folder.path(), "garbage.wasm", b"garbage");
    let refused = async || states(&host, "late") == [State::Refused, State::Installed];
    eventually("the second one is refused", refused).await;
    let why = changes(&host, "late")[0].reason.clone().unwrap();
    assert!(why.contains("zz.wasm holds late already"), "{why}");
    eventually("so is garbage", async || states(&host, "garbage") == [State::Refused]).await;
    // Nor does it take over at the next start.
    let host = setup.start_in(host.stop().await).await;
    let refused = async || states(&host, "late") == [State::Refused, State::Refused, State::Installed];
    eventually("the second one is refused again", refused).await;
    assert_eq!(version(&host, "late").as_deref(), Some("1.0.0"));
    put(folder.path(), "zz.wasm", &named("other", "1.0.0"));
    runs(&host, "other", "1.0.0").await;
    eventually("the one before is unloaded", async || version(&host, "late").is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_another_one_whatever_its_time_and_size_and_one_plugin_holds_up_no_other() {
    use std::time::SystemTime;
    let folder = tempfile::tempdir().unwrap();
    let host = following(folder.path()).yaml(OTHER).start().await;
    let file = folder.path().join("late.wasm");
    let at = SystemTime::now() - Duration::from_secs(1_000);
    let write = |component: &[u8]| {
        std::fs::write(&file, component).unwrap();
        std::fs::File::options().write(true).open(&file).unwrap().set_modified(at).unwrap();
    };
    assert_eq!(late("1.0.0").len(), late("2.0.0").len());
    write(&late("1.0.0"));
    put(folder.path(), ".hidden.wasm", &named("other", "9.0.0"));
    runs(&host, "late", "1.0.0").await;
    write(&late("2.0.0"));
    runs(&host, "late", "2.0.0").await;
    assert!(version(&host, "other").is_none(), "a hidden file is none");
    // It is drained for a while, and another one comes meanwhile.
    host.listening(&"probe.in".parse().unwrap()).await;
    for _ in 0..500 {
        host.from_peer("probe.in", busy()).await;
    }
    // With no file at all nothing would be unloaded.
    put(folder.path(), "broken.wasm", b"no component");
    std::fs::remove_file(&file).unwrap();
    downtime(Duration::from_millis(1_600)).await;
    put(folder.path(), "other.wasm", &named("other", "1.0.0"));
    runs(&host, "other", "1.0.0").await;
    assert!(version(&host, "late").is_some(), "it is drained still");
    eventually("it is unloaded", async || version(&host, "late").is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_is_empty_or_gone_unloads_nothing_and_is_a_trouble() {
    let parent = tempfile::tempdir().unwrap();
    let (folder, away) = (parent.path().join("plugins"), parent.path().join("away"));
    std::fs::create_dir(&folder).unwrap();
    let setup = following(&folder);
    let host = setup.start().await;
    put(&folder, "late.wasm", &late("1.0.0"));
    runs(&host, "late", "1.0.0").await;
    assert_eq!(host.host.folder_trouble(), None);
    std::fs::rename(&folder, &away).unwrap();
    let told = async |why: &str| {
        host.host.folder_trouble().is_some_and(|it| it.is_error() && it.message.contains(why))
    };
    eventually("it is gone", async || told("cannot be read").await).await;
    let since = host.host.folder_trouble().unwrap().since;
    std::fs::create_dir(&folder).unwrap();
    eventually("it is empty", async || told("is empty").await).await;
    assert_eq!(host.host.folder_trouble().unwrap().since, since, "it is one trouble");
    downtime(Duration::from_secs(3)).await;
    assert_eq!(version(&host, "late").as_deref(), Some("1.0.0"));
    // Nor does a start in front of an empty folder unload it.
    let host = setup.start_in(host.stop().await).await;
    eventually("it is told", async || host.host.folder_trouble().is_some()).await;
    downtime(Duration::from_secs(3)).await;
    assert_eq!(version(&host, "late").as_deref(), Some("1.0.0"));
    std::fs::rename(away.join("late.wasm"), folder.join("late.wasm")).unwrap();
    eventually("all is well", async || host.host.folder_trouble().is_none()).await;
    std::fs::remove_file(folder.join("late.wasm")).unwrap();
    eventually("it is told", async || host.host.folder_trouble().is_some()).await;
    host.host.remove(&"late".parse().unwrap(), false, "the test").await.unwrap();
    eventually("all is well", async || host.host.folder_trouble().is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_first_start_acknowledges_before_a_plugin_of_the_folder_is_installed_is_for_it() {
    let (folder, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    put(folder.path(), "late.wasm", &late("1.0.0"));
    put(folder.path(), "broken.wasm", b"no component");
    // It is granted nothing, so it waits, and nothing is kept for it.
    put(folder.path(), "beggar.wasm", &named("beggar", "1.0.0"));
    let options = dim_server::host::Options::new(following(folder.path()).config(), dir.path());
    let host = dim_server::host::Host::begin(options).await.unwrap();
    let topic: dim_model::ident::Topic = "probe.in".parse().unwrap();
    let early = dim_store::effect::Publish { topic: topic.clone(), data: count().into() };
    host.storage.commit.publish(early, host.storage.log.now()).await.unwrap();
    host.load().await.unwrap();
    let counted = async || {
        let late = host.plugins.get("late")?;
        let asked = script(json!([{ "do": "get", "key": "count" }])).to_string();
        let answer = late.handle.query("run".to_owned(), asked).await.ok()?;
        let answer: serde_json::Value = serde_json::from_str(&answer).ok()?;
        answer[0]["ok"].as_str().map(str::to_owned)
    };
    eventually("it has counted what came early", async || counted().await.as_deref() == Some("1")).await;
    // It subscribes once: what comes now is counted once.
    let next = dim_store::effect::Publish { topic, data: count().into() };
    host.storage.commit.publish(next, host.storage.log.now()).await.unwrap();
    eventually("it counts on", async || counted().await.as_deref() == Some("2")).await;
    host.shutdown().await;
}
