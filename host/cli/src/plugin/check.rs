//! Owns `dim plugin check`: checks a component without running it. Receives a component file and the config of a host;
//! shows the manifest and the reasons for which that host would refuse the component.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Args;
use dim_model::error_chain::chain;
use dim_runtime::Inspection;
use dim_scenarios::TestBench;
use dim_server::config::{Config, Policy};
use serde_json::{Value, json};

use super::build::{asks, by_package};
use super::told_if_slow;
use crate::output::Output;

#[derive(Debug, Args)]
pub struct Check {
    /// Component file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Config file of the target host, for its signers and limits
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// The error for a component that a host would refuse.
#[derive(Debug, thiserror::Error)]
#[error("{0} would be refused")]
pub struct Unfit(String);

impl Check {
    /// Checks the component, and shows the findings. Fails if a host would refuse the component.
    pub fn execute(&self, out: &Output) -> anyhow::Result<()> {
        let config = match &self.config {
            Some(file) => Config::read(file)?,
            None => Config::default(),
        };
        let shown = self.file.display().to_string();
        if self.file.is_dir() {
            bail!(
                "{shown} is a directory: build a component with `dim plugin build {shown}`, then check that file"
            );
        }
        let bytes = dim_runtime::read(&self.file).with_context(|| format!("cannot read {shown}"))?;
        let mut refused = Vec::new();
        let mut found = json!({ "file": self.file, "size": bytes.len() });
        let most = config.limits.component_bytes;
        if bytes.len() > most {
            refused.push(format!(
                "it has {} bytes, the maximum is {most} (limits.component-bytes)",
                bytes.len()
            ));
        }
        match dim_runtime::inspect(&bytes) {
            Err(error) => refused.push(chain(&error)),
            Ok(inspection) => {
                let inspection = match inspection.clone().signed(&bytes, config.signing.signers.values()) {
                    Ok(signed) => signed,
                    Err(error) => {
                        refused.push(chain(&error));
                        inspection
                    }
                };
                self.judge(&config, &inspection, &bytes, out, (&mut found, &mut refused));
                if refused.is_empty() {
                    refused.extend(fits_the_world(&bytes)?);
                }
                if refused.is_empty() {
                    let contract = dim_runtime::version_of(&inspection.imports);
                    found["world"] = json!(format!("dim:coordination/plugin@{contract}"));
                }
            }
        }
        found["fit"] = refused.is_empty().into();
        found["refused"] = json!(refused);
        out.object(&found)?;
        if refused.is_empty() { Ok(()) } else { Err(Unfit(shown).into()) }
    }

    fn judge(
        &self,
        config: &Config,
        inspection: &Inspection,
        bytes: &[u8],
        out: &Output,
        (found, refused): (&mut Value, &mut Vec<String>),
    ) {
        let manifest = &inspection.manifest;
        let lacking = inspection.imports.iter().filter_map(|import| dim_runtime::lacking([import]));
        refused.extend(lacking);
        let set = config.plugins.get(&manifest.name).map(|plugin| plugin.config.clone()).unwrap_or_default();
        match asks(manifest, &set) {
            Ok(asked) => found["asks"] = json!(asked),
            // A host can set the missing values, so this is no refusal.
            Err(why) => found["needs"] = json!(why),
        }
        let over = config.limits.over_ceiling(&manifest.limits);
        refused.extend(over.map(|over| format!("it requests more than the maximum: {over}")));
        let by = config.signing.in_words(inspection.signer.as_ref());
        match config.signing.policy(&self.file.display().to_string(), inspection.signer.as_ref()) {
            Policy::Refuse => refused.push(format!(
                "it is signed by {by}, and the host refuses such components (signing.unsigned)"
            )),
            Policy::Ask => {
                found["trust"] =
                    json!(format!("the operator must vouch for its digest: --trust {}", inspection.digest))
            }
            Policy::Allow => {}
        }
        found["name"] = json!(manifest.name);
        found["version"] = json!(manifest.version);
        found["state_version"] = json!(manifest.state_version);
        found["digest"] = json!(inspection.digest);
        found["signed_by"] = json!(by);
        found["imports"] = match out.is_json() {
            true => json!(inspection.imports),
            false => json!(by_package(&inspection.imports)),
        };
        let waits = dim_runtime::ways_to_wait(bytes);
        found["may_wait"] = json!(!waits.is_empty());
        if !waits.is_empty() {
            found["waits"] = json!(format!("it imports {}: a call that waits traps", waits.join(" and ")));
        }
    }
}

/// Compiles and links the component without running it. Returns the reason if that fails.
fn fits_the_world(component: &[u8]) -> anyhow::Result<Option<String>> {
    let bench = TestBench::new()?;
    let compiled = told_if_slow("compiling the component", || bench.plugin(component));
    Ok(compiled.err().map(|error| chain(&error)))
}
