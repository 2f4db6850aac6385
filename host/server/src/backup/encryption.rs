//! Encrypts and decrypts a stream with a passphrase, in the [age](https://age-encryption.org/v1) format. Only its
//! `scrypt` recipient is supported: a backup has one passphrase and no other recipient.
//!
//! The file is a header of text and a payload. The header holds the file key, encrypted with a key that scrypt derives
//! from the passphrase, and a MAC. The payload is a nonce of 16 bytes and chunks of 64 KiB, each encrypted with
//! ChaCha20-Poly1305 by the STREAM construction: chunks cannot be reordered, and a truncated payload is detected.

use std::io::{self, BufRead, Read, Write};

use chacha20poly1305::aead::stream::{DecryptorBE32, EncryptorBE32};
use chacha20poly1305::aead::{Aead, KeyInit};
use chacha20poly1305::{ChaCha20Poly1305, Key, Nonce};
use data_encoding::BASE64_NOPAD;
use hkdf::Hkdf;
use hmac::{Hmac, Mac};
use scrypt::Params;
use secrecy::{ExposeSecret as _, SecretString};
use sha2::Sha256;
use thiserror::Error;
use zeroize::Zeroizing;

const VERSION_LINE: &str = "age-encryption.org/v1";
const SCRYPT_LABEL: &[u8] = b"age-encryption.org/v1/scrypt";

/// log2 of the number of scrypt's iterations for a new file. Needs 256 MiB of memory, as in the `age` program.
const WORK_FACTOR: u8 = 18;

/// The maximum of the same number in a file, so that a hostile file cannot demand more than 4 GiB of memory.
const MAX_WORK_FACTOR: u8 = 22;

/// The maximum number of bytes of a line of the header. The longest valid one has 46.
const MAX_LINE: u64 = 64;

/// The number of bytes of an encrypted chunk's content.
const CHUNK: usize = 64 << 10;

/// The number of bytes that encryption adds to a chunk.
const TAG: usize = 16;

/// The minimum length of a passphrase, in characters.
const SHORTEST: usize = 8;

/// The passphrase of a backup. Its debug form hides it.
#[derive(Clone, Debug)]
pub struct Passphrase(SecretString);

/// The error of a passphrase with fewer than 8 characters.
#[derive(Debug, Error)]
#[error("a backup holds the host's private keys: its passphrase needs at least {SHORTEST} characters")]
pub struct ShortPassphrase;

impl Passphrase {
    /// Makes a passphrase. Returns an error if it has fewer than 8 characters.
    pub fn new(text: String) -> Result<Self, ShortPassphrase> {
        if text.chars().count() < SHORTEST {
            return Err(ShortPassphrase);
        }
        Ok(Self(SecretString::from(text)))
    }

    /// Returns the text, for the derivation of keys.
    pub fn secret(&self) -> &SecretString {
        &self.0
    }
}

/// The key of one file, from which the keys of its header and its payload are derived.
pub type FileKey = Zeroizing<[u8; 16]>;

/// An error that prevents decryption.
#[derive(Debug, Error)]
pub enum DecryptError {
    /// The input is not an age file that is encrypted with a passphrase.
    #[error("the header of the age format is missing or invalid: {0}")]
    Header(&'static str),
    /// The file is encrypted for another kind of recipient.
    #[error("the file is not encrypted with a passphrase")]
    Recipient,
    /// The passphrase does not decrypt the file key.
    #[error("the passphrase is wrong, or the encrypted file key was changed")]
    Passphrase,
    /// The file demands more work than this host accepts.
    #[error("the scrypt work factor is {0}, and the maximum is {MAX_WORK_FACTOR}")]
    ExcessiveWork(u8),
    /// A read failed.
    #[error("cannot read the header")]
    Io(#[from] io::Error),
}

/// Encrypts everything that is written and writes it to `W`. [`finish`](Self::finish) writes the end; without it the
/// file is truncated.
pub struct Encryptor<W> {
    out: W,
    stream: EncryptorBE32<ChaCha20Poly1305>,
    /// The content of the next chunk, at most [`CHUNK`] bytes.
    chunk: Zeroizing<Vec<u8>>,
}

impl<W: Write> Encryptor<W> {
    /// Writes the header to `out`. Blocks: derives a key from the passphrase, which takes about a second.
    pub fn new(passphrase: &SecretString, mut out: W) -> io::Result<Self> {
        let file_key = Zeroizing::new(rand::random::<[u8; 16]>());
        let salt: [u8; 16] = rand::random();
        let wrapped = ChaCha20Poly1305::new(&wrap_key(passphrase, &salt, WORK_FACTOR))
            .encrypt(&Nonce::default(), file_key.as_slice())
            .map_err(too_large)?;
        let mut header = format!(
            "{VERSION_LINE}\n-> scrypt {} {WORK_FACTOR}\n{}\n---",
            BASE64_NOPAD.encode(&salt),
            BASE64_NOPAD.encode(&wrapped)
        );
        let mac = header_mac(&file_key, header.as_bytes()).finalize().into_bytes();
        header.push(' ');
        header.push_str(&BASE64_NOPAD.encode(&mac));
        header.push('\n');
        out.write_all(header.as_bytes())?;
        Self::with_file_key(&file_key, out)
    }

    /// Encrypts a payload whose header is already written.
    pub fn with_file_key(file_key: &FileKey, mut out: W) -> io::Result<Self> {
        let nonce: [u8; 16] = rand::random();
        out.write_all(&nonce)?;
        let stream = EncryptorBE32::new(&payload_key(file_key, &nonce), &Default::default());
        Ok(Self { out, stream, chunk: Zeroizing::new(Vec::with_capacity(CHUNK)) })
    }

    /// Writes the last chunk and returns the output.
    pub fn finish(mut self) -> io::Result<W> {
        let last = self.stream.encrypt_last(self.chunk.as_slice()).map_err(too_large)?;
        self.out.write_all(&last)?;
        Ok(self.out)
    }
}

impl<W: Write> Write for Encryptor<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A full chunk is written once more content follows, because the last one is encrypted differently.
        if self.chunk.len() == CHUNK && !bytes.is_empty() {
            let full = self.stream.encrypt_next(self.chunk.as_slice()).map_err(too_large)?;
            self.chunk.clear();
            self.out.write_all(&full)?;
        }
        let taken = bytes.len().min(CHUNK - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    /// Flushes the output. A chunk that is not full stays in memory.
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Decrypts an age file. Reads return an error of kind `InvalidData` if the payload was changed or truncated.
pub struct Decryptor<R> {
    input: R,
    /// `None` after the last chunk.
    stream: Option<DecryptorBE32<ChaCha20Poly1305>>,
    chunk: Zeroizing<Vec<u8>>,
    /// The number of bytes of `chunk` that were already returned.
    returned: usize,
    is_first: bool,
}

impl<R: BufRead> Decryptor<R> {
    /// Reads and checks the header of `input`. Blocks: derives a key from the passphrase.
    pub fn new(passphrase: &SecretString, mut input: R) -> Result<Self, DecryptError> {
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
        let header = format!("{version}\n{recipient}\n{body}\n---");
        header_mac(&file_key, header.as_bytes())
            .verify_slice(&mac)
            .map_err(|_| DecryptError::Header("its MAC does not match"))?;

        Ok(Self::with_file_key(&file_key, input)?)
    }

    /// Decrypts a payload whose header is already read.
    pub fn with_file_key(file_key: &FileKey, mut input: R) -> io::Result<Self> {
        let mut nonce = [0; 16];
        input.read_exact(&mut nonce)?;
        let stream = DecryptorBE32::new(&payload_key(file_key, &nonce), &Default::default());
        Ok(Self {
            input,
            stream: Some(stream),
            chunk: Zeroizing::new(Vec::with_capacity(CHUNK + TAG)),
            returned: 0,
            is_first: true,
        })
    }

    /// Decrypts the next chunk into `chunk`. Leaves it empty at the end.
    fn fill(&mut self) -> io::Result<()> {
        self.chunk.clear();
        self.returned = 0;
        let Some(mut stream) = self.stream.take() else { return Ok(()) };
        (&mut self.input).take((CHUNK + TAG) as u64).read_to_end(&mut self.chunk)?;
        let is_last = self.chunk.len() < CHUNK + TAG || self.input.fill_buf()?.is_empty();
        if is_last {
            stream
                .decrypt_last_in_place(b"", &mut *self.chunk)
                .map_err(|_| invalid("the payload was changed or truncated"))?;
            if self.chunk.is_empty() && !self.is_first {
                return Err(invalid("the last chunk of the payload is empty"));
            }
        } else {
            stream
                .decrypt_next_in_place(b"", &mut *self.chunk)
                .map_err(|_| invalid("the payload was changed"))?;
            self.stream = Some(stream);
        }
        self.is_first = false;
        Ok(())
    }
}

impl<R: BufRead> Read for Decryptor<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.returned == self.chunk.len() {
            self.fill()?;
        }
        let rest = &self.chunk[self.returned..];
        let taken = rest.len().min(buffer.len());
        buffer[..taken].copy_from_slice(&rest[..taken]);
        self.returned += taken;
        Ok(taken)
    }
}

/// Reads a line of the header and returns it without its end.
fn line(input: &mut impl BufRead) -> Result<String, DecryptError> {
    let mut line = Vec::new();
    input.take(MAX_LINE).read_until(b'\n', &mut line)?;
    if line.pop() != Some(b'\n') {
        return Err(DecryptError::Header("a line is too long, or the file ends within it"));
    }
    String::from_utf8(line).map_err(|_| DecryptError::Header("a line is not text"))
}

fn decoded<const N: usize>(text: &str, error: &'static str) -> Result<[u8; N], DecryptError> {
    let bytes = BASE64_NOPAD.decode(text.as_bytes()).map_err(|_| DecryptError::Header(error))?;
    bytes.try_into().map_err(|_| DecryptError::Header(error))
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

fn header_mac(file_key: &FileKey, header: &[u8]) -> Hmac<Sha256> {
    let key = derived(file_key, None, b"header");
    <Hmac<Sha256> as Mac>::new_from_slice(&key).expect("HMAC takes keys of any length").chain_update(header)
}

fn payload_key(file_key: &FileKey, nonce: &[u8; 16]) -> Key {
    derived(file_key, Some(nonce), b"payload")
}

fn derived(file_key: &FileKey, salt: Option<&[u8]>, info: &[u8]) -> Key {
    let mut key = Key::default();
    Hkdf::<Sha256>::new(salt, file_key.as_slice())
        .expand(info, &mut key)
        .expect("32 bytes are below HKDF's maximum");
    key
}

/// The error of an encryption, which fails only when a payload has more than 2^32 chunks.
fn too_large(_: chacha20poly1305::aead::Error) -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, "an encrypted file has at most 256 TiB")
}

fn invalid(message: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}
