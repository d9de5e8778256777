//! F12, F14 and F15: a NaN on one rank is skipped by all alike; memory that is not there ends a run before its first step; a GPU's
//! driver that is missing, old or broken is an error with what was found, never a panic.

use super::faults::{cases, report};
use super::place::*;
use cellrefine::corpus::Corpus;
use cellrefine::error::Code;
use cellrefine::train::stages;
use std::path::{Path, PathBuf};

#[test]
fn a_nan_on_one_rank_is_skipped_by_all_and_leaves_everything_as_it_was() {
    let place = Place::new();
    let mut lost = Lost::default();
    let set = ["train.steps=8", "train.checkpoint_every=1", "train.keep=20", "train.max_bad_steps=3"];
    let stages: [(&str, Stage, bool, &[&str]); 5] = [
        ("pretrain", stages::pretrain, false, &[]),
        ("refine", refine, true, &[]),
        ("finetune", stages::finetune, true, &[]),
        ("adapted", refine, true, &["lora.rank=2"]),
        ("divided", stages::pretrain, false, &["optimizer.sharded=true"]),
    ];
    let mut tried = 0;
    for (i, (name, stage, later, more)) in stages.into_iter().enumerate() {
        let worlds: &[usize] = if cases(0, 1) == 1 { &[1, 2, 4] } else { &[1 + i % 3] };
        for world in worlds {
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().take(cases(1, 3)) {
                let out = format!("{name}-{world}-{value}");
                let set = [&set[..], more].concat();
                let inputs = if later { place.later(&out, &set) } else { place.inputs(&out, &set) };
                // On the last rank alone.
                let script = |rank: usize| Script {
                    injects: if rank + 1 == *world {
                        vec![(3, value), (5, value), (6, value)]
                    } else {
                        Vec::new()
                    },
                    ..Script::default()
                };
                tried += 1;
                for (rank, (outcome, script)) in ranks(*world, stage, &inputs, script).into_iter().enumerate()
                {
                    let counted = matches!(&outcome, Ok(s) if (s.steps, s.bad_steps) == (8, 3));
                    lost.unless(counted, || format!("{out}: rank {rank}: {outcome:?}"));
                    let said =
                        |step: u64| script.notes.iter().any(|n| n.contains(&format!("step {step} skipped")));
                    lost.unless([3, 5, 6].into_iter().all(said), || format!("{out}: {:?}", script.notes));
                }
                let at = |step| tensors(&checkpoint(&inputs.out, step));
                for step in 2..=8 {
                    let skipped = [3, 5, 6].contains(&step);
                    lost.unless((at(step) == at(step - 1)) == skipped, || format!("{out}: step {step}"));
                }
            }
        }
    }
    report(
        "F12",
        "NaN or infinity on one rank, by stage: skipped by all, weights and moments as before",
        tried,
        &lost.0,
    );
}

#[test]
fn too_many_in_a_row_stop_all_ranks_and_name_the_cells() {
    let place = Place::new();
    let mut lost = Lost::default();
    let tried = cases(2, 4);
    for world in 1..=tried {
        let out = format!("stopped-{world}");
        let inputs =
            place.inputs(&out, &["train.steps=20", "train.max_bad_steps=4", "train.checkpoint_every=2"]);
        let script = |rank: usize| Script {
            injects: if rank == 0 { (7..=10).map(|step| (step, f32::NAN)).collect() } else { Vec::new() },
            ..Script::default()
        };
        for (rank, (outcome, _)) in ranks(world, stages::pretrain, &inputs, script).into_iter().enumerate() {
            let said =
                outcome.as_ref().map_or_else(|e| e.to_string(), |s| format!("went on to step {}", s.steps));
            let code = outcome.map_err(|e| (e.code(), e.kind().exit_code())).map(|s| s.steps);
            let named =
                ["step 10", "word", "--resume", "max_bad_steps"].iter().all(|part| said.contains(part));
            lost.unless(code == Err((Code::LossNotFinite, 6)) && named, || {
                format!("{out}, rank {rank}: {said}")
            });
        }
        let dump = std::fs::read_to_string(inputs.out.join("bad-step-10.json")).unwrap_or_default();
        let dump: serde_json::Value = serde_json::from_str(&dump).unwrap_or_default();
        let ids: Vec<&str> =
            dump["cell_ids"].as_array().into_iter().flatten().filter_map(|id| id.as_str()).collect();
        let corpus = Corpus::open(&place.corpus).unwrap();
        let all: Vec<&str> = (0..corpus.cells()).map(|cell| corpus.cell_id(cell).unwrap()).collect();
        let known = ids.len() == 8 && ids.iter().all(|id| all.contains(id));
        lost.unless(known, || format!("{out}: the dump names {dump}"));
    }
    report(
        "F12",
        "too many bad steps in a row: all ranks stop with 6, and the cells are named",
        tried,
        &lost.0,
    );
}

#[cfg(emulator)]
#[test]
fn memory_that_is_not_there_ends_a_run_before_its_first_step() {
    let place = Place::new();
    let mut lost = Lost::default();
    let sizes = "--preset tiny --set model.layers=1 --set model.width=32 --set model.heads=1 --set model.ffn=64 \
        --set batch.cells=6 --set batch.tokens=64";
    let plan = place.run(&format!("plan --stage pretrain --corpus x.cells {sizes} --json"));
    let plan: serde_json::Value = serde_json::from_slice(&plan.stdout).unwrap();
    let needed = plan["bytes"].as_u64().unwrap() + plan["cuda_workspace"].as_u64().unwrap();
    let tried = cases(8, 60) as u64;
    for case in 0..tried {
        // From a single byte to one too few.
        let bytes = 1 + (needed - 2) * case / (tried - 1);
        let mut command = place.command(&format!(
            "pretrain --device emulated --corpus x.cells --out run {sizes} --set train.steps=1 --json"
        ));
        let out = command.env("CELLREFINE_EMULATOR_MEMORY", bytes.to_string()).output().unwrap();
        let said: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
        let field = |name: &str| said["error"][name].as_str().unwrap_or_default().to_string();
        let settings = ["batch.tokens", "batch.cells", "a smaller network"];
        let holds = out.status.code() == Some(4)
            && field("code") == "CR0801"
            && field("found").contains(" MB refused; ")
            && field("found").contains(" MB free")
            && settings.iter().any(|setting| field("next").contains(setting))
            && !field("where").is_empty();
        lost.unless(holds, || format!("{bytes} of {needed} bytes: {:?} {said}", out.status.code()));
        lost.unless(!place.root.join("run").exists(), || format!("{bytes} bytes: left a run folder"));
    }
    report(
        "F14",
        "a device with too little memory: no step, the bytes, the buffer and the setting",
        tried as usize,
        &lost.0,
    );
}

/// A driver as a library that answers three questions about itself.
struct Mock {
    name: &'static str,
    /// What asking for the version returns, and the version.
    version: (i32, i32),
    /// What starting it returns.
    init: i32,
    gpus: i32,
    /// What `doctor` says of it.
    says: &'static [&'static str],
}

/// Its folder, for LD_LIBRARY_PATH; nothing where there is no C compiler.
fn mock_driver(place: &Place, mock: &Mock) -> Option<PathBuf> {
    let Mock { name, version: (answer, number), init, gpus, .. } = mock;
    let folder = place.root.join(name);
    std::fs::create_dir(&folder).unwrap();
    let source = format!(
        "int cuInit(unsigned f) {{ return {init}; }}\n\
         int cuDriverGetVersion(int *v) {{ *v = {number}; return {answer}; }}\n\
         int cuDeviceGetCount(int *n) {{ *n = {gpus}; return 0; }}\n"
    );
    std::fs::write(folder.join("cuda.c"), source).unwrap();
    let library = folder.join("libcuda.so.1");
    let built = std::process::Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .arg(&library)
        .arg(folder.join("cuda.c"))
        .status()
        .is_ok_and(|status| status.success());
    std::os::unix::fs::symlink("libcuda.so.1", folder.join("libcuda.so")).unwrap();
    built.then_some(folder)
}

#[test]
fn a_driver_that_is_missing_old_or_broken_is_named() {
    let place = Place::new();
    let mut lost = Lost::default();
    let mut tried = 0;
    let mut check = |name: &str, folder: Option<&Path>, parts: &[&str]| {
        let run = |words: &str| {
            let mut command = place.command(words);
            if let Some(folder) = folder {
                command.env("LD_LIBRARY_PATH", folder);
            }
            command.output().unwrap()
        };
        let doctor = run("doctor");
        let said = text(&doctor.stdout);
        let named = parts.iter().all(|part| said.contains(part));
        lost.unless(doctor.status.success() && named, || {
            format!("{name}: doctor: {said}{}", text(&doctor.stderr))
        });
        for words in [
            "pretrain --corpus x.cells --preset tiny --out run --device cuda",
            "pretrain --corpus x.cells --preset tiny --out run --device cuda:3",
            "bench kernels --device cuda",
        ] {
            let out = run(words);
            let said = text(&out.stderr);
            let code =
                ["CR0810", "CR0811", "CR0812", "CR0813", "CR0814"].iter().any(|code| said.contains(code));
            let holds =
                out.status.code() == Some(4) && code && said.contains("try:") && !said.contains("panicked");
            lost.unless(holds, || format!("{name}: {words}: {:?} {said}", out.status.code()));
        }
        let auto = run(
            "pretrain --corpus x.cells --preset tiny --out auto --set train.steps=1 --set model.layers=1",
        );
        lost.unless(auto.status.success(), || {
            format!("{name}: without a device named: {}", text(&auto.stderr))
        });
        std::fs::remove_dir_all(place.root.join("auto")).unwrap();
        tried += 1;
    };
    // A machine with a driver has more to say: only the mocks are asked there.
    let there = place.run("doctor");
    if text(&there.stdout).contains("no NVIDIA driver") {
        check("none", None, &["no NVIDIA driver (libcuda.so.1 cannot be loaded)", "wanted: driver r580"]);
    }
    let mock = |name, version, init, gpus, says| Mock { name, version, init, gpus, says };
    for mock in [
        mock("old", (0, 12_080), 0, 1, &["the NVIDIA driver is too old (CUDA 12.8)", "wanted: CUDA 13.0"]),
        mock("no-device", (0, 13_000), 100, 0, &["CUDA_ERROR_NO_DEVICE"]),
        mock("none-counted", (0, 13_000), 0, 0, &["no NVIDIA GPU", "0 devices"]),
        mock("mismatch", (0, 13_010), 803, 1, &["CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803)"]),
        mock("stub", (34, 0), 34, 0, &["CUDA_ERROR_STUB_LIBRARY (34)"]),
        mock("fallen-off", (0, 13_000), 999, 1, &["(999)"]),
    ] {
        if let Some(folder) = mock_driver(&place, &mock) {
            check(mock.name, Some(&folder), mock.says);
        }
    }
    report(
        "F15",
        "no driver, an old, foreign, stub or failing one (mocked): exit 4, found and needed",
        tried,
        &lost.0,
    );
}
