//! `/v1/config`: the config file of the running host.

use axum::Json;

use super::extract::{Caller, Current};
use super::openapi::{Conflict, Refused};
use super::{ApiError, to_its_end};
use crate::host::Reloaded;

/// Read the config file again.
///
/// The host takes over the keys that can change while it runs, and names those that need a restart. If the file has an
/// error, or a plugin does not start with its new config, the host changes nothing and answers 422. SIGHUP does the
/// same.
#[utoipa::path(post, path = "/config/reload", tag = "host", operation_id = "reload_config",
    responses((status = 200, body = Reloaded), Conflict, Refused))]
pub async fn reload(Current(host): Current, caller: Caller) -> Result<Json<Reloaded>, ApiError> {
    Ok(Json(to_its_end(async move { host.reload(&caller.0).await }).await?))
}
