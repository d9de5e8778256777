//! Every kind of file that the program reads: how a small valid sample is made, which of its files are damaged, and how it is
//! read. The one list that the mutation tests beside this file and the targets of `fuzz/` go through.

#![allow(dead_code)] // a fuzz target uses its own part

#[path = "kinds/models.rs"]
mod models;
#[path = "kinds/samples.rs"]
mod samples;
#[path = "kinds/tables.rs"]
mod tables;

use cellrefine::error::{Error, Kind as ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// What a reader found, to compare with what it finds in the undamaged sample.
pub type Found = Result<String, Error>;

/// One kind of file or folder.
pub struct Kind {
    /// Its name, also that of its fuzz target.
    pub name: &'static str,
    /// The row of docs/reliability.md that it belongs to.
    pub fault: &'static str,
    /// Makes a valid sample in an empty folder.
    pub make: fn(&Path),
    /// The files of the sample that are damaged, by name.
    pub damaged: &'static [&'static str],
    /// Reads the sample to its last byte. What it writes goes to `out` in the folder.
    pub read: fn(&Path) -> Found,
    /// Damage must be refused, or leave what is read as it was.
    pub sealed: bool,
    /// A reading trains: fewer mutants are made of it.
    pub heavy: bool,
}

/// A reader of files that say nothing of their own health.
const fn open(
    name: &'static str,
    fault: &'static str,
    make: fn(&Path),
    damaged: &'static [&'static str],
    read: fn(&Path) -> Found,
) -> Kind {
    Kind { name, fault, make, damaged, read, sealed: false, heavy: false }
}

/// One whose files carry checksums.
const fn sealed(
    name: &'static str,
    fault: &'static str,
    make: fn(&Path),
    damaged: &'static [&'static str],
    read: fn(&Path) -> Found,
) -> Kind {
    Kind { sealed: true, ..open(name, fault, make, damaged, read) }
}

/// All kinds.
pub const KINDS: &[Kind] = &[
    open("h5ad_csr", "F17", samples::h5ad_csr, &["x.h5ad"], samples::pack_h5ad),
    open("h5ad_csc", "F17", samples::h5ad_csc, &["x.h5ad"], samples::pack_h5ad),
    open("h5ad_dense", "F17", samples::h5ad_dense, &["x.h5ad"], samples::pack_h5ad),
    open("h5ad_anndata", "F17", samples::h5ad_nullable, &["x.h5ad"], samples::pack_h5ad),
    open("h5ad_lzf", "F17", samples::h5ad_lzf, &["x.h5ad"], samples::pack_h5ad),
    open("h5ad_legacy", "F17", samples::h5ad_legacy, &["x.h5ad"], samples::pack_h5ad),
    open("h5ad_categories", "F17", samples::h5ad_categories, &["x.h5ad"], samples::pack_h5ad),
    open("h5ad_medians", "F17", samples::h5ad_csr, &["x.h5ad"], samples::medians),
    open("h5ad_extended", "F17", samples::h5ad_to_extend, &["x.h5ad"], samples::extend_h5ad),
    open("tenx_v2", "F17", samples::tenx_v2, &["x.h5"], samples::pack_tenx),
    open("tenx_v3", "F17", samples::tenx_v3, &["x.h5"], samples::pack_tenx),
    open(
        "mtx",
        "F17",
        samples::mtx,
        &["x/matrix.mtx", "x/genes.tsv", "x/barcodes.tsv"],
        samples::pack_folder,
    ),
    open(
        "mtx_gzip",
        "F17",
        samples::mtx_gzip,
        &["x/GSM42_matrix.mtx.gz", "x/GSM42_features.tsv.gz", "x/GSM42_barcodes.tsv.gz"],
        samples::pack_folder,
    ),
    open(
        "dataset",
        "F20",
        samples::dataset,
        &["x/data-00000-of-00001.arrow", "x/state.json", "x/dataset_info.json"],
        samples::pack_folder,
    ),
    open(
        "dataset_large_list",
        "F20",
        samples::dataset_large_list,
        &["x/data-00000-of-00001.arrow"],
        samples::pack_folder,
    ),
    open(
        "dataset_files",
        "F21",
        samples::dataset_files,
        &["x/state.json", "x/data-00001-of-00003.arrow"],
        samples::pack_folder,
    ),
    open("markers_gmt", "F18", tables::gmt, &["m.gmt"], tables::markers),
    open("markers_table", "F18", tables::marker_table, &["m.gmt"], tables::markers),
    open("markers_gzip", "F18", tables::gmt_gzip, &["m.gmt"], tables::markers),
    open("marker_map", "F18", tables::gmt, &["map.tsv"], tables::marker_map),
    open("gene_map", "F18", tables::gmt, &["symbols.tsv"], tables::markers),
    open("vocabulary", "F18", tables::vocabulary, &["V.tsv"], tables::read_vocabulary),
    open(
        "pickle",
        "F18",
        tables::pickles,
        &["tokens.pkl", "medians.pkl", "symbols.pkl"],
        tables::dictionaries,
    ),
    open("pickle_protocol_2", "F18", tables::pickles_2, &["tokens.pkl", "medians.pkl"], tables::dictionaries),
    open("pickle_protocol_0", "F18", tables::pickles_0, &["medians.pkl"], tables::dictionaries),
    open(
        "dictionary_json",
        "F18",
        tables::json_dictionaries,
        &["tokens.json", "medians.json"],
        tables::dictionaries,
    ),
    open("settings", "F18", tables::settings, &["s.toml"], tables::read_settings),
    open("bench_json", "F18", tables::bench, &["b.json", "old.json"], tables::read_bench),
    open("trace_json", "F18", tables::bench, &["trace.json"], tables::read_trace),
    open("perturbations", "F18", tables::perturbations, &["p.tsv"], tables::read_perturbations),
    open("lengths", "F18", tables::lengths, &["l.txt"], tables::read_lengths),
    open("npy", "F18", tables::npy, &["e.npy"], tables::read_npy),
    open("safetensors", "F19", models::tensors, &["t.safetensors"], models::read_tensors),
    open("model", "F19", models::model, &["config.json", "model.safetensors"], models::read_model),
    open(
        "model_sharded",
        "F21",
        models::sharded,
        &["model.safetensors.index.json", "model-00001-of-00002.safetensors"],
        models::read_model,
    ),
    open(
        "prototypes",
        "F19",
        models::with_heads,
        &["prototypes.safetensors", "classifier.json", "classifier.safetensors"],
        models::read_heads,
    ),
    sealed(
        "corpus",
        "F8",
        samples::corpus,
        &[
            "x.cells/corpus.json",
            "x.cells/shard-00000.safetensors",
            "x.cells/shard-00001.safetensors",
            "x.cells/vocab.tsv",
        ],
        samples::read_corpus,
    ),
    sealed(
        "corpus_blocks",
        "F8",
        samples::corpus_blocks,
        &["x.cells/shard-00000.safetensors"],
        samples::read_corpus,
    ),
    sealed(
        "corpus_parts",
        "F8",
        samples::corpus_parts,
        &["a.cells/corpus.json", "b.cells/shard-00000.safetensors"],
        samples::merge_corpora,
    ),
    sealed(
        "checkpoint",
        "F10",
        models::run,
        &[
            "run/checkpoints/step-4/state.json",
            "run/checkpoints/step-4/model.safetensors",
            "run/checkpoints/step-4/state.safetensors",
            "run/checkpoints/step-4/config.json",
            "run/checkpoints/step-4/vocab.tsv",
        ],
        models::verify_checkpoint,
    ),
    Kind {
        heavy: true,
        ..sealed(
            "resume",
            "F10",
            models::run,
            &[
                "run/checkpoints/step-4/state.json",
                "run/checkpoints/step-4/model.safetensors",
                "run/checkpoints/step-4/state.safetensors",
                "run/last",
            ],
            models::resume,
        )
    },
    Kind {
        heavy: true,
        ..sealed(
            "resume_auto",
            "F10",
            models::run,
            &[
                "run/checkpoints/step-4/state.json",
                "run/checkpoints/step-4/model.safetensors",
                "run/checkpoints/step-4/state.safetensors",
            ],
            models::resume_auto,
        )
    },
    Kind {
        heavy: true,
        ..open(
            "resume_resealed",
            "F10",
            models::run,
            &["run/checkpoints/step-4/state.json"],
            models::resume_resealed,
        )
    },
    open(
        "run_folder",
        "F18",
        models::run,
        &[
            "run/metrics.jsonl",
            "run/run.json",
            "run/settings.toml",
            "run/split.json",
            "run/last",
            "run/best",
            "run/checkpoints/step-4/state.json",
        ],
        models::report,
    ),
];

/// The kind of a name.
pub fn named(name: &str) -> &'static Kind {
    KINDS.iter().find(|k| k.name == name).unwrap_or_else(|| panic!("no kind {name:?}"))
}

/// Whether an error is one that a damaged file may end in: bad input or, of settings alone, bad usage.
pub fn is_refusal(kind: &Kind, e: &Error) -> bool {
    e.kind() == ErrorKind::Input || (e.kind() == ErrorKind::Usage && kind.name == "settings")
}

/// Files of the repository, whichever crate of it this is compiled into.
pub fn golden(name: &str) -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = if here.ends_with("fuzz") { here.parent().expect("the repository") } else { here };
    root.join("tests/golden").join(name)
}

/// Copies a folder with all below it.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() { copy(&path, &target) } else { std::fs::copy(&path, &target).map(|_| ()).unwrap() }
    }
}

/// Valid files of a kind, in the form that [`read_damaged`] takes.
pub fn seeds(kind: &Kind) -> Vec<(String, Vec<u8>)> {
    let folder = tempfile::tempdir().unwrap();
    (kind.make)(folder.path());
    let several = kind.damaged.len() > 1;
    let seed = |(n, file): (usize, &&str)| {
        let which = several.then_some(n as u8);
        let bytes = which.into_iter().chain(std::fs::read(folder.path().join(file)).unwrap()).collect();
        (file.replace('/', "_"), bytes)
    };
    kind.damaged.iter().enumerate().map(seed).collect()
}

/// A fuzz target's one call: `bytes` in the place of a file of kind `name`, which the first byte chooses where there are several.
pub fn read_damaged(name: &str, bytes: &[u8]) {
    static SAMPLE: OnceLock<(tempfile::TempDir, String)> = OnceLock::new();
    let kind = named(name);
    let (sample, sound) = SAMPLE.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let sample = folder.path().join("sample");
        std::fs::create_dir(&sample).unwrap();
        (kind.make)(&sample);
        copy(&sample, &folder.path().join("read"));
        let sound = (kind.read)(&folder.path().join("read")).expect("a valid sample");
        (folder, sound)
    });
    let (file, bytes) = match (kind.damaged, bytes) {
        ([file], _) => (file, bytes),
        (files, [first, rest @ ..]) => (&files[*first as usize % files.len()], rest),
        (_, []) => return,
    };
    let place = sample.path().join("read");
    let _ = std::fs::remove_dir_all(&place);
    copy(&sample.path().join("sample"), &place);
    std::fs::write(place.join(file), bytes).unwrap();
    match (kind.read)(&place) {
        Ok(found) => assert!(!kind.sealed || found == *sound, "damage was read as data"),
        Err(e) => assert!(is_refusal(kind, &e), "{e}"),
    }
}
