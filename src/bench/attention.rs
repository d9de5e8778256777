//! Times [`gene_attention`] alone, both directions, on random cells.
//!
//! FLOPs are those of the pairs that attend ([`pairs`]), products only: 4·D a pair forward, 10·D backward. Padding of tiles,
//! softmax and recomputation beyond the five products of the backward pass are not credited.

use crate::device::{Act, Dropout};
use crate::error::Result;
use crate::ops::gene_attention::{self, BackwardIn, Dims, GeneAttention, In, Pattern, flops, pairs};
use crate::rng::{Philox, site};
use std::time::Instant;

/// What is timed.
#[derive(Debug, Clone)]
pub struct Case {
    /// Tokens of each cell.
    pub lengths: Vec<usize>,
    /// H
    pub heads: usize,
    /// K
    pub head_width: usize,
    /// `MarkerSparse` with every 40th token global and this half-width of the window; `None`: dense.
    pub window: Option<usize>,
    /// Probability.
    pub dropout: f32,
}

/// The best of the repeats, with the work done in that time.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// Seconds of the forward pass.
    pub forward_s: f64,
    /// Seconds of the backward pass.
    pub backward_s: f64,
    /// FLOPs of the forward pass.
    pub forward_flops: f64,
    /// FLOPs of the backward pass.
    pub backward_flops: f64,
}

/// Runs both directions once to warm up and then `repeats` times, in turn.
pub fn measure<A: Act, B: GeneAttention<A>>(dev: &B, case: &Case, repeats: usize) -> Result<Times> {
    let mut starts = vec![0u32];
    for len in &case.lengths {
        starts.push(starts[starts.len() - 1] + *len as u32);
    }
    let tokens = starts[case.lengths.len()] as usize;
    let pattern = case.window.map_or(Pattern::Dense, |window| Pattern::MarkerSparse { window });
    let dims = Dims {
        tokens,
        cells: case.lengths.len(),
        heads: case.heads,
        head_width: case.head_width,
        max_len: case.lengths.iter().copied().max().unwrap_or(0),
        pattern,
    };
    let mut rng = Philox::new(0, 0, site::BENCH);
    let mut normal = |len: usize| -> Vec<A> { (0..len).map(|_| A::from_f32(rng.normal() as f32)).collect() };
    let n = tokens * dims.width();
    let (qkv, do_) = (dev.upload(&normal(3 * n))?, dev.upload(&normal(n))?);
    let global_host: Vec<u8> = (0..tokens).map(|i| u8::from(i % 40 == 0)).collect();
    let (cell_start, global) = (dev.upload(&starts)?, dev.upload(&global_host)?);
    let (mut o, mut dqkv) = (dev.zeros(n)?, dev.zeros(3 * n)?);
    let (mut lse, mut delta) = (dev.zeros(tokens * dims.heads)?, dev.zeros(tokens * dims.heads)?);
    let dropout = Dropout { probability: case.dropout, ..Dropout::NONE };
    let input = || In { qkv: &qkv, cell_start: &cell_start, global: Some(&global), dropout };
    let (forward_flops, backward_flops) = flops(dims, pairs(pattern, &starts, &global_host));
    let mut times = Times { forward_s: f64::MAX, backward_s: f64::MAX, forward_flops, backward_flops };
    for _ in 0..=repeats {
        let start = Instant::now();
        gene_attention::forward(dev, dims, input(), &mut o, &mut lse)?;
        times.forward_s = times.forward_s.min(start.elapsed().as_secs_f64());
        let start = Instant::now();
        let saved = BackwardIn { do_: &do_, o: &o, lse: &lse };
        gene_attention::backward(dev, dims, input(), saved, &mut dqkv, &mut delta)?;
        times.backward_s = times.backward_s.min(start.elapsed().as_secs_f64());
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Cpu;
    use half::bf16;

    fn case(lengths: &[usize], head_width: usize, window: Option<usize>, dropout: f32) -> Case {
        Case { lengths: lengths.to_vec(), heads: 256 / head_width, head_width, window, dropout }
    }

    #[test]
    fn flops_count_the_pairs_that_attend() {
        let dense = measure::<f32, _>(&Cpu, &case(&[3, 5], 64, None, 0.0), 1).unwrap();
        assert_eq!((dense.forward_flops, dense.backward_flops), (4.0 * 256.0 * 34.0, 10.0 * 256.0 * 34.0));
        // Token 0 is global: it sees and is seen by all; the others see themselves and one neighbour to each side.
        let sparse = measure::<f32, _>(&Cpu, &case(&[5], 64, Some(1), 0.0), 1).unwrap();
        assert_eq!(sparse.forward_flops, 4.0 * 256.0 * (9 + 4 + 2 * 3) as f64);
    }

    /// `cargo test --release --lib bench::attention -- --ignored --nocapture`: the table of `docs/attention.md`, one thread.
    #[test]
    #[ignore = "prints times"]
    fn print_times() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let cases = [
            case(&[512; 2], 64, None, 0.0),
            case(&[2048], 64, None, 0.0),
            case(&[2048], 64, None, 0.1),
            case(&[512; 2], 32, None, 0.0),
            case(&[512; 2], 128, None, 0.0),
            case(&[64; 64], 64, None, 0.0),
            case(&[2048], 64, Some(64), 0.0),
            case(&[4096], 64, Some(64), 0.0),
            case(&[4096], 64, None, 0.0),
        ];
        for c in &cases {
            for (name, t) in pool.install(|| {
                [("f32", measure::<f32, _>(&Cpu, c, 8)), ("bf16", measure::<bf16, _>(&Cpu, c, 8))]
            }) {
                let t = t.unwrap();
                println!(
                    "{name:4} {} x {:4}, K {:3}, window {:?}, dropout {}: forward {:6.2} ms {:6.1} GFLOP/s, backward {:6.2} ms {:5.1} GFLOP/s",
                    c.lengths.len(),
                    c.lengths[0],
                    c.head_width,
                    c.window,
                    c.dropout,
                    t.forward_s * 1e3,
                    t.forward_flops / t.forward_s * 1e-9,
                    t.backward_s * 1e3,
                    t.backward_flops / t.backward_s * 1e-9,
                );
            }
        }
    }
}
