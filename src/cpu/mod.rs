//! The CPU backend: the default, complete without a GPU, and the oracle's next-door neighbour for every kernel.
//!
//! One file per op, as in [`crate::ops`]. Work is cut into chunks whose size depends on the shapes alone, and partial
//! results are combined in chunk order, so results have the same bits for any number of threads.

mod adamw;
mod anchor;
mod buffer;
pub mod dropout;
mod embed;
pub mod gemm;
pub mod gene_attention;
mod layernorm;
mod linear;
mod mask_tokens;
pub mod memory;
mod normalize;
mod pool;
mod prototype_loss;
mod reduce;
mod rows;
pub mod scratch;
pub mod simd;
pub mod simd_vector;
mod structure;

pub use buffer::Buf;

use crate::collective::{Collective, Piece};
use crate::device::{Device, Element, Queue};
use crate::error::Result;
use std::ops::Range;

/// The processor this program runs on; threads come from rayon's global pool.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu;

impl Device for Cpu {
    type Buf<T: Element> = Buf<T>;
    /// Work is done when its call returns.
    type Event = ();

    fn name(&self) -> String {
        format!("cpu ({} threads)", rayon::current_num_threads())
    }

    fn zeros<T: Element>(&self, len: usize) -> Result<Buf<T>> {
        Buf::zeros(len)
    }

    fn write<T: Element>(&self, buf: &mut Buf<T>, host: &[T]) -> Result<()> {
        buf[..host.len()].copy_from_slice(host);
        Ok(())
    }

    fn event(&self, _: Queue) -> Result<()> {
        Ok(())
    }

    fn record(&self, _: &mut (), _: Queue) -> Result<()> {
        Ok(())
    }

    fn wait(&self, _: &(), _: Queue) -> Result<()> {
        Ok(())
    }

    fn write_beside<T: Element>(&self, buf: &mut Buf<T>, host: &[T]) -> Result<()> {
        self.write(buf, host)
    }

    fn read<T: Element>(&self, buf: &Buf<T>, host: &mut [T]) -> Result<()> {
        host.copy_from_slice(&buf[..host.len()]);
        Ok(())
    }

    fn clear<T: Element>(&self, buf: &mut Buf<T>) -> Result<()> {
        buf.fill(bytemuck::Zeroable::zeroed());
        Ok(())
    }

    fn copy<T: Element>(&self, from: &Buf<T>, to: &mut Buf<T>, len: usize) -> Result<()> {
        to[..len].copy_from_slice(&from[..len]);
        Ok(())
    }

    fn sum(&self, ranks: &Collective, buf: &mut Buf<f32>, piece: &Piece, _: Queue) -> Result<()> {
        ranks.sum_piece(piece, &mut buf[piece.range.clone()])
    }

    fn all_gather(&self, ranks: &Collective, buf: &mut Buf<f32>, ranges: &[Range<usize>]) -> Result<()> {
        ranks.all_gather_ranges(&mut buf[..], ranges)
    }

    unsafe fn part<T: Element>(&self, buf: &Buf<T>, range: Range<usize>) -> Buf<T> {
        // SAFETY: the caller keeps the two handles from being used at once, as this function's contract asks.
        unsafe { buf.part(range) }
    }
}
