//! Sums of floats over the ranks, and whose they are.

use super::{Collective, Operation};
use crate::error::Result;
use rayon::prelude::*;
use std::ops::Range;

/// Elements of an array that are summed over the ranks together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// They.
    pub range: Range<usize>,
    /// Which of them each rank adds up, in order.
    pub owners: Vec<Range<usize>>,
    /// Does every rank get all sums afterwards, or those that it added alone?
    pub for_all: bool,
}

/// Floats that one exchange of a sum moves at most: bounds its buffers.
const BUCKET: usize = 4 << 20;
/// Slices start at multiples of so many floats: a cache line.
const ALIGN: usize = 16;

impl Collective {
    /// The slice of `len` floats that belongs to `rank`.
    pub fn slice(&self, len: usize, rank: usize) -> Range<usize> {
        slice(len, rank, self.world())
    }

    /// Elements `range` of an array, to be summed for every rank.
    pub fn piece(&self, range: Range<usize>) -> Piece {
        let slice = |r| self.slice(range.len(), r);
        let owners = (0..self.world()).map(|r| range.start + slice(r).start..range.start + slice(r).end);
        Piece { owners: owners.collect(), for_all: true, range }
    }

    /// Elements `range` of an array of `len`, each to be summed for the rank alone whose [slice](Collective::slice) it is in.
    pub fn scattered_piece(&self, range: Range<usize>, len: usize) -> Piece {
        let cut = |at: usize| at.clamp(range.start, range.end);
        let owner = |r| cut(self.slice(len, r).start)..cut(self.slice(len, r).end);
        Piece { owners: (0..self.world()).map(owner).collect(), for_all: false, range }
    }

    /// Sums a piece, whose elements are `values`, over the ranks.
    ///
    /// # Errors
    /// As [`Transport::exchange`](super::Transport::exchange).
    pub fn sum_piece(&self, piece: &Piece, values: &mut [f32]) -> Result<()> {
        let here = |r: &Range<usize>| r.start - piece.range.start..r.end - piece.range.start;
        let owners: Vec<_> = piece.owners.iter().map(here).collect();
        self.reduce_scatter_ranges(values, &owners)?;
        if piece.for_all { self.all_gather_ranges(values, &owners) } else { Ok(()) }
    }

    /// Sums `values` over the ranks; each gets its own [slice](Collective::slice), which is returned, the rest is as before.
    pub fn reduce_scatter(&self, values: &mut [f32]) -> Result<Range<usize>> {
        let slices: Vec<_> = (0..self.world()).map(|r| self.slice(values.len(), r)).collect();
        self.reduce_scatter_ranges(values, &slices)?;
        Ok(slices[self.rank()].clone())
    }

    /// Sums `values` over the ranks; rank r gets `ranges[r]`, the rest is as before.
    fn reduce_scatter_ranges(&self, values: &mut [f32], ranges: &[Range<usize>]) -> Result<()> {
        if self.is_single() {
            return Ok(());
        }
        // Buckets of ranges, not ranges of buckets: a rank's own elements stay together.
        let longest = ranges.iter().map(Range::len).max().unwrap_or(0);
        let (step, mut parts) = (BUCKET / self.world(), Vec::new());
        for start in (0..longest).step_by(step.max(1)) {
            let bucket = |r: usize| {
                let range = &ranges[r];
                (range.start + start).min(range.end)..(range.start + start + step).min(range.end)
            };
            let mine = bucket(self.rank());
            parts.resize_with(self.world(), Vec::new);
            parts.iter_mut().enumerate().for_each(|(r, part): (usize, &mut Vec<f32>)| {
                part.clear();
                part.resize(if r == self.rank() { 0 } else { mine.len() }, 0.0);
            });
            let send: Vec<&[u8]> =
                (0..self.world()).map(|r| bytemuck::cast_slice(&values[bucket(r)])).collect();
            self.exchange(
                Operation::ReduceScatter,
                &send,
                &mut parts.iter_mut().map(|p| bytemuck::cast_slice_mut(p)).collect::<Vec<_>>(),
            )?;
            add_in_order(&mut values[mine], self.rank(), &parts);
        }
        Ok(())
    }

    /// Σ of `values` over the ranks, on every rank.
    pub fn all_reduce(&self, values: &mut [f32]) -> Result<()> {
        self.reduce_scatter(values)?;
        self.all_gather(values)
    }
}

/// Slice `rank` of `len` elements in `world` runs that start at whole cache lines.
pub fn slice(len: usize, rank: usize, world: usize) -> Range<usize> {
    let lines = len.div_ceil(ALIGN);
    let at = |r: usize| (lines * r / world * ALIGN).min(len);
    at(rank)..at(rank + 1)
}

/// `own[i] = Σ_r part_r[i]` in rank order, where the part of `rank` is `own` itself.
fn add_in_order(own: &mut [f32], rank: usize, parts: &[Vec<f32>]) {
    const CHUNK: usize = 1 << 14;
    own.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, own)| {
        let start = chunk * CHUNK;
        let mut sum = [0f64; CHUNK];
        let sum = &mut sum[..own.len()];
        for (r, part) in parts.iter().enumerate() {
            let part = if r == rank { &*own } else { &part[start..start + own.len()] };
            sum.iter_mut().zip(part).for_each(|(s, x)| *s += *x as f64);
        }
        own.iter_mut().zip(sum).for_each(|(x, s)| *x = *s as f32);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_cover_in_order_and_start_at_cache_lines() {
        for len in [0, 1, 15, 16, 17, 1000, 4096] {
            for world in [1, 2, 3, 7, 64] {
                let all: Vec<_> = (0..world).map(|r| slice(len, r, world)).collect();
                assert!(all[0].start == 0 && all[world - 1].end == len);
                assert!(all.windows(2).all(|w| w[0].end == w[1].start));
                assert!(all.iter().all(|s| s.start == len || s.start % ALIGN == 0));
            }
        }
    }
}
