//! Owns `/v1/dead-letters`: lists dead letters, and replays or drops them on the operator's order.

use std::collections::BTreeSet;

use axum::Json;
use axum::http::StatusCode;
use axum::response::Response;
use dim_model::error_chain::listed;
use dim_model::ident::{PluginName, Topic};
use dim_model::time::{Since, Timestamp};
use dim_server::dead_letters::{self, Fate};
use dim_server::host::Host;
use dim_store::dead_letters::Filter;
use dim_store::effect::DeadLetter;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};

use crate::extract::{Current, Path, Query};
use crate::names::Resolved;
use crate::openapi::{Conflict, Missing};
use crate::{ApiError, row_list};

/// The maximum number of letters of a page.
const PAGE: usize = 1_000;

/// The maximum size of an event's data, of log lines and of a stack in a list, in bytes each.
const IN_LIST: usize = 1_000;

/// The filter of an order about dead letters.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Meant {
    /// Only letters of this plugin
    plugin: Option<PluginName>,
    /// Only letters of events on this topic
    topic: Option<Topic>,
    /// Only letters from this time or later
    since: Option<Since>,
}

impl Meant {
    fn filter(self, host: &Host) -> Filter {
        let Self { plugin, topic, since } = self;
        Filter { plugin, topic, since: since.map(|since| since.before(host.storage.log.now())) }
    }
}

/// The filter and the page of a list of dead letters.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Page {
    /// Only letters of this plugin
    plugin: Option<PluginName>,
    /// Only letters of events on this topic
    topic: Option<Topic>,
    /// Only letters from this time or later
    since: Option<Since>,
    /// Only letters after the one with this id, which is the last one of the page before
    after: Option<u64>,
    /// The maximum number of letters, at most 1,000
    limit: Option<usize>,
}

/// A dead letter: an event that a plugin could not handle.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = DeadLetter)]
pub struct Letter {
    /// The number of the letter on this host.
    id: u64,
    /// The plugin that could not handle the event.
    plugin: PluginName,
    /// The version of the plugin.
    version: String,
    /// The offset of the entry with the event.
    offset: u64,
    /// The time at which the letter was made.
    time: Timestamp,
    /// The number of attempts.
    attempts: u32,
    /// The reason.
    reason: String,
    /// The stack of the plugin if it trapped: its functions, innermost first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stack: Vec<String>,
    /// The number of functions of the stack. Present in a list if the stack is cut.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    stack_lines: Option<usize>,
    /// The lines that the plugin logged meanwhile.
    log: Vec<String>,
    /// The number of lines of the log. Present in a list if the log is cut.
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
        /// The topic.
        topic: Topic,
        /// The sender: `this host`, `plugin NAME` or `peer ID`.
        origin: String,
        /// The content; bytes that are not UTF-8 are replaced.
        data: String,
        /// The size of the content, in bytes.
        bytes: usize,
        /// Present in a list if the content is cut.
        #[schema(nullable = false)]
        cut: Option<bool>,
    },
    /// A timer that became due.
    Timer {
        /// The key of the timer.
        key: String,
        /// The time at which it was due.
        due: Timestamp,
    },
    /// A followed name that changed.
    NameChanged(Resolved),
    /// A span of time in which the host may have missed messages.
    Gap {
        /// The topic.
        topic: Topic,
        /// The start of the span.
        since: Timestamp,
        /// The end of the span.
        until: Timestamp,
        /// On a reliable topic: the events of a member that cannot be had.
        #[schema(nullable = false)]
        missing: Option<MissingEvents>,
    },
}

/// Consecutive events of a member that cannot be had.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the event describes itself")]
pub struct MissingEvents {
    /// The writer, by the IPNS name of its key.
    writer: String,
    /// The process start of the writer, in hex.
    incarnation: String,
    /// The sequence of the first missing event.
    first: u64,
    /// The sequence after the last missing event.
    next: u64,
}

/// Lists dead letters in the order of their creation, in pages.
///
/// The next page begins after the last letter of this one. An empty page is the end. Long data, logs and stacks are
/// cut; the letter itself has all of them.
#[utoipa::path(get, path = "/dead-letters", tag = "dead letters", operation_id = "list_dead_letters",
    params(Page), responses((status = 200, body = [Letter])))]
pub async fn list(
    Current(host): Current,
    Query(Page { plugin, topic, since, after, limit }): Query<Page>,
) -> Result<Response, ApiError> {
    check_plugin(&host, plugin.as_ref()).await?;
    let filter = Meant { plugin, topic, since }.filter(&host);
    row_list::list(limit.unwrap_or(PAGE).min(PAGE), move |rows| {
        if rows.room().is_continue() {
            dim_store::dead_letters::walk(&host.storage.store, &filter, after, |id, letter| {
                rows.push(&cut(describe(id, letter)))
            })?;
        }
        Ok(())
    })
    .await
}

/// Shows one letter.
#[utoipa::path(get, path = "/dead-letters/{id}", tag = "dead letters", operation_id = "get_dead_letter",
    params(("id", description = "The letter's id")), responses((status = 200, body = Letter), Missing))]
pub async fn show(Current(host): Current, Path(id): Path<u64>) -> Result<Json<Letter>, ApiError> {
    let letter = dim_store::dead_letters::get(&host.storage.store, id)?.ok_or_else(|| missing(id))?;
    Ok(Json(describe(id, letter)))
}

/// Replays a letter: its plugin gets the event again.
///
/// If the plugin cannot handle the event this time either, it becomes another letter.
#[utoipa::path(post, path = "/dead-letters/{id}/replay", tag = "dead letters",
    operation_id = "replay_dead_letter", params(("id", description = "The letter's id")),
    responses((status = 202, description = "The event is in the log again"), Missing, Conflict))]
pub async fn replay(Current(host): Current, Path(id): Path<u64>) -> Result<StatusCode, ApiError> {
    let letter = dim_store::dead_letters::get(&host.storage.store, id)?.ok_or_else(|| missing(id))?;
    if host.plugins.get(&letter.plugin).is_none() {
        return Err(ApiError::conflict(format!("plugin {} does not run: the letter stays", letter.plugin)));
    }
    if dead_letters::replay(&host.storage.commit, id).await? {
        Ok(StatusCode::ACCEPTED)
    } else {
        Err(missing(id))
    }
}

/// Drops a letter.
#[utoipa::path(delete, path = "/dead-letters/{id}", tag = "dead letters", operation_id = "drop_dead_letter",
    params(("id", description = "The letter's id")), responses((status = 204), Missing))]
pub async fn remove(Current(host): Current, Path(id): Path<u64>) -> Result<StatusCode, ApiError> {
    if dead_letters::drop_letter(&host.storage.commit, id).await? {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(missing(id))
    }
}

/// The number of letters that an order concerned.
#[derive(Debug, Serialize, ToSchema)]
pub struct Done {
    /// The number.
    count: u64,
}

/// Replays all letters that match the filter, except those of plugins that do not run.
#[utoipa::path(post, path = "/dead-letters/replay", tag = "dead letters", operation_id = "replay_dead_letters",
    params(Meant), responses((status = 202, body = Done, description = "The events are in the log again")))]
pub async fn replay_all(
    Current(host): Current,
    Query(meant): Query<Meant>,
) -> Result<(StatusCode, Json<Done>), ApiError> {
    check_plugin(&host, meant.plugin.as_ref()).await?;
    let count = dead_letters::all(&host, meant.filter(&host), Fate::Replay).await?;
    Ok((StatusCode::ACCEPTED, Json(Done { count })))
}

/// Drops all letters that match the filter.
#[utoipa::path(delete, path = "/dead-letters", tag = "dead letters", operation_id = "drop_dead_letters",
    params(Meant), responses((status = 200, body = Done)))]
pub async fn remove_all(Current(host): Current, Query(meant): Query<Meant>) -> Result<Json<Done>, ApiError> {
    check_plugin(&host, meant.plugin.as_ref()).await?;
    Ok(Json(Done { count: dead_letters::all(&host, meant.filter(&host), Fate::Drop).await? }))
}

/// Refuses an unknown plugin without letters: a misspelt name must not look like an empty list.
async fn check_plugin(host: &Host, plugin: Option<&PluginName>) -> Result<(), ApiError> {
    let Some(plugin) = plugin else { return Ok(()) };
    let mut names: BTreeSet<PluginName> = host.plugins.all().into_keys().collect();
    names.extend(host.not_loaded().into_iter().map(|refused| refused.name));
    names.extend(host.loading());
    names.extend(host.config.now().plugins.keys().cloned());
    names.extend(host.changes().under_way().into_keys());
    let of_plugin = Filter { plugin: Some(plugin.clone()), ..Filter::default() };
    let store = host.storage.store.clone();
    let left_one =
        tokio::task::spawn_blocking(move || dim_store::dead_letters::list(&store, &of_plugin, None, 1));
    if names.contains(plugin) || !left_one.await.expect("reading does not panic")?.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = names.iter().map(ToString::to_string).collect();
    Err(ApiError::invalid(format!("there is no plugin {plugin}; there are {}", listed(&names))))
}

fn missing(id: u64) -> ApiError {
    ApiError::not_found(format!("there is no dead letter {id}"))
}

/// Cuts long data, logs and stacks for a list.
fn cut(mut letter: Letter) -> Letter {
    if let Some(data) = letter.event["data"].as_str().filter(|data| data.len() > IN_LIST) {
        letter.event["data"] = json!(data[..data.floor_char_boundary(IN_LIST)]);
        letter.event["cut"] = json!(true);
    }
    letter.log_lines = cut_lines(&mut letter.log);
    letter.stack_lines = cut_lines(&mut letter.stack);
    letter
}

/// Cuts lines to the size of a list. Returns the number of lines if any is missing.
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
