//! Owns the runs of a scenario: the plain run, one with a crash between each two entries, and one with the plugin
//! replaced by itself between each two entries. Receives a scenario and a plugin; returns a report. The final state of
//! all runs must be the same.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dim_model::entry::{Event, Kind, MemberEvent, Missing, Origin};
use dim_model::ident::{PeerName, Topic};
use rand::SeedableRng as _;
use rand::seq::index::sample;
use rand_chacha::ChaCha12Rng;
use serde_json::{Map, Value, json};

use crate::TrialError;
use crate::final_state::End;
use crate::identity::{incarnation_of, member_of, name_for};
use crate::matching::{Difference, Match, differences};
use crate::notation::{self, shown, shown_key};
use crate::report::{Failure, Report, Why};
use crate::scenario::{Action, Expectation, MessageSender, Scenario, Step, Time, Vars, place_of};
use crate::test_bench::{Plugin, TestBench};
use crate::trial::{Between, Listening, Trial};

/// Number of entries with an interruption, if there are more than [`ALL`] entries.
const PLACES: usize = 250;

/// Maximum number of entries up to which each one gets an interruption.
const ALL: u64 = 1_000;

/// The runs besides the plain one.
#[derive(Clone, Copy, Debug)]
pub struct Runs {
    /// Whether there is a run with a crash and a restart between each two entries.
    pub crash: bool,
    /// Whether there is a run with the plugin replaced by itself between each two entries.
    pub replace: bool,
    /// Whether the plain run records the results of each step.
    pub record: bool,
}

impl Default for Runs {
    fn default() -> Self {
        Self { crash: true, replace: true, record: false }
    }
}

/// The outcome of one run: its failures, its final state, and the number of entries that an interruption can hit.
struct Outcome {
    failures: Vec<Failure>,
    end: End,
    places: u64,
    happened: Vec<Option<Map<String, Value>>>,
    took: Duration,
}

impl Outcome {
    /// Compares with the final state of the plain run. Returns the first failure, if any.
    fn unlike(self, why: Why, plain: &End) -> Option<Failure> {
        match self.failures.into_iter().next() {
            Some(failure) => Some(Failure { why, ..failure }),
            None => plain.unlike(&self.end, why),
        }
    }
}

/// Selects the entries that get an interruption: all, as none, up to [`ALL`]; else [`PLACES`] random ones. Also returns
/// their number.
pub fn places(all: u64, seed: u64) -> (Option<BTreeSet<u64>>, u64) {
    if all <= ALL {
        return (None, all);
    }
    let mut random = ChaCha12Rng::seed_from_u64(seed);
    let length = usize::try_from(all).unwrap_or(usize::MAX);
    let places: BTreeSet<u64> = sample(&mut random, length, PLACES).iter().map(|at| at as u64 + 1).collect();
    let count = places.len() as u64;
    (Some(places), count)
}

impl Scenario {
    /// Runs the scenario with a plugin. An unmet expectation is a failure in the report, not an error. Blocks, and
    /// must not be called from an async thread.
    pub fn run(&self, bench: &TestBench, plugin: &Plugin, runs: &Runs) -> Result<Report, TrialError> {
        // A separate thread, because WASI must not be entered from an async thread.
        std::thread::scope(|scope| {
            let running = scope.spawn(|| self.run_here(bench, plugin, runs));
            running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn run_here(&self, bench: &TestBench, plugin: &Plugin, runs: &Runs) -> Result<Report, TrialError> {
        let begun = Instant::now();
        let plain = self.run_once(bench, plugin, Between::Nothing, runs.record)?;
        let mut report = Report {
            name: self.name.clone(),
            failures: plain.failures,
            entries: plain.places,
            crashes: None,
            replacements: None,
            plain: plain.took,
            took: Duration::ZERO,
            happened: plain.happened,
        };
        let (places, count) = places(plain.places, self.given.host.seed);
        let is_well = report.failures.is_empty();
        if runs.crash && is_well {
            let other = self.run_once(bench, plugin, Between::Crash(places.clone()), false)?;
            report.failures.extend(other.unlike(Why::Crash, &plain.end));
            report.crashes = Some(count);
        }
        if runs.replace && is_well {
            let other = self.run_once(bench, plugin, Between::Replace(places), false)?;
            report.failures.extend(other.unlike(Why::Replacement, &plain.end));
            report.replacements = Some(count);
        }
        report.took = begun.elapsed();
        Ok(report)
    }

    fn run_once(
        &self,
        bench: &TestBench,
        plugin: &Plugin,
        between: Between,
        records: bool,
    ) -> Result<Outcome, TrialError> {
        let begun = Instant::now();
        let is_plain = between == Between::Nothing;
        let mut trial = Trial::new(bench, plugin, &self.given)?;
        trial.interrupt(between);
        let mut run = Run {
            scenario: self,
            bench,
            trial,
            is_plain,
            records,
            round: 0,
            keeps: is_plain && !self.end.is_empty(),
            failures: Vec::new(),
            end: End::default(),
            happened: Vec::new(),
            peers: BTreeMap::new(),
            sequences: BTreeMap::new(),
        };
        if let Err(error) = run.all() {
            run.fail("", error.to_string(), Vec::new());
        }
        let Run { mut trial, failures, mut end, happened, .. } = run;
        end.stands(&mut trial)?;
        Ok(Outcome { failures, end, places: trial.places(), happened, took: begun.elapsed() })
    }
}

/// One run of a scenario.
struct Run<'a> {
    scenario: &'a Scenario,
    bench: &'a TestBench,
    trial: Trial,
    /// Whether this is the plain run, which checks the expectations of each step.
    is_plain: bool,
    /// Whether the results of each step are recorded.
    records: bool,
    round: u64,
    /// Whether the effects so far are needed for a later check.
    keeps: bool,
    failures: Vec<Failure>,
    end: End,
    /// The results of each top-level step that differ from the expected ones.
    happened: Vec<Option<Map<String, Value>>>,
    /// The peers behind words.
    peers: BTreeMap<String, PeerName>,
    /// The numbers of the next events of members, by topic and word.
    sequences: BTreeMap<(Topic, String), u64>,
}

/// Maximum number of a plugin's log lines in one failure.
const LINES: usize = 15;

/// Maximum number of reported failures of one scenario.
const FAILURES: usize = 10;

impl Run<'_> {
    fn vars(&self) -> Vars {
        Vars { seed: self.scenario.given.host.seed, now: self.trial.now(), round: self.round }
    }

    /// The peer behind a word. It is cached, because deriving its key is slow.
    fn peer(&mut self, word: &str) -> PeerName {
        let vars = self.vars();
        self.peers.entry(word.to_owned()).or_insert_with(|| vars.peer(word)).clone()
    }

    /// The identity of the next event of a member, of which it publishes `count`.
    fn member_event(&mut self, topic: &Topic, word: &str, count: u64) -> MemberEvent {
        let (seed, time) = (self.vars().seed, self.trial.now());
        let next = self.sequences.entry((topic.clone(), word.to_owned())).or_default();
        let sequence = *next;
        *next += count;
        let (writer, incarnation) = (member_of(seed, word), incarnation_of(seed, word));
        MemberEvent { writer, incarnation, sequence, time }
    }

    fn fail(&mut self, place: &str, reason: String, differences: Vec<Difference>) {
        if self.failures.len() < FAILURES {
            self.failures.push(Failure { why: Why::Step, place: place.to_owned(), reason, differences });
        }
    }

    fn all(&mut self) -> Result<(), TrialError> {
        let scenario = self.scenario;
        let vars = self.vars();
        for (word, document) in scenario.names.iter().filter(|(_, document)| !document.is_null()) {
            let bytes = notation::bytes_of(&vars.fill(document)).map_err(TrialError::Given)?;
            self.trial.set_name(name_for(vars.seed, word), Bytes::from(bytes))?;
        }
        self.trial.start()?;
        for (number, step) in (1..).zip(&scenario.steps) {
            let happened = self.step(&step.value, &place_of(number, step))?;
            self.happened.push(happened);
        }
        let end = &scenario.end;
        if !end.is_empty() && self.is_plain {
            let end = end.filled(&self.vars());
            self.check("in the end", &end, 0, None)?;
        }
        Ok(())
    }

    /// Runs a step and checks its expectation. Returns its results if the run records them and they differ from the
    /// expected ones.
    fn step(&mut self, step: &Value, place: &str) -> Result<Option<Map<String, Value>>, TrialError> {
        let step =
            Step::parse(step, &self.vars()).map_err(|why| TrialError::Given(format!("{place}: {why}")))?;
        let mark = self.trial.happened().len();
        let place = format!("{place}, {}", step.action.told());
        // The steps inside a repetition are checked one by one.
        let is_one = !matches!(step.action, Action::Repeat { .. });
        let kept = self.keeps;
        self.keeps |= self.is_plain && !step.expectation.is_empty();
        let answer = self.act(step.action, &place)?;
        self.keeps = kept;
        let mut happened = None;
        if self.is_plain {
            let unexpected = self.unexpected(&step.expectation, mark, answer.as_ref()).filter(|_| is_one);
            let is_expected = unexpected.is_none();
            if let Some(reason) = unexpected {
                self.fail(&place, reason, Vec::new());
            }
            let expectation = step.expectation.filled(&self.vars());
            let differ = self.check(&place, &expectation, mark, answer.as_ref())?;
            if self.records && is_one {
                happened = self.news_of(&expectation, &differ, is_expected, mark, answer.as_ref())?;
            }
        }
        self.let_go();
        Ok(happened)
    }

    /// Moves the committed effects into the final state, unless a later check needs them.
    fn let_go(&mut self) {
        if !self.keeps {
            self.end.happened(&self.trial.drain_committed());
        }
    }

    /// The results of a step that blessing writes: all sections if the step has no expectation, else the sections that
    /// differ. A step with only `include` is left as it is, because its author checks a part on purpose.
    fn news_of(
        &mut self,
        Expectation { expect, include }: &Expectation,
        differ: &BTreeSet<String>,
        is_expected: bool,
        mark: usize,
        answer: Option<&(&'static str, Value)>,
    ) -> Result<Option<Map<String, Value>>, TrialError> {
        let is_told = !expect.is_empty();
        if is_told && differ.is_empty() && is_expected || !is_told && !include.is_empty() {
            return Ok(None);
        }
        let mut happened = self.sections(mark, answer)?;
        happened.extend(self.standing(|_| true)?);
        if is_told {
            happened.retain(|section, _| {
                differ.contains(section)
                    || section == "reply" && differ.contains("error")
                    || !is_expected && ["error", "dead"].contains(&section.as_str())
            });
        }
        Ok(Some(happened.into_iter().map(|(section, value)| (section, Vars::escaped(&value))).collect()))
    }

    /// Performs an action. Returns the answer of a query.
    fn act(&mut self, action: Action, place: &str) -> Result<Option<(&'static str, Value)>, TrialError> {
        let vars = self.vars();
        let now = self.trial.now();
        match action {
            Action::Message { topic, data, from } => {
                let word =
                    |error: dim_model::ident::InvalidWord| TrialError::Given(format!("{place}: {error}"));
                let origin = match from {
                    MessageSender::Host => Origin::Host,
                    MessageSender::Plugin(plugin) => Origin::Plugin(plugin.parse().map_err(word)?),
                    MessageSender::Peer(peer) => Origin::Peer(self.peer(&peer)),
                    MessageSender::Member(member) => Origin::Member(self.member_event(&topic, &member, 1)),
                };
                // What a member has published is kept for a later subscription.
                let is_kept = matches!(origin, Origin::Member(_));
                if self.is_plain && !is_kept && !self.trial.hears(&topic) {
                    self.fail(place, format!("the plugin is not subscribed to {topic}"), Vec::new());
                }
                self.trial.feed(Kind::Event(Event::Message { topic, data: data.into(), origin }))?;
            }
            Action::Missing(topic, member, count) => {
                let MemberEvent { writer, incarnation, sequence: first, .. } =
                    self.member_event(&topic, &member, count);
                let missing = Some(Missing { writer, incarnation, first, next: first + count });
                self.trial.feed(Kind::Event(Event::Gap { topic, since: now, until: now, missing }))?;
            }
            Action::Wait(Time::For(duration)) => self.trial.wait_until(now.after(duration))?,
            Action::Wait(Time::Until(until)) if until < now => {
                return Err(TrialError::Given(format!("{place}: the time is already {now}")));
            }
            Action::Wait(Time::Until(until)) => self.trial.wait_until(until)?,
            Action::Deaf(duration, topic) => {
                let listening = topic.map_or(Listening::No, Listening::NotTo);
                self.trial.wait_deaf_until(now.after(duration), listening)?;
            }
            Action::Down(duration) => self.trial.be_down_until(now.after(duration))?,
            Action::Command(method, body) => {
                self.trial.command(&method, &body)?;
                let reply =
                    self.trial.happened().iter().rev().find_map(|it| it.reply.as_ref()).map(notation::reply);
                self.end.replied(reply.as_ref().map(|(section, value)| json!({ *section: value })));
            }
            Action::Query(method, body) => {
                let answer = notation::reply(&self.trial.ask(&method, &body)?);
                self.end.replied([json!({ answer.0: answer.1 })]);
                return Ok(Some(answer));
            }
            Action::Name(name, document) => {
                let name = name.parse().unwrap_or_else(|_| name_for(vars.seed, &name));
                self.trial.set_name(name, document.into())?;
            }
            Action::Peers(topic, peers) => {
                let mut peers: Vec<_> = peers.iter().map(|peer| self.peer(peer)).collect();
                peers.sort();
                self.trial.feed(Kind::Peers { topic, peers })?;
            }
            Action::Replace(file) => {
                let file = self.scenario.dir.join(file);
                let component = dim_runtime::read(&file)
                    .map_err(|error| TrialError::Given(format!("cannot read {}: {error}", file.display())))?;
                let plugin = self.bench.plugin(&component)?;
                self.trial.replace(&plugin, &self.scenario.given)?;
            }
            Action::Repeat { times, every, steps } => {
                let outer = self.round;
                for round in 1..=times {
                    self.round = round;
                    let next = self.trial.now().after(every);
                    for (number, step) in (1..).zip(&steps) {
                        self.step(step, &format!("{place} (round {round}), step {number}"))?;
                    }
                    let mark = self.trial.happened().len();
                    if self.trial.now() < next {
                        self.trial.wait_until(next)?;
                    }
                    let unexpected = self.unexpected(&Expectation::default(), mark, None);
                    if let Some(reason) = unexpected.filter(|_| self.is_plain) {
                        self.fail(&format!("{place} (the end of round {round})"), reason, Vec::new());
                    }
                    self.let_go();
                }
                self.round = outer;
            }
        }
        Ok(None)
    }

    /// Compares the results of a step with its expectation, and adds a failure if they differ. Returns the sections of
    /// `expect` that differ.
    fn check(
        &mut self,
        place: &str,
        expectation: &Expectation,
        mark: usize,
        answer: Option<&(&'static str, Value)>,
    ) -> Result<BTreeSet<String>, TrialError> {
        let mut differ = BTreeSet::new();
        if expectation.is_empty() {
            return Ok(differ);
        }
        let mut actual = self.sections(mark, answer)?;
        actual.extend(self.standing(|section| expectation.tells_of(section))?);
        let mut found = Vec::new();
        for (sections, how) in [(&expectation.expect, Match::Exact), (&expectation.include, Match::Partial)] {
            for (section, expected) in sections {
                let of_it = differences(section, expected, actual.get(section), how);
                if how == Match::Exact && !of_it.is_empty() {
                    differ.insert(section.clone());
                }
                found.extend(of_it);
            }
        }
        if !found.is_empty() {
            self.fail(place, String::new(), found);
        }
        Ok(differ)
    }

    /// The failure for a refusal or a dead letter that the step does not expect.
    fn unexpected(
        &self,
        expectation: &Expectation,
        mark: usize,
        answer: Option<&(&'static str, Value)>,
    ) -> Option<String> {
        let happened = &self.trial.happened()[mark..];
        let reply = happened.iter().rev().find_map(|it| it.reply.as_ref()).map(notation::reply);
        let refused = answer.cloned().or(reply).filter(|(section, _)| *section == "error");
        let logged = |lines: &[String]| {
            // The end of a stack trace is the most useful part.
            let last = lines.len().saturating_sub(LINES);
            lines[last..].iter().map(|line| format!("\n  | {line}")).collect::<String>()
        };
        if let Some((_, why)) = refused.filter(|_| !expectation.tells_of("error")) {
            let why = why.as_str().unwrap_or_default();
            let lines: Vec<String> = happened.iter().flat_map(|it| it.lines.clone()).collect();
            return Some(format!("the call was refused, but no error was expected: {why}{}", logged(&lines)));
        }
        let letter =
            happened.iter().find_map(|it| it.dead.first()).filter(|_| !expectation.tells_of("dead"))?;
        let (why, lines) = (&letter.reason, logged(&letter.log));
        Some(format!("an event became a dead letter, but none was expected: {why}{lines}"))
    }

    /// The results of a step, by sections. Commits first.
    fn sections(
        &mut self,
        mark: usize,
        answer: Option<&(&'static str, Value)>,
    ) -> Result<Map<String, Value>, TrialError> {
        self.trial.settle()?;
        let mut sections = notation::sections(&self.trial.happened()[mark..]);
        if let Some((section, value)) = answer {
            sections.insert((*section).to_owned(), value.clone());
        }
        Ok(sections)
    }

    /// The current situation, by sections. `state` and `timers` are read only if `is_asked` selects them.
    fn standing(&mut self, is_asked: impl Fn(&str) -> bool) -> Result<Map<String, Value>, TrialError> {
        let mut standing = Map::new();
        if is_asked("state") {
            let state = self.trial.state()?;
            let state = state.iter().map(|(key, value)| (shown_key(key), shown(value)));
            standing.insert("state".to_owned(), Value::Object(state.collect()));
        }
        if is_asked("timers") {
            standing.insert("timers".to_owned(), json!(self.trial.timers()?));
        }
        let (hears, follows) = self.trial.hears_and_follows();
        standing.insert("hears".to_owned(), json!(hears));
        standing.insert("follows".to_owned(), json!(follows));
        Ok(standing)
    }
}

impl Action {
    /// A short description for reports.
    fn told(&self) -> String {
        match self {
            Self::Message { topic, .. } => format!("message {topic}"),
            Self::Missing(topic, ..) => format!("missing {topic}"),
            Self::Wait(Time::For(duration)) => format!("wait {duration:?}"),
            Self::Wait(Time::Until(until)) => format!("until {until}"),
            Self::Deaf(duration, _) => format!("deaf {duration:?}"),
            Self::Down(duration) => format!("down {duration:?}"),
            Self::Command(method, _) => format!("command {method}"),
            Self::Query(method, _) => format!("query {method}"),
            Self::Name(name, _) => format!("name {name}"),
            Self::Peers(topic, _) => format!("peers of {topic}"),
            Self::Replace(file) => format!("replace {}", file.display()),
            Self::Repeat { .. } => "repeat".to_owned(),
        }
    }
}
