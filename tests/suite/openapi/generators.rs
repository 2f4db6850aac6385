//! The description as others read it: two programs find nothing wrong with it, and two others make clients of it in which
//! no operation is missing.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use dim_tests::{Setup, SupervisedHost, TOKEN, javascript, python};
use serde_json::json;
use tempfile::TempDir;

use super::{described, printed};

/// The programs in Python.
const PYTHON: &[&str] = &["openapi-spec-validator==0.9.0", "openapi-python-client==0.29.1"];

/// The programs in JavaScript.
fn javascript() -> Option<PathBuf> {
    let package = json!({ "private": true, "dependencies": {
        "@hey-api/openapi-ts": "0.95.0",
        "@redocly/cli": "2.77.0",
        "typescript": "5.9.3",
    } });
    Some(javascript::directory("openapi-javascript", &package.to_string())?.join("node_modules/.bin"))
}

fn python() -> Option<PathBuf> {
    python::environment("openapi-python", PYTHON)
}

/// A directory with the description in it, as `openapi.json`.
fn with_description() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("openapi.json"), printed()).unwrap();
    dir
}

/// Runs a program of `programs` in `dir`, with those beside it on its path.
fn run(programs: &Path, program: &str, args: &[&str], dir: &TempDir) -> Output {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(programs.join(program));
    command.args(args).current_dir(dir.path()).env("PATH", format!("{}:{path}", programs.display()));
    // What it asks of the network is no part of the test.
    command.env("REDOCLY_TELEMETRY", "off").env("REDOCLY_SUPPRESS_UPDATE_NOTICE", "true");
    command.output().unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// What a program says that goes well.
fn said(programs: &Path, program: &str, args: &[&str], dir: &TempDir) -> String {
    let output = run(programs, program, args, dir);
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {said}");
    said
}

#[test]
fn openapi_spec_validator_finds_the_description_valid() {
    let Some(programs) = python() else { return };
    said(&programs, "openapi-spec-validator", &["openapi.json"], &with_description());
}

#[test]
fn redocly_finds_the_description_valid() {
    let Some(programs) = javascript() else { return };
    // Operations that take nothing have no answer of their own for what is wrong with a request.
    let args = ["lint", "--max-problems=1000", "--skip-rule=operation-4xx-response", "openapi.json"];
    let said = said(&programs, "redocly", &args, &with_description());
    assert!(!said.contains("Warning was generated"), "{said}");
}

#[test]
fn openapi_typescript_generates_every_operation() {
    let Some(programs) = javascript() else { return };
    let dir = with_description();
    said(&programs, "openapi-ts", &["-i", "openapi.json", "-o", "client"], &dir);
    let sdk = std::fs::read_to_string(dir.path().join("client/sdk.gen.ts")).unwrap();
    for operation in described().operations() {
        let call = format!("export const {} = <", camel_case(&operation.id));
        assert!(sdk.contains(&call), "{} is missing", operation.id);
    }
    let types = std::fs::read_to_string(dir.path().join("client/types.gen.ts")).unwrap();
    for body in ["PublishMessageData", "UpdateStateData", "InstallPluginData"] {
        let declared = types.split_once(&format!("export type {body} = {{")).unwrap().1;
        let members = declared.split_once("\n};").unwrap().0;
        assert!(members.contains("\n    body: Blob | File;"), "{body}");
    }
    let strict = ["--noEmit", "--strict", "--skipLibCheck", "--target", "es2022", "--module", "esnext"];
    let more = ["--moduleResolution", "bundler", "--lib", "es2022,dom,dom.iterable", "client/index.ts"];
    said(&programs, "tsc", &[&strict[..], &more].concat(), &dir);
}

fn camel_case(id: &str) -> String {
    let mut words = id.split('_');
    let first = words.next().unwrap_or_default().to_owned();
    words.fold(first, |name, word| format!("{name}{}{}", word[..1].to_uppercase(), &word[1..]))
}

/// The client in Python, as the package `client` in the directory.
fn client_in_python(programs: &Path) -> (TempDir, String) {
    let dir = with_description();
    let args = ["generate", "--path", "openapi.json", "--meta", "none", "--output-path", "client"];
    let said = said(programs, "openapi-python-client", &args, &dir);
    (dir, said)
}

#[test]
fn openapi_python_client_generates_every_operation() {
    let Some(programs) = python() else { return };
    let (dir, said) = client_in_python(&programs);
    assert!(!said.contains("will not be generated"), "{said}");
    // It knows no other type of an answer than JSON, text and bytes; the calls are there and give the bytes.
    let warnings: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("WARNING parsing ")).collect();
    assert_eq!(warnings, ["GET /metrics within host.", "GET /v1/events within host."], "{said}");
    for operation in described().operations() {
        let tag = operation.value["tags"][0].as_str().unwrap().replace(' ', "_");
        let file = dir.path().join(format!("client/api/{tag}/{}.py", operation.id));
        assert!(file.is_file(), "{} is missing", operation.id);
    }
}

/// Sends bytes that are no text to each operation that takes bytes.
const CALLS: &str = r#"
import io, sys
from client import AuthenticatedClient
from client.api.names import get_state, update_state
from client.api.plugins import install_plugin
from client.api.topics import publish_message
from client.types import File

address, token, component = sys.argv[1:]
dim = AuthenticatedClient(base_url=address, token=token, raise_on_unexpected_status=True)
data = bytes(range(256))
file = lambda data: File(payload=io.BytesIO(data))
assert publish_message.sync_detailed("fleet.talk", client=dim, body=file(data)).status_code == 202
stored = update_state.sync_detailed("policy", client=dim, body=file(data))
assert stored.status_code == 200, stored
assert get_state.sync_detailed("policy", client=dim).content == data
change = install_plugin.sync("forgetful", client=dim, body=file(open(component, "rb").read()), grant=True)
assert change.state == "installed", change
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_generated_client_sends_bytes_as_they_are() {
    let Some(programs) = python() else { return };
    let host = SupervisedHost::start(&Setup::default()).await;
    let address = host.serve().await;
    tokio::task::block_in_place(|| {
        let (dir, _) = client_in_python(&programs);
        said(&programs, "python", &["-c", CALLS, &address, TOKEN, dim_tests::FORGETFUL], &dir);
    });
    host.stop().await;
}
