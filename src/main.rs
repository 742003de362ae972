use std::process::ExitCode;

fn main() -> ExitCode {
    worker_candle::app::main()
}
