//! Which column of a count matrix is which token.
//!
//! An entry is looked up as an Ensembl gene id (`^ENS[A-Z]{0,4}G\d{11}(\.\d+)?$` in any case, version dropped), then as a token
//! name, then as a symbol through the mapping file and through the vocabulary's own symbols, then as a symbol in upper case
//! (counted apart: many of these mean another species). Recognition is per entry, never "most of the column". Without an
//! explicit column, a column of `var` that is mostly Ensembl ids is taken if at least half of what could match does, and else the
//! one with most matches, the index first among equals.
//!
//! The share that decides failure is matched / min(entries of the file, genes of the vocabulary): a file annotated with 60,000
//! genes is fine when it covers the vocabulary's 25,000, a panel of 500 genes is fine when its genes are known, and a wrong
//! column or species is near 0 either way.

pub(crate) use super::symbol_map::read_text;
pub use super::symbol_map::{SymbolMap, ensembl_id};
use super::vocab::{Match, Vocab};
use crate::error::{Code, Error, Result, nearest};
use std::fmt::Write as _;

/// Names shown per group of the report.
const SAMPLES: usize = 5;

/// A column of gene names: one per matrix column, empty = missing.
#[derive(Debug, Clone)]
pub struct NameColumn {
    /// Its name in `var`.
    pub name: String,
    /// One entry per matrix column.
    pub values: Vec<String>,
}

/// How names are looked up.
#[derive(Debug, Clone, Copy)]
pub struct MappingOptions<'a> {
    /// The column of gene names; absent = the one with most matches.
    pub column: Option<&'a str>,
    /// Symbols to Ensembl ids.
    pub symbols: Option<&'a SymbolMap>,
    /// Least share of matches, 0 to 1.
    pub min_match: f64,
}

/// The token of every matrix column, and the report about it.
#[derive(Debug, Clone)]
pub struct GeneMapping {
    /// One entry per matrix column; `None` = not in the vocabulary.
    pub token: Vec<Option<u32>>,
    /// Counts and samples.
    pub report: MappingReport,
}

/// What became of the gene names of one file.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct MappingReport {
    /// The column that was used.
    pub column: String,
    /// Matrix columns.
    pub entries: usize,
    /// Genes of the vocabulary.
    pub vocabulary_genes: usize,
    /// Entries with a token.
    pub matched: usize,
    /// Distinct tokens among them.
    pub tokens: usize,
    /// matched / min(entries, vocabulary_genes).
    pub share: f64,
    /// Entries without a token.
    pub unmatched: usize,
    /// Entries that are empty, part of `unmatched`.
    pub empty: usize,
    /// Symbols that mean several tokens: left out, part of `unmatched`.
    pub ambiguous: usize,
    /// Entries beyond the first of their token: their counts are summed into it.
    pub duplicated: usize,
    /// Entries that matched as a symbol in upper case only.
    pub upper_cased: usize,
    /// Some names without a token.
    pub unmatched_sample: Vec<String>,
    /// Some ambiguous names.
    pub ambiguous_sample: Vec<String>,
    /// Some names whose token was there before.
    pub duplicated_sample: Vec<String>,
}

pub(super) enum Found {
    Token(u32),
    Unknown,
    Ambiguous,
}

fn look_up_symbol(symbol: &str, vocab: &Vocab, symbols: Option<&SymbolMap>) -> Found {
    match symbols.map_or(Found::Unknown, |m| m.tokens(symbol, vocab)) {
        Found::Unknown => match vocab.by_symbol(symbol) {
            Match::One(id) => Found::Token(id),
            Match::Ambiguous(_) => Found::Ambiguous,
            Match::Unknown => Found::Unknown,
        },
        found => found,
    }
}

/// The token of one name, and whether it took upper-casing a symbol.
fn look_up(name: &str, vocab: &Vocab, symbols: Option<&SymbolMap>) -> (Found, bool) {
    let name = name.trim();
    if name.is_empty() || super::vocab::is_special(name) {
        return (Found::Unknown, false);
    }
    if let Some(id) = ensembl_id(name) {
        let token = vocab.id(&id).or_else(|| vocab.id(name));
        return (token.map_or(Found::Unknown, Found::Token), false);
    }
    if let Some(id) = vocab.id(name) {
        return (Found::Token(id), false);
    }
    match look_up_symbol(name, vocab, symbols) {
        Found::Unknown => {
            let upper = name.to_uppercase();
            if upper == name {
                return (Found::Unknown, false);
            }
            let token = vocab.id(&upper).map_or_else(|| look_up_symbol(&upper, vocab, symbols), Found::Token);
            let folded = matches!(token, Found::Token(_));
            (token, folded)
        }
        found => (found, false),
    }
}

fn map_column(column: &NameColumn, vocab: &Vocab, symbols: Option<&SymbolMap>) -> GeneMapping {
    let mut report = MappingReport {
        column: column.name.clone(),
        entries: column.values.len(),
        vocabulary_genes: vocab.genes(),
        matched: 0,
        tokens: 0,
        share: 0.0,
        unmatched: 0,
        empty: 0,
        ambiguous: 0,
        duplicated: 0,
        upper_cased: 0,
        unmatched_sample: Vec::new(),
        ambiguous_sample: Vec::new(),
        duplicated_sample: Vec::new(),
    };
    let keep = |sample: &mut Vec<String>, name: &str| {
        if sample.len() < SAMPLES {
            sample.push(super::vocab::clip(name, 60));
        }
    };
    let mut seen = vec![false; vocab.len()];
    let token = column.values.iter().map(|name| {
        let (found, folded) = look_up(name, vocab, symbols);
        match found {
            Found::Token(id) => {
                report.matched += 1;
                report.upper_cased += usize::from(folded);
                if std::mem::replace(&mut seen[id as usize], true) {
                    report.duplicated += 1;
                    keep(&mut report.duplicated_sample, name);
                } else {
                    report.tokens += 1;
                }
                return Some(id);
            }
            Found::Ambiguous => {
                report.ambiguous += 1;
                keep(&mut report.ambiguous_sample, name);
            }
            Found::Unknown if name.trim().is_empty() => report.empty += 1,
            Found::Unknown => keep(&mut report.unmatched_sample, name),
        }
        report.unmatched += 1;
        None
    });
    let token: Vec<Option<u32>> = token.collect();
    let possible = report.entries.min(report.vocabulary_genes);
    report.share = if possible == 0 { 0.0 } else { report.matched as f64 / possible as f64 };
    GeneMapping { token, report }
}

/// Maps the matrix columns of one file onto the vocabulary.
///
/// `columns` are the index of `var` and its text columns; `place` names the file and slot for messages.
///
/// # Errors
/// Input: the wanted column is absent, there is none, or fewer genes match than `min_match` asks for.
pub fn map_genes(
    columns: &[NameColumn],
    vocab: &Vocab,
    options: MappingOptions<'_>,
    place: &str,
) -> Result<GeneMapping> {
    let names = || columns.iter().map(|c| c.name.as_str());
    let mapping = match options.column {
        Some(wanted) => {
            let column = columns.iter().find(|c| c.name == wanted).ok_or_else(|| {
                let hint = nearest(wanted, names()).map_or(String::new(), |n| format!("; did you mean {n}?"));
                Error::new(Code::ColumnMissing, format!("there is no gene column {wanted:?}"))
                    .at(place)
                    .found(format!("text columns {}{hint}", names().collect::<Vec<_>>().join(", ")))
                    .next("name one of these with --genes, or leave --genes out")
            })?;
            map_column(column, vocab, options.symbols)
        }
        None => {
            let best = |columns: &mut dyn Iterator<Item = &NameColumn>| {
                columns
                    .map(|c| map_column(c, vocab, options.symbols))
                    // The first of the best: `max_by_key` would give the last.
                    .reduce(|best, m| if m.report.matched > best.report.matched { m } else { best })
            };
            // Ids say exactly what they mean, symbols do not: a column of ids wins as soon as it is good enough.
            best(&mut columns.iter().filter(|c| looks_ensembl(c)))
                .filter(|m| m.report.share >= options.min_match.max(0.5))
                .or_else(|| best(&mut columns.iter()))
                .ok_or_else(|| {
                    Error::new(Code::GeneNamesMissing, "there is no column of gene names").at(place)
                })?
        }
    };
    if mapping.report.matched == 0 || mapping.report.share < options.min_match {
        return Err(too_few(columns, vocab, &mapping.report, options, place));
    }
    Ok(mapping)
}

/// Are most entries Ensembl gene ids?
fn looks_ensembl(column: &NameColumn) -> bool {
    2 * column.values.iter().filter(|v| ensembl_id(v).is_some()).count() > column.values.len()
}

fn too_few(
    columns: &[NameColumn],
    vocab: &Vocab,
    r: &MappingReport,
    options: MappingOptions<'_>,
    place: &str,
) -> Error {
    let samples = |c: &NameColumn| {
        let some: Vec<String> = c
            .values
            .iter()
            .filter(|v| !v.trim().is_empty())
            .take(3)
            .map(|v| super::vocab::clip(v, 40))
            .collect();
        some.join(", ")
    };
    let sample = columns.iter().find(|c| c.name == r.column).map_or(String::new(), samples);
    let next = match columns.iter().find(|c| looks_ensembl(c)) {
        Some(c) if c.name != r.column => format!("--genes {} (that column holds Ensembl ids: {})", c.name, samples(c)),
        Some(_) => "these are Ensembl ids that the vocabulary lacks: another species, or the wrong --vocab? \
                    --min-gene-match lowers the bar"
            .to_string(),
        None if options.symbols.is_none() && !vocab.has_symbols() => {
            "no column looks like Ensembl: give symbols with --gene-map FILE (symbol<TAB>Ensembl id) or --genes COL".to_string()
        }
        None => "no column looks like Ensembl: choose the column of symbols with --genes COL, or check the species".to_string(),
    };
    let genes = (0..vocab.len() as u32).filter(|&i| !vocab.is_special(i)).take(3).map(|i| vocab.token(i));
    Error::new(
        Code::GenesNotRecognised,
        format!("only {} of {} gene names are in the vocabulary", r.matched, r.entries),
    )
    .at(format!("{place}, column {}", r.column))
    .found(format!("names such as {sample}; share {:.3} of what could match", r.share))
    .wanted(format!(
        "at least {} of {} (--min-gene-match), names such as {}",
        options.min_match,
        r.entries.min(r.vocabulary_genes),
        genes.collect::<Vec<_>>().join(", ")
    ))
    .next(next)
}

impl MappingReport {
    /// A few lines for people.
    pub fn to_text(&self) -> String {
        let mut out = format!(
            "genes from column {}: {} of {} names matched ({:.1} % of what could match), {} of the vocabulary's {} genes",
            self.column,
            self.matched,
            self.entries,
            100.0 * self.share,
            self.tokens,
            self.vocabulary_genes
        );
        let mut group = |count: usize, what: &str, sample: &[String]| {
            if count > 0 {
                let some = if sample.is_empty() { String::new() } else { format!(": {}", sample.join(", ")) };
                let more = if sample.len() < count && !sample.is_empty() { ", …" } else { "" };
                let _ = write!(out, "\n  {count} {what}{some}{more}");
            }
        };
        group(self.unmatched - self.ambiguous - self.empty, "not in the vocabulary", &self.unmatched_sample);
        group(self.empty, "without a name", &[]);
        group(self.ambiguous, "ambiguous symbols left out", &self.ambiguous_sample);
        group(self.duplicated, "duplicates summed", &self.duplicated_sample);
        group(self.upper_cased, "matched in upper case only (another species?)", &[]);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vocab() -> Vocab {
        let token = [
            "<pad>",
            "<mask>",
            "ENSG00000000003",
            "ENSG00000000005",
            "ENSG00000000007",
            "ENSMUSG00000000001",
        ];
        let symbol = ["", "", "AA", "BB|OLD", "CC|OLD", ""].map(str::to_string).to_vec();
        let median = vec![0.0, 0.0, 1.0, 1.0, 1.0, 1.0];
        Vocab::from_parts(token.map(str::to_string).to_vec(), median, symbol).unwrap()
    }
    fn column(name: &str, values: &[&str]) -> NameColumn {
        NameColumn { name: name.into(), values: values.iter().map(|s| s.to_string()).collect() }
    }
    const FREE: MappingOptions<'static> = MappingOptions { column: None, symbols: None, min_match: 0.0 };

    #[test]
    fn ensembl_ids_are_told_from_symbols_and_transcripts() {
        for (name, id) in [
            ("ENSG00000000003", Some("ENSG00000000003")),
            ("ensg00000000003.17", Some("ENSG00000000003")),
            (" ENSMUSG00000000001.4 ", Some("ENSMUSG00000000001")),
            ("ENSABCDG00000000001", Some("ENSABCDG00000000001")),
            ("ENSABCDEG00000000001", None),
            ("ENSA", None),
            ("ENST00000000003", None),
            ("ENSG0000000003", None),
            ("ENSG000000000035", None),
            ("ENSG00000000003.", None),
            ("ENSG00000000003.x", None),
            ("ENSG00000000003.1.2", None),
            ("ENSGR0000000003", None),
            ("ÉNSG00000000003", None),
            ("", None),
        ] {
            assert_eq!(ensembl_id(name).as_deref(), id, "{name}");
        }
    }

    #[test]
    fn every_entry_is_looked_up_on_its_own() {
        let names = ["ENSG00000000003.2", "BB", "cc", "OLD", "", "?", "AA", "<mask>", "ENSMUSG00000000001"];
        let m = map_genes(&[column("index", &names)], &vocab(), FREE, "f").unwrap();
        assert_eq!(m.token, [Some(2), Some(3), Some(4), None, None, None, Some(2), None, Some(5)]);
        let r = &m.report;
        assert_eq!((r.matched, r.tokens, r.unmatched, r.ambiguous, r.duplicated), (5, 4, 4, 1, 1));
        assert_eq!((r.empty, r.upper_cased, r.share), (1, 1, 5.0 / 4.0));
        assert_eq!(r.ambiguous_sample, ["OLD"]);
        let text = r.to_text();
        assert!(
            text.contains("1 duplicates summed: AA") && text.contains("2 not in the vocabulary: ?, <mask>"),
            "{text}"
        );
    }

    #[test]
    fn the_column_with_most_matches_is_taken_and_the_index_among_equals() {
        let columns = [
            column("index", &["AA", "zz", "yy"]),
            column("id", &["ENSG00000000003", "ENSG00000000005", ""]),
            column("same", &["AA", "BB", ""]),
        ];
        assert_eq!(map_genes(&columns, &vocab(), FREE, "f").unwrap().report.column, "id");
        let asked = MappingOptions { column: Some("index"), ..FREE };
        assert_eq!(map_genes(&columns, &vocab(), asked, "f").unwrap().report.matched, 1);
        let typo = MappingOptions { column: Some("samee"), ..FREE };
        assert!(
            map_genes(&columns, &vocab(), typo, "f").unwrap_err().to_string().contains("did you mean same")
        );
    }

    #[test]
    fn too_few_matches_name_the_column_samples_and_the_better_column() {
        let columns = [
            column("index", &["g1", "g2", "g3", "g4"]),
            column("id", &["ENSG00000000003.1", "ENSG00000000005", "ENSG00000000009", "x"]),
        ];
        let asked = MappingOptions { column: Some("index"), min_match: 0.5, symbols: None };
        let e = map_genes(&columns, &vocab(), asked, "a.h5ad:var").unwrap_err().to_string();
        for needle in ["a.h5ad:var, column index", "g1, g2, g3", "--genes id", "0 of 4"] {
            assert!(e.contains(needle), "{needle} not in {e}");
        }
        let strict = MappingOptions { min_match: 0.51, ..FREE };
        assert!(map_genes(&columns, &vocab(), strict, "f").is_err(), "2 of 4 is below 0.51");
        assert!(map_genes(&columns, &vocab(), MappingOptions { min_match: 0.5, ..FREE }, "f").is_ok());
    }

    #[test]
    fn a_gene_map_reads_both_orders_gzip_and_finds_ambiguous_symbols() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("map.tsv.gz");
        let text = "gene_symbol\tensembl_id\nS1\tENSG00000000003.4\tx\nENSG00000000005\tS2\r\n\nS3\tENSG00000000003\nS3\tENSG00000000005\nS4\tENSG00000000005\nS4\tENSG99999999999\n";
        let mut gz =
            flate2::write::GzEncoder::new(std::fs::File::create(&path).unwrap(), flate2::Compression::fast());
        std::io::Write::write_all(&mut gz, text.as_bytes()).unwrap();
        gz.finish().unwrap();
        let map = SymbolMap::load(&path).unwrap();
        assert_eq!(map.len(), 6);
        let options = MappingOptions { symbols: Some(&map), ..FREE };
        let m = map_genes(&[column("index", &["S1", "S2", "S3", "S4"])], &vocab(), options, "f").unwrap();
        assert_eq!(
            m.token,
            [Some(2), Some(3), None, Some(3)],
            "an id outside the vocabulary does not make S4 ambiguous"
        );
        assert_eq!(m.report.ambiguous, 1);
        std::fs::write(&path, "a\tb\nS1\tENSG00000000003\nnothing here\n").unwrap();
        assert!(SymbolMap::load(&path).unwrap_err().to_string().contains(":3"));
        std::fs::write(&path, [0x1f, 0x8b, 8, 0, 0]).unwrap();
        assert!(SymbolMap::load(&path).unwrap_err().to_string().contains("gzip"));
    }
}
