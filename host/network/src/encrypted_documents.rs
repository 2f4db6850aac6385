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
//! `text` is the ciphertext of the document. Its key is `HKDF-SHA256(secret of the epoch, "dim-name-1", fleet, name)`, its
//! algorithm XChaCha20-Poly1305, with epoch and group as associated data. The nonce is derived from the secret, the name
//! and the document, so one document gives one file, and its CID stays the same when the record is renewed; two different
//! documents get different nonces.
//!
//! A host decrypts a file only under the IPNS name in it. Otherwise the owner of another name could let a plugin that may
//! read only that name read this document.

use std::collections::BTreeSet;
use std::fmt;

use bytes::Bytes;
use cid::Cid;
use dim_ipfs::{Backend, BackendError, unixfs};
use dim_model::ident::{ContentPath, GroupName, IpnsName, KeyName};
use dim_model::live::Live;
use dim_store::effect::NameValue;
use dim_store::names::Encryption;
use dim_store::plugin_limits::DOCUMENT_BYTES;
use dim_topics::membership::NoKey;
use dim_topics::membership::encryption::{Nonce, Secret, TextKey};
use hkdf::Hkdf;
use multibase::Base;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::Settings;
use crate::reliable_topics::Reliable;

/// The length of a nonce in base64.
const NONCE_DIGITS: usize = 32;

/// The length of the identity of a key epoch in hexadecimal digits.
const EPOCH_DIGITS: usize = 32;

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
pub struct Encrypted {
    /// The fleet, whose name is an IPNS name.
    fleet: IpnsName,
    /// The group that reads it.
    group: GroupName,
    /// The name under which it was published.
    name: IpnsName,
    /// The identity of the key epoch.
    epoch: [u8; 16],
    nonce: Nonce,
    ciphertext: Vec<u8>,
}

impl Encrypted {
    /// Parses a file; `None` if it is no encrypted document.
    ///
    /// # Errors
    /// The file begins as an encrypted document and is malformed.
    pub fn parse(file: &[u8]) -> Option<Result<Self, CipherError>> {
        file.starts_with(BEGINNING).then(|| Self::parse_file(file).map_err(CipherError::Malformed))
    }

    /// Errors contain nothing of the file, because anybody can have written it.
    fn parse_file(file: &[u8]) -> Result<Self, &'static str> {
        let file: File =
            serde_json::from_slice(file).map_err(|_| "it lacks a required member, or has an unknown one")?;
        if file.version != VERSION {
            return Err("unsupported version: this host reads version 1");
        }
        let fleet = canonical(&file.fleet).ok_or("its fleet is no IPNS name")?;
        let name = canonical(&file.name).ok_or("its name is no IPNS name")?;
        let epoch = Some(&file.epoch).filter(|it| it.len() == EPOCH_DIGITS);
        let epoch = epoch.and_then(|it| Base::Base16Lower.decode(it).ok()?.try_into().ok());
        let nonce = Some(&file.nonce).filter(|it| it.len() == NONCE_DIGITS);
        let nonce = nonce.and_then(|it| Base::Base64Pad.decode(it).ok()?.try_into().ok());
        Ok(Self {
            fleet,
            group: file.group,
            name,
            epoch: epoch.ok_or("its epoch does not have 32 hexadecimal digits")?,
            nonce: nonce.ok_or("its nonce is not 24 bytes in base64")?,
            ciphertext: Base::Base64Pad.decode(&file.text).map_err(|_| "its text is not base64")?,
        })
    }

    /// The IPNS name under which the document was published.
    pub fn name(&self) -> &IpnsName {
        &self.name
    }

    /// The key of the document, with one secret of its epoch.
    pub fn key(&self, secret: Secret) -> DocumentKey {
        let Self { fleet, group, epoch, .. } = self;
        DocumentKey { fleet: fleet.to_string(), group: group.clone(), epoch: *epoch, secret }
    }

    /// Decrypts the document with the first right one of several secrets; `None` if there is no secret.
    ///
    /// # Errors
    /// No secret is right, or the file was changed.
    pub fn decrypt(&self, secrets: &[Secret]) -> Option<Result<Bytes, CipherError>> {
        let associated = associated(&self.group, &self.epoch);
        let (fleet, name) = (self.fleet.to_string(), self.name.to_string());
        let decrypt = |secret: &Secret| {
            TextKey::of_document(secret, &fleet, &name).decrypt(&self.nonce, &associated, &self.ciphertext)
        };
        let mut attempts = secrets.iter().map(decrypt);
        let first = attempts.next()?;
        let right = first.or_else(|why| attempts.find_map(Result::ok).ok_or(why));
        let changed = |_| CipherError::Undecipherable;
        Some(right.map(Bytes::from).map_err(changed))
    }
}

/// Parses an IPNS name in the only form that [`DocumentKey::encrypt`] writes.
fn canonical(text: &str) -> Option<IpnsName> {
    text.parse().ok().filter(|name: &IpnsName| name.to_string() == text)
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

impl DocumentCipher {
    /// The group for which the documents of a key are encrypted; `None` if they are not.
    pub fn group(&self, key: &KeyName) -> Option<GroupName> {
        self.settings.now().encrypted_names.get(key).cloned()
    }

    /// The groups for which documents are encrypted.
    pub fn groups(&self) -> BTreeSet<GroupName> {
        self.settings.now().encrypted_names.values().cloned().collect()
    }

    /// The key with which the host encrypts documents for a group now.
    ///
    /// # Errors
    /// The host has no key, for the reason in the error.
    pub async fn writing_key(&self, group: &GroupName) -> Result<DocumentKey, NoDocumentKey> {
        self.reliable.document_key(group).await
    }

    /// The keys with which the host may have encrypted a document before.
    pub async fn earlier_keys(&self, encryption: &Encryption) -> Vec<DocumentKey> {
        let Encryption { fleet, group, epoch, .. } = encryption;
        let Some(epoch) = Base::Base16Lower.decode(epoch).ok().and_then(|it| it.try_into().ok()) else {
            return Vec::new();
        };
        let secrets = self.reliable.secrets(fleet, group, &epoch).await;
        let key = |secret| DocumentKey { fleet: fleet.clone(), group: group.clone(), epoch, secret };
        secrets.into_iter().map(key).collect()
    }

    /// Whether the host has a key that a document needs.
    pub async fn has_key(&self, missing: &MissingKey) -> bool {
        let MissingKey { fleet, group, epoch } = missing;
        !self.reliable.secrets(&fleet.to_string(), group, epoch).await.is_empty()
    }

    /// Returns the document in a file that was fetched for an IPNS name. Files that are not encrypted are returned as they
    /// are.
    ///
    /// # Errors
    /// The host lacks the key, the file is malformed or encrypted for another name, or the document has more than
    /// [`DOCUMENT_BYTES`].
    async fn open(&self, name: &IpnsName, (cid, file): (Cid, Bytes)) -> Result<Document, CipherError> {
        let encrypted = match file.starts_with(BEGINNING) {
            true => {
                let file = file.clone();
                let parse = tokio::task::spawn_blocking(move || Encrypted::parse(&file).transpose());
                parse.await.expect("a parser does not panic")?
            }
            false => None,
        };
        let document = match encrypted {
            None => Document { cid, data: file, encryption: None },
            Some(encrypted) if encrypted.name != *name => {
                return Err(CipherError::OtherName { asked: name.clone(), name: encrypted.name });
            }
            Some(encrypted) => {
                let Encrypted { fleet, group, epoch, .. } = &encrypted;
                let (fleet, group, epoch) = (fleet.clone(), group.clone(), *epoch);
                let secrets = self.reliable.secrets(&fleet.to_string(), &group, &epoch).await;
                let decrypt = move || {
                    let document = encrypted.decrypt(&secrets).transpose()?;
                    Ok::<_, CipherError>(document.map(|document| (unixfs::file_cid(&document), document)))
                };
                let decrypted =
                    tokio::task::spawn_blocking(decrypt).await.expect("a decryption does not panic");
                let Some((cid, data)) = decrypted? else {
                    return Err(CipherError::Unreadable(MissingKey { fleet, group, epoch }));
                };
                let encryption = Encryption {
                    document: ContentPath::of(&cid),
                    fleet: fleet.to_string(),
                    group,
                    epoch: hex(&epoch),
                };
                Document { cid, data, encryption: Some(encryption) }
            }
        };
        if document.data.len() > DOCUMENT_BYTES {
            return Err(CipherError::TooLarge(document.data.len()));
        }
        Ok(document)
    }

    /// Reads the document that an IPNS name points to. `path` is the end of the name's chain.
    ///
    /// # Errors
    /// The file cannot be found or read, it is encrypted for another name, or the document has more than
    /// [`DOCUMENT_BYTES`].
    pub async fn document(
        &self,
        backend: &Backend,
        name: &IpnsName,
        path: &ContentPath,
    ) -> Result<Document, CipherError> {
        let file = backend.content.file(path, FILE_BYTES).await?;
        self.open(name, file).await
    }

    /// Reads the document that an IPNS name points to. `path` is that of its record.
    ///
    /// # Errors
    /// As in [`DocumentCipher::document`], or a name of the chain cannot be resolved.
    pub async fn document_behind(
        &self,
        backend: &Backend,
        name: &IpnsName,
        path: &ContentPath,
    ) -> Result<Document, CipherError> {
        let path = backend.end_of_chain(path.clone()).await?;
        self.document(backend, name, &path).await
    }
}

/// A document as a reader gets it.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// The CID of the document. If it was encrypted, this is not the CID of the published file.
    pub cid: Cid,
    /// The content.
    pub data: Bytes,
    /// The encryption of the published file, if it was encrypted.
    pub encryption: Option<Encryption>,
}

impl Document {
    /// The document as a value of a name, and its encryption.
    pub fn into_value(self) -> (NameValue, Option<Encryption>) {
        let Self { cid, data, encryption } = self;
        (NameValue::Document { cid, data }, encryption)
    }
}

/// The key that a document needs and the host lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingKey {
    /// The fleet.
    pub fleet: IpnsName,
    /// The group.
    pub group: GroupName,
    /// The identity of the key epoch.
    pub epoch: [u8; 16],
}

/// The reason why the host cannot encrypt documents for a group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoDocumentKey {
    /// The host stops.
    #[error("the host stops")]
    Stopping,
    /// The fleet gives no key.
    #[error(transparent)]
    Membership(#[from] NoKey),
}

impl NoDocumentKey {
    /// Whether the operator must act before there is a key.
    pub fn needs_operator(&self) -> bool {
        match self {
            // A roster and keys arrive from members.
            Self::Stopping | Self::Membership(NoKey::NoRoster | NoKey::NoEpoch(_)) => false,
            Self::Membership(_) => true,
        }
    }
}

/// The reason why a document cannot be encrypted or read.
#[derive(Debug, thiserror::Error)]
pub enum CipherError {
    /// The host cannot encrypt.
    #[error("the document waits until it can be encrypted: {0}")]
    NoKey(#[from] NoDocumentKey),
    /// The host lacks the key of the document.
    #[error(
        "the document is encrypted for group {} of fleet {}, and this host does not have the key of epoch {}: ask an admin to add this host to the group",
        .0.group, .0.fleet, hex(&.0.epoch)
    )]
    Unreadable(MissingKey),
    /// The file was published under another name than the one that points to it.
    #[error(
        "the document is encrypted for name {name}, and is not decrypted for name {asked}: read it as {name}"
    )]
    OtherName {
        /// The name that points to the file.
        asked: IpnsName,
        /// The name in the file.
        name: IpnsName,
    },
    /// No key of the epoch decrypts the document.
    #[error("the encrypted document was changed, or the host has a wrong key of its epoch")]
    Undecipherable,
    /// The file is malformed.
    #[error("the encrypted document is malformed: {0}")]
    Malformed(&'static str),
    /// The document is too large.
    #[error("the document has {0} bytes; {DOCUMENT_BYTES} are the limit")]
    TooLarge(usize),
    /// The daemon does not have the file.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

#[cfg(test)]
mod tests {
    use chacha20poly1305::aead::{Aead as _, KeyInit as _, Payload};
    use chacha20poly1305::{XChaCha20Poly1305, XNonce};

    use super::*;

    fn key(secret: u8, epoch: u8) -> DocumentKey {
        DocumentKey {
            fleet: name(1).to_string(),
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
        let (fleet, other) = (name(1).to_string(), name(2).to_string());
        let own = format!(r#""name":"{}""#, name(7));
        let other_name = format!(r#""name":"{other}""#);
        for (member, other) in [
            (fleet.as_str(), other.as_str()),
            (own.as_str(), other_name.as_str()),
            (r#""group":"all""#, r#""group":"one""#),
            (r#""epoch":"02"#, r#""epoch":"03"#),
        ] {
            let changed = text.replace(member, other);
            assert_ne!(changed, text, "{member}");
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
    fn other_files_are_no_encrypted_documents_and_malformed_ones_are_refused_without_their_content() {
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
            (r#""name":"k"#, r#""name":"K"#),
            (r#""fleet":"k"#, r#""fleet":"/ipns/k"#),
        ] {
            let changed = file.replacen(from, to, 1);
            assert_ne!(changed, file, "{from}");
            let refused = Encrypted::parse(changed.as_bytes()).unwrap().unwrap_err().to_string();
            assert!(!refused.contains(to), "{refused}");
        }
        for end in [BEGINNING.len(), file.len() / 2, file.len() - 1] {
            Encrypted::parse(&file.as_bytes()[..end]).unwrap().unwrap_err();
        }
    }

    const VECTOR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/topics/encrypted-document.json");

    /// `DIM_WRITE_VECTORS=1` writes the file.
    #[test]
    fn the_vector_is_what_this_implementation_makes_and_another_one_decrypts_it() {
        let (key, name, document) = (key(0x5e, 0xe0), name(7), r#"{"jobs":{}}"#);
        let file = String::from_utf8(key.encrypt(&name, document.as_bytes())).unwrap();
        let vector = serde_json::json!({
            "about": "A document that is published under an IPNS name, encrypted for a group.",
            "name": name.to_string(),
            "document": document,
            "file": file,
            "cid": unixfs::file_cid(file.as_bytes()).to_string(),
            "key_epoch": { "epoch": key.epoch_name(), "secret": hex(key.secret.bytes()) },
        });
        if std::env::var_os("DIM_WRITE_VECTORS").is_some() {
            std::fs::write(VECTOR, format!("{vector:#}\n")).unwrap();
        }
        let stored: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(VECTOR).unwrap()).unwrap();
        assert_eq!(stored, vector);

        let file: serde_json::Value = serde_json::from_str(stored["file"].as_str().unwrap()).unwrap();
        let text = |member: &str| file[member].as_str().unwrap();
        let mut info = Vec::new();
        for part in ["dim-name-1", text("fleet"), text("name")] {
            info.extend_from_slice(&u32::try_from(part.len()).unwrap().to_be_bytes());
            info.extend_from_slice(part.as_bytes());
        }
        let mut secret = [0; 32];
        Hkdf::<Sha256>::new(None, &[0x5e; 32]).expand(&info, &mut secret).unwrap();
        let associated = [&[0xe0; 16], text("group").as_bytes()].concat();
        let (nonce, ciphertext) =
            (Base::Base64Pad.decode(text("nonce")).unwrap(), Base::Base64Pad.decode(text("text")).unwrap());
        let decrypted = XChaCha20Poly1305::new(&secret.into())
            .decrypt(XNonce::from_slice(&nonce), Payload { msg: &ciphertext, aad: &associated })
            .unwrap();
        assert_eq!(decrypted, document.as_bytes());
    }
}
