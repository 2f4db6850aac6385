//! Owns the extraction of parts of a request for handlers. A request that does not fit is answered with problem
//! details.

use std::sync::Arc;

use axum::extract::connect_info::ConnectInfo;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use dim_server::host::{Host, Standing, Supervised};

use crate::ApiError;
use crate::body_timeout::Late;

/// The running host.
#[derive(Debug)]
pub struct Current(pub Arc<Host>);

impl FromRequestParts<Arc<Supervised>> for Current {
    type Rejection = ApiError;

    async fn from_request_parts(_: &mut Parts, host: &Arc<Supervised>) -> Result<Self, ApiError> {
        match host.standing() {
            Standing::Running(host) => Ok(Self(host)),
            Standing::Down { reason, since } => {
                Err(ApiError::unavailable(format!("the host is down since {since:.0}: {reason}")))
            }
        }
    }
}

/// The caller, for records: the user of a socket, or the address of a connection.
#[derive(Clone, Debug)]
pub struct Caller(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let peer = parts.extensions.get::<ConnectInfo<Self>>();
        Ok(peer.map_or_else(|| Self("the API".to_owned()), |ConnectInfo(peer)| peer.clone()))
    }
}

/// A part of the path.
#[derive(Debug, FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(ApiError))]
pub struct Path<T>(pub T);

/// The query.
#[derive(Debug, FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(ApiError))]
pub struct Query<T>(pub T);

/// A body of JSON.
#[derive(Debug, FromRequest)]
#[from_request(via(axum::Json), rejection(ApiError))]
pub struct Body<T>(pub T);

/// A body without conversion: bytes or text.
#[derive(Debug)]
pub struct Plain<T>(pub T);

impl<S, T> FromRequest<S> for Plain<T>
where
    S: Send + Sync,
    T: FromRequest<S>,
    ApiError: From<T::Rejection>,
{
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        Ok(Self(T::from_request(request, state).await?))
    }
}

macro_rules! rejections {
    ($($rejection:ident),*) => {$(
        impl From<axum::extract::rejection::$rejection> for ApiError {
            fn from(rejection: axum::extract::rejection::$rejection) -> Self {
                if Late::is_cause(&rejection) {
                    return Self::late();
                }
                Self::of_status(rejection.status(), rejection.body_text())
            }
        }
    )*};
}

rejections!(PathRejection, QueryRejection, JsonRejection, BytesRejection, StringRejection);
