//! Owns the task that sends notices. It reads them from the spool in order and sends each until it is accepted or
//! finally refused.

use std::sync::Arc;
use std::time::Duration;

use dim_model::backoff::Backoff;
use dim_model::connectivity::Connectivity;
use dim_model::time::{Clock, Timestamp};
use tokio_util::sync::CancellationToken;

use crate::notice_order::{Delivered, Pending};
use crate::spool::{Refusal, Spool, SpoolError, on_disk};
use crate::transport::{Answer, Transport, Undelivered};

/// The time between two checks for receivers, while notices must be repeated.
const LOOK: Duration = Duration::from_secs(5);

/// The pause between checks for acknowledgements.
const LOOK_AT_PROGRESS: Duration = Duration::from_millis(250);

/// The task that sends notices.
#[derive(Debug)]
pub struct Sender {
    /// The spool with the waiting notices.
    pub spool: Arc<Spool>,
    /// The transport to the receivers.
    pub transport: Arc<dyn Transport>,
    /// The state of the connection, from the results of sends.
    pub connectivity: Arc<Connectivity>,
    /// The clock that measures pauses.
    pub clock: Arc<dyn Clock>,
}

impl Sender {
    /// Sends notices until `stop` is cancelled. A notice whose send is interrupted is sent again by the next agent.
    pub async fn run(self, stop: CancellationToken) {
        let mut pending = Pending::new(self.transport.repeats());
        let mut backoff = Backoff::new();
        let work = async {
            loop {
                if let Err(pause) = self.turn(&mut pending, &mut backoff).await {
                    self.clock.sleep(pause).await;
                }
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    /// Sends one notice, or waits for one. After a failure it returns the pause before the next turn.
    async fn turn(&self, pending: &mut Pending, backoff: &mut Backoff) -> Result<(), Duration> {
        let turn = async {
            self.load(pending).await?;
            self.take_acknowledged(pending).await?;
            match pending.next(self.clock.monotonic()).map(|(number, notice)| (number, notice.clone())) {
                Some((number, notice)) => {
                    let told = self.transport.tell(&notice).await;
                    self.settle(pending, number, notice, told).await
                }
                None => self.wait(pending).await,
            }
        };
        match turn.await {
            Ok(()) => {
                backoff.reset();
                Ok(())
            }
            Err(failure) => {
                self.take_note(pending, &failure);
                Err(backoff.next_pause())
            }
        }
    }

    async fn load(&self, pending: &mut Pending) -> Result<(), Failure> {
        let last = pending.last;
        for (number, notice) in on_disk(&self.spool, move |spool| spool.waiting(last)).await? {
            pending.add(number, notice, self.clock.monotonic());
        }
        Ok(())
    }

    async fn settle(
        &self,
        pending: &mut Pending,
        number: u64,
        notice: super::notice::Notice,
        told: Result<Answer, Undelivered>,
    ) -> Result<(), Failure> {
        let answer = told.map_err(|why| Failure::Undelivered { number, why })?;
        tracing::debug!(number, job = %notice.job, notice = notice.word.name(), "told");
        if !matches!(answer, Answer::Published(_)) {
            self.connectivity.made();
        }
        match answer {
            Answer::Published(receipt) => {
                pending.published(number, receipt, self.clock.monotonic());
                return Ok(());
            }
            Answer::Taken if pending.told(number, self.clock.monotonic()) == Delivered::Again => {
                return Ok(());
            }
            Answer::Taken => on_disk(&self.spool, move |spool| spool.taken(&[number])).await?,
            Answer::Refused(reason) => {
                tracing::warn!(job = %notice.job, notice = notice.word.name(), "a notice is refused: {reason}");
                let refusal = Refusal { notice, refused: Timestamp::wall(), reason };
                on_disk(&self.spool, move |spool| spool.refused(number, &refusal)).await?;
            }
        }
        pending.remove(number);
        Ok(())
    }

    /// Removes the published notices that are acknowledged.
    async fn take_acknowledged(&self, pending: &mut Pending) -> Result<(), Failure> {
        let now = self.clock.monotonic();
        if !pending.is_time_to_look(now, LOOK_AT_PROGRESS) {
            return Ok(());
        }
        for topic in pending.published_on() {
            let progress = self.transport.progress(&topic).await;
            pending.publish_again(&topic, &progress, now);
            let numbers = Arc::new(pending.acknowledged(&topic, &progress));
            if numbers.is_empty() {
                continue;
            }
            let taken = numbers.clone();
            on_disk(&self.spool, move |spool| spool.taken(&taken)).await?;
            numbers.iter().for_each(|number| pending.remove(*number));
            self.connectivity.made();
        }
        let oldest = pending.oldest_published();
        let Some(waits) = oldest.map(|at| now.saturating_duration_since(at)) else { return Ok(()) };
        if waits > self.transport.acknowledged_within().await {
            let why =
                format!("no host has acknowledged a notice that was published {} s ago", waits.as_secs());
            self.connectivity.failed(&Undelivered::Away(why));
        }
        Ok(())
    }

    /// Waits for a new notice or for the time of a pending one. If notices were sent and must be repeated, it checks
    /// that receivers exist.
    async fn wait(&self, pending: &Pending) -> Result<(), Failure> {
        let look = if pending.oldest_published().is_some() {
            LOOK_AT_PROGRESS
        } else if pending.has_told() {
            LOOK
        } else {
            Duration::from_secs(3_600)
        };
        let now = self.clock.monotonic();
        let due = pending.soonest().map_or(look, |soonest| look.min(soonest.saturating_duration_since(now)));
        tokio::select! {
            () = self.spool.kept.notified() => return Ok(()),
            () = self.clock.sleep(due) => {}
        }
        if pending.has_told() {
            self.transport.audience().await?;
        }
        Ok(())
    }

    fn take_note(&self, pending: &mut Pending, failure: &Failure) {
        match failure {
            Failure::Undelivered { why: why @ Undelivered::Away(_), .. } | Failure::Nobody(why) => {
                self.connectivity.failed(why);
                pending.begin_anew(self.clock.monotonic());
            }
            Failure::Undelivered { number, why } => {
                tracing::debug!(number, "a notice is not accepted yet: {why}");
                self.connectivity.failed(why);
                pending.hold(*number, self.clock.monotonic());
            }
            Failure::Spool(error) => {
                tracing::error!("the notices cannot be read: {}", dim_model::error_chain::chain(error));
            }
        }
    }
}

/// The reason why a turn failed.
enum Failure {
    /// A notice was not sent.
    Undelivered { number: u64, why: Undelivered },
    /// There is no receiver for a repetition.
    Nobody(Undelivered),
    /// The disk failed.
    Spool(SpoolError),
}

impl From<Undelivered> for Failure {
    fn from(why: Undelivered) -> Self {
        Self::Nobody(why)
    }
}

impl From<SpoolError> for Failure {
    fn from(error: SpoolError) -> Self {
        Self::Spool(error)
    }
}
