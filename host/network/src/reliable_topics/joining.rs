//! Owns the change of the fleet while the host runs. It receives the identity of the host in the new fleet, ends the
//! tasks of the driver, and returns a driver that begins anew.

use std::collections::VecDeque;

use dim_store::commit::CommitError;
use dim_store::{Store, StoreError, topic_rows};
use dim_topics::membership::NoKey;
use thiserror::Error;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::channel::{Input, Inputs};
use super::outgoing::Waiting;
use super::{Identity, Parts, ReliableTopics};

/// The reason why a host cannot join a fleet now.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum JoinError {
    /// Events of the present fleet are not sent yet.
    #[error(
        "{0} events or messages of the present fleet are not sent yet: try again when the daemon has taken them"
    )]
    Unsent(usize),
    /// The host joins another fleet at this moment.
    #[error("the host joins a fleet at this moment: try again")]
    UnderWay,
}

/// A request to join a fleet.
#[derive(Debug)]
pub(super) struct Join {
    identity: Box<Identity>,
    to: oneshot::Sender<Result<(), JoinError>>,
}

/// Makes the store that of a member of `fleet`, before the writer starts. It writes only if the fleet has changed, because
/// a host must also start on a full disk.
pub fn enter_fleet(store: &Store, fleet: &str) -> Result<(), StoreError> {
    if topic_rows::fleet(store)?.is_none_or(|before| before == fleet) {
        return Ok(());
    }
    let write = store.begin()?;
    let unsent = topic_rows::enter_fleet(&write, fleet)?;
    write.commit()?;
    warn_of_unsent(unsent);
    Ok(())
}

fn warn_of_unsent(unsent: usize) {
    if unsent > 0 {
        tracing::error!(unsent, "the fleet has changed: bundles that were not published before are not sent");
    }
}

/// Waits until the host joins its first fleet, and returns a driver that begins there; `None` if the host stops.
pub(super) async fn first_join(
    parts: Parts,
    inputs: &mut Inputs,
    until: CancellationToken,
) -> Result<Option<ReliableTopics>, CommitError> {
    loop {
        let input = tokio::select! {
            biased;
            () = until.cancelled() => return Ok(None),
            input = inputs.0.recv() => input,
        };
        match input {
            None => return Ok(None),
            Some(Input::Join { identity, to }) => {
                return enter(parts, Join { identity, to }, until).await.map(Some);
            }
            // The caller may have disconnected.
            Some(Input::DocumentKey { to, .. }) => drop(to.send(Err(NoKey::NoFleet.into()))),
            // The host has nothing else of a fleet: a caller that asks gets no answer.
            Some(_) => {}
        }
    }
}

/// Makes the store and the topics those of the fleet of `join`, and returns a driver that begins there.
async fn enter(parts: Parts, join: Join, until: CancellationToken) -> Result<ReliableTopics, CommitError> {
    let Join { identity, to } = join;
    let fleet = identity.author.fleet.clone();
    let name = fleet.clone();
    let unsent = parts.commit.write(move |write| topic_rows::enter_fleet(write, &name)).await?;
    warn_of_unsent(unsent);
    parts.reliable.enter_fleet(&fleet);
    let driver = ReliableTopics::new(parts, *identity, until)?;
    tracing::info!(fleet, "the host takes part in another fleet");
    // The caller may have disconnected.
    let _ = to.send(Ok(()));
    Ok(driver)
}

impl ReliableTopics {
    /// Ends the work in the present fleet if nothing of it is unsent.
    pub(super) fn begin_join(&mut self, identity: Box<Identity>, to: oneshot::Sender<Result<(), JoinError>>) {
        let is_unsent = |waiting: &Waiting| usize::from(waiting.is_under_way());
        let unsent = self.outgoing.unsent() + self.waiting.values().map(is_unsent).sum::<usize>();
        if unsent > 0 {
            // The caller may have disconnected.
            let _ = to.send(Err(JoinError::Unsent(unsent)));
            return;
        }
        self.joining = Some(Join { identity, to });
    }

    /// Continues in the fleet of `join`. Returns an error if the store failed.
    pub(super) async fn enter(self, join: Join, inputs: &mut Inputs) -> Result<Self, CommitError> {
        let Self { parts, waiting, tasks, stop, until, .. } = self;
        stop.cancel();
        tasks.close();
        // Tasks may wait until their inputs are taken.
        let mut kept = VecDeque::new();
        loop {
            tokio::select! {
                biased;
                () = tasks.wait() => break,
                Some(input) = inputs.0.recv() => kept.extend(of_no_fleet(input)),
            }
        }
        while let Ok(input) = inputs.0.try_recv() {
            kept.extend(of_no_fleet(input));
        }
        let mut next = enter(parts, join, until).await?;
        next.begin().await?;
        next.waiting = waiting.into_iter().map(|(topic, it)| (topic, it.anew())).collect();
        for input in kept {
            next.take(input);
        }
        next.form_waiting();
        Ok(next)
    }
}

/// An input that does not belong to the fleet that is left.
fn of_no_fleet(input: Input) -> Option<Input> {
    match input {
        Input::Subscribed(..)
        | Input::Unsubscribed(_)
        | Input::Waiting { .. }
        | Input::Place(_)
        | Input::Fleet(_)
        | Input::Activity(_)
        | Input::DocumentKey { .. }
        | Input::Secrets { .. }
        | Input::Writers { .. }
        | Input::AcknowledgedWithin(_)
        | Input::CatchUpsChanged
        | Input::RosterOffered { .. }
        | Input::RecordOffered { .. } => Some(input),
        Input::Join { to, .. } => {
            // The caller may have disconnected.
            let _ = to.send(Err(JoinError::UnderWay));
            None
        }
        _ => None,
    }
}
