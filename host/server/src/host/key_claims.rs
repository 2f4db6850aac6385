//! Owns the claims of plugins on keys: two plugins publish under one key only if both share it. It receives the
//! permissions of a plugin and returns a hold on its keys, or the conflict.
//!
//! A plugin owns the keys of its running code and of the code that it can return to. Code that is about to run holds
//! its keys in addition until it runs or is dropped. So does a plugin of the config that is not loaded yet or cannot
//! be loaded.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use dim_model::ident::{KeyName, PluginName};
use dim_store::grants::Reach;
use dim_store::plugin_registry::{Claim, Row};

use super::candidate::Candidate;
use super::replacement::ReplaceError;
use super::{Host, UNHURT};
use crate::config::Config;

/// The keys of code that does not run yet, or not any more.
#[derive(Debug, Default)]
pub struct KeyClaims(Mutex<BTreeMap<PluginName, Claim>>);

/// Keys that are held for code that is about to run. They are released on drop.
#[must_use]
#[derive(Debug)]
pub struct Hold<'a> {
    claims: &'a KeyClaims,
    name: PluginName,
    /// The claim that was held for the plugin before.
    before: Option<Claim>,
}

impl Hold<'_> {
    /// Ends the hold because the code runs and claims its keys itself.
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

impl KeyClaims {
    /// Returns the claims of the plugins at a start, by their present grants. A key goes first to the plugin that had
    /// it before, then by name. Plugins above the maximum number get none; the oldest plugins come first.
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

    /// Returns the plugins that a key is held for.
    pub fn holders(&self, key: &KeyName) -> BTreeSet<PluginName> {
        let claims = self.0.lock().expect(UNHURT);
        claims.iter().filter(|(_, claim)| claim.keys.contains(key)).map(|(name, _)| name.clone()).collect()
    }

    /// Releases the keys of a plugin that does not come back.
    pub fn forget(&self, name: &PluginName) {
        self.0.lock().expect(UNHURT).remove(name);
    }
}

impl Host {
    /// Reserves a place for a plugin and the keys that it may write, unless another plugin owns one of them. The
    /// plugin keeps its present keys meanwhile.
    pub(super) fn claim(&self, name: &PluginName, reach: &Reach) -> Result<Hold<'_>, ReplaceError> {
        let claim = Claim::of(reach);
        let mut about = self.deployment.claims.0.lock().expect(UNHURT);
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
                "the host has {most} plugins already, which is the maximum (limits.plugins)"
            )));
        }
        // The running code keeps its keys until the new code certainly runs.
        let own = running.get(name).into_iter().flat_map(|loaded| loaded.handle.claims());
        let held = own.fold(claim, Claim::and);
        let before = about.insert(name.clone(), held);
        Ok(Hold { claims: &self.deployment.claims, name: name.clone(), before })
    }

    /// Holds the keys of a plugin that stops, until its removal is certain.
    pub(super) fn keep_claim(&self, name: &PluginName) {
        let Some(loaded) = self.plugins.get(name) else { return };
        let kept = loaded.handle.claims().fold(Claim::default(), Claim::and);
        self.deployment.claims.0.lock().expect(UNHURT).insert(name.clone(), kept);
    }
}
