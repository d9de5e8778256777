//! Attention on the CPU: row by row, a probability row at a time.

use super::{Buf, Cpu};
use crate::device::{Act, Dropout};
use crate::error::Result;
use crate::ops::gene_attention::{BackwardIn, Dims, GeneAttention, In, Pattern};
use crate::rng::{ATTENTION_ROW_STRIDE, dropout_scale, dropout_threshold, lane16, stream_block};
use rayon::prelude::*;

/// A pointer that several threads write through, each to elements of its own.
struct Shared<T>(*mut T);
// SAFETY: every user writes elements that no other thread touches: the rows of its own (cell, head).
unsafe impl<T> Sync for Shared<T> {}
impl<T> Shared<T> {
    fn at(&self, i: usize) -> *mut T {
        self.0.wrapping_add(i)
    }
}

fn attends(pattern: Pattern, global: Option<&[u8]>, start: usize, i: usize, j: usize) -> bool {
    match (pattern, global) {
        (Pattern::MarkerSparse { window }, Some(g)) => {
            g[start + i] != 0 || g[start + j] != 0 || i.abs_diff(j) <= window
        }
        _ => true,
    }
}

/// 0 for a dropped pair, the inverse keep probability for a kept one.
fn kept(d: &Dropout, row: u64, j: usize) -> f32 {
    if d.probability == 0.0 {
        return 1.0;
    }
    let element = row * ATTENTION_ROW_STRIDE + j as u64;
    let lane = lane16(stream_block(d.seed, d.step, d.site, element / 8), element);
    if lane < dropout_threshold(d.probability) { 0.0 } else { dropout_scale(d.probability) }
}

impl<A: Act> GeneAttention<A> for Cpu {
    fn gene_attention_forward(
        &self,
        dims: Dims,
        input: In<'_, Self, A>,
        o: &mut Buf<A>,
        lse: &mut Buf<f32>,
    ) -> Result<()> {
        let (h, k, d) = (dims.heads, dims.head_width, dims.width());
        let qkv: &[A] = input.qkv;
        let starts: &[u32] = input.cell_start;
        let global: Option<&[u8]> = input.global.map(|g| &**g);
        let (o, lse) = (Shared(o.as_mut_ptr()), Shared(lse.as_mut_ptr()));
        let scale = (k as f32).sqrt().recip();
        (0..dims.cells * h).into_par_iter().for_each(|item| {
            let (cell, head) = (item / h, item % h);
            let (start, end) = (starts[cell] as usize, starts[cell + 1] as usize);
            let len = end - start;
            let part = |i: usize, third: usize| &qkv[(start + i) * 3 * d + third * d + head * k..][..k];
            let (mut p, mut sum) = (vec![0f32; len], vec![0f32; k]);
            for i in 0..len {
                let q = part(i, 0);
                let mut max = f32::NEG_INFINITY;
                for (j, p) in p.iter_mut().enumerate() {
                    *p = f32::NEG_INFINITY;
                    if attends(dims.pattern, global, start, i, j) {
                        *p = scale
                            * q.iter().zip(part(j, 1)).map(|(a, b)| a.to_f32() * b.to_f32()).sum::<f32>();
                        max = max.max(*p);
                    }
                }
                let row = (input.dropout.first_row + (start + i) as u64) * h as u64 + head as u64;
                let mut l = 0f32;
                sum.fill(0.0);
                for (j, p) in p.iter().enumerate().filter(|(_, p)| **p != f32::NEG_INFINITY) {
                    let e = (p - max).exp();
                    l += e;
                    let e = e * kept(&input.dropout, row, j);
                    sum.iter_mut().zip(part(j, 2)).for_each(|(s, v)| *s += e * v.to_f32());
                }
                // SAFETY: row i of this cell and head belongs to this item alone, and lies inside the checked buffers.
                unsafe {
                    *lse.at((start + i) * h + head) = max + l.ln();
                    for (c, s) in sum.iter().enumerate() {
                        *o.at((start + i) * d + head * k + c) = A::from_f32(s / l);
                    }
                }
            }
        });
        Ok(())
    }

    fn gene_attention_backward(
        &self,
        dims: Dims,
        input: In<'_, Self, A>,
        backward: BackwardIn<'_, Self, A>,
        dqkv: &mut Buf<A>,
        delta: &mut Buf<f32>,
    ) -> Result<()> {
        let (h, k, d) = (dims.heads, dims.head_width, dims.width());
        let qkv: &[A] = input.qkv;
        let starts: &[u32] = input.cell_start;
        let global: Option<&[u8]> = input.global.map(|g| &**g);
        let (dqkv, delta) = (Shared(dqkv.as_mut_ptr()), Shared(delta.as_mut_ptr()));
        let scale = (k as f32).sqrt().recip();
        let dot = |a: &[A], b: &[A]| a.iter().zip(b).map(|(a, b)| a.to_f32() * b.to_f32()).sum::<f32>();
        (0..dims.cells * h).into_par_iter().for_each(|item| {
            let (cell, head) = (item / h, item % h);
            let (start, end) = (starts[cell] as usize, starts[cell + 1] as usize);
            let len = end - start;
            let part = |i: usize, third: usize| &qkv[(start + i) * 3 * d + third * d + head * k..][..k];
            let row_of =
                |x: &'_ Buf<A>, i: usize| -> Vec<A> { x[(start + i) * d + head * k..][..k].to_vec() };
            let mut sums = vec![0f32; 3 * len * k];
            let (dq, rest) = sums.split_at_mut(len * k);
            let (dk, dv) = rest.split_at_mut(len * k);
            for i in 0..len {
                let (q, do_, o) = (part(i, 0), row_of(backward.do_, i), row_of(backward.o, i));
                let delta_i = dot(&do_, &o);
                // SAFETY: row i of this cell and head belongs to this item alone, and lies inside the checked buffer.
                unsafe { *delta.at((start + i) * h + head) = delta_i };
                let row = (input.dropout.first_row + (start + i) as u64) * h as u64 + head as u64;
                let lse = backward.lse[(start + i) * h + head];
                for j in (0..len).filter(|j| attends(dims.pattern, global, start, i, *j)) {
                    let p = (scale * dot(q, part(j, 1)) - lse).exp();
                    let keep = kept(&input.dropout, row, j);
                    let ds = p * (keep * dot(&do_, part(j, 2)) - delta_i) * scale;
                    for c in 0..k {
                        dv[j * k + c] += p * keep * do_[c].to_f32();
                        dq[i * k + c] += ds * part(j, 1)[c].to_f32();
                        dk[j * k + c] += ds * q[c].to_f32();
                    }
                }
            }
            for (third, sums) in [&*dq, &*dk, &*dv].into_iter().enumerate() {
                for i in 0..len {
                    for c in 0..k {
                        // SAFETY: as above, for the three parts of dqkv.
                        unsafe {
                            *dqkv.at((start + i) * 3 * d + third * d + head * k + c) =
                                A::from_f32(sums[i * k + c])
                        };
                    }
                }
            }
        });
        Ok(())
    }
}
