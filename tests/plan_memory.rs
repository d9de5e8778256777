//! `plan` against a run: the bytes it predicts are the bytes that the device's allocator hands out, for every stage.
//!
//! One test, because the backend counts for the whole process.

#[path = "common/typed_cells.rs"]
mod typed_cells;

use cellrefine::collective::threads;
use cellrefine::config::{Sources, Stage};
use cellrefine::corpus::Corpus;
use cellrefine::cpu::memory::{memory, start_watch};
use cellrefine::model::config::Vocabulary;
use cellrefine::model::{ModelConfig, Preset, checkpoint};
use cellrefine::train::plan::{Plan, PlanCase, plan};
use cellrefine::train::{MarkerInputs, RunInputs, SplitFlags, Unwatched, stages};
use std::path::Path;
use std::time::Duration;

const TYPES: usize = 3;

struct Case<'a> {
    root: &'a Path,
    corpus: &'a Corpus,
}

impl Case<'_> {
    /// Inputs of a run of two steps without validation cells, from a checkpoint or, without one, from a preset.
    fn inputs(&self, out: &str, checkpoint: Option<&str>, label: bool, set: &[&str]) -> RunInputs {
        let preset = checkpoint.is_none().then(|| "tiny".to_string());
        let mut all = vec!["train.steps=2".to_string(), "batch.cells=8".into(), "batch.tokens=64".into()];
        if preset.is_some() {
            all.extend(["model.layers=2", "model.width=32", "model.ffn=48"].map(String::from));
        }
        all.extend(set.iter().map(|s| s.to_string()));
        RunInputs {
            corpus: self.corpus.path().to_path_buf(),
            out: self.root.join(out),
            preset,
            checkpoint: checkpoint.map(|c| self.root.join(c)),
            sources: Sources { set: all, ..Sources::default() },
            split: SplitFlags {
                label: label.then(|| "cell_type".into()),
                split: label.then(|| "train=0.7,test=0.3".into()),
                ..SplitFlags::default()
            },
            ..RunInputs::default()
        }
    }

    fn plan(&self, stage: Stage, inputs: &RunInputs) -> Plan {
        let vocab = self.corpus.vocab().unwrap();
        let mut config: ModelConfig = match &inputs.checkpoint {
            Some(path) => checkpoint::read_config(&checkpoint::resolve(path).unwrap()).unwrap(),
            None => Preset::named("tiny").unwrap().config(vocab.len(), Vocabulary::of(&vocab)),
        };
        let settings = inputs.sources.resolve(stage, &config).unwrap();
        settings.model.apply_to(&mut config, inputs.checkpoint.is_some()).unwrap();
        let labelled = inputs.split.label.is_some();
        let corpus = Some(self.corpus);
        let ranks = inputs.ranks.world();
        plan(&PlanCase { stage, config: &config, settings: &settings, corpus, types: TYPES, labelled, ranks })
            .unwrap()
    }

    /// Runs, and holds the backend's count against the plan.
    fn check(&self, what: &str, stage: Stage, inputs: &RunInputs, run: impl FnOnce()) {
        let plan = self.plan(stage, inputs);
        assert_eq!(memory().buffers, 0, "{what}: an earlier run left buffers behind");
        start_watch();
        run();
        let found = memory();
        let planned = inputs.ranks.world() as u64 * plan.bytes();
        assert_eq!(found.most_buffers, planned, "{what}: allocated, and planned:\n{}", plan.to_text());
        // Scratch is kept from run to run, so it may only grow; the estimate is of the right size.
        let (held, about) = (found.scratch, plan.scratch_bytes());
        assert!(
            held > about / 10 && held < 3 * about,
            "{what}: {held} bytes of scratch, planned about {about}"
        );
    }
}

#[test]
fn a_run_allocates_what_plan_says() {
    let dir = tempfile::tempdir().unwrap();
    let path = typed_cells::write(dir.path(), "x.cells", &[30, 20, 12], 0.0);
    let markers =
        MarkerInputs { markers: typed_cells::markers(dir.path(), TYPES), ..MarkerInputs::default() };
    let corpus = Corpus::open(&path).unwrap();
    let case = Case { root: dir.path(), corpus: &corpus };
    let pretrain = |what: &str, set: &[&str]| {
        let inputs = case.inputs(what, None, false, set);
        case.check(what, Stage::Pretrain, &inputs, || {
            stages::pretrain(&inputs, &mut Unwatched).unwrap();
        });
    };
    pretrain("f32", &[]);
    pretrain("bf16", &["train.precision=bf16"]);
    pretrain("sparse", &["model.attention=marker-sparse", "model.window=3", "train.accumulate=2"]);
    pretrain("recompute", &["train.recompute=true"]);
    pretrain("whole", &["batch.tokens=100000", "batch.max_tokens=20"]);
    // Ranks of one process; the slices of two are equal.
    for (what, set) in [("ranks", &[][..]), ("sharded", &["optimizer.sharded=true"])] {
        let all = threads::ranks(2, Duration::from_secs(60));
        let inputs = RunInputs { ranks: all[0].clone(), ..case.inputs(what, None, false, set) };
        case.check(what, Stage::Pretrain, &inputs, || {
            std::thread::scope(|scope| {
                for ranks in all {
                    let inputs = RunInputs { ranks, ..inputs.clone() };
                    scope.spawn(move || stages::pretrain(&inputs, &mut Unwatched).unwrap());
                }
            });
        });
        let (plan, json) = (case.plan(Stage::Pretrain, &inputs), |plan: &Plan| plan.to_json());
        let one = case.plan(Stage::Pretrain, &RunInputs { ranks: Default::default(), ..inputs });
        let moments = json(&one)["groups"][2]["bytes"].as_u64().unwrap();
        let saved = if set.is_empty() { 0 } else { moments / 2 };
        assert_eq!(plan.bytes() + saved, one.bytes());
        // Half of a gradient's bytes to the other rank, and half of the sums.
        assert_eq!(json(&plan)["sent_per_step_and_rank"].as_f64(), Some(moments as f64 / 2.0));
        assert_eq!(json(&one)["sent_per_step_and_rank"].as_f64(), Some(0.0));
    }
    let refine = |what: &str, label: bool, set: &[&str]| {
        let inputs = case.inputs(what, Some("f32"), label, set);
        case.check(what, Stage::Refine, &inputs, || {
            stages::refine(&inputs, &markers, &mut Unwatched).unwrap();
        });
    };
    refine("refine", true, &[]);
    refine("adapters", true, &["lora.rank=4", "lora.targets=attention"]);
    refine("label-free", false, &["objective.mlm=0"]);
    let inputs = case.inputs("finetune", Some("refine"), true, &["train.precision=bf16"]);
    case.check("finetune", Stage::Finetune, &inputs, || {
        stages::finetune(&inputs, &mut Unwatched).unwrap();
    });
}
