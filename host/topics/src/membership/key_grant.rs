//! Owns the key grant: the message with which a keeper gives the secrets of a group to members, or a member those that no
//! keeper has. This file has the wire
//! format of key grants; it receives secrets and keys, or untrusted bytes, and returns blocks or verified grants.
//!
//! The payload of the block is a DAG-CBOR map:
//!
//! | key | value |
//! |---|---|
//! | `v` | 1 |
//! | `fleet`, `group` | texts |
//! | `writer` | the public key of the keeper or member |
//! | `roster` | the version of the roster that the keeper has |
//! | `to` | the public key of the member that asked; null if the grant is for the whole group |
//! | `refused` | the identities of epochs that the member that asked may not have, at most 64 |
//! | `epochs` | `[number, id, roster, time]`: the identities of the epochs, at most 64 |
//! | `sealed` | a file in the age format for the X25519 keys of the receivers |
//!
//! The file holds a DAG-CBOR list of the secrets, in the order of the epochs.

use std::fmt;

use bytes::Bytes;
use dim_age::x25519::{self, Identity, Recipient};
use dim_model::ident::GroupName;
use dim_model::time::Timestamp;
use ed25519_dalek::SigningKey;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::encryption::Secret;
use crate::block::{self, Unverified};
use crate::identity::WriterId;
use crate::malformed::Malformed;

/// The version of the payload of key grants.
const VERSION: u64 = 1;

/// The maximum number of epochs of a key grant.
pub const MAX_EPOCHS: usize = 64;

/// The identity of a key epoch. Of several, members write with the highest one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EpochId {
    /// The number, counted by the keepers. Two keepers may give the same one at once.
    pub number: u64,
    /// 16 random bytes.
    pub id: [u8; 16],
}

impl fmt::Display for EpochId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-", self.number)?;
        self.id.iter().take(4).try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for EpochId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A key epoch: a secret of a group, and when it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Epoch {
    /// The identity.
    pub id: EpochId,
    /// The version of the roster that the keeper had when it made the secret.
    pub roster: u64,
    /// The hybrid time at which the keeper made the secret.
    pub time: Timestamp,
    /// The secret.
    pub secret: Secret,
}

/// A key grant with a verified signature. Its secrets may be for others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyGrant {
    /// The group.
    pub group: GroupName,
    /// The keeper or member.
    pub writer: WriterId,
    /// The version of the roster that the keeper has.
    pub roster: u64,
    /// The identities of the epochs, the versions of the roster and the times when they were made.
    pub epochs: Vec<(EpochId, u64, Timestamp)>,
    /// The member that asked; `None` if the grant is for the whole group.
    pub receiver: Option<WriterId>,
    /// The identities of epochs that the member that asked may not have.
    pub refused: Vec<[u8; 16]>,
    sealed: Bytes,
}

/// The content of a key grant.
#[derive(Clone, Copy, Debug)]
pub struct Granted<'a> {
    /// The group.
    pub group: &'a GroupName,
    /// The version of the roster that the keeper has.
    pub roster: u64,
    /// The epochs.
    pub epochs: &'a [Epoch],
    /// The member that asked; `None` if the grant is for the whole group.
    pub receiver: Option<WriterId>,
    /// The identities of epochs that the member that asked may not have.
    pub refused: &'a [[u8; 16]],
}

#[derive(Serialize, Deserialize)]
struct Payload<'a> {
    v: u64,
    to: Option<WriterId>,
    fleet: &'a str,
    group: &'a str,
    #[serde(borrow)]
    epochs: Vec<WireEpoch<'a>>,
    roster: u64,
    #[serde(borrow)]
    sealed: &'a serde_bytes::Bytes,
    writer: WriterId,
    #[serde(borrow)]
    refused: Vec<&'a serde_bytes::Bytes>,
}

/// `[number, id, roster, time]`.
#[derive(Serialize, Deserialize)]
struct WireEpoch<'a>(u64, #[serde(borrow)] &'a serde_bytes::Bytes, u64, u64);

impl KeyGrant {
    /// Encrypts epochs of a group for `keys`, and signs them as the keeper with `key`. Returns the block. `random` fills
    /// bytes with random numbers.
    ///
    /// # Panics
    /// There are more than [`MAX_EPOCHS`] epochs or refused ones, or more than [`x25519::MAX_RECIPIENTS`] keys.
    pub fn seal(
        fleet: &str,
        granted: Granted<'_>,
        keys: &[Recipient],
        key: &SigningKey,
        random: &mut dyn FnMut(&mut [u8]),
    ) -> Bytes {
        let Granted { group, roster, epochs, receiver, refused } = granted;
        let is_limited = epochs.len() <= MAX_EPOCHS && refused.len() <= MAX_EPOCHS;
        assert!(is_limited, "the caller limits the number of epochs");
        let secrets: Vec<_> =
            epochs.iter().map(|epoch| serde_bytes::Bytes::new(epoch.secret.bytes())).collect();
        let secrets = serde_ipld_dagcbor::to_vec(&secrets).expect("byte strings");
        let sealed = x25519::seal(&Zeroizing::new(secrets), keys, random);
        let wire = |it: &'_ Epoch| (it.id.number, it.id.id, it.roster, it.time.0);
        let rows: Vec<_> = epochs.iter().map(wire).collect();
        let epochs = rows.iter().map(|(number, id, roster, time)| {
            WireEpoch(*number, serde_bytes::Bytes::new(id), *roster, *time)
        });
        let payload = Payload {
            v: VERSION,
            to: receiver,
            fleet,
            group: group.as_str(),
            epochs: epochs.collect(),
            roster,
            sealed: serde_bytes::Bytes::new(&sealed),
            writer: WriterId::of(&key.verifying_key()),
            refused: refused.iter().map(|id| serde_bytes::Bytes::new(id)).collect(),
        };
        block::seal(&serde_ipld_dagcbor::to_vec(&payload).expect("a map of plain fields"), key)
    }

    /// Parses and verifies a block as a key grant of `fleet`. The caller checks its writer.
    pub fn open(block: &Bytes, fleet: &str) -> Result<Self, Malformed> {
        let envelope = Unverified::parse(block)?;
        let payload: Payload<'_> = serde_ipld_dagcbor::from_slice(envelope.payload)
            .map_err(|_| Malformed::Payload("not the DAG-CBOR map of a key grant"))?;
        if payload.v != VERSION {
            return Err(Malformed::Version(payload.v));
        }
        if payload.fleet != fleet {
            return Err(Malformed::Elsewhere);
        }
        if payload.epochs.len() > MAX_EPOCHS || payload.refused.len() > MAX_EPOCHS {
            return Err(Malformed::Payload("it has too many epochs"));
        }
        envelope.verify(&payload.writer)?;
        let group = payload.group.parse().map_err(|_| Malformed::Payload("the group is invalid"))?;
        let epoch = |WireEpoch(number, id, roster, time): WireEpoch<'_>| {
            let id = id.as_ref().try_into();
            let id = id.map_err(|_| Malformed::Payload("the identity of an epoch does not have 16 bytes"))?;
            Ok((EpochId { number, id }, roster, Timestamp(time)))
        };
        let epochs = payload.epochs.into_iter().map(epoch).collect::<Result<Vec<_>, Malformed>>()?;
        if epochs.iter().any(|(_, roster, _)| *roster > payload.roster) {
            return Err(Malformed::Payload("an epoch is of a later roster"));
        }
        let (writer, roster, receiver) = (payload.writer, payload.roster, payload.to);
        let refused = payload.refused.into_iter().map(|id| id.as_ref().try_into()).collect::<Result<_, _>>();
        let refused =
            refused.map_err(|_| Malformed::Payload("the identity of an epoch does not have 16 bytes"))?;
        let sealed = block.slice_ref(payload.sealed);
        Ok(Self { group, writer, roster, epochs, receiver, refused, sealed })
    }

    /// Decrypts the secrets; `None` if they are for others.
    pub fn unseal(&self, identity: &Identity) -> Result<Option<Vec<Epoch>>, Malformed> {
        let secrets = match identity.open(&self.sealed) {
            Ok(secrets) => secrets,
            Err(dim_age::DecryptError::OtherKeys) => return Ok(None),
            Err(_) => return Err(Malformed::Payload("the secrets are no valid file in the age format")),
        };
        let secrets: Vec<&serde_bytes::Bytes> = serde_ipld_dagcbor::from_slice(&secrets)
            .map_err(|_| Malformed::Payload("the secrets are no DAG-CBOR list of byte strings"))?;
        if secrets.len() != self.epochs.len() {
            return Err(Malformed::Payload("there are not as many secrets as epochs"));
        }
        let epoch = |(secret, (id, roster, time)): (&serde_bytes::Bytes, &(EpochId, u64, Timestamp))| {
            let secret = secret.as_ref().try_into();
            let secret = secret.map_err(|_| Malformed::Payload("a secret does not have 32 bytes"))?;
            Ok(Epoch { id: *id, roster: *roster, time: *time, secret: Secret::new(secret) })
        };
        secrets.into_iter().zip(&self.epochs).map(epoch).collect::<Result<_, _>>().map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLEET: &str = "fleet";

    fn epochs(count: u8) -> Vec<Epoch> {
        let epoch = |number: u8| Epoch {
            id: EpochId { number: number.into(), id: [number; 16] },
            roster: 3,
            time: Timestamp(number.into()),
            secret: Secret::new([number; 32]),
        };
        (0..count).map(epoch).collect()
    }

    #[test]
    fn the_receivers_and_nobody_else_read_the_secrets() {
        let keeper = SigningKey::from_bytes(&[3; 32]);
        let identities = [1, 2, 3].map(|number| Identity::new(&[number; 32]));
        let receivers = [identities[0].recipient(), identities[1].recipient()];
        let group: GroupName = "jobs".parse().unwrap();
        let epochs = epochs(3);
        let (asker, refused) = (WriterId([1; 32]), [[9; 16]]);
        let granted =
            Granted { group: &group, roster: 3, epochs: &epochs, receiver: Some(asker), refused: &refused };
        let block = KeyGrant::seal(FLEET, granted, &receivers, &keeper, &mut |it| rand::fill(it));
        let grant = KeyGrant::open(&block, FLEET).unwrap();
        assert_eq!((grant.receiver, grant.refused.as_slice()), (Some(asker), refused.as_slice()));
        assert_eq!((&grant.group, grant.writer), (&group, WriterId::of(&keeper.verifying_key())));
        assert_eq!(grant.unseal(&identities[0]).unwrap().as_ref(), Some(&epochs));
        assert_eq!(grant.unseal(&identities[1]).unwrap().as_ref(), Some(&epochs));
        assert_eq!(grant.unseal(&identities[2]).unwrap(), None);
        assert_eq!(KeyGrant::open(&block, "other"), Err(Malformed::Elsewhere));
        for index in 0..block.len() {
            let mut changed = block.to_vec();
            changed[index] ^= 1;
            KeyGrant::open(&changed.into(), FLEET).unwrap_err();
        }
    }
}
