//! Every op of the network's body against its f64 oracle: both activation types, odd sizes, guard words round every buffer,
//! NaN in every output, the same bits for 1, 2 and 3 threads. Generic over the backend: a backend joins by one line in
//! `on_every_backend!`.

mod common;

use cellrefine::cpu::Cpu;
use cellrefine::device::{Act, Device, Dropout};
use cellrefine::ops::{adamw, embed, layernorm, linear, mask_tokens, pool, reduce, rows};
use cellrefine::rng;
use common::close::{assert_close, assert_rounded, assert_same_bits, rounding_bound, wide};
use common::guarded::{Sample, input, poisoned};
use common::{cases, naive};
use half::bf16;

/// One test per generic body and activation type.
macro_rules! on_every_backend {
    ($($body:ident),* $(,)?) => {
        mod f32_activations {
            $(#[test] fn $body() { super::$body::<super::Cpu, f32>(&super::Cpu); })*
        }
        mod bf16_activations {
            $(#[test] fn $body() { super::$body::<super::Cpu, super::bf16>(&super::Cpu); })*
        }
    };
}
on_every_backend!(
    linear_forward,
    linear_backward_input,
    linear_backward_weight,
    layernorm_forward,
    layernorm_backward,
    embed_forward,
    embed_backward,
    pool_forward_and_backward,
    rows_gather_and_scatter,
    adamw_follows_the_formula,
);

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

const DROPOUT: Dropout =
    Dropout { probability: 0.25, seed: 0xABCD_EF01_2345, step: 3, site: 5, first_row: 1000 };

trait ActSample: Act + Sample {}
impl<A: Act + Sample> ActSample for A {}

fn linear_forward<B: linear::Linear<A>, A: ActSample>(dev: &B) {
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

fn linear_backward_input<B: linear::Linear<A>, A: ActSample>(dev: &B) {
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

fn linear_backward_weight<B: linear::Linear<A>, A: ActSample>(dev: &B) {
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

/// The four shapes of a LayerNorm call: with and without residual and dropout. A backward call with neither also masks by
/// the ReLU that its input came out of.
const BRANCHES: [(bool, bool); 4] = [(false, false), (true, false), (false, true), (true, true)];

fn layernorm_forward<B: layernorm::LayerNorm<A>, A: ActSample>(dev: &B) {
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

fn layernorm_backward<B: layernorm::LayerNorm<A>, A: ActSample>(dev: &B) {
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

/// Inputs of an embedding call; genes repeat, so that the backward pass has rows to sum.
struct EmbedCase<A> {
    dims: embed::Dims,
    dropout: Dropout,
    gene: Vec<u32>,
    position: Vec<u32>,
    bin: Vec<u32>,
    tables: [Vec<A>; 6],
}

/// (N, D, value bins, dropout); more genes than a task's share in the last.
const EMBED: &[(usize, usize, usize, bool)] =
    &[(1, 1, 0, false), (7, 17, 3, false), (33, 100, 0, true), (130, 48, 5, true), (257, 16, 0, false)];

fn embed_case<A: Act>((tokens, width, value_bins, dropped): (usize, usize, usize, bool)) -> EmbedCase<A> {
    let dims = embed::Dims { tokens, width, vocab: 71, positions: 40, value_bins, eps: 0.1 };
    let table = |seed, rows: usize| cases::normal::<A>(seed, rows * width, 1.0);
    EmbedCase {
        dims,
        dropout: if dropped { DROPOUT } else { Dropout::NONE },
        // Squaring makes low genes frequent; gene 70 stays absent in small cases.
        gene: cases::integers(1, tokens, 71).iter().map(|g| g * g / 71).collect(),
        position: (0..tokens as u32).map(|t| t % 40).collect(),
        bin: cases::integers(2, tokens, value_bins.max(1) as u32),
        tables: [table(3, 71), table(4, 40), table(5, 2), table(6, value_bins), table(7, 1), table(8, 1)],
    }
}

impl<A: Act> EmbedCase<A> {
    /// `s` in f64.
    fn sum(&self) -> Vec<f64> {
        let width = self.dims.width;
        let [word, position, kind, value, ..] = &self.tables;
        (0..self.dims.tokens * width)
            .map(|i| {
                let (t, c) = (i / width, i % width);
                let at = |table: &[A], row: u32| table[row as usize * width + c].to_f32() as f64;
                let value = if self.dims.value_bins > 0 { at(value, self.bin[t]) } else { 0.0 };
                at(word, self.gene[t]) + at(position, self.position[t]) + at(kind, 0) + value
            })
            .collect()
    }
    fn factor(&self) -> Vec<f64> {
        let n = self.dims.tokens * self.dims.width;
        if self.dropout.probability > 0.0 {
            naive::dropout(self.dropout, self.dims.tokens, self.dims.width)
        } else {
            vec![1.0; n]
        }
    }
}

/// Uploads a case and lends its tables.
macro_rules! embed_tables {
    ($dev:expr, $case:expr, $bufs:ident, $tables:ident) => {
        let $bufs = (
            input($dev, &$case.gene),
            input($dev, &$case.position),
            input($dev, &$case.bin),
            [0, 1, 2, 3, 4, 5].map(|i| input($dev, &$case.tables[i])),
        );
        let values = $case.dims.value_bins > 0;
        let $tables = || embed::Tables {
            gene: $bufs.0.buf(),
            position: $bufs.1.buf(),
            value_bin: values.then_some($bufs.2.buf()),
            word: $bufs.3[0].buf(),
            position_table: $bufs.3[1].buf(),
            type_table: $bufs.3[2].buf(),
            value_table: values.then_some($bufs.3[3].buf()),
            weight: $bufs.3[4].buf(),
            bias: $bufs.3[5].buf(),
            dropout: $case.dropout,
        };
    };
}

fn embed_forward<B: embed::Embed<A>, A: ActSample>(dev: &B) {
    for &case in EMBED {
        let case = embed_case::<A>(case);
        let dims = case.dims;
        embed_tables!(dev, case, bufs, tables);
        let mut x = poisoned::<B, A>(dev, dims.tokens * dims.width);
        let (mut mean, mut rstd) =
            (poisoned::<B, f32>(dev, dims.tokens), poisoned::<B, f32>(dev, dims.tokens));
        let out = embed::Out { x: x.buf_mut(), mean: mean.buf_mut(), rstd: rstd.buf_mut() };
        embed::forward(dev, dims, tables(), out).unwrap();
        let [.., weight, bias] = &case.tables;
        let (y, want_mean, want_rstd) =
            naive::layernorm(&case.sum(), &wide(weight), &wide(bias), dims.eps as f64);
        let want: Vec<f64> = y.iter().zip(case.factor()).map(|(y, f)| y * f).collect();
        assert_rounded(&format!("x {dims:?}"), &x.read(), &want, 1e-5);
        assert_close(&format!("mean {dims:?}"), &mean.read(), &want_mean, 1e-6, 1e-5);
        assert_close(&format!("rstd {dims:?}"), &rstd.read(), &want_rstd, 1e-6, 1e-5);
    }
}

fn embed_backward<B: embed::Embed<A>, A: ActSample>(dev: &B) {
    for &case in EMBED {
        let case = embed_case::<A>(case);
        let dims = case.dims;
        let (n, width) = (dims.tokens * dims.width, dims.width);
        embed_tables!(dev, case, bufs, tables);
        let dx = cases::normal::<A>(9, n, 1.0);
        let sum = case.sum();
        let [.., weight, bias] = &case.tables;
        let (_, mean, rstd) = naive::layernorm(&sum, &wide(weight), &wide(bias), dims.eps as f64);
        let narrow = |x: &[f64]| x.iter().map(|x| *x as f32).collect::<Vec<_>>();
        let (dx_buf, mean_buf, rstd_buf) =
            (input(dev, &dx), input(dev, &narrow(&mean)), input(dev, &narrow(&rstd)));
        let before: [Vec<f32>; 6] =
            [71, 40, 2, dims.value_bins, 1, 1].map(|r| cases::normal(10, r * width, 1.0));
        let [one, two, three] = cases::by_threads(|| {
            let mut g = before.each_ref().map(|b| input(dev, b));
            let [word, position, kind, value, weight, bias] = &mut g;
            let grads = embed::Gradients {
                word: word.buf_mut(),
                position_table: position.buf_mut(),
                type_table: kind.buf_mut(),
                value_table: (dims.value_bins > 0).then_some(value.buf_mut()),
                weight: weight.buf_mut(),
                bias: bias.buf_mut(),
            };
            let read = embed::BackwardIn { dx: dx_buf.buf(), mean: mean_buf.buf(), rstd: rstd_buf.buf() };
            embed::backward(dev, dims, tables(), read, grads).unwrap();
            g.map(|g| g.read())
        });
        let dy: Vec<f64> = wide(&dx).iter().zip(case.factor()).map(|(d, f)| d * f).collect();
        let (ds, dweight, dbias) = naive::layernorm_backward(&dy, &sum, &wide(weight), dims.eps as f64);
        let mut want = before.each_ref().map(|b| wide(b));
        for t in 0..dims.tokens {
            for c in 0..width {
                want[0][case.gene[t] as usize * width + c] += ds[t * width + c];
                want[1][case.position[t] as usize * width + c] += ds[t * width + c];
                want[2][c] += ds[t * width + c];
                if dims.value_bins > 0 {
                    want[3][case.bin[t] as usize * width + c] += ds[t * width + c];
                }
            }
        }
        want[4].iter_mut().zip(dweight).for_each(|(w, d)| *w += d);
        want[5].iter_mut().zip(dbias).for_each(|(w, d)| *w += d);
        for (i, name) in ["word", "position", "type", "value", "weight", "bias"].iter().enumerate() {
            assert_close(&format!("d{name} {dims:?}"), &one[i], &want[i], 1e-4, 1e-5);
            assert_same_bits(&format!("d{name} by threads"), &two[i], &one[i]);
            assert_same_bits(&format!("d{name} by threads"), &three[i], &one[i]);
        }
    }
}

fn pool_forward_and_backward<B: pool::Pool<A>, A: ActSample>(dev: &B) {
    // Cells of one token, of special tokens alone, longer than a block of the sum.
    let start = cases::cell_start(&[1, 2, 3, 17, 200, 1, 64]);
    let (tokens, cells) = (*start.last().unwrap() as usize, start.len() - 1);
    for width in [1, 7, 16, 33, 256] {
        for (pooling, prefix, suffix) in
            [(pool::Pooling::Cls, 1, 1), (pool::Pooling::Mean, 0, 0), (pool::Pooling::Mean, 1, 1)]
        {
            let dims = pool::Dims { tokens, cells, width, pooling, prefix, suffix };
            let (x, dh) =
                (cases::normal::<A>(1, tokens * width, 1.0), cases::normal::<f32>(2, cells * width, 1.0));
            let (x_buf, dh_buf, start_buf) = (input(dev, &x), input(dev, &dh), input(dev, &start));
            let mut h = poisoned::<B, f32>(dev, cells * width);
            let mut dx = poisoned::<B, A>(dev, tokens * width);
            pool::forward(dev, dims, x_buf.buf(), start_buf.buf(), h.buf_mut()).unwrap();
            pool::backward(dev, dims, dh_buf.buf(), start_buf.buf(), dx.buf_mut()).unwrap();
            let (mut want, mut want_dx) = (vec![0.0; cells * width], vec![0.0; tokens * width]);
            for c in 0..cells {
                let (s, e) = (start[c] as usize, start[c + 1] as usize);
                let members: Vec<usize> = match pooling {
                    pool::Pooling::Cls => vec![s],
                    pool::Pooling::Mean if e - s > prefix + suffix => (s + prefix..e - suffix).collect(),
                    pool::Pooling::Mean => (s..e).collect(),
                };
                for t in &members {
                    for i in 0..width {
                        want[c * width + i] += x[t * width + i].to_f32() as f64 / members.len() as f64;
                        want_dx[t * width + i] = dh[c * width + i] as f64 / members.len() as f64;
                    }
                }
            }
            assert_close(&format!("h {dims:?}"), &h.read(), &want, 1e-6, 1e-5);
            assert_rounded(&format!("dx {dims:?}"), &dx.read(), &want_dx, 1e-6);
        }
    }
}

fn rows_gather_and_scatter<B: rows::Rows<A>, A: ActSample>(dev: &B) {
    for (total, width) in cases::rows_by_widths() {
        let index: Vec<u32> = (0..total as u32).filter(|i| i % 3 != 1).rev().collect();
        let dims = rows::Dims { rows: total, gathered: index.len(), width };
        let (x, dy) =
            (cases::normal::<A>(1, total * width, 1.0), cases::normal::<A>(2, index.len() * width, 1.0));
        let (x_buf, dy_buf, index_buf) = (input(dev, &x), input(dev, &dy), input(dev, &index));
        let (mut y, mut dx) = (poisoned::<B, A>(dev, index.len() * width), input(dev, &x));
        rows::gather(dev, dims, x_buf.buf(), index_buf.buf(), y.buf_mut()).unwrap();
        rows::scatter_add(dev, dims, dy_buf.buf(), index_buf.buf(), dx.buf_mut()).unwrap();
        let (mut want_y, mut want_dx) = (Vec::new(), wide(&x));
        for (m, row) in index.iter().enumerate() {
            want_y.extend_from_slice(&x[*row as usize * width..][..width]);
            for i in 0..width {
                want_dx[*row as usize * width + i] += dy[m * width + i].to_f32() as f64;
            }
        }
        assert_same_bits("gathered rows", &y.read(), &want_y);
        assert_rounded("scattered rows", &dx.read(), &want_dx, 1e-6);
    }
}

fn adamw_follows_the_formula<B: adamw::AdamW<A>, A: ActSample>(dev: &B) {
    for len in [1usize, 17, 255, 40_000] {
        let range = len / 4..len;
        let (mut w, mut m, mut v) = (cases::normal::<f32>(1, len, 1.0), vec![0.0f32; len], vec![0.0f32; len]);
        let (mut w64, mut m64, mut v64) = (wide(&w), wide(&m), wide(&v));
        for step in 1..=3u32 {
            let grad = cases::normal::<f32>(10 + step as u64, len, 1.0);
            let norm: f64 = grad.iter().map(|g| (*g as f64).powi(2)).sum();
            let hyper = adamw::Hyper {
                learning_rate: 0.01,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.1,
                step,
                max_norm: if step == 2 { f32::INFINITY } else { 0.5 },
                norm_slot: 1,
            };
            let (mut w_buf, mut m_buf, mut v_buf) = (input(dev, &w), input(dev, &m), input(dev, &v));
            let (g_buf, mut copy) = (input(dev, &grad), poisoned::<B, A>(dev, len));
            let scalars = input(dev, &[f64::NAN, norm]);
            let state = adamw::State {
                weight: w_buf.buf_mut(),
                grad: g_buf.buf(),
                m: m_buf.buf_mut(),
                v: v_buf.buf_mut(),
                copy: Some(copy.buf_mut()),
                scalars: scalars.buf(),
            };
            adamw::step(dev, range.clone(), hyper, state).unwrap();
            let clip = (hyper.max_norm as f64 / (norm.sqrt() + 1e-6)).min(1.0);
            let (b1, b2) = (hyper.beta1 as f64, hyper.beta2 as f64);
            for i in range.clone() {
                let g = clip * grad[i] as f64;
                m64[i] = b1 * m64[i] + (1.0 - b1) * g;
                v64[i] = b2 * v64[i] + (1.0 - b2) * g * g;
                let (m_hat, v_hat) =
                    (m64[i] / (1.0 - b1.powi(step as i32)), v64[i] / (1.0 - b2.powi(step as i32)));
                let (lr, decay) = (hyper.learning_rate as f64, hyper.weight_decay as f64);
                w64[i] -= lr * (m_hat / (v_hat.sqrt() + hyper.eps as f64) + decay * w64[i]);
            }
            (w, m, v) = (w_buf.read(), m_buf.read(), v_buf.read());
            assert_close("weight", &w, &w64, 1e-6, 1e-5);
            assert_close("m", &m, &m64, 1e-7, 1e-5);
            assert_close("v", &v, &v64, 1e-9, 1e-4);
            let copied = copy.read();
            for i in 0..len {
                let want = if range.contains(&i) { A::from_f32(w[i]) } else { A::POISON };
                assert_same_bits("rounded copy", &copied[i..=i], &[want]);
            }
        }
        // A gradient norm that is not finite: nothing moves.
        for bad in [f64::NAN, f64::INFINITY] {
            let (mut w_buf, mut m_buf, mut v_buf) = (input(dev, &w), input(dev, &m), input(dev, &v));
            let (g_buf, scalars) = (input(dev, &vec![1.0f32; len]), input(dev, &[bad]));
            let hyper = adamw::Hyper {
                learning_rate: 0.01,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.1,
                step: 4,
                max_norm: 1.0,
                norm_slot: 0,
            };
            let state = adamw::State {
                weight: w_buf.buf_mut(),
                grad: g_buf.buf(),
                m: m_buf.buf_mut(),
                v: v_buf.buf_mut(),
                copy: None,
                scalars: scalars.buf(),
            };
            adamw::step::<A, B>(dev, 0..len, hyper, state).unwrap();
            assert_same_bits("weight after a bad step", &w_buf.read(), &w);
            assert_same_bits("m after a bad step", &m_buf.read(), &m);
            assert_same_bits("v after a bad step", &v_buf.read(), &v);
        }
    }
}

/// A forward pass cut in two, the second part told its first row, draws the same dropout.
#[test]
fn dropout_does_not_depend_on_the_batch_split() {
    let dev = &Cpu;
    let (rows, width) = (37, 13);
    let x = cases::normal::<f32>(1, rows * width, 1.0);
    let (weight, bias) = (input(dev, &vec![1.0f32; width]), input(dev, &vec![0.0f32; width]));
    let run = |x: &[f32], first_row: u64| {
        let rows = x.len() / width;
        let (mut x_buf, mut y) = (input(dev, x), poisoned::<_, f32>(dev, x.len()));
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
    assert!(whole.iter().filter(|x| **x == 0.0).count() > rows * width / 10, "nothing was dropped");
}

#[test]
fn linear_has_the_same_bits_for_any_thread_count() {
    let dev = &Cpu;
    let (rows, inputs, outputs) = (333, 100, 130);
    let (x, w) =
        (cases::normal::<bf16>(1, rows * inputs, 1.0), cases::normal::<bf16>(2, outputs * inputs, 1.0));
    let (x_buf, w_buf) = (input(dev, &x), input(dev, &w));
    let [one, two, three] = cases::by_threads(|| {
        let mut y = poisoned::<_, bf16>(dev, rows * outputs);
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
#[test]
fn relu_keeps_nan() {
    let dev = &Cpu;
    let (x, w) = (input(dev, &[f32::NAN, 1.0]), input(dev, &[1.0f32, 1.0]));
    let mut y = poisoned::<_, f32>(dev, 1);
    let read = linear::In { x: x.buf(), weight: w.buf(), bias: None, activation: linear::Activation::Relu };
    dev.clear(y.buf_mut()).unwrap();
    linear::forward(dev, linear::Dims { rows: 1, inputs: 2, outputs: 1 }, read, y.buf_mut()).unwrap();
    assert!(y.read()[0].is_nan());
}

#[test]
fn sums_are_f64_in_fixed_order() {
    let dev = &Cpu;
    for len in [0usize, 1, 31, 16_384, 16_385, 100_003] {
        let x = cases::normal::<f32>(1, len + 3, 1e3);
        let x_buf = input(dev, &x);
        let [one, two, three] = cases::by_threads(|| {
            let mut scalars = input(dev, &[7.0f64, f64::NAN, f64::NAN]);
            reduce::sum(dev, x_buf.buf(), len, scalars.buf_mut(), 1).unwrap();
            reduce::sum_squares(dev, x_buf.buf(), len, scalars.buf_mut(), 2).unwrap();
            scalars.read()
        });
        let sum: f64 = x[..len].iter().map(|x| *x as f64).sum();
        let squares: f64 = x[..len].iter().map(|x| (*x as f64).powi(2)).sum();
        let absolute: f64 = x[..len].iter().map(|x| x.abs() as f64).sum();
        assert_eq!(one[0], 7.0);
        assert!((one[1] - sum).abs() <= 1e-13 * absolute, "{} {sum}", one[1]);
        assert!((one[2] - squares).abs() <= 1e-13 * squares, "{} {squares}", one[2]);
        assert_same_bits("two threads", &two, &one);
        assert_same_bits("three threads", &three, &one);
    }
    let (bad, mut scalars) = (input(dev, &[1.0, f32::NAN, 2.0]), input(dev, &[0.0f64]));
    reduce::sum_squares(dev, bad.buf(), 3, scalars.buf_mut(), 0).unwrap();
    assert!(scalars.read()[0].is_nan());
}

/// Bits against the rules of `ops::mask_tokens`, written out once more; and the shares of a large draw.
#[test]
fn masking_follows_its_rules() {
    let dev = &Cpu;
    let gene = cases::integers(1, 100_000, 1000);
    let dims = mask_tokens::Dims {
        tokens: gene.len(),
        vocab: 1000,
        first_gene: 4,
        mask_id: 1,
        probability: 0.15,
        mask_share: 0.8,
        random_share: 0.1,
        seed: 11,
        step: 6,
        first_row: 1 << 33,
    };
    let run = |dims: mask_tokens::Dims, gene: &[u32]| {
        let n = gene.len();
        let gene_buf = input(dev, gene);
        let (mut masked, mut index, mut target) =
            (poisoned::<_, u32>(dev, n), poisoned::<_, u32>(dev, n), poisoned::<_, i32>(dev, n));
        let out =
            mask_tokens::Out { gene: masked.buf_mut(), index: index.buf_mut(), target: target.buf_mut() };
        let m = mask_tokens::mask(dev, dims, gene_buf.buf(), out).unwrap();
        (masked.read(), index.read()[..m].to_vec(), target.read()[..m].to_vec())
    };
    let (masked, index, target) = run(dims, &gene);
    let two_to_32 = 4294967296.0f64;
    let (mut want, mut want_index) = (gene.clone(), Vec::new());
    let (mut masks, mut others) = (0.0, 0.0);
    for (t, g) in gene.iter().enumerate() {
        let w = rng::stream_block(dims.seed, dims.step, rng::site::MASK, dims.first_row + t as u64);
        if *g < 4 || w[0] as f64 >= dims.probability as f64 * two_to_32 {
            continue;
        }
        want_index.push(t as u32);
        if (w[1] as f64) < dims.mask_share as f64 * two_to_32 {
            want[t] = dims.mask_id;
            masks += 1.0;
        } else if (w[1] as f64) < (dims.mask_share as f64 + dims.random_share as f64) * two_to_32 {
            let draw = w[2] as u64 + ((w[3] as u64) << 32);
            want[t] = 4 + ((draw as u128 * 996) >> 64) as u32;
            others += 1.0;
        }
    }
    assert_same_bits("genes", &masked, &want);
    assert_same_bits("indices", &index, &want_index);
    assert!(index.iter().zip(&target).all(|(i, g)| gene[*i as usize] as i32 == *g));
    assert_eq!(mask_tokens::count(dims, &gene), index.len());
    let genes = gene.iter().filter(|g| **g >= 4).count() as f64;
    let chosen = index.len() as f64;
    assert!((chosen / genes - 0.15).abs() < 0.005 && (masks / chosen - 0.8).abs() < 0.02);
    assert!((others / chosen - 0.1).abs() < 0.015);
    // The same batch in two halves.
    let (left, right) = gene.split_at(33_333);
    let half = |gene: &[u32], first| {
        run(mask_tokens::Dims { tokens: gene.len(), first_row: dims.first_row + first, ..dims }, gene)
    };
    let (a, b) = (half(left, 0), half(right, 33_333));
    assert_same_bits("split genes", &[a.0, b.0].concat(), &masked);
    assert_same_bits("split targets", &[a.2, b.2].concat(), &target);
    // Probabilities 0 and 1.
    assert!(run(mask_tokens::Dims { probability: 0.0, ..dims }, &gene).1.is_empty());
    assert_eq!(run(mask_tokens::Dims { probability: 1.0, ..dims }, &gene).1.len() as f64, genes);
}

/// `round` copies everything after a load.
#[test]
fn rounding_copies_all_weights() {
    let dev = &Cpu;
    let w = cases::normal::<f32>(1, 40_001, 1.0);
    let (w_buf, mut copy) = (input(dev, &w), poisoned::<_, bf16>(dev, w.len()));
    adamw::AdamW::<bf16>::round(dev, w_buf.buf(), copy.buf_mut()).unwrap();
    let want: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
    assert_same_bits("copy", &copy.read(), &want);
}

/// Five clipped steps against torch.optim.AdamW (scripts/golden/make_adamw.py).
#[test]
fn adamw_equals_torch() {
    let golden: serde_json::Value = serde_json::from_str(include_str!("golden/adamw.json")).unwrap();
    let number = |name: &str| golden[name].as_f64().unwrap() as f32;
    let list =
        |v: &serde_json::Value| v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect::<Vec<_>>();
    let narrow = |v: &serde_json::Value| list(v).iter().map(|x| *x as f32).collect::<Vec<_>>();
    let dev = &Cpu;
    let start = narrow(&golden["start"]);
    let mut w = input(dev, &start);
    let (mut m, mut v) = (input(dev, &vec![0.0f32; start.len()]), input(dev, &vec![0.0f32; start.len()]));
    for (i, grad) in golden["grads"].as_array().unwrap().iter().enumerate() {
        let g = input(dev, &narrow(grad));
        let mut scalars = input(dev, &[0.0f64]);
        reduce::sum_squares(dev, g.buf(), start.len(), scalars.buf_mut(), 0).unwrap();
        let hyper = adamw::Hyper {
            learning_rate: number("learning_rate"),
            beta1: number("beta1"),
            beta2: number("beta2"),
            eps: number("eps"),
            weight_decay: number("weight_decay"),
            step: i as u32 + 1,
            max_norm: number("max_norm"),
            norm_slot: 0,
        };
        let state = adamw::State::<Cpu, f32> {
            weight: w.buf_mut(),
            grad: g.buf(),
            m: m.buf_mut(),
            v: v.buf_mut(),
            copy: None,
            scalars: scalars.buf(),
        };
        adamw::step(dev, 0..start.len(), hyper, state).unwrap();
        assert_close(
            &format!("weights after step {}", i + 1),
            &w.read(),
            &list(&golden["weights"][i]),
            1e-7,
            1e-6,
        );
    }
    assert_close("m", &m.read(), &list(&golden["m"]), 1e-8, 1e-5);
    assert_close("v", &v.read(), &list(&golden["v"]), 1e-10, 1e-5);
}
