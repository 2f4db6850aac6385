//! Owns the list of `/v1/keys`, the import of private keys and the removal of keys.

use std::collections::BTreeMap;

use axum::Json;
use axum::body::Bytes;
use dim_ipfs::keys::Key;
use dim_model::ident::{ContentPath, GroupName, IpnsName, KeyName, PluginName};
use dim_server::host::{Forgotten, Host, PrivateKey};
use dim_store::names;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::extract::{Current, Path, Plain, Query};
use crate::openapi::{Binary, Conflict, Missing, Refused};
use crate::status::OnHold;
use crate::{ApiError, to_its_end};

/// A key of the host, and the value of its name.
#[derive(Debug, Serialize, ToSchema)]
pub struct ListedKey {
    /// The name of the key, given by the operator.
    key: KeyName,
    /// The IPNS name; null if the key does not exist any more.
    #[schema(required)]
    name: Option<IpnsName>,
    /// The holder of the private key; null if the key does not exist any more.
    #[schema(required)]
    held_by: Option<Holder>,
    /// The plugins that publish under it or read it.
    #[schema(value_type = Vec<String>)]
    used_by: Vec<PluginName>,
    /// The path that the host publishes; null if the name has no value.
    #[schema(required)]
    path: Option<ContentPath>,
    /// Whether the backend has accepted the newest value.
    published: bool,
    /// The group that reads the published document, if it is encrypted.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String, nullable = false, required = false)]
    encrypted: Option<GroupName>,
    /// The hold of the name; null if it is not on hold.
    #[schema(required)]
    hold: Option<OnHold>,
}

/// The holder of a private key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Holder {
    /// The host: the key is in the state directory and in backups.
    Host,
    /// The daemon alone: the key was adopted and is in no backup.
    Daemon,
}

impl From<&Key> for Holder {
    fn from(key: &Key) -> Self {
        match key {
            Key::Own(_) => Self::Host,
            Key::Adopted(_) => Self::Daemon,
        }
    }
}

/// Lists the keys of the host, and the value of each name.
#[utoipa::path(get, path = "/keys", tag = "names", operation_id = "list_keys",
    responses((status = 200, body = [ListedKey])))]
pub async fn list(Current(host): Current) -> Result<Json<Vec<ListedKey>>, ApiError> {
    Ok(Json(listed(&host)?))
}

fn listed(host: &Host) -> Result<Vec<ListedKey>, ApiError> {
    let mut known: BTreeMap<_, _> = names::all(&host.storage.store.snapshot()?)?
        .into_iter()
        .map(|(key, known)| (key, Some(known)))
        .collect();
    let keys: BTreeMap<_, _> = host.storage.keys.all().into_iter().collect();
    for key in keys.keys() {
        known.entry(key.clone()).or_insert(None);
    }
    let describe = |(key, known): (KeyName, Option<names::Known>)| {
        let held = keys.get(&key);
        ListedKey {
            name: held.map(Key::name),
            held_by: held.map(Holder::from),
            used_by: host.users(&key),
            published: known.as_ref().is_some_and(names::Known::is_published),
            path: known.as_ref().map(|known| known.visible_path().clone()),
            encrypted: known.as_ref().and_then(names::Known::encryption).map(|it| it.group.clone()),
            hold: known.and_then(|known| known.hold).map(OnHold::from),
            key,
        }
    };
    Ok(known.into_iter().map(describe).collect())
}

/// A key whose private key the host holds.
#[derive(Debug, Serialize, ToSchema)]
pub struct TakenKey {
    /// The key.
    key: KeyName,
    /// The IPNS name of the key.
    name: IpnsName,
    /// The holder of the private key, which is the host.
    held_by: Holder,
}

/// Imports the private key of an adopted key, in the format of `ipfs key export`.
///
/// The key becomes the host's own. Backups contain it, and the host restores it in a daemon that has lost it. The
/// body is the file, in the format libp2p-protobuf-cleartext or, for Ed25519, pem-pkcs8-cleartext. A private key of
/// another name is refused with 409.
#[utoipa::path(put, path = "/keys/{key}/private", tag = "names", operation_id = "import_key",
    params(("key" = KeyName, Path, description = "The key")),
    request_body(content = inline(Binary), content_type = "application/octet-stream"),
    responses((status = 200, body = TakenKey), Missing, Conflict, Refused))]
pub async fn import(
    Current(host): Current,
    Path(key): Path<String>,
    Plain(file): Plain<Bytes>,
) -> Result<Json<TakenKey>, ApiError> {
    let key: KeyName = key.parse()?;
    let (keys, taken) = (host.storage.keys.clone(), key.clone());
    let name = tokio::task::spawn_blocking(move || keys.take_private(&taken, &file)).await;
    let name = name.expect("taking a key does not panic")?;
    tracing::info!(%key, %name, "the host has the private half of the key");
    // A publication may be waiting for the private key.
    host.storage.commit.names.notify_one();
    Ok(Json(TakenKey { key, name, held_by: Holder::Host }))
}

/// The options of the removal of a key.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Forget {
    /// Whether to delete a private key that the host has made. Without it such a key is refused with 409.
    #[serde(default)]
    delete_key: bool,
}

/// Removes a name from the host: its value, its hold and its key.
///
/// The host deletes nothing in the daemon and publishes nothing. The record there stays valid for its lifetime, and
/// the last document stays pinned. A key that a plugin uses is refused with 409.
#[utoipa::path(delete, path = "/keys/{key}", tag = "names", operation_id = "forget_key",
    params(("key" = KeyName, Path, description = "The key"), Forget),
    responses((status = 200, body = Forgotten), Missing, Conflict))]
pub async fn forget(
    Current(host): Current,
    Path(key): Path<String>,
    Query(Forget { delete_key }): Query<Forget>,
) -> Result<Json<Forgotten>, ApiError> {
    let key = key.parse()?;
    let private = if delete_key { PrivateKey::Delete } else { PrivateKey::Keep };
    Ok(Json(to_its_end(async move { host.forget(&key, private).await }).await?))
}
