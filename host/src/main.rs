//! The program `dim`.

fn main() -> std::process::ExitCode {
    dim::cli::main()
}
