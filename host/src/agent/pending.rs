//! Which notice is to be told next: in order, each as often as it takes, and none that has to wait
//! holds up the notices of other jobs.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use tokio::time::Instant;

use super::notice::Notice;
use crate::backoff::Backoff;
use crate::ident::JobId;

/// The notices that are not taken yet.
#[derive(Debug)]
pub struct Pending {
    notices: BTreeMap<u64, Telling>,
    /// Jobs whose notices have to wait, each until when.
    held: HashMap<JobId, (Backoff, Instant)>,
    /// Pauses before a notice is told again.
    repeats: &'static [Duration],
    /// The number of the last notice that was added.
    pub last: u64,
}

#[derive(Debug)]
struct Telling {
    notice: Notice,
    /// How often it was told since the way was last cut off.
    told: usize,
    due: Instant,
}

/// What telling a notice has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// It was told as often as it has to be.
    Enough,
    /// It is told again later.
    Again,
}

impl Pending {
    /// None yet; each will be told once, and once more after each of `repeats`.
    pub fn new(repeats: &'static [Duration]) -> Self {
        Self { notices: BTreeMap::new(), held: HashMap::new(), repeats, last: 0 }
    }

    /// Adds a notice, whose number is above all others.
    pub fn add(&mut self, number: u64, notice: Notice, now: Instant) {
        self.last = number;
        self.notices.insert(number, Telling { notice, told: 0, due: now });
    }

    /// The notice to tell now.
    pub fn next(&self, now: Instant) -> Option<(u64, &Notice)> {
        let ready = |telling: &Telling| self.ready_at(telling) <= now;
        let (number, telling) = self.notices.iter().find(|(_, telling)| ready(telling))?;
        Some((*number, &telling.notice))
    }

    /// When there is one to tell.
    pub fn soonest(&self) -> Option<Instant> {
        self.notices.values().map(|telling| self.ready_at(telling)).min()
    }

    fn ready_at(&self, telling: &Telling) -> Instant {
        let held = self.held.get(&telling.notice.job).map(|(_, until)| *until);
        held.map_or(telling.due, |until| until.max(telling.due))
    }

    /// Takes note that a notice was told.
    pub fn told(&mut self, number: u64, now: Instant) -> Told {
        let Some(telling) = self.notices.get_mut(&number) else { return Told::Enough };
        self.held.remove(&telling.notice.job);
        let Some(pause) = self.repeats.get(telling.told) else { return Told::Enough };
        telling.told += 1;
        telling.due = now + *pause;
        Told::Again
    }

    /// Lets the notices of a job wait, longer each time.
    pub fn hold(&mut self, number: u64, now: Instant) {
        let Some(telling) = self.notices.get(&number) else { return };
        let job = telling.notice.job.clone();
        let (backoff, until) = self.held.entry(job).or_insert_with(|| (Backoff::new(), now));
        *until = now + backoff.next();
    }

    /// Forgets a notice.
    pub fn remove(&mut self, number: u64) {
        if let Some(telling) = self.notices.remove(&number) {
            self.held.remove(&telling.notice.job);
        }
    }

    /// Begins anew with all of them: who was told before may not have heard it.
    pub fn begin_anew(&mut self, now: Instant) {
        for telling in self.notices.values_mut().filter(|telling| telling.told > 0) {
            telling.told = 0;
            telling.due = now;
        }
    }

    /// Whether there is a notice that was told and has to be told again.
    pub fn has_told(&self) -> bool {
        self.notices.values().any(|telling| telling.told > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::notice::{EventType, JobEvent, Word};
    use super::*;
    use crate::time::Timestamp;

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
        assert_eq!(pending.told(1, now), Told::Enough);
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
    fn what_nobody_acknowledges_is_told_three_times_and_anew_after_a_cut() {
        let (mut pending, now) = (Pending::new(REPEATS), Instant::now());
        pending.add(1, notice("a"), now);
        assert_eq!(pending.told(1, now), Told::Again);
        assert_eq!(pending.soonest(), Some(after(now, 10)));
        assert_eq!(pending.told(1, after(now, 10)), Told::Again);
        assert_eq!(pending.soonest(), Some(after(now, 100)));
        assert!(pending.has_told());
        pending.begin_anew(after(now, 20));
        assert!(!pending.has_told());
        for (at, told) in [(20, Told::Again), (30, Told::Again), (120, Told::Enough)] {
            assert_eq!(pending.next(after(now, at)).unwrap().0, 1);
            assert_eq!(pending.told(1, after(now, at)), told);
        }
    }
}
