//! Criterion view of `cellrefine bench step`: forward and training steps of the smallest Geneformer.

use cellrefine::bench::Effort;
use cellrefine::bench::step::{Step, StepCase};
use cellrefine::cpu::Cpu;
use cellrefine::model::Preset;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

fn step(c: &mut Criterion) {
    let mut group = c.benchmark_group("step/gf-v1-10m/f32");
    group.sample_size(10);
    for (seq, train) in [(512, false), (512, true), (2048, false)] {
        let preset = Preset::named("gf-v1-10m").expect("a preset");
        let case = StepCase {
            preset,
            lengths: vec![seq; 4],
            train,
            mlm: false,
            graph: false,
            effort: Effort::quick(),
            seed: 0,
        };
        let mut step = Step::<Cpu, f32>::prepare(&Cpu, &case).expect("buffers");
        group.throughput(Throughput::Elements(4 * seq as u64));
        let mode = if train { "train" } else { "fwd" };
        group.bench_function(BenchmarkId::new(mode, seq), |b| b.iter(|| step.run().expect("a step")));
    }
    group.finish();
}

criterion_group!(benches, step);
criterion_main!(benches);
