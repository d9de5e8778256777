//! Files that are read whole: settings, dictionaries, tables, records; and gzip, told by content.
//!
//! Memory follows the file's true size. A file beyond what its kind may have is refused by its length, before a byte of it is
//! read, and gzip may unpack to a hundred times the packed size, which no table of names or counts comes near, and no further:
//! deflate reaches a thousand, for a megabyte that unpacks to a gigabyte.

use crate::error::{Code, Error, Result};
use std::fs::File;
use std::io::{Read, Result as IoResult};
use std::path::Path;

/// How many times its own size a gzip file may unpack to.
const GZIP_EXPANSION: u64 = 100;
/// What any gzip file may unpack to.
const GZIP_ALWAYS_BYTES: u64 = 1 << 20;
/// First bytes of gzip.
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// The bytes of a file of at most `most` bytes.
///
/// # Errors
/// Input: missing, a folder, larger.
pub(crate) fn read(path: &Path, doing: &str, most: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|e| Error::io(path, doing, &e))?;
    fits(path, &file, most)?;
    // What grows meanwhile, and what is no plain file, is held to the limit as well.
    file.take(most + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, doing, &e))?;
    if bytes.len() as u64 > most { Err(too_large(path, bytes.len() as u64, most)) } else { Ok(bytes) }
}

/// The text of a file of at most `most` bytes.
///
/// # Errors
/// As [`read`], and where the file is not UTF-8, with the line.
pub(crate) fn read_text(path: &Path, doing: &str, most: u64) -> Result<String> {
    text(path, read(path, doing, most)?)
}

/// The bytes of a file, plain or gzip, of at most `most` bytes unpacked.
///
/// # Errors
/// As [`read`], and where gzip is damaged or unpacks too far.
pub(crate) fn unpack(path: &Path, doing: &str, most: u64) -> Result<Vec<u8>> {
    let io = |e: std::io::Error| Error::io(path, doing, &e);
    let file = File::open(path).map_err(io)?;
    fits(path, &file, most)?;
    let (reader, packed) = told_by_content(file).map_err(io)?;
    let mut bytes = Vec::new();
    reader.take(most + 1).read_to_end(&mut bytes).map_err(|e| match packed {
        true => Error::new(Code::GzipDamaged, "the gzip file is damaged or cut off")
            .at(path.display())
            .found(e)
            .next("copy or download it again"),
        false => io(e),
    })?;
    if bytes.len() as u64 > most { Err(too_large(path, bytes.len() as u64, most)) } else { Ok(bytes) }
}

/// UTF-8, or the line where it ends.
pub(crate) fn text(path: &Path, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        let line = 1 + e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|&&b| b == b'\n').count();
        Error::new(Code::NotText, "the file is not UTF-8 text").at(format!("{}:{line}", path.display()))
    })
}

/// A reader of what a file holds, unpacked where it is gzip, and whether it is.
pub(crate) fn told_by_content(mut file: File) -> IoResult<(Box<dyn Read + Send>, bool)> {
    let metadata = file.metadata()?;
    let mut magic = Vec::new();
    file.by_ref().take(2).read_to_end(&mut magic)?;
    let packed = magic == GZIP;
    let whole = std::io::Cursor::new(magic).chain(file);
    if !packed {
        return Ok((Box::new(whole), false));
    }
    // A pipe has no size to go by.
    let size = if metadata.is_file() { metadata.len() } else { u64::MAX };
    let limit = size.saturating_mul(GZIP_EXPANSION).saturating_add(GZIP_ALWAYS_BYTES);
    Ok((Box::new(Unpacked { inside: flate2::read::MultiGzDecoder::new(whole), left: limit, limit }), true))
}

fn fits(path: &Path, file: &File, most: u64) -> Result<()> {
    let metadata = file.metadata().map_err(|e| Error::io(path, "read the size", &e))?;
    if metadata.len() > most { Err(too_large(path, metadata.len(), most)) } else { Ok(()) }
}

fn too_large(path: &Path, bytes: u64, most: u64) -> Error {
    Error::new(Code::FileTooLarge, "the file is too large for what it should be")
        .at(path.display())
        .found(format!("{bytes} bytes"))
        .wanted(format!("at most {most}"))
        .next("check that the path names the file that was meant")
}

/// A decoder that stops where it has given too much.
struct Unpacked<R> {
    inside: R,
    left: u64,
    limit: u64,
}

impl<R: Read> Read for Unpacked<R> {
    fn read(&mut self, out: &mut [u8]) -> IoResult<usize> {
        let n = self.inside.read(out)?;
        self.left = self.left.checked_sub(n as u64).ok_or_else(|| {
            let what =
                format!("it unpacks to more than {} bytes, {GZIP_EXPANSION} times its size", self.limit);
            std::io::Error::new(std::io::ErrorKind::InvalidData, what)
        })?;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn sizes_are_held_before_and_behind_gzip() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, b"some text").unwrap();
        assert_eq!(read_text(&path, "read", 9).unwrap(), "some text");
        assert_eq!(read(&path, "read", 8).unwrap_err().code(), Code::FileTooLarge);
        let packed = |bytes: &[u8]| {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            gzip.write_all(bytes).unwrap();
            std::fs::write(&path, gzip.finish().unwrap()).unwrap();
        };
        packed(&[b'a'; 1 << 20]);
        assert_eq!(unpack(&path, "read", 1 << 21).unwrap().len(), 1 << 20);
        assert_eq!(unpack(&path, "read", 1 << 19).unwrap_err().code(), Code::FileTooLarge);
        packed(&[b'a'; 8 << 20]);
        let e = unpack(&path, "read", 1 << 30).unwrap_err();
        assert!(e.code() == Code::GzipDamaged && e.to_string().contains("100 times its size"), "{e}");
    }
}
