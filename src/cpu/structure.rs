//! The structure term on the CPU (formulas: [`crate::ops::structure`]). One prototype is one task's: its cosines with all
//! others, its loss and its gradient. P is at most a few thousand, so each pair's cosine is computed twice rather than
//! shared between tasks.

use super::{Buf, Cpu};
use crate::cpu::simd::sum_by;
use crate::error::Result;
use crate::ops::structure::{Dims, Structure};
use rayon::prelude::*;

impl Structure for Cpu {
    fn structure(
        &self,
        dims: Dims,
        p: &Buf<f32>,
        jaccard: &Buf<f32>,
        loss: &mut Buf<f32>,
        dp: &mut Buf<f32>,
    ) -> Result<()> {
        let Dims { prototypes: n, width, c0, c1, scale } = dims;
        if n < 2 {
            loss[..n].fill(0.0);
            return Ok(());
        }
        let p = &p[..n * width];
        let pairs = n as f32 * (n - 1) as f32;
        let parts = dp[..n * width].par_chunks_mut(width).zip(&mut loss[..n]).enumerate();
        parts.with_min_len(8).for_each(|(k, (dp, loss))| {
            let own = &p[k * width..(k + 1) * width];
            let mut total = 0.0f64;
            for (l, other) in p.chunks_exact(width).enumerate() {
                if l == k {
                    continue;
                }
                let wanted = c0 + (c1 - c0) * jaccard[k * n + l];
                let excess = sum_by(width, |i| own[i] * other[i]) - wanted;
                total += excess as f64 * excess as f64;
                let factor = scale * 4.0 / pairs * excess;
                dp.iter_mut().zip(other).for_each(|(dp, p)| *dp += factor * p);
            }
            *loss = (total / pairs as f64) as f32;
        });
        Ok(())
    }
}
