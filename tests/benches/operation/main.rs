//! How a host does in operation: `cargo bench -p dim-tests --bench operation -- WHAT`.
//!
//! - `faults [SECONDS] [NAME]`: each trouble that a daemon can be in, a minute each, or one of them.
//! - `ready [GIGABYTES]`: how soon a host is ready after `kill -9` on a large store.
//! - `soak [MINUTES]`: a large fleet with troubles at random, and whether memory, disk, tasks, files and
//!   pins stay flat.

mod faults;
mod ready;
mod soak;

fn main() {
    let args = dim_tests::measurement::arguments();
    let number = |default: u64| args.get(1).map_or(default, |text| text.parse().expect("a number"));
    match args.first().map(String::as_str) {
        Some("faults") => faults::run(number(60), args.get(2).map(String::as_str)),
        Some("ready") => ready::run(number(2)),
        Some("soak") => soak::run(number(30)),
        _ => println!("say what: faults [SECONDS] [NAME], ready [GIGABYTES] or soak [MINUTES]"),
    }
}
