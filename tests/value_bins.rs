//! An encoder that reads the bins of a cell's own values instead of ranks: trained, refined and embedded like the other.

#[path = "common/typed_cells.rs"]
mod typed_cells;

use cellrefine::backend::Choice;
use cellrefine::config::Sources;
use cellrefine::corpus::{
    CellRecord, Corpus, CorpusOptions, CorpusWriter, ObsKind, ObsSpec, ObsValue, VocabIdentity,
};
use cellrefine::cpu::Cpu;
use cellrefine::error::{Error, Kind};
use cellrefine::eval::embed::{EmbedOptions, Embedder};
use cellrefine::rng::Philox;
use cellrefine::train::{MarkerInputs, RunInputs, RunSummary, SplitFlags, Unwatched, stages};
use half::f16;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The cells of `typed_cells` with falling values; `shuffled` puts the same genes and values in another order.
fn with_values(root: &Path, plain: &Path, name: &str, shuffled: bool) -> PathBuf {
    let plain = Corpus::open(plain).unwrap();
    let vocab = plain.vocab().unwrap();
    let options = CorpusOptions {
        vocab: VocabIdentity { digest: vocab.digest().into(), len: vocab.len() },
        vocab_file: Some(vocab.to_tsv(&[]).into_bytes()),
        values: true,
        shard_cells: 0,
        obs: vec![ObsSpec { name: "cell_type".into(), kind: ObsKind::Categorical }],
        provenance: serde_json::json!({"made": "up"}),
    };
    let types = plain.categorical("cell_type").unwrap();
    let mut random = Philox::new(3, 0, 9);
    let path = root.join(name);
    let mut writer = CorpusWriter::create(&path, options).unwrap();
    for cell in 0..plain.cells() {
        let gene = plain.genes(cell).unwrap().to_vec();
        let mut pairs: Vec<(u32, f16)> =
            gene.iter().enumerate().map(|(i, g)| (*g, f16::from_f32(6.0 - 0.125 * i as f32))).collect();
        if shuffled {
            random.shuffle(&mut pairs);
        }
        let (gene, value): (Vec<u32>, Vec<f16>) = pairs.into_iter().unzip();
        let obs = [ObsValue::Category(&types.categories[types.codes[cell] as usize])];
        let id = plain.cell_id(cell).unwrap();
        let record = CellRecord { id, gene: &gene, value: Some(&value), total_count: 100.0, obs: &obs };
        writer.push(&record).unwrap();
    }
    writer.finish().unwrap();
    path
}

fn inputs(corpus: &Path, out: &Path, set: &[&str]) -> RunInputs {
    let all = ["batch.cells=16", "optimizer.learning_rate=5e-3"].iter().chain(set).map(|s| s.to_string());
    RunInputs {
        device: Choice::Cpu,
        corpus: corpus.to_path_buf(),
        out: out.to_path_buf(),
        sources: Sources { set: all.collect(), ..Sources::default() },
        split: SplitFlags {
            label: Some("cell_type".into()),
            split: Some("train=0.6,val=0.2,test=0.2".into()),
            ..SplitFlags::default()
        },
        ..RunInputs::default()
    }
}

fn pretrain(corpus: &Path, out: &Path, embedding: &str) -> Result<RunSummary, Error> {
    let small = ["model.layers=1", "model.width=16", "model.ffn=32", "train.steps=80", embedding];
    let inputs = RunInputs { preset: Some("tiny".into()), ..inputs(corpus, out, &small) };
    stages::pretrain(&inputs, &mut Unwatched)
}

fn rows(corpus: &Path, checkpoint: &Path) -> Vec<f32> {
    let corpus = Arc::new(Corpus::open(corpus).unwrap());
    let cells: Vec<u32> = (0..corpus.cells() as u32).collect();
    let mut embedder =
        Embedder::<Cpu, f32>::open(&Cpu, checkpoint, corpus, &EmbedOptions::default()).unwrap();
    embedder.collect(&cells, |_| ()).unwrap()
}

fn farthest(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn value_bins_are_trained_refined_and_embedded_and_order_says_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let plain = typed_cells::write(root, "plain.cells", &[60, 30, 12], 0.0);
    let markers = MarkerInputs { markers: typed_cells::markers(root, 3), ..MarkerInputs::default() };
    let ranked = with_values(root, &plain, "ranked.cells", false);
    let shuffled = with_values(root, &plain, "shuffled.cells", true);

    let pre = pretrain(&ranked, &root.join("pre"), "model.embedding=value-bins").unwrap().out;
    let config = std::fs::read_to_string(pre.join("checkpoints/step-80/config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["cellrefine"]["embedding"], "value-bins");
    assert_eq!(config["cellrefine"]["value_bins"], 51, "scGPT's number, where none is set");
    let (a, b) = (rows(&ranked, &pre), rows(&shuffled, &pre));
    assert!(farthest(&a, &b) < 1e-4, "order changed a row by {}", farthest(&a, &b));
    assert!(farthest(&a[..16], &a[16..32]) > 0.01, "cells are told apart");

    let on = |out: &str, set: &[&str]| {
        let set = [&["train.steps=120", "train.eval_every=40"][..], set].concat();
        RunInputs { checkpoint: Some(pre.clone()), ..inputs(&ranked, &root.join(out), &set) }
    };
    let refined = stages::refine(&on("refined", &[]), &markers, &mut Unwatched).unwrap();
    assert!(refined.best.as_ref().unwrap().value > 0.6, "{:?}", refined.best);
    let sentences = on("sentences", &["objective.prototypes=sentence"]);
    stages::refine(&sentences, &markers, &mut Unwatched).unwrap();
    let further = RunInputs { checkpoint: Some(refined.out.clone()), ..on("tuned", &["train.steps=240"]) };
    let tuned = stages::finetune(&further, &mut Unwatched).unwrap();
    assert!(tuned.best.as_ref().unwrap().value > 0.6, "{:?}", tuned.best);

    // The same cells through ranks: there the order is what is read.
    let by_rank = pretrain(&ranked, &root.join("rank"), "model.embedding=rank").unwrap().out;
    assert!(farthest(&rows(&ranked, &by_rank), &rows(&shuffled, &by_rank)) > 0.01);

    let e = stages::finetune(&on("bad", &["model.embedding=rank"]), &mut Unwatched).unwrap_err();
    assert!(e.kind() == Kind::Usage && e.to_string().contains("model.embedding"), "{e}");
    let e = pretrain(&plain, &root.join("bad"), "model.embedding=value-bins").unwrap_err();
    assert!(e.kind() == Kind::Input && e.to_string().contains("--values"), "{e}");
    assert!(!root.join("bad").exists());
}
