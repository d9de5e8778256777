//! NumPy's `.npy`, version 1.0, for one kind of array: little-endian f32, C order, (C, D).
//!
//! ```text
//! \x93NUMPY 1 0 | u16 header length | {'descr': '<f4', 'fortran_order': False, 'shape': (C, D), } padded to 64 | data
//! ```
//!
//! Rows are appended as they come, so memory does not grow with the cells; the file gets its name only when the last row
//! and an fsync are behind it. Cell ids go to a text file beside it, one a line, in the same order.

use crate::disk::Pending;
use crate::error::{Code, Error, Result};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"\x93NUMPY\x01\x00";

fn header(rows: usize, width: usize) -> Vec<u8> {
    let mut text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}");
    // Magic, length and text with its final newline fill a multiple of 64 bytes, so that the data is aligned.
    text.push_str(&" ".repeat(63 - (MAGIC.len() + 2 + text.len()) % 64));
    text.push('\n');
    let mut bytes = MAGIC.to_vec();
    bytes.extend((text.len() as u16).to_le_bytes());
    bytes.extend(text.as_bytes());
    bytes
}

/// `a/b.npy` -> `a/b.ids.txt`.
pub fn ids_path(npy: &Path) -> PathBuf {
    npy.with_extension("ids.txt")
}

/// Refuses rows (n, D) that hold a value that is not finite, naming the cell.
pub(crate) fn check_finite<S: AsRef<str>>(values: &[f32], width: usize, ids: &[S]) -> Result<()> {
    let Some(i) = values.iter().position(|x| !x.is_finite()) else { return Ok(()) };
    Err(Error::new(Code::EmbeddingNotFinite, "an embedding holds a value that is not finite")
        .at(format!("cell {:?}, column {}", ids[i / width].as_ref(), i % width))
        .found(values[i])
        .next("check the checkpoint with `cellrefine inspect`; a run that diverged leaves such weights"))
}

/// Writes rows and ids of an announced number, a block at a time.
pub struct NpyWriter {
    values: Pending,
    ids: Pending,
    rows: usize,
    width: usize,
    written: usize,
}

impl NpyWriter {
    /// Starts `path` for (`rows`, `width`) values, and the ids file beside it.
    pub fn create(path: &Path, rows: usize, width: usize) -> Result<Self> {
        let mut values = Pending::create(path)?;
        values.write(&header(rows, width))?;
        Ok(NpyWriter { values, ids: Pending::create(&ids_path(path))?, rows, width, written: 0 })
    }

    /// Appends rows (n, D) with their n ids. Refuses values that are not finite and ids with a line break.
    pub fn append<S: AsRef<str>>(&mut self, values: &[f32], ids: &[S]) -> Result<()> {
        if values.len() != ids.len() * self.width || self.written + ids.len() > self.rows {
            return Err(Error::bug("rows and ids do not fit the announced shape")
                .found(format!("{} values, {} ids after {} rows", values.len(), ids.len(), self.written))
                .wanted(format!("({}, {})", self.rows, self.width)));
        }
        check_finite(values, self.width, ids)?;
        for v in values {
            self.values.write(&v.to_le_bytes())?;
        }
        for id in ids {
            let id = id.as_ref();
            if id.contains(['\n', '\r']) {
                return Err(Error::new(
                    Code::CellRefused,
                    "a cell id holds a line break; one id a line cannot hold it",
                )
                .found(format!("{id:?}")));
            }
            self.ids.write(id.as_bytes())?;
            self.ids.write(b"\n")?;
        }
        self.written += ids.len();
        Ok(())
    }

    /// Gives both files their names: ids first, so that whoever sees the array finds its ids.
    pub fn finish(self) -> Result<()> {
        if self.written != self.rows {
            return Err(Error::bug("fewer rows than announced").found(self.written).wanted(self.rows));
        }
        self.ids.publish()?;
        self.values.publish()
    }
}

/// An array read back: (rows, width) values.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// Row-major values.
    pub values: Vec<f32>,
    /// C.
    pub rows: usize,
    /// D.
    pub width: usize,
}

/// Reads a two-dimensional little-endian f32 array in C order; anything else is refused by name.
pub fn read(path: &Path) -> Result<Array> {
    let mut file = File::open(path).map_err(|e| Error::io(path, "open the array", &e))?;
    let size = file.metadata().map_err(|e| Error::io(path, "read the size", &e))?.len() as usize;
    let bad = |found: String| {
        Error::new(Code::NpyDamaged, "not a .npy array that can be used here")
            .at(path.display())
            .found(found)
            .wanted("NumPy format 1.0, '<f4', C order, two dimensions, all its data")
            .next("numpy.save(path, array.astype('<f4'))")
    };
    let mut start = [0u8; 10];
    file.read_exact(&mut start).map_err(|_| bad(format!("{size} bytes")))?;
    if &start[..8] != MAGIC {
        return Err(bad(format!("the first bytes {:?}", &start[..8])));
    }
    let mut text = vec![0u8; u16::from_le_bytes([start[8], start[9]]) as usize];
    file.read_exact(&mut text).map_err(|_| bad("a header cut short".into()))?;
    let text = String::from_utf8_lossy(&text).into_owned();
    let shape = || -> Option<(usize, usize)> {
        let inside = text.split_once("'shape': (")?.1.split_once(')')?.0;
        let mut numbers = inside.split(',').map(str::trim).filter(|s| !s.is_empty()).map(|s| s.parse().ok());
        match (numbers.next()??, numbers.next()??, numbers.next()) {
            (rows, width, None) => Some((rows, width)),
            _ => None,
        }
    };
    let plain = text.contains("'descr': '<f4'") && text.contains("'fortran_order': False");
    let (rows, width) =
        shape().filter(|_| plain).ok_or_else(|| bad(format!("the header {}", text.trim())))?;
    let bytes = rows.checked_mul(width).and_then(|n| n.checked_mul(4));
    let payload = size - start.len() - u16::from_le_bytes([start[8], start[9]]) as usize;
    if bytes != Some(payload) {
        return Err(bad(format!("{payload} bytes of data for shape ({rows}, {width})")));
    }
    let mut data = Vec::with_capacity(payload);
    file.read_to_end(&mut data).map_err(|e| Error::io(path, "read the array", &e))?;
    let values = data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    Ok(Array { values, rows, width })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_alignment() {
        let folder = tempfile::tempdir().unwrap();
        for (rows, width) in [(0, 3), (1, 1), (7, 5), (123_456, 1)] {
            let path = folder.path().join("e.npy");
            let values: Vec<f32> = (0..rows * width).map(|i| i as f32 - 2.5).collect();
            let ids: Vec<String> = (0..rows).map(|i| format!("cell {i}")).collect();
            let mut w = NpyWriter::create(&path, rows, width).unwrap();
            let half = rows / 2;
            w.append(&values[..half * width], &ids[..half]).unwrap();
            w.append(&values[half * width..], &ids[half..]).unwrap();
            w.finish().unwrap();
            assert_eq!(read(&path).unwrap(), Array { values, rows, width });
            let size = std::fs::metadata(&path).unwrap().len() as usize;
            assert_eq!((size - rows * width * 4) % 64, 0);
            let text = std::fs::read_to_string(folder.path().join("e.ids.txt")).unwrap();
            assert_eq!(text.lines().collect::<Vec<_>>(), ids);
        }
    }

    #[test]
    fn nothing_is_left_of_a_file_that_was_not_finished() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("e.npy");
        let mut w = NpyWriter::create(&path, 2, 2).unwrap();
        w.append(&[1.0, 2.0], &["a"]).unwrap();
        assert!(w.append(&[1.0, f32::NAN], &["b"]).unwrap_err().place().unwrap().contains("\"b\", column 1"));
        assert_eq!(w.finish().unwrap_err().kind().exit_code(), 1);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn damaged_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("e.npy");
        let mut whole = header(2, 2);
        whole.extend([0u8; 16]);
        std::fs::write(&path, &whole).unwrap();
        assert!(read(&path).is_ok());
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(read(&path).unwrap_err().kind().exit_code(), 3, "cut at {cut}");
        }
        let text = String::from_utf8_lossy(&whole).into_owned();
        for (from, to) in [("<f4", "<f8"), ("False", "True "), ("(2, 2)", "(4,  )"), ("(2, 2)", "(9, 2)")] {
            let changed = text.replace(from, to);
            assert_ne!(changed, text);
            let mut bytes = whole.clone();
            let at = text[6..].find(from).unwrap(); // bytes and characters differ by the magic's first byte
            let at = whole.windows(from.len()).position(|w| w == from.as_bytes()).unwrap_or(at);
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(read(&path).unwrap_err().kind().exit_code(), 3, "{to}");
        }
    }
}
