//! Owns one instance of a plugin in its wasmtime store: the calls, their deadlines and the limit on memory.
//! After a trap the instance is unusable, and only its session is used again.

use std::time::Duration;

use dim_model::entry::Event;
use dim_model::escape::escaped;
use dim_model::ident::PluginName;
use dim_store::StoreError;
use dim_store::plugin_limits::{LimitName, Limits};
use rustix::time::{ClockId, clock_gettime};
use sha2::{Digest as _, Sha256};
use thiserror::Error;
use wasmtime::component::ResourceTable;
use wasmtime::{ResourceLimiter, UpdateDeadline, WasmBacktrace};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

use crate::bindings::v0_2::{Failure, Refusal as PluginRefusal};
use crate::bindings::{v0_1, v0_2};
use crate::contract::Exports;
use crate::engine::{Engine, Prepared};
use crate::exception;
use crate::session::{Answer, Mode, Refusal, Session};
use crate::wasi::{self, Console, EntryRandom, Numbers, Surroundings};

/// Most WASI resources of an instance, such as streams, which use the host's memory.
const RESOURCES: usize = 1_000;

/// A part of wasmtime's error message when a call exceeds its fuel for bytes over the border.
const TOO_MUCH_AT_ONCE: &str = "fuel allocated for hostcalls";

/// The reason why a call did not finish.
#[derive(Debug, Error)]
pub enum CallError {
    /// The guest trapped or exceeded a limit.
    #[error("{}", .0.reason)]
    Trap(Trap),
    /// The guest exceeded the limit on CPU time or on memory. The point of failure depends on the machine or on
    /// the age of the instance.
    #[error("{}", .0.reason)]
    Limit(Trap),
    /// The host failed; the guest is not the cause.
    #[error(transparent)]
    Host(#[from] StoreError),
}

/// The reason why a call trapped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trap {
    /// The reason in words.
    pub reason: String,
    /// The guest's functions at the trap, innermost first, with the names of its name sections.
    pub stack: Vec<String>,
    /// The exceeded limit, if there is one.
    pub limit: Option<LimitName>,
}

impl Trap {
    /// A trap without a stack, for a failure outside the current call.
    pub fn of_reason(reason: String) -> Self {
        Self { reason, ..Self::default() }
    }
}

/// Most functions of a recorded stack, and most bytes of one name.
const STACK: (usize, usize) = (32, 256);

/// The data of a guest in its wasmtime store.
pub struct Guest {
    wasi: WasiCtx,
    table: ResourceTable,
    session: Session,
    memory: MemoryLimit,
    deadline: Deadline,
    /// The fault of the host that trapped the call.
    fault: Option<StoreError>,
    /// The number of calls of host functions that remain for the call.
    calls_left: u64,
    /// Whether the call exceeded that number.
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
        self.session.context.time().0
    }

    /// Calls the session and converts its refusal to the error of an interface.
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

// These interfaces contain only types.
impl v0_1::dim::coordination::time::Host for Guest {}
impl v0_1::dim::coordination::event::Host for Guest {}
impl v0_2::dim::coordination::time::Host for Guest {}
impl v0_2::dim::coordination::event::Host for Guest {}

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

/// The size of a table element, in bytes.
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
    /// Whether the call is a start.
    is_start: bool,
    /// The thread's CPU time at the first check during the call.
    first_look: Option<Duration>,
    struck: bool,
}

impl Deadline {
    /// Checks the deadline; called at each epoch while a call runs. It uses CPU time, so that a busy machine
    /// does not count against the plugin.
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

/// The parts of an instance beside its component: the same for all restarts and versions of a plugin.
#[derive(Debug)]
pub struct Setting {
    /// The random numbers of the entry.
    pub random: EntryRandom,
    /// The seed of hash maps.
    hash_seed: u128,
}

impl Setting {
    /// Derives the setting of `plugin` from the host's secret. Random numbers follow from `numbers`, if there
    /// are any.
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
    exports: Exports,
    console: Console,
    limits: Limits,
}

impl Instance {
    /// Makes an instance. After a failure it returns the session with the error.
    ///
    /// The `start` functions of the component's core modules, which run during the instantiation, have no
    /// effects: an instance that is never completed must leave nothing behind.
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
        let mut store = wasmtime::Store::new(prepared.linked.engine(), guest);
        store.limiter(|guest| &mut guest.memory);
        store.set_hostcall_fuel(limits.border_bytes);
        store.epoch_deadline_callback(|mut context| Ok(context.data_mut().deadline.look()));
        store.set_epoch_deadline(1);
        match prepared.linked.instantiate(&mut store) {
            Ok(exports) => {
                store.data_mut().session.mode = mode;
                Ok(Self { store, exports, console, limits })
            }
            Err(error) => {
                let mut guest = store.into_data();
                guest.session.mode = mode;
                let written = console.take_lines();
                guest.session.log.lines.extend(written.iter().map(|line| escaped(line).into_owned()));
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

    /// Drops the instance and returns its session.
    pub fn into_session(self) -> Session {
        self.store.into_data().session
    }

    /// The size of linear memories and tables in bytes.
    pub fn memory(&self) -> usize {
        self.store.data().memory.used
    }

    /// Whether an epoch ended during a call since this was last asked.
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
        self.call(limit, true, |exports, store| exports.start(store, config, from_state_version))
    }

    /// Calls `handle`.
    pub fn handle(&mut self, event: &Event) -> Result<Result<(), Failure>, CallError> {
        let limit = self.limits.call_cpu();
        self.call(limit, false, |exports, store| exports.handle(store, event))
    }

    /// Calls `command`.
    pub fn command(&mut self, method: &str, body: &str) -> Result<Result<String, PluginRefusal>, CallError> {
        let limit = self.limits.call_cpu();
        self.call(limit, false, |exports, store| exports.command(store, method, body))
    }

    /// Calls `query`.
    pub fn query(&mut self, method: &str, body: &str) -> Result<Result<String, PluginRefusal>, CallError> {
        let limit = self.limits.call_cpu();
        self.call(limit, false, |exports, store| exports.query(store, method, body))
    }

    fn call<R>(
        &mut self,
        limit: Duration,
        is_start: bool,
        call: impl FnOnce(&Exports, &mut wasmtime::Store<Guest>) -> wasmtime::Result<R>,
    ) -> Result<R, CallError> {
        let guest = self.store.data_mut();
        guest.deadline = Deadline { limit, is_start, ..Deadline::default() };
        guest.memory.struck = false;
        (guest.calls_left, guest.is_out_of_calls) = (self.limits.host_calls, false);
        self.store.set_epoch_deadline(1);
        let result = call(&self.exports, &mut self.store);
        let written = self.console.take_lines();
        for line in &written {
            self.session_mut().line(tracing::Level::INFO, line.clone());
        }
        result.map_err(|error| cause(self.store.data_mut(), &written, &error))
    }
}

/// Converts the error of a call to words for the plugin's author. `written` contains the guest's output during
/// the call.
fn cause(guest: &mut Guest, written: &[String], error: &wasmtime::Error) -> CallError {
    if let Some(fault) = guest.fault.take() {
        return CallError::Host(fault);
    }
    if guest.deadline.struck {
        let limit = guest.deadline.limit;
        let reason = format!("the call took more than {limit:?} of CPU time");
        let name = if guest.deadline.is_start { LimitName::START_CPU_MS } else { LimitName::CALL_CPU_MS };
        return CallError::Limit(Trap { reason, stack: stack(error), limit: Some(name) });
    }
    if guest.is_out_of_calls {
        let most = guest.session.limits().host_calls;
        let reason = format!("the call made more than {most} calls of host functions");
        return CallError::Trap(Trap { reason, stack: stack(error), limit: Some(LimitName::HOST_CALLS) });
    }
    if error.is::<wasmtime::PoolConcurrencyLimitError>() {
        let reason = format!("there is no space for another instance: {}", error.root_cause());
        return CallError::Trap(Trap { reason, stack: Vec::new(), limit: Some(LimitName::INSTANCES) });
    }
    // The root cause only: the outer messages contain names of guest functions.
    if error.root_cause().to_string().contains(TOO_MUCH_AT_ONCE) {
        let most = guest.session.limits().border_bytes;
        let reason = format!("more than {most} bytes went over the plugin's border at once");
        return CallError::Trap(Trap { reason, stack: stack(error), limit: Some(LimitName::BORDER_BYTES) });
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
    let (reason, limit) = (escaped(&text).into_owned(), memory_struck.then_some(LimitName::MEMORY));
    let trap = Trap { reason, stack, limit };
    if memory_struck { CallError::Limit(trap) } else { CallError::Trap(trap) }
}

/// The guest's functions that were running when it trapped.
fn stack(error: &wasmtime::Error) -> Vec<String> {
    let frames = error.downcast_ref::<WasmBacktrace>().map_or(&[][..], WasmBacktrace::frames);
    let named = frames.iter().take(STACK.0).map(|frame| match frame.func_name() {
        Some(name) => short(&format!("{:#}", rustc_demangle::demangle(name))),
        None => format!("function {}", frame.func_index()),
    });
    named.collect()
}

/// The name of a function, cut and escaped.
fn short(name: &str) -> String {
    escaped(&name[..name.floor_char_boundary(STACK.1)]).into_owned()
}

/// The last lines of the guest's output: the place and the message of a panic.
fn last_words(guest: &Guest) -> String {
    let lines = guest.session.log.lines.iter();
    let telling: Vec<&str> =
        lines.map(String::as_str).filter(|line| !line.starts_with("note: run with")).collect();
    telling[telling.len().saturating_sub(2)..].join(" ")
}
