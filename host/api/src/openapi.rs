//! Owns the description of the API in OpenAPI 3.1: the parts that all routes share, and `/v1/openapi.json`. The
//! description of a route is at its handler, and no route is served without one.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use dim_model::ident::{KeyName, PluginName, Topic};
use dim_model::time::Since;
use utoipa::openapi::path::{Operation, Parameter, ParameterIn, PathItem};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{Ref, RefOr, Response};
use utoipa::{IntoResponses, Modify, OpenApi, ToResponse, ToSchema};

use crate::error::Problem;

/// The parts that all routes share.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "dim",
        description = "Coordinates a fleet through sandboxed plugins, over IPFS or with nothing installed.\n\n\
            A host offers this on the Unix socket `api.sock` in its state directory, and on loopback with \
            `dim run --listen`. On the socket, which only its owner can open, no token is needed. Over TCP \
            the token of the host is required, as `Authorization: Bearer TOKEN`, or the answer is 401 \
            (`unauthorized`). Requests of web pages are refused.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    tags(
        (name = "jobs", description = "Jobs of the fleet, as the plugin `job-tracker` keeps them"),
        (name = "nodes", description = "Nodes of the fleet, as the plugin `node-registry` keeps them"),
        (name = "topics", description = "Pubsub topics"),
        (name = "fleet", description = "The members of the fleet"),
        (name = "names", description = "IPNS names: the host's own, each under a key, and all others"),
        (name = "plugins", description = "The plugins of the host"),
        (name = "dead letters", description = "Events that a plugin could not handle"),
        (name = "host", description = "The state of the host"),
    ),
    servers(
        (url = "http://127.0.0.1:7080", description = "A host that listens there: `dim run --listen 127.0.0.1:7080`"),
    ),
    // The socket needs no token, TCP needs it.
    security((), ("token" = [])),
    modifiers(&TokenScheme),
    components(
        schemas(Problem, Topic, PluginName, KeyName, Since),
        responses(Failure),
    ),
)]
pub struct Shared;

/// Adds the scheme of the token.
struct TokenScheme;

impl Modify for TokenScheme {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let bearer =
            HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some("The token of the host"));
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("token", SecurityScheme::Http(bearer.build()));
    }
}

/// Bytes without an encoding.
// Generators of clients make no call for a body without a schema.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
pub struct Binary(#[expect(dead_code, reason = "it is read as it comes")] Vec<u8>);

/// Any other error: 401 over TCP without the token, 403 for a request of a web page, 408 for a body that does not
/// arrive in time, 413 for a body of more than 16 MiB, 500 if the store or a plugin fails, 502 to 504 if the backend
/// fails, 503 while the host is down, 507 while the disk is too full for the intake.
#[derive(ToResponse)]
#[response(content_type = "application/problem+json")]
pub struct Failure(#[expect(dead_code, reason = "errors make it")] Problem);

macro_rules! problems {
    ($($(#[doc = $doc:literal])* $name:ident = $status:literal),* $(,)?) => {$(
        $(#[doc = $doc])*
        #[derive(Debug)]
        pub enum $name {}

        impl IntoResponses for $name {
            fn responses() -> BTreeMap<String, RefOr<Response>> {
                [($status.to_owned(), problem(concat!($($doc),*).trim()))].into()
            }
        }
    )*};
}

problems! {
    /// The subject does not exist.
    Missing = "404",
    /// The request contradicts the present state.
    Conflict = "409",
    /// The body has more bytes than allowed.
    TooLarge = "413",
    /// The request is well formed, but refused.
    Refused = "422",
}

fn problem(description: &str) -> RefOr<Response> {
    Ref::builder()
        .ref_location("#/components/responses/Failure".to_owned())
        .description(Some(description))
        .build()
        .into()
}

/// Adds the responses to an operation that every handler has.
fn complete(operation: &mut Operation) {
    for (status, response) in &mut operation.responses.responses {
        if let RefOr::T(response) = response
            && response.description.is_empty()
        {
            let reason = status.parse().ok().and_then(|status: StatusCode| status.canonical_reason());
            response.description = reason.unwrap_or(status).to_owned();
        }
    }
    let responses = &mut operation.responses.responses;
    responses.insert("default".to_owned(), problem(""));
    // An invalid `Last-Event-ID` is no error, so a route with only this header has no 400.
    let is_header = |parameter: &RefOr<Parameter>| matches!(parameter, RefOr::T(parameter) if matches!(parameter.parameter_in, ParameterIn::Header));
    let mut parameters = operation.parameters.iter().flatten();
    if !parameters.all(is_header) || operation.request_body.is_some() {
        responses.insert("400".to_owned(), problem("The request is invalid."));
    }
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut item.get, &mut item.put, &mut item.post, &mut item.patch, &mut item.delete].into_iter().flatten()
}

/// Returns the description of the whole API, an OpenAPI document in JSON.
pub fn document() -> &'static str {
    static DOCUMENT: LazyLock<String> = LazyLock::new(|| {
        let mut document = super::described().into_openapi();
        document.paths.paths.values_mut().flat_map(operations).for_each(complete);
        document.to_pretty_json().expect("a description is plain data")
    });
    &DOCUMENT
}

/// Returns this description.
#[utoipa::path(get, path = "/openapi.json", tag = "host", operation_id = "get_openapi",
    responses((status = 200, body = Object, description = "An OpenAPI document")))]
pub async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], document())
}
