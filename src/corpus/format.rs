//! What lies in `NAME.cells/`.

use serde::{Deserialize, Serialize};

/// Version of the layout; a reader refuses any other.
pub const SCHEMA: u32 = 1;

/// Which vocabulary the gene ids belong to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VocabIdentity {
    /// Digest of the vocabulary, as `genes::vocab` computes it.
    pub digest: String,
    /// Number of ids, special tokens included: every gene id is below it.
    pub len: usize,
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
