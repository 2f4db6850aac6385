//! `/v1/dead-letters`: what plugins could not handle.

use axum::Json;
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::ApiError;
use super::extract::{Current, Path, Query};
use crate::dead;
use crate::effect::DeadLetter;
use crate::ident::PluginName;
use crate::store;
use crate::time::Timestamp;

/// Most letters of one page.
const PAGE: usize = 1_000;

/// Bytes of an event's data in a list.
const IN_LIST: usize = 1_000;

/// Which letters are asked for.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    plugin: Option<PluginName>,
    after: Option<u64>,
    limit: Option<usize>,
}

/// Letters in the order in which they were set aside.
pub async fn list(Current(host): Current, Query(filter): Query<Filter>) -> Result<Json<Value>, ApiError> {
    let limit = filter.limit.unwrap_or(PAGE).min(PAGE);
    let letters = store::dead::list(&host.store, filter.plugin.as_ref(), filter.after, limit)?;
    Ok(Json(letters.iter().map(|(id, letter)| cut(describe(*id, letter))).collect()))
}

/// One letter.
pub async fn show(Current(host): Current, Path(id): Path<u64>) -> Result<Json<Value>, ApiError> {
    let letter = store::dead::get(&host.store, id)?.ok_or_else(|| missing(id))?;
    Ok(Json(describe(id, &letter)))
}

/// Gives a letter's event to its plugin again.
pub async fn replay(Current(host): Current, Path(id): Path<u64>) -> Result<StatusCode, ApiError> {
    let letter = store::dead::get(&host.store, id)?.ok_or_else(|| missing(id))?;
    if !host.plugins.contains_key(&letter.plugin) {
        return Err(ApiError::conflict(format!("plugin {} does not run: the letter stays", letter.plugin)));
    }
    if dead::replay(&host.commit, id).await? { Ok(StatusCode::ACCEPTED) } else { Err(missing(id)) }
}

/// Forgets a letter.
pub async fn remove(Current(host): Current, Path(id): Path<u64>) -> Result<StatusCode, ApiError> {
    if dead::drop_letter(&host.commit, id).await? { Ok(StatusCode::NO_CONTENT) } else { Err(missing(id)) }
}

fn missing(id: u64) -> ApiError {
    ApiError::not_found(format!("there is no dead letter {id}"))
}

/// A list says of a large event how it begins.
fn cut(mut letter: Value) -> Value {
    if let Some(data) = letter["event"]["data"].as_str().filter(|data| data.len() > IN_LIST) {
        letter["event"]["data"] = json!(data[..data.floor_char_boundary(IN_LIST)]);
        letter["event"]["cut"] = json!(true);
    }
    letter
}

fn describe(id: u64, letter: &DeadLetter) -> Value {
    let (kind, event) = letter.event.describe();
    json!({
        "id": id,
        "plugin": letter.plugin,
        "version": letter.version,
        "offset": letter.offset,
        "time": Timestamp(letter.time),
        "attempts": letter.attempts,
        "reason": letter.reason,
        "log": letter.log,
        "kind": kind,
        "event": event,
    })
}
