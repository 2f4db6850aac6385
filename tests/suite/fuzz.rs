//! What comes from outside, at random: each target of cargo-fuzz over its corpus, and over changes of it that are the
//! same each time.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use dim_fuzz::{TARGETS, Target};
use dim_tests::tier;
use rand::{Rng, RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

/// Longest input that is made.
const LONGEST: usize = 16 << 10;

fn target(name: &str) -> &'static Target {
    TARGETS.iter().find(|target| target.name == name).expect("there is such a target")
}

/// Runs a target over its corpus, then over so many changes of it; a tenth of them in the usual tier.
fn run(name: &str, changes: usize) {
    let changes = tier::repeats(changes / 10, changes);
    let target = target(name);
    let corpus = kept(target);
    assert!(!corpus.is_empty(), "the corpus of {name} is not there");
    for input in &corpus {
        bear(target, input);
    }
    let mut random = ChaCha8Rng::seed_from_u64(name.bytes().map(u64::from).sum());
    for _ in 0..changes {
        let other = corpus[random.random_range(0..corpus.len())].clone();
        let mut input = corpus[random.random_range(0..corpus.len())].clone();
        for _ in 0..random.random_range(1..=4) {
            change(&mut input, &other, &mut random);
        }
        input.truncate(LONGEST);
        bear(target, &input);
    }
}

fn kept(target: &Target) -> Vec<Vec<u8>> {
    let mut files: Vec<_> = std::fs::read_dir(target.corpus())
        .into_iter()
        .flatten()
        .map(|file| file.expect("the corpus can be listed").path())
        .collect();
    files.sort();
    files.into_iter().map(|file| std::fs::read(file).expect("the corpus can be read")).collect()
}

/// Tries an input; one that the target does not bear is kept for who looks into it.
fn bear(target: &Target, input: &[u8]) {
    let tried = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    if let Err(panic) = tried {
        let file = dim_tests::data("../target").join(format!("{}-does-not-bear", target.name));
        std::fs::write(&file, input).expect("the target directory can be written");
        eprintln!("{} does not bear {}", target.name, file.display());
        resume_unwind(panic);
    }
}

fn change(input: &mut Vec<u8>, other: &[u8], random: &mut impl Rng) {
    let at = random.random_range(0..=input.len());
    let end = (at + random.random_range(0..=32)).min(input.len());
    let from = random.random_range(0..=other.len());
    let part = &other[from..(from + random.random_range(0..=64)).min(other.len())];
    match random.random_range(0..6) {
        0 if at < input.len() => input[at] ^= 1 << random.random_range(0..8),
        1 if at < input.len() => input[at] = random.random(),
        2 => drop(input.drain(at..end)),
        3 => {
            let again = input[at..end].to_vec();
            input.splice(at..at, again);
        }
        4 => drop(input.splice(at..end, part.iter().copied())),
        _ => drop(input.splice(at..at, part.iter().copied())),
    }
}

macro_rules! targets {
    ($($test:ident: $name:literal, $changes:literal;)+) => {
        $(
            #[test]
            fn $test() {
                run($name, $changes);
            }
        )+

        #[test]
        fn each_target_has_a_test_a_program_and_its_seeds() {
            let tested = [$($name),+];
            let programs: Vec<String> = std::fs::read_dir(dim_tests::data("../fuzz/fuzz_targets"))
                .expect("they are there")
                .map(|file| file.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
                .collect();
            for Target { name, .. } in TARGETS {
                assert!(tested.contains(name), "{name} has no test");
                assert!(programs.iter().any(|program| program == name), "{name} has no program");
            }
            for target in TARGETS {
                let kept = kept(target);
                assert!((target.seeds)().iter().all(|seed| kept.contains(seed)), "renew them: fuzz/run");
            }
            assert_eq!(programs.len(), TARGETS.len());
        }
    };
}

targets! {
    requests_at_random_neither_break_the_host_nor_are_answered_by_chance: "api", 400;
    blocks_at_random_are_files_or_errors: "blocks", 20_000;
    bundles_at_random_are_read_in_order_or_refused: "bundles", 5_000;
    components_at_random_are_judged: "components", 5_000;
    configs_at_random_are_read_or_refused: "config", 3_000;
    encrypted_documents_at_random_are_decrypted_only_if_they_were_encrypted: "documents", 5_000;
    recorded_events_at_random_are_handled_or_refused: "events", 1_000;
    heads_at_random_make_a_reader_neither_fail_nor_exceed_its_limits: "heads", 5_000;
    heartbeats_at_random_leave_sound_nodes: "heartbeats", 1_000;
    records_at_random_are_believed_only_if_signed: "ipns_records", 5_000;
    job_events_at_random_leave_sound_jobs: "job_events", 1_000;
    answers_of_a_daemon_at_random_are_understood_or_refused: "kubo", 1_000;
    manifests_at_random_are_read_or_refused: "manifests", 3_000;
    rosters_and_keys_at_random_are_taken_in_only_from_admins_and_keepers: "membership", 3_000;
    random_components_are_refused_and_do_no_harm: "random_components", 50;
    scenarios_at_random_end_the_same_each_time: "scenarios", 1_000;
}
