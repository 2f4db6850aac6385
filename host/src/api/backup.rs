//! `/v1/backup`: the host's store and keys, encrypted.

use axum::Extension;
use axum::response::Response;
use serde::Deserialize;
use utoipa::ToSchema;

use super::extract::{Body, Current};
use super::openapi::{Binary, Refused};
use super::{ApiError, chunks};
use crate::backup::{self, Passphrase};
use crate::cause::chain;

/// On requests over the socket, which only the owner can open.
#[derive(Clone, Copy, Debug)]
pub struct OwnersOnly;

/// What a backup is made with.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = BackupOrder)]
pub struct Order {
    /// What the backup is encrypted with, and can be restored with.
    #[schema(min_length = 8)]
    passphrase: String,
}

/// Makes a backup of the running host, as of now.
///
/// It holds the private keys, so it is made over the socket only, and one at a time. If the stream breaks
/// off, so is the backup; so it is when nothing is read for 30 s.
#[utoipa::path(post, path = "/backup", tag = "host", operation_id = "make_backup", request_body = Order,
    responses((status = 200, description = "The backup, a file of age",
        body = inline(Binary), content_type = "application/octet-stream"), Refused))]
pub async fn make(
    Current(host): Current,
    owner: Option<Extension<OwnersOnly>>,
    Body(order): Body<Order>,
) -> Result<Response, ApiError> {
    if owner.is_none() {
        let why = "a backup holds the host's private keys: it is made over the socket in the state directory";
        return Err(ApiError::forbidden(why));
    }
    let passphrase = Passphrase::new(order.passphrase).map_err(ApiError::invalid)?;
    let Ok(turn) = host.backups.clone().try_acquire_owned() else {
        return Err(ApiError::unavailable("another backup is being made: wait for it"));
    };
    let (store, keys, ended) = (host.store.clone(), host.keys.clone(), host.ended.clone());
    drop(host);
    Ok(chunks::stream("application/octet-stream", ended, move |out| {
        let made = backup::write(&store, &keys, passphrase, out);
        drop((store, keys, turn));
        made.inspect_err(|error| tracing::error!("a backup was not finished: {}", chain(error)))
    }))
}
