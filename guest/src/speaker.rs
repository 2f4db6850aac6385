//! Who may speak for a thing of the fleet, a node for example: whoever spoke for it first, or whom the operator names.
//!
//! The backend knows which peer has published a message, for that is signed. What comes from this host, through its API
//! or from its plugins, is believed.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use crate::bindings::dim::coordination::event::{Failure, Origin, Refusal};
use crate::json;
use crate::state::{Error, Map};

/// The peer that each id is bound to.
const BOUND: Map<str, String> = Map::new("speaker/");

/// Whom an id is bound to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Binding {
    /// To nobody: any peer may speak for it, unless the operator names its peers.
    #[default]
    No,
    /// To the first peer that speaks for it.
    First,
    /// To the peers that the operator names; for any other id nobody speaks.
    Listed,
}

/// Who may speak for which id.
#[derive(Debug, Default)]
pub struct Speakers {
    binding: Binding,
    listed: BTreeMap<String, BTreeSet<String>>,
}

/// An id that is to be unbound.
#[derive(Debug, Deserialize)]
pub struct Unbind {
    /// Which.
    node_id: String,
}

impl Speakers {
    /// `listed` are pairs, as in `ID=PEER`; an id may stand there more than once.
    pub fn new(binding: Binding, listed: &[String]) -> Result<Self, String> {
        let mut speakers = Self { binding, listed: BTreeMap::new() };
        for pair in listed {
            let split = pair.rsplit_once('=').filter(|(id, peer)| !id.is_empty() && !peer.is_empty());
            let (id, peer) = split.ok_or_else(|| format!("{pair:?} is no pair, as in NODE=PEER"))?;
            let is_base58 = |c: char| c.is_ascii_alphanumeric() && !"0OIl".contains(c);
            if !(46..=64).contains(&peer.len()) || !peer.chars().all(is_base58) {
                return Err(format!("{peer:?} is no peer id, as in 12D3Koo… or Qm…"));
            }
            speakers.listed.entry(id.to_owned()).or_default().insert(peer.to_owned());
        }
        Ok(speakers)
    }

    /// Whether the sender of a message may speak for `id`; if it is the first that does, it is bound to it.
    pub fn check(&self, id: &str, origin: &Origin) -> Result<(), Failure> {
        let Origin::Peer(peer) = origin else { return Ok(()) };
        let no = |whose: &str| Err(Failure::Reject(format!("{peer} may not speak for {id}: {whose}")));
        if let Some(peers) = self.listed.get(id) {
            return if peers.contains(peer) { Ok(()) } else { no("the config names its peers") };
        }
        match self.binding {
            Binding::No => Ok(()),
            Binding::Listed => no("the config names no peer for it"),
            Binding::First => match BOUND.get(id)? {
                Some(bound) if bound == *peer => Ok(()),
                Some(bound) => no(&format!("it is bound to {bound}, which was the first")),
                None => Ok(BOUND.set(id, peer)?),
            },
        }
    }

    /// Forgets whom an id is bound to.
    pub fn forget(&self, id: &str) -> Result<(), Error> {
        BOUND.delete(id)
    }

    /// The command that unbinds an id: its peer is another one now.
    pub fn unbind(&self, body: &str) -> Result<String, Refusal> {
        let Unbind { node_id } = json::read(body)?;
        let bound = BOUND.get(&node_id)?;
        BOUND.delete(&node_id)?;
        json::write(&serde_json::json!({ "node_id": node_id, "was": bound }))
    }
}
