//! TensorBoard event files, written by hand: scalars need two protocol buffers and a framing.
//!
//! ```text
//! record  = length u64 | masked crc32c(length) u32 | payload | masked crc32c(payload) u32          little-endian
//! masked  = (crc >> 15 | crc << 17) + 0xa282ead8
//! Event   = 1: wall_time f64, 2: step i64, 3: file_version string, 5: Summary, 7: SessionLog
//! Summary = repeated 1: Value { 1: tag string, 2: simple_value f32 };   SessionLog = 1: status (1 = START)
//! ```
//! A resumed run opens a new file whose session START at step N makes TensorBoard drop what an earlier file holds beyond N.

use crate::disk::Output;
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// An open event file.
#[derive(Debug)]
pub struct EventFile {
    file: Output,
    path: PathBuf,
}

/// Wire types of protocol buffers.
const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const BYTES: u8 = 2;
const FIXED32: u8 = 5;
/// `SessionLog.status = START`.
const SESSION_START: u64 = 1;

impl EventFile {
    /// A new event file in `folder`; `resumed_step` is the step that a resumed run continues from, 0 for a fresh one.
    pub fn create(folder: &Path, resumed_step: u64) -> Result<EventFile> {
        let now = wall_time();
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host = if host.trim().is_empty() { "localhost" } else { host.trim() };
        let name = format!("events.out.tfevents.{}.{host}.{}.{resumed_step}", now as u64, std::process::id());
        let path = folder.join(name);
        let file = Output::append(&path).map_err(|e| Error::io(&path, "create the event file", &e))?;
        let mut events = EventFile { file, path };
        events.append(&version(now))?;
        if resumed_step > 0 {
            events.append(&session_start(now, resumed_step))?;
        }
        Ok(events)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes `scalars` (tag, value) of one step.
    pub fn scalars<'a>(
        &mut self,
        step: u64,
        scalars: impl IntoIterator<Item = (&'a str, f64)>,
    ) -> Result<()> {
        let record = summary(wall_time(), step, scalars);
        self.append(&record)
    }

    fn append(&mut self, payload: &[u8]) -> Result<()> {
        self.file
            .append_whole(&framed(payload))
            .map_err(|e| Error::io(&self.path, "write the event file", &e))
    }
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// An `Event` with its time and, for all but the version record, its step.
fn event(wall_time: f64, step: Option<u64>) -> Vec<u8> {
    let mut out = Vec::new();
    key(&mut out, 1, FIXED64);
    out.extend_from_slice(&wall_time.to_le_bytes());
    if let Some(step) = step {
        key(&mut out, 2, VARINT);
        varint(&mut out, step);
    }
    out
}

/// The first record of a file.
fn version(wall_time: f64) -> Vec<u8> {
    let mut record = event(wall_time, None);
    bytes_field(&mut record, 3, b"brain.Event:2");
    record
}

/// What makes TensorBoard forget the steps of an earlier file from `step` on.
fn session_start(wall_time: f64, step: u64) -> Vec<u8> {
    let mut session = Vec::new();
    key(&mut session, 1, VARINT);
    varint(&mut session, SESSION_START);
    let mut record = event(wall_time, Some(step));
    bytes_field(&mut record, 7, &session);
    record
}

/// The scalars (tag, value) of one step.
fn summary<'a>(wall_time: f64, step: u64, scalars: impl IntoIterator<Item = (&'a str, f64)>) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, number) in scalars {
        let mut value = Vec::new();
        bytes_field(&mut value, 1, tag.as_bytes());
        key(&mut value, 2, FIXED32);
        value.extend_from_slice(&(number as f32).to_le_bytes());
        bytes_field(&mut summary, 1, &value);
    }
    let mut record = event(wall_time, Some(step));
    bytes_field(&mut record, 5, &summary);
    record
}

fn framed(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(payload.len() + 16);
    record.extend_from_slice(&length);
    record.extend_from_slice(&masked_crc(&length).to_le_bytes());
    record.extend_from_slice(payload);
    record.extend_from_slice(&masked_crc(payload).to_le_bytes());
    record
}

/// CRC-32C, rotated and shifted so that a checksum of data that hold a checksum stays a checksum.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn key(out: &mut Vec<u8>, field: u8, wire: u8) {
    out.push(field << 3 | wire);
}

fn varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn bytes_field(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    key(out, field, BYTES);
    varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// scripts/golden/check_tensorboard.py wrote the file with TensorBoard's protocol buffers and record writer, and read it with
    /// TensorBoard's event reader into the .json beside it.
    #[test]
    fn our_bytes_are_those_of_the_reference_writer() {
        let mut ours = framed(&version(1_795_360_778.0));
        ours.extend(framed(&session_start(1_795_360_778.0, 300)));
        type Step = (u64, f64, &'static [(&'static str, f64)]);
        let steps: [Step; 3] = [
            (301, 1_795_360_779.25, &[("loss", 0.25), ("learning_rate", 1e-3)]),
            (302, 1_795_360_780.5, &[("loss", -3.5e8), ("grad_norm", 1e-30), ("β", 0.1)]),
            (5_000_000_000, 1_795_360_781.0, &[("loss", f64::INFINITY)]),
        ];
        for (step, time, scalars) in steps {
            ours.extend(framed(&summary(time, step, scalars.iter().copied())));
        }
        assert_eq!(ours, include_bytes!("../../tests/golden/tensorboard.bin"));
        // The reader's values: what was given, in f32.
        let read: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/golden/tensorboard.json")).unwrap();
        for (step, time, scalars) in steps {
            for (tag, value) in scalars.iter().filter(|s| s.1.is_finite()) {
                let point = read[*tag].as_array().unwrap().iter().find(|p| p[0] == step).unwrap();
                assert_eq!(
                    (point[1].as_f64(), point[2].as_f64().map(|v| v as f32)),
                    (Some(time), Some(*value as f32))
                );
            }
        }
    }

    #[test]
    fn every_record_frames_and_checks() {
        let dir = tempfile::tempdir().unwrap();
        let mut events = EventFile::create(dir.path(), 300).unwrap();
        events.scalars(301, [("loss", 0.25), ("learning_rate", 1e-3)]).unwrap();
        let bytes = std::fs::read(&events.path).unwrap();
        let (mut at, mut records) = (0, 0);
        while at < bytes.len() {
            let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            let payload = &bytes[at + 12..at + 12 + length];
            assert_eq!(framed(payload), bytes[at..at + 16 + length]);
            at += 16 + length;
            records += 1;
        }
        assert_eq!(records, 3);
    }
}
