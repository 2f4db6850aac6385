//! Owns what all kinds of recipients share in the header: its lines and its MAC.

use std::io::BufRead;

use chacha20poly1305::Key;
use data_encoding::BASE64_NOPAD;
use hkdf::Hkdf;
use hmac::{Hmac, Mac as _};
use sha2::Sha256;

use crate::{DecryptError, FileKey};

/// The first line.
pub(crate) const VERSION_LINE: &str = "age-encryption.org/v1";

/// The maximum number of bytes of a line. The longest valid one of the supported kinds has 53.
const MAX_LINE: u64 = 64;

/// Reads a line and returns it without its end.
pub(crate) fn line(input: &mut impl BufRead) -> Result<String, DecryptError> {
    line_of(input, MAX_LINE)
}

/// Reads a line of at most `max` bytes and returns it without its end.
pub(crate) fn line_of(input: &mut impl BufRead, max: u64) -> Result<String, DecryptError> {
    let mut line = Vec::new();
    std::io::Read::take(&mut *input, max).read_until(b'\n', &mut line)?;
    if line.pop() != Some(b'\n') {
        return Err(DecryptError::Header("a line is too long, or the file ends within it"));
    }
    String::from_utf8(line).map_err(|_| DecryptError::Header("a line is not text"))
}

/// Decodes a value of a fixed length.
pub(crate) fn decoded<const N: usize>(text: &str, error: &'static str) -> Result<[u8; N], DecryptError> {
    let bytes = BASE64_NOPAD.decode(text.as_bytes()).map_err(|_| DecryptError::Header(error))?;
    bytes.try_into().map_err(|_| DecryptError::Header(error))
}

/// Ends a header, whose lines up to `---` are given, with its MAC.
pub(crate) fn with_mac(mut header: String, file_key: &FileKey) -> String {
    let mac = mac(file_key, header.as_bytes()).finalize().into_bytes();
    header.push(' ');
    header.push_str(&BASE64_NOPAD.encode(&mac));
    header.push('\n');
    header
}

/// Verifies the MAC of a header, whose lines up to `---` are given.
pub(crate) fn verify(header: &str, file_key: &FileKey, expected: &[u8; 32]) -> Result<(), DecryptError> {
    let mac = mac(file_key, header.as_bytes());
    mac.verify_slice(expected).map_err(|_| DecryptError::Header("its MAC does not match"))
}

fn mac(file_key: &FileKey, header: &[u8]) -> Hmac<Sha256> {
    let key = derived(file_key, None, b"header");
    <Hmac<Sha256> as hmac::Mac>::new_from_slice(&key)
        .expect("HMAC takes keys of any length")
        .chain_update(header)
}

/// Derives a key from the file key.
pub(crate) fn derived(file_key: &FileKey, salt: Option<&[u8]>, info: &[u8]) -> Key {
    hkdf(file_key.as_slice(), salt, info)
}

/// HKDF with SHA-256, to 32 bytes.
pub(crate) fn hkdf(input: &[u8], salt: Option<&[u8]>, info: &[u8]) -> Key {
    let mut key = Key::default();
    Hkdf::<Sha256>::new(salt, input).expand(info, &mut key).expect("32 bytes are below HKDF's maximum");
    key
}
