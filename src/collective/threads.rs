//! Ranks that are threads of one process: for tests, and for programs that embed the library.
//!
//! Every two ranks share a channel in each direction. A rank that is dropped closes its channels, which is how the others learn
//! of it.

use super::{Call, Collective, Transport};
use crate::error::{Code, Error, Result};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

enum Message {
    Data(Call, Vec<u8>),
    Abort(String),
}

/// One rank of [`ranks`].
pub struct Threads {
    rank: usize,
    timeout: Duration,
    to: Vec<Mutex<Sender<Message>>>,
    from: Vec<Mutex<Receiver<Message>>>,
}

impl std::fmt::Debug for Threads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "thread {} of {}", self.rank, self.to.len())
    }
}

/// `world` ranks, to be handed to as many threads; an exchange fails where a rank does not come for `timeout`.
pub fn ranks(world: usize, timeout: Duration) -> Vec<Collective> {
    let mut to: Vec<Vec<Mutex<Sender<Message>>>> = (0..world).map(|_| Vec::new()).collect();
    let mut from: Vec<Vec<Mutex<Receiver<Message>>>> = (0..world).map(|_| Vec::new()).collect();
    for sender in to.iter_mut() {
        for receiver in from.iter_mut() {
            let (send, receive) = channel();
            sender.push(Mutex::new(send));
            receiver.push(Mutex::new(receive));
        }
    }
    let pairs = to.into_iter().zip(from).enumerate();
    pairs.map(|(rank, (to, from))| Collective::over(Threads { rank, timeout, to, from })).collect()
}

impl Threads {
    fn send(&self, rank: usize, message: Message) -> bool {
        self.to[rank].lock().is_ok_and(|to| to.send(message).is_ok())
    }
}

impl Transport for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.to.len()
    }

    fn timeout(&self) -> Duration {
        self.timeout
    }

    fn exchange(&self, call: Call, send: &[&[u8]], receive: &mut [&mut [u8]]) -> Result<()> {
        let others = || (0..self.world()).filter(|r| *r != self.rank);
        for rank in others() {
            // A closed channel is found below, together with what its rank may have said before it ended.
            self.send(rank, Message::Data(call, send[rank].to_vec()));
        }
        let deadline = Instant::now() + self.timeout;
        for rank in others() {
            let from = self.from[rank].lock().map_err(|_| Error::bug("two threads speak for one rank"))?;
            let left = deadline.saturating_duration_since(Instant::now());
            match from.recv_timeout(left) {
                Ok(Message::Data(theirs, data)) => {
                    if theirs != call || data.len() != receive[rank].len() {
                        return Err(out_of_step(rank, theirs, call));
                    }
                    receive[rank].copy_from_slice(&data);
                }
                Ok(Message::Abort(reason)) => return Err(stopped(rank, "this process", &reason, call)),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(silent(&[format!("rank {rank}")], self.timeout, call));
                }
                Err(RecvTimeoutError::Disconnected) => return Err(ended(rank, "this process", call)),
            }
        }
        Ok(())
    }

    fn abort(&self, reason: &Error) {
        for rank in (0..self.world()).filter(|r| *r != self.rank) {
            self.send(rank, Message::Abort(reason.to_string()));
        }
    }
}

/// The error of a rank whose program went another way.
pub(super) fn out_of_step(rank: usize, theirs: Call, mine: Call) -> Error {
    Error::bug("the ranks are out of step")
        .at(format!("rank {rank}"))
        .found(format!("{theirs} (exchange {})", theirs.sequence))
        .wanted(format!("{mine} (exchange {})", mine.sequence))
        .next("start all ranks with the same command, settings and version")
}

/// The error of a rank that said why it stops.
pub(super) fn stopped(rank: usize, host: &str, reason: &str, call: Call) -> Error {
    Error::new(Code::RankLost, format!("rank {rank} stopped"))
        .at(format!("rank {rank} on {host}, seen in {call}"))
        .found(reason.replace('\n', "; "))
        .next("see its own messages; then continue from the last checkpoint with --resume")
}

/// The error of a rank that is gone without a word.
pub(super) fn ended(rank: usize, host: &str, call: Call) -> Error {
    Error::new(Code::RankLost, format!("rank {rank} ended without a word"))
        .at(format!("rank {rank} on {host}, seen in {call}"))
        .found("its connection is closed: killed, out of memory, or its machine is gone")
        .next("look at that machine; then continue from the last checkpoint with --resume")
}

/// The error of ranks that let the time-out pass.
pub(super) fn silent(ranks: &[String], timeout: Duration, call: Call) -> Error {
    Error::new(
        Code::RankLate,
        format!("{} did not come within {} s", ranks.join(", "), timeout.as_secs_f64()),
    )
    .at(format!("{call}"))
    .found("no answer: hanging, stopped, or behind a broken network")
    .next("look at that machine; a longer wait: --rank-timeout SECONDS")
}
