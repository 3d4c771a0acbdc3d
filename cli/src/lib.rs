//! The `depthwise` command: argument parsing and wiring only. It is a library so that tests can parse the commands that
//! the documents show.

#![deny(clippy::print_stdout, clippy::print_stderr)]

mod arguments;
mod commands;
mod interrupt;
mod output;
mod process;
mod progress;
mod report;
mod warnings;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use experiments::results::set_commit;

use crate::interrupt::Interrupted;
use crate::output::{Unprinted, note};

/// Serve, measure and simulate recursive transformers with continuous depth-wise batching
#[derive(Debug, clap::Parser)]
#[command(name = "depthwise", version, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Run(commands::run::Args),
    Simulate(commands::simulate::Args),
    Plot(commands::plot::Args),
    Report(commands::report::Args),
    Profile(commands::profile::Args),
    Profiles(commands::profiles::Args),
    Import(commands::import::Args),
    Record(commands::record::Args),
    Replay(commands::replay::Args),
    Bench(commands::bench::Args),
    Validate(commands::validate::Args),
    Vllm(commands::vllm::Args),
    Sweep(commands::sweep::Args),
    Capacity(commands::capacity::Args),
    Timeline(commands::timeline::Args),
    Trace(commands::trace::Args),
    Convert(commands::convert::Args),
    Export(commands::export::Args),
    Train(Box<commands::train::Args>),
    Generate(commands::generate::Args),
    Serve(Box<commands::serve::Args>),
    Evaluate(commands::evaluate::Args),
    Calibrate(commands::calibrate::Args),
}

impl Command {
    /// Whether options describe how to serve requests, not a YAML file.
    fn is_of_options(&self) -> bool {
        match self {
            Self::Record(_) | Self::Replay(_) | Self::Bench(_) | Self::Validate(_) | Self::Serve(_) => true,
            Self::Simulate(args) => args.is_of_options(),
            Self::Timeline(args) => args.is_of_options(),
            Self::Capacity(args) => args.is_of_options(),
            _ => false,
        }
    }
}

/// Does what the arguments of the process ask for.
pub fn main() -> ExitCode {
    warnings::show();
    let command = Cli::parse().command;
    let is_of_options = command.is_of_options();
    let done = run(command);
    let printed = output::flush();
    let Err(error) = done.and_then(|()| Ok(printed?)) else { return ExitCode::SUCCESS };
    if error.is::<Interrupted>() {
        return ExitCode::from(interrupt::INTERRUPTED);
    }
    if error.downcast_ref().is_some_and(Unprinted::reader_gone) {
        return ExitCode::from(output::READER_GONE);
    }
    let message = message(&error);
    note!("error: {}", if is_of_options { arguments::name_options(&message) } else { message });
    ExitCode::FAILURE
}

fn run(command: Command) -> Result<()> {
    // Handling a signal starts a thread, before which training sets up its process.
    if let Command::Train(_) = command {
        process::prepare_for_training();
    }
    interrupt::end()?;
    if let Some(commit) = option_env!("DEPTHWISE_COMMIT") {
        set_commit(commit);
    }
    match command {
        Command::Run(args) => commands::run::run(args),
        Command::Simulate(args) => commands::simulate::run(args),
        Command::Plot(args) => commands::plot::run(args),
        Command::Report(args) => commands::report::run(args),
        Command::Profile(args) => commands::profile::run(args),
        Command::Profiles(args) => commands::profiles::run(args),
        Command::Import(args) => commands::import::run(args),
        Command::Record(args) => commands::record::run(args),
        Command::Replay(args) => commands::replay::run(args),
        Command::Bench(args) => commands::bench::run(args),
        Command::Validate(args) => commands::validate::run(args),
        Command::Vllm(args) => commands::vllm::run(args),
        Command::Sweep(args) => commands::sweep::run(args),
        Command::Capacity(args) => commands::capacity::run(args),
        Command::Timeline(args) => commands::timeline::run(args),
        Command::Trace(args) => commands::trace::run(args),
        Command::Convert(args) => commands::convert::run(args),
        Command::Export(args) => commands::export::run(args),
        Command::Train(args) => commands::train::run(*args),
        Command::Generate(args) => commands::generate::run(args),
        Command::Serve(args) => commands::serve::run(*args),
        Command::Evaluate(args) => commands::evaluate::run(args),
        Command::Calibrate(args) => commands::calibrate::run(args),
    }
}

/// An error with its causes, each said once.
fn message(error: &anyhow::Error) -> String {
    let mut message = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !message.contains(&cause) {
            message = format!("{message}: {cause}");
        }
    }
    message
}
