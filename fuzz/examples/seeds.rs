//! Writes the seeds of each target into its corpus directory, where cargo-fuzz reads them.

use std::io;

fn main() -> io::Result<()> {
    for target in dim_fuzz::TARGETS {
        let corpus = target.corpus();
        std::fs::create_dir_all(&corpus)?;
        for (number, seed) in (target.seeds)().iter().enumerate() {
            std::fs::write(corpus.join(format!("seed-{number:02}")), seed)?;
        }
    }
    Ok(())
}
