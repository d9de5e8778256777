//! A GPU too small for the run: the program names the buffer that did not fit and the setting that makes it smaller, ends with
//! exit code 4, and leaves nothing behind that stands in the way of the next attempt.
#![cfg(emulator)]

#[path = "common/typed_cells.rs"]
mod typed_cells;

use serde_json::Value;
use std::path::PathBuf;
use std::process::Command;

const RUN: &str = "pretrain --device emulated --corpus x.cells --preset tiny --out run --set train.steps=2";
const SIZES: &str = "--set model.layers=1 --set model.width=32 --set model.heads=1 --set model.ffn=64 \
                     --set batch.cells=6 --set batch.tokens=64";

struct Place {
    _dir: tempfile::TempDir,
    root: PathBuf,
}

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_path_buf();
        typed_cells::write(&root, "x.cells", &[20, 12, 6], 0.0);
        typed_cells::markers(&root, 3);
        Place { _dir: dir, root }
    }

    /// Exit code and the object printed by a device of so many bytes.
    fn program(&self, words: &str, bytes: u64) -> (i32, Value) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cellrefine"));
        command.current_dir(&self.root).args(words.split_whitespace()).args(["--json", "--quiet"]);
        let out = command.env("CELLREFINE_EMULATOR_MEMORY", bytes.to_string()).output().unwrap();
        let code = out.status.code().expect("no signal");
        let text = String::from_utf8([out.stdout, out.stderr].concat()).unwrap();
        // The object comes first; under an error the text for people follows.
        let object = serde_json::Deserializer::from_str(&text).into_iter().next();
        (code, object.and_then(|o| o.ok()).unwrap_or_else(|| panic!("{words}: {text}")))
    }

    /// Buffers of the run in the order in which they are made: name, bytes.
    fn buffers(&self) -> Vec<(String, u64)> {
        let (code, plan) =
            self.program(&format!("plan --stage pretrain --corpus x.cells --preset tiny {SIZES}"), 0);
        assert_eq!(code, 0, "{plan}");
        let groups = plan["groups"].as_array().unwrap();
        let buffers = groups.iter().flat_map(|g| g["buffers"].as_array().unwrap());
        buffers.map(|b| (b["name"].as_str().unwrap().into(), b["bytes"].as_u64().unwrap())).collect()
    }

    #[track_caller]
    fn refused(&self, words: &str, bytes: u64, buffer: &str, setting: &str) {
        let (code, said) = self.program(words, bytes);
        let error = &said["error"];
        let text = |field: &str| error[field].as_str().unwrap_or_default().to_string();
        assert_eq!((code, text("message").as_str()), (4, "out of memory"), "{said}");
        assert!(text("where").starts_with(buffer), "{buffer}: {said}");
        assert!(text("next").contains(setting), "{setting}: {said}");
        assert!(text("found").contains(" MB refused; "), "{said}");
    }
}

#[test]
fn the_buffer_and_the_setting_are_named() {
    let place = Place::new();
    let buffers = place.buffers();
    let run = format!("{RUN} {SIZES}");
    for (name, shape, setting) in [
        ("weights (master, f32)", "(parameters)", "a smaller network"),
        ("second moments of the network", "(parameters)", "a smaller network"),
        ("layer.0.hidden", "(N, F)", "lower batch.tokens"),
        ("batch.cell_start", "(C + 1)", "lower batch.cells"),
        ("masked.norm", "(M, D)", "lower batch.tokens"),
    ] {
        let at = buffers.iter().position(|(n, _)| n == name).unwrap_or_else(|| panic!("{name}: {buffers:?}"));
        let before: u64 = buffers[..at].iter().map(|(_, bytes)| bytes).sum();
        // Room for all before it, and all but a byte of it.
        let bytes = before + buffers[at].1 - 1;
        place.refused(&run, bytes, &format!("{name} {shape} on emulated"), setting);
        assert!(!place.root.join("run").exists(), "{name}: a run that never began has a folder");
    }
}

/// A device of as many bytes as planned is enough for every stage; with one byte less, what kernels work in does not fit.
#[test]
fn the_plan_is_what_a_device_needs() {
    let place = Place::new();
    let planned = |words: &str| {
        let (code, plan) = place.program(&format!("plan --corpus x.cells {words}"), 0);
        assert_eq!(code, 0, "{plan}");
        plan["bytes"].as_u64().unwrap() + plan["cuda_workspace"].as_u64().unwrap()
    };
    let on = |words: &str, bytes| {
        let (code, said) = place.program(words, bytes);
        assert!(code == 0 && said["steps"] == 2, "{words}: {said}");
    };
    let run = format!("{RUN} {SIZES}");
    let bytes = planned(&format!("--stage pretrain --preset tiny {SIZES}"));
    place.refused(&run, bytes - 1, "what kernels work in", "lower batch.tokens");
    assert!(!place.root.join("run").exists(), "a run that never began has a folder");
    on(&run, bytes);

    let batch = "--set batch.cells=6 --set batch.tokens=64 --set train.steps=2";
    let later =
        "--device emulated --corpus x.cells --checkpoint run --label cell_type --split train=0.8,val=0.2";
    for sparse in ["", "--set model.attention=marker-sparse --set model.window=3"] {
        let bytes =
            planned(&format!("--stage refine --checkpoint run --types 3 --label cell_type {batch} {sparse}"));
        let run =
            format!("refine {later} --markers markers.gmt --out refined{} {batch} {sparse}", sparse.len());
        place.refused(&run, bytes - 1, "", "lower batch.");
        assert!(!place.root.join(format!("refined{}", sparse.len())).exists());
        on(&run, bytes);
    }
    let bytes = planned(&format!("--stage finetune --checkpoint run --types 3 --label cell_type {batch}"));
    let run = format!("finetune {later} --out tuned {batch}");
    place.refused(&run, bytes - 1, "what kernels work in", "lower batch.tokens");
    on(&run, bytes);
}

#[test]
fn embedding_names_its_own_flag() {
    let place = Place::new();
    let (code, said) = place.program(&format!("{RUN} {SIZES}"), 1 << 30);
    assert_eq!(code, 0, "{said}");
    place.refused(
        "embed --device emulated --corpus x.cells --checkpoint run --out x.npy",
        1 << 20,
        "hidden_state.0 (N, D)",
        "--batch-tokens",
    );
    assert!(!place.root.join("x.npy").exists());
}
