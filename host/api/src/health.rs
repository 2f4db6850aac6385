//! Owns `/healthz`. It collects the health findings of every stage of the host, and returns them as one line or as
//! JSON, with an error status if any is an error.

pub mod probes;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use dim_model::connectivity;
use dim_model::escape::escaped;
use dim_model::health::{Code, HealthFinding};
use dim_model::ident::{KeyName, PluginName};
use dim_model::time::Timestamp;
use dim_network::name_publisher::Lasting;
use dim_network::reliable_topics::{FleetProblem, FleetState, MAX_WRITERS};
use dim_server::host::{Host, NotLoaded, Standing, Supervised};
use dim_store::change::Version;
use dim_store::disk_monitor::Shortage;
use dim_store::names::{self, KeyUse, Known};
use dim_store::plugin_limits::DOCUMENT_BYTES;
use dim_store::plugin_registry;
use dim_store::topic_rows::{self, RaisedAlarm};
use dim_store::{META, Snapshot, change_history, outbox};
use serde::Serialize;
use utoipa::ToSchema;

use crate::extract::Current;
use crate::nodes::{self, MergeFailure};
use crate::outbox_quotas::{Queue, queues};
use crate::{ApiError, jobs};

/// The health findings of a host.
#[derive(Debug, Serialize, ToSchema)]
pub struct Health {
    /// Whether no finding is an error.
    healthy: bool,
    /// The findings: errors and warnings.
    troubles: Vec<HealthFinding>,
}

/// Reports the health of the host in one line, or as JSON for callers that accept `application/json`.
#[utoipa::path(get, path = "/healthz", tag = "host", operation_id = "get_health", responses(
    (status = 200, description = "No health finding is an error",
        content((String = "text/plain"), (Health = "application/json"))),
    (status = 503, description = "The health findings, at least one of which is an error",
        content((String = "text/plain"), (Health = "application/json")))))]
pub async fn health(State(host): State<Arc<Supervised>>, headers: HeaderMap) -> Result<Response, ApiError> {
    let troubles = match host.standing() {
        Standing::Running(host) => all_troubles(&host).await?,
        Standing::Down { reason, since } => vec![down(&reason, since)],
    };
    let healthy = !troubles.iter().any(HealthFinding::is_error);
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

/// Returns the finding that the host has failed and restarts.
pub fn down(reason: &str, since: Timestamp) -> HealthFinding {
    HealthFinding::error(Code::HostDown, format!("down since {since:.0}: {reason}")).since(since)
}

/// Returns the messages of findings.
pub fn messages(troubles: &[HealthFinding]) -> Vec<String> {
    troubles.iter().map(|trouble| trouble.message.clone()).collect()
}

/// The time after which a waiting publish is a finding.
const LATE: Duration = Duration::from_secs(30);

/// The time after which a refused or interrupted subscription is a finding. It is longer than the reopening of a
/// stream takes, and shorter than the 2 s in which a known problem must be visible.
const CUT: Duration = Duration::from_secs(1);

/// The maximum time to ask plugins about merges. Findings of plugins that take longer are left out.
const ASKING: Duration = Duration::from_millis(500);

/// Returns all findings, including those about merges with other hosts of the fleet.
pub async fn all_troubles(host: &Host) -> Result<Vec<HealthFinding>, ApiError> {
    let mut found = troubles(host)?;
    let (reports, report, fleet, activity) = tokio::join!(
        tokio::time::timeout(ASKING, jobs::reports(host)),
        tokio::time::timeout(ASKING, nodes::report(host)),
        tokio::time::timeout(ASKING, host.exchange.links.reliable.fleet()),
        tokio::time::timeout(ASKING, host.exchange.links.reliable.activity()),
    );
    let refused = activity.ok().flatten().map_or(0, |it| it.counters.refused);
    found.extend(HealthFinding::events(Code::WritersRefused, refused, || {
        format!(
            "writers of reliable topics were refused {refused} times, because this host knows too many of them: a topic has at most {MAX_WRITERS}"
        )
    }).filter(|finding| host.notes.acknowledged.shows(finding)));
    found.extend(of_fleet(fleet.ok().flatten(), host.storage.log.clock().wall()));
    let reports = reports.unwrap_or_default();
    found.extend(reports.into_iter().filter_map(|report| {
        if let Some(error) = report.error {
            let message = format!("the jobs of {} cannot be merged: {error}", report.name);
            return Some(HealthFinding::warning(Code::JobsDiffer, message).about(report.name));
        }
        let since = report.differs_since?;
        let message = format!(
            "another host of the fleet lacks jobs or job changes of this host since {since:.0}: {} active jobs are not in {}, and {} jobs there have an earlier state (such as {}); that host merges this host's jobs if its `ipfs.jobs_ipns` names this host's document",
            report.missing_there,
            report.name,
            report.behind_there,
            report.examples.join(", ")
        );
        Some(HealthFinding::warning(Code::JobsDiffer, message).since(since).about(report.name))
    }));
    found.extend(report.unwrap_or_default().map(|MergeFailure { registry, error }| {
        let message = format!(
            "the registry {registry} cannot be merged, and its nodes are shown as they were: {error}"
        );
        HealthFinding::warning(Code::RegistryNotMerged, message).about(registry)
    }));
    Ok(found)
}

/// Returns the findings that need no plugin.
fn troubles(host: &Host) -> Result<Vec<HealthFinding>, ApiError> {
    let (snapshot, now) = (host.storage.store.snapshot()?, Timestamp::wall());
    let lost = |lost| HealthFinding::error(Code::KeyLost, lost);
    let mut troubles: Vec<_> = host.lost().into_iter().map(lost).collect();
    if let Some(Shortage { reason, since, .. }) = host.storage.disk.shortage() {
        let message = format!("the intake is stopped since {since:.0}: {reason}");
        troubles.push(HealthFinding::error(Code::IntakeStopped, message).since(since));
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
    troubles.extend(unknown_keys(host));
    troubles.extend(past(host)?);
    troubles.retain(|trouble| host.notes.acknowledged.shows(trouble));
    Ok(troubles)
}

/// Returns the findings about past events since the start of the host.
fn past(host: &Host) -> Result<Vec<HealthFinding>, ApiError> {
    let (mut past, away) = (taken_back(host)?, host.exchange.echoes.lost());
    past.extend(host.notes.left_out.troubles());
    past.extend(alarms(host)?);
    for (topic, hearing) in host.exchange.links.listening_records.all() {
        let refused = HealthFinding::events(Code::MessagesRefused, hearing.refused, || {
            let last = hearing
                .last_refused
                .as_ref()
                .map_or_else(String::new, |peer| format!(", last one of {peer}"));
            format!(
                "messages on {topic} of peers that are not accepted there were refused since the host started: {}{last}",
                hearing.refused
            )
        });
        let lost = hearing.lost + away.get(&topic).copied().unwrap_or(0);
        let lost = HealthFinding::events(Code::MessagesLost, lost, || {
            format!("messages on {topic} were lost for certain since the host started: {lost}")
        });
        past.extend(refused.into_iter().chain(lost).map(|trouble| trouble.about(&topic)));
    }
    let dropped = dim_store::dead_letters::dropped(&host.storage.store)?
        .saturating_sub(host.notes.letters_dropped_before);
    past.extend(HealthFinding::events(Code::LettersDropped, dropped, || {
        format!("dead letters were dropped since the host started, because there were too many or they were too old: {dropped}")
    }));
    Ok(past)
}

/// Returns the alarms about writers of reliable topics: one finding for each writer.
fn alarms(host: &Host) -> Result<Vec<HealthFinding>, ApiError> {
    let mut of_writer: BTreeMap<String, Vec<RaisedAlarm>> = BTreeMap::new();
    let raised = topic_rows::alarms(&host.storage.store.snapshot()?)?;
    for alarm in raised.into_iter().filter(|alarm| !alarm.is_acknowledged) {
        of_writer.entry(alarm.writer.to_string()).or_default().push(alarm);
    }
    let finding = |(writer, alarms): (String, Vec<RaisedAlarm>)| {
        let last = alarms.last()?;
        let count = alarms.len() as u64;
        let message = || {
            format!(
                "alarms about the writer {writer} of reliable topics: {count}, the last one on {}: {}",
                last.topic, last.finding
            )
        };
        Some(HealthFinding::events(Code::WriterAlarm, count, message)?.about(&writer).since(last.at))
    };
    Ok(of_writer.into_iter().filter_map(finding).collect())
}

/// Returns the findings about a fleet with a roster.
fn of_fleet(state: Option<FleetState>, now: Timestamp) -> Vec<HealthFinding> {
    let finding = |problem: FleetProblem| {
        let message = problem.to_string();
        match problem {
            FleetProblem::Fork(_) => HealthFinding::error(Code::FleetAlarm, message),
            FleetProblem::Removed(_) | FleetProblem::Expired(_) => {
                HealthFinding::error(Code::FleetProblem, message)
            }
            _ => HealthFinding::warning(Code::FleetProblem, message),
        }
    };
    state.iter().flat_map(|state| state.problems(now)).map(finding).collect()
}

/// Acknowledges the past events that the health findings describe.
///
/// Acknowledged events are hidden until another event of the same kind concerns the same subject, or until the host
/// restarts. Acknowledged alarms stay hidden. The answer lists what was acknowledged.
#[utoipa::path(post, path = "/status/acknowledge", tag = "host", operation_id = "acknowledge_past_events",
    responses((status = 200, body = [HealthFinding])))]
pub async fn acknowledge(Current(host): Current) -> Result<Json<Vec<HealthFinding>>, ApiError> {
    let mut past = past(&host)?;
    past.retain(|trouble| host.notes.acknowledged.shows(trouble));
    let (alarms, others): (Vec<_>, Vec<_>) =
        past.iter().cloned().partition(|it| it.code == Code::WriterAlarm);
    host.notes.acknowledged.put_aside(&others);
    if !alarms.is_empty() {
        host.storage.commit.write(topic_rows::acknowledge_alarms).await?;
    }
    Ok(Json(past))
}

fn of_plugins(host: &Host) -> Vec<HealthFinding> {
    let refused = |NotLoaded { name, reason, .. }: &NotLoaded| {
        HealthFinding::error(Code::PluginNotLoaded, format!("plugin {name} is not loaded: {reason}"))
            .about(name)
    };
    let mut troubles: Vec<HealthFinding> = host.not_loaded().iter().map(refused).collect();
    let loading = host.loading();
    if !loading.is_empty() {
        let names: Vec<_> = loading.iter().map(PluginName::as_str).collect();
        let message = format!("these plugins are not loaded yet: {}", names.join(", "));
        troubles.push(HealthFinding::error(Code::PluginsLoading, message).since(host.life.started));
    }
    for (name, plugin) in host.plugins.all() {
        let status = plugin.handle.status();
        if let Some(reason) = status.reason {
            let since = status.failing_since.unwrap_or(host.life.started);
            let trouble = match status.state {
                "quarantined" => HealthFinding::error(
                    Code::PluginQuarantined,
                    format!(
                        "plugin {name} is quarantined since {since:.0}, `dim plugin resume {name}` or a new version ends that: {reason}"
                    ),
                ),
                _ => HealthFinding::error(
                    Code::PluginFailing,
                    format!("plugin {name} does not start since {since:.0}: {reason}"),
                ),
            };
            troubles.push(trouble.since(since).about(&name));
        }
        if status.state == "paused" {
            let message = format!(
                "plugin {name} is paused: its entries wait and commands are refused until `dim plugin resume {name}`"
            );
            troubles.push(HealthFinding::warning(Code::PluginPaused, message).about(&name));
        }
        for (key, limit) in status.too_large {
            let message = format!("the document of {key} has more than {limit} bytes and is not published");
            troubles.push(HealthFinding::error(Code::DocumentTooLarge, message).about(key));
        }
    }
    troubles
}

/// Returns findings about code that failed on probation, until the plugin has a newer change.
fn taken_back(host: &Host) -> Result<Vec<HealthFinding>, ApiError> {
    let loaded = host.plugins.all();
    let changes = change_history::taken_back(&host.storage.store.snapshot()?)?
        .into_iter()
        .filter(|(name, _)| loaded.contains_key(name));
    let troubles = changes.filter_map(|(name, change)| {
        let version = |version: &Option<Version>| version.as_ref().map_or("?", |it| &it.version).to_owned();
        let (before, after) = (version(&change.before), version(&change.after));
        let why = change.reason.as_deref().unwrap_or("it failed on probation");
        let message =
            || format!("version {after} of plugin {name} was rolled back, and {before} runs again: {why}");
        let at = change.steps.last()?.at;
        // A later rollback is another event.
        Some(HealthFinding::events(Code::PluginTakenBack, at.0, message)?.about(&name).since(at))
    });
    Ok(troubles.collect())
}

/// Returns findings about late publishes and full queues.
fn waiting(host: &Host, now: Timestamp) -> Result<Vec<HealthFinding>, ApiError> {
    let late = match outbox::waiting(&host.storage.store)? {
        (waiting, Some(oldest)) if now.since(oldest) > LATE => {
            let message = format!("{waiting} publishes wait since {oldest:.0}");
            Some(HealthFinding::error(Code::PublishesLate, message).since(oldest))
        }
        _ => None,
    };
    let is_full = |queue: &Queue| queue.waiting >= queue.limit;
    let full = queues(host).into_iter().filter(is_full);
    let full = full.map(|Queue { owner, limit, .. }| {
        let message = format!("{limit} publishes of {owner} wait: more are refused");
        HealthFinding::error(Code::QueueFull, message).about(owner)
    });
    Ok(late.into_iter().chain(full).collect())
}

/// Returns the findings about an own name: late, about to expire, on hold, or with a document near the limit.
fn of_name(host: &Host, key: &KeyName, known: &Known, now: Timestamp) -> Vec<HealthFinding> {
    let mut troubles: Vec<_> = late(host, key, known, now).into_iter().collect();
    if let Some(accepted) = known.published.as_ref().filter(|accepted| accepted.is_nearly_over(now)) {
        let message = format!("the record of {key} ends at {:.0}", accepted.valid_until());
        troubles.push(HealthFinding::error(Code::RecordEnding, message));
    }
    troubles.extend(plain_document(host, key, known));
    let used = host.key_use(key);
    // If no plugin here publishes under the key, another writer's value blocks nothing.
    let is_idle = used == KeyUse::Nobody && known.is_of_another();
    if let Some(hold) = known.hold.as_ref().filter(|_| !is_idle) {
        let since = Timestamp(hold.since);
        let message = format!("{key} is on hold since {since:.0}: {}", hold.explain(key, used));
        troubles.push(HealthFinding::error(Code::NameOnHold, message).since(since));
    }
    let document = known.document.unwrap_or_default();
    if document > DOCUMENT_BYTES as u64 / 10 * 9 {
        let message = format!("the document of {key} has {document} bytes; {DOCUMENT_BYTES} are the limit");
        troubles.push(HealthFinding::warning(Code::DocumentNearLimit, message));
    }
    troubles.into_iter().map(|trouble| trouble.about(key)).collect()
}

/// Returns a finding about a name that has waited too long, or whose publication fails until the operator fixes the
/// cause.
fn late(host: &Host, key: &KeyName, known: &Known, now: Timestamp) -> Option<HealthFinding> {
    let failure = host.exchange.links.failures.of(key).filter(|_| known.hold.is_none());
    let lasts = failure.as_ref().is_some_and(|failure| failure.lasts == Lasting::UntilMended);
    let since = match known.waiting_since().filter(|_| known.is_waiting()) {
        Some(since) if lasts || now.since(since) > LATE => since,
        // The name has no new value; its published record must be signed again.
        None if lasts => failure.as_ref()?.since,
        _ => return None,
    };
    let why = failure.map_or_else(String::new, |failure| format!(": {}", failure.why));
    let message = format!("name {key} is not published since {since:.0}{why}");
    Some(HealthFinding::error(Code::NameLate, message).since(since))
}

/// Returns a finding about a document that stays published without encryption or for other readers, because the host
/// cannot encrypt it.
fn plain_document(host: &Host, key: &KeyName, known: &Known) -> Option<HealthFinding> {
    let dim_server::host::Links { backend, cipher, reliable, failures, .. } = &host.exchange.links;
    let group = cipher.group(key).filter(|_| backend.network && known.hold.is_none())?;
    let published = known.published.as_ref().filter(|it| it.is_held)?;
    let failure = failures.of(key)?;
    let fleet = reliable.channels().fleet().to_owned();
    let readers = match &published.encryption {
        Some(now) if (&now.fleet, &now.group) == (&fleet, &group) => return None,
        Some(now) => format!("is encrypted for group {} of fleet {}", now.group, now.fleet),
        None => "can be read by everybody".to_owned(),
    };
    let message = format!(
        "the published document of {key} {readers}, and the config requires group {group} of the present fleet: {}",
        failure.why
    );
    Some(HealthFinding::error(Code::DocumentNotEncrypted, message).since(failure.since))
}

/// Returns findings about the section `names` of the config: a mistyped key would leave documents unencrypted.
fn unknown_keys(host: &Host) -> Vec<HealthFinding> {
    let config = host.config.now();
    let unknown = config.names.keys().filter(|key| host.storage.keys.name(key).is_none());
    let finding = |key: &KeyName| {
        let message = format!(
            "`names.{key}` in the config has no effect: the host has no key {key}. `dim ipns ls` shows its keys"
        );
        HealthFinding::warning(Code::KeyUnknown, message).about(key)
    };
    unknown.map(finding).collect()
}

/// Returns a finding about a log above its maximum size because a plugin has not read it.
fn overlong_log(host: &Host, snapshot: &Snapshot) -> Result<Option<HealthFinding>, ApiError> {
    let (bytes, most) =
        (dim_store::event_log_rows::bytes(&snapshot.table(META)?)?, host.config.now().store.log.max_bytes);
    // Retention trims a small excess soon.
    if bytes <= most.saturating_mul(2) {
        return Ok(None);
    }
    let loaded = host.plugins.all();
    let refused = host.not_loaded();
    let configured = loaded.keys().chain(refused.iter().map(|plugin| &plugin.name));
    Ok(plugin_registry::furthest_behind(snapshot, configured)?.map(|(cursor, name)| {
        let message = format!(
            "the log has {bytes} of {most} bytes and waits for plugin {name}, which has read up to {cursor}: repair it or disable it"
        );
        HealthFinding::error(Code::LogTooLong, message).about(name)
    }))
}

/// Returns a finding if the daemon does not answer.
fn away(host: &Host) -> Option<HealthFinding> {
    let connectivity::State::Offline { since, why } = host.exchange.links.backend.connectivity.state() else {
        return None;
    };
    let message = format!("the daemon does not answer since {since:.0}: {why}");
    Some(HealthFinding::error(Code::DaemonAway, message).since(since))
}

/// Returns findings about followed names that cannot be resolved. If the daemon does not answer, another finding says
/// so.
fn unresolved(host: &Host, now: Timestamp) -> Vec<HealthFinding> {
    if away(host).is_some() {
        return Vec::new();
    }
    host.exchange.links.unresolved.troubles(now)
}

/// Returns findings about topics without proof of listening; topics with the same reason share one.
fn deaf(host: &Host, now: Timestamp) -> Vec<HealthFinding> {
    let mut by_reason: BTreeMap<String, (Timestamp, Vec<String>)> = BTreeMap::new();
    for (topic, hearing) in host.exchange.links.listening_records.all() {
        let proven = hearing.proven_until.unwrap_or(host.life.started);
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
        HealthFinding::error(Code::NotListening, message).since(since).about(topics)
    });
    told.collect()
}
