//! Marker sets: files good and bad, weights, matching with labels, derivation and scores against numpy.

use cellrefine::corpus::splits::SplitRule;
use cellrefine::corpus::*;
use cellrefine::error::{Error, Kind};
use cellrefine::genes::Vocab;
use cellrefine::genes::marker_score::{Standardiser, marker_scores};
use cellrefine::genes::markers::{MarkerSets, read_marker_map};
use cellrefine::genes::markers_derive::derive;
use cellrefine::genes::markers_file::{MarkerFile, RawSets};
use half::f16;
use serde_json::Value;
use std::io::Write;
use std::path::Path;

/// `<pad>`, `<mask>`, then genes ENSG00000000002… with symbols G2….
fn vocab(len: usize) -> Vocab {
    let token: Vec<String> = (0..len)
        .map(|i| match i {
            0 => "<pad>".into(),
            1 => "<mask>".into(),
            _ => format!("ENSG{i:011}"),
        })
        .collect();
    let median = (0..len).map(|i| if i < 2 { 0.0 } else { 1.0 }).collect();
    let symbol =
        (0..len).map(|i| if i < 2 { String::new() } else { format!("G{i}|ALIAS{}", i / 2) }).collect();
    Vocab::from_parts(token, median, symbol).unwrap()
}

fn parse(text: &[u8]) -> Result<MarkerFile, Error> {
    MarkerFile::parse(text, Path::new("m.gmt"))
}

fn raw(text: &str) -> RawSets {
    parse(text.as_bytes()).unwrap().resolve(&vocab(100), None).unwrap()
}

#[test]
fn gmt_and_table_say_the_same() {
    let gmt = "# a comment\r\nB cell\tdescription\tG5\tENSG00000000007.3\t\r\n\r\nT cell\t\tg9\tG5\tG5\tNOSUCH\tALIAS20\n";
    let table = "label\tgene\nB cell\tG5\nT cell\tG9\nB cell\tENSG00000000007\nT cell\tG5\nT cell\tNOSUCH\nT cell\tALIAS20\n";
    let (a, b) = (raw(gmt), raw(table));
    for r in [&a, &b] {
        assert_eq!(r.sets[0].genes, [(5, None), (7, None)]);
        assert_eq!(r.sets[1].genes, [(9, None), (5, None)]);
        assert_eq!(
            (&r.sets[1].unknown, &r.sets[1].ambiguous),
            (&vec!["NOSUCH".to_string()], &vec!["ALIAS20".into()])
        );
    }
    assert_eq!((a.repeated_genes, b.repeated_genes), (1, 0));
    assert_eq!(a.all().unwrap(), b.all().unwrap());
    // Two names of one gene are one gene.
    let same = raw("x\t\tG5\tENSG00000000005\tG6\n");
    assert_eq!((same.sets[0].genes.len(), same.sets[0].repeated), (2, 1));
}

#[test]
fn plain_and_gzip_files_load_and_absent_or_cut_ones_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gmt.gz");
    let text = "B\td\tG5\tG6\nT\td\tG7\n";
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gz.write_all(text.as_bytes()).unwrap();
    let packed = gz.finish().unwrap();
    std::fs::write(&path, &packed).unwrap();
    assert_eq!(MarkerFile::load(&path).unwrap().sets, parse(text.as_bytes()).unwrap().sets);
    std::fs::write(&path, &packed[..packed.len() - 6]).unwrap();
    assert!(MarkerFile::load(&path).unwrap_err().what().contains("gzip"));
    let absent = MarkerFile::load(&dir.path().join("none.gmt")).unwrap_err();
    assert!(absent.kind() == Kind::Input && absent.to_string().contains("none.gmt"));
    assert_eq!(MarkerFile::load(dir.path()).unwrap_err().kind(), Kind::Input);
}

#[test]
fn broken_files_are_refused_with_their_line() {
    let long_name = format!("{}\td\tG5\n", "n".repeat(501));
    let cases: Vec<(&[u8], &str, &str)> = vec![
        (b"", "holds no set", "m.gmt"),
        (b"# only a comment\n\n", "holds no set", "m.gmt"),
        (b"B\td\tG5\nno tabs here\n", "no tab", "m.gmt:2:1"),
        (b"B\td\tG5\nT\td\t\xff\xfe\n", "not a marker file", "m.gmt:2:5"),
        (b"B\td\tG5\0\n", "not a marker file", "m.gmt:1:7"),
        (b"\x89HDF\r\n\x1a\n\0\0", "not a marker file", "m.gmt:1:1"),
        (b"B\td\tG5\nT\tonly a description\n", "\"T\" has no genes", "m.gmt:2"),
        (b"B\td\tG5\nT\td\t\t\t\n", "\"T\" has no genes", "m.gmt:2"),
        (b"B\td\tG5\n\nB\td\tG6\n", "occurs twice", "m.gmt:3"),
        (b"\td\tG5\n", "no name", "m.gmt:1"),
        (b"B\td\tG5,0.5\tG6\n", "only some genes", "m.gmt:1"),
        (b"B\td\tG5,-1\n", "weight cannot be used", "m.gmt:1"),
        (b"B\td\tG5,nan\n", "weight cannot be used", "m.gmt:1"),
        (b"B\td\tG5,0\tG6,0\n", "are 0", "m.gmt:1"),
        (b"set\tgene\tweight\nB\tG5\tmuch\n", "weight cannot be used", "m.gmt:2"),
        (b"set\tgene\nB\t\n", "lacks its set or its gene", "m.gmt:2"),
        (b"set\tgene\n", "holds no set", "m.gmt"),
        (long_name.as_bytes(), "too long", "m.gmt:1"),
    ];
    for (bytes, words, place) in cases {
        let e = parse(bytes).unwrap_err();
        assert_eq!(e.kind(), Kind::Input);
        assert!(e.what().contains(words), "{words:?}: {e}");
        assert!(e.place().unwrap().starts_with(place), "{place}: {e}");
    }
    let line = vec![b'x'; (16 << 20) + 1];
    let e = parse(&[b"B\td\tG5\n".as_slice(), &line].concat()).unwrap_err();
    assert!(e.what().contains("line") && e.place().unwrap().contains(":2"), "{e}");
}

#[test]
fn a_file_of_strangers_says_what_the_vocabulary_holds() {
    let e = parse(b"B\td\tXYZ1\tXYZ2\n").unwrap().resolve(&vocab(20), None).unwrap_err();
    assert_eq!(e.kind(), Kind::Input);
    let text = e.to_string();
    assert!(["XYZ1, XYZ2", "ENSG00000000002", "--gene-map"].iter().all(|w| text.contains(w)), "{text}");
    // A gene map brings the symbols.
    let dir = tempfile::tempdir().unwrap();
    let (map, gmt) = (dir.path().join("map.tsv"), dir.path().join("m.gmt"));
    std::fs::write(&map, "symbol\tensembl\nXYZ1\tENSG00000000004\n").unwrap();
    std::fs::write(&gmt, "B\td\tXYZ1\tXYZ2\n").unwrap();
    let raw = RawSets::load(&gmt, &vocab(20), Some(&map)).unwrap();
    assert_eq!(raw.sets[0].genes, [(4, None)]);
    assert_eq!(raw.sets[0].unknown, ["XYZ2"]);
}

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| s.to_string()).collect()
}

#[test]
fn labels_meet_sets_by_name_or_map_or_not_at_all() {
    let raw = raw(
        "CD16- NK cells\t\tG5\nCD16+ NK cells\t\tG6\nBlood|B cell\t\tG7\nb_cell\t\tG8\nNothing known\t\tQQ\n",
    );
    let of = |classes: &[&str], map: Option<&[(String, String)]>, allow| {
        raw.for_labels(&names(classes), map, allow)
    };
    let m = of(&["B-cell", "cd16+ nk cells"], None, false).unwrap();
    assert_eq!(m.names, ["B-cell", "cd16+ nk cells"]);
    assert_eq!((m.sets[0][0].0, m.sets[1][0].0), (8, 6));
    let e = of(&["B cell", "CD16 NK cells"], None, false).unwrap_err();
    assert_eq!(e.kind(), Kind::Input);
    let text = e.to_string();
    assert!(text.contains("\"CD16 NK cells\": nearest \"CD16") && text.contains("--marker-map"), "{text}");
    assert!(!text.contains("\"B cell\":"), "{text}");
    let map = [("CD16 NK cells".to_string(), "CD16- NK cells".to_string())];
    assert_eq!(of(&["B cell", "CD16 NK cells"], Some(&map), false).unwrap().sets[1][0].0, 5);
    assert!(of(&["B cell", "CD16 NK cells"], None, true).unwrap().sets[1].is_empty());
    assert!(of(&["CD16 NK cells"], None, true).is_err(), "no label has a set at all");
    let wrong = [("B cell".to_string(), "Blod|B cell".to_string())];
    let e = of(&["B cell"], Some(&wrong), false).unwrap_err();
    assert!(e.to_string().contains("nearest \"Blood|B cell\""), "{e}");
    let e = of(&["B cell", "Nothing known"], None, false).unwrap_err();
    assert!(e.to_string().contains("no gene of the vocabulary"), "{e}");
}

#[test]
fn two_sets_that_differ_in_case_alone_need_the_map() {
    let raw = raw("B Cell\t\tG5\nb-cell\t\tG6\n");
    assert_eq!(
        raw.for_labels(&names(&["b-cell"]), None, false).unwrap().sets[0][0].0,
        6,
        "the exact name goes first"
    );
    let e = raw.for_labels(&names(&["b cell"]), None, false).unwrap_err();
    assert!(e.what().contains("fits several") && e.to_string().contains("\"B Cell\", \"b-cell\""), "{e}");
}

#[test]
fn a_marker_map_is_read_or_refused_by_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("map.tsv");
    let read = |text: &str| {
        std::fs::write(&path, text).unwrap();
        read_marker_map(&path)
    };
    assert_eq!(
        read("# label\tset\nB\tBlood|B cell\r\n\nT\tT cells\n").unwrap(),
        [("B".to_string(), "Blood|B cell".to_string()), ("T".into(), "T cells".into())]
    );
    for (text, words) in [("", "empty"), ("B\n", "lacks"), ("B\tx\nB\ty\n", "twice")] {
        let e = read(text).unwrap_err();
        assert!(e.kind() == Kind::Input && e.what().contains(words), "{e}");
    }
}

fn golden() -> Value {
    serde_json::from_str(include_str!("golden/markers.json")).unwrap()
}

fn floats(v: &Value) -> Vec<f64> {
    v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn sets(v: &Value) -> Vec<Vec<(u32, f64)>> {
    let pair = |p: &Value| (p[0].as_u64().unwrap() as u32, p[1].as_f64().unwrap());
    v.as_array().unwrap().iter().map(|s| s.as_array().unwrap().iter().map(pair).collect()).collect()
}

fn golden_corpus(
    dir: &Path,
    golden: &Value,
    values: bool,
    labels: impl Fn(usize) -> Option<String>,
) -> Corpus {
    let path = dir.join(format!("golden-{values}.cells"));
    let options = CorpusOptions {
        vocab: VocabIdentity { digest: "golden".into(), len: golden["vocab"].as_u64().unwrap() as usize },
        vocab_file: None,
        values,
        shard_cells: 40,
        obs: vec![
            ObsSpec { name: "type".into(), kind: ObsKind::Categorical },
            ObsSpec { name: "part".into(), kind: ObsKind::Categorical },
        ],
        provenance: Value::Null,
    };
    let mut w = CorpusWriter::create(&path, options).unwrap();
    for i in 0..golden["label"].as_array().unwrap().len() {
        let gene: Vec<u32> = floats(&golden["tokens"][i]).iter().map(|&t| t as u32).collect();
        let value: Vec<f16> = floats(&golden["values"][i]).iter().map(|&v| f16::from_f64(v)).collect();
        let label = labels(i);
        w.push(&CellRecord {
            id: &format!("c{i}"),
            gene: &gene,
            value: values.then_some(&value[..]),
            total_count: golden["total"][i].as_f64().unwrap() as f32,
            obs: &[
                label.as_deref().map_or(ObsValue::Missing, ObsValue::Category),
                ObsValue::Category(if i % 3 == 1 { "other" } else { "own" }),
            ],
        })
        .unwrap();
    }
    w.finish().unwrap();
    Corpus::open(&path).unwrap()
}

fn all_train(corpus: &Corpus) -> Split {
    let spec = SplitSpec {
        rule: SplitRule::All,
        label: Some("type".into()),
        exclude: Vec::new(),
        labels_per_class: None,
        seed: 0,
    };
    Split::make(corpus, &spec).unwrap()
}

fn assert_sets(found: &MarkerSets, wanted: &[Vec<(u32, f64)>]) {
    assert_eq!(found.len(), wanted.len());
    for (k, (f, w)) in found.sets.iter().zip(wanted).enumerate() {
        assert_eq!(
            f.iter().map(|g| g.0).collect::<Vec<_>>(),
            w.iter().map(|g| g.0).collect::<Vec<_>>(),
            "set {k}"
        );
        for (a, b) in f.iter().zip(w) {
            assert!((a.1 as f64 - b.1).abs() < 1e-6, "set {k}: {a:?} {b:?}");
        }
    }
}

#[test]
fn derivation_jaccard_and_scores_equal_numpy() {
    let golden = golden();
    let dir = tempfile::tempdir().unwrap();
    let label = |i: usize| Some(format!("type {}", golden["label"][i]));
    let top = golden["top"].as_u64().unwrap() as usize;
    for (values, key) in [(true, "derived_values"), (false, "derived_ranks")] {
        let corpus = golden_corpus(dir.path(), &golden, values, label);
        let split = all_train(&corpus);
        let derived = derive(&corpus, &split.training(), top).unwrap();
        assert_eq!(derived.from_values, values);
        assert_sets(&derived.markers, &sets(&golden[key]));
        if !values {
            continue;
        }
        let markers = derived.markers;
        let p = markers.len();
        for (found, wanted) in markers.jaccard().chunks(p).zip(golden["jaccard"].as_array().unwrap()) {
            assert!(found.iter().zip(floats(wanted)).all(|(a, b)| (*a as f64 - b).abs() < 1e-6));
        }
        let cells: Vec<u32> = (0..corpus.cells() as u32).collect();
        let mut scores = marker_scores(&corpus, &cells, &markers).unwrap();
        let close = |found: &[f32], key: &str, tolerance: f64| {
            for (row, wanted) in found.chunks(p).zip(golden[key].as_array().unwrap()) {
                for (a, b) in row.iter().zip(floats(wanted)) {
                    assert!((*a as f64 - b).abs() < tolerance, "{key}: {a} {b}");
                }
            }
        };
        close(&scores, "scores", 1e-6);
        let fitted = golden["fitted_cells"].as_u64().unwrap() as usize;
        Standardiser::fit(&scores[..fitted * p], p).apply(&mut scores);
        close(&scores, "standardised", 1e-3);

        // What is written reads back equal, weights included.
        let path = dir.path().join("derived.gmt");
        let vocab = vocab(golden["vocab"].as_u64().unwrap() as usize);
        markers.write_gmt(&path, &vocab, |k| format!("class {k}")).unwrap();
        let read = RawSets::load(&path, &vocab, None).unwrap();
        assert_eq!(read.for_labels(&markers.names, None, false).unwrap(), markers);
        assert_eq!(read.all().unwrap(), markers);
    }
    let text: String = golden["plain"]
        .as_array()
        .unwrap()
        .iter()
        .enumerate()
        .map(|(k, s)| {
            format!("s{k}\td\t{}\n", floats(s).iter().map(|g| format!("G{g}")).collect::<Vec<_>>().join("\t"))
        })
        .collect();
    let idf = raw(&text).all().unwrap();
    for (found, wanted) in idf.sets.iter().zip(sets(&golden["idf"])) {
        for (token, weight) in wanted {
            let at = found.iter().find(|g| g.0 == token).unwrap();
            assert!((at.1 as f64 - weight).abs() < 1e-6);
        }
        assert!(found.windows(2).all(|w| w[0].1 >= w[1].1));
    }
}

#[test]
fn derivation_sees_training_labels_alone_and_bears_absent_classes() {
    let golden = golden();
    let dir = tempfile::tempdir().unwrap();
    // Class 3 appears in the last cells alone; they are test cells of a held-out split.
    let corpus = golden_corpus(dir.path(), &golden, true, |i| Some(format!("type {}", golden["label"][i])));
    let mut spec = SplitSpec {
        rule: SplitRule::Holdout { column: "type".into(), value: "type 3".into(), val: 0.0 },
        label: Some("type".into()),
        exclude: Vec::new(),
        labels_per_class: None,
        seed: 0,
    };
    let split = Split::make(&corpus, &spec).unwrap();
    let derived = derive(&corpus, &split.training(), 10).unwrap();
    assert!(derived.markers.sets[3].is_empty() && derived.cells[3] == 0);
    assert!(derived.markers.sets[..3].iter().all(|s| s.len() == 10));
    // An empty set is left out of the file; the class then has none.
    let path = dir.path().join("d.gmt");
    let vocab = vocab(golden["vocab"].as_u64().unwrap() as usize);
    derived.markers.write_gmt(&path, &vocab, |_| String::new()).unwrap();
    let read = RawSets::load(&path, &vocab, None).unwrap();
    assert_eq!(read.sets.len(), 3);
    assert_eq!(read.for_labels(&derived.markers.names, None, true).unwrap(), derived.markers);
    // Labels of test cells do not matter: another label on each of them changes nothing.
    spec.rule = SplitRule::Holdout { column: "part".into(), value: "other".into(), val: 0.0 };
    let before = derive(&corpus, &Split::make(&corpus, &spec).unwrap().training(), 10).unwrap();
    let moved = tempfile::tempdir().unwrap();
    let relabelled = golden_corpus(moved.path(), &golden, true, |i| {
        let k = golden["label"][i].as_u64().unwrap();
        Some(format!("type {}", if i % 3 == 1 { (k + 1) % 4 } else { k }))
    });
    let split = Split::make(&relabelled, &spec).unwrap();
    assert!(split.test.iter().all(|c| c % 3 == 1) && split.train.iter().all(|c| c % 3 != 1));
    assert_eq!(derive(&relabelled, &split.training(), 10).unwrap(), before);
}

#[test]
fn thread_count_does_not_change_a_bit() {
    let golden = golden();
    let dir = tempfile::tempdir().unwrap();
    let corpus = golden_corpus(dir.path(), &golden, true, |i| Some(format!("type {}", golden["label"][i])));
    let split = all_train(&corpus);
    let with = |threads: usize| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let d = derive(&corpus, &split.training(), 20).unwrap();
            let u = marker_scores(&corpus, &split.train, &d.markers).unwrap();
            (d, u)
        })
    };
    assert!(with(1) == with(3));
}

fn cellrefine(args: &[&str]) -> (i32, Value, String) {
    let out =
        assert_cmd::Command::cargo_bin("cellrefine").unwrap().arg("--json").args(args).output().unwrap();
    let json = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| {
        panic!("{args:?}: stdout is not one JSON object ({e}): {}", String::from_utf8_lossy(&out.stdout))
    });
    (out.status.code().unwrap(), json, String::from_utf8_lossy(&out.stderr).into_owned())
}

#[test]
fn derive_and_check_on_the_command_line() {
    let golden = golden();
    let dir = tempfile::tempdir().unwrap();
    let vocab = vocab(golden["vocab"].as_u64().unwrap() as usize);
    let label = |i: usize| Some(format!("type {}", golden["label"][i]));
    // The same cells with their vocabulary inside.
    let bare = golden_corpus(dir.path(), &golden, true, label);
    let path = dir.path().join("with-vocabulary.cells");
    let options = CorpusOptions {
        vocab: VocabIdentity { digest: vocab.digest().into(), len: vocab.len() },
        vocab_file: Some(vocab.to_tsv(&[]).into_bytes()),
        values: true,
        shard_cells: 0,
        obs: vec![ObsSpec { name: "type".into(), kind: ObsKind::Categorical }],
        provenance: Value::Null,
    };
    let mut w = CorpusWriter::create(&path, options).unwrap();
    for i in 0..bare.cells() {
        w.push(&CellRecord {
            id: bare.cell_id(i).unwrap(),
            gene: &bare.genes(i).unwrap().to_vec(),
            value: bare.values(i).unwrap(),
            total_count: bare.total_count(i).unwrap(),
            obs: &[ObsValue::Category(&label(i).unwrap())],
        })
        .unwrap();
    }
    w.finish().unwrap();
    let (corpus, gmt) = (path.to_str().unwrap(), dir.path().join("m.gmt"));
    let gmt = gmt.to_str().unwrap();
    let (code, json, stderr) =
        cellrefine(&["markers", "derive", "--corpus", corpus, "--label", "type", "--out", gmt]);
    assert_eq!((code, json["sets"].as_array().unwrap().len()), (0, 4), "{stderr}");
    assert_eq!(json["split"]["spec"]["rule"]["fractions"]["train"], 0.67);
    let record: splits::SplitRecord = serde_json::from_value(json["split"].clone()).unwrap();
    let split = Split::restore(&Corpus::open(&path).unwrap(), &record).unwrap();
    let wanted = derive(&Corpus::open(&path).unwrap(), &split.training(), 50).unwrap().markers;
    let read = RawSets::load(Path::new(gmt), &vocab, None).unwrap();
    assert_eq!(read.for_labels(&wanted.names, None, false).unwrap(), wanted);

    let (code, json, _) = cellrefine(&["markers", "check", gmt, "--corpus", corpus, "--label", "type"]);
    assert_eq!((code, &json["unmatched"], &json["usable"]), (0, &0.into(), &4.into()));
    let (code, json, _) = cellrefine(&["inspect", gmt]);
    assert_eq!((code, &json["kind"]), (0, &"markers".into()));

    let error = |args: &[&str], wanted: i32, words: &str| {
        let (code, json, stderr) = cellrefine(args);
        assert_eq!(code, wanted, "{stderr}");
        assert!(json.to_string().contains(words), "{json}");
    };
    error(&["markers", "derive", "--corpus", corpus, "--label", "tipe", "--out", gmt], 3, "did you mean");
    error(
        &["markers", "derive", "--corpus", corpus, "--label", "type", "--split", "train=2", "--out", gmt],
        2,
        "0 to 1",
    );
    let one = [
        "markers",
        "derive",
        "--corpus",
        corpus,
        "--label",
        "type",
        "--out",
        gmt,
        "--exclude-label",
        "type 1",
    ];
    error(
        &[&one[..], &["--exclude-label", "type 2", "--exclude-label", "type 3"]].concat(),
        3,
        "two classes",
    );
    error(
        &["markers", "derive", "--corpus", bare.path().to_str().unwrap(), "--label", "type", "--out", gmt],
        3,
        "--vocab",
    );
    std::fs::write(dir.path().join("bad.gmt"), "no tabs\n").unwrap();
    let bad = dir.path().join("bad.gmt");
    error(
        &["markers", "check", bad.to_str().unwrap(), "--corpus", corpus, "--label", "type"],
        3,
        "bad.gmt:1",
    );
}
