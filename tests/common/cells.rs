//! Made-up cells for corpus tests: lengths, genes, names and labels from a small generator, the same for every run.
#![allow(dead_code)]

use cellrefine::corpus::*;
use cellrefine::rng::Philox;
use half::f16;
use std::path::Path;

/// An owned cell.
#[derive(Debug, Clone, PartialEq)]
pub struct Cell {
    pub id: String,
    pub gene: Vec<u32>,
    pub value: Vec<f16>,
    pub total_count: f32,
    pub label: Option<String>,
    pub score: f64,
}

/// `n` cells over `vocab` ids; lengths 0 to `longest`; every seventh label missing.
pub fn cells(n: usize, vocab: u32, longest: usize, seed: u64) -> Vec<Cell> {
    let mut r = Philox::new(seed, 0, 1);
    (0..n)
        .map(|i| {
            let len = if i % 11 == 5 { 0 } else { r.below(longest as u64 + 1) as usize };
            Cell {
                id: format!("cell-{i}-\u{3b1}"),
                gene: (0..len).map(|_| 2 + r.below(vocab as u64 - 2) as u32).collect(),
                value: (0..len).map(|_| f16::from_f64(r.uniform() * 5.0)).collect(),
                total_count: r.below(20_000) as f32,
                label: (i % 7 != 6).then(|| format!("type {}", ["b", "a", "c"][(r.below(6) / 2) as usize])),
                score: r.normal(),
            }
        })
        .collect()
}

pub fn options(vocab: usize, values: bool, shard_cells: usize) -> CorpusOptions {
    CorpusOptions {
        vocab: VocabIdentity { digest: format!("vocab-{vocab}"), len: vocab },
        vocab_file: Some(b"made up\n".to_vec()),
        values,
        shard_cells,
        obs: vec![
            ObsSpec { name: "cell_type".into(), kind: ObsKind::Categorical },
            ObsSpec { name: "score".into(), kind: ObsKind::Numeric },
        ],
        provenance: serde_json::json!({"made": "up"}),
    }
}

pub fn write(path: &Path, cells: &[Cell], options: CorpusOptions) -> Manifest {
    let values = options.values;
    let mut w = CorpusWriter::create(path, options).unwrap();
    for c in cells {
        push(&mut w, c, values).unwrap();
    }
    w.finish().unwrap()
}

pub fn push(w: &mut CorpusWriter, c: &Cell, values: bool) -> cellrefine::error::Result<()> {
    w.push(&CellRecord {
        id: &c.id,
        gene: &c.gene,
        value: values.then_some(&c.value[..]),
        total_count: c.total_count,
        obs: &[c.label.as_deref().map_or(ObsValue::Missing, ObsValue::Category), ObsValue::Number(c.score)],
    })
}

/// Every field of every cell, read back.
pub fn check(corpus: &Corpus, cells: &[Cell]) {
    let values = corpus.manifest().values;
    let label = corpus.categorical("cell_type").unwrap();
    let score = corpus.numeric("score").unwrap();
    assert_eq!(corpus.cells(), cells.len());
    assert_eq!(corpus.tokens(), cells.iter().map(|c| c.gene.len() as u64).sum::<u64>());
    assert!(label.categories.windows(2).all(|w| w[0] < w[1]));
    for (i, c) in cells.iter().enumerate() {
        assert_eq!(corpus.genes(i).unwrap().to_vec(), c.gene, "cell {i}");
        assert_eq!(corpus.len_of(i), c.gene.len());
        assert_eq!(corpus.values(i).unwrap(), values.then_some(&c.value[..]), "cell {i}");
        assert_eq!(corpus.cell_id(i).unwrap(), c.id);
        assert_eq!(corpus.total_count(i).unwrap(), c.total_count);
        assert_eq!(
            (label.codes[i] >= 0).then(|| &label.categories[label.codes[i] as usize]),
            c.label.as_ref()
        );
        assert_eq!(score[i], c.score);
    }
}
