//! A host as a program of its own, which can be killed.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::child::Owned;

/// A running `dim run`; it is killed with the value.
pub struct Program {
    child: Owned,
    state_dir: PathBuf,
    program: PathBuf,
}

/// Begins a request at the socket of a host, whose body has `length` bytes and comes after it. What goes over
/// the connection is read and written as it comes.
pub fn begin_request(socket: &Path, line: &str, length: usize) -> UnixStream {
    let mut stream = UnixStream::connect(socket).expect("the host's socket");
    let head = format!("{line} HTTP/1.1\r\nhost: dim\r\ncontent-length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).expect("the host listens");
    stream
}

impl Program {
    /// Starts `dim run` with more arguments; returns once its API answers.
    pub fn start(program: &Path, state_dir: &Path, args: &[&str]) -> Self {
        crate::host::warm(state_dir);
        let mut command = Command::new(program);
        command.args(["run", "--state-dir"]).arg(state_dir).args(args);
        // What one test compiles is not what another one finds, unless it says so.
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

    /// Whether it answers and compiles no plugin any more.
    fn has_loaded(&self) -> bool {
        let listed = self.dim(&["plugin", "ls", "--output", "json"]);
        let plugins: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap_or_default();
        let is_loaded = |plugin: &serde_json::Value| plugin["state"] != "loading";
        listed.status.success() && plugins.as_array().is_some_and(|all| all.iter().all(is_loaded))
    }

    /// Runs a command against this host.
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

    /// Runs a command that must go well; returns the JSON that it prints.
    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        let output = self.dim(&[args, &["--output", "json"]].concat());
        let error = String::from_utf8_lossy(&output.stderr);
        // The status of a host that is not well is told all the same, with 1.
        let is_told = args == ["status"] && output.status.code() == Some(1) && !output.stdout.is_empty();
        assert!(output.status.success() || is_told, "dim {}: {error}", args.join(" "));
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// The socket of its API.
    pub fn socket(&self) -> PathBuf {
        self.state_dir.join(dim_client::SOCKET)
    }

    /// Where its API is on loopback, if it was told to listen there.
    pub fn url(&self) -> String {
        let log = self.log();
        let at = log.rfind("http://127.0.0.1:").expect("it listens on loopback");
        log[at..].split_whitespace().next().expect("an address").to_owned()
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Its counts for Prometheus.
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

    /// Asks it to end, as Ctrl-C does.
    pub fn interrupt(&self) {
        self.child.interrupt();
    }

    /// Waits until it has ended; returns how.
    pub fn wait(mut self) -> std::process::ExitStatus {
        self.child.wait()
    }

    /// Stops it as Ctrl-Z does, until it is let go on.
    pub fn freeze(&self) {
        self.child.freeze();
    }

    /// Lets a stopped one go on.
    pub fn thaw(&self) {
        self.child.thaw();
    }

    /// Kills it, as `kill -9` does.
    pub fn kill(mut self) {
        self.child.kill();
    }

    /// What it has written to its log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.state_dir.with_extension("log")).unwrap_or_default()
    }
}
