//! Files → vocabulary: the exact median, over cells with a count, of counts per 10,000 of every gene.
//!
//! If all values fit the budget they are collected and selected from. If not, a median is narrowed down without keeping values:
//! positive floats order like their bits, so a pass histograms each gene's values into 256 ranges of bits, the range that holds
//! the middle rank is kept, and the next pass looks into it; as soon as what is left fits, it is collected. Two passes shrink the
//! candidates by orders of magnitude, and the result is the same bits as from sorting everything. Of an even number of values
//! the two in the middle are averaged, as `numpy.median` does; they are two targets if they part.

use super::h5ad::{CellSource, H5ad};
use super::matrix::Pass;
use crate::error::{Error, Result};
use crate::genes::mapping::{NameColumn, SymbolMap, ensembl_id};
use crate::genes::tokenize::TARGET_SUM;
use crate::genes::vocab::{Vocab, is_special};
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

/// Ranges per gene and pass.
const BINS: usize = 256;
/// The first pass cuts at quarter octaves from 2^-40 to 2^24; values are below 2^14.
const FIRST_SHIFT: u32 = 50;
const FIRST_KEY: u64 = (1023 - 40) << 2;

/// Options of [`build`].
#[derive(Debug, Clone)]
pub struct BuildOptions<'a> {
    /// `X`, `raw` or `layers/NAME`; absent = `X`.
    pub counts: Option<String>,
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
    let open = |path: &PathBuf| H5ad::open(path, options.counts.as_deref(), options.allow_non_integer);
    let mut genes = Genes::default();
    let mut files = Vec::new();
    let (mut cells, mut entries) = (0, 0);
    let mut notes = Vec::new();
    for path in inputs {
        let source = open(path)?;
        let wanted = options.cells.map(|names| wanted_rows(&source, names)).transpose()?;
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
        return Err(Error::input("none of the cells to look at is in the inputs")
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
        return Err(Error::input("no gene has a count").at(inputs
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
fn wanted_rows(source: &H5ad, names: &HashSet<String>) -> Result<Vec<bool>> {
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
                Error::input(format!("there is no gene column {wanted:?}"))
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
        None => Err(Error::input("there is no column of gene names").at(place)),
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

/// A range of bit patterns that holds one or both middle ranks of a gene.
#[derive(Debug, Clone)]
struct Target {
    low: u64,
    /// Last pattern that belongs to it.
    high: u64,
    /// Ranks within the range; equal where one is looked for.
    ranks: [u64; 2],
    count: u64,
}

type ForEachValue<'a> = dyn FnMut(&mut dyn FnMut(u32, f64)) -> Result<()> + 'a;

/// The median per gene, `None` below `min_cells` values. `for_each_value` runs over all (gene, value) pairs, the same each time;
/// values are positive.
fn exact_medians(
    genes: usize,
    entries: u64,
    memory_bytes: u64,
    min_cells: u64,
    for_each_value: &mut ForEachValue<'_>,
) -> Result<Vec<Option<f64>>> {
    // Growing vectors hold up to twice what is in them.
    let room = (memory_bytes / 16).max(1);
    let enough = |n: u64| n >= min_cells.max(1);
    if entries <= room {
        let mut values: Vec<Vec<f64>> = vec![Vec::new(); genes];
        for_each_value(&mut |gene, value| values[gene as usize].push(value))?;
        let median = |v: &mut Vec<f64>| {
            let n = v.len() as u64;
            enough(n).then(|| middle(select(v, (n - 1) / 2), select(v, n / 2)))
        };
        return Ok(values.iter_mut().map(median).collect());
    }
    let mut targets: Vec<Vec<Target>> = Vec::new();
    let mut histogram = vec![0u64; genes * BINS];
    for_each_value(&mut |gene, value| {
        let bin = (value.to_bits() >> FIRST_SHIFT).saturating_sub(FIRST_KEY).min(BINS as u64 - 1);
        histogram[gene as usize * BINS + bin as usize] += 1;
    })?;
    for bins in histogram.chunks(BINS) {
        let count: u64 = bins.iter().sum();
        let whole = Target { low: 0, high: u64::MAX, ranks: [count.saturating_sub(1) / 2, count / 2], count };
        let range = |bin: usize| {
            let low = if bin == 0 { 0 } else { (FIRST_KEY + bin as u64) << FIRST_SHIFT };
            let high =
                if bin == BINS - 1 { u64::MAX } else { ((FIRST_KEY + bin as u64 + 1) << FIRST_SHIFT) - 1 };
            (low, high)
        };
        targets.push(if enough(count) { narrow(&whole, bins, range) } else { Vec::new() });
    }
    while targets.iter().flatten().map(|t| t.count).sum::<u64>() > room
        && targets.iter().flatten().any(|t| t.low < t.high)
    {
        let first: Vec<usize> = starts(&targets);
        histogram.clear();
        histogram.resize(first[genes] * BINS, 0);
        for_each_value(&mut |gene, value| {
            let key = value.to_bits();
            for (n, t) in targets[gene as usize].iter().enumerate() {
                if (t.low..=t.high).contains(&key) {
                    histogram[(first[gene as usize] + n) * BINS + ((key - t.low) >> shift(t)) as usize] += 1;
                }
            }
        })?;
        for (gene, list) in targets.iter_mut().enumerate() {
            let narrowed = list.iter().enumerate().flat_map(|(n, t)| {
                let bins = &histogram[(first[gene] + n) * BINS..][..BINS];
                let range = |bin: usize| {
                    let low = t.low + ((bin as u64) << shift(t));
                    (low, t.high.min(low + ((1u64 << shift(t)) - 1)))
                };
                narrow(t, bins, range)
            });
            *list = narrowed.collect();
        }
    }
    // What is left fits, or consists of equal values that need no looking at.
    let first = starts(&targets);
    let mut values: Vec<Vec<f64>> = vec![Vec::new(); first[genes]];
    for_each_value(&mut |gene, value| {
        let key = value.to_bits();
        for (n, t) in targets[gene as usize].iter().enumerate() {
            if t.low < t.high && (t.low..=t.high).contains(&key) {
                values[first[gene as usize] + n].push(value);
            }
        }
    })?;
    let mut at = |gene: usize, n: usize, rank: usize, t: &Target| {
        if t.low == t.high {
            f64::from_bits(t.low)
        } else {
            select(&mut values[first[gene] + n], t.ranks[rank])
        }
    };
    Ok(targets
        .iter()
        .enumerate()
        .map(|(gene, list)| match list.as_slice() {
            [] => None,
            [one] => Some(middle(at(gene, 0, 0, one), at(gene, 0, 1, one))),
            [low, high, ..] => Some(middle(at(gene, 0, 0, low), at(gene, 1, 0, high))),
        })
        .collect())
}

/// First index of each gene's targets in a flat list, and their number.
fn starts(targets: &[Vec<Target>]) -> Vec<usize> {
    let mut first = vec![0];
    first.extend(targets.iter().scan(0, |sum, list| {
        *sum += list.len();
        Some(*sum)
    }));
    first
}

/// How far keys of a target are shifted so that its range has at most [`BINS`] bins.
fn shift(t: &Target) -> u32 {
    (64 - (t.high - t.low).leading_zeros()).saturating_sub(BINS.trailing_zeros())
}

/// The bins that hold the target's ranks: one, or two where the ranks part.
fn narrow(t: &Target, bins: &[u64], range: impl Fn(usize) -> (u64, u64)) -> Vec<Target> {
    let find = |rank: u64| {
        let mut below = 0;
        for (bin, &count) in bins.iter().enumerate() {
            if rank < below + count {
                let (low, high) = range(bin);
                return (bin, Target { low, high, ranks: [rank - below; 2], count });
            }
            below += count;
        }
        unreachable!("a rank below the count lies in a bin")
    };
    let (bin, mut first) = find(t.ranks[0]);
    let (other, second) = find(t.ranks[1]);
    if bin == other {
        first.ranks[1] = second.ranks[0];
        return vec![first];
    }
    vec![first, second]
}

fn select(values: &mut [f64], rank: u64) -> f64 {
    *values.select_nth_unstable_by(rank as usize, f64::total_cmp).1
}

fn middle(a: f64, b: f64) -> f64 {
    if a == b { a } else { (a + b) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sorted_median(mut v: Vec<f64>) -> Option<f64> {
        v.sort_by(f64::total_cmp);
        let n = v.len();
        (n > 0).then(|| (v[(n - 1) / 2] + v[n / 2]) / 2.0)
    }

    proptest! {
        #[test]
        fn narrowing_equals_sorting_bit_for_bit(
            genes in prop::collection::vec(
                prop::collection::vec(prop_oneof![1e-3f64..1e4, (1u32..5, 1u32..2000).prop_map(|(a, b)| f64::from(a) / f64::from(b) * 1e4),
                    Just(7.5), Just(f64::MIN_POSITIVE), Just(1e300)], 0..60), 1..6),
            room in 1u64..80,
        ) {
            let expected: Vec<Option<f64>> = genes.iter().cloned().map(sorted_median).collect();
            let entries = genes.iter().map(Vec::len).sum::<usize>() as u64;
            let mut passes = 0;
            let mut run = |memory: u64| exact_medians(genes.len(), entries, memory, 1, &mut |each| {
                passes += 1;
                for (g, values) in genes.iter().enumerate() {
                    values.iter().for_each(|&v| each(g as u32, v));
                }
                Ok(())
            }).unwrap();
            let bits = |m: &[Option<f64>]| m.iter().map(|m| m.map(f64::to_bits)).collect::<Vec<_>>();
            prop_assert_eq!(bits(&run(room * 16)), bits(&expected));
            prop_assert_eq!(bits(&run(16)), bits(&expected));
            prop_assert_eq!(bits(&run(u64::MAX)), bits(&expected));
        }
    }

    #[test]
    fn genes_below_the_least_number_of_cells_have_no_median() {
        let run = |memory| {
            exact_medians(2, 3, memory, 2, &mut |each| {
                [(0, 1.0), (0, 3.0), (1, 5.0)].iter().for_each(|&(g, v)| each(g, v));
                Ok(())
            })
        };
        assert_eq!(run(u64::MAX).unwrap(), [Some(2.0), None]);
        assert_eq!(run(16).unwrap(), [Some(2.0), None]);
    }
}
