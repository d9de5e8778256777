//! The gene vocabulary: token id = position in a list of names, with a median per gene.
//!
//! `V.tsv` is UTF-8 text, `#` header lines, then one tab-separated row per token in id order:
//! ```text
//! # cellrefine-vocabulary 1
//! # digest 5f0c…               (sha256 of the canonical content; checked when read)
//! token            id  median             symbol
//! <pad>            0   0                  .
//! ENSG00000000003  1   2.001186019549122  TSPAN6|T245
//! ```
//! `symbol` is optional: names separated by `|`, the first is the usual one, `.` is none. The digest covers token names and the
//! bits of the medians, because a checkpoint depends on these; it leaves symbols out, so that adding symbols to a vocabulary
//! keeps old checkpoints and corpora usable. Names in angle brackets are special tokens; `<pad>` and `<mask>` must exist.

use crate::digest::hex;
use crate::disk;
use crate::error::{Code, Error, Result};
use crate::whole_file;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;

/// A vocabulary of a million genes has 50 MB.
pub(crate) const MAX_BYTES: u64 = 256 << 20;
const SCHEMA: &str = "# cellrefine-vocabulary 1";

/// Ids of the tokens that are no genes. Read from the vocabulary by name, never assumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Specials {
    /// `<pad>`.
    pub pad: u32,
    /// `<mask>`.
    pub mask: u32,
    /// `<cls>`, where the vocabulary has one.
    pub cls: Option<u32>,
    /// `<eos>`, where the vocabulary has one.
    pub eos: Option<u32>,
}

/// What a symbol means in a vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match<'a> {
    /// No token has this name.
    Unknown,
    /// One token has it.
    One(u32),
    /// Several have it, and none has it as its first name alone.
    Ambiguous(&'a [u32]),
}

/// Token names in id order with a median per gene; immutable once built.
#[derive(Debug, Clone)]
pub struct Vocab {
    token: Vec<String>,
    median: Vec<f64>,
    /// Names joined by `|`; empty = none. Empty vector = no symbols at all.
    symbol: Vec<String>,
    specials: Specials,
    id_of_token: HashMap<String, u32>,
    ids_of_symbol: HashMap<String, Vec<u32>>,
    digest: String,
}

/// Is this the name of a special token?
pub fn is_special(token: &str) -> bool {
    token.starts_with('<') && token.ends_with('>')
}

impl Vocab {
    /// Builds a vocabulary from token names in id order, one median each (0 for special tokens) and either no symbols or one
    /// string per token (names joined by `|`, empty = none).
    ///
    /// # Errors
    /// Input: a name twice, an empty name, a gene whose median is not a positive finite number, `<pad>` or `<mask>` missing.
    pub fn from_parts(token: Vec<String>, median: Vec<f64>, symbol: Vec<String>) -> Result<Self> {
        if token.len() != median.len() || !(symbol.is_empty() || symbol.len() == token.len()) {
            return Err(Error::bug("vocabulary columns of different lengths"));
        }
        if token.len() > u32::MAX as usize {
            return Err(Error::new(Code::VocabularyForm, "a vocabulary holds at most 2^32 - 1 tokens")
                .found(token.len()));
        }
        let mut id_of_token = HashMap::with_capacity(token.len());
        for (id, name) in token.iter().enumerate() {
            if name.is_empty() || name.contains(['\t', '\n', '\r']) {
                return Err(Error::new(
                    Code::VocabularyForm,
                    "a token name is empty or holds a tab or a line break",
                )
                .at(format!("token id {id}"))
                .found(format!("{name:?}")));
            }
            if let Some(first) = id_of_token.insert(name.clone(), id as u32) {
                return Err(Error::new(Code::VocabularyForm, format!("token {name} occurs twice"))
                    .found(format!("ids {first} and {id}"))
                    .wanted("one id per token"));
            }
            let m = median[id];
            let usable = m.is_finite() && m > 0.0;
            if !is_special(name) && !usable {
                return Err(Error::new(Code::VocabularyForm, format!("the median of {name} cannot be used"))
                    .at(format!("token id {id}"))
                    .found(m)
                    .wanted("a positive finite number (ranks are counts divided by it)"));
            }
        }
        let find = |name: &str| id_of_token.get(name).copied();
        let need = |name: &str| {
            find(name).ok_or_else(|| {
                Error::new(Code::VocabularyTokens, format!("the vocabulary has no {name} token"))
                    .found(format!("{} tokens, the first is {:?}", token.len(), token.first()))
                    .wanted("special tokens <pad> and <mask> (and, for newer models, <cls> and <eos>)")
                    .next("convert Geneformer's token dictionary, or build one: cellrefine vocab build IN.h5ad --out V.tsv")
            })
        };
        let specials =
            Specials { pad: need("<pad>")?, mask: need("<mask>")?, cls: find("<cls>"), eos: find("<eos>") };
        let ids_of_symbol = index_symbols(&symbol);
        let digest = digest(&token, &median);
        Ok(Vocab { token, median, symbol, specials, id_of_token, ids_of_symbol, digest })
    }

    /// Number of tokens, special ones included: V.
    pub fn len(&self) -> usize {
        self.token.len()
    }
    /// Whether there are no tokens; never true for a vocabulary that was built.
    pub fn is_empty(&self) -> bool {
        self.token.is_empty()
    }
    /// Number of genes: tokens that are not special.
    pub fn genes(&self) -> usize {
        self.token.iter().filter(|t| !is_special(t)).count()
    }
    /// The name of a token id. Panics if `id >= len()`.
    pub fn token(&self, id: u32) -> &str {
        &self.token[id as usize]
    }
    /// All names, in id order.
    pub fn tokens(&self) -> &[String] {
        &self.token
    }
    /// The non-zero median of counts per 10,000 of a gene, 0 for special tokens. Panics if `id >= len()`.
    pub fn median(&self, id: u32) -> f64 {
        self.median[id as usize]
    }
    /// All medians, in id order.
    pub fn medians(&self) -> &[f64] {
        &self.median
    }
    /// The special tokens.
    pub fn specials(&self) -> Specials {
        self.specials
    }
    /// Is this id a special token (any name in angle brackets)?
    pub fn is_special(&self, id: u32) -> bool {
        is_special(self.token(id))
    }
    /// sha256 (hex) of names and medians: equal digests, equal meaning of every id.
    pub fn digest(&self) -> &str {
        &self.digest
    }
    /// The id of an exact token name.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.id_of_token.get(token).copied()
    }
    /// The usual symbol of a token.
    pub fn symbol(&self, id: u32) -> Option<&str> {
        let names = self.symbol.get(id as usize)?;
        names.split('|').next().filter(|s| !s.is_empty())
    }
    /// The usual symbol, or else the token name: what to show to people.
    pub fn name(&self, id: u32) -> &str {
        self.symbol(id).unwrap_or_else(|| self.token(id))
    }
    /// Does any token carry a symbol?
    pub fn has_symbols(&self) -> bool {
        !self.ids_of_symbol.is_empty()
    }
    /// The token with this symbol, letter case respected. A token whose usual symbol it is goes before tokens that carry it
    /// as an alias.
    pub fn by_symbol(&self, symbol: &str) -> Match<'_> {
        match self.ids_of_symbol.get(symbol).map(Vec::as_slice) {
            None | Some([]) => Match::Unknown,
            Some([id]) => Match::One(*id),
            Some(ids) => {
                let mut first = ids.iter().filter(|&&id| self.symbol(id) == Some(symbol));
                match (first.next(), first.next()) {
                    (Some(&id), None) => Match::One(id),
                    _ => Match::Ambiguous(ids),
                }
            }
        }
    }
    /// The gene that `name` means: a token name, an Ensembl id in any case and with any version suffix, or a symbol
    /// (first as written, then in upper case). Never a special token. Marker files are resolved through this.
    pub fn resolve(&self, name: &str) -> Match<'_> {
        let name = name.trim();
        if is_special(name) {
            return Match::Unknown;
        }
        let ensembl = super::mapping::ensembl_id(name);
        if let Some(id) = self.id(name).or_else(|| self.id(ensembl.as_deref()?)) {
            return Match::One(id);
        }
        match self.by_symbol(name) {
            Match::Unknown => self.by_symbol(&name.to_uppercase()),
            found => found,
        }
    }

    /// The same vocabulary with symbols: `names` gives (Ensembl id or token, symbol) pairs, the first symbol of a token is its
    /// usual one. Unknown ids are passed over. Returns how many genes have a symbol now.
    pub fn attach_symbols<'a>(&mut self, names: impl IntoIterator<Item = (&'a str, &'a str)>) -> usize {
        let mut symbol = std::mem::take(&mut self.symbol);
        symbol.resize(self.len(), String::new());
        for (gene, name) in names {
            let ensembl = super::mapping::ensembl_id(gene);
            let id = self.id(gene).or_else(|| self.id(ensembl.as_deref()?));
            let Some(id) = id.filter(|&id| !self.is_special(id)) else { continue };
            let name = name.trim();
            if name.is_empty() || name.contains(['|', '\t', '\n', '\r']) {
                continue;
            }
            let names = &mut symbol[id as usize];
            if names.is_empty() {
                names.push_str(name);
            } else if names.split('|').all(|n| n != name) {
                names.push('|');
                names.push_str(name);
            }
        }
        let with = symbol.iter().filter(|s| !s.is_empty()).count();
        self.ids_of_symbol = index_symbols(&symbol);
        self.symbol = if with == 0 { Vec::new() } else { symbol };
        with
    }

    /// Reads a `V.tsv`.
    ///
    /// # Errors
    /// Input, with the line number: not such a file, an id out of order, a bad median, a name twice, a digest that does not
    /// fit the content.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = whole_file::read(path, "read the vocabulary", MAX_BYTES).map_err(|e| match e.code() {
            Code::FileMissing => e.next("build one: cellrefine vocab build IN.h5ad --out V.tsv, or cellrefine vocab convert TOKENS MEDIANS --out V.tsv"),
            _ => e,
        })?;
        let text = String::from_utf8(text).map_err(|e| {
            wrong_kind(path)
                .at(format!("{}:byte {}", path.display(), e.utf8_error().valid_up_to()))
                .found("bytes that are not UTF-8")
        })?;
        Self::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self> {
        let place = |line: usize| format!("{}:{}", path.display(), line + 1);
        let mut lines = text.lines().enumerate();
        match lines.next() {
            Some((_, line)) if line.trim_end() == SCHEMA => {}
            Some((_, line)) if line.starts_with("# cellrefine-vocabulary ") => {
                return Err(wrong_kind(path)
                    .at(place(0))
                    .found(format!("schema line {line:?}"))
                    .wanted(SCHEMA));
            }
            other => {
                let found = other.map_or("an empty file".to_string(), |(_, l)| format!("{:?}", clip(l, 60)));
                return Err(wrong_kind(path).at(place(0)).found(found));
            }
        }
        let mut recorded = None;
        let mut header: Option<Vec<&str>> = None;
        let (mut token, mut median, mut symbol) = (Vec::new(), Vec::new(), Vec::new());
        for (n, line) in lines {
            if let Some(comment) = line.strip_prefix('#') {
                if let Some(d) = comment.trim().strip_prefix("digest ") {
                    recorded = Some(d.trim().to_string());
                }
                continue;
            }
            let fields: Vec<&str> = line.trim_end_matches('\r').split('\t').collect();
            let Some(columns) = &header else {
                if fields.len() < 3
                    || fields[..3] != ["token", "id", "median"]
                    || (fields.len() > 3 && fields[3] != "symbol")
                {
                    return Err(wrong_kind(path)
                        .at(place(n))
                        .found(format!("columns {}", clip(line, 80)))
                        .wanted("columns token, id, median and, optionally, symbol"));
                }
                header = Some(fields);
                continue;
            };
            if fields.len() != columns.len() {
                return Err(Error::new(
                    Code::VocabularyForm,
                    "a vocabulary row has the wrong number of columns",
                )
                .at(place(n))
                .found(format!("{} in {:?}", fields.len(), clip(line, 60)))
                .wanted(format!("{} tab-separated columns", columns.len()))
                .next("the file may be cut short; make it again"));
            }
            if fields[1].parse() != Ok(token.len()) {
                return Err(Error::new(Code::VocabularyForm, "token ids must count up from 0 without gaps")
                    .at(place(n))
                    .found(fields[1])
                    .wanted(token.len()));
            }
            let value: f64 = fields[2].parse().map_err(|_| {
                Error::new(Code::VocabularyForm, "the median is not a number")
                    .at(place(n))
                    .found(format!("{:?}", fields[2]))
            })?;
            token.push(fields[0].to_string());
            median.push(value);
            if columns.len() > 3 {
                symbol.push(if fields[3] == "." { String::new() } else { fields[3].to_string() });
            }
        }
        if token.is_empty() {
            return Err(Error::new(Code::VocabularyForm, "the vocabulary has no tokens").at(path.display()));
        }
        let vocab = Self::from_parts(token, median, symbol).map_err(|e| {
            let place = e.place().map_or(String::new(), |p| format!(" ({p})"));
            e.at(format!("{}{place}", path.display()))
        })?;
        match recorded {
            Some(d) if d != vocab.digest => Err(Error::new(Code::VocabularyDigest, "the vocabulary does not fit its own digest")
                .at(path.display())
                .found(format!("content with digest {}", vocab.digest))
                .wanted(format!("digest {d}, as its header says"))
                .next("the file was edited or damaged: make it again, or delete the '# digest' line if the edit was meant")),
            _ => Ok(vocab),
        }
    }

    /// The text of `V.tsv`; `notes` become `#` lines.
    pub fn to_tsv(&self, notes: &[String]) -> String {
        let mut out = format!("{SCHEMA}\n# digest {}\n", self.digest);
        for note in notes {
            let _ = writeln!(out, "# {}", note.replace(['\n', '\r'], " "));
        }
        let symbols = !self.symbol.is_empty();
        out.push_str(if symbols { "token\tid\tmedian\tsymbol\n" } else { "token\tid\tmedian\n" });
        for (id, token) in self.token.iter().enumerate() {
            let _ = write!(out, "{token}\t{id}\t{}", self.median[id]);
            if symbols {
                let names = self.symbol[id].as_str();
                let _ = write!(out, "\t{}", if names.is_empty() { "." } else { names });
            }
            out.push('\n');
        }
        out
    }

    /// Writes `V.tsv` so that a reader sees the old file or the whole new one: temporary file, fsync, rename.
    pub fn save(&self, path: impl AsRef<Path>, notes: &[String]) -> Result<()> {
        disk::replace(path.as_ref(), self.to_tsv(notes).as_bytes())
    }
}

fn wrong_kind(path: &Path) -> Error {
    Error::new(Code::VocabularyForm, "this is not a cellrefine vocabulary")
        .at(path.display())
        .wanted(format!("a file that starts with {SCHEMA:?}"))
        .next("make one: cellrefine vocab build IN.h5ad --out V.tsv, or cellrefine vocab convert TOKENS MEDIANS --out V.tsv")
}

/// The first `n` characters, for error messages.
pub(crate) fn clip(text: &str, n: usize) -> String {
    let mut out: String = text.chars().take(n).collect();
    if out.len() < text.len() {
        out.push('…');
    }
    out
}

fn index_symbols(symbol: &[String]) -> HashMap<String, Vec<u32>> {
    let mut index: HashMap<String, Vec<u32>> = HashMap::new();
    for (id, names) in symbol.iter().enumerate() {
        for name in names.split('|').filter(|n| !n.is_empty()) {
            let ids = index.entry(name.to_string()).or_default();
            if ids.last() != Some(&(id as u32)) {
                ids.push(id as u32);
            }
        }
    }
    index
}

fn digest(token: &[String], median: &[f64]) -> String {
    let mut hash = Sha256::new();
    hash.update(b"cellrefine-vocabulary 1\n");
    for (name, m) in token.iter().zip(median) {
        hash.update(name.as_bytes());
        hash.update(b"\t");
        // +0 and -0 are one value; so is every special token's median.
        hash.update(if is_special(name) { 0u64 } else { m.to_bits() }.to_le_bytes());
        hash.update(b"\n");
    }
    hex(&hash.finalize())
}

#[cfg(test)]
mod tests;
