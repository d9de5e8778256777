//! Ranks that a launcher of MPI started.
//!
//! One exchange is a send and a receive per pair, posted at once and tested until all are done or the time-out passes. MPI has no
//! way back from a rank that does not answer, so what fails here ends the job: the reason is printed, then `MPI_Abort` with this
//! program's exit code. A rank that is killed is reported by the launcher itself, which ends the others.

use super::threads::silent;
use super::{Call, Collective, Transport};
use crate::error::{Code, Error, Result};
use mpi::environment::Universe;
use mpi::point_to_point::{Destination, Source};
use mpi::request::{self, Request};
use mpi::topology::{Communicator, SimpleCommunicator};
use std::time::{Duration, Instant};

/// Bytes of one message at most: MPI counts in `int`.
const MESSAGE: usize = 1 << 30;
/// Polled without a pause for so long, then with one: a rank that waits must not take the cores of one that works.
const EAGER: Duration = Duration::from_micros(200);
/// The pause.
const PAUSE: Duration = Duration::from_micros(50);

/// The world communicator.
pub struct Mpi {
    rank: usize,
    world: usize,
    timeout: Duration,
    /// Ends MPI when it goes.
    _universe: Universe,
}

impl std::fmt::Debug for Mpi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "mpi rank {} of {}", self.rank, self.world)
    }
}

/// Starts MPI and checks that it numbers the ranks as the environment does.
///
/// # Errors
/// Environment (4): MPI does not start, or counts other ranks.
pub fn connect(rank: usize, world: usize, timeout: Duration) -> Result<Collective> {
    let (universe, _) = mpi::initialize_with_threading(mpi::Threading::Serialized).ok_or_else(|| {
        Error::new(Code::RankConnection, "MPI cannot be started a second time in one process")
    })?;
    let all = SimpleCommunicator::world();
    let theirs = (all.rank() as usize, all.size() as usize);
    if theirs != (rank, world) {
        return Err(Error::new(Code::RankConnection, "MPI numbers the ranks differently")
            .found(format!("rank {} of {}", theirs.0, theirs.1))
            .wanted(format!("rank {rank} of {world}"))
            .next("start the ranks with mpirun or srun --mpi=pmix, or use --collective tcp"));
    }
    let all = Collective::over(Mpi { rank, world, timeout, _universe: universe });
    all.barrier()?;
    Ok(all)
}

impl Transport for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.world
    }

    fn timeout(&self) -> Duration {
        self.timeout
    }

    fn exchange(&self, call: Call, send: &[&[u8]], receive: &mut [&mut [u8]]) -> Result<()> {
        let all = SimpleCommunicator::world();
        // Two exchanges are never open at once between two ranks, so a few bits of their number keep them apart.
        let tag = (call.sequence % 4096) as i32 * 8 + call.operation as i32;
        request::scope(|scope| {
            let mut open: Vec<(usize, Request<'_, [u8], _>)> = Vec::new();
            for (rank, receive) in receive.iter_mut().enumerate().filter(|(r, _)| *r != self.rank) {
                for part in receive.chunks_mut(MESSAGE) {
                    let from = all.process_at_rank(rank as i32);
                    open.push((rank, from.immediate_receive_into_with_tag(scope, part, tag)));
                }
            }
            for (rank, send) in send.iter().enumerate().filter(|(r, _)| *r != self.rank) {
                for part in send.chunks(MESSAGE) {
                    let to = all.process_at_rank(rank as i32);
                    open.push((rank, to.immediate_send_with_tag(scope, part, tag)));
                }
            }
            let started = Instant::now();
            while !open.is_empty() {
                open = open
                    .into_iter()
                    .filter_map(|(rank, request)| request.test().err().map(|request| (rank, request)))
                    .collect();
                let waited = started.elapsed();
                if !open.is_empty() && waited > self.timeout {
                    let mut late: Vec<usize> = open.iter().map(|(rank, _)| *rank).collect();
                    late.dedup();
                    let late: Vec<String> = late.iter().map(|rank| format!("rank {rank}")).collect();
                    self.abort(&silent(&late, self.timeout, call));
                }
                if waited > EAGER {
                    std::thread::sleep(PAUSE);
                }
            }
        });
        Ok(())
    }

    fn abort(&self, reason: &Error) {
        eprintln!("rank {}: error: {reason}", self.rank);
        SimpleCommunicator::world().abort(reason.kind().exit_code() as i32)
    }
}
