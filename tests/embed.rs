//! `embed` into the files that others read: Parquet, and a copy of the `.h5ad`. What the copy must not touch is compared object
//! by object with a file written by anndata (tests/golden/embed, scripts/golden/make_embed_h5ad.py), whose rows are twelve of the
//! bundled cells, shuffled, two of them under names that the corpus lacks. scripts/golden/check_embed_out.py does the same with
//! anndata, h5py, pandas, pyarrow and polars.

use arrow_array::cast::AsArray;
use arrow_array::types::Float32Type;
use assert_cmd::Command;
use cellrefine::corpus::Corpus;
use cellrefine::cpu::Cpu;
use cellrefine::eval::npy;
use cellrefine::genes::Vocab;
use cellrefine::import::hdf5::{Attribute, H5Source, Node, PureFile, Stored};
use cellrefine::model::config::Vocabulary;
use cellrefine::model::snapshot::Snapshot;
use cellrefine::model::{Parameters, Preset};
use cellrefine::objective::StoredPrototypes;
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

struct Fixture {
    folder: tempfile::TempDir,
}

impl Fixture {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }
}

fn bundled(name: &str) -> String {
    format!("{}/data/pbmc700/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn everything() -> String {
    format!("{}/tests/golden/embed/everything.h5ad", env!("CARGO_MANIFEST_DIR"))
}

fn cellrefine(args: &[&str]) -> std::process::Output {
    Command::cargo_bin("cellrefine").unwrap().args(args).output().unwrap()
}

#[track_caller]
fn ok(args: &[&str]) -> Value {
    let mut all = args.to_vec();
    all.extend(["--json", "--quiet", "--threads", "2"]);
    let out = cellrefine(&all);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

#[track_caller]
fn fails(args: &[&str], code: i32, says: &[&str]) {
    let out = cellrefine(args);
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(code), "{stderr}");
    says.iter().for_each(|s| assert!(stderr.contains(s), "no {s:?} in: {stderr}"));
}

/// A corpus of 700 cells; `plain`, a random encoder; `refined`, the same with three prototypes; rows of `plain` as .npy.
fn fixture() -> &'static Fixture {
    static FIXTURE: OnceLock<Fixture> = OnceLock::new();
    FIXTURE.get_or_init(|| {
        let f = Fixture { folder: tempfile::tempdir().unwrap() };
        ok(&["vocab", "build", &bundled("pbmc700.h5ad"), "--out", &f.text("v.tsv")]);
        ok(&["pack", &bundled("pbmc700.h5ad"), "--vocab", &f.text("v.tsv"), "--out", &f.text("x.cells")]);
        let vocab = Vocab::load(f.path("v.tsv")).unwrap();
        let mut config = Preset::named("tiny").unwrap().config(vocab.len(), Vocabulary::of(&vocab));
        (config.width, config.ffn, config.positions) = (32, 48, 64);
        let params = Parameters::<Cpu, f32>::random(&Cpu, &config, 5).unwrap();
        for name in ["plain", "refined"] {
            let mut snapshot =
                Snapshot::of_model(&Cpu, &config, params.layout(), params.master(), None).unwrap();
            if name == "refined" {
                let mut rng = cellrefine::rng::Philox::new(1, 0, 9);
                let stored = StoredPrototypes {
                    names: ["A", "B", "C"].map(String::from).to_vec(),
                    vectors: (0..3 * 32).map(|_| rng.normal() as f32).collect(),
                    centre: vec![0.0; 32],
                    temperature: 0.1,
                    layer: config.layer,
                    pooling: config.pooling,
                };
                stored.add_to(&mut snapshot).unwrap();
            }
            snapshot.publish(&f.path(name)).unwrap();
        }
        embed(&f, "plain", "rows.npy", &[]);
        f
    })
}

fn embed(f: &Fixture, checkpoint: &str, out: &str, more: &[&str]) -> Value {
    let (corpus, checkpoint, out) = (f.text("x.cells"), f.text(checkpoint), f.text(out));
    let mut args = vec!["embed", "--corpus", &corpus, "--checkpoint", &checkpoint, "--out", &out];
    args.extend(more);
    ok(&args)
}

/// Row of each cell by name.
fn rows_by_name(f: &Fixture) -> HashMap<String, Vec<f32>> {
    let rows = npy::read(&f.path("rows.npy")).unwrap();
    let ids = std::fs::read_to_string(f.path("rows.ids.txt")).unwrap();
    ids.lines().zip(rows.values.chunks(rows.width)).map(|(id, row)| (id.to_string(), row.to_vec())).collect()
}

fn floats(file: &PureFile, path: &str) -> Vec<f32> {
    let array = file.array(path).unwrap();
    let bytes = array.rows(0, array.shape()[0]).unwrap();
    bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn texts(file: &PureFile, path: &str) -> Vec<String> {
    let array = file.array(path).unwrap();
    array.texts(0, array.shape()[0]).unwrap()
}

#[test]
fn parquet_holds_the_rows_of_the_npy_file_bit_for_bit() {
    let f = fixture();
    let told = embed(f, "plain", "rows.parquet", &[]);
    assert_eq!((told["cells"].as_u64(), told["width"].as_u64()), (Some(700), Some(32)));
    let file = std::fs::File::open(f.path("rows.parquet")).unwrap();
    let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(file).unwrap();
    let origin = reader.metadata().file_metadata().key_value_metadata().unwrap().clone();
    let origin = |key: &str| origin.iter().find(|k| k.key == key).unwrap().value.clone().unwrap();
    assert_eq!(origin("cellrefine.layer"), told["layer"].to_string());
    assert_eq!(origin("cellrefine.corpus_digest"), Corpus::open(&f.path("x.cells")).unwrap().digest());
    assert_eq!(origin("cellrefine.checkpoint_sha256").len(), 64);
    let wanted = npy::read(&f.path("rows.npy")).unwrap();
    let ids = std::fs::read_to_string(f.path("rows.ids.txt")).unwrap();
    let mut ids = ids.lines();
    let mut at = 0;
    for batch in reader.build().unwrap() {
        let batch = batch.unwrap();
        batch.column(0).as_string::<i32>().iter().for_each(|id| assert_eq!(id, ids.next()));
        let list = batch.column(1).as_fixed_size_list();
        assert_eq!(list.value_length(), 32);
        let values = list.values().as_primitive::<Float32Type>().values();
        assert_eq!(values[..], wanted.values[at..at + values.len()]);
        at += values.len();
    }
    assert_eq!((at, ids.next()), (wanted.values.len(), None));
}

#[test]
fn rows_of_a_copied_h5ad_are_found_by_name_and_absent_cells_are_nan() {
    let f = fixture();
    let told = embed(f, "refined", "copy.h5ad", &["--h5ad", &everything()]);
    assert_eq!((told["cells"].as_u64(), told["cells_absent"].as_u64()), (Some(12), Some(2)));
    let copy = PureFile::open(&f.path("copy.h5ad")).unwrap();
    let (names, by_name) = (texts(&copy, "obs/_index"), rows_by_name(f));
    let x = floats(&copy, "obsm/X_cellrefine");
    let codes = copy.array("obs/cellrefine_label/codes").unwrap().rows(0, 12).unwrap();
    let scores = floats(&copy, "obs/cellrefine_score");
    for (i, (name, row)) in names.iter().zip(x.chunks(32)).enumerate() {
        match by_name.get(name) {
            Some(wanted) => {
                assert_eq!(row, wanted, "{name}");
                assert!(codes[i] < 3 && (1.0 / 3.0..=1.0).contains(&scores[i]));
            }
            None => {
                assert!([3, 9].contains(&i) && row.iter().all(|v| v.is_nan()));
                assert!(codes[i] as i8 == -1 && scores[i].is_nan());
            }
        }
    }
    assert_eq!(texts(&copy, "obs/cellrefine_label/categories"), ["A", "B", "C"]);
    let Some(Attribute::Texts(columns)) = copy.attribute("obs", "column-order").unwrap() else { panic!() };
    let ours: Vec<&String> = columns.iter().filter(|c| c.starts_with("cellrefine_")).collect();
    assert_eq!((columns.len(), ours.len()), (7, 2), "{columns:?}");
    // Of the earlier run nothing is left, and what is new is complete.
    let origin = copy.children("uns/cellrefine").unwrap();
    assert!(!origin.contains(&"stale".to_string()) && origin.contains(&"cells_absent".to_string()));
}

#[test]
fn whatever_else_the_h5ad_holds_stays_as_it_is() {
    let f = fixture();
    let before = std::fs::read(everything()).unwrap();
    embed(f, "refined", "same.h5ad", &["--h5ad", &everything()]);
    assert_eq!(std::fs::read(everything()).unwrap(), before, "the source was touched");
    let (old, new) =
        (PureFile::open(Path::new(&everything())).unwrap(), PureFile::open(&f.path("same.h5ad")).unwrap());
    let mut compared = 0;
    walk(&old, &new, "", &mut compared);
    assert!(compared > 40, "{compared}");
    // The bytes themselves, but for the superblock: all objects lie where they lay.
    let after = std::fs::read(f.path("same.h5ad")).unwrap();
    assert_eq!(before[96..], after[96..before.len()]);
}

fn walk(old: &PureFile, new: &PureFile, at: &str, compared: &mut usize) {
    for name in old.children(at).unwrap() {
        let path = if at.is_empty() { name } else { format!("{at}/{name}") };
        if ["obs/cellrefine_label", "obs/cellrefine_score", "uns/cellrefine"].contains(&path.as_str()) {
            continue;
        }
        let kind = old.node(&path).unwrap();
        assert_eq!(kind, new.node(&path).unwrap(), "{path}");
        for attribute in
            ["encoding-type", "encoding-version", "_index", "ordered", "shape", "an attribute of somebody's"]
        {
            assert_eq!(
                old.attribute(&path, attribute).unwrap(),
                new.attribute(&path, attribute).unwrap(),
                "{path} {attribute}"
            );
        }
        *compared += 1;
        if kind == Some(Node::Group) {
            walk(old, new, &path, compared);
            continue;
        }
        let (a, b) = (old.array(&path).unwrap(), new.array(&path).unwrap());
        assert_eq!(
            (a.shape(), a.stored(), a.chunk_rows()),
            (b.shape(), b.stored(), b.chunk_rows()),
            "{path}"
        );
        let Some(&rows) = a.shape().first() else { continue };
        match a.stored() {
            Stored::HeapText => assert_eq!(a.texts(0, rows).unwrap(), b.texts(0, rows).unwrap(), "{path}"),
            _ => assert_eq!(a.rows(0, rows).unwrap(), b.rows(0, rows).unwrap(), "{path}"),
        }
    }
}

#[test]
fn labels_come_from_markers_as_annotate_gives_them_or_not_at_all() {
    let f = fixture();
    let markers = bundled("markers.gmt");
    let told = embed(f, "plain", "labels.h5ad", &["--h5ad", &bundled("pbmc700.h5ad"), "--markers", &markers]);
    assert_eq!(told["labels"].as_array().unwrap().len(), 10);
    let (corpus, plain, table) = (f.text("x.cells"), f.text("plain"), f.text("labels.tsv"));
    ok(&["annotate", "--corpus", &corpus, "--checkpoint", &plain, "--markers", &markers, "--out", &table]);
    let copy = PureFile::open(&f.path("labels.h5ad")).unwrap();
    let names = texts(&copy, "obs/cellrefine_label/categories");
    let codes = copy.array("obs/cellrefine_label/codes").unwrap().rows(0, 700).unwrap();
    let scores = floats(&copy, "obs/cellrefine_score");
    let text = std::fs::read_to_string(table).unwrap();
    for (i, line) in text.lines().skip(1).enumerate() {
        let fields: Vec<&str> = line.split('\t').collect();
        assert_eq!(fields[1], names[codes[i] as usize]);
        assert!((fields[2].parse::<f32>().unwrap() - scores[i]).abs() <= 5.1e-6);
    }
    let told = embed(f, "refined", "none.h5ad", &["--h5ad", &bundled("pbmc700.h5ad"), "--no-labels"]);
    assert_eq!(told["labels"], Value::Null);
    assert_eq!(PureFile::open(&f.path("none.h5ad")).unwrap().node("obs/cellrefine_label").unwrap(), None);
}

#[test]
fn what_cannot_be_written_is_refused_and_leaves_nothing() {
    let f = fixture();
    let (corpus, plain) = (f.text("x.cells"), f.text("plain"));
    let run = |out: &str, more: &[&str], code: i32, says: &[&str]| {
        let mut args = vec!["embed", "--corpus", &corpus, "--checkpoint", &plain, "--out", out];
        args.extend(more);
        fails(&args, code, says);
    };
    run("x.csv", &[], 2, &[".npy, .parquet or .h5ad"]);
    run("x.h5ad", &[], 2, &["--h5ad SOURCE.h5ad"]);
    run("x.npy", &["--h5ad", &everything()], 2, &["--h5ad goes with"]);
    run("x.parquet", &["--markers", &bundled("markers.gmt")], 2, &["--h5ad"]);
    let own = f.text("own.h5ad");
    std::fs::copy(everything(), &own).unwrap();
    run(&own, &["--h5ad", &own], 2, &["never changed in place"]);
    let alias = f.text("alias.h5ad");
    std::fs::hard_link(&own, &alias).unwrap();
    run(&alias, &["--h5ad", &own], 2, &["never changed in place"]);
    let out = f.text("refused.h5ad");
    run(&out, &["--h5ad", &bundled("markers.gmt")], 3, &["not an HDF5 file"]);
    // Two rows of one name; then no row of the corpus.
    let names = |names: [&str; 2], path: &str| {
        let mut file = hdf5_pure::FileBuilder::new();
        let mut obs = file.create_group("obs");
        obs.set_attr("_index", hdf5_pure::AttrValue::VarLenString("_index".into()));
        obs.set_attr("column-order", hdf5_pure::AttrValue::VarLenStringArray(vec![]));
        obs.create_dataset("_index").with_vlen_strings(&names);
        file.add_group(obs.finish());
        file.write(path).unwrap();
    };
    let first = Corpus::open(&f.path("x.cells")).unwrap().cell_id(0).unwrap().to_string();
    let bad = f.text("bad.h5ad");
    names([&first, &first], &bad);
    run(&out, &["--h5ad", &bad], 3, &["the same name", "obs_names_make_unique"]);
    names(["who", "what"], &bad);
    run(&out, &["--h5ad", &bad], 3, &["no cell of the file is in the corpus", "\"who\""]);
    let left: Vec<_> = std::fs::read_dir(f.folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    // Other tests write into this folder at the same time, under other names.
    assert!(!left.iter().any(|n| n.to_string_lossy().contains("refused")), "{left:?}");
}

#[test]
fn a_damaged_source_is_refused_without_a_trace_or_copied_whole() {
    let f = fixture();
    let whole = std::fs::read(everything()).unwrap();
    let bad = f.path("damaged.h5ad");
    let (corpus, plain, out) = (f.text("x.cells"), f.text("plain"), f.text("from-damaged.h5ad"));
    let mut rng = cellrefine::rng::Philox::new(11, 0, 3);
    for round in 0..12 {
        let mut bytes = whole.clone();
        if round % 2 == 0 {
            bytes.truncate(1 + (rng.uniform() * whole.len() as f64) as usize);
        } else {
            // Headers of groups lie in the first kilobytes.
            (0..20)
                .for_each(|_| bytes[96 + (rng.uniform() * 8000.0) as usize] = (rng.uniform() * 255.0) as u8);
        }
        std::fs::write(&bad, &bytes).unwrap();
        let source = bad.display().to_string();
        let done = cellrefine(&[
            "embed",
            "--corpus",
            &corpus,
            "--checkpoint",
            &plain,
            "--out",
            &out,
            "--h5ad",
            &source,
            "-q",
        ]);
        let stderr = String::from_utf8_lossy(&done.stderr);
        match done.status.code() {
            Some(0) => assert!(PureFile::open(Path::new(&out)).is_ok()),
            Some(3) => assert!(stderr.starts_with("error[CR") && !Path::new(&out).exists(), "{stderr}"),
            other => panic!("round {round}: exit {other:?}: {stderr}"),
        }
        let _ = std::fs::remove_file(&out);
    }
}

#[test]
fn pooling_and_layer_are_those_asked_for() {
    let f = fixture();
    embed(f, "refined", "other.h5ad", &["--h5ad", &everything(), "--pool", "cls", "--layer", "-1"]);
    let copy = PureFile::open(&f.path("other.h5ad")).unwrap();
    // Prototypes are of another layer: no labels, rather than wrong ones. What stands there is the file's own.
    let kept = texts(&copy, "obs/cellrefine_label/categories");
    assert_eq!(kept, ["old"]);
    let origin = hdf5_pure::File::open(f.path("other.h5ad")).unwrap();
    let labels = origin.dataset("uns/cellrefine/labels").unwrap().read_string().unwrap();
    assert_eq!(labels, ["none of this run"]);
}
