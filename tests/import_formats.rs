//! 10x matrices and tokenised data sets: whatever form the cells come in, packing gives the tokens that numpy gives.

#[path = "common/import.rs"]
mod fixtures;
#[path = "common/formats.rs"]
mod formats;

use cellrefine::cli::Progress;
use cellrefine::corpus::Corpus;
use cellrefine::export::dataset;
use cellrefine::genes::Vocab;
use cellrefine::import::medians::{BuildOptions, build};
use cellrefine::import::pack::{EmptyCells, PackOptions, pack};
use fixtures::{expected, fixture, program, refuse, run, vocab};
use std::path::{Path, PathBuf};

const MATRICES: [&str; 6] = ["v3.h5", "v2.h5", "mtx_v3", "mtx_v2", "mtx_by_gene", "mtx_turned"];

fn matrix(dir: &Path, name: &str) -> PathBuf {
    match name.strip_suffix(".h5") {
        Some(stem) => formats::h5(dir, stem),
        None => formats::golden(name),
    }
}

/// Tokens, totals and names of every cell, against numpy's.
fn check(name: &str, folder: &Path) {
    let want = expected();
    let corpus = Corpus::open(folder).unwrap();
    let kept: Vec<usize> = (0..29).filter(|&c| !want["tokens"][c].as_array().unwrap().is_empty()).collect();
    assert_eq!(corpus.cells(), kept.len(), "{name}");
    for (at, &cell) in kept.iter().enumerate() {
        let found: Vec<u64> = corpus.genes(at).unwrap().iter().map(u64::from).collect();
        let tokens: Vec<u64> =
            want["tokens"][cell].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect();
        assert_eq!(found, tokens, "{name}, cell {cell}");
        assert_eq!(
            f64::from(corpus.total_count(at).unwrap()),
            want["total"][cell].as_f64().unwrap(),
            "{name}"
        );
        assert_eq!(corpus.cell_id(at).unwrap(), want["ids"][cell].as_str().unwrap(), "{name}");
    }
}

#[test]
fn every_10x_matrix_gives_the_tokens_that_numpy_gives() {
    let dir = tempfile::tempdir().unwrap();
    for name in MATRICES {
        for memory in [2 << 30, 1] {
            let out = dir.path().join(format!("{name}.{memory}.cells"));
            let options = PackOptions { memory_bytes: memory, ..PackOptions::default() };
            let report =
                run(&[matrix(dir.path(), name)], &out, &options).unwrap_or_else(|e| panic!("{name}: {e}"));
            let genes = report.files[0].genes.as_ref().unwrap();
            assert_eq!((genes.column.as_str(), genes.entries, genes.matched), ("gene_ids", 23, 21), "{name}");
            assert_eq!(report.files[0].empty, 2, "{name}");
            let typed = ["v3.h5", "mtx_v3"].contains(&name);
            assert_eq!(
                report.files[0].counts.contains("23 of 25 features"),
                typed,
                "{}",
                report.files[0].counts
            );
            check(name, &out);
        }
    }
}

#[test]
fn a_large_matrix_in_any_order_is_the_same_corpus() {
    let (cells, genes, entries) = fixtures::many();
    let vocab = fixtures::wide_vocab(genes);
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, entries: &[(usize, usize, f32)]| {
        let folder = dir.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        let mut text =
            format!("%%MatrixMarket matrix coordinate integer general\n{genes} {cells} {}\n", entries.len());
        entries.iter().for_each(|(cell, gene, x)| text += &format!("{} {} {x}\n", gene + 1, cell + 1));
        std::fs::write(folder.join("matrix.mtx"), text).unwrap();
        let names =
            |n: usize, name: &dyn Fn(usize) -> String| (0..n).map(|i| name(i) + "\n").collect::<String>();
        std::fs::write(folder.join("barcodes.tsv"), names(cells, &|c| format!("cell-{c}"))).unwrap();
        let first = (0..vocab.len() as u32).find(|&t| !vocab.is_special(t)).unwrap();
        std::fs::write(
            folder.join("genes.tsv"),
            names(genes, &|g| vocab.token(first + g as u32).to_string()),
        )
        .unwrap();
        folder
    };
    let mut shuffled = entries.clone();
    let mut state = 7u64;
    for i in (1..shuffled.len()).rev() {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        shuffled.swap(i, (state >> 33) as usize % (i + 1));
    }
    let mut digests = Vec::new();
    for (name, entries) in [("sorted", &entries), ("shuffled", &shuffled)] {
        let folder = write(name, entries);
        for memory in [2u64 << 30, 1] {
            let out = dir.path().join(format!("{name}.{memory}.cells"));
            let options = PackOptions { memory_bytes: memory, ..PackOptions::default() };
            let report =
                pack(std::slice::from_ref(&folder), &vocab, &out, &options, &Progress::silent()).unwrap();
            assert!(report.files[0].empty > 0 && report.manifest.cells > 1000);
            digests.push(report.manifest.digest);
        }
    }
    digests.dedup();
    assert_eq!(digests.len(), 1, "{digests:?}");
}

#[test]
fn vocabularies_from_10x_matrices_are_those_from_the_h5ad() {
    let dir = tempfile::tempdir().unwrap();
    let of = |path: PathBuf| build(&[path], &BuildOptions::default()).unwrap().vocab;
    let want = of(fixture(dir.path(), "csr_float32_gzip"));
    for name in MATRICES {
        let vocab = of(matrix(dir.path(), name));
        assert_eq!(vocab.digest(), want.digest(), "{name}");
        assert_eq!(vocab.symbol(vocab.id("ENSG00000000100").unwrap()), Some("SYM0"), "{name}");
    }
    let e = build(&[formats::golden("list.dataset")], &BuildOptions::default()).unwrap_err();
    assert!(e.kind().exit_code() == 3 && e.to_string().contains("vocab convert"), "{e}");
}

#[test]
fn a_genome_is_chosen_among_several_and_never_guessed() {
    let dir = tempfile::tempdir().unwrap();
    let path = formats::h5(dir.path(), "v2_two_genomes");
    refuse(&path, &PackOptions::default(), &["several genomes", "GRCh38, mm10", "--genome GRCh38"]);
    let of = |genome: &str| PackOptions { genome: Some(genome.into()), ..PackOptions::default() };
    refuse(&path, &of("hg19"), &["no genome \"hg19\"", "GRCh38, mm10"]);
    // The genes of the other species are not in the vocabulary, and that is said as ever.
    refuse(&path, &of("mm10"), &["0 of 23 gene names"]);
    let out = dir.path().join("human.cells");
    run(std::slice::from_ref(&path), &out, &of("GRCh38")).unwrap();
    check("v2_two_genomes", &out);
    // Of version 3, the genome is a column beside the features.
    let v3 = formats::h5(dir.path(), "v3");
    run(std::slice::from_ref(&v3), &dir.path().join("v3.cells"), &of("GRCh38")).unwrap();
    refuse(&v3, &of("mm10"), &["no gene is of genome \"mm10\"", "\"GRCh38\" (23)"]);
    let e = run(&[fixture(dir.path(), "raw")], &dir.path().join("x.cells"), &of("mm10")).unwrap_err();
    assert_eq!(e.kind().exit_code(), 2, "{e}");
}

/// The digest covers every byte of every shard: tokens, totals, names, obs columns and their order.
#[test]
fn a_dataset_that_datasets_wrote_is_the_corpus_of_its_h5ad() {
    let dir = tempfile::tempdir().unwrap();
    let h5ad = fixture(dir.path(), "csr_float32_gzip");
    let want = run(&[h5ad], &dir.path().join("h5ad.cells"), &PackOptions::default()).unwrap().manifest;
    for name in ["list.dataset", "sequence.dataset", "int32_three_files.dataset", "large_list.dataset"] {
        for memory in [2 << 30, 1] {
            let out = dir.path().join(format!("{name}.{memory}.cells"));
            let options = PackOptions { memory_bytes: memory, ..PackOptions::default() };
            let report =
                run(&[formats::golden(name)], &out, &options).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert!(
                report.files[0].genes.is_none()
                    && report.files[0].sha256.as_ref().is_some_and(|s| s.len() == 64)
            );
            check(name, &out);
            assert_eq!(report.manifest.columns, want.columns, "{name}");
            assert_eq!(report.manifest.digest, want.digest, "{name}");
        }
    }
    // And back: what we write is what we read.
    let corpus = Corpus::open(&dir.path().join("h5ad.cells")).unwrap();
    let out = dir.path().join("ours.dataset");
    let exported = dataset::export(&corpus, &out, None, &|_| ()).unwrap();
    assert_eq!((exported.cells, exported.cut, exported.max_tokens), (27, 0, 2048));
    let again = run(&[out], &dir.path().join("again.cells"), &PackOptions::default()).unwrap().manifest;
    assert_eq!(again.digest, want.digest);
}

#[test]
fn options_reach_tokenised_cells() {
    let dir = tempfile::tempdir().unwrap();
    let input = [formats::golden("int32_three_files.dataset")];
    let options = PackOptions {
        max_tokens: 2,
        obs: vec!["batch".into()],
        drop: vec![("label".into(), "NK".into())],
        empty_cells: EmptyCells::Error,
        ..PackOptions::default()
    };
    let report = run(&input, &dir.path().join("a.cells"), &options).unwrap();
    assert_eq!(report.manifest.columns.len(), 1);
    assert!(report.files[0].dropped > 0 && report.manifest.cells == 27 - report.files[0].dropped);
    let corpus = Corpus::open(&dir.path().join("a.cells")).unwrap();
    assert!((0..corpus.cells()).all(|c| corpus.len_of(c) <= 2));
    let e = run(&input, &dir.path().join("b.cells"), &PackOptions { values: true, ..PackOptions::default() });
    assert!(e.unwrap_err().to_string().contains("--values needs counts"));
    let counts = PackOptions { counts: Some("raw".into()), ..PackOptions::default() };
    assert_eq!(run(&input, &dir.path().join("b.cells"), &counts).unwrap_err().kind().exit_code(), 2);
}

/// With <cls> and <eos>, they stand round the cell in the data set and nowhere in the corpus.
#[test]
fn special_tokens_go_out_and_do_not_come_in() {
    let dir = tempfile::tempdir().unwrap();
    let h5ad = fixture(dir.path(), "csr_float32_gzip");
    let vocab = build(std::slice::from_ref(&h5ad), &BuildOptions::default()).unwrap().vocab;
    let (cells, out) = (dir.path().join("v2.cells"), dir.path().join("v2.dataset"));
    let want = pack(&[h5ad], &vocab, &cells, &PackOptions::default(), &Progress::silent()).unwrap().manifest;
    let corpus = Corpus::open(&cells).unwrap();
    let exported = dataset::export(&corpus, &out, None, &|_| ()).unwrap();
    assert_eq!(exported.tokens, want.tokens + 2 * want.cells);
    assert_eq!(exported.max_tokens, 4096);
    let again = dir.path().join("again.cells");
    let report =
        pack(std::slice::from_ref(&out), &vocab, &again, &PackOptions::default(), &Progress::silent())
            .unwrap();
    assert_eq!(report.manifest.digest, want.digest);
    // The folder knows its vocabulary.
    let e = pack(
        &[out],
        &fixtures::vocab(),
        &dir.path().join("x.cells"),
        &PackOptions::default(),
        &Progress::silent(),
    );
    let e = e.unwrap_err();
    assert!(e.kind().exit_code() == 3 && e.to_string().contains(vocab.digest()), "{e}");
    // Cut as asked: two genes and the two around them.
    let short = dir.path().join("short.dataset");
    let exported = dataset::export(&corpus, &short, Some(4), &|_| ()).unwrap();
    assert!(exported.cut > 0);
    let report =
        pack(&[short], &vocab, &dir.path().join("s.cells"), &PackOptions::default(), &Progress::silent());
    assert!(report.unwrap().manifest.tokens <= 2 * want.cells);
    assert_eq!(
        dataset::export(&corpus, &dir.path().join("n"), Some(2), &|_| ()).unwrap_err().kind().exit_code(),
        2
    );
}

#[test]
fn the_program_packs_and_exports() {
    let dir = tempfile::tempdir().unwrap();
    let vocab_file = dir.path().join("V.tsv");
    vocab().save(&vocab_file, &[]).unwrap();
    let path = |name: &str| dir.path().join(name);
    for (input, out) in [(formats::golden("mtx_v3"), "a.cells"), (formats::golden("list.dataset"), "b.cells")]
    {
        let mut pack = program();
        pack.arg("pack").arg(input).arg("--vocab").arg(&vocab_file).arg("--out").arg(path(out)).arg("--json");
        let done = pack.assert().success();
        let json: serde_json::Value = serde_json::from_slice(&done.get_output().stdout).unwrap();
        assert_eq!(json["cells"], 27);
    }
    let mut export = program();
    export.arg("export").arg(path("a.cells")).arg("--out").arg(path("a.dataset")).arg("--json");
    let done = export.assert().success();
    let json: serde_json::Value = serde_json::from_slice(&done.get_output().stdout).unwrap();
    assert_eq!((&json["kind"], &json["cells"], &json["cut"]), (&"dataset".into(), &27.into(), &0.into()));
    program().arg("export").arg(path("a.cells")).arg("--out").arg(path("a.dataset")).assert().code(2);
    let vocab = Vocab::load(&vocab_file).unwrap();
    assert_eq!(vocab.digest(), fixtures::vocab().digest());
}
