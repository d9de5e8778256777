//! The training commands as a user meets them: the chain, what a run folder holds, signals, and bad input.

#[path = "common/typed_cells.rs"]
mod typed_cells;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

struct Place {
    _dir: tempfile::TempDir,
    root: PathBuf,
}

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_path_buf();
        Place { _dir: dir, root }
    }

    /// `cellrefine` with words; `@name` is a path in this place.
    fn command(&self, words: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cellrefine"));
        command.env_remove("CELLREFINE_SEED").current_dir(&self.root);
        for word in words.split_whitespace() {
            match word.strip_prefix('@') {
                Some(name) => command.arg(self.root.join(name)),
                None => command.arg(word),
            };
        }
        command
    }

    fn run(&self, words: &str) -> Output {
        self.command(words).output().unwrap()
    }

    fn json(&self, words: &str) -> Value {
        let out = self.run(&format!("{words} --json --quiet"));
        assert!(out.status.success(), "{words}: {}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout).unwrap()
    }

    /// Exit code, and the message on stderr.
    fn fails(&self, words: &str, code: i32, says: &[&str]) {
        let out = self.run(words);
        let text = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{words}: {text}");
        for part in says {
            assert!(text.contains(part), "{words}: no {part:?} in: {text}");
        }
        assert!(!self.root.join("bad").exists(), "{words}: left something under the final name");
    }
}

const SMALL: &str = "--set model.width=16 --set model.ffn=32 --set model.layers=1 --set batch.cells=8";

fn pretrained(place: &Place, counts: &[usize]) {
    typed_cells::write(&place.root, "x.cells", counts, 0.0);
    typed_cells::markers(&place.root, counts.len());
    place.json(&format!("pretrain --corpus @x.cells --preset tiny --out @pre {SMALL} --set train.steps=4"));
}

#[test]
fn the_chain_and_what_it_leaves() {
    let place = Place::new();
    typed_cells::write(&place.root, "x.cells", &[60, 30, 12], 0.0);
    typed_cells::markers(&place.root, 3);
    let split = "--label cell_type --split train=0.6,val=0.2,test=0.2";
    let pre = place.json(&format!(
        "pretrain --corpus @x.cells --preset tiny {split} --out @pre {SMALL} --set train.steps=12 \
         --set train.log_every=2 --set train.checkpoint_every=5"
    ));
    assert_eq!((pre["steps"].as_u64(), pre["stage"].as_str()), (Some(12), Some("pretrain")));
    let run = place.root.join("pre");
    for name in ["settings.toml", "metrics.jsonl", "split.json", "split.tsv", "run.json", "best", "last"] {
        assert!(run.join(name).is_file(), "{name}");
    }
    let names = |folder: &Path| -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert!(names(&run).iter().any(|n| n.starts_with("events.out.tfevents.")));
    assert_eq!(
        names(&run.join("checkpoints/step-12")),
        ["config.json", "model.safetensors", "state.json", "state.safetensors", "vocab.tsv"]
    );
    let lines: Vec<Value> = std::fs::read_to_string(run.join("metrics.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let logged: Vec<u64> = lines.iter().map(|l| l["step"].as_u64().unwrap()).collect();
    assert!(logged.starts_with(&[1, 2, 4]) && logged.ends_with(&[12]), "{logged:?}");
    for name in [
        "loss",
        "mlm",
        "learning_rate",
        "grad_norm",
        "cells_per_s",
        "tokens_per_s",
        "time",
        "tokens",
        "cells",
        "dt_ms",
        "host_memory_bytes",
        "fraction_of_peak",
    ] {
        assert!(lines.iter().all(|l| l[name].is_number()), "{name}");
    }
    assert!(lines.last().unwrap()["val_mlm"].is_number());

    // Later stages take the split over; derived markers see its training part alone.
    let refined = place.json(
        "refine --corpus @x.cells --checkpoint @pre --markers derive --label cell_type --out @refined \
         --set train.steps=6 --set batch.cells=8",
    );
    assert!(
        refined["terms"]["proto"].is_number() && refined["evaluation"]["val_macro_recall_at_1"].is_number()
    );
    assert!(names(&place.root.join("refined/checkpoints/step-6")).contains(&"prototypes.safetensors".into()));
    assert!(place.root.join("refined/markers.gmt").is_file());
    let tuned = place.json(
        "finetune --corpus @x.cells --checkpoint @refined --label cell_type --labels-per-class 5 --out @tuned \
         --set train.steps=6 --set batch.cells=8",
    );
    assert!(tuned["evaluation"]["val_macro_f1"].is_number());
    assert!(names(&place.root.join("tuned/checkpoints/step-6")).contains(&"classifier.safetensors".into()));
    let cells = |run: &str| -> Value {
        let text = std::fs::read_to_string(place.root.join(run).join("split.json")).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["cells"].clone()
    };
    assert!(cells("pre") == cells("refined") && cells("pre") == cells("tuned"));
    // The saved settings are a settings file.
    place.json(
        "pretrain --corpus @x.cells --preset tiny --config @pre/settings.toml --out @again --set train.steps=1",
    );
}

#[test]
fn partly_labelled_and_label_free() {
    let place = Place::new();
    pretrained(&place, &[30, 20, 10]);
    let base = "refine --corpus @x.cells --checkpoint @pre --markers @markers.gmt --set train.steps=3";
    let free = place.json(&format!("{base} --out @free --split train=0.8,val=0.2"));
    assert!(free["evaluation"]["val_macro_marker_agreement"].is_number());
    let out = place.run(&format!("{base} --label cell_type --labels-per-class 2 --out @few"));
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && text.contains("6 labelled cells"), "{text}");
}

#[test]
fn a_signal_checkpoints_and_says_how_to_go_on() {
    let place = Place::new();
    typed_cells::write(&place.root, "x.cells", &[60, 30, 12], 0.0);
    let words = format!(
        "pretrain --corpus @x.cells --preset tiny --out @run {SMALL} --set train.steps=1000000 --set train.log_every=1"
    );
    let stop_after = |words: &str, line: usize| -> (i32, String) {
        let child = place.command(words).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let log = place.root.join("run/metrics.jsonl");
        let patience = Instant::now() + Duration::from_secs(120);
        while std::fs::read_to_string(&log).map_or(0, |t| t.lines().count()) < line {
            assert!(Instant::now() < patience, "the run does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        // SAFETY: sends a signal to our own child, which has not been waited for.
        assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGTERM) }, 0);
        let out = child.wait_with_output().unwrap();
        (out.status.code().unwrap_or(-1), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let last = || std::fs::read_to_string(place.root.join("run/last")).unwrap();
    let (code, text) = stop_after(&words, 3);
    assert_eq!(code, 5, "{text}");
    assert!(text.contains("checkpointed at step") && text.contains("--resume"), "{text}");
    let first = last();
    let lines = std::fs::read_to_string(place.root.join("run/metrics.jsonl")).unwrap().lines().count();
    let (code, text) = stop_after(&format!("{words} --resume"), lines + 3);
    assert_eq!(code, 5, "{text}");
    assert_ne!(first, last());
}

#[test]
fn bad_input_of_training() {
    let place = Place::new();
    pretrained(&place, &[20, 10, 6]);
    let refine = "refine --corpus @x.cells --checkpoint @pre --out @bad --markers";
    let tune = "finetune --corpus @x.cells --checkpoint @pre --out @bad --label";
    // Corpus and checkpoint.
    place.fails("pretrain --corpus @none.cells --preset tiny --out @bad", 3, &["none.cells"]);
    place.fails("finetune --corpus @x.cells --checkpoint @none --label cell_type --out @bad", 3, &["none"]);
    typed_cells::write(&place.root, "other.cells", &[20, 10, 6], 0.5);
    place.fails(
        "finetune --corpus @other.cells --checkpoint @pre --label cell_type --out @bad",
        3,
        &["different vocabularies"],
    );
    // Labels.
    place.fails(&format!("{tune} cell_typ"), 3, &["cell_typ", "cell_type"]);
    place.fails(
        &format!("{tune} cell_type --exclude-label type0 --exclude-label type1"),
        3,
        &["two classes"],
    );
    typed_cells::write(&place.root, "one.cells", &[20, 10, 1], 0.0);
    place.fails("finetune --corpus @one.cells --checkpoint @pre --label cell_type --out @bad", 3, &["type2"]);
    // Markers.
    place.fails(&format!("{refine} @none.gmt --label cell_type"), 3, &["none.gmt"]);
    std::fs::write(place.root.join("strange.gmt"), "type0\tx\tNOPE1\tNOPE2\n").unwrap();
    place.fails(&format!("{refine} @strange.gmt --label cell_type"), 3, &["strange.gmt"]);
    std::fs::write(place.root.join("empty.gmt"), "").unwrap();
    place.fails(&format!("{refine} @empty.gmt --label cell_type"), 3, &["empty.gmt"]);
    let text = std::fs::read_to_string(place.root.join("markers.gmt")).unwrap();
    let without: String = text.lines().take(2).map(|l| format!("{l}\n")).collect();
    std::fs::write(place.root.join("two.gmt"), without).unwrap();
    place.fails(&format!("{refine} @two.gmt --label cell_type"), 3, &["type2"]);
    let allowed = "refine --corpus @x.cells --checkpoint @pre --markers @two.gmt --label cell_type --allow-unmatched \
                   --out @allowed --set train.steps=1";
    place.json(allowed);
    // Flags and settings.
    place.fails(&format!("{refine} derive"), 2, &["--label"]);
    place.fails("pretrain --corpus @x.cells --preset tinny --out @bad", 2, &["tiny"]);
    place.fails(
        "pretrain --corpus @x.cells --preset tiny --out @bad --set optimizer.learning_rat=1",
        2,
        &["optimizer.learning_rate"],
    );
    place.fails(&format!("{tune} cell_type --set model.width=64"), 2, &["model.width"]);
    place.fails(&format!("{tune} cell_type --split train=0.5,test=0.6"), 2, &["sum to 1"]);
    place.fails("pretrain --corpus @x.cells --preset tiny --out @bad --resume", 3, &["--resume=auto"]);
    let again = place.run("pretrain --corpus @x.cells --preset tiny --out @pre");
    assert_eq!(again.status.code(), Some(2));
}

#[test]
fn runs_side_by_side() {
    let place = Place::new();
    pretrained(&place, &[20, 10, 6]);
    let report = place.json("report @pre");
    let run = &report["runs"][0];
    assert_eq!((run["stage"].as_str(), run["step"].as_u64()), (Some("pretrain"), Some(4)));
    assert_eq!(run["cells"].as_u64().or(run["cells"].as_f64().map(|c| c as u64)), Some(32));
    assert!(run["loss"].is_number() && run["tokens_per_s"].is_number());
    std::fs::create_dir(place.root.join("empty")).unwrap();
    place.fails("report @empty", 3, &["metrics.jsonl"]);
}

/// (name, start, end) of a trace's ranges in µs, outer before inner; panics where two overlap and neither holds the other.
fn ranges(path: &Path) -> Vec<(String, f64, f64)> {
    let json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(json["otherData"]["ranges_left_out"], 0);
    let mut threads = std::collections::BTreeMap::<u64, Vec<(String, f64, f64)>>::new();
    for event in json["traceEvents"].as_array().unwrap() {
        assert_eq!((event["ph"].as_str(), event["pid"].as_u64()), (Some("X"), Some(1)));
        let (start, length) = (event["ts"].as_f64().unwrap(), event["dur"].as_f64().unwrap());
        let name = event["name"].as_str().unwrap().to_string();
        threads.entry(event["tid"].as_u64().unwrap()).or_default().push((name, start, start + length));
    }
    for events in threads.values_mut() {
        events.sort_by(|a, b| a.1.total_cmp(&b.1).then(b.2.total_cmp(&a.2)));
        let mut open: Vec<f64> = Vec::new();
        for (name, start, end) in events.iter() {
            open.retain(|outer| outer > start);
            // A nanosecond is what the file's microseconds are rounded to.
            assert!(
                open.iter().all(|outer| *end <= outer + 0.002),
                "{name} at {start} outlives what holds it"
            );
            open.push(*end);
        }
    }
    threads.into_values().flatten().collect()
}

/// Every phase is there, and the phases of all steps fill them: nothing that costs time is without a name.
fn fills_its_steps(path: &Path, phases: &[&str]) {
    let ranges = ranges(path);
    let inside =
        |outer: &(String, f64, f64), r: &(String, f64, f64)| outer.1 <= r.1 && r.2 <= outer.2 + 0.002;
    let steps: Vec<_> = ranges.iter().filter(|r| r.0 == "step").collect();
    assert!(steps.len() >= 3, "{} steps", steps.len());
    let (mut named, mut whole) = (0.0, 0.0);
    for step in &steps {
        let within: Vec<_> =
            ranges.iter().filter(|r| phases.contains(&r.0.as_str()) && inside(step, r)).collect();
        let outermost = within.iter().filter(|r| !within.iter().any(|o| o != *r && inside(o, r)));
        named += outermost.map(|r| r.2 - r.1).sum::<f64>();
        whole += step.2 - step.1;
    }
    for phase in phases {
        assert!(ranges.iter().any(|r| r.0 == *phase), "no range {phase:?}");
    }
    let share = named / whole;
    assert!((0.8..1.001).contains(&share), "the phases are {share:.3} of the steps");
}

#[test]
fn a_trace_names_every_phase_of_a_step() {
    let place = Place::new();
    typed_cells::write(&place.root, "x.cells", &[60, 30, 12], 0.0);
    typed_cells::markers(&place.root, 3);
    let phases =
        ["batch wait", "upload", "forward", "loss", "backward", "optimizer", "evaluation", "checkpoint"];
    let steps =
        "--set train.steps=4 --set batch.cells=16 --label cell_type --split train=0.6,val=0.2,test=0.2";
    let on = "--corpus @x.cells --trace";
    place.json(&format!("pretrain --preset tiny {on} @p.json --out @pre {steps}"));
    fills_its_steps(&place.root.join("p.json"), &[&phases[..], &["masks"]].concat());
    let steps = "--set train.steps=3 --set batch.cells=16 --label cell_type";
    place.json(&format!("refine --checkpoint @pre --markers @markers.gmt {on} @r.json --out @ref {steps}"));
    fills_its_steps(&place.root.join("r.json"), &[&phases[..], &["masks"]].concat());
    place.json(&format!("finetune --checkpoint @pre {on} @f.json --out @fine {steps}"));
    fills_its_steps(&place.root.join("f.json"), &phases);
    let ops = ranges(&place.root.join("r.json"));
    for op in ["gene_attention_backward", "linear_backward_weight", "prototype_loss_forward", "adamw"] {
        assert!(ops.iter().any(|r| r.0 == op), "no range {op:?}");
    }
    let bench = "bench step --preset tiny --mode train --head mlm --seq 64 --seconds 0.1 --trace @b.json";
    place.json(bench);
    fills_its_steps(&place.root.join("b.json"), &["forward", "loss", "backward", "optimizer"]);
    // A run that fails leaves the trace of what it did; one that cannot be written stops before the work.
    place.fails("pretrain --corpus @none.cells --preset tiny --out @bad --trace @e.json", 3, &["none.cells"]);
    assert!(ranges(&place.root.join("e.json")).is_empty());
    place.fails("pretrain --corpus @x.cells --preset tiny --out @bad --trace @no/t.json", 3, &["t.json"]);
    place.fails("bench loader --trace @t.json", 2, &["bench step"]);
}
