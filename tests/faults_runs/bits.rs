//! F24: equal bits: from repeat to repeat, for any number of threads, however memory and batches are cut, and whatever stands beside a
//! cell.

use super::faults::{cases, report};
use super::place::*;
use super::typed_cells;
use cellrefine::corpus::{CellRecord, Corpus, CorpusOptions, CorpusWriter, VocabIdentity};
use cellrefine::train::stages;
use std::collections::BTreeMap;
use std::path::Path;

#[test]
fn repeats_of_every_stage() {
    let place = Place::new();
    let mut lost = Lost::default();
    let set = ["train.steps=3", "batch.tokens=64", "batch.cells=24", "model.hidden_dropout=0.1"];
    let repeats = cases(4, 30);
    let stages: [(&str, Stage, &[&str]); 4] = [
        ("pretrain", stages::pretrain, &[]),
        ("refine", refine, &["objective.refresh=0.9"]),
        ("finetune", stages::finetune, &["batch.sampling=sqrt"]),
        ("bf16", refine, &["train.precision=bf16"]),
    ];
    for (name, stage, more) in stages {
        let mut first = None;
        for repeat in 0..repeats {
            let set = [&set[..], more].concat();
            let out = format!("{name}-{repeat}");
            let inputs = if name == "pretrain" { place.inputs(&out, &set) } else { place.later(&out, &set) };
            stage(&inputs, &mut Script::default()).unwrap();
            let these = tensors(&checkpoint(&inputs.out, 3));
            let first = first.get_or_insert_with(|| these.clone());
            lost.unless(*first == these, || format!("{name}, repeat {repeat}"));
            std::fs::remove_dir_all(&inputs.out).unwrap();
        }
    }
    report("F24", "repeats of each stage, f32 and bf16", 4 * repeats, &lost.0);
}

/// The bytes of every file in and below a folder that hold no time.
fn bytes(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap()))
        .collect()
}

#[test]
fn threads_and_cuts_of_the_program() {
    let place = Place::new();
    let mut lost = Lost::default();
    let mut tried = 0;
    let small = "--set model.layers=1 --set model.width=32 --set model.ffn=64 --set train.steps=3 --set batch.cells=24";
    let pre = place.run(&format!("pretrain --corpus x.cells --preset tiny {small} --out base"));
    assert!(pre.status.success(), "{}", text(&pre.stderr));
    let entries: Vec<_> = (0..600)
        .flat_map(|r| (0..9).map(move |k| (r, (r * 7 + k * 5) % 40, (1 + (r + k) % 6) as f32)))
        .collect();
    let mut entries: Vec<(usize, usize, f32)> = entries;
    entries.sort_by_key(|e| (e.0, e.1));
    entries.dedup_by_key(|e| (e.0, e.1));
    super::h5ad::Spec::csr(600, 40, &entries).write(&place.root.join("in.h5ad"));
    super::h5ad::Spec::csc(600, 40, &entries).write(&place.root.join("by-gene.h5ad"));
    let vocab = place.run("vocab build in.h5ad --out v.tsv");
    assert!(vocab.status.success(), "{}", text(&vocab.stderr));
    type Result_ = Box<dyn Fn(&Path) -> BTreeMap<String, Vec<u8>>>;
    let (refine_on, embed_on) = (
        "refine --corpus x.cells --checkpoint base --markers markers.gmt --label cell_type --set train.steps=3 --set batch.cells=24",
        "embed --corpus x.cells --checkpoint base",
    );
    let of_run = || -> Result_ { Box::new(|out: &Path| tensors(&checkpoint(out, 3))) };
    let of_file = || -> Result_ {
        Box::new(|out: &Path| BTreeMap::from([("file".into(), std::fs::read(out).unwrap())]))
    };
    // A manifest names its inputs and when it was made; shards hold the cells.
    let of_corpus = || -> Result_ {
        Box::new(|out: &Path| {
            bytes(out).into_iter().filter(|(name, _)| name.ends_with(".safetensors")).collect()
        })
    };
    let works: [(&str, String, Vec<&str>, Result_); 6] = [
        (
            "pretrain",
            format!("pretrain --corpus x.cells --preset tiny {small}"),
            vec!["--threads 1", "--threads 2", "--threads 8", "--set batch.ahead=1", "--set batch.ahead=9"],
            of_run(),
        ),
        (
            "refine",
            refine_on.into(),
            vec!["--threads 1", "--threads 2", "--threads 8", "--set train.recompute=true"],
            of_run(),
        ),
        (
            "embed",
            embed_on.into(),
            vec![
                "--threads 1",
                "--threads 8",
                "--batch-tokens 1",
                "--batch-tokens 100",
                "--batch-tokens 100000",
            ],
            of_file(),
        ),
        (
            "embed in bf16",
            format!("{embed_on} --dtype bf16"),
            vec!["--threads 1", "--threads 8", "--batch-tokens 60", "--batch-tokens 100000"],
            of_file(),
        ),
        (
            "pack",
            "pack in.h5ad --vocab v.tsv".into(),
            vec!["--threads 1", "--threads 2", "--threads 8", "--memory 16M", "--memory 1G"],
            of_corpus(),
        ),
        (
            "pack by gene",
            "pack by-gene.h5ad --vocab v.tsv".into(),
            vec!["--threads 1", "--threads 8", "--memory 16M"],
            of_corpus(),
        ),
    ];
    for (w, (name, words, cuts, result)) in works.iter().enumerate() {
        let mut first = None;
        for (c, cut) in cuts.iter().enumerate() {
            let out = match *name {
                n if n.starts_with("embed") => format!("o{w}-{c}.npy"),
                _ => format!("o{w}-{c}"),
            };
            let done = place.run(&format!("{words} {cut} --out {out} --quiet"));
            tried += 1;
            if !done.status.success() {
                lost.0.push(format!("{name} {cut}: {}", text(&done.stderr)));
                continue;
            }
            let these = result(&place.root.join(&out));
            lost.unless(!these.is_empty(), || format!("{name}: nothing to compare"));
            let first = first.get_or_insert_with(|| these.clone());
            lost.unless(*first == these, || format!("{name} {cut}"));
        }
    }
    report(
        "F24",
        "threads 1, 2 and 8, sizes of blocks, batches and queues, through the program",
        tried,
        &lost.0,
    );
}

#[test]
fn a_row_depends_on_its_cell_alone() {
    let place = Place::new();
    let mut lost = Lost::default();
    let base = place.run(
        "pretrain --corpus x.cells --preset tiny --set model.layers=1 --set model.width=32 --set model.ffn=64 --set train.steps=3 --out base",
    );
    assert!(base.status.success(), "{}", text(&base.stderr));
    let corpus = Corpus::open(&place.corpus).unwrap();
    let vocab = typed_cells::vocab(3, 0.0);
    let cells = corpus.cells();
    // Every seventh cell alone, backwards, and by a stride.
    let orders: Vec<(&str, Vec<usize>)> = vec![
        ("as they are", (0..cells).collect()),
        ("backwards", (0..cells).rev().collect()),
        ("by a stride", (0..cells).map(|i| i * 5 % cells).collect()),
        ("one in seven", (0..cells).step_by(7).collect()),
        ("one alone", vec![17]),
    ];
    let mut wanted: Option<Vec<Vec<u8>>> = None;
    let mut tried = 0;
    for (i, (name, order)) in orders.iter().enumerate() {
        let options = CorpusOptions {
            vocab: VocabIdentity { digest: vocab.digest().into(), len: vocab.len() },
            vocab_file: Some(vocab.to_tsv(&[]).into_bytes()),
            values: false,
            shard_cells: 0,
            obs: Vec::new(),
            provenance: serde_json::Value::Null,
        };
        let mut writer = CorpusWriter::create(&place.root.join(format!("{i}.cells")), options).unwrap();
        for cell in order {
            let (id, gene) = (corpus.cell_id(*cell).unwrap(), corpus.genes(*cell).unwrap().to_vec());
            writer.push(&CellRecord { id, gene: &gene, value: None, total_count: 1.0, obs: &[] }).unwrap();
        }
        writer.finish().unwrap();
        let done = place
            .run(&format!("embed --corpus {i}.cells --checkpoint base --out {i}.npy --batch-tokens 200"));
        assert!(done.status.success(), "{}", text(&done.stderr));
        let file = std::fs::read(place.root.join(format!("{i}.npy"))).unwrap();
        let rows: Vec<Vec<u8>> = file[128..].chunks_exact(4 * 32).map(<[u8]>::to_vec).collect();
        assert_eq!(rows.len(), order.len(), "rows of 32 floats behind a header of 128 bytes");
        let wanted = wanted.get_or_insert_with(|| rows.clone());
        for (row, cell) in rows.iter().zip(order) {
            lost.unless(*row == wanted[*cell], || format!("{name}: cell {cell}"));
            tried += 1;
        }
    }
    report("F24", "embedding rows, cells in other orders and other company", tried, &lost.0);
}
