//! Outputs that appear whole or not at all: written beside their place under a hidden name, synced, renamed.

use super::{Output, beside, parent, remove_file, rename, sync_folder};
use crate::error::{Error, Result};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// A file that takes its final name when [`publish`](Self::publish)ed and leaves nothing behind when dropped before.
#[derive(Debug)]
pub struct Pending {
    file: Option<BufWriter<Output>>,
    temporary: PathBuf,
    path: PathBuf,
}

impl Pending {
    /// Starts a file that is to be called `path`.
    ///
    /// # Errors
    /// The file system's. Usage: `path` ends in no name.
    pub fn create(path: &Path) -> Result<Self> {
        let temporary = beside(path, &format!("{}.tmp", std::process::id()))?;
        let file = Output::create(&temporary).map_err(|e| Error::io(path, "create the file", &e))?;
        Ok(Pending {
            file: Some(BufWriter::with_capacity(1 << 20, file)),
            temporary,
            path: path.to_path_buf(),
        })
    }

    /// Appends.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let file = self.file.as_mut().ok_or_else(|| Error::bug("a write after the writer was closed"))?;
        file.write_all(bytes).map_err(|e| Error::io(&self.path, "write the file", &e))
    }

    /// Ends writing by appending: what was written is in the file, which others may now edit under the path returned.
    ///
    /// # Errors
    /// The file system's.
    pub fn close_writer(&mut self) -> Result<&Path> {
        if let Some(mut file) = self.file.take() {
            file.flush().map_err(|e| Error::io(&self.path, "write the file", &e))?;
        }
        Ok(&self.temporary)
    }

    /// Syncs the file, gives it its name and makes that durable.
    ///
    /// # Errors
    /// The file system's; a file that was there before is then still there.
    pub fn publish(mut self) -> Result<()> {
        let failed = |e: std::io::Error| Error::io(&self.path, "write the file", &e);
        let output = match self.file.take() {
            Some(file) => file.into_inner().map_err(|e| failed(e.into_error()))?,
            // Edited by others since: what they wrote is synced through any descriptor.
            None => Output::append(&self.temporary).map_err(failed)?,
        };
        output.sync().map_err(failed)?;
        rename(&self.temporary, &self.path).map_err(failed)?;
        sync_folder(parent(&self.path)).map_err(failed)
    }

    /// Gives the file its name without syncing anything: see [`super::replace_unsynced`].
    pub(super) fn publish_unsynced(mut self) -> Result<()> {
        self.close_writer()?;
        rename(&self.temporary, &self.path).map_err(|e| Error::io(&self.path, "write the file", &e))
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
        if self.temporary.exists() {
            let _ = remove_file(&self.temporary);
        }
    }
}
