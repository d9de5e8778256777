//! Attention's calls and its naive f64 oracle, for every backend.

use super::cases::{cell_start, normal};
use super::guarded::{self, Guarded, Sample};
use cellrefine::device::{Act, Device, Dropout};
use cellrefine::ops::gene_attention::{self, BackwardIn, Dims, GeneAttention, In, Pattern};
use cellrefine::rng::{ATTENTION_ROW_STRIDE, Philox, dropout_scale, dropout_threshold, lane16, stream_block};
use half::bf16;

/// One call: shapes, pattern and dropout.
#[derive(Clone)]
pub struct Case {
    pub lengths: Vec<usize>,
    pub heads: usize,
    pub head_width: usize,
    /// Half-width of the window and every how many tokens one is global.
    pub sparse: Option<(usize, usize)>,
    pub dropout: Dropout,
    /// Standard deviation of q and k.
    pub scale: f64,
    /// Global tokens in place of those that `global` scatters.
    pub flags: Option<Vec<u8>>,
}

impl Case {
    pub fn dense(lengths: &[usize], heads: usize, head_width: usize) -> Case {
        let lengths = lengths.to_vec();
        Case { lengths, heads, head_width, sparse: None, dropout: Dropout::NONE, scale: 1.0, flags: None }
    }
    pub fn sparse(mut self, window: usize, every: usize) -> Case {
        self.sparse = Some((window, every));
        self
    }
    pub fn dropout(mut self, probability: f32) -> Case {
        self.dropout =
            Dropout { probability, seed: 0x1234_5678_9ABC, step: 11, site: 5, first_row: (1 << 33) + 3 };
        self
    }
    pub fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }
    pub fn width(&self) -> usize {
        self.heads * self.head_width
    }
    pub fn pattern(&self) -> Pattern {
        self.sparse.map_or(Pattern::Dense, |(window, _)| Pattern::MarkerSparse { window })
    }
    pub fn dims(&self) -> Dims {
        Dims {
            tokens: self.tokens(),
            cells: self.lengths.len(),
            heads: self.heads,
            head_width: self.head_width,
            max_len: self.lengths.iter().copied().max().unwrap_or(0),
            pattern: self.pattern(),
        }
    }
    /// The first token of the batch and scattered ones are global.
    pub fn global(&self) -> Vec<u8> {
        if let Some(flags) = &self.flags {
            return flags.clone();
        }
        let mut rng = Philox::new(3, 0, 78);
        let every = self.sparse.map_or(1, |(_, every)| every) as u64;
        (0..self.tokens()).map(|i| u8::from(i == 0 || rng.below(every) == 0)).collect()
    }
    pub fn qkv<A: Act>(&self) -> Vec<A> {
        let (d, mut x) = (self.width(), normal::<A>(1, 3 * self.tokens() * self.width(), 1.0));
        for (_, x) in x.iter_mut().enumerate().filter(|(i, _)| i % (3 * d) < 2 * d) {
            *x = A::from_f32(x.to_f32() * self.scale as f32);
        }
        x
    }
    pub fn do_<A: Act>(&self) -> Vec<A> {
        normal(2, self.tokens() * self.width(), 1.0)
    }
}

/// What a run leaves.
pub struct Results<A> {
    pub o: Vec<A>,
    pub lse: Vec<f32>,
    pub dqkv: Vec<A>,
    pub delta: Vec<f32>,
}

/// The buffers of a call between guard words, outputs full of poison.
pub struct Buffers<B: Device, A: Sample> {
    pub qkv: Guarded<B, A>,
    pub do_: Guarded<B, A>,
    start: Guarded<B, u32>,
    global: Guarded<B, u8>,
    pub o: Guarded<B, A>,
    pub lse: Guarded<B, f32>,
    pub dqkv: Guarded<B, A>,
    pub delta: Guarded<B, f32>,
}

impl<B: Device, A: Act + Sample> Buffers<B, A> {
    pub fn new(dev: &B, case: &Case, qkv: &[A], do_: &[A]) -> Self {
        let dims = case.dims();
        Buffers {
            qkv: guarded::input(dev, qkv),
            do_: guarded::input(dev, do_),
            start: guarded::input(dev, &cell_start(&case.lengths)),
            global: guarded::input(dev, &case.global()),
            o: guarded::poisoned(dev, dims.tokens * dims.width()),
            lse: guarded::poisoned(dev, dims.tokens * dims.heads),
            dqkv: guarded::poisoned(dev, 3 * dims.tokens * dims.width()),
            delta: guarded::poisoned(dev, dims.tokens * dims.heads),
        }
    }
    /// Calls `run(input, o, lse)`.
    pub fn forward<R>(
        &mut self,
        case: &Case,
        run: impl FnOnce(In<'_, B, A>, &mut B::Buf<A>, &mut B::Buf<f32>) -> R,
    ) -> R {
        let Buffers { qkv, start, global, o, lse, .. } = self;
        run(input(case, qkv, start, global), o.buf_mut(), lse.buf_mut())
    }
    /// Calls `run(input, saved, dqkv, delta)`.
    pub fn backward<R>(
        &mut self,
        case: &Case,
        run: impl FnOnce(In<'_, B, A>, BackwardIn<'_, B, A>, &mut B::Buf<A>, &mut B::Buf<f32>) -> R,
    ) -> R {
        let Buffers { qkv, do_, start, global, o, lse, dqkv, delta } = self;
        let saved = BackwardIn { do_: do_.buf(), o: o.buf(), lse: lse.buf() };
        run(input(case, qkv, start, global), saved, dqkv.buf_mut(), delta.buf_mut())
    }
    pub fn read(&self) -> Results<A> {
        Results { o: self.o.read(), lse: self.lse.read(), dqkv: self.dqkv.read(), delta: self.delta.read() }
    }
}

fn input<'a, B: Device, A: Act + Sample>(
    case: &Case,
    qkv: &'a Guarded<B, A>,
    start: &'a Guarded<B, u32>,
    global: &'a Guarded<B, u8>,
) -> In<'a, B, A> {
    let global = case.sparse.is_some().then(|| global.buf());
    In { qkv: qkv.buf(), cell_start: start.buf(), global, dropout: case.dropout }
}

/// Both directions through the checked op, on given inputs.
pub fn run_on<A: Act + Sample, B: GeneAttention<A>>(
    dev: &B,
    case: &Case,
    qkv: &[A],
    do_: &[A],
) -> Results<A> {
    let mut buffers = Buffers::new(dev, case, qkv, do_);
    let dims = case.dims();
    buffers.forward(case, |input, o, lse| gene_attention::forward(dev, dims, input, o, lse)).unwrap();
    buffers
        .backward(case, |input, saved, dqkv, delta| {
            gene_attention::backward(dev, dims, input, saved, dqkv, delta)
        })
        .unwrap();
    buffers.read()
}

/// The same on the case's own inputs.
pub fn run<A: Act + Sample, B: GeneAttention<A>>(dev: &B, case: &Case) -> Results<A> {
    run_on(dev, case, &case.qkv::<A>(), &case.do_::<A>())
}

/// The oracle's results, in f64 throughout; `p_rounded` is o with each probability, relative to the row's largest, rounded
/// to bf16 on the way: what a bf16 product of P and V stores.
pub struct Exact {
    pub o: Vec<f64>,
    pub o_p_rounded: Vec<f64>,
    pub lse: Vec<f64>,
    pub dqkv: Vec<f64>,
}

pub fn oracle(case: &Case, qkv: &[f64], do_: &[f64]) -> Exact {
    let (h, k, d, n) = (case.heads, case.head_width, case.width(), case.tokens());
    let global = case.global();
    let mut x = Exact {
        o: vec![0.0; n * d],
        o_p_rounded: vec![0.0; n * d],
        lse: vec![0.0; n * h],
        dqkv: vec![0.0; 3 * n * d],
    };
    let scale = 1.0 / (k as f64).sqrt();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let starts = cell_start(&case.lengths);
    for cell in starts.windows(2) {
        let cell = cell[0] as usize..cell[1] as usize;
        for head in 0..h {
            let part = |i: usize, third: usize| &qkv[(i * 3 + third) * d + head * k..][..k];
            for i in cell.clone() {
                let s: Vec<f64> = cell
                    .clone()
                    .map(|j| match case.sparse {
                        Some((w, _)) if global[i] == 0 && global[j] == 0 && i.abs_diff(j) > w => {
                            f64::NEG_INFINITY
                        }
                        _ => dot(part(i, 0), part(j, 1)) * scale,
                    })
                    .collect();
                let max = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = s.iter().map(|s| (s - max).exp()).sum();
                x.lse[i * h + head] = max + sum.ln();
                let keep: Vec<f64> = (0..s.len())
                    .map(|j| {
                        let row = (case.dropout.first_row + i as u64) * h as u64 + head as u64;
                        let element = row * ATTENTION_ROW_STRIDE + j as u64;
                        let block = stream_block(
                            case.dropout.seed,
                            case.dropout.step,
                            case.dropout.site,
                            element / 8,
                        );
                        let dropped = lane16(block, element) < dropout_threshold(case.dropout.probability);
                        if dropped { 0.0 } else { dropout_scale(case.dropout.probability) as f64 }
                    })
                    .collect();
                for (j, s) in s.iter().enumerate() {
                    let e = (s - max).exp();
                    let (p, rounded) = (e / sum, bf16::from_f64(e).to_f64() / sum);
                    for c in 0..k {
                        let v = part(cell.start + j, 2)[c] * keep[j];
                        x.o[i * d + head * k + c] += p * v;
                        x.o_p_rounded[i * d + head * k + c] += rounded * v;
                    }
                }
                let at = i * d + head * k..i * d + (head + 1) * k;
                let delta = dot(&do_[at.clone()], &x.o[at.clone()]);
                let go = &do_[at];
                for (j, s) in s.iter().enumerate() {
                    let p = (s - max).exp() / sum;
                    let ds = p * (keep[j] * dot(go, part(cell.start + j, 2)) - delta) * scale;
                    let j_at = (cell.start + j) * 3 * d + head * k;
                    for (c, go) in go.iter().enumerate() {
                        x.dqkv[i * 3 * d + head * k + c] += ds * part(cell.start + j, 1)[c];
                        x.dqkv[j_at + d + c] += ds * part(i, 0)[c];
                        x.dqkv[j_at + 2 * d + c] += p * keep[j] * go;
                    }
                }
            }
        }
    }
    x
}

/// Greatest magnitude.
pub fn largest(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |m, x| m.max(x.abs()))
}
