//! Which tokens are masked, what stands in their place, what is to be told: bit for bit.

use crate::common::cases;
use crate::common::close::assert_same_bits;
use crate::common::guarded::{input, poisoned};
use cellrefine::ops::mask_tokens;
use cellrefine::rng;

on_every_backend!(follows_its_rules);
on_emulated!(follows_its_rules);
mutants!("mask_tokens");

/// Bits against the rules of `ops::mask_tokens`, written out once more; and the shares of a large draw.
fn follows_its_rules<B: mask_tokens::MaskTokens>(dev: &B) {
    let gene = cases::integers(1, 100_000, 1000);
    let dims = mask_tokens::Dims {
        tokens: gene.len(),
        vocab: 1000,
        first_gene: 4,
        mask_id: 1,
        probability: 0.15,
        mask_share: 0.8,
        random_share: 0.1,
        seed: 11,
        step: 6,
        first_row: 1 << 33,
    };
    let run = |dims: mask_tokens::Dims, gene: &[u32]| {
        let n = gene.len();
        let gene_buf = input(dev, gene);
        let (mut masked, mut index, mut target) =
            (poisoned::<_, u32>(dev, n), poisoned::<_, u32>(dev, n), poisoned::<_, i32>(dev, n));
        let out =
            mask_tokens::Out { gene: masked.buf_mut(), index: index.buf_mut(), target: target.buf_mut() };
        mask_tokens::mask(dev, dims, gene_buf.buf(), out).unwrap();
        let m = mask_tokens::count(dims, gene);
        (masked.read(), index.read()[..m].to_vec(), target.read()[..m].to_vec())
    };
    let (masked, index, target) = run(dims, &gene);
    let two_to_32 = 4294967296.0f64;
    let (mut want, mut want_index) = (gene.clone(), Vec::new());
    let (mut masks, mut others) = (0.0, 0.0);
    for (t, g) in gene.iter().enumerate() {
        let w = rng::stream_block(dims.seed, dims.step, rng::site::MASK, dims.first_row + t as u64);
        if *g < 4 || w[0] as f64 >= dims.probability as f64 * two_to_32 {
            continue;
        }
        want_index.push(t as u32);
        if (w[1] as f64) < dims.mask_share as f64 * two_to_32 {
            want[t] = dims.mask_id;
            masks += 1.0;
        } else if (w[1] as f64) < (dims.mask_share as f64 + dims.random_share as f64) * two_to_32 {
            let draw = w[2] as u64 + ((w[3] as u64) << 32);
            want[t] = 4 + ((draw as u128 * 996) >> 64) as u32;
            others += 1.0;
        }
    }
    assert_same_bits("genes", &masked, &want);
    assert_same_bits("indices", &index, &want_index);
    assert!(index.iter().zip(&target).all(|(i, g)| gene[*i as usize] as i32 == *g));
    // `index` is as long as the count: what lies behind it was not written.
    let genes = gene.iter().filter(|g| **g >= 4).count() as f64;
    let chosen = index.len() as f64;
    assert!((chosen / genes - 0.15).abs() < 0.005 && (masks / chosen - 0.8).abs() < 0.02);
    assert!((others / chosen - 0.1).abs() < 0.015);
    // The same batch in two halves.
    let (left, right) = gene.split_at(33_333);
    let half = |gene: &[u32], first| {
        run(mask_tokens::Dims { tokens: gene.len(), first_row: dims.first_row + first, ..dims }, gene)
    };
    let (a, b) = (half(left, 0), half(right, 33_333));
    assert_same_bits("split genes", &[a.0, b.0].concat(), &masked);
    assert_same_bits("split targets", &[a.2, b.2].concat(), &target);
    // Probabilities 0 and 1.
    assert!(run(mask_tokens::Dims { probability: 0.0, ..dims }, &gene).1.is_empty());
    assert_eq!(run(mask_tokens::Dims { probability: 1.0, ..dims }, &gene).1.len() as f64, genes);
}
