//! Several ranks are one process: the same batches, masks and dropout, the loss and gradients of one rank but for the rounding of
//! sums, the same bits at every repeat and on every rank; they stop, skip and fail together.

#[path = "common/typed_cells.rs"]
mod typed_cells;

use cellrefine::collective::{Collective, threads};
use cellrefine::config::Sources;
use cellrefine::error::{Error, Kind};
use cellrefine::report::jsonl;
use cellrefine::train::record::StepRecord;
use cellrefine::train::{Flow, MarkerInputs, Observer, Resume, RunInputs, RunSummary, SplitFlags, stages};
use std::path::{Path, PathBuf};
use std::time::Duration;

type Stage = fn(&RunInputs, &mut dyn Observer) -> Result<RunSummary, Error>;

/// Stops and poisons steps, and keeps what it was told.
#[derive(Clone, Default)]
struct Script {
    stops: Option<u64>,
    poisons: Vec<u64>,
    notes: Vec<String>,
}

impl Observer for Script {
    fn note(&mut self, text: &str) {
        self.notes.push(text.to_string());
    }
    fn step(&mut self, step: u64, _record: Option<&StepRecord>) -> Flow {
        if self.stops == Some(step) { Flow::Stop } else { Flow::Continue }
    }
    fn poisons(&self, step: u64) -> bool {
        self.poisons.contains(&step)
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
        let corpus = typed_cells::write(&root, "x.cells", &[60, 30, 13], 0.0);
        Case { _dir: dir, root, corpus }
    }

    fn inputs(&self, out: &str, set: &[&str]) -> RunInputs {
        let sizes = ["model.layers=2", "model.width=16", "model.ffn=32"];
        let base =
            ["batch.cells=10", "batch.tokens=64", "train.log_every=1", "train.eval_every=3", "train.steps=7"];
        RunInputs {
            corpus: self.corpus.clone(),
            out: self.root.join(out),
            preset: Some("tiny".into()),
            sources: Sources {
                set: [&sizes[..], &base, set].concat().iter().map(|s| s.to_string()).collect(),
                ..Sources::default()
            },
            split: SplitFlags {
                label: Some("cell_type".into()),
                split: Some("train=0.6,val=0.2,test=0.2".into()),
                ..SplitFlags::default()
            },
            ..RunInputs::default()
        }
    }

    /// Inputs of a later stage: sizes come from a short pretraining.
    fn later(&self, out: &str, set: &[&str]) -> RunInputs {
        let pre = self.root.join("pre");
        if !pre.exists() {
            stages::pretrain(&self.inputs("pre", &["train.steps=3"]), &mut Script::default()).unwrap();
        }
        let mut inputs = self.inputs(out, set);
        inputs.preset = None;
        inputs.checkpoint = Some(pre);
        inputs
            .sources
            .set
            .retain(|s| !s.starts_with("model.l") && !s.starts_with("model.w") && !s.starts_with("model.f"));
        inputs
    }
}

/// `refine` as a [`Stage`]: markers beside the corpus.
fn refine(inputs: &RunInputs, observer: &mut dyn Observer) -> Result<RunSummary, Error> {
    let markers = inputs.corpus.parent().unwrap().join("m").join(inputs.ranks.rank().to_string());
    std::fs::create_dir_all(&markers).unwrap();
    let markers = typed_cells::markers(&markers, 3);
    stages::refine(inputs, &MarkerInputs { markers, ..MarkerInputs::default() }, observer)
}

/// Runs `stage` as `world` threads, each with its script; outcomes by rank.
fn ranks(
    world: usize,
    stage: Stage,
    inputs: &RunInputs,
    script: impl Fn(usize) -> Script + Sync,
) -> Vec<(Result<RunSummary, Error>, Script)> {
    let one = |all: Collective| {
        let mut script = script(all.rank());
        let inputs = RunInputs { ranks: all, ..inputs.clone() };
        (stage(&inputs, &mut script), script)
    };
    std::thread::scope(|scope| {
        let one = &one;
        let ranks = threads::ranks(world, Duration::from_secs(120));
        let all: Vec<_> = ranks.into_iter().map(|all| scope.spawn(move || one(all))).collect();
        all.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn quiet(_: usize) -> Script {
    Script::default()
}

fn log(out: &Path) -> Vec<serde_json::Value> {
    jsonl::read(&out.join("metrics.jsonl")).unwrap()
}

/// Weights and moments of the checkpoint of `step`.
fn files(out: &Path, step: u64) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> = std::fs::read_dir(out.join(format!("checkpoints/step-{step}")))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap()))
        .collect();
    all.sort();
    all
}

/// First moments after one step: a tenth of the clipped gradient, by tensor.
fn gradients(out: &Path) -> Vec<(String, Vec<f32>)> {
    let bytes = std::fs::read(out.join("checkpoints/step-1/state.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Vec<_> = file
        .tensors()
        .into_iter()
        .filter(|(name, _)| name.ends_with(".m"))
        .map(|(name, tensor)| {
            let floats = tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            (name, floats.collect())
        })
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// One rank and several: gradients of the first step within 1e-6 of their norm, losses and norms of all steps close, cells and
/// tokens counted alike; a repeat has the same bits.
fn several_are_one(stage: Stage, make: impl Fn(&str, &[&str]) -> RunInputs, worlds: &[usize]) {
    let first = ["train.steps=1", "train.checkpoint_every=1"];
    stage(&make("one-step", &first), &mut Script::default()).unwrap();
    let one = stage(&make("one", &[]), &mut Script::default()).unwrap();
    for world in worlds {
        let name = |what: &str| format!("{what}-{world}");
        for (summary, _) in ranks(*world, stage, &make(&name("first"), &first), quiet) {
            summary.unwrap();
        }
        let (a, b) = (gradients(&make("one-step", &[]).out), gradients(&make(&name("first"), &[]).out));
        assert!(!a.is_empty() && a.len() == b.len());
        for ((tensor, a), (other, b)) in a.iter().zip(&b) {
            assert_eq!(tensor, other);
            let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
            let size = norm(&mut a.iter().map(|x| *x as f64));
            let apart = norm(&mut a.iter().zip(b).map(|(a, b)| *a as f64 - *b as f64));
            assert!(size > 0.0 && apart <= 1e-6 * size, "{world} ranks, {tensor}: {apart:e} of {size:e}");
        }
        let repeat: Vec<_> = ["a", "b"]
            .iter()
            .map(|turn| {
                let inputs = make(&name(turn), &[]);
                for (summary, _) in ranks(*world, stage, &inputs, quiet) {
                    let summary = summary.unwrap();
                    assert_eq!((summary.steps, summary.bad_steps), (one.steps, 0));
                }
                inputs.out
            })
            .collect();
        assert!(files(&repeat[0], one.steps) == files(&repeat[1], one.steps), "{world} ranks, a repeat");
        let (a, b) = (log(&one.out), log(&repeat[0]));
        assert_eq!(a.len(), b.len());
        for (i, (a, b)) in a.iter().zip(&b).enumerate() {
            assert_eq!((&a["tokens"], &a["cells"], &a["epoch"]), (&b["tokens"], &b["cells"], &b["epoch"]));
            for name in ["loss", "grad_norm"] {
                let (a, b) = (a[name].as_f64().unwrap(), b[name].as_f64().unwrap());
                // Weights drift apart by the rounding of earlier steps.
                let tolerance = if i == 0 { 1e-6 } else { 2e-4 };
                assert!((a - b).abs() <= tolerance * a.abs(), "{world} ranks, line {i}: {name} {a} {b}");
            }
        }
    }
}

#[test]
fn pretraining_ranks_are_one_process() {
    let case = Case::new();
    let dropout = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1", "train.accumulate=2"];
    several_are_one(stages::pretrain, |out, set| case.inputs(out, &[&dropout[..], set].concat()), &[2, 3]);
}

/// Layers of 0.8 M weights: two pieces of the sum go behind the backward pass, under parts and batches of unequal number.
#[test]
fn sums_behind_the_backward_pass_are_those_after_it() {
    let case = Case::new();
    let sizes = ["model.layers=3", "model.width=256", "model.ffn=1024", "train.steps=3", "batch.cells=5"];
    for more in [&["train.accumulate=2", "batch.tokens=40"][..], &["optimizer.sharded=true"]] {
        let name = format!("{}", more.len());
        let make = |out: &str, set: &[&str]| {
            case.inputs(&format!("{name}-{out}"), &[&sizes[..], more, set].concat())
        };
        several_are_one(stages::pretrain, make, &[2, 3]);
    }
}

#[test]
fn moments_divided_over_ranks_change_nothing_but_rounding() {
    let case = Case::new();
    let sharded = ["optimizer.sharded=true"];
    several_are_one(refine, |out, set| case.later(out, &[&sharded[..], set].concat()), &[2, 3]);
    let bf16 = ["optimizer.sharded=true", "train.precision=bf16", "train.steps=2", "train.eval_every=100"];
    for (summary, _) in ranks(2, stages::pretrain, &case.inputs("bf16", &bf16), quiet) {
        summary.unwrap();
    }
    // What three ranks saved, divided, one resumes whole, and a NaN in a slice is found by all.
    let inputs = case.inputs("resumed", &sharded);
    let stop = |_: usize| Script { stops: Some(4), poisons: vec![2], ..Script::default() };
    for (outcome, script) in ranks(3, stages::pretrain, &inputs, stop) {
        assert_eq!(outcome.unwrap_err().kind(), Kind::Interrupted);
        assert!(script.notes.iter().any(|note| note.contains("step 2 skipped") && note.contains("word")));
    }
    let again = RunInputs { resume: Resume::Last, ..inputs };
    assert_eq!(stages::pretrain(&again, &mut Script::default()).unwrap().steps, 7);
}

#[test]
fn refining_ranks_are_one_process() {
    let case = Case::new();
    several_are_one(refine, |out, set| case.later(out, &[&["objective.refresh=0.9"], set].concat()), &[2, 4]);
}

#[test]
fn tuning_ranks_are_one_process() {
    let case = Case::new();
    several_are_one(stages::finetune, |out, set| case.later(out, set), &[2]);
}

#[test]
fn adapters_are_summed_over_ranks() {
    let case = Case::new();
    several_are_one(refine, |out, set| case.later(out, &[&["lora.rank=2"], set].concat()), &[2]);
}

#[test]
fn more_ranks_than_cells_of_a_batch() {
    let case = Case::new();
    let make =
        |out: &str, set: &[&str]| case.later(out, &[&["batch.cells=3", "train.steps=3"], set].concat());
    several_are_one(refine, make, &[5]);
}

#[test]
fn a_signal_to_one_rank_stops_all_and_any_number_of_ranks_goes_on() {
    let case = Case::new();
    let whole = stages::pretrain(&case.inputs("whole", &[]), &mut Script::default()).unwrap();
    for (stopped, resumed) in [(2usize, 1usize), (1, 3), (2, 2)] {
        let inputs = case.inputs(&format!("stopped-{stopped}-{resumed}"), &[]);
        // The last rank is told.
        let script = |rank: usize| Script { stops: (rank + 1 == stopped).then_some(4), ..Script::default() };
        for (outcome, _) in ranks(stopped, stages::pretrain, &inputs, script) {
            let e = outcome.unwrap_err();
            assert!(e.kind() == Kind::Interrupted && e.to_string().contains("checkpointed at step 4"), "{e}");
        }
        let again = RunInputs { resume: Resume::Last, ..inputs.clone() };
        let outcomes = ranks(resumed, stages::pretrain, &again, quiet);
        for (rank, (summary, script)) in outcomes.iter().enumerate() {
            let summary = summary.as_ref().unwrap();
            assert_eq!(summary.steps, 7);
            let said = script.notes.iter().any(|note| note.contains(&format!("continued by {resumed}")));
            assert_eq!(said, stopped != resumed, "rank {rank}: {:?}", script.notes);
        }
        let (a, b) = (log(&whole.out), log(&inputs.out));
        for (a, b) in a.iter().zip(&b) {
            let (x, y) = (a["loss"].as_f64().unwrap(), b["loss"].as_f64().unwrap());
            assert!((x - y).abs() <= 2e-4 * x, "{x} {y}");
            assert_eq!((&a["step"], &a["tokens"]), (&b["step"], &b["tokens"]));
        }
        if stopped == resumed {
            let unbroken = case.inputs("unbroken", &[]);
            ranks(stopped, stages::pretrain, &unbroken, quiet)
                .into_iter()
                .for_each(|(s, _)| drop(s.unwrap()));
            assert!(files(&unbroken.out, 7) == files(&inputs.out, 7), "a resumed run of {stopped} ranks");
        }
    }
}

#[test]
fn a_nan_of_one_rank_is_skipped_by_all_and_too_many_stop_all() {
    let case = Case::new();
    let inputs = case.later("skipped", &["train.max_bad_steps=3"]);
    let poison = |steps: &'static [u64]| {
        move |rank: usize| Script {
            poisons: if rank == 1 { steps.into() } else { Vec::new() },
            ..Script::default()
        }
    };
    for (summary, script) in ranks(2, refine, &inputs, poison(&[2, 5])) {
        assert_eq!(summary.unwrap().bad_steps, 2);
        assert!(script.notes.iter().any(|note| note.contains("step 5 skipped")), "{:?}", script.notes);
    }
    let inputs = case.later("stopped", &["train.max_bad_steps=3"]);
    for (outcome, _) in ranks(2, refine, &inputs, poison(&[2, 3, 4])) {
        assert_eq!(outcome.unwrap_err().kind(), Kind::Numerical);
    }
    assert!(inputs.out.join("bad-step-4.json").is_file());
}

#[test]
fn what_one_rank_cannot_do_ends_all_with_its_reason() {
    let case = Case::new();
    // Rank 1 sees another corpus: missing there.
    let inputs = case.inputs("failed", &[]);
    let stage: Stage = |inputs, observer| {
        let mut inputs = inputs.clone();
        if inputs.ranks.rank() == 1 {
            inputs.corpus = "/nowhere/x.cells".into();
        }
        stages::pretrain(&inputs, observer)
    };
    let outcomes = ranks(3, stage, &inputs, quiet);
    let kinds: Vec<_> = outcomes.iter().map(|(o, _)| o.as_ref().unwrap_err().kind()).collect();
    assert_eq!(kinds, [Kind::Environment, Kind::Input, Kind::Environment]);
    for rank in [0, 2] {
        let e = outcomes[rank].0.as_ref().unwrap_err().to_string();
        assert!(e.contains("rank 1 stopped") && e.contains("/nowhere/x.cells"), "{e}");
    }
    assert!(!inputs.out.join("checkpoints").exists());
    // A folder that holds a run already is refused by the leader, and so by all.
    stages::pretrain(&inputs, &mut Script::default()).unwrap();
    for (rank, (outcome, _)) in ranks(2, stages::pretrain, &inputs, quiet).into_iter().enumerate() {
        let e = outcome.unwrap_err();
        assert!(e.to_string().contains("holds a run already"), "rank {rank}: {e}");
    }
}

#[test]
fn ranks_with_other_weights_are_found_out() {
    let case = Case::new();
    let stage: Stage = |inputs, observer| {
        let mut inputs = inputs.clone();
        if inputs.ranks.rank() == 1 {
            inputs.sources.set.push("optimizer.learning_rate=0.0123".into());
        }
        stages::pretrain(&inputs, observer)
    };
    for (outcome, _) in ranks(2, stage, &case.inputs("drift", &[]), quiet) {
        let e = outcome.unwrap_err();
        assert!(e.to_string().contains("different weights"), "{e}");
    }
}
