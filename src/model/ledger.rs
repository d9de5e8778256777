//! Buffers by name. Every buffer of a run is asked for here, so that what `plan` prints and what a run allocates come from
//! the same lines of code: the same constructors run over a real device, or over [`Paper`], which only counts.

use crate::device::{Device, Element, Len, Queue};
use crate::error::{Error, Result};
use std::ops::Range;

/// Hands out zeroed buffers and keeps the books.
pub struct Ledger<'d, B> {
    dev: &'d B,
    entries: Vec<Entry>,
}

/// How buffers over tokens get smaller.
const FEWER_TOKENS: &str = "train.recompute=true, or lower batch.tokens (below the longest cell also batch.max_tokens); `cellrefine plan` lists every buffer";

/// The setting that makes a buffer of this shape smaller, told from its letters.
fn remedy(shape: &str) -> &'static str {
    let over = |letter| shape.split(|c: char| !c.is_alphanumeric()).any(|word| word == letter);
    if over("N") || over("M") {
        FEWER_TOKENS
    } else if over("C") {
        "lower batch.cells; `cellrefine plan` lists every buffer"
    } else {
        "choose a smaller network (--preset, or model.layers and model.width); `cellrefine plan` lists every buffer"
    }
}

/// One buffer.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Entry {
    /// `layer.3.qkv`.
    pub name: String,
    /// Shape in the crate's letters: `(N, 3D)`.
    pub shape: &'static str,
    /// Size.
    pub bytes: u64,
}

impl<'d, B: Device> Ledger<'d, B> {
    /// An empty ledger over `dev`.
    pub fn new(dev: &'d B) -> Self {
        Ledger { dev, entries: Vec::new() }
    }
    /// The device.
    pub fn dev(&self) -> &'d B {
        self.dev
    }
    /// `len` zeros under a name.
    ///
    /// # Errors
    /// Out of memory (4): names the buffer, its shape, and the setting that makes it smaller.
    pub fn zeros<T: Element>(
        &mut self,
        name: impl Into<String>,
        shape: &'static str,
        len: usize,
    ) -> Result<B::Buf<T>> {
        let name = name.into();
        let buf = self.dev.zeros(len).map_err(|e| match e.is_out_of_memory() {
            true => e.at(format!("{name} {shape} on {}", self.dev.name())).next(remedy(shape)),
            false => e,
        })?;
        self.entries.push(Entry { name, shape, bytes: (buf.len() * size_of::<T>()) as u64 });
        Ok(buf)
    }
    /// What was handed out, in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }
    /// Sum of all entries.
    pub fn bytes(&self) -> u64 {
        self.entries.iter().map(|e| e.bytes).sum()
    }
}

/// A device that has no memory: buffers know their length alone. What `plan` runs the constructors on.
#[derive(Debug, Clone, Copy, Default)]
pub struct Paper;

/// A buffer that exists on paper.
pub struct PaperBuf<T> {
    len: usize,
    _type: std::marker::PhantomData<fn() -> T>,
}

impl<T> Len for PaperBuf<T> {
    fn len(&self) -> usize {
        self.len
    }
}

fn no_memory<T>() -> Result<T> {
    Err(Error::bug("a planned buffer has no memory"))
}

impl Device for Paper {
    type Buf<T: Element> = PaperBuf<T>;
    type Event = ();
    fn name(&self) -> String {
        "paper".into()
    }
    fn zeros<T: Element>(&self, len: usize) -> Result<PaperBuf<T>> {
        Ok(PaperBuf { len, _type: std::marker::PhantomData })
    }
    fn write<T: Element>(&self, _: &mut PaperBuf<T>, _: &[T]) -> Result<()> {
        no_memory()
    }
    fn event(&self, _: Queue) -> Result<()> {
        Ok(())
    }
    fn record(&self, _: &mut (), _: Queue) -> Result<()> {
        Ok(())
    }
    fn wait(&self, _: &(), _: Queue) -> Result<()> {
        Ok(())
    }
    fn write_beside<T: Element>(&self, _: &mut PaperBuf<T>, _: &[T]) -> Result<()> {
        no_memory()
    }
    fn read<T: Element>(&self, _: &PaperBuf<T>, _: &mut [T]) -> Result<()> {
        no_memory()
    }
    fn clear<T: Element>(&self, _: &mut PaperBuf<T>) -> Result<()> {
        no_memory()
    }
    fn copy<T: Element>(&self, _: &PaperBuf<T>, _: &mut PaperBuf<T>, _: usize) -> Result<()> {
        no_memory()
    }
    unsafe fn part<T: Element>(&self, _: &PaperBuf<T>, range: Range<usize>) -> PaperBuf<T> {
        PaperBuf { len: range.len(), _type: std::marker::PhantomData }
    }
}
