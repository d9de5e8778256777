//! Streaming softmax loss on the CPU (formulas: [`crate::ops::prototype_loss`]).
//!
//! A task owns up to [`BLOCK_ROWS`] rows (forward) or one tile of columns (backward) and walks the other axis; the tile of
//! logits, (columns, rows) transposed, stays in the second-level cache:
//! ```text
//! forward, one-hot       per column tile:  S = P Zᵀ;  online softmax;  O = O · shrink + (scale e^(S-max))ᵀ P
//!                        end:              dz = gκ (O/l - Σ mass scale p)            2 products
//! forward, dense target  lse first; then   S = P Zᵀ;  G = κ(e^(S-lse) - T);  dz += (scale G)ᵀ P      3 products
//! backward               per row block:    S = P Zᵀ;  G = gκ(e^(S-lse) - T);  dP += G Z              2 products
//! ```
//! The trait keeps two passes because a device with many cores wants them: fused on one core, forward with column gradients
//! would need lse first as well, hence 1 + 1 + 2 products, the same 4 as two passes.
//!
//! Rows that take no part (κ = 0, no target) are left out before anything is computed. Every row and every column is
//! summed in an order fixed by the shapes, so results do not depend on threads.
mod backward;
mod forward;
mod kernels;
mod problem;
mod scratch;
mod targets;

use super::scratch::take;
use super::{Buf, Cpu};
use crate::device::Act;
use crate::error::Result;
use crate::ops::prototype_loss::{ColumnGradients, Dims, In, Out, PrototypeLoss};
use backward::{OutColumns, PackedRows};
use forward::OutRows;
use kernels::{EXCLUDED, Kernels, PANEL};
use problem::Problem;
use rayon::prelude::*;
use scratch::{Arena, BLOCK_ROWS, Rows, TileScratch, pack_rows, scratch_len, tile_columns, widen_rows};
use targets::Targets;

/// Runs `work` with `len` floats of this thread's scratch, content unspecified.
fn with_arena<T>(len: usize, work: impl FnOnce(Arena<'_>) -> T) -> T {
    let mut block = take(len * size_of::<f32>());
    work(Arena(block.slice(len)))
}

/// Cuts `rows` into blocks of whole panels, at most [`BLOCK_ROWS`] each, as even as may be and an even number of them, so
/// that two threads end together. A row's result does not depend on its block.
fn row_blocks(rows: usize) -> Vec<usize> {
    let groups = rows.div_ceil(PANEL);
    let blocks = groups.div_ceil(BLOCK_ROWS / PANEL).next_multiple_of(2).clamp(1, groups.max(1));
    let ends = (1..=blocks).map(|b| (groups * b / blocks * PANEL).min(rows));
    ends.collect()
}

/// Runs the tasks over rayon's pool, each alone; a single task on this thread.
fn run_all<T: Send>(mut tasks: Vec<T>, run: impl Fn(T) + Send + Sync) {
    match tasks.len() {
        0 => {}
        1 => run(tasks.remove(0)),
        _ => tasks.into_par_iter().with_max_len(1).for_each(run),
    }
}

fn forward<A: Act>(kernels: &'static Kernels, dims: Dims, input: In<Cpu, A>, out: Out<Cpu, A>) {
    let problem = Problem::new(kernels, dims, &input);
    let active = problem.active_rows();
    let (mut loss, mut lse) = (&mut out.loss[..dims.rows], &mut out.lse[..dims.rows]);
    let mut dz = &mut out.dz[..dims.rows * dims.width];
    let (mut tasks, mut start, mut first) = (Vec::new(), 0, 0);
    let blocks = row_blocks(active.len());
    for (b, end) in blocks.iter().enumerate() {
        // The block's stretch of all rows ends where the next block's first active row begins.
        let last = b + 1 == blocks.len();
        let until = if last { dims.rows } else { active[*end] as usize };
        let take = until - first;
        let (a, rest) = std::mem::take(&mut loss).split_at_mut(take);
        loss = rest;
        let (b, rest) = std::mem::take(&mut lse).split_at_mut(take);
        lse = rest;
        let (c, rest) = std::mem::take(&mut dz).split_at_mut(take * dims.width);
        dz = rest;
        let rows =
            OutRows { first, loss: a, lse: b, dz: c, width: dims.width, accumulate: out.accumulate_dz };
        tasks.push((&active[start..*end], rows));
        (start, first) = (*end, until);
    }
    run_all(tasks, |(rows, mut out)| {
        out.clear();
        if !rows.is_empty() {
            let len = scratch_len(dims.width);
            with_arena(len, |arena| problem.forward_rows(rows, &mut out, arena));
        }
    });
}

fn backward<A: Act>(
    kernels: &'static Kernels,
    dims: Dims,
    input: In<Cpu, A>,
    lse: &[f32],
    grads: ColumnGradients<Cpu>,
) {
    let problem = Problem::new(kernels, dims, &input);
    let active = problem.active_rows();
    if active.is_empty() {
        return;
    }
    let (width, padded, tile) = (dims.width, problem.padded, tile_columns(dims.width));
    let lanes = active.len().next_multiple_of(PANEL);
    let teacher = problem.targets.teacher();
    let teacher_len = if teacher.is_some() { lanes * width } else { 0 };
    with_arena(lanes * width + lanes * padded + teacher_len + 64, |mut arena| {
        let (panels, z) = (arena.take(lanes * width), arena.take(lanes * padded));
        let teacher_panels = arena.take(teacher_len);
        pack_rows(&active, problem.z, width, panels);
        widen_rows(active.iter().map(|i| &problem.z[*i as usize * width..][..width]), padded, z);
        if let Some(teacher) = teacher {
            pack_rows(&active, teacher.z, width, teacher_panels);
        }
        let packed = PackedRows { rows: &active, panels, teacher_panels, z };
        let mut bias = grads.bias.map(|b| b[..dims.columns].chunks_mut(tile));
        let mut scale = grads.scale.map(|s| s[..dims.columns].chunks_mut(tile));
        let columns = grads.column[..dims.columns * width].chunks_mut(tile * width);
        let tasks = columns.enumerate().map(|(i, column)| OutColumns {
            first: i * tile,
            column,
            bias: bias.as_mut().and_then(Iterator::next),
            scale: scale.as_mut().and_then(Iterator::next),
        });
        run_all(tasks.collect(), |out| {
            let len = scratch_len(width);
            with_arena(len, |arena| problem.backward_tile(&packed, lse, out, arena));
        });
    });
}

fn lse<A: Act>(kernels: &'static Kernels, dims: Dims, z: &[A], column: &[A], scale: f32, lse: &mut [f32]) {
    let (width, padded) = (dims.width, dims.width.next_multiple_of(PANEL));
    let problem = Problem {
        kernels,
        dims,
        padded,
        z,
        column,
        scale: None,
        bias: None,
        margin: None,
        row_weight: &[],
        targets: Targets::Sparse {
            entries: 0,
            column: &[],
            mass: None,
            share: 1.0,
            mix: None,
            teacher: None,
        },
    };
    let all: Vec<u32> = (0..dims.rows as u32).collect();
    let mut lse = &mut lse[..dims.rows];
    let (mut tasks, mut start) = (Vec::new(), 0);
    for end in row_blocks(dims.rows) {
        let (head, rest) = std::mem::take(&mut lse).split_at_mut(end - start);
        lse = rest;
        tasks.push((&all[start..end], head));
        start = end;
    }
    run_all(tasks, |(rows, out)| {
        with_arena(scratch_len(width), |mut arena| {
            let lanes = rows.len().next_multiple_of(PANEL);
            let stats = Rows::new(&mut arena);
            let scratch = TileScratch::new(&mut arena, width, padded);
            let panels = arena.take(BLOCK_ROWS * width);
            pack_rows(rows, z, width, panels);
            stats.max.fill(EXCLUDED);
            stats.sum.fill(0.0);
            scratch.scale.fill(scale);
            scratch.bias.fill(0.0);
            for first in (0..dims.columns).step_by(tile_columns(width)) {
                let columns = problem.columns(first, scratch.columns);
                // SAFETY: scratch is sized for a tile of BLOCK_ROWS rows, `lanes` of which are packed.
                unsafe {
                    let tile = problem.dots(columns, panels, lanes, scratch.s);
                    (kernels.finish)(tile, scratch.scale, scratch.bias);
                    (kernels.online)(tile, scratch.scale, stats.max, stats.sum, stats.shrink);
                }
            }
            for (lane, out) in out.iter_mut().enumerate() {
                *out = stats.max[lane] + stats.sum[lane].ln();
            }
        });
    });
}

impl<A: Act> PrototypeLoss<A> for Cpu {
    fn prototype_loss_forward(&self, dims: Dims, input: In<Cpu, A>, out: Out<Cpu, A>) -> Result<()> {
        forward(Kernels::best(), dims, input, out);
        Ok(())
    }

    fn prototype_loss_backward(
        &self,
        dims: Dims,
        input: In<Cpu, A>,
        lse: &Buf<f32>,
        grads: ColumnGradients<Cpu>,
    ) -> Result<()> {
        backward(Kernels::best(), dims, input, lse, grads);
        Ok(())
    }

    fn prototype_loss_lse(
        &self,
        dims: Dims,
        z: &Buf<A>,
        column: &Buf<A>,
        scale: f32,
        out: &mut Buf<f32>,
    ) -> Result<()> {
        lse(Kernels::best(), dims, z, column, scale, out);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::ops::prototype_loss::Target;
    use crate::rng::Philox;

    fn normal(seed: u64, len: usize) -> Buf<f32> {
        let mut rng = Philox::new(seed, 0, 77);
        Cpu.upload(&(0..len).map(|_| 0.3 * rng.normal() as f32).collect::<Vec<f32>>()).unwrap()
    }

    /// loss, lse, dz, dcolumn, dbias of one case on one instruction set.
    fn run(kernels: &'static Kernels, z: &Buf<f32>, same_label: bool) -> [Vec<f32>; 5] {
        let (rows, columns, width) = (70, 250, 45);
        let dims = Dims { rows, columns, width, gradient_scale: 0.5, bias_in_target: !same_label };
        let (column, bias) = (normal(2, columns * width), normal(3, columns));
        let weight = Cpu.upload(&vec![0.1f32; rows]).unwrap();
        let labels = |n: i32| Cpu.upload(&(0..n).map(|i| i * 7 % 50).collect::<Vec<i32>>()).unwrap();
        let (first, second) = (labels(rows as i32), labels(columns as i32));
        let input = || In {
            z,
            column: &column,
            scale: None,
            bias: Some(&bias),
            margin: None,
            row_weight: &weight,
            target: if same_label {
                Target::SameLabel {
                    row_label: &first,
                    column_label: &second,
                    first_self: 0,
                    same_bias: Some(&bias),
                }
            } else {
                Target::Sparse { entries: 1, column: &first, mass: None, mix: None, teacher: None }
            },
        };
        let mut set = [rows, rows, rows * width, columns * width, columns].map(|n| Cpu.zeros(n).unwrap());
        let [loss, lse, dz, dcolumn, dbias] = &mut set;
        forward(kernels, dims, input(), Out { loss, lse, dz, accumulate_dz: false });
        backward(
            kernels,
            dims,
            input(),
            lse,
            ColumnGradients { column: dcolumn, bias: Some(dbias), scale: None },
        );
        set.map(|x| x.to_vec())
    }

    #[test]
    fn every_instruction_set_agrees() {
        let z = normal(1, 70 * 45);
        for same_label in [false, true] {
            let want = run(&kernels::PORTABLE, &z, same_label);
            for kernels in Kernels::all() {
                let got = run(kernels, &z, same_label);
                for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
                    assert!((got - want).abs() < 2e-6 * want.abs().max(1.0), "{got} {want}");
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_shows_a_nan() {
        for (at, same_label) in [(0, false), (45 * 33 + 7, false), (45 * 69, true)] {
            let mut z = normal(1, 70 * 45);
            z[at] = f32::NAN;
            for kernels in Kernels::all() {
                assert!(run(kernels, &z, same_label)[0][at / 45].is_nan());
            }
        }
    }

    #[test]
    fn blocks_cover_all_rows_in_whole_panels() {
        for rows in 0..700 {
            let ends = row_blocks(rows);
            assert_eq!(*ends.last().unwrap(), rows);
            let starts = [0].iter().chain(&ends);
            for (start, end) in starts.zip(&ends) {
                assert!(start % PANEL == 0 && end - start <= BLOCK_ROWS && (end > start || rows == 0));
            }
        }
    }
}
