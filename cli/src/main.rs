//! The `doppel` command.

use clap::Parser;
use doppel_cli::args::{Cli, Command};
use doppel_cli::host_error::with_advice;
use doppel_cli::{assemble, domain, explain, image, run, terminal};
use std::process::ExitCode;

/// Exit status for an error of the host or of usage.
const ERROR: u8 = 1;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { ERROR } else { 0 });
        }
    };
    let result = match &cli.command {
        Command::Run(args) => run::run(args),
        Command::Explain(args) => explain::explain(args),
        Command::Guest(args) => assemble::assemble(args).map(|()| 0),
        Command::Image(args) => image::image(args).map(|()| 0),
        Command::Backend(args) => domain::serve(args).map(|()| 0),
        Command::Watchdog => terminal::watch().map(|()| 0),
    };
    ExitCode::from(result.unwrap_or_else(|error| {
        let text = with_advice(&format!("{error:#}"));
        eprintln!("doppel: {}", terminal::printable(&text));
        ERROR
    }))
}
