//! Lines of a text file, plain or gzip (told by content), with bounded memory whatever the file claims.

use crate::error::{Code, Error, Result};
use crate::whole_file;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Longest line; also the window in which the file is read.
const WINDOW_BYTES: usize = 1 << 20;

/// A text file read line by line.
pub(super) struct Lines {
    reader: Box<dyn Read + Send>,
    path: PathBuf,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that are filled and not yet handed out.
    ready: Range<usize>,
    line: u64,
    ended: bool,
}

impl Lines {
    /// Opens a file.
    ///
    /// # Errors
    /// Input: missing, a folder.
    pub fn open(path: &Path) -> Result<Lines> {
        let fail = |e: std::io::Error| Error::io(path, "read the file", &e);
        let file = std::fs::File::open(path).map_err(fail)?;
        let (reader, _) = whole_file::told_by_content(file).map_err(fail)?;
        Ok(Lines {
            reader,
            path: path.to_path_buf(),
            buffer: vec![0; WINDOW_BYTES],
            ready: 0..0,
            line: 0,
            ended: false,
        })
    }

    /// `file:line` of the line that was handed out last, for messages.
    pub fn place(&self) -> String {
        format!("{}:{}", self.path.display(), self.line)
    }

    /// The next line, without its end; `None` behind the last.
    ///
    /// # Errors
    /// Input: a line beyond [`WINDOW_BYTES`], gzip data that is damaged or cut short.
    pub fn next_line(&mut self) -> Result<Option<&[u8]>> {
        let mut searched = 0;
        loop {
            let window = &self.buffer[self.ready.clone()];
            if let Some(at) = window[searched..].iter().position(|&b| b == b'\n') {
                let line = self.ready.start..self.ready.start + searched + at;
                self.ready.start = line.end + 1;
                return Ok(Some(self.take(line)));
            }
            searched = window.len();
            if self.ended {
                let line = self.ready.clone();
                self.ready.start = line.end;
                return Ok(if line.is_empty() { None } else { Some(self.take(line)) });
            }
            self.buffer.copy_within(self.ready.clone(), 0);
            self.ready = 0..self.ready.len();
            if self.ready.end == self.buffer.len() {
                return Err(Error::new(Code::FileTooLarge, "a line is too long for a table of text")
                    .at(format!("{}:{}", self.path.display(), self.line + 1))
                    .wanted(format!("lines of at most {WINDOW_BYTES} bytes")));
            }
            match self.reader.read(&mut self.buffer[self.ready.end..]) {
                Ok(0) => self.ended = true,
                Ok(n) => self.ready.end += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => {
                    return Err(Error::new(Code::FileCut, "the file cannot be read to its end")
                        .at(format!("{}:{}", self.path.display(), self.line + 1))
                        .found(e)
                        .next("it is damaged or cut short: copy or download it again"));
                }
            }
        }
    }

    fn take(&mut self, line: Range<usize>) -> &[u8] {
        self.line += 1;
        let line = &self.buffer[line];
        line.strip_suffix(b"\r").unwrap_or(line)
    }
}
