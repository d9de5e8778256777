//! Arrow IPC streams by positioned reads: where every buffer of every batch lies, then just the bytes that are asked for.
//!
//! The metadata is parsed by `arrow-ipc`, whose flatbuffer verifier bounds every access; its array builders, which panic on a
//! malformed schema and allocate what a file claims, are not used. A length that a message claims is held against the file's own
//! before anything is read, so memory follows the file's true size and the window that is read, never its claims. A column is
//! read without the others: an obs column costs its own bytes, not those of the tokens beside it.

mod index;

use super::hdf5::{NumberKind, NumberType};
use crate::error::{Code, Error, Result};
use index::Index;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// How the values of a column are stored, as far as they can be read.
#[derive(Debug, Clone, PartialEq)]
pub enum Storage {
    /// Integers and floats.
    Number(NumberType),
    /// One bit each.
    Bool,
    /// UTF-8 strings; offsets of 8 bytes where `wide`.
    Text {
        /// 64-bit offsets.
        wide: bool,
    },
    /// Lists of numbers; offsets of 8 bytes where `wide`.
    List {
        /// 64-bit offsets.
        wide: bool,
        /// The elements.
        item: NumberType,
    },
    /// Anything else, by name.
    Other(String),
}

/// A top-level column.
#[derive(Debug, Clone)]
pub struct ArrowColumn {
    /// Its name.
    pub name: String,
    /// Its storage.
    pub storage: Storage,
    /// Place of its first node and buffer within a batch.
    first: (usize, usize),
}

/// One record batch.
struct Batch {
    rows: u64,
    /// First byte of the body in the file.
    body: u64,
    /// (offset within the body, bytes) of each buffer; checked to lie within it.
    buffers: Vec<(u64, u64)>,
    /// Missing values of each node.
    missing: Vec<u64>,
}

/// An opened file.
pub struct ArrowFile {
    path: PathBuf,
    file: File,
    columns: Vec<ArrowColumn>,
    metadata: Vec<(String, String)>,
    batches: Vec<Batch>,
    /// First row of each batch, and the number of rows at the end.
    first_row: Vec<u64>,
}

/// Some rows of a column of lists: `offsets` (rows + 1) into the elements from `base` on.
pub struct Lists {
    batch: usize,
    column: usize,
    /// Absolute element offsets, one more than rows.
    pub offsets: Vec<u64>,
}

impl ArrowFile {
    /// Opens a file and indexes its batches; reads metadata alone.
    ///
    /// # Errors
    /// Input, with the byte where it went wrong: no Arrow stream, cut short, claims beyond the file.
    pub fn open(path: &Path) -> Result<ArrowFile> {
        let fail = |e: std::io::Error| Error::io(path, "read the file", &e);
        let file = File::open(path).map_err(fail)?;
        let len = file.metadata().map_err(fail)?.len();
        // Belt and braces: the verifier is a dependency's, and a panic of it is the file's fault here, not a bug of ours.
        let index = std::panic::AssertUnwindSafe(|| Index { path, file: &file, len }.read());
        let found = std::panic::catch_unwind(index).unwrap_or_else(|_| {
            Err(broken(path, 0, "the Arrow metadata cannot be read").found("a malformed flatbuffer"))
        })?;
        let (columns, metadata, batches) = found;
        let mut first_row = vec![0];
        for batch in &batches {
            let last = first_row[first_row.len() - 1];
            first_row.push(last + batch.rows);
        }
        Ok(ArrowFile { path: path.to_path_buf(), file, columns, metadata, batches, first_row })
    }

    /// Rows.
    pub fn rows(&self) -> u64 {
        self.first_row[self.batches.len()]
    }
    /// Columns, in order.
    pub fn columns(&self) -> &[ArrowColumn] {
        &self.columns
    }
    /// A value of the schema's metadata.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }
    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Splits rows `start .. start + rows` at the borders of batches: (batch, first row within it, rows).
    fn parts(&self, start: u64, rows: u64) -> impl Iterator<Item = (usize, u64, u64)> + '_ {
        let end = (start + rows).min(self.rows());
        let first = self.first_row.partition_point(|&f| f <= start).saturating_sub(1);
        (first..self.batches.len())
            .take_while(move |&b| self.first_row[b] < end)
            .map(move |b| {
                let from = start.max(self.first_row[b]) - self.first_row[b];
                let to = end.min(self.first_row[b + 1]) - self.first_row[b];
                (b, from, to - from)
            })
            .filter(|part| part.2 > 0)
    }

    /// Bytes `from .. from + bytes` of a buffer.
    fn bytes(&self, batch: usize, buffer: usize, from: u64, bytes: u64) -> Result<Vec<u8>> {
        let b = &self.batches[batch];
        let &(at, len) = b
            .buffers
            .get(buffer)
            .ok_or_else(|| broken(&self.path, b.body, "a record batch has too few buffers"))?;
        if from.checked_add(bytes).is_none_or(|end| end > len) {
            return Err(broken(&self.path, b.body + at, "a buffer is shorter than its column")
                .found(format!("{len} bytes"))
                .wanted(format!("{} bytes", from.saturating_add(bytes))));
        }
        let mut out = vec![0; bytes as usize];
        let io = |e: std::io::Error| Error::io(&self.path, "read the file", &e);
        self.file.read_exact_at(&mut out, b.body + at + from).map_err(io)?;
        Ok(out)
    }

    /// One flag per row: is the value missing? Empty where none is.
    fn missing(&self, batch: usize, node: usize, buffer: usize, from: u64, rows: u64) -> Result<Vec<bool>> {
        if self.batches[batch].missing.get(node).is_none_or(|&n| n == 0) {
            return Ok(Vec::new());
        }
        let bits = self.bits(batch, buffer, from, rows)?;
        Ok(bits.into_iter().map(|present| !present).collect())
    }

    fn bits(&self, batch: usize, buffer: usize, from: u64, rows: u64) -> Result<Vec<bool>> {
        let first = from / 8;
        let bytes = self.bytes(batch, buffer, first, (from + rows).div_ceil(8) - first)?;
        Ok((from..from + rows).map(|r| bytes[(r / 8 - first) as usize] >> (r % 8) & 1 == 1).collect())
    }

    /// Offsets of `rows + 1` borders from row `from` on, checked to rise within `limit`.
    fn offsets(
        &self,
        batch: usize,
        buffer: usize,
        wide: bool,
        from: u64,
        rows: u64,
        limit: u64,
    ) -> Result<Vec<u64>> {
        let width = if wide { 8 } else { 4 };
        let raw = self.bytes(batch, buffer, from * width, (rows + 1) * width)?;
        let kind = NumberType { kind: NumberKind::Signed, bytes: width as usize, big_endian: false };
        let mut values = Vec::with_capacity(rows as usize + 1);
        let _ = kind.decode_i64(&raw, &mut values);
        let rises = values.windows(2).all(|w| w[0] <= w[1]) && values.first().is_some_and(|&v| v >= 0);
        match values.last() {
            Some(&last) if rises && last as u64 <= limit => {
                Ok(values.into_iter().map(|v| v as u64).collect())
            }
            _ => Err(broken(
                &self.path,
                self.batches[batch].body,
                "the offsets of a column do not rise within its data",
            )
            .found(format!("{:?} …", &values[..values.len().min(4)]))
            .wanted(format!("offsets from 0 to {limit}"))),
        }
    }

    /// Numbers of rows `start .. start + rows`, missing = NaN; booleans are 0 and 1.
    pub fn numbers(&self, column: usize, start: u64, rows: u64) -> Result<Vec<f64>> {
        let c = &self.columns[column];
        let (node, buffer) = c.first;
        let mut out = Vec::new();
        for (batch, from, rows) in self.parts(start, rows) {
            let at = out.len();
            match c.storage {
                Storage::Number(t) => {
                    let width = t.bytes as u64;
                    t.decode_f64(&self.bytes(batch, buffer + 1, from * width, rows * width)?, &mut out);
                }
                Storage::Bool => out.extend(
                    self.bits(batch, buffer + 1, from, rows)?.into_iter().map(|b| f64::from(u8::from(b))),
                ),
                _ => return Err(Error::bug("numbers of a column that holds none")),
            }
            for (value, missing) in out[at..].iter_mut().zip(self.missing(batch, node, buffer, from, rows)?) {
                if missing {
                    *value = f64::NAN;
                }
            }
        }
        Ok(out)
    }

    /// Strings of rows `start .. start + rows`, missing = empty.
    pub fn texts(&self, column: usize, start: u64, rows: u64) -> Result<Vec<String>> {
        let c = &self.columns[column];
        let (node, buffer) = c.first;
        let Storage::Text { wide } = c.storage else {
            return Err(Error::bug("strings of a column that holds none"));
        };
        let mut out = Vec::new();
        for (batch, from, rows) in self.parts(start, rows) {
            let data = self.batches[batch].buffers.get(buffer + 2).map_or(0, |b| b.1);
            let offsets = self.offsets(batch, buffer + 1, wide, from, rows, data)?;
            let base = offsets[0];
            let raw = self.bytes(batch, buffer + 2, base, offsets[rows as usize] - base)?;
            let missing = self.missing(batch, node, buffer, from, rows)?;
            for (row, span) in offsets.windows(2).enumerate() {
                let bytes = &raw[(span[0] - base) as usize..(span[1] - base) as usize];
                let text = match missing.get(row) {
                    Some(true) => "",
                    _ => std::str::from_utf8(bytes).map_err(|_| {
                        broken(&self.path, self.batches[batch].body, "a string is not UTF-8").found(format!(
                            "column {}, row {} (from 0)",
                            c.name,
                            self.first_row[batch] + from + row as u64
                        ))
                    })?,
                };
                out.push(text.to_string());
            }
        }
        Ok(out)
    }

    /// Windows of a column of lists, each within one batch and of at most `rows` rows: offsets alone.
    pub fn list_windows(&self, column: usize, rows: u64) -> impl Iterator<Item = Result<Lists>> + '_ {
        let windows = (0..self.batches.len()).flat_map(move |batch| {
            let all = self.batches[batch].rows;
            (0..all).step_by(rows.max(1) as usize).map(move |from| (batch, from, rows.min(all - from)))
        });
        windows.map(move |(batch, from, rows)| self.lists(column, batch, from, rows))
    }

    fn lists(&self, column: usize, batch: usize, from: u64, rows: u64) -> Result<Lists> {
        let c = &self.columns[column];
        let (node, buffer) = c.first;
        let Storage::List { wide, item } = c.storage else {
            return Err(Error::bug("lists of a column that holds none"));
        };
        let row = || self.first_row[batch] + from;
        let missing = self.missing(batch, node, buffer, from, rows)?;
        if let Some(at) = missing.iter().position(|&m| m) {
            return Err(Error::new(Code::DatasetTokens, "a cell has no list of tokens")
                .at(format!("{}, row {} (from 0)", self.path.display(), row() + at as u64))
                .found("null"));
        }
        if self.batches[batch].missing.get(node + 1).is_some_and(|&n| n > 0) {
            return Err(Error::new(Code::DatasetTokens, "a list of tokens holds a missing value")
                .at(format!("{}, the batch from row {}", self.path.display(), self.first_row[batch])));
        }
        let limit = self.batches[batch].buffers.get(buffer + 3).map_or(0, |b| b.1) / item.bytes as u64;
        let offsets = self.offsets(batch, buffer + 1, wide, from, rows, limit)?;
        Ok(Lists { batch, column, offsets })
    }

    /// The elements of rows `first .. last` of a window, one list after the other.
    pub fn elements(&self, lists: &Lists, first: usize, last: usize, out: &mut Vec<i64>) -> Result<()> {
        let c = &self.columns[lists.column];
        let Storage::List { item, .. } = c.storage else {
            return Err(Error::bug("lists of a column that holds none"));
        };
        let width = item.bytes as u64;
        let (from, to) = (lists.offsets[first], lists.offsets[last]);
        let raw = self.bytes(lists.batch, c.first.1 + 3, from * width, (to - from) * width)?;
        item.decode_i64(&raw, out).ok_or_else(|| Error::bug("tokens that are no integers"))
    }
}

fn broken(path: &Path, byte: u64, what: &str) -> Error {
    Error::new(Code::ArrowDamaged, what)
        .at(format!("{}, byte {byte}", path.display()))
        .next("the file is damaged or cut short: copy it again, or save it again with datasets' save_to_disk")
}
