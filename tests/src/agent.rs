//! Runs the agent of a node as a separate process, which a test can kill.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::child::Owned;

/// The exit code of a command that cannot reach the agent.
const UNREACHABLE: i32 = 4;

/// A running `dim agent`, which is killed on drop.
pub struct Agent {
    child: Owned,
    dir: PathBuf,
    program: PathBuf,
}

impl Agent {
    /// Starts `dim agent` for the node `n1` with more arguments. Returns when its socket answers.
    pub fn start(program: &Path, dir: &Path, args: &[&str]) -> Self {
        Self::start_by(program, dir, args, 1)
    }

    /// Does the same; on the agent's clock `rate` seconds pass in a second.
    pub fn start_by(program: &Path, dir: &Path, args: &[&str], rate: u32) -> Self {
        let mut command = Command::new(program);
        command.env("DIM_TEST_CLOCK_RATE", rate.to_string());
        command.args(["agent", "--node-id", "n1", "--agent-dir"]).arg(dir).args(args);
        command.env_remove("DIM_API");
        let child = Owned::spawn_logging(&mut command, &dir.with_extension("log"));
        let mut agent = Self { child, dir: dir.to_owned(), program: program.to_owned() };
        let deadline = Instant::now() + Duration::from_secs(30);
        // Any other exit code means that the agent answers, even if it reports problems.
        while agent.dim(&["status"]).status.code() == Some(UNREACHABLE) {
            assert!(!agent.child.has_ended(), "the agent ended: {}", agent.log());
            assert!(Instant::now() < deadline, "the agent does not answer: {}", agent.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        agent
    }

    /// Runs `dim agent` with a subcommand.
    pub fn dim(&self, args: &[&str]) -> Output {
        Command::new(&self.program)
            .arg("agent")
            .args(args)
            .arg("--agent-dir")
            .arg(&self.dir)
            .env("RUST_BACKTRACE", "0")
            .output()
            .expect("dim can be run")
    }

    /// Runs a subcommand that must succeed, and returns the JSON that it prints.
    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        let output = self.dim(&[args, &["--output", "json"]].concat());
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "dim agent {}: {error}", args.join(" "));
        serde_json::from_slice(&output.stdout).expect("JSON was asked for")
    }

    /// Returns the path of its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join(dim_agent::SOCKET)
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Kills the process with SIGKILL.
    pub fn kill(mut self) {
        self.child.kill();
    }

    /// Interrupts the process with SIGINT, waits for its end, and returns its log.
    pub fn interrupt(mut self) -> String {
        self.child.interrupt();
        self.child.wait();
        self.log()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.with_extension("log")).unwrap_or_default()
    }
}
