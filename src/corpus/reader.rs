//! Maps a corpus into memory: cells by index, without a copy.
//!
//! Opening checks what every later read relies on (see `shard`); the genes of a cell are then two loads and a slice. All the
//! shards lie side by side under one cell index, 0 up to [`Corpus::cells`], in packing order.

use super::format::*;
use super::shard::Shard;
use crate::digest::sha256;
use crate::error::{Code, Error, Result, nearest};
use crate::genes::{Vocab, vocab};
use crate::whole_file;
use half::f16;
use rayon::prelude::*;
use std::path::{Path, PathBuf};

/// The gene ids of a cell, in rank order, borrowed from the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Genes<'a> {
    /// Vocabularies of at most 65,536 ids.
    U16(&'a [u16]),
    /// Larger vocabularies.
    U32(&'a [u32]),
}

impl<'a> Genes<'a> {
    /// Number of genes.
    #[inline]
    pub fn len(&self) -> usize {
        match self {
            Genes::U16(g) => g.len(),
            Genes::U32(g) => g.len(),
        }
    }
    /// No genes at all?
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The id at rank `rank`.
    #[inline]
    pub fn get(&self, rank: usize) -> u32 {
        match self {
            Genes::U16(g) => g[rank] as u32,
            Genes::U32(g) => g[rank],
        }
    }
    /// The ids, best rank first.
    #[inline]
    pub fn iter(self) -> impl Iterator<Item = u32> + 'a {
        (0..self.len()).map(move |rank| self.get(rank))
    }
    /// The ids as a new vector.
    pub fn to_vec(self) -> Vec<u32> {
        self.iter().collect()
    }
}

/// A categorical obs column of the whole corpus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Categorical {
    /// Index into `categories` per cell; −1 is missing.
    pub codes: Vec<i32>,
    /// Sorted names.
    pub categories: Vec<String>,
}

/// An open corpus: cells by index, 0 up to [`Corpus::cells`], in the order in which they were packed.
#[derive(Debug)]
pub struct Corpus {
    root: PathBuf,
    manifest: Manifest,
    shards: Vec<Shard>,
    /// First cell of each shard, and the number of cells at the end (shards + 1).
    first_cell: Vec<usize>,
    /// Does the corpus outgrow half of this machine's memory, so that pages once read are likely to be gone?
    outgrows_memory: bool,
}

/// A manifest larger than this is refused before it is read.
const MANIFEST_MAX_BYTES: u64 = 1 << 30;

impl Corpus {
    /// Opens and checks the folder at `path`. Errors are of kind input and name the file.
    pub fn open(path: &Path) -> Result<Corpus> {
        if !path.is_dir() {
            return Err(Error::new(
                Code::CorpusMissing,
                if path.exists() { "a corpus is a folder, this is a file" } else { "no such corpus" },
            )
            .at(path.display())
            .wanted("a folder NAME.cells with corpus.json in it")
            .next("make one with `cellrefine pack IN.h5ad --vocab V.tsv --out NAME.cells`"));
        }
        let manifest = read_manifest(path)?;
        let shards: Vec<Result<Shard>> =
            manifest.shards.par_iter().map(|entry| Shard::open(path, entry, &manifest)).collect();
        let shards = shards.into_iter().collect::<Result<Vec<_>>>()?;
        let mut first_cell = vec![0];
        for s in &shards {
            first_cell.push(first_cell[first_cell.len() - 1] + s.cells);
        }
        let bytes: u64 = manifest.shards.iter().map(|s| s.bytes).sum();
        Ok(Corpus {
            root: path.into(),
            outgrows_memory: bytes > physical_memory_bytes() / 2,
            manifest,
            shards,
            first_cell,
        })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.root
    }
    /// Number of cells.
    pub fn cells(&self) -> usize {
        self.manifest.cells as usize
    }
    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        self.manifest.tokens
    }
    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }
    /// Digest that names the cells.
    pub fn digest(&self) -> &str {
        &self.manifest.digest
    }

    /// Bytes of the vocabulary file that travels with the corpus; an error where none does or its digest differs.
    pub fn vocab_file(&self) -> Result<Vec<u8>> {
        let path = self.root.join(VOCAB);
        let Some(wanted) = &self.manifest.vocab_sha256 else {
            return Err(Error::new(
                Code::VocabularyFile,
                "this corpus was packed without its vocabulary file",
            )
            .at(self.root.display())
            .next("pack it again with --vocab V.tsv"));
        };
        let bytes = whole_file::read(&path, "read the corpus's vocabulary", vocab::MAX_BYTES)
            .map_err(|e| e.next("copy the folder again"))?;
        let found = sha256(&bytes);
        if found != *wanted {
            return Err(Error::new(Code::VocabularyFile, "the corpus's vocabulary file was changed")
                .at(path.display())
                .found(found)
                .wanted(wanted)
                .next("copy the corpus folder again"));
        }
        Ok(bytes)
    }

    /// The vocabulary that travels with the corpus, checked against the manifest.
    pub fn vocab(&self) -> Result<Vocab> {
        self.vocab_file()?;
        let vocab = Vocab::load(self.root.join(VOCAB))?;
        let wanted = &self.manifest.vocabulary;
        if vocab.digest() != wanted.digest || vocab.len() != wanted.len {
            return Err(Error::new(
                Code::VocabularyMismatch,
                "the vocabulary file is not the one of the corpus's gene ids",
            )
            .at(self.root.join(VOCAB).display())
            .found(format!("digest {}, {} ids", vocab.digest(), vocab.len()))
            .wanted(format!("digest {}, {} ids", wanted.digest, wanted.len)));
        }
        Ok(vocab)
    }

    /// Reads everything and checks every block, every digest and every text. `progress` is called with bytes done.
    pub fn verify_with(&self, progress: &(dyn Fn(u64) + Sync)) -> Result<()> {
        if self.manifest.vocab_sha256.is_some() {
            self.vocab_file()?;
        }
        for (shard, entry) in self.shards.iter().zip(&self.manifest.shards) {
            let failed: Vec<Error> = (0..shard.blocks())
                .into_par_iter()
                .filter_map(|b| {
                    progress(BLOCK_BYTES as u64);
                    shard.prove_block(b).err()
                })
                .collect();
            if let Some(first) = failed.first() {
                let more = failed.len() - 1;
                return Err(if more == 0 {
                    first.clone()
                } else {
                    first.clone().next(format!(
                        "copy the shard again, or pack it again ({more} more damaged blocks in it)"
                    ))
                });
            }
            let sha256 = shard.sha256();
            if sha256 != entry.sha256 {
                return Err(Error::new(Code::ShardDigest, "the shard's digest differs from the manifest's")
                    .at(shard.path().display())
                    .found(sha256)
                    .wanted(&entry.sha256)
                    .next("copy the shard again, or pack it again"));
            }
            for cell in 0..shard.cells {
                shard.cell_id(cell)?;
            }
        }
        for column in &self.manifest.columns {
            if column.kind == ObsKind::Categorical {
                self.categorical(&column.name)?;
            }
        }
        Ok(())
    }

    /// Reads everything and checks every block, every digest and every text.
    pub fn verify(&self) -> Result<()> {
        self.verify_with(&|_| ())
    }

    /// The shard of `cell` and its index there.
    #[inline]
    pub(super) fn locate(&self, cell: usize) -> (&Shard, usize) {
        assert!(cell < self.cells(), "cell {cell} of {}", self.cells());
        let s = if self.shards.len() == 1 { 0 } else { self.first_cell.partition_point(|&f| f <= cell) - 1 };
        (&self.shards[s], cell - self.first_cell[s])
    }

    /// Number of genes of `cell`. Panics where `cell` is not below [`Corpus::cells`], as all per-cell calls do.
    #[inline]
    pub fn len_of(&self, cell: usize) -> usize {
        let (shard, i) = self.locate(cell);
        let starts = shard.starts();
        (starts[i + 1] - starts[i]) as usize
    }

    /// Number of genes of the longest cell, from the offset tables alone.
    pub fn longest_cell(&self) -> usize {
        let longest = |s: &Shard| s.starts().windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0);
        self.shards.par_iter().map(longest).max().unwrap_or(0) as usize
    }

    /// The genes of `cell`. The error is a failed checksum, found on the first touch of the bytes.
    #[inline]
    pub fn genes(&self, cell: usize) -> Result<Genes<'_>> {
        let (shard, i) = self.locate(cell);
        let span = shard.gene_span(i);
        Ok(if self.manifest.vocabulary.narrow() {
            Genes::U16(shard.read(span)?)
        } else {
            Genes::U32(shard.read(span)?)
        })
    }

    /// The values of `cell`, parallel to its genes; `None` where the corpus stores none.
    #[inline]
    pub fn values(&self, cell: usize) -> Result<Option<&[f16]>> {
        let (shard, i) = self.locate(cell);
        shard.value_span(i).map(|span| shard.read(span)).transpose()
    }

    /// Total count of `cell` over all genes of its source.
    pub fn total_count(&self, cell: usize) -> Result<f32> {
        let (shard, i) = self.locate(cell);
        shard.total_count(i)
    }

    /// Total counts of all cells (C).
    pub fn total_counts(&self) -> Result<Vec<f32>> {
        let mut all = Vec::with_capacity(self.cells());
        for s in &self.shards {
            all.extend_from_slice(s.total_counts()?);
        }
        Ok(all)
    }

    /// Name of `cell` in its source.
    pub fn cell_id(&self, cell: usize) -> Result<&str> {
        let (shard, i) = self.locate(cell);
        shard.cell_id(i)
    }

    fn column(&self, name: &str, kind: ObsKind) -> Result<usize> {
        let columns = &self.manifest.columns;
        let Some(at) = columns.iter().position(|c| c.name == name) else {
            let names: Vec<&str> = columns.iter().map(|c| c.name.as_str()).collect();
            let e = Error::new(Code::ObsMissing, format!("the corpus has no obs column {name:?}"))
                .at(self.root.display())
                .found(if names.is_empty() { "no columns".to_string() } else { names.join(", ") });
            return Err(match nearest(name, names) {
                Some(near) => e.next(format!("did you mean {near:?}?")),
                None => e.next(format!("pack the corpus again with --obs {name}")),
            });
        };
        if columns[at].kind != kind {
            let word = |k| if k == ObsKind::Categorical { "categorical" } else { "numeric" };
            return Err(Error::new(
                Code::ObsType,
                format!("obs column {name:?} is {}", word(columns[at].kind)),
            )
            .at(self.root.display())
            .wanted(format!("a {} column", word(kind)))
            .next("name another column; `cellrefine inspect` lists them"));
        }
        Ok(at)
    }

    /// The categorical column `column`; where it is absent the error lists the columns and the nearest name.
    pub fn categorical(&self, column: &str) -> Result<Categorical> {
        let at = self.column(column, ObsKind::Categorical)?;
        let categories = self.manifest.columns[at].categories.clone();
        let mut codes = Vec::with_capacity(self.cells());
        for s in &self.shards {
            s.codes_into(at, categories.len(), &mut codes)?;
        }
        Ok(Categorical { codes, categories })
    }

    /// The numeric column `column`; NaN is missing.
    pub fn numeric(&self, column: &str) -> Result<Vec<f64>> {
        let at = self.column(column, ObsKind::Numeric)?;
        let mut numbers = Vec::with_capacity(self.cells());
        for s in &self.shards {
            numbers.extend_from_slice(s.obs::<f64>(at)?);
        }
        Ok(numbers)
    }

    /// Asks the kernel for the pages of these cells ahead of their use. Cells in blocks that were read before cost two loads and
    /// no system call, unless the corpus outgrows memory.
    pub fn will_need(&self, cells: &[u32]) {
        for &cell in cells {
            let (shard, i) = self.locate(cell as usize);
            for span in [Some(shard.gene_span(i)), shard.value_span(i)].into_iter().flatten() {
                if !span.is_empty() && (self.outgrows_memory || !shard.is_proved(&span)) {
                    shard.will_need(&span);
                }
            }
        }
    }
}

/// Reads and checks `corpus.json` of the folder at `root`.
pub fn read_manifest(root: &Path) -> Result<Manifest> {
    let path = root.join(MANIFEST);
    let bytes = whole_file::read(&path, "read the corpus manifest", MANIFEST_MAX_BYTES).map_err(|e| {
        let e = match e.code() {
            Code::FileMissing => {
                Error::new(Code::CorpusMissing, "this folder is no corpus: it has no manifest")
                    .at(path.display())
            }
            Code::FileTooLarge => return e,
            _ => e,
        };
        e.wanted("a folder that `cellrefine pack` wrote")
            .next("check the path; an interrupted pack leaves no corpus behind")
    })?;
    Manifest::parse(&bytes, &path.display().to_string())
}

fn physical_memory_bytes() -> u64 {
    // SAFETY: `sysconf` reads two constants of the system.
    let (pages, page) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    pages.max(0) as u64 * page.max(0) as u64
}
