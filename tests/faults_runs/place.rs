//! A folder with a small corpus, and runs in it: stages called as the library offers them, on one rank or several that are threads,
//! and the program as a process.
#![allow(dead_code)] // every module uses its own part

use super::typed_cells;
use cellrefine::collective::{Collective, threads};
use cellrefine::config::Sources;
use cellrefine::error::Error;
use cellrefine::train::record::StepRecord;
use cellrefine::train::{Flow, MarkerInputs, Observer, RunInputs, RunSummary, SplitFlags, stages};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A stage of the library.
pub type Stage = fn(&RunInputs, &mut dyn Observer) -> Result<RunSummary, Error>;
/// What a stage came to on one rank, and what its observer heard.
pub type Outcome = (Result<RunSummary, Error>, Script);

/// Stops after some steps, puts numbers into the gradients of others, and keeps what it hears.
#[derive(Debug, Clone, Default)]
pub struct Script {
    /// Ask for a stop after these steps.
    pub stops: Vec<u64>,
    /// (step, value) put into the first element of the gradient.
    pub injects: Vec<(u64, f32)>,
    /// What was said.
    pub notes: Vec<String>,
}

impl Observer for Script {
    fn note(&mut self, text: &str) {
        self.notes.push(text.to_string());
    }
    fn step(&mut self, step: u64, _record: Option<&StepRecord>) -> Flow {
        if self.stops.contains(&step) { Flow::Stop } else { Flow::Continue }
    }
    fn spikes(&self, step: u64) -> Option<f32> {
        self.injects.iter().find(|(at, _)| *at == step).map(|(_, value)| *value)
    }
}

pub struct Place {
    _dir: tempfile::TempDir,
    pub root: PathBuf,
    pub corpus: PathBuf,
}

impl Place {
    /// With `x.cells`: 60, 30 and 12 cells of three types.
    pub fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_path_buf();
        let corpus = typed_cells::write(&root, "x.cells", &[60, 30, 12], 0.0);
        typed_cells::markers(&root, 3);
        Place { _dir: dir, root, corpus }
    }

    /// A network of one narrow layer, over a third of the cells.
    pub fn inputs(&self, out: &str, set: &[&str]) -> RunInputs {
        let base = [
            "model.layers=1",
            "model.width=16",
            "model.ffn=32",
            "batch.cells=8",
            "train.log_every=1",
            "train.checkpoint_every=0",
            "train.eval_every=1000",
        ];
        RunInputs {
            corpus: self.corpus.clone(),
            out: self.root.join(out),
            preset: Some("tiny".into()),
            sources: Sources {
                set: [&base[..], set].concat().iter().map(|s| s.to_string()).collect(),
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
    pub fn later(&self, out: &str, set: &[&str]) -> RunInputs {
        let pre = self.root.join("pre");
        if !pre.exists() {
            stages::pretrain(&self.inputs("pre", &["train.steps=3"]), &mut Script::default()).unwrap();
        }
        let mut inputs = self.inputs(out, set);
        inputs.preset = None;
        inputs.checkpoint = Some(pre);
        let fixed = ["model.layers", "model.width", "model.ffn"];
        inputs.sources.set.retain(|s| !fixed.iter().any(|name| s.starts_with(name)));
        inputs
    }

    /// The program with `words`, in this folder, without any launcher's variables.
    pub fn command(&self, words: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cellrefine"));
        let foreign = ["RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI_", "CELLREFINE_"];
        for (name, _) in std::env::vars().filter(|(n, _)| foreign.iter().any(|f| n.starts_with(f))) {
            command.env_remove(name);
        }
        command.current_dir(&self.root).args(words.split_whitespace());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Its outcome.
    pub fn run(&self, words: &str) -> Output {
        self.command(words).output().unwrap()
    }

    /// Waits until the run in `out` has logged `lines` steps.
    pub fn wait_for(&self, out: &str, lines: usize) {
        let log = self.root.join(out).join("metrics.jsonl");
        let patience = Instant::now() + Duration::from_secs(120);
        while std::fs::read_to_string(&log).map_or(0, |text| text.lines().count()) < lines {
            assert!(Instant::now() < patience, "the run does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// `refine` as a [`Stage`], with the markers beside the corpus.
pub fn refine(inputs: &RunInputs, observer: &mut dyn Observer) -> Result<RunSummary, Error> {
    let markers = inputs.corpus.parent().unwrap().join("markers.gmt");
    stages::refine(inputs, &MarkerInputs { markers, ..MarkerInputs::default() }, observer)
}

/// Runs `stage` as `world` threads, each with its script; outcomes by rank.
pub fn ranks(
    world: usize,
    stage: Stage,
    inputs: &RunInputs,
    script: impl Fn(usize) -> Script + Sync,
) -> Vec<Outcome> {
    let one = |all: Collective| {
        let mut script = script(all.rank());
        let inputs = RunInputs { ranks: all, ..inputs.clone() };
        (stage(&inputs, &mut script), script)
    };
    if world == 1 {
        return vec![one(Collective::default())];
    }
    std::thread::scope(|scope| {
        let one = &one;
        let ranks = threads::ranks(world, Duration::from_secs(120));
        let all: Vec<_> = ranks.into_iter().map(|all| scope.spawn(move || one(all))).collect();
        all.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Weights, moments and the stage's own tensors of a checkpoint, as bytes.
pub fn tensors(checkpoint: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = std::fs::read_dir(checkpoint).unwrap().map(|entry| entry.unwrap().path());
    let tensors = files.filter(|path| path.extension().is_some_and(|e| e == "safetensors"));
    tensors
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap()))
        .collect()
}

/// The loop's state in a checkpoint's manifest, the clock apart.
pub fn state(checkpoint: &Path) -> serde_json::Value {
    let text = std::fs::read_to_string(checkpoint.join("state.json")).unwrap();
    let mut state: serde_json::Value = serde_json::from_str(&text).unwrap();
    state["loop"].as_object_mut().unwrap().remove("seconds");
    state["loop"].take()
}

/// `run/checkpoints/step-N`.
pub fn checkpoint(out: &Path, step: u64) -> PathBuf {
    out.join(format!("checkpoints/step-{step}"))
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn free_address() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

pub fn signal(child: &Child, signal: i32) {
    // SAFETY: a signal to our own child, which has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}

/// Cases that broke a promise.
#[derive(Default)]
pub struct Lost(pub Vec<String>);

impl Lost {
    /// One more where `holds` is false.
    pub fn unless(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.0.push(what());
        }
    }
}
