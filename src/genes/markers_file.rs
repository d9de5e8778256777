//! Reads marker-set files: GMT, or a TSV with a header; plain or gzip.
//!
//! ```text
//! GMT   name<TAB>description<TAB>gene<TAB>gene…       a gene may carry a weight: CD3D,0.125
//! TSV   set<TAB>gene[<TAB>weight]                     this header line, then one gene a line
//! ```
//! `#` lines and blank lines are passed over, CRLF is accepted. What a typing or copying mistake leaves behind is an error with its
//! line: bytes that are not text, lines without tabs, a set without genes, two sets of one name, half of a set weighted. A gene
//! named twice in a set is counted and kept once.

use super::mapping::SymbolMap;
use super::vocab::{Match, Vocab, clip};
use crate::error::{Code, Error, Result};
use crate::whole_file;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

/// The largest file that is read, unpacked.
const FILE_MAX_BYTES: u64 = 256 << 20;
/// The longest line.
const LINE_MAX_BYTES: usize = 16 << 20;
/// The most sets in a file.
const SETS_MAX: usize = 200_000;
/// The longest name of a set or gene.
const NAME_MAX_CHARS: usize = 500;

/// One set as it stands in the file.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedSet {
    /// Its name.
    pub name: String,
    /// Line of the file on which it starts, from 1.
    pub line: usize,
    /// Gene names with the weight given, in file order.
    pub genes: Vec<(String, Option<f32>)>,
}

/// A marker file before its genes are looked up.
#[derive(Debug, Clone, PartialEq)]
pub struct MarkerFile {
    /// Where it was read from.
    pub path: PathBuf,
    /// The sets in file order.
    pub sets: Vec<NamedSet>,
    /// Genes that were named more than once in one set.
    pub repeated_genes: usize,
}

impl MarkerFile {
    /// Reads and checks the file at `path`.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes =
            whole_file::unpack(path, "read the marker file", FILE_MAX_BYTES).map_err(|e| match e.code() {
                Code::FileMissing => e.next("check the path given as --markers"),
                _ => e,
            })?;
        Self::parse(&bytes, path)
    }

    /// Checks the unpacked bytes of a file; `path` is named in errors.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let mut file = MarkerFile { path: path.into(), sets: Vec::new(), repeated_genes: 0 };
        let mut table: Option<Columns> = None;
        let mut line_of_set: HashMap<String, usize> = HashMap::new();
        for (n, raw) in bytes.split(|&b| b == b'\n').enumerate() {
            let place = |column: usize| format!("{}:{}:{column}", path.display(), n + 1);
            if raw.len() > LINE_MAX_BYTES {
                return Err(Error::new(Code::MarkerLimits, "a line of the marker file is too long")
                    .at(place(1))
                    .found(format!("{} MB without a line break", raw.len() >> 20))
                    .wanted(format!("lines of at most {} MB: one set a line", LINE_MAX_BYTES >> 20)));
            }
            if let Some(zero) = raw.iter().position(|&b| b == 0) {
                return Err(not_text(path).at(place(zero + 1)).found("a zero byte: a binary file"));
            }
            let line = std::str::from_utf8(raw).map_err(|e| {
                not_text(path).at(place(e.valid_up_to() + 1)).found("bytes that are not UTF-8")
            })?;
            let line = line.strip_suffix('\r').unwrap_or(line);
            let line = if n == 0 { line.strip_prefix('\u{feff}').unwrap_or(line) } else { line };
            if line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            let fields: Vec<&str> = line.split('\t').map(str::trim).collect();
            if fields.len() == 1 {
                return Err(Error::new(Code::MarkerForm, "a line of the marker file has no tab")
                    .at(place(1))
                    .found(format!("{:?}", clip(line, 60)))
                    .wanted(
                        "name<TAB>description<TAB>gene<TAB>gene… (GMT), or a table set<TAB>gene[<TAB>weight]",
                    ));
            }
            if let Some(long) = fields.iter().find(|f| f.chars().count() > NAME_MAX_CHARS) {
                return Err(Error::new(Code::MarkerLimits, "a name in the marker file is too long")
                    .at(place(1))
                    .found(format!("{} characters: {:?}", long.chars().count(), clip(long, 40)))
                    .wanted(format!("at most {NAME_MAX_CHARS}")));
            }
            if file.sets.is_empty() && table.is_none() {
                table = Columns::of(&fields);
                if table.is_some() {
                    continue;
                }
            }
            match &table {
                Some(columns) => file.table_row(columns, &fields, n + 1, &mut line_of_set, &place(1))?,
                None => file.gmt_row(&fields, n + 1, &mut line_of_set, &place(1))?,
            }
            if file.sets.len() > SETS_MAX {
                return Err(Error::new(Code::MarkerLimits, "too many marker sets")
                    .at(place(1))
                    .wanted(format!("at most {SETS_MAX}")));
            }
        }
        if bytes.len() as u64 > FILE_MAX_BYTES {
            return Err(Error::new(Code::MarkerLimits, "the marker file is too large")
                .at(path.display())
                .wanted(format!("at most {} MB unpacked", FILE_MAX_BYTES >> 20)));
        }
        if file.sets.is_empty() {
            return Err(Error::new(Code::MarkerForm, "the marker file holds no set")
                .at(path.display())
                .found(format!("{} bytes", bytes.len()))
                .wanted("one line a set: name<TAB>description<TAB>gene<TAB>gene…"));
        }
        file.finish()?;
        Ok(file)
    }

    fn gmt_row(
        &mut self,
        fields: &[&str],
        line: usize,
        line_of_set: &mut HashMap<String, usize>,
        place: &str,
    ) -> Result<()> {
        let name = fields[0];
        if name.is_empty() {
            return Err(Error::new(Code::MarkerForm, "a marker set has no name").at(place));
        }
        if let Some(first) = line_of_set.insert(name.to_string(), line) {
            return Err(Error::new(Code::MarkerSets, format!("marker set {name:?} occurs twice"))
                .at(place)
                .found(format!("first on line {first}"))
                .wanted("one line per set")
                .next("rename one of them, or join their genes on one line"));
        }
        let genes = fields.iter().skip(2).filter(|g| !g.is_empty());
        let genes = genes.map(|g| weighted_gene(g, place)).collect::<Result<_>>()?;
        self.sets.push(NamedSet { name: name.to_string(), line, genes });
        Ok(())
    }

    fn table_row(
        &mut self,
        columns: &Columns,
        fields: &[&str],
        line: usize,
        line_of_set: &mut HashMap<String, usize>,
        place: &str,
    ) -> Result<()> {
        let field = |i: usize| fields.get(i).copied().unwrap_or("");
        let (name, gene) = (field(columns.set), field(columns.gene));
        if name.is_empty() || gene.is_empty() {
            return Err(Error::new(Code::MarkerForm, "a row of the marker table lacks its set or its gene")
                .at(place)
                .found(format!("{:?}", clip(&fields.join("\t"), 60))));
        }
        let weight = match columns.weight.map(field) {
            None | Some("") => None,
            Some(text) => Some(weight(text).ok_or_else(|| bad_weight(text, place))?),
        };
        let at = *line_of_set.entry(name.to_string()).or_insert_with(|| {
            self.sets.push(NamedSet { name: name.to_string(), line, genes: Vec::new() });
            self.sets.len() - 1
        });
        self.sets[at].genes.push((gene.to_string(), weight));
        Ok(())
    }

    /// Checks each set as a whole and drops repeated genes.
    fn finish(&mut self) -> Result<()> {
        for set in &mut self.sets {
            let place = format!("{}:{}", self.path.display(), set.line);
            if set.genes.is_empty() {
                return Err(Error::new(Code::MarkerSets, format!("marker set {:?} has no genes", set.name))
                    .at(place)
                    .wanted("name<TAB>description<TAB>gene<TAB>gene…")
                    .next("add genes, or delete the line"));
            }
            let given = set.genes.iter().filter(|(_, w)| w.is_some()).count();
            if given != 0 && given != set.genes.len() {
                return Err(Error::new(
                    Code::MarkerSets,
                    format!("only some genes of marker set {:?} have a weight", set.name),
                )
                .at(place)
                .found(format!("{given} of {}", set.genes.len()))
                .wanted("a weight for every gene of the set, or for none"));
            }
            if given != 0 && set.genes.iter().all(|(_, w)| *w == Some(0.0)) {
                return Err(Error::new(
                    Code::MarkerSets,
                    format!("all weights of marker set {:?} are 0", set.name),
                )
                .at(place));
            }
            let mut seen = HashSet::new();
            let before = set.genes.len();
            set.genes.retain(|(gene, _)| seen.insert(gene.clone()));
            self.repeated_genes += before - set.genes.len();
        }
        Ok(())
    }

    /// Looks the genes up in `vocab`: token names, Ensembl ids with any version, symbols, and the symbols of `gene_map`.
    ///
    /// # Errors
    /// Input: not one gene of the whole file is known.
    pub fn resolve(&self, vocab: &Vocab, gene_map: Option<&SymbolMap>) -> Result<RawSets> {
        let with_map;
        let vocab = match gene_map {
            Some(map) => {
                let mut own = vocab.clone();
                own.attach_symbols(map.pairs());
                with_map = own;
                &with_map
            }
            None => vocab,
        };
        let mut raw =
            RawSets { path: self.path.clone(), repeated_genes: self.repeated_genes, ..RawSets::default() };
        for set in &self.sets {
            let mut resolved = ResolvedSet { name: set.name.clone(), ..ResolvedSet::default() };
            let mut seen = HashSet::new();
            for (gene, weight) in &set.genes {
                match vocab.resolve(gene) {
                    Match::One(token) if seen.insert(token) => resolved.genes.push((token, *weight)),
                    Match::One(_) => resolved.repeated += 1,
                    Match::Unknown => resolved.unknown.push(gene.clone()),
                    Match::Ambiguous(_) => resolved.ambiguous.push(gene.clone()),
                }
            }
            raw.sets.push(resolved);
        }
        if raw.sets.iter().all(|s| s.genes.is_empty()) {
            let sample: Vec<&str> =
                self.sets.iter().flat_map(|s| &s.genes).take(3).map(|(g, _)| g.as_str()).collect();
            let example =
                (0..vocab.len() as u32).find(|&t| !vocab.is_special(t)).map_or("", |t| vocab.token(t));
            let symbols = if vocab.has_symbols() { "with symbols" } else { "without symbols" };
            return Err(Error::new(
                Code::MarkerGenesUnknown,
                "the vocabulary knows no gene of the marker file",
            )
            .at(self.path.display())
            .found(format!("genes such as {}", sample.join(", ")))
            .wanted(format!(
                "genes of the vocabulary ({} genes, {symbols}), such as {example}",
                vocab.genes()
            ))
            .next("give the symbols' Ensembl ids with --gene-map SYMBOLS.tsv"));
        }
        Ok(raw)
    }
}

fn not_text(path: &Path) -> Error {
    Error::new(Code::MarkerForm, "this is not a marker file")
        .at(path.display())
        .wanted("UTF-8 text, plain or gzip: GMT, or a table set<TAB>gene[<TAB>weight]")
}

fn weight(text: &str) -> Option<f32> {
    text.parse::<f32>().ok().filter(|w| w.is_finite() && *w >= 0.0)
}

fn bad_weight(text: &str, place: &str) -> Error {
    Error::new(Code::MarkerForm, "a marker weight cannot be used")
        .at(place)
        .found(format!("{text:?}"))
        .wanted("a number of at least 0")
}

/// `GENE` or `GENE,WEIGHT`. What follows a comma must be a number if it begins like one.
fn weighted_gene(field: &str, place: &str) -> Result<(String, Option<f32>)> {
    match field.rsplit_once(',') {
        Some((gene, text)) if !gene.trim().is_empty() => {
            let text = text.trim();
            match weight(text) {
                Some(w) => Ok((gene.trim().to_string(), Some(w))),
                None if text.parse::<f64>().is_ok() => Err(bad_weight(text, place)),
                None => Ok((field.to_string(), None)),
            }
        }
        _ => Ok((field.to_string(), None)),
    }
}

/// Which columns of a marker table hold what.
struct Columns {
    set: usize,
    gene: usize,
    weight: Option<usize>,
}

impl Columns {
    /// The columns, if `fields` is the header of a marker table.
    fn of(fields: &[&str]) -> Option<Columns> {
        let find = |names: &[&str]| fields.iter().position(|f| names.contains(&f.to_lowercase().as_str()));
        Some(Columns {
            set: find(&["set", "label", "cell_type"])?,
            gene: find(&["gene", "gene_id", "symbol"])?,
            weight: find(&["weight"]),
        })
    }
}

/// A set whose genes were looked up.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ResolvedSet {
    /// Name in the file.
    pub name: String,
    /// Known genes as tokens with the weight given, each once.
    pub genes: Vec<(u32, Option<f32>)>,
    /// Names that the vocabulary does not know.
    pub unknown: Vec<String>,
    /// Names that mean several genes.
    pub ambiguous: Vec<String>,
    /// Names that mean a gene already in the set.
    pub repeated: usize,
}

/// The sets of a file as tokens, before they are chosen and weighted.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RawSets {
    /// Where they came from.
    pub path: PathBuf,
    /// In file order; a set may be without a known gene.
    pub sets: Vec<ResolvedSet>,
    /// Gene names that stood more than once in one set of the file.
    pub repeated_genes: usize,
}

impl RawSets {
    /// Reads the marker file at `path` and looks its genes up in `vocab`, with the help of the symbols in `gene_map`.
    pub fn load(path: &Path, vocab: &Vocab, gene_map: Option<&Path>) -> Result<Self> {
        let map = gene_map.map(SymbolMap::load).transpose()?;
        MarkerFile::load(path)?.resolve(vocab, map.as_ref())
    }
}
