//! Owns runs of a plugin on recorded events. Receives records; returns the effects of each, and their totals.

use std::collections::BTreeMap;
use std::time::Instant;

use dim_model::beginning::Beginning;
use dim_model::entry::export::Record;
use dim_model::time::Timestamp;
use dim_store::entry_context::SubscriptionRequest;
use serde::Serialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::TrialError;
use crate::compare::CompareError;
use crate::events::{Events, EventsError};
use crate::final_state::{End, take_in};
use crate::notation;
use crate::report::{Report, Why};
use crate::run::{Runs, places};
use crate::test_bench::{Given, Plugin, TestBench};
use crate::trial::{Between, Happened, Trial};

/// The totals of the effects of one version.
#[derive(Clone, Debug, Serialize)]
pub struct Totals {
    /// The version in the manifest.
    pub version: String,
    /// The digest of the component.
    pub digest: String,
    /// The number of calls.
    pub calls: u64,
    /// The number of writes and deletions of keys.
    pub state_writes: u64,
    /// The number of publishes.
    pub publishes: u64,
    /// The number of new values of names.
    pub names: u64,
    /// The number of dead letters.
    pub dead: u64,
    /// The number of retries.
    pub retries: u64,
    /// The size of the final state, in bytes.
    pub state_bytes: u64,
    /// The CPU time, in seconds.
    pub cpu_seconds: f64,
    /// The maximum of the instance's memory, in bytes.
    pub memory: usize,
    /// The SHA-256 of all effects in their order. Two runs of one version have the same digest.
    pub effects: String,
}

impl Totals {
    /// The totals of a plugin before its first call.
    fn of(plugin: &Plugin) -> Self {
        let inspection = plugin.inspection();
        Self {
            version: inspection.manifest.version.clone(),
            digest: inspection.digest.to_string(),
            calls: 0,
            state_writes: 0,
            publishes: 0,
            names: 0,
            dead: 0,
            retries: 0,
            state_bytes: 0,
            cpu_seconds: 0.0,
            memory: 0,
            effects: String::new(),
        }
    }
}

/// A trial of one version, and the totals so far.
pub struct Player {
    trial: Trial,
    totals: Totals,
    effects: Sha256,
}

impl Player {
    /// Starts a plugin with the given data.
    pub fn new(bench: &TestBench, plugin: &Plugin, given: &Given) -> Result<Self, TrialError> {
        let mut trial = Trial::new(bench, plugin, given)?;
        trial.expect_recorded_events();
        trial.start()?;
        Ok(Self { trial, totals: Totals::of(plugin), effects: Sha256::new() })
    }

    /// Handles records. Returns the calls and effects of each record.
    pub fn play(&mut self, records: &[Record]) -> Result<Vec<Vec<Happened>>, TrialError> {
        let mut all = Vec::with_capacity(records.len());
        for record in records {
            self.trial.feed_record(record)?;
            let happened = self.trial.drain_happened();
            self.count(&happened);
            all.push(happened);
        }
        self.totals.memory = self.totals.memory.max(self.trial.memory());
        Ok(all)
    }

    fn count(&mut self, happened: &[Happened]) {
        let totals = &mut self.totals;
        for it in happened {
            totals.calls += 1;
            totals.state_writes += it.asked.state.len() as u64;
            totals.publishes += it.asked.publishes.len() as u64;
            totals.names += it.asked.names.len() as u64;
            totals.dead += it.dead.len() as u64;
            totals.retries += it.retries.len() as u64;
            totals.cpu_seconds += it.cpu.as_secs_f64();
            digest(&mut self.effects, it);
        }
    }

    /// Counts the committed effects, adds them to `end`, and drops them.
    fn take_committed(&mut self, end: &mut End) {
        self.totals.memory = self.totals.memory.max(self.trial.memory());
        let happened = self.trial.drain_committed();
        self.count(&happened);
        end.happened(&happened);
        let replies = happened.iter().filter_map(|it| it.reply.as_ref());
        end.replied(replies.map(|reply| json!([notation::reply(reply)])));
    }

    /// Replaces the code and resets the totals. Returns the effects of the takeover.
    pub fn replace(&mut self, plugin: &Plugin, given: &Given) -> Result<Vec<Happened>, TrialError> {
        self.begin(plugin);
        self.trial.replace(plugin, given)?;
        Ok(self.trial.drain_happened())
    }

    /// Resets the totals.
    pub fn begin(&mut self, plugin: &Plugin) {
        self.trial.drain_happened();
        (self.totals, self.effects) = (Totals::of(plugin), Sha256::new());
    }

    /// Lets time pass until `until`, and ends the trial. Returns the totals, the effects since the last record, and the
    /// final state.
    pub fn end(mut self, until: Timestamp) -> Result<(Totals, Vec<Happened>, State), TrialError> {
        let until = until.max(self.trial.now());
        self.trial.wait_until(until)?;
        let last = self.trial.drain_happened();
        self.count(&last);
        self.trial.settle()?;
        let state = self.trial.state()?;
        self.totals.memory = self.totals.memory.max(self.trial.memory());
        self.totals.state_bytes = state.iter().map(|(key, value)| (key.len() + value.len()) as u64).sum();
        self.totals.effects = format!("{:x}", self.effects.finalize());
        Ok((self.totals, last, state))
    }
}

/// The final state of a version.
pub type State = BTreeMap<Vec<u8>, Vec<u8>>;

/// Adds the effects of one call to a digest, each part with its length.
fn digest(hash: &mut Sha256, happened: &Happened) {
    let mut put = |bytes: &[u8]| take_in(hash, bytes);
    put(&happened.time.0.to_be_bytes());
    for (key, value) in &happened.asked.state {
        put(key);
        put(value.as_deref().unwrap_or(b"\0deleted"));
    }
    for (key, at) in &happened.asked.timers {
        put(key.as_bytes());
        put(&at.map_or(0, |at| at.0).to_be_bytes());
    }
    for publish in &happened.asked.publishes {
        put(publish.topic.as_str().as_bytes());
        put(&publish.data);
    }
    for (key, update) in &happened.asked.names {
        put(key.as_str().as_bytes());
        put(update.value.path().as_str().as_bytes());
        put(&update.lifetime.as_nanos().to_be_bytes());
    }
    for (topic, SubscriptionRequest(requested)) in &happened.asked.subscriptions {
        put(topic.as_str().as_bytes());
        put(&[u8::from(requested.is_some())]);
        match requested {
            None | Some(Beginning::Head) => {}
            Some(Beginning::Earliest) => put(b"earliest"),
            Some(Beginning::Time(time)) => put(&time.0.to_be_bytes()),
        }
    }
    for (name, followed) in &happened.asked.follows {
        put(name.as_str().as_bytes());
        put(&[u8::from(*followed)]);
    }
    for letter in &happened.dead {
        put(letter.reason.as_bytes());
        put(&letter.attempts.to_be_bytes());
    }
    for retry in &happened.retries {
        put(&retry.at.0.to_be_bytes());
    }
    if let Some(reply) = &happened.reply {
        put(format!("{reply:?}").as_bytes());
    }
}

/// Runs a plugin on recorded events: plainly, with crashes around the entries, and with replacements between them. The
/// final state must be the same. `open` opens the events for each run. Blocks, and must not be called from an async
/// thread.
pub fn try_on(
    bench: &TestBench,
    plugin: &Plugin,
    given: &Given,
    open: impl Fn() -> Result<Events, EventsError>,
    runs: &Runs,
) -> Result<(Report, Totals), CompareError> {
    let begun = Instant::now();
    let of_it =
        |source| CompareError::Version { version: plugin.inspection().manifest.version.clone(), source };
    let run = |between: Between| -> Result<(End, Player, u64), CompareError> {
        let mut player = Player::new(bench, plugin, given).map_err(of_it)?;
        player.trial.interrupt(between);
        let (mut events, mut records, mut end) = (open()?, 0, End::default());
        for record in events.by_ref() {
            player.trial.feed_record(&record?).map_err(of_it)?;
            player.take_committed(&mut end);
            records += 1;
        }
        let until = events.header.until.max(player.trial.now());
        player.trial.wait_until(until).map_err(of_it)?;
        player.trial.settle().map_err(of_it)?;
        player.take_committed(&mut end);
        end.stands(&mut player.trial).map_err(of_it)?;
        Ok((end, player, records))
    };
    let (plain, player, records) = run(Between::Nothing)?;
    let took = begun.elapsed();
    let (places, count) = places(player.trial.places(), 0);
    let (totals, ..) = player.end(Timestamp(0)).map_err(of_it)?;
    let mut report = Report {
        name: "recorded events".to_owned(),
        failures: Vec::new(),
        entries: records,
        crashes: runs.crash.then_some(count),
        replacements: runs.replace.then_some(count),
        plain: took,
        took,
        happened: Vec::new(),
    };
    if runs.crash {
        report.failures.extend(plain.unlike(&run(Between::Crash(places.clone()))?.0, Why::Crash));
    }
    if runs.replace {
        report.failures.extend(plain.unlike(&run(Between::Replace(places))?.0, Why::Replacement));
    }
    report.took = begun.elapsed();
    Ok((report, totals))
}
