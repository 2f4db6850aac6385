//! Owns the parsing of private keys that other programs exported. It receives the file of `ipfs key export` and
//! returns a key pair.

use libp2p_identity::Keypair;
use pkcs8::der::Decode as _;
use pkcs8::{ObjectIdentifier, PrivateKeyInfo, SecretDocument};
use thiserror::Error;

/// The maximum size of a key file, in bytes.
const LARGEST: usize = 16 << 10;

/// The algorithm of an Ed25519 key in PKCS #8. See RFC 8410.
const ED25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");

/// The error of bytes that cannot be imported as a key.
#[derive(Debug, Error)]
pub enum ExportedKeyError {
    /// The bytes are no private key in a known format.
    #[error(
        "this is not a private key from `ipfs key export` in the format libp2p-protobuf-cleartext or pem-pkcs8-cleartext"
    )]
    NoKey,
    /// The host does not support keys of this kind.
    #[error("the host supports Ed25519, ECDSA and secp256k1 keys, but not RSA keys")]
    Rsa,
}

/// Parses a private key in libp2p's protobuf format, or an Ed25519 key in PEM and PKCS #8.
pub fn read(bytes: &[u8]) -> Result<Keypair, ExportedKeyError> {
    if bytes.len() > LARGEST {
        return Err(ExportedKeyError::NoKey);
    }
    let pair = match std::str::from_utf8(bytes) {
        Ok(text) if text.trim_start().starts_with("-----BEGIN") => read_pem(text.trim())?,
        _ => Keypair::from_protobuf_encoding(bytes).map_err(|_| ExportedKeyError::NoKey)?,
    };
    // The host stores keys in this format, so it cannot store a key without it.
    pair.to_protobuf_encoding().map_err(|_| ExportedKeyError::Rsa)?;
    Ok(pair)
}

fn read_pem(text: &str) -> Result<Keypair, ExportedKeyError> {
    let (_, document) = SecretDocument::from_pem(text).map_err(|_| ExportedKeyError::NoKey)?;
    let info = PrivateKeyInfo::try_from(document.as_bytes()).map_err(|_| ExportedKeyError::NoKey)?;
    if info.algorithm.oid != ED25519 {
        return Err(ExportedKeyError::NoKey);
    }
    // The seed is an octet string inside an octet string.
    let seed = pkcs8::der::asn1::OctetStringRef::from_der(info.private_key);
    let mut seed = seed.map_err(|_| ExportedKeyError::NoKey)?.as_bytes().to_vec();
    Keypair::ed25519_from_bytes(&mut seed).map_err(|_| ExportedKeyError::NoKey)
}
