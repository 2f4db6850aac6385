//! `/healthz`: whether all is well, and what is not, each in a sentence with the time since when. Every stage of the
//! host contributes its troubles here.

pub mod probes;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::extract::Current;
use super::nodes::{self, MergeFailure};
use super::queues::{Queue, queues};
use super::{ApiError, jobs};
use crate::change::Version;
use crate::contact;
use crate::escape::escaped;
use crate::host::{Host, NotLoaded, Standing, Supervised};
use crate::ident::{KeyName, PluginName};
use crate::names::Lasting;
use crate::plugin::{DOCUMENT_BYTES, roster};
use crate::room::Shortage;
use crate::store::names::{self, KeyUse, Known};
use crate::store::{self, META, Snapshot, history, outbox};
use crate::time::Timestamp;
use crate::trouble::{Code, Trouble};

/// All that is wrong with a host.
#[derive(Debug, Serialize, ToSchema)]
pub struct Health {
    /// Whether no trouble is an error.
    healthy: bool,
    /// What is wrong; the errors and the warnings.
    troubles: Vec<Trouble>,
}

/// One line: whether all is well, and what is not; JSON for those who accept `application/json`.
#[utoipa::path(get, path = "/healthz", tag = "host", operation_id = "get_health", responses(
    (status = 200, description = "Nothing is wrong but for warnings",
        content((String = "text/plain"), (Health = "application/json"))),
    (status = 503, description = "What is not well",
        content((String = "text/plain"), (Health = "application/json")))))]
pub async fn health(State(host): State<Arc<Supervised>>, headers: HeaderMap) -> Result<Response, ApiError> {
    let troubles = match host.standing() {
        Standing::Running(host) => all_troubles(&host).await?,
        Standing::Down { reason, since } => vec![down(&reason, since)],
    };
    let healthy = !troubles.iter().any(Trouble::is_error);
    let status = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Ok(if accepts_json(&headers) {
        (status, Json(Health { healthy, troubles })).into_response()
    } else if healthy {
        (status, "ok\n".to_owned()).into_response()
    } else {
        (status, format!("{}\n", escaped(&messages(&troubles).join("; ")))).into_response()
    })
}

fn accepts_json(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let mut kinds = accepted.flat_map(|value| value.split(','));
    kinds.any(|kind| kind.split(';').next().is_some_and(|kind| kind.trim() == "application/json"))
}

/// Says that the host has failed and is started again.
pub fn down(reason: &str, since: Timestamp) -> Trouble {
    Trouble::error(Code::HostDown, format!("down since {since:.0}: {reason}")).since(since)
}

/// What troubles say, each in a sentence.
pub fn messages(troubles: &[Trouble]) -> Vec<String> {
    troubles.iter().map(|trouble| trouble.message.clone()).collect()
}

/// A publish that waits for longer than this is a trouble.
const LATE: Duration = Duration::from_secs(30);

/// A subscription that is refused or cut for longer than this is a trouble. Less than the 2 s in which what is known
/// is to be seen, and more than it takes to open a stream again.
const CUT: Duration = Duration::from_secs(1);

/// How long it may take to learn how the jobs of other hosts differ; what takes longer is not said this time.
const ASKING: Duration = Duration::from_millis(500);

/// What is wrong, and how other hosts of the fleet differ.
pub async fn all_troubles(host: &Host) -> Result<Vec<Trouble>, ApiError> {
    let mut found = troubles(host)?;
    let (reports, report) = tokio::join!(
        tokio::time::timeout(ASKING, jobs::reports(host)),
        tokio::time::timeout(ASKING, nodes::report(host)),
    );
    let reports = reports.unwrap_or_default();
    found.extend(reports.into_iter().filter_map(|report| {
        if let Some(error) = report.error {
            let message = format!("the jobs of {} cannot be merged: {error}", report.name);
            return Some(Trouble::warning(Code::JobsDiffer, message).about(report.name));
        }
        let since = report.differs_since?;
        let message = format!(
            "another host of the fleet lacks what this one knows of jobs since {since:.0}: {} active jobs are not in {}, and of {} it has an earlier state (such as {}); it follows this host's document if its `ipfs.jobs_ipns` names it",
            report.missing_there,
            report.name,
            report.behind_there,
            report.examples.join(", ")
        );
        Some(Trouble::warning(Code::JobsDiffer, message).since(since).about(report.name))
    }));
    found.extend(report.unwrap_or_default().map(|MergeFailure { registry, error }| {
        let message = format!(
            "the registry {registry} cannot be merged, and its nodes are shown as they were: {error}"
        );
        Trouble::warning(Code::RegistryNotMerged, message).about(registry)
    }));
    Ok(found)
}

/// What is wrong.
fn troubles(host: &Host) -> Result<Vec<Trouble>, ApiError> {
    let (snapshot, now) = (host.store.snapshot()?, Timestamp::wall());
    let lost = |lost| Trouble::error(Code::KeyLost, lost);
    let mut troubles: Vec<_> = host.lost().into_iter().map(lost).collect();
    if let Some(Shortage { reason, since, .. }) = host.room.shortage() {
        let message = format!("nothing is taken in since {since:.0}: {reason}");
        troubles.push(Trouble::error(Code::IntakeStopped, message).since(since));
    }
    troubles.extend(of_plugins(host));
    troubles.extend(host.folder_trouble());
    troubles.extend(deaf(host, now));
    troubles.extend(away(host));
    troubles.extend(waiting(host, now)?);
    troubles.extend(overlong_log(host, &snapshot)?);
    troubles.extend(unresolved(host, now));
    for (key, known) in names::all(&snapshot)? {
        troubles.extend(of_name(host, &key, &known, now));
    }
    troubles.extend(past(host)?);
    troubles.retain(|trouble| host.acknowledged.shows(trouble));
    Ok(troubles)
}

/// Past events since the host started of which the operator should know.
fn past(host: &Host) -> Result<Vec<Trouble>, ApiError> {
    let (mut past, away) = (taken_back(host)?, host.echoes.lost());
    past.extend(host.left_out.troubles());
    for (topic, hearing) in host.hearings.all() {
        let refused = Trouble::events(Code::MessagesRefused, hearing.refused, || {
            let last = hearing
                .last_refused
                .as_ref()
                .map_or_else(String::new, |peer| format!(", last one of {peer}"));
            format!(
                "messages on {topic} of peers that may not speak there were refused since the host started: {}{last}",
                hearing.refused
            )
        });
        let lost = hearing.lost + away.get(&topic).copied().unwrap_or(0);
        let lost = Trouble::events(Code::MessagesLost, lost, || {
            format!("messages on {topic} were lost for certain since the host started: {lost}")
        });
        past.extend(refused.into_iter().chain(lost).map(|trouble| trouble.about(&topic)));
    }
    let dropped = store::dead::dropped(&host.store)?.saturating_sub(host.letters_dropped_before);
    past.extend(Trouble::events(Code::LettersDropped, dropped, || {
        format!("dead letters were dropped since the host started, because there were too many or they were too old: {dropped}")
    }));
    Ok(past)
}

/// Acknowledges the past events that troubles describe.
///
/// They are put aside until another event of the kind happens to the same subject, or the host starts again. The answer
/// has what was put aside.
#[utoipa::path(post, path = "/status/acknowledge", tag = "host", operation_id = "acknowledge_past_events",
    responses((status = 200, body = [Trouble])))]
pub async fn acknowledge(Current(host): Current) -> Result<Json<Vec<Trouble>>, ApiError> {
    let mut past = past(&host)?;
    past.retain(|trouble| host.acknowledged.shows(trouble));
    host.acknowledged.put_aside(&past);
    Ok(Json(past))
}

fn of_plugins(host: &Host) -> Vec<Trouble> {
    let refused = |NotLoaded { name, reason, .. }: &NotLoaded| {
        Trouble::error(Code::PluginNotLoaded, format!("plugin {name} is not loaded: {reason}")).about(name)
    };
    let mut troubles: Vec<Trouble> = host.not_loaded().iter().map(refused).collect();
    let loading = host.loading();
    if !loading.is_empty() {
        let names: Vec<_> = loading.iter().map(PluginName::as_str).collect();
        let message = format!("these plugins are not loaded yet: {}", names.join(", "));
        troubles.push(Trouble::error(Code::PluginsLoading, message).since(host.started));
    }
    for (name, plugin) in host.plugins.all() {
        let status = plugin.handle.status();
        if let Some(reason) = status.reason {
            let since = status.failing_since.unwrap_or(host.started);
            let trouble = match status.state {
                "quarantined" => Trouble::error(
                    Code::PluginQuarantined,
                    format!(
                        "plugin {name} is quarantined since {since:.0}, `dim plugin resume {name}` or a new version lets it go on: {reason}"
                    ),
                ),
                _ => Trouble::error(
                    Code::PluginFailing,
                    format!("plugin {name} does not start since {since:.0}: {reason}"),
                ),
            };
            troubles.push(trouble.since(since).about(&name));
        }
        if status.state == "paused" {
            let message = format!(
                "plugin {name} is paused: what comes for it waits, and orders are refused, until `dim plugin resume {name}`"
            );
            troubles.push(Trouble::warning(Code::PluginPaused, message).about(&name));
        }
        for (key, limit) in status.too_large {
            let message = format!("the document of {key} has more than {limit} bytes and is not published");
            troubles.push(Trouble::error(Code::DocumentTooLarge, message).about(key));
        }
    }
    troubles
}

/// Code that failed on probation, until there is a newer change of the plugin.
fn taken_back(host: &Host) -> Result<Vec<Trouble>, ApiError> {
    let loaded = host.plugins.all();
    let changes = history::taken_back(&host.store.snapshot()?)?
        .into_iter()
        .filter(|(name, _)| loaded.contains_key(name));
    let troubles = changes.filter_map(|(name, change)| {
        let version = |version: &Option<Version>| version.as_ref().map_or("?", |it| &it.version).to_owned();
        let (before, after) = (version(&change.before), version(&change.after));
        let why = change.reason.as_deref().unwrap_or("it failed on probation");
        let message =
            || format!("version {after} of plugin {name} was taken back, and {before} goes on: {why}");
        let at = change.steps.last()?.at;
        // A later one is another event.
        Some(Trouble::events(Code::PluginTakenBack, at.0, message)?.about(&name).since(at))
    });
    Ok(troubles.collect())
}

/// Publishes that are late, and queues that are full.
fn waiting(host: &Host, now: Timestamp) -> Result<Vec<Trouble>, ApiError> {
    let late = match outbox::waiting(&host.store)? {
        (waiting, Some(oldest)) if now.since(oldest) > LATE => {
            let message = format!("{waiting} publishes wait since {oldest:.0}");
            Some(Trouble::error(Code::PublishesLate, message).since(oldest))
        }
        _ => None,
    };
    let is_full = |queue: &Queue| queue.waiting >= queue.limit;
    let full = queues(host).into_iter().filter(is_full);
    let full = full.map(|Queue { owner, limit, .. }| {
        let message = format!("{limit} publishes of {owner} wait: more are refused");
        Trouble::error(Code::QueueFull, message).about(owner)
    });
    Ok(late.into_iter().chain(full).collect())
}

/// An own name that is late, nearly over, someone else's too, or nearly too large.
fn of_name(host: &Host, key: &KeyName, known: &Known, now: Timestamp) -> Vec<Trouble> {
    let mut troubles: Vec<_> = late(host, key, known, now).into_iter().collect();
    if let Some(accepted) = known.published.as_ref().filter(|accepted| accepted.is_nearly_over(now)) {
        let message = format!("the record of {key} ends at {:.0}", accepted.valid_until());
        troubles.push(Trouble::error(Code::RecordEnding, message));
    }
    let used = host.key_use(key);
    // Under a key that nothing here publishes under, the value of somebody else keeps nothing back.
    let is_idle = used == KeyUse::Nobody && known.is_of_another();
    if let Some(hold) = known.hold.as_ref().filter(|_| !is_idle) {
        let since = Timestamp(hold.since);
        let message = format!("{key} is on hold since {since:.0}: {}", hold.explain(key, used));
        troubles.push(Trouble::error(Code::NameOnHold, message).since(since));
    }
    let document = known.document.unwrap_or_default();
    if document > DOCUMENT_BYTES as u64 / 10 * 9 {
        let message = format!("the document of {key} has {document} bytes; {DOCUMENT_BYTES} are the limit");
        troubles.push(Trouble::warning(Code::DocumentNearLimit, message));
    }
    troubles.into_iter().map(|trouble| trouble.about(key)).collect()
}

/// A name that has waited for long, or that no attempt will publish until the operator mends the cause.
fn late(host: &Host, key: &KeyName, known: &Known, now: Timestamp) -> Option<Trouble> {
    let failure = host.failures.of(key).filter(|_| known.hold.is_none());
    let lasts = failure.as_ref().is_some_and(|failure| failure.lasts == Lasting::UntilMended);
    let since = match known.waiting_since().filter(|_| known.is_waiting()) {
        Some(since) if lasts || now.since(since) > LATE => since,
        // What is published is to be signed anew.
        None if lasts => failure.as_ref()?.since,
        _ => return None,
    };
    let why = failure.map_or_else(String::new, |failure| format!(": {}", failure.why));
    let message = format!("name {key} is not published since {since:.0}{why}");
    Some(Trouble::error(Code::NameLate, message).since(since))
}

/// A log that has grown past its size, for one of the plugins has not read it.
fn overlong_log(host: &Host, snapshot: &Snapshot) -> Result<Option<Trouble>, ApiError> {
    let (bytes, most) = (store::log::bytes(&snapshot.table(META)?)?, host.config.now().store.log.max_bytes);
    // A little more than may be is trimmed in a moment.
    if bytes <= most.saturating_mul(2) {
        return Ok(None);
    }
    let loaded = host.plugins.all();
    let refused = host.not_loaded();
    let configured = loaded.keys().chain(refused.iter().map(|plugin| &plugin.name));
    Ok(roster::furthest_behind(snapshot, configured)?.map(|(cursor, name)| {
        let message = format!(
            "the log has {bytes} of {most} bytes and waits for plugin {name}, which has read up to {cursor}: mend it or disable it"
        );
        Trouble::error(Code::LogTooLong, message).about(name)
    }))
}

/// That the daemon does not answer.
fn away(host: &Host) -> Option<Trouble> {
    let contact::State::Offline { since, why } = host.backend.contact.state() else { return None };
    let message = format!("the daemon does not answer since {since:.0}: {why}");
    Some(Trouble::error(Code::DaemonAway, message).since(since))
}

/// The names of others that cannot be resolved. Whether the daemon answers at all is told elsewhere.
fn unresolved(host: &Host, now: Timestamp) -> Vec<Trouble> {
    if away(host).is_some() {
        return Vec::new();
    }
    host.unresolved.troubles(now)
}

/// The topics that are not listened to for certain; those with one reason are told together.
fn deaf(host: &Host, now: Timestamp) -> Vec<Trouble> {
    let mut by_reason: BTreeMap<String, (Timestamp, Vec<String>)> = BTreeMap::new();
    for (topic, hearing) in host.hearings.all() {
        let proven = hearing.proven_until.unwrap_or(host.started);
        let is_cut = hearing.cut_since.is_some_and(|since| now.since(since) > CUT);
        if is_cut || now.since(proven) > LATE {
            let why = hearing.deaf.unwrap_or_else(|| "no proof has come".to_owned());
            let (since, topics) = by_reason.entry(why).or_insert((proven, Vec::new()));
            *since = proven.min(*since);
            topics.push(topic.to_string());
        }
    }
    let told = by_reason.into_iter().map(|(why, (since, topics))| {
        let topics = topics.join(", ");
        let message = format!("listening is not proven since {since:.0} on {topics}: {why}");
        Trouble::error(Code::NotListening, message).since(since).about(topics)
    });
    told.collect()
}
