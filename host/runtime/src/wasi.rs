//! Owns the WASI environment of a guest: clocks that show the entry's time, random numbers that follow from the
//! entry, and standard output that becomes log lines. All other interfaces of WASI 0.2 exist and deny access.
//! Every kind of wait traps.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use dim_store::plugin_limits::LINE_BYTES;
use rand::{Rng, SeedableRng, TryRng};
use rand_chacha::ChaCha12Rng;
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWrite;
use wasmtime::component::{HasData, Linker, Resource};
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::bindings::clocks::monotonic_clock;
use wasmtime_wasi::p2::{DynPollable, OutputStream, Pollable, StreamError, StreamResult};
use wasmtime_wasi::{HostMonotonicClock, HostWallClock, WasiCtx};

use crate::instance::Guest;

/// The error of a guest that waits.
const WAITING: &str = "a plugin cannot wait: a call has the time of its entry and ends at once; set a timer with `timers.set` instead";

/// The parts of the WASI environment of one instance.
pub struct Surroundings {
    /// The time of the entry, in nanoseconds since 1970.
    pub clock: Arc<AtomicU64>,
    /// The random numbers of the entry.
    pub random: EntryRandom,
    /// The seed of hash maps, the same for all instances of a plugin.
    pub hash_seed: u128,
    /// The receiver of standard output and standard error.
    pub console: Console,
}

/// Makes the WASI context of an instance.
pub fn context(surroundings: Surroundings) -> WasiCtx {
    let Surroundings { clock, random, hash_seed, console } = surroundings;
    WasiCtx::builder()
        .wall_clock(EntryClock(clock.clone()))
        .monotonic_clock(EntryClock(clock))
        .secure_random(random.clone())
        .insecure_random(random)
        .insecure_random_seed(hash_seed)
        .max_random_size(64 << 10)
        .stdout(console.clone())
        .stderr(console)
        .allow_tcp(false)
        .allow_udp(false)
        .allow_ip_name_lookup(false)
        .build()
}

/// Adds WASI 0.2 to a linker, with clocks that do not allow a wait.
pub fn add_to_linker(linker: &mut Linker<Guest>) -> wasmtime::Result<()> {
    wasmtime_wasi::p2::add_to_linker_sync(linker)?;
    // An epoch deadline does not interrupt a guest that sleeps in a poll, so a wait must trap at once.
    linker.allow_shadowing(true);
    monotonic_clock::add_to_linker::<Guest, NoWaiting>(linker, |guest| NoWaitingView {
        clock: guest.clock(),
    })?;
    linker.allow_shadowing(false);
    Ok(())
}

struct NoWaiting;

impl HasData for NoWaiting {
    type Data<'a> = NoWaitingView;
}

struct NoWaitingView {
    clock: u64,
}

impl monotonic_clock::Host for NoWaitingView {
    fn now(&mut self) -> wasmtime::Result<u64> {
        Ok(self.clock)
    }

    fn resolution(&mut self) -> wasmtime::Result<u64> {
        Ok(1)
    }

    fn subscribe_instant(&mut self, _: u64) -> wasmtime::Result<Resource<DynPollable>> {
        Err(wasmtime::Error::msg(WAITING))
    }

    fn subscribe_duration(&mut self, _: u64) -> wasmtime::Result<Resource<DynPollable>> {
        Err(wasmtime::Error::msg(WAITING))
    }
}

struct EntryClock(Arc<AtomicU64>);

impl HostWallClock for EntryClock {
    fn resolution(&self) -> Duration {
        Duration::from_nanos(1)
    }

    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }
}

impl HostMonotonicClock for EntryClock {
    fn resolution(&self) -> u64 {
        1
    }

    fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Random numbers that follow from the host's secret, the plugin and the entry.
#[derive(Clone)]
pub struct EntryRandom(Arc<Mutex<Source>>);

impl std::fmt::Debug for EntryRandom {
    /// Omits the secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EntryRandom")
    }
}

/// The offsets of the entries from outside, in order. Two versions of a plugin add different entries of their
/// own to a log. Random numbers that follow from outside entries are the same for both.
#[derive(Clone, Debug, Default)]
pub struct Numbers(Arc<Mutex<Vec<u64>>>);

impl Numbers {
    /// Adds the newest entry.
    pub fn add(&self, offset: u64) {
        self.lock().push(offset);
    }

    /// The number and part that replace a part of the entry at `offset`. The number is that of the last outside
    /// entry up to `offset`. Timers keep their part; any other entry gets its distance from that outside entry.
    fn of(&self, offset: u64, part: u64) -> (u64, u64) {
        let from_outside = self.lock();
        let number = from_outside.partition_point(|before| *before <= offset);
        let before = number.checked_sub(1).map_or(0, |last| from_outside[last]);
        let distance = if part == 0 { offset - before } else { 0 };
        (number as u64, part ^ (distance << 32))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<u64>> {
        self.0.lock().expect("no one panics while holding the numbers")
    }
}

struct Source {
    secret: [u8; 32],
    entry: (u64, u64),
    numbers: Option<Numbers>,
    generator: Option<ChaCha12Rng>,
}

impl EntryRandom {
    /// Creates the random numbers of one plugin; `secret` is derived from the host's secret and the plugin.
    /// They follow from the offsets of entries, or from `numbers`.
    pub fn new(secret: [u8; 32], numbers: Option<Numbers>) -> Self {
        Self(Arc::new(Mutex::new(Source { secret, entry: (0, 0), numbers, generator: None })))
    }

    /// Begins the call for part `part` of the entry at `offset`. Timers before the entry are parts of it.
    pub fn begin(&self, offset: u64, part: u64) {
        let mut source = self.source();
        source.entry = source.numbers.as_ref().map_or((offset, part), |numbers| numbers.of(offset, part));
        source.generator = None;
    }

    fn source(&self) -> std::sync::MutexGuard<'_, Source> {
        self.0.lock().expect("no one panics while holding the source")
    }
}

impl Source {
    /// Creates the generator on first use, because most calls use no random numbers.
    fn generator(&mut self) -> &mut ChaCha12Rng {
        let (secret, (offset, part)) = (&self.secret, self.entry);
        self.generator.get_or_insert_with(|| {
            let mut hash = Sha256::new();
            hash.update(secret);
            hash.update(offset.to_be_bytes());
            hash.update(part.to_be_bytes());
            ChaCha12Rng::from_seed(hash.finalize().into())
        })
    }
}

impl TryRng for EntryRandom {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(self.source().generator().next_u32())
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(self.source().generator().next_u64())
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        self.source().generator().fill_bytes(bytes);
        Ok(())
    }
}

/// Most lines of standard output that are kept until the next read.
const CONSOLE_LINES: usize = 64;

/// Standard output and error as lines. The number of lines is limited, but the guest can always write.
#[derive(Clone, Default)]
pub struct Console(Arc<Mutex<Written>>);

#[derive(Default)]
struct Written {
    line: Vec<u8>,
    lines: VecDeque<String>,
}

impl Console {
    /// Takes the lines since the last call, including an unfinished one.
    pub fn take_lines(&self) -> Vec<String> {
        let mut written = self.0.lock().expect("no one panics while holding the console");
        if written.lines.is_empty() && written.line.is_empty() {
            return Vec::new();
        }
        written.end_line();
        written.lines.drain(..).collect()
    }
}

impl Written {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match byte {
                b'\n' => self.end_line(),
                byte if self.line.len() < LINE_BYTES => self.line.push(byte),
                _ => {}
            }
        }
    }

    fn end_line(&mut self) {
        if self.line.is_empty() {
            return;
        }
        let line = String::from_utf8_lossy(&self.line).into_owned();
        self.line.clear();
        if self.lines.len() == CONSOLE_LINES {
            // The end of a panic message is more useful than its beginning.
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }
}

impl IsTerminal for Console {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Console {
    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }

    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        // Only WASI 0.3 uses it, which this host does not offer.
        Box::new(tokio::io::sink())
    }
}

#[async_trait::async_trait]
impl Pollable for Console {
    async fn ready(&mut self) {}
}

impl OutputStream for Console {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.0.lock().expect("no one panics while holding the console").write(&bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> Result<usize, StreamError> {
        Ok(64 << 10)
    }
}
