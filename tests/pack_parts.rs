//! `pack --shard I/N` and `merge`: parts packed apart are the corpus packed in one go.

#[path = "common/import.rs"]
mod fixtures;
#[path = "common/h5ad.rs"]
mod h5ad;

use cellrefine::cli::Progress;
use cellrefine::corpus::merge::merge;
use cellrefine::corpus::part::Part;
use cellrefine::corpus::reader::Corpus;
use cellrefine::error::{Code, Error};
use cellrefine::import::pack::{EmptyCells, PackOptions, pack};
use fixtures::{many, wide_vocab};
use h5ad::Spec;
use std::path::{Path, PathBuf};

/// Three inputs, stored by cells, by genes and by cells; names come again within the last.
fn inputs(folder: &Path) -> Vec<PathBuf> {
    let (rows, columns, entries) = many();
    let mut specs = [
        Spec::csr(rows, columns, &entries),
        Spec::csc(rows, columns, &entries),
        Spec::csr(rows, columns, &entries),
    ];
    for (n, spec) in specs.iter_mut().enumerate() {
        spec.ids.iter_mut().enumerate().for_each(|(i, id)| *id = format!("d{n}-c{i}"));
        spec.label = Some((vec!["x", "y", "z"], (0..rows).map(|i| (i * (n + 1) % 3) as i8).collect()));
    }
    specs[2].ids.iter_mut().enumerate().for_each(|(i, id)| *id = format!("d2-c{}", i % 700));
    let name = |n: usize| folder.join(format!("{n}.h5ad"));
    specs.iter().enumerate().for_each(|(n, spec)| spec.write(&name(n)));
    (0..3).map(name).collect()
}

fn go(inputs: &[PathBuf], out: &Path, options: &PackOptions<'_>) -> Result<(), Error> {
    pack(inputs, &wide_vocab(90), out, options, &Progress::silent()).map(|_| ())
}

fn parts(inputs: &[PathBuf], folder: &Path, of: u64, options: &PackOptions<'_>) -> Vec<PathBuf> {
    let name = |i: u64| folder.join(format!("part-{i}-of-{of}.cells"));
    for index in 0..of {
        go(inputs, &name(index), &PackOptions { part: Some(Part { index, of }), ..options.clone() }).unwrap();
    }
    (0..of).map(name).collect()
}

fn cells(path: &Path) -> Vec<(String, Vec<u32>, f32)> {
    let corpus = Corpus::open(path).unwrap();
    let cell = |c| {
        (
            corpus.cell_id(c).unwrap().to_string(),
            corpus.genes(c).unwrap().to_vec(),
            corpus.total_count(c).unwrap(),
        )
    };
    (0..corpus.cells()).map(cell).collect()
}

#[test]
fn merged_parts_are_the_corpus_of_one_run() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = inputs(dir.path());
    for (empty_cells, of) in [(EmptyCells::Keep, 4), (EmptyCells::Keep, 7), (EmptyCells::Skip, 5)] {
        let options = PackOptions { shard_cells: 100, empty_cells, ..PackOptions::default() };
        let name = |what: &str| dir.path().join(format!("{what}-{of}.cells"));
        go(&inputs, &name("whole"), &options).unwrap();
        let mut parts = parts(&inputs, dir.path(), of, &options);
        // A shell lists part-10 before part-2: the order of the names does not matter.
        parts.reverse();
        merge(&parts, &name("merged"), &|_| ()).unwrap();
        let (whole, merged) = (Corpus::open(&name("whole")).unwrap(), Corpus::open(&name("merged")).unwrap());
        merged.verify().unwrap();
        assert_eq!(cells(&name("whole")), cells(&name("merged")), "{of} parts");
        assert_eq!(whole.categorical("label").unwrap(), merged.categorical("label").unwrap());
        assert_eq!(whole.manifest().vocabulary, merged.manifest().vocabulary);
        if empty_cells == EmptyCells::Keep {
            assert_eq!(whole.digest(), merged.digest(), "{of} parts");
            for shard in &whole.manifest().shards {
                let read = |folder: &str| std::fs::read(name(folder).join(&shard.file)).unwrap();
                assert!(read("whole") == read("merged"), "{of} parts: {}", shard.file);
            }
        }
    }
}

#[test]
fn a_part_is_a_pure_function() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = inputs(dir.path());
    let options =
        PackOptions { shard_cells: 100, part: Some(Part { index: 2, of: 6 }), ..PackOptions::default() };
    let [a, b] = ["a.cells", "b.cells"].map(|n| dir.path().join(n));
    go(&inputs, &a, &options).unwrap();
    go(&inputs, &b, &PackOptions { memory_bytes: 16 << 20, ..options }).unwrap();
    for entry in std::fs::read_dir(&a).unwrap() {
        let file = entry.unwrap().file_name();
        assert!(std::fs::read(a.join(&file)).unwrap() == std::fs::read(b.join(&file)).unwrap(), "{file:?}");
    }
}

#[test]
fn parts_that_are_missing_twice_or_of_another_job_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = inputs(dir.path());
    let options = PackOptions { shard_cells: 500, ..PackOptions::default() };
    let all = parts(&inputs, dir.path(), 3, &options);
    let other = dir.path().join("other.cells");
    let part = Some(Part { index: 1, of: 3 });
    go(&inputs, &other, &PackOptions { max_tokens: 5, part, ..options.clone() }).unwrap();
    let whole = dir.path().join("whole.cells");
    go(&inputs, &whole, &options).unwrap();
    let refused = |list: &[&PathBuf]| {
        let list: Vec<PathBuf> = list.iter().map(|p| p.to_path_buf()).collect();
        let out = dir.path().join("out.cells");
        let e = merge(&list, &out, &|_| ()).unwrap_err();
        assert!(!out.exists() && e.code() == Code::PartsIncomplete, "{e}");
        e.to_string()
    };
    let missing = refused(&[&all[0], &all[2]]);
    assert!(missing.contains("1/3") && missing.contains("2 of 3"), "{missing}");
    assert!(refused(&[&all[0], &all[1], &all[1], &all[2]]).contains("named twice"));
    assert!(refused(&[&all[0], &other, &all[2]]).contains("different corpora"));
    assert!(refused(&[&all[0], &all[1], &all[2], &whole]).contains("whole corpus"));

    let many = Some(Part { index: 0, of: 200 });
    let e = go(&inputs, &dir.path().join("n.cells"), &PackOptions { part: many, ..options }).unwrap_err();
    assert!(e.code() == Code::FlagValue && e.to_string().contains("at most 9 parts"), "{e}");
}

/// One file under two names, in two parts that never see each other's bytes.
#[test]
fn one_input_under_two_names_shows_when_parts_are_merged() {
    let dir = tempfile::tempdir().unwrap();
    let first = inputs(dir.path()).remove(0);
    let again = dir.path().join("again.h5ad");
    std::fs::copy(&first, &again).unwrap();
    let options = PackOptions { shard_cells: 500, ..PackOptions::default() };
    let list = [first, again];
    assert_eq!(go(&list, &dir.path().join("w.cells"), &options).unwrap_err().code(), Code::InputTwice);
    let parts = parts(&list, dir.path(), 2, &options);
    let e = merge(&parts, &dir.path().join("m.cells"), &|_| ()).unwrap_err();
    assert_eq!(e.code(), Code::MergeTwice, "{e}");
}

#[test]
fn a_stopped_run_is_started_again_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = inputs(dir.path());
    let options = PackOptions { shard_cells: 500, ..PackOptions::default() };
    let [clean, out] = ["clean.cells", "x.cells"].map(|n| dir.path().join(n));
    go(&inputs, &clean, &options).unwrap();
    let left = dir.path().join(".x.cells.partial");
    std::fs::create_dir(&left).unwrap();
    for n in 0..3 {
        std::fs::write(left.join(format!("shard-0000{n}.safetensors")), b"half").unwrap();
    }
    let report = pack(&inputs, &wide_vocab(90), &out, &options, &Progress::silent()).unwrap();
    assert!(
        report.notes.iter().any(|n| n.contains("incomplete corpus") && n.contains("3 shards")),
        "{:?}",
        report.notes
    );
    assert_eq!(Corpus::open(&clean).unwrap().digest(), Corpus::open(&out).unwrap().digest());
}
