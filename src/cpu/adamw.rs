//! AdamW in one pass over the flat store. Formula in [`crate::ops::adamw`].
//!
//! Bound by memory: 28 bytes of traffic per parameter. The corrections 1 - β^t and the clip factor are computed once, in f64.

use crate::cpu::Cpu;
use crate::cpu::simd::vectorized;
use crate::device::Act;
use crate::error::Result;
use crate::ops::adamw::{AdamW, Hyper, State};
use rayon::prelude::*;
use std::ops::Range;

/// Parameters per task: 64 KiB of each array, so that a task's five streams fit the second-level cache.
const CHUNK: usize = 16 * 1024;

/// The constants of one step.
#[derive(Clone, Copy)]
struct Step {
    clip: f32,
    beta1: f32,
    beta2: f32,
    /// lr / (1 - β1^t).
    rate: f32,
    /// 1 / sqrt(1 - β2^t).
    root_correction: f32,
    eps: f32,
    /// 1 - lr · weight decay.
    keep: f32,
}

vectorized! {
    /// One chunk; `weight` is updated in place.
    fn update[](s: Step, weight: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32]) {
        let len = weight.len();
        let (grad, m, v) = (&grad[..len], &mut m[..len], &mut v[..len]);
        for i in 0..len {
            let g = s.clip * grad[i];
            m[i] = s.beta1 * m[i] + (1.0 - s.beta1) * g;
            v[i] = s.beta2 * v[i] + (1.0 - s.beta2) * g * g;
            weight[i] = s.keep * weight[i] - s.rate * m[i] / (v[i].sqrt() * s.root_correction + s.eps);
        }
    }
}

vectorized! {
    /// `copy = weight`, rounded.
    fn round_chunk[A: Act](weight: &[f32], copy: &mut [A]) {
        for (c, w) in copy.iter_mut().zip(weight) { *c = A::from_f32(*w) }
    }
}

impl<A: Act> AdamW<A> for Cpu {
    fn adamw(&self, range: Range<usize>, hyper: Hyper, state: State<'_, Self, A>) -> Result<()> {
        let squares = state.scalars[hyper.norm_slot];
        if !squares.is_finite() || range.is_empty() {
            return Ok(());
        }
        let power = |beta: f32| 1.0 - (beta as f64).powi(hyper.step as i32);
        let step = Step {
            clip: (hyper.max_norm as f64 / (squares.sqrt() + 1e-6)).min(1.0) as f32,
            beta1: hyper.beta1,
            beta2: hyper.beta2,
            rate: (hyper.learning_rate as f64 / power(hyper.beta1)) as f32,
            root_correction: (1.0 / power(hyper.beta2).sqrt()) as f32,
            eps: hyper.eps,
            keep: (1.0 - hyper.learning_rate as f64 * hyper.weight_decay as f64) as f32,
        };
        let chunks = (
            state.weight[range.clone()].par_chunks_mut(CHUNK),
            state.grad[range.clone()].par_chunks(CHUNK),
            state.m[range.clone()].par_chunks_mut(CHUNK),
            state.v[range.clone()].par_chunks_mut(CHUNK),
        )
            .into_par_iter();
        match state.copy {
            Some(copy) => {
                chunks.zip(copy[range].par_chunks_mut(CHUNK)).for_each(|((weight, grad, m, v), copy)| {
                    update(step, weight, grad, m, v);
                    round_chunk(weight, copy);
                })
            }
            None => chunks.for_each(|(weight, grad, m, v)| update(step, weight, grad, m, v)),
        }
        Ok(())
    }

    fn round(&self, weight: &Self::Buf<f32>, copy: &mut Self::Buf<A>) -> Result<()> {
        weight
            .par_chunks(CHUNK)
            .zip(copy.par_chunks_mut(CHUNK))
            .for_each(|(weight, copy)| round_chunk(weight, copy));
        Ok(())
    }
}
