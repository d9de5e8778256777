//! The `cellrefine` program: everything is in the library; this picks the exit code.

fn main() -> std::process::ExitCode {
    std::process::ExitCode::from(cellrefine::cli::main())
}
