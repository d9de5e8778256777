//! Criterion view of the ops that dominate a step: linear layers and attention at Geneformer's smallest width.

use cellrefine::bench::attention::{Case, measure};
use cellrefine::cpu::Cpu;
use cellrefine::device::Device;
use cellrefine::ops::linear::{Activation, Dims, In, forward};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::time::Duration;

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

fn attention(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention, 4 heads of 64");
    group.sample_size(10);
    for (len, window) in [(512, None), (2048, None), (2048, Some(128))] {
        let case = Case { lengths: vec![len; 2], heads: 4, head_width: 64, window, dropout: 0.0 };
        let name = format!("{len}/{}", if window.is_some() { "marker-sparse" } else { "dense" });
        group.bench_function(BenchmarkId::from_parameter(name), |b| {
            b.iter_custom(|rounds| {
                let one = || measure::<f32, Cpu>(&Cpu, &case, 1).expect("shapes");
                (0..rounds).map(|_| one()).map(|t| Duration::from_secs_f64(t.forward_s + t.backward_s)).sum()
            })
        });
    }
    group.finish();
}

criterion_group!(benches, linear, attention);
criterion_main!(benches);
