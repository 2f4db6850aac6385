//! The command line's way to the API of a host.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use reqwest::{Method, RequestBuilder, Response, Url};
use serde_json::Value;
use thiserror::Error;

use crate::api::{MAX_BODY, Problem, SOCKET};

/// How long a command is silent while it waits.
const MOMENT: Duration = Duration::from_secs(1);

/// Why a call failed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// There is no host, or no way to it.
    #[error("cannot reach the host at {address}")]
    Unreachable {
        /// Where it was looked for.
        address: String,
        /// Why.
        source: reqwest::Error,
    },
    /// The host says no.
    #[error("{}", .0.detail)]
    Problem(Problem),
    /// The address is none.
    #[error("{0:?} is not the address of a host's API: write unix:PATH or http://127.0.0.1:PORT")]
    Address(String),
    /// The answer is not what a host answers.
    #[error("the answer of {address} is not that of a host: {why}")]
    Strange {
        /// Who answered.
        address: String,
        /// What is strange.
        why: String,
    },
}

/// A client of one host.
#[derive(Debug)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
    address: String,
}

impl Client {
    /// A client for the host at `api`, or for the one whose state is in `state_dir`.
    pub fn new(api: Option<&str>, state_dir: &Path) -> Result<Self, ClientError> {
        crate::install_tls();
        let builder = reqwest::Client::builder().no_proxy();
        let (builder, base, address) = match api {
            Some(http) if http.starts_with("http://") => {
                let base = Url::parse(http).map_err(|_| ClientError::Address(http.to_owned()))?;
                (builder, base, http.to_owned())
            }
            Some(other) => {
                let path = other.strip_prefix("unix:").or_else(|| other.strip_prefix("/unix"));
                let path = path.or_else(|| other.starts_with('/').then_some(other));
                on_socket(builder, path.ok_or_else(|| ClientError::Address(other.to_owned()))?.into())
            }
            None => on_socket(builder, state_dir.join(SOCKET)),
        };
        let http = builder
            .build()
            .map_err(|source| ClientError::Unreachable { address: address.clone(), source })?;
        Ok(Self { http, base, address })
    }

    fn request(&self, method: Method, segments: &[&str]) -> Result<RequestBuilder, ClientError> {
        // A URL cannot hold them: they mean the directory. No id is one of them.
        if let Some(dots) = segments.iter().find(|segment| [".", ".."].contains(*segment)) {
            return Err(refused(400, format!("{dots:?} is no id")));
        }
        let mut url = self.base.clone();
        url.path_segments_mut().expect("the base has a host").pop_if_empty().push("v1").extend(segments);
        Ok(self.http.request(method, url))
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, ClientError> {
        let unreachable = |source| ClientError::Unreachable { address: self.address.clone(), source };
        let response = telling(request.send(), &self.address).await.map_err(unreachable)?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body = response.bytes().await.map_err(unreachable)?;
        Err(match serde_json::from_slice(&body) {
            Ok(problem) => ClientError::Problem(problem),
            Err(_) => self.strange(format!("{status}: {}", String::from_utf8_lossy(&body).trim())),
        })
    }

    fn strange(&self, why: String) -> ClientError {
        ClientError::Strange { address: self.address.clone(), why }
    }

    async fn json(&self, request: RequestBuilder) -> Result<Value, ClientError> {
        let body = self.bytes(request).await?;
        if body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&body).map_err(|error| self.strange(error.to_string()))
    }

    async fn bytes(&self, request: RequestBuilder) -> Result<Bytes, ClientError> {
        let response = self.send(request).await?;
        response
            .bytes()
            .await
            .map_err(|source| ClientError::Unreachable { address: self.address.clone(), source })
    }

    /// Reads JSON.
    pub async fn get(&self, segments: &[&str], query: &[(&str, String)]) -> Result<Value, ClientError> {
        self.json(self.request(Method::GET, segments)?.query(query)).await
    }

    /// Reads bytes as they are.
    pub async fn get_bytes(&self, segments: &[&str]) -> Result<Bytes, ClientError> {
        self.bytes(self.request(Method::GET, segments)?).await
    }

    /// Sends JSON.
    pub async fn send_json(
        &self,
        method: Method,
        segments: &[&str],
        query: &[(&str, String)],
        body: &Value,
    ) -> Result<Value, ClientError> {
        self.json(self.request(method, segments)?.query(query).json(body)).await
    }

    /// Sends bytes as they are.
    pub async fn send_bytes(
        &self,
        method: Method,
        segments: &[&str],
        query: &[(&str, String)],
        body: Vec<u8>,
    ) -> Result<Value, ClientError> {
        // The host would break off in the middle of a body that is too large.
        if body.len() > MAX_BODY {
            return Err(refused(413, format!("it is too large: the host takes at most {MAX_BODY} bytes")));
        }
        self.json(self.request(method, segments)?.query(query).body(body)).await
    }

    /// Deletes.
    pub async fn delete(&self, segments: &[&str]) -> Result<Value, ClientError> {
        self.json(self.request(Method::DELETE, segments)?).await
    }

    /// Reads server-sent events until the stream ends; `each` gets the kind and the data.
    pub async fn events(
        &self,
        segments: &[&str],
        mut each: impl FnMut(&str, &str) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let response = self.send(self.request(Method::GET, segments)?).await?;
        let mut chunks = response.bytes_stream();
        let mut text = Vec::new();
        while let Some(chunk) = chunks.next().await {
            text.extend_from_slice(&chunk?);
            while let Some(end) = text.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = text.drain(..end + 2).collect();
                let (kind, data) = event_of(&String::from_utf8_lossy(&event));
                if !data.is_empty() {
                    each(&kind, &data)?;
                }
            }
        }
        Ok(())
    }
}

/// Tells who waits at a terminal what for, when it takes longer than a moment.
async fn telling<R>(answer: impl Future<Output = R>, address: &str) -> R {
    tokio::pin!(answer);
    tokio::select! {
        biased;
        answer = &mut answer => answer,
        () = tokio::time::sleep(MOMENT) => {
            if std::io::stderr().is_terminal() {
                eprintln!("waiting for the host at {address} …");
            }
            answer.await
        }
    }
}

/// What the host would say no to.
fn refused(status: u16, detail: String) -> ClientError {
    ClientError::Problem(Problem { kind: "invalid".to_owned(), title: "Refused".to_owned(), status, detail })
}

fn on_socket(builder: reqwest::ClientBuilder, path: PathBuf) -> (reqwest::ClientBuilder, Url, String) {
    let base = Url::parse("http://dim.localhost").expect("a valid URL");
    let address = format!("unix:{}", path.display());
    (builder.unix_socket(path), base, address)
}

/// The kind and the data of a server-sent event.
fn event_of(text: &str) -> (String, String) {
    let (mut kind, mut data) = (String::from("message"), Vec::new());
    for line in text.lines() {
        if let Some(value) = line.strip_prefix("event:") {
            kind = value.trim_start().to_owned();
        } else if let Some(value) = line.strip_prefix("data:") {
            data.push(value.strip_prefix(' ').unwrap_or(value));
        }
    }
    (kind, data.join("\n"))
}
