//! Owns how a component is compiled: in a process of its own, which has so much CPU time and memory. The compiler is
//! large, what it is given comes from anyone, and what it takes to compile it nobody knows before.

use std::io::{self, Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Resource, Rlimit, setrlimit};
use wasmtime::InstanceAllocationStrategy;

use super::engine::{EngineError, config};

/// The subcommand of the program that compiles.
pub const SUBCOMMAND: &str = "compile-component";

/// By how much the niceness of a compiler is above that of the host.
const NICER: i32 = 5;

/// How much compiling one component may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allotment {
    /// Seconds of CPU time, of all threads together.
    pub seconds: u64,
    /// Bytes of memory.
    pub memory: u64,
}

/// What compiles components.
#[derive(Clone, Debug)]
pub enum Compiler {
    /// This process, for a host within another program: nothing limits it.
    Here,
    /// A process of its own.
    Apart {
        /// A program that understands [`SUBCOMMAND`].
        program: PathBuf,
        /// What it may take.
        may: Allotment,
    },
}

impl Compiler {
    /// Compiles a component. Takes seconds for a large one.
    pub fn compile(&self, engine: &wasmtime::Engine, component: &[u8]) -> Result<Vec<u8>, EngineError> {
        match self {
            Self::Here => engine.precompile_component(component).map_err(EngineError::Compile),
            Self::Apart { program, may } => {
                let broken =
                    |error: io::Error| EngineError::Compiler(format!("{}: {error}", program.display()));
                let ended = may.begin(program).and_then(|child| fed(child, component)).map_err(broken)?;
                let Ended { status, compiled, said } = ended;
                if status.success() { Ok(compiled) } else { Err(may.why(status, &said)) }
            }
        }
    }
}

impl Allotment {
    fn begin(self, program: &PathBuf) -> io::Result<Child> {
        let mut command = Command::new(program);
        command.arg(SUBCOMMAND).arg(self.seconds.to_string()).arg(self.memory.to_string());
        command.env_clear().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
    }

    /// Why a compiler ended badly.
    fn why(self, status: ExitStatus, said: &str) -> EngineError {
        // As Linux, macOS and the BSDs number them.
        const SIGXCPU: i32 = 24;
        match status.signal() {
            Some(SIGXCPU) => EngineError::TooMuch(format!(
                "compiling it takes more than {} s of CPU time (limits.compile-seconds)",
                self.seconds
            )),
            Some(_) if said.contains("memory allocation") => EngineError::TooMuch(format!(
                "compiling it takes more than {} bytes of memory (limits.compile-memory)",
                self.memory
            )),
            Some(signal) => EngineError::Compiler(format!("it ended by signal {signal}: {said}")),
            // It says what it was at and then why.
            None => {
                let why =
                    said.rsplit("Caused by:").next().unwrap_or(said).split_whitespace().collect::<Vec<_>>();
                EngineError::Compile(wasmtime::Error::msg(why.join(" ")))
            }
        }
    }

    /// Holds this process to it.
    fn hold(self) -> io::Result<()> {
        // Whoever waits for an answer of the host goes first.
        rustix::process::nice(NICER)?;
        let limit = |most: u64| Rlimit { current: Some(most), maximum: Some(most) };
        // After the soft limit comes the signal that says why; after the hard one another.
        setrlimit(Resource::Cpu, Rlimit { current: Some(self.seconds), maximum: Some(self.seconds + 5) })?;
        setrlimit(Resource::Data, limit(self.memory))?;
        setrlimit(Resource::Core, limit(0))?;
        // Nobody waits for it once the host is gone.
        #[cfg(target_os = "linux")]
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        Ok(())
    }
}

/// How a compiler ended.
struct Ended {
    status: ExitStatus,
    compiled: Vec<u8>,
    said: String,
}

/// Gives a compiler its work and waits for what it makes of it.
fn fed(mut child: Child, component: &[u8]) -> io::Result<Ended> {
    let stdin = child.stdin.take();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            // One that ends before it has read all says why.
            if let Some(mut stdin) = stdin {
                let _ = stdin.write_all(component);
            }
        });
        child.wait_with_output()
    })?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Ok(Ended { status: output.status, compiled: output.stdout, said })
}

/// The work of the process: compiles the component on standard input, with so much CPU time and memory at most, and
/// writes the compiled form to standard output.
pub fn compile_apart(may: Allotment) -> Result<(), EngineError> {
    let broken = |error: io::Error| EngineError::Compiler(error.to_string());
    may.hold().map_err(broken)?;
    let mut component = Vec::new();
    io::stdin().lock().read_to_end(&mut component).map_err(broken)?;
    // No memory is reserved, for no instance runs here.
    let config = config(InstanceAllocationStrategy::OnDemand);
    let engine = wasmtime::Engine::new(&config).map_err(EngineError::Engine)?;
    let compiled = engine.precompile_component(&component).map_err(EngineError::Compile)?;
    io::stdout().lock().write_all(&compiled).map_err(broken)
}
