//! Owns the identity with which a program writes reliable topics: a key that is kept with its other keys, and a process
//! start of its own.

use dim_age::x25519;
use dim_ipfs::keys::{Key, KeyError, Keyring};
use dim_model::ident::{IpnsName, KeyName};
use dim_model::time::Timestamp;
use dim_topics::identity::{Incarnation, WriterId};
use dim_topics::membership::exchange::Exchange;
use dim_topics::own_log::Author;
use ed25519_dalek::SigningKey;
use libp2p_identity::Keypair;
use rand::Rng as _;
use thiserror::Error;

use super::membership_files::MembershipFiles;

/// The name of the key.
const KEY: &str = "dim-writer";

/// The name of the key for which other members encrypt secrets. Its 32 private bytes are an X25519 key.
const SEALING_KEY: &str = "dim-sealing";

/// The identity of this start of a program on reliable topics.
#[derive(Debug)]
pub struct Identity {
    /// The private key, the process start and the fleet.
    pub author: Author,
    /// Any number, for the jitter of heads.
    pub seed: u64,
    /// In a fleet with a roster: the exchange of rosters and keys, and the files that keep them.
    pub membership: Option<(MembershipFiles, Exchange)>,
}

/// The reason why a program cannot write reliable topics.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// The key cannot be made or read.
    #[error("cannot use the key for reliable topics")]
    Key(#[from] KeyError),
    /// The key cannot sign.
    #[error(
        "the key {KEY} cannot sign reliable topics: it must be an Ed25519 key of this host, with its private key"
    )]
    Kind,
    /// The roster and the keys of the groups cannot be read.
    #[error("cannot read the roster and the keys of the fleet")]
    Files(#[from] std::io::Error),
}

impl Identity {
    /// Returns an identity with a new process start. The key is made once. A fleet whose name is an IPNS name has a roster.
    pub fn new(keys: &Keyring, fleet: &str, now: Timestamp) -> Result<Self, IdentityError> {
        let key = signing_key(keys, KEY)?;
        let mut random = rand::rng();
        let mut incarnation = [0; 16];
        random.fill_bytes(&mut incarnation);
        let incarnation = Incarnation(incarnation);
        let author = Author { fleet: fleet.to_owned(), key, incarnation, began: now };
        let membership = if has_roster(fleet) {
            let sealing = x25519::Identity::new(signing_key(keys, SEALING_KEY)?.as_bytes());
            Some(MembershipFiles::open(keys, &author, sealing)?)
        } else {
            None
        };
        Ok(Self { author, seed: random.next_u64(), membership })
    }
}

/// Returns the public keys of a host or an agent in one line, as an admin adds it to a fleet. The keys are made once.
pub fn keys_line(keys: &Keyring) -> Result<String, IdentityError> {
    let writer = WriterId::of(&signing_key(keys, KEY)?.verifying_key());
    let sealing = x25519::Identity::new(signing_key(keys, SEALING_KEY)?.as_bytes());
    Ok(format!("{}:{}", writer.name(), sealing.recipient()))
}

/// Returns the writer that a program is on reliable topics, or `None` if it has never been one.
pub fn own_writer(keys: &Keyring) -> Option<IpnsName> {
    keys.name(&KEY.parse().expect("it is a valid name"))
}

/// Whether a fleet has a roster: its name is the IPNS name of the key of its first admin.
pub fn has_roster(fleet: &str) -> bool {
    fleet.parse::<IpnsName>().is_ok_and(|name| name.as_str() == fleet)
}

fn signing_key(keys: &Keyring, name: &str) -> Result<SigningKey, IdentityError> {
    let name: KeyName = name.parse().expect("it is a valid name");
    let Key::Own(pair) = keys.get_or_create(&name)? else { return Err(IdentityError::Kind) };
    let pair = Keypair::clone(&pair).try_into_ed25519().map_err(|_| IdentityError::Kind)?;
    let secret = pair.secret();
    let secret: [u8; 32] = secret.as_ref().try_into().map_err(|_| IdentityError::Kind)?;
    Ok(SigningKey::from_bytes(&secret))
}
