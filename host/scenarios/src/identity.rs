//! Owns the identities in a trial: the host, its keys, and the peers and names behind the words of a scenario.
//! Receives a seed, or the header of recorded events; all identities derive from it.

use std::collections::BTreeMap;

use dim_ipfs::keys::name_of;
use dim_model::entry::export::{Header, Malformed};
use dim_model::ident::{IpnsName, KeyName, MemberName, PeerName};
use libp2p_identity::Keypair;
use sha2::{Digest as _, Sha256};

/// The identity of the host in a trial.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The id of the host.
    pub id: String,
    /// The secret from which random numbers derive.
    pub secret: [u8; 32],
    /// The seed from which the keys derive, and the peers and names behind words.
    pub seed: u64,
    /// The names of recorded keys. Only the names are known, not the private keys.
    pub keys: BTreeMap<KeyName, IpnsName>,
}

impl Identity {
    /// Derives a host from a seed.
    pub fn of(seed: u64) -> Self {
        let id = peer_of(seed, "host").to_string();
        Self { id, secret: secret_of(seed, "secret"), seed, keys: BTreeMap::new() }
    }

    /// The host that recorded the events. The export contains a seed of random numbers instead of its secret. Fails if
    /// the header is malformed.
    pub fn recorded(header: &Header) -> Result<Self, Malformed> {
        let (id, secret, keys) = (header.host.clone(), header.secret()?, header.keys.clone());
        Ok(Self { id, secret, seed: 0, keys })
    }
}

/// Derives 32 bytes from a seed and a word.
pub fn secret_of(seed: u64, word: &str) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(b"dim test");
    hash.update(seed.to_be_bytes());
    hash.update(word);
    hash.finalize().into()
}

/// Derives an Ed25519 key pair from a seed and a word.
pub fn pair_of(seed: u64, word: &str) -> Keypair {
    Keypair::ed25519_from_bytes(secret_of(seed, word)).expect("any 32 bytes are an ed25519 key")
}

/// The peer behind a word.
pub fn peer_of(seed: u64, word: &str) -> PeerName {
    let peer = pair_of(seed, &format!("peer {word}")).public().to_peer_id();
    peer.to_base58().parse().expect("a peer id is base58")
}

/// The member behind a word.
pub fn member_of(seed: u64, word: &str) -> MemberName {
    MemberName::from(name_of(&pair_of(seed, &format!("member {word}"))))
}

/// The process start of the member behind a word.
pub fn incarnation_of(seed: u64, word: &str) -> [u8; 16] {
    let secret = secret_of(seed, &format!("incarnation {word}"));
    *secret.first_chunk().expect("it has 32 bytes")
}

/// The IPNS name of the plugin's own key `key`.
pub fn key_for(seed: u64, key: &str) -> IpnsName {
    name_of(&pair_of(seed, &format!("key {key}")))
}

/// The IPNS name behind a word.
pub fn name_for(seed: u64, word: &str) -> IpnsName {
    name_of(&pair_of(seed, &format!("name {word}")))
}
