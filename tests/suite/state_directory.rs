//! The files of a state directory: who can use them, and what happens when they are lost, changed or exchanged.

use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dim_server::host::{Host, Options};
use dim_store::batch::ReplyError;
use dim_store::{Absent, Disk, Medium, Store, StoreError};
use dim_tests::{PROBE, Program, Setup, eventually, eventually_within, script};
use redb::{Builder, Database, DatabaseError};
use serde_json::json;

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// All files and directories below `dir`.
fn below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            found.extend(below(&path));
        }
        found.push(path);
    }
    found
}

/// Those that others than the owner can use.
fn open_to_others(dir: &Path) -> Vec<String> {
    let open = below(dir).into_iter().filter(|path| mode(path) & 0o077 != 0);
    open.map(|path| format!("{} {:03o}", path.display(), mode(&path))).collect()
}

/// A program that starts `dim` with an umask or a limit of the shell.
fn dim_after(dir: &Path, setting: &str) -> PathBuf {
    let file = dir.join("dim");
    std::fs::write(&file, format!("#!/bin/sh\n{setting}\nexec {PROGRAM} \"$@\"\n")).unwrap();
    set_mode(&file, 0o755);
    file
}

#[test]
fn every_file_of_a_host_is_the_owners_alone_whatever_the_umask() {
    for umask in ["000", "002", "022"] {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        std::fs::create_dir(&state).unwrap();
        set_mode(&state, 0o755);
        let program = dim_after(dir.path(), &format!("umask {umask}"));
        let host = Program::start(&program, &state, &["--embedded", "--listen", "127.0.0.1:0"]);
        let installed = host.dim(&["plugin", "install", PROBE, "--grant"]);
        assert!(installed.status.success(), "{installed:?}");
        let names: Vec<_> =
            below(&state).iter().map(|path| path.strip_prefix(&state).unwrap().to_owned()).collect();
        for expected in ["dim.redb", "lock", "api.sock", "api-token", "keys", "components", "compiled"] {
            assert!(names.iter().any(|name| name == Path::new(expected)), "{expected}: {names:?}");
        }
        assert_eq!(open_to_others(&state), Vec::<String>::new(), "umask {umask}");
    }
}

/// A disk that notes the mode of the database's file at the moment it is opened.
#[derive(Clone, Debug, Default)]
struct Noting(Arc<Mutex<Vec<u32>>>);

impl Medium for Noting {
    fn open(&self, builder: &Builder, file: &Path) -> Result<Database, DatabaseError> {
        let opened = Disk.open(builder, file);
        self.0.lock().unwrap().push(mode(file));
        opened
    }

    fn taken(&self, file: &Path) -> u64 {
        Disk.taken(file)
    }

    fn free(&self, state_dir: &Path) -> std::io::Result<u64> {
        Disk.free(state_dir)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_within_another_program_creates_nothing_that_others_can_use() {
    let (dir, disk) = (tempfile::tempdir().unwrap(), Noting::default());
    set_mode(dir.path(), 0o755);
    let setup = Setup::probe().on_disk(disk.clone());
    let host = setup.start_in(dir).await;
    assert_eq!(open_to_others(host.host.storage.store.path()), Vec::<String>::new());
    let dir = host.stop().await;
    // As an earlier version left them.
    for path in below(dir.path()) {
        let rights = if path.is_dir() { 0o755 } else { 0o644 };
        set_mode(&path, rights);
    }
    let host = setup.start_in(dir).await;
    let open = open_to_others(host.host.storage.store.path());
    assert!(open.iter().all(|path| path.contains("/compiled/")), "in a directory of mode 700: {open:?}");
    assert_eq!(mode(&host.host.storage.store.path().join("compiled")), 0o700);
    assert_eq!(*disk.0.lock().unwrap(), [0o600, 0o600], "from the first moment on");
}

#[tokio::test(flavor = "multi_thread")]
async fn compiled_forms_that_were_exchanged_are_not_run() {
    let setup = Setup::bundled();
    let dir = setup.start().await.stop().await;
    let compiled = dir.path().join("compiled");
    for ending in ["cwasm", "mac", "sha256"] {
        let mut files = below(&compiled);
        files.retain(|file| file.extension().is_some_and(|found| found == ending));
        files.sort();
        let contents: Vec<_> = files.iter().map(|file| std::fs::read(file).unwrap()).collect();
        for (file, content) in files.iter().zip(contents.iter().cycle().skip(1)) {
            std::fs::write(file, content).unwrap();
        }
    }
    let host = setup.start_in(dir).await;
    let update = json!({ "job_id": "j1", "event_type": "running" });
    host.command("job-tracker", "update", update).await.unwrap();
    let nodes = host.query("node-registry", "list", json!({})).await.unwrap();
    assert_eq!(nodes, json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_program_of_a_user_has_compiled_no_other_one_compiles_again() {
    let shared = tempfile::tempdir().unwrap();
    let start = async |dir: &Path, compiler: Option<&str>| {
        let mut options = Options::new(Setup::bundled().config(), dir);
        options.shared_cache = Some(shared.path().to_owned());
        options.compiler = compiler.map(PathBuf::from);
        let host = Host::start(options).await.unwrap();
        let loaded = host.plugins.all().len();
        host.shutdown().await;
        loaded
    };
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    assert_eq!(start(one.path(), None).await, 3);
    // This compiler makes nothing.
    assert_eq!(start(other.path(), Some("/bin/false")).await, 3);
    // A host keeps what it uses.
    std::fs::remove_dir_all(shared.path().join("compiled")).unwrap();
    assert_eq!(start(other.path(), Some("/bin/false")).await, 3);
}

/// Why a host does not start, with all causes.
async fn refusal(options: &Options) -> String {
    let error = Host::start(options.clone()).await.expect_err("it is refused");
    let causes = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_or_empty_database_beside_what_a_host_left_is_refused() {
    let setup = Setup::bundled();
    let host = setup.start().await;
    host.command("job-tracker", "update", json!({ "job_id": "j1", "event_type": "running" })).await.unwrap();
    let dir = host.stop().await;
    let (file, away) = (Store::file(dir.path()), dir.path().join("away"));
    std::fs::rename(&file, &away).unwrap();
    let mut options = Options::new(setup.config(), dir.path());
    let is_refused = async |options: &Options, what: &str| {
        let why = refusal(options).await;
        assert!(
            why.contains("--new-store") && why.contains("dim restore") && why.contains("dim.redb"),
            "{what}: {why}"
        );
    };
    is_refused(&options, "missing").await;
    assert!(!file.exists(), "nothing is made");
    std::fs::write(&file, "").unwrap();
    is_refused(&options, "empty").await;
    std::fs::remove_file(&file).unwrap();
    drop(Database::create(&file).unwrap());
    is_refused(&options, "without tables").await;
    std::fs::rename(&away, &file).unwrap();
    let host = setup.start_in(dir).await;
    let jobs = host.query("job-tracker", "list", json!({})).await.unwrap();
    assert_eq!(jobs.as_array().unwrap().len(), 1);
    let dir = host.stop().await;

    options = Options::new(setup.config(), dir.path());
    options.absent = Absent::Created;
    let why = refusal(&options).await;
    assert!(why.contains("exists") && why.contains("without --new-store"), "{why}");
    std::fs::remove_file(&file).unwrap();
    let host = Host::start(options).await.unwrap();
    let jobs =
        host.plugins.get("job-tracker").unwrap().handle.query("list".to_owned(), "{}".to_owned()).await;
    assert_eq!(jobs.unwrap(), "[]");
    host.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_removed_stops_the_intake_and_can_be_saved_by_a_backup() {
    let host = Setup::probe().start().await;
    host.run(json!([{ "do": "set", "key": "k", "value": "kept" }])).await;
    let file = Store::file(host.host.storage.store.path());
    let beside = file.with_file_name("beside");
    std::fs::hard_link(&file, &beside).unwrap();
    std::fs::remove_file(&file).unwrap();
    let shortage = || host.host.storage.disk.shortage();
    eventually_within(Duration::from_secs(2), "it is noticed", async || shortage().is_some()).await;
    let why = shortage().unwrap().reason;
    assert!(why.contains("removed or replaced") && why.contains("dim backup"), "{why}");
    let refused = host.command("probe", "run", script(json!([]))).await;
    assert!(matches!(refused, Err(ReplyError::IntakeStopped(_))), "{refused:?}");
    assert_eq!(host.state_of("probe", "k").await, "kept", "questions are answered");
    let (mut backup, passphrase) =
        (Vec::new(), dim_server::backup::Passphrase::new("long enough".to_owned()).unwrap());
    dim_server::backup::write(
        &host.host.storage.store,
        &host.host.storage.keys,
        passphrase.clone(),
        &mut backup,
    )
    .unwrap();
    dim_server::backup::verify(backup.as_slice(), passphrase).unwrap();
    // Another file in its place is not the one that is open.
    std::fs::copy(&beside, &file).unwrap();
    eventually("the host has looked", async || !host.host.storage.store.is_in_place()).await;
    assert!(shortage().is_some());
    std::fs::rename(&beside, &file).unwrap();
    eventually("it goes on once the file is back", async || shortage().is_none()).await;
    host.run(json!([])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_in_a_stored_value_is_found_at_the_next_start() {
    let needle = b"needle-in-the-state";
    let setup = Setup::probe();
    let host = setup.start().await;
    host.run(json!([{ "do": "set", "key": "k", "value": String::from_utf8_lossy(needle) }])).await;
    let dir = host.stop().await;
    let file = Store::file(dir.path());
    let whole = std::fs::read(&file).unwrap();
    let mut flipped = whole.clone();
    let places: Vec<_> =
        whole.windows(needle.len()).enumerate().filter(|(_, found)| found == needle).collect();
    assert!(!places.is_empty());
    for (place, _) in places {
        flipped[place] ^= 1;
    }
    std::fs::write(&file, flipped).unwrap();
    let why = refusal(&Options::new(setup.config(), dir.path())).await;
    assert!(why.contains("dim.redb") && why.contains("backup") && why.contains("damaged"), "{why}");
    std::fs::write(&file, whole).unwrap();
    assert_eq!(setup.start_in(dir).await.state_of("probe", "k").await, "needle-in-the-state");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bit_that_flips_while_a_host_runs_is_found_when_the_value_is_read() {
    let needle = b"needle-in-the-state";
    let host = Setup::probe().start().await;
    host.run(json!([{ "do": "set", "key": "k", "value": String::from_utf8_lossy(needle) }])).await;
    let dir = host.stop().await;
    // Without a cache each value is read from the file.
    let store = Store::open_on(dir.path(), Arc::new(Disk), 0, Absent::Refused).unwrap();
    let read = || -> Result<bool, StoreError> {
        let snapshot = store.snapshot()?;
        let mut values = snapshot.scan(std::ops::Bound::Unbounded)?;
        values.try_fold(false, |found, row| {
            Ok(found || row?.1.windows(needle.len()).any(|part| part == needle))
        })
    };
    assert!(read().unwrap(), "it is there");
    let file = std::fs::File::options().write(true).open(Store::file(dir.path())).unwrap();
    let whole = std::fs::read(Store::file(dir.path())).unwrap();
    for (place, _) in whole.windows(needle.len()).enumerate().filter(|(_, found)| found == needle) {
        file.write_all_at(&[whole[place] ^ 1], place as u64).unwrap();
    }
    let error = read().unwrap_err();
    let causes = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
    let why = causes.map(ToString::to_string).collect::<Vec<_>>().join(": ");
    assert!(why.contains("dim.redb is damaged") && why.contains("restore a backup"), "{why}");
}

#[test]
fn without_a_directory_for_state_nothing_is_written_into_the_current_one() {
    let here = tempfile::tempdir().unwrap();
    for args in [&["run", "--embedded"][..], &["status"], &["agent", "--node-id", "n1"], &["agent", "status"]]
    {
        for unset in ["", "state"] {
            let mut command = Command::new(PROGRAM);
            command.args(args).current_dir(here.path()).env_clear();
            command.envs(["STATE_DIRECTORY", "XDG_STATE_HOME", "HOME"].map(|name| (name, unset)));
            let refused = command.output().unwrap();
            let why = String::from_utf8_lossy(&refused.stderr).into_owned();
            assert!(
                !refused.status.success() && why.contains("there is no directory for the state"),
                "{args:?}: {why}"
            );
            assert_eq!(why.contains("--agent-dir or DIM_AGENT_DIR"), args[0] == "agent", "{why}");
        }
    }
    assert_eq!(std::fs::read_dir(here.path()).unwrap().count(), 0);
}
