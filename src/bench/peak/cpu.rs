//! Ceilings of this processor, measured now: a register-only multiply-add loop per thread, and a copy between large arrays.
//!
//! Twelve independent accumulators hide the latency of the multiply-add (4 cycles, 2 a cycle, and some spare); nothing touches
//! memory, so the result is what the arithmetic units can do at the clock they run at today.

use super::Peak;
use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;

const ACCUMULATORS: usize = 12;

/// A loop of `n` rounds and the operations of one round.
type Loop = (fn(u64) -> f32, f64, &'static str);

/// The loop for f32 multiply-adds, or for bf16 pairs where the processor has them.
fn best_loop(bf16: bool) -> Loop {
    #[cfg(target_arch = "x86_64")]
    {
        let wide = std::arch::is_x86_feature_detected!("avx512f");
        if bf16 && wide && std::arch::is_x86_feature_detected!("avx512bf16") {
            return (x86::bf16_pairs, (64 * ACCUMULATORS) as f64, "register loop of vdpbf16ps zmm");
        }
        if wide {
            return (x86::fma512, (32 * ACCUMULATORS) as f64, "register loop of f32 FMA zmm");
        }
        if std::arch::is_x86_feature_detected!("fma") {
            return (x86::fma256, (16 * ACCUMULATORS) as f64, "register loop of f32 FMA ymm");
        }
    }
    let _ = bf16;
    (portable, (2 * 8 * ACCUMULATORS) as f64, "loop of f32 multiply-add as compiled for this target")
}

/// Peak of the worker threads together: the best of a few tries of about 20 ms, long against a clock tick and short against the
/// start of a run, which waits for it.
pub(super) fn measure(bf16: bool) -> Peak {
    let (run, flop, source) = best_loop(bf16);
    let threads = rayon::current_num_threads();
    let once = |rounds: u64| {
        let start = Instant::now();
        // One task per thread: `broadcast` runs on each worker at once.
        rayon::broadcast(|_| black_box(run(black_box(rounds))));
        start.elapsed().as_secs_f64()
    };
    let calibration = once(200_000);
    let rounds = (2e5 * 0.02 / calibration).max(2e5) as u64;
    let best = (0..8).map(|_| once(rounds)).fold(f64::INFINITY, f64::min);
    Peak {
        gflop_per_s: flop * rounds as f64 * threads as f64 / best / 1e9,
        source: format!("{source}, {threads} threads, same run"),
    }
}

/// 10⁹ bytes a second of copying between arrays too large for any cache, reads and writes both counted.
pub(super) fn copy_gb_per_s() -> f64 {
    const FLOATS: usize = 16 << 20;
    let from = vec![1.0f32; FLOATS];
    let mut to = vec![0.0f32; FLOATS];
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        let start = Instant::now();
        to.par_chunks_mut(1 << 18)
            .zip(from.par_chunks(1 << 18))
            .for_each(|(to, from)| to.copy_from_slice(from));
        black_box(&mut to);
        best = best.min(start.elapsed().as_secs_f64());
    }
    8.0 * FLOATS as f64 / best / 1e9
}

/// Whatever the target's baseline makes of eight lanes.
fn portable(rounds: u64) -> f32 {
    let (x, y) = (black_box(1.000_001f32), black_box(1e-9f32));
    let mut a = [[0.0f32; 8]; ACCUMULATORS];
    for _ in 0..rounds {
        for lanes in &mut a {
            for a in lanes {
                *a = *a * x + y;
            }
        }
    }
    a.iter().flatten().sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::ACCUMULATORS;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    pub fn fma512(rounds: u64) -> f32 {
        #[target_feature(enable = "avx512f")]
        fn run(rounds: u64) -> f32 {
            let (x, y) = (_mm512_set1_ps(black_box(1.000_001)), _mm512_set1_ps(black_box(1e-9)));
            let mut a = [_mm512_setzero_ps(); ACCUMULATORS];
            for _ in 0..rounds {
                for a in &mut a {
                    *a = _mm512_fmadd_ps(*a, x, y);
                }
            }
            a.into_iter().map(|a| _mm512_reduce_add_ps(a)).sum()
        }
        // SAFETY: `best_loop` hands this function out only where AVX-512F was detected.
        unsafe { run(rounds) }
    }

    pub fn fma256(rounds: u64) -> f32 {
        #[target_feature(enable = "avx,fma")]
        fn run(rounds: u64) -> f32 {
            let (x, y) = (_mm256_set1_ps(black_box(1.000_001)), _mm256_set1_ps(black_box(1e-9)));
            let mut a = [_mm256_setzero_ps(); ACCUMULATORS];
            for _ in 0..rounds {
                for a in &mut a {
                    *a = _mm256_fmadd_ps(*a, x, y);
                }
            }
            a.into_iter().map(|a| _mm256_cvtss_f32(a)).sum()
        }
        // SAFETY: `best_loop` hands this function out only where FMA (and with it AVX) was detected.
        unsafe { run(rounds) }
    }

    pub fn bf16_pairs(rounds: u64) -> f32 {
        #[target_feature(enable = "avx512f,avx512bf16")]
        fn run(rounds: u64) -> f32 {
            let pairs = |bits: i32| {
                // SAFETY: both types are 64 bytes of plain bits; the pattern is pairs of bf16 ones and zeros.
                unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(black_box(bits))) }
            };
            let (x, y) = (pairs(0x3f80_3f80), pairs(0x0000_3f80));
            let mut a = [_mm512_setzero_ps(); ACCUMULATORS];
            for _ in 0..rounds {
                for a in &mut a {
                    *a = _mm512_dpbf16_ps(*a, x, y);
                }
            }
            a.into_iter().map(|a| _mm512_reduce_add_ps(a)).sum()
        }
        // SAFETY: `best_loop` hands this function out only where AVX-512F and AVX512_BF16 were detected.
        unsafe { run(rounds) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_loop_does_its_work() {
        // 1 → 1.000001 · a + 1e-9 from zero: the sum grows with the rounds, so the loop was not taken out.
        for bf16 in [false, true] {
            let (run, flop, source) = best_loop(bf16);
            assert!(run(20_000) > run(2_000) && flop >= 192.0, "{source}");
        }
        assert!(portable(20_000) > portable(2_000));
        let p = measure(false);
        assert!(p.gflop_per_s > 0.1 && p.source.contains("loop"));
    }
}
