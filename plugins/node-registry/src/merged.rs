//! The registry that another host publishes, beside the own one. A row that cannot be read costs itself.

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

/// The key of the name of that registry; each of its nodes is shown with it.
const MERGED_FROM: &[u8] = b"registry";

/// How the last merge went.
const REPORT: Value<Report> = Value::new("merge-report");

/// Reasons that a report keeps.
const REASONS: usize = 5;

/// Largest of them, in bytes: an error of the reader repeats what it has read.
const REASON_BYTES: usize = 200;

/// How the last merge of another host's registry went.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The registry's name; none if none was merged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registry: Option<String>,
    /// When it was merged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<Time>,
    /// Nodes that were taken.
    pub nodes: u64,
    /// Rows that were not.
    pub set_aside: u64,
    /// Nodes that were taken without a member that cannot be read.
    pub incomplete: u64,
    /// Why, the first few.
    pub reasons: Vec<String>,
    /// Why the last document could not be merged; what was merged before it stays.
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

/// The name of the registry that is merged.
pub fn source() -> Result<Option<String>, state::Error> {
    state::get_json(MERGED_FROM)
}

/// How the last merge went.
pub fn report() -> Result<Report, state::Error> {
    Ok(REPORT.get()?.unwrap_or_default())
}

/// Forgets what was merged from a registry that is followed no more.
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

/// Takes in the registry that another host publishes under `name`. In one entry, so that no one
/// sees half of it: a document that can be published has no more than an entry may change.
pub fn merge(name: &str) -> Result<(), Failure> {
    #[derive(Deserialize)]
    struct Registry<'a> {
        #[serde(borrow)]
        nodes: Vec<&'a RawValue>,
    }
    // Not held any more: a newer one has come, and with it another event.
    let Ok(document) = ipns::get_state(name) else { return Ok(()) };
    let now = Time::now();
    let registry: Registry<'_> = match serde_json::from_slice(&document.data) {
        Ok(registry) => registry,
        Err(error) => {
            let error = format!("it holds no registry: {error}");
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

/// The nodes that can be read, by id; the report says what cannot.
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
        // A clock that is ahead would hide what this host hears itself.
        let node = Node { last_seen: node.last_seen.min(now), ..node };
        if let Some(known) = nodes.get(&node.node_id) {
            report.set_aside(format!("row {number}: {} is there twice", node.node_id));
            if known.last_seen >= node.last_seen {
                continue;
            }
        }
        nodes.insert(node.node_id.clone(), node);
    }
    nodes
}
