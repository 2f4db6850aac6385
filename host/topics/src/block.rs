//! Owns the signed block: the envelope of everything that members send. A block with one signature is a COSE_Sign1
//! message (RFC 9052) without its tag; one with several signatures is a COSE_Sign message without its tag. Both are
//! signed with Ed25519 and are valid DAG-CBOR too. It receives a payload and keys, or untrusted bytes, and returns bytes
//! or a payload with verified signatures.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};

use crate::identity::WriterId;
use crate::malformed::Malformed;

/// The protected header: the map `{1: -8}`, which is the algorithm EdDSA.
const PROTECTED: &[u8] = &[0xa1, 0x01, 0x27];

/// The context of the signature of a COSE_Sign1 message.
const CONTEXT: &str = "Signature1";

/// The context of a signature of a COSE_Sign message.
const CONTEXT_OF_MANY: &str = "Signature";

/// The beginning of the protected header of a signer: the map `{1: -8, 4: key}`, which is the algorithm EdDSA and the
/// public key of 32 bytes.
const SIGNER: &[u8] = &[0xa2, 0x01, 0x27, 0x04, 0x58, 0x20];

/// The maximum number of signatures of a block.
pub const MAX_SIGNERS: usize = 32;

/// The maximum size of a block, in bytes. Bitswap transfers blocks up to 2 MiB.
pub const MAX_BLOCK: usize = 1_200_000;

/// The members of a block: protected header, unprotected header, payload, signature.
#[derive(Serialize, Deserialize)]
struct Sign1<'a>(
    #[serde(borrow)] &'a serde_bytes::Bytes,
    Empty,
    #[serde(borrow)] &'a serde_bytes::Bytes,
    #[serde(borrow)] &'a serde_bytes::Bytes,
);

/// The unprotected header, which is empty.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Empty {}

/// Signs a payload and returns the block.
pub fn seal(payload: &[u8], key: &SigningKey) -> Bytes {
    let signature = key.sign(&signed_bytes(payload)).to_bytes();
    let block = Sign1(
        serde_bytes::Bytes::new(PROTECTED),
        Empty {},
        serde_bytes::Bytes::new(payload),
        serde_bytes::Bytes::new(&signature),
    );
    serde_ipld_dagcbor::to_vec(&block).expect("byte strings and an empty map").into()
}

/// A block whose form was checked and whose signature was not.
#[derive(Debug)]
pub struct Unverified<'a> {
    /// The payload.
    pub payload: &'a [u8],
    signature: [u8; 64],
}

impl<'a> Unverified<'a> {
    /// Parses a block.
    pub fn parse(block: &'a [u8]) -> Result<Self, Malformed> {
        if block.len() > MAX_BLOCK {
            return Err(Malformed::TooLarge { bytes: block.len(), limit: MAX_BLOCK });
        }
        let Sign1(protected, Empty {}, payload, signature) = serde_ipld_dagcbor::from_slice(block)
            .map_err(|_| Malformed::Block("not a COSE_Sign1 message"))?;
        if protected.as_ref() != PROTECTED {
            return Err(Malformed::Block("the algorithm is not EdDSA"));
        }
        let signature = signature.as_ref().try_into();
        let signature = signature.map_err(|_| Malformed::Block("the signature does not have 64 bytes"))?;
        Ok(Self { payload: payload.as_ref(), signature })
    }

    /// Verifies the signature of `writer`.
    pub fn verify(&self, writer: &WriterId) -> Result<(), Malformed> {
        verify(writer, &signed_bytes(self.payload), &self.signature)
    }
}

/// The members of a block with several signatures: protected header, unprotected header, payload, signatures.
#[derive(Serialize, Deserialize)]
struct Sign<'a>(
    #[serde(borrow)] &'a serde_bytes::Bytes,
    Empty,
    #[serde(borrow)] &'a serde_bytes::Bytes,
    #[serde(borrow)] Vec<Signer<'a>>,
);

/// A signature: protected header, unprotected header, signature.
#[derive(Serialize, Deserialize)]
struct Signer<'a>(#[serde(borrow)] &'a serde_bytes::Bytes, Empty, #[serde(borrow)] &'a serde_bytes::Bytes);

/// A payload with the verified signatures of its signers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedByMany {
    /// The payload.
    pub payload: Bytes,
    /// The signatures by their signers.
    signatures: BTreeMap<WriterId, [u8; 64]>,
}

impl SignedByMany {
    /// A payload without signatures.
    pub fn new(payload: Bytes) -> Self {
        Self { payload, signatures: BTreeMap::new() }
    }

    /// Adds the signature of `key`.
    pub fn sign(&mut self, key: &SigningKey) {
        let signer = WriterId::of(&key.verifying_key());
        let signature = key.sign(&signed_by_one_of_many(&self.payload, &signer)).to_bytes();
        self.signatures.insert(signer, signature);
    }

    /// The signers.
    pub fn signers(&self) -> BTreeSet<WriterId> {
        self.signatures.keys().copied().collect()
    }

    /// Returns the block.
    pub fn to_block(&self) -> Bytes {
        let headers: Vec<Vec<u8>> = self.signatures.keys().map(protected_of).collect();
        let signers = headers.iter().zip(self.signatures.values()).map(|(header, signature)| {
            Signer(serde_bytes::Bytes::new(header), Empty {}, serde_bytes::Bytes::new(signature))
        });
        let signers = signers.collect();
        let block =
            Sign(serde_bytes::Bytes::new(&[]), Empty {}, serde_bytes::Bytes::new(&self.payload), signers);
        serde_ipld_dagcbor::to_vec(&block).expect("byte strings and empty maps").into()
    }

    /// Parses a block and verifies its signatures. The signers are in the order of their keys, each once.
    pub fn open(block: &Bytes) -> Result<Self, Malformed> {
        if block.len() > MAX_BLOCK {
            return Err(Malformed::TooLarge { bytes: block.len(), limit: MAX_BLOCK });
        }
        let Sign(protected, Empty {}, payload, signers) =
            serde_ipld_dagcbor::from_slice(block).map_err(|_| Malformed::Block("not a COSE_Sign message"))?;
        if !protected.is_empty() {
            return Err(Malformed::Block("the protected header is not empty"));
        }
        if signers.len() > MAX_SIGNERS {
            return Err(Malformed::Block("it has too many signatures"));
        }
        let mut signatures = BTreeMap::new();
        for Signer(protected, Empty {}, signature) in signers {
            let key = protected.strip_prefix(SIGNER).and_then(|key| key.try_into().ok());
            let signer = key.map(WriterId).ok_or(Malformed::Block("a signer is not an EdDSA key"))?;
            if signatures.last_key_value().is_some_and(|(last, _)| *last >= signer) {
                return Err(Malformed::Block("the signers are not in order"));
            }
            let signature = signature.as_ref().try_into();
            let signature = signature.map_err(|_| Malformed::Block("a signature does not have 64 bytes"))?;
            verify(&signer, &signed_by_one_of_many(payload, &signer), &signature)?;
            signatures.insert(signer, signature);
        }
        Ok(Self { payload: block.slice_ref(payload), signatures })
    }
}

/// The protected header of a signer.
fn protected_of(signer: &WriterId) -> Vec<u8> {
    [SIGNER, &signer.0].concat()
}

/// Verifies a signature. It refuses weak keys and signatures that another signature of the same message could replace.
pub(crate) fn verify(signer: &WriterId, message: &[u8], signature: &[u8; 64]) -> Result<(), Malformed> {
    let key = VerifyingKey::from_bytes(&signer.0).map_err(|_| Malformed::Signature)?;
    key.verify_strict(message, &Signature::from_bytes(signature)).map_err(|_| Malformed::Signature)
}

/// The bytes that a signature of a block with several covers: `Sig_structure` of RFC 9052, section 4.4.
fn signed_by_one_of_many(payload: &[u8], signer: &WriterId) -> Vec<u8> {
    let empty = serde_bytes::Bytes::new(&[]);
    let (protected, payload) = (protected_of(signer), serde_bytes::Bytes::new(payload));
    let structure = (CONTEXT_OF_MANY, empty, serde_bytes::Bytes::new(&protected), empty, payload);
    serde_ipld_dagcbor::to_vec(&structure).expect("a text and byte strings")
}

/// The bytes that a signature covers: `Sig_structure` of RFC 9052, section 4.4.
fn signed_bytes(payload: &[u8]) -> Vec<u8> {
    let empty = serde_bytes::Bytes::new(&[]);
    let structure = (CONTEXT, serde_bytes::Bytes::new(PROTECTED), empty, serde_bytes::Bytes::new(payload));
    serde_ipld_dagcbor::to_vec(&structure).expect("a text and byte strings")
}

#[cfg(test)]
mod tests {
    use coset::{CborSerializable as _, CoseSign1};

    use super::*;

    fn key() -> SigningKey {
        SigningKey::from_bytes(&[3; 32])
    }

    #[test]
    fn another_implementation_of_cose_verifies_a_block() {
        let block = seal(b"payload", &key());
        let message = CoseSign1::from_slice(&block).unwrap();
        let algorithm = coset::RegisteredLabelWithPrivate::Assigned(coset::iana::Algorithm::EdDSA);
        assert_eq!(message.protected.header.alg, Some(algorithm));
        message
            .verify_signature(b"", |signature, signed| {
                let signature = Signature::from_slice(signature).unwrap();
                key().verifying_key().verify_strict(signed, &signature)
            })
            .unwrap();
        assert_eq!(message.payload.unwrap(), b"payload");
    }

    #[test]
    fn another_implementation_of_cose_verifies_a_block_with_several_signatures() {
        let keys = [SigningKey::from_bytes(&[3; 32]), SigningKey::from_bytes(&[4; 32])];
        let mut signed = SignedByMany::new(Bytes::from_static(b"payload"));
        keys.iter().for_each(|key| signed.sign(key));
        let block = signed.to_block();
        assert_eq!(SignedByMany::open(&block).unwrap(), signed);
        let message = coset::CoseSign::from_slice(&block).unwrap();
        assert_eq!(message.signatures.len(), 2);
        for (index, signer) in signed.signers().into_iter().enumerate() {
            assert_eq!(message.signatures[index].protected.header.key_id, signer.0);
            message
                .verify_signature(index, b"", |signature, signed| {
                    let key = VerifyingKey::from_bytes(&signer.0).unwrap();
                    key.verify_strict(signed, &Signature::from_slice(signature).unwrap())
                })
                .unwrap();
        }
        for index in 0..block.len() {
            let mut changed = block.to_vec();
            changed[index] ^= 1;
            SignedByMany::open(&changed.into()).expect_err(&format!("byte {index}"));
        }
    }

    #[test]
    fn a_signer_counts_once() {
        let mut signed = SignedByMany::new(Bytes::from_static(b"payload"));
        signed.sign(&key());
        signed.sign(&key());
        assert_eq!(signed.signers().len(), 1);
        let header = protected_of(&signed.signers().into_iter().next().unwrap());
        let signature = *signed.signatures.values().next().unwrap();
        let twice = (0..2)
            .map(|_| Signer(serde_bytes::Bytes::new(&header), Empty {}, serde_bytes::Bytes::new(&signature)));
        let payload = serde_bytes::Bytes::new(b"payload");
        let block = Sign(serde_bytes::Bytes::new(&[]), Empty {}, payload, twice.collect());
        let block = serde_ipld_dagcbor::to_vec(&block).unwrap();
        assert_eq!(SignedByMany::open(&block.into()), Err(Malformed::Block("the signers are not in order")));
    }

    #[test]
    fn a_block_is_refused_if_any_of_its_bytes_differs() {
        let block = seal(b"payload", &key());
        let writer = WriterId::of(&key().verifying_key());
        let is_valid = |block: &[u8]| Unverified::parse(block).and_then(|it| it.verify(&writer)).is_ok();
        assert!(is_valid(&block));
        for index in 0..block.len() {
            let mut changed = block.to_vec();
            changed[index] ^= 1;
            assert!(!is_valid(&changed), "byte {index}");
        }
        assert!(!is_valid(&[&block[..], &[0]].concat()), "a byte at the end");
        assert!(!is_valid(&block[..block.len() - 1]));
    }

    #[test]
    fn a_block_over_the_limit_is_refused() {
        let block = seal(&vec![0; MAX_BLOCK - 77], &key());
        assert_eq!(block.len(), MAX_BLOCK);
        Unverified::parse(&block).unwrap();
        let block = seal(&vec![0; MAX_BLOCK - 76], &key());
        assert!(matches!(Unverified::parse(&block), Err(Malformed::TooLarge { .. })));
    }
}
