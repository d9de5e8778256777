//! The backend boundary: a device that owns memory, and the buffers on it.
//!
//! Everything above this file (model, objective, training) is generic over a [`Device`] and the ops in [`crate::ops`];
//! everything below it (`cpu/`, and later `cuda/`) implements them. A buffer is either an allocation or a part of one:
//! [`Store`](crate::model::store::Store) lays named parts over one flat buffer, so that the optimiser sees one array and
//! the network sees tensors.

use crate::collective::{Collective, Piece};
use crate::error::Result;
use half::bf16;
use std::ops::Range;

/// A plain number that can live in device memory.
pub trait Element: bytemuck::Pod + Send + Sync + std::fmt::Debug + PartialEq + 'static {}
impl Element for f32 {}
impl Element for f64 {}
impl Element for bf16 {}
impl Element for u8 {}
impl Element for u16 {}
impl Element for u32 {}
impl Element for i32 {}
impl Element for u64 {}

/// Activation types. Sums, statistics and losses are f32 or better whatever the activation type is; rounding to it
/// happens once, at the store.
pub trait Act: Element + Copy + Default {
    /// `"f32"` or `"bf16"`, as on the command line.
    const NAME: &'static str;
    /// True where activations and master weights have the same type, so that one copy serves both.
    const IS_F32: bool;
    /// Exact widening.
    fn to_f32(self) -> f32;
    /// Rounding to nearest even.
    fn from_f32(x: f32) -> Self;
}
impl Act for f32 {
    const NAME: &'static str = "f32";
    const IS_F32: bool = true;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
}
impl Act for bf16 {
    const NAME: &'static str = "bf16";
    const IS_F32: bool = false;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        // `bf16::from_f32` without its branch, so that stores vectorise: add half an ulp, ties to even; NaN stays a quiet NaN.
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1));
        bf16::from_bits((if x.is_nan() { bits | 0x0040_0000 } else { rounded } >> 16) as u16)
    }
}

/// Length of a device buffer, in elements.
pub trait Len {
    /// Elements in the buffer.
    fn len(&self) -> usize;
    /// True when there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A read that is on its way; the call waits for it and gives the values.
pub type Later<T> = Box<dyn FnOnce() -> Result<Vec<T>> + Send>;

/// The largest sizes of a run's steps: what the memory that kernels work in is made for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepSizes {
    /// N of a part.
    pub tokens: usize,
    /// C of a part.
    pub cells: usize,
    /// C of a logical batch.
    pub batch_cells: usize,
    /// Tokens of the longest cell.
    pub longest: usize,
    /// M of a part; 0 without a masked-gene term.
    pub masked: usize,
    /// D.
    pub width: usize,
    /// H.
    pub heads: usize,
    /// F.
    pub ffn: usize,
    /// V.
    pub vocab: usize,
    /// P of `refine`, classes of `finetune`, else 0.
    pub types: usize,
    /// Elements of the network's flat store.
    pub parameters: usize,
}

/// The queues of a device. What is queued on one runs in that order; between them, events order what has to be ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    /// Everything that is not said to be on another.
    Compute,
    /// Copies from the host that run beside it.
    Copies,
    /// Sums over the ranks that run beside it, where [`Device::queues_sums`].
    Sums,
}

/// A device: where buffers live and ops run. Cheap to clone (a handle).
pub trait Device: Sized + Clone + Send + Sync + 'static {
    /// Memory of this device, or a part of such memory. Not `Clone`: a copy of device memory is never made by accident.
    type Buf<T: Element>: Len + Send + Sync + 'static;

    /// A point in the order of a queue.
    type Event: Send + Sync + 'static;

    /// What `doctor` and the run record call this device.
    fn name(&self) -> String;

    /// `len` zeros. Fails with the bytes asked for when memory runs out (exit 4).
    fn zeros<T: Element>(&self, len: usize) -> Result<Self::Buf<T>>;

    /// Makes the memory that kernels of such steps work in, where the device would otherwise allocate it within a step.
    fn reserve<A: Act>(&self, sizes: &StepSizes) -> Result<()> {
        let _ = sizes;
        Ok(())
    }

    /// Host to device; `host` may be shorter than `buf`, the rest keeps its content.
    fn write<T: Element>(&self, buf: &mut Self::Buf<T>, host: &[T]) -> Result<()>;

    /// An event at the end of all work queued so far on `queue`.
    fn event(&self, queue: Queue) -> Result<Self::Event>;

    /// Moves the event to the end of all work queued so far on `queue`.
    fn record(&self, event: &mut Self::Event, queue: Queue) -> Result<()>;

    /// Holds back what is queued on `queue` from now on until all work before the event is done. The host does not wait.
    fn wait(&self, event: &Self::Event, queue: Queue) -> Result<()>;

    /// As [`Device::write`], on [`Queue::Copies`]: an event keeps it behind what still reads `buf`, and another keeps what reads
    /// the new content behind it. `host` may be reused at once.
    fn write_beside<T: Element>(&self, buf: &mut Self::Buf<T>, host: &[T]) -> Result<()>;

    /// Device to host; `host` may be shorter than `buf`.
    fn read<T: Element>(&self, buf: &Self::Buf<T>, host: &mut [T]) -> Result<()>;

    /// Sets every element to zero.
    fn clear<T: Element>(&self, buf: &mut Self::Buf<T>) -> Result<()>;

    /// Device to device, the first `len` elements.
    fn copy<T: Element>(&self, from: &Self::Buf<T>, to: &mut Self::Buf<T>, len: usize) -> Result<()>;

    /// Device to device: elements `range` of `from` to those of `to` from `start` on.
    fn copy_part<T: Element>(
        &self,
        from: &Self::Buf<T>,
        range: Range<usize>,
        to: &mut Self::Buf<T>,
        start: usize,
    ) -> Result<()> {
        let len = range.len();
        // SAFETY: the handles end with this call, which borrows `from` for reading and `to` for writing.
        let (from, mut to) = unsafe { (self.part(from, range), self.part(to, start..start + len)) };
        self.copy(&from, &mut to, len)
    }

    /// Device to host without waiting: `buf` as all work queued so far leaves it, whatever is queued later.
    fn read_later<T: Element>(&self, buf: &Self::Buf<T>) -> Result<Later<T>> {
        let host = self.download(buf)?;
        Ok(Box::new(|| Ok(host)))
    }

    /// Does this device itself sum over these ranks, so that a sum is queued and the host goes on? Elsewhere it is the host's work.
    fn queues_sums(&self, ranks: &Collective) -> bool {
        let _ = ranks;
        false
    }

    /// Sums a piece of `buf` over the ranks, on `queue` where the device [queues sums](Device::queues_sums); elements of a piece that
    /// is not for all may be left with any content on ranks that do not own them.
    fn sum(&self, ranks: &Collective, buf: &mut Self::Buf<f32>, piece: &Piece, queue: Queue) -> Result<()> {
        let _ = queue;
        sum_staged(self, ranks, buf, piece)
    }

    /// As [`Device::read_later`], elements `range`.
    fn read_part_later<T: Element>(&self, buf: &Self::Buf<T>, range: Range<usize>) -> Result<Later<T>> {
        // SAFETY: the handle ends with this call, which borrows `buf` for reading.
        self.read_later(&unsafe { self.part(buf, range) })
    }

    /// As [`Device::write`], from element `start` on.
    fn write_part<T: Element>(&self, buf: &mut Self::Buf<T>, start: usize, host: &[T]) -> Result<()> {
        // SAFETY: the handle ends with this call, which borrows `buf` for writing.
        let mut part = unsafe { self.part(buf, start..start + host.len()) };
        self.write(&mut part, host)
    }

    /// Elements `ranges[r]`, which only rank r has, to all ranks; the ranges follow each other from 0 on.
    fn all_gather(
        &self,
        ranks: &Collective,
        buf: &mut Self::Buf<f32>,
        ranges: &[Range<usize>],
    ) -> Result<()> {
        all_gather_staged(self, ranks, buf, ranges)
    }

    /// A second handle to elements `range` of `buf`, kept alive independently of it.
    ///
    /// # Safety
    /// The two handles see the same memory. The caller keeps Rust's rule: while one is borrowed mutably, the other is
    /// not used. [`Store`](crate::model::store::Store) is the keeper: it lends either its flat or its named view.
    unsafe fn part<T: Element>(&self, buf: &Self::Buf<T>, range: Range<usize>) -> Self::Buf<T>;

    /// A new buffer with the content of `host`.
    fn upload<T: Element>(&self, host: &[T]) -> Result<Self::Buf<T>> {
        let mut buf = self.zeros(host.len())?;
        self.write(&mut buf, host)?;
        Ok(buf)
    }

    /// All of `buf` on the host.
    fn download<T: Element>(&self, buf: &Self::Buf<T>) -> Result<Vec<T>> {
        let mut host = vec![bytemuck::Zeroable::zeroed(); buf.len()];
        self.read(buf, &mut host)?;
        Ok(host)
    }
}

/// [`Device::sum`] by way of the host.
pub(crate) fn sum_staged<B: Device>(
    dev: &B,
    ranks: &Collective,
    buf: &mut B::Buf<f32>,
    piece: &Piece,
) -> Result<()> {
    if ranks.is_single() {
        return Ok(());
    }
    let mut host = dev.read_part_later(buf, piece.range.clone())?()?;
    ranks.sum_piece(piece, &mut host)?;
    dev.write_part(buf, piece.range.start, &host)
}

/// [`Device::all_gather`] by way of the host.
pub(crate) fn all_gather_staged<B: Device>(
    dev: &B,
    ranks: &Collective,
    buf: &mut B::Buf<f32>,
    ranges: &[Range<usize>],
) -> Result<()> {
    if ranks.is_single() {
        return Ok(());
    }
    let mut host = vec![0.0; ranges.last().map_or(0, |last| last.end)];
    dev.read(buf, &mut host)?;
    ranks.all_gather_ranges(&mut host, ranges)?;
    dev.write(buf, &host)
}

/// Counter-based dropout (Philox 4x32-10, [`crate::rng`]): element `i` of row `r` is kept or dropped by
/// `(seed, step, site, first_row + r, i)` alone, so every backend, batch split and thread count draws the same mask.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Probability of dropping, in [0, 1); 0 switches it off and costs nothing.
    pub probability: f32,
    /// Seed of the run.
    pub seed: u64,
    /// Training step.
    pub step: u32,
    /// Which dropout of the network: unique per layer and place.
    pub site: u32,
    /// Index, within the logical batch, of this call's first row (a token).
    pub first_row: u64,
}

impl Dropout {
    /// No dropout: evaluation.
    pub const NONE: Dropout = Dropout { probability: 0.0, seed: 0, step: 0, site: 0, first_row: 0 };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_to_bf16_is_that_of_half() {
        let specials = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE, 1.0e-45];
        let mut bits = 1u32;
        let random = std::iter::repeat_with(|| {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f32::from_bits(bits)
        });
        for x in specials.into_iter().chain(random.take(200_000)).filter(|x| !x.is_nan()) {
            assert_eq!(<bf16 as Act>::from_f32(x).to_bits(), bf16::from_f32(x).to_bits(), "{x:e}");
        }
        assert!(<bf16 as Act>::from_f32(f32::NAN).is_nan());
        assert!(<bf16 as Act>::from_f32(f32::from_bits(0x7F80_0001)).is_nan());
    }
}
