//! Text and small binary files: marker sets, vocabularies, dictionaries, settings, what `report` and `bench` take.

use super::{Found, golden};
use cellrefine::bench::{compare, lengths as bench_lengths};
use cellrefine::config::{Sources, Stage};
use cellrefine::eval::npy as array;
use cellrefine::genes::Vocab;
use cellrefine::genes::dictionary::{Scalar, convert, read_pairs};
use cellrefine::genes::markers::read_marker_map;
use cellrefine::genes::markers_file::RawSets;
use cellrefine::model::Preset;
use cellrefine::model::config::Vocabulary;
use cellrefine::report::charts::kernels::{Bench, trace};
use cellrefine::report::charts::perturbation;
use serde_json::json;
use std::io::Write;
use std::path::Path;

const MADE: &str = "a sample";

fn write(folder: &Path, name: &str, text: impl AsRef<[u8]>) {
    std::fs::write(folder.join(name), text).expect(MADE);
}

fn copy(folder: &Path, from: &str, to: &str) {
    std::fs::copy(golden(from), folder.join(to)).expect(MADE);
}

fn gene(g: usize) -> String {
    format!("ENSG{:011}", [100, 107, 114, 121, 135, 142, 149, 156][g % 8])
}

/// Sets, the map of labels to sets, and symbols for the genes.
pub fn gmt(folder: &Path) {
    copy(folder, "import/V.tsv", "V.tsv");
    let sets: String = (0..6)
        .map(|s| format!("set {s}\thttp://made.up\t{}\t{}\tS{}\n", gene(s), gene(s + 1), s % 8))
        .collect();
    write(folder, "m.gmt", sets);
    write(folder, "map.tsv", (0..4).map(|s| format!("label {s}\tset {s}\n")).collect::<String>());
    write(folder, "symbols.tsv", (0..8).map(|g| format!("S{g}\t{}\tfree\n", gene(g))).collect::<String>());
}

pub fn marker_table(folder: &Path) {
    gmt(folder);
    let rows: String =
        (0..24).map(|r| format!("set {}\t{}\t{}\n", r % 5, gene(r), 0.25 * (r + 1) as f64)).collect();
    write(folder, "m.gmt", format!("set\tgene\tweight\n{rows}"));
}

pub fn gmt_gzip(folder: &Path) {
    gmt(folder);
    let text = std::fs::read(folder.join("m.gmt")).expect(MADE);
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    packed.write_all(&text).expect(MADE);
    write(folder, "m.gmt", packed.finish().expect(MADE));
}

pub fn markers(folder: &Path) -> Found {
    let vocab = Vocab::load(folder.join("V.tsv"))?;
    let sets = RawSets::load(&folder.join("m.gmt"), &vocab, Some(&folder.join("symbols.tsv")))?;
    let labels: Vec<String> = (0..4).map(|s| format!("set {s}")).collect();
    let _ = sets.for_labels(&labels, None, true)?;
    let all = sets.all()?;
    Ok(format!("{:?}", all.jaccard()))
}

pub fn marker_map(folder: &Path) -> Found {
    let vocab = Vocab::load(folder.join("V.tsv"))?;
    let map = read_marker_map(&folder.join("map.tsv"))?;
    let sets = RawSets::load(&folder.join("m.gmt"), &vocab, None)?;
    let labels: Vec<String> = (0..4).map(|s| format!("label {s}")).collect();
    let matched = sets.for_labels(&labels, Some(&map), true)?;
    Ok(format!("{matched:?}"))
}

pub fn vocabulary(folder: &Path) {
    let mut vocab = Vocab::load(golden("import/V.tsv")).expect(MADE);
    vocab.attach_symbols([(gene(0).as_str(), "S0"), (gene(3).as_str(), "S3")]);
    vocab.save(folder.join("V.tsv"), &["made up".into()]).expect(MADE);
}

pub fn read_vocabulary(folder: &Path) -> Found {
    Ok(Vocab::load(folder.join("V.tsv"))?.to_tsv(&[]))
}

pub fn pickles(folder: &Path) {
    copy(folder, "import/tokens_p4.pkl", "tokens.pkl");
    copy(folder, "import/medians_p4.pkl", "medians.pkl");
    copy(folder, "import/symbols_p4.pkl", "symbols.pkl");
}

pub fn pickles_2(folder: &Path) {
    pickles(folder);
    copy(folder, "import/tokens_p2.pkl", "tokens.pkl");
    copy(folder, "import/medians_p2.pkl", "medians.pkl");
}

/// The protocol of text is told by the name alone.
pub fn pickles_0(folder: &Path) {
    pickles(folder);
    copy(folder, "import/medians_p0.pkl", "medians.pkl");
}

pub fn json_dictionaries(folder: &Path) {
    copy(folder, "import/tokens.json", "tokens.json");
    copy(folder, "import/medians.json", "medians.json");
    copy(folder, "import/symbols_p4.pkl", "symbols.pkl");
}

/// Which of the two forms of a dictionary the sample has.
pub fn dictionaries(folder: &Path) -> Found {
    let place = |name: &str| {
        let json = folder.join(format!("{name}.json"));
        if json.symlink_metadata().is_ok() { json } else { folder.join(format!("{name}.pkl")) }
    };
    let pairs: Vec<(String, Scalar)> = read_pairs(&place("medians"))?;
    let converted = convert(&place("tokens"), Some(&place("medians")), Some(&place("symbols")))?;
    Ok(format!("{} {}", pairs.len(), converted.vocab.digest()))
}

pub fn settings(folder: &Path) {
    let text = "seed = 7\n[train]\nsteps = 12\ncheckpoint_every = 4\n[batch]\ncells = 8\ntokens = 512\n[optimizer]\n\
                learning_rate = 1e-3\nweight_decay = 0.01\n[model]\nlayers = 2\nwidth = 32\nheads = 4\n";
    write(folder, "s.toml", text);
}

pub fn read_settings(folder: &Path) -> Found {
    let preset = Preset::named("tiny")?;
    let config = preset.config(100, Vocabulary::default());
    let sources = Sources { config: Some(folder.join("s.toml")), ..Sources::default() };
    let mut all = String::new();
    for stage in [Stage::Pretrain, Stage::Refine, Stage::Finetune] {
        all += &format!("{:?}\n", sources.resolve(stage, &config));
    }
    sources.resolve(Stage::Pretrain, &config).map(|_| all)
}

pub fn bench(folder: &Path) {
    let kernels: Vec<_> = (1..5)
        .map(|k| {
            json!({"name": format!("kernel {k}"), "shape": "N 64 D 32", "dtype": "f32", "ms_median": 0.5 * k as f64, "gb_per_s": 3.0,
                "tflop_per_s": 0.5, "fraction_of_peak": 0.25})
        })
        .collect();
    let report = json!({"device": "a machine", "kernels": kernels, "peak_gflop_per_s": 900.0, "copy_gb_per_s": 12.5,
        "steps": [{"preset": "tiny", "stage": "pretrain", "ms_median": 3.0}], "loader": {"cells_per_s": 1000.0}});
    write(folder, "b.json", report.to_string());
    write(folder, "old.json", report.to_string());
    let events: Vec<_> = (0..12)
        .map(|e| (e, ["forward", "backward", "update"][e % 3]))
        .map(|(e, name)| json!({"name": name, "ph": "X", "ts": 10 * e, "dur": 9, "pid": 1, "tid": e % 2}))
        .collect();
    write(folder, "trace.json", json!({"traceEvents": events}).to_string());
}

pub fn read_bench(folder: &Path) -> Found {
    let page = Bench::read(&folder.join("b.json"))?.html();
    let mut report = cellrefine::report::charts::kernels::read_json(&folder.join("b.json"))?;
    compare::compare(&mut report, &folder.join("old.json"), None)?;
    Ok(page)
}

pub fn read_trace(folder: &Path) -> Found {
    trace(&folder.join("trace.json"))
}

pub fn perturbations(folder: &Path) {
    let head = "gene_id\tsymbol\tcells\tsimilarity\tprototype\tshift\tshift_sd\ttowards\n";
    let rows = (0..8).flat_map(|g| {
        (0..3).map(move |p| {
            format!(
                "{}\tS{g}\t{}\t0.9{g}\ttype {p}\t{}\t0.01\t0.5\n",
                gene(g),
                10 + g,
                0.01 * (g as f64 - p as f64)
            )
        })
    });
    write(folder, "p.tsv", head.to_string() + &rows.collect::<String>());
}

pub fn read_perturbations(folder: &Path) -> Found {
    perturbation::html(&folder.join("p.tsv"))
}

pub fn lengths(folder: &Path) {
    write(folder, "l.txt", "12, 40 7\n2048\n900,13\n");
}

pub fn read_lengths(folder: &Path) -> Found {
    bench_lengths::read(&folder.join("l.txt")).map(|l| format!("{l:?}"))
}

pub fn npy(folder: &Path) {
    let mut writer = array::NpyWriter::create(&folder.join("e.npy"), 5, 3).expect(MADE);
    let ids: Vec<String> = (0..5).map(|i| format!("cell {i}")).collect();
    writer.append(&[0.5; 15], &ids).expect(MADE);
    writer.finish().expect(MADE);
}

pub fn read_npy(folder: &Path) -> Found {
    array::read(&folder.join("e.npy")).map(|a| format!("{} {} {:?}", a.rows, a.width, a.values))
}
