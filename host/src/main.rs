//! The program `dim`.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
