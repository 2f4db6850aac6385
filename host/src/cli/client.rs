//! The command line's way to the API of a host.

use std::io::{IsTerminal as _, Write as _};
use std::pin::pin;
use std::time::{Duration, Instant};

use bytes::Bytes;
use dim_client::{Address, ClientError, Http, ServerEvent};
use futures::{Stream, StreamExt as _};
use reqwest::Method;
use secrecy::SecretString;
use serde::Serialize;
use serde_json::Value;

use super::human;
use super::output::{end_if_unread, note, note_piece};

/// How long a command is silent while it waits.
const MOMENT: Duration = Duration::from_secs(1);

/// How often a stream that has nothing to show looks whether anyone reads on.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A client of one host, which tells who waits at a terminal what for.
#[derive(Clone, Debug)]
pub struct Client {
    http: Http,
}

impl Client {
    /// A client for the host at `address`, which may want a token.
    pub fn new(address: Address, token: Option<&SecretString>) -> Result<Self, ClientError> {
        Ok(Self { http: Http::with_token(address, token)? })
    }

    /// Reads JSON.
    pub async fn get(&self, segments: &[&str], query: &[(&str, String)]) -> Result<Value, ClientError> {
        self.telling(self.http.get(segments, query)).await
    }

    /// Reads the rows of a list page by page, `limit` of them or all; `id` is the member that they are
    /// ordered by.
    pub async fn rows(
        &self,
        segments: &[&str],
        query: Vec<(&str, String)>,
        id: &str,
        limit: Option<usize>,
    ) -> Result<Value, ClientError> {
        let rows = self.telling(self.http.rows::<Value>(segments, &query, id, limit)).await?;
        Ok(Value::Array(rows))
    }

    /// Reads bytes as they are.
    pub async fn get_bytes(&self, segments: &[&str]) -> Result<Bytes, ClientError> {
        self.telling(self.http.bytes(self.http.request(Method::GET, segments)?)).await
    }

    /// Sends JSON and reads bytes as they come.
    pub async fn chunks(
        &self,
        segments: &[&str],
        body: &Value,
    ) -> Result<impl Stream<Item = Result<Bytes, ClientError>> + use<>, ClientError> {
        let request = self.http.request(Method::POST, segments)?.json(body);
        self.telling(self.http.chunks(request)).await
    }

    /// Reads bytes as they come.
    pub async fn get_chunks(
        &self,
        segments: &[&str],
        query: &[(&str, String)],
    ) -> Result<impl Stream<Item = Result<Bytes, ClientError>> + use<>, ClientError> {
        let request = self.http.request(Method::GET, segments)?.query(query);
        self.telling(self.http.chunks(request)).await
    }

    /// Sends JSON.
    pub async fn send_json(
        &self,
        method: Method,
        segments: &[&str],
        query: &[(&str, String)],
        body: &(impl Serialize + ?Sized),
    ) -> Result<Value, ClientError> {
        self.telling(self.http.send_json(method, segments, query, body)).await
    }

    /// Sends bytes as they are.
    pub async fn send_bytes(
        &self,
        method: Method,
        segments: &[&str],
        query: &[(&str, String)],
        body: Vec<u8>,
    ) -> Result<Value, ClientError> {
        self.telling(self.http.send_bytes(method, segments, query, body)).await
    }

    /// Sends a plugin's component.
    pub async fn send_component(
        &self,
        plugin: &str,
        query: &[(&str, String)],
        component: Vec<u8>,
    ) -> Result<Value, ClientError> {
        self.telling(self.http.send_component(plugin, query, component)).await
    }

    /// Orders what needs no body.
    pub async fn post(&self, segments: &[&str]) -> Result<Value, ClientError> {
        self.send_bytes(Method::POST, segments, &[], Vec::new()).await
    }

    /// Deletes.
    pub async fn delete(&self, segments: &[&str]) -> Result<Value, ClientError> {
        self.telling(self.http.delete(segments)).await
    }

    /// Server-sent events as they come.
    pub async fn event_stream(
        &self,
        segments: &[&str],
    ) -> Result<impl Stream<Item = Result<ServerEvent, ClientError>> + use<>, ClientError> {
        self.http.events(segments).await
    }

    /// Reads server-sent events until the stream ends; `each` gets the data. What was missed is told.
    pub async fn events(
        &self,
        segments: &[&str],
        mut each: impl FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut events = pin!(self.telling(self.http.events(segments)).await?);
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            let next = tokio::select! {
                biased;
                next = events.next() => next,
                _ = look.tick() => {
                    end_if_unread();
                    continue;
                }
            };
            let Some(event) = next.transpose()? else { return Ok(()) };
            match event.missed() {
                Some(missed) => note(&format!("warning: {}", ClientError::Lagged(missed))),
                None => each(&event.data)?,
            }
        }
    }

    /// Says what is waited for, when it takes longer than a moment.
    async fn telling<R>(&self, answer: impl Future<Output = R>) -> R {
        let mut answer = pin!(answer);
        tokio::select! {
            biased;
            answer = &mut answer => answer,
            () = tokio::time::sleep(MOMENT) => {
                if std::io::stderr().is_terminal() {
                    note(&format!("waiting for the host at {} …", self.http.address()));
                }
                answer.await
            }
        }
    }
}

/// How often it is told how much has come.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// Writes what comes into a file; returns how many bytes came.
pub async fn receive(
    chunks: impl Stream<Item = Result<bytes::Bytes, ClientError>>,
    file: &mut std::fs::File,
) -> anyhow::Result<u64> {
    let (mut received, mut told) = (0_u64, Instant::now());
    let mut chunks = pin!(chunks);
    while let Some(chunk) = chunks.next().await.transpose()? {
        file.write_all(&chunk)?;
        received += chunk.len() as u64;
        if told.elapsed() > TELL_EVERY && std::io::stderr().is_terminal() {
            note_piece(&format!("\r{} …    ", human::size(received)));
            told = Instant::now();
        }
    }
    file.sync_all()?;
    Ok(received)
}
