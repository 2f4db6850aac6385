//! Owns the values of `/v1/keys` and `/v1/names`: publishes under the host's own names, decides about names on hold,
//! and resolves any name.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use dim_model::entry::Resolution;
use dim_model::ident::{ContentPath, IpnsName, KeyName};
use dim_model::time::Timestamp;
use dim_server::host::{Adopted, Adoption, Host};
use dim_store::commit::NameChange;
use dim_store::documents;
use dim_store::effect::{LIFETIME, LIFETIMES, NameUpdate, NameValue};
use dim_store::followed_names::{self, Followed};
use dim_store::grants::NameOrKey;
use dim_store::names::{self, Known};
use dim_store::plugin_limits::DOCUMENT_BYTES;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::extract::{Body, Current, Path, Plain, Query};
use crate::openapi::{Binary, Conflict, Missing, Refused, TooLarge};
use crate::{ApiError, to_its_end};

/// The maximum time that a caller waits for the backend to accept a value. The host continues to try afterwards.
const PATIENCE: Duration = Duration::from_secs(20);

/// A key of the host.
#[derive(Debug, Serialize, ToSchema)]
pub struct Key {
    /// The name of the key, given by the operator.
    key: KeyName,
    /// The IPNS name of the key.
    name: IpnsName,
}

/// Shows the IPNS name of a key.
#[utoipa::path(get, path = "/keys/{key}", tag = "names", operation_id = "get_key",
    params(("key" = KeyName, Path, description = "The key")),
    responses((status = 200, body = Key), Missing))]
pub async fn key_id(Current(host): Current, Path(key): Path<String>) -> Result<Json<Key>, ApiError> {
    let key: KeyName = key.parse()?;
    let name =
        host.storage.keys.name(&key).ok_or_else(|| ApiError::not_found(format!("there is no key {key}")))?;
    Ok(Json(Key { key, name }))
}

/// Shows the IPNS name of a key. The key is made if it does not exist.
#[utoipa::path(put, path = "/keys/{key}", tag = "names", operation_id = "make_key",
    params(("key" = KeyName, Path, description = "The key")), responses((status = 200, body = Key)))]
pub async fn make_key(Current(host): Current, Path(key): Path<String>) -> Result<Json<Key>, ApiError> {
    let key: KeyName = key.parse()?;
    let name = key_name(&host, &key).await?;
    Ok(Json(Key { key, name }))
}

async fn key_name(host: &Host, key: &KeyName) -> Result<IpnsName, ApiError> {
    if let Some(name) = host.storage.keys.name(key) {
        return Ok(name);
    }
    // The daemon's key of this name is adopted. If the daemon does not answer, a new key is made.
    let there = host.exchange.links.backend.names.keys().await.unwrap_or_default();
    if let Some((_, name)) = there.into_iter().find(|(name, _)| name == key) {
        host.storage.keys.adopt(key, &name)?;
        return Ok(name);
    }
    Ok(host.storage.keys.get_or_create(key)?.name())
}

/// The path to publish.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = PathToPublish)]
pub struct Publish {
    /// The path that the name will point to.
    path: ContentPath,
}

/// The options of a publication.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct How {
    /// The lifetime of the record in seconds: at most a year, default a day. The host signs the record again after
    /// half of it.
    #[param(minimum = 60, maximum = 31_536_000)]
    lifetime_seconds: Option<u64>,
    /// Whether to publish although a plugin publishes under the key or the name is on hold. Readers take the value
    /// for the plugin's until the plugin's next value replaces it, and the hold ends. Without it both cases are
    /// refused with 409.
    #[serde(default)]
    force: bool,
}

/// A new value of a name of the host.
#[derive(Debug, Serialize, ToSchema)]
pub struct Published {
    /// The key.
    key: KeyName,
    /// The IPNS name.
    name: IpnsName,
    /// The path that the name points to.
    path: ContentPath,
    /// The number of the value.
    sequence: u64,
    /// Whether the backend has accepted the value. If false, the value is committed and the host continues to try,
    /// unless the name is on hold.
    published: bool,
    /// The reason why the name is on hold. The value is committed, and the host publishes nothing until the operator
    /// decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    hold: Option<String>,
}

/// Points a key's name at a path. The key is made if it does not exist.
///
/// The answer comes once the value is committed and the backend has accepted it, or after 20 s without the backend.
#[utoipa::path(put, path = "/keys/{key}/path", tag = "names", operation_id = "publish_path",
    params(("key" = KeyName, Path, description = "The key"), How),
    request_body = Publish, responses((status = 200, body = Published), Conflict, Refused))]
pub async fn publish(
    Current(host): Current,
    Path(key): Path<String>,
    Query(how): Query<How>,
    Body(body): Body<Publish>,
) -> Result<Json<Published>, ApiError> {
    set(&host, key.parse()?, NameValue::Path(body.path), &how).await
}

/// Stores the body as a file and points a key's name at it. The key is made if it does not exist.
///
/// The body has at most 16 MiB and any content type. The answer comes as for a path.
#[utoipa::path(put, path = "/keys/{key}/state", tag = "names", operation_id = "update_state",
    params(("key" = KeyName, Path, description = "The key"), How),
    request_body(content = inline(Binary), content_type = "application/octet-stream"),
    responses((status = 200, body = Published), Conflict, TooLarge))]
pub async fn update_state(
    Current(host): Current,
    Path(key): Path<String>,
    Query(how): Query<How>,
    Plain(data): Plain<Bytes>,
) -> Result<Json<Published>, ApiError> {
    if data.len() > DOCUMENT_BYTES {
        return Err(ApiError::too_large(format!(
            "the document has {} bytes; {DOCUMENT_BYTES} are the limit",
            data.len()
        )));
    }
    let value = tokio::task::spawn_blocking(|| NameValue::document(data)).await;
    set(&host, key.parse()?, value.map_err(ApiError::invalid)?, &how).await
}

async fn set(
    host: &Arc<Host>,
    key: KeyName,
    value: NameValue,
    how: &How,
) -> Result<Json<Published>, ApiError> {
    let lifetime = how.lifetime_seconds.map_or(LIFETIME, Duration::from_secs);
    if !LIFETIMES.contains(&lifetime) {
        return Err(ApiError::invalid("a lifetime must be between one minute and one year"));
    }
    if !how.force {
        refuse_what_plugins_write(host, &key).await?;
        refuse_what_is_on_hold(host, &key)?;
    }
    let name = key_name(host, &key).await?;
    if how.force {
        // A hold can be released only after the host knows the published record.
        host.looked_at(&key).await;
    }
    let update = NameUpdate { name: name.clone(), value, lifetime };
    host.storage.commit.change_name(NameChange::Own { key: key.clone(), update }).await?;
    if how.force {
        let released = key.clone();
        host.storage.commit.write(move |write| names::release(write, &released, Timestamp::wall())).await?;
        host.storage.commit.names.notify_one();
    }
    let known = published(host, &key).await?;
    let (published, hold) =
        (known.is_published(), known.hold.as_ref().map(|hold| hold.explain(&key, host.key_use(&key))));
    let path = known.visible_path().clone();
    Ok(Json(Published { key, name, path, sequence: known.sequence, published, hold }))
}

/// Refuses a key under which a plugin publishes: readers would take the value for the plugin's.
async fn refuse_what_plugins_write(host: &Arc<Host>, key: &KeyName) -> Result<(), ApiError> {
    host.all_loaded().await;
    match host.writers(key).first() {
        None => Ok(()),
        Some(plugin) => Err(ApiError::conflict(format!(
            "plugin {plugin} publishes under the key {key}, and readers of the name would take this value for the plugin's: use another key, or `force` (--force) to publish it until the plugin's next value"
        ))),
    }
}

/// Refuses a key whose name is on hold.
fn refuse_what_is_on_hold(host: &Host, key: &KeyName) -> Result<(), ApiError> {
    let known = names::known(&host.storage.store.snapshot()?, key)?;
    match known.and_then(|known| known.hold) {
        None => Ok(()),
        Some(hold) => {
            Err(ApiError::conflict(format!("{key} is on hold: {}", hold.explain(key, host.key_use(key)))))
        }
    }
}

/// The decision about a document that another writer published.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Adopt {
    /// The decision.
    how: Adoption,
}

/// Decides about a document that another writer published under a key of the host.
///
/// The host publishes nothing under such a name until the decision. With `import` the plugins that import documents
/// of the key take over its content first; with `replace` the host overwrites it.
#[utoipa::path(post, path = "/keys/{key}/adopt", tag = "names", operation_id = "adopt_name",
    params(("key" = KeyName, Path, description = "The key")),
    request_body = Adopt, responses((status = 200, body = Adopted), Conflict, Refused))]
pub async fn adopt(
    Current(host): Current,
    Path(key): Path<String>,
    Body(Adopt { how }): Body<Adopt>,
) -> Result<Json<Adopted>, ApiError> {
    let key = key.parse()?;
    Ok(Json(to_its_end(async move { host.adopt(&key, how).await }).await?))
}

/// Waits at most [`PATIENCE`] for the backend to accept the newest value.
async fn published(host: &Host, key: &KeyName) -> Result<Known, ApiError> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let known =
            names::known(&host.storage.store.snapshot()?, key)?.ok_or_else(|| ApiError::not_found(key))?;
        if known.is_published() || known.hold.is_some() || tokio::time::Instant::now() >= deadline {
            return Ok(known);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The resolution of a name.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Resolution)]
pub struct Resolved {
    /// The IPNS name.
    name: IpnsName,
    /// The path that it points to.
    path: ContentPath,
    /// The sequence number of the record; for an own name the number of its value.
    sequence: u64,
    /// The time at which the record stops being valid.
    valid_until: Timestamp,
    /// The time at which the backend last had this record. A time long ago means that the record is stale.
    confirmed_at: Timestamp,
}

impl From<Resolution> for Resolved {
    fn from(known: Resolution) -> Self {
        let Resolution { name, path, sequence, valid_until, confirmed_at } = known;
        Self { name, path, sequence, valid_until, confirmed_at }
    }
}

/// Resolves a name, or the name of a key.
#[utoipa::path(get, path = "/names/{name}", tag = "names", operation_id = "resolve_name",
    params(("name", description = "A name, in any form that IPFS knows, or a key of the host")),
    responses((status = 200, body = Resolved), Missing))]
pub async fn resolve(Current(host): Current, Path(name): Path<String>) -> Result<Json<Resolved>, ApiError> {
    Ok(Json(resolution(&host, &name).await?.0.into()))
}

/// Returns the document behind a name, or behind the name of a key.
///
/// A document that is encrypted for a group of the fleet is decrypted. Without its key the answer is 409.
#[utoipa::path(get, path = "/names/{name}/state", tag = "names", operation_id = "get_state",
    params(("name", description = "A name, in any form that IPFS knows, or a key of the host")),
    responses((status = 200, description = "Its bytes, 16 MiB at most",
        body = inline(Binary), content_type = "application/octet-stream"), Missing))]
pub async fn get_state(Current(host): Current, Path(name): Path<String>) -> Result<Response, ApiError> {
    let (Resolution { name, .. }, path) = resolution(&host, &name).await?;
    let held = documents::get(&host.storage.store.snapshot()?, &path)?;
    let data = match held {
        Some(data) => Bytes::from(data),
        None => {
            let backend = &host.exchange.links.backend;
            host.exchange.links.cipher.document_behind(backend, &name, &path).await?.data
        }
    };
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], data).into_response())
}

/// The resolution of a name with the path that other programs find, and the path of its document in the store of the
/// host. The paths differ if the published file is encrypted.
async fn resolution(host: &Host, text: &str) -> Result<(Resolution, ContentPath), ApiError> {
    let name = match text.parse::<NameOrKey>()? {
        NameOrKey::Name(name) => name,
        NameOrKey::Key(key) => host
            .storage
            .keys
            .name(&key)
            .ok_or_else(|| ApiError::not_found(format!("the host has no key {key}")))?,
    };
    if let Some(key) = host.storage.keys.key_of(&name)
        && let Some(known) = names::known(&host.storage.store.snapshot()?, &key)?
        // The value of a name on hold is not what the name points to.
        && known.hold.is_none()
    {
        let visible = Resolution { path: known.visible_path().clone(), ..known.resolution(name) };
        return Ok((visible, known.path));
    }
    // A followed name is resolved in the background; the answer contains its age.
    let known = followed_names::known(&host.storage.store.snapshot()?, &name)?;
    let with_path = |known: Followed| {
        let visible = Resolution { path: known.visible_path().clone(), ..known.resolution.clone() };
        (visible, known.resolution.path)
    };
    if let Some(known) = known.clone().filter(|_| host.exchange.links.interest.names().contains(&name)) {
        return Ok(with_path(known));
    }
    let record = match (host.exchange.links.backend.record(&name).await, known) {
        (Ok(record), _) => record,
        (Err(_), Some(known)) => return Ok(with_path(known)),
        (Err(error), None) => return Err(error.into()),
    };
    let resolution = Resolution {
        name,
        path: record.path.clone(),
        sequence: record.sequence,
        valid_until: record.validity,
        confirmed_at: Timestamp::wall(),
    };
    Ok((resolution, record.path))
}
