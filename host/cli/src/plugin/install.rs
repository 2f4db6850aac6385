//! Owns `dim plugin install`: sends a component to the host, shows the states of the change, and waits for the end of
//! the probation. Receives a location of a component; returns the change as the host reports it.

use std::path::PathBuf;
use std::pin::pin;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use dim_client::{ClientError, masked};
use dim_model::escape::escaped;
use dim_model::ident::{ContentPath, Digest};
use dim_model::time::Timestamp;
use dim_runtime::MAX_COMPONENT;
use dim_store::change::{Change, State};
use futures::{Stream, StreamExt as _};
use reqwest::Method;
use serde_json::{Value, json};

use super::grants::{agrees, asks};
use crate::client::Client;
use crate::human;
use crate::output::{Output, note};

/// Time without a new state after which the command shows the current state again.
const STILL: Duration = Duration::from_secs(2);

/// Interval between two reads of the history while the command waits for a change.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// A request to install a component, as the command line gives it.
pub struct InstallRequest {
    pub from: ComponentLocation,
    pub name: Option<String>,
    pub trust: Option<Digest>,
    pub grant: bool,
    pub wait: bool,
}

/// The consent of the user to an installation.
#[derive(Clone, Copy)]
struct Consent {
    /// Grants all requested permissions.
    grant: bool,
    /// The digest of the accepted component. A name may point to another component by the time of the second request.
    trust: Option<Digest>,
}

/// The location of a component.
#[derive(Clone, Debug)]
pub enum ComponentLocation {
    File(PathBuf),
    Url(String),
    Ipfs(ContentPath),
}

impl FromStr for ComponentLocation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with("/ipfs/") || text.starts_with("/ipns/") {
            return text.parse().map(Self::Ipfs).map_err(|error| format!("{error}"));
        }
        if text.starts_with("http://") || text.starts_with("https://") {
            return Ok(Self::Url(text.to_owned()));
        }
        Ok(Self::File(text.into()))
    }
}

/// Installs a component as the command line asks. Fails with [`Waits`] if the component waits for a grant.
pub async fn install(client: &Client, out: &Output, wish: InstallRequest) -> anyhow::Result<()> {
    let InstallRequest { from, name, trust, grant, wait } = wish;
    let (component, source) = match from {
        ComponentLocation::File(file) => {
            let shown = file.display().to_string();
            (dim_runtime::read(&file).with_context(|| format!("cannot read {shown}"))?, shown)
        }
        ComponentLocation::Url(url) => (download(&url, out).await?, masked(&url)),
        ComponentLocation::Ipfs(path) => {
            let send = async |Consent { grant, trust }: Consent| {
                let fetch = json!({ "from": path, "trust": trust, "name": name, "grant": grant });
                client.send_json(Method::POST, &["plugins"], &[], &fetch).await
            };
            return settled(client, out, name.as_deref(), send, Consent { grant, trust }, wait).await;
        }
    };
    let inspection = dim_runtime::inspect(&component).with_context(|| format!("{source} is not a plugin"))?;
    let name = name.unwrap_or_else(|| inspection.manifest.name.to_string());
    if !out.is_json() {
        let size = human::size(component.len() as u64);
        note(&format!("{size} of {name} {}", inspection.manifest.version));
    }
    let send = async |Consent { grant, trust }: Consent| {
        let mut query = vec![("source", source.clone()), ("grant", grant.to_string())];
        query.extend(trust.map(|trust| ("trust", trust.to_string())));
        client.send_component(&name, &query, component.clone()).await
    };
    settled(client, out, Some(&name), send, Consent { grant, trust }, wait).await
}

/// The error for a component that waits for a grant.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.reason.clone().unwrap_or_default())]
pub struct Waits(Change);

/// Downloads a component of at most [`MAX_COMPONENT`] bytes.
async fn download(url: &str, out: &Output) -> anyhow::Result<Vec<u8>> {
    dim_client::install_tls();
    let response = reqwest::get(url).await.and_then(reqwest::Response::error_for_status);
    // The URL may contain a token, which must not appear in an error.
    let url = masked(url);
    let response = response.map_err(reqwest::Error::without_url);
    let response = response.with_context(|| format!("cannot fetch {url}"))?;
    let whole = response.content_length();
    let (mut component, mut chunks) = (Vec::new(), response.bytes_stream());
    let mut told = Instant::now();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(reqwest::Error::without_url);
        component
            .extend_from_slice(&chunk.with_context(|| format!("the download of {url} was interrupted"))?);
        if component.len() > MAX_COMPONENT {
            bail!("{url} has more than {MAX_COMPONENT} bytes");
        }
        if told.elapsed() > Duration::from_secs(1) && !out.is_json() {
            told = Instant::now();
            let of = whole.map_or_else(String::new, |whole| format!(" of {}", human::size(whole)));
            note(&format!("{}{of} of {url}", human::size(component.len() as u64)));
        }
    }
    Ok(component)
}

/// Sends a component. Sends it again if the user vouches for it or grants the missing permissions at a prompt. With
/// `wait` it waits for the end of the probation.
async fn settled(
    client: &Client,
    out: &Output,
    name: Option<&str>,
    send: impl AsyncFn(Consent) -> Result<Value, ClientError>,
    mut consent: Consent,
    wait: bool,
) -> anyhow::Result<()> {
    let mut sent = told(client, out, name, send(consent)).await;
    if let Err(error) = &sent
        && let Some(ClientError::Problem(problem)) = error.downcast_ref::<ClientError>()
        && problem.kind == "untrusted"
        && asks(&escaped(&problem.detail), "Install it anyway?")? == Some(true)
    {
        let digest = problem.digest.as_deref().context("the host's answer")?;
        consent.trust = Some(digest.parse().context("the host's answer")?);
        sent = told(client, out, name, send(consent)).await;
    }
    let lacks = match &sent {
        Ok(change) => (change["state"] == "pending")
            .then(|| (change["missing"].clone(), change["after"]["digest"].clone())),
        Err(error) => match error.downcast_ref::<ClientError>() {
            Some(ClientError::Problem(problem)) => {
                (!problem.missing.is_empty()).then(|| (json!(problem.missing), json!(problem.digest)))
            }
            _ => None,
        },
    };
    let sent = match lacks {
        Some((missing, digest)) if agrees(name.unwrap_or("it"), &missing)? == Some(true) => {
            let trust = serde_json::from_value(digest).context("the host's answer")?;
            told(client, out, name, send(Consent { grant: true, trust })).await?
        }
        _ => sent?,
    };
    if sent["state"] == "pending" {
        show(out, sent.clone())?;
        return Err(Waits(serde_json::from_value(sent).context("the host's answer")?).into());
    }
    show(out, if wait { waited(client, out, name, sent).await? } else { sent })
}

/// Shows a change. People get no `steps`, because [`told`] has already shown them.
pub fn show(out: &Output, mut change: Value) -> anyhow::Result<()> {
    if let (false, Some(members)) = (out.is_json(), change.as_object_mut()) {
        members.remove("steps");
    }
    out.object(&change)
}

/// Waits for an answer, and meanwhile shows each state of the plugin's change on standard error.
pub async fn told<E>(
    client: &Client,
    out: &Output,
    name: Option<&str>,
    answer: impl Future<Output = Result<Value, E>>,
) -> anyhow::Result<Value>
where
    anyhow::Error: From<E>,
{
    // The stream of changes is only for progress. The request works without it.
    let Ok(changes) = client.changes(name).await else { return Ok(answer.await?) };
    let (mut changes, mut answer) = (pin!(changes), pin!(answer));
    let (mut last, mut since) = (None::<Change>, Instant::now());
    let answer = loop {
        tokio::select! {
            biased;
            Some(change) = changes.next() => {
                tell(out, &change);
                (last, since) = (Some(change), Instant::now());
            }
            answer = &mut answer => break answer?,
            () = tokio::time::sleep(STILL) => tell_still(out, last.as_ref(), since.elapsed()),
        }
    };
    // The stream may not have delivered the last state yet.
    if let Ok(change) = serde_json::from_value::<Change>(answer.clone())
        && last.map(|last| last.state) != Some(change.state)
    {
        tell(out, &change);
    }
    Ok(answer)
}

/// Waits for the end of a probation. Fails if the host rolls the code back or refuses it, or if the
/// plugin is removed.
async fn waited(client: &Client, out: &Output, name: Option<&str>, begun: Value) -> anyhow::Result<Value> {
    let mut changes = pin!(client.changes(name).await?);
    let mut change: Change = serde_json::from_value(begun.clone()).context("the host's answer")?;
    while !change.state.is_final() {
        tokio::select! {
            biased;
            next = changes.next() => match next {
                Some(next) if is_same(&next, &change) => change = next,
                Some(_) => {}
                None => bail!("the host ended before the probation did"),
            },
            // A busy stream may have dropped the final state.
            () = tokio::time::sleep(LOOK_AGAIN) => {
                let history = client.get(&["plugins", change.plugin.as_str(), "history"], &[]).await?;
                let history: Vec<Change> = serde_json::from_value(history).context("the host's answer")?;
                if let Some(now) = history.into_iter().find(|it| is_same(it, &change)) {
                    change = now;
                }
            }
        }
    }
    tell(out, &change);
    match change.state {
        State::Removed | State::Purged => {
            bail!("{} was removed before the end of its probation", change.plugin)
        }
        State::TakenBack | State::RolledBack | State::Refused => {
            bail!("{} was rolled back: {}", change.plugin, change.reason.unwrap_or_default())
        }
        _ => Ok(serde_json::to_value(change)?),
    }
}

/// Whether both values describe the same change, possibly in two states.
fn is_same(one: &Change, other: &Change) -> bool {
    one.plugin == other.plugin && one.steps.first() == other.steps.first()
}

/// Shows that a change is still in the same state.
fn tell_still(out: &Output, change: Option<&Change>, since: Duration) {
    let Some(change) = change.filter(|change| !out.is_json() && !change.state.is_final()) else { return };
    let state = change.state.as_str().replace('-', " ");
    let received =
        change.received.map_or_else(String::new, |bytes| format!(", {} so far", human::size(bytes)));
    note(&format!(
        "{:.0}  {}: {state} for {} s{received}",
        Timestamp::wall(),
        change.plugin,
        since.as_secs()
    ));
}

/// Shows the newest state of a change on standard error; writes nothing for JSON output.
pub fn tell(out: &Output, change: &Change) {
    let Some(step) = change.steps.last().filter(|_| !out.is_json()) else { return };
    // The host reports each received piece. Only the start of the fetch gets a line.
    if change.state == State::Fetching && change.received.is_some() {
        return;
    }
    let state = step.state.as_str().replace('-', " ");
    let version = change.after.as_ref().map_or_else(String::new, |after| format!(" {}", after.version));
    let reason = change.reason.as_ref().map_or_else(String::new, |reason| format!(": {}", escaped(reason)));
    note(&format!("{:.0}  {}{version}: {state}{reason}", step.at, change.plugin));
}

impl Client {
    /// A stream of the new states of changes: of one plugin, or of all.
    pub async fn changes(&self, name: Option<&str>) -> anyhow::Result<impl Stream<Item = Change> + use<>> {
        let events = self.event_stream(&["changes"]).await?;
        let name = name.map(str::to_owned);
        Ok(events.filter_map(move |event| {
            let change = event.ok().and_then(|event| serde_json::from_str::<Change>(&event.data).ok());
            std::future::ready(
                change.filter(|it| name.as_ref().is_none_or(|name| it.plugin.as_str() == name)),
            )
        }))
    }
}
