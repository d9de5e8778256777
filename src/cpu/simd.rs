//! One source, several instruction sets: functions compiled for AVX-512, for AVX2 and for the baseline, chosen at run time.
//!
//! Plain loops over slices vectorise well once the compiler may use wide registers; [`vectorized!`] writes the copies and
//! the choice. Reductions are written over [`LANES`] partial sums, so that a result does not depend on the instruction set's
//! width. Only the matrix tiles ([`gemm`](crate::cpu::gemm)) use intrinsics.

use crate::device::Act;

/// Partial sums of a reduction: one AVX-512 register of f32, two of AVX2.
pub const LANES: usize = 16;

/// Defines a function whose body is compiled per instruction set. Generic parameters go in square brackets; helper functions
/// called from the body must be `#[inline(always)]` to be compiled along with it.
macro_rules! vectorized {
    ($(#[$meta:meta])* $vis:vis fn $name:ident[$($generic:ident: $bound:path),*]($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)?
        $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)] // a kernel's argument list
        $vis fn $name<$($generic: $bound),*>($($arg: $type),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<$($generic: $bound),*>($($arg: $type),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn wide<$($generic: $bound),*>($($arg: $type),*) $(-> $ret)? {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn medium<$($generic: $bound),*>($($arg: $type),*) $(-> $ret)? {
                    body($($arg),*)
                }
                if $crate::cpu::simd::has_avx512() {
                    // SAFETY: the features were just found on this processor.
                    return unsafe { wide($($arg),*) };
                }
                if $crate::cpu::simd::has_avx2() {
                    // SAFETY: as above.
                    return unsafe { medium($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use vectorized;

/// AVX-512 F, BW, DQ and VL.
#[cfg(target_arch = "x86_64")]
#[inline]
pub fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && has_avx2()
}

/// AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[inline]
pub fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// Sum of the lanes by halving, a fixed order.
#[inline(always)]
pub fn lane_sum(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Σ f(i) over `0..len` in [`LANES`] partial sums.
#[inline(always)]
pub fn sum_by(len: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let whole = len / LANES * LANES;
    let mut i = 0;
    while i < whole {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + l);
        }
        i += LANES;
    }
    for (l, lane) in lanes.iter_mut().enumerate().take(len - whole) {
        *lane += f(whole + l);
    }
    lane_sum(lanes)
}

/// `out[i] = x[i]`, widened.
#[inline(always)]
pub fn widen<A: Act>(x: &[A], out: &mut [f32]) {
    for (o, x) in out.iter_mut().zip(x) {
        *o = x.to_f32();
    }
}

/// Asks for the cache lines of `x`; a hint. Worth it where rows are read in pieces, which the processor does not foresee.
#[inline(always)]
pub fn prefetch<T>(x: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..size_of_val(x)).step_by(64) {
        // SAFETY: a prefetch reads nothing and never faults; the address lies in `x` anyhow.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(x.as_ptr().cast::<i8>().add(line));
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = x;
}
