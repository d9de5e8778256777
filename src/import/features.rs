//! The genes of a 10x matrix: ids, symbols, and which of the stored columns are gene expression at all.
//!
//! Antibody counts, guide barcodes and multiplexing tags stand beside genes in one matrix. They are no part of a cell's total and
//! get no rank, so their columns are taken out of every block before anything else sees it.

use super::matrix::RowBlock;
use crate::error::{Code, Error, Result};
use crate::genes::mapping::NameColumn;
use std::collections::BTreeMap;

/// The feature type of genes, as Cell Ranger writes it.
const GENE_EXPRESSION: &str = "Gene Expression";
/// A stored column that is left out.
const NONE: u32 = u32::MAX;

/// The genes of a matrix.
pub(super) struct Features {
    ids: Vec<String>,
    symbols: Option<Vec<String>>,
    /// Per stored column its place among the genes, or `NONE`; absent where all are genes.
    place: Option<Vec<u32>>,
    stored: usize,
    left_out: String,
}

impl Features {
    /// `types` and `genomes` have one entry per stored column where the file has them; with `genome`, columns of that one are
    /// kept.
    ///
    /// # Errors
    /// Input: no column is gene expression, or none is of `genome`, with what there is.
    pub fn select(
        ids: Vec<String>,
        symbols: Option<Vec<String>>,
        types: Option<&[String]>,
        genomes: Option<&[String]>,
        genome: Option<&str>,
        place: &str,
    ) -> Result<Features> {
        let stored = ids.len();
        let is_gene = |column: usize| types.is_none_or(|t| t[column] == GENE_EXPRESSION);
        let of_genome =
            |column: usize| genome.is_none_or(|wanted| genomes.is_some_and(|g| g[column] == wanted));
        let counts = |names: &[String]| {
            let mut count: BTreeMap<&str, usize> = BTreeMap::new();
            names.iter().for_each(|name| *count.entry(name).or_insert(0) += 1);
            let all: Vec<String> = count.iter().take(12).map(|(name, n)| format!("{name:?} ({n})")).collect();
            all.join(", ")
        };
        if let Some(types) = types
            && !types.is_empty()
            && !(0..stored).any(is_gene)
        {
            return Err(Error::new(Code::TenxFeatures, "the matrix holds no gene expression")
                .at(place)
                .found(format!("feature types {}", counts(types)))
                .wanted(format!("features of type {GENE_EXPRESSION:?}")));
        }
        if let Some(wanted) = genome
            && !(0..stored).any(of_genome)
        {
            let found = genomes.map_or("a file that names no genomes".to_string(), counts);
            return Err(Error::new(Code::TenxFeatures, format!("no gene is of genome {wanted:?}"))
                .at(place)
                .found(found)
                .next("name one of these with --genome, or leave --genome out"));
        }
        let kept: Vec<usize> = (0..stored).filter(|&c| is_gene(c) && of_genome(c)).collect();
        if kept.len() == stored {
            return Ok(Features { ids, symbols, place: None, stored, left_out: String::new() });
        }
        let mut place = vec![NONE; stored];
        kept.iter().enumerate().for_each(|(gene, &column)| place[column] = gene as u32);
        let take = |names: Vec<String>| kept.iter().map(|&c| names[c].clone()).collect::<Vec<_>>();
        let left_out = format!("{} of {stored} features are genes taken", kept.len());
        Ok(Features { ids: take(ids), symbols: symbols.map(take), place: Some(place), stored, left_out })
    }

    /// Stored columns, genes or not.
    pub fn stored(&self) -> usize {
        self.stored
    }
    /// What was left out, for the note on the input; empty where nothing was.
    pub fn left_out(&self) -> &str {
        &self.left_out
    }
    /// Ids, then symbols where there are some.
    pub fn names(&self) -> Vec<NameColumn> {
        let ids = NameColumn { name: "gene_ids".into(), values: self.ids.clone() };
        let symbols = self.symbols.as_ref();
        let symbols = symbols.map(|s| NameColumn { name: "gene_symbols".into(), values: s.clone() });
        std::iter::once(ids).chain(symbols).collect()
    }

    /// Hands on a block without the columns that are left out.
    pub fn filter(&self, block: &RowBlock, each: &mut dyn FnMut(&RowBlock) -> Result<()>) -> Result<()> {
        let Some(place) = &self.place else { return each(block) };
        let mut genes = RowBlock { first: block.first, start: vec![0], ..RowBlock::default() };
        for row in 0..block.rows() {
            let (columns, counts) = block.row(row);
            for (&column, &count) in columns.iter().zip(counts) {
                if place[column as usize] != NONE {
                    genes.column.push(place[column as usize]);
                    genes.count.push(count);
                }
            }
            genes.start.push(genes.column.len());
        }
        each(&genes)
    }
}
