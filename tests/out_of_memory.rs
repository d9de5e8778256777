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

#[test]
fn a_run_that_ends_in_its_first_step_can_be_started_again() {
    let place = Place::new();
    let run = format!("{RUN} {SIZES}");
    let all: u64 = place.buffers().iter().map(|(_, bytes)| bytes).sum();
    place.refused(&run, all, "what kernels work in", "lower batch.tokens");
    let (code, said) = place.program(&run, 1 << 30);
    assert!(code == 0 && said["steps"] == 2, "{said}");
}

#[test]
fn refining_and_embedding_name_what_they_lack() {
    let place = Place::new();
    let (code, said) = place.program(&format!("{RUN} {SIZES}"), 1 << 30);
    assert_eq!(code, 0, "{said}");
    let refine = "refine --device emulated --corpus x.cells --checkpoint run --markers markers.gmt --label cell_type \
                  --split train=0.8,val=0.2 --out refined --set batch.cells=6 --set batch.tokens=64";
    let (_, plan) = place.program(
        "plan --stage refine --corpus x.cells --checkpoint run --types 3 --label cell_type --set batch.cells=6 \
         --set batch.tokens=64",
        0,
    );
    let (code, said) = place.program(refine, plan["bytes"].as_u64().unwrap() - 1);
    let place_of = said["error"]["where"].as_str().unwrap();
    assert!(code == 4 && place_of.ends_with("threads)") && place_of.contains("(C, D) on emulated"), "{said}");
    assert!(!place.root.join("refined").exists());
    place.refused(
        "embed --device emulated --corpus x.cells --checkpoint run --out x.npy",
        1 << 20,
        "hidden_state.0 (N, D)",
        "--batch-tokens",
    );
    assert!(!place.root.join("x.npy").exists());
}
