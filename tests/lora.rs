//! Refine and fine-tuning with low-rank adapters, as runs: what learns, what is saved, what resumes.

#[path = "common/typed_cells.rs"]
mod typed_cells;

use cellrefine::config::Sources;
use cellrefine::error::{Error, Kind};
use cellrefine::model::checkpoint;
use cellrefine::train::record::StepRecord;
use cellrefine::train::{Flow, MarkerInputs, Observer, Resume, RunInputs, RunSummary, SplitFlags, stages};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Stops after one step.
struct StopAt(u64);
impl Observer for StopAt {
    fn step(&mut self, step: u64, _record: Option<&StepRecord>) -> Flow {
        if step == self.0 { Flow::Stop } else { Flow::Continue }
    }
}

struct Case {
    _dir: tempfile::TempDir,
    root: PathBuf,
    corpus: PathBuf,
}

impl Case {
    fn new() -> Case {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_path_buf();
        let corpus = typed_cells::write(&root, "x.cells", &[60, 30, 12], 0.0);
        Case { _dir: dir, root, corpus }
    }

    fn inputs(&self, out: &str, set: &[&str]) -> RunInputs {
        RunInputs {
            corpus: self.corpus.clone(),
            out: self.root.join(out),
            sources: Sources { set: set.iter().map(|s| s.to_string()).collect(), ..Sources::default() },
            split: SplitFlags {
                label: Some("cell_type".into()),
                split: Some("train=0.6,val=0.2,test=0.2".into()),
                ..SplitFlags::default()
            },
            ..RunInputs::default()
        }
    }

    fn pretrained(&self) -> PathBuf {
        let small = [
            "train.steps=60",
            "model.layers=2",
            "model.width=16",
            "model.ffn=32",
            "optimizer.learning_rate=5e-3",
        ];
        let inputs = RunInputs { preset: Some("tiny".into()), ..self.inputs("pre", &small) };
        stages::pretrain(&inputs, &mut StopAt(0)).unwrap().out
    }

    fn on(&self, start: &Path, out: &str, set: &[&str]) -> RunInputs {
        RunInputs { checkpoint: Some(start.to_path_buf()), ..self.inputs(out, set) }
    }
}

fn refine(inputs: &RunInputs, observer: &mut dyn Observer) -> Result<RunSummary, Error> {
    let markers = typed_cells::markers(inputs.corpus.parent().unwrap(), 3);
    stages::refine(inputs, &MarkerInputs { markers, ..MarkerInputs::default() }, observer)
}

fn tensors(file: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = std::fs::read(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |data: &[u8]| -> Vec<f32> {
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    file.tensors().into_iter().map(|(name, view)| (name, floats(view.data()))).collect()
}

const LORA: [&str; 4] =
    ["lora.rank=4", "lora.alpha=10", "optimizer.learning_rate=1e-2", "optimizer.weight_decay=0.1"];

#[test]
fn only_adapted_matrices_change_and_by_what_peft_will_add() {
    let case = Case::new();
    let pre = case.pretrained();
    let start = checkpoint::resolve(&pre).unwrap();
    for (out, extra) in [("f32", "train.precision=f32"), ("bf16", "train.precision=bf16")] {
        let set = [&LORA[..], &["train.steps=12", extra]].concat();
        let run = refine(&case.on(&pre, out, &set), &mut StopAt(0)).unwrap();
        let (before, after) =
            (tensors(&start.join("model.safetensors")), tensors(&run.checkpoint.join("model.safetensors")));
        let thin = tensors(&run.checkpoint.join("adapter/adapter_model.safetensors"));
        assert_eq!(thin.len(), 2 * 12, "{:?}", thin.keys());
        let config = std::fs::read(run.checkpoint.join("adapter/adapter_config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        assert_eq!((config["r"].as_u64(), config["lora_alpha"].as_f64()), (Some(4), Some(10.0)));
        assert_eq!(config["base_model_name_or_path"].as_str(), Some(start.to_str().unwrap()));
        let scale = config["lora_alpha"].as_f64().unwrap() / config["r"].as_f64().unwrap();
        let modules: Vec<&str> =
            config["target_modules"].as_array().unwrap().iter().map(|m| m.as_str().unwrap()).collect();
        let mut moved = 0;
        for (name, after) in &after {
            let module = name.strip_suffix(".weight").unwrap_or(name);
            let before = &before[name];
            if !modules.contains(&module) {
                assert!(before == after, "{name} learned");
                continue;
            }
            let of = |leaf: &str| &thin[&format!("base_model.model.{module}.{leaf}.weight")];
            let (a, b) = (of("lora_A"), of("lora_B"));
            let inputs = a.len() / 4;
            for (i, after) in after.iter().enumerate() {
                let (row, column) = (i / inputs, i % inputs);
                let ba: f64 = (0..4).map(|k| b[row * 4 + k] as f64 * a[k * inputs + column] as f64).sum();
                let wanted = before[i] as f64 + scale * ba;
                assert!((wanted - *after as f64).abs() < 1e-6, "{name}[{i}]: {wanted} {after}");
                moved += usize::from(ba.abs() > 1e-4);
            }
        }
        assert!(moved > 4_000, "{moved} elements moved");
        // Moments are those of the adapters: 2 × 4 × Σ (in + out), padded.
        let moments = tensors(&run.checkpoint.join("state.safetensors"));
        assert!(moments["adapters.m"].len() < 4_000 && !moments.contains_key("network.m"));
    }
}

#[test]
fn a_stopped_run_goes_on_bit_for_bit() {
    let case = Case::new();
    let pre = case.pretrained();
    let set = [&LORA[..], &["train.steps=14", "batch.cells=8", "batch.tokens=64"]].concat();
    for (name, stage) in
        [("refine", refine as fn(&RunInputs, &mut dyn Observer) -> _), ("finetune", stages::finetune)]
    {
        let whole = stage(&case.on(&pre, &format!("{name}-whole"), &set), &mut StopAt(0)).unwrap();
        let mut inputs = case.on(&pre, &format!("{name}-stopped"), &set);
        for stop in [3, 9] {
            let e = stage(&inputs, &mut StopAt(stop)).unwrap_err();
            assert_eq!(e.kind(), Kind::Interrupted, "{e}");
            inputs.resume = Resume::Last;
        }
        let resumed = stage(&inputs, &mut StopAt(0)).unwrap();
        for file in [
            "model.safetensors",
            "state.safetensors",
            "adapters.safetensors",
            "adapter/adapter_model.safetensors",
        ] {
            let read = |run: &RunSummary| std::fs::read(run.checkpoint.join(file)).unwrap();
            assert!(read(&whole) == read(&resumed), "{name}: {file} differs");
        }
    }
}

#[test]
fn adapters_learn_the_types_and_later_stages_start_from_the_merged_network() {
    let case = Case::new();
    let pre = case.pretrained();
    let set = [&LORA[..], &["train.steps=120", "train.eval_every=40"]].concat();
    let refined = refine(&case.on(&pre, "refined", &set), &mut StopAt(0)).unwrap();
    assert!(refined.best.as_ref().unwrap().value > 0.8, "{:?}", refined.best);
    let tuned = stages::finetune(&case.on(&refined.out, "tuned", &set), &mut StopAt(0)).unwrap();
    assert!(tuned.best.as_ref().unwrap().value > 0.8, "{:?}", tuned.best);
}

#[test]
fn adapters_are_refused_where_they_cannot_be() {
    let case = Case::new();
    let pre = case.pretrained();
    let fails = |result: Result<RunSummary, Error>, says: &str| {
        let e = result.unwrap_err();
        assert!(e.kind() == Kind::Usage && e.to_string().contains(says), "{e}");
    };
    let new = RunInputs { preset: Some("tiny".into()), ..case.inputs("bad", &["lora.rank=2"]) };
    fails(stages::pretrain(&new, &mut StopAt(0)), "for refine and finetune");
    fails(refine(&case.on(&pre, "bad", &["lora.rank=17"]), &mut StopAt(0)), "at most 16");
    fails(refine(&case.on(&pre, "bad", &["lora.rank=2", "lora.alpha=0"]), &mut StopAt(0)), "lora.alpha");
    let frozen = ["lora.rank=2", "finetune.freeze_layers=2"];
    fails(stages::finetune(&case.on(&pre, "bad", &frozen), &mut StopAt(0)), "no layer learns");
    assert!(!case.root.join("bad").exists());
}
