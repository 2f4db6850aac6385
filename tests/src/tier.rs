//! The thoroughness of a test run. The usual tier covers each state, attacker and kind of fault once. The exhaustive
//! tier (`DIM_TEST_TIER=exhaustive`, `.ci/exhaustive`) repeats tests for statistics, and also runs tests that the usual
//! tier ignores.

use rand::Rng as _;

/// Returns whether this is the exhaustive tier. Panics if `DIM_TEST_TIER` is not a tier, because a misspelt one would
/// test too little.
pub fn is_exhaustive() -> bool {
    match std::env::var("DIM_TEST_TIER") {
        Err(_) => false,
        Ok(tier) if tier.is_empty() || tier == "usual" => false,
        Ok(tier) if tier == "exhaustive" => true,
        Ok(tier) => panic!("DIM_TEST_TIER={tier}: it is `usual` or `exhaustive`"),
    }
}

/// Returns a number of repetitions: `usual`, or `exhaustive` in the exhaustive tier.
pub fn repeats(usual: usize, exhaustive: usize) -> usize {
    if is_exhaustive() { exhaustive } else { usual }
}

/// Returns the random seed of a test: `DIM_TEST_SEED`, or a random one. Prints it, so that a failure can be reproduced.
pub fn seed(of: &str) -> u64 {
    let given = std::env::var("DIM_TEST_SEED").ok().filter(|seed| !seed.is_empty());
    let seed = match given {
        Some(seed) => seed.parse().unwrap_or_else(|_| panic!("DIM_TEST_SEED={seed}: it is a number")),
        None => rand::rng().next_u64(),
    };
    println!("{of}: DIM_TEST_SEED={seed}");
    seed
}
