//! Attention on every backend, in the head widths that every backend has: ragged cells around the edges of a warp and a tile,
//! both patterns, dropout. `tests/attention.rs` puts the CPU's instruction sets through more.

use crate::ActSample;
use crate::common::attention::{Case, Results, largest, oracle, run, run_on};
use crate::common::cases::by_threads;
use crate::common::close::{assert_close, assert_same_bits, rounding_bound, wide};
use cellrefine::ops::gene_attention::GeneAttention;

on_every_backend!(A: dense, short_cells_share_a_tile, marker_sparse, dropout, huge_scores_stay_finite,
    backward_is_the_derivative_of_forward, delta_is_the_product_of_o_and_its_gradient,
    a_cell_does_not_feel_its_batch, the_same_bits_for_any_thread_count);
on_emulated!(A: dense, short_cells_share_a_tile, marker_sparse, dropout, huge_scores_stay_finite,
    backward_is_the_derivative_of_forward, delta_is_the_product_of_o_and_its_gradient,
    a_cell_does_not_feel_its_batch, the_same_bits_for_any_thread_count);

/// Both directions against the oracle.
#[track_caller]
pub fn check<B: GeneAttention<A>, A: ActSample>(dev: &B, case: &Case) -> Results<A> {
    let (qkv, do_) = (case.qkv::<A>(), case.do_::<A>());
    let (got, want) = (run_on(dev, case, &qkv, &do_), oracle(case, &wide(&qkv), &wide(&do_)));
    let Case { heads, head_width, lengths, sparse, dropout, .. } = case;
    let name = format!("{heads} × {head_width} {lengths:?} {sparse:?} dropout {}", dropout.probability);
    // Sums of products of unit normals in f32; large scores carry their own rounding into the exponent.
    let f32_sums = 4e-6 * (1.0 + case.scale * case.scale);
    if A::IS_F32 {
        assert_close(&format!("o: {name}"), &got.o, &want.o, f32_sums * largest(&want.o), f32_sums);
        assert_close(&format!("lse: {name}"), &got.lse, &want.lse, f32_sums, 1e-6);
        let bound = 3.0 * f32_sums * largest(&want.dqkv);
        assert_close(&format!("dqkv: {name}"), &got.dqkv, &want.dqkv, bound, f32_sums);
    } else {
        // At most twice the error of the oracle's own results through the same stores: P, then o.
        let p_error = want.o.iter().zip(&want.o_p_rounded).fold(0.0f64, |m, (a, b)| m.max((a - b).abs()));
        let bound = rounding_bound::<A>(&want.o, 1e-5 + f32_sums);
        assert_close(&format!("o: {name}"), &got.o, &want.o, bound + 2.0 * p_error, 0.0);
        assert_close(&format!("lse: {name}"), &got.lse, &want.lse, 2e-5 + f32_sums, 2e-6);
        // o enters delta with its own rounding: |do| · |Δo| of a row reaches dS, and from there, times k or q, dq and dk.
        let delta_error = 2.0 * bound * (*head_width as f64).sqrt() * case.scale;
        let bound = rounding_bound::<A>(&want.dqkv, 1e-4 + 3.0 * f32_sums) + delta_error;
        assert_close(&format!("dqkv: {name}"), &got.dqkv, &want.dqkv, bound, 0.0);
    }
    got
}

/// Around a row group of 16, a tile of 16, 32 or 64, and a block of 64.
const ODD: &[usize] = &[1, 2, 15, 16, 17, 63, 64, 65, 130];

fn dense<B: GeneAttention<A>, A: ActSample>(dev: &B) {
    for (heads, head_width) in [(4, 32), (3, 64), (1, 128)] {
        check(dev, &Case::dense(ODD, heads, head_width));
    }
    check(dev, &Case::dense(&[64], 1, 64));
    check(dev, &Case::dense(&[1], 2, 128));
}

fn short_cells_share_a_tile<B: GeneAttention<A>, A: ActSample>(dev: &B) {
    let lengths: Vec<usize> = (0..70).map(|i| 1 + i * 7 % 9).collect();
    check(dev, &Case::dense(&lengths, 2, 32));
    check(dev, &Case::dense(&lengths, 1, 64).dropout(0.3));
    check(dev, &Case::dense(&lengths, 1, 32).sparse(2, 6).dropout(0.3));
}

/// Windows from none to all, global tokens from hardly any to every second one; `usize::MAX` is a window like any other.
fn marker_sparse<B: GeneAttention<A>, A: ActSample>(dev: &B) {
    for (window, every) in [(0, 5), (1, 1000), (7, 11), (16, 2), (33, 40), (64, 17), (usize::MAX, 9)] {
        check(dev, &Case::dense(&[1, 2, 17, 64, 65, 230], 1, 32).sparse(window, every));
    }
    check(dev, &Case::dense(&[3, 150, 20], 2, 64).sparse(20, 12));
    check(dev, &Case::dense(&[100, 45], 1, 128).sparse(9, 30));
    // Half the tokens are global, so a window spans half as many places as ranks: tiles at either end of it hold no pair.
    check(dev, &Case::dense(&[330], 1, 128).sparse(96, 2));
}

fn dropout<B: GeneAttention<A>, A: ActSample>(dev: &B) {
    for probability in [0.1, 0.5] {
        check(dev, &Case::dense(&[5, 64, 33, 90], 3, 32).dropout(probability));
        check(dev, &Case::dense(&[70, 13], 2, 64).sparse(16, 7).dropout(probability));
        check(dev, &Case::dense(&[3, 41], 2, 128).sparse(5, 9).dropout(probability));
    }
}

pub fn huge_scores_stay_finite<B: GeneAttention<A>, A: ActSample>(dev: &B) {
    for scale in [4.0, 30.0] {
        let mut case = Case::dense(&[65, 40, 1], 2, 64);
        case.scale = scale;
        let got = check(dev, &case);
        assert!(largest(&wide(&got.lse)) > 40.0, "the case is not huge: {}", largest(&wide(&got.lse)));
    }
}

/// Independent of the formulas of the backward pass: central differences of the f64 forward pass.
fn backward_is_the_derivative_of_forward<B: GeneAttention<A>, A: ActSample>(dev: &B) {
    for case in [Case::dense(&[3, 9], 1, 32), Case::dense(&[17], 1, 32).sparse(3, 6).dropout(0.25)] {
        let (qkv, do_) = (case.qkv::<A>(), case.do_::<A>());
        let got = run_on(dev, &case, &qkv, &do_).dqkv;
        let (qkv, do_) = (wide(&qkv), wide(&do_));
        let loss = |x: &[f64]| oracle(&case, x, &do_).o.iter().zip(&do_).map(|(o, g)| o * g).sum::<f64>();
        let slope = |i: usize| {
            let mut x = qkv.clone();
            x[i] += 1e-5;
            let above = loss(&x);
            x[i] -= 2e-5;
            (above - loss(&x)) / 2e-5
        };
        let want: Vec<f64> = (0..qkv.len()).map(slope).collect();
        let bound = if A::IS_F32 { 2e-5 } else { 2e-2 };
        assert_close("dqkv", &got, &want, bound * largest(&want), bound / 2.0);
    }
}

fn delta_is_the_product_of_o_and_its_gradient<B: GeneAttention<A>, A: ActSample>(dev: &B) {
    for (heads, head_width) in [(3, 32), (1, 64), (2, 128)] {
        let case = Case::dense(&[17, 50], heads, head_width);
        let got = run::<A, B>(dev, &case);
        let (d, k) = (case.width(), case.head_width);
        let do_ = case.do_::<A>();
        let want: Vec<f64> = (0..case.tokens() * case.heads)
            .map(|i| (i / case.heads) * d + (i % case.heads) * k)
            .map(|at| (at..at + k).map(|c| got.o[c].to_f32() as f64 * do_[c].to_f32() as f64).sum())
            .collect();
        assert_close("delta", &got.delta, &want, 1e-5, 1e-6);
    }
}

/// A cell's results are its own, to the bit, whatever cells share its tiles.
fn a_cell_does_not_feel_its_batch<B: GeneAttention<A>, A: ActSample>(dev: &B) {
    for whole in [
        Case::dense(&[100, 3, 61, 75], 2, 32).dropout(0.3),
        Case::dense(&[70, 5, 90], 1, 64).sparse(11, 8).dropout(0.3),
    ] {
        let (qkv, do_, global) = (whole.qkv::<A>(), whole.do_::<A>(), whole.global());
        let together = run_on(dev, &whole, &qkv, &do_);
        let mut first = 0;
        for len in whole.lengths.clone() {
            let mut alone = whole.clone();
            alone.lengths = vec![len];
            alone.dropout.first_row += first as u64;
            alone.flags = Some(global[first..first + len].to_vec());
            let (d, h) = (whole.width(), whole.heads);
            let of = |x: &[A], per: usize| x[first * per..(first + len) * per].to_vec();
            let got = run_on(dev, &alone, &of(&qkv, 3 * d), &of(&do_, d));
            assert_same_bits("o", &got.o, &of(&together.o, d));
            assert_same_bits("lse", &got.lse, &together.lse[first * h..(first + len) * h]);
            assert_same_bits("dqkv", &got.dqkv, &of(&together.dqkv, 3 * d));
            first += len;
        }
    }
}

fn the_same_bits_for_any_thread_count<B: GeneAttention<A>, A: ActSample>(dev: &B) {
    for case in [Case::dense(&[90, 7, 1, 64], 2, 32).dropout(0.1), Case::dense(&[120], 1, 64).sparse(30, 10)]
    {
        let [one, two, three] = by_threads(|| run::<A, B>(dev, &case));
        for other in [two, three] {
            assert_same_bits("o", &other.o, &one.o);
            assert_same_bits("lse", &other.lse, &one.lse);
            assert_same_bits("dqkv", &other.dqkv, &one.dqkv);
            assert_same_bits("delta", &other.delta, &one.delta);
        }
    }
}

#[cfg(emulator)]
#[test]
fn a_head_width_without_a_kernel_is_an_error() {
    use crate::common::attention::Buffers;
    let dev = crate::emulated(cellrefine::cuda::Schedule::Late);
    let case = Case::dense(&[4], 1, 16);
    let mut buffers = Buffers::new(&dev, &case, &case.qkv::<f32>(), &case.do_::<f32>());
    let e = buffers
        .forward(&case, |input, o, lse| dev.gene_attention_forward(case.dims(), input, o, lse))
        .unwrap_err();
    assert!(e.to_string().contains("16") && e.to_string().contains("128"), "{e}");
}

/// Few and small calls that reach every part of the kernels: what the mutants run against.
#[cfg(emulator)]
mod faults {
    use super::*;

    fn every_part<B: GeneAttention<A>, A: ActSample>(dev: &B) {
        // A cell that ends at a warp's last row but one, one of a single token, two that span tiles.
        check(dev, &Case::dense(&[15, 1, 66, 50], 2, 64).dropout(0.3));
        check(dev, &Case::dense(&[40], 1, 128));
        sparse(dev);
        // No global token, and windows that end on the last and the first key of a tile.
        let mut narrow = Case::dense(&[130], 1, 32).sparse(1, 1);
        narrow.flags = Some(vec![0; 130]);
        check(dev, &narrow);
    }
    /// A cell that takes `gene_attention_order` two rounds.
    fn sparse<B: GeneAttention<A>, A: ActSample>(dev: &B) {
        check(dev, &Case::dense(&[300, 17], 1, 32).sparse(20, 12).dropout(0.2));
    }

    mod forward {
        use super::every_part;
        on_emulated!(A: every_part);
        mutants!("gene_attention");
    }
    mod backward {
        use super::every_part;
        on_emulated!(A: every_part);
        mutants!("gene_attention_backward");
    }
    mod order {
        use super::sparse;
        on_emulated!(A: sparse);
        mutants!("gene_attention_order");
    }
}
