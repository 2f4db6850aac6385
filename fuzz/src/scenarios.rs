//! Fuzzes the parser and the runner of scenarios.

use dim_scenarios::{Plugin, Runs, Scenario, TestBench};

thread_local! {
    static BENCH: (TestBench, Plugin) = {
        let bench = TestBench::new().expect("a bench");
        let plugin = bench.bundled("heartbeat-watchdog").expect("it comes with the host");
        (bench, plugin)
    };
}

/// Maximum size of a scenario that is run, in bytes. Larger scenarios may be slow by design.
const LONGEST: usize = 4 << 10;

/// Parses a scenario and, unless it may be slow, runs it twice. Both results must be equal.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let scenario = match Scenario::parse("it", text) {
        Ok(scenario) => scenario,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let is_long =
        ["repeat", "wait", "until", "deaf", "down", "time", "replace"].iter().any(|word| text.contains(word));
    if is_long || text.len() > LONGEST {
        return;
    }
    BENCH.with(|(bench, plugin)| {
        let runs = Runs { crash: false, replace: false, record: true };
        let once = || scenario.run(bench, plugin, &runs).map(|report| report.to_string());
        let without_time = |text: String| text.lines().skip(1).map(str::to_owned).collect::<Vec<_>>();
        match (once(), once()) {
            (Ok(one), Ok(other)) => assert_eq!(without_time(one), without_time(other)),
            (Err(one), Err(other)) => assert_eq!(one.to_string(), other.to_string()),
            (one, other) => panic!("{one:?} and then {other:?}"),
        }
    });
}

/// Returns scenarios of the watchdog.
pub fn seeds() -> Vec<Vec<u8>> {
    super::texts([
        "steps:\n- message: dim.nodes.heartbeat\n  data: { node_id: n1 }\n  expect: { publishes: [] }\n",
        "given:\n  config: { observer: me }\n  state: { node/n1: { last_seen: \"${now-1m}\", standing: dead } }\n\
         \x20 timers: { n1: \"${now+7d}\" }\nsteps:\n- message: dim.nodes.heartbeat\n  from: host\n  data: { node_id: n1 }\n\
         \x20 include: { publishes: [{ data: { status: recovered } }] }\n",
        "steps:\n- command: unbind\n  body: { node_id: n1 }\n  expect: { reply: { node_id: n1, was: null } }\n\
         - query: list\n  expect: { reply: [] }\n- query: no\n  include: { error: no }\n",
        "given: { limits: { timers: 1 }, denied: { publish: [dim.nodes.status] }, seed: 7 }\nsteps:\n\
         - message: dim.nodes.heartbeat\n  text: x\n  include: { dead: [{ reason: heartbeat }] }\n\
         - message: dim.nodes.heartbeat\n  data: { $base64: AP8= }\n  include: { dead: [{}] }\n",
        "given: { names: { other: { a: 1 } } }\nsteps:\n- name: other\n  document: { a: 2 }\n- peers: dim.nodes.heartbeat\n\
         \x20 are: [alice, bob]\n- message: dim.nodes.heartbeat\n  from: alice\n  data: { node_id: \"${peer.alice}\" }\nexpect: { dead: [] }\n",
        "steps:\n- repeat: 3\n  every: 1s\n  steps:\n  - message: dim.nodes.heartbeat\n    data: { node_id: \"n${i}\" }\n- wait: 63s\n",
    ])
}
