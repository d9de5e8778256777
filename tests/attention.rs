//! Attention against a naive f64 oracle: ragged cells, odd lengths and head widths, both patterns, dropout, both directions,
//! every instruction set that the processor has, guard words and NaN round and in every output.

mod common;

use cellrefine::cpu::Cpu;
use cellrefine::cpu::gene_attention::{Isa, backward_on, forward_on};
use cellrefine::device::{Act, Dropout};
use cellrefine::ops::gene_attention::{In, forward};
use common::attention::{Buffers, Case, Results, largest, oracle};
use common::cases::{by_threads, cell_start};
use common::close::{assert_close, assert_same_bits, rounding_bound, wide};
use common::guarded::{self, Sample};
use half::bf16;
/// Both directions on one instruction set (`None`: through the checked op), on given inputs.
fn run_on<A: Act + Sample>(case: &Case, qkv: &[A], do_: &[A], isa: Option<Isa>) -> Results<A> {
    let Some(isa) = isa else { return common::attention::run_on(&Cpu, case, qkv, do_) };
    let mut buffers = Buffers::new(&Cpu, case, qkv, do_);
    let dims = case.dims();
    buffers.forward(case, |input, o, lse| forward_on(isa, dims, input, o, lse));
    buffers.backward(case, |input, saved, dqkv, delta| backward_on(isa, dims, input, saved, dqkv, delta));
    buffers.read()
}

fn run<A: Act + Sample>(case: &Case, isa: Option<Isa>) -> Results<A> {
    run_on(case, &case.qkv::<A>(), &case.do_::<A>(), isa)
}

/// Runs a case in f32 on every instruction set and compares all outputs with the oracle.
#[track_caller]
fn check(name: &str, case: &Case) {
    let (qkv, do_) = (case.qkv::<f32>(), case.do_::<f32>());
    let want = oracle(case, &wide(&qkv), &wide(&do_));
    // Sums of products of unit normals in f32; large scores carry their own rounding into the exponent.
    let tolerance = 4e-6 * (1.0 + case.scale * case.scale);
    for isa in Isa::available() {
        let got = run_on(case, &qkv, &do_, Some(isa));
        let name = format!("{name} on {isa:?}");
        assert_close(&format!("{name}: o"), &got.o, &want.o, tolerance * largest(&want.o), tolerance);
        assert_close(&format!("{name}: lse"), &got.lse, &want.lse, tolerance, 1e-6);
        let largest = largest(&want.dqkv);
        assert_close(&format!("{name}: dqkv"), &got.dqkv, &want.dqkv, 3.0 * tolerance * largest, tolerance);
        assert!(got.delta.iter().all(|x| x.is_finite()), "{name}: delta");
    }
}

const ODD: &[usize] = &[1, 2, 15, 16, 17, 63, 64, 65, 127, 200];

#[test]
fn dense_at_odd_lengths_and_head_widths() {
    for (heads, head_width) in [(1, 8), (3, 32), (2, 64), (1, 128), (2, 24), (4, 40)] {
        check(&format!("{heads} heads of {head_width}"), &Case::dense(ODD, heads, head_width));
    }
    check("513", &Case::dense(&[513, 3], 2, 64));
}

#[test]
fn long_cells_are_cut_into_chunks_and_put_together() {
    check("2100", &Case::dense(&[2100], 1, 16));
    check("2100 sparse with dropout", &Case::dense(&[5, 2100, 30], 1, 16).sparse(100, 60).dropout(0.1));
}

#[test]
fn dropout_draws_the_documented_elements() {
    for case in [Case::dense(ODD, 2, 32), Case::dense(&[70, 130], 3, 64), Case::dense(&[513], 1, 64)] {
        check("dropout 0.1", &case.clone().dropout(0.1));
        check("dropout 0.5", &case.dropout(0.5));
    }
}

#[test]
fn marker_sparse_equals_the_masked_oracle() {
    for (window, every) in
        [(0, 5), (1, 1000), (7, 11), (16, 3), (33, 40), (64, 17), (100, 1), (usize::MAX, 9)]
    {
        let case = Case::dense(&[1, 2, 17, 63, 64, 65, 200, 301], 2, 32).sparse(window, every);
        check(&format!("window {window}, 1/{every} global"), &case);
        check(&format!("window {window}, 1/{every} global, dropout"), &case.dropout(0.2));
    }
}

#[test]
fn huge_scores_stay_finite() {
    for scale in [4.0, 30.0] {
        let mut case = Case::dense(&[65, 130, 1], 2, 64);
        case.scale = scale;
        let (qkv, do_) = (case.qkv::<f32>(), case.do_::<f32>());
        let exact = oracle(&case, &wide(&qkv), &wide(&do_));
        assert!(largest(&exact.lse) > 40.0, "the case is not huge: {}", largest(&exact.lse));
        check(&format!("scale {scale}"), &case);
    }
}

/// Independent of the formulas of the backward pass: central differences of the f64 forward pass.
#[test]
fn backward_is_the_derivative_of_forward() {
    for case in [Case::dense(&[5, 19], 2, 8), Case::dense(&[40], 1, 8).sparse(4, 9).dropout(0.25)] {
        let (qkv, do_) = (case.qkv::<f32>(), case.do_::<f32>());
        let got = run_on(&case, &qkv, &do_, None).dqkv;
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
        assert_close("dqkv", &got, &want, 2e-5 * largest(&want), 1e-5);
    }
}

#[test]
fn delta_is_the_product_of_o_and_its_gradient() {
    let case = Case::dense(&[17, 50], 3, 32);
    let got = run::<f32>(&case, None);
    let (d, k) = (case.width(), case.head_width);
    let do_ = case.do_::<f32>();
    let want: Vec<f64> = (0..case.tokens() * case.heads)
        .map(|i| (i / case.heads) * d + (i % case.heads) * k)
        .map(|at| (at..at + k).map(|c| got.o[c] as f64 * do_[c] as f64).sum())
        .collect();
    assert_close("delta", &got.delta, &want, 1e-5, 1e-6);
}

#[test]
fn a_cell_does_not_feel_the_batch_it_is_in() {
    let whole = Case::dense(&[100, 61, 200], 2, 32).dropout(0.3);
    let (qkv, do_) = (whole.qkv::<f32>(), whole.do_::<f32>());
    let together = run_on(&whole, &qkv, &do_, None);
    let mut first = 0;
    for len in whole.lengths.clone() {
        let mut alone = whole.clone();
        alone.lengths = vec![len];
        alone.dropout.first_row += first as u64;
        let (d, h) = (whole.width(), whole.heads);
        let of = |x: &[f32], per: usize| x[first * per..(first + len) * per].to_vec();
        let got = run_on(&alone, &of(&qkv, 3 * d), &of(&do_, d), None);
        assert_same_bits("o", &got.o, &of(&together.o, d));
        assert_same_bits("lse", &got.lse, &of(&together.lse, h));
        assert_same_bits("dqkv", &got.dqkv, &of(&together.dqkv, 3 * d));
        first += len;
    }
}

#[test]
fn thread_count_does_not_change_a_bit() {
    let cases = [
        Case::dense(&[300, 7, 1, 513, 64], 3, 32).dropout(0.1),
        Case::dense(&[2300], 1, 16),
        Case::dense(&[2300, 9], 1, 16).sparse(50, 40),
    ];
    for case in cases {
        let [one, two, three] = by_threads(|| {
            let results = run::<f32>(&case, None);
            let rounded = run::<bf16>(&case, None);
            (results.o, results.lse, results.dqkv, rounded.o, rounded.dqkv)
        });
        for other in [two, three] {
            assert_same_bits("o", &other.0, &one.0);
            assert_same_bits("lse", &other.1, &one.1);
            assert_same_bits("dqkv", &other.2, &one.2);
            assert_same_bits("bf16 o", &other.3, &one.3);
            assert_same_bits("bf16 dqkv", &other.4, &one.4);
        }
    }
}

/// Error at most twice that of the oracle's own result through the same stores (P, then o), plus a floor.
#[test]
fn bf16_is_as_good_as_its_stores() {
    let mut cases: Vec<Case> =
        [8, 32, 64, 128, 40].iter().map(|k| Case::dense(&[1, 2, 31, 64, 200, 97], 2, *k)).collect();
    cases.push(Case::dense(&[513], 2, 64).dropout(0.1));
    cases.push(Case::dense(&[130, 257], 2, 64).sparse(20, 12).dropout(0.1));
    cases.push(Case::dense(&[130, 257], 1, 32).sparse(20, 12));
    for case in cases {
        let (qkv, do_) = (case.qkv::<bf16>(), case.do_::<bf16>());
        let want = oracle(&case, &wide(&qkv), &wide(&do_));
        let p_error = want.o.iter().zip(&want.o_p_rounded).fold(0.0f64, |m, (a, b)| m.max((a - b).abs()));
        for isa in Isa::available() {
            let got = run_on(&case, &qkv, &do_, Some(isa));
            let name = format!("{isa:?} K = {} {:?}", case.head_width, case.lengths);
            let bound = rounding_bound::<bf16>(&want.o, 1e-5);
            assert_close(&format!("{name}: o"), &got.o, &want.o, bound + 2.0 * p_error, 0.0);
            // Scores are exact products summed in f32; lse itself is f32, from probabilities of at least 16 bits.
            assert_close(&format!("{name}: lse"), &got.lse, &want.lse, 2e-5, 2e-6);
            // o enters delta with its own rounding: |do| · |Δo| of a row reaches dS, and from there dq and dk.
            let delta_error = 2.0 * bound * (case.head_width as f64).sqrt();
            let bound = rounding_bound::<bf16>(&want.dqkv, 1e-4) + delta_error;
            assert_close(&format!("{name}: dqkv"), &got.dqkv, &want.dqkv, bound, 0.0);
        }
    }
}

#[test]
fn sparse_without_flags_is_an_error() {
    let case = Case::dense(&[4], 1, 8).sparse(1, 2);
    let dev = Cpu;
    let qkv = guarded::input(&dev, &case.qkv::<f32>());
    let start = guarded::input(&dev, &cell_start(&case.lengths));
    let mut o = guarded::poisoned::<_, f32>(&dev, 32);
    let mut lse = guarded::poisoned::<_, f32>(&dev, 4);
    let input = In { qkv: qkv.buf(), cell_start: start.buf(), global: None, dropout: Dropout::NONE };
    let e = forward(&dev, case.dims(), input, o.buf_mut(), lse.buf_mut()).unwrap_err();
    assert!(e.to_string().contains("global"), "{e}");
}
