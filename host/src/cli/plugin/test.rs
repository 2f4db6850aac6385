//! `dim plugin test`: runs the scenarios of a plugin, without a host and without a network.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use serde_json::{Value, json};

use super::super::input;
use super::super::output::{BAD, Output, line, marked_notes, note};
use super::build::{self, Again};
use super::compare;
use super::watch::Source;
use crate::cause::chain;
use crate::test::{Bench, Events, Failure, Plugin, Report, Runs, Scenario, bless, try_on};

/// Where a plugin's scenarios lie.
pub const SCENARIOS: &str = "scenarios";

#[derive(Debug, Args)]
pub struct Test {
    /// Plugin: its directory, which is built first, or a component file
    #[arg(value_name = "DIR|FILE", default_value = ".")]
    subject: PathBuf,
    /// Scenario file, or a directory of scenarios [default: scenarios in the directory of the plugin]
    #[arg(long = "scenario", value_name = "FILE|DIR")]
    scenarios: Vec<PathBuf>,
    /// Replay recorded events from `dim events export` instead of scenarios
    #[arg(long, value_name = "FILE", conflicts_with_all = ["scenarios", "only", "bless"])]
    events: Option<PathBuf>,
    /// Plugin config for recorded events, a JSON object or @FILE [default: the config on the host that recorded them]
    #[arg(long, value_name = "JSON", value_parser = input::json_or_file::<Value>, requires = "events")]
    config: Option<Value>,
    /// Run the scenarios whose names contain this text
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Skip the runs with a crash and a restart between each two entries
    #[arg(long)]
    no_crash: bool,
    /// Skip the runs with a replacement of the plugin by itself between each two entries
    #[arg(long)]
    no_replace: bool,
    /// Write the results into the scenarios as the expected ones
    #[arg(long)]
    bless: bool,
    /// Write the results to a JUnit file
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Run again whenever the plugin or a scenario changes
    #[arg(long)]
    watch: bool,
}

/// A scenario did not go as it was expected.
#[derive(Debug, thiserror::Error)]
#[error("{failed} of {all} scenarios failed")]
pub struct Failed {
    failed: usize,
    all: usize,
}

impl Test {
    /// Runs them, once or for ever.
    pub fn execute(self, out: &Output) -> anyhow::Result<()> {
        let bench = Bench::new()?;
        if !self.watch {
            return self.round(&bench, out);
        }
        let mut watched = vec![self.subject.clone()];
        watched.extend(self.events.iter().cloned());
        watched.extend(self.places().into_iter().filter(|place| place.exists()));
        Source::watch(&watched, || {
            if let Err(error) = self.round(&bench, out) {
                marked_notes(BAD, "error: ", &format!("{error:#}"));
            }
        })
    }

    fn round(&self, bench: &Bench, out: &Output) -> anyhow::Result<()> {
        let component = match self.subject.is_dir() {
            true => build::build(&self.subject, Again::IfChanged)?.component,
            false => self.subject.clone(),
        };
        let plugin = compare::compiled(bench, &component)?;
        if let Some(events) = &self.events {
            return self.on_events(bench, &plugin, events, out);
        }
        let files = self.files()?;
        let mut results = Vec::new();
        for file in &files {
            results.push(self.one(bench, &plugin, file, out)?);
        }
        self.conclude(&plugin, &results, out)
    }

    /// Has it handle recorded events, and shows what it does.
    fn on_events(&self, bench: &Bench, plugin: &Plugin, file: &Path, out: &Output) -> anyhow::Result<()> {
        let given = compare::given(&Events::open(file)?, plugin, self.config.as_ref(), &[plugin])?;
        let runs = self.runs();
        let open = || Events::open(file);
        let (report, totals) =
            super::told_if_slow("handling the events", || try_on(bench, plugin, &given, open, &runs))?;
        if let Some(file) = &self.junit {
            write_junit(file, plugin, std::slice::from_ref(&report))?;
        }
        if out.is_json() {
            out.object(&json!({ "did": totals, "run": row(&report) }))?;
        } else {
            show(&report)?;
            out.object(&json!(totals))?;
        }
        if report.is_well() { Ok(()) } else { Err(Failed { failed: 1, all: 1 }.into()) }
    }

    fn runs(&self) -> Runs {
        Runs { crash: !self.no_crash, replace: !self.no_replace, record: self.bless }
    }

    fn one(&self, bench: &Bench, plugin: &Plugin, file: &Path, out: &Output) -> anyhow::Result<Report> {
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let runs = self.runs();
        let run = || -> anyhow::Result<(Report, usize)> {
            let scenario = Scenario::read(file)?;
            Ok((scenario.run(bench, plugin, &runs)?, scenario.steps()))
        };
        // One that cannot be run does not keep the others from it.
        let broken = |error: anyhow::Error| (Report::broken(name.clone(), format!("{error:#}")), usize::MAX);
        let (mut report, steps) = run().unwrap_or_else(broken);
        // Of one that has ended early it is not known what happens.
        if self.bless && report.happened.len() == steps {
            match bless(file, &report.happened) {
                Ok(true) => {
                    note(&format!("blessed {}", file.display()));
                    report = run().unwrap_or_else(broken).0;
                }
                Ok(false) => {}
                Err(error) => report.failures.push(Failure::because(chain(&error))),
            }
        }
        if !out.is_json() {
            show(&report)?;
        }
        Ok(report)
    }

    fn conclude(&self, plugin: &Plugin, results: &[Report], out: &Output) -> anyhow::Result<()> {
        if let Some(file) = &self.junit {
            write_junit(file, plugin, results)?;
        }
        let failed = results.iter().filter(|report| !report.is_well()).count();
        if out.is_json() {
            let rows: Vec<Value> = results.iter().map(row).collect();
            out.object(&json!({ "plugin": plugin.name(), "failed": failed, "scenarios": rows }))?;
        } else {
            line(&format!("{} of {} scenarios are well", results.len() - failed, results.len()))?;
        }
        if failed > 0 {
            return Err(Failed { failed, all: results.len() }.into());
        }
        Ok(())
    }

    /// Where the scenarios are.
    fn places(&self) -> Vec<PathBuf> {
        if !self.scenarios.is_empty() {
            return self.scenarios.clone();
        }
        let beside = match self.subject.is_dir() {
            true => self.subject.as_path(),
            false => self.subject.parent().unwrap_or(Path::new("")),
        };
        vec![beside.join(SCENARIOS)]
    }

    /// The scenarios, in the order of their names.
    fn files(&self) -> anyhow::Result<Vec<PathBuf>> {
        let asked = self.places();
        let mut files = Vec::new();
        for path in asked {
            if !path.is_dir() {
                files.push(path);
                continue;
            }
            let listed = std::fs::read_dir(&path)
                .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                .with_context(|| format!("cannot look into {}", path.display()))?;
            let mut scenarios: Vec<_> = listed.into_iter().map(|file| file.path()).collect();
            scenarios.retain(|file| file.extension().is_some_and(|kind| kind == "yaml" || kind == "yml"));
            scenarios.sort();
            files.extend(scenarios);
        }
        let is_meant = |file: &PathBuf| {
            let name = file.file_stem().unwrap_or_default().to_string_lossy();
            self.only.as_ref().is_none_or(|only| name.contains(only))
        };
        files.retain(is_meant);
        if files.is_empty() {
            bail!(
                "there are no scenarios: write one to {SCENARIOS}/NAME.yaml, or say where they are with --scenario"
            );
        }
        Ok(files)
    }
}

/// Shows what came of a scenario, to people.
fn show(report: &Report) -> anyhow::Result<()> {
    report.to_string().lines().try_for_each(line)
}

fn row(report: &Report) -> Value {
    let failures = report.failures.iter().map(|failure| {
        let differences = failure
            .differences
            .iter()
            .map(|it| json!({ "place": it.place, "expected": it.expected, "actual": it.actual }));
        json!({
            "place": failure.place,
            "reason": failure.reason,
            "run": failure.why.as_str(),
            "differences": differences.collect::<Vec<_>>(),
        })
    });
    json!({
        "scenario": report.name,
        "ok": report.is_well(),
        "entries": report.entries,
        "crashes": report.crashes,
        "replacements": report.replacements,
        "seconds": report.took.as_secs_f64(),
        "failures": failures.collect::<Vec<_>>(),
    })
}

fn write_junit(file: &Path, plugin: &Plugin, results: &[Report]) -> anyhow::Result<()> {
    std::fs::write(file, junit(plugin.name().as_str(), results))
        .with_context(|| format!("cannot write {}", file.display()))
}

/// The results in the form of JUnit.
fn junit(plugin: &str, results: &[Report]) -> String {
    let failed = results.iter().filter(|report| !report.is_well()).count();
    let seconds = |took: Duration| took.as_secs_f64();
    let took: f64 = results.iter().map(|report| seconds(report.took)).sum();
    let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites>\n");
    let _ = writeln!(
        xml,
        "  <testsuite name=\"{}\" tests=\"{}\" failures=\"{failed}\" time=\"{took:.3}\">",
        escaped(plugin),
        results.len()
    );
    for report in results {
        let (name, took) = (escaped(&report.name), seconds(report.took));
        let _ =
            write!(xml, "    <testcase classname=\"{}\" name=\"{name}\" time=\"{took:.3}\"", escaped(plugin));
        if report.is_well() {
            xml.push_str("/>\n");
            continue;
        }
        let text: String = report.failures.iter().map(ToString::to_string).collect();
        // Most that CI shows of a failure is its message.
        let first = report.failures.first().map(ToString::to_string).unwrap_or_default();
        let _ = writeln!(
            xml,
            ">\n      <failure message=\"{}\">{}</failure>\n    </testcase>",
            escaped(first.lines().next().unwrap_or_default()),
            escaped(&text)
        );
    }
    xml.push_str("  </testsuite>\n</testsuites>\n");
    xml
}

/// A text in XML; what XML cannot hold is a question mark.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' | '\t' => out.push(c),
            '\u{fffe}' | '\u{ffff}' => out.push('?'),
            c if c.is_control() => out.push('?'),
            c => out.push(c),
        }
    }
    out
}
