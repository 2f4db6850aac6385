//! The encryption of backups, held to the published test vectors of the age format.

use std::io::{BufRead, BufReader, Read as _, Write as _};

use dim_age::payload::{Decryptor, Encryptor};
use dim_age::{DecryptError, FileKey, passphrase};
use dim_model::ident::Digest;
use dim_server::backup::{Passphrase, restore, verify};
use secrecy::SecretString;

/// The number of bytes of a chunk's content.
const CHUNK: usize = 64 << 10;

/// A vector: fields of text, an empty line, and a file in the age format.
struct Vector {
    name: String,
    fields: Vec<(String, String)>,
    file: Vec<u8>,
}

impl Vector {
    fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
    }
}

fn vectors() -> Vec<Vector> {
    let files = std::fs::read_dir(dim_tests::data("age")).unwrap().map(Result::unwrap);
    let files = files.filter(|file| file.file_name() != "README.md");
    files
        .map(|file| {
            let mut input = BufReader::new(std::fs::File::open(file.path()).unwrap());
            let mut fields = Vec::new();
            loop {
                let mut line = String::new();
                input.read_line(&mut line).unwrap();
                let Some((field, value)) = line.trim_end().split_once(": ") else { break };
                fields.push((field.to_owned(), value.to_owned()));
            }
            let mut file_bytes = Vec::new();
            input.read_to_end(&mut file_bytes).unwrap();
            Vector { name: file.file_name().into_string().unwrap(), fields, file: file_bytes }
        })
        .collect()
}

/// Reads the content of a vector as far as it is readable. Returns what ended it: `success` or a failure.
fn outcome(vector: &Vector) -> (&'static str, Vec<u8>) {
    let mut decryptor = match vector.field("passphrase") {
        Some(passphrase) => {
            match passphrase::decrypt(&SecretString::from(passphrase), vector.file.as_slice()) {
                Ok(decryptor) => decryptor,
                Err(DecryptError::Passphrase) => return ("no match", Vec::new()),
                Err(DecryptError::Recipient | DecryptError::OtherKeys) => {
                    return ("other recipient", Vec::new());
                }
                Err(DecryptError::Io(error)) => panic!("{}: {error}", vector.name),
                Err(DecryptError::Header(_) | DecryptError::ExcessiveWork(_)) => {
                    return ("header failure", Vec::new());
                }
            }
        }
        // Another recipient: only the payload is tested.
        None => {
            let end = vector.file.windows(5).position(|bytes| bytes == b"\n--- ").unwrap() + 1;
            let end = end + vector.file[end..].iter().position(|byte| *byte == b'\n').unwrap() + 1;
            let key = data_encoding::HEXLOWER.decode(vector.field("file key").unwrap().as_bytes()).unwrap();
            match Decryptor::with_file_key(&FileKey::new(key.try_into().unwrap()), &vector.file[end..]) {
                Ok(decryptor) => decryptor,
                Err(_) => return ("header failure", Vec::new()),
            }
        }
    };
    let mut content = Vec::new();
    match decryptor.read_to_end(&mut content) {
        Ok(_) => ("success", content),
        Err(error) => {
            assert_eq!(error.kind(), std::io::ErrorKind::InvalidData, "{}", vector.name);
            ("payload failure", content)
        }
    }
}

#[test]
fn the_test_vectors_of_the_age_format_have_the_results_that_they_name() {
    let vectors = vectors();
    assert_eq!(vectors.len(), 34);
    for vector in vectors {
        let (result, content) = outcome(&vector);
        let expected = match vector.name.as_str() {
            // The first recipient is of another kind; an implementation with more kinds reads the next one.
            "scrypt_and_x25519" | "scrypt_uppercase" => Some("other recipient"),
            _ => vector.field("expect"),
        };
        assert_eq!(Some(result), expected, "{}", vector.name);
        if let Some(payload) = vector.field("payload") {
            assert_eq!(Digest::of(&content).to_string(), payload, "{}", vector.name);
        }
    }
}

fn encrypted(key: &FileKey, content: &[u8]) -> Vec<u8> {
    let mut encryptor = Encryptor::with_file_key(key, Vec::new()).unwrap();
    encryptor.write_all(content).unwrap();
    encryptor.finish().unwrap()
}

fn decrypted(key: &FileKey, file: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut content = Vec::new();
    Decryptor::with_file_key(key, file)?.read_to_end(&mut content)?;
    Ok(content)
}

#[test]
fn content_of_any_length_comes_back_and_a_truncated_file_is_refused() {
    let key = FileKey::new([7; 16]);
    for length in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK - 1, 3 * CHUNK] {
        let content: Vec<u8> = (0..length).map(|index| (index % 251) as u8).collect();
        let file = encrypted(&key, &content);
        let chunks = length.div_ceil(CHUNK).max(1);
        assert_eq!(file.len(), 16 + length + 16 * chunks, "{length}");
        assert_eq!(decrypted(&key, &file).unwrap(), content, "{length}");
        // At every border between chunks, and a byte before and after it.
        let borders = (0..=chunks).map(|chunk| 16 + chunk * (CHUNK + 16));
        for end in borders.flat_map(|border| [border - 1, border, border + 1]) {
            if end < file.len() {
                assert!(decrypted(&key, &file[..end]).is_err(), "{length} truncated to {end}");
            }
        }
        assert!(decrypted(&key, &[file.as_slice(), &[0]].concat()).is_err(), "{length} and a byte more");
    }
}

#[test]
fn chunks_cannot_change_their_order() {
    let key = FileKey::new([7; 16]);
    let mut file = encrypted(&key, &vec![3; 3 * CHUNK]);
    let (first, rest) = file[16..].split_at_mut(CHUNK + 16);
    first.swap_with_slice(&mut rest[..CHUNK + 16]);
    assert_eq!(decrypted(&key, &file).unwrap_err().kind(), std::io::ErrorKind::InvalidData);
}

#[test]
fn a_file_of_the_encryptor_opens_with_its_passphrase_alone() {
    let secret = SecretString::from("correct horse battery");
    let mut encryptor = passphrase::encrypt(&secret, Vec::new()).unwrap();
    encryptor.write_all(b"content").unwrap();
    let file = encryptor.finish().unwrap();
    let mut content = Vec::new();
    passphrase::decrypt(&secret, file.as_slice()).unwrap().read_to_end(&mut content).unwrap();
    assert_eq!(content, b"content");
    let other = passphrase::decrypt(&SecretString::from("correct horse"), file.as_slice());
    assert!(matches!(other.err(), Some(DecryptError::Passphrase)));
}

#[test]
fn a_backup_that_an_earlier_host_encrypted_is_restored() {
    let passphrase = || Passphrase::new("correct horse battery".to_owned()).unwrap();
    let open = || std::fs::File::open(dim_tests::data("stores/backups/form-2.age")).unwrap();
    let head = verify(open(), passphrase()).unwrap();
    assert_eq!(head.host, "12D3KooWSsSHVS1R3vjewoeAAJTnueUmqhSiA5KSn4AMtTGan33n");
    let dir = tempfile::tempdir().unwrap();
    restore(open(), passphrase(), &dir.path().join("state")).unwrap();
    assert!(dir.path().join("state/dim.redb").exists());
}
