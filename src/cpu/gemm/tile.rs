//! The inner loop: an 8 × 48 tile of the result, in registers for the whole of k.
//!
//! ```text
//! per step: 3 vector loads of B, 8 broadcasts of A, 24 multiply-adds     (AVX-512: 24 accumulators of 32 registers)
//! ```
//! Eleven loads per 24 multiply-adds leave the multiply-add unit as the bound, and 24 independent sums hide its latency; a
//! last panel of 16 columns still has eight. The result is left in memory (`Tile`), in the first-level cache.

#![allow(clippy::needless_range_loop)] // registers go by number, as in the picture above

/// Rows of a tile.
pub const TILE_ROWS: usize = 8;
/// Columns of a tile: three AVX-512 registers.
pub const TILE_COLUMNS: usize = 48;

/// A finished tile. Columns past the panel's width keep old values.
#[repr(C, align(64))]
pub struct Tile(pub [[f32; TILE_COLUMNS]; TILE_ROWS]);

impl Default for Tile {
    fn default() -> Self {
        Tile([[0.0; TILE_COLUMNS]; TILE_ROWS])
    }
}

/// Instruction sets of the inner loop, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Whatever the compiler's baseline is.
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F.
    Avx512,
    /// AVX-512 F with BF16: `vdpbf16ps`.
    Avx512Bf16,
}

impl Isa {
    /// Those of this processor, weakest first.
    pub fn available() -> Vec<Isa> {
        #[allow(unused_mut)] // other architectures have the portable loop alone
        let mut found = vec![Isa::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            use crate::cpu::simd::{has_avx2, has_avx512};
            let bf16 = has_avx512() && is_x86_feature_detected!("avx512bf16");
            found.extend(has_avx2().then_some(Isa::Avx2));
            found.extend(has_avx512().then_some(Isa::Avx512));
            found.extend(bf16.then_some(Isa::Avx512Bf16));
        }
        found
    }

    /// The strongest of this processor.
    pub fn best() -> Isa {
        static BEST: std::sync::OnceLock<Isa> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| Isa::available().pop().expect("the portable loop is always there"))
    }
}

/// What a call of a [`Kernel`] reads, in 32-bit words: `tile[r][c] = Σ_step a[r][step] · b[step][c]`.
#[derive(Clone, Copy)]
pub struct Operands<'a> {
    /// Values of k, or pairs of them.
    pub steps: usize,
    /// Eight rows of A, one word per step; where A lies by columns, row 0 alone, the others in the words that follow.
    pub a: &'a [*const u8; TILE_ROWS],
    /// Words from a step of A to the next, where A lies by columns.
    pub a_step: usize,
    /// A step of B: as many words as the kernel is wide.
    pub b: *const u32,
    /// Words from a step of B to the next.
    pub b_step: usize,
    /// Asked for during the steps, a cache line each: what a later call will read. Any address will do.
    pub ahead: *const u8,
    /// Bytes from one such line to the next.
    pub ahead_step: usize,
}

/// Multiplies a tile.
///
/// # Safety
/// A and B are readable over all steps, and the processor has the instruction set that the kernel was chosen for.
pub type Kernel = unsafe fn(operands: Operands<'_>, tile: &mut Tile);

/// The kernel for a panel of `vectors` × 16 columns. `by_columns`: A and B are read where they lie, a row per step and eight
/// words of A side by side; otherwise rows of A are contiguous and B is packed. `pairs`: words are pairs of bf16.
pub fn kernel(isa: Isa, pairs: bool, vectors: usize, by_columns: bool) -> Kernel {
    macro_rules! by_width {
        ($kernel:ident) => {
            match (vectors, by_columns) {
                (3, false) => $kernel::<3, false>,
                (2, false) => $kernel::<2, false>,
                (1, false) => $kernel::<1, false>,
                (3, true) => $kernel::<3, true>,
                (2, true) => $kernel::<2, true>,
                (1, true) => $kernel::<1, true>,
                _ => unreachable!("panels are 16, 32 or 48 columns wide"),
            }
        };
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 if pairs => by_width!(avx512_bf16),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 | Isa::Avx512 => by_width!(avx512),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => by_width!(avx2),
        _ => by_width!(portable),
    }
}

/// Steps that a kernel reading by columns runs ahead of itself with its requests: rows lie far apart, in lines that the
/// processor does not foresee, and 16 steps are longer than the way to the third-level cache.
const AHEAD: usize = 16;

/// Where the word of row `r` and step `s` of A lies.
#[inline(always)]
fn word_of<const BY_COLUMNS: bool>(o: &Operands<'_>, r: usize, s: usize) -> *const u8 {
    if BY_COLUMNS { o.a[0].wrapping_add(4 * (s * o.a_step + r)) } else { o.a[r].wrapping_add(4 * s) }
}

/// The requests of step `s`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn request<const V: usize, const BY_COLUMNS: bool>(o: &Operands<'_>, s: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
    // SAFETY: a prefetch reads nothing and never faults, whatever the address.
    unsafe {
        if BY_COLUMNS {
            for v in 0..V {
                _mm_prefetch::<_MM_HINT_T0>(o.b.wrapping_add((s + AHEAD) * o.b_step + v * 16).cast());
            }
            _mm_prefetch::<_MM_HINT_T0>(word_of::<true>(o, 0, s + AHEAD).cast());
        }
        _mm_prefetch::<_MM_HINT_T1>(o.ahead.wrapping_add(s * o.ahead_step).cast());
    }
}

/// f32, AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512<const V: usize, const BY_COLUMNS: bool>(o: Operands<'_>, tile: &mut Tile) {
    use std::arch::x86_64::*;
    let mut sum = [[_mm512_setzero_ps(); V]; TILE_ROWS];
    // SAFETY: `Kernel`'s contract.
    unsafe {
        for s in 0..o.steps {
            let columns: [__m512; V] =
                std::array::from_fn(|v| _mm512_loadu_ps(o.b.add(s * o.b_step + v * 16).cast()));
            request::<V, BY_COLUMNS>(&o, s);
            for r in 0..TILE_ROWS {
                let x = _mm512_set1_ps(*word_of::<BY_COLUMNS>(&o, r, s).cast::<f32>());
                for v in 0..V {
                    sum[r][v] = _mm512_fmadd_ps(x, columns[v], sum[r][v]);
                }
            }
        }
        for (row, sum) in tile.0.iter_mut().zip(sum) {
            for (v, sum) in sum.into_iter().enumerate() {
                _mm512_storeu_ps(row.as_mut_ptr().add(v * 16), sum);
            }
        }
    }
}

/// Pairs of bf16, AVX512_BF16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn avx512_bf16<const V: usize, const BY_COLUMNS: bool>(o: Operands<'_>, tile: &mut Tile) {
    use std::arch::x86_64::*;
    use std::mem::transmute;
    let mut sum = [[_mm512_setzero_ps(); V]; TILE_ROWS];
    // SAFETY: `Kernel`'s contract; both register types are 64 bytes of any content. Rows of bf16 may start at an odd word.
    unsafe {
        for s in 0..o.steps {
            let columns: [__m512bh; V] =
                std::array::from_fn(|v| transmute(_mm512_loadu_si512(o.b.add(s * o.b_step + v * 16).cast())));
            request::<V, BY_COLUMNS>(&o, s);
            for r in 0..TILE_ROWS {
                let x: __m512bh = transmute(_mm512_set1_epi32(
                    word_of::<BY_COLUMNS>(&o, r, s).cast::<i32>().read_unaligned(),
                ));
                for v in 0..V {
                    sum[r][v] = _mm512_dpbf16_ps(sum[r][v], x, columns[v]);
                }
            }
        }
        for (row, sum) in tile.0.iter_mut().zip(sum) {
            for (v, sum) in sum.into_iter().enumerate() {
                _mm512_storeu_ps(row.as_mut_ptr().add(v * 16), sum);
            }
        }
    }
}

/// f32 in plain Rust: sub-tiles of 4 × 16, which fit the sixteen registers of AVX2 and NEON.
///
/// # Safety
/// As [`Kernel`], without the instruction set.
#[inline(always)]
unsafe fn plain<const V: usize, const BY_COLUMNS: bool, const FUSED: bool>(o: Operands<'_>, tile: &mut Tile) {
    for half in 0..TILE_ROWS / 4 {
        for v in 0..V {
            let mut sum = [[0.0f32; 16]; 4];
            for s in 0..o.steps {
                // SAFETY: `Kernel`'s contract; a word is as aligned as an f32.
                let column: &[f32; 16] = unsafe { &*o.b.add(s * o.b_step + v * 16).cast() };
                for r in 0..4 {
                    // SAFETY: as above.
                    let x = unsafe { *word_of::<BY_COLUMNS>(&o, half * 4 + r, s).cast::<f32>() };
                    for c in 0..16 {
                        sum[r][c] =
                            if FUSED { x.mul_add(column[c], sum[r][c]) } else { sum[r][c] + x * column[c] };
                    }
                }
            }
            for (row, sum) in tile.0[half * 4..].iter_mut().zip(&sum) {
                row[v * 16..][..16].copy_from_slice(sum);
            }
        }
    }
}

/// f32, AVX2 with FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const V: usize, const BY_COLUMNS: bool>(o: Operands<'_>, tile: &mut Tile) {
    // SAFETY: the caller's obligations are this function's.
    unsafe { plain::<V, BY_COLUMNS, true>(o, tile) }
}

/// f32, no assumption about the processor; a fused multiply-add would be a library call here.
unsafe fn portable<const V: usize, const BY_COLUMNS: bool>(o: Operands<'_>, tile: &mut Tile) {
    // SAFETY: the caller's obligations are this function's.
    unsafe { plain::<V, BY_COLUMNS, false>(o, tile) }
}
