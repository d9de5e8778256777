//! Cases of the streaming softmax loss, its materialised f64 oracle, and a run of the op between guard words.

use super::guarded::{self, Sample};
use cellrefine::device::Act;
use cellrefine::ops::prototype_loss::{
    self, ColumnGradients, Dims, In, Mix, Out, PrototypeLoss, Target, Teacher,
};
use cellrefine::rng::Philox;
use half::bf16;

/// A target of one test case, on the host.
#[derive(Clone)]
pub enum Aim {
    Sparse { entries: usize, column: Vec<i32>, mass: Option<Vec<f32>>, epsilon: f32, delta: f32 },
    Same { row_label: Vec<i32>, column_label: Vec<i32>, first_self: usize, same_bias: Option<Vec<f32>> },
}

/// One call, on the host.
#[derive(Clone)]
pub struct Case {
    pub rows: usize,
    pub columns: usize,
    pub width: usize,
    pub gradient_scale: f32,
    pub bias_in_target: bool,
    pub z: Vec<f32>,
    pub column: Vec<f32>,
    pub scale: Option<Vec<f32>>,
    pub bias: Option<Vec<f32>>,
    pub margin: Option<Vec<f32>>,
    pub weight: Vec<f32>,
    pub aim: Aim,
    pub mix: Vec<f32>,
    pub teacher_z: Vec<f32>,
    pub teacher_column: Vec<f32>,
    pub teacher_scale: f32,
}

pub fn unit_rows(rng: &mut Philox, rows: usize, width: usize) -> Vec<f32> {
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
    pub fn new(seed: u64, rows: usize, columns: usize, width: usize) -> Case {
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
    pub fn everything(mut self, seed: u64, epsilon: f32, delta: f32) -> Case {
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
    pub fn same_label(
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

    pub fn rounded_to_bf16(mut self) -> Case {
        for x in self.z.iter_mut().chain(&mut self.column) {
            *x = bf16::from_f32(*x).to_f32();
        }
        self
    }
}

/// What the oracle and the op both return.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Results {
    pub loss: Vec<f64>,
    pub lse: Vec<f64>,
    pub dz: Vec<f64>,
    pub dcolumn: Vec<f64>,
    pub dbias: Vec<f64>,
    pub dscale: Vec<f64>,
}

pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum()
}

pub fn softmax(s: &[f64]) -> (f64, Vec<f64>) {
    let top = s.iter().cloned().fold(f64::MIN, f64::max);
    let sum: f64 = s.iter().map(|s| (s - top).exp()).sum();
    let lse = top + sum.ln();
    (lse, s.iter().map(|s| (s - lse).exp()).collect())
}

/// Target row, label and excluded column of row `i`; none when the row is skipped.
pub fn target_of(c: &Case, i: usize) -> Option<(Vec<f64>, Option<usize>, Option<usize>)> {
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
pub fn oracle(c: &Case) -> Results {
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
            if let Aim::Same { row_label, column_label, same_bias: Some(b), .. } = &c.aim
                && row_label[i] == column_label[k]
            {
                bias = b[k] as f64;
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
            for (j, z) in z.iter().enumerate() {
                out.dz[i * d + j] += g * scale(k) * c.column[k * d + j] as f64;
                out.dcolumn[k * d + j] += g * scale(k) * *z as f64;
            }
        }
    }
    out
}

/// Runs the op: guard words round every output, NaN in those it sets, ones in those it adds to.
pub fn run<B: PrototypeLoss<A> + PrototypeLoss<f32>, A: Act + Sample>(dev: &B, c: &Case) -> Results {
    let up = |x: &[f32]| dev.upload(x).unwrap();
    // NaN on either side of the operands: a read beyond them shows in the result. The first buffer owns the second's memory.
    let act = |x: &[f32]| {
        let nan = std::iter::repeat_n(f32::NAN, 64);
        let all: Vec<A> = nan.clone().chain(x.iter().copied()).chain(nan).map(A::from_f32).collect();
        let whole = dev.upload(&all).unwrap();
        // SAFETY: nothing uses `whole` while the op reads its part.
        let part = unsafe { dev.part(&whole, 64..64 + x.len()) };
        (whole, part)
    };
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
    let mut teacher_lse = guarded::poisoned::<_, f32>(dev, c.rows);
    prototype_loss::lse::<f32, B>(
        dev,
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
        z: &z.1,
        column: &column.1,
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
    let mut loss = guarded::poisoned(dev, c.rows);
    let mut lse = guarded::poisoned(dev, c.rows);
    let mut dz = guarded::poisoned::<_, A>(dev, c.rows * c.width);
    let out = Out { loss: loss.buf_mut(), lse: lse.buf_mut(), dz: dz.buf_mut(), accumulate_dz: false };
    prototype_loss::forward::<A, B>(dev, dims, input(), out).unwrap();
    let ones = |n: usize| guarded::input(dev, &vec![1.0f32; n]);
    let (mut dcolumn, mut dbias, mut dscale) = (ones(c.columns * c.width), ones(c.columns), ones(c.columns));
    let grads = ColumnGradients {
        column: dcolumn.buf_mut(),
        bias: Some(dbias.buf_mut()),
        scale: Some(dscale.buf_mut()),
    };
    prototype_loss::backward::<A, B>(dev, dims, input(), lse.buf(), grads).unwrap();
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
pub fn assert_close(c: &Case, got: &Results, want: &Results, tolerance: f64, what: &str) {
    assert_products_close(c, got, want, tolerance, [tolerance; 2], what);
}

/// The same with bounds of their own for dz and dcolumn, whose factors or results may be rounded to the activation type.
#[track_caller]
pub fn assert_products_close(
    c: &Case,
    got: &Results,
    want: &Results,
    tolerance: f64,
    [dz, dcolumn]: [f64; 2],
    what: &str,
) {
    let largest = |x: &[f64]| x.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let kappa = c.weight.iter().fold(0.0f64, |m, w| m.max(*w as f64));
    let term = kappa * c.scale.as_ref().map_or(1.0, |s| s.iter().fold(0.0f64, |m, s| m.max(*s as f64)));
    for (name, a, b, floor, tolerance) in [
        ("loss", &got.loss, &want.loss, kappa * largest(&want.lse), tolerance),
        ("lse", &got.lse, &want.lse, 0.02, tolerance),
        ("dz", &got.dz, &want.dz, term, dz),
        ("dcolumn", &got.dcolumn, &want.dcolumn, term.max(0.02), dcolumn),
        ("dbias", &got.dbias, &want.dbias, kappa.max(0.02), tolerance),
        ("dscale", &got.dscale, &want.dscale, kappa.max(0.02), tolerance),
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
