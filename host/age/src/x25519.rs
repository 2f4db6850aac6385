//! Encrypts small contents for X25519 keys (RFC 7748), and decrypts them. A file may have many recipients.

use std::fmt;
use std::io::{Read as _, Write as _};
use std::str::FromStr;

use bech32::primitives::decode::CheckedHrpstring;
use bech32::{Bech32, Hrp};
use chacha20poly1305::aead::{Aead as _, KeyInit as _};
use chacha20poly1305::{ChaCha20Poly1305, Key, Nonce};
use data_encoding::BASE64_NOPAD;
use thiserror::Error;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use crate::header::{self, VERSION_LINE, decoded, line, line_of};
use crate::payload::{Decryptor, Encryptor};
use crate::{DecryptError, FileKey};

const LABEL: &[u8] = b"age-encryption.org/v1/X25519";

/// The beginning of the line of a recipient.
const STANZA: &str = "-> X25519 ";

/// The prefix of the text of a public key.
const PUBLIC: Hrp = Hrp::parse_unchecked("age");

/// The prefix of the text of a private key.
const PRIVATE: Hrp = Hrp::parse_unchecked("age-secret-key-");

/// The maximum number of recipients of a file.
pub const MAX_RECIPIENTS: usize = 8_192;

/// The maximum number of bytes of a line.
const MAX_LINE: u64 = 1_024;

/// The number of bytes of a line of the body of a recipient, if another line follows.
const BODY_LINE: usize = 64;

/// A public key. Its text begins with `age1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Recipient(pub [u8; 32]);

/// A private key. Its text begins with `AGE-SECRET-KEY-1`, and its debug form hides it.
#[derive(Clone)]
pub struct Identity(StaticSecret);

/// The error of a text that is no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("it is no X25519 key in the form of the age format")]
pub struct InvalidKey;

impl fmt::Display for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = bech32::encode::<Bech32>(PUBLIC, &self.0).expect("32 bytes are short");
        f.write_str(&text)
    }
}

impl FromStr for Recipient {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        // The format has lower case only.
        if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(InvalidKey);
        }
        parsed(text, PUBLIC).map(|key| Self(*key))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("public", &self.recipient()).finish_non_exhaustive()
    }
}

impl FromStr for Identity {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        parsed(text, PRIVATE).map(|key| Self::new(&key))
    }
}

fn parsed(text: &str, prefix: Hrp) -> Result<Zeroizing<[u8; 32]>, InvalidKey> {
    let checked = CheckedHrpstring::new::<Bech32>(text).map_err(|_| InvalidKey)?;
    if checked.hrp() != prefix {
        return Err(InvalidKey);
    }
    let bytes = Zeroizing::new(checked.byte_iter().collect::<Vec<u8>>());
    <[u8; 32]>::try_from(bytes.as_slice()).map(Zeroizing::new).map_err(|_| InvalidKey)
}

impl Identity {
    /// Makes a key of 32 random bytes.
    pub fn new(random: &[u8; 32]) -> Self {
        Self(StaticSecret::from(*random))
    }

    /// The public key.
    pub fn recipient(&self) -> Recipient {
        Recipient(PublicKey::from(&self.0).to_bytes())
    }

    /// The text, for a file.
    pub fn to_text(&self) -> Zeroizing<String> {
        let text = bech32::encode_upper::<Bech32>(PRIVATE, self.0.as_bytes());
        Zeroizing::new(text.expect("32 bytes are short"))
    }

    /// Decrypts a file. The error is [`DecryptError::OtherKeys`] if it is encrypted for other keys.
    pub fn open(&self, file: &[u8]) -> Result<Zeroizing<Vec<u8>>, DecryptError> {
        let mut input = file;
        if line(&mut input)? != VERSION_LINE {
            return Err(DecryptError::Header("the first line is not the version"));
        }
        let (mut count, mut file_key) = (0, None);
        let (mac, covered) = loop {
            let rest = input;
            let first = line_of(&mut input, MAX_LINE)?;
            if let Some(mac) = first.strip_prefix("--- ") {
                let covered = file.len() - rest.len() + "---".len();
                break (decoded(mac, "the MAC is invalid")?, covered);
            }
            count += 1;
            if count > MAX_RECIPIENTS {
                return Err(DecryptError::Header("it has too many recipients"));
            }
            let Some(share) = first.strip_prefix(STANZA) else {
                skip_body(&first, &mut input)?;
                continue;
            };
            let share: [u8; 32] = decoded(share, "the share of a recipient is invalid")?;
            let wrapped: [u8; 32] = decoded(&line(&mut input)?, "an encrypted file key is invalid")?;
            if file_key.is_none() {
                file_key = self.unwrapped(&share, &wrapped)?;
            }
        };
        let file_key = file_key.ok_or(DecryptError::OtherKeys)?;
        let covered = std::str::from_utf8(&file[..covered]).expect("the lines are text");
        header::verify(covered, &file_key, &mac)?;
        let mut content = Zeroizing::new(Vec::with_capacity(input.len()));
        Decryptor::with_file_key(&file_key, input)?.read_to_end(&mut content)?;
        Ok(content)
    }

    /// Decrypts a file key; `None` if it is encrypted for another key.
    fn unwrapped(&self, share: &[u8; 32], wrapped: &[u8; 32]) -> Result<Option<FileKey>, DecryptError> {
        let shared = self.0.diffie_hellman(&PublicKey::from(*share));
        if !shared.was_contributory() {
            return Err(DecryptError::Header("the share of a recipient has a low order"));
        }
        let key = wrap_key(shared.as_bytes(), share, &self.recipient());
        let Ok(file_key) = ChaCha20Poly1305::new(&key).decrypt(&Nonce::default(), wrapped.as_slice()) else {
            return Ok(None);
        };
        let file_key = Zeroizing::new(file_key);
        let file_key = <[u8; 16]>::try_from(file_key.as_slice());
        file_key
            .map(|key| Some(Zeroizing::new(key)))
            .map_err(|_| DecryptError::Header("the file key is invalid"))
    }
}

/// Skips the body of a recipient of another kind, whose first line is given.
fn skip_body(first: &str, input: &mut &[u8]) -> Result<(), DecryptError> {
    if !first.starts_with("-> ") {
        return Err(DecryptError::Header("a line is neither a recipient nor the MAC"));
    }
    while line_of(input, MAX_LINE)?.len() >= BODY_LINE {}
    Ok(())
}

/// Encrypts `content` for all recipients. `random` fills bytes with random numbers. A recipient with a public key of low
/// order cannot decrypt the file.
///
/// # Panics
/// There are more than [`MAX_RECIPIENTS`] recipients.
pub fn seal(content: &[u8], recipients: &[Recipient], random: &mut dyn FnMut(&mut [u8])) -> Vec<u8> {
    assert!(recipients.len() <= MAX_RECIPIENTS, "the caller limits the number of recipients");
    let mut file_key: FileKey = Zeroizing::new([0; 16]);
    random(file_key.as_mut_slice());
    let mut lines = format!("{VERSION_LINE}\n");
    for recipient in recipients {
        let mut secret = Zeroizing::new([0; 32]);
        random(secret.as_mut_slice());
        let secret = StaticSecret::from(*secret);
        let share = PublicKey::from(&secret).to_bytes();
        let shared = secret.diffie_hellman(&PublicKey::from(recipient.0));
        if !shared.was_contributory() {
            continue;
        }
        let key = wrap_key(shared.as_bytes(), &share, recipient);
        let wrapped = ChaCha20Poly1305::new(&key).encrypt(&Nonce::default(), file_key.as_slice());
        let wrapped = wrapped.expect("a file key is short");
        lines.push_str(&format!(
            "{STANZA}{}\n{}\n",
            BASE64_NOPAD.encode(&share),
            BASE64_NOPAD.encode(&wrapped)
        ));
    }
    lines.push_str("---");
    let mut file = header::with_mac(lines, &file_key).into_bytes();
    let mut nonce = [0; 16];
    random(&mut nonce);
    let written = Encryptor::with_nonce(&file_key, nonce, &mut file).and_then(|mut encryptor| {
        encryptor.write_all(content)?;
        encryptor.finish().map(drop)
    });
    written.expect("a write to memory does not fail");
    file
}

/// Derives the key that encrypts the file key for a recipient.
fn wrap_key(shared: &[u8; 32], share: &[u8; 32], recipient: &Recipient) -> Key {
    header::hkdf(shared, Some(&[*share, recipient.0].concat()), LABEL)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random() -> impl FnMut(&mut [u8]) {
        |bytes| rand::fill(bytes)
    }

    fn identity(number: u8) -> Identity {
        Identity::new(&[number; 32])
    }

    #[test]
    fn each_recipient_and_nobody_else_can_decrypt_a_file() {
        let recipients = [1, 2, 3].map(|number| identity(number).recipient());
        for content in [b"".as_slice(), b"secret", &[7; 200_000]] {
            let file = seal(content, &recipients, &mut random());
            for number in 1..=3 {
                assert_eq!(identity(number).open(&file).unwrap().as_slice(), content);
            }
            assert!(matches!(identity(4).open(&file), Err(DecryptError::OtherKeys)));
        }
    }

    #[test]
    fn the_age_crate_reads_what_this_one_writes() {
        let file = seal(b"secret", &[1, 2].map(|number| identity(number).recipient()), &mut random());
        let theirs: age::x25519::Identity = identity(2).to_text().parse().unwrap();
        assert_eq!(theirs.to_public().to_string(), identity(2).recipient().to_string());
        assert_eq!(age::decrypt(&theirs, &file).unwrap(), b"secret");
    }

    #[test]
    fn this_crate_reads_what_the_age_crate_writes() {
        let theirs: age::x25519::Recipient = identity(1).recipient().to_string().parse().unwrap();
        // It adds a recipient of no known kind, which others must ignore.
        let file = age::encrypt(&theirs, b"secret").unwrap();
        assert!(file.windows(7).any(|bytes| bytes == b"-grease"));
        assert_eq!(identity(1).open(&file).unwrap().as_slice(), b"secret");
    }

    #[test]
    fn keys_come_back_from_their_texts() {
        let identity = identity(9);
        let again: Identity = identity.to_text().parse().unwrap();
        assert_eq!(again.recipient(), identity.recipient());
        let recipient = identity.recipient();
        assert_eq!(recipient.to_string().parse(), Ok(recipient));
        assert!(
            recipient.to_string().starts_with("age1") && identity.to_text().starts_with("AGE-SECRET-KEY-1")
        );
        for text in ["", "age1", &recipient.to_string().to_uppercase(), &identity.to_text(), "k51qzi5uqu5"] {
            assert_eq!(text.parse::<Recipient>(), Err(InvalidKey), "{text}");
        }
        assert!(!format!("{identity:?}").contains("SECRET"));
    }

    #[test]
    fn a_changed_file_is_refused() {
        let file = seal(b"secret", &[identity(1).recipient()], &mut random());
        for index in 0..file.len() {
            let mut changed = file.clone();
            changed[index] ^= 1;
            identity(1).open(&changed).unwrap_err();
            identity(1).open(&file[..index]).unwrap_err();
        }
    }

    #[test]
    fn a_key_of_low_order_is_no_recipient() {
        let file = seal(b"secret", &[Recipient([0; 32]), identity(1).recipient()], &mut random());
        assert_eq!(identity(1).open(&file).unwrap().as_slice(), b"secret");
        let share = BASE64_NOPAD.encode(&[0; 32]);
        let hostile = format!("{VERSION_LINE}\n{STANZA}{share}\n{share}\n--- {share}\n");
        assert!(matches!(identity(1).open(hostile.as_bytes()), Err(DecryptError::Header(_))));
    }
}
