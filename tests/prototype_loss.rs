//! The streaming softmax loss against a materialised f64 oracle, by finite differences, and at its edges.

mod common;

use cellrefine::cpu::Cpu;
use cellrefine::device::Device;
use cellrefine::ops::prototype_loss::{self, Dims, In, Out, Target};
use cellrefine::rng::Philox;
use common::cases::by_threads;
use common::softmax::{Aim, Case, assert_close, dot, oracle, run, unit_rows};
use half::bf16;

/// Rows: one, round a panel, more than a block. Columns: one, round a tile of 120. Widths: odd ones, and whole panels.
const SIZES: [(usize, usize, usize); 7] =
    [(1, 1, 1), (3, 2, 5), (7, 14, 128), (40, 121, 33), (97, 240, 64), (130, 1003, 48), (225, 119, 130)];

#[test]
fn streaming_equals_materialised() {
    for (seed, (rows, columns, width)) in SIZES.into_iter().enumerate() {
        let seed = seed as u64;
        let case = Case::new(seed, rows, columns, width);
        assert_close(
            &case,
            &run::<f32>(&case),
            &oracle(&case),
            1e-5,
            &format!("one-hot {rows}×{columns}×{width}"),
        );
        for (epsilon, delta) in [(0.0, 0.0), (0.1, 0.0), (0.0, 0.2), (0.1, 0.2)] {
            let case = case.clone().everything(seed, epsilon, delta);
            let what = format!("ε {epsilon} δ {delta} {rows}×{columns}×{width}");
            assert_close(&case, &run::<f32>(&case), &oracle(&case), 1e-5, &what);
        }
    }
}

#[test]
fn balanced_supervised_contrast() {
    for (seed, (rows, columns, first_self, width, classes)) in
        [(1, 1, 0, 3, 1), (2, 2, 0, 4, 1), (32, 32, 0, 128, 5), (50, 131, 40, 33, 3), (129, 129, 0, 64, 100)]
            .into_iter()
            .enumerate()
    {
        let case = Case::same_label(seed as u64, rows, columns, first_self, width, classes);
        let what = format!("same label {rows}×{columns}×{width}");
        assert_close(&case, &run::<f32>(&case), &oracle(&case), 1e-5, &what);
    }
}

/// The reference's own words: −mean over positives of (s_ip − LSE over the others of s_ia − log max(1, n_a − 1[positive])).
#[test]
fn balanced_supervised_contrast_by_its_definition() {
    let (n, d) = (24, 16);
    let mut case = Case::same_label(3, n, n, 0, d, 4);
    case.weight = vec![1.0 / n as f32; n];
    let Aim::Same { row_label: label, .. } = &case.aim else { unreachable!() };
    let count = |a: usize| label.iter().filter(|l| **l == label[a]).count() as f64;
    let mut want = 0.0;
    for i in 0..n {
        let positive = |a: usize| a != i && label[a] >= 0 && label[a] == label[i];
        let positives = (0..n).filter(|a| positive(*a)).count() as f64;
        if positives == 0.0 {
            continue;
        }
        let s = |a: usize| 10.0 * dot(&case.z[i * d..(i + 1) * d], &case.z[a * d..(a + 1) * d]);
        // Columns without a label are a class of their own, as negatives.
        let own = |a: usize| f64::from(u8::from(label[a] == label[i]));
        let all = (0..n).filter(|a| *a != i).map(|a| (s(a) - (count(a) - own(a)).max(1.0).ln()).exp());
        let lse = all.sum::<f64>().ln();
        let mean = (0..n).filter(|a| positive(*a)).map(|a| s(a) - lse).sum::<f64>() / positives;
        want -= mean / n as f64;
    }
    let got: f64 = run::<f32>(&case).loss.iter().sum();
    assert!((got - want).abs() < 1e-5 * want.abs(), "{got} {want}");
}

/// A tile boundary, τ = 0.01, equal prototypes and a lone prototype.
#[test]
fn edges_of_the_softmax() {
    for columns in [119, 120, 121, 240, 241] {
        let mut case = Case::new(11, 33, columns, 32);
        case.scale = Some(vec![100.0; columns]);
        assert_close(
            &case,
            &run::<f32>(&case),
            &oracle(&case),
            1e-5,
            &format!("τ = 0.01, {columns} columns"),
        );
        let first = case.column[..32].to_vec();
        case.column.chunks_mut(32).for_each(|c| c.copy_from_slice(&first));
        let got = run::<f32>(&case);
        assert_close(&case, &got, &oracle(&case), 1e-5, "equal prototypes");
        let want = (columns as f64).ln();
        let worst = got.loss.iter().zip(&case.weight).map(|(l, w)| (l / *w as f64 - want).abs());
        assert!(worst.fold(0.0, f64::max) < 1e-4);
    }
    for seed in 0..20 {
        let got = run::<f32>(&Case::new(seed, 50, 1, 37));
        assert!(got.loss.iter().all(|l| *l == 0.0), "one prototype: loss 0");
        assert!(got.dcolumn.iter().all(|d| *d == 0.0) && got.dz.iter().all(|d| d.abs() < 1e-6));
    }
}

#[test]
fn losses_are_never_negative_on_one_hot_targets() {
    let mut case = Case::new(5, 200, 7, 24);
    case.scale = Some(vec![100.0; 7]);
    for i in 0..200 {
        let k = i % 7;
        let column = case.column[k * 24..(k + 1) * 24].to_vec();
        case.z[i * 24..(i + 1) * 24].copy_from_slice(&column);
        let Aim::Sparse { column, .. } = &mut case.aim else { unreachable!() };
        column[i] = k as i32;
    }
    assert!(run::<f32>(&case).loss.iter().all(|l| *l >= 0.0));
}

#[test]
fn skipped_rows_change_nothing() {
    let whole = Case::new(21, 70, 130, 40).everything(21, 0.1, 0.2);
    let mut holes = whole.clone();
    for i in (0..70).filter(|i| i % 3 == 0 || *i > 60) {
        holes.weight[i] = 0.0;
        holes.z[i * 40..(i + 1) * 40].fill(f32::NAN);
    }
    let mut want = whole.clone();
    want.weight.clone_from(&holes.weight);
    assert_close(&holes, &run::<f32>(&holes), &oracle(&want), 1e-5, "rows of weight 0, NaN inside");
    holes.weight.fill(0.0);
    let got = run::<f32>(&holes);
    let all = [got.loss, got.lse, got.dz, got.dcolumn, got.dbias, got.dscale].concat();
    assert!(all.iter().all(|x| *x == 0.0), "all rows masked: everything 0");
    let mut none = whole.clone();
    let Aim::Sparse { column, .. } = &mut none.aim else { unreachable!() };
    column[..30].fill(-1);
    assert_close(&none, &run::<f32>(&none), &oracle(&none), 1e-5, "rows without a target");
}

#[test]
fn columns_of_infinite_bias_are_left_out() {
    let mut case = Case::new(22, 40, 200, 32);
    let mut bias = vec![0.0f32; 200];
    bias[150..].fill(f32::NEG_INFINITY);
    let Aim::Sparse { column, .. } = &mut case.aim else { unreachable!() };
    column.iter_mut().for_each(|k| *k %= 150);
    case.bias = Some(bias);
    let mut fewer = case.clone();
    fewer.columns = 150;
    fewer.column.truncate(150 * 32);
    let (mut got, want) = (run::<f32>(&case), oracle(&fewer));
    assert!(got.dcolumn[150 * 32..].iter().all(|x| *x == 0.0));
    got.dcolumn.truncate(150 * 32);
    got.dbias.truncate(150);
    got.dscale.truncate(150);
    assert_close(&case, &got, &want, 1e-5, "50 columns with bias -∞");
}

#[test]
fn the_order_of_prototypes_does_not_matter() {
    let case = Case::new(31, 60, 250, 48).everything(31, 0.1, 0.2);
    let mut order: Vec<usize> = (0..250).collect();
    Philox::new(31, 3, 77).shuffle(&mut order);
    let mut place = vec![0; 250];
    order.iter().enumerate().for_each(|(to, from)| place[*from] = to);
    let rows = |x: &[f32]| order.iter().flat_map(|k| x[k * 48..(k + 1) * 48].to_vec()).collect::<Vec<f32>>();
    let each = |x: &Option<Vec<f32>>| x.as_ref().map(|x| order.iter().map(|k| x[*k]).collect::<Vec<f32>>());
    let mut shuffled = case.clone();
    shuffled.column = rows(&case.column);
    shuffled.teacher_column = rows(&case.teacher_column);
    (shuffled.scale, shuffled.bias, shuffled.margin) =
        (each(&case.scale), each(&case.bias), each(&case.margin));
    for (k, row) in order.iter().zip(shuffled.mix.chunks_mut(250)) {
        order.iter().zip(row).for_each(|(l, x)| *x = case.mix[k * 250 + l]);
    }
    let Aim::Sparse { column, .. } = &mut shuffled.aim else { unreachable!() };
    column.iter_mut().filter(|k| **k >= 0).for_each(|k| *k = place[*k as usize] as i32);
    let (a, mut b) = (run::<f32>(&case), run::<f32>(&shuffled));
    b.dcolumn = place.iter().flat_map(|k| b.dcolumn[k * 48..(k + 1) * 48].to_vec()).collect();
    b.dbias = place.iter().map(|k| b.dbias[*k]).collect();
    b.dscale = place.iter().map(|k| b.dscale[*k]).collect();
    assert_close(&case, &b, &a, 1e-5, "shuffled prototypes");
}

/// The oracle's own gradients against central differences of its loss: what the other tests lean on.
#[test]
fn the_oracle_passes_finite_differences() {
    let same = {
        let mut c = Case::same_label(42, 12, 20, 4, 9, 3);
        // Rows are free here: dz is the gradient by rows alone.
        c.z = unit_rows(&mut Philox::new(42, 4, 77), 12, 9);
        c
    };
    for case in [Case::new(41, 9, 13, 7).everything(41, 0.1, 0.2), same] {
        let g = oracle(&case);
        let loss = |c: &Case| oracle(c).loss.iter().sum::<f64>() * c.gradient_scale as f64;
        type Pick = fn(&mut Case) -> &mut [f32];
        let parts: [(&str, Pick, &[f64]); 4] = [
            ("z", |c| &mut c.z, &g.dz),
            ("column", |c| &mut c.column, &g.dcolumn),
            ("bias", |c| c.bias.as_mut().unwrap(), &g.dbias),
            ("scale", |c| c.scale.as_mut().unwrap(), &g.dscale),
        ];
        let labelled = matches!(case.aim, Aim::Same { .. });
        for (name, pick, gradient) in parts {
            // With same-label biases, `bias` alone is not all of the bias: the op's dbias is by their sum.
            if labelled && name == "bias" {
                continue;
            }
            for (i, want) in gradient.iter().enumerate() {
                let mut moved = case.clone();
                let x = pick(&mut moved)[i];
                let step = 1e-3 * x.abs().max(0.1);
                let (up, down) = (x + step, x - step);
                pick(&mut moved)[i] = up;
                let high = loss(&moved);
                pick(&mut moved)[i] = down;
                let slope = (high - loss(&moved)) / (up as f64 - down as f64);
                assert!((slope - want).abs() < 2e-4 * want.abs().max(0.05), "d{name}[{i}]: {slope} {want}");
            }
        }
    }
}

#[test]
fn same_bits_for_any_number_of_threads() {
    let one_hot = Case::new(51, 330, 700, 64);
    for case in [one_hot.clone(), one_hot.everything(51, 0.1, 0.2), Case::same_label(51, 200, 200, 0, 64, 9)]
    {
        let [one, two, three] = by_threads(|| (run::<f32>(&case), run::<bf16>(&case)));
        assert!(one == two && one == three);
    }
}

/// bf16 inputs are exact in f32, so all but dz, which is stored in bf16, keeps the f32 bound.
#[test]
fn bf16_rounds_only_at_the_store() {
    for (seed, (rows, columns, width)) in SIZES.into_iter().enumerate() {
        let case = Case::new(seed as u64, rows, columns, width).rounded_to_bf16();
        let (mut got, mut want) = (run::<bf16>(&case), oracle(&case));
        let dz: Vec<bf16> = got.dz.iter().map(|x| bf16::from_f64(*x)).collect();
        common::close::assert_rounded("dz", &dz, &want.dz, 1e-5);
        got.dz.clear();
        want.dz.clear();
        assert_close(&case, &got, &want, 1e-5, &format!("bf16 {rows}×{columns}×{width}"));
    }
}

#[test]
fn a_nan_anywhere_reaches_the_loss() {
    for at in 0..4 {
        let mut case = Case::new(61, 40, 130, 32);
        match at {
            0 => case.z[37] = f32::NAN,
            1 => case.column[125 * 32 + 1] = f32::NAN,
            2 => case.column[3] = f32::NAN,
            _ => case.weight[7] = f32::NAN,
        }
        assert!(run::<f32>(&case).loss.iter().any(|l| l.is_nan()), "case {at}");
    }
}

#[test]
fn wrong_sizes_are_refused() {
    let dev = Cpu;
    let dims = Dims { rows: 4, columns: 3, width: 2, gradient_scale: 1.0, bias_in_target: true };
    let f = |n: usize| dev.zeros::<f32>(n).unwrap();
    let target = dev.zeros::<i32>(4).unwrap();
    for (z, column, weight) in [(7, 6, 4), (8, 5, 4), (8, 6, 3)] {
        let (z, column, weight) = (f(z), f(column), f(weight));
        let target = Target::Sparse { entries: 1, column: &target, mass: None, mix: None, teacher: None };
        let input =
            In { z: &z, column: &column, scale: None, bias: None, margin: None, row_weight: &weight, target };
        let (mut loss, mut lse, mut dz) = (f(4), f(4), f(8));
        let out = Out { loss: &mut loss, lse: &mut lse, dz: &mut dz, accumulate_dz: false };
        assert!(prototype_loss::forward(&dev, dims, input, out).is_err());
    }
}
