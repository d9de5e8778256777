//! Buffers between guard words. The op sees a part of a larger allocation ([`Device::part`]); a write outside the part is
//! found when the buffer is read back.

use cellrefine::device::{Device, Element};
use half::bf16;

/// Guard elements on either side; keeps the alignment of the part at 64 bytes.
const GUARD: usize = 64;

/// Elements with a value that stands for "nobody wrote here" and one for "nobody may write here".
pub trait Sample: Element {
    /// NaN, or a wild number: what outputs hold before the call.
    const POISON: Self;
    /// What stands in the guards.
    const WORD: Self;
}
impl Sample for f32 {
    const POISON: f32 = f32::NAN;
    const WORD: f32 = -7.625e11;
}
impl Sample for f64 {
    const POISON: f64 = f64::NAN;
    const WORD: f64 = -7.625e11;
}
impl Sample for bf16 {
    const POISON: bf16 = bf16::NAN;
    const WORD: bf16 = bf16::MIN;
}
impl Sample for u32 {
    const POISON: u32 = 0xDEAD_BEEF;
    const WORD: u32 = 0xA5A5_5A5A;
}
impl Sample for i32 {
    const POISON: i32 = -0x5EAD_BEEF;
    const WORD: i32 = 0x25A5_5A5A;
}
impl Sample for u8 {
    const POISON: u8 = 0xEE;
    const WORD: u8 = 0xA5;
}

/// A buffer of `len` elements with guard words round it.
pub struct Guarded<B: Device, T: Sample> {
    dev: B,
    whole: B::Buf<T>,
    part: B::Buf<T>,
    len: usize,
}

/// A guarded buffer with the content of `host`.
pub fn input<B: Device, T: Sample>(dev: &B, host: &[T]) -> Guarded<B, T> {
    let mut content = vec![T::WORD; GUARD];
    content.extend_from_slice(host);
    content.resize(host.len() + 2 * GUARD, T::WORD);
    let whole = dev.upload(&content).unwrap();
    // SAFETY: `whole` is read in `read` alone, when no op runs on `part`.
    let part = unsafe { dev.part(&whole, GUARD..GUARD + host.len()) };
    Guarded { dev: dev.clone(), whole, part, len: host.len() }
}

/// A guarded buffer full of poison, for an output that the op must set.
pub fn poisoned<B: Device, T: Sample>(dev: &B, len: usize) -> Guarded<B, T> {
    input(dev, &vec![T::POISON; len])
}

impl<B: Device, T: Sample> Guarded<B, T> {
    /// What the op reads.
    pub fn buf(&self) -> &B::Buf<T> {
        &self.part
    }
    /// What the op writes.
    pub fn buf_mut(&mut self) -> &mut B::Buf<T> {
        &mut self.part
    }
    /// The content; panics when a guard word has changed.
    pub fn read(&self) -> Vec<T> {
        let content = self.dev.download(&self.whole).unwrap();
        for (i, word) in content.iter().enumerate() {
            let inside = (GUARD..GUARD + self.len).contains(&i);
            assert!(
                inside || *word == T::WORD,
                "guard word {} of a buffer of {} was overwritten with {word:?}",
                i as isize - GUARD as isize,
                self.len
            );
        }
        content[GUARD..GUARD + self.len].to_vec()
    }
}
