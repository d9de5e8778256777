//! Linear layer, plain.

use crate::cpu::Cpu;
use crate::device::Act;
use crate::error::Result;
use crate::ops::linear::{Activation, BackwardInput, BackwardWeight, Dims, In, Linear};
use rayon::prelude::*;

impl<A: Act> Linear<A> for Cpu {
    fn linear_forward(&self, dims: Dims, input: In<'_, Self, A>, y: &mut Self::Buf<A>) -> Result<()> {
        let (x, w): (&[A], &[A]) = (input.x, input.weight);
        let bias = input.bias.map(|b| &b[..]);
        y[..dims.rows * dims.outputs].par_chunks_mut(dims.outputs).enumerate().for_each(|(r, y)| {
            for (o, y) in y.iter_mut().enumerate() {
                let mut s = bias.map_or(0.0, |b| b[o].to_f32());
                for i in 0..dims.inputs {
                    s += x[r * dims.inputs + i].to_f32() * w[o * dims.inputs + i].to_f32();
                }
                *y = A::from_f32(if input.activation == Activation::Relu && s < 0.0 { 0.0 } else { s });
            }
        });
        Ok(())
    }

    fn linear_backward_input(
        &self,
        dims: Dims,
        input: BackwardInput<'_, Self, A>,
        dx: &mut Self::Buf<A>,
    ) -> Result<()> {
        let (dy, w): (&[A], &[A]) = (input.dy, input.weight);
        let relu = input.relu_output.map(|b| &b[..]);
        dx[..dims.rows * dims.inputs].par_chunks_mut(dims.inputs).enumerate().for_each(|(r, dx)| {
            let mut s = vec![0.0f32; dims.inputs];
            for o in 0..dims.outputs {
                let d = dy[r * dims.outputs + o].to_f32();
                for i in 0..dims.inputs {
                    s[i] += d * w[o * dims.inputs + i].to_f32();
                }
            }
            for i in 0..dims.inputs {
                let live = relu.is_none_or(|m| m[r * dims.inputs + i].to_f32() > 0.0);
                let s = if live { s[i] } else { 0.0 };
                dx[i] = A::from_f32(if input.accumulate { dx[i].to_f32() + s } else { s });
            }
        });
        Ok(())
    }

    fn linear_backward_weight(
        &self,
        dims: Dims,
        input: BackwardWeight<'_, Self, A>,
        dweight: &mut Self::Buf<f32>,
        dbias: Option<&mut Self::Buf<f32>>,
    ) -> Result<()> {
        let (x, dy): (&[A], &[A]) = (input.x, input.dy);
        dweight[..dims.outputs * dims.inputs].par_chunks_mut(dims.inputs).enumerate().for_each(|(o, dw)| {
            for r in 0..dims.rows {
                let d = dy[r * dims.outputs + o].to_f32();
                for i in 0..dims.inputs {
                    dw[i] += d * x[r * dims.inputs + i].to_f32();
                }
            }
        });
        if let Some(db) = dbias {
            for r in 0..dims.rows {
                for o in 0..dims.outputs {
                    db[o] += dy[r * dims.outputs + o].to_f32();
                }
            }
        }
        Ok(())
    }
}
