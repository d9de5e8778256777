//! Finite differences of every backward op of the network's body: forward and backward are checked against each other,
//! without an oracle in between.
//!
//! For a random direction u of an input x and a fixed dy, `(f(x + εu) - f(x - εu)) / 2ε` summed against dy equals dx · u. All
//! in f32 activations; the sums are f64.

mod common;

use cellrefine::cpu::Cpu;
use cellrefine::device::{Device, Dropout};
use cellrefine::ops::{embed, layernorm, linear, pool};
use common::cases;

const DROPOUT: Dropout = Dropout { probability: 0.2, seed: 99, step: 2, site: 7, first_row: 40 };

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum()
}

/// Compares `gradient · u` with the central difference of `loss` along u, for several directions; `loss` takes the moved x.
#[track_caller]
fn check(name: &str, x: &[f32], gradient: &[f32], loss: impl Fn(&[f32]) -> f64) {
    const STEP: f32 = 4e-3;
    assert!(gradient.iter().any(|g| *g != 0.0), "{name}: the gradient is all zero");
    for direction in 0..4 {
        let u = cases::normal::<f32>(1000 + direction, x.len(), 1.0);
        let moved = |sign: f32| x.iter().zip(&u).map(|(x, u)| x + sign * STEP * u).collect::<Vec<_>>();
        let (up, down) = (moved(1.0), moved(-1.0));
        let numeric = (loss(&up) - loss(&down)) / (2.0 * STEP as f64);
        let analytic = dot(gradient, &u);
        // Scale of a random projection, so that a direction nearly orthogonal to the gradient is not asked for digits.
        let scale = gradient.iter().map(|g| (*g as f64).powi(2)).sum::<f64>().sqrt();
        assert!(
            (numeric - analytic).abs() <= 5e-3 * scale,
            "{name}: direction {direction}: difference {numeric:.6e}, gradient {analytic:.6e}, norm {scale:.3e}"
        );
    }
}

#[test]
fn linear_gradients() {
    let dev = Cpu;
    for [rows, inputs, outputs] in [[5, 7, 9], [33, 50, 17]] {
        let dims = linear::Dims { rows, inputs, outputs };
        let x = cases::normal::<f32>(1, rows * inputs, 1.0);
        let w = cases::normal::<f32>(2, outputs * inputs, 0.5);
        let b = cases::normal::<f32>(3, outputs, 1.0);
        let dy = cases::normal::<f32>(4, rows * outputs, 1.0);
        let loss = |x: &[f32], w: &[f32], b: &[f32]| {
            let (x, w, b) = (dev.upload(x).unwrap(), dev.upload(w).unwrap(), dev.upload(b).unwrap());
            let mut y = dev.zeros::<f32>(rows * outputs).unwrap();
            let read = linear::In { x: &x, weight: &w, bias: Some(&b), activation: linear::Activation::None };
            linear::forward(&dev, dims, read, &mut y).unwrap();
            dot(&dy, &y)
        };
        let (x_buf, w_buf, dy_buf) =
            (dev.upload(&x).unwrap(), dev.upload(&w).unwrap(), dev.upload(&dy).unwrap());
        let mut dx = dev.zeros::<f32>(rows * inputs).unwrap();
        let read =
            linear::BackwardInput { dy: &dy_buf, weight: &w_buf, relu_output: None, accumulate: false };
        linear::backward_input(&dev, dims, read, &mut dx).unwrap();
        let (mut dw, mut db) = (dev.zeros(outputs * inputs).unwrap(), dev.zeros(outputs).unwrap());
        let read = linear::BackwardWeight { x: &x_buf, dy: &dy_buf };
        linear::backward_weight(&dev, dims, read, &mut dw, Some(&mut db)).unwrap();
        check("linear dx", &x, &dx, |x| loss(x, &w, &b));
        check("linear dweight", &w, &dw, |w| loss(&x, w, &b));
        check("linear dbias", &b, &db, |b| loss(&x, &w, b));
    }
}

/// Two layers with a ReLU between: the mask of the input gradient is that of the forward pass.
#[test]
fn relu_gradient() {
    let dev = Cpu;
    let (rows, width) = (21, 19);
    let dims = linear::Dims { rows, inputs: width, outputs: width };
    // Pre-activations far from the kink, so that the step does not cross it: eyes of ±3 plus noise.
    let x: Vec<f32> = cases::normal::<f32>(1, rows * width, 0.1)
        .iter()
        .enumerate()
        .map(|(i, x)| x + [3.0, -3.0][i % 2])
        .collect();
    let eye: Vec<f32> = (0..width * width).map(|i| if i / width == i % width { 1.0 } else { 0.0 }).collect();
    let w = cases::normal::<f32>(2, width * width, 0.5);
    let dy = cases::normal::<f32>(3, rows * width, 1.0);
    let (eye, w, dy_buf) = (dev.upload(&eye).unwrap(), dev.upload(&w).unwrap(), dev.upload(&dy).unwrap());
    let run = |x: &[f32]| {
        let (mut h, mut y) =
            (dev.zeros::<f32>(rows * width).unwrap(), dev.zeros::<f32>(rows * width).unwrap());
        let x = dev.upload(x).unwrap();
        let first = linear::In { x: &x, weight: &eye, bias: None, activation: linear::Activation::Relu };
        linear::forward(&dev, dims, first, &mut h).unwrap();
        let second = linear::In { x: &h, weight: &w, bias: None, activation: linear::Activation::None };
        linear::forward(&dev, dims, second, &mut y).unwrap();
        (h, y)
    };
    let (h, _) = run(&x);
    let (mut dh, mut dx) = (dev.zeros::<f32>(rows * width).unwrap(), dev.zeros::<f32>(rows * width).unwrap());
    let read = linear::BackwardInput { dy: &dy_buf, weight: &w, relu_output: Some(&h), accumulate: false };
    linear::backward_input(&dev, dims, read, &mut dh).unwrap();
    let read = linear::BackwardInput { dy: &dh, weight: &eye, relu_output: None, accumulate: false };
    linear::backward_input(&dev, dims, read, &mut dx).unwrap();
    check("relu dx", &x, &dx, |x| dot(&dy, &run(x).1));
}

#[test]
fn layernorm_gradients() {
    let dev = Cpu;
    let (rows, width) = (13, 37);
    let dims = layernorm::Dims { rows, width, eps: 1e-5 };
    let (x, residual) =
        (cases::normal::<f32>(1, rows * width, 1.0), cases::normal::<f32>(2, rows * width, 1.0));
    let (weight, bias) = (cases::normal::<f32>(3, width, 1.0), cases::normal::<f32>(4, width, 1.0));
    let dy = cases::normal::<f32>(5, rows * width, 1.0);
    let run = |x: &[f32], residual: &[f32], weight: &[f32], bias: &[f32]| {
        let (mut sum, residual) = (dev.upload(x).unwrap(), dev.upload(residual).unwrap());
        let (weight, bias) = (dev.upload(weight).unwrap(), dev.upload(bias).unwrap());
        let mut y = dev.zeros::<f32>(rows * width).unwrap();
        let (mut mean, mut rstd) = (dev.zeros(rows).unwrap(), dev.zeros(rows).unwrap());
        let read =
            layernorm::In { residual: Some(&residual), weight: &weight, bias: &bias, dropout: DROPOUT };
        let out = layernorm::Out { x_then_sum: &mut sum, y: &mut y, mean: &mut mean, rstd: &mut rstd };
        layernorm::forward(&dev, dims, read, out).unwrap();
        (dot(&dy, &y), sum, mean, rstd)
    };
    let (_, sum, mean, rstd) = run(&x, &residual, &weight, &bias);
    let (dy_buf, weight_buf) = (dev.upload(&dy).unwrap(), dev.upload(&weight).unwrap());
    let (mut dx, mut dr) = (dev.zeros::<f32>(rows * width).unwrap(), dev.zeros::<f32>(rows * width).unwrap());
    let (mut dw, mut db) = (dev.zeros(width).unwrap(), dev.zeros(width).unwrap());
    let read = layernorm::BackwardIn {
        dy: &dy_buf,
        sum: &sum,
        mean: &mean,
        rstd: &rstd,
        weight: &weight_buf,
        dropout: DROPOUT,
        relu_input: false,
    };
    let out =
        layernorm::Gradients { dx: &mut dx, dresidual: Some(&mut dr), dweight: &mut dw, dbias: &mut db };
    layernorm::backward(&dev, dims, read, out).unwrap();
    check("layernorm dx", &x, &dx, |x| run(x, &residual, &weight, &bias).0);
    check("layernorm dresidual", &residual, &dr, |r| run(&x, r, &weight, &bias).0);
    check("layernorm dweight", &weight, &dw, |w| run(&x, &residual, w, &bias).0);
    check("layernorm dbias", &bias, &db, |b| run(&x, &residual, &weight, b).0);
}

#[test]
fn embed_gradients() {
    let dev = Cpu;
    let (tokens, width) = (90, 21);
    let dims = embed::Dims { tokens, width, vocab: 30, positions: 12, value_bins: 4, eps: 1e-5 };
    let gene = dev.upload(&cases::integers(1, tokens, 30)).unwrap();
    let position = dev.upload(&(0..tokens as u32).map(|t| t % 12).collect::<Vec<_>>()).unwrap();
    let bin = dev.upload(&cases::integers(2, tokens, 4)).unwrap();
    // Word, position, type and value tables, weight, bias.
    let tables = [30, 12, 2, 4, 1, 1].map(|rows| cases::normal::<f32>(rows as u64, rows * width, 1.0));
    let dx = cases::normal::<f32>(5, tokens * width, 1.0);
    macro_rules! lend {
        ($bufs:expr) => {
            embed::Tables {
                gene: &gene,
                position: &position,
                value_bin: Some(&bin),
                word: &$bufs[0],
                position_table: &$bufs[1],
                type_table: &$bufs[2],
                value_table: Some(&$bufs[3]),
                weight: &$bufs[4],
                bias: &$bufs[5],
                dropout: DROPOUT,
            }
        };
    }
    let run = |tables: &[Vec<f32>; 6]| {
        let bufs = tables.each_ref().map(|t| dev.upload(t).unwrap());
        let mut x = dev.zeros::<f32>(tokens * width).unwrap();
        let (mut mean, mut rstd) = (dev.zeros(tokens).unwrap(), dev.zeros(tokens).unwrap());
        let out = embed::Out { x: &mut x, mean: &mut mean, rstd: &mut rstd };
        embed::forward(&dev, dims, lend!(bufs), out).unwrap();
        (dot(&dx, &x), mean, rstd)
    };
    let (_, mean, rstd) = run(&tables);
    let bufs = tables.each_ref().map(|t| dev.upload(t).unwrap());
    let dx_buf = dev.upload(&dx).unwrap();
    let mut grads = tables.each_ref().map(|t| dev.zeros::<f32>(t.len()).unwrap());
    let [word, position_table, type_table, value_table, weight, bias] = &mut grads;
    let out =
        embed::Gradients { word, position_table, type_table, value_table: Some(value_table), weight, bias };
    let read = embed::BackwardIn { dx: &dx_buf, mean: &mean, rstd: &rstd };
    embed::backward(&dev, dims, lend!(bufs), read, out).unwrap();
    for (i, name) in ["word", "position", "type", "value", "weight", "bias"].iter().enumerate() {
        check(&format!("embed d{name}"), &tables[i], &grads[i], |moved| {
            let mut tables = tables.clone();
            tables[i] = moved.to_vec();
            run(&tables).0
        });
    }
}

#[test]
fn pool_gradients() {
    let dev = Cpu;
    let start = cases::cell_start(&[3, 1, 70, 2]);
    let (tokens, cells, width) = (76, 4, 11);
    let start = dev.upload(&start).unwrap();
    let (x, dh) = (cases::normal::<f32>(1, tokens * width, 1.0), cases::normal::<f32>(2, cells * width, 1.0));
    for (pooling, prefix, suffix) in [(pool::Pooling::Cls, 0, 0), (pool::Pooling::Mean, 1, 1)] {
        let dims = pool::Dims { tokens, cells, width, pooling, prefix, suffix };
        let mut dx = dev.zeros::<f32>(tokens * width).unwrap();
        pool::backward(&dev, dims, &dev.upload(&dh).unwrap(), &start, &mut dx).unwrap();
        check(&format!("pool {pooling:?} dx"), &x, &dx, |x| {
            let mut h = dev.zeros::<f32>(cells * width).unwrap();
            pool::forward::<f32, _>(&dev, dims, &dev.upload(x).unwrap(), &start, &mut h).unwrap();
            dot(&dh, &h)
        });
    }
}

/// The harness itself must be able to fail.
#[test]
#[should_panic(expected = "direction")]
fn a_wrong_gradient_is_found() {
    let x = cases::normal::<f32>(1, 50, 1.0);
    let wrong: Vec<f32> = x.iter().map(|x| 2.1 * x).collect();
    check("x²", &x, &wrong, |x| dot(x, x));
}
