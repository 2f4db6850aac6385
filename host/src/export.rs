//! Owns the way of recorded entries out of a host: reads its log from its first entry to its last and writes what was
//! asked for, as [`exported`](crate::entry::exported) says.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufWriter, Write};
use std::sync::Arc;

use multibase::Base;
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use crate::entry::exported::{FORM, Header, Record, What};
use crate::entry::{Offset, Resolution};
use crate::host::{Host, secret};
use crate::ident::{IpnsName, KeyName, PluginName, Topic};
use crate::plugin::{NameOrKey, Reach};
use crate::store::{Store, StoreError, documents};
use crate::time::Timestamp;

/// Entries that are read at a time.
const TOGETHER: usize = 4_096;

/// Why an export was not finished.
#[derive(Debug, Error)]
pub enum ExportError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Whoever reads it.
    #[error("cannot write")]
    Write(#[from] io::Error),
    /// A record that is no JSON.
    #[error("cannot write a record")]
    Record(#[from] serde_json::Error),
}

/// Which entries are wanted.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Only what this plugin can react to.
    pub plugin: Option<PluginName>,
    /// Only what concerns this topic.
    pub topic: Option<Topic>,
    /// Only what was appended at this time or later.
    pub since: Option<Timestamp>,
}

/// Where entries are read, and what is told of the host.
pub struct Source {
    store: Arc<Store>,
    host: String,
    keys: BTreeMap<KeyName, IpnsName>,
    plugins: BTreeMap<PluginName, Audience>,
    until: Timestamp,
    head: Offset,
}

/// A plugin that reacts to entries.
struct Audience {
    config: Value,
    reach: Arc<Reach>,
    /// The names that it may read.
    names: BTreeSet<IpnsName>,
}

impl Source {
    /// The log of a running host, as far as it goes now.
    pub fn of(host: &Host) -> Self {
        let keys: BTreeMap<KeyName, IpnsName> =
            host.keys.all().into_iter().map(|(key, held)| (key, held.name())).collect();
        let plugins = host.plugins.all().into_iter().map(|(name, plugin)| {
            let code = plugin.handle.code();
            let config = serde_json::from_str(&code.config).unwrap_or_default();
            let named = code.reach.reads().filter_map(|either| match either {
                NameOrKey::Name(name) => Some(name.clone()),
                NameOrKey::Key(key) => keys.get(key).cloned(),
            });
            (name, Audience { config, reach: code.reach.clone(), names: named.collect() })
        });
        let plugins = plugins.collect();
        Self {
            store: host.store.clone(),
            host: host.id.clone(),
            keys,
            plugins,
            until: host.log.now(),
            head: host.log.head(),
        }
    }

    fn header(&self) -> Result<Header, StoreError> {
        let mut stand_in = Sha256::new();
        stand_in.update(b"what random follows from in exported events");
        stand_in.update(secret(&self.store)?);
        Ok(Header {
            dim_events: FORM,
            host: self.host.clone(),
            random: Base::Base16Lower.encode(stand_in.finalize()),
            keys: self.keys.clone(),
            plugins: self.plugins.iter().map(|(name, it)| (name.clone(), it.config.clone())).collect(),
            until: self.until,
        })
    }
}

/// Writes what is wanted, from the first entry that the log holds to the last that it held when `source` was made.
/// Blocks for as long as that takes.
pub fn write(source: &Source, wanted: &Wanted, out: impl Write) -> Result<(), ExportError> {
    let mut out = BufWriter::with_capacity(64 << 10, out);
    put(&mut out, &source.header()?)?;
    let mut next = source.store.log_start()?.unwrap_or(source.head);
    while next < source.head {
        let entries = source.store.read_log(next, TOGETHER)?;
        let Some(last) = entries.last() else { break };
        next = Offset(last.offset.0 + 1);
        let snapshot = source.store.snapshot()?;
        for entry in entries.iter().filter(|entry| entry.offset < source.head) {
            if wanted.since.is_some_and(|since| entry.time < since) {
                continue;
            }
            let document = |it: &Resolution| documents::get(&snapshot, &it.path).ok().flatten();
            let Some(mut record) = Record::of(entry, document) else { continue };
            if let What::Heard(spans) = &mut record.what {
                spans.retain(|span| wanted.means_topic(&span.topic, source));
            }
            if wanted.means(&record.what, source) {
                put(&mut out, &record)?;
            }
        }
    }
    Ok(out.flush()?)
}

fn put(out: &mut impl Write, line: &impl Serialize) -> Result<(), ExportError> {
    serde_json::to_writer(&mut *out, line)?;
    Ok(out.write_all(b"\n")?)
}

impl Wanted {
    fn means(&self, what: &What, source: &Source) -> bool {
        let topics = what.topics();
        if !topics.is_empty() || matches!(what, What::Heard(_)) {
            return topics.into_iter().any(|topic| self.means_topic(topic, source));
        }
        if self.topic.is_some() {
            return false;
        }
        let Some(plugin) = &self.plugin else { return true };
        let Some(Audience { names, .. }) = source.plugins.get(plugin) else { return false };
        match what {
            What::Command { plugin: whose, .. } => whose == plugin,
            What::Name { resolution, .. } | What::Confirmed(resolution) => names.contains(&resolution.name),
            _ => false,
        }
    }

    fn means_topic(&self, topic: &Topic, source: &Source) -> bool {
        let hears =
            |plugin: &PluginName| source.plugins.get(plugin).is_some_and(|it| it.reach.may_subscribe(topic));
        self.topic.as_ref().is_none_or(|wanted| wanted == topic) && self.plugin.as_ref().is_none_or(hears)
    }
}
