//! The program and its API, as an operator and as a program use them.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use dim_tests::{Program, soon};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

fn host(dir: &Path) -> Program {
    let state = dir.join("state");
    std::fs::create_dir_all(&state).unwrap();
    Program::start(Path::new(PROGRAM), &state, &["--embedded"])
}

fn exit_code(output: &Output) -> (i32, String) {
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn jobs_nodes_topics_and_names_go_through_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path());
    let job = host.json(&["job", "update", "render-7", "running", "--data", "{\"node_id\":\"n1\"}"]);
    assert_eq!(job["status"], "running");
    assert_eq!(host.json(&["job", "get", "render-7"])["node_id"], "n1");
    host.json(&["job", "update", "render-7", "completed", "--result", "{\"frames\":12}"]);
    let finished = host.json(&["job", "ls", "--status", "completed"]);
    assert_eq!(finished[0]["result"], json!({ "frames": 12 }));
    assert_eq!(host.json(&["job", "ls", "--status", "running"]), json!([]));

    let nodes = dir.path().join("nodes.json");
    std::fs::write(&nodes, "[{\"node_id\":\"n1\",\"status\":\"online\"}]").unwrap();
    host.json(&["node", "put", nodes.to_str().unwrap()]);
    let beat = dir.path().join("beat.json");
    std::fs::write(
        &beat,
        "{\"node_id\":\"n2\",\"resources\":{\"memory_available\":64},\"cached_models\":[\"m\"]}",
    )
    .unwrap();
    host.json(&["topic", "pub", "dim.nodes.heartbeat", &format!("@{}", beat.display())]);
    soon(|| host.json(&["node", "ls"]).as_array().is_some_and(|nodes| nodes.len() == 2));
    assert_eq!(host.json(&["node", "ls", "--min-memory", "32"])[0]["node_id"], "n2");
    assert_eq!(host.json(&["node", "ls", "--model", "m"])[0]["node_id"], "n2");
    assert_eq!(host.json(&["node", "ls", "--gpu"]), json!([]));
    assert_eq!(host.json(&["node", "get", "n1"])["status"], "online");
    assert_eq!(host.json(&["topic", "ls"]).as_array().unwrap().len(), 4);
    assert_eq!(host.json(&["topic", "peers", "dim.jobs.updates"]), json!([]));

    let file = dir.path().join("policy");
    std::fs::write(&file, "the policy").unwrap();
    let set = host.json(&["ipns", "update-state", "policy", file.to_str().unwrap(), "--lifetime", "2h"]);
    assert_eq!(set["published"], true);
    let name = host.json(&["ipns", "key-id", "policy"])["name"].as_str().unwrap().to_owned();
    assert_eq!(set["name"], name.as_str());
    assert_eq!(host.json(&["ipns", "resolve", &name])["path"], set["path"]);
    let status = host.json(&["status"]);
    let policy = status["names"].as_array().unwrap().iter().find(|row| row["key"] == "policy").unwrap();
    assert_eq!((&policy["document_bytes"], &policy["document_limit"]), (&json!(10), &json!(16 << 20)));
    assert_eq!(host.dim(&["ipns", "get-state", "policy"]).stdout, b"the policy");
    let path = set["path"].as_str().unwrap();
    let again = host.json(&["ipns", "publish", "other", path]);
    assert_eq!(again["path"], path);
    assert_eq!(host.dim(&["ipns", "get-state", "other"]).stdout, b"the policy");
}

/// What no number of a machine holds, and what is lost where one is read and written again.
const FIGURES: &str = r#"{"loss":31.245270191439438,"rate":1e-7,"seed":123456789012345678901234567890,"step":9007199254740991.0}"#;

#[test]
fn what_goes_with_a_job_is_passed_on_to_the_letter() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path());
    let shown = |args: &[&str]| {
        let output = host.dim(&[args, &["--output", "json"]].concat());
        let text = String::from_utf8(output.stdout).unwrap();
        text.split_whitespace().collect::<String>()
    };
    let event = format!("{{\"job_id\":\"heard\",\"event_type\":\"running\",\"data\":{FIGURES}}}");
    host.json(&["topic", "pub", "dim.jobs.updates", &event]);
    assert!(shown(&["job", "update", "told", "completed", "--result", FIGURES]).contains(FIGURES));
    for command in [&["job", "get", "heard"], &["job", "get", "told"]] {
        soon(|| shown(command).contains(FIGURES));
    }
    assert_eq!(shown(&["job", "ls"]).matches(FIGURES).count(), 2);
    soon(|| shown(&["ipns", "get-state", "dim-state-key-jobs"]).matches(FIGURES).count() == 2);
    // The command line neither orders members nor spells numbers and texts its own way.
    let exact = r#"{"e":1E5,"b":1,"a":2,"b":3,"s":"\u00e9\/"}"#;
    host.json(&["job", "update", "exact", "running", "--data", exact]);
    soon(|| shown(&["ipns", "get-state", "dim-state-key-jobs"]).contains(exact));
}

#[test]
fn a_job_that_could_not_be_read_again_is_set_aside_and_costs_nobody_the_list() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path());
    host.json(&["job", "update", "good", "running"]);
    for levels in [65, 126, 100_000] {
        let deep = format!("{}{}", "[".repeat(levels), "]".repeat(levels));
        let event = dir.path().join("event");
        for member in ["data", "result"] {
            let text = format!("{{\"job_id\":\"deep\",\"event_type\":\"running\",\"{member}\":{deep}}}");
            std::fs::write(&event, text).unwrap();
            let sent = host.dim(&["topic", "pub", "dim.jobs.updates", &format!("@{}", event.display())]);
            assert!(sent.status.success() || levels > 60_000, "{sent:?}");
        }
    }
    soon(|| host.json(&["dead", "ls"]).as_array().unwrap().len() == 4);
    let why = host.json(&["dead", "ls"])[0]["reason"].as_str().unwrap().to_owned();
    assert!(why.contains("more than 64 levels"), "{why}");
    // Half of a surrogate pair is no text, and what begins so is another value to readers in Rust.
    for data in [r#""\ud800""#, r#"{"\udc00":1}"#, r#"{"a":[{"$serde_json::private::Number":"xyz"}]}"#] {
        let text = format!("{{\"job_id\":\"deep\",\"event_type\":\"running\",\"data\":{data}}}");
        host.json(&["topic", "pub", "dim.jobs.updates", &text]);
        let body = format!("{{\"event_type\":\"running\",\"data\":{data}}}");
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--unix-socket"]).arg(host.socket()).args(["--json", &body]);
        let answer = curl.arg("http://dim.localhost/v1/jobs/deep/events").output().unwrap();
        let problem: serde_json::Value = serde_json::from_slice(&answer.stdout).unwrap();
        assert_eq!(problem["status"], 400, "{problem}");
        let heartbeat = format!("{{\"node_id\":\"n1\",\"resources\":{{\"cpu_available\":{data}}}}}");
        host.json(&["topic", "pub", "dim.nodes.heartbeat", &heartbeat]);
    }
    soon(|| host.json(&["dead", "ls"]).as_array().unwrap().len() == 7);
    soon(|| host.json(&["node", "ls"]).as_array().unwrap().len() == 1);
    assert_eq!(host.json(&["job", "ls"]).as_array().unwrap().len(), 1);
    let told = host.dim(&["job", "update", "deep", "running", "--data", &"[".repeat(200)]);
    assert_eq!(told.status.code(), Some(2), "{told:?}");
}

#[test]
fn nothing_but_a_regular_file_is_replaced_by_force() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path());
    let (pipe, link, secret) = (dir.path().join("pipe"), dir.path().join("link"), dir.path().join("secret"));
    std::fs::write(&secret, "a long passphrase").unwrap();
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    std::os::unix::fs::symlink(dir.path().join("nowhere"), &link).unwrap();
    for there in [&pipe, &link] {
        let there = there.to_str().unwrap();
        let secret = secret.to_str().unwrap();
        for args in [
            &["backup", there, "--force", "--passphrase-file", secret][..],
            &["events", "export", "--to", there, "--force"],
        ] {
            let (code, error) = exit_code(&host.dim(args));
            assert!(code != 0 && error.contains("not a regular file"), "{args:?}: {error}");
        }
    }
    assert!(!pipe.is_file() && link.is_symlink());
}

#[test]
fn an_empty_variable_counts_as_unset_and_a_word_that_is_no_level_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path());
    let dim = |name: &str, value: &str, args: &[&str]| {
        Command::new(PROGRAM).args(args).env(name, value).output().unwrap()
    };
    let state = dir.path().join("state");
    let status = ["status", "--state-dir", state.to_str().unwrap()];
    for name in ["DIM_TOKEN", "DIM_TOKEN_FILE", "DIM_API", "DIM_CONFIG", "DIM_AGENT_DIR", "DIM_LOG"] {
        let output = dim(name, "", &status);
        assert!(output.status.success(), "{name}: {output:?}");
    }
    for (filter, named) in
        [("nonsense", "\"nonsense\" is no level"), ("dim=debug,wran", "\"wran\" is no level")]
    {
        let second = dir.path().join("second");
        let output = dim("DIM_LOG", filter, &["run", "--embedded", "--state-dir", second.to_str().unwrap()]);
        let (code, error) = exit_code(&output);
        assert!(code != 0 && error.contains(named), "{error}");
    }
    drop(host);
}

#[test]
fn plugins_and_dead_letters_go_through_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path());
    let plugins = host.json(&["plugin", "ls"]);
    assert_eq!(plugins.as_array().unwrap().len(), 3);
    assert_eq!(host.json(&["plugin", "inspect", "job-tracker"])["name"], "job-tracker");
    let file = host.json(&["plugin", "inspect", dim_tests::PROBE]);
    assert_eq!((file["name"].as_str(), file["version"].as_str()), (Some("probe"), Some("0.1.0")));
    assert_eq!(file["licenses"], "Apache-2.0");
    let listed = host.json(&["plugin", "query", "job-tracker", "list"]);
    assert_eq!(listed, json!([]));
    let body = "{\"job_id\":\"a\",\"event_type\":\"queued\"}";
    assert_eq!(host.json(&["plugin", "command", "job-tracker", "update", body])["status"], "queued");

    host.json(&["topic", "pub", "dim.jobs.updates", "no job event"]);
    soon(|| host.json(&["dead", "ls"]).as_array().is_some_and(|letters| letters.len() == 1));
    let letter = host.json(&["dead", "ls", "--plugin", "job-tracker"])[0].clone();
    let id = letter["id"].to_string();
    assert_eq!(host.json(&["dead", "show", &id])["event"]["data"], "no job event");
    host.json(&["dead", "replay", &id]);
    soon(|| {
        let letters = host.json(&["dead", "ls"]);
        letters.as_array().is_some_and(|all| all.len() == 1 && all[0]["id"] != letter["id"])
    });
    let again = host.json(&["dead", "ls"])[0]["id"].to_string();
    host.json(&["dead", "drop", &again]);
    assert_eq!(host.json(&["dead", "ls"]), json!([]));
}

#[test]
fn exit_codes_tell_what_went_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path());
    let (code, error) = exit_code(&host.dim(&["job", "get", "nothing"]));
    assert_eq!((code, error.as_str()), (3, "error: not found: nothing\n"));
    assert_eq!(exit_code(&host.dim(&["dead", "show", "77"])).0, 3);
    assert_eq!(exit_code(&host.dim(&["plugin", "query", "nobody", "list"])).0, 3);
    assert_eq!(exit_code(&host.dim(&["job", "update", "a", "exploded"])).0, 5);
    host.json(&["job", "update", "a", "completed"]);
    let (code, error) = exit_code(&host.dim(&["job", "update", "a", "running"]));
    assert_eq!(code, 5);
    assert!(error.contains("completed"), "{error}");
    assert_eq!(exit_code(&host.dim(&["job", "update", "a"])).0, 2);
    assert_eq!(exit_code(&host.dim(&["job", "update", "a", "running", "--data", "{"])).0, 2);
    let second = Command::new(PROGRAM)
        .args(["run", "--embedded", "--state-dir"])
        .arg(dir.path().join("state"))
        .output();
    let (code, error) = exit_code(&second.unwrap());
    assert_eq!(code, 1);
    assert!(error.contains("is in use by dim"), "{error}");
    let nowhere =
        Command::new(PROGRAM).args(["status", "--state-dir"]).arg(dir.path()).env_remove("DIM_API").output();
    let (code, error) = exit_code(&nowhere.unwrap());
    assert_eq!(code, 4);
    assert!(error.contains("Is a host running?"), "{error}");
}

#[test]
fn ids_mean_what_they_say_or_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path());
    host.json(&["job", "update", "ab", "running"]);
    // A URL drops control characters without a word.
    for args in [["job", "rm", "a\tb"], ["job", "get", "a\nb"], ["job", "get", ""], ["node", "get", ".."]] {
        assert_eq!(exit_code(&host.dim(&args)).0, 5, "{args:?}");
    }
    assert_eq!(host.json(&["job", "get", "ab"])["status"], "running");
    for id in ["watch", "a/b", "ü %2F?#", "..."] {
        host.json(&["job", "update", id, "queued"]);
        assert_eq!(host.json(&["job", "get", id])["job_id"], id);
        host.json(&["job", "rm", id]);
        assert_eq!(exit_code(&host.dim(&["job", "get", id])).0, 3, "{id}");
    }
    let (code, error) = exit_code(&host.dim(&["job", "get", &"x".repeat(3_000)]));
    assert_eq!((code, error.contains("1 to 128 bytes")), (5, true), "{error}");
    let nowhere = Command::new(PROGRAM).args(["status", "--api", "bogus"]).output().unwrap();
    assert_eq!(exit_code(&nowhere).0, 2);
    let nowhere = Command::new(PROGRAM).args(["run", "--kubo", "bogus"]).output().unwrap();
    assert_eq!(exit_code(&nowhere).0, 2);
    for number in 0..5 {
        host.json(&["job", "update", &format!("j{number}"), "queued"]);
    }
    let ids = |args: &[&str]| -> Vec<String> {
        let jobs = host.json(args);
        jobs.as_array().unwrap().iter().map(|job| job["job_id"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(ids(&["job", "ls"]), ["ab", "j0", "j1", "j2", "j3", "j4"]);
    assert_eq!(ids(&["job", "ls", "--after", "j0", "--limit", "3"]), ["j1", "j2", "j3"]);
}

#[test]
fn a_topic_and_the_jobs_can_be_watched() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path());
    let watch = |args: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.args(args).args(["--output", "json", "--state-dir"]).arg(dir.path().join("state"));
        command.env_remove("DIM_API").stdout(Stdio::piped());
        command.spawn().expect("it can be started")
    };
    let (mut messages, mut jobs) = (watch(&["topic", "sub", "probe.any"]), watch(&["job", "watch"]));
    soon(|| {
        host.json(&["topic", "ls"]).as_array().unwrap().iter().any(|topic| topic["topic"] == "probe.any")
    });
    // Written until it is seen: there is no sign that the stream of jobs is open.
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (message, job) = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut number = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                number += 1;
                host.json(&["topic", "pub", "probe.any", "{\"to\":\"whoever listens\"}"]);
                host.json(&["job", "update", &format!("j{number}"), "running"]);
            }
        });
        let first = |child: &mut std::process::Child| {
            let mut line = String::new();
            BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
            serde_json::from_str::<Value>(&line).expect("a line of JSON")
        };
        let seen = (first(&mut messages), first(&mut jobs));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        seen
    });
    for mut child in [messages, jobs] {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert_eq!(message["data"], "{\"to\":\"whoever listens\"}");
    assert_eq!(message["origin"], "host");
    assert_eq!(job["status"], "running");
}

#[test]
fn a_message_comes_from_standard_input_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path());
    let mut command = Command::new(PROGRAM);
    command.args(["topic", "pub", "dim.jobs.updates", "-", "--state-dir"]).arg(dir.path().join("state"));
    let mut child = command.env_remove("DIM_API").stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"\xff\0binary").unwrap();
    assert!(child.wait().unwrap().success());
    soon(|| host.json(&["dead", "ls"]).as_array().is_some_and(|letters| letters.len() == 1));
    assert_eq!(host.json(&["dead", "ls"])[0]["event"]["bytes"], 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_of_the_api_are_problem_details() {
    let dir = tempfile::tempdir().unwrap();
    let host = tokio::task::block_in_place(|| host(dir.path()));
    dim_client::install_tls();
    let http = reqwest::Client::builder().unix_socket(host.socket().as_path()).no_proxy().build().unwrap();
    for (path, status, kind) in [
        ("/v1/nothing", 404, "not-found"),
        ("/v1/jobs/nothing", 404, "not-found"),
        ("/v1/plugins/Bad_Name", 400, "invalid"),
        ("/v1/plugins/nobody", 404, "no-plugin"),
        ("/v1/names/x%2Fy", 400, "invalid"),
        ("/v1/jobs?typo=1", 400, "invalid"),
        ("/v1/dead-letters/x", 400, "invalid"),
    ] {
        let response = http.get(format!("http://dim{path}")).send().await.unwrap();
        assert_eq!(response.status(), status, "{path}");
        assert_eq!(response.headers()["content-type"], "application/problem+json", "{path}");
        let problem: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
        assert_eq!((&problem["type"], &problem["status"]), (&json!(kind), &json!(status)), "{path}");
    }
    let wrong = http.post("http://dim/v1/jobs/a/events").body("{").send().await.unwrap();
    assert_eq!(wrong.headers()["content-type"], "application/problem+json");
    let health = http.get("http://dim/healthz").send().await.unwrap();
    assert_eq!((health.status().as_u16(), health.text().await.unwrap().as_str()), (200, "ok\n"));
    let metrics = http.get("http://dim/metrics").send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("dim_plugin_handled_total{plugin=\"job-tracker\"}"), "{metrics}");
    assert!(metrics.ends_with("# EOF\n"), "{metrics}");
    let large = vec![b'x'; (60 << 10) + 1];
    let refused = http.post("http://dim/v1/topics/t/messages").body(large).send().await.unwrap();
    assert_eq!(refused.status(), 413);
}

#[test]
fn the_demonstration_shows_a_death_and_a_return() {
    let mut command = Command::new(PROGRAM);
    command.args(["run", "--demo", "5"]).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut wanted = vec!["node-1 is dead", "job-1 is marked", "node-1 is recovered"].into_iter();
    let mut next = wanted.next();
    for line in lines.map_while(Result::ok).take(60) {
        if next.is_some_and(|text| line.contains(text)) {
            next = wanted.next();
        }
        if next.is_none() {
            break;
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(next, None, "the demonstration does not come to it");
}

#[test]
fn a_demonstration_compiles_nothing_because_the_build_has() {
    let cache = tempfile::tempdir().unwrap();
    let log_of = |number: u32| {
        let log = cache.path().join(format!("{number}.log"));
        let mut command = Command::new(PROGRAM);
        command.args(["run", "--demo", "1"]).env("XDG_CACHE_HOME", cache.path());
        command.stdout(Stdio::piped()).stderr(std::fs::File::create(&log).unwrap());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        assert!(lines.any(|line| line.contains("1 simulated nodes")), "its plugins are loaded");
        child.kill().unwrap();
        child.wait().unwrap();
        std::fs::read_to_string(log).unwrap()
    };
    assert_eq!(log_of(1), "", "the first start");
    assert_eq!(log_of(2), "", "the second");
    let compiled = cache.path().join("dim/compiled");
    let forms = std::fs::read_dir(compiled).into_iter().flatten().flatten().map(|file| file.path());
    assert!(
        !forms.into_iter().any(|file| file.extension().is_some_and(|it| it == "cwasm")),
        "nothing is kept"
    );
}

/// A host whose daemon is not there, with something to send.
fn with_something_to_send(dir: &Path) -> Program {
    let state = dir.join("state");
    std::fs::create_dir_all(&state).unwrap();
    let host = Program::start(Path::new(PROGRAM), &state, &["--kubo", "/ip4/127.0.0.1/tcp/9"]);
    host.json(&["topic", "pub", "fleet.talk", "one"]);
    host.json(&["topic", "pub", "fleet.talk", "two"]);
    host
}

#[test]
fn a_host_that_is_told_to_end_says_what_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let host = with_something_to_send(dir.path());
    let (log, begun) = (dir.path().join("state.log"), std::time::Instant::now());
    host.interrupt();
    assert!(host.wait().success());
    assert!(begun.elapsed() > Duration::from_secs(4), "it has a grace");
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains("not sent before the shutdown") && log.contains("publishes=2"), "{log}");
}

#[test]
fn a_second_signal_ends_a_host_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let host = with_something_to_send(dir.path());
    let begun = std::time::Instant::now();
    host.interrupt();
    soon(|| host.log().contains("shutting down"));
    // What comes within a second of the first is the same request.
    host.interrupt();
    soon(|| begun.elapsed() > Duration::from_millis(1_500));
    host.interrupt();
    assert_eq!(host.wait().code(), Some(1));
    assert!(begun.elapsed() < Duration::from_secs(4), "it does not wait for the grace");
    // Nothing is lost by it.
    let state = dir.path().join("state");
    let host = Program::start(Path::new(PROGRAM), &state, &["--kubo", "/ip4/127.0.0.1/tcp/9"]);
    assert_eq!(host.json(&["status"])["outbox"]["waiting"], 2);
}
