//! Seeded numbers for inputs of any size, fast: uniform with variance 1, in chunks that threads fill apart.

use crate::device::{Act, Device};
use crate::error::Result;
use rayon::prelude::*;

/// Numbers that one stream fills.
const CHUNK: usize = 1 << 14;
/// Numbers drawn for a buffer of the device; longer ones repeat them.
const DRAWN: usize = 1 << 20;

/// `len` numbers of variance `scale²`, from `seed` alone.
pub fn numbers<A: Act>(seed: u64, len: usize, scale: f32) -> Vec<A> {
    let mut all = vec![A::default(); len];
    // Uniform over [-√3, √3) has variance 1.
    let unit = scale * 3f32.sqrt() / (1u64 << 31) as f32;
    all.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
        // SplitMix64 (Steele, Lea & Flood, 2014).
        let mut state = (seed << 32) ^ chunk as u64;
        for value in values {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            *value = A::from_f32(((z ^ (z >> 31)) >> 32) as u32 as i32 as f32 * unit);
        }
    });
    all
}

/// `len` whole numbers below `below`.
pub fn integers(seed: u64, len: usize, below: u32) -> Vec<u32> {
    let uniform = numbers::<f32>(seed, len, 1.0);
    let width = 2.0 * 3f64.sqrt();
    uniform.iter().map(|x| ((f64::from(*x) / width + 0.5) * f64::from(below)) as u32 % below).collect()
}

/// A buffer of `len` such numbers, drawn up to a million and repeated on the device from there.
pub fn buffer<B: Device, A: Act>(dev: &B, len: usize, seed: u64) -> Result<B::Buf<A>> {
    let mut buf = dev.zeros::<A>(len)?;
    let mut done = len.min(DRAWN);
    dev.write(&mut buf, &numbers::<A>(seed, done, 1.0))?;
    while done < len {
        let more = done.min(len - done);
        // SAFETY: the two handles are disjoint, and end with this round.
        let (from, mut to) = unsafe { (dev.part(&buf, 0..more), dev.part(&buf, done..done + more)) };
        dev.copy(&from, &mut to, more)?;
        done += more;
    }
    Ok(buf)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Cpu;

    #[test]
    fn numbers_have_their_variance_and_buffers_repeat_them() {
        let x = numbers::<f32>(5, 100_000, 2.0);
        let n = x.len() as f64;
        let mean = x.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
        let variance = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n;
        assert!(mean.abs() < 0.03 && (variance - 4.0).abs() < 0.05, "{mean} {variance}");
        assert_eq!(x[..10], numbers::<f32>(5, 10, 2.0)[..]);
        assert_ne!(x[..10], numbers::<f32>(6, 10, 2.0)[..]);
        let ids = integers(1, 10_000, 7);
        assert!(
            (0..7).all(|k| ids.iter().filter(|i| **i == k).count() > 1_000) && ids.iter().all(|i| *i < 7)
        );
        let long = Cpu.download(&buffer::<Cpu, f32>(&Cpu, DRAWN + 5, 9).unwrap()).unwrap();
        assert_eq!(long[DRAWN..], long[..5]);
    }
}
