//! Owns the runs of a scenario: as it is written, with a crash between each two entries, and with the plugin replaced by
//! itself between each two. The end must be the same.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rand::SeedableRng as _;
use rand::seq::index::sample;
use rand_chacha::ChaCha12Rng;
use serde_json::{Map, Value, json};

use super::TestError;
use super::bench::{Bench, Plugin};
use super::end::End;
use super::identity::name_for;
use super::matching::{Difference, Match, differences};
use super::report::{Failure, Report, Why};
use super::scenario::{Action, Expectation, From, Scenario, Step, Time, Vars, place_of};
use super::shown::{self, shown, shown_key};
use super::trial::{Between, Listening, Trial};
use crate::entry::{Event, Kind, Origin};
use crate::ident::PeerName;

/// In how many places something comes between entries, if there are more than [`ALL`].
const PLACES: usize = 250;

/// So many places are all taken.
const ALL: u64 = 1_000;

/// What is run beside the scenario as it is written.
#[derive(Clone, Copy, Debug)]
pub struct Runs {
    /// A crash and a restart between each two entries.
    pub crash: bool,
    /// The plugin replaced by itself between each two entries.
    pub replace: bool,
    /// Whether it is noted what each step has brought about.
    pub record: bool,
}

impl Default for Runs {
    fn default() -> Self {
        Self { crash: true, replace: true, record: false }
    }
}

/// A run as it was written: what it has come to, and where something could have come between.
struct Outcome {
    failures: Vec<Failure>,
    end: End,
    places: u64,
    happened: Vec<Option<Map<String, Value>>>,
    took: Duration,
}

impl Outcome {
    /// What went otherwise than in the run that is as written.
    fn unlike(self, why: Why, plain: &End) -> Option<Failure> {
        match self.failures.into_iter().next() {
            Some(failure) => Some(Failure { why, ..failure }),
            None => plain.unlike(&self.end, why),
        }
    }
}

/// The places in which something comes between, all if there are not too many, and how many these are.
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
    /// Runs the scenario with a plugin. Blocks, and must not be called from an async thread.
    pub fn run(&self, bench: &Bench, plugin: &Plugin, runs: &Runs) -> Result<Report, TestError> {
        // On a thread of its own: WASI must not be entered from an async thread.
        std::thread::scope(|scope| {
            let running = scope.spawn(|| self.run_here(bench, plugin, runs));
            running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn run_here(&self, bench: &Bench, plugin: &Plugin, runs: &Runs) -> Result<Report, TestError> {
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
        bench: &Bench,
        plugin: &Plugin,
        between: Between,
        records: bool,
    ) -> Result<Outcome, TestError> {
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
        };
        if let Err(error) = run.all() {
            run.fail("", error.to_string(), Vec::new());
        }
        let Run { mut trial, failures, mut end, happened, .. } = run;
        end.stands(&mut trial)?;
        Ok(Outcome { failures, end, places: trial.places(), happened, took: begun.elapsed() })
    }
}

/// One run.
struct Run<'a> {
    scenario: &'a Scenario,
    bench: &'a Bench,
    trial: Trial,
    /// Whether it is checked what comes of each step.
    is_plain: bool,
    /// Whether that is noted, too.
    records: bool,
    round: u64,
    /// Whether what has happened is looked at again later.
    keeps: bool,
    failures: Vec<Failure>,
    end: End,
    /// What each step on top has brought about, if it is not as it was expected.
    happened: Vec<Option<Map<String, Value>>>,
    /// The peers that words stand for.
    peers: BTreeMap<String, PeerName>,
}

/// Lines of a plugin's log that are told with a failure.
const LINES: usize = 15;

/// Failures that are told of one scenario.
const FAILURES: usize = 10;

impl Run<'_> {
    fn vars(&self) -> Vars {
        Vars { seed: self.scenario.given.host.seed, now: self.trial.now(), round: self.round }
    }

    /// The peer that a word stands for: a key of its own, which takes a while to make.
    fn peer(&mut self, word: &str) -> PeerName {
        let vars = self.vars();
        self.peers.entry(word.to_owned()).or_insert_with(|| vars.peer(word)).clone()
    }

    fn fail(&mut self, place: &str, reason: String, differences: Vec<Difference>) {
        if self.failures.len() < FAILURES {
            self.failures.push(Failure { why: Why::Step, place: place.to_owned(), reason, differences });
        }
    }

    fn all(&mut self) -> Result<(), TestError> {
        let scenario = self.scenario;
        let vars = self.vars();
        for (word, document) in scenario.names.iter().filter(|(_, document)| !document.is_null()) {
            let bytes = shown::bytes_of(&vars.fill(document)).map_err(TestError::Given)?;
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

    /// Does a step; returns what it has brought about, if that is asked for and is not as it was expected.
    fn step(&mut self, step: &Value, place: &str) -> Result<Option<Map<String, Value>>, TestError> {
        let step =
            Step::parse(step, &self.vars()).map_err(|why| TestError::Given(format!("{place}: {why}")))?;
        let mark = self.trial.happened().len();
        let place = format!("{place}, {}", step.action.told());
        // The steps of a repetition are checked where they stand.
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

    /// Lets go of what has happened, unless it is looked at again.
    fn let_go(&mut self) {
        if !self.keeps {
            self.end.happened(&self.trial.drain_committed());
        }
    }

    /// What a step has brought about, as far as it is to be written: all of it where nothing was expected, and else the
    /// sections that differ. Who includes something wants no more.
    fn news_of(
        &mut self,
        Expectation { expect, include }: &Expectation,
        differ: &BTreeSet<String>,
        is_expected: bool,
        mark: usize,
        answer: Option<&(&'static str, Value)>,
    ) -> Result<Option<Map<String, Value>>, TestError> {
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

    /// Does what a step says; returns the answer to a question.
    fn act(&mut self, action: Action, place: &str) -> Result<Option<(&'static str, Value)>, TestError> {
        let vars = self.vars();
        let now = self.trial.now();
        match action {
            Action::Message { topic, data, from } => {
                let word = |error: crate::ident::InvalidWord| TestError::Given(format!("{place}: {error}"));
                let origin = match from {
                    From::Host => Origin::Host,
                    From::Plugin(plugin) => Origin::Plugin(plugin.parse().map_err(word)?),
                    From::Peer(peer) => Origin::Peer(self.peer(&peer)),
                };
                if self.is_plain && !self.trial.hears(&topic) {
                    self.fail(place, format!("the plugin does not hear {topic}"), Vec::new());
                }
                self.trial.feed(Kind::Event(Event::Message { topic, data: data.into(), origin }))?;
            }
            Action::Wait(Time::For(duration)) => self.trial.wait_until(now.after(duration))?,
            Action::Wait(Time::Until(until)) if until < now => {
                return Err(TestError::Given(format!("{place}: it is {now} already")));
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
                    self.trial.happened().iter().rev().find_map(|it| it.reply.as_ref()).map(shown::reply);
                self.end.replied(reply.as_ref().map(|(section, value)| json!({ *section: value })));
            }
            Action::Query(method, body) => {
                let answer = shown::reply(&self.trial.ask(&method, &body)?);
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
                let component = crate::plugin::read(&file)
                    .map_err(|error| TestError::Given(format!("cannot read {}: {error}", file.display())))?;
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

    /// Compares what came of a step with what was expected of it; returns the sections that are expected and differ.
    fn check(
        &mut self,
        place: &str,
        expectation: &Expectation,
        mark: usize,
        answer: Option<&(&'static str, Value)>,
    ) -> Result<BTreeSet<String>, TestError> {
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

    /// What must be told if it is to happen: a refusal, and an event that is set aside.
    fn unexpected(
        &self,
        expectation: &Expectation,
        mark: usize,
        answer: Option<&(&'static str, Value)>,
    ) -> Option<String> {
        let happened = &self.trial.happened()[mark..];
        let reply = happened.iter().rev().find_map(|it| it.reply.as_ref()).map(shown::reply);
        let refused = answer.cloned().or(reply).filter(|(section, _)| *section == "error");
        let logged = |lines: &[String]| {
            // The end of a trace says most.
            let last = lines.len().saturating_sub(LINES);
            lines[last..].iter().map(|line| format!("\n  | {line}")).collect::<String>()
        };
        if let Some((_, why)) = refused.filter(|_| !expectation.tells_of("error")) {
            let why = why.as_str().unwrap_or_default();
            let lines: Vec<String> = happened.iter().flat_map(|it| it.lines.clone()).collect();
            return Some(format!("was refused, and no error was expected: {why}{}", logged(&lines)));
        }
        let letter =
            happened.iter().find_map(|it| it.dead.first()).filter(|_| !expectation.tells_of("dead"))?;
        let (why, lines) = (&letter.reason, logged(&letter.log));
        Some(format!("an event was set aside, and no dead letter was expected: {why}{lines}"))
    }

    /// What a step has brought about, by sections.
    fn sections(
        &mut self,
        mark: usize,
        answer: Option<&(&'static str, Value)>,
    ) -> Result<Map<String, Value>, TestError> {
        self.trial.settle()?;
        let mut sections = shown::sections(&self.trial.happened()[mark..]);
        if let Some((section, value)) = answer {
            sections.insert((*section).to_owned(), value.clone());
        }
        Ok(sections)
    }

    /// How things stand now, by the sections that are asked for.
    fn standing(&mut self, is_asked: impl Fn(&str) -> bool) -> Result<Map<String, Value>, TestError> {
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
    /// What it is, in a word or two.
    fn told(&self) -> String {
        match self {
            Self::Message { topic, .. } => format!("message {topic}"),
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
