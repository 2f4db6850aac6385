//! A process that ends with the test, however the test ends.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

/// A running process; it is killed and waited for with the value.
pub struct Owned(Child);

impl Owned {
    /// Starts a process.
    pub fn spawn(command: &mut Command) -> Self {
        Self(command.spawn().unwrap_or_else(|error| panic!("{command:?} cannot be started: {error}")))
    }

    /// Starts a process whose output goes to the end of a log file.
    pub fn spawn_logging(command: &mut Command, log: &Path) -> Self {
        let log = File::options().create(true).append(true).open(log).expect("a log file");
        command.stdin(Stdio::null());
        Self::spawn(command.stdout(log.try_clone().expect("a log file")).stderr(log))
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        self.0.try_wait().expect("a child can be asked").is_some()
    }

    /// Stops it as Ctrl-Z does, until it is let go on.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets a stopped one go on.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// Asks it to end, as Ctrl-C does.
    pub fn interrupt(&self) {
        self.signal(Signal::INT);
    }

    /// Waits until it has ended; returns how.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        self.0.wait().expect("a child can be waited for")
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).expect("a child can be signalled");
    }

    /// Kills it, as `kill -9` does.
    pub fn kill(&mut self) {
        // One that has ended already is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.kill();
    }
}
