//! Counts of one cell → gene ids in Geneformer's rank order.
//!
//! For every gene with a count x > 0, in f64 and in this order,
//! ```text
//! v = x / n_counts * 10000 / median[gene]        n_counts = total over ALL genes of the file
//! ```
//! and ids are sorted by v, descending. Equal v keep ascending matrix-column order (the first column of a gene that has several,
//! whose counts are summed first): numpy's unstable argsort leaves ties to the CPU, this does not. Positive floats order like
//! their bits, so one integer sort of (¬bits(v), column) does rank and tie rule at once, without a comparison function.
//!
//! No special tokens and no truncation: the batch adds and cuts what its model wants (`max_tokens` cuts here, to save space).

use super::vocab::Vocab;
use half::f16;

/// Counts are scaled to this total.
pub const TARGET_SUM: f64 = 10_000.0;
const NONE: u32 = u32::MAX;

/// Ranks the cells of one file: matrix columns resolved to tokens and medians once.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    /// Per matrix column: the first column of the same token, or `NONE` outside the vocabulary.
    slot: Vec<u32>,
    /// Per matrix column that is a slot: its token.
    gene: Vec<u32>,
    /// Per matrix column that is a slot: its median.
    median: Vec<f64>,
    /// Does any token have several columns?
    has_duplicates: bool,
    max_tokens: usize,
}

/// Work memory of one thread. It grows to the largest cell and is then reused.
#[derive(Debug, Default)]
pub struct Scratch {
    /// (¬bits(v) << 32 | column), ascending = v descending, column ascending.
    keys: Vec<u128>,
    /// Sum per slot while counts of several columns meet; zero between calls.
    sum: Vec<f64>,
    /// Slots with a sum.
    touched: Vec<u32>,
    columns: Vec<u32>,
    counts: Vec<f64>,
}

impl Tokenizer {
    /// `token` has one entry per matrix column (`None` = not in the vocabulary), as in
    /// [`GeneMapping`](super::mapping::GeneMapping); `max_tokens` = 0 keeps all.
    pub fn new(token: &[Option<u32>], vocab: &Vocab, max_tokens: usize) -> Self {
        let mut first = vec![NONE; vocab.len()];
        let mut tokenizer = Tokenizer {
            slot: vec![NONE; token.len()],
            gene: vec![0; token.len()],
            median: vec![1.0; token.len()],
            has_duplicates: false,
            max_tokens: if max_tokens == 0 { usize::MAX } else { max_tokens },
        };
        for (column, id) in token.iter().enumerate() {
            let Some(id) = *id else { continue };
            let slot = &mut first[id as usize];
            if *slot == NONE {
                *slot = column as u32;
            } else {
                tokenizer.has_duplicates = true;
            }
            tokenizer.slot[column] = *slot;
            tokenizer.gene[column] = id;
            tokenizer.median[column] = vocab.median(id);
        }
        tokenizer
    }

    /// Number of matrix columns.
    pub fn columns(&self) -> usize {
        self.slot.len()
    }

    /// Ranks one cell and appends its gene ids to `gene` and, if wanted, log1p(x / n_counts · 10000) of each to `value`.
    /// Returns the number of tokens.
    ///
    /// `columns` and `counts` are parallel, in any order, repeated columns are summed; counts are finite and not negative, zeros
    /// are dropped; `n_counts` is the total over all columns of the file.
    pub fn rank(
        &self,
        columns: &[u32],
        counts: &[f64],
        n_counts: f64,
        scratch: &mut Scratch,
        gene: &mut Vec<u32>,
        value: Option<&mut Vec<f16>>,
    ) -> usize {
        debug_assert_eq!(columns.len(), counts.len());
        if n_counts.is_nan() || n_counts <= 0.0 {
            return 0;
        }
        let Scratch { keys, sum, touched, columns: summed_columns, counts: summed_counts } = scratch;
        let ascending = columns.windows(2).all(|w| w[0] < w[1]);
        let (columns, counts) = if ascending && !self.has_duplicates {
            (columns, counts)
        } else {
            sum.resize(self.slot.len(), 0.0);
            touched.clear();
            for (&column, &x) in columns.iter().zip(counts) {
                let slot = self.slot[column as usize];
                if slot != NONE && x > 0.0 {
                    if sum[slot as usize] == 0.0 {
                        touched.push(slot);
                    }
                    sum[slot as usize] += x;
                }
            }
            summed_columns.clear();
            summed_counts.clear();
            for &slot in touched.iter() {
                summed_columns.push(slot);
                summed_counts.push(std::mem::take(&mut sum[slot as usize]));
            }
            (&summed_columns[..], &summed_counts[..])
        };
        keys.clear();
        for (&column, &x) in columns.iter().zip(counts) {
            if x > 0.0 && self.slot[column as usize] != NONE {
                let v = x / n_counts * TARGET_SUM / self.median[column as usize];
                keys.push(u128::from(!v.to_bits()) << 32 | u128::from(column));
            }
        }
        keys.sort_unstable();
        keys.truncate(self.max_tokens);
        gene.extend(keys.iter().map(|&key| self.gene[key as u32 as usize]));
        if let Some(value) = value {
            // The rank's v is x / n · 10000 / median: multiplying back would round twice, so the count is looked up again.
            sum.resize(self.slot.len(), 0.0);
            for (&column, &x) in columns.iter().zip(counts) {
                sum[column as usize] = x;
            }
            value.extend(
                keys.iter()
                    .map(|&key| f16::from_f64((sum[key as u32 as usize] / n_counts * TARGET_SUM).ln_1p())),
            );
            for &column in columns {
                sum[column as usize] = 0.0;
            }
        }
        keys.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn vocab(median: &[f64]) -> Vocab {
        let genes = (0..median.len()).map(|g| format!("g{g}"));
        let token = ["<pad>".to_string(), "<mask>".to_string()].into_iter().chain(genes).collect();
        Vocab::from_parts(token, [0.0, 0.0].into_iter().chain(median.iter().copied()).collect(), Vec::new())
            .unwrap()
    }

    /// The definition, written down again: sum per token, keep the first column, sort stably by comparison.
    fn naive(
        token: &[Option<u32>],
        vocab: &Vocab,
        columns: &[u32],
        counts: &[f64],
        n: f64,
    ) -> Vec<(u32, f16)> {
        let mut cell: Vec<(u32, u32, f64)> = Vec::new();
        for (column, id) in token.iter().enumerate() {
            let Some(id) = *id else { continue };
            let x: f64 =
                columns.iter().zip(counts).filter(|(c, _)| **c == column as u32).map(|(_, x)| x).sum();
            match cell.iter_mut().find(|(other, ..)| *other == id) {
                Some(entry) => entry.2 += x,
                None => cell.push((id, column as u32, x)),
            }
        }
        cell.retain(|c| c.2 > 0.0);
        let v = |c: &(u32, u32, f64)| c.2 / n * 10000.0 / vocab.median(c.0);
        cell.sort_by(|a, b| v(b).partial_cmp(&v(a)).unwrap());
        cell.iter().map(|c| (c.0, f16::from_f64((c.2 / n * 10000.0).ln_1p()))).collect()
    }

    proptest! {
        #[test]
        fn ranks_equal_the_definition(
            token in prop::collection::vec(prop::option::of(2u32..12), 1..40),
            cell in prop::collection::vec((0usize..40, 0u32..6), 0..60),
            medians in prop::collection::vec(prop::sample::select(vec![0.5, 1.0, 2.0, 3.0, 1.7]), 10),
            extra in 0u32..5,
            canonical in any::<bool>(),
        ) {
            let vocab = vocab(&medians);
            let mut cell: Vec<(u32, f64)> = cell.iter().map(|&(c, x)| ((c % token.len()) as u32, f64::from(x))).collect();
            if canonical {
                cell.sort_by_key(|c| c.0);
                cell.dedup_by_key(|c| c.0);
            }
            let (columns, counts): (Vec<u32>, Vec<f64>) = cell.into_iter().unzip();
            let n = counts.iter().sum::<f64>() + f64::from(extra);
            let tokenizer = Tokenizer::new(&token, &vocab, 0);
            let expected = if n > 0.0 { naive(&token, &vocab, &columns, &counts, n) } else { Vec::new() };
            let mut scratch = Scratch::default();
            for _ in 0..2 {
                // Twice: the scratch must come back clean.
                let (mut gene, mut value) = (Vec::new(), Vec::new());
                tokenizer.rank(&columns, &counts, n, &mut scratch, &mut gene, Some(&mut value));
                prop_assert_eq!(&gene, &expected.iter().map(|e| e.0).collect::<Vec<_>>());
                prop_assert_eq!(&value, &expected.iter().map(|e| e.1).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn ties_keep_column_order_and_max_tokens_cuts_the_tail() {
        let vocab = vocab(&[2.0, 1.0, 4.0, 1.0]);
        // Columns in another order than ids: 2/1 = 4/2 = 8/4 tie, 3/1 leads.
        let token = [Some(5), Some(4), None, Some(2), Some(3)];
        let (columns, counts) = ([0, 1, 2, 3, 4], [2.0, 8.0, 9.0, 4.0, 3.0]);
        let mut gene = Vec::new();
        let all = Tokenizer::new(&token, &vocab, 0).rank(
            &columns,
            &counts,
            26.0,
            &mut Scratch::default(),
            &mut gene,
            None,
        );
        assert_eq!((all, gene.as_slice()), (4, &[3, 5, 4, 2][..]));
        gene.clear();
        Tokenizer::new(&token, &vocab, 2).rank(
            &columns,
            &counts,
            26.0,
            &mut Scratch::default(),
            &mut gene,
            None,
        );
        assert_eq!(gene, [3, 5]);
    }

    #[test]
    fn the_total_counts_genes_outside_the_vocabulary() {
        let vocab = vocab(&[1.0]);
        let (mut gene, mut value) = (Vec::new(), Vec::new());
        let tokenizer = Tokenizer::new(&[Some(2), None], &vocab, 0);
        tokenizer.rank(&[0, 1], &[1.0, 9.0], 10.0, &mut Scratch::default(), &mut gene, Some(&mut value));
        assert_eq!(value, [f16::from_f64(1000f64.ln_1p())]);
    }
}
