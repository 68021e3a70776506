fn main() -> std::process::ExitCode {
    fieldgate::cli::main()
}
