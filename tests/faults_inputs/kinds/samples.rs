//! Cells and corpora: `.h5ad` in its storages, 10x, MTX, Geneformer's data sets, and what `pack` makes of them.

#[path = "../../common/cells.rs"]
mod cells;
#[path = "../../common/h5ad.rs"]
mod h5ad;

use super::{Found, golden};
use cellrefine::cli::Progress;
use cellrefine::corpus::merge::merge;
use cellrefine::corpus::{Batch, BatchOptions, Corpus, Packer};
use cellrefine::error::Result;
use cellrefine::eval::h5ad::{H5adCopy, RowLabels};
use cellrefine::eval::provenance::Provenance;
use cellrefine::genes::Vocab;
use cellrefine::import::medians::{BuildOptions, build};
use cellrefine::import::pack::{PackOptions, pack};
use std::fmt::Write as _;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

const GENES: usize = 40;

/// Thirty cells of forty genes.
fn entries() -> Vec<(usize, usize, f32)> {
    (0..30)
        .flat_map(|r| {
            (0..GENES)
                .filter(move |c| (r * 7 + c * 3) % 5 == 0)
                .map(move |c| (r, c, ((r + c) % 9 + 1) as f32))
        })
        .collect()
}

fn small_vocab(folder: &Path) {
    let mut tokens = vec!["<pad>".to_string(), "<mask>".into()];
    tokens.extend((0..GENES).map(|g| format!("ENSG{g:011}")));
    let median = (0..tokens.len()).map(|id| if id < 2 { 0.0 } else { 1.5 }).collect();
    Vocab::from_parts(tokens, median, Vec::new()).unwrap().save(folder.join("V.tsv"), &[]).unwrap();
}

fn labelled(spec: h5ad::Spec) -> h5ad::Spec {
    h5ad::Spec { label: Some((vec!["x", "y", "z"], (0..30).map(|r| r % 4 - 1).collect())), chunk: 64, ..spec }
}

pub fn h5ad_csr(folder: &Path) {
    small_vocab(folder);
    labelled(h5ad::Spec::csr(30, GENES, &entries())).write(&folder.join("x.h5ad"));
}

pub fn h5ad_csc(folder: &Path) {
    small_vocab(folder);
    labelled(h5ad::Spec::csc(30, GENES, &entries())).write(&folder.join("x.h5ad"));
}

pub fn h5ad_dense(folder: &Path) {
    small_vocab(folder);
    let mut dense = vec![0.0; 30 * GENES];
    entries().into_iter().for_each(|(r, c, v)| dense[r * GENES + c] = v);
    labelled(h5ad::Spec::csr(30, GENES, &entries())).write_dense(&folder.join("x.h5ad"), &dense);
}

/// A file that anndata wrote, and the vocabulary of its genes.
fn written_by_anndata(folder: &Path, name: &str) {
    std::fs::copy(golden("import/V.tsv"), folder.join("V.tsv")).unwrap();
    unpack(&format!("import/{name}.h5ad.gz"), &folder.join("x.h5ad"));
}

fn unpack(name: &str, to: &Path) {
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(std::fs::File::open(golden(name)).unwrap()).read_to_end(&mut bytes).unwrap();
    std::fs::write(to, bytes).unwrap();
}

pub fn h5ad_nullable(folder: &Path) {
    written_by_anndata(folder, "nullable");
}

pub fn h5ad_lzf(folder: &Path) {
    written_by_anndata(folder, "csr_int64_lzf");
}

pub fn h5ad_legacy(folder: &Path) {
    written_by_anndata(folder, "legacy_compound");
}

pub fn h5ad_categories(folder: &Path) {
    written_by_anndata(folder, "legacy_categories");
}

fn tenx(folder: &Path, name: &str) {
    std::fs::copy(golden("import/V.tsv"), folder.join("V.tsv")).unwrap();
    unpack(&format!("formats/{name}.h5.gz"), &folder.join("x.h5"));
}

pub fn tenx_v2(folder: &Path) {
    tenx(folder, "v2");
}

pub fn tenx_v3(folder: &Path) {
    tenx(folder, "v3");
}

fn golden_folder(folder: &Path, name: &str) {
    std::fs::copy(golden("import/V.tsv"), folder.join("V.tsv")).unwrap();
    super::copy(&golden("formats").join(name), &folder.join("x"));
}

pub fn mtx(folder: &Path) {
    golden_folder(folder, "mtx_v2");
}

pub fn mtx_gzip(folder: &Path) {
    golden_folder(folder, "mtx_v3");
}

pub fn dataset(folder: &Path) {
    golden_folder(folder, "list.dataset");
}

pub fn dataset_large_list(folder: &Path) {
    golden_folder(folder, "large_list.dataset");
}

pub fn dataset_files(folder: &Path) {
    golden_folder(folder, "int32_three_files.dataset");
}

/// Packs a file; what comes of it must be a corpus without fault, and of what is refused nothing may be left.
fn packed(folder: &Path, input: &str) -> Found {
    let vocab = Vocab::load(folder.join("V.tsv"))?;
    let out = folder.join("out");
    std::fs::create_dir(&out).unwrap();
    let options = PackOptions { values: input != "x", memory_bytes: 64 << 20, ..PackOptions::default() };
    match pack(&[folder.join(input)], &vocab, &out.join("o.cells"), &options, &Progress::silent()) {
        Ok(_) => read(&out.join("o.cells")).inspect_err(|e| panic!("what was packed cannot be read: {e}")),
        Err(e) => {
            assert_eq!(std::fs::read_dir(&out).unwrap().count(), 0, "left behind after: {e}");
            Err(e)
        }
    }
}

pub fn pack_h5ad(folder: &Path) -> Found {
    packed(folder, "x.h5ad")
}

pub fn pack_tenx(folder: &Path) -> Found {
    packed(folder, "x.h5")
}

pub fn pack_folder(folder: &Path) -> Found {
    packed(folder, "x")
}

pub fn medians(folder: &Path) -> Found {
    let options = BuildOptions { memory_bytes: 64 << 20, ..BuildOptions::default() };
    Ok(build(&[folder.join("x.h5ad")], &options)?.vocab.digest().to_string())
}

pub fn h5ad_to_extend(folder: &Path) {
    h5ad_csr(folder);
    packed(folder, "x.h5ad").unwrap();
}

/// Adds an embedding and labels to a copy of the file.
pub fn extend_h5ad(folder: &Path) -> Found {
    let (source, out) = (folder.join("x.h5ad"), folder.join("copy.h5ad"));
    let corpus = Corpus::open(&folder.join("out/o.cells"))?;
    let plan = H5adCopy::plan(&source, &out, &corpus)?;
    let rows = plan.cells().len();
    let labels = RowLabels {
        names: vec!["x".into()],
        codes: vec![0; rows],
        scores: vec![0.5; rows],
        origin: "made up".into(),
    };
    let text = String::new;
    let provenance = Provenance {
        checkpoint: text(),
        checkpoint_sha256: text(),
        layer: 0,
        pool: "cls",
        dtype: "f32",
        max_tokens: 8,
        corpus: text(),
        corpus_digest: text(),
        vocabulary_digest: text(),
    };
    let done = plan.write(vec![0; rows * 2 * 4], 2, Some(&labels), &provenance);
    assert_eq!(out.exists(), done.is_ok(), "a copy that was refused");
    done.map(|()| text())
}

pub fn corpus(folder: &Path) {
    let vocab: Vec<u8> = std::fs::read(golden("import/V.tsv")).unwrap();
    let known = Vocab::load(golden("import/V.tsv")).unwrap();
    let mut options = cells::options(known.len(), true, 30);
    options.vocab.digest = known.digest().to_string();
    options.vocab_file = Some(vocab);
    cells::write(&folder.join("x.cells"), &cells::cells(50, known.len() as u32, 12, 5), options);
}

/// A shard of several checksum blocks.
pub fn corpus_blocks(folder: &Path) {
    cells::write(
        &folder.join("x.cells"),
        &cells::cells(120, 60_000, 900, 5),
        cells::options(60_000, false, 0),
    );
}

/// Two parts to be merged.
pub fn corpus_parts(folder: &Path) {
    for (name, seed) in [("a.cells", 1), ("b.cells", 2)] {
        let mut made = cells::cells(20, 200, 9, seed);
        made.iter_mut().for_each(|c| c.id = format!("{name}-{}", c.id));
        cells::write(&folder.join(name), &made, cells::options(200, true, 0));
    }
}

/// Everything that is read of a corpus, cell by cell.
fn read(path: &Path) -> Found {
    let corpus = Corpus::open(path)?;
    let mut all = format!("{} {}\n", corpus.digest(), corpus.manifest().provenance);
    // The larger samples have made-up vocabularies.
    all += &match corpus.manifest().vocabulary.len {
        ..100 => corpus.vocab()?.digest().to_string(),
        _ => format!("{:?}", corpus.vocab_file()?),
    };
    for cell in 0..corpus.cells() {
        let (genes, values) = (corpus.genes(cell)?.to_vec(), corpus.values(cell)?);
        let _ = writeln!(all, "{} {genes:?} {values:?} {}", corpus.cell_id(cell)?, corpus.total_count(cell)?);
    }
    for column in &corpus.manifest().columns {
        let _ = match column.kind {
            cellrefine::corpus::ObsKind::Categorical => {
                write!(all, "{:?}", corpus.categorical(&column.name)?)
            }
            cellrefine::corpus::ObsKind::Numeric => write!(all, "{:?}", corpus.numeric(&column.name)?),
        };
    }
    Ok(all)
}

/// The batches that training makes of it, in the order of the corpus.
fn batches(path: &Path) -> Result<()> {
    let corpus = Arc::new(Corpus::open(path)?);
    let values = corpus.manifest().values;
    let options = BatchOptions { cells: 16, tokens: 4096, max_tokens: 64, cls: Some(1), eos: None, values };
    let cells = (0..corpus.cells() as u32).collect();
    let (mut packer, mut batch) = (Packer::in_order(corpus, cells, options)?, Batch::default());
    while packer.fill(&mut batch)? {}
    Ok(())
}

/// Reads a corpus on three ways, which must agree on whether it is sound: cell by cell, by batches, by `verify`.
pub fn read_corpus(folder: &Path) -> Found {
    let path = folder.join("x.cells");
    let found = read(&path);
    let verified = Corpus::open(&path).and_then(|c| c.verify());
    match (&found, &verified) {
        (Ok(_), Ok(())) => {
            batches(&path).unwrap_or_else(|e| panic!("batches cannot be made of a sound corpus: {e}"))
        }
        (Ok(_), Err(e)) => panic!("damage that only --verify sees: {e}"),
        (Err(e), Ok(())) => panic!("damage that --verify does not see: {e}"),
        _ => {}
    }
    found
}

pub fn merge_corpora(folder: &Path) -> Found {
    let out = folder.join("merged.cells");
    match merge(&[folder.join("a.cells"), folder.join("b.cells")], &out, &|_| ()) {
        Err(e) => {
            assert!(!out.exists(), "left behind after: {e}");
            Err(e)
        }
        Ok(_) => read(&out),
    }
}
