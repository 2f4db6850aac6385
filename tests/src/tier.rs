//! How thorough a run of the tests is. The usual tier enumerates: each state, each attacker, each kind of fault once.
//! The exhaustive tier (`DIM_TEST_TIER=exhaustive`, `.ci/exhaustive`) repeats for statistics, and also runs the tests
//! that are ignored in the usual one.

use rand::Rng as _;

/// Whether this is the exhaustive tier. Panics if `DIM_TEST_TIER` names no tier: a misspelt one would test too little.
pub fn is_exhaustive() -> bool {
    match std::env::var("DIM_TEST_TIER") {
        Err(_) => false,
        Ok(tier) if tier.is_empty() || tier == "usual" => false,
        Ok(tier) if tier == "exhaustive" => true,
        Ok(tier) => panic!("DIM_TEST_TIER={tier}: it is `usual` or `exhaustive`"),
    }
}

/// How often something is done: `usual` times, or `exhaustive` times in the exhaustive tier.
pub fn repeats(usual: usize, exhaustive: usize) -> usize {
    if is_exhaustive() { exhaustive } else { usual }
}

/// The seed of what happens at random in a test, from `DIM_TEST_SEED` or at random. It is printed, so that a failure can
/// be repeated.
pub fn seed(of: &str) -> u64 {
    let given = std::env::var("DIM_TEST_SEED").ok().filter(|seed| !seed.is_empty());
    let seed = match given {
        Some(seed) => seed.parse().unwrap_or_else(|_| panic!("DIM_TEST_SEED={seed}: it is a number")),
        None => rand::rng().next_u64(),
    };
    println!("{of}: DIM_TEST_SEED={seed}");
    seed
}
