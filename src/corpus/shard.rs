//! One mapped shard: checked when opened, its payload checked block by block on the first touch.
//!
//! Open proves the file size, the header (by CRC and by safetensors' own rules), the tensor list, and that `cell_start` and
//! `cell_id_start` never fall. The remaining bytes are proved when they are first read: one bit per 64 KiB block says "its
//! CRC-32C is right and every gene in it is below the vocabulary". So opening a terabyte is quick, a read of a proved block costs
//! one load, and no byte reaches a batch unproved.

use super::format::*;
use crate::digest::sha256;
use crate::error::{Code, Error, Result};
use bytemuck::Pod;
use memmap2::Mmap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Bytes of a tensor in the file.
type Span = Range<usize>;

#[derive(Debug)]
pub(super) struct Shard {
    map: Mmap,
    path: PathBuf,
    pub cells: usize,
    cell_start: Span,
    cell_id_start: Span,
    total_count: Span,
    gene: Span,
    value: Option<Span>,
    cell_id: Span,
    /// Parallel to the manifest's columns.
    obs: Vec<Span>,
    /// Code in the shard -> code in the corpus, per column; empty where they agree or the column is numeric.
    pub code_map: Vec<Vec<i32>>,
    payload: Span,
    block_crc32c: Span,
    /// Bit per block: proved.
    proved: Box<[AtomicU64]>,
    narrow: bool,
    vocab: u32,
}

impl Shard {
    /// Maps and checks `entry` of the corpus in `root`.
    pub fn open(root: &Path, entry: &ShardEntry, manifest: &Manifest) -> Result<Shard> {
        let path = root.join(&entry.file);
        let bad = |what: &str| {
            Error::new(Code::ShardHeader, what)
                .at(path.display())
                .next("copy the shard again, or pack the corpus again from its source")
        };
        let link = path.symlink_metadata().map_err(|e| {
            Error::io(&path, "open a shard that the manifest lists", &e)
                .next("copy the whole corpus folder again, or pack it again from its source")
        })?;
        if !link.is_file() {
            return Err(bad("a shard must be a plain file of the corpus folder").found("a link or a folder"));
        }
        let file = File::open(&path).map_err(|e| Error::io(&path, "open a shard", &e))?;
        if link.len() != entry.bytes {
            let what =
                if link.len() < entry.bytes { "the shard is truncated" } else { "the shard is too long" };
            return Err(bad(what)
                .found(format!("{} bytes", link.len()))
                .wanted(format!("{} bytes, as the manifest says", entry.bytes)));
        }
        // SAFETY: the map is read-only and private to this process's view; that nobody shrinks or rewrites the file while it is
        // open is the one thing the format asks of its surroundings. A shrunk file ends the process by `faults::guard`, with
        // a message, and never yields wrong bytes unnoticed on first touch, since blocks are checked against their CRC.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(&path, "map a shard into memory", &e))?;
        super::faults::guard(map.as_ptr() as usize, map.len(), &path);

        let (header, metadata) = safetensors::SafeTensors::read_metadata(&map)
            .map_err(|e| bad("the shard's safetensors header is damaged").found(e))?;
        let start = header + 8;
        let columns = &manifest.columns;
        let narrow = manifest.vocabulary.narrow();
        let wanted = tensors(columns, narrow, manifest.values, entry.cells, entry.tokens);
        let mut spans = Vec::with_capacity(wanted.len());
        for t in &wanted {
            let info = metadata
                .info(&t.name)
                .ok_or_else(|| bad("the shard lacks a tensor").wanted(format!("{} {}", t.name, t.dtype)))?;
            let (from, to) = info.data_offsets;
            if info.dtype.to_string() != t.dtype
                || info.shape.len() != 1
                || t.len.is_some_and(|len| info.shape[0] as u64 != len)
            {
                return Err(bad("a tensor of the shard has another type or shape than the manifest says")
                    .found(format!("{} {} {:?}", t.name, info.dtype, info.shape))
                    .wanted(format!("{} {} {:?}", t.name, t.dtype, t.len)));
            }
            if !(start + from).is_multiple_of(element_bytes(t.dtype) as usize) {
                return Err(bad("a tensor of the shard is not aligned").found(&t.name));
            }
            spans.push(start + from..start + to);
        }
        let others = metadata.tensors().len() - wanted.len();
        if others > 0 {
            return Err(bad("the shard holds tensors that this version does not know").found(others));
        }
        let named = |name: &str| {
            let at = wanted.iter().position(|t| t.name == name).expect("a name of the layout");
            spans[at].clone()
        };
        let block_crc32c = named("block_crc32c");
        let payload = start..block_crc32c.start;
        let blocks = payload.len().div_ceil(BLOCK_BYTES);
        if block_crc32c.end != map.len() || block_crc32c.len() != blocks * 4 {
            return Err(bad("the checksum table must end the shard and hold one entry per block")
                .found(format!("{} bytes", block_crc32c.len()))
                .wanted(format!("{} bytes", blocks * 4)));
        }
        let frame = crc32c::crc32c_append(crc32c::crc32c(&map[..start]), &map[block_crc32c.clone()]);
        if frame != entry.frame_crc32c {
            return Err(bad("the shard's header or checksum table is damaged")
                .found(format!("crc32c {frame:08x}"))
                .wanted(format!("{:08x}", entry.frame_crc32c)));
        }
        let code_map = code_maps(&metadata, manifest).map_err(|(what, found)| {
            bad("the shard's metadata does not fit the manifest").found(found).wanted(what)
        })?;

        let shard = Shard {
            cells: entry.cells as usize,
            cell_start: named("cell_start"),
            cell_id_start: named("cell_id_start"),
            total_count: named("total_count"),
            gene: named("gene"),
            value: manifest.values.then(|| named("value")),
            cell_id: named("cell_id"),
            obs: columns.iter().map(|c| named(&obs_tensor(&c.name))).collect(),
            code_map,
            payload,
            block_crc32c,
            proved: (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            narrow,
            vocab: manifest.vocabulary.len as u32,
            map,
            path: path.clone(),
        };
        shard.check_starts(shard.cell_start.clone(), Some(entry.tokens), "cell_start")?;
        shard.check_starts(shard.cell_id_start.clone(), None, "cell_id_start")?;
        Ok(shard)
    }

    /// Offsets begin at 0, never fall, and end at `end` (or within `cell_id`).
    fn check_starts(&self, span: Span, end: Option<u64>, name: &str) -> Result<()> {
        self.prove(span.clone())?;
        let starts: &[u64] = self.view(&span);
        let last = starts[self.cells];
        let end_fits = end.map_or(last <= self.cell_id.len() as u64, |end| last == end);
        let falls = starts.windows(2).position(|w| w[1] < w[0]);
        if starts[0] == 0 && end_fits && falls.is_none() {
            return Ok(());
        }
        Err(Error::new(Code::ShardOffsets, "the shard's offsets are damaged")
            .at(format!("{}:{name}[{}]", self.path.display(), falls.map_or(self.cells, |i| i + 1)))
            .found(match falls {
                Some(i) => format!("{} after {}", starts[i + 1], starts[i]),
                None => format!("from {} to {last}", starts[0]),
            })
            .wanted("offsets that start at 0, never fall and end where the data ends")
            .next("copy the shard again, or pack the corpus again from its source"))
    }

    /// A tensor as a slice; the span's type and alignment were checked at open.
    #[inline]
    fn view<T: Pod>(&self, span: &Span) -> &[T] {
        bytemuck::cast_slice(&self.map[span.clone()])
    }

    /// The (C+1) token offsets.
    #[inline]
    pub fn starts(&self) -> &[u64] {
        self.view(&self.cell_start)
    }

    /// Bytes of the genes of `cell` in the file.
    #[inline]
    pub fn gene_span(&self, cell: usize) -> Span {
        let starts = self.starts();
        let width = if self.narrow { 2 } else { 4 };
        self.gene.start + starts[cell] as usize * width..self.gene.start + starts[cell + 1] as usize * width
    }

    /// Bytes of the values of `cell` in the file.
    #[inline]
    pub fn value_span(&self, cell: usize) -> Option<Span> {
        let value = self.value.as_ref()?;
        let starts = self.starts();
        Some(value.start + starts[cell] as usize * 2..value.start + starts[cell + 1] as usize * 2)
    }

    /// Proved bytes `span` as elements.
    #[inline]
    pub fn read<T: Pod>(&self, span: Span) -> Result<&[T]> {
        self.prove(span.clone())?;
        Ok(self.view(&span))
    }

    pub fn total_counts(&self) -> Result<&[f32]> {
        self.read(self.total_count.clone())
    }

    pub fn total_count(&self, cell: usize) -> Result<f32> {
        let at = self.total_count.start + cell * 4;
        Ok(self.read::<f32>(at..at + 4)?[0])
    }

    pub fn cell_id(&self, cell: usize) -> Result<&str> {
        let starts: &[u64] = self.view(&self.cell_id_start);
        let at = self.cell_id.start;
        let bytes = self.read::<u8>(at + starts[cell] as usize..at + starts[cell + 1] as usize)?;
        std::str::from_utf8(bytes).map_err(|e| {
            Error::new(Code::ShardContent, "a cell name is not UTF-8")
                .at(format!("{}: cell {cell}", self.path.display()))
                .found(e)
        })
    }

    /// The whole of obs column `column` of the manifest.
    pub fn obs<T: Pod>(&self, column: usize) -> Result<&[T]> {
        self.read(self.obs[column].clone())
    }

    /// Appends the codes of categorical `column` in the corpus's numbering.
    pub fn codes_into(&self, column: usize, categories: usize, out: &mut Vec<i32>) -> Result<()> {
        let map = &self.code_map[column];
        let known = if map.is_empty() { categories } else { map.len() } as i32;
        for (cell, &code) in self.obs::<i32>(column)?.iter().enumerate() {
            if !(-1..known).contains(&code) {
                return Err(Error::new(Code::ShardContent, "a category code is out of range")
                    .at(format!("{}: cell {cell}, column {column}", self.path.display()))
                    .found(code)
                    .wanted(format!("-1 to {}", known - 1)));
            }
            out.push(if code < 0 || map.is_empty() { code } else { map[code as usize] });
        }
        Ok(())
    }

    /// Are the blocks of these bytes proved already?
    #[inline]
    pub fn is_proved(&self, span: &Span) -> bool {
        self.blocks_of(span).all(|b| self.proved[b / 64].load(Relaxed) >> (b % 64) & 1 == 1)
    }

    #[inline]
    fn blocks_of(&self, span: &Span) -> Range<usize> {
        if span.is_empty() {
            return 0..0;
        }
        (span.start - self.payload.start) / BLOCK_BYTES..(span.end - 1 - self.payload.start) / BLOCK_BYTES + 1
    }

    /// Proves the blocks of these bytes, reading only those never touched before.
    #[inline]
    pub fn prove(&self, span: Span) -> Result<()> {
        for b in self.blocks_of(&span) {
            if self.proved[b / 64].load(Relaxed) >> (b % 64) & 1 == 0 {
                self.prove_block(b)?;
            }
        }
        Ok(())
    }

    pub fn blocks(&self) -> usize {
        self.payload.len().div_ceil(BLOCK_BYTES)
    }

    /// Checks block `b`: its CRC, and that the genes in it are below the vocabulary. Threads may do so twice; the bit is the same.
    #[cold]
    pub fn prove_block(&self, b: usize) -> Result<()> {
        let start = self.payload.start + b * BLOCK_BYTES;
        let span = start..(start + BLOCK_BYTES).min(self.payload.end);
        let bytes = &self.map[span.clone()];
        let (found, wanted) = (crc32c::crc32c(bytes), self.view::<u32>(&self.block_crc32c)[b]);
        if found != wanted {
            return Err(Error::new(Code::ShardBlock, format!("block {b} of the shard is damaged"))
                .at(format!("{}: bytes {}..{}, {}", self.path.display(), span.start, span.end, self.cells_in(&span)))
                .found(format!("crc32c {found:08x}"))
                .wanted(format!("{wanted:08x}"))
                .next(format!(
                    "`cellrefine inspect {} --verify` checks every block; then copy the shard again or pack it again",
                    self.path.parent().unwrap_or(Path::new(".")).display()
                )));
        }
        let genes = span.start.max(self.gene.start)..span.end.min(self.gene.end);
        if genes.start < genes.end {
            let highest = if self.narrow {
                self.view::<u16>(&genes).iter().copied().max().map(u32::from)
            } else {
                self.view::<u32>(&genes).iter().copied().max()
            };
            if highest.is_some_and(|g| g >= self.vocab) {
                return Err(Error::new(Code::ShardContent, "a gene id is outside the vocabulary")
                    .at(format!("{}: {}", self.path.display(), self.cells_in(&genes)))
                    .found(highest.unwrap_or(0))
                    .wanted(format!("ids below {}", self.vocab))
                    .next("pack the corpus again with its own vocabulary"));
            }
        }
        self.proved[b / 64].fetch_or(1 << (b % 64), Relaxed);
        Ok(())
    }

    /// Which cells a damaged range touches, in words.
    fn cells_in(&self, span: &Span) -> String {
        let width = |s: &Span, per: usize| {
            let from = span.start.max(s.start);
            let to = span.end.min(s.end);
            (from < to).then(|| ((from - s.start) / per, (to - 1 - s.start) / per))
        };
        let by_token = |(first, last): (usize, usize)| {
            let starts = self.starts();
            let cell = |t: usize| starts.partition_point(|&s| s as usize <= t).saturating_sub(1);
            (cell(first), cell(last))
        };
        let mut first = usize::MAX;
        let mut last = 0;
        let per_gene = if self.narrow { 2 } else { 4 };
        let tokens = [Some((&self.gene, per_gene)), self.value.as_ref().map(|v| (v, 2))];
        let ranges = (tokens.into_iter().flatten())
            .filter_map(|(s, per)| width(s, per).map(by_token))
            .chain(
                [(&self.cell_start, 8), (&self.cell_id_start, 8), (&self.total_count, 4)]
                    .into_iter()
                    .filter_map(|(s, per)| width(s, per)),
            )
            .chain(self.obs.iter().filter_map(|s| width(s, s.len() / self.cells.max(1))))
            .chain(width(&self.cell_id, 1).map(|_| (0, self.cells.saturating_sub(1))));
        for (a, b) in ranges {
            first = first.min(a);
            last = last.max(b);
        }
        if first == usize::MAX {
            return "no cells".into();
        }
        format!("cells {first} to {} of the shard", last.min(self.cells.saturating_sub(1)))
    }

    /// SHA-256 of the whole file.
    pub fn sha256(&self) -> String {
        sha256(&self.map[..])
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tells the kernel that these bytes are wanted soon. Advice only: a failure changes nothing.
    pub fn will_need(&self, span: &Span) {
        let start = span.start / PAGE_BYTES * PAGE_BYTES;
        let _ = self.map.advise_range(memmap2::Advice::WillNeed, start, span.end - start);
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        super::faults::release(self.map.as_ptr() as usize);
    }
}

/// Reads the shard's own category names and maps its codes to the corpus's. Errors are (wanted, found).
fn code_maps(
    metadata: &safetensors::tensor::Metadata,
    manifest: &Manifest,
) -> std::result::Result<Vec<Vec<i32>>, (String, String)> {
    let empty = Default::default();
    let fields = metadata.metadata().as_ref().unwrap_or(&empty);
    let field = |name: &str| fields.get(name).map(String::as_str).unwrap_or_default();
    let block_bytes = BLOCK_BYTES.to_string();
    let schema = SCHEMA.to_string();
    for (name, wanted) in [
        ("format", SHARD_FORMAT),
        ("schema", &schema),
        ("block_bytes", &block_bytes),
        ("vocabulary", &manifest.vocabulary.digest),
    ] {
        if field(name) != wanted {
            return Err((format!("{name} {wanted:?}"), format!("{:?}", field(name))));
        }
    }
    let local: std::collections::BTreeMap<String, Vec<String>> =
        serde_json::from_str(field("categories")).map_err(|e| ("category names".into(), e.to_string()))?;
    let mut maps = Vec::with_capacity(manifest.columns.len());
    for column in &manifest.columns {
        let mut map = Vec::new();
        if column.kind == ObsKind::Categorical {
            let names = local
                .get(&column.name)
                .ok_or_else(|| (format!("categories of column {:?}", column.name), "none".to_string()))?;
            if *names != column.categories {
                for name in names {
                    let code = column.categories.binary_search(name).map_err(|_| {
                        (
                            format!("a category of column {:?} that the manifest lists", column.name),
                            format!("{name:?}"),
                        )
                    })?;
                    map.push(code as i32);
                }
            }
        }
        maps.push(map);
    }
    Ok(maps)
}
