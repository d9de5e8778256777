//! A classifier on the cell vector: `L = Σ_i κ_i CE(W h_i + b, y_i)`, `κ_i = w_{y_i} / Σ_j w_{y_j}` over the logical batch.
//!
//! w is 1, or the effective-number weight (1-β)/(1-βⁿ) of the class's n training cells, mean 1 over the classes: rare classes
//! count more, but never more than their evidence bears.

use super::optimizer::{LOSS_SLOT, Moments, Span, spans};
use super::task::{Evaluation, Loss, Own, Task};
use super::trunk::{Draw, Trunk};
use crate::config::{ClassWeights, FinetuneSettings};
use crate::corpus::{Batch, Labels};
use crate::device::{Act, Device};
use crate::error::{Code, Error, Result};
use crate::eval::metrics::classification;
use crate::model::heads::{self, Classify};
use crate::model::ledger::Ledger;
use crate::model::snapshot::Snapshot;
use crate::model::weights::{Classification, Classifier};
use crate::model::{Layout, ModelConfig, Store, checkpoint};
use crate::objective::prototype_file::StoredPrototypes;
use crate::ops::{Backend, reduce};
use std::path::Path;

/// Keeps the classifier's initial values apart from the encoder's under the same seed.
const CLASSIFIER_SEED: u64 = 0x636c_6173_7369_6679;

/// Class weights from the labelled training cells of each class, mean 1 over the classes that have some.
pub fn class_weights(rule: ClassWeights, beta: f64, counts: &[u64]) -> Vec<f32> {
    let weight = |n: u64| match rule {
        ClassWeights::None => 1.0,
        ClassWeights::EffectiveNumber => (1.0 - beta) / (1.0 - beta.powf(n as f64)),
    };
    let present: Vec<f64> = counts.iter().filter(|n| **n > 0).map(|n| weight(*n)).collect();
    let mean = present.iter().sum::<f64>() / present.len().max(1) as f64;
    counts.iter().map(|n| if *n > 0 { (weight(*n) / mean) as f32 } else { 0.0 }).collect()
}

/// The stage.
pub struct Finetune<B: Backend<A>, A: Act> {
    labels: Labels,
    class_weight: Vec<f32>,
    layout: Layout<Classification>,
    weight: Store<B, f32, Classification>,
    grad: Store<B, f32, Classification>,
    moments: Moments<B>,
    spans: Vec<Span>,
    learning_rate: f64,
    depth: usize,
    rows: Rows<B>,
    _act: std::marker::PhantomData<A>,
}

/// The stage's memory: the classifier's, and rows over the cells of a part.
pub struct Buffers<B: Device> {
    weight: Store<B, f32, Classification>,
    grad: Store<B, f32, Classification>,
    moments: Moments<B>,
    rows: Rows<B>,
}

/// C cells of a part.
struct Rows<B: Device> {
    h: B::Buf<f32>,      // (C, D)
    dh: B::Buf<f32>,     // (C, D)
    loss: B::Buf<f32>,   // (C)
    lse: B::Buf<f32>,    // (C)
    target: B::Buf<i32>, // (C)
    weight: B::Buf<f32>, // (C)
}

impl<B: Device> Buffers<B> {
    /// For a classifier of `layout` on vectors of `width`, over parts of at most `cells`.
    pub fn planned(
        ledger: &mut Ledger<B>,
        layout: &Layout<Classification>,
        width: usize,
        cells: usize,
    ) -> Result<Self> {
        Ok(Buffers {
            weight: Store::planned(ledger, "classifier", layout)?,
            grad: Store::planned(ledger, "gradient of the classifier", layout)?,
            moments: Moments::planned(ledger, "the classifier", layout.len())?,
            rows: Rows {
                h: ledger.zeros("cell vectors", "(C, D)", cells * width)?,
                dh: ledger.zeros("gradient of cell vectors", "(C, D)", cells * width)?,
                loss: ledger.zeros("classifier.loss", "(C)", cells)?,
                lse: ledger.zeros("classifier.lse", "(C)", cells)?,
                target: ledger.zeros("classifier.target", "(C)", cells)?,
                weight: ledger.zeros("classifier.row_weight", "(C)", cells)?,
            },
        })
    }
}

impl<B: Backend<A>, A: Act> Finetune<B, A> {
    /// The stage over `trunk`, for `labels` of which `counts` cells a class train.
    pub fn new(
        trunk: &Trunk<B, A>,
        settings: &FinetuneSettings,
        labels: Labels,
        counts: &[u64],
        learning_rate: f64,
        seed: u64,
    ) -> Result<Self> {
        let (dev, config) = (&trunk.dev, trunk.config());
        let (classes, width) = (labels.classes.len(), config.width);
        if counts.iter().filter(|n| **n > 0).count() < 2 {
            let only = counts.iter().position(|n| *n > 0).map_or("no class", |c| &labels.classes[c]);
            return Err(Error::new(
                Code::SplitClasses,
                "a classifier needs cells of at least two classes in the training split",
            )
            .at(format!("obs column {}", labels.column))
            .found(only)
            .next("choose another --label or --split"));
        }
        let layout = Layout::classifier(classes, width);
        let ledger = &mut Ledger::new(dev);
        let Buffers { mut weight, grad, moments, rows } =
            Buffers::planned(ledger, &layout, width, trunk.capacity().cells)?;
        trunk.reserve(None, classes)?;
        weight.randomize(dev, &layout, config.initializer_range, seed ^ CLASSIFIER_SEED)?;
        Ok(Finetune {
            class_weight: class_weights(settings.class_weights, settings.beta, counts),
            labels,
            weight,
            grad,
            moments,
            spans: spans(&layout, |_| true),
            layout,
            learning_rate,
            depth: config.depth(config.layer)?,
            rows,
            _act: std::marker::PhantomData,
        })
    }

    /// Starts the classes that have a prototype p_k, by name, at its cosine logit
    /// `(h - centre) · p_k / (τ R) `, R the mean distance of prototypes from the centre. Returns how many those are; none where
    /// the prototypes belong to another layer or pooling.
    ///
    /// # Errors
    /// What the device reports.
    pub fn start_at(&mut self, trunk: &Trunk<B, A>, stored: &StoredPrototypes) -> Result<usize> {
        let config = trunk.config();
        if stored.layer != config.layer || stored.pooling != config.pooling {
            return Ok(0);
        }
        let width = config.width;
        let away: Vec<f32> = stored
            .vectors
            .chunks_exact(width)
            .flat_map(|q| q.iter().zip(&stored.centre).map(|(q, c)| q - c))
            .collect();
        let norms: Vec<f32> = away
            .chunks_exact(width)
            .map(|q| q.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12))
            .collect();
        let radius = norms.iter().sum::<f32>() / norms.len().max(1) as f32;
        let mut classifier = self.host(&trunk.dev)?;
        let mut started = 0;
        for (k, name) in self.labels.classes.iter().enumerate() {
            let Some(at) = stored.names.iter().position(|n| n == name) else { continue };
            let scale = 1.0 / (stored.temperature * radius * norms[at]);
            let row = &mut classifier.weight[k * width..(k + 1) * width];
            row.iter_mut().zip(&away[at * width..]).for_each(|(w, q)| *w = scale * q);
            classifier.bias[k] = -row.iter().zip(&stored.centre).map(|(w, c)| w * c).sum::<f32>();
            started += 1;
        }
        let named = self.weight.named_mut();
        trunk.dev.write(&mut named.weight, &classifier.weight)?;
        trunk.dev.write(&mut named.bias, &classifier.bias)?;
        Ok(started)
    }

    /// The weights on the host.
    fn host(&self, dev: &B) -> Result<Classifier<Vec<f32>>> {
        let named = self.weight.named();
        Ok(Classifier { weight: dev.download(&named.weight)?, bias: dev.download(&named.bias)? })
    }
}

impl<B: Backend<A>, A: Act> Task<B, A> for Finetune<B, A> {
    fn gradients(&mut self, trunk: &mut Trunk<B, A>, batch: &Batch, draw: Draw, sums: bool) -> Result<usize> {
        let class = |cell: &u32| self.labels.codes[*cell as usize];
        let class_of: Vec<i32> = batch.cells.iter().map(class).collect();
        let weight_of = |class: i32| if class < 0 { 0.0 } else { self.class_weight[class as usize] };
        let sum: f64 = batch.whole.cells.iter().map(|cell| weight_of(class(cell)) as f64).sum();
        let mut genes = trunk.take_genes();
        let logical = trunk.logical(batch, &mut genes);
        for cells in &logical.parts {
            trunk.load(&logical, cells, draw.first_row)?;
            let Trunk { dev, encoder, params, part, acts, scalars, .. } = &mut *trunk;
            let (config, rows, pass) = (&encoder.config, &mut self.rows, draw.pass());
            encoder.forward(params.network(), part.input(), acts, pass, self.depth)?;
            heads::pool(dev, config, config.pooling, part, acts, self.depth, &mut rows.h)?;
            let range = crate::trace::range("loss");
            let weights: Vec<f32> = class_of[cells.clone()]
                .iter()
                .map(|class| (weight_of(*class) as f64 / sum.max(f64::MIN_POSITIVE)) as f32)
                .collect();
            dev.write(&mut rows.target, &class_of[cells.clone()])?;
            dev.write(&mut rows.weight, &weights)?;
            let classify = Classify {
                cells: cells.len(),
                classes: self.labels.classes.len(),
                width: config.width,
                classifier: self.weight.named(),
                h: &rows.h,
                target: &rows.target,
                row_weight: &rows.weight,
            };
            classify.forward(dev, &mut rows.loss, &mut rows.lse, &mut rows.dh)?;
            classify.backward(dev, &rows.lse, self.grad.named_mut())?;
            drop(range);
            heads::pool_backward(dev, config, config.pooling, part, &rows.dh, acts)?;
            if sums {
                let _range = crate::trace::range("loss");
                reduce::add_sum::<B>(dev, &rows.loss, cells.len(), scalars, LOSS_SLOT)?;
            }
            trunk.backward(None, pass, self.depth)?;
        }
        trunk.recycle(genes);
        Ok(0)
    }

    fn loss(&self, scalars: &[f64], _cells: usize, _masked: usize) -> Loss {
        let total = scalars[LOSS_SLOT];
        Loss { total, terms: vec![("cross_entropy", total)] }
    }

    fn own(&mut self) -> Option<Own<'_, B, A>> {
        Some(Own {
            weight: self.weight.flat_mut(),
            grad: self.grad.flat_mut(),
            moments: &mut self.moments,
            spans: &self.spans,
            len: self.layout.len(),
            learning_rate: self.learning_rate,
            whole: false,
            name: "classifier",
            act: std::marker::PhantomData,
        })
    }

    fn evaluate(&mut self, trunk: &mut Trunk<B, A>, cells: &[u32]) -> Result<Evaluation> {
        let labelled: Vec<u32> =
            cells.iter().copied().filter(|cell| self.labels.codes[*cell as usize] >= 0).collect();
        let truth: Vec<usize> =
            labelled.iter().map(|cell| self.labels.codes[*cell as usize] as usize).collect();
        let logits = heads::logits(&trunk.embed(&labelled)?, &self.host(&trunk.dev)?);
        let classes = self.labels.classes.len();
        let predicted: Vec<usize> = logits.chunks_exact(classes).map(first_maximum).collect();
        let scores = classification(&truth, &predicted, classes)?;
        Ok(Evaluation {
            measure: "val_macro_f1",
            value: scores.macro_f1,
            higher_is_better: true,
            others: vec![("val_accuracy", scores.accuracy)],
        })
    }

    fn save(&self, dev: &B, checkpoint: &mut Snapshot, _config: &ModelConfig) -> Result<()> {
        checkpoint.classifier(dev, &self.layout, &self.weight, &self.labels.classes, &self.labels.column)
    }

    fn restore(&mut self, dev: &B, folder: &Path) -> Result<()> {
        let named = self.weight.named();
        let width = crate::device::Len::len(&named.weight) / self.labels.classes.len();
        let loaded = checkpoint::read_classifier(folder, width)?.ok_or_else(|| {
            Error::new(Code::CheckpointClassifier, "the checkpoint holds no classifier").at(folder.display())
        })?;
        if loaded.labels != self.labels.classes {
            return Err(Error::new(
                Code::CheckpointClassifier,
                "the checkpoint's classifier has other classes",
            )
            .at(folder.display())
            .found(loaded.labels.join(", "))
            .wanted(self.labels.classes.join(", ")));
        }
        let named = self.weight.named_mut();
        dev.write(&mut named.weight, &loaded.weights.weight)?;
        dev.write(&mut named.bias, &loaded.weights.bias)
    }
}

/// Index of the largest value; the first of equals.
fn first_maximum(row: &[f32]) -> usize {
    row.iter().enumerate().fold(0, |best, (i, x)| if *x > row[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rare_classes_weigh_more_and_the_mean_is_one() {
        let w = class_weights(ClassWeights::EffectiveNumber, 0.999, &[1000, 100, 10, 0]);
        assert!(w[0] < w[1] && w[1] < w[2] && w[3] == 0.0);
        assert!(((w[0] + w[1] + w[2]) / 3.0 - 1.0).abs() < 1e-6);
        // (1-β)/(1-βⁿ) for n = 10 and 1000 at β = .999, from Python.
        assert!((w[2] / w[0] - 0.100_450_82 / 0.001_581_516).abs() < 0.01, "{w:?}");
        assert_eq!(class_weights(ClassWeights::None, 0.9, &[5, 500]), [1.0, 1.0]);
    }

    #[test]
    fn the_first_of_equal_maxima_wins() {
        assert_eq!(first_maximum(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(first_maximum(&[f32::NAN, 1.0]), 0);
    }
}
