//! A run that was stopped at any step and resumed is the run that never stopped, bit for bit; so is a run on another number
//! of threads; and a run cut into other parts differs by rounding alone.

#[path = "common/typed_cells.rs"]
mod typed_cells;

use cellrefine::config::Sources;
use cellrefine::error::{Error, Kind};
use cellrefine::report::jsonl;
use cellrefine::train::record::StepRecord;
use cellrefine::train::{Flow, MarkerInputs, Observer, Resume, RunInputs, RunSummary, SplitFlags, stages};
use std::path::{Path, PathBuf};

type Stage = fn(&RunInputs, &mut dyn Observer) -> Result<RunSummary, Error>;

/// Stops after the steps in `stops`, poisons the steps in `poisons`, keeps what it hears.
#[derive(Default)]
struct Script {
    stops: Vec<u64>,
    poisons: Vec<u64>,
    notes: Vec<String>,
}

impl Observer for Script {
    fn note(&mut self, text: &str) {
        self.notes.push(text.to_string());
    }
    fn step(&mut self, step: u64, _record: Option<&StepRecord>) -> Flow {
        if self.stops.contains(&step) { Flow::Stop } else { Flow::Continue }
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
        let corpus = typed_cells::write(&root, "x.cells", &[60, 30, 12], 0.0);
        Case { _dir: dir, root, corpus }
    }

    fn inputs(&self, out: &str, set: &[&str]) -> RunInputs {
        let mut all: Vec<String> = [
            "model.layers=1",
            "model.width=16",
            "model.ffn=32",
            "batch.cells=8",
            "train.log_every=1",
            "train.checkpoint_every=0",
            "train.eval_every=5",
        ]
        .map(String::from)
        .into();
        all.extend(set.iter().map(|s| s.to_string()));
        RunInputs {
            corpus: self.corpus.clone(),
            out: self.root.join(out),
            preset: Some("tiny".into()),
            sources: Sources { set: all, ..Sources::default() },
            split: SplitFlags {
                label: Some("cell_type".into()),
                split: Some("train=0.6,val=0.2,test=0.2".into()),
                ..SplitFlags::default()
            },
            ..RunInputs::default()
        }
    }

    /// A short pretraining run to start later stages from.
    fn pretrained(&self) -> PathBuf {
        stages::pretrain(&self.inputs("pre", &["train.steps=3"]), &mut Script::default()).unwrap().out
    }
}

/// `inputs` for a later stage: sizes come from the checkpoint.
fn on(checkpoint: &Path, mut inputs: RunInputs) -> RunInputs {
    inputs.preset = None;
    inputs.checkpoint = Some(checkpoint.to_path_buf());
    inputs.sources.set.retain(|s| !s.starts_with("model."));
    inputs
}

/// The files that hold numbers of the training, as bytes.
fn files(checkpoint: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<(String, Vec<u8>)> = std::fs::read_dir(checkpoint)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&p).unwrap()))
        .collect();
    all.sort();
    all
}

/// Every number of a run's log that does not depend on the clock.
fn log(out: &Path) -> Vec<serde_json::Value> {
    let clock = [
        "time",
        "dt_ms",
        "cells_per_s",
        "tokens_per_s",
        "gflop_per_s",
        "fraction_of_peak",
        "peak_gflop_per_s",
        "host_memory_bytes",
    ];
    jsonl::read(&out.join("metrics.jsonl"))
        .unwrap()
        .into_iter()
        .map(|mut line| {
            clock.iter().for_each(|name| {
                line.as_object_mut().unwrap().remove(*name);
            });
            line
        })
        .collect()
}

fn assert_same(a: &RunSummary, b: &RunSummary) {
    let (x, y) = (files(&a.checkpoint), files(&b.checkpoint));
    assert!(x.len() >= 2);
    for ((name, x), (other, y)) in x.iter().zip(&y) {
        assert!(name == other && x == y, "{name} differs");
    }
    assert_eq!(log(&a.out), log(&b.out));
    assert_eq!(a.best, b.best);
}

/// Runs `stage` whole, and again with stops after each of `stops`; the results must be equal.
fn stopped_equals_whole(stage: Stage, make: impl Fn(&str) -> RunInputs, stops: &[u64]) {
    let whole = stage(&make("whole"), &mut Script::default()).unwrap();
    let mut inputs = make("stopped");
    for stop in stops {
        let mut script = Script { stops: vec![*stop], ..Script::default() };
        let e = stage(&inputs, &mut script).unwrap_err();
        assert_eq!(e.kind(), Kind::Interrupted, "{e}");
        assert!(e.to_string().contains(&format!("checkpointed at step {stop}")));
        inputs.resume = Resume::Last;
    }
    let resumed = stage(&inputs, &mut Script::default()).unwrap();
    assert_same(&whole, &resumed);
}

#[test]
fn pretrain_resumes_bit_for_bit() {
    let case = Case::new();
    stopped_equals_whole(
        stages::pretrain,
        |out| case.inputs(out, &["train.steps=23", "batch.tokens=64"]),
        &[1, 7, 8, 22],
    );
}

#[test]
fn recomputation_may_begin_in_the_middle_of_a_run() {
    let case = Case::new();
    let set = ["train.steps=9", "model.hidden_dropout=0.1"];
    let whole = stages::pretrain(&case.inputs("whole", &set), &mut Script::default()).unwrap();
    let e =
        stages::pretrain(&case.inputs("moved", &set), &mut Script { stops: vec![4], ..Script::default() });
    assert_eq!(e.unwrap_err().kind(), Kind::Interrupted);
    let mut inputs = case.inputs("moved", &[set[0], set[1], "train.recompute=true"]);
    inputs.resume = Resume::Last;
    assert_same(&whole, &stages::pretrain(&inputs, &mut Script::default()).unwrap());
}

#[test]
fn pretrain_resumes_with_accumulation_and_class_sampling() {
    let case = Case::new();
    let set = ["train.steps=9", "train.accumulate=3", "batch.sampling=sqrt", "optimizer.schedule=linear"];
    stopped_equals_whole(stages::pretrain, |out| case.inputs(out, &set), &[4]);
}

#[test]
fn finetune_resumes_bit_for_bit() {
    let case = Case::new();
    let pre = case.pretrained();
    let make = |out: &str| on(&pre, case.inputs(out, &["train.steps=17", "batch.tokens=64"]));
    stopped_equals_whole(stages::finetune, make, &[3, 11]);
}

/// `refine` as a [`Stage`]: markers beside the corpus.
fn refine(inputs: &RunInputs, observer: &mut dyn Observer) -> Result<RunSummary, Error> {
    let markers = typed_cells::markers(inputs.corpus.parent().unwrap(), 3);
    stages::refine(inputs, &MarkerInputs { markers, ..MarkerInputs::default() }, observer)
}

#[test]
fn refine_resumes_bit_for_bit() {
    let case = Case::new();
    let pre = case.pretrained();
    let make = |out: &str| on(&pre, case.inputs(out, &["train.steps=17", "train.eval_every=4"]));
    stopped_equals_whole(refine, make, &[2, 9, 10]);
}

#[test]
fn refine_with_cached_gradients_sentences_and_few_labels_resumes_bit_for_bit() {
    let case = Case::new();
    let pre = case.pretrained();
    let set = ["train.steps=12", "batch.tokens=60", "objective.prototypes=sentence", "objective.delta=0.3"];
    let make = |out: &str| {
        let mut inputs = on(&pre, case.inputs(out, &set));
        inputs.split.labels_per_class = Some(4);
        inputs
    };
    stopped_equals_whole(refine, make, &[5]);
}

#[test]
fn label_free_refine_with_refreshed_prototypes_resumes_bit_for_bit() {
    let case = Case::new();
    let pre = case.pretrained();
    let make = |out: &str| {
        let mut inputs = on(&pre, case.inputs(out, &["train.steps=18", "objective.refresh=0.9"]));
        (inputs.split.label, inputs.split.split) = (None, None);
        inputs
    };
    stopped_equals_whole(refine, make, &[9]);
}

#[test]
fn gradient_caching_is_the_whole_batch() {
    let case = Case::new();
    let pre = case.pretrained();
    let losses = |out: &str, tokens: &str| {
        let set = ["train.steps=6", "batch.cells=16", tokens];
        let summary = refine(&on(&pre, case.inputs(out, &set)), &mut Script::default()).unwrap();
        log(&summary.out)
    };
    let (whole, cached) = (losses("a", "batch.tokens=100000"), losses("b", "batch.tokens=30"));
    for (a, b) in whole.iter().zip(&cached) {
        for name in ["loss", "proto", "mlm", "cell_cell", "structure", "anchor", "grad_norm"] {
            let (a, b) = (a[name].as_f64().unwrap(), b[name].as_f64().unwrap());
            assert!((a - b).abs() < 1e-3 * a.abs().max(1e-2), "{name}: {a} {b}");
        }
    }
}

#[test]
fn a_weight_of_zero_leaves_its_term_out() {
    let case = Case::new();
    let pre = case.pretrained();
    for name in ["proto", "mlm", "cell_cell", "structure", "anchor"] {
        let off = format!("objective.{name}=0");
        let inputs = on(&pre, case.inputs(name, &["train.steps=2", &off]));
        let summary = refine(&inputs, &mut Script::default()).unwrap();
        let terms: Vec<&str> = summary.loss.terms.iter().map(|(n, _)| *n).collect();
        assert!(terms.len() == 4 && !terms.contains(&name), "{terms:?}");
        assert!(summary.loss.total.is_finite());
    }
    // Without the masked-gene term its head has no gradient, and so must not decay either.
    let head = |run: &Path| {
        let bytes = std::fs::read(run.join("model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        file.tensor("cls.predictions.transform.dense.weight").unwrap().data().to_vec()
    };
    let before = cellrefine::model::checkpoint::resolve(&pre).unwrap();
    let after = |name: &str| case.root.join(name).join("checkpoints/step-2");
    assert!(head(&before) == head(&after("mlm")) && head(&before) != head(&after("proto")));
}

#[test]
fn refine_learns_the_types_and_finetune_classifies_them() {
    let case = Case::new();
    let set = ["train.steps=120", "optimizer.learning_rate=5e-3", "train.eval_every=40"];
    let pre = stages::pretrain(&case.inputs("pre", &set), &mut Script::default()).unwrap();
    let first = jsonl::read(&pre.out.join("metrics.jsonl")).unwrap()[0]["loss"].as_f64().unwrap();
    assert!(pre.loss.total < first - 0.1, "{first} {}", pre.loss.total);
    // The split is the pretraining run's: nothing is said about it here.
    let inherit = |out: &str| {
        let mut inputs = on(&pre.out, case.inputs(out, &set));
        inputs.split.split = None;
        inputs
    };
    let mut script = Script::default();
    let refined = refine(&inherit("refined"), &mut script).unwrap();
    assert!(script.notes.iter().any(|n| n.contains("split taken over")), "{:?}", script.notes);
    assert!(refined.best.as_ref().unwrap().value > 0.8, "{:?}", refined.best);
    let tuned = stages::finetune(&inherit("tuned"), &mut Script::default()).unwrap();
    assert!(tuned.best.as_ref().unwrap().value > 0.8, "{:?}", tuned.best);
    let folder = cellrefine::model::checkpoint::resolve(&tuned.out).unwrap();
    assert!(folder.ends_with(format!("step-{}", tuned.best.unwrap().step)));
    let split = |run: &Path| std::fs::read(run.join("split.json")).unwrap();
    assert!(split(&pre.out) == split(&refined.out) && split(&pre.out) == split(&tuned.out));
}

#[test]
fn a_classifier_starts_at_the_refined_prototypes() {
    let case = Case::new();
    let long = ["train.steps=120", "optimizer.learning_rate=5e-3", "train.eval_every=40"];
    let pre = stages::pretrain(&case.inputs("pre", &long), &mut Script::default()).unwrap();
    let refined = refine(&on(&pre.out, case.inputs("refined", &long)), &mut Script::default()).unwrap();
    // One step that moves nothing: what is scored is the start.
    let still = [
        "train.steps=1",
        "train.eval_every=1",
        "optimizer.learning_rate=1e-12",
        "optimizer.head_learning_rate=1e-12",
    ];
    let start = |out: &str, head: &str| {
        let mut script = Script::default();
        let set = [&still[..], &[head]].concat();
        let tuned = stages::finetune(&on(&refined.out, case.inputs(out, &set)), &mut script).unwrap();
        (
            tuned.best.unwrap().value,
            script.notes.iter().any(|n| n.contains("starts at the checkpoint's prototypes")),
        )
    };
    let (prototypes, said) = start("prototypes", "finetune.head=prototypes");
    let (random, said_of_random) = start("random", "finetune.head=random");
    assert!(said && !said_of_random);
    assert!(prototypes > 0.8 && prototypes > random + 0.2, "{prototypes} {random}");
}

#[test]
fn bf16_resumes_bit_for_bit() {
    let case = Case::new();
    let set = ["train.steps=6", "train.precision=bf16"];
    stopped_equals_whole(stages::pretrain, |out| case.inputs(out, &set), &[2]);
}

#[test]
fn the_cut_into_parts_changes_rounding_alone() {
    let case = Case::new();
    let loss = |out: &str, tokens: &str| {
        let summary =
            stages::pretrain(&case.inputs(out, &["train.steps=8", tokens]), &mut Script::default()).unwrap();
        log(&summary.out).iter().map(|l| l["loss"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    let (whole, cut) = (loss("a", "batch.tokens=100000"), loss("b", "batch.tokens=30"));
    for (a, b) in whole.iter().zip(&cut) {
        assert!((a - b).abs() < 1e-4 * a.abs(), "{whole:?} {cut:?}");
    }
}

#[test]
fn accumulated_batches_are_one_large_batch() {
    let case = Case::new();
    // No dropout, no masks: a classifier's gradient is a mean over cells when classes weigh the same.
    let pre = case.pretrained();
    let set = [
        "train.steps=2",
        "model.hidden_dropout=0",
        "model.attention_dropout=0",
        "finetune.class_weights=none",
        "train.eval_every=100",
        "optimizer.clip=0.5",
    ];
    let norms = |out: &str, more: &[&str]| {
        let mut inputs = on(&pre, case.inputs(out, &[&set[..], more].concat()));
        inputs.sources.set.extend(["model.hidden_dropout=0".into(), "model.attention_dropout=0".into()]);
        let summary = stages::finetune(&inputs, &mut Script::default()).unwrap();
        log(&summary.out).iter().map(|l| l["grad_norm"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    let (one, two) = (norms("a", &["batch.cells=16"]), norms("b", &["batch.cells=8", "train.accumulate=2"]));
    for (a, b) in one.iter().zip(&two) {
        assert!((a - b).abs() < 1e-4 * a, "{one:?} {two:?}");
    }
}

#[test]
fn bad_steps_are_skipped_named_and_counted() {
    let case = Case::new();
    let inputs = case.inputs("bad", &["train.steps=6", "train.max_bad_steps=3"]);
    let mut script = Script { poisons: vec![2, 4, 5], ..Script::default() };
    let summary = stages::pretrain(&inputs, &mut script).unwrap();
    assert_eq!((summary.steps, summary.bad_steps), (6, 3));
    assert!(
        script.notes.iter().any(|n| n.contains("step 2 skipped") && n.contains("word")),
        "{:?}",
        script.notes
    );
    let lines = log(&summary.out);
    assert!(lines[1]["grad_norm"].is_null() && lines[2]["grad_norm"].is_number());
}

#[test]
fn a_skipped_step_leaves_weights_and_moments_alone() {
    let case = Case::new();
    let mut inputs = case.inputs("skip", &["train.steps=5", "train.checkpoint_every=1", "train.keep=9"]);
    inputs.split.split = None;
    let mut script = Script { poisons: vec![3], ..Script::default() };
    let out = stages::pretrain(&inputs, &mut script).unwrap().out;
    let at = |step: u64| files(&out.join(format!("checkpoints/step-{step}")));
    assert!(at(2) == at(3) && at(3) != at(4));
}

#[test]
fn too_many_bad_steps_in_a_row_stop_the_run() {
    let case = Case::new();
    let inputs = case.inputs("stop", &["train.steps=9", "train.max_bad_steps=3", "train.checkpoint_every=2"]);
    let mut script = Script { poisons: vec![4, 5, 6], ..Script::default() };
    let e = stages::pretrain(&inputs, &mut script).unwrap_err();
    assert_eq!(e.kind().exit_code(), 6);
    assert!(e.to_string().contains("step 6") && e.to_string().contains("word"), "{e}");
    let dump = std::fs::read_to_string(inputs.out.join("bad-step-6.json")).unwrap();
    assert!(dump.contains("\"cell_ids\"") && dump.contains("\"cell"));
    // What is on disk is good (the newest is of step 5, an evaluation), and the run goes on from there.
    let summary =
        stages::pretrain(&RunInputs { resume: Resume::Last, ..inputs }, &mut Script::default()).unwrap();
    assert_eq!((summary.steps, summary.bad_steps), (9, 2));
}

/// Steps that are not logged are settled one step late: with the same weights, notes and end.
#[test]
fn bad_steps_that_are_not_logged_count_all_the_same() {
    let case = Case::new();
    let set = ["train.steps=8", "train.max_bad_steps=3", "train.eval_every=1000"];
    let run = |out: &str, every: &str, stops: &[u64], resume| {
        let mut inputs = case.inputs(out, &[&set[..], &[every]].concat());
        inputs.resume = resume;
        let mut script = Script { poisons: vec![2, 4, 5], stops: stops.to_vec(), ..Script::default() };
        let summary = stages::pretrain(&inputs, &mut script);
        script.notes.retain(|note| note.contains("skipped"));
        (summary, script.notes)
    };
    let (logged, notes) = run("logged", "train.log_every=1", &[], Resume::No);
    let (quiet, late) = run("quiet", "train.log_every=1000", &[], Resume::No);
    let (logged, quiet) = (logged.unwrap(), quiet.unwrap());
    assert!(files(&logged.checkpoint) == files(&quiet.checkpoint) && logged.bad_steps == 3);
    assert_eq!((notes.len(), &notes), (3, &late));
    // Stopped right behind a bad step, and within a row of two.
    for stop in [2, 4] {
        let out = format!("stopped-{stop}");
        let (stopped, _) = run(&out, "train.log_every=1000", &[stop], Resume::No);
        assert_eq!(stopped.unwrap_err().kind(), Kind::Interrupted);
        let (resumed, _) = run(&out, "train.log_every=1000", &[], Resume::Last);
        assert!(files(&logged.checkpoint) == files(&resumed.unwrap().checkpoint), "stopped at {stop}");
    }
    let inputs = case.inputs("end", &[&set[..], &["train.log_every=1000"]].concat());
    let mut script = Script { poisons: vec![4, 5, 6], ..Script::default() };
    let e = stages::pretrain(&inputs, &mut script).unwrap_err();
    assert!(e.kind().exit_code() == 6 && e.to_string().contains("step 6, gradient of word"), "{e}");
    assert!(inputs.out.join("bad-step-6.json").exists());
}

#[test]
fn another_corpus_setting_or_label_is_refused() {
    let case = Case::new();
    let inputs = case.inputs("run", &["train.steps=6"]);
    let mut script = Script { stops: vec![2], ..Script::default() };
    stages::pretrain(&inputs, &mut script).unwrap_err();
    let again = RunInputs { resume: Resume::Last, ..inputs.clone() };
    let refused = |inputs: &RunInputs| {
        let e = stages::pretrain(inputs, &mut Script::default()).unwrap_err();
        assert_eq!(e.kind().exit_code(), 3, "{e}");
        e.to_string()
    };
    let other = typed_cells::write(&case.root, "y.cells", &[60, 30, 13], 0.0);
    assert!(refused(&RunInputs { corpus: other, ..again.clone() }).contains("another corpus"));
    let mut rate = again.clone();
    rate.sources.set.push("optimizer.learning_rate=0.5".into());
    assert!(refused(&rate).contains("optimizer.learning_rate"));
    let mut free = again.clone();
    free.sources.set.extend(["train.log_every=2".into(), "train.keep=5".into()]);
    stages::pretrain(&free, &mut Script::default()).unwrap();
    // A fresh run does not write over an old one.
    let e = stages::pretrain(&inputs, &mut Script::default()).unwrap_err();
    assert!(e.kind().exit_code() == 2 && e.to_string().contains("--resume"), "{e}");
}

#[test]
fn auto_falls_back_to_the_newest_checkpoint_that_verifies() {
    let case = Case::new();
    let make = |out: &str| case.inputs(out, &["train.steps=8", "train.checkpoint_every=2", "train.keep=9"]);
    let whole = stages::pretrain(&make("whole"), &mut Script::default()).unwrap();
    let mut inputs = make("hurt");
    let mut script = Script { stops: vec![6], ..Script::default() };
    stages::pretrain(&inputs, &mut script).unwrap_err();
    let newest = inputs.out.join("checkpoints/step-6/state.safetensors");
    let mut bytes = std::fs::read(&newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(&newest, bytes).unwrap();
    inputs.resume = Resume::Last;
    let e = stages::pretrain(&inputs, &mut Script::default()).unwrap_err();
    assert!(e.kind().exit_code() == 3 && e.to_string().contains("--resume=auto"), "{e}");
    inputs.resume = Resume::Auto;
    let mut script = Script::default();
    let resumed = stages::pretrain(&inputs, &mut script).unwrap();
    assert!(script.notes.iter().any(|n| n.contains("skipped") && n.contains("step-6")), "{:?}", script.notes);
    assert_same(&whole, &resumed);
    // Where there is nothing, auto starts afresh and plain --resume says so.
    let fresh = RunInputs { out: case.root.join("none"), ..inputs.clone() };
    let plain = RunInputs { resume: Resume::Last, ..fresh.clone() };
    assert_eq!(stages::pretrain(&plain, &mut Script::default()).unwrap_err().kind().exit_code(), 3);
    assert_same(&whole, &stages::pretrain(&fresh, &mut Script::default()).unwrap());
}

#[test]
fn equal_bits_for_any_number_of_threads() {
    let case = Case::new();
    let run = |threads: &str| -> Vec<(String, Vec<u8>)> {
        let out = case.root.join(format!("threads{threads}"));
        let status = std::process::Command::new(env!("CARGO_BIN_EXE_cellrefine"))
            .args(["pretrain", "--preset", "tiny", "--quiet", "--threads", threads, "--set", "train.steps=4"])
            .args(["--set", "batch.cells=24", "--corpus"])
            .arg(&case.corpus)
            .arg("--out")
            .arg(&out)
            .status()
            .unwrap();
        assert!(status.success());
        files(&out.join("checkpoints/step-4"))
    };
    assert!(run("1") == run("2"));
}
