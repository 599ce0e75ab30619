//! `twoshot`: tries, measures and switches on the library. Everything works without a GPU as far as it can, and says
//! what is missing.
//!
//! `unsafe` is in `nccl` and `cuda` only: libraries opened by path.

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

mod bench;
mod cuda;
mod doctor;
mod element;
mod launch;
mod library;
mod measure;
mod nccl;
mod payload;
mod plot;
mod predict;
mod progress;
mod protocol;
mod rank;
mod report;
mod run;
mod sizes;
mod stats;
mod timing;
mod tune;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// AllReduce for NVLink domains as an NCCL plugin
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Bench(Box<bench::Bench>),
    Doctor(doctor::Doctor),
    Model(predict::Model),
    Plot(plot::Plot),
    Run(run::Run),
    Stats(stats::Stats),
    Tune(Box<tune::Tune>),
    /// One rank of a benchmark; started by `bench`
    #[command(hide = true)]
    BenchRank,
}

fn main() -> ExitCode {
    let code = match Cli::parse().command {
        Command::Bench(bench) => bench::main(&bench),
        Command::Doctor(doctor) => doctor::main(&doctor),
        Command::Model(model) => predict::main(&model),
        Command::Plot(plot) => plot::main(&plot),
        Command::Run(run) => run::main(&run),
        Command::Stats(stats) => stats::main(&stats),
        Command::Tune(tune) => tune::main(&tune),
        Command::BenchRank => rank::main(),
    };
    ExitCode::from(u8::try_from(code).unwrap_or(2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
