//! Several processes as one: what ranks say to each other, and what they reckon together.
//!
//! A [`Transport`] does one thing: all ranks exchange bytes, each pair its own. [`Collective`] makes everything else of it, once for
//! every transport, so that sums are the same bits whichever carries them:
//!
//! ```text
//! slice r of n floats     0..n cut into `world` runs of whole cache lines
//! reduce_scatter          rank r receives slice r of all ranks and adds them in rank order, in f64, rounded once
//! all_gather              each rank sends its slice to all
//! all_reduce              the two in turn, a bucket at a time: 2 (world-1)/world · n floats sent by each rank, as a ring does
//! ```
//! The order of a sum is part of the contract: repeats, transports, thread counts and the cut into [pieces](Piece) give the same
//! bits, and every rank holds the same ones.
//!
//! | file | what |
//! |---|---|
//! | [`threads`] | ranks that are threads of one process: tests, and programs that embed the library |
//! | [`tcp`], [`wire`] | ranks that are processes anywhere: sockets between every two, deadlines, who died |
//! | `mpi` | ranks that a launcher of MPI started (feature `mpi`) |
//! | [`launch`] | which rank this process is: flags, torchrun, Slurm, OpenMPI |
//! | `sums` | sums and slices of floats |
//! | [`behind`] | sums that go on behind other work of this rank |
//!
//! NCCL moves what lies on GPUs (`cuda/nccl.rs`, feature `nccl`); one of these transports brings its ranks together and carries the rest.

pub mod behind;
pub mod launch;
#[cfg(feature = "mpi")]
pub mod mpi;
mod sums;
pub mod tcp;
pub mod threads;
pub mod wire;

pub use sums::{Piece, slice};

use crate::error::{Code, Error, Kind, Result};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// What an exchange is for: named in messages about ranks that do not come, and compared, so that ranks which have lost each
/// other's step say so instead of mixing numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Operation {
    /// All are there.
    Meet,
    /// Waiting for all.
    Barrier,
    /// Small messages of any length.
    Messages,
    /// A few sums.
    Sums,
    /// First half of a sum of floats.
    ReduceScatter,
    /// Slices of floats to all.
    AllGather,
}

impl Operation {
    /// All of them, in the order of their numbers.
    pub const ALL: [Operation; 6] = [
        Operation::Meet,
        Operation::Barrier,
        Operation::Messages,
        Operation::Sums,
        Operation::ReduceScatter,
        Operation::AllGather,
    ];

    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Operation::Meet => "meet",
            Operation::Barrier => "barrier",
            Operation::Messages => "messages",
            Operation::Sums => "sums",
            Operation::ReduceScatter => "reduce_scatter",
            Operation::AllGather => "all_gather",
        }
    }
}

/// An exchange as messages name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// What for.
    pub operation: Operation,
    /// Training step, 0 before the first.
    pub step: u64,
    /// Exchanges before this one.
    pub sequence: u64,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of step {}", self.operation.name(), self.step)
    }
}

/// How bytes get from every rank to every other.
pub trait Transport: fmt::Debug + Send + Sync {
    /// This rank.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn world(&self) -> usize;
    /// How long a rank is waited for.
    fn timeout(&self) -> Duration;
    /// Sends `send[r]` to rank r and fills `receive[r]` from it, for every r but this rank; the lengths of both sides agree.
    /// Called by one thread at a time.
    ///
    /// # Errors
    /// Environment (4): a rank that ended, stopped with an error, or let the time-out pass: named with host, step and operation.
    fn exchange(&self, call: Call, send: &[&[u8]], receive: &mut [&mut [u8]]) -> Result<()>;
    /// Tells the other ranks that this one stops, and why; they fail with it in their next exchange. Never blocks for long.
    fn abort(&self, reason: &Error);
}

/// All ranks of a run. The default is one process alone, for which every operation is free.
#[derive(Clone, Default)]
pub struct Collective {
    shared: Option<Arc<Shared>>,
    nccl: bool,
}

#[derive(Debug)]
struct Shared {
    transport: Box<dyn Transport>,
    step: AtomicU64,
    sequence: AtomicU64,
}

impl fmt::Debug for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {}", self.rank(), self.world())
    }
}

impl Collective {
    /// Over `transport`.
    pub fn over(transport: impl Transport + 'static) -> Collective {
        Collective {
            shared: Some(Arc::new(Shared {
                transport: Box::new(transport),
                step: AtomicU64::new(0),
                sequence: AtomicU64::new(0),
            })),
            nccl: false,
        }
    }

    /// The same ranks, whose GPUs speak NCCL.
    pub fn over_nccl(self) -> Collective {
        Collective { nccl: true, ..self }
    }
    /// Do GPUs of these ranks speak NCCL?
    pub fn uses_nccl(&self) -> bool {
        self.nccl
    }

    /// This rank, from 0.
    pub fn rank(&self) -> usize {
        self.shared.as_ref().map_or(0, |s| s.transport.rank())
    }
    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.shared.as_ref().map_or(1, |s| s.transport.world())
    }
    /// How long a rank is waited for; nobody waits in one process alone.
    pub fn timeout(&self) -> Duration {
        self.shared.as_ref().map_or(Duration::MAX, |s| s.transport.timeout())
    }
    /// Is there no other rank?
    pub fn is_single(&self) -> bool {
        self.world() == 1
    }
    /// Is this the rank that writes files and speaks?
    pub fn leads(&self) -> bool {
        self.rank() == 0
    }
    /// Names the training step in messages from here on.
    pub fn at_step(&self, step: u64) {
        if let Some(s) = &self.shared {
            s.step.store(step, Relaxed);
        }
    }

    /// Stops the other ranks: they fail with `reason` in their next exchange.
    pub fn abort(&self, reason: &Error) {
        if let Some(s) = self.shared.as_ref().filter(|s| s.transport.world() > 1) {
            s.transport.abort(reason);
        }
    }

    /// Runs `body`; where it fails on this rank, the others are told.
    pub fn guard<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        let outcome = body();
        if let Err(e) = &outcome
            && e.kind() != Kind::Interrupted
        {
            self.abort(e);
        }
        outcome
    }

    fn exchange(&self, operation: Operation, send: &[&[u8]], receive: &mut [&mut [u8]]) -> Result<()> {
        let Some(s) = self.shared.as_ref().filter(|s| s.transport.world() > 1) else { return Ok(()) };
        let _range = crate::trace::range("ranks");
        let sequence = s.sequence.fetch_add(1, Relaxed);
        s.transport.exchange(Call { operation, step: s.step.load(Relaxed), sequence }, send, receive)
    }

    /// Waits until all ranks are here.
    pub fn barrier(&self) -> Result<()> {
        self.messages_for(Operation::Barrier, &[]).map(|_| ())
    }

    /// Every rank's message, by rank.
    pub fn messages(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.messages_for(Operation::Messages, mine)
    }

    fn messages_for(&self, operation: Operation, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let (world, rank) = (self.world(), self.rank());
        let length = (mine.len() as u64).to_le_bytes();
        let mut lengths = vec![[0u8; 8]; world];
        self.exchange(
            operation,
            &vec![&length[..]; world],
            &mut lengths.iter_mut().map(|l| &mut l[..]).collect::<Vec<_>>(),
        )?;
        lengths[rank] = length;
        let mut all: Vec<Vec<u8>> =
            lengths.iter().map(|l| vec![0; u64::from_le_bytes(*l) as usize]).collect();
        if all.iter().any(|message| !message.is_empty()) {
            self.exchange(
                operation,
                &vec![mine; world],
                &mut all.iter_mut().map(|m| &mut m[..]).collect::<Vec<_>>(),
            )?;
        }
        all[rank].copy_from_slice(mine);
        Ok(all)
    }

    /// What the leading rank makes, on every rank; its failure is everybody's.
    pub fn lead(&self, make: impl FnOnce() -> Result<Vec<u8>>) -> Result<Vec<u8>> {
        if self.is_single() {
            return make();
        }
        let made = if self.leads() { Some(make()) } else { None };
        let (mut message, mut failure) = (Vec::new(), None);
        match made {
            Some(Ok(bytes)) => message = [&[1], &bytes[..]].concat(),
            Some(Err(e)) => {
                message = [&[0], e.to_string().as_bytes()].concat();
                failure = Some(e);
            }
            None => {}
        }
        let mut all = self.messages(&message)?;
        if let Some(e) = failure {
            return Err(e);
        }
        let mut first = all.swap_remove(0);
        if first.first() == Some(&1) {
            return Ok(first.split_off(1));
        }
        Err(Error::new(Code::RankLost, "the leading rank stopped")
            .found(String::from_utf8_lossy(&first[1.min(first.len())..])))
    }

    /// Σ over the ranks of each of a few numbers, in rank order.
    pub fn sum(&self, values: &mut [f64]) -> Result<()> {
        if self.is_single() || values.is_empty() {
            return Ok(());
        }
        let world = self.world();
        let mine = values.to_vec();
        let mut all = vec![vec![0f64; values.len()]; world];
        self.exchange(
            Operation::Sums,
            &vec![bytemuck::cast_slice(&mine); world],
            &mut all.iter_mut().map(|v| bytemuck::cast_slice_mut(v)).collect::<Vec<_>>(),
        )?;
        all[self.rank()] = mine;
        for (i, value) in values.iter_mut().enumerate() {
            *value = all.iter().map(|theirs| theirs[i]).sum();
        }
        Ok(())
    }

    /// Each rank's [slice](Collective::slice) of `values` to all.
    pub fn all_gather<T: bytemuck::Pod>(&self, values: &mut [T]) -> Result<()> {
        let len = values.len();
        let slices: Vec<Range<usize>> = (0..self.world()).map(|r| self.slice(len, r)).collect();
        self.all_gather_ranges(values, &slices)
    }

    /// Range r of `values` from rank r to all; the ranges follow each other.
    pub fn all_gather_ranges<T: bytemuck::Pod>(
        &self,
        values: &mut [T],
        ranges: &[Range<usize>],
    ) -> Result<()> {
        if self.is_single() {
            return Ok(());
        }
        let mine = values[ranges[self.rank()].clone()].to_vec();
        let mut receive: Vec<&mut [u8]> = Vec::with_capacity(ranges.len());
        let (mut rest, mut at) = (&mut values[..], 0);
        for range in ranges {
            let (_, after) = rest.split_at_mut(range.start - at);
            let (part, after) = after.split_at_mut(range.len());
            receive.push(bytemuck::cast_slice_mut(part));
            (rest, at) = (after, range.end);
        }
        let send = vec![bytemuck::cast_slice(&mine); ranges.len()];
        self.exchange(Operation::AllGather, &send, &mut receive)
    }

    /// Every rank's [slice](Collective::slice) of `len` floats, `own`, to the leading rank, which gets all of them.
    pub fn gather(&self, own: &[f32], len: usize) -> Result<Option<Vec<f32>>> {
        if self.is_single() {
            return Ok(Some(own.to_vec()));
        }
        let mut all = vec![0.0; if self.leads() { len } else { 0 }];
        let send: Vec<&[u8]> = (0..self.world())
            .map(|to| bytemuck::cast_slice(if to == 0 && !self.leads() { own } else { &[] }))
            .collect();
        let (mut receive, mut rest) = (Vec::<&mut [u8]>::new(), &mut all[..]);
        for from in 0..self.world() {
            let size = if self.leads() { self.slice(len, from).len() } else { 0 };
            let (part, after) = std::mem::take(&mut rest).split_at_mut(size);
            if from == 0 && self.leads() {
                part.copy_from_slice(own);
            }
            receive.push(bytemuck::cast_slice_mut(part));
            rest = after;
        }
        self.exchange(Operation::AllGather, &send, &mut receive)?;
        Ok(self.leads().then_some(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_alone_is_every_operation_at_once() {
        let one = Collective::default();
        let mut x = [1.0f32, 2.0];
        one.all_reduce(&mut x).unwrap();
        assert_eq!((x, one.messages(b"a").unwrap()), ([1.0, 2.0], vec![b"a".to_vec()]));
        assert!(one.lead(|| Err(Error::new(Code::FileMissing, "no"))).is_err() && one.leads());
    }
}
