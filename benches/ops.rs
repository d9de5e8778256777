//! Criterion view of the ops that dominate a step: linear layers and attention at Geneformer's smallest width.

use cellrefine::bench::random;
use cellrefine::cpu::Cpu;
use cellrefine::device::{Act, Device, Dropout};
use cellrefine::ops::gene_attention::{self, BackwardIn, GeneAttention, Pattern, flops, pairs};
use cellrefine::ops::linear::{Activation, Dims, In, forward};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;

fn linear(c: &mut Criterion) {
    let mut group = c.benchmark_group("linear forward, 4096 rows, FLOP");
    for (inputs, outputs) in [(256, 768), (256, 256), (256, 512), (512, 256)] {
        let dims = Dims { rows: 4096, inputs, outputs };
        let x = Cpu.upload(&vec![0.5f32; dims.rows * inputs]).expect("memory");
        let weight = Cpu.upload(&vec![0.25f32; inputs * outputs]).expect("memory");
        let bias = Cpu.upload(&vec![1f32; outputs]).expect("memory");
        let mut y = Cpu.zeros::<f32>(dims.rows * outputs).expect("memory");
        group.throughput(Throughput::Elements(2 * (dims.rows * inputs * outputs) as u64));
        group.bench_function(BenchmarkId::from_parameter(format!("{inputs}x{outputs}")), |b| {
            b.iter(|| {
                let input = In { x: &x, weight: &weight, bias: Some(&bias), activation: Activation::Relu };
                forward::<f32, Cpu>(&Cpu, dims, input, &mut y).expect("shapes");
            })
        });
    }
    group.finish();
}

/// One pass over cells of `len` tokens; every 40th token is global where a window is given.
fn pass<A: Act>(
    c: &mut Criterion,
    [cells, len, head_width]: [usize; 3],
    window: Option<usize>,
    backward: bool,
) where
    Cpu: GeneAttention<A>,
{
    let (tokens, heads) = (cells * len, 256 / head_width);
    let pattern = window.map_or(Pattern::Dense, |window| Pattern::MarkerSparse { window });
    let dims = gene_attention::Dims { tokens, cells, heads, head_width, max_len: len, pattern };
    let n = tokens * dims.width();
    let starts: Vec<u32> = (0..=cells).map(|c| (c * len) as u32).collect();
    let flags: Vec<u8> = (0..tokens).map(|i| u8::from(i % 40 == 0)).collect();
    let numbers = |seed, len| Cpu.upload(&random::numbers::<A>(seed, len, 1.0)).expect("memory");
    let (qkv, do_) = (numbers(1, 3 * n), numbers(2, n));
    let (cell_start, global) = (Cpu.upload(&starts).expect("memory"), Cpu.upload(&flags).expect("memory"));
    let (mut o, mut dqkv) = (Cpu.zeros::<A>(n).expect("memory"), Cpu.zeros::<A>(3 * n).expect("memory"));
    let zeros = || Cpu.zeros::<f32>(tokens * heads).expect("memory");
    let (mut lse, mut delta) = (zeros(), zeros());
    let input = || gene_attention::In {
        qkv: &qkv,
        cell_start: &cell_start,
        global: Some(&global),
        dropout: Dropout::NONE,
    };
    gene_attention::forward::<A, Cpu>(&Cpu, dims, input(), &mut o, &mut lse).expect("shapes");
    let flop = flops(dims, pairs(pattern, &starts, &flags));
    let (direction, flop) = if backward { ("backward", flop.1) } else { ("forward", flop.0) };
    let name = format!("{cells}x{len}, width {head_width}, window {window:?}, {}", A::NAME);
    let mut group = c.benchmark_group(format!("attention {direction}, FLOP"));
    group.sample_size(10).throughput(Throughput::Elements(flop as u64));
    group.bench_function(BenchmarkId::from_parameter(name), |b| {
        b.iter(|| match backward {
            false => {
                gene_attention::forward::<A, Cpu>(&Cpu, dims, input(), &mut o, &mut lse).expect("shapes")
            }
            true => {
                let saved = BackwardIn { do_: &do_, o: &o, lse: &lse };
                gene_attention::backward::<A, Cpu>(&Cpu, dims, input(), saved, &mut dqkv, &mut delta)
                    .expect("shapes");
            }
        })
    });
    group.finish();
}

/// The shapes of docs/attention.md; RAYON_NUM_THREADS=1 for its table.
fn attention(c: &mut Criterion) {
    let dense = [[2, 512, 64], [1, 2048, 64], [2, 512, 32], [2, 512, 128], [64, 64, 64], [1, 4096, 64]];
    let cases = dense
        .map(|shape| (shape, None))
        .into_iter()
        .chain([([1, 2048, 64], Some(64)), ([1, 4096, 64], Some(64))]);
    for (shape, window) in cases {
        for backward in [false, true] {
            pass::<f32>(c, shape, window, backward);
            pass::<bf16>(c, shape, window, backward);
        }
    }
}

criterion_group!(benches, linear, attention);
criterion_main!(benches);
