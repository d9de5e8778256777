//! Sixteen f32 lanes under one name on every machine: one AVX-512 register, two AVX2 registers, or an array.
//!
//! A kernel is written once, generic over [`Vector`], marked `#[inline(always)]`, and instantiated inside a function with
//! the matching `#[target_feature]`; see [`gene_attention`](crate::cpu::gene_attention). Values come into being through the
//! unsafe constructors [`Vector::splat`] and [`Vector::load`] alone, so a value is proof that the processor has the
//! instructions, and the arithmetic on values is safe.
//!
//! `2^x`: with n = round(x) and f = x - n in [-½, ½], `2^x = 2^n · p(f)`, p a polynomial of degree 5 with p(0) = 1 exactly,
//! minimax in relative error (1.1e-7); in all at most 2 ulp for results in the normal range. Below 2^-126 the result is 0 or
//! (AVX-512) the denormal. Arguments above 128 give infinity on AVX-512 and are not allowed elsewhere; NaN is not an input.

#![allow(clippy::missing_safety_doc)] // said once, in the trait

/// Lanes of a [`Vector`].
pub const LANES: usize = 16;

/// p(f) ≈ 2^f on [-½, ½]: coefficients of f¹ … f⁵ (Lawson iteration; the constant is 1).
const EXP2: [f32; 5] =
    [std::f32::consts::LN_2 - 1.8e-7, 0.240_222_43, 5.550_733_6e-2, 9.671_513e-3, 1.326_472_7e-3];

/// Sixteen f32.
///
/// # Safety
/// The constructors (`splat`, `load`) may run only where the instruction set of the type is present; pointers must be valid
/// for sixteen f32. There is no alignment to keep.
pub trait Vector: Copy {
    /// Rows of a matrix tile whose accumulators fit the register file beside three vectors of B.
    const ROWS: usize;
    /// x in every lane.
    unsafe fn splat(x: f32) -> Self;
    /// Sixteen f32 at `p`.
    unsafe fn load(p: *const f32) -> Self;
    /// Writes the lanes to `p`.
    unsafe fn store(self, p: *mut f32);
    /// Lane by lane.
    fn add(self, b: Self) -> Self;
    /// Lane by lane.
    fn sub(self, b: Self) -> Self;
    /// Lane by lane.
    fn mul(self, b: Self) -> Self;
    /// Lane by lane.
    fn max(self, b: Self) -> Self;
    /// self · b + c, rounded once where the machine can.
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// 2^self.
    fn exp2(self) -> Self;
    /// Bit i: lane i of self is greater than that of b.
    fn greater(self, b: Self) -> u16;
    /// Lane i of self where bit i is set, of `other` elsewhere.
    fn select(self, bits: u16, other: Self) -> Self;
    /// Lane i where bit i is set, 0 elsewhere.
    fn keep(self, bits: u16) -> Self;
    /// Bit i: words\[i\] is at least `threshold`, unsigned.
    unsafe fn at_least(words: &[u32; LANES], threshold: u32) -> u16;
    /// Philox 4x32-10 at sixteen counters `[low, high, step, site]`; word w of counter i is `[w][i]` of the result.
    #[inline(always)]
    unsafe fn philox(
        low: &[u32; LANES],
        high: &[u32; LANES],
        step: u32,
        site: u32,
        key: [u32; 2],
    ) -> [[u32; LANES]; 4] {
        let mut words = [[0; LANES]; 4];
        for i in 0..LANES {
            let counter = crate::rng::philox4x32([low[i], high[i], step, site], key);
            for (words, word) in words.iter_mut().zip(counter) {
                words[i] = word;
            }
        }
        words
    }
    /// Rows become columns.
    fn transpose(rows: [Self; LANES]) -> [Self; LANES];
}

/// Any machine: arrays that the compiler maps onto the registers it has.
#[derive(Clone, Copy)]
pub struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Portable(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }
}

impl Vector for Portable {
    const ROWS: usize = 1;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Portable([x; LANES])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: valid for sixteen f32 by contract.
        Portable(unsafe { p.cast::<[f32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as above.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        self.zip(b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        self.zip(b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        self.zip(b, |a, b| a * b)
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        self.zip(b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        self.mul(b).add(c)
    }
    #[inline(always)]
    fn exp2(self) -> Self {
        /// 1.5 · 2^23: adding it rounds to the nearest integer and leaves that integer in the low bits.
        const ROUND: f32 = 12_582_912.0;
        Portable(self.0.map(|x| {
            let clamped = if x < -126.0 { -126.0 } else { x };
            let t = clamped + ROUND;
            let f = clamped - (t - ROUND);
            let p = EXP2.iter().rev().fold(0.0, |p, c| (p + c) * f) + 1.0;
            let y = f32::from_bits(p.to_bits().wrapping_add(t.to_bits() << 23));
            if x < -126.0 { 0.0 } else { y }
        }))
    }
    #[inline(always)]
    fn greater(self, b: Self) -> u16 {
        (0..LANES).fold(0, |bits, i| bits | u16::from(self.0[i] > b.0[i]) << i)
    }
    #[inline(always)]
    fn select(self, bits: u16, other: Self) -> Self {
        Portable(std::array::from_fn(|i| if bits >> i & 1 != 0 { self.0[i] } else { other.0[i] }))
    }
    #[inline(always)]
    fn keep(self, bits: u16) -> Self {
        self.select(bits, Portable([0.0; LANES]))
    }
    #[inline(always)]
    unsafe fn at_least(words: &[u32; LANES], threshold: u32) -> u16 {
        (0..LANES).fold(0, |bits, i| bits | u16::from(words[i] >= threshold) << i)
    }
    #[inline(always)]
    fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        std::array::from_fn(|c| Portable(std::array::from_fn(|r| rows[r].0[c])))
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the same checks on one instruction set.
    ///
    /// # Safety
    /// The processor has the instruction set of `V`.
    #[inline(always)]
    unsafe fn check<V: Vector>(name: &str) {
        // SAFETY: sixteen f32; the caller vouches for the instruction set.
        let load = |x: &[f32; LANES]| unsafe { V::load(x.as_ptr()) };
        let lanes = |v: V| {
            let mut out = [0f32; LANES];
            // SAFETY: sixteen f32.
            unsafe { v.store(out.as_mut_ptr()) };
            out
        };
        // 2^x against f64 over the whole range that attention uses.
        let mut worst = 0f64;
        for step in 0..200_000 {
            let x: [f32; LANES] =
                std::array::from_fn(|i| -125.9 + (step * LANES + i) as f32 * (135.9 / 3_200_000.0));
            for (x, y) in x.iter().zip(lanes(load(&x).exp2())) {
                let exact = (*x as f64).exp2();
                worst = worst.max((y as f64 - exact).abs() / (exact * f32::EPSILON as f64));
            }
        }
        assert!(worst <= 2.0, "{name}: exp2 is {worst} epsilon off");
        assert_eq!(lanes(load(&[0.0; LANES]).exp2()), [1.0; LANES], "{name}");
        assert_eq!(lanes(load(&[-1e30; LANES]).exp2()), [0.0; LANES], "{name}");
        let a: [f32; LANES] = std::array::from_fn(|i| i as f32 - 7.5);
        let b: [f32; LANES] = std::array::from_fn(|i| 7.0 - i as f32);
        let greater = load(&a).greater(load(&b));
        let kept = lanes(load(&a).keep(greater));
        let selected = lanes(load(&a).select(greater, load(&b)));
        for i in 0..LANES {
            assert_eq!(greater >> i & 1 == 1, a[i] > b[i], "{name}");
            assert_eq!(kept[i], if a[i] > b[i] { a[i] } else { 0.0 }, "{name}");
            assert_eq!(selected[i], a[i].max(b[i]), "{name}");
            assert_eq!(lanes(load(&a).mul_add(load(&b), load(&a)))[i], a[i] * b[i] + a[i], "{name}");
        }
        let words: [u32; LANES] = std::array::from_fn(|i| (i as u32) << 28);
        // SAFETY: the caller vouches for the instruction set.
        assert_eq!(unsafe { V::at_least(&words, 9 << 28) }, 0xFE00, "{name}");
        let (low, high) = (words, words.map(|w| w.wrapping_mul(77) ^ 5));
        // SAFETY: as above.
        let drawn = unsafe { V::philox(&low, &high, 3, 9, [u32::MAX, 12]) };
        for i in 0..LANES {
            let want = crate::rng::philox4x32([low[i], high[i], 3, 9], [u32::MAX, 12]);
            assert_eq!([drawn[0][i], drawn[1][i], drawn[2][i], drawn[3][i]], want, "{name}");
        }
        let square: [[f32; LANES]; LANES] =
            std::array::from_fn(|r| std::array::from_fn(|c| (r * 16 + c) as f32));
        let turned = V::transpose(square.map(|row| load(&row)));
        for c in 0..LANES {
            assert_eq!(lanes(turned[c]), std::array::from_fn(|r| square[r][c]), "{name}");
        }
    }

    /// Pairs of bf16: the product is the one of the rounded numbers, and the rounding is to nearest even.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn bf16_pairs_multiply_like_rounded_numbers() {
        use half::bf16;
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
        fn check() {
            let x = |seed: usize| -> [f32; LANES] {
                std::array::from_fn(|i| ((i * 37 + seed * 101) % 91) as f32 * 0.173 - 7.0)
            };
            let rounded = |x: f32| bf16::from_f32(x).to_f32();
            let (a0, a1, b0, b1, c) = (x(1), x(2), x(3), x(4), x(5));
            let mut got = [0f32; LANES];
            // SAFETY: the features are enabled here; all arrays hold sixteen f32.
            unsafe {
                let load = |x: &[f32; LANES]| Avx512::load(x.as_ptr());
                let (a, b) = (load(&a0).pair_bf16(load(&a1)), load(&b0).pair_bf16(load(&b1)));
                a.dot_bf16(b, load(&c)).store(got.as_mut_ptr());
            }
            for i in 0..LANES {
                let want = c[i] + rounded(a0[i]) * rounded(b0[i]) + rounded(a1[i]) * rounded(b1[i]);
                assert!(
                    (got[i] - want).abs() <= 1e-5 * want.abs().max(1.0),
                    "lane {i}: {} is not {want}",
                    got[i]
                );
            }
        }
        if crate::cpu::simd::has_avx512() && is_x86_feature_detected!("avx512bf16") {
            // SAFETY: just found.
            unsafe { check() };
        }
    }

    #[test]
    fn every_instruction_set_agrees_with_scalar_arithmetic() {
        // SAFETY: arrays need no instruction set.
        unsafe { check::<Portable>("portable") };
        #[cfg(target_arch = "x86_64")]
        {
            use crate::cpu::simd::{has_avx2, has_avx512};
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn wide() {
                // SAFETY: the features are enabled here.
                unsafe { check::<Avx512>("AVX-512") }
            }
            #[target_feature(enable = "avx2,fma")]
            fn medium() {
                // SAFETY: the features are enabled here.
                unsafe { check::<Avx2>("AVX2") }
            }
            if has_avx512() {
                // SAFETY: just found.
                unsafe { wide() };
            }
            if has_avx2() {
                // SAFETY: just found.
                unsafe { medium() };
            }
        }
    }
}
