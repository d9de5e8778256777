//! `.h5ad` files to corpus and vocabulary: every storage gives the tokens that numpy gives, and everything that can be wrong with
//! a file is said with its place.

#[path = "common/h5ad.rs"]
mod h5ad;

use cellrefine::cli::Progress;
use cellrefine::corpus::Corpus;
use cellrefine::error::{Error, Kind};
use cellrefine::genes::dictionary::convert;
use cellrefine::genes::vocab::Vocab;
use cellrefine::import::medians::{BuildOptions, build};
use cellrefine::import::pack::{EmptyCells, PackOptions, PackReport, pack};
use h5ad::Spec;
use std::io::Read;
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/import").join(name)
}

/// Unpacks a fixture into `dir`.
fn fixture(dir: &Path, name: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let packed = std::fs::File::open(golden(&format!("{name}.h5ad.gz"))).unwrap();
    flate2::read::GzDecoder::new(packed).read_to_end(&mut bytes).unwrap();
    let path = dir.join(format!("{name}.h5ad"));
    std::fs::write(&path, bytes).unwrap();
    path
}

fn expected() -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(golden("expected.json")).unwrap()).unwrap()
}

fn vocab() -> Vocab {
    Vocab::load(golden("V.tsv")).unwrap()
}

fn run(inputs: &[PathBuf], out: &Path, options: &PackOptions<'_>) -> Result<PackReport, Error> {
    pack(inputs, &vocab(), out, options, &Progress::silent())
}

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
        let genes = &report.files[0].genes;
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

/// Entries of a matrix with enough cells for several blocks, buckets and shards.
fn many() -> (usize, usize, Vec<(usize, usize, f32)>) {
    let (rows, columns) = (1500, 90);
    let mut state = 12345u64;
    let mut next = |n: u64| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) % n
    };
    let mut entries = Vec::new();
    for row in 0..rows {
        for column in 0..columns {
            if next(4) == 0 && row % 97 != 0 {
                entries.push((row, column, 1.0 + next(9) as f32));
            }
        }
    }
    (rows, columns, entries)
}

fn wide_vocab(genes: usize) -> Vocab {
    let token = ["<pad>", "<mask>"]
        .map(str::to_string)
        .into_iter()
        .chain((0..genes).map(|g| format!("ENSG{g:011}")))
        .collect();
    let median = (0..genes + 2).map(|g| if g < 2 { 0.0 } else { 0.5 + (g % 7) as f64 }).collect();
    Vocab::from_parts(token, median, Vec::new()).unwrap()
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

/// Packs a broken file; the error must be bad input, name all needles, and leave nothing behind.
fn refuse(path: &Path, options: &PackOptions<'_>, needles: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.cells");
    let e = match run(&[path.to_path_buf()], &out, options) {
        Ok(_) => panic!("{} was accepted; wanted {needles:?}", path.display()),
        Err(e) => e,
    };
    assert_eq!(e.kind(), Kind::Input, "{e}");
    for needle in needles {
        assert!(e.to_string().contains(needle), "{needle:?} not in: {e}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "left behind after: {e}");
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

fn program() -> assert_cmd::Command {
    assert_cmd::Command::cargo_bin("cellrefine").unwrap()
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
