//! Owns the encryption of published documents. It receives a name with its committed value, and decides what is sent to
//! the backend, whether the published file must be replaced, and whether an unknown record has the host's own document.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use dim_ipfs::{BackendError, Current, unixfs};
use dim_model::ident::{ContentPath, GroupName, IpnsName, KeyName};
use dim_store::names::{self, Accepted, Encryption, Known};
use dim_store::{documents, pins};

use super::{PublishError, Publisher};
use crate::encrypted_documents::{CipherError, DocumentKey, MissingKey, NoDocumentKey};

/// The time limit for reading the document of an unknown record.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What is sent to the backend for a name.
pub(super) struct Sent {
    /// The path in the record.
    pub path: ContentPath,
    /// The file at the path, if the host can make it.
    pub file: Option<Bytes>,
    /// The encryption of the document.
    pub encryption: Option<Encryption>,
    /// The number of the value, as in [`Known::sequence`].
    pub of: u64,
}

/// The owner of an unknown record.
pub(super) enum Recognized {
    /// The record has the host's own document, encrypted with another key.
    Own,
    /// The record has another document.
    Foreign,
    /// The host cannot read the document. It lacks this key, if the document is encrypted.
    Unreadable(Option<MissingKey>),
}

/// The present key of each group for which the host encrypts documents, or the reason why there is none.
pub(super) type DocumentKeys = BTreeMap<GroupName, Result<DocumentKey, NoDocumentKey>>;

impl Publisher {
    /// The group for which the documents of a key are encrypted before they are sent. The embedded backend shows them to
    /// nobody, so there they are not encrypted.
    fn group(&self, key: &KeyName) -> Option<GroupName> {
        self.cipher.group(key).filter(|_| self.backend.network)
    }

    /// The present keys of all groups.
    pub(super) async fn document_keys(&self) -> DocumentKeys {
        let mut keys = DocumentKeys::new();
        for group in self.cipher.groups() {
            let key = self.cipher.writing_key(&group).await;
            keys.insert(group, key);
        }
        keys
    }

    /// The reason why the document of a name cannot be encrypted, and the published record cannot be renewed instead.
    pub(super) fn awaits_key(
        &self,
        key: &KeyName,
        known: &Known,
        keys: &DocumentKeys,
    ) -> Option<NoDocumentKey> {
        let group = self.group(key).filter(|_| known.document.is_some())?;
        let Some(Err(why)) = keys.get(&group) else { return None };
        published_form(known, &group).is_none().then(|| why.clone())
    }

    /// What is sent to the backend for a name. The document of a key with encryption is encrypted with the newest key of
    /// its group. Without a key the published record is renewed, so that readers find the published document until the
    /// newer one can be encrypted.
    pub(super) async fn sent(
        &self,
        key: &KeyName,
        known: &Known,
        name: &IpnsName,
    ) -> Result<Sent, PublishError> {
        let (path, of) = (known.path.clone(), known.sequence);
        let document = documents::get(&self.store.snapshot()?, &known.path)?;
        let Some(group) = self.group(key) else {
            return Ok(Sent { path, file: document.map(Bytes::from), encryption: None, of });
        };
        if known.document.is_none() {
            // A path is published as it is. The host does not provide what is there, although it may have it.
            return Ok(Sent { path, file: None, encryption: None, of });
        }
        // The names of other documents do not wait for it.
        let document = document.ok_or_else(|| PublishError::DocumentLost(path.clone()))?;
        let why = match self.cipher.writing_key(&group).await {
            Ok(key) => {
                let epoch = key.epoch_name();
                let encryption = Some(Encryption { document: path, fleet: key.fleet.clone(), group, epoch });
                let (path, file) = encrypt(key, name, document).await;
                return Ok(Sent { path, file: Some(file), encryption, of });
            }
            Err(why) => why,
        };
        if let Some((path, encryption)) = published_form(known, &group) {
            let keys = self.cipher.earlier_keys(encryption).await;
            let file = encrypt_as(path, keys, name, document).await;
            if file.is_none()
                && let Some((cid, _)) = path.ipfs()
                && !self.backend.content.is_pinned(&cid).await?
            {
                return Err(PublishError::FileLost(path.clone()));
            }
            return Ok(Sent { path: path.clone(), file, encryption: Some(encryption.clone()), of });
        }
        match known.published.as_ref().filter(|it| it.of != 0) {
            Some(Accepted { path, encryption, of, .. }) => {
                Ok(Sent { path: path.clone(), file: None, encryption: encryption.clone(), of: *of })
            }
            None => Err(PublishError::Cipher(why.into())),
        }
    }

    /// Whether the published document is encrypted in another way than the config and the newest key of the group
    /// require, so that it is published again.
    pub(super) fn is_encrypted_otherwise(&self, key: &KeyName, known: &Known, keys: &DocumentKeys) -> bool {
        let published = known.published.as_ref().filter(|it| it.of == known.sequence);
        let is_document = self.backend.network && known.hold.is_none() && known.document.is_some();
        let Some(published) = published.filter(|_| is_document) else { return false };
        match (self.group(key), &published.encryption) {
            (None, None) => false,
            (Some(group), Some(now)) => match keys.get(&group) {
                Some(Ok(key)) => {
                    (&key.fleet, &key.group, &key.epoch_name()) != (&now.fleet, &now.group, &now.epoch)
                }
                _ => now.group != group,
            },
            _ => true,
        }
    }

    /// Whether an unknown record has the host's own document, encrypted with another key. A host that was restored from
    /// a backup finds such a record. The record counts as the host's own from then on.
    pub(super) async fn recognize_document(
        &self,
        key: &KeyName,
        known: &Known,
        name: &IpnsName,
        current: &Current,
    ) -> Result<Recognized, PublishError> {
        let was_encrypted = known.encryption().is_some() || self.group(key).is_some();
        if known.document.is_none() || !was_encrypted {
            return Ok(Recognized::Foreign);
        }
        let read = self.cipher.document_behind(&self.backend, name, &current.path);
        let read = tokio::time::timeout(TIMEOUT, read).await;
        let document = match read.map_err(|_| BackendError::Timeout("cat"))? {
            Ok(document) => document,
            Err(CipherError::Backend(error)) => return Err(error.into()),
            Err(CipherError::Unreadable(missing)) => return Ok(Recognized::Unreadable(Some(missing))),
            Err(_) => return Ok(Recognized::Unreadable(None)),
        };
        let path = ContentPath::of(&document.cid);
        let is_own = path == known.path || known.encryption().is_some_and(|before| before.document == path);
        if !is_own || document.encryption.is_none() {
            return Ok(Recognized::Foreign);
        }
        tracing::info!(%key, path = %current.path, "the record has the host's own document, encrypted with another key");
        let (key, path) = (key.clone(), current.path.clone());
        let note = move |write: &redb::WriteTransaction| {
            // Superseded files are unpinned.
            path.ipfs().map_or(Ok(()), |(cid, _)| pins::note(write, &cid))?;
            names::attempt(write, &key, &path)
        };
        self.commit.write(note).await?;
        Ok(Recognized::Own)
    }
}

/// The path and the encryption of the published file, if it encrypts the present document for `group`.
fn published_form<'a>(known: &'a Known, group: &GroupName) -> Option<(&'a ContentPath, &'a Encryption)> {
    let published = known.published.as_ref()?;
    let encryption = published.encryption.as_ref()?;
    (encryption.document == known.path && encryption.group == *group).then_some((&published.path, encryption))
}

/// Encrypts a document. Returns the path and the file.
async fn encrypt(key: DocumentKey, name: &IpnsName, document: Vec<u8>) -> (ContentPath, Bytes) {
    let name = name.clone();
    let encrypt = move || file_of(&key, &name, &document);
    tokio::task::spawn_blocking(encrypt).await.expect("an encryption does not panic")
}

/// Makes the file at `path` again, which encrypts a document with one of several keys.
async fn encrypt_as(
    path: &ContentPath,
    keys: Vec<DocumentKey>,
    name: &IpnsName,
    document: Vec<u8>,
) -> Option<Bytes> {
    let (path, name) = (path.clone(), name.clone());
    let encrypt = move || {
        let mut files = keys.iter().map(|key| file_of(key, &name, &document));
        files.find(|(made, _)| *made == path).map(|(_, file)| file)
    };
    tokio::task::spawn_blocking(encrypt).await.expect("an encryption does not panic")
}

fn file_of(key: &DocumentKey, name: &IpnsName, document: &[u8]) -> (ContentPath, Bytes) {
    let file = key.encrypt(name, document);
    (ContentPath::of(&unixfs::file_cid(&file)), Bytes::from(file))
}
