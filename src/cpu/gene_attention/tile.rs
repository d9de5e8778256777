//! The one matrix tile of attention: `acc[r][v] += Σ_k a(r, k) · b(k, 16·v …)`.
//!
//! `a` is read one element at a time with any strides and broadcast, `b` is read in vectors, and up to 8×3 or 4×4
//! accumulators stay in registers. All seven products of the two directions are this tile; only the strides differ.

#[cfg(target_arch = "x86_64")]
use crate::cpu::simd_vector::Avx512;
use crate::cpu::simd_vector::{LANES, Vector};

/// What one step along k does.
pub trait Product<V: Vector> {
    /// An element is two bf16 in the place of one f32, and a step takes both.
    const PAIRS: bool;
    /// acc + a · b, or acc + a₀ · b₀ + a₁ · b₁.
    fn step(a: V, b: V, acc: V) -> V;
    /// Two rows of f32 as one row of elements.
    fn pair(first: V, second: V) -> V;
}

/// f32.
pub struct Plain;

impl<V: Vector> Product<V> for Plain {
    const PAIRS: bool = false;
    #[inline(always)]
    fn step(a: V, b: V, acc: V) -> V {
        a.mul_add(b, acc)
    }
    #[inline(always)]
    fn pair(first: V, _: V) -> V {
        first
    }
}

/// Pairs of bf16 by `vdpbf16ps`, summed in f32; only where AVX512_BF16 is.
#[cfg(target_arch = "x86_64")]
pub struct Bf16Pairs;

#[cfg(target_arch = "x86_64")]
impl Product<Avx512> for Bf16Pairs {
    const PAIRS: bool = true;
    #[inline(always)]
    fn step(a: Avx512, b: Avx512, acc: Avx512) -> Avx512 {
        a.dot_bf16(b, acc)
    }
    #[inline(always)]
    fn pair(first: Avx512, second: Avx512) -> Avx512 {
        first.pair_bf16(second)
    }
}

/// Where a(r, k) lies: `pointer + r·row + k·step`.
#[derive(Clone, Copy)]
pub struct Scalars {
    /// a(0, 0).
    pub pointer: *const f32,
    /// Distance of rows.
    pub row: usize,
    /// Distance along k.
    pub step: usize,
}

/// Where the vectors b(k, ·) lie: `pointer + k·step`.
#[derive(Clone, Copy)]
pub struct Vectors {
    /// b(0, 0).
    pub pointer: *const f32,
    /// Distance along k.
    pub step: usize,
}

/// The sum over `depth` values of k, on top of `acc`.
///
/// # Safety
/// `a` and `b` are readable over R × depth and depth × 16·N elements; the instruction set of V is present.
#[inline(always)]
pub unsafe fn multiply<V: Vector, P: Product<V>, const R: usize, const N: usize>(
    mut acc: [[V; N]; R],
    depth: usize,
    a: Scalars,
    b: Vectors,
) -> [[V; N]; R] {
    // SAFETY: the caller vouches for the ranges and the instruction set.
    unsafe {
        let (mut pa, mut pb) = (a.pointer, b.pointer);
        for _ in 0..depth {
            let mut row_b = [V::splat(0.0); N];
            for (v, b) in row_b.iter_mut().enumerate() {
                *b = V::load(pb.add(v * LANES));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = V::splat(*pa.add(r * a.row));
                for (acc, b) in acc.iter_mut().zip(row_b) {
                    *acc = P::step(x, b, *acc);
                }
            }
            pa = pa.add(a.step);
            pb = pb.add(b.step);
        }
    }
    acc
}

/// `c(r, ·) += Σ_k a(r, k) · b(k, ·)` in memory, for R rows of 16·N floats, `row` apart.
///
/// # Safety
/// As [`multiply`]; `c` is writable over its R rows.
#[inline(always)]
pub unsafe fn accumulate<V: Vector, P: Product<V>, const R: usize, const N: usize>(
    c: *mut f32,
    row: usize,
    depth: usize,
    a: Scalars,
    b: Vectors,
) {
    // SAFETY: the caller vouches for the ranges and the instruction set.
    unsafe {
        let mut acc = [[V::splat(0.0); N]; R];
        for (r, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                *acc = V::load(c.add(r * row + v * LANES));
            }
        }
        let acc = multiply::<V, P, R, N>(acc, depth, a, b);
        for (r, acc) in acc.iter().enumerate() {
            for (v, acc) in acc.iter().enumerate() {
                acc.store(c.add(r * row + v * LANES));
            }
        }
    }
}

/// [`accumulate`] over `rows` (a multiple of 8) rows of 16·N lanes, in tiles that fit the registers of V.
///
/// # Safety
/// As [`accumulate`], over all rows.
#[inline(always)]
pub unsafe fn accumulate_rows<V: Vector, P: Product<V>, const N: usize>(
    c: *mut f32,
    row: usize,
    rows: usize,
    depth: usize,
    a: Scalars,
    b: Vectors,
) {
    let tile = if N == 4 { V::ROWS.div_ceil(2) } else { V::ROWS };
    for r in (0..rows).step_by(tile) {
        let c = c.wrapping_add(r * row);
        let a = Scalars { pointer: a.pointer.wrapping_add(r * a.row), ..a };
        // SAFETY: the rows r … r + tile lie inside the caller's ranges, since the tile divides 8.
        unsafe {
            match tile {
                8 => accumulate::<V, P, 8, N>(c, row, depth, a, b),
                4 => accumulate::<V, P, 4, N>(c, row, depth, a, b),
                2 => accumulate::<V, P, 2, N>(c, row, depth, a, b),
                _ => accumulate::<V, P, 1, N>(c, row, depth, a, b),
            }
        }
    }
}

/// [`accumulate_rows`] for rows of `width` (a multiple of 16) lanes.
///
/// # Safety
/// As [`accumulate`], over all rows and lanes.
#[inline(always)]
pub unsafe fn accumulate_panel<V: Vector>(
    c: *mut f32,
    width: usize,
    rows: usize,
    depth: usize,
    a: Scalars,
    b: Vectors,
) {
    let mut lane = 0;
    while lane < width {
        let at = Vectors { pointer: b.pointer.wrapping_add(lane), ..b };
        let c = c.wrapping_add(lane);
        // SAFETY: the lanes lie inside the caller's width.
        unsafe {
            if width - lane >= 4 * LANES {
                accumulate_rows::<V, Plain, 4>(c, width, rows, depth, a, at);
                lane += 4 * LANES;
            } else if width - lane >= 2 * LANES {
                accumulate_rows::<V, Plain, 2>(c, width, rows, depth, a, at);
                lane += 2 * LANES;
            } else {
                accumulate_rows::<V, Plain, 1>(c, width, rows, depth, a, at);
                lane += LANES;
            }
        }
    }
}
