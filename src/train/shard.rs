//! The network's moments divided over the ranks (ZeRO stage 1; Rajbhandari et al., 2020).
//!
//! ```text
//! gradients   reduce_scatter: rank r gets the sum of slice r          instead of all_reduce, which is this and a gather
//! norm        Σ over ranks of the squares of the slices
//! AdamW       rank r updates slice r, with moments of that slice alone
//! weights     all_gather of the slices
//! ```
//! Each rank holds 8/n bytes of moments per parameter instead of 8, and sends what it sent before. The norm is summed in another
//! order, so the last bits are not those of a run without. Checkpoints are the same files: moments whole, written by the leading
//! rank, readable by any number of ranks.

use super::optimizer::{BAD_SLOT, Group, Moments, NORM_SLOT, Span, update};
use crate::collective::Collective;
use crate::config::OptimizerSettings;
use crate::device::{Act, Device};
use crate::error::Result;
use crate::ops::{Backend, reduce};
use std::ops::Range;

/// This rank's slice of a flat store.
#[derive(Debug, Clone)]
pub struct Shard {
    ranks: Collective,
    len: usize,
    own: Range<usize>,
}

impl Shard {
    /// Of a store of `len` elements.
    pub fn of(ranks: &Collective, len: usize) -> Shard {
        Shard { ranks: ranks.clone(), len, own: ranks.slice(len, ranks.rank()) }
    }

    /// Its elements.
    pub fn own(&self) -> Range<usize> {
        self.own.clone()
    }

    /// Adds Σ grad² over all slices to [`NORM_SLOT`]; where it is not finite, [`BAD_SLOT`] is left at the first bad element of the
    /// whole gradient, or its length. The host waits for the device here: the sum goes through it.
    pub fn squared_norm<A: Act, B: Backend<A>>(
        &self,
        dev: &B,
        grad: &B::Buf<f32>,
        scalars: &mut B::Buf<f64>,
    ) -> Result<()> {
        // SAFETY: the handle ends with this call, which borrows `grad` for reading.
        let slice = unsafe { dev.part(grad, self.own()) };
        reduce::add_sum_squares::<B>(dev, &slice, self.own.len(), scalars, NORM_SLOT)?;
        let mut host = dev.download(scalars)?;
        self.ranks.sum(&mut host[NORM_SLOT..=NORM_SLOT])?;
        dev.write(scalars, &host)?;
        if host[NORM_SLOT].is_finite() {
            return Ok(());
        }
        reduce::first_bad::<B>(dev, &slice, self.own.len(), scalars, NORM_SLOT, BAD_SLOT)?;
        let mut host = dev.download(scalars)?;
        let place = host[BAD_SLOT] as usize;
        let mine = if place < self.own.len() { self.own.start + place } else { self.len };
        let places = self.ranks.messages(&(mine as u64).to_le_bytes())?;
        let first =
            places.iter().filter_map(|p| Some(u64::from_le_bytes(p.as_slice().try_into().ok()?))).min();
        host[BAD_SLOT] = first.unwrap_or(self.len as u64) as f64;
        dev.write(scalars, &host)
    }

    /// Updates the own slice of `group`, whose moments are of it alone, and gathers the weights; arguments as of [`update`].
    pub fn update<A: Act, B: Backend<A>>(
        &self,
        dev: &B,
        optimizer: &OptimizerSettings,
        t: u32,
        accumulated: usize,
        group: Group<'_, B, A>,
        scalars: &B::Buf<f64>,
    ) -> Result<()> {
        let Group { weight, copy, grad, moments, spans, learning_rate } = group;
        {
            // SAFETY: the handles end with this block; what they see is borrowed by this call alone.
            let (mut slice, grad) = unsafe { (dev.part(weight, self.own()), dev.part(grad, self.own())) };
            let group: Group<'_, B, A> = Group {
                weight: &mut slice,
                copy: None,
                grad: &grad,
                moments,
                spans: &self.within(spans),
                learning_rate,
            };
            update::<A, B>(dev, optimizer, t, accumulated, group, scalars)?;
        }
        let slices: Vec<_> = (0..self.ranks.world()).map(|rank| self.ranks.slice(self.len, rank)).collect();
        dev.all_gather(&self.ranks, weight, &slices)?;
        copy.map_or(Ok(()), |copy| dev.round(weight, copy))
    }

    /// The spans' parts in the own slice, counted from its start.
    fn within(&self, spans: &[Span]) -> Vec<Span> {
        let cut = |at: usize| at.clamp(self.own.start, self.own.end) - self.own.start;
        let inside =
            spans.iter().map(|s| Span { range: cut(s.range.start)..cut(s.range.end), decay: s.decay });
        inside.filter(|span| !span.range.is_empty()).collect()
    }

    /// The whole moments on the host of the leading rank, from everyone's slices: first and second.
    pub fn gather<B: Device>(&self, dev: &B, moments: &Moments<B>) -> Result<Option<[Vec<f32>; 2]>> {
        let m = self.ranks.gather(&dev.download(&moments.m)?, self.len)?;
        let v = self.ranks.gather(&dev.download(&moments.v)?, self.len)?;
        Ok(m.zip(v).map(|(m, v)| [m, v]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_cut_to_the_slice() {
        let shard = Shard { ranks: Collective::default(), len: 100, own: 32..64 };
        let span = |range: Range<usize>, decay| Span { range, decay };
        let all = [span(0..40, true), span(40..50, false), span(70..100, true), span(10..20, false)];
        assert_eq!(shard.within(&all), [span(0..8, true), span(8..18, false)]);
    }
}
