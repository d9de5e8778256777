//! Outputs that appear whole or not at all: written beside their place under a hidden name, synced, renamed.

use crate::error::{Code, Error, Result};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// A file that takes its final name when [`publish`](Self::publish)ed and leaves nothing behind when dropped before.
pub(crate) struct Pending {
    file: Option<BufWriter<File>>,
    temporary: PathBuf,
    path: PathBuf,
}

impl Pending {
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let name = path
            .file_name()
            .ok_or_else(|| Error::new(Code::OutputName, "an output needs a file name").at(path.display()))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.tmp", std::process::id()));
        let temporary = path.with_file_name(hidden);
        let file = File::create(&temporary).map_err(|e| Error::io(&temporary, "create the file", &e))?;
        Ok(Pending {
            file: Some(BufWriter::with_capacity(1 << 20, file)),
            temporary,
            path: path.to_path_buf(),
        })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let file = self.file.as_mut().ok_or_else(|| Error::bug("a write after the writer was closed"))?;
        file.write_all(bytes).map_err(|e| Error::io(&self.temporary, "write", &e))
    }

    /// Ends writing by appending: what was written is in the file, which others may now edit under the path returned.
    pub(crate) fn close_writer(&mut self) -> Result<&Path> {
        if let Some(mut file) = self.file.take() {
            file.flush().map_err(|e| Error::io(&self.temporary, "write", &e))?;
        }
        Ok(&self.temporary)
    }

    pub(crate) fn publish(mut self) -> Result<()> {
        self.close_writer()?;
        let failed = |e: &std::io::Error| Error::io(&self.path, "write", e);
        let file = File::options().write(true).open(&self.temporary).map_err(|e| failed(&e))?;
        file.sync_all().map_err(|e| failed(&e))?;
        drop(file);
        std::fs::rename(&self.temporary, &self.path).map_err(|e| failed(&e))?;
        // The name itself is durable once its folder is. Some file systems cannot sync a folder: the data is safe there.
        let folder = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if let Ok(folder) = File::open(folder) {
            let _ = folder.sync_all();
        }
        Ok(())
    }
}

impl Write for Pending {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let file = self.file.as_mut().ok_or_else(|| std::io::Error::other("the writer was closed"))?;
        file.write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.file.as_mut().map_or(Ok(()), Write::flush)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // After a rename there is nothing under this name.
        let _ = std::fs::remove_file(&self.temporary);
    }
}
