//! `cellrefine launch`: the ranks of one machine, as children of this process.
//!
//! Signals go on to all of them: the first asks for a checkpoint, so it must reach every rank once. Children therefore have a
//! process group of their own, which a terminal's Ctrl-C does not reach directly.

use super::Global;
use crate::collective::launch::LAUNCHED;
use crate::error::{Code, Error, Kind, Result};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use std::net::TcpListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

/// Flags of `launch`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Flags {
    /// Processes to start.
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    ranks: u16,
    /// The command of every rank: pretrain, refine or finetune, with its flags.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

const EXAMPLES: &str = "Examples:\n  \
    cellrefine launch -n 4 refine --device cuda --corpus pbmc.cells --checkpoint runs/pretrain --markers blood.gmt --out runs/refine\n  \
    cellrefine launch -n 2 pretrain --corpus pbmc.cells --preset tiny --out runs/pretrain";

/// How often ended children and signals are looked for.
const PAUSE: Duration = Duration::from_millis(20);

/// Starts the ranks, waits for all, and returns the exit code.
pub fn run(global: &Global, flags: &Flags) -> Result<i32> {
    if global.json {
        return Err(Error::new(Code::FlagConflict, "launch prints nothing of its own")
            .found("--json")
            .next("put --json behind the command of the ranks"));
    }
    let failed = |doing: &str, e: std::io::Error| {
        Error::new(Code::RankConnection, format!("cannot {doing}")).found(e.to_string())
    };
    let program = std::env::current_exe().map_err(|e| failed("find this program", e))?;
    // Free when it was asked for; rank 0 says so where another process was quicker.
    let port = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .map_err(|e| failed("find a free port", e))?
        .port();
    let mut signals =
        Signals::new([SIGTERM, SIGINT, SIGUSR1]).map_err(|e| failed("listen for signals", e))?;
    let mut ranks: Vec<(Child, Option<ExitStatus>)> = Vec::new();
    for rank in 0..flags.ranks {
        let mut command = Command::new(&program);
        command.args(&flags.command).process_group(0).env(LAUNCHED, "1").env_remove("TORCHELASTIC_RUN_ID");
        for (name, value) in [("RANK", rank), ("LOCAL_RANK", rank), ("MASTER_PORT", port)] {
            command.env(name, value.to_string());
        }
        for name in ["WORLD_SIZE", "LOCAL_WORLD_SIZE"] {
            command.env(name, flags.ranks.to_string());
        }
        match command.env("MASTER_ADDR", "127.0.0.1").spawn() {
            Ok(child) => ranks.push((child, None)),
            Err(e) => {
                ranks.iter().for_each(|(child, _)| pass_on(child, SIGTERM));
                return Err(failed("start a rank", e));
            }
        }
    }
    while ranks.iter().any(|(_, ended)| ended.is_none()) {
        for signal in signals.pending() {
            ranks.iter().filter(|(_, ended)| ended.is_none()).for_each(|(child, _)| pass_on(child, signal));
        }
        for (rank, (child, ended)) in ranks.iter_mut().enumerate().filter(|(_, (_, ended))| ended.is_none()) {
            *ended = child.try_wait().map_err(|e| failed("wait for a rank", e))?;
            if let Some(signal) = ended.and_then(|status| status.signal()) {
                global.note(format!("rank {rank} was ended by signal {signal}"));
            }
        }
        std::thread::sleep(PAUSE);
    }
    Ok(outcome(&ranks.iter().filter_map(|(_, ended)| *ended).collect::<Vec<_>>()))
}

/// Signals one child that has not been waited for.
fn pass_on(child: &Child, signal: i32) {
    // SAFETY: a signal to our own child, whose number stays its own until it is waited for.
    unsafe { libc::kill(child.id() as i32, signal) };
}

/// The exit code of all: that of the cause where one rank has one of its own; 4 where the others only miss it.
fn outcome(ranks: &[ExitStatus]) -> i32 {
    let causes = [Kind::Bug, Kind::Usage, Kind::Input, Kind::Numerical, Kind::Interrupted];
    let mut causes = causes.iter().map(|kind| kind.exit_code() as i32);
    let cause = causes.find(|code| ranks.iter().any(|status| status.code() == Some(*code)));
    let all_well = ranks.iter().all(ExitStatus::success);
    cause.unwrap_or(if all_well { 0 } else { Kind::Environment.exit_code() as i32 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_of_one_rank_is_the_outcome_of_all() {
        let exits = |codes: &[i32]| -> Vec<ExitStatus> {
            codes.iter().map(|code| ExitStatus::from_raw(if *code < 0 { -code } else { code << 8 })).collect()
        };
        assert_eq!(outcome(&exits(&[0, 0])), 0);
        for (codes, exit) in [
            (&[4, 3, 4][..], 3),
            (&[5, 5], 5),
            (&[4, -9], 4),
            (&[6, 6], 6),
            (&[4, 0], 4),
            (&[2, 2], 2),
            (&[5, 4], 5),
        ] {
            assert_eq!(outcome(&exits(codes)), exit);
        }
    }
}
