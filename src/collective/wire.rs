//! What goes over a socket between two ranks: frames with a header that names the exchange, and the greeting of a rank.
//!
//! | header field | type | |
//! |---|---|---|
//! | magic | u32 | [`MAGIC`], with the version of this layout |
//! | kind | u32 | 0 data, 1 the reason why the sender stops, 2 greeting |
//! | operation | u32 | [`Operation`]'s number |
//! | reserved | u32 | 0 |
//! | step, sequence, length | u64 | of training, of exchanges, of the bytes that follow |
//!
//! All little-endian. Connections come from within a job; what a stranger sends is refused by magic, and its length is bounded by
//! what the receiver waits for.

use super::{Call, Operation};
use crate::error::{Code, Error, Result};

/// First bytes of every frame.
pub const MAGIC: u32 = u32::from_le_bytes(*b"CRr1");
/// Bytes of a header.
pub const HEADER: usize = 40;
/// Bytes of a reason or a greeting at most.
pub const TEXT: u64 = 1 << 16;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// Bytes of an exchange.
    Data,
    /// Why the sender stops.
    Abort,
    /// Who the sender is.
    Greeting,
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: FrameKind,
    /// The sender's exchange.
    pub call: Call,
    /// Bytes that follow.
    pub length: u64,
}

impl Header {
    /// As sent.
    pub fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&(self.kind as u32).to_le_bytes());
        bytes[8..12].copy_from_slice(&(self.call.operation as u32).to_le_bytes());
        for (i, value) in [self.call.step, self.call.sequence, self.length].into_iter().enumerate() {
            bytes[16 + 8 * i..24 + 8 * i].copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// As received; `None` where it is no frame of ours.
    pub fn parse(bytes: &[u8; HEADER]) -> Option<Header> {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let kind = match word(4) {
            0 => FrameKind::Data,
            1 => FrameKind::Abort,
            2 => FrameKind::Greeting,
            _ => return None,
        };
        let operation = *Operation::ALL.get(word(8) as usize)?;
        let call = Call { operation, step: long(16), sequence: long(24) };
        (word(0) == MAGIC).then_some(Header { kind, call, length: long(32) })
    }
}

/// How a rank introduces itself.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Greeting {
    /// Its rank.
    pub rank: usize,
    /// How many it believes there are.
    pub world: usize,
    /// Its machine.
    pub host: String,
    /// Where it listens for higher ranks.
    pub port: u16,
    /// Version of the program: all must be the same.
    pub version: String,
}

impl Greeting {
    /// Refuses a rank of another job.
    pub fn check(&self, world: usize) -> Result<()> {
        let version = env!("CARGO_PKG_VERSION");
        if self.world != world || self.rank >= world || self.version != version {
            return Err(Error::new(Code::RankNumbers, "a rank belongs to another job")
                .at(format!("rank {} on {}", self.rank, self.host))
                .found(format!("{} ranks, version {}", self.world, self.version))
                .wanted(format!("{world} ranks, version {version}"))
                .next("give each job its own --master HOST:PORT, and start all ranks with one program"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_round_trip_and_strangers_are_refused() {
        for (kind, operation) in [
            (FrameKind::Data, Operation::AllGather),
            (FrameKind::Abort, Operation::Meet),
            (FrameKind::Greeting, Operation::Sums),
        ] {
            let header =
                Header { kind, call: Call { operation, step: 7, sequence: u64::MAX }, length: 1 << 40 };
            assert_eq!(Header::parse(&header.to_bytes()), Some(header));
        }
        let good = Header {
            kind: FrameKind::Data,
            call: Call { operation: Operation::Meet, step: 0, sequence: 0 },
            length: 0,
        };
        for (at, value) in [(0, b'G'), (4, 3), (8, 99)] {
            let mut bytes = good.to_bytes();
            bytes[at] = value;
            assert_eq!(Header::parse(&bytes), None);
        }
    }
}
