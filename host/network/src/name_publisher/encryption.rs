//! Owns the encryption of published documents. It receives a name with its committed value, and decides what is sent to
//! the backend, whether the published file must be replaced, and whether an unknown record has the host's own document.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use dim_ipfs::{Current, unixfs};
use dim_model::ident::{ContentPath, GroupName, IpnsName, KeyName};
use dim_store::commit::CommitError;
use dim_store::names::{self, Encryption, Known};
use dim_store::{StoreError, documents};

use super::{PublishError, Publisher};
use crate::encrypted_documents::{DocumentKey, NoDocumentKey};

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
    /// its group. Without a key the published file of the same document is sent again, so that its record does not end.
    pub(super) async fn sent(
        &self,
        key: &KeyName,
        known: &Known,
        name: &IpnsName,
    ) -> Result<Sent, PublishError> {
        let document = documents::get(&self.store.snapshot()?, &known.path)?;
        let Some(group) = self.group(key) else {
            let file = document.map(Bytes::from);
            return Ok(Sent { path: known.path.clone(), file, encryption: None });
        };
        if known.document.is_none() {
            // A path is published as it is. The host does not provide what is there, although it may have it.
            return Ok(Sent { path: known.path.clone(), file: None, encryption: None });
        }
        let document =
            document.ok_or_else(|| StoreError::corrupt("documents", format!("{} is missing", known.path)))?;
        match (self.cipher.writing_key(&group).await, published_form(known, &group)) {
            (Ok(key), _) => {
                let encryption = Encryption {
                    document: known.path.clone(),
                    fleet: key.fleet.clone(),
                    group,
                    epoch: key.epoch_name(),
                };
                let (path, file) = encrypt(vec![key], name, document).await.remove(0);
                Ok(Sent { path, file: Some(file), encryption: Some(encryption) })
            }
            (Err(_), Some((path, encryption))) => {
                let keys = self.cipher.earlier_keys(encryption).await;
                let files = encrypt(keys, name, document).await;
                // Without its key the daemon alone has the file.
                let file = files.into_iter().find(|(made, _)| made == path).map(|(_, file)| file);
                Ok(Sent { path: path.clone(), file, encryption: Some(encryption.clone()) })
            }
            (Err(why), None) => Err(PublishError::Cipher(why.into())),
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
    pub(super) async fn recognizes(
        &self,
        key: &KeyName,
        known: &Known,
        name: &IpnsName,
        current: &Current,
    ) -> Result<bool, CommitError> {
        let was_encrypted = known.encryption().is_some() || self.group(key).is_some();
        if known.document.is_none() || !was_encrypted {
            return Ok(false);
        }
        let read = self.cipher.document_behind(&self.backend, name, &current.path);
        let Ok(Ok(document)) = tokio::time::timeout(TIMEOUT, read).await else { return Ok(false) };
        let path = ContentPath::of(&document.cid);
        let is_own = path == known.path || known.encryption().is_some_and(|before| before.document == path);
        if is_own && document.encryption.is_some() {
            tracing::info!(%key, path = %current.path, "the record has the host's own document, encrypted with another key");
            let (key, path) = (key.clone(), current.path.clone());
            self.commit.write(move |write| names::attempt(write, &key, &path)).await?;
            return Ok(true);
        }
        Ok(false)
    }
}

/// The path and the encryption of the published file, if it encrypts the present document for `group`.
fn published_form<'a>(known: &'a Known, group: &GroupName) -> Option<(&'a ContentPath, &'a Encryption)> {
    let published = known.published.as_ref()?;
    let encryption = published.encryption.as_ref()?;
    (encryption.document == known.path && encryption.group == *group).then_some((&published.path, encryption))
}

/// Encrypts a document with each of several keys. Returns the paths and the files.
async fn encrypt(keys: Vec<DocumentKey>, name: &IpnsName, document: Vec<u8>) -> Vec<(ContentPath, Bytes)> {
    let name = name.clone();
    let encrypt = move || {
        let file_of = |key: &DocumentKey| {
            let file = key.encrypt(&name, &document);
            (ContentPath::of(&unixfs::file_cid(&file)), Bytes::from(file))
        };
        keys.iter().map(file_of).collect()
    };
    tokio::task::spawn_blocking(encrypt).await.expect("an encryption does not panic")
}
