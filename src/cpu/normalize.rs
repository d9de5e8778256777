//! Unit rows on the CPU (formulas: [`crate::ops::normalize`]). A row is one task's; its sums run in 16 lanes of f32 that are
//! combined in f64, in a fixed order.

use super::{Buf, Cpu};
use crate::error::Result;
use crate::ops::normalize::{Dims, Normalize};
use rayon::prelude::*;

/// Rows a task takes: enough work to be worth handing over.
const ROWS_PER_TASK: usize = 64;

/// Σ f(i), 16 running sums, combined in f64.
#[inline(always)]
pub(super) fn lane_sum(n: usize, f: impl Fn(usize) -> f32) -> f64 {
    let mut lanes = [0.0f32; 16];
    let whole = n - n % 16;
    for i in (0..whole).step_by(16) {
        for (j, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + j);
        }
    }
    for (i, lane) in (whole..n).zip(&mut lanes) {
        *lane += f(i);
    }
    lanes.iter().map(|x| *x as f64).sum()
}

impl Normalize for Cpu {
    fn normalize_forward(
        &self,
        dims: Dims,
        h: &Buf<f32>,
        center: Option<&Buf<f32>>,
        z: &mut Buf<f32>,
        inverse_norm: &mut Buf<f32>,
    ) -> Result<()> {
        let Dims { rows, width } = dims;
        let task = ROWS_PER_TASK * width;
        let parts = z[..rows * width]
            .par_chunks_mut(task)
            .zip(inverse_norm[..rows].par_chunks_mut(ROWS_PER_TASK))
            .zip(h[..rows * width].par_chunks(task));
        parts.for_each(|((z, inverse), h)| {
            for ((z, inverse), h) in z.chunks_exact_mut(width).zip(inverse).zip(h.chunks_exact(width)) {
                match center {
                    Some(c) => z.iter_mut().zip(h).zip(&c[..width]).for_each(|((z, h), c)| *z = h - c),
                    None => z.copy_from_slice(h),
                }
                let square = lane_sum(width, |i| z[i] * z[i]);
                // A square that overflows or a NaN must not turn into a unit row.
                let r = if square < 1e-24 { 1e12 } else { (1.0 / square.sqrt()) as f32 };
                z.iter_mut().for_each(|z| *z *= r);
                *inverse = r;
            }
        });
        Ok(())
    }

    fn normalize_backward(
        &self,
        dims: Dims,
        dz: &Buf<f32>,
        z: &Buf<f32>,
        inverse_norm: &Buf<f32>,
        accumulate: bool,
        dh: &mut Buf<f32>,
    ) -> Result<()> {
        let Dims { rows, width } = dims;
        let task = ROWS_PER_TASK * width;
        let parts = dh[..rows * width]
            .par_chunks_mut(task)
            .zip(inverse_norm[..rows].par_chunks(ROWS_PER_TASK))
            .zip(z[..rows * width].par_chunks(task))
            .zip(dz[..rows * width].par_chunks(task));
        parts.for_each(|(((dh, inverse), z), dz)| {
            let rows = dh.chunks_exact_mut(width).zip(inverse);
            for (((dh, r), z), dz) in rows.zip(z.chunks_exact(width)).zip(dz.chunks_exact(width)) {
                let dot = lane_sum(width, |i| dz[i] * z[i]) as f32;
                for ((dh, z), dz) in dh.iter_mut().zip(z).zip(dz) {
                    let d = r * (dz - dot * z);
                    *dh = if accumulate { *dh + d } else { d };
                }
            }
        });
        Ok(())
    }
}
