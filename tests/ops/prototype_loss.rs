//! The streaming softmax loss against a materialised f64 oracle, by finite differences, and at its edges.

use crate::ActSample;
use crate::common::cases::by_threads;
use crate::common::close::assert_rounded;
use crate::common::softmax::{
    Aim, Case, Results, assert_close, assert_products_close, dot, oracle, run, unit_rows,
};
use cellrefine::cpu::Cpu;
use cellrefine::device::Device;
use cellrefine::ops::prototype_loss::{self, Dims, In, Out, PrototypeLoss, Target};
use cellrefine::rng::Philox;
use half::bf16;

on_every_backend!(A:
    streaming_equals_materialised,
    balanced_supervised_contrast,
    edges_of_the_softmax,
    losses_are_never_negative_on_one_hot_targets,
    skipped_rows_change_nothing,
    columns_of_infinite_bias_are_left_out,
    gradients_are_added_where_asked,
    a_nan_anywhere_reaches_the_loss,
    same_bits_for_any_number_of_threads,
);
on_emulated!(A:
    streaming_equals_materialised,
    balanced_supervised_contrast,
    edges_of_the_softmax,
    losses_are_never_negative_on_one_hot_targets,
    skipped_rows_change_nothing,
    columns_of_infinite_bias_are_left_out,
    gradients_are_added_where_asked,
    a_nan_anywhere_reaches_the_loss,
    same_bits_for_any_number_of_threads,
);

/// Both precisions of the op; the teacher's normaliser is found in f32.
pub trait Loss<A: ActSample>: PrototypeLoss<A> + PrototypeLoss<f32> {}
impl<A: ActSample, B: PrototypeLoss<A> + PrototypeLoss<f32>> Loss<A> for B {}

pub fn emulated<B: Device>(dev: &B) -> bool {
    dev.name().starts_with("emulated")
}

/// The case as the op sees it: operands rounded to the activation type.
pub fn stored<A: ActSample>(case: Case) -> Case {
    if A::IS_F32 { case } else { case.rounded_to_bf16() }
}

/// 1e-5, but for what is rounded to the activation type: dz at its store everywhere; the weights of both products as well where
/// tensor cores take them (2^-9 of each weight, against the largest result).
#[track_caller]
pub fn assert_kept<B: Loss<A>, A: ActSample>(
    dev: &B,
    case: &Case,
    got: &Results,
    want: &Results,
    what: &str,
) {
    let rounded = 1.0 / 256.0;
    let dz = if A::IS_F32 { 1e-5 } else { rounded };
    let dcolumn = if A::IS_F32 || !emulated(dev) { 1e-5 } else { rounded };
    assert_products_close(case, got, want, 1e-5, [dz, dcolumn], &format!("{what} {}", A::NAME));
}

#[track_caller]
pub fn check<B: Loss<A>, A: ActSample>(dev: &B, case: &Case, what: &str) {
    assert_kept::<B, A>(dev, case, &run::<B, A>(dev, case), &oracle(case), what);
}

/// Rows: one, round a panel, more than a block. Columns: one, round a tile of 120. Widths: odd ones, and whole panels.
const SIZES: [(usize, usize, usize); 7] =
    [(1, 1, 1), (3, 2, 5), (7, 14, 128), (40, 121, 33), (97, 240, 64), (130, 1003, 48), (225, 119, 130)];
/// The same for the kernels' tiles. Up to 128 columns take the one-launch kernel in the first pass (and tiles in the second);
/// beyond, one tile more than even, several splits; widths with and without 16-byte rows, and beyond 256, where tiles are others.
const TILE_SIZES: [(usize, usize, usize); 10] = [
    (1, 1, 1),
    (3, 2, 7),
    (17, 128, 32),
    (65, 65, 33),
    (1, 129, 1),
    (3, 131, 7),
    (40, 193, 33),
    (70, 260, 24),
    (18, 130, 200),
    (3, 130, 1150),
];

pub fn streaming_equals_materialised<B: Loss<A>, A: ActSample>(dev: &B) {
    let sizes = if emulated(dev) { &TILE_SIZES[..] } else { &SIZES };
    for (seed, (rows, columns, width)) in sizes.iter().copied().enumerate() {
        let seed = seed as u64;
        let case = stored::<A>(Case::new(seed, rows, columns, width));
        check::<B, A>(dev, &case, &format!("one-hot {rows}×{columns}×{width}"));
        for (epsilon, delta) in [(0.0, 0.0), (0.1, 0.0), (0.0, 0.2), (0.1, 0.2)] {
            if emulated(dev) && width > 30 && (epsilon == 0.0 || delta == 0.0) {
                continue;
            }
            let case = case.clone().everything(seed, epsilon, delta);
            check::<B, A>(dev, &case, &format!("ε {epsilon} δ {delta} {rows}×{columns}×{width}"));
        }
    }
}

pub fn balanced_supervised_contrast<B: Loss<A>, A: ActSample>(dev: &B) {
    for (seed, (rows, columns, first_self, width, classes)) in
        [(1, 1, 0, 3, 1), (2, 2, 0, 4, 1), (32, 32, 0, 128, 5), (50, 131, 40, 33, 3), (129, 129, 0, 64, 100)]
            .into_iter()
            .enumerate()
    {
        let case = stored::<A>(Case::same_label(seed as u64, rows, columns, first_self, width, classes));
        check::<B, A>(dev, &case, &format!("same label {rows}×{columns}×{width}"));
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
    let got: f64 = run::<Cpu, f32>(&Cpu, &case).loss.iter().sum();
    assert!((got - want).abs() < 1e-5 * want.abs(), "{got} {want}");
}

/// A tile boundary, τ = 0.01, equal prototypes and a lone prototype.
pub fn edges_of_the_softmax<B: Loss<A>, A: ActSample>(dev: &B) {
    let columns = if emulated(dev) { [65, 128, 129, 160, 256] } else { [119, 120, 121, 240, 241] };
    for columns in columns {
        let mut case = stored::<A>(Case::new(11, 33, columns, 32));
        case.scale = Some(vec![100.0; columns]);
        check::<B, A>(dev, &case, &format!("τ = 0.01, {columns} columns"));
        let first = case.column[..32].to_vec();
        case.column.chunks_mut(32).for_each(|c| c.copy_from_slice(&first));
        let got = run::<B, A>(dev, &case);
        assert_kept::<B, A>(dev, &case, &got, &oracle(&case), "equal prototypes");
        let want = (columns as f64).ln();
        let worst = got.loss.iter().zip(&case.weight).map(|(l, w)| (l / *w as f64 - want).abs());
        assert!(worst.fold(0.0, f64::max) < 1e-4);
    }
    for seed in 0..if emulated(dev) { 3 } else { 20 } {
        let got = run::<B, A>(dev, &stored::<A>(Case::new(seed, 50, 1, 37)));
        assert!(got.loss.iter().all(|l| *l == 0.0), "one prototype: loss 0");
        assert!(got.dcolumn.iter().all(|d| *d == 0.0) && got.dz.iter().all(|d| d.abs() < 1e-6));
    }
}

pub fn losses_are_never_negative_on_one_hot_targets<B: Loss<A>, A: ActSample>(dev: &B) {
    for columns in [7, 140] {
        never_negative::<B, A>(dev, columns);
    }
}

fn never_negative<B: Loss<A>, A: ActSample>(dev: &B, columns: usize) {
    let rows = if emulated(dev) { 40 } else { 200 };
    let mut case = stored::<A>(Case::new(5, rows, columns, 24));
    case.scale = Some(vec![100.0; columns]);
    for i in 0..rows {
        let k = i % columns;
        let column = case.column[k * 24..(k + 1) * 24].to_vec();
        case.z[i * 24..(i + 1) * 24].copy_from_slice(&column);
        let Aim::Sparse { column, .. } = &mut case.aim else { unreachable!() };
        column[i] = k as i32;
    }
    assert!(run::<B, A>(dev, &case).loss.iter().all(|l| *l >= 0.0));
}

pub fn skipped_rows_change_nothing<B: Loss<A>, A: ActSample>(dev: &B) {
    let whole = stored::<A>(Case::new(21, 70, 130, 40)).everything(21, 0.1, 0.2);
    let mut holes = whole.clone();
    for i in (0..70).filter(|i| i % 3 == 0 || *i > 60) {
        holes.weight[i] = 0.0;
        holes.z[i * 40..(i + 1) * 40].fill(f32::NAN);
    }
    let mut want = whole.clone();
    want.weight.clone_from(&holes.weight);
    let got = run::<B, A>(dev, &holes);
    assert_kept::<B, A>(dev, &holes, &got, &oracle(&want), "rows of weight 0, NaN inside");
    holes.weight.fill(0.0);
    let got = run::<B, A>(dev, &holes);
    let all = [got.loss, got.lse, got.dz, got.dcolumn, got.dbias, got.dscale].concat();
    assert!(all.iter().all(|x| *x == 0.0), "all rows masked: everything 0");
    let mut none = whole.clone();
    let Aim::Sparse { column, .. } = &mut none.aim else { unreachable!() };
    column[..30].fill(-1);
    check::<B, A>(dev, &none, "rows without a target");
}

pub fn columns_of_infinite_bias_are_left_out<B: Loss<A>, A: ActSample>(dev: &B) {
    let mut case = stored::<A>(Case::new(22, 40, 200, 32));
    let mut bias = vec![0.0f32; 200];
    bias[150..].fill(f32::NEG_INFINITY);
    let Aim::Sparse { column, .. } = &mut case.aim else { unreachable!() };
    column.iter_mut().for_each(|k| *k %= 150);
    case.bias = Some(bias);
    let mut fewer = case.clone();
    fewer.columns = 150;
    fewer.column.truncate(150 * 32);
    let (mut got, want) = (run::<B, A>(dev, &case), oracle(&fewer));
    assert!(got.dcolumn[150 * 32..].iter().all(|x| *x == 0.0), "an excluded column has a gradient");
    got.dcolumn.truncate(150 * 32);
    got.dbias.truncate(150);
    got.dscale.truncate(150);
    assert_kept::<B, A>(dev, &case, &got, &want, "50 columns with bias -∞");
}

/// dz is set or added to, and both by the same amount.
pub fn gradients_are_added_where_asked<B: Loss<A>, A: ActSample>(dev: &B) {
    [70, 140].into_iter().for_each(|columns| added_where_asked::<B, A>(dev, columns));
}

fn added_where_asked<B: Loss<A>, A: ActSample>(dev: &B, columns: usize) {
    let (rows, width) = (20, 12);
    let case = stored::<A>(Case::new(71, rows, columns, width));
    let act = |x: &[f32]| dev.upload(&x.iter().map(|x| A::from_f32(*x)).collect::<Vec<_>>()).unwrap();
    let (z, column, weight) = (act(&case.z), act(&case.column), dev.upload(&case.weight).unwrap());
    let Aim::Sparse { column: target, .. } = &case.aim else { unreachable!() };
    let target = dev.upload(target).unwrap();
    let forward = |start: f32, accumulate_dz: bool| {
        let mut dz = act(&vec![start; rows * width]);
        let (mut loss, mut lse) = (dev.zeros(rows).unwrap(), dev.zeros(rows).unwrap());
        let dims = Dims { rows, columns, width, gradient_scale: 1.0, bias_in_target: true };
        let target = Target::Sparse { entries: 1, column: &target, mass: None, mix: None, teacher: None };
        let input =
            In { z: &z, column: &column, scale: None, bias: None, margin: None, row_weight: &weight, target };
        let out = Out { loss: &mut loss, lse: &mut lse, dz: &mut dz, accumulate_dz };
        prototype_loss::forward::<A, B>(dev, dims, input, out).unwrap();
        dev.download(&dz).unwrap()
    };
    let set = forward(f32::NAN, false);
    let added: Vec<A> = set.iter().map(|d| A::from_f32(d.to_f32() + 0.25)).collect();
    let want: Vec<f64> = added.iter().map(|d| d.to_f32() as f64).collect();
    let bound = if A::IS_F32 { 1e-6 } else { 2.0 / 256.0 };
    crate::common::close::assert_close("dz +=", &forward(0.25, true), &want, 0.25 * bound, 0.0);
    assert!(set.iter().any(|d| d.to_f32().abs() > 1e-4), "no gradient at all");
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
    let (a, mut b) = (run::<Cpu, f32>(&Cpu, &case), run::<Cpu, f32>(&Cpu, &shuffled));
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

pub fn same_bits_for_any_number_of_threads<B: Loss<A>, A: ActSample>(dev: &B) {
    let (rows, columns, width) = if emulated(dev) { (150, 180, 20) } else { (330, 700, 64) };
    let one_hot = stored::<A>(Case::new(51, rows, columns, width));
    let same = stored::<A>(Case::same_label(51, rows, rows, 0, width, 9));
    for case in [one_hot.clone(), one_hot.everything(51, 0.1, 0.2), same] {
        let [one, two, three] = by_threads(|| run::<B, A>(dev, &case));
        assert!(one == two && one == three);
    }
}

/// bf16 inputs are exact in f32, so all but dz, which is stored in bf16, keeps the f32 bound.
#[test]
fn bf16_rounds_only_at_the_store() {
    for (seed, (rows, columns, width)) in SIZES.into_iter().enumerate() {
        let case = Case::new(seed as u64, rows, columns, width).rounded_to_bf16();
        let (mut got, mut want) = (run::<Cpu, bf16>(&Cpu, &case), oracle(&case));
        let dz: Vec<bf16> = got.dz.iter().map(|x| bf16::from_f64(*x)).collect();
        assert_rounded("dz", &dz, &want.dz, 1e-5);
        got.dz.clear();
        want.dz.clear();
        assert_close(&case, &got, &want, 1e-5, &format!("bf16 {rows}×{columns}×{width}"));
    }
}

pub fn a_nan_anywhere_reaches_the_loss<B: Loss<A>, A: ActSample>(dev: &B) {
    for (at, columns) in (0..4).flat_map(|at| [(at, 130), (at, 20)]) {
        let mut case = stored::<A>(Case::new(61, 40, columns, 32));
        match at {
            0 => case.z[37] = f32::NAN,
            1 => case.column[(columns - 5) * 32 + 1] = f32::NAN,
            2 => case.column[3] = f32::NAN,
            _ => case.weight[7] = f32::NAN,
        }
        assert!(run::<B, A>(dev, &case).loss.iter().any(|l| l.is_nan()), "case {at}");
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

/// A few cases that pass through every path of the kernels, quick enough to be run for every fault of the mutants.
#[cfg(emulator)]
mod faults {
    use super::*;
    use crate::common::mutants::each_is_caught;

    on_emulated!(A: one_of_each);

    fn one_of_each<B: Loss<A>, A: ActSample>(dev: &B) {
        for (rows, columns, width) in [(17, 40, 9), (70, 193, 16), (20, 150, 264)] {
            let case = stored::<A>(Case::new(81, rows, columns, width));
            check::<B, A>(dev, &case, &format!("one-hot {rows}×{columns}×{width}"));
            let mut want = case.everything(81, 0.1, 0.2);
            want.weight.iter_mut().step_by(5).for_each(|w| *w = 0.0);
            let mut holes = want.clone();
            holes.z.chunks_mut(width).step_by(5).for_each(|z| z.fill(f32::NAN));
            let got = run::<B, A>(dev, &holes);
            assert_kept::<B, A>(dev, &holes, &got, &oracle(&want), &format!("all {rows}×{columns}×{width}"));
        }
        for (rows, columns, first_self, width) in [(20, 60, 30, 9), (50, 131, 40, 33)] {
            let case = stored::<A>(Case::same_label(82, rows, columns, first_self, width, 3));
            check::<B, A>(dev, &case, &format!("same label {rows}×{columns}×{width}"));
        }
    }

    #[test]
    fn of_the_streaming_kernels_are_caught() {
        each_is_caught("prototype_loss", "prototype_loss::faults::");
    }
    #[test]
    fn of_the_totals_are_caught() {
        each_is_caught("prototype_loss_total", "prototype_loss::faults::");
    }
    #[test]
    fn of_the_one_launch_kernel_are_caught() {
        each_is_caught("prototype_loss_small", "prototype_loss::faults::");
    }
}
