//! Matrix products of the linear layer, with what follows them fused into the store.
//!
//! ```text
//! rows_by_panels:   out = epilogue(A · B)      A (m, k) row-major as it lies, B packed once per call
//! columns_by_rows:  C  += Aᵀ · B               A (n, o), B (n, i); both packed chunk by chunk as they stream by
//! ```
//! B is packed into panels of 48 columns so that the inner loop reads it in order; an 8 × 48 tile of the result lives in 24
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
use crate::cpu::simd::vectorized;
use crate::device::Act;
use rayon::prelude::*;
use tile::{TILE_COLUMNS, TILE_ROWS, Tile};

/// Rows of A per task: 64 rows of 256 floats (64 KiB) and a panel of B (48 KiB) share the second-level cache, and 4,096
/// tokens make 64 tasks.
const ROW_BLOCK: usize = 64;
/// Rows of A and B per packed chunk of [`columns_by_rows`]: the packed tile of A (8 KiB) stays in the first-level cache, the
/// packed chunk of B (≤ 512 KiB) in the second.
const CHUNK: usize = 256;
/// Columns of B per packed chunk, at most.
const CHUNK_COLUMNS: usize = 480;

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
            let kernel = tile::kernel(isa, pairs, panel.len() / steps.max(1) / 16, 1);
            for row in (0..rows).step_by(TILE_ROWS) {
                // The last tile repeats the last row instead of reading past it; the surplus is not stored.
                let a: [*const u8; TILE_ROWS] =
                    std::array::from_fn(|r| a.wrapping_add((row + r).min(rows - 1) * stride));
                // SAFETY: each pointer has `steps` words to read (rows of `stride` bytes), the panel has `steps` rows of
                // its width, and `kernel` comes from an instruction set that was found on this processor.
                unsafe { kernel(steps, &a, panel.as_ptr(), &mut tile) };
                let tile_rows = TILE_ROWS.min(rows - row);
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
        for r in 0..rows {
            let row = &tile.0[r];
            let mut values = *row;
            if let Some(bias) = epilogue.bias {
                for (v, b) in values.iter_mut().zip(&bias[column..column + columns]) {
                    *v += b.to_f32();
                }
            }
            if epilogue.relu {
                // Written so that NaN stays NaN.
                for v in &mut values { *v = if *v < 0.0 { 0.0 } else { *v } }
            }
            if let Some(positive) = epilogue.positive {
                for (v, x) in values.iter_mut().zip(&positive[at + r * n + column..][..columns]) {
                    *v = if x.to_f32() > 0.0 { *v } else { 0.0 };
                }
            }
            let out = &mut out[r * n + column..][..columns];
            if epilogue.accumulate {
                for (o, v) in out.iter_mut().zip(&values) { *o = A::from_f32(o.to_f32() + v) }
            } else {
                for (o, v) in out.iter_mut().zip(&values) { *o = A::from_f32(*v) }
            }
        }
    }
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
    // The cut follows the threads: it decides who computes an element, never how.
    let block =
        o.div_ceil(2 * rayon::current_num_threads()).next_multiple_of(TILE_ROWS).clamp(TILE_ROWS, 256);
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
    let mut packed_a = scratch::take(CHUNK * TILE_ROWS * 4);
    let packed_a = packed_a.slice::<f32>(CHUNK * TILE_ROWS);
    let mut tile = Tile::default();
    for column in (0..i).step_by(CHUNK_COLUMNS) {
        let columns = CHUNK_COLUMNS.min(i - column);
        let mut panels = scratch::take(CHUNK * columns.next_multiple_of(16) * 4);
        for chunk in (0..n).step_by(CHUNK) {
            let depth = CHUNK.min(n - chunk);
            let panels = panels.slice::<u32>(depth * columns.next_multiple_of(16));
            pack::chunk(&b[chunk * i..(chunk + depth) * i], i, column, columns, panels);
            for row in (0..rows).step_by(TILE_ROWS) {
                let tile_rows = TILE_ROWS.min(rows - row);
                // The bias gradient rides along the first time a column of A passes.
                let sum = column_sum.as_mut().filter(|_| column == 0).map(|s| &mut s[row..row + tile_rows]);
                pack::columns(&a[chunk * o..(chunk + depth) * o], o, first + row, tile_rows, packed_a, sum);
                let a: [*const u8; TILE_ROWS] = std::array::from_fn(|r| packed_a[r..].as_ptr().cast());
                for (p, panel) in panels.chunks(TILE_COLUMNS * depth).enumerate() {
                    let kernel = tile::kernel(isa, false, panel.len() / depth / 16, TILE_ROWS);
                    // SAFETY: `packed_a` holds `depth` groups of eight floats, the panel `depth` rows of its width.
                    unsafe { kernel(depth, &a, panel.as_ptr(), &mut tile) };
                    let at = column + p * TILE_COLUMNS;
                    add(&tile, tile_rows, i, at, TILE_COLUMNS.min(column + columns - at), &mut c[row * i..]);
                }
            }
        }
    }
}

vectorized! {
    /// Adds a tile to columns `column..column + columns` of `c`, whose rows have `i` elements.
    fn add[](tile: &Tile, rows: usize, i: usize, column: usize, columns: usize, c: &mut [f32]) {
        for r in 0..rows {
            for (c, t) in c[r * i + column..][..columns].iter_mut().zip(&tile.0[r]) { *c += t }
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
    fn weight_products_agree_with_f64_and_add() {
        for isa in Isa::available() {
            for [n, o, i] in [[1, 1, 1], [255, 9, 17], [257, 8, 48], [600, 20, 490], [513, 33, 100]] {
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
