//! Encrypts and decrypts a stream with a passphrase. Only the `scrypt` recipient is read here: such a file has one
//! passphrase and no other recipient.

use std::io::{self, BufRead, Write};

use chacha20poly1305::aead::{Aead as _, KeyInit as _};
use chacha20poly1305::{ChaCha20Poly1305, Key, Nonce};
use data_encoding::BASE64_NOPAD;
use scrypt::Params;
use secrecy::{ExposeSecret as _, SecretString};
use zeroize::Zeroizing;

use crate::header::{self, VERSION_LINE, decoded, line};
use crate::payload::{Decryptor, Encryptor};
use crate::{DecryptError, FileKey};

const SCRYPT_LABEL: &[u8] = b"age-encryption.org/v1/scrypt";

/// log2 of the number of scrypt's iterations for a new file. Needs 256 MiB of memory, as in the `age` program.
const WORK_FACTOR: u8 = 18;

/// The maximum of the same number in a file, so that a hostile file cannot demand more than 4 GiB of memory.
pub const MAX_WORK_FACTOR: u8 = 22;

/// Writes the header to `out`, and returns the encryption of the payload. Blocks: derives a key from the passphrase,
/// which takes about a second.
pub fn encrypt<W: Write>(passphrase: &SecretString, mut out: W) -> io::Result<Encryptor<W>> {
    let file_key: FileKey = Zeroizing::new(rand::random::<[u8; 16]>());
    let salt: [u8; 16] = rand::random();
    let wrapped = ChaCha20Poly1305::new(&wrap_key(passphrase, &salt, WORK_FACTOR))
        .encrypt(&Nonce::default(), file_key.as_slice())
        .expect("a file key is short");
    let lines = format!(
        "{VERSION_LINE}\n-> scrypt {} {WORK_FACTOR}\n{}\n---",
        BASE64_NOPAD.encode(&salt),
        BASE64_NOPAD.encode(&wrapped)
    );
    out.write_all(header::with_mac(lines, &file_key).as_bytes())?;
    Encryptor::with_file_key(&file_key, out)
}

/// Reads and checks the header of `input`, and returns the decryption of the payload. Blocks: derives a key from the
/// passphrase.
pub fn decrypt<R: BufRead>(passphrase: &SecretString, mut input: R) -> Result<Decryptor<R>, DecryptError> {
    let version = line(&mut input)?;
    if version != VERSION_LINE {
        return Err(DecryptError::Header("the first line is not the version"));
    }
    let recipient = line(&mut input)?;
    let Some(arguments) = recipient.strip_prefix("-> scrypt ") else {
        return Err(DecryptError::Recipient);
    };
    let Some((salt, work_factor)) = arguments.split_once(' ') else {
        return Err(DecryptError::Header("the recipient has no work factor"));
    };
    let salt: [u8; 16] = decoded(salt, "the salt is invalid")?;
    let work_factor = parsed_work_factor(work_factor)?;
    let body = line(&mut input)?;
    let wrapped: [u8; 32] = decoded(&body, "the file key is invalid")?;
    let mac_line = line(&mut input)?;
    let Some(mac) = mac_line.strip_prefix("--- ") else {
        return Err(DecryptError::Header("the MAC is missing, or there is a second recipient"));
    };
    let mac: [u8; 32] = decoded(mac, "the MAC is invalid")?;

    let wrap_key = wrap_key(passphrase, &salt, work_factor);
    let file_key = ChaCha20Poly1305::new(&wrap_key)
        .decrypt(&Nonce::default(), wrapped.as_slice())
        .map_err(|_| DecryptError::Passphrase)?;
    let file_key: FileKey =
        Zeroizing::new(file_key.try_into().map_err(|_| DecryptError::Header("the file key is invalid"))?);
    header::verify(&format!("{version}\n{recipient}\n{body}\n---"), &file_key, &mac)?;
    Ok(Decryptor::with_file_key(&file_key, input)?)
}

/// Parses a work factor: decimal digits, the first of which is not zero.
fn parsed_work_factor(text: &str) -> Result<u8, DecryptError> {
    let is_canonical = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    let Some(work_factor) = text.parse::<u8>().ok().filter(|_| is_canonical) else {
        return Err(DecryptError::Header("the work factor is invalid"));
    };
    if work_factor > MAX_WORK_FACTOR {
        return Err(DecryptError::ExcessiveWork(work_factor));
    }
    Ok(work_factor)
}

/// Derives the key that encrypts the file key.
fn wrap_key(passphrase: &SecretString, salt: &[u8; 16], work_factor: u8) -> Key {
    let salt = [SCRYPT_LABEL, salt].concat();
    let params = Params::new(work_factor, 8, 1, 32).expect("the work factor is at most 22");
    let mut key = Key::default();
    scrypt::scrypt(passphrase.expose_secret().as_bytes(), &salt, &params, &mut key)
        .expect("a key may have 32 bytes");
    key
}
