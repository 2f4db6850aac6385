//! `/v1/plugins/NAME/grants`: what a plugin asks for and may.

use axum::Json;

use super::extract::{Body, Caller, Current, Path};
use super::openapi::{Conflict, Missing, Refused};
use super::{ApiError, to_its_end};
use crate::host::{GrantChange, Granted};
use crate::ident::PluginName;

/// What a plugin asks for and may.
#[utoipa::path(get, path = "/plugins/{plugin}/grants", tag = "plugins", operation_id = "get_grants",
    params(("plugin" = PluginName, Path, description = "The plugin's name")),
    responses((status = 200, body = Granted), Missing))]
pub async fn show(Current(host): Current, Path(name): Path<String>) -> Result<Json<Granted>, ApiError> {
    let name: PluginName = name.parse()?;
    host.loaded(name.as_str()).await;
    Ok(Json(host.grants(&name)?))
}

/// Grants a plugin something, and denies it something, which counts more.
///
/// It counts from the next entry on, also after a restart of the host, and goes with the plugin's name. A
/// component that waited until it is granted all that it asks for takes over then; `change` tells how that went.
#[utoipa::path(post, path = "/plugins/{plugin}/grants", tag = "plugins", operation_id = "change_grants",
    params(("plugin" = PluginName, Path, description = "The plugin's name")),
    request_body = GrantChange,
    responses((status = 200, body = Granted), Missing, Conflict, Refused))]
pub async fn change(
    Current(host): Current,
    Path(name): Path<String>,
    Caller(by): Caller,
    Body(change): Body<GrantChange>,
) -> Result<Json<Granted>, ApiError> {
    let name: PluginName = name.parse()?;
    Ok(Json(to_its_end(async move { host.grant(&name, change, &by).await }).await?))
}
