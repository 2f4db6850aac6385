//! Owns `/v1/backup`: streams the host's store and keys, encrypted with a passphrase.

use axum::Extension;
use axum::response::Response;
use dim_model::error_chain::chain;
use dim_server::backup::{self, Passphrase};
use serde::Deserialize;
use utoipa::ToSchema;

use crate::extract::{Body, Current};
use crate::openapi::{Binary, Refused};
use crate::{ApiError, streamed_body};

/// An extension of requests over the socket, which only the owner can open.
#[derive(Clone, Copy, Debug)]
pub struct OwnersOnly;

/// The order to make a backup.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = BackupOrder)]
pub struct Order {
    /// The passphrase that encrypts the backup, needed to restore it.
    #[schema(min_length = 8)]
    passphrase: String,
}

/// Makes a backup of the running host as of now.
///
/// A backup contains the private keys, so it is made over the socket only. One backup is made at a time. It is
/// aborted if the caller reads nothing for 30 s. A stream that ends early is no backup.
#[utoipa::path(post, path = "/backup", tag = "host", operation_id = "make_backup", request_body = Order,
    responses((status = 200, description = "The backup, an age file",
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
    let Ok(turn) = host.permits.backups.clone().try_acquire_owned() else {
        return Err(ApiError::unavailable("another backup is being made: wait for it"));
    };
    let (store, keys, ended) =
        (host.storage.store.clone(), host.storage.keys.clone(), host.life.ended.clone());
    drop(host);
    Ok(streamed_body::stream("application/octet-stream", ended, move |mut out| {
        let made = backup::write(&store, &keys, passphrase, &mut out);
        drop((store, keys, turn));
        made.inspect_err(|error| tracing::error!("a backup was not finished: {}", chain(error)))
    }))
}
