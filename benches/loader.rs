//! Criterion view of `cellrefine bench loader`: seconds per cell of packed batches in random order.

use cellrefine::bench::loader::{LoaderCase, run};
use criterion::{Criterion, criterion_group, criterion_main};
use std::time::Duration;

fn loader(c: &mut Criterion) {
    let mut group = c.benchmark_group("loader");
    group.sample_size(10);
    group.bench_function("one cell, random order, warm", |b| {
        b.iter_custom(|cells| {
            let report = run(&LoaderCase { cells: 20_000, ..LoaderCase::default() }).expect("a corpus");
            Duration::from_secs_f64(cells as f64 / report["cells_per_s"].as_f64().expect("a rate"))
        })
    });
    group.finish();
}

criterion_group!(benches, loader);
criterion_main!(benches);
