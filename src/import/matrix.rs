//! A count matrix on disk as a stream of checked row blocks: CSR, CSC or dense, any number type, bounded memory.
//!
//! Compressed arrays are decoded in pieces that fall on chunk borders, several at a time; what a block does not use yet stays for
//! the next one, so no chunk is decoded twice. A block therefore costs its own entries plus at most one piece.
//! Every block is checked before it is handed out: offsets never fall, columns are below the number of genes, values are counts.

use super::compressed::{
    Compressed, Offsets, Stream, decode_index, number_type, open_arrays, open_sparse, whole,
};
use super::hdf5::{H5Array, H5Source, Node, NumberKind, NumberType};
use crate::error::{Code, Error, Result};
use rayon::prelude::*;
use std::path::Path;

/// Entries of a block at most, where memory allows more: enough to keep all threads busy between two blocks.
const BLOCK_ENTRIES: u64 = 1 << 21;
/// Rows of a block at most, so that empty rows do not pile up.
pub(super) const BLOCK_ROWS: u64 = 1 << 14;
/// Entries looked at by each window of a sample.
const SAMPLE_ENTRIES: u64 = 1 << 16;
/// Bytes of memory that an entry of a block costs at its peak: raw, decoded, token, value, key.
const BYTES_PER_ENTRY: u64 = 64;

/// Said of a matrix with values that are finite, not negative and no integers.
pub(super) const NO_COUNTS: &str = "the matrix does not hold raw counts";

/// Some rows of a matrix, compressed.
#[derive(Debug, Default)]
pub struct RowBlock {
    /// Index of the first row.
    pub first: u64,
    /// Offsets of the rows into `column` and `count`: one more than rows.
    pub start: Vec<usize>,
    /// Matrix column of each entry; in a row ascending or not, as stored.
    pub column: Vec<u32>,
    /// Count of each entry: finite, not negative.
    pub count: Vec<f64>,
}

impl RowBlock {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.start.len() - 1
    }
    /// Columns and counts of the `row`-th row of the block.
    pub fn row(&self, row: usize) -> (&[u32], &[f64]) {
        let span = self.start[row]..self.start[row + 1];
        (&self.column[span.clone()], &self.count[span])
    }
}

/// Memory and checks of a pass over a matrix.
#[derive(Debug, Clone, Copy)]
pub struct Pass<'a> {
    /// Bytes that the pass may use for blocks and transposition.
    pub memory_bytes: u64,
    /// Accept values that are no integers (never negative or NaN ones).
    pub allow_non_integer: bool,
    /// Folder for the temporary files of a transposition larger than memory.
    pub scratch: &'a Path,
    /// The rows that are wanted: what lies outside may be left out, where the storage allows it, or handed out as well.
    pub rows: (u64, u64),
}

impl Pass<'_> {
    /// Entries of a block.
    pub(super) fn block_entries(&self) -> u64 {
        (self.memory_bytes / 4 / BYTES_PER_ENTRY).clamp(1 << 12, BLOCK_ENTRIES)
    }
}

/// An opened matrix.
pub struct Matrix {
    place: String,
    slot: String,
    rows: u64,
    columns: u64,
    layout: Layout,
}

enum Layout {
    Rows(Compressed),
    Columns(Compressed),
    Dense(Box<dyn H5Array>, NumberType),
}

impl Matrix {
    /// Opens the matrix at a slot (`X`, `raw/X`, `layers/NAME`); `None` if nothing is there.
    ///
    /// # Errors
    /// Input: neither sparse nor dense in AnnData's sense, arrays of contradicting lengths, sizes that overflow.
    pub fn open(source: &dyn H5Source, slot: &str) -> Result<Option<Matrix>> {
        let place = format!("{}:{slot}", source.name());
        let (rows, columns, layout) = match source.node(slot)? {
            None => return Ok(None),
            Some(Node::Array) => {
                let array = source.array(slot)?;
                let &[rows, columns] = array.shape() else {
                    return Err(Error::new(Code::MatrixShape, "the matrix does not have two dimensions")
                        .at(&place)
                        .found(format!("shape {:?}", array.shape()))
                        .wanted("cells × genes"));
                };
                let number = number_type(array.as_ref())?;
                (rows, columns, Layout::Dense(array, number))
            }
            Some(Node::Group) => {
                let (rows, columns, by_rows, c) = open_sparse(source, slot, &place)?;
                (rows, columns, if by_rows { Layout::Rows(c) } else { Layout::Columns(c) })
            }
        };
        if columns >= u64::from(u32::MAX) {
            return Err(Error::new(Code::MatrixShape, "the matrix has too many columns")
                .at(&place)
                .found(columns));
        }
        Ok(Some(Matrix { place, slot: slot.to_string(), rows, columns, layout }))
    }

    /// Opens the compressed rows in a group that says nothing about them itself: `data`, `indices`, `indptr` over
    /// `rows` × `columns`.
    ///
    /// # Errors
    /// Input: as [`Matrix::open`].
    pub(super) fn open_rows(source: &dyn H5Source, slot: &str, rows: u64, columns: u64) -> Result<Matrix> {
        let place = format!("{}:{slot}", source.name());
        if columns >= u64::from(u32::MAX) {
            return Err(Error::new(Code::MatrixShape, "the matrix has too many columns")
                .at(&place)
                .found(columns));
        }
        let layout = Layout::Rows(open_arrays(source, slot, rows, columns, true)?);
        Ok(Matrix { place, slot: slot.to_string(), rows, columns, layout })
    }

    /// Cells.
    pub fn rows(&self) -> u64 {
        self.rows
    }
    /// Genes.
    pub fn columns(&self) -> u64 {
        self.columns
    }
    /// The slot, as given to [`Matrix::open`].
    pub fn slot(&self) -> &str {
        &self.slot
    }
    /// `file:slot`, for messages.
    pub fn place(&self) -> &str {
        &self.place
    }
    /// Stored entries; all of them where the matrix is dense.
    pub fn entries(&self) -> u64 {
        match &self.layout {
            Layout::Rows(c) | Layout::Columns(c) => c.entries,
            Layout::Dense(..) => self.rows.saturating_mul(self.columns),
        }
    }
    /// In words, for notes: layout and number type.
    pub fn describe(&self) -> String {
        let number = |t: &NumberType| {
            let kind = match t.kind {
                NumberKind::Float => "float",
                NumberKind::Signed => "int",
                NumberKind::Unsigned => "uint",
                NumberKind::Bool => "bool",
            };
            format!("{kind}{}", 8 * t.bytes)
        };
        match &self.layout {
            Layout::Rows(c) => format!("CSR of {}", number(&c.data_type)),
            Layout::Columns(c) => format!("CSC of {}", number(&c.data_type)),
            Layout::Dense(_, t) => format!("dense {}", number(t)),
        }
    }

    /// Looks at the first, middle and last entries: the first value that is no count, if any. A full pass looks at all.
    pub fn sample_non_count(&self) -> Result<Option<f64>> {
        let (array, number, length) = match &self.layout {
            Layout::Rows(c) | Layout::Columns(c) => (&c.data, c.data_type, c.entries),
            Layout::Dense(array, number) => (array, *number, self.rows),
        };
        let width = if matches!(self.layout, Layout::Dense(..)) { self.columns.max(1) } else { 1 };
        let window = (SAMPLE_ENTRIES / width).max(1);
        let mut values = Vec::new();
        for start in [0, (length / 2).saturating_sub(window / 2), length.saturating_sub(window)] {
            values.clear();
            number.decode_f64(&array.rows(start, window)?, &mut values);
            if let Some(&bad) = values.iter().find(|v| !is_count(**v)) {
                return Ok(Some(bad));
            }
        }
        Ok(None)
    }

    /// Hands out all rows in order, in blocks.
    ///
    /// # Errors
    /// Input, naming slot and row: broken offsets, a column beyond the matrix, a value that is no count; and whatever `each`
    /// returns.
    pub fn for_each_block(
        &self,
        pass: &Pass<'_>,
        each: &mut dyn FnMut(&RowBlock) -> Result<()>,
    ) -> Result<()> {
        let mut checked = |block: &RowBlock| {
            self.check_values(block, pass)?;
            each(block)
        };
        match &self.layout {
            Layout::Rows(c) => self.stream_rows(c, pass, &mut checked),
            Layout::Columns(c) => super::transpose::stream(self, c, pass, &mut checked),
            Layout::Dense(array, number) => self.stream_dense(array.as_ref(), *number, pass, &mut checked),
        }
    }

    fn check_values(&self, block: &RowBlock, pass: &Pass<'_>) -> Result<()> {
        let fine = |x: f64| if pass.allow_non_integer { x >= 0.0 && x.is_finite() } else { is_count(x) };
        const CHUNK: usize = 1 << 15;
        let bad_column =
            block.column.par_chunks(CHUNK).any(|c| c.iter().any(|&c| u64::from(c) >= self.columns));
        let bad_count = block.count.par_chunks(CHUNK).any(|c| c.iter().any(|&x| !fine(x)));
        if !bad_column && !bad_count {
            return Ok(());
        }
        for row in 0..block.rows() {
            let (columns, counts) = block.row(row);
            let place = format!("{}, row {} (from 0)", self.place, block.first + row as u64);
            if let Some(&column) = columns.iter().find(|&&c| u64::from(c) >= self.columns) {
                let column = if column == u32::MAX {
                    "an index that is negative or huge".into()
                } else {
                    column.to_string()
                };
                return Err(Error::new(Code::SparseIndices, "a column index lies outside the matrix")
                    .at(place)
                    .found(column)
                    .wanted(format!("indices from 0 to {}", self.columns.saturating_sub(1)))
                    .next("the file is damaged: write it again with anndata.write_h5ad"));
            }
            if let Some((&column, &x)) = columns.iter().zip(counts).find(|&(_, &x)| !fine(x)) {
                let place = format!("{place}, column {column}");
                if x >= 0.0 && x.is_finite() {
                    return Err(Error::new(Code::NotRawCounts, NO_COUNTS)
                        .at(place)
                        .found(x)
                        .wanted("integers from 0"));
                }
                return Err(Error::new(Code::ValueNoCount, "a value cannot be a count")
                    .at(place)
                    .found(x)
                    .wanted("integers from 0")
                    .next("give the slot that holds raw counts with --counts X|raw|layers/NAME"));
            }
        }
        Err(Error::bug("a bad entry lies in no row"))
    }

    fn stream_rows(
        &self,
        c: &Compressed,
        pass: &Pass<'_>,
        each: &mut dyn FnMut(&RowBlock) -> Result<()>,
    ) -> Result<()> {
        let mut offsets = Offsets::new(c, &self.place, self.rows, self.columns);
        let mut data = Stream::new(c.data.as_ref(), c.entries, |raw, out| c.data_type.decode_f64(raw, out));
        let mut indices =
            Stream::new(c.indices.as_ref(), c.entries, |raw, out| decode_index(c.index_type, raw, out));
        let mut block = RowBlock::default();
        let (mut row, last) = (pass.rows.0.min(self.rows), pass.rows.1.min(self.rows));
        if row > 0 {
            let first = offsets.at(row)?;
            data.seek(first)?;
            indices.seek(first)?;
        }
        while row < last {
            block.first = row;
            block.start.clear();
            block.start.push(0);
            let from = offsets.at(row)?;
            let mut to = from;
            while row < last && row - block.first < BLOCK_ROWS {
                let end = offsets.at(row + 1)?;
                if end - from > pass.block_entries() && to > from {
                    break;
                }
                to = end;
                block.start.push((to - from) as usize);
                row += 1;
            }
            let (a, b) = rayon::join(|| data.take(from, to), || indices.take(from, to));
            a?;
            b?;
            std::mem::swap(&mut block.count, &mut data.taken);
            std::mem::swap(&mut block.column, &mut indices.taken);
            each(&block)?;
        }
        Ok(())
    }

    fn stream_dense(
        &self,
        array: &dyn H5Array,
        number: NumberType,
        pass: &Pass<'_>,
        each: &mut dyn FnMut(&RowBlock) -> Result<()>,
    ) -> Result<()> {
        if self.columns == 0 {
            return Ok(());
        }
        let fit = (pass.block_entries() / self.columns).clamp(1, BLOCK_ROWS);
        let band = array.chunk_rows().max(1);
        // A window of whole chunk bands decodes each chunk once; where a band is beyond memory, windows within it must do.
        let piece = if band <= fit { band } else { fit };
        let window = (fit / piece).max(1) * piece;
        let mut start = pass.rows.0.min(self.rows) / piece * piece;
        let last = pass.rows.1.min(self.rows);
        while start < last {
            let end = (start + window).min(last);
            let pieces: Vec<u64> = (start..end).step_by(piece as usize).collect();
            let decoded: Vec<Result<Vec<f64>>> = pieces
                .par_iter()
                .map(|&at| {
                    let rows = piece.min(end - at);
                    let raw = array.rows(at, rows)?;
                    let mut values = Vec::with_capacity((rows * self.columns) as usize);
                    number.decode_f64(&raw, &mut values);
                    whole(values, rows * self.columns, array.place())
                })
                .collect();
            let mut block = RowBlock { first: start, start: vec![0], ..RowBlock::default() };
            for values in decoded {
                for row in values?.chunks_exact(self.columns as usize) {
                    for (column, &x) in row.iter().enumerate().filter(|(_, x)| **x != 0.0) {
                        block.column.push(column as u32);
                        block.count.push(x);
                    }
                    block.start.push(block.column.len());
                }
            }
            each(&block)?;
            start = end;
        }
        Ok(())
    }
}

/// Is this a raw count: an integer from 0?
pub fn is_count(x: f64) -> bool {
    x >= 0.0 && x == x.trunc() && x.is_finite()
}
