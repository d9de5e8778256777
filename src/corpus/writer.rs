//! Writes a corpus, shard by shard, and publishes it whole.
//!
//! Everything is written into a hidden folder beside the target (`.NAME.cells.partial`, locked against a second writer), flushed
//! to the disk, and renamed: under the final name there is a complete corpus or nothing. The tokens of the open shard go to a
//! spool file, since a safetensors header needs their number before their bytes; memory is bounded by the per-cell columns of
//! one shard. The bytes depend on the cells and the options alone.

use super::format::*;
use super::partial_folder::PartialFolder;
use super::spool::{Spool, SummingWriter, Sums};
use crate::digest::sha256;
use crate::disk::Output;
use crate::error::{Code, Error, Result};
use half::f16;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

/// An obs column to store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObsSpec {
    /// Column name.
    pub name: String,
    /// Storage.
    pub kind: ObsKind,
}

/// What a new corpus is made with.
#[derive(Debug, Clone)]
pub struct CorpusOptions {
    /// The vocabulary of the gene ids.
    pub vocab: VocabIdentity,
    /// The vocabulary file's bytes, copied into the folder as `vocab.tsv`, so that later commands need the corpus alone.
    pub vocab_file: Option<Vec<u8>>,
    /// Does every cell carry values?
    pub values: bool,
    /// Cells in a shard; 0 means [`CorpusOptions::SHARD_CELLS`].
    pub shard_cells: usize,
    /// Obs columns, in the order in which `CellRecord::obs` gives them.
    pub obs: Vec<ObsSpec>,
    /// Recorded in the manifest as it is. Keep time and machine out of it: equal cells give equal bytes.
    pub provenance: serde_json::Value,
}

impl CorpusOptions {
    /// Default cells in a shard: about 150 MB of tokens, so that a lost shard is cheap to make again and 100 million cells make
    /// 1,500 files.
    pub const SHARD_CELLS: usize = 65_536;
}

/// One value of an obs column.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ObsValue<'a> {
    /// Absent in the source.
    Missing,
    /// Of a categorical column.
    Category(&'a str),
    /// Of a numeric column.
    Number(f64),
}

/// One cell to store.
#[derive(Debug, Clone, Copy)]
pub struct CellRecord<'a> {
    /// The cell's name in its source; one line of text.
    pub id: &'a str,
    /// Gene ids in rank order, best first, without special tokens.
    pub gene: &'a [u32],
    /// Log-normalised expression ln(1 + 10⁴·x/total) per token; present exactly when the corpus stores values.
    pub value: Option<&'a [f16]>,
    /// Total count over all genes of the source.
    pub total_count: f32,
    /// One value per column of `CorpusOptions::obs`.
    pub obs: &'a [ObsValue<'a>],
}

/// Writes cells in order; nothing appears under the final name before [`CorpusWriter::finish`]. Dropped unfinished, it removes
/// what it wrote.
#[derive(Debug)]
pub struct CorpusWriter {
    folder: PartialFolder,
    options: CorpusOptions,
    vocab_sha256: Option<String>,
    open: OpenShard,
    done: Vec<ShardEntry>,
    /// Category names over all shards, by column.
    categories: Vec<BTreeSet<String>>,
    cells: u64,
}

impl CorpusWriter {
    /// Starts a corpus at `out`, which must not exist. A second writer on the same target is refused; what a killed one left
    /// behind is removed.
    pub fn create(out: &Path, mut options: CorpusOptions) -> Result<Self> {
        if options.shard_cells == 0 {
            options.shard_cells = CorpusOptions::SHARD_CELLS;
        }
        for (i, o) in options.obs.iter().enumerate() {
            if options.obs[..i].iter().any(|p| p.name == o.name) {
                return Err(Error::new(
                    Code::FlagConflict,
                    format!("obs column {:?} is asked for twice", o.name),
                ));
            }
        }
        let folder = PartialFolder::create(out)?;
        let vocab_sha256 = match &options.vocab_file {
            Some(bytes) => {
                folder.write_file(VOCAB, bytes)?;
                Some(sha256(bytes))
            }
            None => None,
        };
        let open = OpenShard::new(&folder, &options)?;
        let categories = vec![BTreeSet::new(); options.obs.len()];
        Ok(CorpusWriter { folder, options, vocab_sha256, open, done: Vec::new(), categories, cells: 0 })
    }

    /// Adds a cell. Errors (kind input) name the cell; the corpus is then unfinished and vanishes when dropped.
    pub fn push(&mut self, cell: &CellRecord<'_>) -> Result<()> {
        self.check(cell)?;
        if self.open.cells() == self.options.shard_cells {
            self.close_shard()?;
        }
        self.cells += 1;
        self.open.push(cell).map_err(|e| self.folder.failed("write cells", &e))
    }

    fn check(&self, cell: &CellRecord<'_>) -> Result<()> {
        let bad = |what: &str| {
            Error::new(Code::CellRefused, what).at(format!("cell {} ({:?})", self.cells, cell.id))
        };
        let o = &self.options;
        if let Some(&g) = cell.gene.iter().find(|&&g| g as usize >= o.vocab.len) {
            return Err(bad("a gene id is outside the vocabulary")
                .found(g)
                .wanted(format!("ids below {}", o.vocab.len)));
        }
        match cell.value {
            Some(v) if !o.values || v.len() != cell.gene.len() => {
                return Err(bad("values do not fit the cell").found(v.len()).wanted(if o.values {
                    cell.gene.len()
                } else {
                    0
                }));
            }
            Some(v) if v.iter().any(|x| !x.is_finite()) => return Err(bad("a value is not finite")),
            None if o.values => return Err(bad("the corpus stores values, this cell has none")),
            _ => {}
        }
        if cell.id.contains(['\n', '\r', '\0']) {
            return Err(bad("a cell name must be one line of text"));
        }
        if !cell.total_count.is_finite() || cell.total_count < 0.0 {
            return Err(bad("the total count is not a count").found(cell.total_count));
        }
        if self.cells >= u32::MAX as u64 {
            return Err(bad("too many cells for one corpus").wanted(u32::MAX));
        }
        let fits = |(spec, value): (&ObsSpec, &ObsValue<'_>)| {
            matches!(
                (spec.kind, value),
                (_, ObsValue::Missing)
                    | (ObsKind::Categorical, ObsValue::Category(_))
                    | (ObsKind::Numeric, ObsValue::Number(_))
            )
        };
        if cell.obs.len() != o.obs.len() || !o.obs.iter().zip(cell.obs).all(fits) {
            return Err(Error::bug("obs values do not fit the columns of the corpus")
                .at(format!("cell {}", self.cells))
                .found(format!("{:?}", cell.obs))
                .wanted(format!("{:?}", o.obs)));
        }
        Ok(())
    }

    fn close_shard(&mut self) -> Result<()> {
        let file = shard_name(self.done.len());
        let entry = self.open.close(&self.folder, file, &self.options, &mut self.categories)?;
        self.done.push(entry);
        Ok(())
    }

    /// Closes the last shard, writes the manifest and publishes the folder under its final name.
    pub fn finish(mut self) -> Result<Manifest> {
        if self.open.cells() > 0 {
            self.close_shard()?;
        }
        let columns = (self.options.obs.iter().zip(&mut self.categories))
            .map(|(o, names)| Column {
                name: o.name.clone(),
                kind: o.kind,
                categories: std::mem::take(names).into_iter().collect(),
            })
            .collect();
        let manifest = Manifest::seal(
            self.options.vocab.clone(),
            self.vocab_sha256.take(),
            self.options.values,
            columns,
            std::mem::take(&mut self.done),
            self.options.provenance.clone(),
        );
        self.folder.write_file(MANIFEST, &manifest.to_bytes())?;
        self.folder.publish()?;
        Ok(manifest)
    }
}

/// An obs column of the open shard.
#[derive(Debug)]
enum ObsBuffer {
    Numeric(Vec<f64>),
    /// Codes by first appearance; sorted names replace them when the shard closes.
    Categorical {
        codes: Vec<i32>,
        code_of: HashMap<String, i32>,
    },
}

/// The shard being filled: per-cell columns in memory, tokens in spool files.
#[derive(Debug)]
struct OpenShard {
    narrow: bool,
    cell_start: Vec<u64>,
    cell_id_start: Vec<u64>,
    cell_id: Vec<u8>,
    total_count: Vec<f32>,
    obs: Vec<ObsBuffer>,
    gene: Spool,
    value: Option<Spool>,
    /// Bytes of one cell's genes in their stored width.
    narrowed: Vec<u16>,
}

impl OpenShard {
    fn new(folder: &PartialFolder, options: &CorpusOptions) -> Result<Self> {
        Ok(OpenShard {
            narrow: options.vocab.narrow(),
            cell_start: vec![0],
            cell_id_start: vec![0],
            cell_id: Vec::new(),
            total_count: Vec::new(),
            obs: options
                .obs
                .iter()
                .map(|o| match o.kind {
                    ObsKind::Numeric => ObsBuffer::Numeric(Vec::new()),
                    ObsKind::Categorical => {
                        ObsBuffer::Categorical { codes: Vec::new(), code_of: HashMap::new() }
                    }
                })
                .collect(),
            gene: Spool::create(folder, "gene.spool")?,
            value: if options.values { Some(Spool::create(folder, "value.spool")?) } else { None },
            narrowed: Vec::new(),
        })
    }

    fn cells(&self) -> usize {
        self.total_count.len()
    }

    fn push(&mut self, cell: &CellRecord<'_>) -> std::io::Result<()> {
        if self.narrow {
            self.narrowed.clear();
            self.narrowed.extend(cell.gene.iter().map(|&g| g as u16));
            self.gene.write(bytemuck::cast_slice(&self.narrowed))?;
        } else {
            self.gene.write(bytemuck::cast_slice(cell.gene))?;
        }
        if let (Some(spool), Some(value)) = (&mut self.value, cell.value) {
            spool.write(bytemuck::cast_slice(value))?;
        }
        self.cell_start.push(self.cell_start[self.cells()] + cell.gene.len() as u64);
        self.cell_id.extend_from_slice(cell.id.as_bytes());
        self.cell_id_start.push(self.cell_id.len() as u64);
        self.total_count.push(cell.total_count);
        for (buffer, value) in self.obs.iter_mut().zip(cell.obs) {
            match buffer {
                ObsBuffer::Numeric(numbers) => numbers.push(match value {
                    ObsValue::Number(x) => *x,
                    _ => f64::NAN,
                }),
                ObsBuffer::Categorical { codes, code_of } => codes.push(match value {
                    ObsValue::Category(name) => match code_of.get(*name) {
                        Some(&code) => code,
                        None => {
                            let code = code_of.len() as i32;
                            code_of.insert(name.to_string(), code);
                            code
                        }
                    },
                    _ => -1,
                }),
            }
        }
        Ok(())
    }

    /// Writes the shard file and empties the buffers for the next one.
    fn close(
        &mut self,
        folder: &PartialFolder,
        file: String,
        options: &CorpusOptions,
        union: &mut [BTreeSet<String>],
    ) -> Result<ShardEntry> {
        let (cells, tokens) = (self.cells() as u64, self.cell_start[self.cells()]);
        let mut categories = BTreeMap::new();
        for ((buffer, spec), union) in self.obs.iter_mut().zip(&options.obs).zip(union) {
            if let ObsBuffer::Categorical { codes, code_of } = buffer {
                let names = sort_codes(codes, std::mem::take(code_of));
                union.extend(names.iter().cloned());
                categories.insert(spec.name.clone(), names);
            }
        }
        let columns: Vec<Column> = (options.obs.iter())
            .map(|o| Column { name: o.name.clone(), kind: o.kind, categories: Vec::new() })
            .collect();
        let mut specs: Vec<(TensorSpec, u64)> = tensors(&columns, self.narrow, options.values, cells, tokens)
            .into_iter()
            .map(|t| {
                let len = t.len.unwrap_or(0);
                (t, len)
            })
            .collect();
        // Names are padded so that the checksum table behind them is aligned.
        let before: u64 = specs.iter().map(|(t, n)| n * element_bytes(t.dtype)).sum();
        let payload = (before + self.cell_id.len() as u64).next_multiple_of(8);
        self.cell_id.resize((payload - before) as usize, 0);
        let [.., (_, names), (_, table)] = &mut specs[..] else { unreachable!("a shard has tensors") };
        *names = payload - before;
        *table = payload.div_ceil(BLOCK_BYTES as u64);
        let metadata = ShardMetadata { vocab_digest: options.vocab.digest.clone(), categories };

        let path = folder.path.join(&file);
        let mut assemble = || -> std::io::Result<(Output, Sums)> {
            let mut out = SummingWriter::create(&path)?;
            out.frame(&shard_header(&metadata, &specs))?;
            out.payload(bytemuck::cast_slice(&self.cell_start))?;
            out.payload(bytemuck::cast_slice(&self.cell_id_start))?;
            for buffer in &self.obs {
                if let ObsBuffer::Numeric(numbers) = buffer {
                    out.payload(bytemuck::cast_slice(numbers))?;
                }
            }
            out.payload(bytemuck::cast_slice(&self.total_count))?;
            for buffer in &self.obs {
                if let ObsBuffer::Categorical { codes, .. } = buffer {
                    out.payload(bytemuck::cast_slice(codes))?;
                }
            }
            self.gene.drain(&mut out)?;
            if let Some(value) = &mut self.value {
                value.drain(&mut out)?;
            }
            out.payload(&self.cell_id)?;
            out.finish()
        };
        let (written, sums) = assemble().map_err(|e| folder.failed("write a shard", &e))?;
        written.sync().map_err(|e| folder.failed("flush a shard to the disk", &e))?;

        self.cell_start.truncate(1);
        self.cell_id_start.truncate(1);
        self.cell_id.clear();
        self.total_count.clear();
        for buffer in &mut self.obs {
            match buffer {
                ObsBuffer::Numeric(numbers) => numbers.clear(),
                ObsBuffer::Categorical { codes, .. } => codes.clear(),
            }
        }
        Ok(ShardEntry {
            file,
            cells,
            tokens,
            bytes: sums.bytes,
            sha256: sums.sha256,
            frame_crc32c: sums.frame_crc32c,
        })
    }
}

/// Replaces codes by first appearance with codes into the sorted names, which it returns.
fn sort_codes(codes: &mut [i32], code_of: HashMap<String, i32>) -> Vec<String> {
    let mut names: Vec<(String, i32)> = code_of.into_iter().collect();
    names.sort();
    let mut sorted_code = vec![0; names.len()];
    for (new, (_, old)) in names.iter().enumerate() {
        sorted_code[*old as usize] = new as i32;
    }
    for code in codes.iter_mut().filter(|c| **c >= 0) {
        *code = sorted_code[*code as usize];
    }
    names.into_iter().map(|(name, _)| name).collect()
}
