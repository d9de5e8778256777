//! Sizes and inputs that find faults: one, primes, powers of two and their neighbours; seeded numbers.

use cellrefine::device::Act;
use cellrefine::rng::Philox;

/// Row counts: fewer than a vector, just round a register, a tile, a block of rows.
pub const ROWS: &[usize] = &[1, 7, 16, 17, 33, 129];
/// Widths, most of them no multiple of 16.
pub const WIDTHS: &[usize] = &[1, 7, 16, 17, 48, 100, 255, 256];

/// Every row count with every width.
pub fn rows_by_widths() -> impl Iterator<Item = (usize, usize)> {
    ROWS.iter().flat_map(|r| WIDTHS.iter().map(move |w| (*r, *w)))
}

/// `len` standard normal numbers times `scale`, already rounded to `A`, so that the oracle sees what the op sees.
pub fn normal<A: Act>(seed: u64, len: usize, scale: f64) -> Vec<A> {
    let mut rng = Philox::new(seed, 0, 77);
    (0..len).map(|_| A::from_f32((rng.normal() * scale) as f32)).collect()
}

/// `len` integers below `below`.
pub fn integers(seed: u64, len: usize, below: u32) -> Vec<u32> {
    let mut rng = Philox::new(seed, 1, 77);
    (0..len).map(|_| rng.below(below as u64) as u32).collect()
}

/// Cell starts for cells of the given lengths.
pub fn cell_start(lengths: &[usize]) -> Vec<u32> {
    let mut start = vec![0u32];
    for l in lengths {
        start.push(start.last().unwrap() + *l as u32);
    }
    start
}

/// Runs `f` in pools of 1, 2 and 3 threads and returns the three results.
pub fn by_threads<R: Send>(f: impl Fn() -> R + Sync) -> [R; 3] {
    [1, 2, 3].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(&f))
}
