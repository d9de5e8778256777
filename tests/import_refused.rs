//! Everything that can be wrong with a file to import is said with its place, and nothing is left behind.

#[path = "common/import.rs"]
mod fixtures;
#[path = "common/h5ad.rs"]
mod h5ad;

use cellrefine::cli::Progress;
use cellrefine::error::Kind;
use cellrefine::genes::dictionary::convert;
use cellrefine::import::pack::{EmptyCells, PackOptions, pack};
use fixtures::{fixture, golden, many, program, refuse, run, wide_vocab};
use h5ad::Spec;
use std::path::{Path, PathBuf};

#[test]
fn broken_dictionaries_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let medians = golden("medians.json");
    let good = golden("tokens.json");
    let whole = std::fs::read(golden("tokens_p4.pkl")).unwrap();
    let cases: Vec<(PathBuf, PathBuf, &str)> = vec![
        (medians.clone(), good.clone(), "swapped"),
        (dir.path().join("absent.tsv"), medians.clone(), "absent.tsv"),
        (write("empty.tsv", b""), medians.clone(), "empty"),
        (write("cut.pkl", &whole[..whole.len() / 2]), medians.clone(), "ends too early"),
        (write("evil.pkl", b"cos\nsystem\n(Vtrue\ntR."), medians.clone(), "os.system"),
        (write("twice.json", br#"{"<pad>":0,"<mask>":1,"g":2,"g":3}"#), medians.clone(), "twice"),
        (write("gap.json", br#"{"<pad>":0,"<mask>":1,"g":5}"#), medians.clone(), "id 5"),
        (write("same.json", br#"{"<pad>":0,"<mask>":0}"#), medians.clone(), "two tokens"),
        (write("row.tsv", b"a\tb\n<pad>\t0\n<mask>\tone\n"), medians.clone(), "row.tsv:3"),
        (write("list.json", br#"{"<pad>":[0]}"#), medians.clone(), "JSON"),
        (write("none.json", br#"{"g":0}"#), medians.clone(), "no median"),
        (good.clone(), write("few.json", br#"{"ENSG00000000100":1.0}"#), "no median"),
        (write("nomask.json", br#"{"<pad>":0}"#), medians.clone(), "<mask>"),
    ];
    for (tokens, medians, needle) in cases {
        let e = convert(&tokens, Some(&medians), None).unwrap_err();
        assert_eq!(e.kind(), Kind::Input, "{e}");
        assert!(e.to_string().contains(needle), "{needle} not in: {e}");
    }
}

#[test]
fn broken_matrices_are_refused_with_slot_and_row() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.h5ad");
    let mut spec = Spec::small();
    spec.genes = ["ENSG00000000100", "ENSG00000000107", "ENSG00000000114"].map(str::to_string).to_vec();
    spec.write(&path);
    run(std::slice::from_ref(&path), &dir.path().join("good.cells"), &PackOptions::default()).unwrap();
    type Break = fn(&mut Spec);
    let cases: [(Break, &[&str]); 17] = [
        (|s| s.indptr = vec![0, 3, 2], &["X/indptr", "last offset", "4"]),
        (|s| s.indptr = vec![0, 5, 4], &["X/indptr[1]"]),
        (|s| s.indptr = vec![1, 2, 4], &["X/indptr[0]", "first offset"]),
        (|s| s.indptr = vec![0, -2, 4], &["X/indptr[1]", "-2", "monotone"]),
        (|s| s.indptr = vec![0, 4], &["indptr", "3 for a csr_matrix"]),
        (|s| s.indptr = vec![0, 4, 4], &["X/indptr[1]", "more entries"]),
        (|s| s.indices = vec![0, 2, 3, 1], &["row 1", "3", "0 to 2"]),
        (|s| s.indices = vec![0, -2, 0, 1], &["row 0", "negative"]),
        (|s| s.indices = vec![0, 2, 0], &["4 values and 3 indices"]),
        (|s| s.data[2] = f32::NAN, &["x.h5ad:X", "NaN", "no other slot"]),
        (|s| s.data[2] = -1.0, &["x.h5ad:X", "-1"]),
        (|s| s.data[3] = 0.5, &["x.h5ad:X", "0.5", "raw counts", "--allow-non-integer"]),
        (|s| s.data[3] = f32::INFINITY, &["x.h5ad:X", "inf"]),
        (|s| s.encoding = "coo_matrix", &["coo_matrix", "csr_matrix"]),
        (|s| s.columns = -3, &["shape"]),
        (|s| s.ids.truncate(1), &["index of obs", "1 rows", "2"]),
        (|s| s.genes.push("more".into()), &["index of var", "4 rows", "3"]),
    ];
    for (change, needles) in cases {
        let mut broken = spec.clone();
        change(&mut broken);
        broken.write(&path);
        refuse(&path, &PackOptions::default(), needles);
    }
    // The sample looks at ends and middle; the pass looks at all.
    let (rows, columns, mut entries) = many();
    let at = entries.len() / 3;
    entries[at].2 = 1.25;
    Spec::csr(rows, columns, &entries).write(&path);
    let e = pack(
        std::slice::from_ref(&path),
        &wide_vocab(columns),
        &dir.path().join("o.cells"),
        &PackOptions::default(),
        &Progress::silent(),
    )
    .unwrap_err();
    assert!(e.to_string().contains("1.25"), "{e}");
    let free = PackOptions { allow_non_integer: true, ..PackOptions::default() };
    pack(
        std::slice::from_ref(&path),
        &wide_vocab(columns),
        &dir.path().join("o.cells"),
        &free,
        &Progress::silent(),
    )
    .unwrap();
    entries[at].2 = -1.25;
    Spec::csr(rows, columns, &entries).write(&path);
    let e = pack(&[path], &wide_vocab(columns), &dir.path().join("p.cells"), &free, &Progress::silent())
        .unwrap_err();
    assert!(e.to_string().contains(&format!("row {} ", entries[at].0)), "{e}");
    // By columns, the row is known only after the turn.
    let path = dir.path().join("csc.h5ad");
    let mut turned = Spec::csc(rows, columns, &many().2);
    turned.indices[7] = rows as i32;
    turned.write(&path);
    let e = pack(&[path], &wide_vocab(columns), &dir.path().join("q.cells"), &free, &Progress::silent())
        .unwrap_err();
    assert!(e.to_string().contains("X/indices[7]") && e.to_string().contains("1500"), "{e}");
}

#[test]
fn normalised_slots_name_the_slot_that_holds_counts() {
    let dir = tempfile::tempdir().unwrap();
    refuse(&fixture(dir.path(), "raw"), &PackOptions::default(), &["raw.h5ad:X", "--counts raw"]);
    refuse(
        &fixture(dir.path(), "layer"),
        &PackOptions::default(),
        &["layer.h5ad:X", "--counts layers/counts"],
    );
    let layer = |name: &str| PackOptions { counts: Some(name.into()), ..PackOptions::default() };
    let path = dir.path().join("layer.h5ad");
    refuse(&path, &layer("layers/count"), &["no layers/count", "did you mean layers/counts"]);
    refuse(&path, &layer("raw"), &["no raw/X", "layers/counts"]);
    refuse(&path, &layer("layers/scaled"), &["layers/scaled", "--counts layers/counts"]);
    let e = run(&[path], &dir.path().join("o.cells"), &layer("data")).unwrap_err();
    assert_eq!(e.kind(), Kind::Usage);
}

#[test]
fn annotations_and_genes_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let good = fixture(dir.path(), "csr_float32_gzip");
    let obs = |names: &[&str]| PackOptions {
        obs: names.iter().map(|s| s.to_string()).collect(),
        ..PackOptions::default()
    };
    refuse(&good, &obs(&["labl"]), &["labl", "obs", "did you mean label", "batch", "plain"]);
    let genes = |name: &str| PackOptions { genes: Some(name.into()), ..PackOptions::default() };
    refuse(&good, &genes("symbl"), &["symbl", "did you mean symbol"]);
    refuse(&good, &genes("symbol"), &["column symbol", "SYM0, SYM1, SYM2", "Ensembl", "0 of 23"]);
    refuse(
        &good,
        &PackOptions { min_gene_match: 1.0, genes: Some("symbol".into()), ..PackOptions::default() },
        &["--genes"],
    );
    refuse(
        &good,
        &PackOptions { empty_cells: EmptyCells::Error, ..PackOptions::default() },
        &["cell-05", "row 5", "--empty-cells skip"],
    );
    let path = dir.path().join("x.h5ad");
    let mut spec = Spec::small();
    spec.genes = ["ENSG00000000100", "ENSG00000000107", "ENSG00000000114"].map(str::to_string).to_vec();
    spec.label = Some((vec!["x", "y"], vec![0, 2]));
    spec.write(&path);
    refuse(&path, &PackOptions::default(), &["obs/label", "row 1", "category code"]);
    spec.label = Some((vec!["x", "y"], vec![0]));
    spec.write(&path);
    refuse(&path, &obs(&["label"]), &["obs/label", "1 rows", "2"]);
    let report = run(&[path], &dir.path().join("o.cells"), &PackOptions::default()).unwrap();
    assert!(report.notes[0].contains("label"), "a broken column that nobody asked for is a note");
}

#[test]
fn files_of_another_kind_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let good = std::fs::read(fixture(dir.path(), "csr_int64_lzf")).unwrap();
    let write = |bytes: &[u8]| {
        let path = dir.path().join("bad.h5ad");
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let any = PackOptions::default();
    refuse(&dir.path().join("absent.h5ad"), &any, &["absent.h5ad", "cannot read"]);
    refuse(dir.path(), &any, &["folder"]);
    refuse(&write(b""), &any, &["empty"]);
    refuse(&write(b"cell,gene,count\n"), &any, &["not an HDF5 file"]);
    refuse(&write(&std::fs::read(golden("raw.h5ad.gz")).unwrap()), &any, &["not an HDF5 file", "gunzip"]);
    let mut none = hdf5_pure::FileBuilder::new();
    none.create_dataset("something").with_f32_data(&[1.0]);
    let path = dir.path().join("bad.h5ad");
    none.write(&path).unwrap();
    refuse(&path, &any, &["no matrix", "something"]);
    // Cut anywhere, the file is refused, or what is left is whole.
    for at in (0..good.len()).step_by(1009) {
        let path = write(&good[..at]);
        let e = run(&[path], &dir.path().join(format!("cut-{at}.cells")), &any)
            .err()
            .unwrap_or_else(|| panic!("cut at {at}"));
        assert_eq!(e.kind(), Kind::Input, "{e}");
    }
}

#[test]
fn flipped_bytes_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["csr_int64_lzf", "legacy_compound", "csc_uint32_small_chunks"] {
        let good = std::fs::read(fixture(dir.path(), name)).unwrap();
        let path = dir.path().join("flip.h5ad");
        for n in 0..60usize {
            let at = n * 7919 % good.len();
            let mut bytes = good.clone();
            bytes[at] ^= [0xff, 0x80, 0x01][n % 3];
            std::fs::write(&path, &bytes).unwrap();
            let out = dir.path().join("flip.cells");
            if let Err(e) = run(std::slice::from_ref(&path), &out, &PackOptions::default()) {
                assert_ne!(e.kind(), Kind::Bug, "{name}, byte {at}: {e}");
                assert!(!out.exists());
            } else {
                std::fs::remove_dir_all(&out).unwrap();
            }
        }
    }
}

#[test]
fn the_program_tells_bad_input_from_bad_usage() {
    let dir = tempfile::tempdir().unwrap();
    let input = fixture(dir.path(), "csr_float32_gzip");
    let empty = dir.path().join("empty.h5ad");
    std::fs::write(&empty, b"").unwrap();
    let (absent, out) = (dir.path().join("absent"), dir.path().join("out"));
    let (vocab, tokens) = (golden("V.tsv"), golden("tokens.json"));
    let path = |p: &Path| p.to_str().unwrap().to_string();
    let pack = |input: &Path, vocab: &Path, more: &[&str]| {
        let mut all =
            vec!["pack".to_string(), path(input), "--vocab".into(), path(vocab), "--out".into(), path(&out)];
        all.extend(more.iter().map(|s| s.to_string()));
        all
    };
    let make = |command: &str, input: &Path| {
        vec!["vocab".to_string(), command.into(), path(input), "--out".into(), path(&out)]
    };
    let cases: [(Vec<String>, i32, &str); 12] = [
        (pack(&absent, &vocab, &[]), 3, "absent"),
        (pack(&empty, &vocab, &[]), 3, "the file is empty"),
        (pack(&input, &absent, &[]), 3, "vocab build"),
        (pack(&input, &tokens, &[]), 3, "not a cellrefine vocabulary"),
        (pack(&input, &vocab, &["--gene-map", &path(&empty)]), 3, "gene map"),
        (pack(&input, &vocab, &["--obs", "nothing"]), 3, "obs"),
        (pack(&input, &vocab, &["--counts", "raw"]), 3, "no raw/X"),
        (pack(&input, &vocab, &["--memory", "1K"]), 2, "16M"),
        (pack(&input, &vocab, &["--min-gene-match", "7"]), 2, "share"),
        (make("build", &empty), 3, "the file is empty"),
        (make("convert", &empty), 3, "the dictionary is empty"),
        (make("convert", &golden("medians.json")), 3, "swapped"),
    ];
    for (arguments, code, needle) in cases {
        let done = program().args(&arguments).output().unwrap();
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(needle) && done.stdout.is_empty(), "{needle:?} not in: {stderr}");
        assert!(!out.exists(), "{arguments:?} left something behind");
    }
}
