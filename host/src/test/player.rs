//! Owns a plugin that handles recorded events, and the sum of what it does with them.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::Serialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::TestError;
use super::bench::{Bench, Given, Plugin};
use super::compare::CompareError;
use super::end::{End, take_in};
use super::events::{Events, EventsError};
use super::report::{Report, Why};
use super::run::{Runs, places};
use super::shown;
use super::trial::{Between, Happened, Trial};
use crate::entry::exported::Record;
use crate::time::Timestamp;

/// What a version did.
#[derive(Clone, Debug, Serialize)]
pub struct Totals {
    /// Its version.
    pub version: String,
    /// The digest of its component.
    pub digest: String,
    /// How often it was called.
    pub calls: u64,
    /// Writes and deletions of keys.
    pub state_writes: u64,
    /// Publishes.
    pub publishes: u64,
    /// New values of names.
    pub names: u64,
    /// Events that were set aside.
    pub dead: u64,
    /// Events that were put off.
    pub retries: u64,
    /// Bytes of its state in the end.
    pub state_bytes: u64,
    /// CPU time, in seconds.
    pub cpu_seconds: f64,
    /// Most bytes of memory.
    pub memory: usize,
    /// The SHA-256 of all that it did, in order: the same for two runs of one version.
    pub effects: String,
}

impl Totals {
    /// What a version has done that has done nothing yet.
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

/// One version and what it has done so far.
pub struct Player {
    trial: Trial,
    totals: Totals,
    effects: Sha256,
}

impl Player {
    /// One that has handled nothing.
    pub fn new(bench: &Bench, plugin: &Plugin, given: &Given) -> Result<Self, TestError> {
        let mut trial = Trial::new(bench, plugin, given)?;
        trial.start()?;
        Ok(Self { trial, totals: Totals::of(plugin), effects: Sha256::new() })
    }

    /// Handles records; returns what was done with each.
    pub fn play(&mut self, records: &[Record]) -> Result<Vec<Vec<Happened>>, TestError> {
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

    /// Counts what was made real, and lets go of it.
    fn take_committed(&mut self, end: &mut End) {
        self.totals.memory = self.totals.memory.max(self.trial.memory());
        let happened = self.trial.drain_committed();
        self.count(&happened);
        end.happened(&happened);
        let replies = happened.iter().filter_map(|it| it.reply.as_ref());
        end.replied(replies.map(|reply| json!([shown::reply(reply)])));
    }

    /// Has other code take over, counts anew from then on, and returns what the take-over brought about.
    pub fn replace(&mut self, plugin: &Plugin, given: &Given) -> Result<Vec<Happened>, TestError> {
        self.begin(plugin);
        self.trial.replace(plugin, given)?;
        Ok(self.trial.drain_happened())
    }

    /// Counts anew from now on.
    pub fn begin(&mut self, plugin: &Plugin) {
        self.trial.drain_happened();
        (self.totals, self.effects) = (Totals::of(plugin), Sha256::new());
    }

    /// Goes on until a time, and ends: what it did in all, what it did since it last handled something, and its state.
    pub fn end(mut self, until: Timestamp) -> Result<(Totals, Vec<Happened>, State), TestError> {
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

/// What a version's state is in the end.
pub type State = BTreeMap<Vec<u8>, Vec<u8>>;

/// Takes what was done into a digest, each part with its length.
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
    for (topic, subscribed) in &happened.asked.subscriptions {
        put(topic.as_str().as_bytes());
        put(&[u8::from(*subscribed)]);
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

/// Has a plugin handle recorded events, and once more with a crash, and with a replacement, between the entries: the end
/// must be the same. `open` opens the events, for each run. Blocks, and must not be called from an async thread.
pub fn try_on(
    bench: &Bench,
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
