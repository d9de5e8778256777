//! The streams under a shard: a spool for tokens whose number is not known yet, and the shard file, summed while it is written.

use super::format::*;
use super::partial_folder::PartialFolder;
use crate::digest::hex;
use crate::disk::Output;
use crate::error::Result;
use sha2::{Digest, Sha256};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

/// A temporary file for one stream of the open shard.
#[derive(Debug)]
pub(super) struct Spool(BufWriter<Output>);

impl Spool {
    pub fn create(folder: &PartialFolder, name: &str) -> Result<Self> {
        let path = folder.path.join(name);
        let file = Output::create_new(&path).map_err(|e| folder.failed("create a spool file", &e))?;
        Ok(Spool(BufWriter::with_capacity(1 << 20, file)))
    }

    pub fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.0.write_all(bytes)
    }

    /// Moves everything into `out` and starts again from nothing.
    pub fn drain(&mut self, out: &mut SummingWriter) -> std::io::Result<()> {
        self.0.flush()?;
        let file = self.0.get_mut();
        file.seek(SeekFrom::Start(0))?;
        let mut chunk = vec![0; 1 << 20];
        loop {
            match file.read(&mut chunk)? {
                0 => break,
                n => out.payload(&chunk[..n])?,
            }
        }
        file.seek(SeekFrom::Start(0))?;
        file.set_len(0)
    }
}

/// What a finished shard file is known by.
pub(super) struct Sums {
    pub bytes: u64,
    pub sha256: String,
    pub frame_crc32c: u32,
}

/// Writes a shard while summing it: SHA-256 of all, a CRC per payload block, one CRC for the rest.
pub(super) struct SummingWriter {
    file: BufWriter<Output>,
    sha: Sha256,
    bytes: u64,
    frame: u32,
    blocks: Vec<u32>,
    /// Bytes in the unfinished last block.
    fill: usize,
}

impl SummingWriter {
    pub fn create(path: &Path) -> std::io::Result<Self> {
        let file = BufWriter::with_capacity(1 << 20, Output::create_new(path)?);
        Ok(SummingWriter {
            file,
            sha: Sha256::new(),
            bytes: 0,
            frame: 0,
            blocks: Vec::new(),
            fill: BLOCK_BYTES,
        })
    }

    pub fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.sha.update(bytes);
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes)
    }

    pub fn frame(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.frame = crc32c::crc32c_append(self.frame, bytes);
        self.write(bytes)
    }

    pub fn payload(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            if self.fill == BLOCK_BYTES {
                self.blocks.push(0);
                self.fill = 0;
            }
            let (now, later) = rest.split_at(rest.len().min(BLOCK_BYTES - self.fill));
            let crc = self.blocks.last_mut().expect("a block was opened");
            *crc = crc32c::crc32c_append(*crc, now);
            self.fill += now.len();
            rest = later;
        }
        self.write(bytes)
    }

    pub fn finish(mut self) -> std::io::Result<(Output, Sums)> {
        let table = std::mem::take(&mut self.blocks);
        self.frame(bytemuck::cast_slice(&table))?;
        let sums = Sums { bytes: self.bytes, sha256: hex(&self.sha.finalize()), frame_crc32c: self.frame };
        let file = self.file.into_inner().map_err(|e| e.into_error())?;
        Ok((file, sums))
    }
}
