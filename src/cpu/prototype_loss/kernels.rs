//! The inner loops of the streaming softmax loss: a register-blocked product and the softmax passes over one tile.
//!
//! ```text
//! product:   C (m, n) (+)= A (m, k) · B (k, n)      A is read by broadcast, so any strides do; n is a multiple of PANEL
//! online:    m' = max(m, max_p s_p);  l' = l e^{m-m'} + Σ_p e^{s_p-m'};  s_p := scale_p e^{s_p-m'}
//! gradient:  s_p := κ (e^{s_p-lse} - t_p)
//! ```
//! A tile holds logits transposed, (columns, rows): rows are vector lanes, so that running maxima, sums and the exponential
//! need no horizontal step, and every row's arithmetic is its own, whichever rows share the tile. One generic body over
//! [`Lanes`] is compiled for AVX-512, AVX2 and plain code; [`Kernels::best`] picks once. The product needs no packing of
//! the prototypes: broadcasts read them where they lie.

use std::sync::OnceLock;

/// Logits below this count as excluded: e^(s - m) is 0 for every m that occurs, and 0 · s stays 0.
pub(super) const EXCLUDED: f32 = -1e30;

/// A vector of f32.
trait Lanes: Copy {
    /// Lanes.
    const N: usize;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    /// self · factor + addend.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// The larger; `other` where either is NaN.
    unsafe fn max(self, other: Self) -> Self;
    /// e^self within 2 ulp; 0 below -87.3; NaN stays NaN.
    unsafe fn exp(self) -> Self;
    /// Sum of the lanes, pairwise from the outer halves in.
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let mut lanes = [0.0f32; 16];
        // SAFETY: N ≤ 16.
        unsafe { self.store(lanes.as_mut_ptr()) };
        let mut n = Self::N;
        while n > 1 {
            n /= 2;
            for i in 0..n {
                lanes[i] += lanes[i + n];
            }
        }
        lanes[0]
    }
}

/// e^r on |r| ≤ ln2/2 (Cephes), highest power first; the two leading terms are 1 + r.
const EXP: [f32; 6] =
    [1.987_569_2e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.000_000_1e-1];
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
const EXP_LOWEST: f32 = -87.3;
const EXP_HIGHEST: f32 = 88.7;

/// `exp` of a `Lanes` type: range reduction and polynomial; `$scale(y, n)` multiplies by 2^n.
macro_rules! exp_body {
    ($t:ty, $x:expr, $round:expr, $scale:expr) => {{
        // SAFETY: the caller of `exp` has the features of this type.
        unsafe {
            let x = <$t>::splat(EXP_LOWEST - 1.0).max($x);
            let x = <$t>::splat(EXP_HIGHEST).min_nan(x);
            let n = $round(x.mul(<$t>::splat(std::f32::consts::LOG2_E)));
            let r = n.mul_add(<$t>::splat(-LN2_HIGH), x);
            let r = n.mul_add(<$t>::splat(-LN2_LOW), r);
            let mut p = <$t>::splat(EXP[0]);
            for c in &EXP[1..] {
                p = p.mul_add(r, <$t>::splat(*c));
            }
            let y = p.mul_add(r.mul(r), r.add(<$t>::splat(1.0)));
            $scale(x, y, n)
        }
    }};
}

/// Plain code: four lanes that the compiler maps to whatever there is.
#[derive(Clone, Copy)]
struct Plain([f32; 4]);

impl Plain {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Plain(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
    #[inline(always)]
    unsafe fn min_nan(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }
}

impl Lanes for Plain {
    const N: usize = 4;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Plain([x; 4])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller gives N readable elements.
        Plain(unsafe { from.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller gives N writable elements.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        self.zip(factor, |a, b| a * b).zip(addend, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        exp_body!(
            Plain,
            self,
            |x: Plain| Plain(x.0.map(|v| v.round_ties_even())),
            |x: Plain, y: Plain, n: Plain| {
                Plain(std::array::from_fn(|i| {
                    let two_n = f32::from_bits(((n.0[i] as i32 + 127) << 23) as u32);
                    if x.0[i] < EXP_LOWEST { 0.0 } else { y.0[i] * two_n }
                }))
            }
        )
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use std::arch::x86_64::*;

    macro_rules! lanes {
        ($name:ident, $v:ty, $n:literal, $splat:ident, $load:ident, $store:ident, $add:ident, $sub:ident, $mul:ident,
         $fma:ident, $max:ident, $min:ident, $round:expr, $scale:expr) => {
            #[derive(Clone, Copy)]
            pub(super) struct $name($v);

            impl $name {
                #[inline(always)]
                unsafe fn min_nan(self, other: Self) -> Self {
                    // SAFETY: as all of this type: only called from functions with its target features.
                    $name(unsafe { $min(self.0, other.0) })
                }
            }

            // SAFETY (each body): only called from functions with this type's target features; loads and stores touch N
            // elements that the caller owns.
            impl Lanes for $name {
                const N: usize = $n;
                #[inline(always)]
                unsafe fn splat(x: f32) -> Self {
                    // SAFETY: see above the impl.
                    $name(unsafe { $splat(x) })
                }
                #[inline(always)]
                unsafe fn load(from: *const f32) -> Self {
                    // SAFETY: see above the impl.
                    $name(unsafe { $load(from) })
                }
                #[inline(always)]
                unsafe fn store(self, to: *mut f32) {
                    // SAFETY: see above the impl.
                    unsafe { $store(to, self.0) }
                }
                #[inline(always)]
                unsafe fn add(self, other: Self) -> Self {
                    // SAFETY: see above the impl.
                    $name(unsafe { $add(self.0, other.0) })
                }
                #[inline(always)]
                unsafe fn sub(self, other: Self) -> Self {
                    // SAFETY: see above the impl.
                    $name(unsafe { $sub(self.0, other.0) })
                }
                #[inline(always)]
                unsafe fn mul(self, other: Self) -> Self {
                    // SAFETY: see above the impl.
                    $name(unsafe { $mul(self.0, other.0) })
                }
                #[inline(always)]
                unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
                    // SAFETY: see above the impl.
                    $name(unsafe { $fma(self.0, factor.0, addend.0) })
                }
                #[inline(always)]
                unsafe fn max(self, other: Self) -> Self {
                    // SAFETY: see above the impl.
                    $name(unsafe { $max(self.0, other.0) })
                }
                #[inline(always)]
                unsafe fn exp(self) -> Self {
                    exp_body!($name, self, $round, $scale)
                }
            }
        };
    }

    lanes!(
        Avx512,
        __m512,
        16,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_add_ps,
        _mm512_sub_ps,
        _mm512_mul_ps,
        _mm512_fmadd_ps,
        _mm512_max_ps,
        _mm512_min_ps,
        |x: Avx512| Avx512(_mm512_roundscale_ps::<0>(x.0)),
        |x: Avx512, y: Avx512, n: Avx512| {
            let kept = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x.0, _mm512_set1_ps(EXP_LOWEST));
            Avx512(_mm512_maskz_scalef_ps(kept, y.0, n.0))
        }
    );

    lanes!(
        Avx2,
        __m256,
        8,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_add_ps,
        _mm256_sub_ps,
        _mm256_mul_ps,
        _mm256_fmadd_ps,
        _mm256_max_ps,
        _mm256_min_ps,
        |x: Avx2| Avx2(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x.0)),
        |x: Avx2, y: Avx2, n: Avx2| {
            let kept = _mm256_cmp_ps::<_CMP_NLT_UQ>(x.0, _mm256_set1_ps(EXP_LOWEST));
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.0), _mm256_set1_epi32(127));
            let two_n = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent));
            Avx2(_mm256_and_ps(kept, _mm256_mul_ps(y.0, two_n)))
        }
    );
}

/// One product C (m, n) (+)= A (m, k) · B (k, n).
#[derive(Clone, Copy)]
pub(super) struct Product {
    /// Rows of C.
    pub m: usize,
    /// Columns of C, a multiple of [`Kernels::panel`].
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
unsafe fn micro<V: Lanes, const M: usize>(p: &Product, a: *const f32, b: *const f32, c: *mut f32) {
    // SAFETY: the caller's strides and sizes keep all addresses inside A, B and C.
    unsafe {
        let mut acc = [[V::splat(0.0); 2]; M];
        let (mut a, mut b) = (a, b);
        for _ in 0..p.k {
            let (b0, b1) = (V::load(b), V::load(b.add(V::N)));
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
                acc[1].add(V::load(c.add(V::N))).store(c.add(V::N));
            } else {
                acc[0].store(c);
                acc[1].store(c.add(V::N));
            }
        }
    }
}

#[inline(always)]
unsafe fn product<V: Lanes, const M: usize>(p: &Product) {
    let panel = 2 * V::N;
    for j in 0..p.n / panel {
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
                            p.c.add(i * p.c_m + j * panel),
                        )
                    };
                    i += $m;
                }
            };
        }
        rows!(M);
        if M > 8 {
            rows!(8);
        }
        rows!(4);
        rows!(2);
        rows!(1);
    }
}

/// A tile of logits (columns, rows): rows are lanes, `rows` a multiple of [`Kernels::panel`] and the stride between columns.
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
unsafe fn finish<V: Lanes>(t: Tile, scale: &[f32], bias: &[f32]) {
    // SAFETY: the tile is columns × rows.
    unsafe {
        for p in 0..t.columns {
            let (scale, bias) = (V::splat(scale[p]), V::splat(bias[p]));
            for r in (0..t.rows).step_by(V::N) {
                let s = t.s.add(p * t.rows + r);
                V::splat(EXCLUDED).max(V::load(s).mul_add(scale, bias)).store(s);
            }
        }
    }
}

/// Folds a tile into the running maxima and sums; leaves scale_p · e^(s - max) in the tile and, per row, the factor by
/// which earlier sums shrink.
#[inline(always)]
unsafe fn online<V: Lanes>(t: Tile, scale: &[f32], max: &mut [f32], sum: &mut [f32], shrink: &mut [f32]) {
    assert!(max.len() >= t.rows && sum.len() >= t.rows && shrink.len() >= t.rows && scale.len() >= t.columns);
    // SAFETY: the tile is columns × rows, the statistics hold `rows`.
    unsafe {
        for r in (0..t.rows).step_by(V::N) {
            let old = V::load(max.as_ptr().add(r));
            let mut top = old;
            for p in 0..t.columns {
                top = top.max(V::load(t.s.add(p * t.rows + r)));
            }
            let mut total = V::splat(0.0);
            for (p, scale) in scale[..t.columns].iter().enumerate() {
                let s = t.s.add(p * t.rows + r);
                let e = V::load(s).sub(top).exp();
                total = total.add(e);
                e.mul(V::splat(*scale)).store(s);
            }
            let factor = old.sub(top).exp();
            factor.store(shrink.as_mut_ptr().add(r));
            top.store(max.as_mut_ptr().add(r));
            V::load(sum.as_ptr().add(r)).mul_add(factor, total).store(sum.as_mut_ptr().add(r));
        }
    }
}

/// s := κ (e^(s - lse) - t); t absent = 0.
#[inline(always)]
unsafe fn gradient<V: Lanes>(t: Tile, target: Option<*const f32>, lse: &[f32], weight: &[f32]) {
    assert!(lse.len() >= t.rows && weight.len() >= t.rows);
    // SAFETY: tile and target are columns × rows, the statistics hold `rows`.
    unsafe {
        for r in (0..t.rows).step_by(V::N) {
            let (lse, weight) = (V::load(lse.as_ptr().add(r)), V::load(weight.as_ptr().add(r)));
            for p in 0..t.columns {
                let s = t.s.add(p * t.rows + r);
                let mut e = V::load(s).sub(lse).exp();
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
unsafe fn add_softmax<V: Lanes>(t: Tile, scale: f32, lse: &[f32], share: f32, target: *mut f32) {
    assert!(lse.len() >= t.rows);
    // SAFETY: tile and target are columns × rows, lse holds `rows`.
    unsafe {
        for r in (0..t.rows).step_by(V::N) {
            let lse = V::load(lse.as_ptr().add(r));
            for p in 0..t.columns {
                let to = target.add(p * t.rows + r);
                let e = V::load(t.s.add(p * t.rows + r)).mul(V::splat(scale)).sub(lse).exp();
                e.mul_add(V::splat(share), V::load(to)).store(to);
            }
        }
    }
}

/// dot_r += Σ_p target_pr (s_pr - offset_p).
#[inline(always)]
unsafe fn target_logits<V: Lanes>(t: Tile, target: *const f32, offset: &[f32], dot: &mut [f32]) {
    assert!(dot.len() >= t.rows && offset.len() >= t.columns);
    // SAFETY: tile and target are columns × rows, dot holds `rows`.
    unsafe {
        for r in (0..t.rows).step_by(V::N) {
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
unsafe fn column_sums<V: Lanes>(t: Tile, out: &mut [f32]) {
    // SAFETY: the tile is columns × rows.
    unsafe {
        for (p, out) in out[..t.columns].iter_mut().enumerate() {
            let mut total = V::splat(0.0);
            for r in (0..t.rows).step_by(V::N) {
                total = total.add(V::load(t.s.add(p * t.rows + r)));
            }
            *out += total.sum();
        }
    }
}

/// The inner loops compiled for one instruction set. All are unsafe: the caller answers for pointers and sizes.
pub(super) struct Kernels {
    /// Name of the instruction set.
    pub name: &'static str,
    /// Rows of a tile, and columns of a product, come in multiples of this.
    pub panel: usize,
    /// See [`Product`].
    pub product: unsafe fn(&Product),
    /// See [`finish`].
    pub finish: unsafe fn(Tile, &[f32], &[f32]),
    /// See [`online`].
    pub online: unsafe fn(Tile, &[f32], &mut [f32], &mut [f32], &mut [f32]),
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
    ($table:ident, $name:literal, $v:ty, $m:literal, $(#[$feature:meta])?) => {
        static $table: Kernels = {
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
                name: $name,
                panel: 2 * <$v as Lanes>::N,
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

// 12 × 2 accumulators + 2 of B leave 6 of 32 registers; 6 × 2 + 2 leave 2 of 16.
#[cfg(target_arch = "x86_64")]
kernels!(AVX512, "avx512", x86::Avx512, 12, #[target_feature(enable = "avx512f")]);
#[cfg(target_arch = "x86_64")]
kernels!(AVX2, "avx2", x86::Avx2, 6, #[target_feature(enable = "avx2,fma")]);
kernels!(PLAIN, "plain", Plain, 4,);

impl Kernels {
    /// Every set this machine can run, fastest first.
    pub fn all() -> Vec<&'static Kernels> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                all.push(&AVX512);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                all.push(&AVX2);
            }
        }
        all.push(&PLAIN);
        all
    }

    /// The fastest set of this machine.
    pub fn best() -> &'static Kernels {
        static BEST: OnceLock<&'static Kernels> = OnceLock::new();
        BEST.get_or_init(|| Kernels::all()[0])
    }
}
