//! The arrays of a CSR or CSC matrix: opened with their lengths checked against each other, read front to back by windows.

use super::hdf5::{Attribute, H5Array, H5Source, Node, NumberKind, NumberType, Stored};
use crate::error::{Code, Error, Result};
use rayon::prelude::*;

/// Entries decoded at a time where storage is not chunked, or chunked finer.
const PIECE_ENTRIES: u64 = 1 << 18;

/// The three arrays of a CSR or CSC matrix.
pub(super) struct Compressed {
    pub data: Box<dyn H5Array>,
    pub data_type: NumberType,
    pub indices: Box<dyn H5Array>,
    pub index_type: NumberType,
    pub offsets: Box<dyn H5Array>,
    pub offset_type: NumberType,
    pub entries: u64,
}

/// The number type of an array that must hold numbers.
pub(super) fn number_type(array: &dyn H5Array) -> Result<NumberType> {
    match array.stored() {
        Stored::Number(t) => Ok(*t),
        other => Err(Error::new(Code::SparseParts, "the array does not hold numbers")
            .at(array.place())
            .found(format!("{other:?}"))
            .wanted("integers or floats")),
    }
}

/// Opens a sparse matrix: rows, columns, whether it is by rows, and its arrays.
pub(super) fn open_sparse(
    source: &dyn H5Source,
    slot: &str,
    place: &str,
) -> Result<(u64, u64, bool, Compressed)> {
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
            return Err(Error::new(Code::MatrixMissing, "the slot holds no matrix that AnnData would write")
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
            return Err(Error::new(Code::MatrixShape, "the sparse matrix has no usable shape")
                .at(place)
                .found(format!("{other:?}"))
                .wanted("an attribute shape = (cells, genes)"));
        }
    };
    let c = open_arrays(source, slot, rows, columns, by_rows)?;
    Ok((rows, columns, by_rows, c))
}

/// Opens `data`, `indices` and `indptr` of a group, with their lengths checked against the matrix and each other.
pub(super) fn open_arrays(
    source: &dyn H5Source,
    slot: &str,
    rows: u64,
    columns: u64,
    by_rows: bool,
) -> Result<Compressed> {
    let place = &format!("{}:{slot}", source.name());
    let open = |name: &str| -> Result<(Box<dyn H5Array>, NumberType)> {
        let path = format!("{slot}/{name}");
        if source.node(&path)? != Some(Node::Array) {
            return Err(Error::new(Code::SparseParts, "the sparse matrix lacks one of its arrays")
                .at(format!("{place}/{name}"))
                .wanted("arrays data, indices and indptr"));
        }
        let array = source.array(&path)?;
        if array.shape().len() != 1 {
            return Err(Error::new(Code::SparseParts, "an array of a sparse matrix must have one dimension")
                .at(array.place())
                .found(format!("shape {:?}", array.shape())));
        }
        let number = number_type(array.as_ref())?;
        if name != "data" && number.kind == NumberKind::Float {
            return Err(Error::new(Code::SparseParts, "indices and offsets must be integers")
                .at(array.place())
                .found("floats"));
        }
        Ok((array, number))
    };
    let ((data, data_type), (indices, index_type), (offsets, offset_type)) =
        (open("data")?, open("indices")?, open("indptr")?);
    let major = if by_rows { rows } else { columns };
    if offsets.shape()[0].checked_sub(1) != Some(major) {
        return Err(Error::new(Code::SparseOffsets, "indptr does not fit the matrix")
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
        return Err(Error::new(Code::SparseParts, "data and indices differ in length")
            .at(place)
            .found(format!("{entries} values and {} indices", indices.shape()[0]))
            .next("the file is damaged or was cut short while writing"));
    }
    let c = Compressed { data, data_type, indices, index_type, offsets, offset_type, entries };
    let last = c.offset(major, place)?;
    if last != entries {
        return Err(overflow_hint(
            Error::new(Code::SparseOffsets, "the last offset is not the number of stored values")
                .at(c.offsets.place())
                .found(last)
                .wanted(entries),
            entries,
        ));
    }
    Ok(c)
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
pub(super) fn whole<T>(values: Vec<T>, wanted: u64, place: &str) -> Result<Vec<T>> {
    if values.len() as u64 != wanted {
        return Err(Error::new(Code::SparseParts, "the array ends before its declared length")
            .at(place)
            .found(values.len())
            .wanted(wanted));
    }
    Ok(values)
}

impl Compressed {
    /// All offsets, checked.
    pub fn all_offsets(&self, place: &str, major: u64, minor: u64) -> Result<Vec<u64>> {
        let mut offsets = Offsets::new(self, place, major, minor);
        (0..=major).map(|i| offsets.at(i)).collect()
    }

    fn offset(&self, at: u64, place: &str) -> Result<u64> {
        let mut value = Vec::new();
        self.offset_type.decode_i64(&self.offsets.rows(at, 1)?, &mut value);
        match value.first() {
            Some(&v) if v >= 0 => Ok(v as u64),
            other => Err(overflow_hint(
                Error::new(Code::SparseOffsets, "an offset is negative")
                    .at(format!("{place}/indptr[{at}]"))
                    .found(other.map_or("nothing".into(), i64::to_string)),
                self.entries,
            )),
        }
    }
}

/// The offsets of a sparse matrix by windows, each checked against its neighbour.
pub(super) struct Offsets<'a> {
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

    pub fn new(c: &'a Compressed, place: &'a str, major: u64, minor: u64) -> Self {
        Offsets { c, place, major, minor, first: 0, window: Vec::new(), previous: 0 }
    }

    /// The `i`-th offset; `i` must not fall from call to call.
    pub fn at(&mut self, i: u64) -> Result<u64> {
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
                let e = Error::new(Code::SparseOffsets, what)
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

/// Appends the elements in some bytes.
type Decode<'a, T> = dyn Fn(&[u8], &mut Vec<T>) + Send + Sync + 'a;

/// One array read from front to back, decoded in parallel pieces on chunk borders.
pub(super) struct Stream<'a, T> {
    array: &'a dyn H5Array,
    decode: Box<Decode<'a, T>>,
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

    /// Begins at entry `to` rather than at 0, before anything was taken.
    pub fn seek(&mut self, to: u64) -> Result<()> {
        debug_assert_eq!((self.base, self.next), (0, 0));
        self.base = to / self.piece * self.piece;
        self.next = self.base;
        self.take(self.base, to)
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
