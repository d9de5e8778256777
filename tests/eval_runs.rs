//! `eval` on checkpoints that have an answer of their own: a classifier against transformers and sklearn, and refined and
//! fine-tuned runs against what the runs themselves measured.

#[path = "common/typed_cells.rs"]
mod typed_cells;

use cellrefine::corpus::{
    CellRecord, CorpusOptions, CorpusWriter, ObsKind, ObsSpec, ObsValue, VocabIdentity,
};
use cellrefine::cpu::Cpu;
use cellrefine::device::Device;
use cellrefine::genes::Vocab;
use cellrefine::model::snapshot::Snapshot;
use cellrefine::model::{Layout, Store};
use serde_json::Value;
use std::path::Path;
use std::process::Command;

#[track_caller]
fn ok(root: &Path, words: &str) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cellrefine"));
    command.env_remove("CELLREFINE_SEED").current_dir(root);
    let out = command.args(words.split_whitespace()).args(["--json", "--quiet"]).output().unwrap();
    assert!(out.status.success(), "{words}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

#[track_caller]
fn near(got: &Value, want: &Value, tolerance: f64) {
    let (a, b) = (got.as_f64().unwrap(), want.as_f64().unwrap());
    assert!((a - b).abs() <= tolerance, "{a} is not {b}");
}

/// The cells of `golden` over a vocabulary of 41 tokens, with their class and fold.
fn write_corpus(path: &Path, golden: &Value) {
    let mut tokens = vec!["<pad>".to_string(), "<mask>".to_string()];
    tokens.extend((2..41).map(|id| format!("ENSG{id:011}")));
    let median = (0..41).map(|id| if id < 2 { 0.0 } else { 1.0 }).collect();
    let vocab = Vocab::from_parts(tokens, median, Vec::new()).unwrap();
    let column = |name: &str| ObsSpec { name: name.into(), kind: ObsKind::Categorical };
    let options = CorpusOptions {
        vocab: VocabIdentity { digest: vocab.digest().into(), len: vocab.len() },
        vocab_file: Some(vocab.to_tsv(&[]).into_bytes()),
        values: false,
        shard_cells: 0,
        obs: vec![column("class"), column("fold")],
        provenance: serde_json::json!({}),
    };
    let mut writer = CorpusWriter::create(path, options).unwrap();
    for (i, cell) in golden["cells"].as_array().unwrap().iter().enumerate() {
        let gene: Vec<u32> =
            cell["gene"].as_array().unwrap().iter().map(|g| g.as_u64().unwrap() as u32).collect();
        let obs = ["class", "fold"].map(|name| ObsValue::Category(cell[name].as_str().unwrap()));
        let id = i.to_string();
        writer.push(&CellRecord { id: &id, gene: &gene, value: None, total_count: 1.0, obs: &obs }).unwrap();
    }
    writer.finish().unwrap();
}

/// A folder that `transformers` saved, a classifier of our own beside it; the classifier's order of classes is not the corpus's,
/// it lacks a class, and has one that no cell is of (`scripts/golden/make_classifier.py`).
#[test]
fn a_classifier_answers_as_transformers_and_is_scored_as_by_sklearn() {
    let golden: Value = serde_json::from_str(include_str!("golden/classifier.json")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    write_corpus(&dir.path().join("x.cells"), &golden);
    let parity = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/parity");
    let folder = dir.path().join("tuned");
    std::fs::create_dir(&folder).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(Path::new(parity).join(name), folder.join(name)).unwrap();
    }
    let floats = |name: &str| -> Vec<f32> {
        golden[name].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
    };
    let classes: Vec<String> = serde_json::from_value(golden["classes"].clone()).unwrap();
    let layout = Layout::classifier(classes.len(), 64);
    let mut store = Store::<Cpu, f32, _>::zeros(&Cpu, &layout).unwrap();
    let named = store.named_mut();
    Cpu.write(&mut named.weight, &floats("weight")).unwrap();
    Cpu.write(&mut named.bias, &floats("bias")).unwrap();
    let mut snapshot = Snapshot::default();
    snapshot.classifier(&Cpu, &layout, &store, &classes, "class").unwrap();
    snapshot.write(&folder).unwrap();

    let words =
        "eval --corpus x.cells --checkpoint tuned --label class --holdout fold=test --layer -1 --pool mean";
    let json = ok(dir.path(), words);
    let m = &json["metrics"];
    assert_eq!(m["predictor"], "classifier");
    near(&m["accuracy"], &golden["accuracy"], 1e-12);
    near(&m["macro_f1"], &golden["macro_f1"], 1e-12);
    let (got, want) = (m["per_class"].as_object().unwrap(), golden["per_class"].as_object().unwrap());
    assert_eq!(got.len(), want.len(), "{got:?}");
    for (class, scores) in want {
        assert_eq!(got[class]["support"], scores["support"], "{class}");
        for name in ["f1", "precision", "recall"] {
            near(&got[class][name], &scores[name], 1e-12);
        }
    }
}

/// The runs measured themselves on their validation cells as they went; `eval --part val` of the same checkpoint, which goes
/// another way (checkpoint from disk, buffers for evaluation, scores of its own), must find the same numbers.
#[test]
fn eval_finds_what_refined_and_fine_tuned_runs_measured() {
    let dir = tempfile::tempdir().unwrap();
    typed_cells::write(dir.path(), "x.cells", &[60, 30, 20], 0.0);
    typed_cells::markers(dir.path(), 3);
    let small = "--set model.width=16 --set model.ffn=32 --set model.layers=1 --set batch.cells=8";
    let split = "--label cell_type --split train=0.5,val=0.3,test=0.2";
    ok(
        dir.path(),
        &format!("pretrain --corpus x.cells --preset tiny {split} --out pre {small} --set train.steps=6"),
    );
    let stage = "--corpus x.cells --label cell_type --set train.steps=8 --set batch.cells=8";
    let refined =
        ok(dir.path(), &format!("refine {stage} --checkpoint pre --markers markers.gmt --out refined"));
    let tuned = ok(dir.path(), &format!("finetune {stage} --checkpoint refined --out tuned"));

    let eval = "eval --corpus x.cells --label cell_type --part val --checkpoint";
    let json = ok(dir.path(), &format!("{eval} refined/checkpoints/step-8"));
    let m = &json["metrics"];
    assert_eq!((&m["predictor"], &m["prototypes"]), (&"prototype".into(), &"checkpoint".into()));
    assert!(json["split"]["source"].as_str().unwrap().contains("recorded in"));
    near(&m["recall_at"]["1"], &refined["evaluation"]["val_recall_at_1"], 1e-9);
    near(&m["macro_recall_at"]["1"], &refined["evaluation"]["val_macro_recall_at_1"], 1e-9);
    near(&m["accuracy"], &refined["evaluation"]["val_recall_at_1"], 1e-9);
    assert_eq!(m["recall_at"]["3"], 1.0, "three types in all");

    let json = ok(dir.path(), &format!("{eval} tuned/checkpoints/step-8"));
    let m = &json["metrics"];
    assert_eq!(m["predictor"], "classifier");
    near(&m["accuracy"], &tuned["evaluation"]["val_accuracy"], 1e-9);
    near(&m["macro_f1"], &tuned["evaluation"]["val_macro_f1"], 1e-9);
}
