//! Names of genes: the form of an Ensembl id, and symbols by a mapping file.

use super::mapping::Found;
use super::vocab::Vocab;
use crate::error::{Code, Error, Result};
use crate::whole_file;
use std::collections::HashMap;
use std::path::Path;

/// Cap on a mapping file after decompression: 25 times a full human map.
const MAP_LIMIT_BYTES: u64 = 256 << 20;

/// The upper-case, unversioned form of an Ensembl gene id, or `None` if `name` is none (`ENSA` is a symbol, `ENST…` a transcript).
pub fn ensembl_id(name: &str) -> Option<String> {
    let name = name.trim();
    let (stem, version) = match name.split_once('.') {
        Some((stem, version)) => (stem, Some(version)),
        None => (name, None),
    };
    if version.is_some_and(|v| v.is_empty() || !v.bytes().all(|b| b.is_ascii_digit())) || !stem.is_ascii() {
        return None;
    }
    let (letters, digits) = stem.split_at_checked(stem.len().checked_sub(11)?)?;
    let middle = letters
        .get(..3)
        .filter(|p| p.eq_ignore_ascii_case("ENS"))
        .and_then(|_| letters[3..].strip_suffix(['G', 'g']))?;
    let fits = middle.len() <= 4
        && middle.bytes().all(|b| b.is_ascii_alphabetic())
        && digits.bytes().all(|b| b.is_ascii_digit());
    fits.then(|| stem.to_ascii_uppercase())
}

/// Gene symbol to Ensembl ids, from a TSV (plain or gzip) whose first two columns are symbol and id in either order; a first
/// line without an Ensembl id is taken for column names.
#[derive(Debug, Clone)]
pub struct SymbolMap {
    /// In file order, so that the first symbol of a gene is known.
    pairs: Vec<(String, String)>,
    ids_of_symbol: HashMap<String, Vec<String>>,
}

impl SymbolMap {
    /// Reads a mapping file.
    ///
    /// # Errors
    /// Input, with the line number: fewer than two columns, no Ensembl id in a row, not text, larger than 256 MiB.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = read_text(path)?;
        let (mut pairs, mut seen) = (Vec::new(), std::collections::HashSet::new());
        for (n, line) in text.lines().enumerate() {
            let line = line.trim_end_matches('\r');
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let mut fields = line.split('\t').map(str::trim);
            let (a, b) = (fields.next().unwrap_or(""), fields.next().unwrap_or(""));
            let pair = match (ensembl_id(a), ensembl_id(b)) {
                (_, Some(id)) => (a.to_string(), id),
                (Some(id), None) => (b.to_string(), id),
                (None, None) if pairs.is_empty() && n < 64 && !a.is_empty() && !b.is_empty() => continue,
                (None, None) => {
                    return Err(Error::new(Code::GeneMap, "a row of the gene map has no Ensembl gene id")
                        .at(format!("{}:{}", path.display(), n + 1))
                        .found(format!("{:?}", super::vocab::clip(line, 60)))
                        .wanted("symbol<TAB>Ensembl id, further columns are free"));
                }
            };
            if !pair.0.is_empty() && seen.insert(pair.clone()) {
                pairs.push(pair);
            }
        }
        if pairs.is_empty() {
            return Err(Error::new(Code::GeneMap, "the gene map holds no pair of symbol and Ensembl id")
                .at(path.display())
                .wanted("lines of symbol<TAB>Ensembl id"));
        }
        let mut ids_of_symbol: HashMap<String, Vec<String>> = HashMap::new();
        for (symbol, id) in &pairs {
            ids_of_symbol.entry(symbol.clone()).or_default().push(id.clone());
        }
        Ok(SymbolMap { pairs, ids_of_symbol })
    }

    /// (Ensembl id, symbol) pairs in file order: what [`Vocab::attach_symbols`] takes.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.pairs.iter().map(|(symbol, id)| (id.as_str(), symbol.as_str()))
    }
    /// Number of distinct pairs.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }
    /// Never true for a map that was read.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    pub(super) fn tokens(&self, symbol: &str, vocab: &Vocab) -> Found {
        let ids = self.ids_of_symbol.get(symbol).map_or(&[][..], Vec::as_slice);
        let mut known = ids.iter().filter_map(|id| vocab.id(id));
        match (known.next(), known.next()) {
            (None, _) => Found::Unknown,
            (Some(id), None) => Found::Token(id),
            _ => Found::Ambiguous,
        }
    }
}

/// Reads a text file, plain or gzip, of bounded size.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    whole_file::text(path, whole_file::unpack(path, "read the file", MAP_LIMIT_BYTES)?)
}
