//! Sums of table rows, their LayerNorm and dropout; gradients of tables in which genes repeat.

use crate::common::close::{assert_close, assert_rounded, assert_same_bits, wide};
use crate::common::guarded::{input, poisoned};
use crate::common::{cases, naive};
use crate::{ActSample, DROPOUT};
use cellrefine::device::{Act, Dropout};
use cellrefine::ops::embed;

on_every_backend!(A: forward, backward);
on_emulated!(A: forward, backward);
mutants!("embed");

/// The sort by key has no op of its own.
#[cfg(emulator)]
#[test]
fn mutants_of_the_sort_are_caught() {
    crate::common::mutants::each_is_caught("sort", "embed::");
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

/// (N, D, value bins, dropout); more genes than a task's share in the fifth, more tokens than a block sorts and more keys than a
/// digit holds in the last, where the first genes stand in many chunks; columns beyond a block's in the one before.
const EMBED: &[(usize, usize, usize, bool)] = &[
    (1, 1, 0, false),
    (7, 17, 3, false),
    (33, 100, 0, true),
    (130, 48, 5, true),
    (257, 16, 0, false),
    (70, 264, 2, true),
    (2100, 8, 300, true),
];

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

fn forward<B: embed::Embed<A>, A: ActSample>(dev: &B) {
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

fn backward<B: embed::Embed<A>, A: ActSample>(dev: &B) {
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
