//! Perturbations against corpora in which the genes were deleted or moved by hand, and against what the types are made of.

#[path = "common/typed_cells.rs"]
mod typed_cells;

use cellrefine::config::Sources;
use cellrefine::corpus::{CellRecord, Corpus, CorpusOptions, CorpusWriter, VocabIdentity};
use cellrefine::cpu::Cpu;
use cellrefine::eval::embed::{EmbedOptions, Embedder};
use cellrefine::objective::StoredPrototypes;
use cellrefine::train::{MarkerInputs, RunInputs, SplitFlags, Unwatched, stages};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

const TYPES: usize = 3;

struct Place {
    _dir: tempfile::TempDir,
    root: PathBuf,
}

/// One line of the table.
#[derive(Debug, PartialEq)]
struct Line {
    gene: String,
    cells: usize,
    similarity: f64,
    prototype: String,
    shift: f64,
    sd: f64,
    towards: f64,
}

impl Place {
    /// A corpus of three types and a checkpoint refined on it.
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_path_buf();
        let corpus = typed_cells::write(&root, "x.cells", &[40, 24, 12], 0.0);
        let markers = MarkerInputs { markers: typed_cells::markers(&root, TYPES), ..MarkerInputs::default() };
        let inputs = |out: &str, set: &[&str]| RunInputs {
            corpus: corpus.clone(),
            out: root.join(out),
            sources: Sources { set: set.iter().map(|s| s.to_string()).collect(), ..Sources::default() },
            split: SplitFlags {
                label: Some("cell_type".into()),
                split: Some("train=0.7,test=0.3".into()),
                ..SplitFlags::default()
            },
            ..RunInputs::default()
        };
        let small = [
            "model.layers=1",
            "model.width=16",
            "model.ffn=32",
            "train.steps=60",
            "optimizer.learning_rate=5e-3",
        ];
        let pre = RunInputs { preset: Some("tiny".into()), ..inputs("pre", &small) };
        stages::pretrain(&pre, &mut Unwatched).unwrap();
        let refine = ["train.steps=100", "optimizer.learning_rate=5e-3"];
        let refine = RunInputs { checkpoint: Some(root.join("pre")), ..inputs("run", &refine) };
        stages::refine(&refine, &markers, &mut Unwatched).unwrap();
        Place { _dir: dir, root }
    }

    fn run(&self, words: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cellrefine"));
        command.current_dir(&self.root).args(["perturb", "--corpus", "x.cells", "--quiet"]);
        command.args(words.split_whitespace()).output().unwrap()
    }

    fn table(&self, words: &str) -> Vec<Line> {
        let out = self.run(&format!("{words} --checkpoint run --out t.tsv"));
        assert!(out.status.success(), "{words}: {}", String::from_utf8_lossy(&out.stderr));
        let text = std::fs::read_to_string(self.root.join("t.tsv")).unwrap();
        let mut lines = text.lines();
        let header = "gene_id\tsymbol\tcells\tsimilarity\tprototype\tshift\tshift_sd\ttowards";
        assert_eq!(lines.next(), Some(header));
        let number = |text: &str| text.parse().unwrap_or(f64::NAN);
        lines
            .map(|line| {
                let f: Vec<&str> = line.split('\t').collect();
                let [gene, _, cells, similarity, prototype, shift, sd, towards] = f[..] else {
                    panic!("{line}");
                };
                Line {
                    gene: gene.into(),
                    cells: cells.parse().unwrap(),
                    similarity: number(similarity),
                    prototype: prototype.into(),
                    shift: number(shift),
                    sd: number(sd),
                    towards: number(towards),
                }
            })
            .collect()
    }

    /// Rows of `cells`, each as a cell of a corpus written for it.
    fn embed(&self, cells: &[Vec<u32>]) -> Vec<Vec<f64>> {
        let vocab = typed_cells::vocab(TYPES, 0.0);
        let path = self.root.join("hand.cells");
        let _ = std::fs::remove_dir_all(&path);
        let options = CorpusOptions {
            vocab: VocabIdentity { digest: vocab.digest().into(), len: vocab.len() },
            vocab_file: Some(vocab.to_tsv(&[]).into_bytes()),
            values: false,
            shard_cells: 0,
            obs: Vec::new(),
            provenance: serde_json::json!({}),
        };
        let mut writer = CorpusWriter::create(&path, options).unwrap();
        for (i, gene) in cells.iter().enumerate() {
            let id = format!("c{i}");
            writer.push(&CellRecord { id: &id, gene, value: None, total_count: 1.0, obs: &[] }).unwrap();
        }
        writer.finish().unwrap();
        let corpus = Arc::new(Corpus::open(&path).unwrap());
        let (run, options) = (self.root.join("run"), EmbedOptions::default());
        let mut embedder = Embedder::<Cpu, f32>::open(&Cpu, &run, corpus, &options).unwrap();
        let all: Vec<u32> = (0..cells.len() as u32).collect();
        let rows = embedder.collect(&all, |_| ()).unwrap();
        rows.chunks_exact(16).map(|r| r.iter().map(|x| *x as f64).collect()).collect()
    }
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn cells_of(root: &Path) -> Vec<Vec<u32>> {
    let corpus = Corpus::open(&root.join("x.cells")).unwrap();
    (0..corpus.cells()).map(|c| corpus.genes(c).unwrap().to_vec()).collect()
}

#[test]
fn effects_are_those_of_cells_changed_by_hand() {
    let place = Place::new();
    let cells = cells_of(&place.root);
    let stored = place.root.join("run/checkpoints/step-100");
    let prototypes = StoredPrototypes::read(&stored, 16).unwrap().unwrap();
    let away = |row: &[f64]| -> Vec<f64> {
        row.iter().zip(&prototypes.centre).map(|(x, c)| x - *c as f64).collect()
    };
    let q: Vec<Vec<f64>> = prototypes
        .vectors
        .chunks_exact(16)
        .map(|q| away(&q.iter().map(|x| *x as f64).collect::<Vec<_>>()))
        .collect();
    let genes: [u32; 3] = [2, 11, 30];
    let ids = genes.map(|g| typed_cells::vocab(TYPES, 0.0).token(g).to_string());
    type Change = fn(&[u32], &[u32]) -> Vec<u32>;
    let delete: Change = |cell, set| cell.iter().copied().filter(|g| !set.contains(g)).collect();
    let overexpress: Change =
        |cell, set| set.iter().chain(cell.iter().filter(|g| !set.contains(g))).copied().collect();
    for (kind, change) in [("delete", delete), ("overexpress", overexpress)] {
        for (together, sets) in
            [("", vec![vec![2], vec![11], vec![30]]), ("--together", vec![vec![2, 11, 30]])]
        {
            let words = format!("--kind {kind} --genes {} {together} --max-cells 0", ids.join(","));
            let table = place.table(&words);
            assert_eq!(table.len(), sets.len() * TYPES, "{words}");
            for (set, lines) in sets.iter().zip(table.chunks(TYPES)) {
                let (before, after): (Vec<Vec<u32>>, Vec<Vec<u32>>) = cells
                    .iter()
                    .map(|cell| (cell.clone(), change(cell, set)))
                    .filter(|(before, after)| before != after)
                    .unzip();
                let (h, p) = (place.embed(&before), place.embed(&after));
                let n = before.len();
                assert!(n > 5 && lines.iter().all(|l| l.cells == n), "{words}: {n} {lines:?}");
                let similarity = h.iter().zip(&p).map(|(h, p)| cosine(h, p)).sum::<f64>() / n as f64;
                for (k, line) in lines.iter().enumerate() {
                    assert_eq!(line.prototype, format!("type{k}"));
                    let shifts: Vec<f64> = h
                        .iter()
                        .zip(&p)
                        .map(|(h, p)| cosine(&away(p), &q[k]) - cosine(&away(h), &q[k]))
                        .collect();
                    let mean = shifts.iter().sum::<f64>() / n as f64;
                    let sd = (shifts.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / (n - 1) as f64).sqrt();
                    let towards = shifts.iter().filter(|s| **s > 0.0).count() as f64 / n as f64;
                    for (what, found, wanted) in [
                        ("similarity", line.similarity, similarity),
                        ("shift", line.shift, mean),
                        ("sd", line.sd, sd),
                        // A shift of 1e-7 may fall on either side of 0.
                        ("towards", line.towards, towards),
                    ] {
                        let bound = if what == "towards" { 0.05 } else { 2e-5 };
                        assert!((found - wanted).abs() < bound, "{words} {what}: {found} {wanted}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_type_s_own_genes_carry_it_away_and_another_s_bring_it_there() {
    let place = Place::new();
    let own = |t: usize| {
        let ids: Vec<String> = (0..typed_cells::OWN).map(|g| typed_cells::own_gene(t, g)).collect();
        ids.join(",")
    };
    let only = "--together --where cell_type=type0";
    let lost = place.table(&format!("--kind delete --genes {} {only}", own(0)));
    let less = |a: &Line, b: &Line| a.shift < b.shift - 0.1;
    assert!(lost[0].cells == 40 && less(&lost[0], &lost[1]) && less(&lost[0], &lost[2]), "{lost:?}");
    let won = place.table(&format!("--kind overexpress --genes {} {only}", own(1)));
    assert!(won[1].shift > 0.2 && less(&won[0], &won[1]) && less(&won[2], &won[1]), "{won:?}");
}

#[test]
fn batches_and_threads_change_no_byte_and_all_genes_are_those_present() {
    let place = Place::new();
    let words = "--kind delete --max-cells 30 --min-cells 5 --seed 4";
    let first = place.table(words);
    let bytes = std::fs::read(place.root.join("t.tsv")).unwrap();
    for more in ["--batch-tokens 40", "--threads 1", "--threads 3 --batch-tokens 100"] {
        place.table(&format!("{words} {more}"));
        assert!(std::fs::read(place.root.join("t.tsv")).unwrap() == bytes, "{more}");
    }
    assert!(first.len() > 30 * TYPES && first.iter().all(|l| l.cells >= 5 && l.cells <= 30));
    assert_ne!(place.table("--kind delete --max-cells 30 --min-cells 5 --seed 5"), first, "other cells");
}

#[test]
fn without_prototypes_only_the_similarity_is_told_and_bad_words_are_refused() {
    let place = Place::new();
    let gene = typed_cells::own_gene(0, 0);
    let out = place.run(&format!("--kind delete --genes {gene} --checkpoint pre --out p.tsv --json"));
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let json: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(json["prototypes"].as_array().unwrap().is_empty() && json["passes"].as_u64().unwrap() > 10);
    let text = std::fs::read_to_string(place.root.join("p.tsv")).unwrap();
    assert!(text.starts_with("gene_id\tsymbol\tcells\tsimilarity\n") && text.lines().count() == 2, "{text}");
    let made = place
        .run(&format!("--kind delete --genes {gene} --checkpoint pre --markers markers.gmt --out m.tsv"));
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    assert_eq!(std::fs::read_to_string(place.root.join("m.tsv")).unwrap().lines().count(), 1 + TYPES);
    for (words, code, says) in [
        ("--genes NOPE1", 3, "NOPE1"),
        ("--where donor=z", 3, "a, b"),
        ("--where donor", 2, "COL=VALUE"),
        ("--where tissue=x", 3, "tissue"),
        ("--together", 2, "--genes"),
        ("--min-cells 1000", 3, "--min-cells"),
    ] {
        let out = place.run(&format!("--kind delete {words} --checkpoint run --out bad.tsv"));
        let text = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() == Some(code) && text.contains(says), "{words}: {text}");
        assert!(!place.root.join("bad.tsv").exists());
    }
}
