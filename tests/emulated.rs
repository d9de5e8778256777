//! The CUDA backend end to end without a GPU: a tiny model is pretrained, refined, fine-tuned and embeds through the kernels in
//! the emulator. Its losses are the CPU backend's up to rounding, its bits are the same every time, and a run that was stopped
//! goes on, on the other backend as well.
#![cfg(emulator)]

#[path = "common/typed_cells.rs"]
mod typed_cells;

use cellrefine::backend::Choice;
use cellrefine::config::Sources;
use cellrefine::error::{Error, Kind};
use cellrefine::report::jsonl;
use cellrefine::train::record::StepRecord;
use cellrefine::train::{Flow, MarkerInputs, Observer, Resume, RunInputs, RunSummary, SplitFlags, stages};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

type Stage = fn(&RunInputs, &mut dyn Observer) -> Result<RunSummary, Error>;

/// Steps over which losses are compared.
const STEPS: &str = "train.steps=20";

/// Stops after a step.
#[derive(Default)]
struct Stop(Option<u64>);

impl Observer for Stop {
    fn step(&mut self, step: u64, _record: Option<&StepRecord>) -> Flow {
        if self.0 == Some(step) { Flow::Stop } else { Flow::Continue }
    }
}

struct Place {
    _dir: tempfile::TempDir,
    root: PathBuf,
    corpus: PathBuf,
}

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_path_buf();
        let corpus = typed_cells::write(&root, "x.cells", &[20, 12, 6], 0.0);
        typed_cells::markers(&root, 3);
        Place { _dir: dir, root, corpus }
    }

    fn inputs(&self, device: Choice, out: &str, set: &[&str]) -> RunInputs {
        let all = ["batch.cells=6", "train.log_every=1", "train.checkpoint_every=0", "train.eval_every=1000"];
        RunInputs {
            device,
            corpus: self.corpus.clone(),
            out: self.root.join(out),
            sources: Sources {
                set: all.iter().chain(set).map(|s| s.to_string()).collect(),
                ..Sources::default()
            },
            split: SplitFlags {
                label: Some("cell_type".into()),
                split: Some("train=0.9,val=0.1".into()),
                ..SplitFlags::default()
            },
            ..RunInputs::default()
        }
    }

    /// A new encoder of one layer and one head of 32 columns.
    fn fresh(&self, device: Choice, out: &str, set: &[&str]) -> RunInputs {
        let sizes = ["model.layers=1", "model.width=32", "model.heads=1", "model.ffn=64"];
        let mut inputs = self.inputs(device, out, &[&sizes[..], set].concat());
        inputs.preset = Some("tiny".into());
        inputs
    }

    /// A later stage.
    fn after(&self, checkpoint: &Path, device: Choice, out: &str, set: &[&str]) -> RunInputs {
        RunInputs { checkpoint: Some(checkpoint.to_path_buf()), ..self.inputs(device, out, set) }
    }

    fn pretrained(&self) -> PathBuf {
        let inputs = self.fresh(Choice::Cpu, "pre", &["train.steps=3"]);
        stages::pretrain(&inputs, &mut Stop::default()).unwrap().out
    }

    fn json(&self, words: &str) -> Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cellrefine"));
        command.current_dir(&self.root).args(words.split_whitespace()).args(["--json", "--quiet"]);
        let out = command.output().unwrap();
        assert!(out.status.success(), "{words}: {}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout).unwrap()
    }
}

/// `refine` as a [`Stage`]: markers beside the corpus.
fn refine(inputs: &RunInputs, observer: &mut dyn Observer) -> Result<RunSummary, Error> {
    let markers = inputs.corpus.parent().unwrap().join("markers.gmt");
    stages::refine(inputs, &MarkerInputs { markers, ..MarkerInputs::default() }, observer)
}

/// Runs the stage on both backends; each logged loss and term agrees to `tolerance` of the loss, over all 20 steps.
fn agrees_with_the_cpu(
    stage: Stage,
    tolerance: f64,
    terms: &[&str],
    make: impl Fn(Choice, &str) -> RunInputs,
) {
    let lines = |device, out: &str| {
        let summary = stage(&make(device, out), &mut Stop::default()).unwrap();
        jsonl::read(&summary.out.join("metrics.jsonl")).unwrap()
    };
    let (cpu, cuda) = (lines(Choice::Cpu, "on-cpu"), lines(Choice::Emulated, "emulated"));
    assert_eq!((cpu.len(), cuda.len()), (20, 20));
    for (step, (a, b)) in cpu.iter().zip(&cuda).enumerate() {
        let loss = a["loss"].as_f64().unwrap();
        for name in terms.iter().chain(&["loss"]) {
            let (a, b) = (a[*name].as_f64().unwrap(), b[*name].as_f64().unwrap());
            let error = (a - b).abs() / loss.abs();
            assert!(error <= tolerance, "{name} at step {}: {a} on the CPU, {b} emulated", step + 1);
        }
    }
    assert!(cuda[0]["loss"] != cuda[19]["loss"], "nothing was learned");
}

const ALL_TERMS: &[&str] = &["proto", "mlm", "cell_cell", "structure", "anchor"];

#[test]
fn pretraining_follows_the_cpu() {
    let place = Place::new();
    agrees_with_the_cpu(stages::pretrain, 1e-4, &["mlm"], |device, out| place.fresh(device, out, &[STEPS]));
}

#[test]
fn pretraining_in_bf16_follows_the_cpu() {
    let place = Place::new();
    let set = [STEPS, "train.precision=bf16"];
    agrees_with_the_cpu(stages::pretrain, 2e-2, &["mlm"], |device, out| place.fresh(device, out, &set));
}

#[test]
fn refinement_follows_the_cpu() {
    let place = Place::new();
    let pre = place.pretrained();
    agrees_with_the_cpu(refine, 1e-4, ALL_TERMS, |device, out| place.after(&pre, device, out, &[STEPS]));
}

#[test]
fn marker_sparse_refinement_in_parts_follows_the_cpu() {
    let place = Place::new();
    let pre = place.pretrained();
    // A window shorter than the cells, and gradient caching: a logical batch is three or four parts.
    let set = [STEPS, "model.attention=marker-sparse", "model.window=3", "batch.tokens=48"];
    agrees_with_the_cpu(refine, 1e-4, ALL_TERMS, |device, out| place.after(&pre, device, out, &set));
}

#[test]
fn refinement_in_bf16_follows_the_cpu() {
    let place = Place::new();
    let pre = place.pretrained();
    let set = [STEPS, "train.precision=bf16"];
    agrees_with_the_cpu(refine, 2e-2, ALL_TERMS, |device, out| place.after(&pre, device, out, &set));
}

#[test]
fn fine_tuning_follows_the_cpu() {
    let place = Place::new();
    let pre = place.pretrained();
    agrees_with_the_cpu(stages::finetune, 1e-4, &[], |device, out| place.after(&pre, device, out, &[STEPS]));
}

/// Numbers of the training in a checkpoint, as bytes.
fn bytes(checkpoint: &Path) -> Vec<Vec<u8>> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(checkpoint)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    files.sort();
    files.iter().map(|p| std::fs::read(p).unwrap()).collect()
}

/// A run that was stopped and resumed has the bits of one that was not: two runs agree, and nothing is lost between them.
#[test]
fn a_stopped_run_goes_on_bit_for_bit() {
    let place = Place::new();
    let pre = place.pretrained();
    for precision in ["f32", "bf16"] {
        let precision = format!("train.precision={precision}");
        let make = |out: &str| place.after(&pre, Choice::Emulated, out, &["train.steps=6", &precision]);
        let name = |part: &str| format!("{part}-{precision}");
        let whole = refine(&make(&name("whole")), &mut Stop::default()).unwrap();
        let mut inputs = make(&name("stopped"));
        assert_eq!(refine(&inputs, &mut Stop(Some(2))).unwrap_err().kind(), Kind::Interrupted);
        inputs.resume = Resume::Last;
        let resumed = refine(&inputs, &mut Stop::default()).unwrap();
        assert!(bytes(&whole.checkpoint) == bytes(&resumed.checkpoint), "{precision}: other bits");
    }
}

#[test]
fn a_run_moves_between_backends() {
    let place = Place::new();
    let make = |device, out: &str| place.fresh(device, out, &["train.steps=8"]);
    let whole = stages::pretrain(&make(Choice::Cpu, "whole"), &mut Stop::default()).unwrap();
    let mut inputs = make(Choice::Cpu, "moved");
    for (stop, next) in [(3, Choice::Emulated), (5, Choice::Cpu)] {
        assert_eq!(stages::pretrain(&inputs, &mut Stop(Some(stop))).unwrap_err().kind(), Kind::Interrupted);
        inputs.resume = Resume::Last;
        inputs.device = next;
    }
    let moved = stages::pretrain(&inputs, &mut Stop::default()).unwrap();
    let (a, b) = (whole.loss.total, moved.loss.total);
    assert!((a - b).abs() <= 1e-4 * a, "{a} on the CPU alone, {b} on both");
}

/// The program itself, from pretraining to embeddings.
#[test]
fn the_chain_by_the_program() {
    let place = Place::new();
    place.json(
        "pretrain --device emulated --corpus x.cells --preset tiny --out pre --set model.layers=1 --set model.width=32 \
         --set model.heads=1 --set model.ffn=64 --set batch.cells=6 --set train.steps=3",
    );
    let refined = place.json(
        "refine --device emulated --corpus x.cells --checkpoint pre --markers markers.gmt --label cell_type \
         --split train=0.8,val=0.2 --out refined --set train.steps=3 --set batch.cells=6",
    );
    assert!(refined["terms"]["proto"].is_number() && refined["evaluation"].is_object(), "{refined}");
    let tuned = place.json(
        "finetune --device emulated --corpus x.cells --checkpoint refined --label cell_type --out tuned \
         --set train.steps=3 --set batch.cells=6",
    );
    assert!(tuned["evaluation"]["val_macro_f1"].is_number(), "{tuned}");
    let embed = |device: &str| -> Vec<f32> {
        place.json(&format!(
            "embed --device {device} --corpus x.cells --checkpoint refined --out {device}.npy"
        ));
        let data = std::fs::read(place.root.join(format!("{device}.npy"))).unwrap();
        npyz::NpyFile::new(&data[..]).unwrap().into_vec::<f32>().unwrap()
    };
    let (cpu, cuda) = (embed("cpu"), embed("emulated"));
    assert_eq!((cpu.len(), cuda.len()), (38 * 32, 38 * 32));
    let far = cpu.iter().zip(&cuda).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
    assert!(far < 1e-4 && cpu.iter().any(|x| x.abs() > 0.1), "embeddings differ by {far}");
    let annotated = |device: &str| {
        place.json(&format!("annotate --device {device} --corpus x.cells --checkpoint refined --markers markers.gmt --out {device}.tsv"))
    };
    annotated("cpu");
    annotated("emulated");
    let table = |device: &str| std::fs::read_to_string(place.root.join(format!("{device}.tsv"))).unwrap();
    let labels = |text: &str| -> Vec<String> {
        text.lines().map(|l| l.split('\t').take(2).collect::<Vec<_>>().join("\t")).collect()
    };
    assert_eq!(labels(&table("cpu")), labels(&table("emulated")));
}
