//! Which rank this process is. Strongest first: flags, torchrun, Slurm, OpenMPI, PMI; a process that nobody numbered runs alone.
//!
//! | launcher | rank, ranks | rank on this machine | where rank 0 listens |
//! |---|---|---|---|
//! | flags | `--rank`, `--world` | `--local-rank` | `--master` |
//! | torchrun, PyTorchJob, [`LAUNCHED`] | `RANK`, `WORLD_SIZE` | `LOCAL_RANK`, `LOCAL_WORLD_SIZE` | `MASTER_ADDR`, `MASTER_PORT` (its port + 1 where torchrun itself listens) |
//! | Slurm (`srun`) | `SLURM_PROCID`, `SLURM_STEP_NUM_TASKS` | `SLURM_LOCALID` | first node of `SLURM_STEP_NODELIST`, a port from `SLURM_JOB_ID` |
//! | OpenMPI | `OMPI_COMM_WORLD_RANK`, `_SIZE` | `OMPI_COMM_WORLD_LOCAL_RANK`, `_LOCAL_SIZE` | this machine where all ranks are on it, else `--master` |
//! | PMI | `PMI_RANK`, `PMI_SIZE` | `MPI_LOCALRANKID`, `MPI_LOCALNRANKS` | as OpenMPI |
//!
//! What is ambiguous is refused with the flag that settles it: half of a pair, two launchers that disagree below torchrun, several
//! GPUs and no rank on the machine.

mod environment;

use super::Collective;
use super::tcp::{self, Place};
use crate::backend::Choice;
use crate::error::{Code, Error, Result};
use environment::{Found, from_environment, half};
use std::time::Duration;

/// Variable that `cellrefine launch` sets, so that a message can say who numbered the ranks.
pub const LAUNCHED: &str = "CELLREFINE_LAUNCHED";

/// What carries the ranks' messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Carrier {
    /// Sockets between every two ranks.
    #[default]
    Tcp,
    /// MPI (feature `mpi`).
    Mpi,
    /// NCCL between GPUs (feature `nccl`), sockets for the rest.
    Nccl,
}

/// What the command line says about ranks.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Flags {
    /// `--rank`.
    pub rank: Option<usize>,
    /// `--world`.
    pub world: Option<usize>,
    /// `--local-rank`.
    pub local_rank: Option<usize>,
    /// `--gpus-per-node`.
    pub gpus_per_node: Option<usize>,
    /// `--master`.
    pub master: Option<String>,
    /// `--launcher`: the only one to look at; `none` runs alone.
    pub launcher: Option<String>,
    /// `--collective`.
    pub carrier: Carrier,
    /// `--rank-timeout`, in seconds.
    pub timeout: Option<f64>,
}

/// Names of `--launcher`, strongest first.
pub const LAUNCHERS: [&str; 5] = ["torchrun", "slurm", "openmpi", "pmi", "none"];
/// Longest wait for another rank where nothing else is said, as NCCL's.
pub const TIMEOUT: Duration = Duration::from_secs(600);

/// A rank.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub world: usize,
    /// Rank among those of this machine.
    pub local_rank: Option<usize>,
    /// Ranks of this machine.
    pub local_world: Option<usize>,
    /// Where rank 0 listens.
    pub master: Option<String>,
    /// Who numbered the ranks.
    pub source: &'static str,
    /// Longest wait for another rank.
    pub timeout: Duration,
    /// What carries messages.
    pub carrier: Carrier,
}

impl Launch {
    /// Reads flags and environment.
    ///
    /// # Errors
    /// Usage (2): half of a pair, a rank beyond the world, launchers that disagree.
    pub fn discover(flags: &Flags, env: impl Fn(&str) -> Option<String>) -> Result<Launch> {
        let env = &|name: &str| env(name).filter(|value| !value.is_empty());
        let mut found = match (flags.rank, flags.world) {
            (Some(rank), Some(world)) => Some(Found {
                source: "flags",
                rank,
                world,
                local_rank: None,
                local_world: None,
                master: None,
            }),
            (None, None) => from_environment(flags.launcher.as_deref(), env)?,
            _ => return Err(half("--rank", "--world")),
        };
        if let Some(f) = &found
            && (f.rank >= f.world)
        {
            return Err(Error::new(Code::RankNumbers, "the rank is beyond the number of ranks")
                .at(f.source)
                .found(format!("rank {} of {}", f.rank, f.world))
                .wanted("ranks from 0 to one less than their number"));
        }
        if let Some(f) = &mut found {
            f.local_rank =
                flags.local_rank.or(f.local_rank).or(flags.gpus_per_node.map(|n| f.rank % n.max(1)));
            f.master = flags.master.clone().or(f.master.take());
        }
        let seconds = flags.timeout.unwrap_or(TIMEOUT.as_secs_f64());
        let timeout =
            Duration::try_from_secs_f64(seconds).ok().filter(|t| !t.is_zero()).ok_or_else(|| {
                Error::new(Code::FlagValue, "--rank-timeout is out of range")
                    .found(seconds)
                    .wanted("seconds, above 0")
            })?;
        let found = found.filter(|f| f.world > 1);
        Ok(match found {
            Some(f) => Launch {
                rank: f.rank,
                world: f.world,
                local_rank: f.local_rank,
                local_world: f.local_world,
                master: f.master,
                source: f.source,
                timeout,
                carrier: flags.carrier,
            },
            None => Launch {
                rank: 0,
                world: 1,
                local_rank: flags.local_rank,
                local_world: Some(1),
                master: None,
                source: "alone",
                timeout,
                carrier: flags.carrier,
            },
        })
    }

    /// Meets the other ranks.
    ///
    /// # Errors
    /// Usage (2): no address of rank 0, a carrier that this build lacks. Environment (4): ranks that do not come.
    pub fn connect(&self) -> Result<Collective> {
        if self.world == 1 {
            return Ok(Collective::default());
        }
        match self.carrier {
            Carrier::Nccl if !cfg!(feature = "nccl") => {
                Err(Error::new(Code::RankBuild, "this build does not speak NCCL")
                    .at("--collective nccl")
                    .next("build with --features nccl, or --collective tcp"))
            }
            Carrier::Tcp | Carrier::Nccl => {
                let master = self.master.clone().ok_or_else(|| {
                    Error::new(Code::RankAddress, "where does rank 0 listen?")
                        .at(format!("{} numbered {} ranks", self.source, self.world))
                        .found("no address")
                        .next("--master HOST:PORT, the same on all ranks, HOST being the machine of rank 0")
                })?;
                let place = Place { rank: self.rank, world: self.world, master, timeout: self.timeout };
                let all = tcp::connect(&place)?;
                Ok(if self.carrier == Carrier::Nccl { all.over_nccl() } else { all })
            }
            #[cfg(feature = "mpi")]
            Carrier::Mpi => super::mpi::connect(self.rank, self.world, self.timeout),
            #[cfg(not(feature = "mpi"))]
            Carrier::Mpi => Err(Error::new(Code::RankBuild, "this build does not speak MPI")
                .at("--collective mpi")
                .next("build with --features mpi (needs mpicc and libclang), or --collective tcp")),
        }
    }

    /// Threads of this rank where `cores` are shared by all ranks of the machine.
    pub fn threads(&self, cores: usize) -> usize {
        (cores / self.local_world.unwrap_or(1).max(1)).max(1)
    }

    /// The device of this rank: among several ranks, `cuda` and `cuda:0` are the GPU of the rank's number on its machine, unless
    /// its launcher shows it one GPU alone.
    ///
    /// # Errors
    /// Usage (2): several GPUs, and nothing says which is this rank's.
    pub fn device(&self, asked: Choice, gpus: impl FnOnce() -> Result<usize>) -> Result<Choice> {
        if self.world == 1 || asked != Choice::Cuda(0) {
            return Ok(asked);
        }
        let gpus = gpus()?;
        match self.local_rank {
            _ if gpus == 1 => Ok(asked),
            Some(local) if local < gpus => Ok(Choice::Cuda(local)),
            Some(local) => Err(Error::new(Code::RankDevice, "more ranks on this machine than GPUs")
                .found(format!("local rank {local}, {gpus} GPUs"))
                .next("start as many ranks a machine as it has GPUs")),
            None => Err(Error::new(Code::RankDevice, "several GPUs, and nothing says which is this rank's")
                .at(format!("{} set no rank on the machine (LOCAL_RANK)", self.source))
                .found(format!("rank {}, {gpus} GPUs", self.rank))
                .next("--local-rank L, or --gpus-per-node N where ranks are numbered machine by machine")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(flags: &Flags, env: &[(&str, &str)]) -> Result<Launch> {
        let env: Vec<(String, String)> = env.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Launch::discover(flags, |name| env.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone()))
    }

    const TORCHRUN: [(&str, &str); 6] = [
        ("RANK", "5"),
        ("WORLD_SIZE", "8"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "4"),
        ("MASTER_ADDR", "node7"),
        ("MASTER_PORT", "29500"),
    ];
    const SLURM: [(&str, &str); 7] = [
        ("SLURM_PROCID", "3"),
        ("SLURM_STEP_NUM_TASKS", "6"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_NODEID", "1"),
        ("SLURM_STEP_TASKS_PER_NODE", "2(x3)"),
        ("SLURM_STEP_NODELIST", "gpu[003-005]"),
        ("SLURM_JOB_ID", "1234567"),
    ];
    const OPENMPI: [(&str, &str); 4] = [
        ("OMPI_COMM_WORLD_RANK", "1"),
        ("OMPI_COMM_WORLD_SIZE", "2"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
    ];

    #[test]
    fn the_strongest_launcher_numbers_the_ranks() {
        let alone = with(&Flags::default(), &[]).unwrap();
        assert_eq!((alone.rank, alone.world, alone.source), (0, 1, "alone"));
        let torchrun = with(&Flags::default(), &[&TORCHRUN[..], &SLURM[..]].concat()).unwrap();
        assert_eq!((torchrun.rank, torchrun.world, torchrun.local_rank), (5, 8, Some(1)));
        assert_eq!(torchrun.master.as_deref(), Some("node7:29500"));
        let agent =
            with(&Flags::default(), &[&TORCHRUN[..], &[("TORCHELASTIC_RUN_ID", "x")]].concat()).unwrap();
        assert_eq!(agent.master.as_deref(), Some("node7:29501"));
        let slurm = with(&Flags::default(), &SLURM).unwrap();
        assert_eq!((slurm.rank, slurm.world, slurm.local_rank, slurm.local_world), (3, 6, Some(1), Some(2)));
        assert_eq!(slurm.master.as_deref(), Some("gpu003:34567"));
        let openmpi = with(&Flags::default(), &OPENMPI).unwrap();
        assert_eq!((openmpi.rank, openmpi.world, openmpi.source), (1, 2, "OpenMPI"));
        assert!(openmpi.master.unwrap().starts_with("127.0.0.1:"));
        let flags = Flags { rank: Some(0), world: Some(2), master: Some("a:1".into()), ..Flags::default() };
        let flags = with(&flags, &TORCHRUN).unwrap();
        assert_eq!((flags.world, flags.source, flags.master.as_deref()), (2, "flags", Some("a:1")));
        let pmi = with(&Flags::default(), &[("PMI_RANK", "1"), ("PMI_SIZE", "4")]).unwrap();
        assert_eq!((pmi.rank, pmi.world, pmi.master), (1, 4, None));
    }

    #[test]
    fn the_shell_of_a_batch_job_runs_alone() {
        let batch = with(&Flags::default(), &[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")]).unwrap();
        assert_eq!(batch.world, 1);
    }

    #[test]
    fn what_is_ambiguous_is_refused_with_the_flag_that_settles_it() {
        let refused = |flags: &Flags, env: &[(&str, &str)], word: &str| {
            let e = with(flags, env).unwrap_err();
            assert!(e.kind().exit_code() == 2 && e.to_string().contains(word), "{e}");
        };
        let none = Flags::default();
        refused(&none, &[("RANK", "0")], "WORLD_SIZE");
        refused(&none, &[("WORLD_SIZE", "2")], "RANK");
        refused(&none, &[("RANK", "x"), ("WORLD_SIZE", "2")], "RANK");
        refused(&none, &[("RANK", "2"), ("WORLD_SIZE", "2")], "rank 2 of 2");
        refused(&Flags { rank: Some(1), ..Flags::default() }, &[], "--world");
        refused(&none, &[&SLURM[..], &OPENMPI[..]].concat(), "--launcher");
        refused(&Flags { timeout: Some(0.0), ..Flags::default() }, &[], "--rank-timeout");
        let slurm = Flags { launcher: Some("slurm".into()), ..Flags::default() };
        assert_eq!(with(&slurm, &[&SLURM[..], &OPENMPI[..]].concat()).unwrap().world, 6);
        let none = Flags { launcher: Some("none".into()), ..Flags::default() };
        assert_eq!(with(&none, &[&TORCHRUN[..], &SLURM[..]].concat()).unwrap().world, 1);
    }

    #[test]
    fn a_rank_takes_the_gpu_of_its_number_on_the_machine() {
        let rank = with(&Flags::default(), &TORCHRUN).unwrap();
        let device = |launch: &Launch, asked, gpus| launch.device(asked, || Ok(gpus));
        assert_eq!(device(&rank, Choice::Cuda(0), 4).unwrap(), Choice::Cuda(1));
        assert_eq!(device(&rank, Choice::Cuda(0), 1).unwrap(), Choice::Cuda(0));
        assert_eq!(device(&rank, Choice::Cuda(3), 4).unwrap(), Choice::Cuda(3));
        assert_eq!(device(&rank, Choice::Cpu, 4).unwrap(), Choice::Cpu);
        let per_pod = with(&Flags::default(), &[("RANK", "1"), ("WORLD_SIZE", "2")]).unwrap();
        let e = device(&per_pod, Choice::Cuda(0), 8).unwrap_err();
        assert!(e.to_string().contains("--local-rank") && e.to_string().contains("--gpus-per-node"));
        let told = Flags { gpus_per_node: Some(8), ..Flags::default() };
        let told = with(&told, &[("RANK", "9"), ("WORLD_SIZE", "16")]).unwrap();
        assert_eq!(device(&told, Choice::Cuda(0), 8).unwrap(), Choice::Cuda(1));
        assert_eq!((rank.threads(64), per_pod.threads(64), rank.threads(2)), (16, 64, 1));
    }
}
