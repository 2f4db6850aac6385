//! Owns the HTTP connection to the API: requests, responses and event streams.

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

/// Maximum size of a request body in bytes: the largest document and 4,096 bytes more. Components may be larger.
pub const MAX_BODY: usize = (16 << 20) + 4096;

/// An HTTP client of one host. Cheap to clone.
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

/// A server-sent event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerEvent {
    /// The kind of the event.
    pub kind: String,
    /// The data of the event.
    pub data: String,
    /// The id after which a stream resumes, if the event has one.
    pub id: Option<String>,
}

impl ServerEvent {
    /// Returns the number of missed entries if this is an event `lagged`; 0 if the number is unknown.
    pub fn missed(&self) -> Option<u64> {
        (self.kind == "lagged").then(|| self.data.parse().unwrap_or(0))
    }

    /// Returns [`ClientError::Lagged`] if this is an event `lagged`.
    pub(crate) fn check_lagged(&self) -> Result<(), ClientError> {
        self.missed().map_or(Ok(()), |missed| Err(ClientError::Lagged(missed)))
    }
}

impl Http {
    /// Creates a client of the host at `address`, without a token. The host does not need to run yet.
    pub fn new(address: Address) -> Result<Self, ClientError> {
        Self::with_token(address, None)
    }

    /// Creates a client that sends a token. A host requires the token over TCP.
    ///
    /// # Errors
    ///
    /// Returns [`ClientError::Token`] if the token contains characters that are invalid in a header.
    pub fn with_token(address: Address, token: Option<&SecretString>) -> Result<Self, ClientError> {
        crate::install_tls();
        // A host never redirects, and a redirect would send the token to another server.
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

    /// Returns the address of the host.
    pub fn address(&self) -> &Address {
        &self.inner.address
    }

    /// Creates a request to a path under `/v1`. Each segment is one part of the path and is escaped.
    ///
    /// # Errors
    ///
    /// Returns a [`ClientError::Problem`] with status 400 if a segment is empty, `.` or `..`, or contains control
    /// characters.
    pub fn request(&self, method: Method, segments: &[&str]) -> Result<RequestBuilder, ClientError> {
        if let Some(none) = segments.iter().find(|segment| !is_id(segment)) {
            return Err(ClientError::Problem(Problem::refused(
                400,
                "invalid",
                format!("{none:?} is not a valid id"),
            )));
        }
        let mut url = self.inner.base.clone();
        url.path_segments_mut().expect("the base has a host").pop_if_empty().push("v1").extend(segments);
        Ok(self.inner.http.request(method, url))
    }

    /// Sends a request. A response without a success status is an error.
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

    /// Sends a request and returns the response body.
    pub async fn bytes(&self, request: RequestBuilder) -> Result<Bytes, ClientError> {
        let response = self.send(request).await?;
        response.bytes().await.map_err(|source| self.unreachable(source))
    }

    /// Sends a request and returns the response body as a stream.
    pub async fn chunks(
        &self,
        request: RequestBuilder,
    ) -> Result<impl Stream<Item = Result<Bytes, ClientError>> + Send + use<>, ClientError> {
        let (http, response) = (self.clone(), self.send(request).await?);
        Ok(response.bytes_stream().map(move |chunk| {
            chunk.map_err(|source| ClientError::BrokenOff { address: http.address().to_string(), source })
        }))
    }

    /// Sends a request and reads JSON. An empty body is read as null.
    pub async fn json<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, ClientError> {
        let body = self.bytes(request).await?;
        let body = if body.is_empty() { Bytes::from_static(b"null") } else { body };
        serde_json::from_slice(&body).map_err(|error| self.strange(error.to_string()))
    }

    /// Sends a GET request and reads JSON.
    pub async fn get<T: DeserializeOwned>(
        &self,
        segments: &[&str],
        query: &[(&str, String)],
    ) -> Result<T, ClientError> {
        self.json(self.request(Method::GET, segments)?.query(query)).await
    }

    /// Reads the rows of a list page by page: at most `limit`, or all. The list is sorted by the member `id`.
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

    /// Sends a body and reads JSON.
    ///
    /// # Errors
    ///
    /// Returns a [`ClientError::Problem`] with status 413, without a request, if the body is larger than [`MAX_BODY`].
    pub async fn send_bytes<T: DeserializeOwned>(
        &self,
        method: Method,
        segments: &[&str],
        query: &[(&str, String)],
        body: impl Into<Bytes>,
    ) -> Result<T, ClientError> {
        let body = body.into();
        // The host would close the connection in the middle of a body that is too large, without a readable error.
        if body.len() > MAX_BODY {
            let detail = format!("the body is too large: the host accepts at most {MAX_BODY} bytes");
            return Err(ClientError::Problem(Problem::refused(413, "too-large", detail)));
        }
        self.json(self.request(method, segments)?.query(query).body(body)).await
    }

    /// Sends a plugin's component and reads JSON. The host checks its size: a component may exceed [`MAX_BODY`].
    pub async fn send_component<T: DeserializeOwned>(
        &self,
        plugin: &str,
        query: &[(&str, String)],
        component: impl Into<Bytes>,
    ) -> Result<T, ClientError> {
        let request = self.request(Method::PUT, &["plugins", plugin, "component"])?;
        self.json(request.query(query).body(component.into())).await
    }

    /// Sends a DELETE request and reads JSON.
    pub async fn delete(&self, segments: &[&str]) -> Result<Value, ClientError> {
        self.json(self.request(Method::DELETE, segments)?).await
    }

    /// Opens a stream of server-sent events. It ends with the response or after the first error.
    pub async fn events(
        &self,
        segments: &[&str],
    ) -> Result<impl Stream<Item = Result<ServerEvent, ClientError>> + Send + use<>, ClientError> {
        self.events_of(self.request(Method::GET, segments)?).await
    }

    /// Reads server-sent events as the answer to a request, for example with a parameter or with `Last-Event-ID`.
    pub async fn events_of(
        &self,
        request: RequestBuilder,
    ) -> Result<impl Stream<Item = Result<ServerEvent, ClientError>> + Send + use<>, ClientError> {
        let response = self.send(request).await?;
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

    /// Creates the error for a response that is not one of a host's API.
    pub(crate) fn strange(&self, why: String) -> ClientError {
        ClientError::Strange { address: self.inner.address.to_string(), why }
    }
}

/// Returns whether a text can be a segment of a URL path. `.` and `..` mean a directory, and URL parsers drop control
/// characters silently.
fn is_id(text: &str) -> bool {
    !["", ".", ".."].contains(&text) && !text.chars().any(char::is_control)
}

/// The state of a stream of server-sent events: the response and its unparsed bytes.
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
                // An event without data only keeps the connection alive.
                if let Some(event) = event_of(&String::from_utf8_lossy(&event)) {
                    return Some(Ok(event));
                }
            }
            if self.text.len() > MAX_BODY {
                return Some(Err(self.http.strange("an event without end".to_owned())));
            }
            match self.chunks.next().await? {
                Ok(chunk) => self.text.extend_from_slice(&chunk),
                Err(source) => return Some(Err(self.http.unreachable(source))),
            }
        }
    }
}

fn event_of(text: &str) -> Option<ServerEvent> {
    let (mut kind, mut data, mut id) = (String::from("message"), Vec::new(), None);
    for line in text.lines() {
        if let Some(value) = line.strip_prefix("event:") {
            kind = value.trim_start().to_owned();
        } else if let Some(value) = line.strip_prefix("id:") {
            id = Some(value.trim_start().to_owned());
        } else if let Some(value) = line.strip_prefix("data:") {
            data.push(value.strip_prefix(' ').unwrap_or(value));
        }
    }
    (!data.is_empty()).then(|| ServerEvent { kind, data: data.join("\n"), id })
}
