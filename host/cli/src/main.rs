//! Owns the entry point of the program `dim`.

fn main() -> std::process::ExitCode {
    dim::main()
}
