//! Computes the expected state of a plugin without a replacement: the old code handles the same recorded log from the
//! beginning.

use std::path::Path;

use dim_server::host::{Proposal, ReplaceError};
use dim_server::replay::Replay;
use dim_store::batch::Batch;
use dim_store::change::Change;
use dim_store::{STATE, StateKey, Store, TIMERS};
use redb::ReadableTable as _;

use crate::{Setup, TestHost};

/// Rows of the store, sorted by key.
pub type Rows = Vec<(Vec<u8>, Vec<u8>)>;

/// Returns the rows of the state and of the timers of all plugins.
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

/// Returns the rows of the probe after it handled the log of a stopped host without a replacement.
pub fn rows_as_if_alone(setup: &Setup, dir: &Path) -> Rows {
    let replay = Replay::open(&setup.config(), dir).expect("the log can be opened again");
    let done = replay.run().expect("the log can be handled again");
    let (_, batch) = done.into_iter().find(|(name, _)| name.as_str() == "probe").expect("the probe");
    rows_of(batch)
}

/// Returns the rows of the state and of the timers in the batch of a whole replay.
pub fn rows_of(batch: Batch) -> Rows {
    let state = batch.requested.state.into_iter().filter_map(|(key, value)| Some((key, value?)));
    let timers = batch.requested.timers.into_iter();
    let timers = timers.filter_map(|(key, at)| Some((key.into_bytes(), at?.0.to_be_bytes().to_vec())));
    let stored = |key: &[u8]| StateKey::new(batch.id, key).as_bytes().to_vec();
    state.chain(timers).map(|(key, value)| (stored(&key), value)).collect()
}

/// Stops a host and checks that its rows equal those of a probe without a replacement.
pub async fn is_as_if_alone(host: TestHost, setup: &Setup) {
    host.settled().await;
    let dir = host.stop().await;
    let left = rows(&Store::open(dir.path()).expect("the store of the host that was stopped"));
    assert_eq!(left, rows_as_if_alone(setup, dir.path()), "as if it had been alone");
}

/// Returns a proposal of a component for a plugin, from the test as the operator.
pub fn proposal(plugin: &str, component: Vec<u8>) -> Proposal {
    let (plugin, component) = (plugin.parse().expect("a name"), component.into());
    let (source, by) = ("a file".to_owned(), "the test".to_owned());
    Proposal { plugin, component, source, by, follows: None, is_named: false, trust: None }
}

/// Replaces the component of the probe.
pub async fn replace(host: &TestHost, component: Vec<u8>) -> Result<Change, ReplaceError> {
    host.host.replace(proposal("probe", component)).await
}
