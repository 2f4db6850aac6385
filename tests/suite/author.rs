//! What an author does, as the program does it: a plugin is made, built, judged, tried and installed, in each language.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use dim_tests::{Program, javascript, python};
use serde_json::{Value, json};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

/// An author of plugins in one language.
struct Author {
    language: &'static str,
    dir: TempDir,
    /// Set for each command.
    env: Vec<(&'static str, String)>,
    /// The file with the logic, and a line of it before and after it is broken.
    source: &'static str,
    broken: (&'static str, &'static str),
    /// Two more of it that the language allows and the host cannot serve.
    waiting: Option<(&'static str, &'static str)>,
    /// A mistake in it, if its interpreter has exceptions.
    mistake: Option<Mistake>,
}

/// A mistake that shows for one node alone, and at a start with one value of the config.
struct Mistake {
    /// A line before and after it is made.
    line: (&'static str, &'static str),
    /// What is added to the file.
    function: &'static str,
    /// Which line of that throws, counted from 1.
    throws: usize,
    /// What the exception says.
    says: &'static str,
    /// The function that throws it.
    name: &'static str,
}

impl Author {
    fn dim(&self, args: &[&str]) -> Output {
        let mut command = Command::new(PROGRAM);
        command.args(args).current_dir(self.dir.path());
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command.output().unwrap()
    }

    /// What a command writes that goes well.
    fn does(&self, args: &[&str]) -> String {
        let output = self.dim(args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {}{said}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.does(&[args, &["--output", "json"]].concat())).unwrap()
    }

    fn name(&self, template: &str) -> String {
        format!("{template}-{}", self.language)
    }

    /// Each template builds, and its scenarios are well, whatever comes between the entries.
    fn makes_what_builds(&self) {
        for template in ["empty", "jobs", "heartbeats"] {
            let name = self.name(template);
            let made = self.json(&["plugin", "new", &name, "--lang", self.language, "--template", template]);
            assert!(made["next"].as_str().unwrap().contains("dim plugin test"), "{made}");
            if let Some(mistake) = self.mistake.as_ref().filter(|_| template == "heartbeats") {
                self.makes(mistake);
            }
            let tested = self.json(&["plugin", "test", &name, "--junit", "results.xml"]);
            assert_eq!(tested["failed"], 0, "{tested}");
            let first = &tested["scenarios"][0];
            assert!(
                first["crashes"].as_u64().unwrap() > 0 && first["replacements"] == first["crashes"],
                "{first}"
            );
            let xml = std::fs::read_to_string(self.dir.path().join("results.xml")).unwrap();
            assert!(
                xml.contains(&format!("<testsuite name=\"{name}\"")) && !xml.contains("<failure"),
                "{xml}"
            );
            let again = self.dim(&["plugin", "new", &name]);
            assert!(String::from_utf8_lossy(&again.stderr).contains("already exists and is not empty"));
        }
    }

    fn source(&self) -> PathBuf {
        self.dir.path().join(self.name("heartbeats")).join(self.source)
    }

    fn makes(&self, mistake: &Mistake) {
        let (right, wrong) = mistake.line;
        let text = std::fs::read_to_string(self.source()).unwrap();
        assert_eq!(text.matches(right).count(), 1, "{text}");
        std::fs::write(self.source(), text.replace(right, wrong) + mistake.function).unwrap();
    }

    /// An exception is told in the author's words, with the line of the author's code.
    fn is_told_of(&self, mistake: &Mistake, host: &Program) {
        assert!(host.dim(&["topic", "pub", "dim.nodes.heartbeat", r#"{"node_id":"bad"}"#]).status.success());
        dim_tests::soon(|| host.json(&["dead", "ls"]).as_array().is_some_and(|letters| !letters.is_empty()));
        let place = self.place(mistake);
        let reason = format!("{} {place}", mistake.says);
        let listed = String::from_utf8(host.dim(&["dead", "ls"]).stdout).unwrap();
        assert!(listed.lines().any(|row| row.ends_with(&reason)), "{reason}: {listed}");
        let id = host.json(&["dead", "ls"])[0]["id"].to_string();
        let shown = String::from_utf8(host.dim(&["dead", "show", &id]).stdout).unwrap();
        let stack: Vec<&str> = (shown.lines())
            .skip_while(|line| !line.starts_with("stack "))
            .take_while(|line| !line.starts_with("log "))
            .map(|line| line.trim_start_matches("stack").trim())
            .collect();
        assert_eq!(stack[0], format!("{} {place}", mistake.name), "{shown}");
        assert!(stack[1].starts_with(&format!("handle ({}:", self.source)), "{shown}");
        assert!(!shown.contains("wasm trap"), "{shown}");
    }

    /// Where a mistake throws.
    fn place(&self, mistake: &Mistake) -> String {
        let text = std::fs::read_to_string(self.source()).unwrap();
        let before = text.lines().count() - mistake.function.lines().count();
        format!("({}:{})", self.source, before + mistake.throws)
    }

    /// An exception at a start is told in the same way.
    fn is_told_of_a_start(&self, mistake: &Mistake) {
        let name = self.name("heartbeats");
        let given = json!({ "given": { "config": { "silent_after_seconds": 13 } }, "steps": [] });
        std::fs::write(self.dir.path().join("start.yaml"), given.to_string()).unwrap();
        let component = format!("{name}/{name}.wasm");
        let tested = self.dim(&["plugin", "test", &component, "--scenario", "start.yaml"]);
        let said = [tested.stdout, tested.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let reason = format!("{} {}", mistake.says, self.place(mistake));
        assert!(!tested.status.success() && said.contains(&reason), "{reason}: {said}");
    }

    /// The same source is the same component, in whichever directory.
    fn builds_the_same_twice(&self) {
        let build = |dir: &str| {
            self.does(&[
                "plugin",
                "new",
                "same",
                "--lang",
                self.language,
                "--template",
                "empty",
                "--dir",
                dir,
            ]);
            // Nothing that was built before.
            let target = self.dir.path().join(dir).join("target").display().to_string();
            let mut command = Command::new(PROGRAM);
            command.args(["plugin", "build", &format!("{dir}/same"), "--output", "json"]);
            let output =
                command.current_dir(self.dir.path()).env("CARGO_TARGET_DIR", target).output().unwrap();
            serde_json::from_slice::<Value>(&output.stdout).unwrap()
        };
        let (one, other) = (build("one"), build("elsewhere/other"));
        assert!(one["asks"].as_array().unwrap().contains(&json!("subscribe to hello")), "{one}");
        assert_eq!(one["digest"], other["digest"]);
    }

    /// What was built from the same source by the same tool is taken as it is, and is compiled once for all commands.
    fn is_not_built_again(&self) {
        let name = self.name("heartbeats");
        let component = self.dir.path().join(&name).join(format!("{name}.wasm"));
        let written = || std::fs::metadata(&component).unwrap().modified().unwrap();
        let before = written();
        let tested = self.json(&["plugin", "test", &name]);
        assert_eq!(tested["failed"], 0, "{tested}");
        let built = self.dim(&["plugin", "build", &name]);
        let said = String::from_utf8_lossy(&built.stderr).into_owned();
        assert!(built.status.success() && said.contains("is up to date"), "{said}");
        assert_eq!(written(), before, "nothing is built");
        let checked = self.dim(&["plugin", "check", component.to_str().unwrap()]);
        let said = String::from_utf8_lossy(&checked.stderr).into_owned();
        assert!(checked.status.success() && !said.contains("compiling"), "{said}");
    }

    /// What was built is fit, and runs in a host.
    fn installs(&self) {
        let name = self.name("heartbeats");
        let component = format!("{name}/{name}.wasm");
        let checked = self.json(&["plugin", "check", &component]);
        assert_eq!((&checked["fit"], &checked["name"]), (&json!(true), &json!(name)), "{checked}");
        let host = Program::start(Path::new(PROGRAM), &self.dir.path().join("state"), &["--embedded"]);
        let file = self.dir.path().join(&component);
        host.json(&["plugin", "install", file.to_str().unwrap(), "--grant"]);
        assert!(host.dim(&["topic", "pub", "dim.nodes.heartbeat", r#"{"node_id":"n1"}"#]).status.success());
        dim_tests::soon(|| host.json(&["plugin", "query", &name, "counts"]) == json!({ "n1": 1 }));
        let forgotten = host.json(&["plugin", "command", &name, "forget", r#"{"node_id":"n1"}"#]);
        assert_eq!(forgotten, json!({ "node_id": "n1", "count": 1 }));
        let nobody = host.dim(&["plugin", "command", &name, "forget", r#"{"node_id":"n1"}"#]);
        assert_eq!(nobody.status.code(), Some(3));
        if let Some(mistake) = &self.mistake {
            self.is_told_of(mistake, &host);
            self.is_told_of_a_start(mistake);
        }
    }

    /// What no author thinks of is set aside at once: nothing traps.
    fn endures_whatever_comes(&self) {
        let name = self.name("heartbeats");
        let scenario = self.dir.path().join("hostile.yaml");
        let deep = "[".repeat(50_000);
        let texts = [r#"{"node_id":"\ud800"}"#, r#"{"node_id":NaN}"#, r#"{"node_id":1}"#, "null", "", &deep];
        let mut steps = "steps:\n".to_owned();
        let datas = texts.map(|text| json!({ "$text": text })).into_iter();
        for data in datas.chain([json!({ "$base64": "/w==" }), json!({ "$base64": "77u/e30=" })]) {
            let dead = json!([{ "attempts": 1, "reason": "the message cannot be read" }]);
            let step = json!({ "message": "dim.nodes.heartbeat", "data": data, "include": { "dead": dead } });
            steps += &format!("- {step}\n");
        }
        // What comes on a reliable topic.
        let member = json!({
            "message": "dim.nodes.heartbeat", "from": "member alice", "data": { "node_id": "n9" },
            "include": { "state": { "count/n9": 1 } },
        });
        let missing = json!({ "missing": "dim.nodes.heartbeat", "from": "member alice", "count": 3 });
        steps += &format!("- {member}\n- {missing}\n");
        std::fs::write(&scenario, steps).unwrap();
        let component = format!("{name}/{name}.wasm");
        self.does(&["plugin", "test", &component, "--scenario", "hostile.yaml"]);
    }

    /// What a scenario says once a text in the source is another one.
    fn says_with(&self, (right, wrong): (&str, &str)) -> String {
        let (name, source) = (self.name("heartbeats"), self.source());
        let text = std::fs::read_to_string(&source).unwrap();
        assert_eq!(text.matches(right).count(), 1, "{text}");
        std::fs::write(&source, text.replace(right, wrong)).unwrap();
        let tested = self.dim(&["plugin", "test", &name, "--only", "counts"]);
        let said = String::from_utf8_lossy(&tested.stdout).into_owned();
        assert_eq!(tested.status.code(), Some(1), "{said}");
        std::fs::write(&source, text).unwrap();
        said
    }

    /// With one line of its logic broken, the scenario says so; and a call that would wait is none.
    fn is_caught(&self) {
        let said = self.says_with(self.broken);
        for line in
            ["FAILED counts", "step 1 (line 5), message dim.nodes.heartbeat:", "state.count/n1", "- 1", "+ 2"]
        {
            assert!(said.contains(line), "{line}: {said}");
        }
        if let Some(waiting) = self.waiting {
            let said = self.says_with(waiting);
            assert!(said.contains("a call never waits: `handle` must not be async"), "{said}");
        }
    }

    fn all(&self) {
        self.makes_what_builds();
        if self.language != "rust" {
            self.is_not_built_again();
        }
        self.installs();
        self.endures_whatever_comes();
        self.is_caught();
    }
}

fn rust_author() -> Author {
    Author {
        language: "rust",
        dir: tempfile::tempdir().unwrap(),
        // What is built for the tests already need not be built again.
        env: vec![("CARGO_TARGET_DIR", dim_tests::data("../target/dev-test").display().to_string())],
        source: "src/lib.rs",
        broken: ("COUNTS.add(&node_id, 1)? == 1", "COUNTS.add(&node_id, 2)? == 2"),
        waiting: None,
        mistake: None,
    }
}

#[test]
fn a_plugin_in_rust_is_made_built_tried_and_installed() {
    rust_author().all();
}

#[test]
#[ignore = "exhaustive tier: builds a plugin and its crates twice from nothing"]
fn the_same_source_in_rust_is_the_same_component_in_any_directory() {
    rust_author().builds_the_same_twice();
}

#[test]
#[ignore = "exhaustive tier: builds the same plugin in Python many times"]
fn a_plugin_in_python_is_made_built_tried_and_installed() {
    let Some(tool) = python::tool() else { return };
    let path = std::env::var("PATH").unwrap_or_default();
    let path = tool.parent().map_or(path.clone(), |dir| format!("{}:{path}", dir.display()));
    let author = Author {
        language: "python",
        dir: tempfile::tempdir().unwrap(),
        env: vec![("PATH", path)],
        source: "plugin.py",
        broken: ("counts.get(node_id, 0) + 1", "counts.get(node_id, 0) + 2"),
        waiting: Some(("def handle(event):", "async def handle(event):")),
        mistake: Some(Mistake {
            line: (
                "counts.get(node_id, 0) + 1",
                "number_of(node_id) if node_id == 'bad' else counts.get(node_id, 0) + 1",
            ),
            function: "\n\ndef number_of(node_id):\n    return int(node_id)\n\n\n\
                def start(config, from_state_version):\n    if config['silent_after_seconds'] == 13:\n        \
                number_of('bad')\n",
            throws: 4,
            says: "ValueError: invalid literal for int() with base 10: 'bad'",
            name: "number_of",
        }),
    };
    author.all();
    let missing = Command::new(PROGRAM)
        .args(["plugin", "build"])
        .arg(author.dir.path().join("empty-python"))
        .env("PATH", "/nowhere")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert!(said.contains("python3 -m venv .venv && .venv/bin/pip install componentize-py=="), "{said}");
}

#[test]
#[ignore = "exhaustive tier: builds the same plugin in JavaScript many times"]
fn a_plugin_in_javascript_is_made_built_tried_and_installed() {
    let Some(place) = javascript::place() else { return };
    let author = Author {
        language: "javascript",
        dir: tempfile::tempdir_in(place).unwrap(),
        env: Vec::new(),
        source: "plugin.js",
        broken: ("?? 0) + 1", "?? 0) + 2"),
        waiting: Some(("export function handle", "export async function handle")),
        mistake: Some(Mistake {
            line: (
                "(counts.get(node_id) ?? 0) + 1",
                "node_id === 'bad' ? numberOf(node_id) : (counts.get(node_id) ?? 0) + 1",
            ),
            function: "\nfunction numberOf(nodeId) {\n  throw new RangeError('no number: ' + nodeId);\n}\n\n\
                export function start(config) {\n  if (config.silent_after_seconds === 13) numberOf('bad');\n}\n",
            throws: 3,
            says: "RangeError: no number: bad",
            name: "numberOf",
        }),
    };
    author.all();
    let elsewhere = tempfile::tempdir().unwrap();
    let lonely = elsewhere.path().to_str().unwrap();
    author.does(&["plugin", "new", "lonely", "--lang", "javascript", "--dir", lonely]);
    let missing = author.dim(&["plugin", "build", &format!("{lonely}/lonely")]);
    assert!(String::from_utf8_lossy(&missing.stderr).contains("run `npm install`"));
}

/// A plugin whose scenario says nothing yet, and how an author has it say what happens.
#[test]
fn what_happens_is_written_into_a_scenario_and_then_expected() {
    let dir = tempfile::tempdir().unwrap();
    let scenario = dir.path().join("new.yaml");
    std::fs::write(&scenario, "# Mine.\nsteps:\n- message: forgetful.in\n  data: 7\n\n- query: count\n")
        .unwrap();
    let run = |more: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.args(["plugin", "test", dim_tests::FORGETFUL, "--scenario"]).arg(&scenario).args(more);
        command.output().unwrap()
    };
    // It keeps its count in memory alone, so what comes between would show.
    let plain = ["--no-crash", "--no-replace"];
    let blessed = run(&[&plain[..], &["--bless"]].concat());
    assert!(blessed.status.success(), "{}", String::from_utf8_lossy(&blessed.stderr));
    let text = std::fs::read_to_string(&scenario).unwrap();
    assert_eq!(
        text,
        "# Mine.\nsteps:\n- message: forgetful.in\n  data: 7\n\n- query: count\n  expect:\n    reply: 1\n"
    );
    // One that cannot be written to does not keep the others from being run.
    let unwritable = dir.path().join("braces.yaml");
    std::fs::write(&unwritable, "steps: [{ query: count }]\n").unwrap();
    let (file, junit) = (unwritable.to_str().unwrap(), dir.path().join("junit.xml"));
    let both = [&plain[..], &["--bless", "--scenario", file, "--junit", junit.to_str().unwrap()]].concat();
    let refused = run(&both);
    let said = String::from_utf8_lossy(&refused.stdout).into_owned();
    assert!(said.contains("1 of 2 scenarios are well") && said.contains("on a line of its own"), "{said}");
    let xml = std::fs::read_to_string(&junit).unwrap();
    assert!(xml.contains("<failure message=\"") && xml.contains("to bless a scenario"), "{xml}");
    let caught = run(&[]);
    let said = String::from_utf8_lossy(&caught.stdout).into_owned();
    assert!(!caught.status.success() && said.contains("after a crash and a restart"), "{said}");
    let other = run(&["--only", "other"]);
    assert!(String::from_utf8_lossy(&other.stderr).contains("there are no scenarios"));
}

#[test]
fn a_component_that_is_not_fit_is_told_why() {
    let dir = tempfile::tempdir().unwrap();
    let check = |name: &str, bytes: &[u8]| -> (Option<i32>, Value) {
        let file: PathBuf = dir.path().join(name);
        std::fs::write(&file, bytes).unwrap();
        let mut command = Command::new(PROGRAM);
        let output = command.args(["plugin", "check", "--output", "json"]).arg(&file).output().unwrap();
        (output.status.code(), serde_json::from_slice(&output.stdout).unwrap())
    };
    let refused = |name: &str, bytes: &[u8], why: &str| {
        let (code, found) = check(name, bytes);
        assert_eq!(code, Some(5), "{found}");
        assert!(found["fit"] == false && found["refused"].to_string().contains(why), "{why}: {found}");
    };
    let probe = std::fs::read(dim_tests::PROBE).unwrap();
    let (code, fit) = check("probe.wasm", &probe);
    assert_eq!((code, &fit["fit"], &fit["may_wait"]), (Some(0), &json!(true), &json!(true)), "{fit}");
    assert!(
        fit["waits"].as_str().unwrap().contains("subscribe-duration of wasi:clocks/monotonic-clock"),
        "{fit}"
    );
    let still = std::fs::read(dim_tests::FORGETFUL).unwrap();
    assert_eq!(check("still.wasm", &still).1["may_wait"], false);
    refused("text.wasm", b"hello", "not WebAssembly");
    refused("module.wasm", b"\0asm\x01\0\0\0", "core module");
    refused("cut.wasm", &probe[..probe.len() / 2], "damaged");
    let manifest = |text: &str| dim_tests::component::with_manifest(&probe, text);
    refused("bad.wasm", &manifest("name = 3"), "cannot be read");
    let greedy = "name = \"g\"\nversion = \"1.0.0\"\n[limits]\nmemory = 100000000000\n";
    refused("greedy.wasm", &manifest(greedy), "over the ceiling");
    let other = dim_tests::component::with_manifest(
        &wat::parse_str("(component (import \"dim:coordination/states@0.1.0\" (instance)))").unwrap(),
        "name = \"o\"\nversion = \"1.0.0\"\n",
    );
    refused("imports.wasm", &other, "the most similar is dim:coordination/state@0.2.0");
    let empty = dim_tests::component::with_manifest(
        &wat::parse_str("(component)").unwrap(),
        "name = \"e\"\nversion = \"1.0.0\"\n",
    );
    refused("empty.wasm", &empty, "does not fit the world");
}

#[test]
fn who_watches_sees_each_change_of_a_scenario_run() {
    let dir = tempfile::tempdir().unwrap();
    let (scenario, output) = (dir.path().join("it.yaml"), dir.path().join("output"));
    let write = |count: u32| {
        let text = format!(
            "steps:\n- message: forgetful.in\n  data: 7\n- query: count\n  expect: {{ reply: {count} }}\n"
        );
        std::fs::write(&scenario, text).unwrap();
    };
    write(1);
    let file = std::fs::File::create(&output).unwrap();
    let mut command = Command::new(PROGRAM);
    command.args([
        "plugin",
        "test",
        dim_tests::FORGETFUL,
        "--watch",
        "--no-crash",
        "--no-replace",
        "--scenario",
    ]);
    command.arg(&scenario).stdout(file.try_clone().unwrap()).stderr(file);
    let mut child = command.spawn().unwrap();
    let shows = |what: &str| dim_tests::soon(|| std::fs::read_to_string(&output).unwrap().contains(what));
    shows("1 of 1 scenarios are well");
    write(2);
    shows("FAILED it");
    shows("error: 1 of 1 scenarios failed");
    write(1);
    dim_tests::soon(|| {
        std::fs::read_to_string(&output).unwrap().matches("1 of 1 scenarios are well").count() == 2
    });
    child.kill().unwrap();
    child.wait().unwrap();
}
