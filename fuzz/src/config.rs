//! Fuzzes the parser of the config file.

use dim_server::config::Config;

/// Parses a config and reads the values that a start of the host reads.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Config::parse(text) {
        Ok(config) => {
            for notice in config.notices() {
                assert!(!notice.to_string().is_empty());
            }
            let _ = (
                config.network().follow_every,
                config.queue_bytes(),
                config.outbox_expiry(),
                config.replacement.undo(),
            );
            for plugin in ["job-tracker", "node-registry", "heartbeat-watchdog"] {
                config.bundled_values(plugin, |_| true);
            }
        }
        Err(error) => assert!(!error.is_empty()),
    }
}

/// Returns typical configs.
pub fn seeds() -> Vec<Vec<u8>> {
    super::texts([
        "",
        "state_dir: /var/lib/dim\nipfs:\n  api_url: http://127.0.0.1:5001\n  ipns_key_name: dim-state-key\n\
         \x20 pubsub:\n    job_updates: dim.jobs.updates\nregistry:\n  heartbeat_interval: 30\n",
        "plugins:\n  probe:\n    file: probe.wasm\n    config: { topic: t, many: [a, b] }\n    grants:\n      \
         publish: [probe.*]\n      subscribe: [a]\n      write: [k]\n      limits: { timers: 7 }\n    \
         limits: { memory: 1048576 }\n  other: { disabled: true }\n",
        "signing:\n  signers: {}\n  unsigned: { network: refuse, files: allow }\n",
        "signing: { signers: { a: \"MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\" }, unsigned: ask }\n",
        "topics:\n  jobs.*: { peers: [12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf] }\n",
        "api: { token: { env: NAME }, connections: 8 }\nipfs: { api_authorization: { file: /none } }\n",
        "limits: { default: { timers: 1 }, ceiling: { memory: 2097152 }, plugins: 2, queue-bytes: 1048576 }\n\
         store: { memory_bytes: 1048576, durability: eventual, max_bytes: 1073741824, log: { max_age_hours: 1 } }\n",
        "telemetry: { otlp_endpoint: 'http://127.0.0.1:4318', service_name: s, headers: { a: b } }\n",
        "replacement: { probation: { events: 1, seconds: 1 }, undo_hours: 1, trusted: [/ipns/k51] }\nplugins_dir: p\n",
        "api: { token: inline }\n",
    ])
}
