//! Owns one instance of a plugin in its wasmtime store: the calls, their deadlines and the limit on
//! memory. After a trap an instance is dead and only its session lives on.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use sha2::{Digest as _, Sha256};
use thiserror::Error;
use wasmtime::component::ResourceTable;
use wasmtime::{ResourceLimiter, UpdateDeadline, WasmBacktrace};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

use super::bindings;
use super::engine::{Engine, Prepared};
use super::exception;
use super::limits::Limits;
use super::session::{Answer, Mode, Refusal, Session};
use super::wasi::{self, Console, EntryRandom, Numbers, Surroundings};
use crate::escape::escaped;
use crate::ident::PluginName;
use crate::store::StoreError;

/// Resources of WASI that an instance may hold: streams and the like, which lie in the host's memory.
const RESOURCES: usize = 1_000;

/// The limit on instances of all plugins together.
pub const INSTANCES: &str = "instances";

/// How wasmtime says that more went over the border than its fuel allows.
const TOO_MUCH_AT_ONCE: &str = "fuel allocated for hostcalls";

/// Why a call did not come to its end.
#[derive(Debug, Error)]
pub enum CallError {
    /// The guest trapped or met a limit.
    #[error("{}", .0.reason)]
    Trap(Trap),
    /// The guest met the limit on CPU time or on memory. Where that strikes depends on the machine, or
    /// on how long the instance has lived.
    #[error("{}", .0.reason)]
    Limit(Trap),
    /// The host failed; the guest is not to blame.
    #[error(transparent)]
    Host(#[from] StoreError),
}

/// Why a call trapped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trap {
    /// In words.
    pub reason: String,
    /// Where: the guest's functions, innermost first, by the names of its name sections.
    pub stack: Vec<String>,
    /// The limit that was met, if one was.
    pub limit: Option<&'static str>,
}

impl Trap {
    /// One that no call of the guest brought about just now.
    pub fn of_reason(reason: String) -> Self {
        Self { reason, ..Self::default() }
    }
}

/// Most functions of a stack that are told, and most bytes of the name of one.
const STACK: (usize, usize) = (32, 256);

/// What wasmtime keeps for a guest.
pub struct Guest {
    wasi: WasiCtx,
    table: ResourceTable,
    session: Session,
    memory: MemoryLimit,
    deadline: Deadline,
    /// A fault of the host during the call, which trapped it.
    fault: Option<StoreError>,
    /// Calls of host functions that the call has left.
    calls_left: u64,
    /// It wanted more.
    is_out_of_calls: bool,
}

impl Guest {
    /// Counts a call of a host function; the error traps the guest.
    pub(super) fn count_call(&mut self) -> wasmtime::Result<()> {
        match self.calls_left.checked_sub(1) {
            Some(left) => self.calls_left = left,
            None => {
                self.is_out_of_calls = true;
                return Err(wasmtime::Error::msg("too many calls of host functions"));
            }
        }
        Ok(())
    }

    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    pub(super) fn session_mut(&mut self) -> &mut Session {
        &mut self.session
    }

    /// The time of the entry, in nanoseconds since 1970.
    pub(super) fn clock(&self) -> u64 {
        self.session.world.time().0
    }

    /// Calls the session and says its refusal in the words of an interface.
    pub(super) fn answer<T, E: From<Refusal>>(
        &mut self,
        call: impl FnOnce(&mut Session) -> Answer<T>,
    ) -> wasmtime::Result<Result<T, E>> {
        self.count_call()?;
        match call(&mut self.session) {
            Ok(Ok(answer)) => Ok(Ok(answer)),
            Ok(Err(refusal)) => {
                self.session.refuses(&refusal);
                Ok(Err(refusal.into()))
            }
            Err(fault) => {
                self.fault = Some(fault);
                Err(wasmtime::Error::msg("the host's store failed"))
            }
        }
    }
}

// Interfaces of types alone.
impl bindings::dim::coordination::time::Host for Guest {}
impl bindings::dim::coordination::event::Host for Guest {}

impl WasiView for Guest {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

/// The limit on all linear memories and tables of an instance together.
struct MemoryLimit {
    limit: usize,
    used: usize,
    struck: bool,
}

/// What an element of a table costs, in bytes.
const TABLE_ELEMENT: usize = 16;

impl MemoryLimit {
    fn grow(&mut self, by: usize) -> bool {
        let fits = self.used.saturating_add(by) <= self.limit;
        if fits {
            self.used += by;
        } else {
            self.struck = true;
        }
        fits
    }
}

impl ResourceLimiter for MemoryLimit {
    fn memory_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        Ok(self.grow(desired.saturating_sub(current)))
    }

    fn table_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        Ok(self.grow(desired.saturating_sub(current).saturating_mul(TABLE_ELEMENT)))
    }
}

/// The limit on the CPU time of one call.
#[derive(Default)]
struct Deadline {
    limit: Duration,
    /// Whether it is that of a start.
    is_start: bool,
    /// The thread's CPU time at the first look during the call.
    first_look: Option<Duration>,
    struck: bool,
}

impl Deadline {
    /// Called at each epoch while a call runs. It goes by CPU time, so that an honest plugin is
    /// not charged for a busy machine.
    fn look(&mut self) -> UpdateDeadline {
        let now = thread_cpu();
        let first = *self.first_look.get_or_insert(now);
        if now.saturating_sub(first) + Engine::EPOCH > self.limit {
            self.struck = true;
            return UpdateDeadline::Interrupt;
        }
        UpdateDeadline::Continue(1)
    }
}

/// The CPU time of this thread.
pub fn thread_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// What an instance is made of beside its component: the same over restarts and versions of a plugin.
#[derive(Debug)]
pub struct Setting {
    /// Random of the entry.
    pub random: EntryRandom,
    /// The seed of hash maps.
    hash_seed: u128,
}

impl Setting {
    /// What follows from the host's secret for `plugin`; random goes by `numbers`, if there are any.
    pub fn new(secret: &[u8; 32], plugin: &PluginName, numbers: Option<Numbers>) -> Self {
        let mut hash = Sha256::new();
        hash.update(secret);
        hash.update(plugin.as_str());
        let secret: [u8; 32] = hash.finalize().into();
        let hash_seed = u128::from_be_bytes(secret[..16].try_into().expect("16 of 32 bytes"));
        Self { random: EntryRandom::new(secret, numbers), hash_seed }
    }
}

/// A running instance.
pub struct Instance {
    store: wasmtime::Store<Guest>,
    plugin: bindings::Plugin,
    console: Console,
    limits: Limits,
}

impl Instance {
    /// Makes an instance. The session comes back if that fails.
    ///
    /// What a component runs while it is instantiated (the `start` functions of its core modules) has no effects: an
    /// instance that is never made must leave nothing behind.
    pub fn new(
        prepared: &Prepared,
        mut session: Session,
        setting: &Setting,
    ) -> Result<Self, Box<(Session, CallError)>> {
        let console = Console::default();
        let wasi = wasi::context(Surroundings {
            clock: session.clock(),
            random: setting.random.clone(),
            hash_seed: setting.hash_seed,
            console: console.clone(),
        });
        let limits = *session.limits();
        let mode = std::mem::replace(&mut session.mode, Mode::Making);
        let mut table = ResourceTable::new();
        table.set_max_capacity(RESOURCES);
        let guest = Guest {
            wasi,
            table,
            session,
            memory: MemoryLimit { limit: limits.memory, used: 0, struck: false },
            deadline: Deadline { limit: limits.start_cpu(), is_start: true, ..Deadline::default() },
            fault: None,
            calls_left: limits.host_calls,
            is_out_of_calls: false,
        };
        let mut store = wasmtime::Store::new(prepared.pre.engine(), guest);
        store.limiter(|guest| &mut guest.memory);
        store.set_hostcall_fuel(limits.border_bytes);
        store.epoch_deadline_callback(|mut context| Ok(context.data_mut().deadline.look()));
        store.set_epoch_deadline(1);
        match prepared.pre.instantiate(&mut store) {
            Ok(plugin) => {
                store.data_mut().session.mode = mode;
                Ok(Self { store, plugin, console, limits })
            }
            Err(error) => {
                let mut guest = store.into_data();
                guest.session.mode = mode;
                let written = console.take_lines();
                guest.session.lines.extend(written.iter().map(|line| escaped(line).into_owned()));
                let cause = cause(&mut guest, &written, &error);
                Err(Box::new((guest.session, cause)))
            }
        }
    }

    /// The session.
    pub fn session(&self) -> &Session {
        &self.store.data().session
    }

    /// The session.
    pub fn session_mut(&mut self) -> &mut Session {
        &mut self.store.data_mut().session
    }

    /// Ends the instance; its session lives on.
    pub fn into_session(self) -> Session {
        self.store.into_data().session
    }

    /// Bytes of linear memory and tables.
    pub fn memory(&self) -> usize {
        self.store.data().memory.used
    }

    /// Whether a call since this was last asked was under way when an epoch ended.
    pub fn take_slow(&mut self) -> bool {
        self.store.data_mut().deadline.first_look.take().is_some()
    }

    /// Calls `start`.
    pub fn start(
        &mut self,
        config: &str,
        from_state_version: Option<u32>,
    ) -> Result<Result<(), String>, CallError> {
        let limit = self.limits.start_cpu();
        self.call(limit, true, |plugin, store| plugin.call_start(store, config, from_state_version))
    }

    /// Calls `handle`.
    pub fn handle(&mut self, event: &bindings::Event) -> Result<Result<(), bindings::Failure>, CallError> {
        let limit = self.limits.call_cpu();
        self.call(limit, false, |plugin, store| plugin.call_handle(store, event))
    }

    /// Calls `command`.
    pub fn command(
        &mut self,
        method: &str,
        body: &str,
    ) -> Result<Result<String, bindings::Refusal>, CallError> {
        let limit = self.limits.call_cpu();
        self.call(limit, false, |plugin, store| plugin.call_command(store, method, body))
    }

    /// Calls `query`.
    pub fn query(
        &mut self,
        method: &str,
        body: &str,
    ) -> Result<Result<String, bindings::Refusal>, CallError> {
        let limit = self.limits.call_cpu();
        self.call(limit, false, |plugin, store| plugin.call_query(store, method, body))
    }

    fn call<R>(
        &mut self,
        limit: Duration,
        is_start: bool,
        call: impl FnOnce(&bindings::Plugin, &mut wasmtime::Store<Guest>) -> wasmtime::Result<R>,
    ) -> Result<R, CallError> {
        let guest = self.store.data_mut();
        guest.deadline = Deadline { limit, is_start, ..Deadline::default() };
        guest.memory.struck = false;
        (guest.calls_left, guest.is_out_of_calls) = (self.limits.host_calls, false);
        self.store.set_epoch_deadline(1);
        let result = call(&self.plugin, &mut self.store);
        let written = self.console.take_lines();
        for line in &written {
            self.session_mut().line(tracing::Level::INFO, line.clone());
        }
        result.map_err(|error| cause(self.store.data_mut(), &written, &error))
    }
}

/// Why a call trapped during which the guest has written lines, in the words of whoever has to mend it.
fn cause(guest: &mut Guest, written: &[String], error: &wasmtime::Error) -> CallError {
    if let Some(fault) = guest.fault.take() {
        return CallError::Host(fault);
    }
    if guest.deadline.struck {
        let limit = guest.deadline.limit;
        let reason = format!("the call took more than {limit:?} of CPU time");
        let name = if guest.deadline.is_start { "start-cpu-ms" } else { "call-cpu-ms" };
        return CallError::Limit(Trap { reason, stack: stack(error), limit: Some(name) });
    }
    if guest.is_out_of_calls {
        let most = guest.session.limits().host_calls;
        let reason = format!("the call made more than {most} calls of host functions");
        return CallError::Trap(Trap { reason, stack: stack(error), limit: Some("host-calls") });
    }
    if error.is::<wasmtime::PoolConcurrencyLimitError>() {
        let reason = format!("there is no room for one instance more: {}", error.root_cause());
        return CallError::Trap(Trap { reason, stack: Vec::new(), limit: Some(INSTANCES) });
    }
    // The cause itself: what is around it names functions of the guest.
    if error.root_cause().to_string().contains(TOO_MUCH_AT_ONCE) {
        let most = guest.session.limits().border_bytes;
        let reason = format!("more than {most} bytes went over the plugin's border at once");
        return CallError::Trap(Trap { reason, stack: stack(error), limit: Some("border-bytes") });
    }
    let mut text = match error.downcast_ref::<wasmtime::Trap>() {
        Some(trap) => trap.to_string(),
        None => error.root_cause().to_string(),
    };
    let exception = exception::find(written);
    if let Some(exception) = &exception {
        text.clone_from(&exception.reason);
    }
    let memory_struck = guest.memory.struck;
    if memory_struck {
        text = format!("{text} (the limit on memory, {} bytes, was met)", guest.memory.limit);
    }
    let stack = match exception {
        Some(exception) => exception.stack.iter().take(STACK.0).map(|frame| short(frame)).collect(),
        None => {
            let last_words = last_words(guest);
            if !last_words.is_empty() {
                text = format!("{text}: {last_words}");
            }
            stack(error)
        }
    };
    let (reason, limit) = (escaped(&text).into_owned(), memory_struck.then_some("memory"));
    let trap = Trap { reason, stack, limit };
    if memory_struck { CallError::Limit(trap) } else { CallError::Trap(trap) }
}

/// The guest's functions that were under way when it trapped.
fn stack(error: &wasmtime::Error) -> Vec<String> {
    let frames = error.downcast_ref::<WasmBacktrace>().map_or(&[][..], WasmBacktrace::frames);
    let named = frames.iter().take(STACK.0).map(|frame| match frame.func_name() {
        Some(name) => short(&format!("{:#}", rustc_demangle::demangle(name))),
        None => format!("function {}", frame.func_index()),
    });
    named.collect()
}

/// The name of a function, as it is told.
fn short(name: &str) -> String {
    escaped(&name[..name.floor_char_boundary(STACK.1)]).into_owned()
}

/// The end of what the guest wrote during the call: a panic's place and message.
fn last_words(guest: &Guest) -> String {
    let lines = guest.session.lines.iter();
    let telling: Vec<&str> =
        lines.map(String::as_str).filter(|line| !line.starts_with("note: run with")).collect();
    telling[telling.len().saturating_sub(2)..].join(" ")
}
