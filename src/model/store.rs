//! One memory, two views: parameters, gradients and moments are each one flat buffer with named parts laid over it.
//!
//! The optimiser, the gradient norm and checkpoints act on the flat view, the network on the named one; a [`Store`] lends
//! either, never both mutably. Tensors that decay come first, so that AdamW is two calls over two ranges. Parts start at
//! multiples of 64 bytes in either type; the gaps hold zeros and stay zero under AdamW.
//!
//! [`Parameters`] adds the activation type: f32 master weights beside a bf16 copy, or, for f32, one memory that serves as
//! both.

use super::config::ModelConfig;
use super::ledger::Ledger;
use super::weights::{Classification, Classifier, Init, Network, Parameter, Parts, Weights};
use crate::device::{Act, Device, Element};
use crate::error::{Error, Result};
use crate::rng::{site, stream_block};
use rayon::prelude::*;
use std::any::Any;
use std::ops::Range;

/// Parts start at multiples of so many elements: 64 bytes in bf16, 128 in f32.
const ALIGN: usize = 32;

/// Where each part lies in the flat buffer.
pub struct Layout<P: Parts = Network> {
    parts: P::Of<(Parameter, Range<usize>)>,
    len: usize,
    decayed: usize,
}

impl Layout<Network> {
    /// The layout of a network.
    pub fn network(config: &ModelConfig) -> Self {
        Layout::over(Weights::of(config))
    }
}

impl Layout<Classification> {
    /// The layout of a classifier.
    pub fn classifier(classes: usize, width: usize) -> Self {
        Layout::over(Classifier::of(classes, width))
    }
}

impl<P: Parts> Layout<P> {
    /// Lays the parameters out: those that decay first, each group in the order of the list.
    pub fn over(list: P::Of<Parameter>) -> Self {
        let mut place = [0usize; 2];
        let mut rounded = |p: &Parameter| {
            let start = place[usize::from(!p.decay)];
            place[usize::from(!p.decay)] = start + p.len().next_multiple_of(ALIGN);
            start..start + p.len()
        };
        let parts = P::map(list, &mut |p| {
            let range = rounded(&p);
            (p, range)
        });
        let [decayed, undecayed] = place;
        let parts = P::map(parts, &mut |(p, r): (Parameter, Range<usize>)| {
            let shift = if p.decay { 0 } else { decayed };
            (p, r.start + shift..r.end + shift)
        });
        Layout { parts, len: decayed + undecayed, decayed }
    }
    /// Elements of the flat buffer, gaps included.
    pub fn len(&self) -> usize {
        self.len
    }
    /// No parts at all?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Elements on which weight decay acts.
    pub fn decayed(&self) -> Range<usize> {
        0..self.decayed
    }
    /// Elements on which it does not.
    pub fn undecayed(&self) -> Range<usize> {
        self.decayed..self.len
    }
    /// Each parameter with its place, in the order of the list.
    pub fn list(&self) -> Vec<&(Parameter, Range<usize>)> {
        P::list(P::as_ref(&self.parts))
    }
    /// Number of parameters, gaps not counted.
    pub fn parameters(&self) -> usize {
        self.list().iter().map(|(p, _)| p.len()).sum()
    }
}

/// A flat buffer and named parts of it.
pub struct Store<B: Device, T: Element, P: Parts = Network> {
    flat: B::Buf<T>,
    named: P::Of<B::Buf<T>>,
}

impl<B: Device, T: Element, P: Parts> Store<B, T, P> {
    /// Zeros in this layout.
    pub fn zeros(dev: &B, layout: &Layout<P>) -> Result<Self> {
        Ok(Self::over(dev, dev.zeros(layout.len)?, layout))
    }
    /// Zeros in this layout, under a name in the ledger.
    pub fn planned(ledger: &mut Ledger<B>, name: &str, layout: &Layout<P>) -> Result<Self> {
        let flat = ledger.zeros(name, "(parameters)", layout.len)?;
        Ok(Self::over(ledger.dev(), flat, layout))
    }
    /// Named parts over `flat`.
    fn over(dev: &B, flat: B::Buf<T>, layout: &Layout<P>) -> Self {
        let named = P::map(P::as_ref(&layout.parts), &mut |(_, range)| {
            // SAFETY: the ranges of a layout are disjoint, and `flat` and `named` are private: they are lent by `&self`, or
            // one of them by `&mut self`, so no handle is used while an overlapping one is borrowed mutably.
            unsafe { dev.part(&flat, range.clone()) }
        });
        Store { flat, named }
    }
    /// Everything as one array.
    pub fn flat(&self) -> &B::Buf<T> {
        &self.flat
    }
    /// Everything as one array, to write.
    pub fn flat_mut(&mut self) -> &mut B::Buf<T> {
        &mut self.flat
    }
    /// The named parts.
    pub fn named(&self) -> &P::Of<B::Buf<T>> {
        &self.named
    }
    /// The named parts, to write.
    pub fn named_mut(&mut self) -> &mut P::Of<B::Buf<T>> {
        &mut self.named
    }
}

impl<B: Device, P: Parts> Store<B, f32, P> {
    /// Random initial values: a function of the seed and of each tensor's place in the list alone.
    pub fn randomize(&mut self, dev: &B, layout: &Layout<P>, deviation: f64, seed: u64) -> Result<()> {
        let parts = P::list(P::as_mut(&mut self.named));
        for (index, ((parameter, _), part)) in layout.list().into_iter().zip(parts).enumerate() {
            dev.write(part, &initial(parameter, deviation, seed, index as u32))?;
        }
        Ok(())
    }
}

/// Initial values of tensor number `index`.
pub fn initial(parameter: &Parameter, deviation: f64, seed: u64, index: u32) -> Vec<f32> {
    let normal = |zero_row: Option<usize>| {
        let mut values = vec![0.0f32; parameter.len()];
        values.par_chunks_mut(1 << 14).enumerate().for_each(|(chunk, values)| {
            for (i, pair) in values.chunks_mut(2).enumerate() {
                let [a, b, c, d] = stream_block(seed, index, site::INIT, (chunk << 13 | i) as u64);
                // Box–Muller on 53-bit uniforms, both of the pair.
                let unit =
                    |hi: u32, lo: u32| ((hi as u64) << 21 | (lo >> 11) as u64) as f64 / (1u64 << 53) as f64;
                let radius = deviation * (-2.0 * (1.0 - unit(a, b)).ln()).sqrt();
                let (sin, cos) = (std::f64::consts::TAU * unit(c, d)).sin_cos();
                for (x, trig) in pair.iter_mut().zip([cos, sin]) {
                    *x = (radius * trig) as f32;
                }
            }
        });
        if let Some(row) = zero_row {
            let width = parameter.shape[1];
            values[row * width..(row + 1) * width].fill(0.0);
        }
        values
    };
    match parameter.init {
        Init::Normal => normal(None),
        Init::NormalButRow(row) => normal(Some(row).filter(|r| *r < parameter.shape[0])),
        Init::Zero => vec![0.0; parameter.len()],
        Init::One => vec![1.0; parameter.len()],
    }
}

/// Master weights in f32 and, where the activation type is another, a copy in it.
///
/// For `A = f32` the copy is a second set of handles on the master's own memory; the borrows of this struct's methods keep
/// them apart: reads are shared, and [`Parameters::update`] alone writes.
pub struct Parameters<B: Device, A: Act> {
    layout: Layout,
    master: Store<B, f32>,
    copy: Store<B, A>,
}

/// What AdamW writes: the whole flat arrays.
pub struct Update<'a, B: Device, A: Act> {
    /// Master weights.
    pub weight: &'a mut B::Buf<f32>,
    /// Activation-type copy; `None` when the master serves as it.
    pub copy: Option<&'a mut B::Buf<A>>,
    /// The layout: its ranges `decayed` and `undecayed` are the two calls.
    pub layout: &'a Layout,
}

impl<B: Device, A: Act> Parameters<B, A> {
    /// All zero, for loading into.
    pub fn zeros(dev: &B, config: &ModelConfig) -> Result<Self> {
        Self::planned(&mut Ledger::new(dev), config)
    }
    /// All zero, booked in `ledger`.
    pub fn planned(ledger: &mut Ledger<B>, config: &ModelConfig) -> Result<Self> {
        let layout = Layout::network(config);
        let master = Store::planned(ledger, "weights (master, f32)", &layout)?;
        let copy = if A::IS_F32 {
            // SAFETY: `master` and `copy` are private to this struct. Shared borrows of it lend both for reading; the one
            // method that lends for writing takes `&mut self` and lends `master` alone.
            let alias = unsafe { ledger.dev().part(&master.flat, 0..layout.len) };
            Store::over(ledger.dev(), same_type(alias)?, &layout)
        } else {
            Store::planned(ledger, "weights (activation type)", &layout)?
        };
        Ok(Parameters { layout, master, copy })
    }

    /// The layout that gradients and moments share.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }
    /// What the network reads.
    pub fn network(&self) -> &Weights<B::Buf<A>> {
        &self.copy.named
    }
    /// The f32 weights.
    pub fn master(&self) -> &Store<B, f32> {
        &self.master
    }
    /// What the optimiser writes. Whoever writes `weight` writes `copy` in the same pass.
    pub fn update(&mut self) -> Update<'_, B, A> {
        let copy = (!A::IS_F32).then_some(&mut self.copy.flat);
        Update { weight: &mut self.master.flat, copy, layout: &self.layout }
    }
}

impl<B: crate::ops::adamw::AdamW<A>, A: Act> Parameters<B, A> {
    /// Random initial weights.
    pub fn random(dev: &B, config: &ModelConfig, seed: u64) -> Result<Self> {
        let mut p = Self::zeros(dev, config)?;
        p.write_with(dev, |dev, master, layout| {
            master.randomize(dev, layout, config.initializer_range, seed)
        })?;
        Ok(p)
    }
    /// Writes the master weights through `write`, then refreshes the copy.
    pub fn write_with(
        &mut self,
        dev: &B,
        write: impl FnOnce(&B, &mut Store<B, f32>, &Layout) -> Result<()>,
    ) -> Result<()> {
        write(dev, &mut self.master, &self.layout)?;
        if A::IS_F32 { Ok(()) } else { dev.round(&self.master.flat, &mut self.copy.flat) }
    }
}

/// `x` as a `Y`, which is the same type whenever `A = f32`.
fn same_type<X: 'static, Y: 'static>(x: X) -> Result<Y> {
    let mut x = Some(x);
    (&mut x as &mut dyn Any)
        .downcast_mut::<Option<Y>>()
        .and_then(Option::take)
        .ok_or_else(|| Error::bug("an activation type calls itself f32 and is not"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Cpu;
    use crate::model::config::{PRESETS, Vocabulary};
    use half::bf16;

    fn config() -> ModelConfig {
        PRESETS[0].config(101, Vocabulary::default())
    }

    #[test]
    fn layout_is_disjoint_aligned_and_decayed_first() {
        let layout = Layout::network(&config());
        let mut places: Vec<(bool, Range<usize>)> =
            layout.list().iter().map(|(p, r)| (p.decay, r.clone())).collect();
        places.sort_by_key(|(_, r)| r.start);
        assert!(places.windows(2).all(|w| w[0].1.end <= w[1].1.start && (w[0].0 || !w[1].0)));
        assert!(
            places
                .iter()
                .all(|(decay, r)| r.start % ALIGN == 0 && (r.start < layout.decayed().end) == *decay)
        );
        assert_eq!(places.last().unwrap().1.end.next_multiple_of(ALIGN), layout.len());
    }

    #[test]
    fn both_views_are_one_memory() {
        let layout = Layout::network(&config());
        let mut s = Store::<Cpu, f32>::zeros(&Cpu, &layout).unwrap();
        s.named_mut().layers[1].up_bias[3] = 7.0;
        let place = layout.list().iter().find(|(p, _)| p.name == "layer.1.up_bias").unwrap().1.start;
        assert_eq!(s.flat()[place + 3], 7.0);
        s.flat_mut()[place + 4] = 8.0;
        assert_eq!(s.named().layers[1].up_bias[4], 8.0);
    }

    #[test]
    fn for_f32_the_network_reads_the_master_itself() {
        let mut p = Parameters::<Cpu, f32>::zeros(&Cpu, &config()).unwrap();
        assert!(p.update().copy.is_none());
        p.update().weight[0] = 3.0;
        assert_eq!(p.network().embeddings.word[0], 3.0);
        let mut p = Parameters::<Cpu, bf16>::zeros(&Cpu, &config()).unwrap();
        assert!(p.update().copy.is_some());
        p.update().weight[0] = 3.0;
        assert_eq!(p.network().embeddings.word[0], bf16::ZERO);
    }

    #[test]
    fn initial_values_have_the_right_moments_and_do_not_repeat() {
        let layout = Layout::network(&config());
        let mut s = Store::<Cpu, f32>::zeros(&Cpu, &layout).unwrap();
        s.randomize(&Cpu, &layout, 0.02, 5).unwrap();
        let w = &s.named().layers[0].qkv_weight;
        let mean = w.iter().map(|x| *x as f64).sum::<f64>() / w.len() as f64;
        let variance = w.iter().map(|x| (*x as f64).powi(2)).sum::<f64>() / w.len() as f64;
        assert!(mean.abs() < 3e-4 && (variance.sqrt() / 0.02 - 1.0).abs() < 0.01, "{mean} {variance}");
        assert_ne!(w[..8], s.named().layers[1].qkv_weight[..8]);
        assert_ne!(w[..8], w[1 << 14..(1 << 14) + 8]);
        assert!(s.named().embeddings.word[..128].iter().all(|x| *x == 0.0));
        assert!(s.named().layers[0].norm1_weight.iter().all(|x| *x == 1.0));
    }
}
