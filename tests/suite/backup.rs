//! Backups of a running host, and what comes back of them.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use dim_tests::{Kubo, Program, Setup, eventually, eventually_within};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

/// A directory with a passphrase, and what is made of it.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("passphrase"), format!("{PASSPHRASE}\n")).unwrap();
        std::fs::create_dir(dir.path().join("state")).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Nothing half done lies about.
    fn is_tidy(&self) {
        for file in std::fs::read_dir(self.dir.path()).unwrap() {
            let file = file.unwrap();
            assert!(!is_half(&file), "{file:?}");
        }
    }

    fn host(&self, state: &str, args: &[&str]) -> Program {
        tokio::task::block_in_place(|| Program::start(Path::new(PROGRAM), &self.path(state), args))
    }

    fn backup(&self, host: &Program, name: &str) -> Output {
        let (file, passphrase) = (self.path(name), self.path("passphrase"));
        host.dim(&[
            "backup",
            file.to_str().unwrap(),
            "--passphrase-file",
            passphrase.to_str().unwrap(),
            "--output",
            "json",
        ])
    }

    fn restore(&self, name: &str, passphrase: &str, state: &str) -> Output {
        let mut command = Command::new(PROGRAM);
        command.arg("restore").arg(self.path(name)).arg("--state-dir").arg(self.path(state));
        command.env("DIM_PASSPHRASE", passphrase).env("RUST_BACKTRACE", "0").stdin(Stdio::null());
        command.output().unwrap()
    }
}

const PASSPHRASE: &str = "correct horse battery";

/// Whether it is what a backup or a restore has begun.
fn is_half(file: &std::fs::DirEntry) -> bool {
    let name = file.file_name().to_string_lossy().into_owned();
    name.starts_with(".dim-backup-") || name.starts_with(".restoring-")
}

fn error_of(output: &Output) -> String {
    assert!(!output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_host_under_load_is_whole_and_consistent() {
    let place = Place::new();
    let config = place.path("config.yaml");
    let probe = json!({ "file": dim_tests::PROBE, "grants": { "write": ["probe-key"] } });
    std::fs::write(&config, json!({ "plugins": { "probe": probe } }).to_string()).unwrap();
    let args = ["--embedded", "--config", config.to_str().unwrap()];
    let host = place.host("state", &args);
    let socket = host.socket();
    // Each command writes three things that belong together.
    let load = tokio::spawn(async move {
        let client = dim_client::Client::new(dim_client::Address::Unix(socket)).unwrap();
        for number in 0.. {
            let script = json!({ "script": [
                { "do": "set", "key": format!("n/{number:08}"), "value": "x".repeat(2_000) },
                { "do": "add", "key": "count" },
                { "do": "update-state", "key": "probe-key", "data": format!("{number}") },
            ] });
            let path = ["plugins", "probe", "commands", "run"];
            let sent = client.http().send_json::<Value>(reqwest::Method::POST, &path, &[], &script).await;
            if sent.is_err() {
                return;
            }
        }
    });
    let count = |host: &Program| {
        let get = json!({ "script": [{ "do": "get", "key": "count" }] }).to_string();
        let read = host.json(&["plugin", "query", "probe", "run", &get]);
        read[0]["ok"].as_str().map_or(0, |count| count.parse::<usize>().unwrap())
    };
    eventually("there is load", async || tokio::task::block_in_place(|| count(&host)) > 100).await;
    let before = count(&host);
    let made = tokio::task::block_in_place(|| place.backup(&host, "backup"));
    assert!(made.status.success(), "{made:?}");
    let after = count(&host);
    let id = host.json(&["status"])["id"].clone();
    let name = host.json(&["ipns", "key-id", "probe-key"])["name"].clone();
    host.kill();
    load.await.unwrap();

    let restored = tokio::task::block_in_place(|| place.restore("backup", PASSPHRASE, "other"));
    assert!(restored.status.success(), "{restored:?}");
    let host = place.host("other", &args);
    assert_eq!(host.json(&["status"])["id"], id);
    assert_eq!(host.json(&["ipns", "key-id", "probe-key"])["name"], name);
    let (count, mut numbers, mut last) = (count(&host), 0, String::new());
    loop {
        let scan = json!({ "script": [{ "do": "scan", "prefix": "n/", "after": last, "limit": 5000 }] });
        let page = host.json(&["plugin", "query", "probe", "run", &scan.to_string()]);
        let Some(key) = page[0]["ok"].as_array().unwrap().last() else { break };
        last = key.as_str().unwrap().to_owned();
        numbers += page[0]["ok"].as_array().unwrap().len();
    }
    // What was in the log and not handled is handled now.
    assert!((before..=after + 1).contains(&count), "{before} to {after}: {count}");
    assert_eq!(count, numbers, "it is of one moment");
    place.is_tidy();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_backup_is_told_and_nothing_is_left_behind() {
    let place = Place::new();
    let host = place.host("state", &["--embedded", "--listen", "127.0.0.1:0"]);
    let without = host.dim(&["backup", place.path("none").to_str().unwrap()]);
    assert!(error_of(&without).contains("private keys and is encrypted"), "{without:?}");
    std::fs::write(place.path("short"), "short\n").unwrap();
    let (file, short) = (place.path("none"), place.path("short"));
    let weak = host.dim(&["backup", file.to_str().unwrap(), "--passphrase-file", short.to_str().unwrap()]);
    assert!(error_of(&weak).contains("at least 8 characters"), "{weak:?}");
    assert!(place.backup(&host, "backup").status.success());
    assert!(error_of(&place.backup(&host, "backup")).contains("already exists"));
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(place.path("backup")).unwrap().permissions(),
    );
    assert_eq!(mode & 0o777, 0o600);

    let wrong = place.restore("backup", "another one altogether", "other");
    assert!(error_of(&wrong).contains("does not open the backup"), "{wrong:?}");
    let taken = place.restore("backup", PASSPHRASE, "state");
    assert!(error_of(&taken).contains("is not empty"), "{taken:?}");
    let whole = std::fs::read(place.path("backup")).unwrap();
    std::fs::write(place.path("torn"), &whole[..whole.len() - 1_000]).unwrap();
    let mut flipped = whole.clone();
    let middle = whole.len() / 2;
    flipped[middle] ^= 1;
    std::fs::write(place.path("flipped"), flipped).unwrap();
    std::fs::write(place.path("noise"), b"this is no backup").unwrap();
    for name in ["torn", "flipped", "noise"] {
        let error = error_of(&place.restore(name, PASSPHRASE, "other"));
        assert!(!error.contains("panicked"), "{name}: {error}");
        assert!(!place.path("other").exists(), "{name}");
        place.is_tidy();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_restored_into_an_empty_directory_and_nowhere_else() {
    let place = Place::new();
    let host = place.host("state", &["--embedded"]);
    let id = host.json(&["status"])["id"].clone();
    assert!(place.backup(&host, "backup").status.success());
    let link = |to: &str, name: &str| std::os::unix::fs::symlink(place.path(to), place.path(name)).unwrap();
    link("nowhere", "dangling");
    std::fs::write(place.path("file"), "mine").unwrap();
    for (target, why) in
        [("dangling", "is a symlink to nothing"), ("file", "is no directory"), ("state", "is not empty")]
    {
        let error = error_of(&place.restore("backup", PASSPHRASE, target));
        assert!(error.contains(why), "{target}: {error}");
    }
    assert_eq!(std::fs::read(place.path("file")).unwrap(), b"mine");
    // What someone else keeps there stays.
    std::fs::create_dir(place.path("other.restoring")).unwrap();
    // As a new file system has it.
    std::fs::create_dir_all(place.path("volume/lost+found")).unwrap();
    link("volume", "link");
    let restored = place.restore("backup", PASSPHRASE, "link");
    assert!(restored.status.success(), "{restored:?}");
    assert!(place.path("link").is_symlink() && place.path("other.restoring").is_dir());
    let new = place.restore("backup", PASSPHRASE, "new");
    assert!(new.status.success(), "{new:?}");
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(place.path("new")).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o700, "only the owner can read the keys");
    assert_eq!(place.host("link", &["--embedded"]).json(&["status"])["id"], id);
    place.is_tidy();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_is_broken_off_is_not_taken_for_a_state_directory() {
    let place = Place::new();
    std::fs::create_dir_all(place.path("other/.restoring-x/keys")).unwrap();
    let mut command = Command::new(PROGRAM);
    command.args(["run", "--embedded", "--state-dir"]).arg(place.path("other")).env("RUST_BACKTRACE", "0");
    let error = error_of(&command.output().unwrap());
    assert!(error.contains("was aborted: empty the directory"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_is_told_to_end_leaves_no_keys_behind() {
    let place = Place::new();
    let host = place.host("state", &["--embedded"]);
    assert!(place.backup(&host, "backup").status.success());
    // A file that says no more: the restore waits for the rest of it.
    let fifo = place.path("slow");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let mut restoring = Command::new(PROGRAM);
    restoring.arg("restore").arg(&fifo).arg("--state-dir").arg(place.path("other"));
    let restoring = restoring.env("DIM_PASSPHRASE", PASSPHRASE).stderr(Stdio::piped()).spawn().unwrap();
    let mut whole = std::fs::read(place.path("backup")).unwrap();
    let rest = whole.split_off(whole.len() - 200);
    let mut slow = std::fs::OpenOptions::new().write(true).open(&fifo).unwrap();
    tokio::task::block_in_place(|| slow.write_all(&whole)).unwrap();
    let begun = || std::fs::read_dir(place.dir.path()).unwrap().any(|file| is_half(&file.unwrap()));
    eventually("it has begun", async || begun()).await;
    let pid = rustix::process::Pid::from_child(&restoring);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    // It sees it with the next bytes, unless it has ended already.
    let ended = tokio::task::block_in_place(|| {
        std::thread::sleep(Duration::from_millis(500));
        let _ = slow.write_all(&rest);
        drop(slow);
        restoring.wait_with_output().unwrap()
    });
    assert!(error_of(&ended).contains("interrupted"), "{ended:?}");
    place.is_tidy();
    assert!(!place.path("other").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_nobody_reads_holds_up_neither_the_end_of_the_host_nor_its_next_start() {
    let setup = Setup::probe();
    let disk = dim_tests::FailingDisk::default();
    let supervised = dim_tests::SupervisedHost::start(&setup.on_disk(disk.clone())).await;
    // More than the pipes between take.
    for number in 0..40 {
        let set = json!([{ "do": "set", "key": format!("k{number}"), "value": "x".repeat(900_000) }]);
        supervised.try_run("probe", set).await.unwrap();
    }
    let socket = supervised.serve_owner().await;
    let ask = |socket: PathBuf| {
        let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
        let body = json!({ "passphrase": PASSPHRASE }).to_string();
        let head =
            "POST /v1/backup HTTP/1.1\r\nhost: dim\r\nconnection: close\r\ncontent-type: application/json";
        write!(stream, "{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
        let mut status = [0; 12];
        std::io::Read::read_exact(&mut stream, &mut status).unwrap();
        (String::from_utf8(status.to_vec()).unwrap(), stream)
    };
    let (status, unread) = tokio::task::block_in_place(|| ask(socket.clone()));
    assert_eq!(status, "HTTP/1.1 200");
    let (status, _) = tokio::task::block_in_place(|| ask(socket.clone()));
    assert_eq!(status, "HTTP/1.1 503", "one at a time");
    disk.set_broken(true);
    let failing = json!([{ "do": "add", "key": "count" }]);
    eventually("the host fails", async || supervised.try_run("probe", failing.clone()).await.is_none()).await;
    disk.set_broken(false);
    // Sooner than nobody has read for too long.
    eventually_within(Duration::from_secs(15), "it runs again", async || {
        supervised.try_run("probe", json!([])).await.is_some()
    })
    .await;
    let mut rest = Vec::new();
    let _ = tokio::task::block_in_place(|| std::io::Read::read_to_end(&mut { unread }, &mut rest));
    assert!(!rest.ends_with(b"0\r\n\r\n"), "what is not finished does not end as if it were");
    supervised.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_do_not_leave_over_loopback() {
    dim_client::install_tls();
    let place = Place::new();
    let config = place.path("config.yaml");
    std::fs::write(&config, "").unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let listen = format!("127.0.0.1:{port}");
    let _host = place.host("state", &["--embedded", "--listen", &listen]);
    let sent = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = format!("http://{listen}/v1/backup");
    let token = std::fs::read_to_string(place.path("state").join(dim_client::TOKEN)).unwrap();
    let sent = sent.post(url).bearer_auth(token.trim_end());
    let answer = sent.json(&json!({ "passphrase": "correct horse battery" })).send().await.unwrap();
    assert_eq!(answer.status(), 403);
    assert!(answer.text().await.unwrap().contains("over the socket"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_host_publishes_under_the_same_names_beyond_what_was_published_since() {
    let Some((one, other)) = Kubo::start_pair() else { return };
    let place = Place::new();
    let args = ["--kubo", one.api()];
    let host = place.host("state", &args);
    let update = |host: &Program, text: &str| -> Value {
        let file = place.path("document");
        std::fs::write(&file, text).unwrap();
        host.json(&["ipns", "update-state", "fleet-policy", file.to_str().unwrap()])
    };
    let first = update(&host, "as of the backup");
    assert!(tokio::task::block_in_place(|| place.backup(&host, "backup")).status.success());
    for round in 0..5 {
        update(&host, &format!("later {round}"));
    }
    let name = first["name"].as_str().unwrap().to_owned();
    let path = format!("/ipns/{name}");
    let read = |kubo: &Kubo| {
        let target = kubo.try_ipfs(&["name", "resolve", "--nocache", &path]).unwrap_or_default();
        kubo.try_ipfs(&["cat", target.trim()]).unwrap_or_default()
    };
    for kubo in [&one, &other] {
        eventually("both daemons have seen the later record", async || read(kubo) == "later 4").await;
    }
    host.kill();
    let restored = tokio::task::block_in_place(|| place.restore("backup", PASSPHRASE, "back"));
    assert!(restored.status.success(), "{restored:?}");

    // Another daemon, which has only heard of the name: the host brings its key along. What was published since the
    // backup stays until it is said what is meant.
    let host = place.host("back", &["--kubo", other.api()]);
    let hold = || host.json(&["status"])["names"][0]["hold"].clone();
    eventually("the later record is left alone", async || hold()["cause"] == "restored").await;
    for kubo in [&one, &other] {
        assert_eq!(read(kubo), "later 4");
    }
    host.json(&["ipns", "adopt", "fleet-policy", "replace"]);
    for kubo in [&one, &other] {
        eventually("what was backed up is published again", async || read(kubo) == "as of the backup").await;
    }
    let next = update(&host, "after the restore");
    assert_eq!(next["name"], name.as_str());
    assert_eq!(next["published"], true);
    for kubo in [&one, &other] {
        eventually("the next one is accepted by both", async || read(kubo) == "after the restore").await;
    }
    let troubles = host.json(&["status"])["troubles"].clone();
    assert!(!troubles.to_string().contains("on hold"), "{troubles}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_opens_with_what_is_in_it_and_with_nothing_else() {
    use dim_server::backup::{Passphrase, verify, write};
    let host = Setup::probe().start().await;
    let mut bytes = Vec::new();
    let passphrase = |text: &str| Passphrase::new(text.to_owned()).unwrap();
    write(&host.host.storage.store, &host.host.storage.keys, passphrase("long enough"), &mut bytes).unwrap();
    let head = verify(bytes.as_slice(), passphrase("long enough")).unwrap();
    assert_eq!((head.host.as_str(), head.store_format), (host.host.id.as_str(), dim_store::FORMAT));
    assert!(verify(bytes.as_slice(), passphrase("long enough?")).is_err());
    // A key that someone reads over the shoulder of the disk is not in the clear.
    let key = host.host.storage.keys.export(&"probe-key".parse().unwrap()).unwrap();
    assert!(!bytes.windows(32).any(|window| window == &key.bytes[key.bytes.len() - 32..]));
}
