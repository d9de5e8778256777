//! The inner loops of the streaming softmax loss: a register-blocked product and the softmax passes over one tile.
//!
//! ```text
//! product:   C (m, n) (+)= A (m, k) · B (k, n)      A is read by broadcast, so any strides do; n is a multiple of PANEL
//! online:    m' = max(m, max_p s_p);  l' = l e^{m-m'} + Σ_p e^{s_p-m'};  s_p := scale_p e^{s_p-m'}
//! gradient:  s_p := κ (e^{s_p-lse} - t_p)
//! ```
//! A tile holds logits transposed, (columns, rows): rows are vector lanes, so that running maxima, sums and the exponential
//! need no horizontal step, and every row's arithmetic is its own, whichever rows share the tile. One generic body over
//! [`Vector`] is compiled per instruction set; [`Kernels::best`] picks once. The product needs no packing of the prototypes:
//! broadcasts read them where they lie.

use crate::cpu::simd::lane_sum;
use crate::cpu::simd_vector::{LANES, Portable, Vector};
use std::sync::OnceLock;

/// Logits below this count as excluded: e^(s - m) is 0 for every m that occurs, and 0 · s stays 0.
pub(super) const EXCLUDED: f32 = -1e30;

/// Rows of a tile, and columns of a product, come in multiples of two vectors.
pub(super) const PANEL: usize = 2 * LANES;

/// e^x as 2^(x log2 e): the product's rounding costs 6e-8 · |x|, which is 1e-6 where e^x is still 1e-5 of the largest.
#[inline(always)]
unsafe fn exp<V: Vector>(x: V) -> V {
    // SAFETY: `x` proves the instruction set.
    x.mul(unsafe { V::splat(std::f32::consts::LOG2_E) }).exp2()
}

/// One product C (m, n) (+)= A (m, k) · B (k, n).
#[derive(Clone, Copy)]
pub(super) struct Product {
    /// Rows of C.
    pub m: usize,
    /// Columns of C, a multiple of [`PANEL`].
    pub n: usize,
    /// Summed over.
    pub k: usize,
    /// A and the strides of its two axes.
    pub a: *const f32,
    /// Stride over m.
    pub a_m: usize,
    /// Stride over k.
    pub a_k: usize,
    /// B: `panel` columns at `b + j · b_panel`, rows `b_k` apart.
    pub b: *const f32,
    /// Stride over k.
    pub b_k: usize,
    /// Stride over panels.
    pub b_panel: usize,
    /// C, rows `c_m` apart.
    pub c: *mut f32,
    /// Stride over m.
    pub c_m: usize,
    /// `+=` instead of `=`.
    pub accumulate: bool,
}

/// M rows of C by two vectors: 2 M accumulators in registers, summed over all of k from zero, then stored or added. Row
/// addresses come in threes from one base (base, + stride, + 2 strides), which x86 addressing gives for free.
#[inline(always)]
unsafe fn micro<V: Vector, const M: usize>(p: &Product, a: *const f32, b: *const f32, c: *mut f32) {
    // SAFETY: the caller's strides and sizes keep all addresses inside A, B and C.
    unsafe {
        let mut acc = [[V::splat(0.0); 2]; M];
        let (mut a, mut b) = (a, b);
        for _ in 0..p.k {
            let (b0, b1) = (V::load(b), V::load(b.add(LANES)));
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = V::splat(*a.add(i * p.a_m));
                acc[0] = x.mul_add(b0, acc[0]);
                acc[1] = x.mul_add(b1, acc[1]);
            }
            a = a.add(p.a_k);
            b = b.add(p.b_k);
        }
        for (i, acc) in acc.iter().enumerate() {
            let c = c.add(i * p.c_m);
            if p.accumulate {
                acc[0].add(V::load(c)).store(c);
                acc[1].add(V::load(c.add(LANES))).store(c.add(LANES));
            } else {
                acc[0].store(c);
                acc[1].store(c.add(LANES));
            }
        }
    }
}

#[inline(always)]
unsafe fn product<V: Vector, const M: usize>(p: &Product) {
    for j in 0..p.n / PANEL {
        let mut i = 0;
        macro_rules! rows {
            ($m:expr) => {
                while p.m - i >= $m {
                    // SAFETY: rows i..i+m and this panel lie inside the operands.
                    unsafe {
                        micro::<V, { $m }>(
                            p,
                            p.a.add(i * p.a_m),
                            p.b.add(j * p.b_panel),
                            p.c.add(i * p.c_m + j * PANEL),
                        )
                    };
                    i += $m;
                }
            };
        }
        // Leftover rows in shrinking groups; a group is at most M, so that it fits the registers.
        rows!(M);
        if M > 8 {
            rows!(8);
            rows!(4);
            rows!(2);
        }
        rows!(1);
    }
}

/// A tile of logits (columns, rows): rows are lanes, `rows` a multiple of [`PANEL`] and the stride between columns.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// (columns, rows).
    pub s: *mut f32,
    /// Columns.
    pub columns: usize,
    /// Rows, padded.
    pub rows: usize,
}

/// s = max(EXCLUDED, s · scale_p + bias_p).
#[inline(always)]
unsafe fn finish<V: Vector>(t: Tile, scale: &[f32], bias: &[f32]) {
    // SAFETY: the tile is columns × rows.
    unsafe {
        for p in 0..t.columns {
            let (scale, bias) = (V::splat(scale[p]), V::splat(bias[p]));
            for r in (0..t.rows).step_by(LANES) {
                let s = t.s.add(p * t.rows + r);
                V::splat(EXCLUDED).max(V::load(s).mul_add(scale, bias)).store(s);
            }
        }
    }
}

/// Folds a tile into the running maxima and sums; leaves scale_p · e^(s - max) in the tile and, per row, the factor by
/// which earlier sums shrink.
#[inline(always)]
unsafe fn online<V: Vector>(t: Tile, scale: &[f32], max: &mut [f32], sum: &mut [f32], shrink: &mut [f32]) {
    assert!(max.len() >= t.rows && sum.len() >= t.rows && shrink.len() >= t.rows && scale.len() >= t.columns);
    // SAFETY: the tile is columns × rows, the statistics hold `rows`.
    unsafe {
        for r in (0..t.rows).step_by(LANES) {
            let old = V::load(max.as_ptr().add(r));
            let (mut top, zero) = (old, V::splat(0.0));
            // Maxima drop NaN: 0 · s keeps it, and an infinity, for the sum.
            let mut total = zero;
            for p in 0..t.columns {
                let s = V::load(t.s.add(p * t.rows + r));
                top = top.max(s);
                total = zero.mul_add(s, total);
            }
            for (p, scale) in scale[..t.columns].iter().enumerate() {
                let s = t.s.add(p * t.rows + r);
                let e = exp(V::load(s).sub(top));
                total = total.add(e);
                e.mul(V::splat(*scale)).store(s);
            }
            let factor = exp(old.sub(top));
            factor.store(shrink.as_mut_ptr().add(r));
            top.store(max.as_mut_ptr().add(r));
            V::load(sum.as_ptr().add(r)).mul_add(factor, total).store(sum.as_mut_ptr().add(r));
        }
    }
}

/// s := κ (e^(s - lse) - t); t absent = 0.
#[inline(always)]
unsafe fn gradient<V: Vector>(t: Tile, target: Option<*const f32>, lse: &[f32], weight: &[f32]) {
    assert!(lse.len() >= t.rows && weight.len() >= t.rows);
    // SAFETY: tile and target are columns × rows, the statistics hold `rows`.
    unsafe {
        for r in (0..t.rows).step_by(LANES) {
            let (lse, weight) = (V::load(lse.as_ptr().add(r)), V::load(weight.as_ptr().add(r)));
            for p in 0..t.columns {
                let s = t.s.add(p * t.rows + r);
                let mut e = exp(V::load(s).sub(lse));
                if let Some(target) = target {
                    e = e.sub(V::load(target.add(p * t.rows + r)));
                }
                e.mul(weight).store(s);
            }
        }
    }
}

/// target += share · e^(scale · s - lse): the teacher's softmax over its own dot products `t`.
#[inline(always)]
unsafe fn add_softmax<V: Vector>(t: Tile, scale: f32, lse: &[f32], share: f32, target: *mut f32) {
    assert!(lse.len() >= t.rows);
    // SAFETY: tile and target are columns × rows, lse holds `rows`.
    unsafe {
        for r in (0..t.rows).step_by(LANES) {
            let lse = V::load(lse.as_ptr().add(r));
            for p in 0..t.columns {
                let to = target.add(p * t.rows + r);
                let e = exp(V::load(t.s.add(p * t.rows + r)).mul(V::splat(scale)).sub(lse));
                e.mul_add(V::splat(share), V::load(to)).store(to);
            }
        }
    }
}

/// dot_r += Σ_p target_pr (s_pr - offset_p).
#[inline(always)]
unsafe fn target_logits<V: Vector>(t: Tile, target: *const f32, offset: &[f32], dot: &mut [f32]) {
    assert!(dot.len() >= t.rows && offset.len() >= t.columns);
    // SAFETY: tile and target are columns × rows, dot holds `rows`.
    unsafe {
        for r in (0..t.rows).step_by(LANES) {
            let mut total = V::splat(0.0);
            for (p, offset) in offset[..t.columns].iter().enumerate() {
                let s = V::load(t.s.add(p * t.rows + r)).sub(V::splat(*offset));
                total = s.mul_add(V::load(target.add(p * t.rows + r)), total);
            }
            let dot = dot.as_mut_ptr().add(r);
            total.add(V::load(dot)).store(dot);
        }
    }
}

/// out_p += Σ_r s_pr.
#[inline(always)]
unsafe fn column_sums<V: Vector>(t: Tile, out: &mut [f32]) {
    // SAFETY: the tile is columns × rows.
    unsafe {
        for (p, out) in out[..t.columns].iter_mut().enumerate() {
            let mut total = V::splat(0.0);
            for r in (0..t.rows).step_by(LANES) {
                total = total.add(V::load(t.s.add(p * t.rows + r)));
            }
            let mut lanes = [0.0; LANES];
            total.store(lanes.as_mut_ptr());
            *out += lane_sum(lanes);
        }
    }
}

/// (tile, scale, max, sum, shrink): see [`online`].
type Online = unsafe fn(Tile, &[f32], &mut [f32], &mut [f32], &mut [f32]);

/// The inner loops compiled for one instruction set. All are unsafe: the caller answers for pointers and sizes.
pub(super) struct Kernels {
    /// Whether `mul_add` rounds once.
    pub fused: bool,
    /// See [`Product`].
    pub product: unsafe fn(&Product),
    /// See [`finish`].
    pub finish: unsafe fn(Tile, &[f32], &[f32]),
    /// See [`online`].
    pub online: Online,
    /// See [`gradient`].
    pub gradient: unsafe fn(Tile, Option<*const f32>, &[f32], &[f32]),
    /// See [`add_softmax`].
    pub add_softmax: unsafe fn(Tile, f32, &[f32], f32, *mut f32),
    /// See [`target_logits`].
    pub target_logits: unsafe fn(Tile, *const f32, &[f32], &mut [f32]),
    /// See [`column_sums`].
    pub column_sums: unsafe fn(Tile, &mut [f32]),
}

/// `static $table`: every loop over `$v`, compiled with `$features`.
macro_rules! kernels {
    ($table:ident, $fused:literal, $v:ty, $m:literal, $(#[$feature:meta])?) => {
        pub(super) static $table: Kernels = {
            $(#[$feature])? unsafe fn run_product(p: &Product) {
                // SAFETY: passed on from the caller.
                unsafe { product::<$v, $m>(p) }
            }
            $(#[$feature])? unsafe fn run_finish(t: Tile, scale: &[f32], bias: &[f32]) {
                // SAFETY: passed on from the caller.
                unsafe { finish::<$v>(t, scale, bias) }
            }
            $(#[$feature])? unsafe fn run_online(t: Tile, a: &[f32], m: &mut [f32], l: &mut [f32], f: &mut [f32]) {
                // SAFETY: passed on from the caller.
                unsafe { online::<$v>(t, a, m, l, f) }
            }
            $(#[$feature])? unsafe fn run_gradient(t: Tile, y: Option<*const f32>, l: &[f32], w: &[f32]) {
                // SAFETY: passed on from the caller.
                unsafe { gradient::<$v>(t, y, l, w) }
            }
            $(#[$feature])? unsafe fn run_add_softmax(t: Tile, a: f32, l: &[f32], share: f32, y: *mut f32) {
                // SAFETY: passed on from the caller.
                unsafe { add_softmax::<$v>(t, a, l, share, y) }
            }
            $(#[$feature])? unsafe fn run_target_logits(t: Tile, y: *const f32, o: &[f32], d: &mut [f32]) {
                // SAFETY: passed on from the caller.
                unsafe { target_logits::<$v>(t, y, o, d) }
            }
            $(#[$feature])? unsafe fn run_column_sums(t: Tile, out: &mut [f32]) {
                // SAFETY: passed on from the caller.
                unsafe { column_sums::<$v>(t, out) }
            }
            Kernels {
                fused: $fused,
                product: run_product,
                finish: run_finish,
                online: run_online,
                gradient: run_gradient,
                add_softmax: run_add_softmax,
                target_logits: run_target_logits,
                column_sums: run_column_sums,
            }
        };
    };
}

// AVX-512: 12 × 2 accumulators and 2 of B in 32 registers. AVX2: a vector is two registers, so 2 × 4 and 4 in 16; eight
// sums in flight hide the latency of two FMA units.
#[cfg(target_arch = "x86_64")]
kernels!(
    AVX512,
    true,
    crate::cpu::simd_vector::Avx512,
    12,
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
);
#[cfg(target_arch = "x86_64")]
kernels!(AVX2, true, crate::cpu::simd_vector::Avx2, 2, #[target_feature(enable = "avx2,fma")]);
kernels!(PORTABLE, false, Portable, 1,);

impl Kernels {
    /// Every set this machine can run, fastest first.
    pub fn all() -> Vec<&'static Kernels> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if crate::cpu::simd::has_avx512() {
                all.push(&AVX512);
            }
            if crate::cpu::simd::has_avx2() {
                all.push(&AVX2);
            }
        }
        all.push(&PORTABLE);
        all
    }

    /// The fastest set of this machine.
    pub fn best() -> &'static Kernels {
        static BEST: OnceLock<&'static Kernels> = OnceLock::new();
        BEST.get_or_init(|| Kernels::all()[0])
    }
}
