//! Owns `/v1/plugins/{plugin}/grants`: the requested and granted permissions of a plugin, and their changes.

use axum::Json;
use dim_model::ident::PluginName;
use dim_server::host::{GrantChange, Granted};

use crate::extract::{Body, Caller, Current, Path};
use crate::openapi::{Conflict, Missing, Refused};
use crate::{ApiError, to_its_end};

/// Shows the requested and granted permissions of a plugin.
#[utoipa::path(get, path = "/plugins/{plugin}/grants", tag = "plugins", operation_id = "get_grants",
    params(("plugin" = PluginName, Path, description = "The plugin's name")),
    responses((status = 200, body = Granted), Missing))]
pub async fn show(Current(host): Current, Path(name): Path<String>) -> Result<Json<Granted>, ApiError> {
    let name: PluginName = name.parse()?;
    host.loaded(name.as_str()).await;
    Ok(Json(host.grants(&name)?))
}

/// Grants and denies permissions of a plugin. A denial overrides a grant.
///
/// The change takes effect from the next entry on and survives a restart of the host. It belongs to the plugin's
/// name. A pending component that is granted all that it requests takes over; `change` has the result.
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
