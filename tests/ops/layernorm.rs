//! LayerNorm with residual, dropout and the ReLU in front of it, in both directions.

use crate::common::close::{assert_close, assert_rounded, assert_same_bits, rounding_bound, wide};
use crate::common::guarded::{input, poisoned};
use crate::common::{cases, naive};
use crate::{ActSample, DROPOUT};
use cellrefine::device::Dropout;
use cellrefine::ops::layernorm;

on_every_backend!(A: forward, backward, dropout_does_not_depend_on_the_batch_split);
on_emulated!(A: forward, backward, dropout_does_not_depend_on_the_batch_split);
mutants!("layernorm");

/// The four shapes of a LayerNorm call: with and without residual and dropout. A backward call with neither also masks by
/// the ReLU that its input came out of.
const BRANCHES: [(bool, bool); 4] = [(false, false), (true, false), (false, true), (true, true)];

fn forward<B: layernorm::LayerNorm<A>, A: ActSample>(dev: &B) {
    for (rows, width) in cases::rows_by_widths() {
        for (with_residual, dropped) in BRANCHES {
            let dims = layernorm::Dims { rows, width, eps: 1e-5 };
            let dropout = if dropped { DROPOUT } else { Dropout::NONE };
            let (x, residual) =
                (cases::normal::<A>(1, rows * width, 1.0), cases::normal::<A>(2, rows * width, 1.0));
            let (weight, bias) = (cases::normal::<A>(3, width, 1.0), cases::normal::<A>(4, width, 1.0));
            let (r_buf, w_buf, b_buf) = (input(dev, &residual), input(dev, &weight), input(dev, &bias));
            let [one, two, three] = cases::by_threads(|| {
                let (mut x_buf, mut y) = (input(dev, &x), poisoned::<B, A>(dev, rows * width));
                let (mut mean, mut rstd) = (poisoned::<B, f32>(dev, rows), poisoned::<B, f32>(dev, rows));
                let read = layernorm::In {
                    residual: with_residual.then_some(r_buf.buf()),
                    weight: w_buf.buf(),
                    bias: b_buf.buf(),
                    dropout,
                };
                let out = layernorm::Out {
                    x_then_sum: x_buf.buf_mut(),
                    y: y.buf_mut(),
                    mean: mean.buf_mut(),
                    rstd: rstd.buf_mut(),
                };
                layernorm::forward(dev, dims, read, out).unwrap();
                (x_buf.read(), y.read(), mean.read(), rstd.read())
            });
            let factor = if dropped { naive::dropout(dropout, rows, width) } else { vec![1.0; rows * width] };
            let sum: Vec<f64> = (0..rows * width)
                .map(|i| {
                    x[i].to_f32() as f64 * factor[i]
                        + if with_residual { residual[i].to_f32() as f64 } else { 0.0 }
                })
                .collect();
            let (y, mean, rstd) = naive::layernorm(&sum, &wide(&weight), &wide(&bias), dims.eps as f64);
            let name = |what: &str| format!("{what} {dims:?} residual {with_residual} dropout {dropped}");
            assert_rounded(&name("sum"), &one.0, &sum, 1e-6);
            // Two-element-like rows have a tiny variance: rstd amplifies the f32 error of the centred values.
            let steepest = rstd.iter().fold(1.0f64, |m, r| m.max(*r));
            assert_close(&name("y"), &one.1, &y, rounding_bound::<A>(&y, 1e-6 * steepest), 1e-6);
            assert_close(&name("mean"), &one.2, &mean, 1e-6, 1e-5);
            assert_close(&name("rstd"), &one.3, &rstd, 1e-6, 1e-5 * steepest);
            for other in [two, three] {
                assert_same_bits(&name("sum by threads"), &other.0, &one.0);
                assert_same_bits(&name("y by threads"), &other.1, &one.1);
            }
        }
    }
}

fn backward<B: layernorm::LayerNorm<A>, A: ActSample>(dev: &B) {
    for (rows, width) in cases::rows_by_widths() {
        for (with_residual, dropped) in BRANCHES {
            let dims = layernorm::Dims { rows, width, eps: 0.1 };
            let dropout = if dropped { DROPOUT } else { Dropout::NONE };
            let relu_input = !with_residual && !dropped;
            let dy = cases::normal::<A>(1, rows * width, 1.0);
            let mut sum = cases::normal::<A>(2, rows * width, 1.0);
            if relu_input {
                sum.iter_mut().for_each(|x| *x = A::from_f32(x.to_f32().max(0.0)));
            }
            let weight = cases::normal::<A>(3, width, 1.0);
            let (dw0, db0) = (cases::normal::<f32>(4, width, 1.0), cases::normal::<f32>(5, width, 1.0));
            let (_, mean, rstd) =
                naive::layernorm(&wide(&sum), &wide(&weight), &vec![0.0; width], dims.eps as f64);
            let narrow = |x: &[f64]| x.iter().map(|x| *x as f32).collect::<Vec<_>>();
            let (dy_buf, sum_buf, w_buf) = (input(dev, &dy), input(dev, &sum), input(dev, &weight));
            let (mean_buf, rstd_buf) = (input(dev, &narrow(&mean)), input(dev, &narrow(&rstd)));
            let [one, two, three] = cases::by_threads(|| {
                let (mut dx, mut dr) =
                    (poisoned::<B, A>(dev, rows * width), poisoned::<B, A>(dev, rows * width));
                let (mut dw, mut db) = (input(dev, &dw0), input(dev, &db0));
                let read = layernorm::BackwardIn {
                    dy: dy_buf.buf(),
                    sum: sum_buf.buf(),
                    mean: mean_buf.buf(),
                    rstd: rstd_buf.buf(),
                    weight: w_buf.buf(),
                    dropout,
                    relu_input,
                };
                let out = layernorm::Gradients {
                    dx: dx.buf_mut(),
                    dresidual: with_residual.then_some(dr.buf_mut()),
                    dweight: dw.buf_mut(),
                    dbias: db.buf_mut(),
                };
                layernorm::backward(dev, dims, read, out).unwrap();
                (dx.read(), dr.read(), dw.read(), db.read())
            });
            let (ds, dw, db) =
                naive::layernorm_backward(&wide(&dy), &wide(&sum), &wide(&weight), dims.eps as f64);
            let factor = if dropped { naive::dropout(dropout, rows, width) } else { vec![1.0; rows * width] };
            let live = |i: usize| if relu_input && sum[i].to_f32() == 0.0 { 0.0 } else { 1.0 };
            let dx: Vec<f64> = (0..rows * width).map(|i| ds[i] * factor[i] * live(i)).collect();
            let plus = |g: &[f64], before: &[f32]| {
                g.iter().zip(before).map(|(g, b)| g + *b as f64).collect::<Vec<_>>()
            };
            let name = |what: &str| format!("{what} {dims:?} residual {with_residual} dropout {dropped}");
            assert_rounded(&name("dx"), &one.0, &dx, 1e-5);
            if with_residual {
                assert_rounded(&name("dresidual"), &one.1, &ds, 1e-5);
            }
            assert_close(&name("dweight"), &one.2, &plus(&dw, &dw0), 1e-4, 1e-5);
            assert_close(&name("dbias"), &one.3, &plus(&db, &db0), 1e-4, 1e-5);
            for other in [two, three] {
                assert_same_bits(&name("dx by threads"), &other.0, &one.0);
                assert_same_bits(&name("dweight by threads"), &other.2, &one.2);
                assert_same_bits(&name("dbias by threads"), &other.3, &one.3);
            }
        }
    }
}

/// A forward pass cut in two, the second part told its first row, draws the same dropout.
fn dropout_does_not_depend_on_the_batch_split<B: layernorm::LayerNorm<A>, A: ActSample>(dev: &B) {
    let (rows, width) = (37, 13);
    let x = cases::normal::<A>(1, rows * width, 1.0);
    let (weight, bias) = (input(dev, &vec![A::from_f32(1.0); width]), input(dev, &vec![A::default(); width]));
    let run = |x: &[A], first_row: u64| {
        let rows = x.len() / width;
        let (mut x_buf, mut y) = (input(dev, x), poisoned::<_, A>(dev, x.len()));
        let (mut mean, mut rstd) = (poisoned::<_, f32>(dev, rows), poisoned::<_, f32>(dev, rows));
        let read = layernorm::In {
            residual: None,
            weight: weight.buf(),
            bias: bias.buf(),
            dropout: Dropout { first_row, ..DROPOUT },
        };
        let out = layernorm::Out {
            x_then_sum: x_buf.buf_mut(),
            y: y.buf_mut(),
            mean: mean.buf_mut(),
            rstd: rstd.buf_mut(),
        };
        layernorm::forward(dev, layernorm::Dims { rows, width, eps: 1e-12 }, read, out).unwrap();
        x_buf.read()
    };
    let whole = run(&x, 500);
    let split = 11 * width;
    let mut parts = run(&x[..split], 500);
    parts.extend(run(&x[split..], 511));
    assert_same_bits("dropped rows", &parts, &whole);
    assert!(whole.iter().filter(|x| x.to_f32() == 0.0).count() > rows * width / 10, "nothing was dropped");
}
