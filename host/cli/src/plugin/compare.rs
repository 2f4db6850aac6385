//! Owns `dim plugin compare`: runs two versions of a plugin on the same recorded events. Receives two components and an
//! export of events; shows where the effects differ.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use dim_model::error_chain::chain;
use dim_model::escape::escaped;
use dim_model::time::Since;
use dim_scenarios::{Comparison, Differing, Events, Given, Identity, Plugin, TestBench, compare};
use serde_json::{Value, json};

use super::told_if_slow;
use crate::events::Wanted;
use crate::output::{self, Output, note_piece};
use crate::{Global, human, input};

#[derive(Debug, Args)]
pub struct Compare {
    /// Old component
    #[arg(value_name = "OLD")]
    old: PathBuf,
    /// New component
    #[arg(value_name = "NEW")]
    new: PathBuf,
    /// Events from `dim events export` [default: the events of the running host; requires --since]
    #[arg(long, value_name = "FILE", required_unless_present = "since")]
    events: Option<PathBuf>,
    /// Compare from this time on (RFC 3339, such as 2026-01-31T12:00:00Z, or seconds since 1970), or from this duration
    /// before the end (2h); the events before it produce the initial state of both versions
    #[arg(long, value_name = "TIME")]
    since: Option<Since>,
    /// Plugin config, a JSON object or @FILE [default: the config on the host that recorded the events]
    #[arg(long, value_name = "JSON", value_parser = input::json_or_file::<Value>)]
    config: Option<Value>,
    /// Maximum number of differing records to show
    #[arg(long, value_name = "N", default_value_t = 10)]
    detail: usize,
}

/// The error for versions that differ in at least one record.
#[derive(Debug, thiserror::Error)]
#[error("the versions differ in {0} of {1} records")]
pub struct Differ(u64, u64);

/// The error for versions that differ only in their final state.
#[derive(Debug, thiserror::Error)]
#[error("the versions have different final states")]
pub struct DifferAtEnd;

impl Compare {
    /// Compares the versions, and shows the differences. Fails if there are any.
    pub fn execute(self, global: &Global) -> anyhow::Result<()> {
        let bench = TestBench::new()?;
        let (old, new) = (compiled(&bench, &self.old)?, compiled(&bench, &self.new)?);
        let (file, _fetched) = match &self.events {
            Some(file) => (file.clone(), None),
            None => {
                let wanted = Wanted { plugin: Some(old.name().to_string()), ..Wanted::default() };
                let client = global.client()?;
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                let (half, _) = runtime.block_on(wanted.fetch(&client, &std::env::temp_dir()))?;
                (half.path().to_owned(), Some(half))
            }
        };
        let events = Events::open(&file)?;
        let config = self.config.as_ref();
        let both = [&old, &new];
        let (of_old, of_new) = (given(&events, &old, config, &both)?, given(&events, &new, config, &both)?);
        let since = self.since.map(|since| since.before(events.header.until));
        let mut told = Instant::now();
        let tell = |records: u64| {
            if told.elapsed() > Duration::from_secs(1) && std::io::stderr().is_terminal() {
                note_piece(&format!("\r{records} records …"));
                told = Instant::now();
            }
        };
        // `compare` blocks and must not run on an async thread.
        let compared = std::thread::scope(|scope| {
            let comparing =
                scope.spawn(|| compare(&bench, (&old, &new), (&of_old, &of_new), events, since, tell));
            comparing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        if std::io::stderr().is_terminal() {
            note_piece("\r");
        }
        let compared = compared?;
        self.show(&compared, &global.out())?;
        if compared.is_same() {
            return Ok(());
        }
        match compared.differing {
            0 => Err(DifferAtEnd.into()),
            differing => Err(Differ(differing, compared.records).into()),
        }
    }

    fn show(&self, compared: &Comparison, out: &Output) -> anyhow::Result<()> {
        if out.is_json() {
            let mut shown = json!(compared);
            if let Some(first) = shown["first"].as_array_mut() {
                first.truncate(self.detail);
            }
            return out.object(&shown);
        }
        for differing in compared.first.iter().take(self.detail) {
            show_one(differing)?;
        }
        let row =
            |name: &str, old: String, new: String| output::line(&format!("{name:<14}{old:>22}  {new:>22}"));
        row(
            "",
            format!("old {}", escaped(&compared.old.version)),
            format!("new {}", escaped(&compared.new.version)),
        )?;
        let (old, new) = (&compared.old, &compared.new);
        for (name, old, new) in [
            ("calls", old.calls, new.calls),
            ("state writes", old.state_writes, new.state_writes),
            ("publishes", old.publishes, new.publishes),
            ("names", old.names, new.names),
            ("dead letters", old.dead, new.dead),
            ("retries", old.retries, new.retries),
        ] {
            row(name, old.to_string(), new.to_string())?;
        }
        row("state", human::size(old.state_bytes), human::size(new.state_bytes))?;
        row("memory", human::size(old.memory as u64), human::size(new.memory as u64))?;
        row("CPU time", format!("{:.3} s", old.cpu_seconds), format!("{:.3} s", new.cpu_seconds))?;
        row("effects", short(&old.effects), short(&new.effects))?;
        let sections: Vec<_> =
            compared.by_section.iter().map(|(name, count)| format!("{name} {count}")).collect();
        output::line(&format!(
            "{} of {} records differ{}{}, at {:.0} records a second",
            compared.differing,
            compared.records,
            if sections.is_empty() { String::new() } else { format!(": {}", sections.join(", ")) },
            if compared.before == 0 { String::new() } else { format!("; {} came before", compared.before) },
            compared.rate()
        ))?;
        let state = &compared.state;
        if state.only_old + state.only_new + state.different > 0 {
            output::line(&format!(
                "the final states differ: {} keys are only in the old one, {} only in the new one, {} have different values: {}",
                state.only_old,
                state.only_new,
                state.different,
                state.keys.iter().take(10).cloned().collect::<Vec<_>>().join(", ")
            ))?;
        }
        Ok(())
    }
}

fn short(digest: &str) -> String {
    digest.chars().take(16).collect()
}

fn show_one(differing: &Differing) -> anyhow::Result<()> {
    let Differing { offset, time, what, .. } = differing;
    let entry = offset.map_or_else(String::new, |offset| format!(" entry {offset}"));
    output::line(&format!("{time}{entry}: {what}"))?;
    for difference in &differing.differences {
        for line in difference.to_string().lines() {
            output::line(&format!("  {}", line))?;
        }
    }
    Ok(())
}

/// Reads and compiles a component.
pub fn compiled(bench: &TestBench, file: &Path) -> anyhow::Result<Plugin> {
    let bytes = dim_runtime::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let compiled = told_if_slow(&format!("compiling {}", file.display()), || bench.plugin(&bytes));
    compiled.map_err(|error| anyhow::anyhow!("{}: {}", file.display(), chain(&error)))
}

/// The initial data of a plugin for recorded events. The config is the recorded one, overridden by `config`. Fails if
/// none of the plugins in `all` knows a value of `config`.
pub fn given(
    events: &Events,
    plugin: &Plugin,
    config: Option<&Value>,
    all: &[&Plugin],
) -> anyhow::Result<Given> {
    let object = |value: &Value| match value {
        Value::Object(members) => Ok(members.clone()),
        _ => Err(anyhow::anyhow!("a plugin's config is a JSON object")),
    };
    let knows = |plugin: &Plugin, name: &String| plugin.inspection().manifest.config.contains_key(name);
    let set = config.map(object).transpose()?.unwrap_or_default();
    if let Some(name) = set.keys().find(|name| !all.iter().any(|plugin| knows(plugin, name))) {
        anyhow::bail!("the plugin has no config value {name:?}");
    }
    let recorded = events.header.plugins.get(plugin.name()).map(object).transpose()?.unwrap_or_default();
    // Each version gets only the values that it knows. The other version may know more.
    let values = recorded.into_iter().chain(set).filter(|(name, _)| knows(plugin, name)).collect();
    let (time, host) = (events.begin(), Identity::recorded(&events.header)?);
    Ok(Given { config: values, time, host, ..Given::default() })
}
