//! Owns encrypted documents: the files that the host publishes under its IPNS names and that only a group of its fleet can
//! read. It receives a document and returns the file that encrypts it, and the other way round, with the keys of the
//! driver of reliable topics.
//!
//! The file is JSON, so that a reader without a key sees what it is. The members are in this order and without white
//! space, because a file that begins otherwise is taken for a plain document:
//!
//! ```json
//! {
//!   "dim-encrypted-document": 1,
//!   "notice": "This document is encrypted. Members of group all of fleet k51… read it with: dim ipns get-state k51…",
//!   "fleet": "k51…", "group": "all", "name": "k51…",
//!   "epoch": "32 hexadecimal digits", "nonce": "base64", "text": "base64"
//! }
//! ```
//!
//! The key of the text is `HKDF-SHA256(secret of the epoch, "dim-name-1", fleet, name)`. The text is encrypted with
//! XChaCha20-Poly1305, with group and epoch as associated data. The nonce follows from the secret, the name and the text,
//! so one document gives one file, and its CID stays the same when the record is renewed; two different documents get
//! different nonces.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use cid::Cid;
use dim_ipfs::{Backend, BackendError};
use dim_model::ident::{ContentPath, GroupName, IpnsName, KeyName};
use dim_model::live::Live;
use dim_store::plugin_limits::DOCUMENT_BYTES;
use dim_topics::membership::encryption::{Nonce, Secret, TextKey};
use hkdf::Hkdf;
use multibase::Base;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::Settings;
use crate::reliable_topics::Reliable;

/// The version of the form of the file.
const VERSION: u32 = 1;

/// The beginning of every encrypted document.
const BEGINNING: &[u8] = b"{\"dim-encrypted-document\":";

/// The beginning of what a nonce is derived for.
const NONCE: &[u8] = b"dim-name-nonce-1";

/// The maximum size of a file with a document in bytes. Base64 takes a third more.
pub const FILE_BYTES: usize = DOCUMENT_BYTES / 3 * 4 + 4_096;

/// The members of the file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(rename = "dim-encrypted-document")]
    version: u32,
    notice: String,
    fleet: String,
    group: GroupName,
    name: String,
    epoch: String,
    nonce: String,
    text: String,
}

/// The key of a group with which the host encrypts documents.
#[derive(Clone, PartialEq, Eq)]
pub struct DocumentKey {
    /// The fleet.
    pub fleet: String,
    /// The group.
    pub group: GroupName,
    /// The identity of the key epoch.
    pub epoch: [u8; 16],
    /// The secret of the epoch.
    pub secret: Secret,
}

/// Hides the secret.
impl fmt::Debug for DocumentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DocumentKey({}, {}, {})", self.fleet, self.group, hex(&self.epoch))
    }
}

impl DocumentKey {
    /// The epoch as the file names it.
    pub fn epoch_name(&self) -> String {
        hex(&self.epoch)
    }

    /// Returns the file that encrypts a document behind a name.
    pub fn encrypt(&self, name: &IpnsName, document: &[u8]) -> Vec<u8> {
        let name = name.to_string();
        let nonce = self.nonce(&name, document);
        let key = TextKey::of_document(&self.secret, &self.fleet, &name);
        let text = key.encrypt(&nonce, &associated(&self.group, &self.epoch), document);
        let notice = format!(
            "This document is encrypted. Members of group {} of fleet {} read it with: dim ipns get-state {name}",
            self.group, self.fleet
        );
        let file = File {
            version: VERSION,
            notice,
            fleet: self.fleet.clone(),
            group: self.group.clone(),
            name,
            epoch: self.epoch_name(),
            nonce: Base::Base64Pad.encode(nonce),
            text: Base::Base64Pad.encode(text),
        };
        serde_json::to_vec(&file).expect("texts and a number")
    }

    /// HKDF-SHA256 of the name and the hash of the document, each after its length, keyed with the secret.
    fn nonce(&self, name: &str, document: &[u8]) -> Nonce {
        let hash = Sha256::digest(document);
        let mut info = NONCE.to_vec();
        for part in [self.fleet.as_bytes(), name.as_bytes(), self.group.as_str().as_bytes(), &hash] {
            info.extend_from_slice(&u32::try_from(part.len()).expect("a part is short").to_be_bytes());
            info.extend_from_slice(part);
        }
        let mut nonce = [0; 24];
        let derived = Hkdf::<Sha256>::new(None, self.secret.bytes()).expand(&info, &mut nonce);
        derived.expect("24 bytes are below HKDF's maximum");
        nonce
    }
}

/// What encryption authenticates beside the text. The key is that of the fleet and the name.
fn associated(group: &GroupName, epoch: &[u8; 16]) -> Vec<u8> {
    [epoch, group.as_str().as_bytes()].concat()
}

/// An encrypted document whose form was checked.
#[derive(Debug, PartialEq, Eq)]
struct Encrypted {
    fleet: String,
    group: GroupName,
    name: String,
    epoch: [u8; 16],
    nonce: Nonce,
    text: Vec<u8>,
}

impl Encrypted {
    /// Parses a file; `None` if it is no encrypted document.
    fn parse(file: &[u8]) -> Option<Result<Self, CipherError>> {
        file.starts_with(BEGINNING).then(|| Self::parse_file(file).map_err(CipherError::Malformed))
    }

    fn parse_file(file: &[u8]) -> Result<Self, String> {
        let file: File = serde_json::from_slice(file).map_err(|error| error.to_string())?;
        if file.version != VERSION {
            return Err(format!("its version is {}, and this host reads version {VERSION}", file.version));
        }
        let base64 = |text: &str| Base::Base64Pad.decode(text).map_err(|error| error.to_string());
        let epoch = Base::Base16Lower.decode(&file.epoch).ok().and_then(|it| it.try_into().ok());
        let nonce = base64(&file.nonce)?.try_into();
        Ok(Self {
            fleet: file.fleet,
            group: file.group,
            name: file.name,
            epoch: epoch.ok_or("the epoch does not have 32 hexadecimal digits")?,
            nonce: nonce.map_err(|_| "the nonce does not have 24 bytes")?,
            text: base64(&file.text)?,
        })
    }

    /// Decrypts the document with the first right one of several secrets; `None` if there is no secret.
    fn decrypt(&self, secrets: &[Secret]) -> Option<Result<Bytes, CipherError>> {
        let associated = associated(&self.group, &self.epoch);
        let decrypt = |secret: &Secret| {
            TextKey::of_document(secret, &self.fleet, &self.name).decrypt(
                &self.nonce,
                &associated,
                &self.text,
            )
        };
        let mut attempts = secrets.iter().map(decrypt);
        let first = attempts.next()?;
        let right = first.or_else(|why| attempts.find_map(Result::ok).ok_or(why));
        let changed =
            |_| CipherError::Malformed("it was changed, or its key is not that of its epoch".to_owned());
        Some(right.map(Bytes::from).map_err(changed))
    }
}

fn hex(bytes: &[u8]) -> String {
    Base::Base16Lower.encode(bytes)
}

/// Encrypts the documents of the keys that the config names, and decrypts those of others.
#[derive(Clone, Debug)]
pub struct DocumentCipher {
    /// The driver of reliable topics, which has the keys of the fleet.
    pub reliable: Reliable,
    /// The settings, with the keys whose documents are encrypted.
    pub settings: Live<Settings>,
}

/// A host without a fleet, which encrypts nothing.
impl Default for DocumentCipher {
    fn default() -> Self {
        let settings = Settings {
            accepted_peers: BTreeMap::new(),
            follow_every: Duration::from_secs(60),
            encrypted_names: BTreeMap::new(),
        };
        Self { reliable: Reliable::default(), settings: Live::new(settings) }
    }
}

impl DocumentCipher {
    /// The group for which the documents of a key are encrypted; `None` if they are not.
    pub fn group(&self, key: &KeyName) -> Option<GroupName> {
        self.settings.now().encrypted_names.get(key).cloned()
    }

    /// The key with which the host encrypts documents for a group now.
    ///
    /// # Errors
    /// The host has no key: it belongs to no fleet with a roster, it is no member, the roster has expired, or no keeper
    /// has made a key yet.
    pub async fn writing_key(&self, group: &GroupName) -> Result<DocumentKey, CipherError> {
        self.reliable.document_key(group).await.map_err(CipherError::NoKey)
    }

    /// Returns the document in a file that was fetched. Files that are not encrypted are returned as they are.
    ///
    /// # Errors
    /// The host lacks the key, the file is malformed, or the document has more than [`DOCUMENT_BYTES`].
    pub async fn open(&self, file: Bytes) -> Result<Bytes, CipherError> {
        let document = match Encrypted::parse(&file).transpose()? {
            None => file,
            Some(encrypted) => {
                let Encrypted { fleet, group, epoch, .. } = &encrypted;
                let secrets = self.reliable.secrets(fleet, group, epoch).await;
                let missing = || CipherError::Unreadable {
                    fleet: fleet.clone(),
                    group: group.clone(),
                    epoch: hex(epoch),
                };
                encrypted.decrypt(&secrets).ok_or_else(missing)??
            }
        };
        if document.len() > DOCUMENT_BYTES {
            return Err(CipherError::TooLarge(document.len()));
        }
        Ok(document)
    }

    /// Reads the file at a path from the daemon, and returns its CID and the document in it.
    ///
    /// # Errors
    /// The file cannot be found or read, or the document has more than [`DOCUMENT_BYTES`].
    pub async fn document(&self, backend: &Backend, path: &ContentPath) -> Result<(Cid, Bytes), CipherError> {
        let (cid, file) = backend.content.file(path, FILE_BYTES).await?;
        Ok((cid, self.open(file).await?))
    }
}

/// The reason why a document cannot be encrypted or read.
#[derive(Debug, thiserror::Error)]
pub enum CipherError {
    /// The host cannot encrypt.
    #[error("the document waits until it can be encrypted: {0}")]
    NoKey(String),
    /// The host lacks the key of the document.
    #[error(
        "the document is encrypted for group {group} of fleet {fleet}, and this host does not have the key of epoch {epoch}"
    )]
    Unreadable {
        /// The fleet.
        fleet: String,
        /// The group.
        group: GroupName,
        /// The epoch.
        epoch: String,
    },
    /// The file is malformed.
    #[error("the encrypted document is malformed: {0}")]
    Malformed(String),
    /// The document is too large.
    #[error("the document has {0} bytes; {DOCUMENT_BYTES} are the limit")]
    TooLarge(usize),
    /// The daemon does not have the file.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(secret: u8, epoch: u8) -> DocumentKey {
        DocumentKey {
            fleet: "lab".to_owned(),
            group: "all".parse().unwrap(),
            epoch: [epoch; 16],
            secret: Secret::new([secret; 32]),
        }
    }

    fn name(number: u64) -> IpnsName {
        IpnsName::from_multihash(cid::multihash::Multihash::<64>::wrap(0, &number.to_be_bytes()).unwrap())
    }

    #[test]
    fn a_document_is_read_with_its_key_alone_and_says_to_others_what_it_is() {
        let file = key(1, 2).encrypt(&name(7), b"marked text");
        let text = std::str::from_utf8(&file).unwrap();
        assert!(
            text.starts_with(r#"{"dim-encrypted-document":1,"notice":"This document is encrypted."#),
            "{text}"
        );
        assert!(
            text.contains(&format!("dim ipns get-state {}", name(7))) && !text.contains("marked"),
            "{text}"
        );
        let open = |file: &[u8], secrets: &[u8]| {
            let secrets: Vec<Secret> = secrets.iter().map(|it| Secret::new([*it; 32])).collect();
            Encrypted::parse(file).unwrap().unwrap().decrypt(&secrets)
        };
        assert_eq!(open(&file, &[1]).unwrap().unwrap(), "marked text");
        assert_eq!(open(&file, &[9, 1]).unwrap().unwrap(), "marked text", "the second secret is right");
        assert!(open(&file, &[]).is_none());
        open(&file, &[9]).unwrap().unwrap_err();
        // Whoever changes a member of the file changes the key or what is authenticated.
        for (member, other) in [("lab", "bal"), (r#""group":"all""#, r#""group":"one""#), ("02", "03")] {
            let changed = text.replacen(member, other, if member == "02" { 1 } else { 9 });
            assert_ne!(changed, text);
            open(changed.as_bytes(), &[1]).unwrap().unwrap_err();
        }
    }

    #[test]
    fn one_document_gives_one_file_and_no_two_documents_share_a_nonce() {
        let file = |secret: u8, number: u64, text: &[u8]| key(secret, 2).encrypt(&name(number), text);
        assert_eq!(file(1, 7, b"a"), file(1, 7, b"a"), "a renewal changes nothing");
        let files = [file(1, 7, b"a"), file(1, 7, b"b"), file(1, 8, b"a"), file(2, 7, b"a")];
        let nonces: std::collections::BTreeSet<Nonce> =
            files.iter().map(|file| Encrypted::parse(file).unwrap().unwrap().nonce).collect();
        assert_eq!(nonces.len(), files.len());
    }

    #[test]
    fn other_files_are_no_encrypted_documents_and_malformed_ones_are_refused() {
        for plain in [&b"{}"[..], b"", b"text", br#"{"jobs":{}}"#] {
            assert!(Encrypted::parse(plain).is_none());
        }
        let file = String::from_utf8(key(1, 2).encrypt(&name(7), b"text")).unwrap();
        for (from, to) in [
            (r#"document":1"#, r#"document":2"#),
            ("0202", "02"),
            ("0202", "XX02"),
            (r#""nonce":""#, r#""nonce":"AAAA"#),
            (r#""text":""#, r#""text":"-"#),
            (r#""fleet""#, r#""feet""#),
            (r#""group":"all""#, r#""group":"ALL ""#),
        ] {
            let changed = file.replacen(from, to, 1);
            assert_ne!(changed, file, "{from}");
            Encrypted::parse(changed.as_bytes()).unwrap().unwrap_err();
        }
        for end in [BEGINNING.len(), file.len() / 2, file.len() - 1] {
            Encrypted::parse(&file.as_bytes()[..end]).unwrap().unwrap_err();
        }
    }
}
