//! Merges the registry that another host publishes. An unreadable row affects only itself.

use std::collections::{BTreeMap, BTreeSet};

use dim_guest::heartbeat::check_id;
use dim_guest::log::{self, Level};
use dim_guest::state::{self, Map, Value, set_json};
use dim_guest::time::Time;
use dim_guest::{Failure, ipns};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::node::{Node, Row};

/// The nodes of another host's registry.
pub const MERGED: Map<str, Node> = Map::new("merged/");

/// The key of the name of that registry, which its nodes show as `source`.
const MERGED_FROM: &[u8] = b"registry";

/// The report of the last merge.
const REPORT: Value<Report> = Value::new("merge-report");

/// Maximum number of reasons in a report.
const REASONS: usize = 5;

/// Maximum size of a reason, in bytes. An error of the JSON reader repeats its input.
const REASON_BYTES: usize = 200;

/// The report of the last merge of another host's registry.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The name of the registry; none before the first merge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registry: Option<String>,
    /// The time of the merge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<Time>,
    /// The number of merged nodes.
    pub nodes: u64,
    /// The number of rows that were not merged.
    pub set_aside: u64,
    /// The number of nodes that were merged without an unreadable member.
    pub incomplete: u64,
    /// The first reasons for rows that were not merged or are incomplete.
    pub reasons: Vec<String>,
    /// The reason why the last document could not be merged. The nodes of the previous merge stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Report {
    fn because(&mut self, reason: String) {
        if self.reasons.len() < REASONS {
            let cut = reason.floor_char_boundary(REASON_BYTES);
            self.reasons.push(reason[..cut].to_owned());
        }
    }

    fn set_aside(&mut self, reason: String) {
        self.set_aside += 1;
        self.because(reason);
    }
}

/// Returns the name of the merged registry.
pub fn source() -> Result<Option<String>, state::Error> {
    state::get_json(MERGED_FROM)
}

/// Returns the report of the last merge.
pub fn report() -> Result<Report, state::Error> {
    Ok(REPORT.get()?.unwrap_or_default())
}

/// Removes the merged nodes and the report, if the registry is no longer followed.
pub fn forget() -> Result<(), state::Error> {
    if state::get(MERGED_FROM)?.is_none() {
        return Ok(());
    }
    for row in MERGED.iter_raw(None) {
        MERGED.delete(&row?.0)?;
    }
    REPORT.delete()?;
    state::delete(MERGED_FROM)
}

/// Merges the registry that another host publishes under `name`, in one entry, so that the merge is atomic. The size
/// limit of documents keeps the number of changes below the limits of an entry.
pub fn merge(name: &str) -> Result<(), Failure> {
    #[derive(Deserialize)]
    struct Registry<'a> {
        #[serde(borrow)]
        nodes: Vec<&'a RawValue>,
    }
    // The host no longer holds this document because a newer one has arrived, with its own event.
    let Ok(document) = ipns::get_state(name) else { return Ok(()) };
    let now = Time::now();
    let registry: Registry<'_> = match serde_json::from_slice(&document.data) {
        Ok(registry) => registry,
        Err(error) => {
            let error = format!("it is not a registry: {error}");
            let fields = [("name", name), ("why", &error)];
            log::line(Level::Warn, "the registry of another host cannot be merged", &fields);
            let failed = Report { registry: Some(name.to_owned()), error: Some(error), ..report()? };
            return Ok(REPORT.set(&failed)?);
        }
    };
    let mut report = Report { registry: Some(name.to_owned()), at: Some(now), ..Report::default() };
    let nodes = read_all(&registry.nodes, now, &mut report);
    set_json(MERGED_FROM, &name)?;
    let mut gone: BTreeSet<String> =
        MERGED.iter_raw(None).map(|row| Ok(row?.0)).collect::<Result<_, Failure>>()?;
    for (id, node) in &nodes {
        gone.remove(id);
        MERGED.set(id, node)?;
    }
    for id in gone {
        MERGED.delete(&id)?;
    }
    report.nodes = nodes.len() as u64;
    if report.set_aside + report.incomplete > 0 {
        let (set_aside, incomplete) = (report.set_aside.to_string(), report.incomplete.to_string());
        let fields = [
            ("registry", name),
            ("set_aside", &set_aside),
            ("incomplete", &incomplete),
            ("reasons", &report.reasons.join("; ")),
        ];
        log::line(Level::Warn, "rows of a merged registry cannot be read", &fields);
    }
    Ok(REPORT.set(&report)?)
}

/// Reads the nodes by id. Adds unreadable rows to the report.
fn read_all(rows: &[&RawValue], now: Time, report: &mut Report) -> BTreeMap<String, Node> {
    let mut nodes: BTreeMap<String, Node> = BTreeMap::new();
    for (number, row) in rows.iter().enumerate() {
        let (node, reasons) = match serde_json::from_str::<Row<'_>>(row.get()) {
            Ok(row) => row.read(),
            Err(error) => {
                report.set_aside(format!("row {number}: {error}"));
                continue;
            }
        };
        if let Err(why) = check_id(&node.node_id) {
            report.set_aside(format!("row {number}: {why}"));
            continue;
        }
        if !reasons.is_empty() {
            report.incomplete += 1;
            report.because(format!("row {number}: {}", reasons.join(", ")));
        }
        // A time in the future would hide later heartbeats at this host.
        let node = Node { last_seen: node.last_seen.min(now), ..node };
        if let Some(known) = nodes.get(&node.node_id) {
            report.set_aside(format!("row {number}: {} occurs twice", node.node_id));
            if known.last_seen >= node.last_seen {
                continue;
            }
        }
        nodes.insert(node.node_id.clone(), node);
    }
    nodes
}
