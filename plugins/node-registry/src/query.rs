//! Answers the queries of the registry. Own and merged nodes form one list.

use dim_guest::list::{Both, Page, SideBySide};
use dim_guest::log::{self, Level};
use dim_guest::state;
use serde::Deserialize;

use crate::merged::{MERGED, source};
use crate::node::{NODES, Node};
use crate::resources::amount;

/// The body of the query `list`: a filter of nodes and a page.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Filter {
    status: Option<String>,
    cached_model: Option<String>,
    min_memory: Option<f64>,
    gpu: Option<bool>,
    after: Option<String>,
    limit: Option<usize>,
}

impl Filter {
    fn matches(&self, node: &Node) -> bool {
        let has = &node.resources;
        self.status.as_ref().is_none_or(|status| node.status == *status)
            && self.cached_model.as_ref().is_none_or(|model| node.cached_models.contains(model))
            && self.min_memory.is_none_or(|least| amount(has.memory_available.as_ref()) >= least)
            && self.gpu.is_none_or(|gpu| (amount(has.gpu_available.as_ref()) > 0.0) == gpu)
    }
}

/// Returns a node. If both the own and the merged registry know it, returns the one with the later `last_seen`.
pub fn get(id: &str) -> Result<Option<Node>, state::Error> {
    let own = NODES.get(id)?;
    let merged = match MERGED.get(id)? {
        Some(node) => Some(Node { source: source()?, ..node }),
        None => None,
    };
    Ok(own.into_iter().chain(merged).max_by_key(|node| node.last_seen))
}

/// Returns a page of the matching nodes, own and merged, sorted by id. The next page starts after its last node; an
/// empty page is the end. An unreadable record is left out and logged.
pub fn list(filter: &Filter) -> Result<Vec<Node>, state::Error> {
    let after = filter.after.as_deref();
    let source = source()?;
    let mut page = Page::new(filter.limit);
    let mut rows = SideBySide::new(NODES.iter_raw(after), MERGED.iter_raw(after));
    while page.has_room() {
        let Some(Both { one: own, other: merged }) = rows.next().transpose()? else { break };
        let own = own.and_then(|record| Some((read(&record)?, record.len())));
        let merged = merged.and_then(|record| {
            let node = read(&record)?;
            Some((Node { source: source.clone(), ..node }, record.len()))
        });
        // If both know the node, the later `last_seen` wins.
        let newest = own.into_iter().chain(merged).max_by_key(|(node, _)| node.last_seen);
        if let Some((node, bytes)) = newest.filter(|(node, _)| filter.matches(node)) {
            page.push(node, bytes);
        }
    }
    Ok(page.into_rows())
}

/// Reads a stored node. Logs an unreadable record and returns none.
pub fn read(record: &[u8]) -> Option<Node> {
    match state::decode(record) {
        Ok(node) => Some(node),
        Err(error) => {
            log::line(
                Level::Error,
                "a stored node is unreadable and is left out",
                &[("error", &format!("{error:?}"))],
            );
            None
        }
    }
}
