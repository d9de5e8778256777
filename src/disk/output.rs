//! A file that is being written, unbuffered: every call is one operation of the system, which [`super::fault`] counts.

use super::fault::{self, Entry, Operation, Verdict};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// An open file. Put a `BufWriter` around it for small pieces.
#[derive(Debug)]
pub struct Output {
    file: File,
    path: PathBuf,
    /// Where the next byte goes.
    at: u64,
}

impl Output {
    /// A new file, or an old one emptied.
    pub fn create(path: &Path) -> io::Result<Output> {
        Self::open(path, OpenOptions::new().read(true).write(true).create(true).truncate(true))
    }
    /// A new file; one that is there is an error.
    pub fn create_new(path: &Path) -> io::Result<Output> {
        Self::open(path, OpenOptions::new().read(true).write(true).create_new(true))
    }
    /// A file, new or old, to write at its end.
    pub fn append(path: &Path) -> io::Result<Output> {
        let mut output = Self::open(path, OpenOptions::new().create(true).append(true))?;
        output.at = output.file.metadata()?.len();
        Ok(output)
    }

    fn open(path: &Path, how: &OpenOptions) -> io::Result<Output> {
        fault::meet(Operation::Create, path)?;
        let file = how.open(path)?;
        fault::record(|| Entry::file(path, file.metadata().map_or(0, |m| m.len())));
        Ok(Output { file, path: path.to_path_buf(), at: 0 })
    }

    /// Appends all of `bytes` or, where that fails, none of them: what follows a full disk is not joined to half a record.
    pub fn append_whole(&mut self, bytes: &[u8]) -> io::Result<()> {
        let before = self.at;
        let written = self.write_all(bytes);
        if written.is_err() && self.file.set_len(before).is_ok() {
            fault::record(|| Entry::cut(&self.path, before));
            self.at = before;
        }
        written
    }

    /// Makes the content durable; the name is once its folder is synced.
    pub fn sync(&self) -> io::Result<()> {
        fault::meet(Operation::Sync, &self.path)?;
        self.file.sync_all()?;
        fault::record(|| Entry::synced(&self.path));
        Ok(())
    }

    /// Cuts the file, or makes it longer by zeros.
    pub fn set_len(&mut self, bytes: u64) -> io::Result<()> {
        fault::meet(Operation::Write, &self.path)?;
        self.file.set_len(bytes)?;
        fault::record(|| Entry::cut(&self.path, bytes));
        Ok(())
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let most = match fault::meet(Operation::Write, &self.path)? {
            Verdict::Go => bytes.len(),
            Verdict::Short | Verdict::Torn if bytes.len() < 2 => bytes.len(),
            Verdict::Short => bytes.len() / 2,
            Verdict::Torn => {
                let _ = self.file.write_all(&bytes[..bytes.len() / 2]);
                fault::die()
            }
        };
        let written = self.file.write(&bytes[..most])?;
        fault::record(|| Entry::written(&self.path, self.at, &bytes[..written]));
        self.at += written as u64;
        Ok(written)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Output {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(into)?;
        self.at += read as u64;
        Ok(read)
    }
}

impl Seek for Output {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.at = self.file.seek(to)?;
        Ok(self.at)
    }
}
