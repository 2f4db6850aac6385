//! Owns the meaning of `wit/ipns.wit` for a session: own names, followed names and the files of both.

use std::time::Duration;

use bytes::Bytes;
use dim_model::entry::Resolution;
use dim_model::ident::{ContentPath, IpnsName, KeyName};
use dim_store::effect::{LIFETIME, LIFETIMES, NameUpdate, NameValue};
use dim_store::grants::NameOrKey;
use dim_store::plugin_limits::{DOCUMENT_BYTES, LimitName};
use dim_store::{StoreError, documents};

use super::{Answer, Mode, Refusal, Session, allowed, word};

impl Session {
    /// Sets a new value of a key's name.
    pub fn set_name(&mut self, key: &str, value: NameValue, lifetime: Option<Duration>) -> Answer<()> {
        let key = allowed!(self.writable(key));
        let bytes = match &value {
            NameValue::Document { data, .. } => data.len(),
            NameValue::Path(path) => path.as_str().len(),
        };
        if bytes > self.code.limits.document_bytes {
            return Ok(Err(Refusal::TooLarge(
                LimitName::DOCUMENT_BYTES,
                self.code.limits.document_bytes as u64,
            )));
        }
        allowed!(self.may_effect(bytes));
        let lifetime = lifetime.unwrap_or(LIFETIME);
        if !LIFETIMES.contains(&lifetime) {
            return Ok(Err(Refusal::Invalid("a lifetime lies between one minute and one year".to_owned())));
        }
        let Some(name) = self.reads.keys.name(&key) else {
            return Ok(Err(Refusal::Invalid(format!("the host has no key {key}"))));
        };
        if let Err(limit) = self.publishing.outgoing.take_document(bytes) {
            return Ok(Err(Refusal::Limit(limit)));
        }
        self.effects.set_name(&mut self.context, key, NameUpdate { name, value, lifetime });
        Ok(Ok(()))
    }

    /// Stores a document and points a key's name to it. The session remembers a document that is too large, for
    /// the operator to see, until one is accepted.
    pub fn set_document(&mut self, key: &str, data: Bytes, lifetime: Option<Duration>) -> Answer<()> {
        let named = allowed!(self.writable(key));
        let limit = self.code.limits.document_bytes.min(DOCUMENT_BYTES);
        if data.len() > limit {
            self.violations.too_large.insert(named, limit);
            return Ok(Err(Refusal::TooLarge(LimitName::DOCUMENT_BYTES, limit as u64)));
        }
        self.violations.too_large.remove(&named);
        self.set_name(key, NameValue::document(data), lifetime)
    }

    fn writable(&self, key: &str) -> Result<KeyName, Refusal> {
        let key = word::<KeyName>(key)?;
        if self.code.reach.may_write(&key) { Ok(key) } else { Err(Refusal::NotGranted(key.to_string())) }
    }

    /// The name of a key that the plugin may write.
    pub fn key_id(&self, key: &str) -> Answer<IpnsName> {
        let key = allowed!(self.writable(key));
        Ok(self.reads.keys.name(&key).ok_or_else(|| Refusal::Invalid(format!("the host has no key {key}"))))
    }

    /// Follows a name, or stops following it.
    pub fn follow(&mut self, name: &str, followed: bool) -> Answer<()> {
        let name = allowed!(self.readable(name));
        allowed!(self.may_effect(name.as_str().len()));
        if followed
            && self.context.follows().len() >= self.code.limits.follows
            && !self.context.follows().contains_key(&name)
        {
            return Ok(Err(Refusal::Limit(LimitName::FOLLOWS)));
        }
        self.effects.follow(&mut self.context, name, followed);
        Ok(Ok(()))
    }

    fn readable(&self, name: &str) -> Result<IpnsName, Refusal> {
        let asked = word::<NameOrKey>(name)?;
        match self.name_of(&asked) {
            Some(name) if self.may_read(&name) => Ok(name),
            _ => Err(Refusal::NotGranted(String::from(asked))),
        }
    }

    /// Whether the plugin may read a name, whether the grant contains the name or its key.
    pub fn may_read(&self, name: &IpnsName) -> bool {
        let is_meant = |it: &NameOrKey| self.name_of(it).as_ref() == Some(name);
        self.code.reach.granted.read.iter().any(is_meant) && !self.code.reach.denied.read.iter().any(is_meant)
    }

    fn name_of(&self, either: &NameOrKey) -> Option<IpnsName> {
        match either {
            NameOrKey::Name(name) => Some(name.clone()),
            NameOrKey::Key(key) => self.reads.keys.name(key),
        }
    }

    /// The resolution of a followed name or of an own key.
    pub fn resolve(&mut self, name: &str) -> Answer<Resolution> {
        if let Some(name) = self.own_name(name) {
            return Ok(self.context.own(&name).ok_or(Refusal::NotYetKnown));
        }
        let name = allowed!(self.readable(name));
        match self.context.follows().get(&name) {
            Some(Some(known)) => Ok(Ok(known.clone())),
            Some(None) => Ok(Err(Refusal::NotYetKnown)),
            None => {
                if self.mode == Mode::Entry && self.context.follows().len() < self.code.limits.follows {
                    self.effects.follow(&mut self.context, name, true);
                }
                Ok(Err(Refusal::NotYetKnown))
            }
        }
    }

    fn own_name(&self, name: &str) -> Option<IpnsName> {
        let asked = name.parse().ok()?;
        let name = self.name_of(&asked)?;
        self.code.reach.writes().any(|key| self.reads.keys.name(key).as_ref() == Some(&name)).then_some(name)
    }

    /// The file of a followed name or of an own key.
    pub fn get_document(&mut self, name: &str) -> Answer<(Resolution, Vec<u8>)> {
        let resolution = allowed!(self.resolve(name)?);
        let Some(data) = self.document(&resolution.path)? else {
            return Ok(Err(Refusal::NotADocument(format!("{} is not stored here", resolution.path))));
        };
        Ok(Ok((resolution, data)))
    }

    fn document(&self, path: &ContentPath) -> Result<Option<Vec<u8>>, StoreError> {
        let asked =
            self.effects.layers().flat_map(|batch| batch.requested.names.values()).find_map(|update| {
                match &update.value {
                    NameValue::Document { cid, data } if ContentPath::of(cid) == *path => Some(data.to_vec()),
                    _ => None,
                }
            });
        match asked {
            Some(data) => Ok(Some(data)),
            // Another plugin's commit may have stored it after the session's snapshot.
            None => documents::get(&self.reads.files.snapshot()?, path),
        }
    }
}
