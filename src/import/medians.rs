//! Files → vocabulary: the exact median, over cells with a count, of counts per 10,000 of every gene.
//!
//! Which genes there are, and one value per cell and gene; [`exact_median`](super::exact_median) selects.

use super::exact_median::exact_medians;
use super::matrix::Pass;
use super::source::{CellSource, OpenOptions, Source};
use crate::error::{Code, Error, Result};
use crate::genes::mapping::{NameColumn, SymbolMap, ensembl_id};
use crate::genes::tokenize::TARGET_SUM;
use crate::genes::vocab::{Vocab, is_special};
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

/// Options of [`build`].
#[derive(Debug, Clone)]
pub struct BuildOptions<'a> {
    /// `X`, `raw` or `layers/NAME`; absent = `X`.
    pub counts: Option<String>,
    /// The genome to take from a 10x file that holds several.
    pub genome: Option<String>,
    /// Column of gene names; absent = the one of Ensembl ids, or else the index.
    pub genes: Option<String>,
    /// Names of the special tokens, which get the first ids.
    pub specials: Vec<String>,
    /// Symbols to attach.
    pub symbols: Option<&'a SymbolMap>,
    /// Genes seen in fewer cells get no token.
    pub min_cells: u64,
    /// Memory for values, in bytes.
    pub memory_bytes: u64,
    /// Accept values that are no integers.
    pub allow_non_integer: bool,
    /// Look at the cells with these names alone: the training part, so that medians know nothing of test cells.
    pub cells: Option<&'a HashSet<String>>,
}

impl Default for BuildOptions<'_> {
    fn default() -> Self {
        BuildOptions {
            counts: None,
            genome: None,
            genes: None,
            specials: ["<pad>", "<mask>", "<cls>", "<eos>"].map(String::from).to_vec(),
            symbols: None,
            min_cells: 1,
            memory_bytes: 2 << 30,
            allow_non_integer: false,
            cells: None,
        }
    }
}

/// What [`build`] found.
#[derive(Debug)]
pub struct Built {
    /// The vocabulary, genes in ascending order of their names.
    pub vocab: Vocab,
    /// Cells looked at.
    pub cells: u64,
    /// Passes over the inputs.
    pub passes: usize,
    /// Genes named in the inputs without enough cells to have a median.
    pub unseen: usize,
    /// Lines for people.
    pub notes: Vec<String>,
}

/// Builds a vocabulary from the genes of `inputs`.
///
/// # Errors
/// Input: anything wrong in a file; no gene has a count.
pub fn build(inputs: &[PathBuf], options: &BuildOptions<'_>) -> Result<Built> {
    let how = OpenOptions {
        counts: options.counts.as_deref(),
        genome: options.genome.as_deref(),
        allow_non_integer: options.allow_non_integer,
    };
    let open = |path: &PathBuf| {
        match Source::open(path, &how)? {
        Source::Counts(source) => Ok(source),
        Source::Tokens(_) => Err(Error::new(Code::NoCounts, "medians come from counts, and a tokenised data set has none")
            .at(path.display())
            .wanted("an .h5ad file, a 10x .h5 file or a 10x MTX folder")
            .next("convert the dictionaries that it was made with: cellrefine vocab convert TOKENS MEDIANS --out V.tsv")),
    }
    };
    let mut genes = Genes::default();
    let mut files = Vec::new();
    let (mut cells, mut entries) = (0, 0);
    let mut notes = Vec::new();
    for path in inputs {
        let source = open(path)?;
        let wanted = options.cells.map(|names| wanted_rows(source.as_ref(), names)).transpose()?;
        cells += wanted.as_ref().map_or(source.cells(), |w| w.iter().filter(|w| **w).count() as u64);
        entries += source.entries();
        let names = source.gene_names()?;
        let (column, note) = choose(&names, options.genes.as_deref(), source.gene_place())?;
        notes.push(note);
        files.push((path, genes.add(&names, column), wanted));
    }
    if let Some(names) = options.cells
        && cells == 0
    {
        return Err(Error::new(Code::NoCounts, "none of the cells to look at is in the inputs")
            .found(format!(
                "{} names, such as {}",
                names.len(),
                names.iter().min().map_or("", String::as_str)
            ))
            .wanted("names as in obs"));
    }
    let mut passes = 0;
    let scratch = std::env::temp_dir();
    let pass = Pass {
        memory_bytes: options.memory_bytes,
        allow_non_integer: options.allow_non_integer,
        scratch: &scratch,
        rows: (0, u64::MAX),
    };
    let mut for_each_value = |each: &mut dyn FnMut(u32, f64)| -> Result<()> {
        passes += 1;
        for (path, gene_of_column, wanted) in &files {
            let source = open(path)?;
            let mut sums = Sums::new(gene_of_column, genes.name.len());
            source.for_each_block(&pass, &mut |block| {
                for row in 0..block.rows() {
                    if wanted.as_ref().is_some_and(|w| !w[block.first as usize + row]) {
                        continue;
                    }
                    let (columns, counts) = block.row(row);
                    sums.cell(columns, counts, each);
                }
                Ok(())
            })?;
        }
        Ok(())
    };
    let medians = exact_medians(
        genes.name.len(),
        entries,
        options.memory_bytes / 2,
        options.min_cells,
        &mut for_each_value,
    )?;
    let mut order: Vec<usize> = (0..genes.name.len()).filter(|&g| medians[g].is_some()).collect();
    if order.is_empty() {
        return Err(Error::new(Code::NoCounts, "no gene has a count").at(inputs
            .iter()
            .map(|p| p.display().to_string())
            .collect::<Vec<_>>()
            .join(", ")));
    }
    order.sort_unstable_by(|&a, &b| genes.name[a].cmp(&genes.name[b]));
    let specials = options.specials.iter().cloned();
    let token: Vec<String> = specials.chain(order.iter().map(|&g| genes.name[g].clone())).collect();
    let mut median = vec![0.0; options.specials.len()];
    median.extend(order.iter().filter_map(|&g| medians[g]));
    let mut vocab = Vocab::from_parts(token, median, Vec::new())?;
    let own: Vec<(&str, &str)> = order
        .iter()
        .flat_map(|&g| genes.symbols[g].iter().map(move |s| (g, s)))
        .map(|(g, s)| (genes.name[g].as_str(), s.as_str()))
        .collect();
    let mut with = vocab.attach_symbols(own);
    if let Some(map) = options.symbols {
        with = vocab.attach_symbols(map.pairs());
    }
    notes.push(format!("{with} of {} genes have a symbol", vocab.genes()));
    Ok(Built { unseen: genes.name.len() - order.len(), vocab, cells, passes, notes })
}

/// Which rows have one of `names`.
fn wanted_rows(source: &dyn CellSource, names: &HashSet<String>) -> Result<Vec<bool>> {
    let obs = source.obs();
    Ok(obs.all_texts(obs.index())?.iter().map(|name| names.contains(name)).collect())
}

/// Genes met so far, over all inputs.
#[derive(Default)]
struct Genes {
    name: Vec<String>,
    symbols: Vec<Vec<String>>,
    id: HashMap<String, u32>,
}

impl Genes {
    /// Registers the names of one input; gives the gene of each matrix column. Symbols come from a column of another kind.
    fn add(&mut self, names: &[NameColumn], column: usize) -> Vec<Option<u32>> {
        let by_id = names[column].values.iter().any(|v| ensembl_id(v).is_some());
        let symbols = names
            .iter()
            .enumerate()
            .filter(|(n, _)| by_id && *n != column)
            .map(|(_, c)| c)
            .find(|c| looks_like_symbols(c));
        let gene = |(n, name): (usize, &String)| {
            let name = ensembl_id(name).unwrap_or_else(|| name.trim().to_string());
            if name.is_empty() || is_special(&name) {
                return None;
            }
            let next = self.name.len() as u32;
            let id = *self.id.entry(name.clone()).or_insert(next);
            if id == next {
                self.name.push(name);
                self.symbols.push(Vec::new());
            }
            if let Some(symbol) =
                symbols.map(|c| c.values[n].trim()).filter(|s| !s.is_empty() && ensembl_id(s).is_none())
            {
                let known = &mut self.symbols[id as usize];
                if known.iter().all(|k| k != symbol) {
                    known.push(symbol.to_string());
                }
            }
            Some(id)
        };
        names[column].values.iter().enumerate().map(gene).collect()
    }
}

/// Column names that AnnData files use for symbols; a symbol column looks like nothing in particular.
fn looks_like_symbols(column: &NameColumn) -> bool {
    const NAMES: [&str; 12] = [
        "gene_symbol",
        "gene_symbols",
        "symbol",
        "symbols",
        "feature_name",
        "gene_name",
        "gene_names",
        "gene_short_name",
        "hgnc_symbol",
        "genesymbol",
        "name",
        "genes",
    ];
    let name = column.name.to_lowercase();
    NAMES.contains(&name.as_str())
        || (matches!(name.as_str(), "_index" | "index")
            && column.values.iter().take(100).all(|v| ensembl_id(v).is_none()))
}

/// The column of gene ids: the wanted one, else the one with most Ensembl ids if that is most of the column, else the index.
fn choose(names: &[NameColumn], wanted: Option<&str>, place: &str) -> Result<(usize, String)> {
    if let Some(wanted) = wanted {
        return names
            .iter()
            .position(|c| c.name == wanted)
            .map(|n| (n, format!("genes from column {wanted}")))
            .ok_or_else(|| {
                let all: Vec<&str> = names.iter().map(|c| c.name.as_str()).collect();
                Error::new(Code::ColumnMissing, format!("there is no gene column {wanted:?}"))
                    .at(place)
                    .found(format!("text columns {}", all.join(", ")))
                    .next("name one of these with --genes")
            });
    }
    let ids = |c: &NameColumn| c.values.iter().filter(|v| ensembl_id(v).is_some()).count();
    let best = (0..names.len()).map(|n| (ids(&names[n]), n)).reduce(|a, b| if b.0 > a.0 { b } else { a });
    match best {
        Some((count, n)) if 2 * count > names[n].values.len() => Ok((
            n,
            format!(
                "{count} of {} genes have an Ensembl id in column {}",
                names[n].values.len(),
                names[n].name
            ),
        )),
        Some(_) => Ok((
            0,
            format!("no column looks like Ensembl ids: tokens are the names of column {}", names[0].name),
        )),
        None => Err(Error::new(Code::GeneNamesMissing, "there is no column of gene names").at(place)),
    }
}

/// Counts of one cell, summed per gene.
struct Sums<'a> {
    gene_of_column: &'a [Option<u32>],
    sum: Vec<f64>,
    touched: Vec<u32>,
}

impl<'a> Sums<'a> {
    fn new(gene_of_column: &'a [Option<u32>], genes: usize) -> Self {
        Sums { gene_of_column, sum: vec![0.0; genes], touched: Vec::new() }
    }

    fn cell(&mut self, columns: &[u32], counts: &[f64], each: &mut dyn FnMut(u32, f64)) {
        let total: f64 = counts.iter().sum();
        for (&column, &x) in columns.iter().zip(counts) {
            if let (Some(gene), true) = (self.gene_of_column[column as usize], x > 0.0) {
                let sum = &mut self.sum[gene as usize];
                if *sum == 0.0 {
                    self.touched.push(gene);
                }
                *sum += x;
            }
        }
        for gene in self.touched.drain(..) {
            each(gene, std::mem::take(&mut self.sum[gene as usize]) / total * TARGET_SUM);
        }
    }
}
