//! Owns the identity of a signer of components: an Ed25519 public key. It receives PEM or base64 and returns a
//! checked key.

use std::fmt;
use std::str::FromStr;

use multibase::Base;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use utoipa::ToSchema;

/// The bytes before the key in the `SubjectPublicKeyInfo` of an Ed25519 key, in DER.
const HEADER: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// The error of text that contains no Ed25519 public key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("it is no Ed25519 key in PEM, and no base64 line of one")]
pub struct InvalidSigner;

/// The public key of a signer. Its text is the base64 of its `SubjectPublicKeyInfo`
/// (<https://www.rfc-editor.org/rfc/rfc8410>), which is the line between the first and the last line of its PEM file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String)]
pub struct Signer(String);

impl Signer {
    /// Makes the signer with the Ed25519 public key `key`.
    pub fn from_key(key: [u8; 32]) -> Self {
        Self(Base::Base64Pad.encode([&HEADER[..], &key].concat()))
    }

    /// Returns the Ed25519 public key.
    pub fn key(&self) -> [u8; 32] {
        let der = Base::Base64Pad.decode(&self.0).expect("the text was checked");
        der[HEADER.len()..].try_into().expect("the length was checked")
    }

    /// Returns the content of a PEM file with this key.
    pub fn to_pem(&self) -> String {
        format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", self.0)
    }
}

impl FromStr for Signer {
    type Err = InvalidSigner;

    /// Parses a PEM file or the base64 line of one.
    fn from_str(text: &str) -> Result<Self, InvalidSigner> {
        let body: String = text.lines().map(str::trim).filter(|line| !line.starts_with("-----")).collect();
        let der = Base::Base64Pad.decode(&body).map_err(|_| InvalidSigner)?;
        let key = der.strip_prefix(&HEADER).ok_or(InvalidSigner)?;
        Ok(Self::from_key(key.try_into().map_err(|_| InvalidSigner)?))
    }
}

impl TryFrom<String> for Signer {
    type Error = InvalidSigner;

    fn try_from(text: String) -> Result<Self, InvalidSigner> {
        text.parse()
    }
}

impl From<Signer> for String {
    fn from(signer: Signer) -> Self {
        signer.0
    }
}

impl fmt::Display for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
