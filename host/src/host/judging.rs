//! Owns how a component is judged that is to run while the host does: who has signed it or vouches for it, whether it is
//! granted what it asks for, and whether it compiles.

use bytes::Bytes;

use super::candidate::{Allowance, Candidate, Ready};
use super::replacement::ReplaceError;
use super::{Grant, Host};
use crate::cause::chain;
use crate::change::{State, UnderWay};
use crate::config::Policy;
use crate::ident::{Digest, PluginName};
use crate::plugin::roster::Setup;
use crate::plugin::{Inspection, inspect};
use crate::store::components;

/// A component that asks for more than it is granted.
#[derive(Debug)]
pub struct Wanting {
    /// Whose it is.
    pub plugin: PluginName,
    /// What it asks for and is not granted, in words.
    pub missing: Vec<String>,
    /// What it is.
    pub inspection: Inspection,
    /// The file.
    pub component: Bytes,
}

/// A component that was judged and compiled, and is granted what it asks for.
pub(super) struct Judged {
    /// What is to run.
    pub ready: Ready,
    /// The file.
    pub component: Bytes,
    /// What it is given beside what the config says.
    pub given: Setup,
}

/// What has a component judged and compiled must not take the host along.
pub(super) fn broke_down(error: tokio::task::JoinError) -> ReplaceError {
    ReplaceError::Refused(format!("the compiler broke down over it: {error}"))
}

/// What a component is that was fetched, and how it names itself; off the async threads.
pub(super) async fn look_at(component: Bytes) -> Result<(Digest, Result<PluginName, String>), ReplaceError> {
    let looked = tokio::task::spawn_blocking(move || match inspect(&component) {
        Ok(inspection) => (inspection.digest, Ok(inspection.manifest.name)),
        Err(error) => (Digest::of(&component), Err(chain(&error))),
    });
    looked.await.map_err(broke_down)
}

impl Host {
    /// Looks at a component that is kept, off the async threads.
    pub(super) async fn inspect_kept(&self, digest: &str) -> Result<Inspection, ReplaceError> {
        let (store, digest) = (self.store.clone(), digest.to_owned());
        let inspected = tokio::task::spawn_blocking(move || {
            let component = components::read(&store, &digest).map_err(|error| error.to_string())?;
            inspect(&component).map_err(|error| error.to_string())
        });
        inspected.await.map_err(broke_down)?.map_err(ReplaceError::Refused)
    }

    /// Judges and compiles, off the async threads, while the old code works on.
    pub(super) async fn judge(
        &self,
        under_way: &mut UnderWay,
        candidate: Candidate,
        trust: Option<Digest>,
        grant: Grant,
    ) -> Result<Judged, ReplaceError> {
        if under_way.change.state != State::Judging {
            under_way.reach(State::Judging);
        }
        let (engine, config, id) = (self.loader.engine.clone(), self.config.now(), self.id.clone());
        let policy = config.clone();
        let judged = tokio::task::spawn_blocking(move || {
            let inspection = candidate.inspect(&policy)?;
            Ok((candidate, inspection))
        });
        let (mut candidate, inspection) = judged.await.map_err(broke_down)?.map_err(ReplaceError::Refused)?;
        under_way.change.after = Some(inspection.as_version());
        self.vouch(&candidate, &inspection, trust)?;
        let allowance = |candidate: &Candidate| {
            let resolved = candidate.resolve(&config, &inspection, &id);
            resolved.map(|(_, allowance)| allowance).map_err(ReplaceError::Refused)
        };
        let (before, signer) = (candidate.given(), inspection.signer.as_ref());
        let is_others = candidate.installed && !before.is_for(signer) && grant == Grant::AsBefore;
        if !is_others {
            candidate.bind_to(signer);
        }
        if grant == Grant::AllThatIsAsked {
            let asks = allowance(&candidate)?.asks;
            candidate.grant(&asks);
        }
        let Allowance { asks, reach, .. } = allowance(&candidate)?;
        let mut missing = reach.unanswered(&asks);
        if is_others {
            let (whose, now) =
                (config.signing.in_words(before.signer.as_ref()), config.signing.in_words(signer));
            missing.insert(0, format!("go on, signed by {now}, in place of what {whose} has signed"));
        }
        let given = candidate.given();
        // What the config names has what the config says, as at a start.
        if !missing.is_empty() && candidate.installed {
            let plugin = under_way.change.plugin.clone();
            let component = candidate.into_component().map_err(ReplaceError::Refused)?;
            let wanting = Wanting { plugin, missing, inspection, component };
            return Err(ReplaceError::AsksForMore(Box::new(wanting)));
        }
        let permit = self.compiling.acquire().await.expect("it is never closed");
        under_way.reach(State::Compiling);
        let compiled = tokio::task::spawn_blocking(move || {
            let ready = candidate.compile(inspection, &engine, &config, &id)?;
            Ok((ready, candidate.into_component()?))
        });
        let compiled = compiled.await;
        drop(permit);
        let (ready, component) = compiled.map_err(broke_down)?.map_err(ReplaceError::Refused)?;
        under_way.reach(State::Waiting);
        Ok(Judged { ready, component, given })
    }

    /// Whether a component may run here by who has signed it or vouches for it.
    fn vouch(
        &self,
        candidate: &Candidate,
        inspection: &Inspection,
        trust: Option<Digest>,
    ) -> Result<(), ReplaceError> {
        let (from, digest) = (candidate.source.clone(), inspection.digest);
        if let Some(trust) = trust.filter(|trust| *trust != digest) {
            return Err(ReplaceError::Refused(format!("{from} is {digest}, not {trust}")));
        }
        if trust.is_none() && candidate.policy(&self.config.now(), inspection) == Policy::Ask {
            let by = self.config.now().signing.in_words(inspection.signer.as_ref());
            return Err(ReplaceError::Untrusted { from, digest, by });
        }
        Ok(())
    }
}
