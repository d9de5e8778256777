//! `report`, `watch` and the run records as a user meets them: whole runs of the program over a small corpus whose names are hostile.

use assert_cmd::Command;
use cellrefine::corpus::{
    CellRecord, CorpusOptions, CorpusWriter, ObsKind, ObsSpec, ObsValue, VocabIdentity,
};
use cellrefine::genes::Vocab;
use cellrefine::rng::Philox;
use serde_json::Value;
use std::path::PathBuf;
use std::sync::OnceLock;

/// Names that would leave their place in a page: a tag, a script's end, a comment, quotes; the last is a tail class.
const NAMES: [&str; 4] =
    ["</script><b>B</b>", "T \"x\" & 'y'", "<!-- NK", "rare<img src=x onerror=alert(1)>"];
const COUNTS: [usize; 4] = [90, 60, 40, 3];
const OWN: usize = 8;

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
    fn page(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }
}

fn cellrefine(args: &[&str]) -> std::process::Output {
    Command::cargo_bin("cellrefine").unwrap().args(args).output().unwrap()
}

#[track_caller]
fn ok(args: &[&str]) -> Value {
    let mut all = args.to_vec();
    all.extend(["--json", "--quiet"]);
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

fn gene(t: usize, g: usize) -> String {
    format!("ENSG{:011}", 1000 + t * OWN + g)
}

fn write_corpus(f: &Fixture) {
    let mut tokens = vec!["<pad>".to_string(), "<mask>".to_string()];
    tokens.extend((0..4).flat_map(|t| (0..OWN).map(move |g| gene(t, g))));
    tokens.extend((0..30).map(|g| format!("ENSG{:011}", 9000 + g)));
    let median = (0..tokens.len()).map(|id| if id < 2 { 0.0 } else { 1.0 }).collect();
    let vocab = Vocab::from_parts(tokens, median, Vec::new()).unwrap();
    let options = CorpusOptions {
        vocab: VocabIdentity { digest: vocab.digest().into(), len: vocab.len() },
        vocab_file: Some(vocab.to_tsv(&[]).into_bytes()),
        values: false,
        shard_cells: 0,
        obs: vec![ObsSpec { name: "cell_type".into(), kind: ObsKind::Categorical }],
        provenance: serde_json::json!({"made": "up"}),
    };
    let mut writer = CorpusWriter::create(&f.path("x.cells"), options).unwrap();
    let mut random = Philox::new(7, 0, 1);
    let mut index = 0;
    for round in 0..COUNTS[0] {
        for t in (0..4).filter(|&t| round < COUNTS[t]) {
            let mut own: Vec<u32> = (0..OWN).map(|g| (2 + t * OWN + g) as u32).collect();
            let mut other: Vec<u32> = (2..vocab.len() as u32).filter(|id| !own.contains(id)).collect();
            random.shuffle(&mut own);
            random.shuffle(&mut other);
            let mut genes = own[..4].to_vec();
            genes.extend(&other[..8 + random.below(12) as usize]);
            let id = format!("cell {index}</script>");
            let obs = [ObsValue::Category(NAMES[t])];
            writer
                .push(&CellRecord { id: &id, gene: &genes, value: None, total_count: 100.0, obs: &obs })
                .unwrap();
            index += 1;
        }
    }
    writer.finish().unwrap();
    let lines: String = (0..4)
        .map(|t| {
            let genes: Vec<String> = (0..OWN).map(|g| gene(t, g)).collect();
            format!("{}\tmade up\t{}\n", NAMES[t], genes.join("\t"))
        })
        .collect();
    std::fs::write(f.path("m.gmt"), lines).unwrap();
}

/// A corpus, marker sets, and the runs pretrained → refined → refined-tuned and pretrained → tuned, with and without labels.
fn fixture() -> &'static Fixture {
    static FIXTURE: OnceLock<Fixture> = OnceLock::new();
    FIXTURE.get_or_init(|| {
        let f = Fixture { folder: tempfile::tempdir().unwrap() };
        write_corpus(&f);
        let small = [
            "--set",
            "batch.cells=16",
            "--set",
            "train.log_every=2",
            "--set",
            "model.width=32",
            "--set",
            "model.ffn=48",
        ];
        let run = |stage: &str, out: &str, steps: &str, rest: &[&str]| {
            let (corpus, out) = (f.text("x.cells"), f.text(out));
            let mut args = vec![stage, "--corpus", &corpus, "--out", &out, "--set", steps];
            args.extend(rest);
            args.extend(&small[..if stage == "pretrain" { 8 } else { 4 }]);
            ok(&args);
        };
        let (pretrained, refined, markers) = (f.text("pretrained"), f.text("refined"), f.text("m.gmt"));
        let label = ["--label", "cell_type", "--split", "train=0.67,test=0.33"];
        run("pretrain", "pretrained", "train.steps=8", &[&["--preset", "tiny"][..], &label].concat());
        run(
            "refine",
            "refined",
            "train.steps=12",
            &["--checkpoint", &pretrained, "--markers", &markers, "--label", "cell_type"],
        );
        run("finetune", "tuned", "train.steps=12", &["--checkpoint", &pretrained, "--label", "cell_type"]);
        run(
            "finetune",
            "refined-tuned",
            "train.steps=8",
            &["--checkpoint", &refined, "--label", "cell_type"],
        );
        run("pretrain", "unlabelled", "train.steps=4", &["--preset", "tiny"]);
        let unlabelled = f.text("unlabelled");
        run("refine", "label-free", "train.steps=6", &["--checkpoint", &unlabelled, "--markers", &markers]);
        f
    })
}

/// The JSON in the page.
fn data(html: &str) -> Value {
    let start = html.find("id=\"data\">").unwrap() + "id=\"data\">".len();
    serde_json::from_str(&html[start..start + html[start..].find("</script>").unwrap()]).unwrap()
}

/// Opening and closing tags of a well-formed page balance, and no tag is one that a name smuggled in.
fn check_markup(html: &str) {
    for name in NAMES {
        assert!(!html.contains(name), "{name:?} stands in the page as it is");
    }
    assert!(!html.contains("<img") && !html.contains("<b>B"));
    for tag in ["section", "svg", "table", "details", "figure", "div", "select", "script", "ul", "p"] {
        let opened = html.matches(&format!("<{tag}>")).count() + html.matches(&format!("<{tag} ")).count();
        assert_eq!(opened, html.matches(&format!("</{tag}>")).count(), "<{tag}>");
    }
    let outside = html.replace("http://www.w3.org/2000/svg", "");
    for address in ["http:", "https:", "//cdn", "@import", "url("] {
        assert!(!outside.contains(address), "{address} in the page");
    }
}

#[test]
fn the_page_compares_what_was_trained_and_hostile_names_stay_text() {
    let f = fixture();
    let (refined, tuned, both) = (f.text("refined"), f.text("tuned"), f.text("refined-tuned"));
    let said = ok(&["report", &refined, &tuned, &both, "--out", &f.text("all.html")]);
    assert_eq!(
        (said["not_measured"].as_array().unwrap().len(), said["runs"].as_array().unwrap().len()),
        (0, 3)
    );
    let html = f.page("all.html");
    check_markup(&html);
    for wanted in [
        "Refine: pretrained → refined",
        "Refine before fine-tuning: tuned → refined-tuned",
        "&lt;/script&gt;&lt;b&gt;B&lt;/b&gt;",
        "Settings that differ",
        "Loss",
        "loss term: anchor",
        "zero-shot recall@1",
    ] {
        assert!(html.to_lowercase().contains(&wanted.to_lowercase()), "no {wanted:?}");
    }
    let data = data(&html);
    let planes = data["planes"].as_array().unwrap();
    assert_eq!(planes.len(), 4);
    assert_eq!(data["sets"][0]["tail"], serde_json::json!([false, false, false, true]).clone());
    // The numbers are those of `eval`.
    let eval = ok(&[
        "eval",
        "--corpus",
        &f.text("x.cells"),
        "--checkpoint",
        &refined,
        "--label",
        "cell_type",
        "--markers",
        &f.text("m.gmt"),
    ]);
    let macro_f1 = eval["metrics"]["knn_macro_f1"].as_f64().unwrap();
    let row = &html[html.find(">kNN macro-F1</th>").unwrap()..];
    assert!(row[..row.find("</tr>").unwrap()].contains(&format!("{macro_f1:.3}")), "{macro_f1}");
    let cells = eval["cells"].as_u64().unwrap() as usize;
    assert_eq!(data["sets"][0]["ids"].as_str().unwrap().lines().count(), cells);
}

#[test]
fn the_same_runs_give_the_same_bytes_on_any_number_of_threads() {
    let f = fixture();
    let refined = f.text("refined");
    for (threads, name) in [("1", "one.html"), ("3", "three.html")] {
        ok(&["report", &refined, "--out", &f.text(name), "--threads", threads]);
    }
    assert!(f.page("one.html") == f.page("three.html"));
}

#[test]
fn runs_without_labels_without_a_corpus_and_of_one_stage_say_what_is_missing() {
    let f = fixture();
    // No labels: maps by the nearest prototype, and the reason for the missing scores.
    ok(&["report", &f.text("label-free"), "--out", &f.text("free.html")]);
    let html = f.page("free.html");
    check_markup(&html);
    assert!(html.contains("the run saw no labels") && html.contains("colours are the nearest prototype"));
    assert_eq!(data(&html)["sets"][1]["labelled"], false);
    // Labels named now.
    ok(&["report", &f.text("label-free"), "--label", "cell_type", "--out", &f.text("named.html")]);
    assert!(f.page("named.html").contains("zero-shot recall@1"));
    // A corpus that has gone, from a run that says so in its record.
    let moved = f.path("moved");
    std::fs::create_dir(&moved).unwrap();
    for file in ["metrics.jsonl", "settings.toml", "split.json"] {
        std::fs::copy(f.path("pretrained").join(file), moved.join(file)).unwrap();
    }
    std::fs::write(
        moved.join("run.json"),
        "{\"stage\":\"pretrain\",\"corpus\":\"/nowhere/gone.cells\",\"label\":\"cell_type\"}",
    )
    .unwrap();
    let said = ok(&["report", &moved.display().to_string(), "--out", &f.text("gone.html")]);
    assert!(said["not_measured"][0]["why"].as_str().unwrap().contains("--corpus"), "{said}");
    assert!(f.page("gone.html").contains("is not where it was"));
    // One stage, and records alone.
    ok(&["report", &f.text("pretrained"), "--out", &f.text("pre.html")]);
    assert!(f.page("pre.html").contains("<h3>pretrained</h3>"));
    ok(&["report", &f.text("tuned"), "--records-only", "--out", &f.text("records.html")]);
    let html = f.page("records.html");
    assert!(html.contains("records-only") && html.contains("loss term: cross"));
}

#[test]
fn a_bench_and_a_trace_become_a_roofline_and_wrong_files_are_refused() {
    let f = fixture();
    let run = f.text("pretrained");
    std::fs::write(
        f.path("k.json"),
        "{\"device\":\"a <b>GPU</b>\",\"peak_gflop_per_s\":1000.0,\"copy_gb_per_s\":100.0,\"kernels\":[{\"name\":\"attention<i>\",\"shape\":\"x\",\
         \"ms_median\":2.5,\"gb_per_s\":50.0,\"tflop_per_s\":0.5,\"fraction_of_peak\":0.5}]}",
    )
    .unwrap();
    std::fs::write(
        f.path("t.json"),
        "{\"traceEvents\":[{\"name\":\"step\",\"ph\":\"X\",\"tid\":1,\"ts\":0,\"dur\":9000},{\"name\":\"forward\",\"ph\":\"X\",\"tid\":1,\"ts\":1,\"dur\":5000}]}",
    )
    .unwrap();
    let (bench, trace, out) = (f.text("k.json"), f.text("t.json"), f.text("k.html"));
    ok(&["report", &run, "--records-only", "--bench", &bench, "--trace", &trace, "--out", &out]);
    let html = f.page("k.html");
    assert!(
        html.contains("Roofline of 1 kernels")
            && html.contains("attention&lt;i&gt;")
            && html.contains("class=\"roof\"")
    );
    assert!(html.contains("<td>5</td>") && html.contains("<td>4</td>"), "own times of the trace");
    fails(&["report", &run, "--records-only", "--bench", &trace, "--out", &out], 3, &["no kernels"]);
    fails(&["report", &run, "--records-only", "--trace", &bench, "--out", &out], 3, &["no events"]);
    fails(&["report", &run, "--records-only", "--trace", &f.text("x.cells"), "--out", &out], 3, &["read"]);
    fails(&["report", &f.text("x.cells"), "--out", &out], 3, &["not a run folder"]);
    fails(&["report", &run, "--bench", &bench], 2, &["--out"]);
    fails(&["report", &run, "--records-only", "--out", &f.text("no/such/r.html")], 2, &["folder"]);
}

#[test]
fn the_table_and_its_json_need_no_page() {
    let f = fixture();
    let run = f.text("refined");
    let said = ok(&["report", &run]);
    assert_eq!(
        (said["runs"][0]["stage"].as_str(), said["runs"][0]["step"].as_u64()),
        (Some("refine"), Some(12))
    );
    let out = cellrefine(&["report", &run]);
    assert!(String::from_utf8_lossy(&out.stdout).contains("refine"));
}

#[test]
fn watch_says_once_how_a_run_stands_and_prometheus_can_read_it() {
    let f = fixture();
    let run = f.text("refined");
    let said = ok(&["watch", &run]);
    assert_eq!(
        (said["state"].as_str(), said["step"].as_u64(), said["steps"].as_u64()),
        (Some("finished"), Some(12), Some(12))
    );
    assert!(
        said["terms"]["anchor"].is_f64()
            && said["checkpoint"]["step"] == 12
            && said["seconds_left"].is_null()
    );
    // No terminal here, so this is one look too.
    let out = cellrefine(&["watch", &run]);
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(
        text.contains("finished, step 12 of 12 (100.0 %)") && text.contains("last checkpoint: step 12"),
        "{text}"
    );
    fails(&["watch", &f.text("x.cells")], 3, &["not a run folder"]);
    fails(&["watch", &run, "--every", "0"], 2, &["--every"]);
    let prom = f.page("refined/metrics.prom");
    let sample = |name: &str| -> f64 {
        let line = prom
            .lines()
            .find(|l| l.starts_with(&format!("{name}{{")))
            .unwrap_or_else(|| panic!("{name}\n{prom}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert_eq!((sample("cellrefine_step"), sample("cellrefine_steps_planned")), (12.0, 12.0));
    assert!(prom.contains("term=\"anchor\"") && prom.contains("stage=\"refine\""));
    let last: Value = serde_json::from_str(f.page("refined/metrics.jsonl").lines().last().unwrap()).unwrap();
    let loss = last["loss"].as_f64().unwrap();
    assert!((sample("cellrefine_loss") / loss - 1.0).abs() < 1e-12);
}
