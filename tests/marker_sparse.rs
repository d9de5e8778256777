//! Marker-sparse attention from stage to stage: the genes that are global tokens belong to the network, so whoever opens a
//! checkpoint runs it as it was trained.

#[path = "common/typed_cells.rs"]
mod typed_cells;

use cellrefine::eval::npy;
use cellrefine::model::tensors::TensorFile;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::{Command, Output};

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// A corpus of three types, their markers, and an encoder with a window of one rank.
    fn new() -> Place {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        typed_cells::write(place.dir.path(), "x.cells", &[30, 20, 10], 0.0);
        typed_cells::markers(place.dir.path(), 3);
        place
    }
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    /// `cellrefine` with words, in this place.
    fn run(&self, words: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cellrefine"));
        command.env_remove("CELLREFINE_SEED").current_dir(self.dir.path());
        command.args(words.split_whitespace()).args(["--json", "--quiet"]).output().unwrap()
    }
    fn ok(&self, words: &str) -> Value {
        let out = self.run(words);
        assert!(out.status.success(), "{words}: {}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout).unwrap()
    }
    /// `config.json` of a run's last step.
    fn config(&self, run: &str, step: u64) -> (PathBuf, Value) {
        let path = self.path(run).join(format!("checkpoints/step-{step}/config.json"));
        let json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        (path, json)
    }
    fn globals(&self, run: &str, step: u64) -> Value {
        self.config(run, step).1["cellrefine"]["attention"]["marker_sparse"]["globals"].clone()
    }
    fn embed(&self, run: &str, out: &str) -> Vec<f32> {
        self.ok(&format!("embed --corpus x.cells --checkpoint {run} --out {out}"));
        npy::read(&self.path(out)).unwrap().values
    }
}

const SPARSE: &str = "--preset tiny --set model.width=16 --set model.ffn=32 --set batch.cells=8 --set train.steps=3 \
    --set model.attention=marker-sparse --set model.window=1";
const STEPS: &str = "--set train.steps=3 --set batch.cells=8";

#[test]
fn a_refined_checkpoint_is_embedded_with_the_globals_that_refine_trained_with() {
    let place = Place::new();
    place.ok(&format!("pretrain --corpus x.cells --out pre {SPARSE}"));
    assert_eq!(place.globals("pre", 3), json!([]));
    place
        .ok(&format!("refine --corpus x.cells --checkpoint pre --markers markers.gmt --out refined {STEPS}"));
    // Ids 2.. of the vocabulary are the types' own genes, as in the marker file.
    let own: Vec<u32> = (2..2 + 3 * typed_cells::OWN as u32).collect();
    assert_eq!(place.globals("refined", 3), json!(own));

    // What refine computes with a checkpoint is kept in its run folder: the teacher's vectors of all training cells, here all
    // cells. `embed` of that checkpoint must give the same bits.
    place.ok(&format!(
        "refine --corpus x.cells --checkpoint refined --markers markers.gmt --out again {STEPS}"
    ));
    let rows = place.embed("refined", "refined.npy");
    let kept = TensorFile::open(&place.path("again/start.safetensors")).unwrap();
    assert_eq!(kept.floats("teacher", &[60, 16]).unwrap(), rows);

    // The classifier's encoder keeps them, and eval runs with them.
    let tuned = "finetune --corpus x.cells --checkpoint refined --label cell_type --split train=0.6,test=0.4 --out tuned";
    place.ok(&format!("{tuned} {STEPS}"));
    assert_eq!(place.globals("tuned", 3), json!(own));
    place.ok("eval --corpus x.cells --checkpoint tuned --label cell_type");

    // Without them the same weights say something else: a checkpoint of the first version, which names none, is still read.
    let (path, mut config) = place.config("refined", 3);
    let sparse = &mut config["cellrefine"]["attention"]["marker_sparse"];
    sparse.as_object_mut().unwrap().shift_remove("globals");
    std::fs::write(&path, config.to_string()).unwrap();
    assert_ne!(place.embed("refined", "without.npy"), rows);
}

#[test]
fn pretrain_and_finetune_take_globals_from_a_marker_file() {
    let place = Place::new();
    place.ok(&format!("pretrain --corpus x.cells --out pre --markers markers.gmt {SPARSE}"));
    let first = place.globals("pre", 3);
    assert_eq!(first.as_array().unwrap().len(), 3 * typed_cells::OWN);
    std::fs::write(place.path("one.gmt"), format!("one\t\t{}\n", typed_cells::own_gene(0, 4))).unwrap();
    let tune = "finetune --corpus x.cells --checkpoint pre --label cell_type --split train=0.6,test=0.4";
    place.ok(&format!("{tune} --markers one.gmt --out tuned {STEPS}"));
    assert_eq!(place.globals("tuned", 3), json!([6]));

    // A dense network has no use for them, and forgets them when a checkpoint is made dense.
    let out = place.run(&format!("{tune} --markers one.gmt --out bad {STEPS} --set model.attention=dense"));
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("--set model.attention=marker-sparse"));
    place.ok(&format!("{tune} --out dense {STEPS} --set model.attention=dense"));
    assert_eq!(place.config("dense", 3).1["cellrefine"]["attention"], "dense");

    // Going on with other globals is another run.
    let out = place.run(&format!("{tune} --markers markers.gmt --out tuned {STEPS} --resume"));
    assert_eq!(out.status.code(), Some(3), "{}", String::from_utf8_lossy(&out.stderr));
}
