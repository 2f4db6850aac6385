//! Owns the task that tells notices: from the spool, in order, until each is taken or refused for good.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::pending::{Pending, Told};
use super::spool::{Refusal, Spool, SpoolError, on_disk};
use super::way::{Answer, Untold, Way};
use crate::backoff::Backoff;
use crate::contact::Contact;
use crate::time::Timestamp;

/// How often to look whether anyone listens, while there are repeats to come.
const LOOK: Duration = Duration::from_secs(5);

/// The task.
#[derive(Debug)]
pub struct Sender {
    /// Where notices wait.
    pub spool: Arc<Spool>,
    /// Whom they are told.
    pub way: Arc<dyn Way>,
    /// How that goes.
    pub contact: Arc<Contact>,
}

impl Sender {
    /// Tells notices until `stop` is cancelled. One that is being told then is told again by the next
    /// agent.
    pub async fn run(self, stop: CancellationToken) {
        let mut pending = Pending::new(self.way.repeats());
        let mut backoff = Backoff::new();
        let work = async {
            loop {
                if let Err(pause) = self.turn(&mut pending, &mut backoff).await {
                    tokio::time::sleep(pause).await;
                }
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    /// Tells one notice, or waits until there may be one. What fails asks for a pause.
    async fn turn(&self, pending: &mut Pending, backoff: &mut Backoff) -> Result<(), Duration> {
        let turn = async {
            self.load(pending).await?;
            match pending.next(Instant::now()).map(|(number, notice)| (number, notice.clone())) {
                Some((number, notice)) => {
                    let told = self.way.tell(&notice).await;
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
                Err(backoff.next())
            }
        }
    }

    async fn load(&self, pending: &mut Pending) -> Result<(), Failure> {
        let last = pending.last;
        for (number, notice) in on_disk(&self.spool, move |spool| spool.waiting(last)).await? {
            pending.add(number, notice, Instant::now());
        }
        Ok(())
    }

    async fn settle(
        &self,
        pending: &mut Pending,
        number: u64,
        notice: super::notice::Notice,
        told: Result<Answer, Untold>,
    ) -> Result<(), Failure> {
        let answer = told.map_err(|why| Failure::Untold { number, why })?;
        self.contact.made();
        tracing::debug!(number, job = %notice.job, notice = notice.word.name(), "told");
        match answer {
            Answer::Taken if pending.told(number, Instant::now()) == Told::Again => return Ok(()),
            Answer::Taken => on_disk(&self.spool, move |spool| spool.taken(number)).await?,
            Answer::Refused(reason) => {
                tracing::warn!(job = %notice.job, notice = notice.word.name(), "a notice is refused: {reason}");
                let refusal = Refusal { notice, refused: Timestamp::wall(), reason };
                on_disk(&self.spool, move |spool| spool.refused(number, &refusal)).await?;
            }
        }
        pending.remove(number);
        Ok(())
    }

    /// Waits for a notice, or for the time of one; looks meanwhile whether those that were told can
    /// have been heard.
    async fn wait(&self, pending: &Pending) -> Result<(), Failure> {
        let look = if pending.has_told() { LOOK } else { Duration::from_secs(3_600) };
        let until = Instant::now() + look;
        let until = pending.soonest().map_or(until, |soonest| soonest.min(until));
        tokio::select! {
            () = self.spool.kept.notified() => return Ok(()),
            () = tokio::time::sleep_until(until) => {}
        }
        if pending.has_told() {
            self.way.audience().await?;
        }
        Ok(())
    }

    fn take_note(&self, pending: &mut Pending, failure: &Failure) {
        match failure {
            Failure::Untold { why: why @ Untold::Away(_), .. } | Failure::Nobody(why) => {
                self.contact.failed(why);
                pending.begin_anew(Instant::now());
            }
            Failure::Untold { number, why } => {
                tracing::debug!(number, "a notice is not taken yet: {why}");
                self.contact.failed(why);
                pending.hold(*number, Instant::now());
            }
            Failure::Spool(error) => {
                tracing::error!("the notices cannot be read: {}", crate::cause::chain(error));
            }
        }
    }
}

/// Why a turn came to nothing.
enum Failure {
    /// A notice was not told.
    Untold { number: u64, why: Untold },
    /// There is nobody to tell again.
    Nobody(Untold),
    /// The disk failed.
    Spool(SpoolError),
}

impl From<Untold> for Failure {
    fn from(why: Untold) -> Self {
        Self::Nobody(why)
    }
}

impl From<SpoolError> for Failure {
    fn from(error: SpoolError) -> Self {
        Self::Spool(error)
    }
}
