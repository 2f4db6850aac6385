//! Owns `dim plugin test`: runs the scenarios of a plugin, or recorded events, without a host and without a network.
//! Receives a plugin and scenario files; returns reports, as text, JSON or JUnit.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use dim_model::error_chain::chain;
use dim_scenarios::{Events, Failure, Plugin, Report, Runs, Scenario, TestBench, bless, try_on};
use serde_json::{Value, json};

use super::build::{self, Again};
use super::compare;
use super::watch::Source;
use crate::input;
use crate::output::{BAD, Output, line, marked_notes, note};

/// The directory with the scenarios, in the directory of a plugin.
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

/// The error for scenarios that did not meet their expectations.
#[derive(Debug, thiserror::Error)]
#[error("{failed} of {all} scenarios failed")]
pub struct Failed {
    failed: usize,
    all: usize,
}

impl Test {
    /// Runs the scenarios once. With `--watch` it runs them again after each change, until interrupted.
    pub fn execute(self, out: &Output) -> anyhow::Result<()> {
        let bench = TestBench::new()?;
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

    fn round(&self, bench: &TestBench, out: &Output) -> anyhow::Result<()> {
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

    /// Runs the plugin on recorded events, and shows the totals of its effects.
    fn on_events(&self, bench: &TestBench, plugin: &Plugin, file: &Path, out: &Output) -> anyhow::Result<()> {
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

    fn one(&self, bench: &TestBench, plugin: &Plugin, file: &Path, out: &Output) -> anyhow::Result<Report> {
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let runs = self.runs();
        let run = || -> anyhow::Result<(Report, usize)> {
            let scenario = Scenario::read(file)?;
            Ok((scenario.run(bench, plugin, &runs)?, scenario.steps()))
        };
        // A scenario that cannot run must not stop the others.
        let broken = |error: anyhow::Error| (Report::broken(name.clone(), format!("{error:#}")), usize::MAX);
        let (mut report, steps) = run().unwrap_or_else(broken);
        // A run that ended early has no results for its last steps, so it cannot be blessed.
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

    /// The paths of the scenarios: those of `--scenario`, else the directory `scenarios` beside the plugin.
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

    /// The selected scenario files, in the order of the paths and of their names. Fails if there are none.
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
                .with_context(|| format!("cannot read {}", path.display()))?;
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
                "there are no scenarios: write one to {SCENARIOS}/NAME.yaml, or name its path with --scenario"
            );
        }
        Ok(files)
    }
}

/// Shows a report to people.
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

/// Formats the results as JUnit XML.
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
        // CI systems show mostly the message of a failure, so it gets the first line of the text.
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

/// Escapes a text for XML. A character that XML cannot contain becomes a question mark.
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
