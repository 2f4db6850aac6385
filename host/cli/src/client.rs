//! Owns the client of the command line for the API of a host. Receives requests; returns JSON, bytes or streams, and
//! shows on a terminal what it is waiting for.

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

use crate::human;
use crate::output::{end_if_unread, note, note_piece};

/// Time that a command waits before it shows that it is waiting.
const MOMENT: Duration = Duration::from_secs(1);

/// Interval at which an idle stream checks whether standard output still has a reader.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A client of one host. At a terminal it shows that it is waiting for the host.
#[derive(Clone, Debug)]
pub struct Client {
    http: Http,
}

impl Client {
    /// Creates a client for the host at `address`. An address over TCP needs a token.
    pub fn new(address: Address, token: Option<&SecretString>) -> Result<Self, ClientError> {
        Ok(Self { http: Http::with_token(address, token)? })
    }

    /// Sends a `GET` request; returns the JSON answer.
    pub async fn get(&self, segments: &[&str], query: &[(&str, String)]) -> Result<Value, ClientError> {
        self.telling(self.http.get(segments, query)).await
    }

    /// Reads the rows of a list page by page: at most `limit`, or all. `id` is the member by which the rows are
    /// ordered.
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

    /// Sends a `GET` request; returns the bytes of the answer.
    pub async fn get_bytes(&self, segments: &[&str]) -> Result<Bytes, ClientError> {
        self.telling(self.http.bytes(self.http.request(Method::GET, segments)?)).await
    }

    /// Sends JSON in a `POST` request; returns the answer as a stream of bytes.
    pub async fn chunks(
        &self,
        segments: &[&str],
        body: &Value,
    ) -> Result<impl Stream<Item = Result<Bytes, ClientError>> + use<>, ClientError> {
        let request = self.http.request(Method::POST, segments)?.json(body);
        self.telling(self.http.chunks(request)).await
    }

    /// Sends a `GET` request; returns the answer as a stream of bytes.
    pub async fn get_chunks(
        &self,
        segments: &[&str],
        query: &[(&str, String)],
    ) -> Result<impl Stream<Item = Result<Bytes, ClientError>> + use<>, ClientError> {
        let request = self.http.request(Method::GET, segments)?.query(query);
        self.telling(self.http.chunks(request)).await
    }

    /// Sends JSON; returns the JSON answer.
    pub async fn send_json(
        &self,
        method: Method,
        segments: &[&str],
        query: &[(&str, String)],
        body: &(impl Serialize + ?Sized),
    ) -> Result<Value, ClientError> {
        self.telling(self.http.send_json(method, segments, query, body)).await
    }

    /// Sends bytes; returns the JSON answer.
    pub async fn send_bytes(
        &self,
        method: Method,
        segments: &[&str],
        query: &[(&str, String)],
        body: Vec<u8>,
    ) -> Result<Value, ClientError> {
        self.telling(self.http.send_bytes(method, segments, query, body)).await
    }

    /// Sends the component of a plugin; returns the change as JSON.
    pub async fn send_component(
        &self,
        plugin: &str,
        query: &[(&str, String)],
        component: Vec<u8>,
    ) -> Result<Value, ClientError> {
        self.telling(self.http.send_component(plugin, query, component)).await
    }

    /// Sends a `POST` request without a body.
    pub async fn post(&self, segments: &[&str]) -> Result<Value, ClientError> {
        self.send_bytes(Method::POST, segments, &[], Vec::new()).await
    }

    /// Sends a `DELETE` request.
    pub async fn delete(&self, segments: &[&str]) -> Result<Value, ClientError> {
        self.telling(self.http.delete(segments)).await
    }

    /// Opens a stream of server-sent events.
    pub async fn event_stream(
        &self,
        segments: &[&str],
    ) -> Result<impl Stream<Item = Result<ServerEvent, ClientError>> + use<>, ClientError> {
        self.http.events(segments).await
    }

    /// Reads server-sent events until the stream ends, and passes the data of each to `each`. A warning on standard
    /// error gives the number of missed events. Ends the process if standard output has no reader any more.
    pub async fn events(
        &self,
        segments: &[&str],
        query: &[(&str, &str)],
        mut each: impl FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let request = self.http.request(Method::GET, segments)?.query(query);
        let mut events = pin!(self.telling(self.http.events_of(request)).await?);
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

    /// Awaits an answer. After [`MOMENT`] it shows at a terminal that it is waiting for the host.
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

/// Interval between two updates of the number of received bytes.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// Writes a stream of bytes into a file and syncs it; returns the number of bytes.
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
