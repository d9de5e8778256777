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
use crate::cpu::simd::{prefetch, vectorized};
use crate::device::Act;
use rayon::prelude::*;
use tile::{TILE_COLUMNS, TILE_ROWS, Tile};

/// Rows of A per task: 64 rows of 256 floats (64 KiB) and a panel of B (48 KiB) share the second-level cache, and 4,096
/// tokens make 64 tasks.
const ROW_BLOCK: usize = 64;
/// Rows of A and B per packed chunk of [`columns_by_rows`]: both packed chunks, the task's part of C and the next chunk on its
/// way share a second-level cache of 1 MiB; adding a tile to C is then 4 % of computing it (measured: 256 rows without
/// prefetching the next chunk are 3 % slower).
const CHUNK: usize = 128;
/// Columns of B per packed chunk, at most (264 KiB packed).
const CHUNK_COLUMNS: usize = 11 * TILE_COLUMNS;
/// Columns of A per task, at most (128 KiB packed).
const OUTPUT_BLOCK: usize = 256;

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
                let tile_rows = TILE_ROWS.min(rows - row);
                for r in row..row + tile_rows {
                    let at = r * n + column..r * n + n.min(column + TILE_COLUMNS);
                    if let Some(x) = epilogue.positive {
                        prefetch(&x[first * n + at.start..first * n + at.end]);
                    }
                    prefetch(&out[at]);
                }
                // SAFETY: each pointer has `steps` words to read (rows of `stride` bytes), the panel has `steps` rows of
                // its width, and `kernel` comes from an instruction set that was found on this processor.
                unsafe { kernel(steps, &a, panel.as_ptr(), &mut tile) };
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
    // The cut follows the threads: it decides who computes an element, never how. Fewer, larger tasks pack B fewer times.
    let block = o.div_ceil(rayon::current_num_threads()).next_multiple_of(TILE_ROWS).min(OUTPUT_BLOCK);
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
    let tiles = rows.div_ceil(TILE_ROWS);
    // Equal parts of whole panels.
    let part = i.div_ceil(i.div_ceil(CHUNK_COLUMNS)).next_multiple_of(TILE_COLUMNS);
    let mut packed_a = scratch::take(tiles * pack::TILE_STRIDE * 4);
    let packed_a = packed_a.slice::<f32>(tiles * pack::TILE_STRIDE);
    let mut panels = scratch::take(CHUNK * part * 4);
    let mut tile = Tile::default();
    for column in (0..i).step_by(part) {
        let columns = part.min(i - column);
        for chunk in (0..n).step_by(CHUNK) {
            let depth = CHUNK.min(n - chunk);
            let panels = panels.slice::<u32>(depth * columns.next_multiple_of(16));
            pack::chunk(&b[chunk * i..(chunk + depth) * i], i, column, columns, panels);
            // The bias gradient rides along the first time a column of A passes.
            let sum = column_sum.as_deref_mut().filter(|_| column == 0);
            pack::columns(&a[chunk * o..(chunk + depth) * o], o, first, rows, packed_a, sum);
            // The next chunk's rows are asked for while this one is multiplied, a few before each tile.
            let calls = panels.len().div_ceil(TILE_COLUMNS * depth) * tiles;
            let (mut call, mut asked) = (0, 0);
            for (p, panel) in panels.chunks(TILE_COLUMNS * depth).enumerate() {
                let at = column + p * TILE_COLUMNS;
                let kernel = tile::kernel(isa, false, panel.len() / depth / 16, TILE_ROWS);
                for (t, packed) in packed_a.chunks_exact(pack::TILE_STRIDE).enumerate() {
                    call += 1;
                    while asked < call * CHUNK / calls {
                        pack::prefetch_row(a, o, chunk + CHUNK + asked, first, rows);
                        pack::prefetch_row(b, i, chunk + CHUNK + asked, column, columns);
                        asked += 1;
                    }
                    let a: [*const u8; TILE_ROWS] = std::array::from_fn(|r| packed[r..].as_ptr().cast());
                    // SAFETY: `a` holds `depth` groups of eight floats, the panel `depth` rows of its width.
                    unsafe { kernel(depth, &a, panel.as_ptr(), &mut tile) };
                    let (row, width) = (t * TILE_ROWS, TILE_COLUMNS.min(column + columns - at));
                    add(&tile, TILE_ROWS.min(rows - row), i, at, width, &mut c[row * i..]);
                }
            }
        }
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
