//! The scenarios of the bundled plugins, with a crash and with a replacement between each two entries, and what these
//! two find in a plugin that keeps its state in memory alone.

use std::path::PathBuf;

use dim_scenarios::{Failure, Plugin, Report, Runs, Scenario, TestBench, Why};

fn scenarios(plugin: &str) -> Vec<PathBuf> {
    let dir = dim_tests::data("../plugins").join(plugin).join("scenarios");
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    files
}

fn run_all(name: &str, least: usize) {
    let bench = TestBench::new().unwrap();
    let plugin = bench.bundled(name).unwrap();
    let files = scenarios(name);
    assert!(files.len() >= least, "{files:?}");
    for file in files {
        let report = Scenario::read(&file).unwrap().run(&bench, &plugin, &Runs::default()).unwrap();
        assert!(report.is_well(), "{name}: {report}");
        assert!(report.crashes.unwrap() > 0 && report.crashes == report.replacements, "{report}");
    }
}

#[test]
fn the_watchdog_judges_silence_fairly_whatever_comes_between() {
    run_all("heartbeat-watchdog", 7);
}

#[test]
fn each_transition_of_a_job_is_as_it_should_be_whatever_comes_between() {
    run_all("job-tracker", 11);
}

#[test]
fn the_registry_knows_what_it_heard_whatever_comes_between() {
    run_all("node-registry", 5);
}

/// Runs a scenario of the forgetful plugin, which counts messages in its memory or in its state.
fn counted(config: &str, runs: Runs) -> Report {
    let bench = TestBench::new().unwrap();
    let plugin = forgetful(&bench);
    let text = format!(
        "given: {{ config: {{ {config} }} }}\nsteps:\n- repeat: 5\n  steps:\n  - message: forgetful.in\n    data: 1\n- query: count\n  expect: {{ reply: 5 }}\n"
    );
    Scenario::parse("counted", &text).unwrap().run(&bench, &plugin, &runs).unwrap()
}

fn forgetful(bench: &TestBench) -> Plugin {
    bench.plugin(&std::fs::read(dim_tests::FORGETFUL).unwrap()).unwrap()
}

#[test]
fn a_plugin_that_keeps_its_state_in_memory_is_caught_by_the_crash_and_by_the_replacement() {
    let neither = Runs { crash: false, replace: false, record: false };
    let in_memory = counted("remember: memory", neither);
    assert!(in_memory.is_well(), "as it is written nothing shows: {in_memory}");
    for (runs, why) in
        [(Runs { crash: true, ..neither }, Why::Crash), (Runs { replace: true, ..neither }, Why::Replacement)]
    {
        let report = counted("remember: memory", runs);
        let [Failure { why: found, .. }] = report.failures.as_slice() else { panic!("{report}") };
        assert_eq!(*found, why);
        let text = report.to_string();
        assert!(text.contains("replies[0].reply") && text.contains("- 5"), "{text}");
        assert!(text.contains("keeps only in memory"), "{text}");
        let in_state = counted("remember: state", runs);
        assert!(in_state.is_well(), "{in_state}");
    }
}
