//! `.h5ad` files to corpus and vocabulary: every storage gives the tokens that numpy gives.

#[path = "common/import.rs"]
mod fixtures;
#[path = "common/h5ad.rs"]
mod h5ad;

use cellrefine::cli::Progress;
use cellrefine::corpus::Corpus;
use cellrefine::error::Kind;
use cellrefine::genes::dictionary::convert;
use cellrefine::import::medians::{BuildOptions, build};
use cellrefine::import::pack::{EmptyCells, PackOptions, pack};
use fixtures::{expected, fixture, golden, many, program, refuse, run, vocab, wide_vocab};
use h5ad::Spec;
use std::path::Path;

fn texts(v: &serde_json::Value) -> Vec<String> {
    v.as_array().unwrap().iter().map(|s| s.as_str().unwrap_or("").to_string()).collect()
}

/// A categorical column as strings, missing = empty.
fn labels(corpus: &Corpus, column: &str, cells: usize) -> Vec<String> {
    let c = corpus.categorical(column).unwrap();
    assert_eq!(c.codes.len(), cells);
    c.codes
        .iter()
        .map(|&code| usize::try_from(code).map_or(String::new(), |i| c.categories[i].clone()))
        .collect()
}

const STORAGES: [(&str, Option<&str>); 16] = [
    ("csr_float32_gzip", None),
    ("csr_int64_lzf", None),
    ("csc_int32", None),
    ("dense_float64", None),
    ("dense_uint16_gzip", None),
    ("dense_column_chunks", None),
    ("raw", Some("raw")),
    ("layer", Some("layers/counts")),
    ("nullable", Some("X")),
    ("csr_int16_small_chunks_shuffle", None),
    ("csc_uint32_small_chunks", None),
    ("csr_big_endian", None),
    ("csr_v110_fixed_strings", None),
    ("csr_unsorted", None),
    ("legacy_compound", None),
    ("legacy_categories", None),
];

#[test]
fn every_storage_gives_the_tokens_that_numpy_gives() {
    let want = expected();
    let ids = texts(&want["ids"]);
    let kept: Vec<usize> =
        (0..ids.len()).filter(|&c| !want["tokens"][c].as_array().unwrap().is_empty()).collect();
    assert_eq!(kept.len(), ids.len() - 2, "the fixture has an empty cell and one without known genes");
    let dir = tempfile::tempdir().unwrap();
    for (name, counts) in STORAGES {
        let path = fixture(dir.path(), name);
        let out = dir.path().join(format!("{name}.cells"));
        let options =
            PackOptions { counts: counts.map(str::to_string), values: true, ..PackOptions::default() };
        let report = run(&[path], &out, &options).unwrap_or_else(|e| panic!("{name}: {e}"));
        let genes = report.files[0].genes.as_ref().unwrap();
        assert_eq!((genes.matched, genes.unmatched, genes.duplicated), (21, 2, 1), "{name}");
        assert_eq!(report.files[0].empty, 2, "{name}");
        let corpus = Corpus::open(&out).unwrap();
        assert_eq!(corpus.cells(), kept.len(), "{name}");
        for (at, &cell) in kept.iter().enumerate() {
            let tokens: Vec<u64> =
                want["tokens"][cell].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect();
            let found: Vec<u64> = corpus.genes(at).unwrap().iter().map(u64::from).collect();
            assert_eq!(found, tokens, "{name}, cell {cell}");
            let values: Vec<f64> =
                want["values"][cell].as_array().unwrap().iter().map(|t| t.as_f64().unwrap()).collect();
            let found: Vec<f64> = corpus.values(at).unwrap().unwrap().iter().map(|v| v.to_f64()).collect();
            assert_eq!(found, values, "{name}, cell {cell}");
            assert_eq!(
                f64::from(corpus.total_count(at).unwrap()),
                want["total"][cell].as_f64().unwrap(),
                "{name}"
            );
            assert_eq!(corpus.cell_id(at).unwrap(), ids[cell], "{name}");
        }
        for column in ["label", "batch", "plain", "flag"] {
            if report.manifest.columns.iter().any(|c| c.name == column) {
                let all = texts(&want["obs"][column]);
                let wanted: Vec<String> = kept.iter().map(|&c| all[c].clone()).collect();
                assert_eq!(labels(&corpus, column, kept.len()), wanted, "{name}, {column}");
            } else {
                assert!(matches!(column, "plain" | "flag"), "{name} lost {column}");
            }
        }
        if report.manifest.columns.iter().any(|c| c.name == "score") {
            for (at, found) in corpus.numeric("score").unwrap().into_iter().enumerate() {
                let wanted = want["obs"]["score"][kept[at]].as_str().map(|v| v.parse().unwrap());
                assert_eq!((!found.is_nan()).then_some(found), wanted, "{name}");
            }
        }
    }
}

#[test]
fn nullable_columns_and_numbers_as_categories() {
    let dir = tempfile::tempdir().unwrap();
    let path = fixture(dir.path(), "nullable");
    let out = dir.path().join("n.cells");
    let options = PackOptions { empty_cells: EmptyCells::Keep, ..PackOptions::default() };
    let report = run(&[path], &out, &options).unwrap();
    let corpus = Corpus::open(&out).unwrap();
    assert_eq!(corpus.cells(), 29);
    assert_eq!(corpus.genes(5).unwrap().len(), 0, "an empty cell is kept when asked for");
    for (cell, v) in corpus.numeric("whole").unwrap().into_iter().enumerate() {
        assert_eq!(if v.is_nan() { None } else { Some(v) }, (cell % 5 != 0).then_some(cell as f64));
    }
    for (cell, v) in labels(&corpus, "truth", 29).into_iter().enumerate() {
        assert_eq!(v, if cell % 7 == 0 { "" } else { ["True", "False"][cell % 2] });
    }
    assert_eq!(labels(&corpus, "year", 29)[..2], ["2019", "2020"]);
    assert_eq!(report.files[0].empty, 2);
}

fn bytes_of(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files
        .into_iter()
        .map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&p).unwrap()))
        .collect()
}

#[test]
fn bytes_do_not_depend_on_threads_or_memory() {
    let (rows, columns, entries) = many();
    let vocab = wide_vocab(columns);
    let dir = tempfile::tempdir().unwrap();
    let mut dense = vec![0f32; rows * columns];
    entries.iter().for_each(|&(r, c, x)| dense[r * columns + c] = x);
    let csr = Spec::csr(rows, columns, &entries);
    let mut tokens_of_first: Option<Vec<Vec<u32>>> = None;
    for layout in ["csr", "csc", "dense"] {
        let path = dir.path().join(format!("{layout}.h5ad"));
        match layout {
            "csr" => csr.write(&path),
            "csc" => Spec::csc(rows, columns, &entries).write(&path),
            _ => csr.write_dense(&path, &dense),
        }
        let mut first: Option<Vec<(String, Vec<u8>)>> = None;
        for (n, (threads, memory)) in [(1, 2 << 30), (3, 2 << 30), (1, 1), (3, 1)].into_iter().enumerate() {
            let out = dir.path().join(format!("{layout}-{n}.cells"));
            let options = PackOptions {
                memory_bytes: memory,
                values: true,
                shard_cells: 400,
                ..PackOptions::default()
            };
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| pack(std::slice::from_ref(&path), &vocab, &out, &options, &Progress::silent()))
                .unwrap();
            let corpus = Corpus::open(&out).unwrap();
            assert_eq!(corpus.cells(), rows - rows.div_ceil(97));
            let tokens: Vec<Vec<u32>> =
                (0..corpus.cells()).map(|c| corpus.genes(c).unwrap().to_vec()).collect();
            assert!(
                tokens_of_first.get_or_insert_with(|| tokens.clone()) == &tokens,
                "{layout} {threads} {memory}"
            );
            let bytes = bytes_of(&out);
            assert!(first.get_or_insert_with(|| bytes.clone()) == &bytes, "{layout} {threads} {memory}");
        }
    }
}

#[test]
fn built_medians_equal_numpy_whatever_the_memory() {
    let want = expected()["built_medians"].as_object().unwrap().clone();
    let dir = tempfile::tempdir().unwrap();
    for (name, memory) in
        [("csr_float32_gzip", 2 << 30), ("csc_int32", 1), ("csr_unsorted", 256), ("legacy_compound", 1)]
    {
        let options = BuildOptions { memory_bytes: memory, ..BuildOptions::default() };
        let built = build(&[fixture(dir.path(), name)], &options).unwrap();
        let v = &built.vocab;
        assert_eq!(
            (v.specials().pad, v.specials().mask, v.specials().cls, v.specials().eos),
            (0, 1, Some(2), Some(3))
        );
        assert_eq!(v.genes(), want.len());
        assert!(v.tokens()[4..].windows(2).all(|w| w[0] < w[1]), "genes in ascending order");
        for (gene, median) in &want {
            let found = v.median(v.id(gene).unwrap());
            // Equal up to the order of one multiplication: numpy scales before it sums.
            assert!(
                (found / median.as_f64().unwrap() - 1.0).abs() < 1e-14,
                "{name} {gene}: {found} {median}"
            );
        }
        assert_eq!(v.symbol(v.id("ENSG00000000107").unwrap()), Some("SYM1"));
        assert_eq!(built.passes > 1, memory < 1000, "{name}");
    }
}

#[test]
fn medians_of_some_cells_know_nothing_of_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let input = [fixture(dir.path(), "csr_float32_gzip")];
    let whole = build(&input, &BuildOptions::default()).unwrap();
    let out = dir.path().join("all.cells");
    run(&input, &out, &PackOptions::default()).unwrap();
    let corpus = Corpus::open(&out).unwrap();
    let names: Vec<String> = (0..corpus.cells()).map(|c| corpus.cell_id(c).unwrap().to_string()).collect();
    let some: std::collections::HashSet<String> = names.iter().take(names.len() / 2).cloned().collect();
    let built = build(&input, &BuildOptions { cells: Some(&some), ..BuildOptions::default() }).unwrap();
    assert_eq!(built.cells as usize, some.len());
    assert!(built.vocab.genes() <= whole.vocab.genes());
    assert_ne!(built.vocab.medians(), whole.vocab.medians(), "half of the cells have medians of their own");
    let strangers = ["nobody".to_string()].into();
    let e = build(&input, &BuildOptions { cells: Some(&strangers), ..BuildOptions::default() }).unwrap_err();
    assert_eq!(e.kind().exit_code(), 3);
    assert!(e.to_string().contains("nobody"), "{e}");
}

#[test]
fn dictionaries_of_every_kind_convert_to_one_vocabulary() {
    let want = vocab();
    let dir = tempfile::tempdir().unwrap();
    let tsv = |name: &str, header: &str, column: usize| {
        let text = std::fs::read_to_string(golden("V.tsv")).unwrap();
        let rows = text
            .lines()
            .skip(2)
            .map(|l| l.split('\t').collect::<Vec<_>>())
            .filter(|r| column == 1 || !r[0].starts_with('<'));
        let path = dir.path().join(name);
        std::fs::write(
            &path,
            header.to_string() + &rows.map(|r| format!("{}\t{}\n", r[0], r[column])).collect::<String>(),
        )
        .unwrap();
        path
    };
    let cases = [
        (golden("tokens_p2.pkl"), golden("medians_p2.pkl")),
        (golden("tokens_p4.pkl"), golden("medians_p4.pkl")),
        (golden("tokens.json"), golden("medians.json")),
        (golden("tokens.json"), golden("medians_p0.pkl")),
        (tsv("t1.tsv", "token\ttoken_id\n", 1), tsv("m1.tsv", "ensembl_id\tnonzero_median\n", 2)),
        (tsv("t2.tsv", "", 1), tsv("m2.tsv", "", 2)),
    ];
    for (tokens, medians) in cases {
        let made = convert(&tokens, Some(&medians), None).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(made.vocab.digest(), want.digest(), "{} {}", tokens.display(), medians.display());
    }
    let made =
        convert(&golden("tokens.json"), Some(&golden("medians.json")), Some(&golden("symbols_p4.pkl")))
            .unwrap();
    assert_eq!(made.vocab.symbol(made.vocab.id("ENSG00000000107").unwrap()), Some("SYM1"));
    assert_eq!(made.vocab.digest(), want.digest(), "symbols leave the digest alone");
    assert_eq!(
        convert(&golden("V.tsv"), None, Some(&golden("symbols_p4.pkl"))).unwrap().vocab.digest(),
        want.digest()
    );
}

#[test]
fn several_inputs_keep_their_order_and_get_unique_names() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a.h5ad"), dir.path().join("b.h5ad"));
    let mut spec = Spec::small();
    spec.genes = ["ENSG00000000100", "ENSG00000000107", "ENSG00000000114"].map(str::to_string).to_vec();
    spec.write(&a);
    spec.ids = vec!["b".into(), "b".into()];
    spec.label = Some((vec!["y", "z"], vec![1, 0]));
    spec.write(&b);
    let out = dir.path().join("ab.cells");
    let report = run(&[a.clone(), b.clone()], &out, &PackOptions::default()).unwrap();
    assert!(report.prefixed && report.renamed == 1);
    let corpus = Corpus::open(&out).unwrap();
    let ids: Vec<&str> = (0..4).map(|c| corpus.cell_id(c).unwrap()).collect();
    assert_eq!(ids, ["a:a", "a:b", "b:b", "b:b-1"]);
    assert_eq!(labels(&corpus, "label", 4), ["x", "", "z", "y"]);
    let one = run(std::slice::from_ref(&a), &dir.path().join("a.cells"), &PackOptions::default()).unwrap();
    assert!(!one.prefixed && one.renamed == 0);
    let drop = |column: &str, value: &str| PackOptions {
        drop: vec![(column.into(), value.into())],
        ..PackOptions::default()
    };
    let out = dir.path().join("dropped.cells");
    let report = run(&[a.clone(), b], &out, &drop("label", "y")).unwrap();
    assert_eq!((report.files[0].dropped, report.files[1].dropped, report.manifest.cells), (0, 1, 3));
    let report = run(std::slice::from_ref(&a), &dir.path().join("d.cells"), &drop("label", "w")).unwrap();
    assert!(report.notes.iter().any(|n| n.contains("label=w")), "a value that never comes is said");
    refuse(&a, &drop("labels", "y"), &["labels", "did you mean label"]);
    let e = run(&[a.clone(), a], &dir.path().join("aa.cells"), &PackOptions::default()).unwrap_err();
    assert!(e.kind() == Kind::Usage && e.to_string().contains("given twice"), "{e}");
}

#[test]
fn the_program_packs_and_reports() {
    let dir = tempfile::tempdir().unwrap();
    let input = fixture(dir.path(), "raw");
    let (v, out) = (dir.path().join("V.tsv"), dir.path().join("x.cells"));
    let convert = program()
        .args(["vocab", "convert", "--json"])
        .arg(golden("tokens_p4.pkl"))
        .arg(golden("medians_p4.pkl"))
        .arg("--out")
        .arg(&v)
        .output()
        .unwrap();
    assert!(convert.status.success());
    let json: serde_json::Value = serde_json::from_slice(&convert.stdout).unwrap();
    assert_eq!(json["digest"], vocab().digest());
    let arguments = |c: &mut assert_cmd::Command| {
        c.arg("pack").arg(&input).arg("--vocab").arg(&v).arg("--out").arg(&out).arg("--json");
    };
    let mut refused = program();
    arguments(&mut refused);
    let refused = refused.output().unwrap();
    assert_eq!(refused.status.code(), Some(3));
    let json: serde_json::Value = serde_json::from_slice(&refused.stdout).unwrap();
    assert!(json["error"]["next"].as_str().unwrap().contains("--counts raw"), "{json}");
    assert!(!out.exists());
    let mut packed = program();
    arguments(&mut packed);
    let packed = packed.args(["--counts", "raw", "--obs", "label", "batch"]).output().unwrap();
    assert!(packed.status.success(), "{}", String::from_utf8_lossy(&packed.stderr));
    let json: serde_json::Value = serde_json::from_slice(&packed.stdout).unwrap();
    assert_eq!((json["cells"].as_u64(), json["empty_cells"].as_u64()), (Some(27), Some(2)));
    assert_eq!(json["files"][0]["genes"]["duplicated"], 1);
    assert!(String::from_utf8_lossy(&packed.stderr).contains("21 of 23 names matched"));
    // What was packed stays as it is.
    let mut again = program();
    arguments(&mut again);
    assert_eq!(again.args(["--counts", "raw"]).output().unwrap().status.code(), Some(2));
    assert!(Corpus::open(&out).unwrap().verify().is_ok());
}
