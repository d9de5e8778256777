//! Unit rows, the anchor and the structure term: f64 oracles, finite differences, guard words, poison, threads.

use crate::common::cases::{by_threads, normal, rows_by_widths};
use crate::common::close::{assert_close, assert_same_bits, wide};
use crate::common::guarded;
use cellrefine::ops::{anchor, normalize, structure};

on_every_backend!(
    unit_rows_and_their_gradient,
    a_row_on_the_center_is_zero_and_a_nan_stays,
    anchor_by_its_definition,
    structure_by_its_definition_and_by_differences,
    same_bits_for_any_number_of_threads,
);
on_emulated!(
    unit_rows_and_their_gradient,
    a_row_on_the_center_is_zero_and_a_nan_stays,
    anchor_by_its_definition,
    structure_by_its_definition_and_by_differences,
    same_bits_for_any_number_of_threads,
);

/// (h - c) / max(‖h - c‖, 1e-12) in f64.
fn unit(h: &[f64], center: &[f64], width: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut z, mut inverse) = (Vec::new(), Vec::new());
    for row in h.chunks(width) {
        let moved: Vec<f64> = row.iter().zip(center).map(|(h, c)| h - c).collect();
        let r = 1.0 / moved.iter().map(|x| x * x).sum::<f64>().max(1e-24).sqrt();
        z.extend(moved.iter().map(|x| x * r));
        inverse.push(r);
    }
    (z, inverse)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn unit_rows_and_their_gradient<B: normalize::Normalize>(dev: &B) {
    for (seed, (rows, width)) in rows_by_widths().enumerate() {
        let (seed, n) = (seed as u64, rows * width);
        let dims = normalize::Dims { rows, width };
        let (h, c, dz) = (
            normal::<f32>(seed, n, 2.0),
            normal::<f32>(seed + 1000, width, 1.0),
            normal::<f32>(seed, n, 1.0),
        );
        for center in [None, Some(guarded::input(dev, &c))] {
            let zeros = vec![0.0; width];
            let c64 = if center.is_some() { wide(&c) } else { zeros };
            let (z64, inverse64) = unit(&wide(&h), &c64, width);
            let input = guarded::input(dev, &h);
            let (mut z, mut inverse) = (guarded::poisoned(dev, n), guarded::poisoned(dev, rows));
            normalize::forward(
                dev,
                dims,
                input.buf(),
                center.as_ref().map(|c| c.buf()),
                z.buf_mut(),
                inverse.buf_mut(),
            )
            .unwrap();
            assert_close("z", &z.read(), &z64, 1e-6, 1e-6);
            assert_close("inverse_norm", &inverse.read(), &inverse64, 0.0, 2e-6);
            // dh against differences of f(h) = dz · z(h), in f64.
            let dz64 = wide(&dz);
            let step = 1e-6;
            let slope: Vec<f64> = (0..n)
                .map(|i| {
                    let row = i / width * width;
                    let at = |by: f64| {
                        let mut h = wide(&h[row..row + width]);
                        h[i - row] += by;
                        dot(&unit(&h, &c64, width).0, &dz64[row..row + width])
                    };
                    (at(step) - at(-step)) / (2.0 * step)
                })
                .collect();
            let size = inverse64.iter().fold(0.0f64, |m, r| m.max(*r));
            let dz = guarded::input(dev, &dz);
            let mut dh = guarded::poisoned::<_, f32>(dev, n);
            normalize::backward(dev, dims, dz.buf(), z.buf(), inverse.buf(), false, dh.buf_mut()).unwrap();
            assert_close("dh", &dh.read(), &slope, 1e-5 * size.max(1.0), 1e-5);
            let mut sum = guarded::input(dev, &vec![1.0f32; n]);
            normalize::backward(dev, dims, dz.buf(), z.buf(), inverse.buf(), true, sum.buf_mut()).unwrap();
            let added: Vec<f32> = dh.read().iter().map(|d| 1.0 + d).collect();
            assert_close("dh +=", &sum.read(), &wide(&added), 1e-6 * size.max(1.0), 1e-6);
        }
    }
}

fn a_row_on_the_center_is_zero_and_a_nan_stays<B: normalize::Normalize>(dev: &B) {
    let h = dev.upload(&[1.0f32, 2.0, f32::NAN, 2.0, 1e30, 1e30]).unwrap();
    let c = dev.upload(&[1.0f32, 2.0]).unwrap();
    let (mut z, mut inverse) = (dev.zeros(6).unwrap(), dev.zeros(3).unwrap());
    normalize::forward(dev, normalize::Dims { rows: 3, width: 2 }, &h, Some(&c), &mut z, &mut inverse)
        .unwrap();
    let (z, inverse) = (dev.download(&z).unwrap(), dev.download(&inverse).unwrap());
    assert_eq!(z[..2], [0.0, 0.0]);
    assert!(z[2].is_nan() && inverse[1].is_nan());
    assert!(z[4].is_nan(), "too large to square: {}", z[4]);
}

fn anchor_by_its_definition<B: anchor::Anchor>(dev: &B) {
    for (seed, (rows, width)) in rows_by_widths().enumerate() {
        let (seed, n) = (seed as u64, rows * width);
        let (z, z0, dz) =
            (normal::<f32>(seed, n, 0.3), normal::<f32>(seed + 99, n, 0.3), normal::<f32>(seed + 7, n, 1.0));
        let (a, b) = (guarded::input(dev, &z), guarded::input(dev, &z0));
        let (mut loss, mut got) = (guarded::poisoned(dev, rows), guarded::input(dev, &dz));
        let dims = anchor::Dims { rows, width, scale: 0.25 };
        anchor::forward_backward(dev, dims, a.buf(), b.buf(), loss.buf_mut(), got.buf_mut()).unwrap();
        let (z, z0) = (wide(&z), wide(&z0));
        let want: Vec<f64> = z.chunks(width).zip(z0.chunks(width)).map(|(z, z0)| 1.0 - dot(z, z0)).collect();
        assert_close("loss", &loss.read(), &want, 1e-5, 1e-6);
        let want: Vec<f64> = dz.iter().zip(&z0).map(|(d, z0)| *d as f64 - 0.25 * z0).collect();
        assert_close("dz", &got.read(), &want, 1e-6, 1e-6);
    }
}

/// Σ_k loss_k and its gradient by differences in f64.
fn structure_by_its_definition_and_by_differences<B: structure::Structure>(dev: &B) {
    for (seed, (n, width)) in [(1, 5), (2, 3), (7, 16), (19, 33)].into_iter().enumerate() {
        let p = normal::<f32>(seed as u64, n * width, 0.5);
        let mut jaccard = vec![1.0f32; n * n];
        for k in 0..n {
            for l in 0..k {
                let j = (k * 31 + l * 17) as f32 % 10.0 / 10.0;
                (jaccard[k * n + l], jaccard[l * n + k]) = (j, j);
            }
        }
        let (c0, c1) = (-0.1, 0.8);
        let term = |p: &[f64], k: usize| -> f64 {
            let others = (0..n).filter(|l| *l != k);
            let e = |l: usize| {
                let wanted = c0 as f64 + (c1 as f64 - c0 as f64) * jaccard[k * n + l] as f64;
                dot(&p[k * width..(k + 1) * width], &p[l * width..(l + 1) * width]) - wanted
            };
            others.map(|l| e(l).powi(2)).sum::<f64>() / (n * (n - 1).max(1)) as f64
        };
        let total = |p: &[f64]| (0..n).map(|k| term(p, k)).sum::<f64>();
        let (buf, j) = (guarded::input(dev, &p), guarded::input(dev, &jaccard));
        let (mut loss, mut dp) = (guarded::poisoned(dev, n), guarded::input(dev, &vec![1.0f32; n * width]));
        let dims = structure::Dims { prototypes: n, width, c0, c1, scale: 0.5 };
        structure::forward_backward(dev, dims, buf.buf(), j.buf(), loss.buf_mut(), dp.buf_mut()).unwrap();
        let p = wide(&p);
        let want: Vec<f64> = (0..n).map(|k| term(&p, k)).collect();
        assert_close("loss", &loss.read(), &want, 1e-6, 1e-5);
        let slope: Vec<f64> = (0..n * width)
            .map(|i| {
                let at = |by: f64| {
                    let mut p = p.clone();
                    p[i] += by;
                    total(&p)
                };
                1.0 + 0.5 * (at(1e-5) - at(-1e-5)) / 2e-5
            })
            .collect();
        assert_close("dp", &dp.read(), &slope, 2e-6, 1e-5);
    }
}

fn same_bits_for_any_number_of_threads<B: normalize::Normalize + anchor::Anchor + structure::Structure>(
    dev: &B,
) {
    let (rows, width) = (300, 70);
    let (h, z0) = (normal::<f32>(1, rows * width, 1.0), normal::<f32>(2, rows * width, 0.1));
    let jaccard = normal::<f32>(3, rows * rows, 0.1);
    let results = by_threads(|| {
        let [h, z0, j] = [&h, &z0, &jaccard].map(|x| dev.upload(x).unwrap());
        let [mut z, mut dz, mut dh] = [0; 3].map(|_| dev.zeros::<f32>(rows * width).unwrap());
        let [mut inverse, mut loss, mut other] = [0; 3].map(|_| dev.zeros::<f32>(rows).unwrap());
        let dims = normalize::Dims { rows, width };
        normalize::forward(dev, dims, &h, None, &mut z, &mut inverse).unwrap();
        anchor::forward_backward(dev, anchor::Dims { rows, width, scale: 0.1 }, &z, &z0, &mut loss, &mut dz)
            .unwrap();
        let structured = structure::Dims { prototypes: rows, width, c0: 0.0, c1: 0.8, scale: 1.0 };
        structure::forward_backward(dev, structured, &z, &j, &mut other, &mut dz).unwrap();
        normalize::backward(dev, dims, &dz, &z, &inverse, false, &mut dh).unwrap();
        [&z, &loss, &other, &dz, &dh].map(|x| dev.download(x).unwrap()).concat()
    });
    assert_same_bits("2 threads", &results[1], &results[0]);
    assert_same_bits("3 threads", &results[2], &results[0]);
}

/// Each fault of the kernel files fails a test of this module.
#[cfg(emulator)]
mod mutants {
    use crate::common::mutants::each_is_caught;

    #[test]
    fn of_normalize_are_caught() {
        each_is_caught("normalize", "unit_rows::");
    }
    #[test]
    fn of_structure_are_caught() {
        each_is_caught("structure", "unit_rows::");
    }
}
