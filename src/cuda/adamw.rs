//! AdamW: constants of one step and geometry of `kernels/adamw.cu`. Formula in [`crate::ops::adamw`].

use super::functions::{AdamWStep, adamw_round, adamw_update};
use super::{Cuda, Grid};
use crate::device::{Act, Len};
use crate::error::Result;
use crate::ops::adamw::{AdamW, Hyper, State};
use std::ops::Range;

/// Elements of a block: 8 for each of 256 threads.
const BLOCK: usize = 8 * 256;

impl<A: Act> AdamW<A> for Cuda {
    fn adamw(&self, range: Range<usize>, hyper: Hyper, state: State<'_, Self, A>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let power = |beta: f32| 1.0 - (beta as f64).powi(hyper.step as i32);
        let step = AdamWStep {
            beta1: hyper.beta1,
            beta2: hyper.beta2,
            rate: (hyper.learning_rate as f64 / power(hyper.beta1)) as f32,
            root_correction: (1.0 / power(hyper.beta2).sqrt()) as f32,
            eps: hyper.eps,
            keep: (1.0 - hyper.learning_rate as f64 * hyper.weight_decay as f64) as f32,
            max_norm: hyper.max_norm,
            norm_slot: hyper.norm_slot as u32,
        };
        // Groups of 8 are aligned to the array, not to the range.
        let elements = range.end - range.start / 8 * 8;
        adamw_update(
            self,
            Grid::line(elements.div_ceil(BLOCK), 256),
            state.weight,
            state.grad,
            state.m,
            state.v,
            state.copy,
            state.scalars,
            step,
            range.start as u64,
            range.end as u64,
        )
    }

    fn round(&self, weight: &Self::Buf<f32>, copy: &mut Self::Buf<A>) -> Result<()> {
        let len = weight.len().min(copy.len());
        adamw_round(self, Grid::line(len.div_ceil(BLOCK), 256), weight, copy, len as u64)
    }
}
