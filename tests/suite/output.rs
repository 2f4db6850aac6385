//! What the program writes for people: nothing from outside steers a terminal, and a reader may go at any time.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
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
    drop(child.stdout.take());
    drop(child.stderr.take());
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
        (&["node", "ls", "--status", "onlin"], 5, &["did you mean \"online\"?", "suspect", "dead"]),
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
    // What a node may call itself is asked for before one does.
    assert_eq!(host.json(&["node", "ls", "--status", "draining"]), json!([]));
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
    let _host = host(dir.path());
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
    host.json(&["topic", "pub", "probe.in", "hello"]);
    text(&host.dim(&["events", "export", "--to", events.to_str().unwrap()]));
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
    let says = json!({ "script": [{ "do": "log", "line": "said \u{202e}\u{1b}[8m" }] }).to_string();
    host.json(&["plugin", "command", "mine", "run", &says]);
    soon(|| host.log().contains("said "));
    let log = host.log();
    assert!(log.contains("1.0\\u{1b}") && !steers(&log), "{log:?}");
}

/// The lines that a command writes to a pipe, until `is_enough`.
fn lines_until(command: &mut Command, mut is_enough: impl FnMut(&[String]) -> bool) -> Vec<String> {
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let (mut lines, mut out) = (Vec::new(), BufReader::new(child.stdout.take().unwrap()).lines());
    while !is_enough(&lines) {
        lines.push(out.next().expect("it goes on").unwrap());
    }
    drop(out);
    assert!(child.wait().unwrap().success(), "it ends when nobody reads it any more");
    lines
}

/// A command against the host of a directory.
fn dim(dir: &Path, line: &str) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(line.split(' ')).env_remove("DIM_API").env("DIM_STATE_DIR", dir.join("state"));
    command.env_remove("NO_COLOR").env("TERM", "xterm");
    command
}

#[test]
fn jobs_that_are_watched_stand_below_a_head_and_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path());
    let stop = std::sync::atomic::AtomicBool::new(false);
    let lines = std::thread::scope(|scope| {
        // There is no sign that the stream is open.
        scope.spawn(|| {
            for id in ["a", "a-longer-id", "b"].iter().cycle() {
                for event in ["running", "completed"] {
                    host.dim(&["job", "update", id, event, "--data", "{\"node_id\":\"n1\"}"]);
                }
                host.dim(&["job", "rm", id]);
                if stop.load(std::sync::atomic::Ordering::Relaxed) {
                    break;
                }
            }
        });
        let lines = lines_until(&mut dim(dir.path(), "job watch"), |lines| lines.len() > 4);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        lines
    });
    let at = lines[0].find("NODE").unwrap();
    assert!(lines[0].starts_with("TIME                  STATUS"), "{lines:?}");
    for line in &lines[1..] {
        assert_eq!(line.find("n1"), Some(at), "{lines:?}");
        assert!(line.as_bytes()[19] == b'Z' && !line.contains('.'), "a time to the second: {lines:?}");
    }
}

#[test]
fn a_list_that_is_watched_is_shown_again_each_second() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path());
    host.json(&["job", "update", "j1", "running"]);
    for list in ["job ls", "node ls", "plugin ls", "topic ls", "dead ls"] {
        let mut command = dim(dir.path(), &format!("{list} --watch"));
        let heads = |lines: &[String]| lines.iter().filter(|line| **line == lines[0]).count();
        let lines = lines_until(&mut command, |lines| heads(lines) > 1);
        assert!(lines.iter().all(|line| !line.contains('\u{1b}')), "{list}: {lines:?}");
    }
    let json = lines_until(&mut dim(dir.path(), "job ls --watch --output json"), |lines| lines.len() > 1);
    for line in json {
        let jobs: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(jobs[0]["job_id"], "j1");
    }
}

#[test]
fn colour_is_for_terminals_and_for_those_who_ask() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path());
    host.json(&["job", "update", "j1", "running"]);
    let piped = |line: &str| text(&dim(dir.path(), line).output().unwrap());
    let drawn = |command: &mut Command| at_a_terminal(command, "");
    let green = "\u{1b}[32mrunning\u{1b}[0m";
    assert!(!piped("job ls").contains('\u{1b}'));
    assert!(piped("job ls --color always").contains(green));
    assert!(drawn(&mut dim(dir.path(), "job ls")).contains(green));
    assert!(!drawn(&mut dim(dir.path(), "job ls --color never")).contains('\u{1b}'));
    assert!(!drawn(dim(dir.path(), "job ls").env("NO_COLOR", "1")).contains('\u{1b}'));
    assert!(!piped("job ls --color always --output json").contains('\u{1b}'));
    let wrong = dim(dir.path(), "job get nothing --color always").output().unwrap();
    assert!(String::from_utf8_lossy(&wrong.stderr).starts_with("\u{1b}[31merror: \u{1b}[0m"), "{wrong:?}");
}

#[test]
fn what_every_command_understands_stands_apart_in_its_help() {
    let help = text(&Command::new(PROGRAM).args(["job", "ls", "--help"]).output().unwrap());
    let (own, global) = help.split_once("Global options:").expect("a heading");
    for option in ["--status", "--node", "--after", "--limit", "--watch"] {
        assert!(own.contains(option) && !global.contains(option), "{option}: {help}");
    }
    for option in ["--output", "--color", "--api", "--token-file", "--state-dir"] {
        assert!(global.contains(option) && !own.contains(option), "{option}: {help}");
    }
}

#[test]
fn since_means_the_same_to_the_command_line_and_to_the_api() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path());
    host.json(&["topic", "pub", "dim.jobs.updates", "no job event"]);
    soon(|| host.json(&["dead", "ls"]).as_array().is_some_and(|letters| letters.len() == 1));
    let asked = |since: &str| {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--get", "--unix-socket"]).arg(host.socket());
        curl.args(["--data-urlencode", &format!("since={since}"), "http://dim.localhost/v1/dead-letters"]);
        serde_json::from_slice::<serde_json::Value>(&curl.output().unwrap().stdout).unwrap()
    };
    let later = (jiff::Timestamp::now().as_second() + 3_600).to_string();
    for (since, count) in [
        ("2026-01-31T12:00:00Z", 1),
        ("2026-01-31T12:00:00+01:00", 1),
        ("10m", 1),
        ("1d", 1),
        ("1700000000", 1),
        (later.as_str(), 0),
        ("2200-01-01T00:00:00Z", 0),
    ] {
        assert_eq!(asked(since).as_array().map(Vec::len), Some(count), "{since}");
        let listed = host.json(&["dead", "ls", "--since", since]);
        assert_eq!(listed.as_array().map(Vec::len), Some(count), "{since}");
    }
    for since in ["yesterday", "-1h", "2026-01-31"] {
        assert_eq!(asked(since)["status"], 400, "{since}");
        assert_eq!(host.dim(&["dead", "ls", &format!("--since={since}")]).status.code(), Some(2), "{since}");
    }
}

#[test]
fn sizes_and_times_are_short_for_people_and_exact_for_programs() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path());
    host.json(&["job", "update", "j1", "running"]);
    host.json(&["topic", "pub", "dim.nodes.heartbeat", "{\"node_id\":\"n1\"}"]);
    host.json(&["topic", "pub", "dim.jobs.updates", "no job event"]);
    soon(|| host.json(&["dead", "ls"]) != json!([]) && host.json(&["node", "ls"]) != json!([]));
    let nanoseconds = |text: &str| {
        text.split_whitespace().any(|word| word.starts_with("20") && word.contains('T') && word.contains('.'))
    };
    for (line, words) in [
        ("status", &["MiB", "now), in "][..]),
        ("job ls", &["now"]),
        ("node ls", &["now"]),
        ("dead ls", &["now"]),
        ("plugin inspect job-tracker", &["KiB"]),
    ] {
        let shown = text(&host.dim(&line.split(' ').collect::<Vec<_>>()));
        let has_words =
            words.iter().all(|word| shown.contains(word) || shown.contains(&word.replace("now", "s ago")));
        assert!(has_words && !nanoseconds(&shown), "{line}: {shown}");
    }
    assert!(host.json(&["plugin", "inspect", "job-tracker"])["size"].is_u64());
    assert!(host.json(&["dead", "ls"])[0]["time"].as_str().unwrap().len() > 24);
    // The other half of a filter of the API.
    assert_eq!(host.json(&["node", "ls", "--gpu=false"])[0]["node_id"], "n1");
    assert_eq!(host.json(&["node", "ls", "--gpu"]), json!([]));
}
