//! A matrix that is not stored by rows, by rows, in bounded memory: CSC, or triplets in no order.
//!
//! Pass 1 counts the entries of each row (of CSC, from the indices alone). Rows are then cut into buckets that fit the budget. With one bucket,
//! pass 2 scatters every entry to its row's next free place in memory; with several, pass 2 writes (row, column, count) records
//! to one temporary file per bucket, front to back, and each bucket is then read and scattered. The columns of CSC
//! come in ascending order, so every row comes out sorted. Temporary files are unlinked as soon as they are open: no crash leaves one behind.

use super::compressed::{Compressed, Stream, decode_index};
use super::matrix::{Matrix, Pass, RowBlock};
use crate::error::{Code, Error, Result};
use std::io::{BufReader, BufWriter, Read, Seek, Write};

/// Entries read at a time.
const WINDOW: u64 = 1 << 20;
/// Bytes of an entry in memory: column and count.
const ENTRY_BYTES: u64 = 12;
/// Open files at most.
const MAX_BUCKETS: usize = 512;
/// Entries of a block handed out.
const BLOCK_ENTRIES: usize = 1 << 21;
/// Bytes of a record on disk: row, column, count.
const RECORD_BYTES: usize = 16;

/// Rows `first .. first + offset.len() - 1` being assembled.
struct Bucket {
    first: u64,
    /// Start of each row, one more than rows.
    offset: Vec<usize>,
    /// Next free place of each row.
    cursor: Vec<usize>,
    column: Vec<u32>,
    count: Vec<f64>,
}

impl Bucket {
    fn new(first: u64, row_entries: &[u32]) -> Self {
        let mut offset = vec![0usize];
        offset.extend(row_entries.iter().scan(0usize, |sum, &n| {
            *sum += n as usize;
            Some(*sum)
        }));
        let total = *offset.last().expect("one offset at least");
        Bucket {
            first,
            cursor: offset[..row_entries.len()].to_vec(),
            offset,
            column: vec![0; total],
            count: vec![0.0; total],
        }
    }

    fn put(&mut self, row: u64, column: u32, count: f64) {
        let at = &mut self.cursor[(row - self.first) as usize];
        self.column[*at] = column;
        self.count[*at] = count;
        *at += 1;
    }

    fn hand_out(&self, each: &mut dyn FnMut(&RowBlock) -> Result<()>) -> Result<()> {
        let rows = self.offset.len() - 1;
        let mut row = 0;
        while row < rows {
            let from = self.offset[row];
            let mut end = row + 1;
            while end < rows && self.offset[end + 1] - from <= BLOCK_ENTRIES && end - row < 1 << 14 {
                end += 1;
            }
            let span = from..self.offset[end];
            each(&RowBlock {
                first: self.first + row as u64,
                start: self.offset[row..=end].iter().map(|o| o - from).collect(),
                column: self.column[span.clone()].to_vec(),
                count: self.count[span].to_vec(),
            })?;
            row = end;
        }
        Ok(())
    }
}

/// Hands out the rows of a column-compressed matrix in order.
pub(super) fn stream(
    matrix: &Matrix,
    parts: &Compressed,
    pass: &Pass<'_>,
    each: &mut dyn FnMut(&RowBlock) -> Result<()>,
) -> Result<()> {
    let (rows, columns) = (matrix.rows(), matrix.columns());
    let offsets = parts.all_offsets(matrix.place(), columns, rows)?;
    let mut row_entries =
        vec![
            0u32;
            usize::try_from(rows)
                .map_err(|_| Error::new(Code::MatrixShape, "too many rows").at(matrix.place()))?
        ];
    let indices = || {
        Stream::new(parts.indices.as_ref(), parts.entries, |raw, out| {
            decode_index(parts.index_type, raw, out)
        })
    };
    let windows =
        || (0..parts.entries).step_by(WINDOW as usize).map(|from| (from, (from + WINDOW).min(parts.entries)));
    let mut stream = indices();
    for (from, to) in windows() {
        stream.take(from, to)?;
        for (n, &row) in stream.taken.iter().enumerate() {
            let Some(entries) = row_entries.get_mut(row as usize) else {
                return Err(Error::new(Code::SparseIndices, "a row index lies outside the matrix")
                    .at(format!("{}/indices[{}]", matrix.place(), from + n as u64))
                    .found(if row == u32::MAX {
                        "an index that is negative or huge".into()
                    } else {
                        row.to_string()
                    })
                    .wanted(format!("indices from 0 to {}", rows.saturating_sub(1)))
                    .next("the file is damaged: write it again with anndata.write_h5ad"));
            };
            *entries += 1;
        }
    }
    let for_each_entry = |put: &mut Put<'_>| -> Result<()> {
        let mut indices = indices();
        let mut data =
            Stream::new(parts.data.as_ref(), parts.entries, |raw, out| parts.data_type.decode_f64(raw, out));
        let mut column = 0usize;
        for (from, to) in windows() {
            let (a, b) = rayon::join(|| data.take(from, to), || indices.take(from, to));
            a?;
            b?;
            for (n, (&row, &count)) in indices.taken.iter().zip(&data.taken).enumerate() {
                while offsets[column + 1] <= from + n as u64 {
                    column += 1;
                }
                put(u64::from(row), column as u32, count)?;
            }
        }
        Ok(())
    };
    turn(matrix.place(), &row_entries, &for_each_entry, pass, each)
}

/// Takes one entry: row, column, count.
pub(super) type Put<'a> = dyn FnMut(u64, u32, f64) -> Result<()> + 'a;

/// Hands out rows in order. `row_entries` has the number of entries of each row; `for_each_entry` gives all entries in any order
/// that is the same each time, and a row's columns come out in that order.
pub(super) fn turn(
    place: &str,
    row_entries: &[u32],
    for_each_entry: &dyn Fn(&mut Put<'_>) -> Result<()>,
    pass: &Pass<'_>,
    each: &mut dyn FnMut(&RowBlock) -> Result<()>,
) -> Result<()> {
    let entries: u64 = row_entries.iter().map(|&n| u64::from(n)).sum();
    let budget = (pass.memory_bytes / 3 / ENTRY_BYTES).max(1 << 12);
    let bounds = cut(row_entries, budget);
    let buckets = bounds.len() - 1;
    if buckets > MAX_BUCKETS {
        return Err(Error::new(
            Code::TransposeMemory,
            "the matrix is not stored by cells and too large to turn within the given memory",
        )
        .at(place)
        .found(format!("{entries} entries"))
        .next(format!(
            "give at least --memory {}M, or store the matrix by cells (CSR)",
            ((entries * ENTRY_BYTES * 3 / MAX_BUCKETS as u64) >> 20) + 1
        )));
    }
    if buckets <= 1 {
        let mut bucket = Bucket::new(0, row_entries);
        for_each_entry(&mut |row, column, count| {
            bucket.put(row, column, count);
            Ok(())
        })?;
        return bucket.hand_out(each);
    }
    let fail = |e: std::io::Error| Error::io(pass.scratch, "write temporary files for turning a matrix", &e);
    let buffer = ((pass.memory_bytes / 8) as usize / buckets).clamp(1 << 12, 1 << 18);
    let mut files = Vec::with_capacity(buckets);
    for n in 0..buckets {
        files.push(BufWriter::with_capacity(buffer, unlinked(pass.scratch, n).map_err(fail)?));
    }
    for_each_entry(&mut |row, column, count| {
        let n = bounds.partition_point(|&b| b <= row) - 1;
        let mut record = [0u8; RECORD_BYTES];
        record[..4].copy_from_slice(&(row as u32).to_le_bytes());
        record[4..8].copy_from_slice(&column.to_le_bytes());
        record[8..].copy_from_slice(&count.to_le_bytes());
        files[n].write_all(&record).map_err(fail)
    })?;
    for (n, file) in files.into_iter().enumerate() {
        let mut file = file.into_inner().map_err(|e| fail(e.into_error()))?;
        file.rewind().map_err(fail)?;
        let span = bounds[n] as usize..bounds[n + 1] as usize;
        let total: u64 = row_entries[span.clone()].iter().map(|&e| u64::from(e)).sum();
        let mut bucket = Bucket::new(bounds[n], &row_entries[span]);
        let mut reader = BufReader::with_capacity(1 << 18, file);
        let mut record = [0u8; RECORD_BYTES];
        for _ in 0..total {
            reader.read_exact(&mut record).map_err(fail)?;
            let word = |at: usize| u32::from_le_bytes(record[at..at + 4].try_into().expect("4 bytes"));
            let count = f64::from_le_bytes(record[8..].try_into().expect("8 bytes"));
            bucket.put(u64::from(word(0)), word(4), count);
        }
        bucket.hand_out(each)?;
    }
    Ok(())
}

/// Row borders of buckets with at most `budget` entries each (a single row may exceed it).
fn cut(row_entries: &[u32], budget: u64) -> Vec<u64> {
    let mut bounds = vec![0u64];
    let mut sum = 0u64;
    for (row, &entries) in row_entries.iter().enumerate() {
        if sum > 0 && sum + u64::from(entries) > budget {
            bounds.push(row as u64);
            sum = 0;
        }
        sum += u64::from(entries);
    }
    bounds.push(row_entries.len() as u64);
    bounds
}

/// A file that is readable and writable and has no name any more.
fn unlinked(folder: &std::path::Path, n: usize) -> std::io::Result<std::fs::File> {
    let path = folder.join(format!(".cellrefine-transpose.{}.{n}.tmp", std::process::id()));
    let file = std::fs::OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::cut;

    #[test]
    fn buckets_cover_all_rows_and_keep_the_budget() {
        assert_eq!(cut(&[], 10), [0, 0]);
        assert_eq!(cut(&[0, 0], 10), [0, 2]);
        assert_eq!(cut(&[4, 4, 4, 0, 20, 1], 8), [0, 2, 4, 5, 6]);
    }
}
