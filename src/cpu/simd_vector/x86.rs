//! [`Vector`] on x86-64: one AVX-512 register, or two AVX2 registers.
//!
//! `2^x` on AVX-512 rounds and scales with `vrndscaleps` and `vscalefps`; AVX2 adds 1.5·2^23, which leaves the integer in the
//! low bits. The bf16 products belong to AVX-512 with AVX512_BF16 alone.

use super::{EXP2, LANES, Vector};
use std::arch::x86_64::*;

/// One AVX-512 register (features F, BW, DQ, VL).
#[derive(Clone, Copy)]
pub struct Avx512(pub __m512);

/// bf16 pairs; feature BF16 besides.
impl Avx512 {
    /// acc + self₀ · b₀ + self₁ · b₁ per lane, the lanes of self and b being pairs of bf16.
    #[inline(always)]
    pub fn dot_bf16(self, b: Self, acc: Self) -> Self {
        // SAFETY: values prove AVX-512; the caller is compiled for AVX512_BF16, which its dispatcher has found.
        unsafe {
            let (a, b) = (
                std::mem::transmute::<__m512, __m512bh>(self.0),
                std::mem::transmute::<__m512, __m512bh>(b.0),
            );
            Avx512(_mm512_dpbf16_ps(acc.0, a, b))
        }
    }
    /// Lanes of pairs: self rounded to bf16 in the lower halves, `upper` in the upper halves.
    #[inline(always)]
    pub fn pair_bf16(self, upper: Self) -> Self {
        // SAFETY: as above.
        unsafe {
            let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(upper.0, self.0));
            let order = _mm512_loadu_si512(INTERLEAVE.as_ptr().cast());
            Avx512(_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both)))
        }
    }
}

/// Halves of a 32-element vector, interleaved: 0 16 1 17 …
const INTERLEAVE: [u16; 32] = {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 32 {
        order[i] = (i / 2 + i % 2 * 16) as u16;
        i += 1;
    }
    order
};

/// Two AVX registers (features AVX2, FMA).
#[derive(Clone, Copy)]
pub struct Avx2(pub __m256, pub __m256);

/// Methods on values: the value proves that the features are there.
macro_rules! on_values {
    ($($name:ident($($arg:ident: $type:ty),*) -> $ret:ty = $body:expr;)+) => {
        $(#[inline(always)]
        fn $name($($arg: $type),*) -> $ret {
            // SAFETY: a value of this type was made by a constructor, whose caller vouched for the features.
            unsafe { $body }
        })+
    };
}

impl Vector for Avx512 {
    const ROWS: usize = 8;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller vouches for the features.
        Avx512(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: as above, and `p` is valid for sixteen f32.
        Avx512(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn at_least(words: &[u32; LANES], threshold: u32) -> u16 {
        // SAFETY: as above; the array holds sixteen words.
        unsafe {
            let words = _mm512_loadu_si512(words.as_ptr().cast());
            _mm512_cmpge_epu32_mask(words, _mm512_set1_epi32(threshold as i32))
        }
    }
    /// Eight counters per register, each word in the lower half of a 64-bit lane, where `vpmuludq` wants it; what
    /// stands in the upper halves never matters.
    #[inline(always)]
    unsafe fn philox(
        low: &[u32; LANES],
        high: &[u32; LANES],
        step: u32,
        site: u32,
        key: [u32; 2],
    ) -> [[u32; LANES]; 4] {
        let mut words = [[0; LANES]; 4];
        // SAFETY: the caller vouches for the features; the arrays hold sixteen words.
        unsafe {
            let m0 = _mm512_set1_epi64(0xD251_1F53);
            let m1 = _mm512_set1_epi64(0xCD9E_8D57);
            let half = |x: &[u32; LANES], h: usize| {
                _mm512_cvtepu32_epi64(_mm256_loadu_si256(x.as_ptr().add(8 * h).cast()))
            };
            let mut c0 = [half(low, 0), half(low, 1)];
            let mut c1 = [half(high, 0), half(high, 1)];
            let mut c2 = [_mm512_set1_epi64(step as i64); 2];
            let mut c3 = [_mm512_set1_epi64(site as i64); 2];
            let [mut k0, mut k1] = key;
            for _ in 0..10 {
                let (key0, key1) = (_mm512_set1_epi64(k0 as i64), _mm512_set1_epi64(k1 as i64));
                for h in 0..2 {
                    let (p0, p1) = (_mm512_mul_epu32(c0[h], m0), _mm512_mul_epu32(c2[h], m1));
                    // 0x96: a ^ b ^ c.
                    c0[h] = _mm512_ternarylogic_epi64::<0x96>(_mm512_srli_epi64::<32>(p1), c1[h], key0);
                    c2[h] = _mm512_ternarylogic_epi64::<0x96>(_mm512_srli_epi64::<32>(p0), c3[h], key1);
                    c1[h] = p1;
                    c3[h] = p0;
                }
                k0 = k0.wrapping_add(0x9E37_79B9);
                k1 = k1.wrapping_add(0xBB67_AE85);
            }
            let even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
            for (words, c) in words.iter_mut().zip([c0, c1, c2, c3]) {
                _mm512_storeu_si512(words.as_mut_ptr().cast(), _mm512_permutex2var_epi32(c[0], even, c[1]));
            }
        }
        words
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: values prove the features.
        Avx512(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    fn exp2(self) -> Self {
        // SAFETY: values prove the features.
        unsafe {
            let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0);
            let f = _mm512_sub_ps(self.0, n);
            let mut p = _mm512_set1_ps(EXP2[4]);
            for c in [EXP2[3], EXP2[2], EXP2[1], EXP2[0], 1.0] {
                p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
            }
            Avx512(_mm512_scalef_ps(p, n))
        }
    }
    on_values! {
        add(self: Self, b: Self) -> Self = Avx512(_mm512_add_ps(self.0, b.0));
        sub(self: Self, b: Self) -> Self = Avx512(_mm512_sub_ps(self.0, b.0));
        mul(self: Self, b: Self) -> Self = Avx512(_mm512_mul_ps(self.0, b.0));
        max(self: Self, b: Self) -> Self = Avx512(_mm512_max_ps(self.0, b.0));
        greater(self: Self, b: Self) -> u16 = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, b.0);
        select(self: Self, bits: u16, other: Self) -> Self = Avx512(_mm512_mask_mov_ps(other.0, bits, self.0));
        keep(self: Self, bits: u16) -> Self = Avx512(_mm512_maskz_mov_ps(bits, self.0));
    }
    #[inline(always)]
    fn transpose(r: [Self; LANES]) -> [Self; LANES] {
        // SAFETY: values prove the features.
        unsafe {
            let r = r.map(|x| x.0);
            // 4×4 blocks inside the 128-bit lanes: pairs of rows, then pairs of pairs.
            let mut t = [_mm512_setzero_ps(); 16];
            for i in (0..16).step_by(4) {
                let (a, b) = (_mm512_unpacklo_ps(r[i], r[i + 1]), _mm512_unpacklo_ps(r[i + 2], r[i + 3]));
                let (c, d) = (_mm512_unpackhi_ps(r[i], r[i + 1]), _mm512_unpackhi_ps(r[i + 2], r[i + 3]));
                t[i] = _mm512_shuffle_ps::<0b01_00_01_00>(a, b);
                t[i + 1] = _mm512_shuffle_ps::<0b11_10_11_10>(a, b);
                t[i + 2] = _mm512_shuffle_ps::<0b01_00_01_00>(c, d);
                t[i + 3] = _mm512_shuffle_ps::<0b11_10_11_10>(c, d);
            }
            // t[4·b + c] holds, in lane l, column 4·l + c of rows 4·b … 4·b + 3: transpose the 4×4 grid of lanes.
            let mut out = [Avx512(_mm512_setzero_ps()); 16];
            for c in 0..4 {
                let a = _mm512_shuffle_f32x4::<0b10_00_10_00>(t[c], t[4 + c]);
                let b = _mm512_shuffle_f32x4::<0b11_01_11_01>(t[c], t[4 + c]);
                let d = _mm512_shuffle_f32x4::<0b10_00_10_00>(t[8 + c], t[12 + c]);
                let e = _mm512_shuffle_f32x4::<0b11_01_11_01>(t[8 + c], t[12 + c]);
                out[c] = Avx512(_mm512_shuffle_f32x4::<0b10_00_10_00>(a, d));
                out[4 + c] = Avx512(_mm512_shuffle_f32x4::<0b10_00_10_00>(b, e));
                out[8 + c] = Avx512(_mm512_shuffle_f32x4::<0b11_01_11_01>(a, d));
                out[12 + c] = Avx512(_mm512_shuffle_f32x4::<0b11_01_11_01>(b, e));
            }
            out
        }
    }
}

/// 2^x of eight lanes, by the integer in the low bits of x + 1.5·2^23.
///
/// # Safety
/// AVX2 and FMA are present.
#[inline(always)]
unsafe fn exp2_256(x: __m256) -> __m256 {
    // SAFETY: the caller vouches for the features.
    unsafe {
        let round = _mm256_set1_ps(12_582_912.0);
        let low = _mm256_set1_ps(-126.0);
        let clamped = _mm256_max_ps(x, low);
        let t = _mm256_add_ps(clamped, round);
        let f = _mm256_sub_ps(clamped, _mm256_sub_ps(t, round));
        let mut p = _mm256_set1_ps(EXP2[4]);
        for c in [EXP2[3], EXP2[2], EXP2[1], EXP2[0], 1.0] {
            p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(c));
        }
        let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(t));
        let y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
        _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x, low), y)
    }
}

/// All ones in the lanes whose bit is set.
///
/// # Safety
/// AVX2 is present.
#[inline(always)]
unsafe fn mask_256(bits: u16) -> __m256 {
    // SAFETY: the caller vouches for the features.
    unsafe {
        let lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        let set = _mm256_and_si256(_mm256_set1_epi32(bits as i32), lane);
        _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane))
    }
}

impl Vector for Avx2 {
    const ROWS: usize = 2;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller vouches for the features.
        let x = unsafe { _mm256_set1_ps(x) };
        Avx2(x, x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: as above, and `p` is valid for sixteen f32.
        unsafe { Avx2(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as above.
        unsafe {
            _mm256_storeu_ps(p, self.0);
            _mm256_storeu_ps(p.add(8), self.1);
        }
    }
    #[inline(always)]
    unsafe fn at_least(words: &[u32; LANES], threshold: u32) -> u16 {
        (0..LANES).fold(0, |bits, i| bits | u16::from(words[i] >= threshold) << i)
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: values prove the features.
        unsafe { Avx2(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)) }
    }
    #[inline(always)]
    fn exp2(self) -> Self {
        // SAFETY: values prove the features.
        unsafe { Avx2(exp2_256(self.0), exp2_256(self.1)) }
    }
    on_values! {
        add(self: Self, b: Self) -> Self = Avx2(_mm256_add_ps(self.0, b.0), _mm256_add_ps(self.1, b.1));
        sub(self: Self, b: Self) -> Self = Avx2(_mm256_sub_ps(self.0, b.0), _mm256_sub_ps(self.1, b.1));
        mul(self: Self, b: Self) -> Self = Avx2(_mm256_mul_ps(self.0, b.0), _mm256_mul_ps(self.1, b.1));
        max(self: Self, b: Self) -> Self = Avx2(_mm256_max_ps(self.0, b.0), _mm256_max_ps(self.1, b.1));
        greater(self: Self, b: Self) -> u16 = {
            let low = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(self.0, b.0));
            let high = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(self.1, b.1));
            (low | high << 8) as u16
        };
        select(self: Self, bits: u16, other: Self) -> Self = Avx2(
            _mm256_blendv_ps(other.0, self.0, mask_256(bits)),
            _mm256_blendv_ps(other.1, self.1, mask_256(bits >> 8)),
        );
        keep(self: Self, bits: u16) -> Self =
            Avx2(_mm256_and_ps(self.0, mask_256(bits)), _mm256_and_ps(self.1, mask_256(bits >> 8)));
    }
    #[inline(always)]
    fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        let mut square = [[0f32; LANES]; LANES];
        for (row, values) in rows.iter().zip(&mut square) {
            // SAFETY: the row holds sixteen f32.
            unsafe { row.store(values.as_mut_ptr()) };
        }
        std::array::from_fn(|c| {
            let column: [f32; LANES] = std::array::from_fn(|r| square[r][c]);
            // SAFETY: values prove the features; the array holds sixteen f32.
            unsafe { Self::load(column.as_ptr()) }
        })
    }
}
