//! Fuzzes the reader of exported events with untrusted files.

use dim_model::entry::export::{Header, Record};
use dim_model::time::Timestamp;
use dim_scenarios::{Given, Identity, Plugin, TestBench, Trial};

thread_local! {
    static BENCH: (TestBench, Plugin) = {
        let bench = TestBench::new().expect("a bench");
        let plugin = bench.bundled("node-registry").expect("it comes with the host");
        (bench, plugin)
    };
}

/// The accepted log times: 2026-01-01T00:00:00Z and two hours more, in nanoseconds. A replay over years is slow by
/// design.
const TIMES: std::ops::Range<u64> = 1_767_225_600_000_000_000..1_767_232_800_000_000_000;

/// Reads the lines, checks that they survive a round trip, and replays them into the node registry.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut lines = text.lines();
    let Ok(header) = Header::read(lines.next().unwrap_or_default()) else { return };
    let host = Identity::recorded(&header).expect("it was read");
    let given = Given { time: Timestamp(TIMES.start), host, ..Given::default() };
    BENCH.with(|(bench, plugin)| {
        let Ok(mut trial) = Trial::new(bench, plugin, &given) else { return };
        for line in lines.take(64) {
            let Ok(record) = Record::read(line) else { continue };
            let again = serde_json::to_string(&record).expect("a record is plain data");
            assert_eq!(Record::read(&again).expect("it was written"), record);
            if TIMES.contains(&record.time.0) && trial.feed_record(&record).is_err() {
                break;
            }
        }
        let _ = trial.settle();
    });
}

/// Returns exports of hosts.
pub fn seeds() -> Vec<Vec<u8>> {
    let header = format!(
        "{{\"dim_events\":1,\"host\":\"12D3KooWF5RBpjgTtfABAZ5VJc5yvXgWX5DahNPQhttJXnszhCxF\",\"random\":\"{}\",\"keys\":{{\"dim-state-key-jobs\":\"k51qzi5uqu5djrc890xteirkdo2xgf4qn6yu5p8hs5clsui243bseu9692dzb8\"}},\"plugins\":{{\"node-registry\":{{\"bind_nodes\":\"first\"}}}},\"until\":\"2026-01-01T00:10:00Z\"}}\n",
        "5a".repeat(32)
    );
    let record = |number: u64, what: &str| {
        format!("{{\"offset\":{number},\"time\":\"2026-01-01T00:00:{:02}Z\",{what}}}\n", number % 60)
    };
    let beat = r#""message":{"topic":"dim.nodes.heartbeat","from":"peer 12D3KooWF5RBpjgTtfABAZ5VJc5yvXgWX5DahNPQhttJXnszhCxF","text":"{\"node_id\":\"n1\",\"resources\":{\"memory_available\":3}}"}"#;
    let raw = r#""message":{"topic":"dim.nodes.heartbeat","from":"host","base64":"AP8="}"#;
    let verdict = r#""message":{"topic":"dim.nodes.status","from":"plugin heartbeat-watchdog","text":"{\"node_id\":\"n1\",\"status\":\"dead\"}"}"#;
    let gap = r#""gap":{"topic":"dim.nodes.heartbeat","since":"2026-01-01T00:00:01Z","until":"2026-01-01T00:00:02Z"}"#;
    let heard = r#""heard":[{"topic":"dim.nodes.heartbeat","since":"2026-01-01T00:00:00Z","until":"2026-01-01T00:00:03Z"}]"#;
    let peers = r#""peers":{"topic":"dim.nodes.heartbeat","peers":["12D3KooWF5RBpjgTtfABAZ5VJc5yvXgWX5DahNPQhttJXnszhCxF"]}"#;
    let name = r#""name":{"name":"k51qzi5uqu5djrc890xteirkdo2xgf4qn6yu5p8hs5clsui243bseu9692dzb8","path":"/ipfs/bafkreiaew4yc5xnkbux25pla4xjujaozonb7ql2k3pkdxxyk74pttv7gj4","sequence":1,"valid_until":"2026-01-02T00:00:00Z","confirmed_at":"2026-01-01T00:00:00Z","document":{"text":"{\"threshold\":3}"}}"#;
    let confirmed = r#""confirmed":{"name":"k51qzi5uqu5djrc890xteirkdo2xgf4qn6yu5p8hs5clsui243bseu9692dzb8","path":"/ipfs/bafkreiaew4yc5xnkbux25pla4xjujaozonb7ql2k3pkdxxyk74pttv7gj4","sequence":1,"valid_until":"2026-01-02T00:00:00Z","confirmed_at":"2026-01-01T00:00:00Z"}"#;
    let command = r#""command":{"plugin":"node-registry","method":"put","body":"[{\"node_id\":\"n2\"}]"}"#;
    let all = [heard, beat, raw, verdict, gap, peers, name, confirmed, command];
    let one = all.iter().map(|what| format!("{header}{}", record(3, what)).into_bytes());
    let together: String = (1..).zip(all).map(|(number, what)| record(number, what)).collect();
    one.chain([format!("{header}{together}").into_bytes()]).collect()
}
