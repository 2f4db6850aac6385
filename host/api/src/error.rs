//! Owns the errors of the API. It converts errors of all layers to problem details,
//! <https://www.rfc-editor.org/rfc/rfc9457>.

use std::net::IpAddr;

use axum::Json;
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use dim_ipfs::BackendError;
use dim_ipfs::keys::{KeyError, TakeKeyError};
use dim_model::ident::{Digest, InvalidWord};
use dim_network::encrypted_documents::CipherError;
use dim_server::host::{AdoptError, ForgetError, ReloadError, ReplaceError};
use dim_store::StoreError;
use dim_store::batch::ReplyError;
use dim_store::commit::CommitError;
use serde::Serialize;
use utoipa::ToSchema;

use crate::MAX_BODY;
use crate::body_timeout::Late;

/// The body of an error: problem details, <https://www.rfc-editor.org/rfc/rfc9457>.
#[derive(Debug, Serialize, ToSchema)]
pub struct Problem {
    /// The kind of the error, a stable word.
    #[serde(rename = "type")]
    kind: &'static str,
    /// The kind as text.
    title: &'static str,
    /// The HTTP status.
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    /// The description of this error.
    detail: String,
    /// The requested permissions that are not granted, as text.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    missing: Vec<String>,
    /// The digest of the component that requests them, or that nobody vouches for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String, nullable = false)]
    digest: Option<Digest>,
}

/// An error of the API.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    detail: String,
    missing: Vec<String>,
    digest: Option<Digest>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, detail: impl ToString) -> Self {
        Self { status, kind, detail: detail.to_string(), missing: Vec::new(), digest: None }
    }

    /// Returns the description.
    pub fn detail(&self) -> &str {
        &self.detail
    }

    /// Returns an error: the request is invalid.
    pub fn invalid(detail: impl ToString) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid", detail)
    }

    /// Returns an error with a given status: the request is invalid.
    pub fn of_status(status: StatusCode, detail: String) -> Self {
        if status == StatusCode::PAYLOAD_TOO_LARGE {
            return Self::too_large(format!("the body has more than {MAX_BODY} bytes"));
        }
        Self::new(status, "invalid", detail)
    }

    /// Returns an error: the caller has not sent the token.
    pub fn unauthorized() -> Self {
        let detail = "over TCP the API's token is required, as `Authorization: Bearer TOKEN`: none was sent, or a wrong one";
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", detail)
    }

    /// Returns an error: the request is not allowed in this way.
    pub fn forbidden(detail: impl ToString) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", detail)
    }

    /// Returns an error: the subject does not exist.
    pub fn not_found(detail: impl ToString) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not-found", detail)
    }

    /// Returns an error: the body did not arrive in time.
    pub fn late() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "late", Late)
    }

    /// Returns the error for a body that could not be read.
    pub fn of_body(error: axum::Error) -> Self {
        if Late::is_cause(&error) { Self::late() } else { Self::invalid(error) }
    }

    /// Returns an error: the request is impossible now and may be possible later.
    pub fn unavailable(detail: impl ToString) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", detail)
    }

    /// Returns an error: the request contradicts the present state.
    pub fn conflict(detail: impl ToString) -> Self {
        Self::new(StatusCode::CONFLICT, "conflict", detail)
    }

    /// Returns an error: the request has more bytes than allowed.
    pub fn too_large(detail: impl ToString) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too-large", detail)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let problem = Problem {
            kind: self.kind,
            title: self.status.canonical_reason().unwrap_or("Error"),
            status: self.status.as_u16(),
            detail: self.detail,
            missing: self.missing,
            digest: self.digest,
        };
        let mut response = (self.status, Json(problem)).into_response();
        let problem_json = HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(header::CONTENT_TYPE, problem_json);
        if response.status() == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            // A caller without the token keeps no connection.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

impl From<InvalidWord> for ApiError {
    fn from(error: InvalidWord) -> Self {
        Self::invalid(error)
    }
}

impl From<ReplyError> for ApiError {
    fn from(error: ReplyError) -> Self {
        let (status, kind) = match &error {
            ReplyError::UnknownMethod(_) => (StatusCode::NOT_FOUND, "unknown-method"),
            ReplyError::Invalid(_) => (StatusCode::BAD_REQUEST, "invalid"),
            ReplyError::NotFound(_) => (StatusCode::NOT_FOUND, "not-found"),
            ReplyError::Conflict(_) => (StatusCode::CONFLICT, "conflict"),
            ReplyError::Refused(_) => (StatusCode::UNPROCESSABLE_ENTITY, "refused"),
            ReplyError::Failed(_) => (StatusCode::INTERNAL_SERVER_ERROR, "plugin-failed"),
            ReplyError::NoPlugin(_) => (StatusCode::NOT_FOUND, "no-plugin"),
            ReplyError::IntakeStopped(_) => (StatusCode::INSUFFICIENT_STORAGE, "no-room"),
            ReplyError::Unavailable(_) => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
        };
        Self::new(status, kind, error)
    }
}

impl From<ReplaceError> for ApiError {
    fn from(error: ReplaceError) -> Self {
        let detail = dim_model::error_chain::chain(&error);
        let (mut missing, mut digest) = (Vec::new(), None);
        let (status, kind) = match error {
            ReplaceError::AsksForMore(wanting) => {
                digest = Some(wanting.inspection.digest);
                missing = wanting.missing;
                (StatusCode::UNPROCESSABLE_ENTITY, "asks-for-more")
            }
            ReplaceError::Untrusted { digest: untrusted, .. } => {
                digest = Some(untrusted);
                (StatusCode::UNPROCESSABLE_ENTITY, "untrusted")
            }
            ReplaceError::Moved(_) => (StatusCode::CONFLICT, "conflict"),
            ReplaceError::KeyTaken { .. } => (StatusCode::CONFLICT, "key-taken"),
            ReplaceError::NoPlugin(name) => return ReplyError::NoPlugin(name.to_string()).into(),
            ReplaceError::Refused(_)
            | ReplaceError::Component(_)
            | ReplaceError::Stored(_)
            | ReplaceError::Run(_)
            | ReplaceError::DoesNotStart(_) => (StatusCode::UNPROCESSABLE_ENTITY, "refused"),
            ReplaceError::IntakeStopped(error) => return ReplyError::from(error).into(),
            ReplaceError::NoWayBack(_) => (StatusCode::CONFLICT, "no-way-back"),
            ReplaceError::Closed => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
            ReplaceError::Keep(_) | ReplaceError::Store(_) => (StatusCode::INTERNAL_SERVER_ERROR, "store"),
        };
        Self { missing, digest, ..Self::new(status, kind, detail) }
    }
}

impl From<ReloadError> for ApiError {
    fn from(error: ReloadError) -> Self {
        let detail = dim_model::error_chain::chain(&error);
        match error {
            ReloadError::NoFile => Self::conflict(detail),
            ReloadError::Read(_) | ReloadError::Wrong { .. } => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "refused", detail)
            }
            ReloadError::Plugin { source, .. } => Self { detail, ..source.into() },
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        let detail = dim_model::error_chain::chain(&error);
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "store", detail)
    }
}

impl From<CommitError> for ApiError {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::Store(error) => error.into(),
            CommitError::IntakeStopped(error) => ReplyError::from(error).into(),
            CommitError::Closed => Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", error),
        }
    }
}

impl From<KeyError> for ApiError {
    fn from(error: KeyError) -> Self {
        let detail = dim_model::error_chain::chain(&error);
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "key", detail)
    }
}

impl From<AdoptError> for ApiError {
    fn from(error: AdoptError) -> Self {
        let detail = dim_model::error_chain::chain(&error);
        match error {
            AdoptError::NotHeld(_) | AdoptError::NoKey(_) | AdoptError::Encrypted { .. } => {
                Self::conflict(detail)
            }
            AdoptError::Unread { source, .. } => Self { detail, ..source.into() },
            AdoptError::Refused { source, .. } => Self { detail, ..source.into() },
            AdoptError::NoRecord(_) | AdoptError::NoImporter(_) | AdoptError::NotJson { .. } => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "refused", detail)
            }
            AdoptError::Commit(error) => error.into(),
        }
    }
}

impl From<TakeKeyError> for ApiError {
    fn from(error: TakeKeyError) -> Self {
        match error {
            TakeKeyError::NoKey(_) => Self::not_found(error),
            TakeKeyError::OtherName { .. } => Self::conflict(error),
            TakeKeyError::Exported(_) => Self::new(StatusCode::UNPROCESSABLE_ENTITY, "refused", error),
            TakeKeyError::Key(error) => error.into(),
        }
    }
}

impl From<ForgetError> for ApiError {
    fn from(error: ForgetError) -> Self {
        match error {
            ForgetError::NoKey(_) => Self::not_found(error),
            ForgetError::InUse { .. } | ForgetError::OwnKey(_) => Self::conflict(error),
            ForgetError::Key(error) => error.into(),
            ForgetError::Commit(error) => error.into(),
        }
    }
}

impl From<BackendError> for ApiError {
    fn from(error: BackendError) -> Self {
        let (status, kind) = match &error {
            BackendError::NotFound(_) => (StatusCode::NOT_FOUND, "not-found"),
            BackendError::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "too-large"),
            BackendError::Timeout(_) => (StatusCode::GATEWAY_TIMEOUT, "backend-timeout"),
            BackendError::Unreachable { .. } | BackendError::Interrupted { .. } => {
                (StatusCode::SERVICE_UNAVAILABLE, "backend-unreachable")
            }
            BackendError::Refused { .. } | BackendError::Unbelievable { .. } => {
                (StatusCode::BAD_GATEWAY, "backend")
            }
            BackendError::Store(_) => (StatusCode::INTERNAL_SERVER_ERROR, "store"),
        };
        Self::new(status, kind, error)
    }
}

impl From<CipherError> for ApiError {
    fn from(error: CipherError) -> Self {
        match error {
            CipherError::Backend(error) => error.into(),
            CipherError::NoKey(_) | CipherError::Unreadable(_) | CipherError::OtherName { .. } => {
                Self::conflict(error)
            }
            CipherError::TooLarge(_) => Self::too_large(error),
            CipherError::Malformed(_) | CipherError::Undecipherable => {
                Self::new(StatusCode::BAD_GATEWAY, "backend", error)
            }
        }
    }
}

/// Refuses requests of web pages, because a page of any origin can reach loopback through a browser.
pub async fn refuse_browsers(request: Request, next: Next) -> Result<Response, ApiError> {
    let headers = request.headers();
    let says = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let other_site = says("sec-fetch-site").is_some_and(|site| !["same-origin", "none"].contains(&site));
    // A foreign DNS name that points to loopback does not name this host.
    let rebound = says("host").is_some_and(|host| !is_local(host));
    if headers.contains_key(header::ORIGIN) || other_site || rebound {
        return Err(ApiError::forbidden("requests of web pages are refused"));
    }
    Ok(next.run(request).await)
}

/// Returns whether a `Host` header names this machine: loopback, or a name that only this machine resolves.
fn is_local(host: &str) -> bool {
    let name = host.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok());
    let name = name.map_or(host, |(name, _)| name).trim_start_matches('[').trim_end_matches(']');
    // A name without a dot comes from a caller of the socket, or from the machine's own hosts file.
    name.parse::<IpAddr>().map_or(!name.contains('.') || name.ends_with(".localhost"), |ip| ip.is_loopback())
}

/// Answers a request for an unknown path.
pub async fn no_such_route(uri: axum::http::Uri) -> ApiError {
    ApiError::not_found(format!("there is no {}", uri.path()))
}

/// Answers a request with a method that the path does not have.
pub async fn no_such_method() -> ApiError {
    let detail = "the path exists, but does not allow this method";
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", detail)
}
