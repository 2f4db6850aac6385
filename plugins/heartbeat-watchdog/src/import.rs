//! Takes over the nodes of a published registry, so that the watchdog judges their silence from then on.

use dim_guest::foreign::Document;
use dim_guest::heartbeat::check_id;
use dim_guest::time::Time;
use dim_guest::{Refusal, json, timers};
use serde_json::json;

use crate::Watchdog;
use crate::silence::{NODES, Node, Standing};

/// Executes the command `import`: adds the nodes of the document that are not dead and not known yet. Their silence
/// counts from now on, because this host has not listened to them before.
pub fn import(watchdog: &Watchdog, body: &str) -> Result<String, Refusal> {
    let document = Document::read(body)?;
    let (mut taken, mut refused, now) = (0, 0, Time::now());
    for row in document.rows("nodes", "node_id")? {
        let Some(row) = row.filter(|row| check_id(&row.id).is_ok()) else {
            refused += 1;
            continue;
        };
        let is_dead = row.get::<String>("status").as_deref() == Some("dead");
        if is_dead || NODES.get(&row.id)?.is_some() {
            continue;
        }
        let every_ms = row.get("every_ms");
        NODES.set(&row.id, &Node { last_seen: now, standing: Standing::Alive, every_ms, removed: false })?;
        timers::set(&row.id, now.after(watchdog.suspect_after()).timestamp())?;
        taken += 1;
    }
    json::write(&json!({ "nodes": taken, "refused": refused }))
}
