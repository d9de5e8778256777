//! A count matrix on disk as a stream of checked row blocks: CSR, CSC or dense, any number type, bounded memory.
//!
//! Compressed arrays are decoded in pieces that fall on chunk borders, several at a time; what a block does not use yet stays for
//! the next one, so no chunk is decoded twice. A block therefore costs its own entries plus at most one piece.
//! Every block is checked before it is handed out: offsets never fall, columns are below the number of genes, values are counts.

use super::hdf5::{Attribute, H5Array, H5Source, Node, NumberKind, NumberType, Stored};
use crate::error::{Error, Result};
use rayon::prelude::*;
use std::path::Path;

/// Entries of a block at most, where memory allows more: enough to keep all threads busy between two blocks.
const BLOCK_ENTRIES: u64 = 1 << 21;
/// Rows of a block at most, so that empty rows do not pile up.
const BLOCK_ROWS: u64 = 1 << 14;
/// Entries decoded at a time where storage is not chunked, or chunked finer.
const PIECE_ENTRIES: u64 = 1 << 18;
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
}

impl Pass<'_> {
    fn block_entries(&self) -> u64 {
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

struct Compressed {
    data: Box<dyn H5Array>,
    data_type: NumberType,
    indices: Box<dyn H5Array>,
    index_type: NumberType,
    offsets: Box<dyn H5Array>,
    offset_type: NumberType,
    entries: u64,
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
                    return Err(Error::input("the matrix does not have two dimensions")
                        .at(&place)
                        .found(format!("shape {:?}", array.shape()))
                        .wanted("cells × genes"));
                };
                let number = number_type(array.as_ref())?;
                (rows, columns, Layout::Dense(array, number))
            }
            Some(Node::Group) => open_sparse(source, slot, &place)?,
        };
        if columns >= u64::from(u32::MAX) {
            return Err(Error::input("the matrix has too many columns").at(&place).found(columns));
        }
        Ok(Some(Matrix { place, slot: slot.to_string(), rows, columns, layout }))
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
        let window = (PIECE_ENTRIES / 4 / width).max(1);
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
            Layout::Columns(c) => super::transpose::stream(self, c.parts(), pass, &mut checked),
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
                return Err(Error::input("a column index lies outside the matrix")
                    .at(place)
                    .found(column)
                    .wanted(format!("indices from 0 to {}", self.columns.saturating_sub(1)))
                    .next("the file is damaged: write it again with anndata.write_h5ad"));
            }
            if let Some((&column, &x)) = columns.iter().zip(counts).find(|&(_, &x)| !fine(x)) {
                let place = format!("{place}, column {column}");
                if x >= 0.0 && x.is_finite() {
                    return Err(Error::input(NO_COUNTS).at(place).found(x).wanted("integers from 0"));
                }
                return Err(Error::input("a value cannot be a count")
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
        let mut row = 0;
        while row < self.rows {
            block.first = row;
            block.start.clear();
            block.start.push(0);
            let from = offsets.at(row)?;
            let mut to = from;
            while row < self.rows && row - block.first < BLOCK_ROWS {
                let end = offsets.at(row + 1)?;
                if end - from > pass.block_entries() && to > from {
                    break;
                }
                to = end;
                block.start.push((to - from) as usize);
                row += 1;
            }
            let (a, b) = rayon::join(|| data.take(from, to), || indices.take(from, to));
            (a?, b?);
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
        let mut start = 0;
        while start < self.rows {
            let end = (start + window).min(self.rows);
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

fn number_type(array: &dyn H5Array) -> Result<NumberType> {
    match array.stored() {
        Stored::Number(t) => Ok(*t),
        other => Err(Error::input("the array does not hold numbers")
            .at(array.place())
            .found(format!("{other:?}"))
            .wanted("integers or floats")),
    }
}

fn open_sparse(source: &dyn H5Source, slot: &str, place: &str) -> Result<(u64, u64, Layout)> {
    let text = |name: &str| match source.attribute(slot, name)? {
        Some(Attribute::Text(t)) => Ok(Some(t)),
        _ => Ok::<_, Error>(None),
    };
    let encoding = match text("encoding-type")? {
        Some(e) => e,
        None => text("h5sparse_format")?.unwrap_or_default(),
    };
    let by_rows = match encoding.as_str() {
        "csr_matrix" | "csr" => true,
        "csc_matrix" | "csc" => false,
        other => {
            return Err(Error::input("the slot holds no matrix that AnnData would write")
                .at(place)
                .found(format!("encoding-type {other:?}, members {}", source.children(slot)?.join(", ")))
                .wanted("csr_matrix, csc_matrix, or a dense array"));
        }
    };
    let shape = match source.attribute(slot, "shape")? {
        None => source.attribute(slot, "h5sparse_shape")?,
        found => found,
    };
    let (rows, columns) = match shape {
        Some(Attribute::Integers(s)) if s.len() == 2 && s.iter().all(|&d| d >= 0) => {
            (s[0] as u64, s[1] as u64)
        }
        other => {
            return Err(Error::input("the sparse matrix has no usable shape")
                .at(place)
                .found(format!("{other:?}"))
                .wanted("an attribute shape = (cells, genes)"));
        }
    };
    let open = |name: &str| -> Result<(Box<dyn H5Array>, NumberType)> {
        let path = format!("{slot}/{name}");
        if source.node(&path)? != Some(Node::Array) {
            return Err(Error::input("the sparse matrix lacks one of its arrays")
                .at(format!("{place}/{name}"))
                .wanted("arrays data, indices and indptr"));
        }
        let array = source.array(&path)?;
        if array.shape().len() != 1 {
            return Err(Error::input("an array of a sparse matrix must have one dimension")
                .at(array.place())
                .found(format!("shape {:?}", array.shape())));
        }
        let number = number_type(array.as_ref())?;
        if name != "data" && number.kind == NumberKind::Float {
            return Err(Error::input("indices and offsets must be integers")
                .at(array.place())
                .found("floats"));
        }
        Ok((array, number))
    };
    let ((data, data_type), (indices, index_type), (offsets, offset_type)) =
        (open("data")?, open("indices")?, open("indptr")?);
    let major = if by_rows { rows } else { columns };
    if offsets.shape()[0].checked_sub(1) != Some(major) {
        return Err(Error::input("indptr does not fit the matrix")
            .at(offsets.place())
            .found(format!("{} offsets", offsets.shape()[0]))
            .wanted(format!(
                "{} for a {} of {rows} × {columns}",
                major + 1,
                if by_rows { "csr_matrix" } else { "csc_matrix" }
            )));
    }
    let entries = data.shape()[0];
    if indices.shape()[0] != entries {
        return Err(Error::input("data and indices differ in length")
            .at(place)
            .found(format!("{entries} values and {} indices", indices.shape()[0]))
            .next("the file is damaged or was cut short while writing"));
    }
    let c = Compressed { data, data_type, indices, index_type, offsets, offset_type, entries };
    let last = c.offset(major, place)?;
    if last != entries {
        return Err(overflow_hint(
            Error::input("the last offset is not the number of stored values")
                .at(c.offsets.place())
                .found(last)
                .wanted(entries),
            entries,
        ));
    }
    Ok((rows, columns, if by_rows { Layout::Rows(c) } else { Layout::Columns(c) }))
}

fn overflow_hint(e: Error, entries: u64) -> Error {
    if entries > i32::MAX as u64 {
        e.next("32-bit overflow in the file: it was written with int32 offsets and more than 2^31 values; write it again with int64")
    } else {
        e.next("the file is damaged: write it again with anndata.write_h5ad")
    }
}

/// Column indices as u32; what does not fit becomes `u32::MAX`, which no matrix has.
pub(super) fn decode_index(number: NumberType, raw: &[u8], out: &mut Vec<u32>) {
    if number == (NumberType { kind: NumberKind::Signed, bytes: 4, big_endian: false }) {
        // The usual storage, without the detour over i64: a negative index becomes at least 2^31.
        out.extend(raw.chunks_exact(4).map(|b| {
            let v = u32::from_le_bytes(b.try_into().expect("4 bytes"));
            if v > i32::MAX as u32 { u32::MAX } else { v }
        }));
        return;
    }
    let mut wide = Vec::with_capacity(raw.len() / number.bytes);
    if number.decode_i64(raw, &mut wide).is_some() {
        out.extend(wide.into_iter().map(|v| u32::try_from(v).unwrap_or(u32::MAX)));
    }
}

/// An array must deliver what its shape says.
fn whole<T>(values: Vec<T>, wanted: u64, place: &str) -> Result<Vec<T>> {
    if values.len() as u64 != wanted {
        return Err(Error::input("the array ends before its declared length")
            .at(place)
            .found(values.len())
            .wanted(wanted));
    }
    Ok(values)
}

/// The parts that a transposition needs.
pub(super) struct Parts<'a> {
    pub data: &'a dyn H5Array,
    pub data_type: NumberType,
    pub indices: &'a dyn H5Array,
    pub index_type: NumberType,
    pub entries: u64,
    compressed: &'a Compressed,
}

impl Parts<'_> {
    /// All offsets, checked.
    pub fn offsets(&self, place: &str, major: u64, minor: u64) -> Result<Vec<u64>> {
        let mut offsets = Offsets::new(self.compressed, place, major, minor);
        (0..=major).map(|i| offsets.at(i)).collect()
    }
}

impl Compressed {
    fn parts(&self) -> Parts<'_> {
        Parts {
            data: self.data.as_ref(),
            data_type: self.data_type,
            indices: self.indices.as_ref(),
            index_type: self.index_type,
            entries: self.entries,
            compressed: self,
        }
    }

    fn offset(&self, at: u64, place: &str) -> Result<u64> {
        let mut value = Vec::new();
        self.offset_type.decode_i64(&self.offsets.rows(at, 1)?, &mut value);
        match value.first() {
            Some(&v) if v >= 0 => Ok(v as u64),
            other => Err(overflow_hint(
                Error::input("an offset is negative")
                    .at(format!("{place}/indptr[{at}]"))
                    .found(other.map_or("nothing".into(), i64::to_string)),
                self.entries,
            )),
        }
    }
}

/// The offsets of a sparse matrix by windows, each checked against its neighbour.
struct Offsets<'a> {
    c: &'a Compressed,
    place: &'a str,
    major: u64,
    /// Columns of a row (rows of a column): no row can hold more entries.
    minor: u64,
    first: u64,
    window: Vec<i64>,
    previous: i64,
}

impl<'a> Offsets<'a> {
    const WINDOW: u64 = 1 << 16;

    fn new(c: &'a Compressed, place: &'a str, major: u64, minor: u64) -> Self {
        Offsets { c, place, major, minor, first: 0, window: Vec::new(), previous: 0 }
    }

    /// The `i`-th offset; `i` must not fall from call to call.
    fn at(&mut self, i: u64) -> Result<u64> {
        while i >= self.first + self.window.len() as u64 {
            self.first += self.window.len() as u64;
            self.previous = self.window.last().copied().unwrap_or(0);
            self.window.clear();
            let count = Self::WINDOW.min(self.major + 1 - self.first);
            let raw = self.c.offsets.rows(self.first, count)?;
            self.c.offset_type.decode_i64(&raw, &mut self.window);
            self.window = whole(std::mem::take(&mut self.window), count, self.c.offsets.place())?;
            self.check()?;
        }
        Ok(self.window[(i - self.first) as usize] as u64)
    }

    fn check(&self) -> Result<()> {
        let before = std::iter::once(self.previous).chain(self.window.iter().copied());
        for (n, (a, &b)) in before.zip(&self.window).enumerate() {
            let i = self.first + n as u64;
            let wrong = |what: &str, wanted: String| {
                let e = Error::input(what)
                    .at(format!("{}/indptr[{i}]", self.place))
                    .found(format!("{b} after {a}"))
                    .wanted(wanted);
                Err(overflow_hint(e, self.c.entries))
            };
            if i == 0 && b != 0 {
                return wrong("the first offset is not 0", "0".into());
            }
            if b < a {
                return wrong("indptr is not monotone", "offsets that never fall".into());
            }
            if b as u64 > self.c.entries {
                return wrong("an offset lies beyond the data", format!("at most {}", self.c.entries));
            }
            if (b - a) as u64 > self.minor {
                return wrong(
                    "a row or column has more entries than the matrix is wide",
                    format!("at most {} entries", self.minor),
                );
            }
        }
        Ok(())
    }
}

/// One array read from front to back, decoded in parallel pieces on chunk borders.
pub(super) struct Stream<'a, T> {
    array: &'a dyn H5Array,
    decode: Box<dyn Fn(&[u8], &mut Vec<T>) + Send + Sync + 'a>,
    length: u64,
    piece: u64,
    /// Entries `base .. next`, decoded and not yet taken.
    ahead: Vec<T>,
    base: u64,
    next: u64,
    /// What the last `take` took.
    pub taken: Vec<T>,
}

impl<'a, T: Send + Copy> Stream<'a, T> {
    pub fn new(
        array: &'a dyn H5Array,
        length: u64,
        decode: impl Fn(&[u8], &mut Vec<T>) + Send + Sync + 'a,
    ) -> Self {
        let chunk = array.chunk_rows();
        let piece = if chunk == 0 { PIECE_ENTRIES } else { chunk * (PIECE_ENTRIES / chunk).max(1) };
        Stream {
            array,
            decode: Box::new(decode),
            length,
            piece,
            ahead: Vec::new(),
            base: 0,
            next: 0,
            taken: Vec::new(),
        }
    }

    /// Moves entries `from .. to` into `taken`; `from` is where the last call ended.
    pub fn take(&mut self, from: u64, to: u64) -> Result<()> {
        debug_assert_eq!(from, self.base);
        let until = to.div_ceil(self.piece).saturating_mul(self.piece).min(self.length);
        if until > self.next {
            let pieces: Vec<u64> = (self.next..until).step_by(self.piece as usize).collect();
            let decoded: Vec<Result<Vec<T>>> = pieces
                .par_iter()
                .map(|&at| {
                    let count = self.piece.min(until - at);
                    let raw = self.array.rows(at, count)?;
                    let mut values = Vec::with_capacity(count as usize);
                    (self.decode)(&raw, &mut values);
                    whole(values, count, self.array.place())
                })
                .collect();
            for values in decoded {
                self.ahead.extend_from_slice(&values?);
            }
            self.next = until;
        }
        let count = (to - from) as usize;
        self.taken.clear();
        self.taken.extend_from_slice(&self.ahead[..count]);
        self.ahead.drain(..count);
        self.base = to;
        Ok(())
    }
}
