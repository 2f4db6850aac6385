//! What a plugin would have done alone: the same recorded log, handled by the old code from the beginning.

use std::path::Path;

use dim::change::Change;
use dim::host::{Proposal, ReplaceError};
use dim::plugin::Batch;
use dim::replay::Replay;
use dim::store::{STATE, StateKey, Store, TIMERS};
use redb::ReadableTable as _;

use crate::{Setup, TestHost};

/// Rows by their keys.
pub type Rows = Vec<(Vec<u8>, Vec<u8>)>;

/// The rows of the state and of the timers, of all plugins.
pub fn rows(store: &Store) -> Rows {
    let snapshot = store.snapshot().expect("the store can be read");
    let (state, timers) = (snapshot.table(STATE).expect("a table"), snapshot.table(TIMERS).expect("a table"));
    let state = state.iter().expect("rows").map(|row| row.expect("a row"));
    let timers = timers.iter().expect("rows").map(|row| row.expect("a row"));
    state
        .map(|(key, value)| (key.value().to_vec(), value.value().to_vec()))
        .chain(timers.map(|(key, at)| (key.value().to_vec(), at.value().to_be_bytes().to_vec())))
        .collect()
}

/// The rows of the probe when it handles the log that a host left, alone.
pub fn rows_as_if_alone(setup: &Setup, dir: &Path) -> Rows {
    let replay = Replay::open(&setup.config(), dir).expect("the log can be opened again");
    let done = replay.run().expect("the log can be handled again");
    let (_, batch) = done.into_iter().find(|(name, _)| name.as_str() == "probe").expect("the probe");
    rows_of(batch)
}

/// The rows of the state and of the timers that a plugin leaves which does this from the beginning.
pub fn rows_of(batch: Batch) -> Rows {
    let state = batch.state.into_iter().filter_map(|(key, value)| Some((key, value?)));
    let timers = batch.timers.into_iter();
    let timers = timers.filter_map(|(key, at)| Some((key.into_bytes(), at?.0.to_be_bytes().to_vec())));
    let stored = |key: &[u8]| StateKey::new(batch.id, key).as_bytes().to_vec();
    state.chain(timers).map(|(key, value)| (stored(&key), value)).collect()
}

/// Ends a host; fails unless it has left what the probe does alone.
pub async fn is_as_if_alone(host: TestHost, setup: &Setup) {
    host.settled().await;
    let store = host.host.store.clone();
    let dir = host.stop().await;
    let left = rows(&store);
    drop(store);
    assert_eq!(left, rows_as_if_alone(setup, dir.path()), "as if it had been alone");
}

/// A component that a test brings for a plugin.
pub fn proposal(plugin: &str, component: Vec<u8>) -> Proposal {
    let (plugin, component) = (plugin.parse().expect("a name"), component.into());
    let (source, by) = ("a file".to_owned(), "the test".to_owned());
    Proposal { plugin, component, source, by, follows: None, is_named: false, trust: None }
}

/// Replaces the probe of a host.
pub async fn replace(host: &TestHost, component: Vec<u8>) -> Result<Change, ReplaceError> {
    host.host.replace(proposal("probe", component)).await
}
