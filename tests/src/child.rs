//! A child process that ends with the test, also when the test fails.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

/// A running process, which is killed and reaped on drop.
pub struct Owned(Child);

impl Owned {
    /// Starts a process.
    pub fn spawn(command: &mut Command) -> Self {
        Self(command.spawn().unwrap_or_else(|error| panic!("{command:?} cannot be started: {error}")))
    }

    /// Starts a process whose output is appended to a log file.
    pub fn spawn_logging(command: &mut Command, log: &Path) -> Self {
        let log = File::options().create(true).append(true).open(log).expect("a log file");
        command.stdin(Stdio::null());
        Self::spawn(command.stdout(log.try_clone().expect("a log file")).stderr(log))
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Returns whether the process has ended.
    pub fn has_ended(&mut self) -> bool {
        self.0.try_wait().expect("a child can be asked").is_some()
    }

    /// Suspends the process, as Ctrl-Z does, until [`thaw`](Self::thaw).
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Resumes the suspended process.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// Interrupts the process with SIGINT, as Ctrl-C does.
    pub fn interrupt(&self) {
        self.signal(Signal::INT);
    }

    /// Waits for the end of the process and returns its exit status.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        self.0.wait().expect("a child can be waited for")
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).expect("a child can be signalled");
    }

    /// Kills the process with SIGKILL.
    pub fn kill(&mut self) {
        // The error means that the process has already ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.kill();
    }
}
