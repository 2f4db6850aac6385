//! Owns the judgement of a component while the host runs. It receives a candidate, checks its signature or the
//! operator's word, checks its grants, compiles it, and returns it ready to run.

use bytes::Bytes;
use dim_model::ident::{Digest, PluginName};
use dim_runtime::{Inspection, ManifestError, inspect};
use dim_store::change::{State, UnderWay};
use dim_store::components;
use dim_store::plugin_registry::Setup;
use thiserror::Error;

use super::candidate::{Allowance, Candidate, CandidateError, Ready};
use super::replacement::ReplaceError;
use super::{Grant, Host};
use crate::config::Policy;

/// A component that requests more than it is granted.
#[derive(Debug)]
pub struct Wanting {
    /// The plugin.
    pub plugin: PluginName,
    /// The missing permissions, as text.
    pub missing: Vec<String>,
    /// The inspection of the component.
    pub inspection: Inspection,
    /// The bytes of the component.
    pub component: Bytes,
}

/// A component that was judged and compiled, and is granted what it requests.
pub(super) struct Judged {
    /// The code that is ready to run.
    pub ready: Ready,
    /// The bytes of the component.
    pub component: Bytes,
    /// The grants and denials outside the config.
    pub given: Setup,
}

/// A reason why a component cannot be inspected.
#[derive(Debug, Error)]
pub enum InspectionError {
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] std::io::Error),
    /// It is no plugin.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}

/// Converts a panic during judgement or compilation to a refusal, so that it does not end the host.
pub(super) fn broke_down(error: tokio::task::JoinError) -> ReplaceError {
    ReplaceError::Refused(format!("the compiler failed on it: {error}"))
}

/// Returns the digest of a fetched component and the name in its manifest. Runs outside the async threads.
pub(super) async fn look_at(
    component: Bytes,
) -> Result<(Digest, Result<PluginName, ManifestError>), ReplaceError> {
    let looked = tokio::task::spawn_blocking(move || match inspect(&component) {
        Ok(inspection) => (inspection.digest, Ok(inspection.manifest.name)),
        Err(error) => (Digest::of(&component), Err(error)),
    });
    looked.await.map_err(broke_down)
}

impl Host {
    /// Inspects a stored component outside the async threads.
    pub(super) async fn inspect_kept(&self, digest: &str) -> Result<Inspection, ReplaceError> {
        let (store, digest) = (self.storage.store.clone(), digest.to_owned());
        let inspected = tokio::task::spawn_blocking(move || {
            Ok::<_, InspectionError>(inspect(&components::read(&store, &digest)?)?)
        });
        Ok(inspected.await.map_err(broke_down)??)
    }

    /// Judges and compiles a component outside the async threads while the old code continues.
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
        let (engine, config, id) =
            (self.deployment.loader.engine.clone(), self.config.now(), self.id.clone());
        let policy = config.clone();
        let judged = tokio::task::spawn_blocking(move || {
            let inspection = candidate.inspect(&policy)?;
            Ok::<_, CandidateError>((candidate, inspection))
        });
        let (mut candidate, inspection) = judged.await.map_err(broke_down)??;
        under_way.change.after = Some(inspection.as_version());
        self.vouch(&candidate, &inspection, trust)?;
        let allowance = |candidate: &Candidate| {
            let resolved = candidate.resolve(&config, &inspection, &id);
            resolved.map(|(_, allowance)| allowance).map_err(CandidateError::Values)
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
            missing.insert(0, format!("run code signed by {now} in place of code signed by {whose}"));
        }
        let given = candidate.given();
        // A component from the config has the grants of the config, as at a start.
        if !missing.is_empty() && candidate.installed {
            let plugin = under_way.change.plugin.clone();
            let component = candidate.into_component()?;
            let wanting = Wanting { plugin, missing, inspection, component };
            return Err(ReplaceError::AsksForMore(Box::new(wanting)));
        }
        let permit = self.deployment.compiling.acquire().await.expect("it is never closed");
        under_way.reach(State::Compiling);
        let compiled = tokio::task::spawn_blocking(move || {
            let ready = candidate.compile(inspection, &engine, &config, &id)?;
            Ok::<_, CandidateError>((ready, candidate.into_component()?))
        });
        let compiled = compiled.await;
        drop(permit);
        let (ready, component) = compiled.map_err(broke_down)??;
        under_way.reach(State::Waiting);
        Ok(Judged { ready, component, given })
    }

    /// Checks whether a component may run here, by its signer or by the digest that somebody vouches for.
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
