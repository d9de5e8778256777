//! A small network with everything a training step needs, for the tests of the whole model.

use cellrefine::cpu::Cpu;
use cellrefine::device::{Act, Device};
use cellrefine::model::config::Vocabulary;
use cellrefine::model::heads::{MaskedGenes, Masking};
use cellrefine::model::ledger::Ledger;
use cellrefine::model::{
    Activations, Capacity, DeviceBatch, Encoder, ModelConfig, Parameters, Pass, Preset, Store,
};
use cellrefine::ops::Backend;
use cellrefine::rng::Philox;
use half::f16;

/// Cells on the host.
#[derive(Clone)]
pub struct Cells {
    pub gene: Vec<u32>,
    pub value: Vec<f16>,
    pub cell_start: Vec<u32>,
}

impl Cells {
    /// Random cells of these lengths; the first token is `<cls>`, the last `<eos>`.
    pub fn random(config: &ModelConfig, lengths: &[usize], seed: u64) -> Cells {
        let mut random = Philox::new(seed, 0, 99);
        let mut cells = Cells { gene: vec![], value: vec![], cell_start: vec![0] };
        let first = config.vocabulary.first_gene as u64;
        for &len in lengths {
            for t in 0..len {
                let gene = first + random.below(config.vocab as u64 - first);
                let special = if t == 0 {
                    config.vocabulary.cls
                } else {
                    config.vocabulary.eos.filter(|_| t + 1 == len)
                };
                cells.gene.push(special.unwrap_or(gene as u32));
                let value = if special.is_some() { 0.0 } else { 9.2 * random.uniform() as f32 };
                cells.value.push(f16::from_f32(value));
            }
            cells.cell_start.push(cells.gene.len() as u32);
        }
        cells
    }
    /// Cells `range` alone.
    pub fn part(&self, range: std::ops::Range<usize>) -> Cells {
        let tokens = self.cell_start[range.start] as usize..self.cell_start[range.end] as usize;
        Cells {
            gene: self.gene[tokens.clone()].to_vec(),
            value: self.value[tokens.clone()].to_vec(),
            cell_start: self.cell_start[range.start..=range.end]
                .iter()
                .map(|s| s - tokens.start as u32)
                .collect(),
        }
    }
    pub fn tokens(&self) -> usize {
        self.gene.len()
    }
    pub fn len(&self) -> usize {
        self.cell_start.len() - 1
    }
}

/// Two layers, 64 wide, two heads, 40 genes and four special tokens, dropout 0.1.
pub fn small_config() -> ModelConfig {
    let vocabulary = Vocabulary { digest: None, mask: 1, cls: Some(2), eos: Some(3), first_gene: 4 };
    let mut c = Preset::named("tiny").unwrap().config(44, vocabulary);
    (c.width, c.ffn, c.positions, c.initializer_range) = (64, 96, 24, 0.15);
    (c.hidden_dropout, c.attention_dropout) = (0.1, 0.1);
    c
}

/// Everything of a training step.
pub struct Rig<A: Act>
where
    Cpu: Backend<A>,
{
    pub encoder: Encoder<Cpu>,
    pub params: Parameters<Cpu, A>,
    pub grads: Store<Cpu, f32>,
    pub acts: Activations<Cpu, A>,
    pub head: MaskedGenes<Cpu, A>,
    pub batch: DeviceBatch<Cpu>,
}

pub const MASKING: Masking =
    Masking { probability: 0.3, mask_share: 0.8, random_share: 0.1, seed: 3, step: 11 };

impl<A: Act> Rig<A>
where
    Cpu: Backend<A>,
{
    pub fn new(config: &ModelConfig, params: Parameters<Cpu, A>, capacity: Capacity) -> Self {
        let mut ledger = Ledger::new(&Cpu);
        Rig {
            grads: Store::planned(&mut ledger, "gradients", params.layout()).unwrap(),
            acts: Activations::training(&mut ledger, config, capacity, false).unwrap(),
            head: MaskedGenes::planned(&mut ledger, config, capacity, MASKING).unwrap(),
            batch: DeviceBatch::planned(&mut ledger, config, capacity).unwrap(),
            encoder: Encoder::new(Cpu, config.clone()),
            params,
        }
    }
    pub fn random(config: &ModelConfig, capacity: Capacity) -> Self {
        Self::new(config, Parameters::random(&Cpu, config, 1).unwrap(), capacity)
    }
    pub fn upload(&mut self, cells: &Cells) {
        let config = &self.encoder.config;
        let value = Some(&cells.value[..]);
        self.batch.upload_cells(&Cpu, config, &cells.gene, &cells.cell_start, value).unwrap();
    }
    /// Hidden state `depth` (N, D) after a clean forward pass.
    pub fn hidden(&mut self, pass: Pass, depth: usize) -> Vec<A> {
        let input = self.batch.input();
        self.encoder.forward(self.params.network(), input, &mut self.acts, pass, depth).unwrap();
        let len = self.batch.tokens * self.encoder.config.width;
        Cpu.download(self.acts.hidden(depth)).unwrap()[..len].to_vec()
    }
    /// Masked-gene loss Σ_m of the uploaded cells, masked already; gradients are added where `backward`.
    pub fn masked_loss(&mut self, pass: Pass, gradient_scale: f32, backward: bool) -> f64 {
        let Rig { encoder, params, grads, acts, head, batch } = self;
        let config = &encoder.config;
        encoder.forward(params.network(), head.input(batch), acts, pass, config.layers).unwrap();
        head.forward(&Cpu, config, params, batch, acts, gradient_scale).unwrap();
        if backward {
            head.backward(&Cpu, config, params, batch, acts, gradient_scale, grads.named_mut()).unwrap();
            let input = head.input(batch);
            encoder.backward(params.network(), input, acts, pass, config.layers, grads.named_mut()).unwrap();
        }
        head.loss()[..head.masked()].iter().map(|x| *x as f64).sum()
    }
    /// Masks the uploaded cells.
    pub fn mask(&mut self) -> usize {
        let Rig { encoder, batch, head, .. } = self;
        let masked = MASKING.count(&encoder.config, &batch.gene[..batch.tokens], batch.first_row);
        head.mask(&Cpu, &encoder.config, batch, MASKING, masked).unwrap();
        masked
    }
    /// The gradient of one parameter.
    pub fn gradient(&self, name: &str) -> &[f32] {
        let layout = self.params.layout().list();
        let (_, range) = layout.into_iter().find(|(p, _)| p.name == name).unwrap();
        &self.grads.flat()[range.clone()]
    }
}
