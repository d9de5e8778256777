//! The anchor on the CPU (formulas: [`crate::ops::anchor`]).

use super::{Buf, Cpu};
use crate::cpu::simd::sum_by;
use crate::error::Result;
use crate::ops::anchor::{Anchor, Dims};
use rayon::prelude::*;

/// Rows a task takes.
const ROWS_PER_TASK: usize = 64;

impl Anchor for Cpu {
    fn anchor(
        &self,
        dims: Dims,
        z: &Buf<f32>,
        z0: &Buf<f32>,
        loss: &mut Buf<f32>,
        dz: &mut Buf<f32>,
    ) -> Result<()> {
        let Dims { rows, width, scale } = dims;
        let task = ROWS_PER_TASK * width;
        let parts = dz[..rows * width]
            .par_chunks_mut(task)
            .zip(loss[..rows].par_chunks_mut(ROWS_PER_TASK))
            .zip(z[..rows * width].par_chunks(task))
            .zip(z0[..rows * width].par_chunks(task));
        parts.for_each(|(((dz, loss), z), z0)| {
            let rows = dz.chunks_exact_mut(width).zip(loss);
            for (((dz, loss), z), z0) in rows.zip(z.chunks_exact(width)).zip(z0.chunks_exact(width)) {
                *loss = 1.0 - sum_by(width, |i| z[i] * z0[i]);
                dz.iter_mut().zip(z0).for_each(|(dz, z0)| *dz -= scale * z0);
            }
        });
        Ok(())
    }
}
