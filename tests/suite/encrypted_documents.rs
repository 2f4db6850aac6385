//! Documents that are encrypted for a group of the fleet.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use dim_model::ident::KeyName;
use dim_model::time::Timestamp;
use dim_network::encrypted_documents::CipherError;
use dim_network::name_publisher::Lasting;
use dim_server::host::{AdoptError, Adoption};
use dim_store::commit::NameChange;
use dim_store::effect::{NameUpdate, NameValue};
use dim_store::followed_names;
use dim_store::names::{self, Cause};
use dim_tests::fleet::{FleetAdmin, all_members, keys_of};
use dim_tests::{Kubo, Setup, SupervisedHost, TestHost, eventually, eventually_within};
use dim_topics::identity::WriterId;
use serde_json::{Value, json};

use crate::membership::{MARK, blocks, contains_mark, fleet};
use crate::reliable_topics::{ARRIVAL, copy_of};

fn key() -> KeyName {
    "probe-key".parse().unwrap()
}

/// The value of the name of the probe.
fn known(host: &TestHost) -> names::Known {
    names::known(&host.host.storage.store.snapshot().unwrap(), &key()).unwrap().expect("a value")
}

async fn update(host: &TestHost, text: &str) {
    host.run(json!([{ "do": "update-state", "key": "probe-key", "data": text }])).await;
}

/// The config of a host in a fleet, and of one that encrypts the documents of the probe.
fn configs(admin: &FleetAdmin) -> (String, String) {
    let in_fleet = format!("fleet: {{ name: {} }}\nipfs: {{ follow_every: 1s }}\n", admin.fleet());
    let encrypting = format!("{in_fleet}names: {{ probe-key: {{ encrypt: true }} }}\n");
    (in_fleet, encrypting)
}

/// A host that is the only member of a fleet, and has published an encrypted document.
async fn lone_member(daemon: &Kubo, document: &str) -> (TestHost, FleetAdmin) {
    let admin = FleetAdmin::new(7);
    let (_, encrypting) = configs(&admin);
    let host = Setup::probe().yaml(&encrypting).on_kubo(daemon.api()).start().await;
    let admin = admin.with_members(&[(&keys_of(&host), "one", true)]);
    assert_eq!(admin.offer(&host).await, Ok(1));
    update(&host, document).await;
    eventually_within(ARRIVAL, "it is published", async || known(&host).is_published()).await;
    (host, admin)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_published_document_is_read_by_its_group_and_by_nobody_else() {
    let Some((near, far)) = tokio::task::block_in_place(Kubo::start_pair) else { return };
    let admin = FleetAdmin::new(7);
    let fleet_name = admin.fleet();
    let in_fleet = format!("fleet: {{ name: {fleet_name} }}\nipfs: {{ follow_every: 1s }}\n");
    let yaml = format!("{in_fleet}names: {{ probe-key: {{ encrypt: true }} }}\n");
    let one = Setup::probe().yaml(&yaml).on_kubo(near.api()).start().await;
    let first = format!("{MARK}: 1");
    update(&one, &first).await;
    let key = key();
    let name = one.host.storage.keys.name(&key).unwrap();

    // Without a key the document waits, and nothing is published.
    eventually("the host says why it waits", async || {
        let failure = one.host.exchange.links.failures.of(&key);
        failure.is_some_and(|it| it.why.contains("waits until it can be encrypted"))
    })
    .await;
    assert!(known(&one).published.is_none());
    let follow = json!([{ "do": "follow", "name": name.to_string() }]).to_string();
    let reader = json!({ "config": { "on_start": follow }, "grants": { "read": [name.to_string()] } });
    let other = Setup::default().and_probe("probe", reader).yaml(&in_fleet).on_kubo(far.api()).start().await;
    let lines = [keys_of(&one), keys_of(&other)];
    let mut admin = admin.with_members(&[(&lines[0], "one", true), (&lines[1], "other", false)]);
    assert_eq!(admin.offer(&one).await, Ok(1));
    eventually_within(ARRIVAL, "it is published", async || known(&one).is_published()).await;

    // Another program finds a file that says what it is.
    let file_of = |host: &TestHost| {
        let path = known(host).visible_path().to_string();
        (path.clone(), tokio::task::block_in_place(|| near.ipfs(&["cat", &path])))
    };
    let (path, file) = file_of(&one);
    let file: Value = serde_json::from_str(&file).unwrap();
    assert_eq!((&file["dim-encrypted-document"], &file["group"]), (&json!(1), &json!("all")));
    let notice = file["notice"].as_str().unwrap();
    assert!(notice.contains(&format!("dim ipns get-state {name}")), "{notice}");
    let documents = async |host: &TestHost| {
        let changed = host.state_of("probe", "changed").await;
        let changes = changed.as_array().cloned().unwrap_or_default();
        changes.iter().map(|change| change["document"]["ok"].clone()).collect::<Vec<_>>()
    };
    eventually_within(ARRIVAL, "the plugin of the other host reads it", async || {
        documents(&other).await == [json!(first)]
    })
    .await;
    let read_by = async |host: &TestHost| {
        let links = &host.host.exchange.links;
        let path = known(&one).visible_path().clone();
        links.cipher.document(&links.backend, &name, &path).await.map(|document| document.data)
    };
    assert_eq!(read_by(&other).await.unwrap(), first);
    // The reader stores the document under the CID of the document, and shows the path of the file.
    let snapshot = other.host.storage.store.snapshot().unwrap();
    let followed = followed_names::known(&snapshot, &name).unwrap().unwrap();
    let of_document = NameValue::document(first.clone().into()).path();
    assert_eq!(
        (&followed.resolution.path, followed.visible_path()),
        (&of_document, known(&one).visible_path())
    );
    // Under another name that points to the file, not even a member reads it.
    let links = &other.host.exchange.links;
    let other_name = other.host.storage.keys.get_or_create(&key).unwrap().name();
    let refused = links.cipher.document(&links.backend, &other_name, known(&one).visible_path()).await;
    assert!(matches!(refused, Err(CipherError::OtherName { .. })), "{refused:?}");
    let stranger = SupervisedHost::start(&Setup::default().on_kubo(far.api())).await;
    let url = format!("{}/v1/names/{name}/state", stranger.serve().await);
    let answer = dim_tests::with_token().get(url).send().await.unwrap();
    let (status, why) = (answer.status().as_u16(), answer.text().await.unwrap());
    assert!(status == 409 && why.contains("encrypted for group all of fleet"), "{status} {why}");

    // A removed host does not read what is published from then on, and the present document is encrypted again.
    let gone = WriterId::of_name(&fleet(&other).await.id).unwrap();
    admin.remove(&gone, BTreeMap::new());
    assert_eq!(admin.offer(&one).await, Ok(2));
    eventually_within(Duration::from_secs(5), "it is encrypted with a new key", async || {
        known(&one).is_published() && known(&one).visible_path().as_str() != path
    })
    .await;
    let second = format!("{MARK}: 2");
    update(&one, &second).await;
    eventually_within(ARRIVAL, "the second one is published", async || known(&one).is_published()).await;
    assert_eq!(read_by(&one).await.unwrap(), second);
    let refused = read_by(&other).await.unwrap_err();
    assert!(matches!(refused, CipherError::Unreadable(_)), "{refused}");
    let later = || Timestamp(Timestamp::wall().0 + 3_600_000_000_000);
    eventually_within(ARRIVAL, "the removed host cannot read it", async || {
        let troubles = other.host.exchange.links.unresolved.troubles(later());
        troubles.iter().any(|trouble| trouble.message.contains("does not have the key of epoch"))
    })
    .await;
    assert_eq!(documents(&other).await, [json!(first)], "one document is one change");
    for daemon in [&near, &far] {
        let blocks = blocks(daemon).await;
        assert!(blocks.len() > 3 && !blocks.values().any(|block| contains_mark(block)));
    }

    // After a restart the record is the host's own, and stays as it is until the config changes.
    let (path, _) = file_of(&one);
    let one = Setup::probe().yaml(&yaml).on_kubo(near.api()).start_in(one.stop().await).await;
    one.host.looked_at(&key).await;
    assert!(known(&one).hold.is_none() && known(&one).is_published(), "{:?}", known(&one));
    assert_eq!(known(&one).visible_path().as_str(), path);
    let one = Setup::probe().yaml(&in_fleet).on_kubo(near.api()).start_in(one.stop().await).await;
    eventually_within(ARRIVAL, "it is published without encryption", async || {
        known(&one).is_published() && known(&one).encryption().is_none()
    })
    .await;
    assert_eq!(file_of(&one).1, second);
    let pins = tokio::task::block_in_place(|| near.ipfs(&["pin", "ls", "--quiet", "--type", "recursive"]));
    assert!(!pins.contains(path.trim_start_matches("/ipfs/")), "the encrypted file is still pinned");
    let one = Setup::probe().yaml(&yaml).on_kubo(near.api()).start_in(one.stop().await).await;
    eventually_within(ARRIVAL, "it is encrypted again", async || known(&one).encryption().is_some()).await;
    let plain = known(&one).path.to_string();
    eventually("the plain file is no longer pinned", async || {
        let pins =
            tokio::task::block_in_place(|| near.ipfs(&["pin", "ls", "--quiet", "--type", "recursive"]));
        !pins.contains(plain.trim_start_matches("/ipfs/"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_key_the_record_is_renewed_and_a_new_document_waits() {
    let Some(daemon) = tokio::task::block_in_place(Kubo::start) else { return };
    let (host, mut admin) = lone_member(&daemon, MARK).await;
    let published = known(&host).published.unwrap();
    let me = WriterId::of_name(&fleet(&host).await.id).unwrap();
    admin.remove(&me, BTreeMap::new());
    assert_eq!(admin.offer(&host).await, Ok(2));
    // The daemon has lost the file.
    let file = published.path.to_string();
    tokio::task::block_in_place(|| {
        daemon.ipfs(&["pin", "rm", &file]);
        daemon.ipfs(&["repo", "gc"]);
    });
    let name = host.host.storage.keys.name(&key()).unwrap();
    let renewal =
        NameUpdate { name, value: NameValue::document(MARK.into()), lifetime: Duration::from_secs(7_200) };
    host.host.storage.commit.change_name(NameChange::Own { key: key(), update: renewal }).await.unwrap();
    eventually_within(ARRIVAL, "the record is renewed", async || {
        known(&host).published.is_some_and(|it| it.lifetime == 7_200_000_000_000)
    })
    .await;
    assert_eq!(known(&host).published.unwrap().path, published.path);
    assert_eq!(host.host.exchange.links.failures.of(&key()), None);
    tokio::task::block_in_place(|| daemon.ipfs(&["block", "stat", "--offline", &file]));
    // A new document cannot be encrypted.
    update(&host, &format!("{MARK}: new")).await;
    eventually("the host says why it waits", async || {
        let failure = host.host.exchange.links.failures.of(&key());
        failure.is_some_and(|it| it.why.contains("no member") && it.lasts == Lasting::UntilMended)
    })
    .await;
    // Until then readers find the present document, also after half of the lifetime of its record.
    let published = known(&host).published.unwrap();
    let aged = names::Accepted { at: published.at - 2 * 3_600_000_000_000, ..published.clone() };
    host.host.storage.commit.write(move |write| names::accept(write, &key(), aged)).await.unwrap();
    host.host.storage.commit.names.notify_one();
    eventually_within(ARRIVAL, "the record is renewed again", async || {
        known(&host).published.is_some_and(|it| it.at > published.at)
    })
    .await;
    let renewed = known(&host).published.unwrap();
    assert_eq!((renewed.path, renewed.of), (published.path, published.of));
    assert!(!known(&host).is_published() && host.host.exchange.links.failures.of(&key()).is_some());
    assert!(!blocks(&daemon).await.values().any(|block| contains_mark(block)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_from_before_a_new_key_knows_the_document_under_its_name() {
    let Some(daemon) = tokio::task::block_in_place(Kubo::start) else { return };
    let (host, mut admin) = lone_member(&daemon, MARK).await;
    let (_, encrypting) = configs(&admin);
    let start = async |dir| Setup::probe().yaml(&encrypting).on_kubo(daemon.api()).start_in(dir).await;
    let dir = host.stop().await;
    let (store, copy) = (dir.path().join("dim.redb"), tempfile::tempdir().unwrap());
    let without_new_key = copy_of(dir.path());
    std::fs::copy(&store, copy.path().join("dim.redb")).unwrap();
    let host = start(dir).await;
    let before = known(&host).visible_path().clone();
    admin.change(|roster| roster.groups.get_mut(&all_members()).unwrap().rekeyed = roster.version);
    assert_eq!(admin.offer(&host).await, Ok(2));
    eventually_within(ARRIVAL, "it is encrypted with a new key", async || {
        known(&host).is_published() && *known(&host).visible_path() != before
    })
    .await;
    let after = known(&host).visible_path().clone();
    let dir = host.stop().await;
    let with_new_key = copy_of(dir.path());
    std::fs::copy(copy.path().join("dim.redb"), &store).unwrap();
    let host = start(dir).await;
    assert_eq!(*known(&host).visible_path(), before);
    host.host.looked_at(&key()).await;
    eventually_within(ARRIVAL, "its record is that of the new key", async || {
        assert_eq!(known(&host).hold, None);
        known(&host).is_published() && *known(&host).visible_path() == after
    })
    .await;
    // Its pin is the host's own, and is removed with the next document.
    update(&host, "another one").await;
    let pins =
        || tokio::task::block_in_place(|| daemon.ipfs(&["pin", "ls", "--quiet", "--type", "recursive"]));
    eventually_within(ARRIVAL, "it is unpinned", async || {
        known(&host).is_published() && !pins().contains(after.as_str().trim_start_matches("/ipfs/"))
    })
    .await;
    update(&host, MARK).await;
    eventually_within(ARRIVAL, "the first document is back", async || {
        known(&host).is_published() && *known(&host).visible_path() == after
    })
    .await;
    host.stop().await;

    // Without the new key the name is on hold until the key is there.
    let dir = copy_of(without_new_key.path());
    let host = start(dir).await;
    host.host.looked_at(&key()).await;
    eventually("the name is on hold", async || known(&host).hold.is_some()).await;
    let dir = host.stop().await;
    let keys = |dir: &Path| dir.join("keys");
    std::fs::remove_dir_all(keys(dir.path())).unwrap();
    std::fs::rename(keys(with_new_key.path()), keys(dir.path())).unwrap();
    let host = start(dir).await;
    eventually_within(ARRIVAL, "the name is no longer on hold", async || {
        known(&host).hold.is_none() && known(&host).is_published()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_document_is_imported_only_where_documents_are_encrypted() {
    let Some(daemon) = tokio::task::block_in_place(Kubo::start) else { return };
    let (host, admin) = lone_member(&daemon, r#"{"jobs":2500}"#).await;
    let (in_fleet, encrypting) = configs(&admin);
    let start = async |yaml: &str, dir| Setup::probe().yaml(yaml).on_kubo(daemon.api()).start_in(dir).await;
    // For the host the document is then that of another host.
    host.host.storage.commit.write(|write| names::forget(write, &key())).await.unwrap();
    let host = start(&in_fleet, host.stop().await).await;
    host.host.looked_at(&key()).await;
    eventually("the name is on hold", async || {
        let snapshot = host.host.storage.store.snapshot().unwrap();
        let known = names::known(&snapshot, &key()).unwrap();
        known.and_then(|known| known.hold).is_some_and(|hold| hold.cause == Cause::NeverPublished)
    })
    .await;
    let refused = host.host.adopt(&key(), Adoption::Import).await;
    assert!(matches!(refused, Err(AdoptError::Encrypted { .. })), "{refused:?}");
    let for_others = encrypting.replace("encrypt: true", "encrypt: true, group: others");
    let host = start(&for_others, host.stop().await).await;
    let refused = host.host.adopt(&key(), Adoption::Import).await;
    assert!(matches!(refused, Err(AdoptError::Encrypted { .. })), "{refused:?}");
    let host = start(&encrypting, host.stop().await).await;
    host.host.adopt(&key(), Adoption::Import).await.unwrap();
    assert_eq!(host.state_of("probe", "imported").await, json!({ "jobs": 2500 }));
    eventually_within(ARRIVAL, "what it published is encrypted", async || {
        known(&host).is_published() && known(&host).encryption().is_some()
    })
    .await;
    // A host that does not encrypt has no plain copy that it could publish instead.
    host.host.storage.commit.write(|write| names::forget(write, &key())).await.unwrap();
    let host = start(&in_fleet, host.stop().await).await;
    host.host.looked_at(&key()).await;
    eventually("the name is on hold", async || known(&host).hold.is_some()).await;
    host.host.adopt(&key(), Adoption::Replace).await.unwrap();
    eventually_within(ARRIVAL, "it is published", async || known(&host).is_published()).await;
    assert!(!blocks(&daemon).await.values().any(|block| String::from_utf8_lossy(block).contains("2500")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_begins_and_ends_encryption_and_findings_tell_what_is_not_encrypted() {
    let Some(daemon) = tokio::task::block_in_place(Kubo::start) else { return };
    let (dir, admin) = (tempfile::tempdir().unwrap(), FleetAdmin::new(7));
    let file = dir.path().join("config.yaml");
    let probe = |yaml: &str| Setup::probe().yaml(yaml).on_kubo(daemon.api());
    let write = |yaml: &str| {
        let mut config = serde_json::to_value(probe(yaml).config()).unwrap();
        // The host may join a fleet.
        config.as_object_mut().unwrap().remove("fleet");
        std::fs::write(&file, config.to_string()).unwrap();
    };
    // At its start the host has nothing to share in a fleet.
    let plain_config = "ipfs: { follow_every: 1s }\n";
    write(plain_config);
    let supervised = SupervisedHost::start(&probe(plain_config).from_file(&file)).await;
    let (url, client) = (format!("{}/healthz", supervised.serve().await), dim_tests::with_token());
    let trouble = async |code: &str| {
        let answer: Value =
            client.get(&url).header("Accept", "application/json").send().await.unwrap().json().await.unwrap();
        answer["troubles"].as_array().unwrap().iter().find(|it| it["code"] == code).cloned()
    };
    let host = supervised.host().unwrap();
    let known = || names::known(&host.storage.store.snapshot().unwrap(), &key()).unwrap().expect("a value");
    let steps = json!([{ "do": "update-state", "key": "probe-key", "data": MARK }]);
    supervised.try_run("probe", steps).await.unwrap();
    eventually_within(ARRIVAL, "it is published", async || known().is_published()).await;
    let plain = known().path;
    // There is no fleet yet, and one key is mistyped.
    let names = "names: { probe-key: { encrypt: true }";
    write(&format!("{plain_config}{names}, prob-key: {{ encrypt: true }} }}\n"));
    let reloaded = host.reload("a test").await.unwrap();
    assert!(!reloaded.needs_restart.iter().any(|it| it.starts_with("names")), "{:?}", reloaded.needs_restart);
    assert!(reloaded.changed.iter().any(|it| it.starts_with("names.probe-key")), "{:?}", reloaded.changed);
    eventually("a finding tells of the plain document", async || {
        let told = trouble("document-not-encrypted").await;
        told.is_some_and(|it| it["message"].as_str().unwrap().contains("dim fleet join"))
    })
    .await;
    assert_eq!(trouble("key-unknown").await.unwrap()["subject"], "prob-key");
    // Without the setting nothing is left of it.
    let encrypting = std::fs::read_to_string(&file).unwrap();
    write(plain_config);
    host.reload("a test").await.unwrap();
    eventually("the failure is forgotten", async || host.exchange.links.failures.of(&key()).is_none()).await;
    assert_eq!((trouble("name-late").await, trouble("document-not-encrypted").await), (None, None));
    std::fs::write(&file, encrypting).unwrap();
    host.reload("a test").await.unwrap();
    assert_eq!(known().visible_path(), &plain, "readers keep what there is");
    let reliable = &host.exchange.links.reliable;
    host.join_fleet(&admin.fleet().parse().unwrap(), false).await.unwrap();
    let state = reliable.fleet().await.unwrap();
    let line = format!("{}:{}", state.id, state.sealing);
    let admin = admin.with_members(&[(&line, "one", true)]);
    assert_eq!(reliable.offer_roster(admin.roster.to_block()).await, Some(Ok(1)));
    eventually_within(ARRIVAL, "it is encrypted", async || known().encryption().is_some()).await;
    assert_eq!(trouble("document-not-encrypted").await, None);
    write(plain_config);
    host.reload("a test").await.unwrap();
    eventually_within(ARRIVAL, "it is plain again", async || known().visible_path() == &plain).await;
    assert_eq!(trouble("key-unknown").await, None);
    drop(host);
    supervised.stop().await;
}
