//! Owns who plays a part in a trial: the host, its keys, and the peers and names that words stand for. All of them follow
//! from a seed, or from what was recorded.

use std::collections::BTreeMap;

use libp2p_identity::Keypair;
use sha2::{Digest as _, Sha256};

use crate::entry::exported::{Header, Malformed};
use crate::ident::{IpnsName, KeyName, PeerName};
use crate::keys::name_of;

/// A host that plugins are tried on.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Who it is.
    pub id: String,
    /// What random follows from.
    pub secret: [u8; 32],
    /// What its keys follow from, and the peers and names that words stand for.
    pub seed: u64,
    /// The names of keys that do not follow from the seed: it has the names alone.
    pub keys: BTreeMap<KeyName, IpnsName>,
}

impl Identity {
    /// The host that follows from a seed.
    pub fn of(seed: u64) -> Self {
        let id = peer_of(seed, "host").to_string();
        Self { id, secret: secret_of(seed, "secret"), seed, keys: BTreeMap::new() }
    }

    /// The host that events were recorded on, but for its secret.
    pub fn recorded(header: &Header) -> Result<Self, Malformed> {
        let (id, secret, keys) = (header.host.clone(), header.secret()?, header.keys.clone());
        Ok(Self { id, secret, seed: 0, keys })
    }
}

/// Bytes that follow from a seed and a word.
pub fn secret_of(seed: u64, word: &str) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(b"dim test");
    hash.update(seed.to_be_bytes());
    hash.update(word);
    hash.finalize().into()
}

pub fn pair_of(seed: u64, word: &str) -> Keypair {
    Keypair::ed25519_from_bytes(secret_of(seed, word)).expect("any 32 bytes are an ed25519 key")
}

/// A peer that has this word for a name.
pub fn peer_of(seed: u64, word: &str) -> PeerName {
    let peer = pair_of(seed, &format!("peer {word}")).public().to_peer_id();
    peer.to_base58().parse().expect("a peer id is base58")
}

/// The name of the plugin's own key of this name.
pub fn key_for(seed: u64, key: &str) -> IpnsName {
    name_of(&pair_of(seed, &format!("key {key}")))
}

/// An IPNS name that has this word for a name.
pub fn name_for(seed: u64, word: &str) -> IpnsName {
    name_of(&pair_of(seed, &format!("name {word}")))
}
