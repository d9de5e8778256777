//! The refine objective against a torch implementation, by finite differences of an f64 oracle, and term by term.

mod common;

use cellrefine::cpu::Cpu;
use cellrefine::device::Device;
use cellrefine::model::ledger::Ledger;
use cellrefine::objective::{CellTargets, Losses, Objective, ObjectiveConfig, SLOTS, Start, Teacher};
use cellrefine::rng::Philox;
use common::cases::by_threads;
use common::guarded;

/// One batch, its table, and what the objective is to work on. C cells, D wide, P types, N in the table.
#[derive(Clone)]
struct Case {
    config: ObjectiveConfig,
    types: usize,
    width: usize,
    labels: Vec<i32>,         // (N)
    scores: Option<Vec<f32>>, // (N, P)
    teacher: Vec<f32>,        // (N, D), exact in f16
    prototypes: Vec<f32>,     // (P, D)
    jaccard: Vec<f32>,        // (P, P)
    batch: Vec<u32>,          // (C)
    h: Vec<f32>,              // (C, D)
    q: Vec<f32>,              // (P, D)
}

#[derive(Debug, Clone, PartialEq)]
struct Step {
    losses: Losses,
    dh: Vec<f32>,
    dq: Vec<f32>,
    scalars: Vec<f64>,
}

impl Case {
    fn random(seed: u64, cells: usize, types: usize, width: usize, config: ObjectiveConfig) -> Case {
        let table = cells + 5;
        let mut rng = Philox::new(seed, 0, 77);
        let mean: Vec<f64> = (0..width).map(|_| 2.0 * rng.normal()).collect();
        let mut rows = |n: usize, grid: f64| -> Vec<f32> {
            let x = (0..n * width).map(|i| mean[i % width] + rng.normal());
            x.map(|x| ((x * grid).round() / grid) as f32).collect()
        };
        // Multiples of 1/64 are exact in f16.
        let (teacher, prototypes) = (rows(table, 64.0), rows(types, 1e6));
        let (h, q) = (rows(cells, 1e6), rows(types, 1e6));
        let mut jaccard = vec![1.0f32; types * types];
        for k in 0..types {
            for l in 0..k {
                let j = 0.5 * rng.uniform() as f32;
                (jaccard[k * types + l], jaccard[l * types + k]) = (j, j);
            }
        }
        let mut batch: Vec<u32> = (0..table as u32).collect();
        rng.shuffle(&mut batch);
        batch.truncate(cells);
        Case {
            labels: (0..table).map(|_| rng.below(types as u64 + 1) as i32 - 1).collect(),
            scores: Some((0..table * types).map(|_| 1.5 * rng.normal() as f32).collect()),
            config,
            types,
            width,
            teacher,
            prototypes,
            jaccard,
            batch,
            h,
            q,
        }
    }

    fn targets(&self) -> CellTargets {
        CellTargets::new(&self.labels, self.scores.as_deref(), self.types, &self.config).unwrap()
    }

    /// One step on the CPU: NaN in dh, guard words round it, ones in dq.
    fn step(&self) -> Step {
        let (dev, targets) = (Cpu, self.targets());
        let mut teacher = Teacher::new(self.width);
        teacher.push(&self.teacher).unwrap();
        let mut objective = Objective::planned(
            &mut Ledger::new(&dev),
            self.config.clone(),
            self.types,
            self.width,
            self.batch.len() + 3,
            targets.entries(),
        )
        .unwrap();
        let start = Start { prototypes: &self.prototypes, jaccard: &self.jaccard, teacher, targets };
        objective.start(&dev, start).unwrap();
        let (q, dq) = objective.parameters();
        dev.write(q, &self.q).unwrap();
        dev.write(dq, &vec![1.0f32; self.q.len()]).unwrap();
        let h = dev.upload(&self.h).unwrap();
        let mut dh = guarded::poisoned::<_, f32>(&dev, self.h.len());
        let mut scalars = dev.upload(&[-7.0f64; SLOTS + 1]).unwrap();
        objective.step(&dev, &self.batch, &h, dh.buf_mut(), &mut scalars, 1).unwrap();
        let dq = dev.download(objective.gradient()).unwrap();
        Step {
            losses: objective.losses(&scalars[1..], self.batch.len()),
            dh: dh.read(),
            dq: dq[..self.q.len()].iter().map(|x| x - 1.0).collect(),
            scalars: scalars.to_vec(),
        }
    }
}

fn unit(x: &[f64], center: &[f64]) -> Vec<f64> {
    let moved: Vec<f64> = x.iter().zip(center).map(|(x, c)| x - c).collect();
    let norm = moved.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-12);
    moved.iter().map(|x| x / norm).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn lse(s: &[f64]) -> f64 {
    let top = s.iter().cloned().fold(f64::MIN, f64::max);
    top + s.iter().map(|s| (s - top).exp()).sum::<f64>().ln()
}

/// The terms as the method writes them, one cell and one pair at a time, at h and q given in f64.
fn oracle(c: &Case, h: &[f64], q: &[f64]) -> Losses {
    let (o, d, p) = (&c.config, c.width, c.types);
    let wide = |x: &[f32]| x.iter().map(|x| *x as f64).collect::<Vec<f64>>();
    let rows = |x: &[f64], center: &[f64]| x.chunks(d).map(|x| unit(x, center)).collect::<Vec<_>>();
    let (teacher, targets) = (wide(&c.teacher), c.targets());
    let mean = |j: usize| teacher.iter().skip(j).step_by(d).sum::<f64>() / (teacher.len() / d) as f64;
    let center: Vec<f64> = (0..d).map(|j| if o.center { mean(j) } else { 0.0 }).collect();
    let (z, pr) = (rows(h, &center), rows(q, &center));
    let (all_z0, p0) = (rows(&teacher, &center), rows(&wide(&c.prototypes), &center));
    let z0: Vec<&Vec<f64>> = c.batch.iter().map(|i| &all_z0[*i as usize]).collect();
    let class: Vec<i32> = c.batch.iter().map(|i| targets.class()[*i as usize]).collect();
    let guess: Vec<i32> = c.batch.iter().map(|i| targets.guess()[*i as usize]).collect();
    let n: Vec<f64> = targets.counts().iter().map(|n| (*n).max(1) as f64).collect();
    let j = |k: usize, l: usize| c.jaccard[k * p + l] as f64;
    let size = c.batch.len() as f64;

    let number = |k: usize| {
        if o.beta == 0.0 { 1.0 } else { (1.0 - o.beta as f64) / (1.0 - (o.beta as f64).powf(n[k])) }
    };
    let mean_number = (0..p).map(number).sum::<f64>() / p as f64;
    let rarest = n.iter().map(|n| n.powf(-0.25)).fold(0.0, f64::max);
    let (mut proto, mut total_weight) = (0.0, 0.0);
    for (i, cell) in c.batch.iter().enumerate() {
        if class[i] < 0 {
            continue;
        }
        let (y, cell) = (class[i] as usize, *cell as usize);
        let mut t = vec![0.0; p];
        let epsilon = if p > 1 { o.epsilon as f64 } else { 0.0 };
        let teacher_s: Vec<f64> = p0.iter().map(|p0| dot(z0[i], p0) / o.tau as f64).collect();
        for (m, a) in targets.columns(cell).iter().zip(targets.masses(cell)).filter(|(m, _)| **m >= 0) {
            let (m, a) = (*m as usize, *a as f64);
            t[m] += (1.0 - epsilon - o.delta as f64) * a;
            let e = |k: usize| (j(m, k) / o.tau_overlap as f64).exp();
            let sum: f64 = (0..p).filter(|k| *k != m).map(e).sum();
            (0..p).filter(|k| *k != m).for_each(|k| t[k] += epsilon * a * e(k) / sum);
        }
        for (t, s) in t.iter_mut().zip(&teacher_s) {
            *t += o.delta as f64 * (s - lse(&teacher_s)).exp();
        }
        let margin = |k: usize| if k == y { o.margin as f64 * n[k].powf(-0.25) / rarest } else { 0.0 };
        let bias = |k: usize| o.logit_adjustment as f64 * (n[k] / n.iter().sum::<f64>()).ln();
        let s: Vec<f64> = (0..p).map(|k| (dot(&z[i], &pr[k]) - margin(k)) / o.tau as f64 + bias(k)).collect();
        let weight = number(y) / mean_number;
        proto += weight * (lse(&s) - dot(&t, &s));
        total_weight += weight;
    }

    let mut cell_cell = 0.0;
    for i in 0..z.len() {
        let positive = |a: usize| a != i && class[i] >= 0 && class[a] == class[i];
        let positives: Vec<usize> = (0..z.len()).filter(|a| positive(*a)).collect();
        let s = |a: usize| dot(&z[i], &z[a]) / o.tau_cell as f64;
        let count = |a: usize| guess.iter().filter(|g| **g == guess[a]).count() as f64;
        let beta = |a: usize| {
            let n = if guess[a] < 0 { 1.0 } else { count(a) };
            -(n - f64::from(u8::from(positive(a)))).max(1.0).ln()
        };
        let others: Vec<f64> = (0..z.len()).filter(|a| *a != i).map(|a| s(a) + beta(a)).collect();
        for a in &positives {
            cell_cell += (lse(&others) - s(*a)) / positives.len() as f64 / size;
        }
    }

    let mut structure = 0.0;
    for k in 0..p {
        for l in (0..p).filter(|l| *l != k) {
            let wanted = o.overlap_low as f64 + (o.overlap_high as f64 - o.overlap_low as f64) * j(k, l);
            structure += (dot(&pr[k], &pr[l]) - wanted).powi(2) / (p * (p - 1)) as f64;
        }
    }
    let cells: f64 = z.iter().zip(&z0).map(|(z, z0)| (1.0 - dot(z, z0)) / size).sum();
    let types: f64 = pr.iter().zip(&p0).map(|(a, b)| (1.0 - dot(a, b)) / p as f64).sum();
    let on = |weight: f32, trains: bool| f64::from(u8::from(weight > 0.0 && (trains || o.trainable)));
    let mut losses = Losses {
        proto: on(o.proto, true) * proto / total_weight.max(1e-6),
        cell_cell: on(o.cell_cell, true) * cell_cell,
        structure: on(o.structure, false) * structure,
        anchor: on(o.anchor, true) * (cells + on(1.0, false) * o.prototype_anchor as f64 * types),
        total: 0.0,
    };
    losses.total = o.proto as f64 * losses.proto
        + o.cell_cell as f64 * losses.cell_cell
        + o.structure as f64 * losses.structure
        + o.anchor as f64 * losses.anchor;
    losses
}

fn assert_losses(got: &Losses, want: &Losses, what: &str) {
    for (name, a, b) in [
        ("proto", got.proto, want.proto),
        ("cell_cell", got.cell_cell, want.cell_cell),
        ("structure", got.structure, want.structure),
        ("anchor", got.anchor, want.anchor),
        ("total", got.total, want.total),
    ] {
        assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{what}: {name} is {a}, wanted {b}");
    }
}

/// Options that a run may set, all away from their defaults.
fn every_option() -> ObjectiveConfig {
    ObjectiveConfig {
        proto: 0.7,
        cell_cell: 0.5,
        structure: 2.0,
        anchor: 0.4,
        tau: 0.2,
        tau_cell: 0.3,
        epsilon: 0.1,
        delta: 0.3,
        beta: 0.9,
        margin: 0.2,
        logit_adjustment: 1.0,
        tau_marker: 0.5,
        confidence: 0.6,
        overlap_low: -0.1,
        prototype_anchor: 0.5,
        target_entries: 3,
        ..Default::default()
    }
}

/// Central differences of the oracle against dh and dq of the product.
#[test]
fn gradients_by_finite_differences() {
    let frozen = ObjectiveConfig { trainable: false, center: false, ..every_option() };
    let cases = [
        ("defaults", Case::random(1, 9, 4, 6, ObjectiveConfig::default())),
        ("every option", Case::random(2, 12, 5, 7, every_option())),
        ("frozen, not centred", Case::random(3, 8, 3, 5, frozen)),
        ("one type", Case::random(4, 6, 1, 5, ObjectiveConfig::default())),
    ];
    for (what, case) in cases {
        let got = case.step();
        let wide = |x: &[f32]| x.iter().map(|x| *x as f64).collect::<Vec<f64>>();
        let (h, q) = (wide(&case.h), wide(&case.q));
        assert_losses(&got.losses, &oracle(&case, &h, &q), what);
        let largest = |x: &[f32]| x.iter().fold(1e-3f64, |m, x| m.max(x.abs() as f64));
        let step = 1e-5;
        for i in 0..h.len() {
            let at = |by: f64| {
                let mut h = h.clone();
                h[i] += by;
                oracle(&case, &h, &q).total
            };
            let slope = (at(step) - at(-step)) / (2.0 * step);
            let off = (slope - got.dh[i] as f64).abs();
            assert!(off < 1e-5 * largest(&got.dh).max(0.1), "{what}: dh[{i}] {} slope {slope}", got.dh[i]);
        }
        for i in 0..q.len() {
            let at = |by: f64| {
                let mut q = q.clone();
                q[i] += by;
                oracle(&case, &h, &q).total
            };
            let slope = if case.config.trainable { (at(step) - at(-step)) / (2.0 * step) } else { 0.0 };
            let off = (slope - got.dq[i] as f64).abs();
            assert!(off < 1e-5 * largest(&got.dq).max(0.1), "{what}: dq[{i}] {} slope {slope}", got.dq[i]);
        }
    }
}

/// `scripts/golden/make_objective.py`: torch in f64, gradients by autograd.
#[test]
fn equals_torch() {
    let golden: serde_json::Value = serde_json::from_str(include_str!("golden/objective.json")).unwrap();
    for golden in golden.as_array().unwrap() {
        let what = golden["name"].as_str().unwrap();
        let floats = |name: &str| -> Vec<f32> {
            let rows = golden[name].as_array().unwrap().iter();
            rows.flat_map(|r| r.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32)).collect()
        };
        let integers = |name: &str| {
            golden[name].as_array().unwrap().iter().map(|x| x.as_i64().unwrap()).collect::<Vec<_>>()
        };
        let case = Case {
            config: serde_json::from_value(golden["objective"].clone()).unwrap(),
            types: golden["q"].as_array().unwrap().len(),
            width: golden["q"][0].as_array().unwrap().len(),
            labels: integers("labels").iter().map(|x| *x as i32).collect(),
            scores: Some(floats("scores")),
            teacher: floats("teacher"),
            prototypes: floats("prototypes"),
            jaccard: floats("jaccard"),
            batch: integers("batch").iter().map(|x| *x as u32).collect(),
            h: floats("h"),
            q: floats("q"),
        };
        let got = case.step();
        let loss = |name: &str| golden["losses"][name].as_f64().unwrap();
        let want = Losses {
            proto: loss("proto"),
            cell_cell: loss("cell_cell"),
            structure: loss("structure"),
            anchor: loss("anchor"),
            total: loss("total"),
        };
        assert_losses(&got.losses, &want, what);
        for (name, got) in [("dh", &got.dh), ("dq", &got.dq)] {
            let want: Vec<f64> = floats(name).iter().map(|x| *x as f64).collect();
            common::close::assert_rounded(&format!("{what}: {name}"), got, &want, 1e-5);
        }
    }
}

/// Each weight at 0: the other terms' values do not move, the gradient is the one without that term, and the term's slot is
/// never written.
#[test]
fn a_weight_of_zero_skips_its_term() {
    let whole = Case::random(5, 11, 4, 6, every_option());
    let all = whole.step();
    type Pick = fn(&mut ObjectiveConfig) -> &mut f32;
    let terms: [(Pick, usize); 4] =
        [(|c| &mut c.proto, 0), (|c| &mut c.cell_cell, 1), (|c| &mut c.structure, 2), (|c| &mut c.anchor, 3)];
    let mut sum_dh = vec![0.0f64; all.dh.len()];
    let mut sum_dq = vec![0.0f64; all.dq.len()];
    for (pick, slot) in terms {
        let mut without = whole.clone();
        *pick(&mut without.config) = 0.0;
        let got = without.step();
        for s in 0..SLOTS {
            let off = s == slot || (slot == 3 && s == 4);
            assert_eq!(
                got.scalars[1 + s],
                if off { -7.0 } else { all.scalars[1 + s] },
                "slot {s} without {slot}"
            );
        }
        let wide = |x: &[f32]| x.iter().map(|x| *x as f64).collect::<Vec<f64>>();
        assert_losses(&got.losses, &oracle(&without, &wide(&without.h), &wide(&without.q)), "without a term");
        // Alone = all - without: terms add up.
        let mut alone = whole.clone();
        for (other, _) in terms {
            if other as usize != pick as usize {
                *other(&mut alone.config) = 0.0;
            }
        }
        let alone = alone.step();
        for ((sum, a), (x, y)) in sum_dh.iter_mut().zip(&alone.dh).zip(all.dh.iter().zip(&got.dh)) {
            *sum += *a as f64;
            assert!((x - y - a).abs() < 1e-5);
        }
        sum_dq.iter_mut().zip(&alone.dq).for_each(|(s, a)| *s += *a as f64);
    }
    for (sum, all) in sum_dh.iter().zip(&all.dh).chain(sum_dq.iter().zip(&all.dq)) {
        assert!((sum - *all as f64).abs() < 1e-5);
    }
    let mut nothing = whole.clone();
    terms.iter().for_each(|(pick, _)| *pick(&mut nothing.config) = 0.0);
    let got = nothing.step();
    assert_eq!(got.scalars, [-7.0; SLOTS + 1]);
    assert!(got.dh.iter().chain(&got.dq).all(|x| *x == 0.0));
    assert_eq!(got.losses, Losses::default());
}

#[test]
fn same_bits_for_any_number_of_threads() {
    let case = Case::random(6, 150, 30, 64, every_option());
    let [one, two, three] = by_threads(|| case.step());
    assert!(one == two && one == three);
}

/// Cells without a target have no part in the class terms; a batch of such cells still has its anchor.
#[test]
fn a_batch_without_targets() {
    let mut case = Case::random(7, 10, 3, 6, ObjectiveConfig::default());
    (case.labels, case.scores) = (vec![-1; 15], None);
    let other = (0..15).find(|i| !case.batch.contains(i)).unwrap();
    case.labels[other as usize] = 1;
    let got = case.step();
    assert_eq!((got.losses.proto, got.losses.cell_cell), (0.0, 0.0));
    assert!(got.losses.anchor > 0.0 && got.dh.iter().all(|x| x.is_finite()));
}

#[test]
fn what_does_not_fit_is_refused() {
    let case = Case::random(8, 4, 3, 5, ObjectiveConfig::default());
    let dev = Cpu;
    let targets = case.targets();
    let mut objective =
        Objective::planned(&mut Ledger::new(&dev), case.config.clone(), 3, 5, 4, targets.entries()).unwrap();
    let teacher = || {
        let mut t = Teacher::new(5);
        t.push(&case.teacher).unwrap();
        t
    };
    let short = Start {
        prototypes: &case.prototypes[1..],
        jaccard: &case.jaccard,
        teacher: teacher(),
        targets: targets.clone(),
    };
    assert!(objective.start(&dev, short).is_err());
    let start = Start { prototypes: &case.prototypes, jaccard: &case.jaccard, teacher: teacher(), targets };
    objective.start(&dev, start).unwrap();
    let (h, mut dh) = (dev.zeros::<f32>(25).unwrap(), dev.zeros::<f32>(25).unwrap());
    let mut scalars = dev.zeros::<f64>(SLOTS).unwrap();
    assert!(objective.step(&dev, &[0, 1, 2, 3, 4], &h, &mut dh, &mut scalars, 0).is_err(), "five cells");
    assert!(objective.step(&dev, &[0, 9], &h, &mut dh, &mut scalars, 0).is_err(), "no cell 9");
    assert!(Teacher::new(2).push(&[1.0, f32::NAN]).is_err());
}
