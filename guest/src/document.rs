//! A state document that follows the plugin's state at a distance.

use std::cell::Cell;
use std::io;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::failure::is_met_for_a_while;
use crate::log::{self, Level};
use crate::time::Time;
use crate::{DueTimer, Failure, ipns, state, timers};

/// Publishes a document some time after the state that it shows has changed.
///
/// Building it for each event would cost more than everything else together, so a change only
/// arms a timer. The clock stands still during a call; the time that building takes is therefore
/// judged by the size of the last document, and the timer is set so that building takes no more
/// than about 5 % of a core.
#[derive(Debug)]
pub struct Document {
    key: String,
    timer: &'static str,
    least: Duration,
    /// Whether the timer is known to be armed; a cache of what [`timers`] knows.
    armed: Cell<bool>,
}

/// What building and handing over a byte is taken to cost.
const NANOSECONDS_A_BYTE: u64 = 10;

/// Largest document that any host takes, in bytes.
const LARGEST: usize = 16 << 20;

/// Bytes of the records that documents are built of, from which on no new ones are taken: to build one must not take
/// more than a call may.
const MOST: u64 = 24 << 20;

/// For how long a limit that a document has met is kept to; it may be higher by then.
const KEPT_TO: Duration = Duration::from_secs(3_600);

/// The inverse of the share of a core that building may take.
const SHARE: u64 = 20;

impl Document {
    /// A document under the IPNS key `key`, built by `timer` at least `least` after a change.
    pub fn new(key: String, timer: &'static str, least: Duration) -> Self {
        Self { key, timer, least, armed: Cell::new(false) }
    }

    /// Says that what the document shows has changed.
    pub fn touch(&self) -> Result<(), Failure> {
        if self.armed.get() {
            return Ok(());
        }
        if timers::get(self.timer)?.is_none() {
            let size: u64 = state::get_json(self.size_key().as_bytes())?.unwrap_or(0);
            let pause = Duration::from_nanos(size.saturating_mul(NANOSECONDS_A_BYTE * SHARE));
            timers::set(self.timer, Time::now().after(self.least.max(pause)).timestamp())?;
        }
        self.armed.set(true);
        Ok(())
    }

    /// Whether `timer` says that it is time to build the document.
    pub fn is_due(&self, timer: &DueTimer) -> bool {
        let due = timer.key == self.timer;
        if due {
            self.armed.set(false);
        }
        due
    }

    /// How many bytes the document may have, as far as that is known.
    pub fn room(&self) -> Result<usize, Failure> {
        let met: Option<Met> = state::get_json(self.limit_key().as_bytes())?;
        let met = met.filter(|met| Time::now().since(met.at) < KEPT_TO);
        Ok(met.map_or(LARGEST, |met| met.limit))
    }

    /// Publishes the document. One that is too large is told to the operator and left: the one before stays, and the
    /// next is built when there is something new to show, or soon if there is less [room](Self::room) than was known.
    /// One for which the rate of documents leaves no room is built anew a little later.
    pub fn publish(&self, data: &[u8]) -> Result<(), Failure> {
        state::set_json(self.size_key().as_bytes(), &data.len())?;
        // No host takes more; what goes over the border in one call is limited, too.
        let shown = &data[..data.len().min(LARGEST + 1)];
        match ipns::update_state(&self.key, shown, None) {
            Err(ipns::Error::TooLarge(met)) => {
                let (size, limit) = (data.len().to_string(), met.to_string());
                let values = [("key", self.key.as_str()), ("bytes", &size), ("limit", &limit)];
                log::line(Level::Error, "the document is too large and is not published", &values);
                let limit = usize::try_from(met).unwrap_or(LARGEST);
                let is_news = limit < self.room()?;
                state::set_json(self.limit_key().as_bytes(), &Met { limit, at: Time::now() })?;
                // Who takes no notice of it would be no better off the next time.
                if is_news { self.touch() } else { Ok(()) }
            }
            // It is built once there is room again.
            Err(ipns::Error::LimitExceeded(limit)) if is_met_for_a_while(&limit) => self.touch(),
            published => Ok(published?),
        }
    }

    /// Takes in that a record of the document has come, gone or changed: how many bytes it had and has, as
    /// [`size`] tells.
    pub fn counts(&self, before: Option<usize>, after: Option<usize>) -> Result<(), state::Error> {
        if before == after {
            return Ok(());
        }
        let Tally { count, bytes } = self.tally()?.unwrap_or_default();
        let moved = |total: u64, less: u64, more: u64| total.saturating_sub(less).saturating_add(more);
        let bytes_of = |size: Option<usize>| size.unwrap_or(0) as u64;
        self.set_tally(Tally {
            count: moved(count, u64::from(before.is_some()), u64::from(after.is_some())),
            bytes: moved(bytes, bytes_of(before), bytes_of(after)),
        })
    }

    /// Refuses a new record, one of `what`, while there are too many.
    pub fn check_room(&self, what: &str) -> Result<(), Failure> {
        if self.tally()?.is_none_or(|tally| tally.bytes <= MOST) {
            return Ok(());
        }
        Err(Failure::Reject(format!(
            "there are more than {} MiB of {what}: no new ones are taken",
            MOST >> 20
        )))
    }

    /// Puts records into a document that is being built: all of them, if they take no more than `room` bytes.
    /// Otherwise those come first that take no more than their share of it, and others as far as there is room, so
    /// that a few large ones crowd nobody out. Returns how many are left out.
    ///
    /// `put` writes the record of an id, with whatever stands before it.
    pub fn fill<Rows: Iterator<Item = Result<(String, Vec<u8>), state::Error>>>(
        &self,
        document: &mut Vec<u8>,
        room: usize,
        rows: impl Fn() -> Rows,
        put: impl Fn(&mut Vec<u8>, &str, &[u8]),
    ) -> Result<u64, state::Error> {
        let begin = document.len();
        let put_if_it_fits = |document: &mut Vec<u8>, id: &str, record: &[u8]| {
            let before = document.len();
            put(document, id, record);
            let fits = document.len() - begin <= room;
            if !fits {
                document.truncate(before);
            }
            fits
        };
        // Puts in those of a size, and counts all.
        let put_those = |document: &mut Vec<u8>, is_meant: &dyn Fn(usize) -> bool| {
            let (mut tally, mut done) = (Tally::default(), 0);
            for row in rows() {
                let (id, record) = row?;
                tally.count += 1;
                tally.bytes += record.len() as u64;
                if is_meant(id.len() + record.len()) {
                    done += u64::from(put_if_it_fits(document, &id, &record));
                }
            }
            Ok((tally, done))
        };
        let share_of = |count: u64| room / usize::try_from(count.max(1)).unwrap_or(usize::MAX);
        let known = self.tally()?;
        let mut share = known.filter(|tally| tally.bytes > room as u64).map(|tally| share_of(tally.count));
        let (tally, mut done) = put_those(document, &|size| share.is_none_or(|share| size <= share))?;
        // What was taken in between may be off by a little.
        if known != Some(tally) {
            self.set_tally(tally)?;
        }
        if share.is_none() && done < tally.count {
            // That they do not all fit was not known.
            document.truncate(begin);
            let found = share_of(tally.count);
            share = Some(found);
            done = put_those(document, &|size| size <= found)?.1;
        }
        if let Some(share) = share.filter(|_| done < tally.count) {
            done += put_those(document, &|size| size > share)?.1;
        }
        Ok(tally.count - done)
    }

    fn tally(&self) -> Result<Option<Tally>, state::Error> {
        state::get_json(self.tally_key().as_bytes())
    }

    fn set_tally(&self, tally: Tally) -> Result<(), state::Error> {
        state::set_json(self.tally_key().as_bytes(), &tally)
    }

    fn tally_key(&self) -> String {
        format!("document-tally/{}", self.timer)
    }

    fn size_key(&self) -> String {
        format!("document/{}", self.timer)
    }

    fn limit_key(&self) -> String {
        format!("document-limit/{}", self.timer)
    }
}

/// A limit that a document has met.
#[derive(Serialize, Deserialize)]
struct Met {
    limit: usize,
    at: Time,
}

/// How many records there are, and their bytes.
#[derive(Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Tally {
    count: u64,
    bytes: u64,
}

/// How many bytes a record has in the state.
pub fn size<T: Serialize>(record: &T) -> usize {
    struct Count(usize);
    impl io::Write for Count {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(0);
    // What cannot be written is not kept, either.
    let _ = serde_json::to_writer(&mut count, record);
    count.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Host;
    use crate::state::Map;

    const RECORDS: Map<str, String> = Map::new("r/");

    fn filled(room: usize) -> (String, u64) {
        let mut built = b"[".to_vec();
        let put = |document: &mut Vec<u8>, _: &str, record: &[u8]| {
            document.extend(record);
            document.push(b',');
        };
        let document = Document::new("key".to_owned(), "timer", Duration::ZERO);
        let left_out = document.fill(&mut built, room, || RECORDS.iter_raw(None), put).unwrap();
        (String::from_utf8(built).unwrap(), left_out)
    }

    #[test]
    fn large_records_crowd_nobody_out_of_a_document() {
        let _host = Host::new();
        for (id, text) in [("a", "x".repeat(50)), ("b", "small".to_owned()), ("c", "y".repeat(20))] {
            RECORDS.set(id, &text).unwrap();
            assert_eq!(RECORDS.get_raw(id).unwrap().unwrap().len(), size(&text));
        }
        let (all, left_out) = filled(100);
        assert!(all.contains("xx") && all.contains("small") && all.contains("yy"), "{all}");
        assert_eq!(left_out, 0);
        let without_the_largest = || ("[\"small\",\"yyyyyyyyyyyyyyyyyyyy\",".to_owned(), 1);
        // A share of 13 bytes each.
        for _ in 0..2 {
            assert_eq!(filled(40), without_the_largest());
            assert_eq!(filled(70), without_the_largest());
        }
        // Their bytes fit, and what stands around them does not.
        assert_eq!(filled(82), without_the_largest());
        assert_eq!(filled(82), without_the_largest());
        assert_eq!(filled(10).0, "[\"small\",");
        assert_eq!(filled(0), ("[".to_owned(), 3));
    }

    #[test]
    fn records_are_counted_and_from_a_number_on_no_new_ones_are_taken() {
        let _host = Host::new();
        let document = Document::new("key".to_owned(), "timer", Duration::ZERO);
        let most = usize::try_from(MOST).unwrap();
        document.counts(None, Some(most)).unwrap();
        document.check_room("records").unwrap();
        document.counts(Some(most), Some(most + 1)).unwrap();
        let why = document.check_room("records").unwrap_err();
        assert!(matches!(why, Failure::Reject(why) if why.contains("more than 24 MiB of records")));
        document.counts(Some(2), None).unwrap();
        document.check_room("records").unwrap();
    }
}
