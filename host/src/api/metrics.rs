//! `/metrics`: counts for Prometheus.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use axum::http::header;
use axum::response::{IntoResponse, Response};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;

use super::ApiError;
use super::extract::Current;
use crate::host::Host;
use crate::plugin::PluginStatus;
use crate::store::{dead, outbox};
use crate::subscription::TopicHearing;

/// All counts, in the OpenMetrics text format.
#[utoipa::path(get, path = "/metrics", tag = "host", operation_id = "get_metrics",
    responses((status = 200, body = String, content_type = "application/openmetrics-text")))]
pub async fn metrics(Current(host): Current) -> Result<Response, ApiError> {
    let mut registry = Registry::with_prefix("dim");
    plugins(&mut registry, &host);
    topics(&mut registry, &host);
    store(&mut registry, &host)?;
    let mut text = String::new();
    encode(&mut text, &registry).map_err(ApiError::invalid)?;
    let openmetrics = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, openmetrics)], text).into_response())
}

fn plugins(registry: &mut Registry, host: &Host) {
    let head = host.log.head().0;
    let all: Vec<(String, PluginStatus)> =
        host.plugins.iter().map(|(name, plugin)| (name.to_string(), plugin.handle.status())).collect();
    let mut of_each = |kind: Kind, name: &str, help: &str, value: fn(&PluginStatus, u64) -> f64| {
        let values = all.iter().map(|(plugin, status)| (plugin.clone(), value(status, head)));
        family(registry, kind, name, help, "plugin", values);
    };
    of_each(Kind::Counter, "plugin_handled", "Events, commands and timers that were handled", |p, _| {
        p.handled as f64
    });
    of_each(Kind::Counter, "plugin_failures", "Rejections, retries and traps", |p, _| p.failures as f64);
    of_each(Kind::Counter, "plugin_dead_letters", "Events that were set aside", |p, _| p.dead_letters as f64);
    of_each(Kind::Counter, "plugin_instances", "Instances that were made", |p, _| p.instances as f64);
    of_each(Kind::Counter, "plugin_cpu_seconds", "CPU time", |p, _| p.cpu as f64 / 1e9);
    of_each(Kind::Gauge, "plugin_memory_bytes", "Memory of the instance", |p, _| p.memory as f64);
    of_each(Kind::Gauge, "plugin_state_bytes", "State", |p, _| p.state_bytes as f64);
    of_each(Kind::Gauge, "plugin_timers", "Timers that are set", |p, _| p.timers as f64);
    of_each(Kind::Gauge, "plugin_behind", "Entries of the log that it has not read yet", |p, head| {
        head.saturating_sub(p.cursor) as f64
    });
}

fn topics(registry: &mut Registry, host: &Host) {
    let received = &host.received;
    let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    counter(registry, "messages_received", "Messages that became entries", load(&received.received));
    counter(registry, "messages_echoed", "Echoes of own publishes", load(&received.echoes));
    counter(registry, "messages_repeated", "Messages that came twice", load(&received.repeated));
    counter(
        registry,
        "messages_oversized",
        "Messages that were too large to be taken in",
        load(&received.oversized),
    );
    counter(
        registry,
        "stream_reconnects",
        "Streams that ended and were opened again",
        load(&received.reconnects),
    );
    let all = host.hearings.all();
    let mut of_each = |name: &str, help: &str, value: fn(&TopicHearing) -> f64| {
        let values = all.iter().map(|(topic, hearing)| (topic.to_string(), value(hearing)));
        family(registry, Kind::Gauge, name, help, "topic", values);
    };
    of_each("topic_connected", "Whether the stream is open", |hearing| {
        f64::from(u8::from(hearing.connected_since.is_some()))
    });
    of_each("topic_peers", "Peers on the topic", |hearing| hearing.peer_count() as f64);
    of_each("topic_proven_until_seconds", "Until when listening is proven", |hearing| {
        hearing.proven_until.map_or(0.0, |until| until.0 as f64 / 1e9)
    });
}

fn store(registry: &mut Registry, host: &Host) -> Result<(), ApiError> {
    let sent = &host.sent;
    let load = |counter: &AtomicUsize| counter.load(Ordering::Relaxed) as u64;
    counter(registry, "publishes_sent", "Publishes that the backend accepted", load(&sent.accepted));
    counter(
        registry,
        "publishes_retried",
        "Publishes that were refused and tried again",
        load(&sent.retried),
    );
    counter(registry, "publishes_expired", "Publishes that were given up", load(&sent.expired));
    gauge(registry, "outbox_waiting", "Publishes that wait", outbox::waiting(&host.store)?.0);
    gauge(registry, "dead_letters", "Dead letters that are held", dead::count(&host.store)?);
    let tally = &host.commit.tally;
    counter(registry, "commits", "Transactions", tally.commits.load(Ordering::Relaxed));
    let seconds = tally.nanoseconds.load(Ordering::Relaxed) as f64 / 1e9;
    registry.register("commit_seconds", "Time spent in transactions and syncs", ConstCounter::new(seconds));
    counter(
        registry,
        "entries_committed",
        "Entries that were handled and are durable",
        tally.handled.load(Ordering::Relaxed),
    );
    gauge(registry, "log_head", "The offset of the next entry", host.log.head().0);
    Ok(())
}

#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
}

/// One family with a value for each of what a label names.
fn family(
    registry: &mut Registry,
    kind: Kind,
    name: &str,
    help: &str,
    label: &'static str,
    values: impl Iterator<Item = (String, f64)>,
) {
    let counters = Family::<[(&'static str, String); 1], Counter<f64, AtomicU64>>::default();
    let gauges = Family::<[(&'static str, String); 1], Gauge<f64, AtomicU64>>::default();
    for (whose, value) in values {
        let labels = [(label, whose)];
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
