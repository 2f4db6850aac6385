//! Owns `/metrics`: reads the counters of all stages and returns them for Prometheus.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use axum::http::header;
use axum::response::{IntoResponse, Response};
use dim_model::entry::Offset;
use dim_model::ident::Topic;
use dim_model::time::Timestamp;
use dim_network::reliable_topics::{Activity, MemberCounters, ReaderCounters};
use dim_network::subscription::ListeningRecord;
use dim_runtime::PluginStatus;
use dim_server::host::Host;
use dim_store::names::{self, Known};
use dim_store::{Usage, dead_letters, followed_names, outbox};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;

use crate::ApiError;
use crate::extract::Current;
use crate::outbox_quotas::{Queue, queues};

/// Returns all metrics in the OpenMetrics text format.
#[utoipa::path(get, path = "/metrics", tag = "host", operation_id = "get_metrics",
    responses((status = 200, body = String, content_type = "application/openmetrics-text")))]
pub async fn metrics(Current(host): Current) -> Result<Response, ApiError> {
    let mut registry = Registry::with_prefix("dim");
    plugins(&mut registry, &host);
    topics(&mut registry, &host);
    writers(&mut registry, &host).await;
    fleet(&mut registry, &host).await;
    sending(&mut registry, &host)?;
    own_names(&mut registry, &host)?;
    store(&mut registry, &host)?;
    counter(
        &mut registry,
        "log_lines_dropped",
        "Lines of the log and of standard output that were dropped because of a blocked reader",
        dim_server::line_queue::dropped(),
    );
    let mut text = String::new();
    encode(&mut text, &registry).map_err(ApiError::invalid)?;
    let openmetrics = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, openmetrics)], text).into_response())
}

fn plugins(registry: &mut Registry, host: &Host) {
    let now = host.storage.log.now();
    let plugins = host.plugins.all();
    let seen = plugins.iter().map(|(name, plugin)| {
        let status = plugin.handle.status();
        let waiting = host.storage.log.waiting(name, Offset(status.cursor));
        (name.to_string(), status, waiting)
    });
    let all: Vec<(String, PluginStatus, u64)> = seen.collect();
    let mut of_each = |kind: Kind, name: &str, help: &str, value: fn(&PluginStatus, u64) -> f64| {
        let values = all.iter().map(|(plugin, status, waiting)| (plugin.clone(), value(status, *waiting)));
        family(registry, kind, name, help, "plugin", values);
    };
    of_each(Kind::Counter, "plugin_handled", "Events, commands and timers that were handled", |p, _| {
        p.handled as f64
    });
    of_each(Kind::Counter, "plugin_failures", "Rejections, retries and traps", |p, _| p.failures as f64);
    of_each(Kind::Counter, "plugin_dead_letters", "Events that became dead letters", |p, _| {
        p.dead_letters as f64
    });
    of_each(Kind::Counter, "plugin_instances", "Instances that were started", |p, _| p.instances as f64);
    of_each(Kind::Counter, "plugin_state_writes", "Keys of its state that it wrote or deleted", |p, _| {
        p.effects.state as f64
    });
    of_each(Kind::Counter, "plugin_publishes", "Publishes that it requested", |p, _| {
        p.effects.publishes as f64
    });
    of_each(Kind::Counter, "plugin_name_updates", "New values of names that it set", |p, _| {
        p.effects.names as f64
    });
    of_each(Kind::Counter, "plugin_timer_changes", "Timers that it set or cleared", |p, _| {
        p.effects.timers as f64
    });
    of_each(Kind::Gauge, "plugin_failing", "Whether it does not start", |p, _| {
        f64::from(u8::from(p.reason.is_some()))
    });
    of_each(Kind::Gauge, "plugin_quarantined", "Whether it is quarantined", |p, _| {
        f64::from(u8::from(p.state == "quarantined"))
    });
    of_each(Kind::Gauge, "plugin_on_probation", "Whether its code is on probation", |p, _| {
        f64::from(u8::from(p.probation.is_some()))
    });
    of_each(Kind::Counter, "plugin_cpu_seconds", "CPU time", |p, _| p.cpu as f64 / 1e9);
    of_each(Kind::Gauge, "plugin_memory_bytes", "Memory of the instance", |p, _| p.memory as f64);
    of_each(Kind::Gauge, "plugin_state_bytes", "State", |p, _| p.state_bytes as f64);
    of_each(Kind::Gauge, "plugin_timers", "Timers that are set", |p, _| p.timers as f64);
    of_each(Kind::Gauge, "plugin_behind", "Entries of the log that wait for it", |_, waiting| waiting as f64);
    let met = Family::<[(&'static str, String); 2], Counter<u64>>::default();
    for (plugin, status, _) in &all {
        for (limit, count) in &status.met {
            met.get_or_create(&[("plugin", plugin.clone()), ("limit", limit.to_string())]).inc_by(*count);
        }
    }
    let help = "How often it exceeded a limit, or used a permission that is not granted (limit=\"grants\")";
    registry.register("plugin_limits_met", help, met);
    let ages = all.iter().map(|(plugin, status, waiting)| {
        (plugin.clone(), if *waiting > 0 { now.since(status.reached).as_secs_f64() } else { 0.0 })
    });
    let help = "Time since the last entry that it handled, while entries wait";
    family(registry, Kind::Gauge, "plugin_behind_seconds", help, "plugin", ages);
    let counters = &host.changes().counters;
    let ends: Vec<_> = counters.counts().into_iter().map(|(state, count)| (state, count as f64)).collect();
    let help = "Changes of plugins' code that reached a state";
    family(registry, Kind::Counter, "plugin_changes", help, "state", ends.into_iter());
    let help = "How long a plugin handled nothing during a takeover";
    registry.register("plugin_pause_seconds", help, counters.pauses.clone());
}

fn topics(registry: &mut Registry, host: &Host) {
    let received = &host.exchange.received;
    let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    counter(registry, "messages_received", "Messages that became entries", load(&received.received));
    counter(registry, "messages_echoed", "Echoes of own publishes", load(&received.echoes));
    counter(registry, "messages_copied", "Plain copies of events of reliable topics", load(&received.copies));
    counter(registry, "messages_repeated", "Messages that arrived twice", load(&received.repeated));
    counter(
        registry,
        "messages_oversized",
        "Messages that exceeded the size limit",
        load(&received.oversized),
    );
    counter(
        registry,
        "stream_reconnects",
        "Streams that ended and were opened again",
        load(&received.reconnects),
    );
    let all = host.exchange.links.listening_records.all();
    let mut of_each = |kind: Kind, name: &str, help: &str, value: fn(&ListeningRecord) -> f64| {
        let values = all.iter().map(|(topic, hearing)| (topic.to_string(), value(hearing)));
        family(registry, kind, name, help, "topic", values);
    };
    of_each(
        Kind::Counter,
        "topic_received",
        "Messages from the network that were accepted; those published through this host are not counted",
        |hearing| hearing.received as f64,
    );
    of_each(
        Kind::Counter,
        "topic_refused",
        "Messages of peers that are not accepted on the topic, and malformed bundles",
        |hearing| hearing.refused as f64,
    );
    of_each(Kind::Counter, "topic_gaps", "Gaps in which messages may have been missed", |hearing| {
        hearing.gaps as f64
    });
    of_each(Kind::Counter, "topic_gap_seconds", "Total length of the gaps", |hearing| {
        hearing.deaf_for.as_secs_f64()
    });
    of_each(Kind::Gauge, "topic_connected", "Whether the stream is open", |hearing| {
        f64::from(u8::from(hearing.connected_since.is_some()))
    });
    of_each(Kind::Gauge, "topic_listening", "Whether listening is proven", |hearing| {
        f64::from(u8::from(hearing.proven_until.is_some() && hearing.deaf.is_none()))
    });
    of_each(Kind::Gauge, "topic_peers", "Peers on the topic", |hearing| hearing.peer_count() as f64);
    of_each(Kind::Gauge, "topic_proven_until_seconds", "Until when listening is proven", |hearing| {
        hearing.proven_until.map_or(0.0, |until| seconds(until.0))
    });
    // The sum of messages that exceed the size limit and own messages that the daemon accepted but did not send back.
    let away = host.exchange.echoes.lost();
    let lost = all.iter().map(|(topic, hearing)| {
        (topic.to_string(), (hearing.lost + away.get(topic).copied().unwrap_or(0)) as f64)
    });
    let help = "Messages that were certainly lost";
    family(registry, Kind::Counter, "topic_lost", help, "topic", lost);
}

/// The values of one writer of a reliable topic, over all its incarnations.
#[derive(Debug, Default)]
struct OfWriter {
    lag: u64,
    counters: ReaderCounters,
}

async fn writers(registry: &mut Registry, host: &Host) {
    let reliable = &host.exchange.links.reliable;
    let mut all: BTreeMap<(String, String), OfWriter> = BTreeMap::new();
    let mut readers: BTreeMap<(String, String), f64> = BTreeMap::new();
    let Activity { counters, written } = reliable.activity().await.unwrap_or_default();
    let mut topics: BTreeSet<Topic> = host.exchange.links.interest.topics().into_iter().collect();
    topics.retain(|topic| reliable.is_reliable(topic));
    topics.extend(written);
    for topic in &topics {
        for log in reliable.writers(topic).await.unwrap_or_default() {
            for position in log.readers.iter().filter(|_| log.is_own) {
                let lag = log.end.saturating_sub(position.received) as f64;
                *readers.entry((topic.to_string(), position.reader.to_string())).or_default() += lag;
            }
            let of_writer = all.entry((topic.to_string(), log.writer.to_string())).or_default();
            of_writer.lag += log.end.saturating_sub(log.received);
            // They are those of the writer, in each of its incarnations.
            of_writer.counters = log.counters;
        }
    }
    let mut of_each = |kind: Kind, name: &str, help: &str, value: fn(&OfWriter) -> u64| {
        let values = all.iter().map(|(labels, of_writer)| (labels.clone(), value(of_writer) as f64));
        family_of_two(registry, kind, name, help, ["topic", "writer"], values);
    };
    let help = "Events of a writer that are known and not durable at this host";
    of_each(Kind::Gauge, "topic_writer_lag", help, |it| it.lag);
    let help = "Bundles that were fetched because their message was lost";
    of_each(Kind::Counter, "topic_writer_repaired", help, |it| it.counters.repaired);
    of_each(Kind::Counter, "topic_writer_gaps", "Gaps in the events of a writer", |it| it.counters.gaps);
    of_each(Kind::Counter, "topic_writer_refused", "Bundles that were refused", |it| it.counters.refused);
    let help = "Events of this host that another host does not have, as far as it has reported";
    family_of_two(registry, Kind::Gauge, "topic_reader_lag", help, ["topic", "reader"], readers.into_iter());
    member(registry, counters);
}

/// The counters of the driver of reliable topics.
fn member(registry: &mut Registry, MemberCounters { heads, old_heads, refused, resent }: MemberCounters) {
    counter(registry, "topic_heads", "Heads of other members that were received", heads);
    counter(registry, "topic_old_heads", "Heads of other members that came again or late", old_heads);
    let help = "Times that a writer or a member was refused because there are too many";
    counter(registry, "topic_writers_refused", help, refused);
    counter(registry, "topic_bundles_resent", "Own bundles that were sent again on request", resent);
}

/// The metrics of a fleet with a roster.
async fn fleet(registry: &mut Registry, host: &Host) {
    let Some(state) = host.exchange.links.reliable.fleet().await else { return };
    let roster = state.roster.as_ref().map(|it| &it.roster);
    let version = roster.map_or(0, |it| it.version);
    gauge(registry, "fleet_roster_version", "Version of the roster that this host has", version);
    let members = roster.map_or(0, |it| it.members.len() as u64);
    gauge(registry, "fleet_members", "Members of the fleet by the roster of this host", members);
    let expires = roster.map_or(0, |it| it.expires.0 / 1_000_000_000);
    let help = "Time after which members write no encrypted topics, in seconds since 1970";
    gauge(registry, "fleet_roster_expires", help, expires);
    let forks = state.forks.len() as u64;
    gauge(registry, "fleet_roster_forks", "Rosters that were refused because of another one", forks);
    let refused = state.refused.iter().map(|(why, it)| (why.name().to_owned(), it.count as f64));
    let help = "Messages and blocks of the fleet that were refused, by the reason";
    family(registry, Kind::Counter, "fleet_refused", help, "reason", refused);
}

fn sending(registry: &mut Registry, host: &Host) -> Result<(), ApiError> {
    let sent = &host.exchange.sent;
    let load = |counter: &AtomicUsize| counter.load(Ordering::Relaxed) as u64;
    counter(registry, "publishes_sent", "Publishes that the backend accepted", load(&sent.accepted));
    counter(registry, "publishes_retried", "Publishes that were refused and retried", load(&sent.retried));
    counter(registry, "publishes_expired", "Publishes that expired", load(&sent.expired));
    let (waiting, oldest) = outbox::waiting(&host.storage.store)?;
    gauge(registry, "outbox_waiting", "Publishes that wait", waiting);
    let age = oldest.map_or(0.0, |oldest| host.storage.log.now().since(oldest).as_secs_f64());
    registry.register(
        "outbox_oldest_seconds",
        "How long the oldest publish has waited",
        ConstGauge::new(age),
    );
    let of_each = |value: fn(&Queue) -> usize| {
        let queues = queues(host).into_iter();
        queues.map(move |queue| (queue.owner.clone(), value(&queue) as f64))
    };
    let (waiting, limits) = (of_each(|queue| queue.waiting), of_each(|queue| queue.limit));
    let gauge = Kind::Gauge;
    family(registry, gauge, "outbox_queue_waiting", "Publishes of one owner that wait", "owner", waiting);
    family(registry, gauge, "outbox_queue_limit", "Publishes of one owner that may wait", "owner", limits);
    Ok(())
}

fn own_names(registry: &mut Registry, host: &Host) -> Result<(), ApiError> {
    let (snapshot, now) = (host.storage.store.snapshot()?, Timestamp::wall());
    let own = names::all(&snapshot)?;
    let mut of_each = |name: &str, help: &str, value: &dyn Fn(&Known) -> Option<f64>| {
        let values = own.iter().filter_map(|(key, known)| Some((key.to_string(), value(known)?)));
        family(registry, Kind::Gauge, name, help, "key", values);
    };
    of_each("name_confirmed_age_seconds", "Age of the last record that the backend accepted", &|known| {
        known.published.as_ref().map(|accepted| now.since(Timestamp(accepted.at)).as_secs_f64())
    });
    of_each("name_waiting_seconds", "How long the newest value has waited for the backend", &|known| {
        Some(known.waiting_since().map_or(0.0, |since| now.since(since).as_secs_f64()))
    });
    of_each("name_document_bytes", "Size of its document", &|known| known.document.map(|bytes| bytes as f64));
    let mut others = Vec::new();
    for name in host.exchange.links.interest.names() {
        if let Some(known) = followed_names::known(&snapshot, &name)? {
            let age = now.since(known.resolution.confirmed_at).as_secs_f64();
            others.push((name.to_string(), age));
        }
    }
    let help = "Age of the last record of a followed name";
    family(registry, Kind::Gauge, "followed_confirmed_age_seconds", help, "name", others.into_iter());
    Ok(())
}

fn store(registry: &mut Registry, host: &Host) -> Result<(), ApiError> {
    gauge(registry, "dead_letters", "Dead letters", dead_letters::count(&host.storage.store)?);
    let usage = Usage::of(&host.storage.store.snapshot()?)?;
    let parts = usage.parts().into_iter().map(|(part, bytes)| (part.to_owned(), bytes as f64));
    family(registry, Kind::Gauge, "store_bytes", "Content of the store", "part", parts);
    gauge(registry, "store_file_bytes", "Size of the file of the database", host.storage.store.file_bytes());
    gauge(registry, "disk_free_bytes", "Free space on the disk", host.storage.store.free()?);
    let stopped = u64::from(host.storage.disk.shortage().is_some());
    gauge(registry, "intake_stopped", "Whether the intake is stopped", stopped);
    let counters = &host.storage.commit.counters;
    counter(registry, "commits", "Transactions", counters.commits.load(Ordering::Relaxed));
    let seconds = seconds(counters.nanoseconds.load(Ordering::Relaxed));
    registry.register("commit_sync_seconds", "How long a sync of the disk took", counters.syncs.clone());
    counter(
        registry,
        "dead_letters_dropped",
        "Dead letters that were dropped because there were too many or they were too old, since the store was made",
        dead_letters::dropped(&host.storage.store)?,
    );
    registry.register("commit_seconds", "Time spent in transactions and syncs", ConstCounter::new(seconds));
    counter(
        registry,
        "entries_committed",
        "Entries that were handled and are durable",
        counters.handled.load(Ordering::Relaxed),
    );
    gauge(registry, "log_head", "The offset of the next entry", host.storage.log.head().0);
    Ok(())
}

fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}

#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
}

/// Registers a family with one value for each value of a label.
fn family(
    registry: &mut Registry,
    kind: Kind,
    name: &str,
    help: &str,
    label: &'static str,
    values: impl Iterator<Item = (String, f64)>,
) {
    family_of(registry, kind, name, help, values.map(|(whose, value)| ([(label, whose)], value)));
}

/// Registers a family with one value for each pair of values of two labels.
fn family_of_two(
    registry: &mut Registry,
    kind: Kind,
    name: &str,
    help: &str,
    [one, other]: [&'static str; 2],
    values: impl Iterator<Item = ((String, String), f64)>,
) {
    let values = values.map(|((first, second), value)| ([(one, first), (other, second)], value));
    family_of(registry, kind, name, help, values);
}

fn family_of<const N: usize>(
    registry: &mut Registry,
    kind: Kind,
    name: &str,
    help: &str,
    values: impl Iterator<Item = ([(&'static str, String); N], f64)>,
) where
    [(&'static str, String); N]: EncodeLabelSet,
{
    let counters = Family::<[(&'static str, String); N], Counter<f64, AtomicU64>>::default();
    let gauges = Family::<[(&'static str, String); N], Gauge<f64, AtomicU64>>::default();
    for (labels, value) in values {
        match kind {
            Kind::Counter => drop(counters.get_or_create(&labels).inc_by(value)),
            Kind::Gauge => drop(gauges.get_or_create(&labels).set(value)),
        }
    }
    match kind {
        Kind::Counter => registry.register(name, help, counters),
        Kind::Gauge => registry.register(name, help, gauges),
    }
}

fn counter(registry: &mut Registry, name: &str, help: &str, value: u64) {
    registry.register(name, help, ConstCounter::new(value));
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: u64) {
    registry.register(name, help, ConstGauge::new(value));
}
