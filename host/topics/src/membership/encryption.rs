//! Owns the encryption of events and documents. It receives the secret of a key epoch and the place of a text, and
//! encrypts or decrypts the text with XChaCha20-Poly1305. Nonces of events are random and have 24 bytes, so nothing is
//! counted: a host that is restored from a backup, or runs twice, uses no nonce again.

use std::fmt;

use chacha20poly1305::aead::{Aead as _, KeyInit as _, Payload};
use chacha20poly1305::{Key, XChaCha20Poly1305, XNonce};
use dim_model::ident::Topic;
use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::{Zeroize as _, Zeroizing};

use crate::identity::{Incarnation, WriterId};
use crate::malformed::Malformed;

/// The number of bytes that encryption adds.
pub const TAG: usize = 16;

/// The beginning of what the key of a log is derived for.
const TOPIC: &str = "dim-topic-1";

/// The beginning of what the key of a document is derived for.
const DOCUMENT: &str = "dim-name-1";

/// The secret of a key epoch: 32 random bytes. Its debug form hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<[u8; 32]>);

impl Secret {
    /// Returns a secret of 32 random bytes.
    pub fn new(random: [u8; 32]) -> Self {
        Self(Zeroizing::new(random))
    }

    /// The bytes, for a file or a message that is encrypted or that only its owner can read.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// A nonce: 24 bytes, random for events and derived for documents.
pub type Nonce = [u8; 24];

/// The key of one log or document.
pub struct TextKey(XChaCha20Poly1305);

impl TextKey {
    /// The key of the log of an incarnation.
    pub fn of_log(
        secret: &Secret,
        fleet: &str,
        topic: &Topic,
        writer: &WriterId,
        incarnation: &Incarnation,
    ) -> Self {
        Self::of(secret, TOPIC, &[fleet.as_bytes(), topic.as_str().as_bytes(), &writer.0, &incarnation.0])
    }

    /// The key of the documents behind an IPNS name.
    pub fn of_document(secret: &Secret, fleet: &str, name: &str) -> Self {
        Self::of(secret, DOCUMENT, &[fleet.as_bytes(), name.as_bytes()])
    }

    /// HKDF-SHA256 (RFC 5869) without a salt. Each part of `info` follows its length, 4 bytes big-endian, so that different
    /// parts never make the same `info`.
    fn of(secret: &Secret, label: &str, parts: &[&[u8]]) -> Self {
        let mut info = Vec::new();
        for part in [label.as_bytes()].iter().chain(parts) {
            let length = u32::try_from(part.len()).expect("a part is short");
            info.extend_from_slice(&length.to_be_bytes());
            info.extend_from_slice(part);
        }
        let mut key = Key::default();
        let derived = Hkdf::<Sha256>::new(None, secret.bytes()).expand(&info, &mut key);
        derived.expect("32 bytes are below HKDF's maximum");
        let it = Self(XChaCha20Poly1305::new(&key));
        key.zeroize();
        it
    }

    /// Encrypts a text. `associated` is authenticated and not encrypted.
    pub fn encrypt(&self, nonce: &Nonce, associated: &[u8], text: &[u8]) -> Vec<u8> {
        let payload = Payload { msg: text, aad: associated };
        self.0.encrypt(XNonce::from_slice(nonce), payload).expect("a text is shorter than 256 GiB")
    }

    /// Decrypts a text.
    pub fn decrypt(&self, nonce: &Nonce, associated: &[u8], text: &[u8]) -> Result<Vec<u8>, Malformed> {
        let payload = Payload { msg: text, aad: associated };
        let decrypted = self.0.decrypt(XNonce::from_slice(nonce), payload);
        decrypted.map_err(|_| Malformed::Events("they are encrypted with another key, or were changed"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(secret: u8, fleet: &str, topic: &str, writer: u8, incarnation: u8) -> TextKey {
        let (secret, topic) = (Secret::new([secret; 32]), topic.parse().unwrap());
        TextKey::of_log(&secret, fleet, &topic, &WriterId([writer; 32]), &Incarnation([incarnation; 16]))
    }

    #[test]
    fn a_text_is_decrypted_with_the_same_key_nonce_and_associated_data_only() {
        let text = key(1, "f", "jobs", 2, 3).encrypt(&[4; 24], b"place", b"text");
        let open =
            |key: TextKey, nonce: u8, place: &[u8], text: &[u8]| key.decrypt(&[nonce; 24], place, text);
        assert_eq!(open(key(1, "f", "jobs", 2, 3), 4, b"place", &text).unwrap(), b"text");
        for other in [
            key(9, "f", "jobs", 2, 3),
            key(1, "g", "jobs", 2, 3),
            // The same bytes in a row.
            key(1, "fj", "obs", 2, 3),
            key(1, "f", "jobs", 9, 3),
            key(1, "f", "jobs", 2, 9),
            TextKey::of_document(&Secret::new([1; 32]), "f", "jobs"),
        ] {
            open(other, 4, b"place", &text).unwrap_err();
        }
        open(key(1, "f", "jobs", 2, 3), 5, b"place", &text).unwrap_err();
        open(key(1, "f", "jobs", 2, 3), 4, b"other", &text).unwrap_err();
        for index in 0..text.len() {
            let mut changed = text.clone();
            changed[index] ^= 1;
            open(key(1, "f", "jobs", 2, 3), 4, b"place", &changed).unwrap_err();
        }
    }
}
