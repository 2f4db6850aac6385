//! Owns the compilation of components in a separate process with limits on CPU time and memory. The compiler is
//! large, its input is untrusted, and the cost of a compilation is unknown in advance.

use std::io::{self, Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Resource, Rlimit, setrlimit};
use wasmtime::InstanceAllocationStrategy;

use crate::compile_settings::config;
use crate::engine::EngineError;

/// The subcommand of the program that compiles.
pub const SUBCOMMAND: &str = "compile-component";

/// The increase of the compiler's niceness over that of the host.
const NICER: i32 = 5;

/// The limits of one compilation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allotment {
    /// CPU time of all threads together, in seconds.
    pub seconds: u64,
    /// Memory in bytes.
    pub memory: u64,
}

/// The place where components are compiled.
#[derive(Clone, Debug)]
pub enum Compiler {
    /// In this process, without limits, for a host within another program.
    Here,
    /// In a separate process.
    Apart {
        /// A program with the subcommand [`SUBCOMMAND`].
        program: PathBuf,
        /// The limits of the process.
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

    /// The reason why a compiler process failed.
    fn why(self, status: ExitStatus, said: &str) -> EngineError {
        // As Linux, macOS and the BSDs number it.
        const SIGXCPU: i32 = 24;
        match status.signal() {
            Some(SIGXCPU) => EngineError::TooMuch(format!(
                "compiling it takes more than {} s of CPU time (limits.compile-time)",
                self.seconds
            )),
            Some(_) if said.contains("memory allocation") => EngineError::TooMuch(format!(
                "compiling it takes more than {} bytes of memory (limits.compile-memory)",
                self.memory
            )),
            Some(signal) => EngineError::Compiler(format!("it ended by signal {signal}: {said}")),
            // The message contains the failed step first, and then the cause.
            None => {
                let why =
                    said.rsplit("Caused by:").next().unwrap_or(said).split_whitespace().collect::<Vec<_>>();
                EngineError::Compile(wasmtime::Error::msg(why.join(" ")))
            }
        }
    }

    /// Applies the limits to this process.
    fn hold(self) -> io::Result<()> {
        // Callers that wait for an answer of the host have priority.
        rustix::process::nice(NICER)?;
        let limit = |most: u64| Rlimit { current: Some(most), maximum: Some(most) };
        // The soft limit sends the signal that shows the cause; the hard limit sends another one.
        setrlimit(Resource::Cpu, Rlimit { current: Some(self.seconds), maximum: Some(self.seconds + 5) })?;
        setrlimit(Resource::Data, limit(self.memory))?;
        setrlimit(Resource::Core, limit(0))?;
        // The result has no reader once the host has ended.
        #[cfg(target_os = "linux")]
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        Ok(())
    }
}

/// The end of a compiler process.
struct Ended {
    status: ExitStatus,
    compiled: Vec<u8>,
    said: String,
}

/// Sends the component to a compiler process and waits for its output.
fn fed(mut child: Child, component: &[u8]) -> io::Result<Ended> {
    let stdin = child.stdin.take();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            // A write error is ignored: a process that ends early reports the cause itself.
            if let Some(mut stdin) = stdin {
                let _ = stdin.write_all(component);
            }
        });
        child.wait_with_output()
    })?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Ok(Ended { status: output.status, compiled: output.stdout, said })
}

/// Runs the work of the compiler process: compiles the component on standard input within the limits, and
/// writes the compiled form to standard output.
pub fn compile_apart(may: Allotment) -> Result<(), EngineError> {
    let broken = |error: io::Error| EngineError::Compiler(error.to_string());
    may.hold().map_err(broken)?;
    let mut component = Vec::new();
    io::stdin().lock().read_to_end(&mut component).map_err(broken)?;
    // No instance runs here, so no memory is reserved for a pool.
    let config = config(InstanceAllocationStrategy::OnDemand);
    let engine = wasmtime::Engine::new(&config).map_err(EngineError::Engine)?;
    let compiled = engine.precompile_component(&component).map_err(EngineError::Compile)?;
    io::stdout().lock().write_all(&compiled).map_err(broken)
}
