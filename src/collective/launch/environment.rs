//! What launchers say in the environment.

use super::LAUNCHED;
use crate::error::{Code, Error, Result};

/// What one launcher said.
pub(super) struct Found {
    pub(super) source: &'static str,
    pub(super) rank: usize,
    pub(super) world: usize,
    pub(super) local_rank: Option<usize>,
    pub(super) local_world: Option<usize>,
    pub(super) master: Option<String>,
}

/// A process's variables by name.
type Variables<'a> = &'a dyn Fn(&str) -> Option<String>;
/// What one launcher's variables say; `None` where it set none.
type Reader = fn(Variables<'_>) -> Result<Option<Found>>;

pub(super) fn from_environment(only: Option<&str>, env: Variables<'_>) -> Result<Option<Found>> {
    let looked_at = |name: &str| only.is_none_or(|only| only == name);
    let ask = |name: &str, of: Reader| if looked_at(name) { of(env) } else { Ok(None) };
    if let Some(found) = ask("torchrun", torchrun)? {
        return Ok(Some(found));
    }
    let (slurm, openmpi) = (ask("slurm", slurm)?, ask("openmpi", openmpi)?);
    // mpirun within Slurm starts one process of its own per machine through srun, and its ranks inherit that numbering.
    if let (Some(s), Some(o)) = (&slurm, &openmpi)
        && (s.rank, s.world) != (o.rank, o.world)
        && s.world.max(o.world) > 1
    {
        return Err(Error::new(Code::RankNumbers, "two launchers number the ranks differently")
            .at("SLURM_PROCID and OMPI_COMM_WORLD_RANK")
            .found(format!("rank {} of {} and rank {} of {}", s.rank, s.world, o.rank, o.world))
            .next("--launcher slurm for srun, --launcher openmpi for mpirun"));
    }
    match slurm.or(openmpi) {
        Some(found) => Ok(Some(found)),
        None => ask("pmi", pmi),
    }
}

pub(super) fn half(given: &str, other: &str) -> Error {
    Error::new(Code::RankNumbers, format!("{given} and {other} go together"))
        .found("one of them")
        .next("give both, or neither (--launcher none runs alone)")
}

/// A number of the environment.
fn number(env: Variables<'_>, name: &str) -> Result<Option<usize>> {
    let Some(text) = env(name) else { return Ok(None) };
    text.trim().parse().map(Some).map_err(|_| {
        Error::new(Code::RankNumbers, format!("{name} is no number"))
            .found(text)
            .next("unset it, or number the ranks with --rank and --world")
    })
}

/// Both or none of a pair of numbers.
fn pair(env: Variables<'_>, a: &str, b: &str) -> Result<Option<(usize, usize)>> {
    match (number(env, a)?, number(env, b)?) {
        (Some(a), Some(b)) => Ok(Some((a, b))),
        (None, None) => Ok(None),
        (Some(_), None) => Err(half(a, b)),
        (None, Some(_)) => Err(half(b, a)),
    }
}

fn torchrun(env: Variables<'_>) -> Result<Option<Found>> {
    let Some((rank, world)) = pair(env, "RANK", "WORLD_SIZE")? else { return Ok(None) };
    // The agent of torchrun holds the port that it hands out.
    let taken = env("TORCHELASTIC_RUN_ID").is_some();
    let port = number(env, "MASTER_PORT")?.map(|port| port + usize::from(taken));
    Ok(Some(Found {
        source: if env(LAUNCHED).is_some() { "cellrefine launch" } else { "torchrun" },
        rank,
        world,
        local_rank: number(env, "LOCAL_RANK")?,
        local_world: number(env, "LOCAL_WORLD_SIZE")?,
        master: env("MASTER_ADDR").zip(port).map(|(host, port)| format!("{host}:{port}")),
    }))
}

/// `srun` alone: the batch script itself has a SLURM_PROCID too, but no step of several tasks.
fn slurm(env: Variables<'_>) -> Result<Option<Found>> {
    let (Some(rank), Some(world)) = (number(env, "SLURM_PROCID")?, number(env, "SLURM_STEP_NUM_TASKS")?)
    else {
        return Ok(None);
    };
    let host =
        env("SLURM_STEP_NODELIST").or_else(|| env("SLURM_JOB_NODELIST")).and_then(|list| first_node(&list));
    let port = number(env, "SLURM_JOB_ID")?.map_or(29_400, |job| 20_000 + job % 20_000);
    let here = env("SLURM_STEP_TASKS_PER_NODE")
        .and_then(|text| tasks_here(&text, number(env, "SLURM_NODEID").ok()??));
    Ok(Some(Found {
        source: "Slurm",
        rank,
        world,
        local_rank: number(env, "SLURM_LOCALID")?,
        local_world: here,
        master: host.map(|host| format!("{host}:{port}")),
    }))
}

/// First node of Slurm's list: `gpu[003-010,12],login1` is `gpu003`.
fn first_node(list: &str) -> Option<String> {
    let end = list.find([',', '[']).unwrap_or(list.len());
    let (name, rest) = list.split_at(end);
    let Some(inside) = rest.strip_prefix('[') else {
        return Some(name.to_string()).filter(|n| !n.is_empty());
    };
    let number: String = inside.chars().take_while(char::is_ascii_digit).collect();
    (!number.is_empty()).then(|| format!("{name}{number}"))
}

/// Tasks on node number `node` of Slurm's `4(x2),3`.
fn tasks_here(text: &str, node: usize) -> Option<usize> {
    let mut first = 0;
    for part in text.split(',') {
        let (tasks, times) = match part.split_once("(x") {
            Some((tasks, times)) => (tasks.parse().ok()?, times.strip_suffix(')')?.parse().ok()?),
            None => (part.parse().ok()?, 1),
        };
        first += times;
        if node < first {
            return Some(tasks);
        }
    }
    None
}

fn openmpi(env: Variables<'_>) -> Result<Option<Found>> {
    let names = ["OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"];
    let pair = pair(env, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")?;
    // The id of the job, for a port of its own: 3215327233 of `3215327233.0` or `[3215327233,1]`.
    let job = env("PMIX_NAMESPACE").or_else(|| env("OMPI_MCA_ess_base_jobid"));
    numbered("OpenMPI", env, pair, names, job)
}

fn pmi(env: Variables<'_>) -> Result<Option<Found>> {
    let pair = pair(env, "PMI_RANK", "PMI_SIZE")?;
    numbered("PMI", env, pair, ["MPI_LOCALRANKID", "MPI_LOCALNRANKS"], env("PMI_PORT"))
}

fn numbered(
    source: &'static str,
    env: Variables<'_>,
    pair: Option<(usize, usize)>,
    local: [&str; 2],
    job: Option<String>,
) -> Result<Option<Found>> {
    let Some((rank, world)) = pair else { return Ok(None) };
    let (local_rank, local_world) = (number(env, local[0])?, number(env, local[1])?);
    let digits = |text: String| {
        text.chars().filter_map(|c| c.to_digit(10)).fold(0u64, |n, d| (n * 10 + d as u64) % 20_000)
    };
    let port = 20_000 + job.map_or(9_400, digits);
    let master = (local_world == Some(world)).then(|| format!("127.0.0.1:{port}"));
    Ok(Some(Found { source, rank, world, local_rank, local_world, master }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slurms_shorthand_is_read() {
        for (list, first) in [
            ("gpu[003-010,12],login1", Some("gpu003")),
            ("n1,n2", Some("n1")),
            ("node7", Some("node7")),
            ("a-b[9]", Some("a-b9")),
            ("", None),
            ("x[", None),
        ] {
            assert_eq!(first_node(list).as_deref(), first);
        }
        assert_eq!([0, 1, 2, 3].map(|n| tasks_here("4(x2),3", n)), [Some(4), Some(4), Some(3), None]);
        assert_eq!(tasks_here("many", 0), None);
    }
}
