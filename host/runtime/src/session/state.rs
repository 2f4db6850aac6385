//! Owns the meaning of `wit/state.wit` for a session: the plugin's own keys and values.

use std::collections::btree_map::Range;
use std::iter::Peekable;
use std::ops::Bound;

use dim_store::plugin_limits::{KEY_BYTES, LimitName, PAGE_BYTES};
use dim_store::{StateKey, StoreError};

use super::{Answer, Refusal, Session, allowed, check_key};

impl Session {
    /// The value of a state key.
    pub fn get_state(&mut self, key: &[u8]) -> Answer<Option<Vec<u8>>> {
        allowed!(check_key(key));
        let value = self.read_state(key)?;
        self.reads.last_read = Some((key.to_vec(), value.as_ref().map(Vec::len)));
        Ok(Ok(value))
    }

    fn read_state(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        match self.effects.state(key) {
            Some(value) => Ok(value.map(<[u8]>::to_vec)),
            None => self.reads.snapshot.state(&StateKey::new(self.id, key)),
        }
    }

    /// Sets or deletes a state key.
    pub fn set_state(&mut self, key: &[u8], value: Option<&[u8]>) -> Answer<()> {
        allowed!(check_key(key));
        let len = value.map_or(0, <[u8]>::len);
        if len > self.code.limits.value_bytes {
            return Ok(Err(Refusal::TooLarge(LimitName::VALUE_BYTES, self.code.limits.value_bytes as u64)));
        }
        allowed!(self.may_effect(key.len() + len));
        let old = match self.reads.last_read.take() {
            Some((read, len)) if read == key => len,
            _ => self.read_state(key)?.map(|value| value.len()),
        };
        let grows = value.map_or(0, |value| key.len() + value.len()) as u64;
        let shrinks = old.map_or(0, |len| (key.len() + len) as u64);
        if grows > shrinks && self.effects.state_size + grows - shrinks > self.code.limits.state_bytes {
            return Ok(Err(Refusal::Quota(self.code.limits.state_bytes)));
        }
        if value.is_none() && old.is_none() {
            return Ok(Ok(()));
        }
        self.effects.set_state(key.to_vec(), value.map(<[u8]>::to_vec), old);
        Ok(Ok(()))
    }

    /// Returns at most `limit` keys with the prefix `prefix` after the key `after`, with their values.
    pub fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Answer<Vec<(Vec<u8>, Vec<u8>)>> {
        if prefix.len() > KEY_BYTES || after.is_some_and(|after| after.len() > KEY_BYTES) {
            return Ok(Err(Refusal::KeyLength(KEY_BYTES as u32)));
        }
        let from = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        let layers = self.effects.layers();
        let layers =
            layers.map(|batch| batch.requested.state.range::<[u8], _>((from, Bound::Unbounded)).peekable());
        let fresh = Fresh { layers: layers.collect() };
        let mut fresh = fresh.take_while(|(key, _)| key.starts_with(prefix)).peekable();
        let stored_from = from.map(|key| StateKey::new(self.id, key));
        let stored = self.reads.snapshot.scan(stored_from.as_ref().map(|key| key.as_bytes()))?;
        let mut stored = stored
            .map_while(|row| match row {
                Ok((key, value)) => {
                    let key = StateKey::strip(self.id, &key)?.to_vec();
                    key.starts_with(prefix).then_some(Ok((key, value)))
                }
                Err(error) => Some(Err(error)),
            })
            .peekable();
        let mut page = Page { rows: Vec::new(), bytes: 0, limit };
        while page.has_room() {
            let next_stored = match stored.peek() {
                Some(Ok((key, _))) => Some(key.as_slice()),
                Some(Err(_)) => return Err(stored.next().and_then(Result::err).expect("just seen")),
                None => None,
            };
            match (fresh.peek(), next_stored) {
                (None, None) => break,
                (Some((new, _)), old) if old.is_none_or(|old| *new <= old) => {
                    if old == Some(*new) {
                        stored.next();
                    }
                    let (key, value) = fresh.next().expect("just seen");
                    if let Some(value) = value {
                        page.push(key.to_vec(), value.to_vec());
                    }
                }
                _ => {
                    let (key, value) = stored.next().expect("just seen")?;
                    page.push(key, value);
                }
            }
        }
        Ok(Ok(page.rows))
    }
}

/// The uncommitted rows in the order of keys. A page is small and a batch may be large, so it reads only as
/// many rows as the page needs.
struct Fresh<'a> {
    /// The layers, newest first.
    layers: Vec<Layer<'a>>,
}

type Layer<'a> = Peekable<Range<'a, Vec<u8>, Option<Vec<u8>>>>;

impl<'a> Iterator for Fresh<'a> {
    type Item = (&'a [u8], Option<&'a [u8]>);

    fn next(&mut self) -> Option<Self::Item> {
        let key = self.layers.iter_mut().filter_map(|layer| layer.peek().map(|(key, _)| *key)).min()?;
        let mut said = None;
        for layer in &mut self.layers {
            // The newest layer determines the value of a key; older layers are skipped.
            if let Some((_, value)) = layer.next_if(|(other, _)| *other == key) {
                said.get_or_insert(value);
            }
        }
        said.map(|value| (key.as_slice(), value.as_deref()))
    }
}

/// A page of a scan.
struct Page {
    rows: Vec<(Vec<u8>, Vec<u8>)>,
    bytes: usize,
    limit: usize,
}

impl Page {
    fn has_room(&self) -> bool {
        self.rows.len() < self.limit && self.bytes < PAGE_BYTES
    }

    fn push(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.bytes += key.len() + value.len();
        self.rows.push((key, value));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn of_one_key_the_newest_layer_counts() {
        let layer = |rows: &[(&str, Option<&str>)]| -> BTreeMap<Vec<u8>, Option<Vec<u8>>> {
            let bytes = |text: &str| text.as_bytes().to_vec();
            rows.iter().map(|(key, value)| (bytes(key), value.map(bytes))).collect()
        };
        let newest = layer(&[("b", None), ("d", Some("new"))]);
        let older = layer(&[("a", Some("1")), ("b", Some("2")), ("d", Some("old"))]);
        let oldest = layer(&[("b", Some("3")), ("c", None), ("e", Some("5"))]);
        let layers = [&newest, &older, &oldest].map(|layer| layer.range::<[u8], _>(..).peekable());
        let merged: Vec<_> = Fresh { layers: layers.into() }.collect();
        let expected: [(&[u8], Option<&[u8]>); 5] =
            [(b"a", Some(b"1")), (b"b", None), (b"c", None), (b"d", Some(b"new")), (b"e", Some(b"5"))];
        assert_eq!(merged, expected);
    }
}
