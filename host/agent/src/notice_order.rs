//! Owns the order of notices: it receives notices and the results of sends, and returns the notice to send next.
//! Notices are in order, each is repeated as often as the transport requires, and a notice that must wait does not
//! delay other jobs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use dim_model::backoff::Backoff;
use dim_model::ident::{JobId, Topic};
use dim_network::lone_writer::Progress;

use crate::notice::Notice;
use crate::transport::Receipt;

/// The notices that are not finished yet.
#[derive(Debug)]
pub struct Pending {
    notices: BTreeMap<u64, Telling>,
    /// The jobs whose notices must wait, each with the end of the wait.
    held: HashMap<JobId, (Backoff, Instant)>,
    /// The pauses before a notice is sent again.
    repeats: &'static [Duration],
    /// The number of the last notice that was added.
    pub last: u64,
    /// The time of the last look for acknowledgements.
    looked: Option<Instant>,
}

#[derive(Debug)]
struct Telling {
    notice: Notice,
    /// The number of sends since the receivers were last unreachable.
    told: usize,
    due: Instant,
    /// The place on a reliable topic, and the time, if it was published there.
    published: Option<(Receipt, Instant)>,
}

/// The state of a notice after a send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// It was sent as often as required.
    Enough,
    /// It is sent again later.
    Again,
}

impl Pending {
    /// Makes an empty order. Each notice is sent once, and again after each pause of `repeats`.
    pub fn new(repeats: &'static [Duration]) -> Self {
        Self { notices: BTreeMap::new(), held: HashMap::new(), repeats, last: 0, looked: None }
    }

    /// Adds a notice. Its number must be greater than all others.
    pub fn add(&mut self, number: u64, notice: Notice, now: Instant) {
        self.last = number;
        self.notices.insert(number, Telling { notice, told: 0, due: now, published: None });
    }

    /// Returns the notice to send now.
    pub fn next(&self, now: Instant) -> Option<(u64, &Notice)> {
        let ready = |telling: &Telling| self.ready_at(telling) <= now;
        let (number, telling) = self.notices.iter().find(|(_, telling)| ready(telling))?;
        Some((*number, &telling.notice))
    }

    /// Returns the time at which the next notice can be sent.
    pub fn soonest(&self) -> Option<Instant> {
        self.notices.values().map(|telling| self.ready_at(telling)).min()
    }

    fn ready_at(&self, telling: &Telling) -> Instant {
        let held = self.held.get(&telling.notice.job).map(|(_, until)| *until);
        held.map_or(telling.due, |until| until.max(telling.due))
    }

    /// Records that a notice was sent.
    pub fn told(&mut self, number: u64, now: Instant) -> Delivered {
        let Some(telling) = self.notices.get_mut(&number) else { return Delivered::Enough };
        self.held.remove(&telling.notice.job);
        let Some(pause) = self.repeats.get(telling.told) else { return Delivered::Enough };
        telling.told += 1;
        telling.due = now + *pause;
        Delivered::Again
    }

    /// Records that a notice was published on a reliable topic. It is published again when the time of the receipt is
    /// over, unless it is removed before.
    pub fn published(&mut self, number: u64, receipt: Receipt, now: Instant) {
        let Some(telling) = self.notices.get_mut(&number) else { return };
        self.held.remove(&telling.notice.job);
        telling.due = now + receipt.again;
        telling.published = Some((receipt, now));
    }

    /// Returns whether the last look for acknowledgements was at least `pause` ago. Then a new one begins.
    pub fn is_time_to_look(&mut self, now: Instant, pause: Duration) -> bool {
        let is_time = self.looked.is_none_or(|looked| now.saturating_duration_since(looked) >= pause);
        self.looked = if is_time { Some(now) } else { self.looked };
        is_time
    }

    /// Returns the topics of the published notices.
    pub fn published_on(&self) -> BTreeSet<Topic> {
        let published = self.notices.values().filter_map(|telling| telling.published.as_ref());
        published.map(|(receipt, _)| receipt.topic.clone()).collect()
    }

    /// Lets the published notices of a topic that were given up be published again.
    pub fn publish_again(&mut self, topic: &Topic, progress: &Progress, now: Instant) {
        let is_given_up = |receipt: &Receipt| {
            let given_up = progress.acknowledged + 1..=progress.given_up;
            receipt.topic == *topic && given_up.contains(&receipt.number)
        };
        for telling in self.notices.values_mut() {
            if telling.published.take_if(|(receipt, _)| is_given_up(receipt)).is_some() {
                telling.due = now;
            }
        }
    }

    /// Returns the published notices of a topic that are acknowledged.
    pub fn acknowledged(&self, topic: &Topic, progress: &Progress) -> Vec<u64> {
        let is_acknowledged =
            |receipt: &Receipt| receipt.topic == *topic && receipt.number <= progress.acknowledged;
        let published = self.notices.iter().filter(|(_, telling)| {
            telling.published.as_ref().is_some_and(|(receipt, _)| is_acknowledged(receipt))
        });
        published.map(|(number, _)| *number).collect()
    }

    /// Returns the time at which the oldest published notice was published.
    pub fn oldest_published(&self) -> Option<Instant> {
        self.notices.values().filter_map(|telling| telling.published.as_ref()).map(|(_, at)| *at).min()
    }

    /// Delays the notices of a job, longer each time.
    pub fn hold(&mut self, number: u64, now: Instant) {
        let Some(telling) = self.notices.get(&number) else { return };
        let job = telling.notice.job.clone();
        let (backoff, until) = self.held.entry(job).or_insert_with(|| (Backoff::new(), now));
        *until = now + backoff.next_pause();
    }

    /// Removes a notice.
    pub fn remove(&mut self, number: u64) {
        if let Some(telling) = self.notices.remove(&number) {
            self.held.remove(&telling.notice.job);
        }
    }

    /// Starts again with all notices that were sent, because their receivers may not have received them.
    pub fn begin_anew(&mut self, now: Instant) {
        for telling in self.notices.values_mut().filter(|telling| telling.told > 0) {
            telling.told = 0;
            telling.due = now;
        }
    }

    /// Returns whether a notice was sent and must be sent again.
    pub fn has_told(&self) -> bool {
        self.notices.values().any(|telling| telling.told > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::notice::{EventType, JobEvent, Word};
    use super::*;
    use dim_model::time::Timestamp;

    const REPEATS: &[Duration] = &[Duration::from_secs(10), Duration::from_secs(90)];

    fn notice(job: &str) -> Notice {
        let event = JobEvent { event_type: EventType::Running, data: None, result: None };
        Notice { job: job.parse().unwrap(), given: Timestamp(0), word: Word::Event(event) }
    }

    fn after(now: Instant, seconds: u64) -> Instant {
        now + Duration::from_secs(seconds)
    }

    #[test]
    fn notices_are_told_in_order_and_once_where_they_are_acknowledged() {
        let (mut pending, now) = (Pending::new(&[]), Instant::now());
        pending.add(1, notice("a"), now);
        pending.add(2, notice("a"), now);
        assert_eq!(pending.next(now).unwrap().0, 1);
        assert_eq!(pending.told(1, now), Delivered::Enough);
        pending.remove(1);
        assert_eq!(pending.next(now).unwrap().0, 2);
    }

    #[test]
    fn a_job_that_has_to_wait_holds_up_no_other_and_keeps_its_order() {
        let (mut pending, now) = (Pending::new(&[]), Instant::now());
        for (number, job) in [(1, "a"), (2, "b"), (3, "a")] {
            pending.add(number, notice(job), now);
        }
        pending.hold(1, now);
        assert_eq!(pending.next(now).unwrap().0, 2);
        pending.remove(2);
        assert_eq!(pending.next(now), None);
        assert_eq!(pending.next(after(now, 1)).unwrap().0, 1);
        pending.remove(1);
        assert_eq!(pending.next(now).unwrap().0, 3);
    }

    #[test]
    fn a_published_notice_waits_for_its_acknowledgement_and_is_published_again_if_none_comes() {
        let (mut pending, now) = (Pending::new(&[]), Instant::now());
        let [jobs, results] = ["jobs", "results"].map(|topic| topic.parse::<Topic>().unwrap());
        let receipt = |topic: &Topic, number| {
            let again = Duration::from_secs(60);
            Receipt { topic: topic.clone(), number, again }
        };
        let progress = |acknowledged, given_up| Progress { acknowledged, given_up };
        for (number, topic, place) in [(1, &jobs, 1), (2, &results, 1), (3, &jobs, 2)] {
            pending.add(number, notice("a"), now);
            pending.published(number, receipt(topic, place), now);
        }
        assert_eq!(pending.next(now), None);
        assert!(!pending.has_told(), "they are not repeated for a receiver that was away");
        assert_eq!(pending.published_on(), [jobs.clone(), results.clone()].into());
        assert!(pending.acknowledged(&jobs, &progress(0, 0)).is_empty());
        assert_eq!(pending.acknowledged(&jobs, &progress(1, 0)), [1]);
        assert_eq!(pending.acknowledged(&jobs, &progress(7, 0)), [1, 3]);
        assert_eq!(pending.oldest_published(), Some(now));
        pending.remove(1);
        assert_eq!(pending.next(after(now, 61)).unwrap().0, 2);
        pending.published(2, receipt(&results, 2), after(now, 61));
        assert!(pending.acknowledged(&results, &progress(1, 0)).is_empty(), "the later place counts");
        // A reader has acknowledged one, and another one has passed over it.
        pending.publish_again(&results, &progress(2, 2), after(now, 62));
        assert_eq!(pending.acknowledged(&results, &progress(2, 2)), [2]);
        pending.publish_again(&jobs, &progress(1, 2), now);
        assert_eq!(pending.next(now).unwrap().0, 3);
        assert!(pending.acknowledged(&jobs, &progress(2, 2)).is_empty(), "it is published again first");
    }

    #[test]
    fn what_nobody_acknowledges_is_told_three_times_and_anew_after_a_cut() {
        let (mut pending, now) = (Pending::new(REPEATS), Instant::now());
        pending.add(1, notice("a"), now);
        assert_eq!(pending.told(1, now), Delivered::Again);
        assert_eq!(pending.soonest(), Some(after(now, 10)));
        assert_eq!(pending.told(1, after(now, 10)), Delivered::Again);
        assert_eq!(pending.soonest(), Some(after(now, 100)));
        assert!(pending.has_told());
        pending.begin_anew(after(now, 20));
        assert!(!pending.has_told());
        for (at, told) in [(20, Delivered::Again), (30, Delivered::Again), (120, Delivered::Enough)] {
            assert_eq!(pending.next(after(now, at)).unwrap().0, 1);
            assert_eq!(pending.told(1, after(now, at)), told);
        }
    }
}
