//! F22: the smallest inputs and unusual surroundings: everything works or is refused with a clear error; nothing is a fault of the
//! program, and a refused command leaves nothing under its output's name.

use super::faults::{cases, report};
use super::h5ad::Spec;
use super::place::*;
use super::typed_cells;
use cellrefine::corpus::{
    CellRecord, CorpusOptions, CorpusWriter, ObsKind, ObsSpec, ObsValue, VocabIdentity,
};
use cellrefine::genes::Vocab;
use std::path::Path;
use std::process::{Command, Output, Stdio};

const SMALL: &str =
    "--threads 1 --set model.layers=1 --set model.width=16 --set model.ffn=32 --set train.steps=2";
const BATCH: &str = "--threads 1 --set train.steps=2 --set batch.cells=8";

/// Cells of one label and some genes each.
fn corpus(root: &Path, name: &str, vocab: &Vocab, cells: &[(Option<&str>, Vec<u32>)]) {
    let options = CorpusOptions {
        vocab: VocabIdentity { digest: vocab.digest().into(), len: vocab.len() },
        vocab_file: Some(vocab.to_tsv(&[]).into_bytes()),
        values: false,
        shard_cells: 0,
        obs: vec![ObsSpec { name: "cell_type".into(), kind: ObsKind::Categorical }],
        provenance: serde_json::Value::Null,
    };
    let mut writer = CorpusWriter::create(&root.join(name), options).unwrap();
    for (i, (label, gene)) in cells.iter().enumerate() {
        let obs = [label.map_or(ObsValue::Missing, ObsValue::Category)];
        let id = format!("cell{i}");
        writer.push(&CellRecord { id: &id, gene, value: None, total_count: 1.0, obs: &obs }).unwrap();
    }
    writer.finish().unwrap();
}

/// Done, or a clear error of the user's: its code, a next step or what was wanted, and nothing at `out`.
fn well(place: &Place, out: &str, words: &str, output: &Output, lost: &mut Lost) {
    let (code, said) = (output.status.code(), text(&output.stderr));
    match code {
        Some(0) => lost.unless(place.root.join(out).exists(), || format!("{words}: done, and no {out}")),
        Some(2 | 3) => {
            let clear = said.lines().any(|line| line.starts_with("error[CR")) && said.contains("\n  ");
            lost.unless(clear, || format!("{words}: {said}"));
            lost.unless(!place.root.join(out).exists(), || {
                format!("{words}: refused, and left {out}: {said}")
            });
        }
        _ => lost.0.push(format!("{words}: {code:?} {said}")),
    }
}

/// Every loss that the run in `out` logged is a number.
fn finite(place: &Place, out: &str, lost: &mut Lost) {
    let log = std::fs::read_to_string(place.root.join(out).join("metrics.jsonl")).unwrap_or_default();
    let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let losses: Vec<_> = lines.map(|line| line["loss"].clone()).collect();
    lost.unless(!losses.is_empty() && losses.iter().all(|loss| loss.is_number()), || {
        format!("{out}: {losses:?}")
    });
}

#[test]
fn the_smallest_corpora_through_every_command() {
    let place = Place::new();
    let mut lost = Lost::default();
    let vocab = typed_cells::vocab(3, 0.0);
    let base = place.run(&format!("pretrain --corpus x.cells --preset tiny --out base {SMALL}"));
    assert!(base.status.success(), "{}", text(&base.stderr));
    let gene = |k: u32| 2 + k % (vocab.len() as u32 - 2);
    let types = ["type0", "type1", "type2"];
    let of = |n: usize, types: &[&'static str], genes: u32| -> Vec<(Option<&'static str>, Vec<u32>)> {
        let cell =
            |i: usize| (Some(types[i % types.len()]), (0..genes).map(|g| gene(g + i as u32)).collect());
        (0..n).map(cell).collect()
    };
    let mut half_empty = of(12, &types, 5);
    half_empty.iter_mut().step_by(2).for_each(|cell| cell.1.clear());
    let mut unlabelled = of(12, &types, 5);
    unlabelled.iter_mut().for_each(|cell| cell.0 = None);
    let same_gene = (0..12).map(|i| (Some(types[i % 3]), vec![5])).collect();
    let corpora = [
        ("no-cell", of(0, &types, 5)),
        ("one-cell", of(1, &types, 5)),
        ("one-gene", same_gene),
        ("one-class", of(12, &types[..1], 5)),
        ("empty-cells", of(12, &types, 0)),
        ("one-cell-a-class", of(3, &types, 5)),
        ("half-empty", half_empty),
        ("no-labels", unlabelled),
        ("one-empty-cell", of(1, &types, 0)),
    ];
    let mut tried = 0;
    for (name, cells) in corpora.iter().take(cases(5, corpora.len())) {
        corpus(&place.root, &format!("{name}.cells"), &vocab, cells);
        let on = format!("--corpus {name}.cells --checkpoint base");
        let commands = [
            ("pre", format!("pretrain --corpus {name}.cells --preset tiny {SMALL}")),
            ("ref", format!("refine {on} --markers markers.gmt --label cell_type {BATCH}")),
            ("free", format!("refine {on} --markers markers.gmt {BATCH}")),
            ("derived", format!("refine {on} --markers derive --label cell_type {BATCH}")),
            ("fine", format!("finetune {on} --label cell_type {BATCH}")),
            ("emb.npy", format!("embed {on}")),
            ("tab.tsv", format!("annotate {on} --markers markers.gmt")),
            ("drv.gmt", format!("markers derive --corpus {name}.cells --label cell_type")),
        ];
        for (out, words) in commands {
            let (out, words) = (format!("{name}-{out}"), format!("{words} --out {name}-{out}"));
            let output = place.run(&words);
            well(&place, &out, &words, &output, &mut lost);
            if output.status.success() && words.contains("train.steps") {
                finite(&place, &out, &mut lost);
            }
            tried += 1;
        }
        for words in [format!("eval {on} --label cell_type"), format!("inspect {name}.cells --verify")] {
            let output = place.run(&words);
            let clear = text(&output.stderr).contains("error[CR") || output.status.success();
            let holds = matches!(output.status.code(), Some(0 | 2 | 3)) && clear;
            lost.unless(holds, || format!("{words}: {:?} {}", output.status.code(), text(&output.stderr)));
            tried += 1;
        }
        let rows = std::fs::read(place.root.join(format!("{name}-emb.npy")));
        let finite = rows.is_ok_and(|bytes| {
            let floats = bytes[128..].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            floats.into_iter().all(f32::is_finite) || cells.iter().any(|cell| cell.1.is_empty())
        });
        let refused = !place.root.join(format!("{name}-emb.npy")).exists();
        lost.unless(finite || refused, || format!("{name}: rows that are not finite"));
    }
    report(
        "F22",
        "no cell, one cell, one gene, one class, empty cells, no labels, through every command",
        tried,
        &lost.0,
    );
}

#[test]
fn the_smallest_batches_and_masks() {
    let place = Place::new();
    let mut lost = Lost::default();
    let settings = [
        "batch.max_tokens=1",
        "mask.probability=1",
        "mask.probability=0",
        "batch.cells=1",
        "batch.tokens=1",
        "batch.cells=100000",
        "batch.max_tokens=2",
        "train.log_every=1000000",
        "optimizer.clip=0",
    ];
    let chosen = &settings[..cases(4, settings.len())];
    let mut tried = 0;
    let base = place.run(&format!("pretrain --corpus x.cells --preset tiny --out base {SMALL}"));
    assert!(base.status.success(), "{}", text(&base.stderr));
    for (i, set) in chosen.iter().enumerate() {
        let on = format!(
            "--corpus x.cells --checkpoint base --label cell_type --set {set} --threads 1 --set train.steps=2"
        );
        for (out, words) in [
            (format!("p{i}"), format!("pretrain --corpus x.cells --preset tiny {SMALL} --set {set}")),
            (format!("r{i}"), format!("refine {on} --markers markers.gmt")),
            (format!("f{i}"), format!("finetune {on}")),
        ] {
            let words = format!("{words} --out {out}");
            let output = place.run(&words);
            well(&place, &out, &words, &output, &mut lost);
            if output.status.success() {
                finite(&place, &out, &mut lost);
            }
            tried += 1;
        }
    }
    for words in ["embed --out e.npy --max-tokens 1", "embed --out e2.npy --batch-tokens 1"] {
        let words = format!("{words} --corpus x.cells --checkpoint base");
        let output = place.run(&words);
        let out = words.split_whitespace().nth(2).unwrap().to_string();
        well(&place, &out, &words, &output, &mut lost);
        tried += 1;
    }
    report(
        "F22",
        "one token a cell, all or none masked, one cell a batch, batches beyond the corpus",
        tried,
        &lost.0,
    );
}

#[test]
fn the_smallest_files_are_packed_or_refused() {
    let place = Place::new();
    let mut lost = Lost::default();
    let files = [
        ("one-cell", Spec::csr(1, 3, &[(0, 0, 2.0), (0, 2, 1.0)])),
        ("one-gene", Spec::csr(4, 1, &[(0, 0, 2.0), (1, 0, 1.0), (3, 0, 7.0)])),
        ("one-of-each", Spec::csr(1, 1, &[(0, 0, 1.0)])),
        ("last-cells-empty", Spec::csr(4, 3, &[(0, 0, 2.0)])),
    ];
    for (name, spec) in &files {
        spec.write(&place.root.join(format!("{name}.h5ad")));
        for (out, words) in [
            (format!("{name}.tsv"), format!("vocab build {name}.h5ad")),
            (format!("{name}.cells"), format!("pack {name}.h5ad --vocab {name}.tsv")),
            (format!("{name}-kept.cells"), format!("pack {name}.h5ad --vocab {name}.tsv --empty-cells keep")),
            (format!("{name}-run"), format!("pretrain --corpus {name}.cells --preset tiny {SMALL}")),
            (format!("{name}.npy"), format!("embed --corpus {name}-kept.cells --checkpoint {name}-run")),
        ] {
            let words = format!("{words} --out {out}");
            let output = place.run(&words);
            well(&place, &out, &words, &output, &mut lost);
        }
    }
    report(
        "F22",
        "files of one cell, one gene, empty cells: packed, trained on and embedded, or refused",
        5 * files.len(),
        &lost.0,
    );
}

/// (what, command, exit code) of a command in an unusual surrounding.
#[test]
fn unusual_surroundings() {
    let place = Place::new();
    let mut lost = Lost::default();
    let train = |out: &str| {
        format!("pretrain --corpus x.cells --preset tiny {SMALL} --set train.log_every=1 --out {out}")
    };
    let base = place.run(&train("base"));
    assert!(base.status.success(), "{}", text(&base.stderr));
    let weights = |out: &str| tensors(&checkpoint(&place.root.join(out), 2));
    let wanted = weights("base");
    let mut tried = 0;
    let mut check = |what: &str, command: &mut Command, out: Option<&str>, code: i32| {
        let output = command.output().unwrap();
        let said = text(&output.stderr);
        lost.unless(output.status.code() == Some(code), || {
            format!("{what}: {:?} {said}", output.status.code())
        });
        lost.unless(!said.contains("panicked"), || format!("{what}: {said}"));
        if let Some(out) = out {
            lost.unless(weights(out) == wanted, || format!("{what}: other weights"));
        }
        tried += 1;
    };
    // Pipes whose readers have gone, and descriptors that are closed.
    let shell = |script: &str| {
        let mut command = Command::new("bash");
        let program = env!("CARGO_BIN_EXE_cellrefine");
        command.current_dir(&place.root).args([
            "-o",
            "pipefail",
            "-c",
            &script.replace("cellrefine", program),
        ]);
        command.stdin(Stdio::null());
        command
    };
    check("stdout without a reader", &mut shell("(sleep 0.2; cellrefine doctor) | true"), None, 0);
    check("its JSON", &mut shell("(sleep 0.2; cellrefine inspect x.cells --json) | true"), None, 0);
    let gone = format!("(sleep 0.2; cellrefine {}) 2>&1 | true", train("gone"));
    check("neither stdout nor stderr has a reader", &mut shell(&gone), Some("gone"), 0);
    let failing = "(sleep 0.2; cellrefine inspect nothing.cells) 2>&1 | true";
    check("an error that nobody reads", &mut shell(failing), None, 3);
    check(
        "all descriptors closed",
        &mut shell(&format!("cellrefine {} <&- >&- 2>&-", train("shut"))),
        Some("shut"),
        0,
    );
    check("a full device", &mut shell("cellrefine inspect x.cells > /dev/full"), None, 4);
    check(
        "stderr on a full device",
        &mut shell(&format!("cellrefine {} 2> /dev/full", train("full"))),
        Some("full"),
        0,
    );
    // Locale, home and temporary folder.
    let mut c = place.command(&train("läuft-α"));
    check("LANG=C and a name beyond ASCII", c.env("LANG", "C").env("LC_ALL", "C"), Some("läuft-α"), 0);
    let mut nowhere = place.command(&train("homeless"));
    nowhere.env("HOME", "/proc/1/nothing").env("TMPDIR", "/proc").env("XDG_CACHE_HOME", "/proc");
    check("no home and no temporary folder to write to", &mut nowhere, Some("homeless"), 0);
    check("an empty environment", place.command(&train("bare")).env_clear(), Some("bare"), 0);
    let mut dumb = place.command(&train("dumb"));
    check(
        "a dumb terminal",
        dumb.env("TERM", "dumb").env("NO_COLOR", "1").env("COLUMNS", "0"),
        Some("dumb"),
        0,
    );
    // A clock that jumps back an hour at every look.
    let clock = place.root.join("clock.c");
    let source = "#define _GNU_SOURCE\n#include <dlfcn.h>\n#include <time.h>\n\
        int clock_gettime(clockid_t id, struct timespec *t) {\n\
        static int (*real)(clockid_t, struct timespec *); static long looks;\n\
        if (!real) real = dlsym(RTLD_NEXT, \"clock_gettime\");\n\
        int r = real(id, t); if (id == CLOCK_REALTIME) t->tv_sec -= 3600 * looks++; return r; }\n";
    std::fs::write(&clock, source).unwrap();
    let library = place.root.join("clock.so");
    let built =
        Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&clock).arg("-ldl").status();
    if built.is_ok_and(|status| status.success()) {
        check(
            "a clock that runs back",
            place.command(&train("back")).env("LD_PRELOAD", &library),
            Some("back"),
            0,
        );
        let mut report = place.command("report back base --records-only --out back.html");
        check("its report", report.env("LD_PRELOAD", &library), None, 0);
        let more = format!("{} --resume --allow-settings --set train.steps=4", train("back"));
        check("its resume", place.command(&more).env("LD_PRELOAD", &library), None, 0);
    }
    report(
        "F22",
        "closed pipes and descriptors, full devices, LANG=C, no home, no terminal, a clock that runs back",
        tried,
        &lost.0,
    );
}
