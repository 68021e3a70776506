//! The `fieldgate` command; everything is in the library.

fn main() -> std::process::ExitCode {
    fieldgate::cli::main()
}
