//! What a training step asks of the device: after the first, no memory, and nothing that the host waits for but the norm of the
//! step before. Logged steps read their losses as well, once a logical batch.
//!
//! One test, because the drivers count for the whole process.
#![cfg(emulator)]

#[path = "common/typed_cells.rs"]
mod typed_cells;

use cellrefine::backend::Choice;
use cellrefine::config::Sources;
use cellrefine::cuda::{Traffic, traffic};
use cellrefine::error::Error;
use cellrefine::train::record::StepRecord;
use cellrefine::train::{Flow, MarkerInputs, Observer, RunInputs, RunSummary, SplitFlags, stages};
use std::path::{Path, PathBuf};

type Stage = fn(&RunInputs, &mut dyn Observer) -> Result<RunSummary, Error>;

const STEPS: usize = 9;

/// The counts after each step.
#[derive(Default)]
struct Watch(Vec<Traffic>);

impl Observer for Watch {
    fn step(&mut self, _step: u64, _record: Option<&StepRecord>) -> Flow {
        self.0.push(traffic());
        Flow::Continue
    }
    /// A bad step is nothing special for the device.
    fn poisons(&self, step: u64) -> bool {
        step == 4
    }
}

struct Place {
    root: PathBuf,
    corpus: PathBuf,
}

impl Place {
    fn inputs(&self, out: &str, checkpoint: Option<&Path>, set: &[&str]) -> RunInputs {
        let sizes = ["model.layers=1", "model.width=32", "model.heads=1", "model.ffn=64"];
        let all = ["train.steps=9", "batch.cells=6", "train.checkpoint_every=0", "train.eval_every=1000"];
        let sizes = if checkpoint.is_some() { &sizes[..0] } else { &sizes[..] };
        RunInputs {
            device: Choice::Emulated,
            corpus: self.corpus.clone(),
            out: self.root.join(out),
            preset: checkpoint.is_none().then(|| "tiny".into()),
            checkpoint: checkpoint.map(Path::to_path_buf),
            sources: Sources {
                set: all.iter().chain(sizes).chain(set).map(|s| s.to_string()).collect(),
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
}

fn refine(inputs: &RunInputs, observer: &mut dyn Observer) -> Result<RunSummary, Error> {
    let markers = inputs.corpus.parent().unwrap().join("markers.gmt");
    stages::refine(inputs, &MarkerInputs { markers, ..MarkerInputs::default() }, observer)
}

/// Runs the stage; each step but the first and the last, which is evaluated, makes `reads` later reads and no other traffic
/// towards the host. Returns uploads per step.
#[track_caller]
fn is_quiet(stage: Stage, inputs: &RunInputs, reads: u64) -> Vec<u64> {
    let mut watch = Watch::default();
    let summary = stage(inputs, &mut watch).unwrap();
    assert_eq!((watch.0.len(), summary.bad_steps), (STEPS, 1));
    let pairs = watch.0.windows(2).enumerate().take(STEPS - 2);
    pairs
        .map(|(i, pair)| {
            let [before, after] = [pair[0], pair[1]];
            let step = i + 2;
            assert_eq!(after.allocations, before.allocations, "step {step} allocates");
            assert_eq!(after.downloads, before.downloads, "step {step} stops for a download");
            assert_eq!(after.later_reads - before.later_reads, reads, "step {step} reads");
            // Step 4 is poisoned by one upload.
            after.uploads - before.uploads - u64::from(step == 4)
        })
        .collect()
}

#[test]
fn steps_neither_allocate_nor_wait() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().to_path_buf();
    let corpus = typed_cells::write(&root, "x.cells", &[20, 12, 6], 0.0);
    typed_cells::markers(&root, 3);
    let place = Place { root, corpus };
    let quiet = "train.log_every=1000";

    let inputs = place.inputs("pre", None, &[quiet]);
    assert_eq!(is_quiet(stages::pretrain, &inputs, 1), [3; 7], "genes, positions, offsets");
    let pre = inputs.out;
    let bf16 = [quiet, "train.precision=bf16", "train.accumulate=2"];
    assert_eq!(is_quiet(stages::pretrain, &place.inputs("bf16", None, &bf16), 1), [6; 7]);
    // Logged: the loss of each of two logical batches, and the norm.
    let logged = ["train.log_every=1", "train.accumulate=2", "batch.tokens=48"];
    is_quiet(stages::pretrain, &place.inputs("logged", None, &logged), 3);

    is_quiet(refine, &place.inputs("refine", Some(&pre), &[quiet]), 1);
    // Gradient caching: parts go through twice, and their vectors stay on the device.
    let parts = [quiet, "batch.tokens=48", "model.attention=marker-sparse", "model.window=3"];
    is_quiet(refine, &place.inputs("parts", Some(&pre), &parts), 1);
    let logged = ["train.log_every=1", "batch.tokens=48"];
    is_quiet(refine, &place.inputs("logged-parts", Some(&pre), &logged), 2);

    is_quiet(stages::finetune, &place.inputs("finetune", Some(&pre), &[quiet]), 1);
}
