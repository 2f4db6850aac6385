//! Owns the log lines of `dim run` and `dim agent`. Receives `tracing` events; writes them to standard error through a
//! queue, so that a stalled reader blocks nobody, and optionally exports them to an OpenTelemetry collector.

use std::backtrace::BacktraceStatus;
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anstream::{AutoStream, ColorChoice};
use anyhow::Context as _;
use async_trait::async_trait;
use bytes::Bytes;
use clap::ValueEnum;
use dim_client::masked;
use dim_model::error_chain::chain;
use dim_model::escape::escaped;
use dim_server::config::Telemetry;
use dim_server::line_queue::LineQueue;
use http::{Request, Response};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{LogExporter, Protocol, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::logs::SdkLoggerProvider;
use reqwest::Url;
use secrecy::ExposeSecret as _;
use tokio::runtime::Handle;
use tracing_subscriber::Layer as _;
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::{DefaultFields, Writer};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Time limit for the export of the last lines to the collector at the end of the program.
const GRACE: Duration = Duration::from_secs(2);

/// Time limit for the reader of standard error to accept the remaining lines at the end of the program.
const FLUSH: Duration = Duration::from_secs(1);

/// Time limit of one export.
const EXPORT: Duration = Duration::from_secs(10);

/// The crates that export. Their own log lines must not be exported, or each export would cause another.
const EXPORTERS: [&str; 5] = ["hyper", "hyper_util", "reqwest", "rustls", "opentelemetry"];

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text for people
    Text,
    /// JSON for programs, one object per line
    Json,
}

/// The log of the process. On drop it exports and writes the remaining lines, within [`GRACE`] and [`FLUSH`].
pub struct Logging {
    written: LineQueue,
    exported: Option<SdkLoggerProvider>,
}

/// Refuses a word of the filter that is neither a level nor a target. `Targets` would take it as the name of a target,
/// and nothing would be logged. It would take an empty word as every target, so empty words are left out.
fn parse_filter(filter: &str) -> anyhow::Result<Targets> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let words: Vec<&str> = filter.split(',').map(str::trim).filter(|word| !word.is_empty()).collect();
    let is_meant = |word: &str| {
        let is_level =
            LEVELS.iter().any(|level| level.eq_ignore_ascii_case(word)) || word.parse::<u8>().is_ok();
        !word.contains('[') && (is_level || word.contains(['=', ':']) || word.starts_with("dim"))
    };
    if let Some(word) = words.iter().find(|word| !is_meant(word)) {
        anyhow::bail!(
            "DIM_LOG: {word:?} is no level; the levels are {}, alone or as in dim=debug",
            LEVELS.join(", ")
        );
    }
    words.join(",").parse().context("DIM_LOG is not a valid filter")
}

impl Logging {
    /// Starts the log of this process. `default` is the filter if `DIM_LOG` is unset or empty. `runtime` runs the
    /// exports. Fails if `DIM_LOG` is no filter, or if the collector's address or headers cannot be used.
    pub fn start(
        format: LogFormat,
        default: &str,
        telemetry: &Telemetry,
        runtime: &Handle,
    ) -> anyhow::Result<Self> {
        let filter = || match std::env::var("DIM_LOG") {
            Ok(filter) if !filter.trim().is_empty() => parse_filter(&filter),
            _ => Ok(default.parse().expect("the default is a filter")),
        };
        let lines = LineQueue::start(std::io::stderr(), |dropped| {
            tracing::warn!(dropped, "lines of the log were dropped because nobody read standard error");
        })
        .context("cannot start the thread that writes the log")?;
        report_panics_to(lines.clone());
        let to = lines.clone();
        let written = tracing_subscriber::fmt::layer()
            .with_writer(move || to.clone())
            .with_ansi(AutoStream::choice(&std::io::stderr()) != ColorChoice::Never);
        let written = match format {
            LogFormat::Text => written.fmt_fields(Escaped(DefaultFields::new())).boxed(),
            LogFormat::Json => written.json().boxed(),
        };
        let exported =
            telemetry.otlp_endpoint.as_deref().map(|to| export(to, telemetry, runtime)).transpose()?;
        let bridge = match &exported {
            Some(provider) => {
                let filter = filter()?.with_targets(EXPORTERS.map(|part| (part, LevelFilter::OFF)));
                Some(OpenTelemetryTracingBridge::new(provider).with_filter(filter))
            }
            None => None,
        };
        tracing_subscriber::registry().with(written.with_filter(filter()?)).with(bridge).init();
        Ok(Self { written: lines, exported })
    }
}

/// Formats the message and the fields of a line for people. Both may contain text of plugins, peers and files, so they
/// are escaped and stay on one line.
struct Escaped(DefaultFields);

impl<'w> FormatFields<'w> for Escaped {
    fn format_fields<R: RecordFields>(&self, mut writer: Writer<'w>, fields: R) -> fmt::Result {
        let mut text = String::new();
        self.0.format_fields(Writer::new(&mut text), fields)?;
        writer.write_str(&escaped(&text))
    }
}

impl Drop for Logging {
    fn drop(&mut self) {
        if let Some(exported) = &self.exported
            && let Err(error) = exported.shutdown_with_timeout(GRACE)
        {
            let warning = format!("warning: the last log lines did not reach the collector: {error}\n");
            self.written.push(warning.into_bytes());
        }
        self.written.flush(FLUSH);
    }
}

/// Reports panics through the line queue. The default hook writes to standard error directly: a stalled reader would
/// block the panicking thread, and every later panic.
fn report_panics_to(lines: LineQueue) {
    std::panic::set_hook(Box::new(move |panic| {
        let trace = std::backtrace::Backtrace::capture();
        lines.push(match trace.status() {
            BacktraceStatus::Captured => format!("{panic}\n{trace}\n").into_bytes(),
            _ => format!("{panic}\n").into_bytes(),
        });
    }));
}

fn export(endpoint: &str, telemetry: &Telemetry, runtime: &Handle) -> anyhow::Result<SdkLoggerProvider> {
    dim_client::install_tls();
    let mut headers = HashMap::new();
    for (name, value) in &telemetry.headers {
        let value = value.read().with_context(|| format!("telemetry.headers.{name}"))?;
        headers.insert(name.clone(), value.expose_secret().to_owned());
    }
    let http = reqwest::Client::builder().no_proxy().timeout(EXPORT).build()?;
    let url = logs_at(endpoint)?;
    let is_away = AtomicBool::default();
    let exporter = LogExporter::builder()
        .with_http()
        .with_http_client(Collector { http, url: url.clone(), runtime: runtime.clone(), is_away })
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(masked(url.as_str()))
        .with_headers(headers)
        .build()
        .with_context(|| format!("telemetry.otlp_endpoint: cannot export to {}", masked(endpoint)))?;
    let resource = Resource::builder().with_service_name(telemetry.service_name.clone()).build();
    Ok(SdkLoggerProvider::builder().with_resource(resource).with_batch_exporter(exporter).build())
}

/// The URL at which a collector receives logs.
fn logs_at(endpoint: &str) -> anyhow::Result<Url> {
    let wrong =
        || format!("telemetry.otlp_endpoint: {:?} is no URL, as in http://127.0.0.1:4318", masked(endpoint));
    let mut url = Url::parse(endpoint).ok().filter(Url::has_host).with_context(wrong)?;
    if let Ok(mut path) = url.path_segments_mut() {
        path.pop_if_empty().extend(["v1", "logs"]);
    }
    Ok(url)
}

/// The HTTP client of the exporter. The exporter calls it on its own thread without a runtime, so requests run on
/// `runtime`.
struct Collector {
    http: reqwest::Client,
    /// The URL with its user and password, if any. The client sends them as `Authorization`; the exporter does not.
    url: Url,
    runtime: Handle,
    /// Whether the last export failed.
    is_away: AtomicBool,
}

impl std::fmt::Debug for Collector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Collector").field("url", &masked(self.url.as_str())).finish_non_exhaustive()
    }
}

impl Collector {
    /// Logs the first failure of a series, and the first success after it.
    fn take_note(&self, failure: Option<&str>) {
        match (self.is_away.swap(failure.is_some(), Ordering::Relaxed), failure) {
            (false, Some(why)) => tracing::warn!("the log does not reach the collector: {why}"),
            (true, None) => tracing::info!("the log reaches the collector again"),
            _ => {}
        }
    }
}

#[async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (parts, body) = request.into_parts();
        let request = self.http.request(parts.method, self.url.clone()).headers(parts.headers).body(body);
        let sent = self.runtime.spawn(async move {
            let response = request.send().await.map_err(reqwest::Error::without_url)?;
            let status = response.status();
            let mut answer = Response::new(response.bytes().await?);
            *answer.status_mut() = status;
            Ok::<_, reqwest::Error>(answer)
        });
        let sent = sent.await?;
        match &sent {
            Ok(answer) if !answer.status().is_success() => self.take_note(Some(&answer.status().to_string())),
            Ok(_) => self.take_note(None),
            Err(error) => self.take_note(Some(&chain(error))),
        }
        Ok(sent?)
    }
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn a_filter_may_have_spaces_and_empty_words_and_no_spans() {
        let filter = parse_filter("info, dim=debug,,").unwrap();
        assert!(filter.would_enable("dim::run", &Level::DEBUG) && filter.would_enable("hyper", &Level::INFO));
        assert!(
            !filter.would_enable("dim::run", &Level::TRACE) && !filter.would_enable("hyper", &Level::DEBUG)
        );
        for wrong in ["verbose", "dim[span]=debug", "info,dim[{a}]", "dim=loud"] {
            assert!(parse_filter(wrong).is_err(), "{wrong}");
        }
    }
}
