//! What the program writes for people: nothing from outside steers a terminal, and a reader may go at any time.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use dim_tests::{Program, component, soon};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::json;

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

fn host(dir: &Path) -> Program {
    let state = dir.join("state");
    std::fs::create_dir_all(&state).unwrap();
    Program::start(Path::new(PROGRAM), &state, &["--embedded"])
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Whether a text would do more to a terminal than to show what is seen.
fn steers(text: &str) -> bool {
    let hides = |c: char| matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
    text.chars().any(|c| (c.is_control() && c != '\n') || hides(c))
}

#[test]
fn a_reader_that_goes_ends_each_command_without_a_word() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path());
    host.json(&["job", "update", "j1", "running"]);
    host.json(&["topic", "pub", "dim.jobs.updates", "no job event"]);
    host.json(&["ipns", "update-state", "policy", dim_tests::PROBE]);
    soon(|| host.json(&["dead", "ls"]).as_array().is_some_and(|letters| letters.len() == 1));
    for line in [
        "--help",
        "--version",
        "plugin install --help",
        "completions bash",
        "completions zsh",
        "openapi",
        "status",
        "job ls",
        "job get j1",
        "job watch",
        "node ls",
        "topic ls",
        "topic sub a.b",
        "plugin ls",
        "plugin inspect job-tracker",
        "plugin grants job-tracker",
        "plugin log job-tracker",
        "plugin query job-tracker list",
        "plugin history job-tracker",
        "dead ls",
        "dead show 1",
        "ipns get-state policy",
        "ipns resolve policy",
        "events export --to -",
        "job ls --output json",
    ] {
        let mut command = Command::new(PROGRAM);
        command.args(line.split(' ')).env_remove("DIM_API").env("DIM_STATE_DIR", dir.path().join("state"));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let ended = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&ended.stderr), "", "{line}");
        assert_eq!(ended.status.code(), Some(0), "{line}");
    }
    // Nor does it matter that nobody reads standard error.
    let mut command = Command::new(PROGRAM);
    command
        .args(["job", "get", "nothing"])
        .env_remove("DIM_API")
        .env("DIM_STATE_DIR", dir.path().join("state"));
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    (drop(child.stdout.take()), drop(child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(3));
}

#[test]
fn ids_and_topics_are_written_out_before_they_reach_a_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path());
    let ids = ["a\u{202e}b", "\u{200b}", "c\u{2066}d\u{2069}", " blank ", "\u{feff}e\u{61c}"];
    for id in ids {
        host.json(&["job", "update", id, "running", "--data", &json!({ "node_id": id }).to_string()]);
        let beat = json!({ "node_id": id, "status": id, "cached_models": [id] }).to_string();
        host.json(&["topic", "pub", "dim.nodes.heartbeat", &beat]);
    }
    host.json(&["topic", "pub", "dim.jobs.updates", "no\u{1b}[2J \u{202e}event"]);
    soon(|| host.json(&["node", "ls"]).as_array().is_some_and(|nodes| nodes.len() == ids.len()));
    soon(|| host.json(&["dead", "ls"]).as_array().is_some_and(|letters| letters.len() == 1));
    let jobs = text(&host.dim(&["job", "ls"]));
    assert!(jobs.contains("a\\u{202e}b") && jobs.contains("\\u{20}blank\\u{20}"), "{jobs}");
    for args in [
        &["job", "ls"][..],
        &["job", "get", ids[0]],
        &["job", "get", ids[3]],
        &["node", "ls"],
        &["node", "get", ids[2]],
        &["dead", "ls"],
        &["dead", "show", "1"],
    ] {
        let shown = text(&host.dim(args));
        assert!(!steers(&shown), "{args:?}: {shown:?}");
    }
    let refused = host.dim(&["job", "get", "no \u{202e}job"]);
    assert!(!steers(&String::from_utf8_lossy(&refused.stderr)), "{refused:?}");
    // Programs get what was sent.
    let listed = host.json(&["job", "ls"]);
    let listed: Vec<_> =
        listed.as_array().unwrap().iter().map(|job| job["job_id"].as_str().unwrap()).collect();
    assert!(ids.iter().all(|id| listed.contains(id)), "{listed:?}");
}

#[test]
fn a_filter_with_a_value_that_nothing_has_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path());
    host.json(&["topic", "pub", "dim.nodes.heartbeat", "{\"node_id\":\"n1\",\"status\":\"busy\"}"]);
    soon(|| {
        host.json(&["node", "ls", "--status", "online"]) == json!([])
            && host.json(&["node", "ls"]) != json!([])
    });
    for (args, code, names) in [
        (&["job", "ls", "--status", "runing"][..], 2, &["running", "completed"][..]),
        (&["node", "ls", "--status", "onlin"], 5, &["online", "suspect", "dead", "busy"]),
        (&["dead", "ls", "--plugin", "job-traker"], 5, &["job-tracker", "node-registry"]),
        (&["dead", "drop", "--plugin", "job-traker"], 5, &["job-tracker"]),
        (&["dead", "replay", "--plugin", "job-traker"], 5, &["job-tracker"]),
    ] {
        let output = host.dim(args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
        assert!(names.iter().all(|name| error.contains(name)), "{args:?}: {error}");
    }
    assert_eq!(host.json(&["node", "ls", "--status", "busy"])[0]["node_id"], "n1");
    assert_eq!(host.json(&["node", "ls", "--status", "dead"]), json!([]));
    assert_eq!(host.json(&["dead", "ls", "--plugin", "job-tracker"]), json!([]));
    for (path, name) in [
        ("/v1/jobs?status=runing", "running"),
        ("/v1/nodes?status=onlin", "suspect"),
        ("/v1/dead-letters?plugin=nobody", "job-tracker"),
    ] {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--unix-socket"]).arg(host.socket());
        let output = curl.arg(format!("http://dim.localhost{path}")).output().unwrap();
        let problem: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(problem["status"], 400, "{path}: {problem}");
        assert!(problem["detail"].as_str().unwrap().contains(name), "{path}: {problem}");
    }
}

/// A component whose version and description would clear a terminal, hide what follows and turn it around.
fn hostile_component(dir: &Path) -> PathBuf {
    let hostile = "1.0\\u001B[2J\\u001B[8m\\u202E\\r\\u200B";
    let file = dir.join("hostile.wasm");
    std::fs::write(
        &file,
        component::probe_with(hostile, &[("description = \"", "description = \"\\u001B[8m")]),
    )
    .unwrap();
    file
}

/// Runs a command at a terminal of its own, where its question is answered with no; returns what the terminal got.
fn at_a_terminal(command: &mut Command, answer: &str) -> String {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let slave = File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
    let end = || Stdio::from(OwnedFd::from(slave.try_clone().unwrap()));
    let mut child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    drop(slave);
    let mut terminal = File::from(master);
    terminal.write_all(format!("{answer}\n").as_bytes()).unwrap();
    let mut got = Vec::new();
    // A terminal that nobody holds any more gives an error in place of an end.
    let _ = terminal.read_to_end(&mut got);
    child.wait().unwrap();
    String::from_utf8_lossy(&got).into_owned()
}

#[test]
fn a_component_cannot_hide_the_question_whether_it_is_granted_what_it_asks_for() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path());
    let file = hostile_component(dir.path());
    let dim = |args: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.args(args).arg(&file).env_remove("DIM_API").env("DIM_STATE_DIR", dir.path().join("state"));
        command.env("NO_COLOR", "1");
        command
    };
    for args in [&["plugin", "check"][..], &["plugin", "inspect"], &["plugin", "install", "--name", "mine"]] {
        let piped = dim(args).output().unwrap();
        let piped = [piped.stdout, piped.stderr].concat();
        let piped = String::from_utf8_lossy(&piped);
        assert!(piped.contains("1.0\\u{1b}[2J") && !steers(&piped), "{args:?}: {piped:?}");
        // A terminal ends lines with both.
        let drawn = at_a_terminal(&mut dim(args), "no").replace("\r\n", "\n");
        assert!(drawn.contains("1.0\\u{1b}[2J") && !steers(&drawn), "{args:?}: {drawn:?}");
    }
    let asked = at_a_terminal(&mut dim(&["plugin", "install", "--name", "mine"]), "no").replace("\r\n", "\n");
    assert!(asked.contains("mine asks to\n  - ") && asked.contains("Grant it? [y/N] "), "{asked}");
}

#[test]
fn what_a_component_says_is_written_out_wherever_it_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path());
    let file = hostile_component(dir.path());
    let shown = file.to_str().unwrap();
    text(&host.dim(&["plugin", "install", shown, "--name", "mine", "--grant", "--wait"]));
    for args in [
        &["plugin", "ls"][..],
        &["plugin", "history", "mine"],
        &["plugin", "inspect", "mine"],
        &["plugin", "grants", "mine"],
        &["plugin", "verify", shown],
        &["status"],
    ] {
        let output = host.dim(args);
        let drawn = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(!steers(&drawn), "{args:?}: {drawn:?}");
    }
    let other = dir.path().join("other.wasm");
    std::fs::copy(dim_tests::PROBE, &other).unwrap();
    let events = dir.path().join("events");
    text(&host.dim(&["events", "export", "--to", events.to_str().unwrap(), "--plugin", "mine"]));
    let compared = host.dim(&[
        "plugin",
        "compare",
        shown,
        other.to_str().unwrap(),
        "--events",
        events.to_str().unwrap(),
    ]);
    let compared = String::from_utf8_lossy(&[compared.stdout, compared.stderr].concat()).into_owned();
    assert!(compared.contains("1.0\\u{1b}") && !steers(&compared), "{compared:?}");
    let log = host.log();
    assert!(log.contains("1.0\\u{1b}") && !steers(&log), "{log:?}");
}
