//! From an `.h5ad` file to packed batches: what a corpus is, and how the network gets its cells.
//!
//!     cargo run --release --example pack_and_read
//!
//! A cell is a run of genes in rank order: counts, divided by the cell's total and by each gene's median over the data, sorted.
//! On disk, in the batch and in the kernels that is one layout, CSR: `cell_start (C + 1)` over packed `gene (N)`. There is no
//! padding anywhere, so nothing has to be masked.

use cellrefine::cli::Progress;
use cellrefine::corpus::{Batch, BatchOptions, Corpus, Packer};
use cellrefine::error::{Error, Result};
use cellrefine::import::medians::{BuildOptions, build};
use cellrefine::import::pack::{PackOptions, pack};
use std::path::PathBuf;
use std::sync::Arc;

fn main() -> Result<()> {
    let cells = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/data/pbmc700/pbmc700.h5ad"));
    let folder = std::env::temp_dir().join(format!("cellrefine-pack-{}", std::process::id()));
    std::fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, "make a folder", &e))?;

    // A vocabulary is gene names with their medians. Geneformer's own would come from `genes::dictionary`.
    let inputs = [cells];
    let vocab = build(&inputs, &BuildOptions::default())?.vocab;
    println!("vocabulary: {} tokens, digest {}", vocab.len(), &vocab.digest()[..12]);

    // Packing reads the file in blocks, in bounded memory, and says what it made of the genes.
    let report =
        pack(&inputs, &vocab, &folder.join("x.cells"), &PackOptions::default(), &Progress::silent())?;
    println!("packed {} cells, {} tokens", report.manifest.cells, report.manifest.tokens);

    // Opening maps the files and checks them; reading a cell copies nothing.
    let corpus = Arc::new(Corpus::open(&folder.join("x.cells"))?);
    let label = corpus.categorical("cell_type")?;
    for cell in [0, 1, 2] {
        let genes = corpus.genes(cell)?;
        let first: Vec<&str> = genes.iter().take(5).map(|token| vocab.name(token)).collect();
        let label = &label.categories[label.codes[cell] as usize];
        println!("{:<18} {label:<14} {:>3} genes: {} …", corpus.cell_id(cell)?, genes.len(), first.join(" "));
    }

    // A batch is as many whole cells as fit, one after the other.
    let room = BatchOptions { cells: 64, tokens: 4096, max_tokens: 256, cls: None, eos: None, values: false };
    let mut packer = Packer::in_order(corpus.clone(), (0..corpus.cells() as u32).collect(), room)?;
    let (mut batch, mut batches, mut tokens) = (Batch::default(), 0, 0);
    while packer.fill(&mut batch)? {
        assert_eq!(*batch.cell_start.last().unwrap_or(&0) as usize, batch.tokens());
        (batches, tokens) = (batches + 1, tokens + batch.tokens());
    }
    println!("{batches} batches of at most 4096 tokens hold {tokens} tokens and no padding");

    std::fs::remove_dir_all(&folder).map_err(|e| Error::io(&folder, "remove the folder", &e))
}
