//! What the training commands say about ranks, and what a rank that does not lead keeps to itself.

use super::Output;
use crate::backend::Choice;
use crate::collective::Collective;
use crate::collective::launch::{Carrier, Flags, LAUNCHERS, Launch};
use crate::cuda::gpu;
use crate::error::{Error, Result};
use crate::train::{RunInputs, RunSummary};
use std::sync::OnceLock;

/// Several processes as one run. Under `cellrefine launch`, torchrun, srun or mpirun none of these is needed.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Several processes")]
pub struct RankArgs {
    /// This process's number, from 0; with --world.
    #[arg(long, value_name = "R")]
    rank: Option<usize>,
    /// Number of processes.
    #[arg(long, value_name = "N")]
    world: Option<usize>,
    /// This process's number on its machine: which GPU it takes.
    #[arg(long, value_name = "L")]
    local_rank: Option<usize>,
    /// GPUs a machine has, where processes are numbered machine by machine and nobody sets a local rank.
    #[arg(long, value_name = "N")]
    gpus_per_node: Option<usize>,
    /// Where process 0 listens for the others: an address of its machine and a free port.
    #[arg(long, value_name = "HOST:PORT")]
    master: Option<String>,
    /// The only launcher whose variables are looked at.
    #[arg(long, value_name = "NAME", value_parser = LAUNCHERS)]
    launcher: Option<String>,
    /// What carries sums between processes: tcp; mpi or nccl (between GPUs) where this build has them [default: nccl for GPUs in
    /// a build that has it, else tcp].
    #[arg(long, value_name = "NAME", value_parser = ["tcp", "mpi", "nccl"])]
    collective: Option<String>,
    /// Longest wait for another process, in seconds [default: 600].
    #[arg(long, value_name = "SECONDS")]
    rank_timeout: Option<f64>,
}

/// This process's rank once it is one of several.
static RANK: OnceLock<usize> = OnceLock::new();

/// Does this process leave the speaking to another one?
pub fn is_follower() -> bool {
    RANK.get().is_some_and(|rank| *rank > 0)
}

/// What this process's messages begin with.
pub fn prefix() -> String {
    RANK.get().map_or(String::new(), |rank| format!("rank {rank}: "))
}

impl RankArgs {
    /// Flags and environment, for a rank on `device`.
    pub fn launch(&self, device: Choice) -> Result<Launch> {
        let flags = Flags {
            rank: self.rank,
            world: self.world,
            local_rank: self.local_rank,
            gpus_per_node: self.gpus_per_node,
            master: self.master.clone(),
            launcher: self.launcher.clone(),
            carrier: match self.collective.as_deref() {
                Some("mpi") => Carrier::Mpi,
                Some("nccl") => Carrier::Nccl,
                None if cfg!(feature = "nccl") && matches!(device, Choice::Cuda(_)) => Carrier::Nccl,
                _ => Carrier::Tcp,
            },
            timeout: self.rank_timeout,
        };
        let launch = Launch::discover(&flags, |name| std::env::var(name).ok())?;
        if launch.world > 1 {
            let _ = RANK.set(launch.rank);
        }
        Ok(launch)
    }

    /// Meets the other ranks and gives `inputs` this rank's place and device among them.
    pub fn join(&self, inputs: &mut RunInputs) -> Result<Collective> {
        let launch = self.launch(inputs.device)?;
        inputs.device = launch.device(inputs.device, gpu::count)?;
        inputs.ranks = launch.connect()?;
        Ok(inputs.ranks.clone())
    }
}

/// The result of a training command: the leading rank's.
pub fn output(summary: &RunSummary, ranks: &Collective) -> Output {
    match ranks.leads() {
        true => Output { text: summary.to_text(), json: summary.to_json() },
        false => Output::default(),
    }
}

/// The error as this process prints it; `None` where the leading rank says the same.
pub fn said(e: &Error) -> Option<String> {
    let same_everywhere = e.kind() == crate::error::Kind::Interrupted;
    (!(is_follower() && same_everywhere)).then(|| format!("{}error[{}]: {e}", prefix(), e.code()))
}
