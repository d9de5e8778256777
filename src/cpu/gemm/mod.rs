//! Matrix products of the linear layer, with what follows them fused into the store.
//!
//! ```text
//! rows_by_panels:   out = epilogue(A · B)      A (m, k) row-major as it lies, B packed once per call
//! columns_by_rows:  C  += Aᵀ · B               A (n, o), B (n, i); both as they lie, in chunks of n
//! ```
//! A row of A and of B is a step of the second product, so it needs no packing where rows are f32 and whole vectors: the inner
//! loop asks for lines some steps ahead, and for the next chunk meanwhile. For the first, B is packed into panels of 48 columns
//! so that the inner loop reads it in order. An 8 × 48 tile of the result lives in 24
//! vector registers for the whole of k ([`tile`]). A finished tile goes to the first-level cache, where the epilogue (bias,
//! ReLU, mask, accumulate, rounding) picks it up: no further pass over the output, and the epilogue is plain Rust.
//!
//! bf16 operands: with AVX512_BF16 a step of the inner loop takes two values of k at once (`vdpbf16ps`, products exact, sum
//! f32); elsewhere they are widened to f32 on the way and take the f32 tile. Weight gradients are always f32.
//!
//! An element of the result is one sum over k in ascending order (in chunks of [`CHUNK`] where C is added to), whatever the
//! cut into tasks: the same bits for any number of threads.

mod pack;
mod tile;

pub use tile::Isa;

use crate::cpu::scratch;
use crate::cpu::simd::{prefetch, vectorized};
use crate::device::Act;
use rayon::prelude::*;
use tile::{Operands, TILE_COLUMNS, TILE_ROWS, Tile};

/// Rows of A per task: 64 rows of 256 floats (64 KiB) and a panel of B (48 KiB) share the second-level cache, and 4,096
/// tokens make 64 tasks.
const ROW_BLOCK: usize = 64;
/// Rows of A and B per chunk of [`columns_by_rows`]: a task's part of this chunk, of the next one on its way, and of C share a
/// second-level cache of 1 MiB; adding a tile to C is then 3 % of computing it.
const CHUNK: usize = 256;
/// Columns of B per chunk, at most.
const CHUNK_COLUMNS: usize = 288;
/// Columns of A per task, at most.
const OUTPUT_BLOCK: usize = 64;

/// How B lies in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Layout {
    /// (k, n): a row per value of k.
    Rows,
    /// (n, k): a row per column, as weights lie for the forward pass.
    Columns,
}

/// What happens to a tile on its way out.
pub struct Epilogue<'a, A> {
    /// (n) added to every row.
    pub bias: Option<&'a [A]>,
    /// max(0, ·), after the bias.
    pub relu: bool,
    /// (m, n): the result is 0 where this is not above 0.
    pub positive: Option<&'a [A]>,
    /// `out += …`.
    pub accumulate: bool,
}

/// `out (m, n) = epilogue(a (m, k) · b)`, b (k, n) or (n, k) by `layout`.
pub fn rows_by_panels<A: Act>(
    isa: Isa,
    [m, n, k]: [usize; 3],
    a: &[A],
    b: &[A],
    layout: Layout,
    epilogue: Epilogue<'_, A>,
    out: &mut [A],
) {
    if m * n == 0 {
        return;
    }
    // Two values of k per step where the tile multiplies bf16 pairs.
    let pairs = !A::IS_F32 && isa == Isa::Avx512Bf16;
    let steps = if pairs { k.div_ceil(2) } else { k };
    let panels_len = n.next_multiple_of(16) * steps;
    let mut panels = scratch::take(panels_len * 4);
    let panels = panels.slice::<u32>(panels_len);
    pack::panels(b, layout, n, k, pairs, panels);
    let panels = &*panels;
    out[..m * n].par_chunks_mut(ROW_BLOCK * n).enumerate().for_each(|(block, out)| {
        let first = block * ROW_BLOCK;
        let rows = out.len() / n;
        let a = &a[first * k..(first + rows) * k];
        // A is read where it lies, unless it must be widened or an odd k padded to a pair.
        let mut staged = scratch::take(0);
        let (a, stride) = if A::IS_F32 || (pairs && k % 2 == 0) {
            (a.as_ptr().cast::<u8>(), k * size_of::<A>())
        } else {
            staged = scratch::take(rows * steps * 4);
            let words = staged.slice::<u32>(rows * steps);
            pack::stage(a, k, pairs, words);
            (words.as_ptr().cast::<u8>(), steps * 4)
        };
        let mut tile = Tile::default();
        for (p, panel) in panels.chunks(TILE_COLUMNS * steps.max(1)).enumerate() {
            let column = p * TILE_COLUMNS;
            let width = panel.len() / steps.max(1);
            let kernel = tile::kernel(isa, pairs, width / 16, false);
            for row in (0..rows).step_by(TILE_ROWS) {
                // The last tile repeats the last row instead of reading past it; the surplus is not stored.
                let a: [*const u8; TILE_ROWS] =
                    std::array::from_fn(|r| a.wrapping_add((row + r).min(rows - 1) * stride));
                let tile_rows = TILE_ROWS.min(rows - row);
                for r in row..row + tile_rows {
                    let at = r * n + column..r * n + n.min(column + TILE_COLUMNS);
                    if let Some(x) = epilogue.positive {
                        prefetch(&x[first * n + at.start..first * n + at.end]);
                    }
                    prefetch(&out[at]);
                }
                // Meanwhile the next panel is asked for, an equal part by each tile; under the last one the next rows.
                let (ahead, ahead_step) = if column + TILE_COLUMNS < n {
                    let part = panel.len() * 4 * TILE_ROWS / rows;
                    (
                        panel
                            .as_ptr()
                            .wrapping_add(panel.len())
                            .cast::<u8>()
                            .wrapping_add(row / TILE_ROWS * part),
                        part / steps.max(1),
                    )
                } else {
                    (a[0].wrapping_add(rows * stride), TILE_ROWS * stride / steps.max(1))
                };
                let operands =
                    Operands { steps, a: &a, a_step: 1, b: panel.as_ptr(), b_step: width, ahead, ahead_step };
                // SAFETY: each pointer has `steps` words to read (rows of `stride` bytes), the panel has `steps` rows of
                // its width, and `kernel` comes from an instruction set that was found on this processor.
                unsafe { kernel(operands, &mut tile) };
                store(&tile, tile_rows, n, column, (first + row) * n, &epilogue, &mut out[row * n..]);
            }
        }
        drop(staged);
    });
}

vectorized! {
    /// Writes a tile's rows to columns `column..` of `out`, through the epilogue; `at` is where `out` begins in (m, n).
    fn store[A: Act](tile: &Tile, rows: usize, n: usize, column: usize, at: usize, epilogue: &Epilogue<'_, A>, out: &mut [A]) {
        let columns = TILE_COLUMNS.min(n - column);
        let whole = columns / 16 * 16;
        let bias = epilogue.bias.map(|b| &b[column..column + columns]);
        for r in 0..rows {
            let values = &tile.0[r];
            let positive = epilogue.positive.map(|p| &p[at + r * n + column..][..columns]);
            let out = &mut out[r * n + column..][..columns];
            for c in (0..whole).step_by(16) {
                finish::<A, 16>(c, values, bias, positive, epilogue, out);
            }
            for c in whole..columns {
                finish::<A, 1>(c, values, bias, positive, epilogue, out);
            }
        }
    }
}

/// The epilogue on `W` values of a row, from column `c` of the tile: one register, or one element at the right edge.
#[inline(always)]
fn finish<A: Act, const W: usize>(
    c: usize,
    values: &[f32; TILE_COLUMNS],
    bias: Option<&[A]>,
    positive: Option<&[A]>,
    epilogue: &Epilogue<'_, A>,
    out: &mut [A],
) {
    let mut value: [f32; W] = std::array::from_fn(|i| values[c + i]);
    let out: &mut [A; W] = (&mut out[c..c + W]).try_into().expect("W elements");
    if let Some(bias) = bias {
        let bias: &[A; W] = bias[c..c + W].try_into().expect("W elements");
        for i in 0..W {
            value[i] += bias[i].to_f32();
        }
    }
    if epilogue.relu {
        for v in &mut value {
            // Written so that NaN stays NaN.
            *v = if *v < 0.0 { 0.0 } else { *v };
        }
    }
    if let Some(positive) = positive {
        let positive: &[A; W] = positive[c..c + W].try_into().expect("W elements");
        for i in 0..W {
            value[i] = if positive[i].to_f32() > 0.0 { value[i] } else { 0.0 };
        }
    }
    if epilogue.accumulate {
        for i in 0..W {
            value[i] += out[i].to_f32();
        }
    }
    *out = value.map(A::from_f32);
}

/// `c (o, i) += aᵀ (o, n) · b (n, i)` and `column_sum (o) += Σ_rows a`, for a (n, o) and b (n, i); f32 whatever A is.
pub fn columns_by_rows<A: Act>(
    isa: Isa,
    [n, o, i]: [usize; 3],
    a: &[A],
    b: &[A],
    c: &mut [f32],
    column_sum: Option<&mut [f32]>,
) {
    if n * o * i == 0 {
        return;
    }
    // With more threads than blocks the cut is finer: it decides who computes an element, never how.
    let block = o.div_ceil(rayon::current_num_threads()).next_multiple_of(16).min(OUTPUT_BLOCK);
    let c = c[..o * i].par_chunks_mut(block * i).enumerate();
    match column_sum {
        Some(sum) => c.zip(sum[..o].par_chunks_mut(block)).for_each(|((t, c), sum)| {
            output_block(isa, [n, o, i], t * block, a, b, c, Some(sum));
        }),
        None => c.for_each(|(t, c)| output_block(isa, [n, o, i], t * block, a, b, c, None)),
    }
}

/// Rows `first..` of C (as many as `c` holds), over all of n.
fn output_block<A: Act>(
    isa: Isa,
    [n, o, i]: [usize; 3],
    first: usize,
    a: &[A],
    b: &[A],
    c: &mut [f32],
    mut column_sum: Option<&mut [f32]>,
) {
    let rows = c.len() / i;
    // Equal parts of whole panels.
    let part = i.div_ceil(i.div_ceil(CHUNK_COLUMNS)).next_multiple_of(TILE_COLUMNS);
    let (mut wide_a, mut wide_b) = (scratch::take(0), scratch::take(0));
    let mut tile = Tile::default();
    for column in (0..i).step_by(part) {
        let columns = part.min(i - column);
        for chunk in (0..n).step_by(CHUNK) {
            let depth = CHUNK.min(n - chunk);
            let (chunk_a, chunk_b) = (&a[chunk * o..(chunk + depth) * o], &b[chunk * i..(chunk + depth) * i]);
            // The bias gradient is summed when a column of A passes for the first time.
            if let Some(sum) = column_sum.as_deref_mut().filter(|_| column == 0) {
                add_rows(chunk_a, o, first, sum);
            }
            let a = pack::in_place(chunk_a, o, first, rows, TILE_ROWS, &mut wide_a);
            let b = pack::in_place(chunk_b, i, column, columns, 16, &mut wide_b);
            // Each tile asks for one line of each row of the next chunk, until it is complete.
            let lines = (rows * size_of::<A>()).div_ceil(64);
            let mut call = 0;
            for at in (0..columns).step_by(TILE_COLUMNS) {
                let width = TILE_COLUMNS.min(columns - at);
                let kernel = tile::kernel(isa, false, width.div_ceil(16), true);
                for row in (0..rows).step_by(TILE_ROWS) {
                    let (ahead, ahead_step) = if call < lines {
                        (
                            chunk_a
                                .as_ptr()
                                .wrapping_add(depth * o + first)
                                .cast::<u8>()
                                .wrapping_add(call * 64),
                            o * size_of::<A>(),
                        )
                    } else {
                        let line = (call - lines).min((columns * size_of::<A>() - 1) / 64);
                        (
                            chunk_b
                                .as_ptr()
                                .wrapping_add(depth * i + column)
                                .cast::<u8>()
                                .wrapping_add(line * 64),
                            i * size_of::<A>(),
                        )
                    };
                    call += 1;
                    let operands = Operands {
                        steps: depth,
                        a: &[a.pointer.wrapping_add(row).cast(); TILE_ROWS],
                        a_step: a.step,
                        b: b.pointer.wrapping_add(at).cast(),
                        b_step: b.step,
                        ahead,
                        ahead_step,
                    };
                    // SAFETY: `in_place` gives rows of whole tiles and vectors, `depth` of them; the instruction set is there.
                    unsafe { kernel(operands, &mut tile) };
                    add(&tile, TILE_ROWS.min(rows - row), i, column + at, width, &mut c[row * i..]);
                }
            }
        }
    }
}

vectorized! {
    /// `sum[r] += Σ_rows a[·, first + r]`.
    fn add_rows[A: Act](a: &[A], stride: usize, first: usize, sum: &mut [f32]) {
        let mut total = [0.0f32; OUTPUT_BLOCK];
        let total = &mut total[..sum.len()];
        for row in a.chunks_exact(stride) {
            for (t, x) in total.iter_mut().zip(&row[first..][..sum.len()]) { *t += x.to_f32() }
        }
        for (s, t) in sum.iter_mut().zip(total) { *s += *t }
    }
}

vectorized! {
    /// Adds a tile to columns `column..column + columns` of `c`, whose rows have `i` elements.
    fn add[](tile: &Tile, rows: usize, i: usize, column: usize, columns: usize, c: &mut [f32]) {
        for r in 0..rows {
            let c = &mut c[r * i + column..][..columns];
            match <&mut [f32; TILE_COLUMNS]>::try_from(&mut *c) {
                Ok(c) => for (c, t) in c.iter_mut().zip(&tile.0[r]) { *c += t },
                Err(_) => for (c, t) in c.iter_mut().zip(&tile.0[r]) { *c += t },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Philox;
    use half::bf16;

    fn normal<A: Act>(seed: u64, len: usize) -> Vec<A> {
        let mut rng = Philox::new(seed, 0, 0);
        (0..len).map(|_| A::from_f32(rng.normal() as f32)).collect()
    }

    /// Every instruction set of this processor against an f64 sum, at sizes round the tile's and the blocks' edges, with
    /// both layouts of B.
    fn agree<A: Act>() {
        for isa in Isa::available() {
            for [m, n, k] in
                [[1, 1, 1], [7, 15, 3], [8, 48, 16], [9, 49, 17], [65, 33, 255], [130, 100, 64], [3, 112, 31]]
            {
                let (a, b) = (normal::<A>(1, m * k), normal::<A>(2, k * n));
                for layout in [Layout::Rows, Layout::Columns] {
                    let mut out = vec![A::from_f32(f32::NAN); m * n];
                    let plain = Epilogue { bias: None, relu: false, positive: None, accumulate: false };
                    rows_by_panels(isa, [m, n, k], &a, &b, layout, plain, &mut out);
                    for (i, got) in out.iter().enumerate() {
                        let term = |p: usize| {
                            let at = if layout == Layout::Rows { p * n + i % n } else { i % n * k + p };
                            a[i / n * k + p].to_f32() as f64 * b[at].to_f32() as f64
                        };
                        let want: f64 = (0..k).map(term).sum();
                        let bound = 1e-6 * k as f64 + if A::IS_F32 { 0.0 } else { want.abs() / 256.0 };
                        let error = (got.to_f32() as f64 - want).abs();
                        assert!(
                            error <= bound,
                            "{isa:?} {m}x{n}x{k} {layout:?} element {i}: {got:?}, not {want}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_agrees_with_f64_in_f32() {
        agree::<f32>();
    }

    #[test]
    fn every_instruction_set_agrees_with_f64_in_bf16() {
        agree::<bf16>();
    }

    #[test]
    fn any_number_of_threads_makes_the_same_bits() {
        let [n, o, i] = [600, 200, 320];
        let (a, b) = (normal::<f32>(5, n * o), normal::<f32>(6, n * i));
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            let (mut c, mut sum) = (vec![1.0; o * i], vec![2.0; o]);
            pool.install(|| columns_by_rows(Isa::best(), [n, o, i], &a, &b, &mut c, Some(&mut sum)));
            c.into_iter().chain(sum).map(f32::to_bits).collect::<Vec<_>>()
        };
        let one = with(1);
        for threads in [2, 3, 7, 16] {
            assert!(with(threads) == one, "{threads} threads");
        }
    }

    #[test]
    fn weight_products_agree_with_f64_and_add() {
        for isa in Isa::available() {
            for [n, o, i] in
                [[1, 1, 1], [255, 9, 17], [257, 8, 48], [600, 20, 490], [513, 33, 100], [300, 80, 608]]
            {
                let (a, b) = (normal::<f32>(3, n * o), normal::<f32>(4, n * i));
                let (mut c, mut sum) = (vec![1.0; o * i], vec![2.0; o]);
                columns_by_rows(isa, [n, o, i], &a, &b, &mut c, Some(&mut sum));
                for (at, got) in c.iter().enumerate() {
                    let want: f64 = (0..n).map(|t| a[t * o + at / i] as f64 * b[t * i + at % i] as f64).sum();
                    assert!(
                        (*got as f64 - 1.0 - want).abs() < 1e-6 * n as f64 + 1e-6,
                        "{isa:?} {n}x{o}x{i} element {at}"
                    );
                }
                for (r, got) in sum.iter().enumerate() {
                    let want: f64 = (0..n).map(|t| a[t * o + r] as f64).sum();
                    assert!(
                        (*got as f64 - 2.0 - want).abs() < 1e-6 * n as f64 + 1e-6,
                        "{isa:?} sum of column {r}"
                    );
                }
            }
        }
    }
}
