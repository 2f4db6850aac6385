//! Publishes a document that shows the plugin's state, with a delay and within size limits.

use std::cell::Cell;
use std::io;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::failure::is_met_for_a_while;
use crate::log::{self, Level};
use crate::time::Time;
use crate::{DueTimer, Failure, ipns, state, timers};

/// A published document that is rebuilt some time after the state that it shows has changed.
///
/// To rebuild the document for each event would cost more than all other work, so a change only sets a timer. The
/// clock does not advance during a call, so the cost of a build is estimated from the size of the last document. The
/// delay of the timer limits builds to about 5 % of a core.
#[derive(Debug)]
pub struct Document {
    key: String,
    timer: &'static str,
    least: Duration,
    /// Whether the timer is known to be set. A cache: the host's [`timers`] are authoritative.
    armed: Cell<bool>,
}

/// Estimated cost of building and publishing one byte, in nanoseconds.
const NANOSECONDS_A_BYTE: u64 = 10;

/// Maximum size of a document that any host accepts, in bytes.
const LARGEST: usize = 16 << 20;

/// Maximum total size of the records of a document, in bytes. Beyond it new records are refused, because one call must
/// be able to build the document.
const MOST: u64 = 24 << 20;

/// The time for which the plugin obeys a size limit that the host reported. The operator may raise it meanwhile.
const KEPT_TO: Duration = Duration::from_secs(3_600);

/// The inverse of the share of a core that builds may use.
const SHARE: u64 = 20;

impl Document {
    /// Creates a document under the IPNS key `key`. The timer `timer` triggers a build at least `least` after a change.
    pub fn new(key: String, timer: &'static str, least: Duration) -> Self {
        Self { key, timer, least, armed: Cell::new(false) }
    }

    /// Schedules a build because the content of the document has changed.
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

    /// Returns whether `timer` is the timer of this document. If so, the caller builds and publishes the document.
    pub fn is_due(&self, timer: &DueTimer) -> bool {
        let due = timer.key == self.timer;
        if due {
            self.armed.set(false);
        }
        due
    }

    /// Returns the maximum size of the document in bytes, as far as it is known.
    pub fn room(&self) -> Result<usize, Failure> {
        let met: Option<Met> = state::get_json(self.limit_key().as_bytes())?;
        let met = met.filter(|met| Time::now().since(met.at) < KEPT_TO);
        Ok(met.map_or(LARGEST, |met| met.limit))
    }

    /// Publishes the document.
    ///
    /// If the document is too large, this logs an error for the operator and the previous document stays published.
    /// The next build follows the next change, or comes soon if the limit is lower than the known [room](Self::room).
    /// If the rate of documents is exceeded, the document is built again later.
    pub fn publish(&self, data: &[u8]) -> Result<(), Failure> {
        state::set_json(self.size_key().as_bytes(), &data.len())?;
        // No host accepts more, and the limit `border-bytes` would trap the call.
        let shown = &data[..data.len().min(LARGEST + 1)];
        match ipns::update_state(&self.key, shown, None) {
            Err(ipns::Error::TooLarge(met)) => {
                let (size, limit) = (data.len().to_string(), met.to_string());
                let values = [("key", self.key.as_str()), ("bytes", &size), ("limit", &limit)];
                log::line(Level::Error, "the document is too large and is not published", &values);
                let limit = usize::try_from(met).unwrap_or(LARGEST);
                let is_news = limit < self.room()?;
                state::set_json(self.limit_key().as_bytes(), &Met { limit, at: Time::now() })?;
                // A caller that ignores the known limit would build the same document again.
                if is_news { self.touch() } else { Ok(()) }
            }
            // The next build comes when the rate allows it again.
            Err(ipns::Error::LimitExceeded(limit)) if is_met_for_a_while(&limit) => self.touch(),
            published => Ok(published?),
        }
    }

    /// Updates the count and the total size of the document's records after a record was added, removed or changed.
    ///
    /// `before` and `after` are the record's sizes in bytes, as [`size`] returns them; `None` if there was or is none.
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

    /// Rejects a new record while the records have more than 24 MiB together. `what` names them in the error.
    pub fn check_room(&self, what: &str) -> Result<(), Failure> {
        if self.tally()?.is_none_or(|tally| tally.bytes <= MOST) {
            return Ok(());
        }
        Err(Failure::Reject(format!(
            "there are more than {} MiB of {what}: new ones are refused",
            MOST >> 20
        )))
    }

    /// Appends records to a document that is being built, and returns the number of records that do not fit.
    ///
    /// If not all records fit into `room` bytes, those that need at most an equal share of it come first, then larger
    /// ones while they fit. So a few large records do not displace many small ones.
    ///
    /// `put` writes one record with its id and any separator. `rows` starts a new iteration over all records.
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
        // Appends the records that `is_meant` selects by size, and counts all records.
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
        // The stored tally may be inexact; this iteration has the exact one.
        if known != Some(tally) {
            self.set_tally(tally)?;
        }
        if share.is_none() && done < tally.count {
            // The tally wrongly promised that all records fit: start again with shares.
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

/// A size limit that the host reported for a document.
#[derive(Serialize, Deserialize)]
struct Met {
    limit: usize,
    at: Time,
}

/// The number of records and their total size in bytes.
#[derive(Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Tally {
    count: u64,
    bytes: u64,
}

/// Returns the size of a record in the state, in bytes.
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
    // A record that cannot be serialized is not in the state either.
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
        // The share of each record is 13 bytes.
        for _ in 0..2 {
            assert_eq!(filled(40), without_the_largest());
            assert_eq!(filled(70), without_the_largest());
        }
        // The records fit, but not with their separators.
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
