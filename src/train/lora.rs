//! LoRA (Hu et al., 2021): each adapted matrix is the checkpoint's plus a product of two thin ones, and only those two learn.
//!
//! ```text
//! W = W₀ + s·B·A,   A (r, in),  B (out, r),  s = α/r          B = 0 at the start, A as PEFT draws its own in variance
//! dB = s · dW · Aᵀ,  dA = s · Bᵀ · dW
//! ```
//! The product is folded into the weights after every update, so the encoder knows nothing of adapters: forward and backward
//! cost what they cost without, embeddings and checkpoints are those of the merged network, and there is no second path to get
//! wrong. What is saved is the optimiser's memory; what is not is the weight gradient, which both thin gradients are made from.
//!
//! What is kept and trained is `B̂ = s·B`, at the rate s·lr, with ε/s and decay/s: under AdamW, which does not see a gradient's scale,
//! that is PEFT's update of B. (The global norm sees dW·Aᵀ, PEFT's sees s times that.)

mod layout;

pub use layout::{Adapter, AdapterLayout};

use super::optimizer::{Group, Moments, Span, update};
use crate::config::OptimizerSettings;
use crate::device::{Act, Device, Len};
use crate::error::Result;
use crate::model::Parameters;
use crate::model::ledger::Ledger;
use crate::model::snapshot::{Numbers, Snapshot};
use crate::model::store::initial;
use crate::model::tensors::{Declared, TensorFile};
use crate::model::weights::{Init, Parameter};
use crate::ops::linear::{self, Activation, BackwardInput, BackwardWeight, Dims, In};
use crate::ops::{Backend, adamw};
use std::path::Path;

/// Keeps first values apart from the encoder's and the classifier's under the same seed.
const LORA_SEED: u64 = 0x6c6f_7261_6164_6170;
/// What a resumed run reads: W₀ of the adapted matrices, and the adapters, exactly.
const STATE: &str = "adapters.safetensors";

/// The adapters on a device.
pub struct Adapters<B: Device> {
    layout: AdapterLayout,
    base: B::Buf<f32>,   // W₀ of the adapted matrices
    weight: B::Buf<f32>, // A, then B̂
    grad: B::Buf<f32>,   // of both
}

/// One adapter's numbers on the host, as PEFT counts them.
pub struct Factors<'a> {
    /// Which.
    pub adapter: &'a Adapter,
    /// A (r, in).
    pub a: Vec<f32>,
    /// B (out, r).
    pub b: Vec<f32>,
}

/// Handles to one adapter's parts of the flat stores.
struct Thin<B: Device> {
    a: B::Buf<f32>, // (r, in)
    b: B::Buf<f32>, // (out, r)
}

impl<B: Device> Adapters<B> {
    /// Zeros in this layout.
    pub fn planned(ledger: &mut Ledger<B>, layout: AdapterLayout) -> Result<Self> {
        Ok(Adapters {
            base: ledger.zeros("adapted weights of the checkpoint", "(parameters)", layout.base)?,
            weight: ledger.zeros("adapters", "(parameters)", layout.len())?,
            grad: ledger.zeros("gradients of the adapters", "(parameters)", layout.len())?,
            layout,
        })
    }
    /// Where what lies.
    pub fn layout(&self) -> &AdapterLayout {
        &self.layout
    }
    /// The flat gradient.
    pub fn grad(&self) -> &B::Buf<f32> {
        &self.grad
    }
    /// The same, to write.
    pub fn grad_mut(&mut self) -> &mut B::Buf<f32> {
        &mut self.grad
    }
    /// The adapter that element `place` of the flat gradient belongs to.
    pub fn name_of(&self, place: usize) -> Option<&str> {
        let holds = |m: &&Adapter| m.a.contains(&place) || m.b.contains(&place);
        self.layout.adapters.iter().find(holds).map(|m| m.module.as_str())
    }

    /// # Safety
    /// As [`Device::part`]: the handles end before `store` is lent again.
    unsafe fn thin(dev: &B, store: &B::Buf<f32>, m: &Adapter) -> Thin<B> {
        // SAFETY: the caller's.
        unsafe { Thin { a: dev.part(store, m.a.clone()), b: dev.part(store, m.b.clone()) } }
    }

    /// First values, for weights that were just loaded: W₀ is kept, A drawn, B = 0. Changes no weight.
    pub fn start<A: Act>(&mut self, dev: &B, params: &Parameters<B, A>, seed: u64) -> Result<()> {
        let rank = self.layout.rank;
        let mut first = vec![0.0f32; self.layout.len()];
        for (index, m) in self.layout.adapters.iter().enumerate() {
            dev.copy_part(params.master().flat(), m.weight.clone(), &mut self.base, m.base.start)?;
            // PEFT draws A from U(-1/√in, 1/√in); this is its variance.
            let deviation = (3.0 * m.inputs as f64).sqrt().recip();
            let thin = Parameter {
                name: m.module.clone(),
                shape: vec![rank, m.inputs],
                init: Init::Normal,
                decay: true,
                stored_as: Vec::new(),
            };
            first[m.a.clone()].copy_from_slice(&initial(&thin, deviation, seed ^ LORA_SEED, index as u32));
        }
        dev.write(&mut self.weight, &first)
    }

    /// Adds what a resumed run needs to a checkpoint.
    pub fn save(&self, dev: &B, checkpoint: &mut Snapshot) -> Result<()> {
        let tensor = |name: &str, values: &B::Buf<f32>| -> Result<(Declared, Numbers)> {
            Ok((Declared::f32(name, &[values.len()]), Numbers::all(dev.download(values)?)))
        };
        let tensors = vec![tensor("base", &self.base)?, tensor("weight", &self.weight)?];
        checkpoint.tensors(STATE, &[("format", "pt")], tensors)
    }

    /// Reads it back.
    pub fn restore(&mut self, dev: &B, folder: &Path) -> Result<()> {
        let file = TensorFile::open(&folder.join(STATE))?;
        let (base, weight) = (self.base.len(), self.weight.len());
        dev.write(&mut self.base, &file.floats("base", &[base])?)?;
        dev.write(&mut self.weight, &file.floats("weight", &[weight])?)
    }

    /// The adapters' numbers.
    pub fn host(&self, dev: &B) -> Result<Vec<Factors<'_>>> {
        let (weight, scale) = (dev.download(&self.weight)?, self.layout.scale());
        let factors = self.layout.adapters.iter().map(|adapter| Factors {
            adapter,
            a: weight[adapter.a.clone()].to_vec(),
            b: weight[adapter.b.clone()].iter().map(|x| (*x as f64 / scale) as f32).collect(),
        });
        Ok(factors.collect())
    }
}

impl<B: linear::Linear<f32>> Adapters<B> {
    /// Gradients of A and B̂ from those of the network's weights: `network` is its flat gradient.
    pub fn gradients(&mut self, dev: &B, network: &B::Buf<f32>) -> Result<()> {
        let _range = crate::trace::range("adapters");
        let rank = self.layout.rank;
        dev.clear(&mut self.grad)?;
        for m in &self.layout.adapters {
            // SAFETY: the parts end with this turn of the loop; those of `grad`, which is borrowed mutably, are disjoint.
            let (dw, thin, mut grad) = unsafe {
                let dw = dev.part(network, m.weight.clone());
                (dw, Self::thin(dev, &self.weight, m), Self::thin(dev, &self.grad, m))
            };
            let dims = Dims { rows: m.outputs, inputs: m.inputs, outputs: rank };
            let input = In { x: &dw, weight: &thin.a, bias: None, activation: Activation::None };
            linear::forward(dev, dims, input, &mut grad.b)?;
            let factors = BackwardWeight { x: &dw, dy: &thin.b };
            linear::backward_weight(dev, dims, factors, &mut grad.a, None)?;
        }
        Ok(())
    }

    /// `W = W₀ + B̂·A` in the network's weights, and in their copy of the activation type.
    pub fn fold<A: Act>(&self, dev: &B, params: &mut Parameters<B, A>) -> Result<()>
    where
        B: adamw::AdamW<A>,
    {
        let _range = crate::trace::range("adapters");
        params.write_with(dev, |dev, master, _| {
            for m in &self.layout.adapters {
                dev.copy_part(&self.base, m.base.clone(), master.flat_mut(), m.weight.start)?;
                // SAFETY: the parts end with this turn of the loop; `master` is borrowed mutably.
                let (thin, mut w) =
                    unsafe { (Self::thin(dev, &self.weight, m), dev.part(master.flat(), m.weight.clone())) };
                let dims = Dims { rows: m.outputs, inputs: m.inputs, outputs: self.layout.rank };
                let factors =
                    BackwardInput { dy: &thin.b, weight: &thin.a, relu_output: None, accumulate: true };
                linear::backward_input(dev, dims, factors, &mut w)?;
            }
            Ok(())
        })
    }
}

impl<B: Device> Adapters<B> {
    /// One AdamW update of the adapters (arguments as of [`update`]); the weights follow with [`Adapters::fold`].
    pub fn update<A: Act>(
        &mut self,
        dev: &B,
        optimizer: &OptimizerSettings,
        learning_rate: f64,
        (t, accumulated): (u32, usize),
        moments: &mut Moments<B>,
        scalars: &B::Buf<f64>,
    ) -> Result<()>
    where
        B: Backend<A>,
    {
        let scale = self.layout.scale();
        for (range, scale) in [(self.layout.a.clone(), 1.0), (self.layout.b.clone(), scale)] {
            let optimizer = OptimizerSettings {
                weight_decay: optimizer.weight_decay / scale,
                eps: optimizer.eps / scale,
                ..optimizer.clone()
            };
            let group: Group<'_, B, A> = Group {
                weight: &mut self.weight,
                copy: None,
                grad: &self.grad,
                moments: &mut *moments,
                spans: &[Span { range, decay: true }],
                learning_rate: learning_rate * scale,
            };
            update::<A, B>(dev, &optimizer, t, accumulated, group, scalars)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{LoraSettings, LoraTargets};
    use crate::cpu::Cpu;
    use crate::model::Layout;
    use crate::model::config::{PRESETS, Vocabulary};
    use half::bf16;

    const SETTINGS: LoraSettings = LoraSettings { rank: 3, alpha: 6.0, targets: LoraTargets::All };

    fn started<A: Act>(learns: impl Fn(&Parameter) -> bool) -> (Parameters<Cpu, A>, Adapters<Cpu>)
    where
        Cpu: Backend<A>,
    {
        let mut config = PRESETS[0].config(60, Vocabulary::default());
        (config.width, config.ffn) = (24, 40);
        let params = Parameters::<Cpu, A>::random(&Cpu, &config, 5).unwrap();
        let layout = AdapterLayout::of(params.layout(), &SETTINGS, learns).unwrap();
        let mut adapters = Adapters::planned(&mut Ledger::new(&Cpu), layout).unwrap();
        adapters.start(&Cpu, &params, 9).unwrap();
        (params, adapters)
    }

    /// B as if it had learned.
    fn learn(adapters: &mut Adapters<Cpu>) {
        let b = adapters.layout.b.clone();
        for (i, x) in adapters.weight[b].iter_mut().enumerate() {
            *x = ((i * 37 % 101) as f32 - 50.0) / 400.0;
        }
    }

    /// W₀ + s·B·A in f64, from what PEFT is given.
    fn merged(adapters: &Adapters<Cpu>, base: &[f32]) -> Vec<f64> {
        let mut w: Vec<f64> = base.iter().map(|x| *x as f64).collect();
        let rank = adapters.layout.rank;
        for Factors { adapter: m, a, b } in adapters.host(&Cpu).unwrap() {
            for (i, w) in w[m.weight.clone()].iter_mut().enumerate() {
                let (row, column) = (i / m.inputs, i % m.inputs);
                let ba = (0..rank).map(|k| b[row * rank + k] as f64 * a[k * m.inputs + column] as f64);
                *w += adapters.layout.scale() * ba.sum::<f64>();
            }
        }
        w
    }

    #[test]
    fn twelve_projections_are_adapted_and_their_parts_are_disjoint() {
        let (params, adapters) = started::<f32>(|_| true);
        let layout = adapters.layout();
        assert_eq!(layout.adapters.len(), 12);
        assert_eq!(layout.adapters[0].module, "bert.encoder.layer.0.attention.self.query");
        assert_eq!(layout.adapters[11].module, "bert.encoder.layer.1.output.dense");
        assert_eq!(layout.parameters(), 2 * 3 * (4 * 48 + 2 * 64));
        let mut parts: Vec<_> = layout.adapters.iter().flat_map(|m| [m.a.clone(), m.b.clone()]).collect();
        parts.sort_by_key(|r| r.start);
        assert!(parts.windows(2).all(|w| w[0].end <= w[1].start));
        assert!(layout.adapters.iter().all(|m| m.a.end <= layout.b.start && m.b.end <= layout.len()));
        assert_eq!(adapters.name_of(layout.adapters[4].b.start), Some(layout.adapters[4].module.as_str()));
        // Key is the second third of the stacked matrix.
        let (_, qkv) =
            params.layout().list().into_iter().find(|(p, _)| p.name == "layer.0.qkv_weight").unwrap();
        assert_eq!(layout.adapters[1].weight, qkv.start + 576..qkv.start + 1152);
        let (_, frozen) = started::<f32>(|p| !p.name.starts_with("layer.0."));
        assert!(frozen.layout.adapters.iter().all(|m| m.module.starts_with("bert.encoder.layer.1.")));
    }

    #[test]
    fn nothing_changes_at_the_start_and_a_fold_is_the_sum() {
        let (mut params, mut adapters) = started::<f32>(|_| true);
        let first = params.master().flat().to_vec();
        adapters.fold(&Cpu, &mut params).unwrap();
        assert_eq!(params.master().flat()[..], first[..], "B = 0");
        learn(&mut adapters);
        for _ in 0..2 {
            // A second fold does not add a second time.
            adapters.fold(&Cpu, &mut params).unwrap();
            let wanted = merged(&adapters, &first);
            for (i, (w, x)) in wanted.iter().zip(params.master().flat().iter()).enumerate() {
                assert!((w - *x as f64).abs() < 1e-6, "{i}: {w} {x}");
            }
        }
        assert_ne!(params.master().flat()[..], first[..]);
    }

    #[test]
    fn the_copy_of_the_activation_type_follows() {
        let (mut params, mut adapters) = started::<bf16>(|_| true);
        learn(&mut adapters);
        adapters.fold(&Cpu, &mut params).unwrap();
        let master = params.master().named().layers[1].up_weight.to_vec();
        let copy = &params.network().layers[1].up_weight;
        assert!(master.iter().zip(copy.iter()).all(|(w, c)| bf16::from_f32(*w) == *c));
    }

    /// L = Σ dW ∘ W(A, B̂): its derivatives by central differences are what `gradients` says.
    #[test]
    fn gradients_are_those_of_finite_differences() {
        let (params, mut adapters) = started::<f32>(|_| true);
        learn(&mut adapters);
        let base = params.master().flat().to_vec();
        let dw: Vec<f32> = (0..base.len()).map(|i| ((i * 13 % 29) as f32 - 14.0) / 10.0).collect();
        let mut network = Cpu.zeros::<f32>(dw.len()).unwrap();
        Cpu.write(&mut network, &dw).unwrap();
        adapters.gradients(&Cpu, &network).unwrap();
        let loss = |adapters: &Adapters<Cpu>| -> f64 {
            let w = merged(adapters, &base);
            adapters.layout.adapters.iter().flat_map(|m| m.weight.clone()).map(|i| w[i] * dw[i] as f64).sum()
        };
        let places: Vec<usize> = adapters
            .layout
            .adapters
            .iter()
            .flat_map(|m| [m.a.start, m.a.end - 1, m.b.start, m.b.start + 4, m.b.end - 1])
            .collect();
        for place in places {
            let kept = adapters.weight[place];
            let mut at = |x: f32| {
                adapters.weight[place] = x;
                loss(&adapters)
            };
            let slope = (at(kept + 0.25) - at(kept - 0.25)) / 0.5;
            adapters.weight[place] = kept;
            let found = adapters.grad[place] as f64;
            assert!((slope - found).abs() < 1e-4 * slope.abs().max(1.0), "{place}: {slope} {found}");
        }
    }

    #[test]
    fn a_rank_beyond_the_matrices_and_nothing_to_adapt_are_refused() {
        let config = PRESETS[0].config(60, Vocabulary::default());
        let layout = Layout::network(&config);
        let wide = LoraSettings { rank: 129, ..SETTINGS };
        let e = AdapterLayout::of(&layout, &wide, |_| true).unwrap_err();
        assert!(e.kind().exit_code() == 2 && e.to_string().contains("at most 128"), "{e}");
        let e = AdapterLayout::of(&layout, &SETTINGS, |_| false).unwrap_err();
        assert_eq!(e.kind().exit_code(), 2);
    }
}
