//! The streaming softmax loss against a materialised f64 oracle, by finite differences, and at its edges.

mod common;

use cellrefine::cpu::Cpu;
use cellrefine::device::{Act, Device};
use cellrefine::ops::prototype_loss::{
    self, ColumnGradients, Dims, In, Mix, Out, PrototypeLoss, Target, Teacher,
};
use cellrefine::rng::Philox;
use common::cases::by_threads;
use common::guarded::{self, Sample};
use half::bf16;

/// A target of one test case, on the host.
#[derive(Clone)]
enum Aim {
    Sparse { entries: usize, column: Vec<i32>, mass: Option<Vec<f32>>, epsilon: f32, delta: f32 },
    Same { row_label: Vec<i32>, column_label: Vec<i32>, first_self: usize, same_bias: Option<Vec<f32>> },
}

/// One call, on the host.
#[derive(Clone)]
struct Case {
    rows: usize,
    columns: usize,
    width: usize,
    gradient_scale: f32,
    bias_in_target: bool,
    z: Vec<f32>,
    column: Vec<f32>,
    scale: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
    margin: Option<Vec<f32>>,
    weight: Vec<f32>,
    aim: Aim,
    mix: Vec<f32>,
    teacher_z: Vec<f32>,
    teacher_column: Vec<f32>,
    teacher_scale: f32,
}

fn unit_rows(rng: &mut Philox, rows: usize, width: usize) -> Vec<f32> {
    let mut all = Vec::new();
    for _ in 0..rows {
        let row: Vec<f64> = (0..width).map(|_| rng.normal()).collect();
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        all.extend(row.iter().map(|x| (x / norm) as f32));
    }
    all
}

impl Case {
    /// One-hot targets, unit rows, weights that sum to 1, τ = 0.1.
    fn new(seed: u64, rows: usize, columns: usize, width: usize) -> Case {
        let mut rng = Philox::new(seed, 0, 77);
        let z = unit_rows(&mut rng, rows, width);
        let column = unit_rows(&mut rng, columns, width);
        let target = (0..rows).map(|_| rng.below(columns as u64) as i32).collect();
        let raw: Vec<f64> = (0..rows).map(|_| 0.5 + rng.uniform()).collect();
        let total: f64 = raw.iter().sum();
        let mut mix: Vec<f32> = (0..columns * columns).map(|_| rng.uniform() as f32).collect();
        for row in mix.chunks_mut(columns) {
            let sum: f32 = row.iter().sum();
            row.iter_mut().for_each(|x| *x /= sum);
        }
        Case {
            rows,
            columns,
            width,
            gradient_scale: 1.0,
            bias_in_target: true,
            teacher_z: unit_rows(&mut rng, rows, width),
            teacher_column: unit_rows(&mut rng, columns, width),
            teacher_scale: 8.0,
            z,
            column,
            scale: Some(vec![10.0; columns]),
            bias: None,
            margin: None,
            weight: raw.iter().map(|w| (w / total) as f32).collect(),
            aim: Aim::Sparse { entries: 1, column: target, mass: None, epsilon: 0.0, delta: 0.0 },
            mix,
        }
    }

    /// Every per-column array, uneven scales, weighted target entries with gaps, shares ε and δ.
    fn everything(mut self, seed: u64, epsilon: f32, delta: f32) -> Case {
        let mut rng = Philox::new(seed, 1, 77);
        let p = self.columns;
        self.scale = Some((0..p).map(|_| 5.0 + 10.0 * rng.uniform() as f32).collect());
        self.bias = Some((0..p).map(|_| rng.normal() as f32).collect());
        self.margin = Some((0..p).map(|_| 0.2 * rng.uniform() as f32).collect());
        let (mut column, mut mass) = (Vec::new(), Vec::new());
        for _ in 0..self.rows {
            let a = 0.2 + 0.6 * rng.uniform() as f32;
            column.extend([rng.below(p as u64) as i32, -1, rng.below(p as u64) as i32]);
            mass.extend([a, 0.0, 1.0 - a]);
        }
        self.aim = Aim::Sparse { entries: 3, column, mass: Some(mass), epsilon, delta };
        self.gradient_scale = 0.7;
        self
    }

    /// Balanced supervised contrast of the rows with all columns; row i is column `first_self + i`.
    fn same_label(
        seed: u64,
        rows: usize,
        columns: usize,
        first_self: usize,
        width: usize,
        classes: u64,
    ) -> Case {
        let mut case = Case::new(seed, rows, columns, width);
        let mut rng = Philox::new(seed, 2, 77);
        let label: Vec<i32> = (0..columns).map(|_| rng.below(classes + 1) as i32 - 1).collect();
        let count = |l: i32| label.iter().filter(|x| **x == l).count() as f32;
        case.z = case.column[first_self * width..(first_self + rows) * width].to_vec();
        case.bias = Some(label.iter().map(|l| -count(*l).max(1.0).ln()).collect());
        let same = label.iter().map(|l| -(count(*l) - 1.0).max(1.0).ln()).collect();
        case.bias_in_target = false;
        case.aim = Aim::Same {
            row_label: label[first_self..first_self + rows].to_vec(),
            column_label: label,
            first_self,
            same_bias: Some(same),
        };
        case
    }

    fn rounded_to_bf16(mut self) -> Case {
        for x in self.z.iter_mut().chain(&mut self.column) {
            *x = bf16::from_f32(*x).to_f32();
        }
        self
    }
}

/// What the oracle and the op both return.
#[derive(Debug, Clone, Default, PartialEq)]
struct Results {
    loss: Vec<f64>,
    lse: Vec<f64>,
    dz: Vec<f64>,
    dcolumn: Vec<f64>,
    dbias: Vec<f64>,
    dscale: Vec<f64>,
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum()
}

fn softmax(s: &[f64]) -> (f64, Vec<f64>) {
    let top = s.iter().cloned().fold(f64::MIN, f64::max);
    let sum: f64 = s.iter().map(|s| (s - top).exp()).sum();
    let lse = top + sum.ln();
    (lse, s.iter().map(|s| (s - lse).exp()).collect())
}

/// Target row, label and excluded column of row `i`; none when the row is skipped.
fn target_of(c: &Case, i: usize) -> Option<(Vec<f64>, Option<usize>, Option<usize>)> {
    let (p, d) = (c.columns, c.width);
    let mut t = vec![0.0f64; p];
    match &c.aim {
        Aim::Sparse { entries, column, mass, epsilon, delta } => {
            let main = 1.0 - *epsilon as f64 - *delta as f64;
            let columns = &column[i * entries..(i + 1) * entries];
            if columns.iter().all(|k| *k < 0) {
                return None;
            }
            for (m, k) in columns.iter().enumerate().filter(|(_, k)| **k >= 0) {
                let (k, mass) = (*k as usize, mass.as_ref().map_or(1.0, |x| x[i * entries + m] as f64));
                t[k] += main * mass;
                for (l, t) in t.iter_mut().enumerate() {
                    *t += *epsilon as f64 * mass * c.mix[k * p + l] as f64;
                }
            }
            if *delta > 0.0 {
                let z = &c.teacher_z[i * d..(i + 1) * d];
                let row = c.teacher_column.chunks(d);
                let s: Vec<f64> = row.map(|q| c.teacher_scale as f64 * dot(z, q)).collect();
                t.iter_mut().zip(softmax(&s).1).for_each(|(t, q)| *t += *delta as f64 * q);
            }
            Some((t, (columns[0] >= 0).then_some(columns[0] as usize), None))
        }
        Aim::Same { row_label, column_label, first_self, .. } => {
            let own = first_self + i;
            let same = |k: &usize| row_label[i] >= 0 && column_label[*k] == row_label[i] && *k != own;
            let n = (0..p).filter(same).count();
            (0..p).filter(same).for_each(|k| t[k] = 1.0 / n as f64);
            (n > 0).then_some((t, None, Some(own)))
        }
    }
}

/// The materialised computation in f64. Skipped rows have loss = lse = dz = 0.
fn oracle(c: &Case) -> Results {
    let (r, p, d) = (c.rows, c.columns, c.width);
    let mut out = Results {
        loss: vec![0.0; r],
        lse: vec![0.0; r],
        dz: vec![0.0; r * d],
        dcolumn: vec![0.0; p * d],
        dbias: vec![0.0; p],
        dscale: vec![0.0; p],
    };
    for i in 0..r {
        let z = &c.z[i * d..(i + 1) * d];
        let kappa = c.weight[i] as f64;
        let Some((t, label, excluded)) = target_of(c, i).filter(|_| kappa != 0.0) else { continue };
        let scale = |k: usize| c.scale.as_ref().map_or(1.0, |s| s[k] as f64);
        let (mut cosine, mut s, mut target) = (vec![0.0; p], vec![0.0; p], 0.0);
        for k in 0..p {
            cosine[k] = dot(z, &c.column[k * d..(k + 1) * d]);
            if label == Some(k) {
                cosine[k] -= c.margin.as_ref().map_or(0.0, |m| m[k] as f64);
            }
            let mut bias = c.bias.as_ref().map_or(0.0, |b| b[k] as f64);
            if let Aim::Same { row_label, column_label, same_bias: Some(b), .. } = &c.aim {
                if row_label[i] == column_label[k] {
                    bias = b[k] as f64;
                }
            }
            s[k] = scale(k) * cosine[k] + bias;
            if t[k] > 0.0 {
                target += t[k] * (s[k] - if c.bias_in_target { 0.0 } else { bias });
            }
            if excluded == Some(k) {
                s[k] = f64::NEG_INFINITY;
            }
        }
        let (lse, probability) = softmax(&s);
        out.lse[i] = lse;
        out.loss[i] = kappa * (lse - target);
        for k in 0..p {
            let g = c.gradient_scale as f64 * kappa * (probability[k] - t[k]);
            out.dbias[k] += g;
            out.dscale[k] += g * cosine[k];
            for j in 0..d {
                out.dz[i * d + j] += g * scale(k) * c.column[k * d + j] as f64;
                out.dcolumn[k * d + j] += g * scale(k) * z[j] as f64;
            }
        }
    }
    out
}

/// Runs the op: guard words round every output, NaN in those it sets, ones in those it adds to.
fn run<A: Act + Sample>(c: &Case) -> Results
where
    Cpu: PrototypeLoss<A>,
{
    let dev = Cpu;
    let up = |x: &[f32]| dev.upload(x).unwrap();
    let act = |x: &[f32]| dev.upload(&x.iter().map(|v| A::from_f32(*v)).collect::<Vec<_>>()).unwrap();
    let dims = Dims {
        rows: c.rows,
        columns: c.columns,
        width: c.width,
        gradient_scale: c.gradient_scale,
        bias_in_target: c.bias_in_target,
    };
    let (z, column, weight) = (act(&c.z), act(&c.column), up(&c.weight));
    let [scale, bias, margin] = [&c.scale, &c.bias, &c.margin].map(|x| x.as_deref().map(up));
    let (mix, teacher_z, teacher_column) = (up(&c.mix), up(&c.teacher_z), up(&c.teacher_column));
    let mut teacher_lse = guarded::poisoned::<_, f32>(&dev, c.rows);
    prototype_loss::lse::<f32, Cpu>(
        &dev,
        dims,
        &teacher_z,
        &teacher_column,
        c.teacher_scale,
        teacher_lse.buf_mut(),
    )
    .unwrap();
    let (first, second, mass, same) = match &c.aim {
        Aim::Sparse { column, mass, .. } => (column.clone(), vec![], mass.as_deref().map(up), None),
        Aim::Same { row_label, column_label, same_bias, .. } => {
            (row_label.clone(), column_label.clone(), None, same_bias.as_deref().map(up))
        }
    };
    let (first, second) = (dev.upload(&first).unwrap(), dev.upload(&second).unwrap());
    let input = || In {
        z: &z,
        column: &column,
        scale: scale.as_ref(),
        bias: bias.as_ref(),
        margin: margin.as_ref(),
        row_weight: &weight,
        target: match &c.aim {
            Aim::Sparse { entries, epsilon, delta, .. } => Target::Sparse {
                entries: *entries,
                column: &first,
                mass: mass.as_ref(),
                mix: (*epsilon > 0.0).then_some(Mix { matrix: &mix, share: *epsilon }),
                teacher: (*delta > 0.0).then_some(Teacher {
                    z: &teacher_z,
                    column: &teacher_column,
                    lse: teacher_lse.buf(),
                    scale: c.teacher_scale,
                    share: *delta,
                }),
            },
            Aim::Same { first_self, .. } => Target::SameLabel {
                row_label: &first,
                column_label: &second,
                first_self: *first_self,
                same_bias: same.as_ref(),
            },
        },
    };
    let mut loss = guarded::poisoned(&dev, c.rows);
    let mut lse = guarded::poisoned(&dev, c.rows);
    let mut dz = guarded::poisoned::<_, A>(&dev, c.rows * c.width);
    let out = Out { loss: loss.buf_mut(), lse: lse.buf_mut(), dz: dz.buf_mut(), accumulate_dz: false };
    prototype_loss::forward(&dev, dims, input(), out).unwrap();
    let ones = |n: usize| guarded::input(&dev, &vec![1.0f32; n]);
    let (mut dcolumn, mut dbias, mut dscale) = (ones(c.columns * c.width), ones(c.columns), ones(c.columns));
    let grads = ColumnGradients {
        column: dcolumn.buf_mut(),
        bias: Some(dbias.buf_mut()),
        scale: Some(dscale.buf_mut()),
    };
    prototype_loss::backward(&dev, dims, input(), lse.buf(), grads).unwrap();
    let all = |b: Vec<f32>, minus: f64| b.iter().map(|x| *x as f64 - minus).collect();
    Results {
        loss: all(loss.read(), 0.0),
        lse: all(lse.read(), 0.0),
        dz: dz.read().iter().map(|x| x.to_f32() as f64).collect(),
        dcolumn: all(dcolumn.read(), 1.0),
        dbias: all(dbias.read(), 1.0),
        dscale: all(dscale.read(), 1.0),
    }
}

/// Fails unless each result is within `tolerance` of the array's largest magnitude, or of the terms it is a difference of:
/// κ · lse for losses, κ · scale for gradients. Arrays that are added to start from 1 and keep 6e-8 of that: 0.02.
#[track_caller]
fn assert_close(c: &Case, got: &Results, want: &Results, tolerance: f64, what: &str) {
    let largest = |x: &[f64]| x.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let kappa = c.weight.iter().fold(0.0f64, |m, w| m.max(*w as f64));
    let term = kappa * c.scale.as_ref().map_or(1.0, |s| s.iter().fold(0.0f64, |m, s| m.max(*s as f64)));
    for (name, a, b, floor) in [
        ("loss", &got.loss, &want.loss, kappa * largest(&want.lse)),
        ("lse", &got.lse, &want.lse, 0.02),
        ("dz", &got.dz, &want.dz, term),
        ("dcolumn", &got.dcolumn, &want.dcolumn, term.max(0.02)),
        ("dbias", &got.dbias, &want.dbias, kappa.max(0.02)),
        ("dscale", &got.dscale, &want.dscale, kappa.max(0.02)),
    ] {
        assert_eq!(a.len(), b.len());
        let size = largest(b).max(floor).max(1e-30);
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            let off = (a - b).abs() / size;
            assert!(
                off <= tolerance,
                "{what}: {name}[{i}] is {a:.9e}, wanted {b:.9e}: {off:.1e} of {size:.2e}"
            );
        }
    }
}

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
