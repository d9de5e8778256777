//! What lies in `NAME.cells/`: a manifest, the vocabulary, and shards that are ordinary safetensors files.
//!
//! ```text
//! corpus.json                      the manifest
//! vocab.tsv                        the vocabulary, as it was given
//! shard-00000.safetensors          C cells, N tokens:
//!   cell_start      U64 (C+1)      where each cell's tokens begin; the last entry is N
//!   cell_id_start   U64 (C+1)      where each cell's name begins in cell_id
//!   obs.<column>    F64 (C)        numeric columns, NaN = missing
//!   total_count     F32 (C)        counts over all genes of the source
//!   obs.<column>    I32 (C)        codes of categorical columns, −1 = missing
//!   gene            U16|U32 (N)    gene ids in rank order; U32 above 65,536 ids
//!   value           F16 (N)        optional: ln(1 + 10⁴·x/total)
//!   cell_id         U8             UTF-8 names end to end, zeros up to the next multiple of 8
//!   block_crc32c    U32            CRC-32C per 64 KiB of everything above
//! ```
//! Tensors lie in falling order of element size in a data section that starts on a page, so every mapped slice is aligned.
//! A shard knows its own category names (safetensors metadata); the manifest holds their sorted union, and a reader maps one
//! to the other. So shards packed apart are merged by writing a manifest, and a shard's bytes depend on its cells alone.

use crate::digest::hex;
use crate::error::{Code, Error, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

#[cfg(target_endian = "big")]
compile_error!("the corpus is mapped as it lies on disk, which is little-endian");

/// Version of the layout; a reader refuses any other.
pub const SCHEMA: u32 = 1;
/// Name of the manifest in the folder.
pub const MANIFEST: &str = "corpus.json";
/// Name of the vocabulary in the folder.
pub const VOCAB: &str = "vocab.tsv";
/// Bytes under one checksum: large enough that the table is 0.006 % of the data, small enough that the first touch of a cell
/// costs microseconds.
pub const BLOCK_BYTES: usize = 64 << 10;
/// The data section starts at a multiple of this, so that checksum blocks are whole pages.
pub const PAGE_BYTES: usize = 4096;
/// Value of `format` in a shard's metadata.
pub const SHARD_FORMAT: &str = "cellrefine-corpus";

/// Which vocabulary the gene ids belong to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VocabIdentity {
    /// Digest of the vocabulary, as `genes::vocab` computes it.
    pub digest: String,
    /// Number of ids, special tokens included: every gene id is below it.
    pub len: usize,
}

impl VocabIdentity {
    /// Do gene ids fit 16 bits?
    pub fn narrow(&self) -> bool {
        self.len <= 1 << 16
    }
}

/// How an obs column is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ObsKind {
    /// Codes into a list of names; −1 is missing.
    Categorical,
    /// Float64; NaN is missing.
    Numeric,
}

/// An obs column of the whole corpus.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Column {
    /// Name, as in the source's `obs`.
    pub name: String,
    /// Storage.
    pub kind: ObsKind,
    /// Sorted category names over all shards; empty for a numeric column.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub categories: Vec<String>,
}

/// One shard file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// File name inside the corpus folder.
    pub file: String,
    /// Cells in it.
    pub cells: u64,
    /// Tokens in it.
    pub tokens: u64,
    /// Size of the file.
    pub bytes: u64,
    /// SHA-256 of the file, hexadecimal.
    pub sha256: String,
    /// CRC-32C of everything that the block checksums do not cover: the header and the checksum table.
    pub frame_crc32c: u32,
}

/// `corpus.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Cells in all shards.
    pub cells: u64,
    /// Tokens in all shards.
    pub tokens: u64,
    /// The vocabulary of the gene ids.
    pub vocabulary: VocabIdentity,
    /// SHA-256 of `vocab.tsv`; absent where the corpus was packed without its vocabulary file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vocab_sha256: Option<String>,
    /// Does every token carry a value?
    pub values: bool,
    /// The obs columns.
    pub columns: Vec<Column>,
    /// The shards in cell order.
    pub shards: Vec<ShardEntry>,
    /// SHA-256 over vocabulary, columns and shard digests: names the cells, whatever the folder is called.
    pub digest: String,
    /// Where the cells came from: sources with their digests, options, program version.
    pub provenance: serde_json::Value,
    /// CRC-32C of this manifest's other fields in compact form.
    pub checksum: u32,
}

impl Manifest {
    /// Builds the manifest over `shards`: sums, digest and checksum.
    pub fn seal(
        vocabulary: VocabIdentity,
        vocab_sha256: Option<String>,
        values: bool,
        columns: Vec<Column>,
        shards: Vec<ShardEntry>,
        provenance: serde_json::Value,
    ) -> Manifest {
        let mut m = Manifest {
            schema: SCHEMA,
            cells: shards.iter().map(|s| s.cells).sum(),
            tokens: shards.iter().map(|s| s.tokens).sum(),
            vocabulary,
            vocab_sha256,
            values,
            columns,
            shards,
            digest: String::new(),
            provenance,
            checksum: 0,
        };
        m.digest = m.compute_digest();
        m.checksum = m.compute_checksum();
        m
    }

    fn compute_digest(&self) -> String {
        let mut sha = Sha256::new();
        let line = serde_json::json!([self.schema, self.vocabulary, self.values, self.columns]);
        sha.update(line.to_string());
        for s in &self.shards {
            sha.update(format!("\n{} {} {}", s.sha256, s.cells, s.tokens));
        }
        hex(&sha.finalize())
    }

    fn compute_checksum(&self) -> u32 {
        let bare = Manifest { checksum: 0, ..self.clone() };
        crc32c::crc32c(serde_json::to_string(&bare).expect("a manifest is plain data").as_bytes())
    }

    /// The file's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut text = serde_json::to_string_pretty(self).expect("a manifest is plain data");
        text.push('\n');
        text.into_bytes()
    }

    /// Reads and checks a manifest: schema, checksum, digest, sums, plain shard names, distinct sorted categories. `place` is
    /// the path named in errors.
    pub fn parse(bytes: &[u8], place: &str) -> Result<Manifest> {
        let bad = |what: &str| {
            Error::new(Code::ManifestDamaged, what)
                .at(place)
                .next("copy the corpus folder again, or pack it again from its source")
        };
        if bytes.is_empty() {
            return Err(bad("the corpus manifest is empty").wanted("the JSON object that pack writes"));
        }
        let value: serde_json::Value = serde_json::from_slice(bytes)
            .map_err(|e| bad("the corpus manifest is not valid JSON (truncated or damaged)").found(e))?;
        match value.get("schema").and_then(|s| s.as_u64()) {
            Some(s) if s == SCHEMA as u64 => {}
            Some(s) => {
                return Err(Error::new(Code::CorpusVersion, "the corpus has another schema version")
                    .at(place)
                    .found(s)
                    .wanted(SCHEMA)
                    .next("pack it again with this version of cellrefine"));
            }
            None => {
                return Err(bad("this JSON file is not a corpus manifest").wanted("a field `schema`"));
            }
        }
        let m: Manifest = serde_json::from_value(value)
            .map_err(|e| bad("the corpus manifest has wrong fields").found(e))?;
        if m.checksum != m.compute_checksum() || m.digest != m.compute_digest() {
            return Err(bad("the corpus manifest was changed after it was written")
                .found(format!("checksum {}, digest {}", m.compute_checksum(), m.compute_digest()))
                .wanted(format!("{}, {}", m.checksum, m.digest)));
        }
        m.consistent().map_err(|what| bad(&format!("the corpus manifest contradicts itself: {what}")))?;
        Ok(m)
    }

    /// Refuses more cells than a batch can name.
    pub(super) fn check_size(&self, place: &std::path::Path) -> Result<()> {
        if self.cells <= u32::MAX as u64 {
            return Ok(());
        }
        Err(Error::new(Code::TooManyCells, "too many cells for one corpus")
            .at(place.display())
            .found(self.cells)
            .wanted(u32::MAX))
    }

    /// Sums, names and limits; a checksum cannot speak for a manifest that another program wrote.
    fn consistent(&self) -> std::result::Result<(), String> {
        let sum = |f: fn(&ShardEntry) -> u64| self.shards.iter().try_fold(0u64, |a, s| a.checked_add(f(s)));
        if sum(|s| s.cells) != Some(self.cells) || sum(|s| s.tokens) != Some(self.tokens) {
            return Err("cells or tokens are not the sum over the shards".into());
        }
        if self.cells > u32::MAX as u64 {
            return Err(format!("{} cells, at most {} are supported", self.cells, u32::MAX));
        }
        if self.vocabulary.len == 0 || self.vocabulary.len > 1 << 31 {
            return Err(format!("a vocabulary of {} ids", self.vocabulary.len));
        }
        for s in &self.shards {
            if !plain_name(&s.file) {
                return Err(format!("shard name {:?} is not a plain file name", s.file));
            }
        }
        for (i, c) in self.columns.iter().enumerate() {
            if self.columns[..i].iter().any(|d| d.name == c.name) {
                return Err(format!("column {:?} twice", c.name));
            }
            if !c.categories.windows(2).all(|w| w[0] < w[1]) {
                return Err(format!("categories of column {:?} are not sorted and distinct", c.name));
            }
        }
        Ok(())
    }
}

/// A file name that cannot leave its folder.
pub(super) fn plain_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}

/// File name of shard `index`.
pub fn shard_name(index: usize) -> String {
    format!("shard-{index:05}.safetensors")
}

/// Name of the tensor of an obs column.
pub fn obs_tensor(column: &str) -> String {
    format!("obs.{column}")
}

/// A tensor of a shard as the layout orders it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TensorSpec {
    pub name: String,
    pub dtype: &'static str,
    /// Elements; `None` where the header alone decides (`cell_id`, `block_crc32c`).
    pub len: Option<u64>,
}

/// The tensors of a shard of `cells` cells and `tokens` tokens, in file order.
pub(super) fn tensors(
    columns: &[Column],
    narrow: bool,
    values: bool,
    cells: u64,
    tokens: u64,
) -> Vec<TensorSpec> {
    let one = |name: &str, dtype, len| TensorSpec { name: name.into(), dtype, len };
    let obs = |kind: ObsKind, dtype: &'static str| {
        columns.iter().filter(move |c| c.kind == kind).map(move |c| TensorSpec {
            name: obs_tensor(&c.name),
            dtype,
            len: Some(cells),
        })
    };
    let mut all =
        vec![one("cell_start", "U64", Some(cells + 1)), one("cell_id_start", "U64", Some(cells + 1))];
    all.extend(obs(ObsKind::Numeric, "F64"));
    all.push(one("total_count", "F32", Some(cells)));
    all.extend(obs(ObsKind::Categorical, "I32"));
    all.push(one("gene", if narrow { "U16" } else { "U32" }, Some(tokens)));
    if values {
        all.push(one("value", "F16", Some(tokens)));
    }
    all.push(one("cell_id", "U8", None));
    all.push(one("block_crc32c", "U32", None));
    all
}

/// Bytes of one element of a safetensors type that a shard uses.
pub(super) fn element_bytes(dtype: &str) -> u64 {
    match dtype {
        "U64" | "F64" => 8,
        "F32" | "I32" | "U32" => 4,
        "U16" | "F16" => 2,
        _ => 1,
    }
}

/// Metadata of a shard: what Python sees as `safe_open(f).metadata()`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ShardMetadata {
    pub vocab_digest: String,
    /// Category names of this shard by column, sorted.
    pub categories: BTreeMap<String, Vec<String>>,
}

/// The header bytes of a shard, length prefix included, padded with spaces so that the data section starts on a page. Written
/// by hand because the order of keys is part of the promise of equal bytes.
pub(super) fn shard_header(metadata: &ShardMetadata, tensors: &[(TensorSpec, u64)]) -> Vec<u8> {
    let text = |s: &str| serde_json::Value::from(s).to_string();
    let categories = serde_json::to_string(&metadata.categories).expect("names are plain data");
    let mut json = format!(
        "{{\"__metadata__\":{{\"format\":{},\"schema\":\"{SCHEMA}\",\"vocabulary\":{},\"block_bytes\":\"{BLOCK_BYTES}\",\
         \"categories\":{}}}",
        text(SHARD_FORMAT),
        text(&metadata.vocab_digest),
        text(&categories)
    );
    let mut offset = 0;
    for (t, len) in tensors {
        let end = offset + len * element_bytes(t.dtype);
        json += &format!(
            ",{}:{{\"dtype\":\"{}\",\"shape\":[{len}],\"data_offsets\":[{offset},{end}]}}",
            text(&t.name),
            t.dtype
        );
        offset = end;
    }
    json.push('}');
    let padded = (8 + json.len()).next_multiple_of(PAGE_BYTES) - 8;
    json.extend(std::iter::repeat_n(' ', padded - json.len()));
    let mut bytes = (padded as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    bytes
}

#[cfg(test)]
mod tests;
