//! Owns what a guest's standard library must find to start: clocks that show the entry's time,
//! random that follows from the entry, and standard output that becomes log lines. Everything else
//! of WASI 0.2 is there and denies; waiting of any kind traps.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use rand::{Rng, SeedableRng, TryRng};
use rand_chacha::ChaCha12Rng;
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWrite;
use wasmtime::component::{HasData, Linker, Resource};
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::bindings::clocks::monotonic_clock;
use wasmtime_wasi::p2::{DynPollable, OutputStream, Pollable, StreamError, StreamResult};
use wasmtime_wasi::{HostMonotonicClock, HostWallClock, WasiCtx};

use super::instance::Guest;
use super::limits::LINE_BYTES;

/// What a guest that waits is told.
const WAITING: &str = "a plugin cannot wait: a call has the time of its entry and ends at once; set a timer with `timers.set` instead";

/// What WASI of one instance is made of.
pub struct Surroundings {
    /// The time of the entry, in nanoseconds since 1970.
    pub clock: Arc<AtomicU64>,
    /// Random of the entry.
    pub random: EntryRandom,
    /// The seed of hash maps, the same for all instances of a plugin.
    pub hash_seed: u128,
    /// Where standard output and error go.
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

/// Adds WASI 0.2 to a linker, with clocks that cannot be waited for.
pub fn add_to_linker(linker: &mut Linker<Guest>) -> wasmtime::Result<()> {
    wasmtime_wasi::p2::add_to_linker_sync(linker)?;
    // An epoch deadline does not reach a guest asleep in a poll: waiting must trap at once.
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
    /// Says nothing of the secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EntryRandom")
    }
}

/// The offsets of the entries that came from outside, in order. Two versions of a plugin add different entries of
/// their own to a log; random that goes by what came from outside is the same for both.
#[derive(Clone, Debug, Default)]
pub struct Numbers(Arc<Mutex<Vec<u64>>>);

impl Numbers {
    /// Adds the entry that came last.
    pub fn add(&self, offset: u64) {
        self.lock().push(offset);
    }

    /// What stands for a part of the entry at `offset`: that of the one before it that came from outside, if it did not;
    /// timers have a part of their own, and anything else its distance from that one.
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
    /// Random for one plugin; `secret` is of the host and the plugin. It goes by the offsets of entries, or by `numbers`.
    pub fn new(secret: [u8; 32], numbers: Option<Numbers>) -> Self {
        Self(Arc::new(Mutex::new(Source { secret, entry: (0, 0), numbers, generator: None })))
    }

    /// Begins a call: the `part`th of the entry at `offset` (an entry may be preceded by timers).
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
    /// Made when it is first asked for: most calls ask for nothing.
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

/// Most lines of standard output that are kept between two looks at them.
const CONSOLE_LINES: usize = 64;

/// Standard output and error: lines, bounded, and never full as the guest sees it.
#[derive(Clone, Default)]
pub struct Console(Arc<Mutex<Written>>);

#[derive(Default)]
struct Written {
    line: Vec<u8>,
    lines: VecDeque<String>,
}

impl Console {
    /// The lines since the last call, the unfinished one included.
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
            // The end of a panic says more than its beginning.
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
        // Only WASI 0.3 asks for it, which this host does not offer.
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
