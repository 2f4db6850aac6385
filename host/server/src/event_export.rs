//! Owns the export of recorded entries. It receives a running host and a filter, reads the log from its first entry
//! to its last, and writes lines in the format of [`export`](dim_model::entry::export).

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufWriter, Write};
use std::sync::Arc;

use dim_model::entry::export::{FORM, Header, Record, What};
use dim_model::entry::{Offset, Resolution};
use dim_model::ident::{IpnsName, KeyName, PluginName, Topic};
use dim_model::time::Timestamp;
use dim_store::grants::{NameOrKey, Reach};
use dim_store::{Store, StoreError, documents};
use multibase::Base;
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use crate::host::{Host, secret};

/// The number of entries that are read at a time.
const TOGETHER: usize = 4_096;

/// An error that ends an export.
#[derive(Debug, Error)]
pub enum ExportError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The reader of the export failed.
    #[error("cannot write")]
    Write(#[from] io::Error),
    /// A record cannot be written as JSON.
    #[error("cannot write a record")]
    Record(#[from] serde_json::Error),
}

/// The filter of an export.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Only entries that this plugin can react to.
    pub plugin: Option<PluginName>,
    /// Only entries about this topic.
    pub topic: Option<Topic>,
    /// Only entries that were appended at this time or later.
    pub since: Option<Timestamp>,
}

/// The log to export, and the description of its host.
pub struct Source {
    store: Arc<Store>,
    host: String,
    keys: BTreeMap<KeyName, IpnsName>,
    plugins: BTreeMap<PluginName, Audience>,
    until: Timestamp,
    head: Offset,
}

/// The config and the permissions of a plugin that reacts to entries.
struct Audience {
    config: Value,
    reach: Arc<Reach>,
    /// The names that the plugin may read.
    names: BTreeSet<IpnsName>,
}

impl Source {
    /// Returns the log of a running host, up to its current end.
    pub fn of(host: &Host) -> Self {
        let keys: BTreeMap<KeyName, IpnsName> =
            host.storage.keys.all().into_iter().map(|(key, held)| (key, held.name())).collect();
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
            store: host.storage.store.clone(),
            host: host.id.clone(),
            keys,
            plugins,
            until: host.storage.log.now(),
            head: host.storage.log.head(),
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

/// Writes the entries that match `wanted`, from the first entry of the log to the last one that existed when `source`
/// was made. Blocks until the end.
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
