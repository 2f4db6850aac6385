//! Owns the signed block: the envelope of bundles and heads. A block is a COSE_Sign1 message (RFC 9052) without its
//! tag, signed with Ed25519, and is valid DAG-CBOR too. It receives a payload and a key, or untrusted bytes, and
//! returns bytes or a payload with a verified signature.

use bytes::Bytes;
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};

use crate::identity::WriterId;
use crate::malformed::Malformed;

/// The protected header: the map `{1: -8}`, which is the algorithm EdDSA.
const PROTECTED: &[u8] = &[0xa1, 0x01, 0x27];

/// The context of the signature of a COSE_Sign1 message.
const CONTEXT: &str = "Signature1";

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

    /// Verifies the signature of `writer`. It refuses weak keys and signatures that another signature of the same
    /// message could replace.
    pub fn verify(&self, writer: &WriterId) -> Result<(), Malformed> {
        let key = VerifyingKey::from_bytes(&writer.0).map_err(|_| Malformed::Signature)?;
        let signature = Signature::from_bytes(&self.signature);
        key.verify_strict(&signed_bytes(self.payload), &signature).map_err(|_| Malformed::Signature)
    }
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
