//! `embed`, `annotate` and `eval` as a user runs them: the program itself over the bundled cells and a small random encoder.

use assert_cmd::Command;
use cellrefine::corpus::splits::SplitRule;
use cellrefine::corpus::{Corpus, Labels, Split, SplitSpec};
use cellrefine::cpu::Cpu;
use cellrefine::eval::embed::{EmbedOptions, Embedder};
use cellrefine::eval::npy;
use cellrefine::genes::Vocab;
use cellrefine::genes::markers_derive::derive;
use cellrefine::model::config::Vocabulary;
use cellrefine::model::snapshot::Snapshot;
use cellrefine::model::{Parameters, Preset, checkpoint};
use cellrefine::objective::StoredPrototypes;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

const LABEL: &str = "cell_type";

/// What all tests share: a corpus of 700 cells, a random encoder, a run folder that recorded a split, marker sets.
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

fn data(name: &str) -> String {
    format!("{}/data/pbmc700/{name}", env!("CARGO_MANIFEST_DIR"))
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

fn write_checkpoint(folder: &Path, corpus: &Corpus, seed: u64) {
    let vocab = Vocab::load(corpus.path().join("vocab.tsv")).unwrap();
    let mut config = Preset::named("tiny").unwrap().config(vocab.len(), Vocabulary::of(&vocab));
    (config.width, config.ffn, config.positions) = (32, 48, 64);
    let params = Parameters::<Cpu, f32>::random(&Cpu, &config, seed).unwrap();
    let snapshot = Snapshot::of_model(&Cpu, &config, params.layout(), params.master(), None).unwrap();
    snapshot.publish(folder).unwrap();
}

fn fixture() -> &'static Fixture {
    static FIXTURE: OnceLock<Fixture> = OnceLock::new();
    FIXTURE.get_or_init(|| {
        let f = Fixture { folder: tempfile::tempdir().unwrap() };
        ok(&["vocab", "build", &data("pbmc700.h5ad"), "--out", &f.text("v.tsv")]);
        ok(&["pack", &data("pbmc700.h5ad"), "--vocab", &f.text("v.tsv"), "--out", &f.text("x.cells")]);
        let corpus = Corpus::open(&f.path("x.cells")).unwrap();
        write_checkpoint(&f.path("plain"), &corpus, 5);
        // A run folder: a checkpoint that `last` names, its split, its settings.
        let run = f.path("run");
        std::fs::create_dir_all(run.join("checkpoints")).unwrap();
        write_checkpoint(&run.join("checkpoints/step-3"), &corpus, 6);
        checkpoint::point(&run, checkpoint::Pointer::Last, "step-3").unwrap();
        std::fs::write(run.join("settings.toml"), "[batch]\nmax_tokens = 48\n").unwrap();
        let spec = SplitSpec {
            rule: SplitRule::parse_fractions("train=0.6,test=0.4").unwrap(),
            label: Some(LABEL.into()),
            exclude: Vec::new(),
            labels_per_class: None,
            seed: 11,
        };
        let split = Split::make(&corpus, &spec).unwrap();
        std::fs::write(run.join("split.json"), serde_json::to_string(&split.record()).unwrap()).unwrap();
        let vocab = Vocab::load(corpus.path().join("vocab.tsv")).unwrap();
        let derived = derive(&corpus, &split.training(), 20).unwrap();
        derived.markers.write_gmt(&f.path("m.gmt"), &vocab, |_| "derived".into()).unwrap();
        f
    })
}

#[test]
fn embeddings_come_in_input_order_whatever_the_batch_size_order_and_threads() {
    let f = fixture();
    let corpus = Arc::new(Corpus::open(&f.path("x.cells")).unwrap());
    let (x, c, out) = (f.text("x.cells"), f.text("plain"), f.text("e.npy"));
    let json = ok(&["embed", "--corpus", &x, "--checkpoint", &c, "--out", &out]);
    let all = npy::read(Path::new(&out)).unwrap();
    assert_eq!((all.rows, all.width, json["cells"].as_u64()), (corpus.cells(), 32, Some(all.rows as u64)));
    let ids = std::fs::read_to_string(f.path("e.ids.txt")).unwrap();
    for (i, id) in ids.lines().enumerate() {
        assert_eq!(id, corpus.cell_id(i).unwrap());
    }
    let distinct: std::collections::HashSet<Vec<u32>> =
        all.values.chunks(32).map(|r| r.iter().map(|x| x.to_bits()).collect()).collect();
    assert!(distinct.len() > all.rows * 9 / 10, "rows of different cells differ");

    for (tokens, threads) in [("64", "1"), ("333", "2"), ("1000000", "3")] {
        let other = f.text(&format!("e-{tokens}.npy"));
        let args = ["embed", "--corpus", &x, "--checkpoint", &c, "--out", &other, "--batch-tokens", tokens];
        let args: Vec<&str> = args.into_iter().chain(["--threads", threads]).collect();
        assert!(cellrefine(&args).status.success());
        assert!(npy::read(Path::new(&other)).unwrap() == all, "{tokens} tokens a batch, {threads} threads");
    }
    // Backwards, by the library: the same rows.
    let mut e =
        Embedder::<Cpu, f32>::open(&Cpu, Path::new(&c), corpus.clone(), &EmbedOptions::default()).unwrap();
    let backwards: Vec<u32> = (0..corpus.cells() as u32).rev().collect();
    let rows = e.collect(&backwards, |_| {}).unwrap();
    assert!(rows.chunks(32).rev().eq(all.values.chunks(32)));
}

#[test]
fn layer_pool_and_context_change_rows_and_the_run_names_its_context() {
    let f = fixture();
    let embed = |checkpoint: &str, more: &[&str]| {
        let out = f.text(&format!("l{}{}.npy", checkpoint.len(), more.concat()));
        let mut args = vec!["embed", "--corpus", "", "--checkpoint", checkpoint, "--out", &out];
        let x = f.text("x.cells");
        args[2] = &x;
        args.extend(more);
        ok(&args);
        npy::read(Path::new(&out)).unwrap()
    };
    let plain = f.text("plain");
    let default = embed(&plain, &[]);
    // The checkpoint names its layer: a small preset its last one.
    assert!(embed(&plain, &["--layer", "0"]) == default);
    assert!(embed(&plain, &["--layer", "-1"]) != default);
    assert!(embed(&plain, &["--max-tokens", "10"]) != default);
    // The run trained on 48 tokens a cell, so its embeddings are of 48 tokens.
    let run = f.text("run");
    assert!(embed(&run, &[]) == embed(&run, &["--max-tokens", "48"]));
    assert!(embed(&run, &[]) != embed(&run, &["--max-tokens", "64"]));
}

#[test]
fn eval_prints_the_contracted_json_and_text_on_the_recorded_split() {
    let f = fixture();
    let (x, run) = (f.text("x.cells"), f.text("run"));
    let json = ok(&["eval", "--corpus", &x, "--checkpoint", &run, "--label", LABEL]);
    let m = &json["metrics"];
    for name in ["accuracy", "macro_f1", "linear_probe_macro_f1", "knn_macro_f1", "ari", "nmi", "silhouette"]
    {
        assert!(m[name].is_number(), "{name} in {m}");
    }
    for name in ["head_f1", "medium_f1", "tail_f1"] {
        assert!(m[name].is_number() || m[name].is_null());
    }
    // No prototypes and no markers: recall does not apply; the probe answers.
    assert!(m["recall_at"].is_null() && m["macro_recall_at"].is_null() && m["predictor"] == "linear_probe");
    assert_eq!(m["macro_f1"], m["linear_probe_macro_f1"]);
    let support: u64 =
        m["per_class"].as_object().unwrap().values().map(|c| c["support"].as_u64().unwrap()).sum();
    assert_eq!(json["cells"].as_u64(), Some(support));
    assert!(
        json["split"]["source"].as_str().unwrap().contains("recorded in")
            && json["split"]["spec"]["seed"] == 11
    );
    assert!(json["checkpoint"].as_str().unwrap().ends_with("step-3"));
    // 700 real cells under a random encoder: far above the share of the largest class, or something is shuffled.
    assert!(m["linear_probe_accuracy"].as_f64().unwrap() > 0.5, "{}", m["linear_probe_accuracy"]);
    let text = cellrefine(&["eval", "--corpus", &x, "--checkpoint", &run, "--label", LABEL]);
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(
        text.contains("linear probe *") && text.contains("recorded in") && text.contains("silhouette"),
        "{text}"
    );
    // Twice the same bits.
    assert_eq!(
        json["metrics"],
        ok(&["eval", "--corpus", &x, "--checkpoint", &run, "--label", LABEL])["metrics"]
    );
}

#[test]
fn eval_with_markers_scores_each_evidence_and_batches() {
    let f = fixture();
    let (x, run, m) = (f.text("x.cells"), f.text("run"), f.text("m.gmt"));
    let args = [
        "eval",
        "--corpus",
        &x,
        "--checkpoint",
        &run,
        "--label",
        LABEL,
        "--markers",
        &m,
        "--batch-key",
        LABEL,
    ];
    let json = ok(&args);
    let metrics = &json["metrics"];
    assert_eq!(metrics["predictor"], "prototype");
    for evidence in ["prototype", "markers", "both"] {
        let recall = &metrics["zero_shot"][evidence]["recall_at"];
        let at = |k: &str| recall[k].as_f64().unwrap();
        assert!(at("1") <= at("3") && at("3") <= at("5") && at("5") <= at("10"), "{recall}");
    }
    assert_eq!(metrics["recall_at"], metrics["zero_shot"]["prototype"]["recall_at"]);
    assert!(metrics["zero_shot"]["markers"]["recall_at"]["1"].as_f64().unwrap() > 0.5);
    let mixing = &metrics["batch_mixing"];
    assert!(
        mixing["batches"] == 10 && mixing["batch_asw"].is_null() && mixing["ilisi"].is_number(),
        "{mixing}"
    );
    let args: Vec<&str> = args.into_iter().chain(["--evidence", "markers"]).collect();
    let by_markers = ok(&args);
    assert_eq!(by_markers["metrics"]["recall_at"], metrics["zero_shot"]["markers"]["recall_at"]);
    assert_eq!(by_markers["metrics"]["predictor"], "markers");
}

#[test]
fn the_validation_part_is_scored_where_it_is_asked_for() {
    let f = fixture();
    let (x, run) = (f.text("x.cells"), f.text("run"));
    let eval = ["eval", "--corpus", &x, "--checkpoint", &run, "--label", LABEL, "--split"];
    let json = ok(&[&eval[..], &["train=0.5,val=0.2,test=0.3", "--part", "val"]].concat());
    assert_eq!(json["scored"], "val");
    // Every bundled cell has a label.
    assert_eq!(json["cells"], json["split"]["val"]);
    let test = ok(&[&eval[..], &["train=0.5,val=0.2,test=0.3"]].concat());
    assert_eq!((&test["scored"], &test["cells"]), (&Value::from("test"), &test["split"]["test"]));
    assert_ne!(json["metrics"], test["metrics"]);
    fails(
        &[&eval[..], &["train=0.67,test=0.33", "--part", "val"]].concat(),
        3,
        &["0 labelled validation cells"],
    );
}

#[test]
fn a_perfect_classifier_and_perfect_prototypes_are_recognised() {
    // Prototypes and weights made from the answer: whoever mixes up classes, columns or cells fails here.
    let f = fixture();
    let corpus = Arc::new(Corpus::open(&f.path("x.cells")).unwrap());
    let labels = Labels::read(&corpus, LABEL, &[]).unwrap();
    let folder = f.path("answers");
    write_checkpoint(&folder, &corpus, 5);
    let mut e = Embedder::<Cpu, f32>::open(&Cpu, &folder, corpus.clone(), &EmbedOptions::default()).unwrap();
    let cells: Vec<u32> = (0..corpus.cells() as u32).collect();
    let rows = e.collect(&cells, |_| {}).unwrap();
    // The prototype of a class is its cell of highest index; recall@1 must then be what the cosines say, class by class.
    let names: Vec<String> = labels.classes.iter().rev().cloned().collect();
    let of_class = |name: &String| {
        let k = labels.classes.iter().position(|c| c == name).unwrap();
        (0..corpus.cells()).rev().find(|&i| labels.class(i) == Some(k)).unwrap()
    };
    let chosen: Vec<usize> = names.iter().map(of_class).collect();
    let vectors: Vec<f32> = chosen.iter().flat_map(|&i| rows[i * 32..(i + 1) * 32].to_vec()).collect();
    let centre: Vec<f32> = (0..32).map(|j| rows.iter().skip(j).step_by(32).sum::<f32>() / 700.0).collect();
    let stored = StoredPrototypes {
        names: names.clone(),
        vectors: vectors.clone(),
        centre: centre.clone(),
        temperature: 0.1,
        layer: e.layer(),
        pooling: e.pooling(),
    };
    stored.write(&folder).unwrap();
    let x = f.text("x.cells");
    let json = ok(&["eval", "--corpus", &x, "--checkpoint", &f.text("answers"), "--label", LABEL]);
    let spec = SplitSpec {
        rule: SplitRule::parse_fractions("train=0.67,test=0.33").unwrap(),
        label: Some(LABEL.into()),
        exclude: Vec::new(),
        labels_per_class: None,
        seed: 0,
    };
    let split = Split::make(&corpus, &spec).unwrap();
    let cosine = |i: usize, p: usize| {
        let centred = |v: &[f32]| (0..32).map(|j| (v[j] - centre[j]) as f64).collect::<Vec<_>>();
        let (a, b) = (centred(&rows[i * 32..]), centred(&vectors[p * 32..]));
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt()
    };
    let right = split.test.iter().filter(|&&c| {
        let best = (0..names.len())
            .max_by(|&a, &b| cosine(c as usize, a).total_cmp(&cosine(c as usize, b)))
            .unwrap();
        names[best] == labels.classes[labels.class(c as usize).unwrap()]
    });
    let want = right.count() as f64 / split.test.len() as f64;
    let m = &json["metrics"];
    assert!((m["recall_at"]["1"].as_f64().unwrap() - want).abs() < 1e-9, "{} against {want}", m["recall_at"]);
    assert!((m["accuracy"].as_f64().unwrap() - want).abs() < 1e-9 && m["predictor"] == "prototype");
    assert_eq!(m["prototypes"], "checkpoint");
    assert!(json["split"]["source"].as_str().unwrap().contains("default"));

    // annotate by the same prototypes says the same labels.
    let (m_gmt, out) = (f.text("m.gmt"), f.text("labels.tsv"));
    let done = ok(&[
        "annotate",
        "--corpus",
        &x,
        "--checkpoint",
        &f.text("answers"),
        "--markers",
        &m_gmt,
        "--out",
        &out,
        "--top",
        "2",
    ]);
    assert_eq!((done["cells"].as_u64(), done["prototypes"].as_str()), (Some(700), Some("checkpoint")));
    let table = std::fs::read_to_string(&out).unwrap();
    let mut lines = table.lines();
    assert_eq!(
        lines.next().unwrap(),
        "cell_id\tlabel\tprobability\tcosine\tmarker_score\tlabel_2\tprobability_2"
    );
    for (i, line) in lines.enumerate() {
        let fields: Vec<&str> = line.split('\t').collect();
        let best = (0..names.len()).max_by(|&a, &b| cosine(i, a).total_cmp(&cosine(i, b))).unwrap();
        assert_eq!((fields[0], fields[1]), (corpus.cell_id(i).unwrap(), names[best].as_str()));
        assert!((fields[3].parse::<f64>().unwrap() - cosine(i, best)).abs() < 1e-4);
        assert!(fields[2].parse::<f64>().unwrap() >= fields[6].parse::<f64>().unwrap());
    }
}

#[test]
fn annotate_by_each_evidence_and_with_an_unknown_threshold() {
    let f = fixture();
    let (x, run, m) = (f.text("x.cells"), f.text("run"), f.text("m.gmt"));
    for evidence in ["prototype", "markers", "both"] {
        let out = f.text(&format!("{evidence}.tsv"));
        let args = [
            "annotate",
            "--corpus",
            &x,
            "--checkpoint",
            &run,
            "--markers",
            &m,
            "--out",
            &out,
            "--evidence",
            evidence,
        ];
        let json = ok(&args);
        let total: u64 = json["labels"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum();
        assert_eq!(total, 700);
        assert!(json["reference"].as_str().unwrap().contains("split.json"), "{json}");
        let all_unknown = args.into_iter().chain(["--unknown-below", "1.1"]).collect::<Vec<_>>();
        assert_eq!(ok(&all_unknown)["labels"], serde_json::json!({"unknown": 700}));
    }
}

#[test]
fn bad_input_is_refused_with_place_and_remedy() {
    let f = fixture();
    let (x, c, run) = (f.text("x.cells"), f.text("plain"), f.text("run"));
    let h5ad = f.text("e.h5ad");
    fails(
        &["embed", "--corpus", &x, "--checkpoint", &c, "--out", &h5ad],
        2,
        &["copy of a file", "--h5ad SOURCE.h5ad"],
    );
    fails(
        &["embed", "--corpus", &x, "--checkpoint", &f.text("nothing"), "--out", &f.text("n.npy")],
        3,
        &["nothing"],
    );
    fails(
        &["embed", "--corpus", &x, "--checkpoint", &c, "--out", &f.text("n.npy"), "--layer", "-3"],
        2,
        &["-3"],
    );
    fails(
        &["embed", "--corpus", &x, "--checkpoint", &c, "--out", &f.text("n.npy"), "--max-tokens", "65"],
        2,
        &["64"],
    );
    fails(
        &["embed", "--corpus", &x, "--checkpoint", &c, "--out", &f.text("n.npy"), "--device", "cuda"],
        4,
        &["cuda"],
    );
    assert!(!f.path("n.npy").exists() && !f.path("n.ids.txt").exists());
    let eval = |label: &str, more: &[&str]| {
        let mut all =
            vec!["eval".to_string(), "--corpus".into(), x.clone(), "--checkpoint".into(), run.clone()];
        all.extend(["--label".to_string(), label.to_string()]);
        all.extend(more.iter().map(|s| s.to_string()));
        all
    };
    let run_eval = |label: &str, more: &[&str], code: i32, says: &[&str]| {
        let args = eval(label, more);
        fails(&args.iter().map(String::as_str).collect::<Vec<_>>(), code, says);
    };
    run_eval("cell_typ", &["--split", "train=0.5,test=0.5"], 3, &["cell_typ", LABEL]);
    run_eval(LABEL, &["--evidence", "markers"], 2, &["--markers"]);
    run_eval(LABEL, &["--prototypes", "sentence"], 2, &["--markers"]);
    run_eval(LABEL, &["--batch-key", "donor"], 3, &["donor"]);
    run_eval(LABEL, &["--split", "train=0.5,test=0.5", "--holdout", "a=b"], 2, &["--holdout"]);
    run_eval(LABEL, &["--head-share", "0.01"], 2, &["--tail-share"]);
    std::fs::write(f.path("alien.gmt"), "Martian\tx\tNOTAGENE\tNEITHER\n").unwrap();
    let alien = f.text("alien.gmt");
    run_eval(LABEL, &["--markers", &alien], 3, &["alien.gmt"]);

    // A checkpoint that diverged.
    let folder = f.path("nan");
    write_checkpoint(&folder, &Corpus::open(&f.path("x.cells")).unwrap(), 5);
    let path = folder.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[header..].chunks_exact_mut(4).for_each(|b| b.copy_from_slice(&f32::NAN.to_le_bytes()));
    std::fs::write(&path, bytes).unwrap();
    let nan = f.text("nan");
    fails(
        &["embed", "--corpus", &x, "--checkpoint", &nan, "--out", &f.text("n.npy")],
        3,
        &["not finite", "inspect"],
    );
    assert!(!f.path("n.npy").exists());
    fails(&["eval", "--corpus", &x, "--checkpoint", &nan, "--label", LABEL], 3, &["not finite"]);
}
