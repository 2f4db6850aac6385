//! Owns the calls of the daemon's RPC. It receives calls with their time limits, and returns answers or errors. See
//! <https://docs.ipfs.tech/reference/kubo/rpc/>.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::multipart::{Form, Part};
use reqwest::redirect::Policy;
use reqwest::{Body, Client, Response, StatusCode};
use secrecy::ExposeSecret as _;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::{Address, ClientError, Settings};
use crate::BackendError;

/// The trailer with an error that occurred after the status 200 was sent.
const STREAM_ERROR: &str = "x-stream-error";

/// The maximum length of an error message, in bytes. The rest is dropped.
const MAX_MESSAGE: usize = 2_048;

/// The RPC of a daemon.
#[derive(Debug)]
pub struct Rpc {
    client: Client,
    address: Address,
}

/// A call of a command.
#[derive(Debug)]
pub struct Call<'a> {
    command: &'static str,
    args: Vec<(&'a str, String)>,
    body: Option<Body>,
    timeout: Duration,
}

impl<'a> Call<'a> {
    /// Makes a call of `command` with a time limit of 30 s.
    pub fn new(command: &'static str) -> Self {
        Self { command, args: Vec::new(), body: None, timeout: Duration::from_secs(30) }
    }

    /// Adds an argument.
    pub fn arg(self, value: impl Into<String>) -> Self {
        self.option("arg", value)
    }

    /// Adds an option.
    pub fn option(mut self, name: &'a str, value: impl Into<String>) -> Self {
        self.args.push((name, value.into()));
        self
    }

    /// Adds the content of a file.
    pub fn file(self, data: Bytes) -> Self {
        self.stream_file(Body::from(data))
    }

    /// Adds the content of a file that is read while it is sent.
    pub fn stream_file(mut self, data: Body) -> Self {
        self.body = Some(data);
        self
    }

    /// Sets the time limit.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }
}

impl Rpc {
    /// Makes a client. The daemon need not run yet.
    pub fn new(settings: &Settings) -> Result<Self, ClientError> {
        dim_client::install_tls();
        let mut headers = HeaderMap::new();
        if let Some(authorization) = &settings.authorization {
            let mut value = HeaderValue::from_str(authorization.expose_secret())
                .map_err(|_| ClientError::Authorization)?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        // A user agent with `/kubo/` in it would have to equal the daemon's version.
        let mut builder = Client::builder()
            .user_agent(concat!("dim/", env!("CARGO_PKG_VERSION")))
            .default_headers(headers)
            .connect_timeout(Duration::from_secs(5))
            // A daemon does not redirect. A program in its place could send keys and tokens to another server.
            .redirect(Policy::none())
            .no_proxy();
        if let Address::Unix(path) = &settings.address {
            builder = builder.unix_socket(path.as_path());
        }
        Ok(Self { client: builder.build()?, address: settings.address.clone() })
    }

    /// Calls and returns the JSON answer.
    pub async fn json<T: DeserializeOwned>(&self, call: Call<'_>) -> Result<T, BackendError> {
        let command = call.command;
        let body = self.bytes(call).await?;
        // A daemon answers some wrong calls with status 200 and no body, such as a timeout without a unit.
        let why = |why: String| BackendError::Unbelievable { call: command, why };
        if body.is_empty() {
            return Err(why("status 200 with an empty body instead of JSON".to_owned()));
        }
        serde_json::from_slice(&body).map_err(|error| why(error.to_string()))
    }

    /// Calls and returns the whole answer, up to the end of its trailers. The maximum is 64 MiB.
    pub async fn bytes(&self, call: Call<'_>) -> Result<Bytes, BackendError> {
        self.bytes_up_to(call, 64 << 20).await
    }

    /// Calls and returns an answer of at most `limit` bytes.
    pub async fn bytes_up_to(&self, call: Call<'_>, limit: usize) -> Result<Bytes, BackendError> {
        let (command, timeout) = (call.command, call.timeout);
        let read = async {
            let response = self.send(call).await?;
            read_whole(command, response, limit).await
        };
        // The daemon has the same time limit, but a frozen daemon does not apply it.
        tokio::time::timeout(timeout + Duration::from_secs(2), read)
            .await
            .map_err(|_| BackendError::Timeout(command))?
    }

    /// Calls and returns the answer as soon as its headers arrive.
    pub async fn stream(&self, call: Call<'_>) -> Result<Response, BackendError> {
        let (command, timeout) = (call.command, call.timeout);
        tokio::time::timeout(timeout, self.send_without_limit(call))
            .await
            .map_err(|_| BackendError::Timeout(command))?
    }

    async fn send(&self, mut call: Call<'_>) -> Result<Response, BackendError> {
        // The daemon needs a unit in the timeout.
        call.args.push(("timeout", format!("{}s", call.timeout.as_secs().max(1))));
        self.send_without_limit(call).await
    }

    async fn send_without_limit(&self, call: Call<'_>) -> Result<Response, BackendError> {
        let mut request = self.client.post(self.address.command(call.command)).query(&call.args);
        if let Some(body) = call.body {
            let part = Part::stream(body).file_name("file");
            request = request.multipart(Form::new().part("file", part));
        }
        let response =
            request.send().await.map_err(|error| self.failed(call.command, &error.without_url()))?;
        if response.status() == StatusCode::OK {
            return Ok(response);
        }
        Err(refused(call.command, response).await)
    }

    /// If there was no connection, the request was not executed. If a connection ended, it may have been.
    fn failed(&self, call: &'static str, error: &reqwest::Error) -> BackendError {
        let mut why = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            why = cause.to_string();
            source = cause.source();
        }
        if !error.is_connect() {
            return BackendError::Interrupted { call, why };
        }
        BackendError::Unreachable { what: format!("the IPFS API at {}", self.address), why }
    }
}

async fn read_whole(command: &'static str, response: Response, limit: usize) -> Result<Bytes, BackendError> {
    let broken = |why: String| BackendError::Interrupted { call: command, why };
    // reqwest drops trailers, but the frames of the body still have them.
    let mut body = http::Response::<Body>::from(response).into_body();
    let mut data = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| broken(error.to_string()))?;
        if let Some(error) = frame.trailers_ref().and_then(|trailers| trailers.get(STREAM_ERROR)) {
            let message = String::from_utf8_lossy(error.as_bytes()).into_owned();
            return Err(BackendError::Refused { call: command, message });
        }
        if let Ok(chunk) = frame.into_data() {
            if data.len() + chunk.len() > limit {
                return Err(BackendError::TooLarge { what: format!("the answer of {command}"), limit });
            }
            data.extend_from_slice(&chunk);
        }
    }
    Ok(data.freeze())
}

/// Most errors are JSON. Bad arguments, unknown commands and refused authorizations are plain text.
async fn refused(command: &'static str, response: Response) -> BackendError {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Error {
        message: String,
    }
    let status = response.status();
    let body = read_whole(command, response, 64 << 10).await.unwrap_or_default();
    let mut message = match serde_json::from_slice::<Error>(&body) {
        Ok(error) => error.message,
        Err(_) => format!("{status}: {}", String::from_utf8_lossy(&body).trim()),
    };
    message.truncate(message.floor_char_boundary(MAX_MESSAGE));
    BackendError::Refused { call: command, message }
}
