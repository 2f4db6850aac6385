//! The program `dim`, as the suite starts it.

fn main() -> std::process::ExitCode {
    dim::cli::main()
}
