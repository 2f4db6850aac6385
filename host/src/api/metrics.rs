//! `/metrics`: counts for Prometheus.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use axum::http::header;
use axum::response::{IntoResponse, Response};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::ApiError;
use super::extract::Current;
use crate::host::Host;
use crate::plugin::PluginStatus;
use crate::store::{dead, outbox};

/// All counts, in the OpenMetrics text format.
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
    for (name, plugin) in &host.plugins {
        let PluginStatus {
            cursor,
            handled,
            failures,
            dead_letters,
            instances,
            cpu,
            memory,
            state_bytes,
            timers,
            ..
        } = plugin.handle.status();
        let registry = registry.sub_registry_with_label(("plugin".into(), name.to_string().into()));
        counter(registry, "plugin_handled", "Events, commands and timers that were handled", handled);
        counter(registry, "plugin_failures", "Rejections, retries and traps", failures);
        counter(registry, "plugin_dead_letters", "Events that were set aside", dead_letters);
        counter(registry, "plugin_instances", "Instances that were made", instances);
        let cpu = ConstCounter::new(cpu as f64 / 1e9);
        registry.register("plugin_cpu_seconds", "CPU time", cpu);
        gauge(registry, "plugin_memory_bytes", "Memory of the instance", memory as u64);
        gauge(registry, "plugin_state_bytes", "State", state_bytes);
        gauge(registry, "plugin_timers", "Timers that are set", timers as u64);
        gauge(
            registry,
            "plugin_behind",
            "Entries of the log that it has not read yet",
            head.saturating_sub(cursor),
        );
    }
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
    for (topic, hearing) in host.hearings.all() {
        let registry = registry.sub_registry_with_label(("topic".into(), topic.to_string().into()));
        gauge(
            registry,
            "topic_connected",
            "Whether the stream is open",
            u64::from(hearing.connected_since.is_some()),
        );
        gauge(registry, "topic_peers", "Peers on the topic", hearing.peers.len() as u64);
        let proven = hearing.proven_until.map_or(0.0, |until| until.0 as f64 / 1e9);
        registry.register(
            "topic_proven_until_seconds",
            "Until when listening is proven",
            ConstGauge::new(proven),
        );
    }
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

fn counter(registry: &mut Registry, name: &str, help: &str, value: u64) {
    registry.register(name, help, ConstCounter::new(value));
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: u64) {
    registry.register(name, help, ConstGauge::new(value));
}
