//! Owns the keys that are each plugin's own: no other plugin publishes under them, unless both share the key.
//!
//! A plugin has the keys of what it runs and of what it may go back to. What is about to run has its keys beside
//! those until it runs or is given up, and so has what the config names and is not loaded yet, or cannot be.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use super::candidate::Candidate;
use super::replacement::ReplaceError;
use super::{Host, UNHURT};
use crate::config::Config;
use crate::ident::{KeyName, PluginName};
use crate::plugin::Reach;
use crate::plugin::roster::{Claim, Row};

/// The keys of what does not run yet, or not any more.
#[derive(Debug, Default)]
pub struct Claims(Mutex<BTreeMap<PluginName, Claim>>);

/// Keys that are held for what is about to run. Dropped, they are given up again.
#[must_use]
#[derive(Debug)]
pub struct Hold<'a> {
    claims: &'a Claims,
    name: PluginName,
    /// What was held for the plugin before.
    before: Option<Claim>,
}

impl Hold<'_> {
    /// What they were held for runs: what runs has them.
    pub fn runs(mut self) {
        self.before = None;
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let mut claims = self.claims.0.lock().expect(UNHURT);
        match self.before.take() {
            Some(before) => claims.insert(self.name.clone(), before),
            None => claims.remove(&self.name),
        };
    }
}

impl Claims {
    /// Those of the plugins that a host begins with, by what they are granted now: first to whoever had a key
    /// before, then by name; to no more plugins than there may be, the oldest first.
    pub fn at_start(
        candidates: &[Candidate],
        rows: &BTreeMap<PluginName, Row>,
        config: &Config,
        id: &str,
    ) -> Self {
        let mut wanted: Vec<_> = candidates
            .iter()
            .map(|it| (rows.get(&it.name), &it.name, it.may_claim(rows.get(&it.name), config, id)))
            .collect();
        wanted.sort_by_key(|(row, name, _)| (row.map_or(u32::MAX, |row| row.id.0), *name));
        wanted.truncate(config.limits.plugins);
        wanted.sort_by_key(|(_, name, _)| *name);
        let mut claims: BTreeMap<PluginName, Claim> = BTreeMap::new();
        for (_, name, wanted) in &wanted {
            claims.insert((*name).clone(), Claim { keys: BTreeSet::new(), shared: wanted.shared.clone() });
        }
        let had = |row: &Option<&Row>, key| row.is_some_and(|row| row.claim.keys.contains(key));
        for is_old in [true, false] {
            for (row, name, wanted) in &wanted {
                for key in wanted.keys.iter().filter(|key| had(row, *key) == is_old) {
                    let one = Claim { keys: [key.clone()].into(), shared: wanted.shared.clone() };
                    let is_taken =
                        claims.iter().any(|(other, theirs)| other != *name && one.conflict(theirs).is_some());
                    if let Some(own) = claims.get_mut(*name).filter(|_| !is_taken) {
                        own.keys.insert(key.clone());
                    }
                }
            }
        }
        Self(Mutex::new(claims))
    }

    /// The plugins that a key is held for.
    pub fn holders(&self, key: &KeyName) -> BTreeSet<PluginName> {
        let claims = self.0.lock().expect(UNHURT);
        claims.iter().filter(|(_, claim)| claim.keys.contains(key)).map(|(name, _)| name.clone()).collect()
    }

    /// Gives up what is held for a plugin that is not to come back.
    pub fn forget(&self, name: &PluginName) {
        self.0.lock().expect(UNHURT).remove(name);
    }
}

impl Host {
    /// Has a place for a plugin, and makes the keys that it may write under its own, unless another plugin has one
    /// of them. What it has already stays its own meanwhile.
    pub(super) fn claim(&self, name: &PluginName, reach: &Reach) -> Result<Hold<'_>, ReplaceError> {
        let claim = Claim::of(reach);
        let mut about = self.claims.0.lock().expect(UNHURT);
        let running = self.plugins.all();
        let runs = running.iter().flat_map(|(name, loaded)| loaded.handle.claims().map(move |it| (name, it)));
        let about_to = about.iter().map(|(name, claim)| (name, claim.clone()));
        let taken = runs.chain(about_to).filter(|(other, _)| *other != name).find_map(|(other, theirs)| {
            let key = claim.conflict(&theirs)?.clone();
            Some(ReplaceError::KeyTaken { key, other: other.clone() })
        });
        if let Some(taken) = taken {
            return Err(taken);
        }
        let is_known = running.contains_key(name) || about.contains_key(name);
        let (there, most) =
            (running.keys().chain(about.keys()).collect::<BTreeSet<_>>(), self.config.now().limits.plugins);
        if !is_known && there.len() >= most {
            return Err(ReplaceError::Refused(format!(
                "{most} plugins are there already, and there may be no more (limits.plugins)"
            )));
        }
        // Until it is sure that it runs, what runs has its keys, too, whatever its thread is at.
        let own = running.get(name).into_iter().flat_map(|loaded| loaded.handle.claims());
        let held = own.fold(claim, Claim::and);
        let before = about.insert(name.clone(), held);
        Ok(Hold { claims: &self.claims, name: name.clone(), before })
    }

    /// Keeps for a plugin that stops what it has, until it is sure that it does not come back.
    pub(super) fn keep_claim(&self, name: &PluginName) {
        let Some(loaded) = self.plugins.get(name) else { return };
        let kept = loaded.handle.claims().fold(Claim::default(), Claim::and);
        self.claims.0.lock().expect(UNHURT).insert(name.clone(), kept);
    }
}
