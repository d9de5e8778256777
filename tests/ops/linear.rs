//! Matrix products with bias, ReLU and accumulation, at sizes round the tiles; NaN passes through ReLU.

use crate::ActSample;
use crate::common::close::{assert_rounded, assert_same_bits, wide};
use crate::common::guarded::{input, poisoned};
use crate::common::{cases, naive};
use cellrefine::ops::linear;

on_every_backend!(A: forward, backward_input, backward_weight, same_bits_for_any_thread_count, relu_keeps_nan);
on_emulated!(A: forward, backward_input, backward_weight, same_bits_for_any_thread_count, relu_keeps_nan);
mutants!("linear_epilogue");

/// Sizes (rows, inputs, outputs) round the matrix tile, its panels and the blocks.
const LINEAR: &[[usize; 3]] = &[
    [1, 1, 1],
    [7, 16, 17],
    [16, 7, 48],
    [17, 255, 33],
    [33, 48, 129],
    [65, 100, 7],
    [129, 256, 255],
    [300, 96, 112],
];

fn forward<B: linear::Linear<A>, A: ActSample>(dev: &B) {
    for &[rows, inputs, outputs] in LINEAR {
        for (with_bias, activation) in [(false, linear::Activation::None), (true, linear::Activation::Relu)] {
            let (x, w) =
                (cases::normal::<A>(1, rows * inputs, 1.0), cases::normal::<A>(2, outputs * inputs, 0.5));
            let b = cases::normal::<A>(3, outputs, 1.0);
            let (x_buf, w_buf, b_buf) = (input(dev, &x), input(dev, &w), input(dev, &b));
            let mut y = poisoned::<B, A>(dev, rows * outputs);
            let dims = linear::Dims { rows, inputs, outputs };
            let read = linear::In {
                x: x_buf.buf(),
                weight: w_buf.buf(),
                bias: with_bias.then_some(b_buf.buf()),
                activation,
            };
            linear::forward(dev, dims, read, y.buf_mut()).unwrap();
            let mut want = naive::matmul_nt(&wide(&x), &wide(&w), rows, outputs, inputs);
            for (i, v) in want.iter_mut().enumerate() {
                *v += if with_bias { b[i % outputs].to_f32() as f64 } else { 0.0 };
                *v = if activation == linear::Activation::Relu { v.max(0.0) } else { *v };
            }
            assert_rounded(&format!("y {dims:?} {activation:?}"), &y.read(), &want, 1e-5);
        }
    }
}

fn backward_input<B: linear::Linear<A>, A: ActSample>(dev: &B) {
    for &[rows, inputs, outputs] in LINEAR {
        for (masked, accumulate) in [(false, false), (true, false), (false, true), (true, true)] {
            let (dy, w) =
                (cases::normal::<A>(1, rows * outputs, 1.0), cases::normal::<A>(2, outputs * inputs, 0.5));
            let mut relu = cases::normal::<A>(3, rows * inputs, 1.0);
            relu.iter_mut().for_each(|x| *x = A::from_f32(x.to_f32().max(0.0)));
            let before = cases::normal::<A>(4, rows * inputs, 1.0);
            let (dy_buf, w_buf, relu_buf) = (input(dev, &dy), input(dev, &w), input(dev, &relu));
            let mut dx = if accumulate { input(dev, &before) } else { poisoned(dev, rows * inputs) };
            let dims = linear::Dims { rows, inputs, outputs };
            let read = linear::BackwardInput {
                dy: dy_buf.buf(),
                weight: w_buf.buf(),
                relu_output: masked.then_some(relu_buf.buf()),
                accumulate,
            };
            linear::backward_input(dev, dims, read, dx.buf_mut()).unwrap();
            let wt = naive::transpose(&wide(&w), outputs, inputs);
            let mut want = naive::matmul_nt(&wide(&dy), &wt, rows, inputs, outputs);
            for (i, v) in want.iter_mut().enumerate() {
                *v = if masked && relu[i].to_f32() == 0.0 { 0.0 } else { *v };
                *v += if accumulate { before[i].to_f32() as f64 } else { 0.0 };
            }
            assert_rounded(&format!("dx {dims:?} {masked} {accumulate}"), &dx.read(), &want, 1e-5);
        }
    }
}

fn backward_weight<B: linear::Linear<A>, A: ActSample>(dev: &B) {
    for &[rows, inputs, outputs] in LINEAR.iter().chain(&[[513, 500, 20]]) {
        let (x, dy) = (cases::normal::<A>(1, rows * inputs, 1.0), cases::normal::<A>(2, rows * outputs, 1.0));
        let (dw0, db0) =
            (cases::normal::<f32>(3, outputs * inputs, 1.0), cases::normal::<f32>(4, outputs, 1.0));
        let (x_buf, dy_buf) = (input(dev, &x), input(dev, &dy));
        let dims = linear::Dims { rows, inputs, outputs };
        let (xt, dyt) =
            (naive::transpose(&wide(&x), rows, inputs), naive::transpose(&wide(&dy), rows, outputs));
        let mut want = naive::matmul_nt(&dyt, &xt, outputs, inputs, rows);
        want.iter_mut().zip(&dw0).for_each(|(w, d)| *w += *d as f64);
        let want_bias: Vec<f64> =
            (0..outputs).map(|o| db0[o] as f64 + dyt[o * rows..(o + 1) * rows].iter().sum::<f64>()).collect();
        let [one, two, three] = cases::by_threads(|| {
            let (mut dw, mut db) = (input(dev, &dw0), input(dev, &db0));
            let read = linear::BackwardWeight { x: x_buf.buf(), dy: dy_buf.buf() };
            linear::backward_weight(dev, dims, read, dw.buf_mut(), Some(db.buf_mut())).unwrap();
            (dw.read(), db.read())
        });
        assert_rounded(&format!("dweight {dims:?}"), &one.0, &want, 1e-5);
        assert_rounded(&format!("dbias {dims:?}"), &one.1, &want_bias, 1e-5);
        for other in [two, three] {
            assert_same_bits("dweight by threads", &other.0, &one.0);
            assert_same_bits("dbias by threads", &other.1, &one.1);
        }
        let (mut dw, read) = (input(dev, &dw0), linear::BackwardWeight { x: x_buf.buf(), dy: dy_buf.buf() });
        linear::backward_weight(dev, dims, read, dw.buf_mut(), None).unwrap();
        assert_same_bits("dweight without dbias", &dw.read(), &one.0);
    }
}

fn same_bits_for_any_thread_count<B: linear::Linear<A>, A: ActSample>(dev: &B) {
    let (rows, inputs, outputs) = (333, 100, 130);
    let (x, w) = (cases::normal::<A>(1, rows * inputs, 1.0), cases::normal::<A>(2, outputs * inputs, 1.0));
    let (x_buf, w_buf) = (input(dev, &x), input(dev, &w));
    let [one, two, three] = cases::by_threads(|| {
        let mut y = poisoned::<_, A>(dev, rows * outputs);
        let read = linear::In {
            x: x_buf.buf(),
            weight: w_buf.buf(),
            bias: None,
            activation: linear::Activation::None,
        };
        linear::forward(dev, linear::Dims { rows, inputs, outputs }, read, y.buf_mut()).unwrap();
        y.read()
    });
    assert_same_bits("two threads", &two, &one);
    assert_same_bits("three threads", &three, &one);
}

/// NaN must reach the loss, where the bad step is noticed: ReLU does not swallow it.
fn relu_keeps_nan<B: linear::Linear<A>, A: ActSample>(dev: &B) {
    let (x, w) = (input(dev, &[f32::NAN, 1.0].map(A::from_f32)), input(dev, &[1.0, 1.0].map(A::from_f32)));
    let mut y = poisoned::<_, A>(dev, 1);
    let read = linear::In { x: x.buf(), weight: w.buf(), bias: None, activation: linear::Activation::Relu };
    dev.clear(y.buf_mut()).unwrap();
    linear::forward(dev, linear::Dims { rows: 1, inputs: 2, outputs: 1 }, read, y.buf_mut()).unwrap();
    assert!(y.read()[0].to_f32().is_nan());
}
