//! `/v1/keys` and `/v1/names`: the host's own names, and reading any name.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::extract::{Body, Current, Path, Plain, Query};
use super::openapi::{Binary, Conflict, Missing, Refused, TooLarge};
use super::{ApiError, to_its_end};
use crate::commit::NameChange;
use crate::effect::{LIFETIME, LIFETIMES, NameUpdate, NameValue};
use crate::entry::Resolution;
use crate::host::{Adopted, Adoption, Host};
use crate::ident::{ContentPath, IpnsName, KeyName};
use crate::plugin::{DOCUMENT_BYTES, NameOrKey};
use crate::store::names::{self, Known};
use crate::store::{documents, followed};
use crate::time::Timestamp;

/// How long a caller waits for the backend to accept a name; it goes on afterwards.
const PATIENCE: Duration = Duration::from_secs(20);

/// A key of the host.
#[derive(Debug, Serialize, ToSchema)]
pub struct Key {
    /// The operator's word for it.
    key: KeyName,
    /// The name that belongs to it.
    name: IpnsName,
}

/// The name that belongs to a key.
#[utoipa::path(get, path = "/keys/{key}", tag = "names", operation_id = "get_key",
    params(("key" = KeyName, Path, description = "The key")),
    responses((status = 200, body = Key), Missing))]
pub async fn key_id(Current(host): Current, Path(key): Path<String>) -> Result<Json<Key>, ApiError> {
    let key: KeyName = key.parse()?;
    let name = host.keys.name(&key).ok_or_else(|| ApiError::not_found(format!("there is no key {key}")))?;
    Ok(Json(Key { key, name }))
}

/// The name that belongs to a key, which is made if there is none.
#[utoipa::path(put, path = "/keys/{key}", tag = "names", operation_id = "make_key",
    params(("key" = KeyName, Path, description = "The key")), responses((status = 200, body = Key)))]
pub async fn make_key(Current(host): Current, Path(key): Path<String>) -> Result<Json<Key>, ApiError> {
    let key: KeyName = key.parse()?;
    let name = key_name(&host, &key).await?;
    Ok(Json(Key { key, name }))
}

async fn key_name(host: &Host, key: &KeyName) -> Result<IpnsName, ApiError> {
    if let Some(name) = host.keys.name(key) {
        return Ok(name);
    }
    // A key that the daemon has under this name is adopted; without the daemon one is made.
    let there = host.backend.names.keys().await.unwrap_or_default();
    if let Some((_, name)) = there.into_iter().find(|(name, _)| name == key) {
        host.keys.adopt(key, &name)?;
        return Ok(name);
    }
    Ok(host.keys.get_or_create(key)?.name())
}

/// What to publish.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = PathToPublish)]
pub struct Publish {
    /// What the name is to point to.
    path: ContentPath,
}

/// How to publish it.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct How {
    /// For how long the record is valid: a day if it is absent, a year at most. The host signs it anew
    /// at half of it.
    #[param(minimum = 60, maximum = 31_536_000)]
    lifetime_seconds: Option<u64>,
    /// Whether the value is published although a plugin publishes under the key (whoever reads the name takes it for
    /// the plugin's, until the plugin's next value takes its place), or the name is on hold, which it ends. Without it
    /// both are refused with 409.
    #[serde(default)]
    force: bool,
}

/// A name of the host that was given a new value.
#[derive(Debug, Serialize, ToSchema)]
pub struct Published {
    /// The key.
    key: KeyName,
    /// Its name.
    name: IpnsName,
    /// What the name points to.
    path: ContentPath,
    /// Counts the values of the name.
    sequence: u64,
    /// Whether the backend has accepted it. If not, the value is committed and the host goes on trying, unless the name
    /// is on hold.
    published: bool,
    /// Why the name is on hold: the value is committed, and nothing is published until the operator decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    hold: Option<String>,
}

/// Points a key's name at a path. The key is made if there is none.
///
/// The answer comes once the value is committed and the backend has accepted it, or after 20 s without.
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

/// Stores the body as a file and points a key's name at it. The key is made if there is none.
///
/// At most 16 MiB, whatever its content type. The answer comes as it does for a path.
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
        return Err(ApiError::invalid("a lifetime lies between one minute and one year"));
    }
    if !how.force {
        refuse_what_plugins_write(host, &key).await?;
        refuse_what_is_on_hold(host, &key)?;
    }
    let name = key_name(host, &key).await?;
    if how.force {
        // What is not known to be on hold cannot be released.
        host.looked_at(&key).await;
    }
    let update = NameUpdate { name: name.clone(), value, lifetime };
    host.commit.change_name(NameChange::Own { key: key.clone(), update }).await?;
    if how.force {
        let released = key.clone();
        host.commit.write(move |write| names::release(write, &released, Timestamp::wall())).await?;
        host.commit.names.notify_one();
    }
    let known = published(host, &key).await?;
    let (published, hold) =
        (known.is_published(), known.hold.as_ref().map(|hold| hold.explain(&key, host.key_use(&key))));
    Ok(Json(Published { key, name, path: known.path, sequence: known.sequence, published, hold }))
}

/// What a plugin publishes is what its fleet reads: a value from elsewhere takes its place only if that is meant.
async fn refuse_what_plugins_write(host: &Arc<Host>, key: &KeyName) -> Result<(), ApiError> {
    host.all_loaded().await;
    match host.writers(key).first() {
        None => Ok(()),
        Some(plugin) => Err(ApiError::conflict(format!(
            "plugin {plugin} publishes under the key {key}, and whoever reads the name would take this value for the plugin's: use another key, or `force` (--force) to have it stand until the plugin's next value"
        ))),
    }
}

/// Nothing is published under a name that points to what the host does not know, unless that is meant.
fn refuse_what_is_on_hold(host: &Host, key: &KeyName) -> Result<(), ApiError> {
    let known = names::known(&host.store.snapshot()?, key)?;
    match known.and_then(|known| known.hold) {
        None => Ok(()),
        Some(hold) => {
            Err(ApiError::conflict(format!("{key} is on hold: {}", hold.explain(key, host.key_use(key)))))
        }
    }
}

/// What becomes of what somebody else has published.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Adopt {
    /// What becomes of it.
    how: Adoption,
}

/// Decides what becomes of a document that somebody else has published under a key of the host.
///
/// The host publishes nothing under such a name until this is decided. With `import` the plugins that import the
/// documents of the key take its content over first; with `replace` it is overwritten.
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

/// Waits a while for the backend to accept the newest value.
async fn published(host: &Host, key: &KeyName) -> Result<Known, ApiError> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let known = names::known(&host.store.snapshot()?, key)?.ok_or_else(|| ApiError::not_found(key))?;
        if known.is_published() || known.hold.is_some() || tokio::time::Instant::now() >= deadline {
            return Ok(known);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What is known of a name.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Resolution)]
pub struct Resolved {
    /// The name.
    name: IpnsName,
    /// What it points to.
    path: ContentPath,
    /// The record's sequence; of an own name the count of its values.
    sequence: u64,
    /// When the record stops being valid.
    valid_until: Timestamp,
    /// When the backend last had this record; long ago means stale.
    confirmed_at: Timestamp,
}

impl From<Resolution> for Resolved {
    fn from(known: Resolution) -> Self {
        let Resolution { name, path, sequence, valid_until, confirmed_at } = known;
        Self { name, path, sequence, valid_until, confirmed_at }
    }
}

/// What a name, or a key's name, points to.
#[utoipa::path(get, path = "/names/{name}", tag = "names", operation_id = "resolve_name",
    params(("name", description = "A name, in any form that IPFS knows, or a key of the host")),
    responses((status = 200, body = Resolved), Missing))]
pub async fn resolve(Current(host): Current, Path(name): Path<String>) -> Result<Json<Resolved>, ApiError> {
    Ok(Json(resolution(&host, &name).await?.into()))
}

/// The file behind a name, or behind a key's name.
#[utoipa::path(get, path = "/names/{name}/state", tag = "names", operation_id = "get_state",
    params(("name", description = "A name, in any form that IPFS knows, or a key of the host")),
    responses((status = 200, description = "Its bytes, 16 MiB at most",
        body = inline(Binary), content_type = "application/octet-stream"), Missing))]
pub async fn get_state(Current(host): Current, Path(name): Path<String>) -> Result<Response, ApiError> {
    let known = resolution(&host, &name).await?;
    let held = documents::get(&host.store.snapshot()?, &known.path)?;
    let data = match held {
        Some(data) => Bytes::from(data),
        None => {
            let path = host.backend.end_of_chain(known.path).await?;
            host.backend.content.file(&path, DOCUMENT_BYTES).await?.1
        }
    };
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], data).into_response())
}

async fn resolution(host: &Host, text: &str) -> Result<Resolution, ApiError> {
    let name = match text.parse::<NameOrKey>()? {
        NameOrKey::Name(name) => name,
        NameOrKey::Key(key) => {
            host.keys.name(&key).ok_or_else(|| ApiError::not_found(format!("the host has no key {key}")))?
        }
    };
    let own = host.keys.all().into_iter().find(|(_, key)| key.name() == name);
    if let Some((key, _)) = own
        && let Some(known) = names::known(&host.store.snapshot()?, &key)?
        // What is held back is not what the name points to.
        && known.hold.is_none()
    {
        return Ok(known.resolution(name));
    }
    // A followed name is asked for in the background; how old the answer is stands in it.
    let known = followed::known(&host.store.snapshot()?, &name)?.map(|known| known.resolution);
    if let Some(known) = known.clone().filter(|_| host.interest.names().contains(&name)) {
        return Ok(known);
    }
    let record = match (host.backend.record(&name).await, known) {
        (Ok(record), _) => record,
        (Err(_), Some(known)) => return Ok(known),
        (Err(error), None) => return Err(error.into()),
    };
    Ok(Resolution {
        name,
        path: record.path,
        sequence: record.sequence,
        valid_until: record.validity,
        confirmed_at: Timestamp::wall(),
    })
}
