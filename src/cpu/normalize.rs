//! Unit rows on the CPU (formulas: [`crate::ops::normalize`]). A row is one task's.

use super::{Buf, Cpu};
use crate::cpu::simd::sum_by;
use crate::error::Result;
use crate::ops::normalize::{Dims, Normalize};
use rayon::prelude::*;

/// Rows a task takes: enough work to be worth handing over.
const ROWS_PER_TASK: usize = 64;

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
                let square = sum_by(width, |i| z[i] * z[i]);
                let r = match square {
                    s if s < 1e-24 => 1e12,
                    s if s.is_finite() => 1.0 / s.sqrt(),
                    // A square that overflows must not pass for a row of zeros.
                    _ => f32::NAN,
                };
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
                let dot = sum_by(width, |i| dz[i] * z[i]);
                for ((dh, z), dz) in dh.iter_mut().zip(z).zip(dz) {
                    let d = r * (dz - dot * z);
                    *dh = if accumulate { *dh + d } else { d };
                }
            }
        });
        Ok(())
    }
}
