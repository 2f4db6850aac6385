//! Binds ids, for example those of nodes, to the peers that may publish for them.
//!
//! An id is bound to the first peer that published for it, or to peers that the operator lists. Messages are signed, so
//! the backend knows the publisher. Messages of this host, from its API or its plugins, are always accepted.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use crate::bindings::dim::coordination::event::{Failure, Origin, Refusal};
use crate::json;
use crate::state::{Error, Map};

/// The first peer that published for each id.
const BOUND: Map<str, String> = Map::new("speaker/");

impl Origin {
    /// The peer id of a peer or of a member, in base58; none for this host and its plugins.
    pub fn peer(&self) -> Option<&str> {
        match self {
            Origin::Peer(peer) => Some(peer),
            Origin::Member(event) => Some(&event.peer),
            Origin::Plugin(_) | Origin::Host => None,
        }
    }
}

/// The rule that binds an id to peers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Binding {
    /// No binding: any peer may publish for an id, unless the operator lists peers for it.
    #[default]
    No,
    /// An id is bound to the first peer that publishes for it, unless the operator lists peers for it.
    First,
    /// An id is bound to the peers that the operator lists. Without listed peers, no peer may publish for it.
    Listed,
}

/// The peers that may publish for each id.
#[derive(Debug, Default)]
pub struct Speakers {
    binding: Binding,
    listed: BTreeMap<String, BTreeSet<String>>,
}

/// The body of the command `unbind`.
#[derive(Debug, Deserialize)]
pub struct Unbind {
    /// The id of the node to unbind.
    node_id: String,
}

impl Speakers {
    /// Creates the rules from a binding and a list of `ID=PEER` pairs. An id may occur in several pairs.
    ///
    /// # Errors
    ///
    /// Returns a text for the operator if an item is not a pair or `PEER` is not a peer id.
    pub fn new(binding: Binding, listed: &[String]) -> Result<Self, String> {
        let mut speakers = Self { binding, listed: BTreeMap::new() };
        for pair in listed {
            let split = pair.rsplit_once('=').filter(|(id, peer)| !id.is_empty() && !peer.is_empty());
            let (id, peer) = split.ok_or_else(|| format!("{pair:?} is no pair, as in NODE=PEER"))?;
            let is_base58 = |c: char| c.is_ascii_alphanumeric() && !"0OIl".contains(c);
            if !(46..=64).contains(&peer.len()) || !peer.chars().all(is_base58) {
                return Err(format!("{peer:?} is not a peer id, as in 12D3Koo… or Qm…"));
            }
            speakers.listed.entry(id.to_owned()).or_default().insert(peer.to_owned());
        }
        Ok(speakers)
    }

    /// Rejects a message whose sender may not publish for `id`. Under [`Binding::First`] an unbound id is bound to the
    /// sender.
    pub fn check(&self, id: &str, origin: &Origin) -> Result<(), Failure> {
        let Some(peer) = origin.peer() else { return Ok(()) };
        let no = |whose: &str| Err(Failure::Reject(format!("{peer} may not publish for {id}: {whose}")));
        if let Some(peers) = self.listed.get(id) {
            return if peers.contains(peer) { Ok(()) } else { no("the config lists other peers for it") };
        }
        match self.binding {
            Binding::No => Ok(()),
            Binding::Listed => no("the config lists no peer for it"),
            Binding::First => match BOUND.get(id)? {
                Some(bound) if bound == peer => Ok(()),
                Some(bound) => no(&format!("it is bound to {bound}, the first peer that published for it")),
                None => Ok(BOUND.set(id, &peer.to_owned())?),
            },
        }
    }

    /// Removes the binding of an id to its first peer.
    pub fn forget(&self, id: &str) -> Result<(), Error> {
        BOUND.delete(id)
    }

    /// Executes the command `unbind`, after which the id can be bound to another peer. The reply contains the id and
    /// the previous peer as `was`.
    pub fn unbind(&self, body: &str) -> Result<String, Refusal> {
        let Unbind { node_id } = json::read(body)?;
        let bound = BOUND.get(&node_id)?;
        BOUND.delete(&node_id)?;
        json::write(&serde_json::json!({ "node_id": node_id, "was": bound }))
    }
}
