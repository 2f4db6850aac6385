//! Owns `/v1/config`: the reload of the config file of the running host.

use axum::Json;
use dim_server::host::Reloaded;

use crate::extract::{Caller, Current};
use crate::openapi::{Conflict, Refused};
use crate::{ApiError, to_its_end};

/// Reads the config file again.
///
/// The host applies the keys that can change while it runs, and lists those that need a restart. If the file has an
/// error, or a plugin does not start with its new config, the host changes nothing and answers 422. SIGHUP does the
/// same.
#[utoipa::path(post, path = "/config/reload", tag = "host", operation_id = "reload_config",
    responses((status = 200, body = Reloaded), Conflict, Refused))]
pub async fn reload(Current(host): Current, caller: Caller) -> Result<Json<Reloaded>, ApiError> {
    Ok(Json(to_its_end(async move { host.reload(&caller.0).await }).await?))
}
