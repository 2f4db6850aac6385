//! Owns feeds: a bounded buffer of the newest items, each with a number. It receives items and returns them to
//! readers, who can continue after a lost connection.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use tokio::sync::watch;

const UNHURT: &str = "no thread panics while it holds the items";

/// The maximum number of items of one read. There may be many readers, and slow ones.
const AT_A_TIME: usize = 64;

/// A feed of items.
#[derive(Debug)]
pub struct Feed<T> {
    held: Mutex<Held<T>>,
    /// The number of the next item.
    next: watch::Sender<u64>,
    /// The number of the first item since the start of the feed.
    begin: u64,
    most: usize,
}

#[derive(Debug)]
struct Held<T> {
    items: VecDeque<T>,
    /// The number of the first item in the buffer.
    first: u64,
}

/// The items that a reader requested and did not receive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Missed {
    /// Nothing.
    #[default]
    Nothing,
    /// This number of items.
    Count(u64),
    /// An unknown number of items.
    Unknown,
}

impl Missed {
    /// What is missed of two parts together.
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Nothing, it) | (it, Self::Nothing) => it,
            (Self::Count(one), Self::Count(other)) => Self::Count(one.saturating_add(other)),
            (Self::Unknown, _) | (_, Self::Unknown) => Self::Unknown,
        }
    }
}

impl<T: Clone> Feed<T> {
    /// Makes a feed that holds the newest `most` items. Its numbers are greater than those of feeds made earlier,
    /// because they start at the time in microseconds.
    pub fn new(most: usize) -> Self {
        let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let begin = u64::try_from(since.as_micros()).unwrap_or(1).max(1);
        let held = Held { items: VecDeque::new(), first: begin };
        Self { held: Mutex::new(held), next: watch::Sender::new(begin), begin, most }
    }

    /// Appends an item.
    pub fn tell(&self, item: T) {
        let mut held = self.held.lock().expect(UNHURT);
        held.items.push_back(item);
        if held.items.len() > self.most {
            held.items.pop_front();
            held.first += 1;
        }
        self.next.send_modify(|next| *next += 1);
    }

    /// Returns a reader of the items from now on, or of those after the item with the number `after`.
    pub fn follow(self: &Arc<Self>, after: Option<u64>) -> Reader<T> {
        let held = self.held.lock().expect(UNHURT);
        let end = *self.next.borrow();
        let (next, missed) = match after {
            None => (end, Missed::Nothing),
            Some(after) if after < end && after + 1 >= self.begin => (after + 1, Missed::Nothing),
            // The number is from an earlier feed, so all items of this feed came after it.
            Some(after) if after < end => (held.first, Missed::Unknown),
            Some(_) => (end, Missed::Unknown),
        };
        Reader { feed: self.clone(), next, missed, told: self.next.subscribe() }
    }
}

/// A reader of a feed.
#[derive(Debug)]
pub struct Reader<T> {
    feed: Arc<Feed<T>>,
    next: u64,
    /// The items that it missed before its first read.
    missed: Missed,
    told: watch::Receiver<u64>,
}

/// The result of one read.
#[derive(Debug)]
pub struct Read<T> {
    /// The items that were missed before these.
    pub missed: Missed,
    /// The items, each with its number.
    pub items: Vec<(u64, T)>,
}

impl<T: Clone> Reader<T> {
    /// Returns the number of the next item.
    pub fn next_number(&self) -> u64 {
        self.next
    }

    /// Returns whether the next read reports missed items and nothing else.
    pub fn has_missed(&self) -> bool {
        self.missed != Missed::Nothing
    }

    /// Waits for items and returns at most 64 of them.
    ///
    /// Cancel safe.
    pub async fn read(&mut self) -> Read<T> {
        let missed = std::mem::take(&mut self.missed);
        if missed != Missed::Nothing {
            return Read { missed, items: Vec::new() };
        }
        // The reader holds the feed, and with it the sender.
        self.told.wait_for(|next| *next > self.next).await.expect("the feed is there");
        let held = self.feed.held.lock().expect(UNHURT);
        let first = self.next.max(held.first);
        let missed = match first - self.next {
            0 => Missed::Nothing,
            count => Missed::Count(count),
        };
        let from = usize::try_from(first - held.first).unwrap_or(usize::MAX);
        let items: Vec<(u64, T)> =
            (first..).zip(held.items.iter().skip(from).take(AT_A_TIME).cloned()).collect();
        self.next = first + items.len() as u64;
        Read { missed, items }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(reader: &mut Reader<u32>) -> (Missed, Vec<u32>) {
        let Read { missed, items } = reader.read().await;
        (missed, items.into_iter().map(|(_, item)| item).collect())
    }

    #[tokio::test]
    async fn a_reader_goes_on_after_what_it_had_last() {
        let feed = Arc::new(Feed::new(3));
        let mut reader = feed.follow(None);
        let before = reader.next_number() - 1;
        feed.tell(1);
        feed.tell(2);
        let Read { items, .. } = reader.read().await;
        feed.tell(3);
        assert_eq!(read(&mut feed.follow(Some(items[0].0))).await, (Missed::Nothing, vec![2, 3]));
        assert_eq!(read(&mut feed.follow(Some(before))).await, (Missed::Nothing, vec![1, 2, 3]));
        feed.tell(4);
        feed.tell(5);
        assert_eq!(read(&mut reader).await, (Missed::Nothing, vec![3, 4, 5]));
        assert_eq!(read(&mut feed.follow(Some(before))).await, (Missed::Count(2), vec![3, 4, 5]));
    }

    #[tokio::test]
    async fn a_reader_reads_a_bounded_number_at_a_time() {
        let feed = Arc::new(Feed::new(100));
        let mut reader = feed.follow(None);
        (0..100).for_each(|item| feed.tell(item));
        assert_eq!(read(&mut reader).await, (Missed::Nothing, (0..64).collect()));
        assert_eq!(read(&mut reader).await, (Missed::Nothing, (64..100).collect()));
    }

    #[tokio::test]
    async fn what_another_feed_told_last_is_not_known() {
        let feed = Arc::new(Feed::new(3));
        feed.tell(1);
        let mut earlier = feed.follow(Some(7));
        assert_eq!(read(&mut earlier).await, (Missed::Unknown, vec![]));
        assert_eq!(read(&mut earlier).await, (Missed::Nothing, vec![1]));
        let mut later = feed.follow(Some(u64::MAX));
        assert_eq!(read(&mut later).await, (Missed::Unknown, vec![]));
        feed.tell(2);
        assert_eq!(read(&mut later).await, (Missed::Nothing, vec![2]));
    }
}
