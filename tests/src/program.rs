//! Runs a host as a separate process, which a test can kill.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::child::Owned;

/// A running `dim run`, which is killed on drop.
pub struct Program {
    child: Owned,
    state_dir: PathBuf,
    program: PathBuf,
}

/// Starts a request on the socket of a host and returns the connection. The caller writes the body of `length` bytes
/// and reads the response.
pub fn begin_request(socket: &Path, line: &str, length: usize) -> UnixStream {
    let mut stream = UnixStream::connect(socket).expect("the host's socket");
    let head = format!("{line} HTTP/1.1\r\nhost: dim\r\ncontent-length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).expect("the host listens");
    stream
}

impl Program {
    /// Starts `dim run` with more arguments. Returns when its API answers.
    pub fn start(program: &Path, state_dir: &Path, args: &[&str]) -> Self {
        crate::host::warm(state_dir);
        let mut command = Command::new(program);
        command.args(["run", "--state-dir"]).arg(state_dir).args(args);
        // Tests do not share compiled components unless they request it.
        command.env_remove("DIM_API").env("XDG_CACHE_HOME", state_dir.with_extension("cache"));
        let child = Owned::spawn_logging(&mut command, &state_dir.with_extension("log"));
        let mut host = Self { child, state_dir: state_dir.to_owned(), program: program.to_owned() };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !host.has_loaded() {
            assert!(!host.child.has_ended(), "dim ended: {}", host.log());
            assert!(Instant::now() < deadline, "dim does not answer: {}", host.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        host
    }

    /// Returns whether the API answers and all plugins are compiled.
    fn has_loaded(&self) -> bool {
        let is_loaded = |plugin: &serde_json::Value| plugin["state"] != "loading";
        let plugins = self.get("/v1/plugins");
        plugins.is_some_and(|plugins| plugins.as_array().is_some_and(|all| all.iter().all(is_loaded)))
    }

    /// Returns the JSON at a path of the API, without the cost of a process; `None` if the host does not answer, or not
    /// with success.
    pub fn get(&self, path: &str) -> Option<serde_json::Value> {
        self.call("GET", path, "")
    }

    /// Returns the answer of a plugin to a query.
    pub fn query(&self, plugin: &str, method: &str, body: &str) -> serde_json::Value {
        let answer = self.call("POST", &format!("/v1/plugins/{plugin}/queries/{method}"), body);
        answer.unwrap_or_else(|| panic!("{plugin} does not answer {method} {body}"))
    }

    fn call(&self, method: &str, path: &str, body: &str) -> Option<serde_json::Value> {
        let mut stream = UnixStream::connect(self.socket()).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(30))).ok()?;
        // A response in HTTP/1.0 ends with the connection.
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.0\r\nhost: dim\r\naccept: application/json\r\ncontent-length: {length}"
        );
        write!(stream, "{head}\r\ncontent-type: application/json\r\n\r\n{body}").ok()?;
        let mut response = String::new();
        stream.read_to_string(&mut response).ok()?;
        let (head, body) = response.split_once("\r\n\r\n")?;
        let is_success = head.split(' ').nth(1).is_some_and(|status| status == "200");
        is_success.then(|| serde_json::from_str(body).ok()).flatten()
    }

    /// Runs a `dim` command against this host.
    pub fn dim(&self, args: &[&str]) -> Output {
        Command::new(&self.program)
            .args(args)
            .arg("--state-dir")
            .arg(&self.state_dir)
            .env_remove("DIM_API")
            .env("RUST_BACKTRACE", "0")
            .output()
            .expect("dim can be run")
    }

    /// Runs a command that must succeed, and returns the JSON that it prints.
    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        let output = self.dim(&[args, &["--output", "json"]].concat());
        let error = String::from_utf8_lossy(&output.stderr);
        // `dim status` of an unhealthy host prints the status and exits with 1.
        let is_told = args == ["status"] && output.status.code() == Some(1) && !output.stdout.is_empty();
        assert!(output.status.success() || is_told, "dim {}: {error}", args.join(" "));
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// Returns the path of the API's socket.
    pub fn socket(&self) -> PathBuf {
        self.state_dir.join(dim_client::SOCKET)
    }

    /// Returns the URL of the API on loopback. Panics if the host does not listen there.
    pub fn url(&self) -> String {
        let log = self.log();
        let at = log.rfind("http://127.0.0.1:").expect("it listens on loopback");
        log[at..].split_whitespace().next().expect("an address").to_owned()
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Returns the metrics.
    pub fn metrics(&self) -> String {
        let output = Command::new("curl")
            .args(["--silent", "--fail", "--unix-socket"])
            .arg(self.socket())
            .arg("http://dim.localhost/metrics")
            .output()
            .expect("curl can be run");
        assert!(output.status.success(), "the host has counts");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Interrupts the process with SIGINT, as Ctrl-C does.
    pub fn interrupt(&self) {
        self.child.interrupt();
    }

    /// Waits for the end of the process and returns its exit status.
    pub fn wait(mut self) -> std::process::ExitStatus {
        self.child.wait()
    }

    /// Suspends the process, as Ctrl-Z does, until [`thaw`](Self::thaw).
    pub fn freeze(&self) {
        self.child.freeze();
    }

    /// Resumes the suspended process.
    pub fn thaw(&self) {
        self.child.thaw();
    }

    /// Kills the process with SIGKILL.
    pub fn kill(mut self) {
        self.child.kill();
    }

    /// Returns the log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.state_dir.with_extension("log")).unwrap_or_default()
    }
}
