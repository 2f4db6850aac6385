//! Owns the way to the API: requests, answers and streams of events.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::{Method, RequestBuilder, Response, Url};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{Address, ClientError, Problem};

/// Largest body that a host takes, in bytes: the largest document, and a little.
pub const MAX_BODY: usize = (16 << 20) + 4096;

/// A connection to one host. Cheap to clone.
#[derive(Clone)]
pub struct Http {
    inner: Arc<Inner>,
}

struct Inner {
    http: reqwest::Client,
    base: Url,
    address: Address,
}

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http").field("address", &self.inner.address).finish_non_exhaustive()
    }
}

/// An event of a stream: its kind and its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerEvent {
    /// Which kind.
    pub kind: String,
    /// What it says.
    pub data: String,
}

impl ServerEvent {
    /// How many entries were missed before this, if that is what it says; 0 if that is not known.
    pub fn missed(&self) -> Option<u64> {
        (self.kind == "lagged").then(|| self.data.parse().unwrap_or(0))
    }

    /// An error if this says that entries were missed.
    pub(crate) fn check_lagged(&self) -> Result<(), ClientError> {
        self.missed().map_or(Ok(()), |missed| Err(ClientError::Lagged(missed)))
    }
}

impl Http {
    /// A connection to the host at `address`, which need not be there yet.
    pub fn new(address: Address) -> Result<Self, ClientError> {
        Self::with_token(address, None)
    }

    /// A connection that shows a token, which a host asks for over TCP.
    pub fn with_token(address: Address, token: Option<&SecretString>) -> Result<Self, ClientError> {
        crate::install_tls();
        // A host redirects nobody: the token would go along.
        let mut builder = reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none());
        if let Some(token) = token {
            let value = HeaderValue::from_str(&format!("Bearer {}", token.expose_secret()));
            let mut value = value.map_err(|_| ClientError::Token)?;
            value.set_sensitive(true);
            builder = builder.default_headers(HeaderMap::from_iter([(AUTHORIZATION, value)]));
        }
        let (builder, base) = match &address {
            Address::Http(url) => (builder, url.clone()),
            Address::Unix(path) => {
                let base = Url::parse("http://dim.localhost").expect("a valid URL");
                (builder.unix_socket(path.as_path()), base)
            }
        };
        let unreachable = |source| ClientError::Unreachable { address: address.to_string(), source };
        let http = builder.build().map_err(unreachable)?;
        Ok(Self { inner: Arc::new(Inner { http, base, address }) })
    }

    /// Where the host is.
    pub fn address(&self) -> &Address {
        &self.inner.address
    }

    /// A request below `/v1`; each segment is one part of the path, whatever is in it.
    pub fn request(&self, method: Method, segments: &[&str]) -> Result<RequestBuilder, ClientError> {
        if let Some(none) = segments.iter().find(|segment| !is_id(segment)) {
            return Err(ClientError::Problem(Problem::refused(400, "invalid", format!("{none:?} is no id"))));
        }
        let mut url = self.inner.base.clone();
        url.path_segments_mut().expect("the base has a host").pop_if_empty().push("v1").extend(segments);
        Ok(self.inner.http.request(method, url))
    }

    /// Sends a request; what is not a success is an error.
    pub async fn send(&self, request: RequestBuilder) -> Result<Response, ClientError> {
        let response = request.send().await.map_err(|source| self.unreachable(source))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body = response.bytes().await.map_err(|source| self.unreachable(source))?;
        Err(match serde_json::from_slice(&body) {
            Ok(problem) => ClientError::Problem(Box::new(problem)),
            Err(_) => self.strange(format!("{status}: {}", String::from_utf8_lossy(&body).trim())),
        })
    }

    /// Sends a request and reads bytes as they are.
    pub async fn bytes(&self, request: RequestBuilder) -> Result<Bytes, ClientError> {
        let response = self.send(request).await?;
        response.bytes().await.map_err(|source| self.unreachable(source))
    }

    /// Sends a request and reads bytes as they come.
    pub async fn chunks(
        &self,
        request: RequestBuilder,
    ) -> Result<impl Stream<Item = Result<Bytes, ClientError>> + Send + use<>, ClientError> {
        let (http, response) = (self.clone(), self.send(request).await?);
        Ok(response.bytes_stream().map(move |chunk| {
            chunk.map_err(|source| ClientError::BrokenOff { address: http.address().to_string(), source })
        }))
    }

    /// Sends a request and reads JSON; no body is null.
    pub async fn json<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, ClientError> {
        let body = self.bytes(request).await?;
        let body = if body.is_empty() { Bytes::from_static(b"null") } else { body };
        serde_json::from_slice(&body).map_err(|error| self.strange(error.to_string()))
    }

    /// Reads JSON.
    pub async fn get<T: DeserializeOwned>(
        &self,
        segments: &[&str],
        query: &[(&str, String)],
    ) -> Result<T, ClientError> {
        self.json(self.request(Method::GET, segments)?.query(query)).await
    }

    /// Reads the rows of a list page by page, `limit` of them or all; `id` is the member that they are
    /// ordered by.
    pub async fn rows<T: DeserializeOwned>(
        &self,
        segments: &[&str],
        query: &[(&str, String)],
        id: &str,
        limit: Option<usize>,
    ) -> Result<Vec<T>, ClientError> {
        let (mut rows, mut after) = (Vec::new(), None);
        loop {
            let mut query = query.to_vec();
            query.extend(limit.map(|limit| ("limit", (limit - rows.len()).to_string())));
            if let Some(after) = after.take() {
                query.retain(|(name, _)| *name != "after");
                query.push(("after", after));
            }
            let page: Vec<Value> = self.get(segments, &query).await?;
            after = page.last().and_then(|last| match &last[id] {
                Value::String(id) => Some(id.clone()),
                Value::Number(id) => Some(id.to_string()),
                _ => None,
            });
            for row in page {
                rows.push(serde_json::from_value(row).map_err(|error| self.strange(error.to_string()))?);
            }
            if after.is_none() || limit.is_some_and(|limit| rows.len() >= limit) {
                return Ok(rows);
            }
        }
    }

    /// Sends JSON and reads JSON.
    pub async fn send_json<T: DeserializeOwned>(
        &self,
        method: Method,
        segments: &[&str],
        query: &[(&str, String)],
        body: &(impl Serialize + ?Sized),
    ) -> Result<T, ClientError> {
        self.json(self.request(method, segments)?.query(query).json(body)).await
    }

    /// Sends bytes as they are and reads JSON.
    pub async fn send_bytes<T: DeserializeOwned>(
        &self,
        method: Method,
        segments: &[&str],
        query: &[(&str, String)],
        body: impl Into<Bytes>,
    ) -> Result<T, ClientError> {
        let body = body.into();
        // The host would break off in the middle of a body that is too large.
        if body.len() > MAX_BODY {
            let detail = format!("it is too large: the host takes at most {MAX_BODY} bytes");
            return Err(ClientError::Problem(Problem::refused(413, "too-large", detail)));
        }
        self.json(self.request(method, segments)?.query(query).body(body)).await
    }

    /// Sends a plugin's component and reads JSON. How large it may be the host says: more than any other body.
    pub async fn send_component<T: DeserializeOwned>(
        &self,
        plugin: &str,
        query: &[(&str, String)],
        component: impl Into<Bytes>,
    ) -> Result<T, ClientError> {
        let request = self.request(Method::PUT, &["plugins", plugin, "component"])?;
        self.json(request.query(query).body(component.into())).await
    }

    /// Deletes.
    pub async fn delete(&self, segments: &[&str]) -> Result<Value, ClientError> {
        self.json(self.request(Method::DELETE, segments)?).await
    }

    /// The server-sent events of a stream, until it ends or fails.
    pub async fn events(
        &self,
        segments: &[&str],
    ) -> Result<impl Stream<Item = Result<ServerEvent, ClientError>> + Send + use<>, ClientError> {
        let response = self.send(self.request(Method::GET, segments)?).await?;
        let reading =
            Reading { http: self.clone(), chunks: response.bytes_stream().boxed(), text: Vec::new() };
        Ok(stream::unfold(Some(reading), |reading| async {
            let mut reading = reading?;
            match reading.next().await {
                Some(Ok(event)) => Some((Ok(event), Some(reading))),
                Some(Err(error)) => Some((Err(error), None)),
                None => None,
            }
        }))
    }

    fn unreachable(&self, source: reqwest::Error) -> ClientError {
        ClientError::Unreachable { address: self.inner.address.to_string(), source: source.without_url() }
    }

    /// The error of an answer that no host gives.
    pub(crate) fn strange(&self, why: String) -> ClientError {
        ClientError::Strange { address: self.inner.address.to_string(), why }
    }
}

/// Whether a URL can hold a text as a part of its path: dots mean the directory, and control characters
/// are dropped without a word.
fn is_id(text: &str) -> bool {
    !["", ".", ".."].contains(&text) && !text.chars().any(char::is_control)
}

struct Reading {
    http: Http,
    chunks: stream::BoxStream<'static, reqwest::Result<Bytes>>,
    text: Vec<u8>,
}

impl Reading {
    async fn next(&mut self) -> Option<Result<ServerEvent, ClientError>> {
        loop {
            while let Some(end) = self.text.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = self.text.drain(..end + 2).collect();
                // One without data keeps the connection alive.
                if let Some(event) = event_of(&String::from_utf8_lossy(&event)) {
                    return Some(Ok(event));
                }
            }
            if self.text.len() > MAX_BODY {
                return Some(Err(self.http.strange("an event without an end".to_owned())));
            }
            match self.chunks.next().await? {
                Ok(chunk) => self.text.extend_from_slice(&chunk),
                Err(source) => return Some(Err(self.http.unreachable(source))),
            }
        }
    }
}

fn event_of(text: &str) -> Option<ServerEvent> {
    let (mut kind, mut data) = (String::from("message"), Vec::new());
    for line in text.lines() {
        if let Some(value) = line.strip_prefix("event:") {
            kind = value.trim_start().to_owned();
        } else if let Some(value) = line.strip_prefix("data:") {
            data.push(value.strip_prefix(' ').unwrap_or(value));
        }
    }
    (!data.is_empty()).then(|| ServerEvent { kind, data: data.join("\n") })
}
