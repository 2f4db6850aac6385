//! `/v1/dead-letters`: what plugins could not handle.

use std::collections::BTreeSet;

use axum::Json;
use axum::http::StatusCode;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};

use super::extract::{Current, Path, Query};
use super::names::Resolved;
use super::openapi::{Conflict, Missing};
use super::{ApiError, rows};
use crate::cause::listed;
use crate::dead::{self, Fate};
use crate::effect::DeadLetter;
use crate::host::Host;
use crate::ident::{PluginName, Topic};
use crate::store;
use crate::store::dead::Filter;
use crate::time::{Since, Timestamp};

/// Most letters of one page.
const PAGE: usize = 1_000;

/// Bytes of an event's data in a list, and of the lines of a log and of a stack.
const IN_LIST: usize = 1_000;

/// Which letters are meant.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Meant {
    /// Letters of this plugin only
    plugin: Option<PluginName>,
    /// Letters of events on this topic only
    topic: Option<Topic>,
    /// Letters that were set aside at this time or later only
    since: Option<Since>,
}

impl Meant {
    fn filter(self, host: &Host) -> Filter {
        let Self { plugin, topic, since } = self;
        Filter { plugin, topic, since: since.map(|since| since.before(host.log.now())) }
    }
}

/// Which letters are asked for.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Page {
    /// Letters of this plugin only
    plugin: Option<PluginName>,
    /// Letters of events on this topic only
    topic: Option<Topic>,
    /// Letters that were set aside at this time or later only
    since: Option<Since>,
    /// Letters after the one with this id only: the last of the page before
    after: Option<u64>,
    /// How many at most; more than 1,000 are never told at once
    limit: Option<usize>,
}

/// A dead letter: an event that was set aside because a plugin could not handle it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = DeadLetter)]
pub struct Letter {
    /// Counts the letters of the host.
    id: u64,
    /// Which plugin could not handle it.
    plugin: PluginName,
    /// The plugin's version.
    version: String,
    /// The entry of the log that the event came from.
    offset: u64,
    /// When it was set aside.
    time: Timestamp,
    /// How often it was tried.
    attempts: u32,
    /// Why it was set aside.
    reason: String,
    /// Where the plugin trapped, if it did: its functions, innermost first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stack: Vec<String>,
    /// Set in a list, if the stack is so long that this is its beginning: how many functions it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    stack_lines: Option<usize>,
    /// What the plugin logged meanwhile.
    log: Vec<String>,
    /// Set in a list, if the log is so long that this is its beginning: how many lines it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    log_lines: Option<usize>,
    /// `message`, `timer`, `name-changed` or `gap`.
    kind: &'static str,
    /// The event.
    #[schema(value_type = DeadEvent)]
    event: Value,
}

/// The event of a dead letter, by its kind.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "the event describes itself")]
pub enum DeadEvent {
    /// A message.
    Message {
        /// Its topic.
        topic: Topic,
        /// Who sent it: `this host`, `plugin NAME` or `peer ID`.
        origin: String,
        /// What it says; what is not UTF-8 is replaced.
        data: String,
        /// How many bytes it has.
        bytes: usize,
        /// Set in a list, if it is so long that this is its beginning.
        #[schema(nullable = false)]
        cut: Option<bool>,
    },
    /// A timer that fell due.
    Timer {
        /// Its key.
        key: String,
        /// When it was due.
        due: Timestamp,
    },
    /// A followed name that changed.
    NameChanged(Resolved),
    /// A time for which the host may have missed messages.
    Gap {
        /// On which topic.
        topic: Topic,
        /// From when.
        since: Timestamp,
        /// Until when.
        until: Timestamp,
    },
}

/// Letters in the order in which they were set aside, in pages.
///
/// The next page begins after the last letter of this one; an empty page is the end. Of long data, of a long log and of a
/// long stack it has the beginning: one letter alone has all.
#[utoipa::path(get, path = "/dead-letters", tag = "dead letters", operation_id = "list_dead_letters",
    params(Page), responses((status = 200, body = [Letter])))]
pub async fn list(
    Current(host): Current,
    Query(Page { plugin, topic, since, after, limit }): Query<Page>,
) -> Result<Response, ApiError> {
    check_plugin(&host, plugin.as_ref()).await?;
    let filter = Meant { plugin, topic, since }.filter(&host);
    rows::list(limit.unwrap_or(PAGE).min(PAGE), move |rows| {
        if rows.room().is_continue() {
            store::dead::walk(&host.store, &filter, after, |id, letter| {
                rows.push(&cut(describe(id, letter)))
            })?;
        }
        Ok(())
    })
    .await
}

/// One letter.
#[utoipa::path(get, path = "/dead-letters/{id}", tag = "dead letters", operation_id = "get_dead_letter",
    params(("id", description = "The letter's id")), responses((status = 200, body = Letter), Missing))]
pub async fn show(Current(host): Current, Path(id): Path<u64>) -> Result<Json<Letter>, ApiError> {
    let letter = store::dead::get(&host.store, id)?.ok_or_else(|| missing(id))?;
    Ok(Json(describe(id, letter)))
}

/// Gives a letter's event to its plugin again.
///
/// If the plugin cannot handle it now either, it is set aside as another letter.
#[utoipa::path(post, path = "/dead-letters/{id}/replay", tag = "dead letters",
    operation_id = "replay_dead_letter", params(("id", description = "The letter's id")),
    responses((status = 202, description = "It is in the log again"), Missing, Conflict))]
pub async fn replay(Current(host): Current, Path(id): Path<u64>) -> Result<StatusCode, ApiError> {
    let letter = store::dead::get(&host.store, id)?.ok_or_else(|| missing(id))?;
    if host.plugins.get(&letter.plugin).is_none() {
        return Err(ApiError::conflict(format!("plugin {} does not run: the letter stays", letter.plugin)));
    }
    if dead::replay(&host.commit, id).await? { Ok(StatusCode::ACCEPTED) } else { Err(missing(id)) }
}

/// Forgets a letter.
#[utoipa::path(delete, path = "/dead-letters/{id}", tag = "dead letters", operation_id = "drop_dead_letter",
    params(("id", description = "The letter's id")), responses((status = 204), Missing))]
pub async fn remove(Current(host): Current, Path(id): Path<u64>) -> Result<StatusCode, ApiError> {
    if dead::drop_letter(&host.commit, id).await? { Ok(StatusCode::NO_CONTENT) } else { Err(missing(id)) }
}

/// With how many letters it was done.
#[derive(Debug, Serialize, ToSchema)]
pub struct Done {
    /// How many.
    count: u64,
}

/// Gives the events of all letters that are meant to their plugins again, but for plugins that do not run.
#[utoipa::path(post, path = "/dead-letters/replay", tag = "dead letters", operation_id = "replay_dead_letters",
    params(Meant), responses((status = 202, body = Done, description = "They are in the log again")))]
pub async fn replay_all(
    Current(host): Current,
    Query(meant): Query<Meant>,
) -> Result<(StatusCode, Json<Done>), ApiError> {
    check_plugin(&host, meant.plugin.as_ref()).await?;
    let count = dead::all(&host, meant.filter(&host), Fate::Replay).await?;
    Ok((StatusCode::ACCEPTED, Json(Done { count })))
}

/// Forgets all letters that are meant.
#[utoipa::path(delete, path = "/dead-letters", tag = "dead letters", operation_id = "drop_dead_letters",
    params(Meant), responses((status = 200, body = Done)))]
pub async fn remove_all(Current(host): Current, Query(meant): Query<Meant>) -> Result<Json<Done>, ApiError> {
    check_plugin(&host, meant.plugin.as_ref()).await?;
    Ok(Json(Done { count: dead::all(&host, meant.filter(&host), Fate::Drop).await? }))
}

/// Refuses a plugin that does not exist and has left no letter: a slip of the finger is no empty list.
async fn check_plugin(host: &Host, plugin: Option<&PluginName>) -> Result<(), ApiError> {
    let Some(plugin) = plugin else { return Ok(()) };
    let mut names: BTreeSet<PluginName> = host.plugins.all().into_keys().collect();
    names.extend(host.not_loaded().into_iter().map(|refused| refused.name));
    names.extend(host.loading());
    names.extend(host.config.now().plugins.keys().cloned());
    names.extend(host.changes().under_way().into_keys());
    let of_plugin = Filter { plugin: Some(plugin.clone()), ..Filter::default() };
    let store = host.store.clone();
    let left_one = tokio::task::spawn_blocking(move || store::dead::list(&store, &of_plugin, None, 1));
    if names.contains(plugin) || !left_one.await.expect("reading does not panic")?.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = names.iter().map(ToString::to_string).collect();
    Err(ApiError::invalid(format!("there is no plugin {plugin}; there are {}", listed(&names))))
}

fn missing(id: u64) -> ApiError {
    ApiError::not_found(format!("there is no dead letter {id}"))
}

/// A list says of a large event, of a long log and of a long stack how they begin.
fn cut(mut letter: Letter) -> Letter {
    if let Some(data) = letter.event["data"].as_str().filter(|data| data.len() > IN_LIST) {
        letter.event["data"] = json!(data[..data.floor_char_boundary(IN_LIST)]);
        letter.event["cut"] = json!(true);
    }
    letter.log_lines = cut_lines(&mut letter.log);
    letter.stack_lines = cut_lines(&mut letter.stack);
    letter
}

/// Leaves as much of the first lines as a list has; returns how many there were, if something is missing.
fn cut_lines(lines: &mut Vec<String>) -> Option<usize> {
    let (count, mut left) = (lines.len(), IN_LIST);
    for (number, line) in lines.iter_mut().enumerate() {
        if line.len() > left {
            line.truncate(line.floor_char_boundary(left));
            lines.truncate(number + 1);
            return Some(count);
        }
        left -= line.len();
    }
    None
}

fn describe(id: u64, letter: DeadLetter) -> Letter {
    let (kind, event) = letter.event.describe();
    let DeadLetter { plugin, version, offset, attempts, reason, stack, log, .. } = letter;
    let (time, stack_lines, log_lines) = (Timestamp(letter.time), None, None);
    Letter {
        id,
        plugin,
        version,
        offset,
        time,
        attempts,
        reason,
        stack,
        stack_lines,
        log,
        log_lines,
        kind,
        event,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_where_a_list_has_no_more() {
        let cut = |lines: &[usize]| {
            let mut lines: Vec<String> = lines.iter().map(|length| "x".repeat(*length)).collect();
            let count = cut_lines(&mut lines);
            (count, lines.iter().map(String::len).collect::<Vec<_>>())
        };
        assert_eq!(cut(&[400, 600]), (None, vec![400, 600]));
        assert_eq!(cut(&[400, 601, 5]), (Some(3), vec![400, 600]));
        assert_eq!(cut(&[1_000, 0, 1]), (Some(3), vec![1_000, 0, 0]));
        assert_eq!(cut(&[]), (None, vec![]));
    }
}
