//! Owns the payload of a file. It receives the file key and a stream, and encrypts or decrypts the stream.

use std::io::{self, BufRead, Read, Write};

use chacha20poly1305::aead::stream::{DecryptorBE32, EncryptorBE32};
use chacha20poly1305::{ChaCha20Poly1305, Key};
use zeroize::Zeroizing;

use crate::FileKey;
use crate::header::derived;

/// The number of bytes of an encrypted chunk's content.
const CHUNK: usize = 64 << 10;

/// The number of bytes that encryption adds to a chunk.
const TAG: usize = 16;

/// Encrypts everything that is written and writes it to `W`. [`finish`](Self::finish) writes the end; without it the
/// file is truncated.
pub struct Encryptor<W> {
    out: W,
    stream: EncryptorBE32<ChaCha20Poly1305>,
    /// The content of the next chunk, at most [`CHUNK`] bytes.
    chunk: Zeroizing<Vec<u8>>,
}

impl<W: Write> Encryptor<W> {
    /// Encrypts a payload whose header is already written.
    pub fn with_file_key(file_key: &FileKey, out: W) -> io::Result<Self> {
        Self::with_nonce(file_key, rand::random(), out)
    }

    /// Encrypts a payload whose header is already written, with a nonce that is used for no other file.
    pub fn with_nonce(file_key: &FileKey, nonce: [u8; 16], mut out: W) -> io::Result<Self> {
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

fn payload_key(file_key: &FileKey, nonce: &[u8; 16]) -> Key {
    derived(file_key, Some(nonce), b"payload")
}

/// The error of an encryption, which fails only when a payload has more than 2^32 chunks.
fn too_large(_: chacha20poly1305::aead::Error) -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, "an encrypted file has at most 256 TiB")
}

fn invalid(message: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}
