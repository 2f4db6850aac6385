//! `/v1/keys`: which keys the host has, where their private halves are, and how it forgets one.

use std::collections::BTreeMap;

use axum::Json;
use axum::body::Bytes;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::extract::{Current, Path, Plain, Query};
use super::openapi::{Binary, Conflict, Missing, Refused};
use super::status::OnHold;
use super::{ApiError, to_its_end};
use crate::host::{Forgotten, Host, PrivateKey};
use crate::ident::{ContentPath, IpnsName, KeyName, PluginName};
use crate::keys::Key;
use crate::store::names;

/// A key of the host, and what is published under it.
#[derive(Debug, Serialize, ToSchema)]
pub struct ListedKey {
    /// The operator's word for it.
    key: KeyName,
    /// The name that belongs to it; null if the key is gone.
    #[schema(required)]
    name: Option<IpnsName>,
    /// Where its private half is; null if the key is gone.
    #[schema(required)]
    held_by: Option<Holder>,
    /// The plugins that publish under it or read it.
    #[schema(value_type = Vec<String>)]
    used_by: Vec<PluginName>,
    /// What the host has the name point to; null if it has no value.
    #[schema(required)]
    path: Option<ContentPath>,
    /// Whether the backend has accepted the newest value.
    published: bool,
    /// Why nothing is published under the name until the operator decides; null if nothing keeps it.
    #[schema(required)]
    hold: Option<OnHold>,
}

/// Where the private half of a key is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Holder {
    /// In the state directory, and so in backups.
    Host,
    /// In the daemon alone: the key was adopted, and no backup has it.
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

/// The keys of the host, and what is published under each.
#[utoipa::path(get, path = "/keys", tag = "names", operation_id = "list_keys",
    responses((status = 200, body = [ListedKey])))]
pub async fn list(Current(host): Current) -> Result<Json<Vec<ListedKey>>, ApiError> {
    Ok(Json(listed(&host)?))
}

fn listed(host: &Host) -> Result<Vec<ListedKey>, ApiError> {
    let mut known: BTreeMap<_, _> =
        names::all(&host.store.snapshot()?)?.into_iter().map(|(key, known)| (key, Some(known))).collect();
    let keys: BTreeMap<_, _> = host.keys.all().into_iter().collect();
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
            path: known.as_ref().map(|known| known.path.clone()),
            hold: known.and_then(|known| known.hold).map(OnHold::from),
            key,
        }
    };
    Ok(known.into_iter().map(describe).collect())
}

/// A key whose private half the host has.
#[derive(Debug, Serialize, ToSchema)]
pub struct TakenKey {
    /// The key.
    key: KeyName,
    /// The name that belongs to it.
    name: IpnsName,
    /// Where its private half is: here.
    held_by: Holder,
}

/// Takes the private half of an adopted key, as `ipfs key export` writes it.
///
/// From then on the key is the host's own: backups have it, and the host puts it again into a daemon that has lost it.
/// The body is the file, in the format libp2p-protobuf-cleartext or, for Ed25519, pem-pkcs8-cleartext. A key of another
/// name is refused with 409.
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
    let (keys, taken) = (host.keys.clone(), key.clone());
    let name = tokio::task::spawn_blocking(move || keys.take_private(&taken, &file)).await;
    let name = name.expect("taking a key does not panic")?;
    tracing::info!(%key, %name, "the host has the private half of the key");
    // It may wait for this.
    host.commit.names.notify_one();
    Ok(Json(TakenKey { key, name, held_by: Holder::Host }))
}

/// What is forgotten.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Forget {
    /// Whether a private key that the host has made is deleted. Without it such a key is refused with 409.
    #[serde(default)]
    delete_key: bool,
}

/// Forgets a name of the host: its value, its hold and its key.
///
/// Nothing is deleted in the daemon and nothing is published: the record there stays valid for its lifetime, and the
/// last document stays pinned. A key that a plugin uses is refused with 409.
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
