//! How a host does in operation: `cargo bench -p dim-tests --bench operation -- WHAT`.
//!
//! - `faults [SECONDS]`: each trouble that a daemon can be in, a minute each.
//! - `ready [GIGABYTES]`: how soon a host is ready after `kill -9` on a large store.
//! - `soak [MINUTES]`: a large fleet with troubles at random, and whether memory, disk, tasks, files and
//!   pins stay flat.

mod faults;
mod ready;
mod soak;

fn main() {
    // cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let number = |default: u64| args.get(1).map_or(default, |text| text.parse().expect("a number"));
    match args.first().map(String::as_str) {
        Some("faults") => faults::run(number(60)),
        Some("ready") => ready::run(number(2)),
        Some("soak") => soak::run(number(30)),
        _ => println!("say what: faults [SECONDS], ready [GIGABYTES] or soak [MINUTES]"),
    }
}
