//! The sum of the network's gradient over the ranks, begun while the backward pass still runs.
//!
//! ```text
//! flat gradient   | tables | layer 0 … layer L-1, head: matrices      | vectors |
//! final                      <- from the top, as backward passes them
//! summed            after    <- pieces of whole layers, behind it       after
//! ```
//! Only the last backward pass of a step makes gradients final: the others of accumulated batches, and of parts of a batch, add to
//! them. A rank may have fewer parts than another, or none; the pieces and their order are the same on all, and each element is
//! summed as it would be afterwards, so what overlaps changes no bit.
//!
//! Where the device queues sums (NCCL), a piece is queued beside the kernels. Elsewhere a copy of it goes to a thread.

use crate::collective::behind::Behind;
use crate::collective::{Collective, Piece};
use crate::device::{Device, Queue};
use crate::error::Result;
use crate::model::Layout;
use std::ops::Range;

/// Floats of a piece, at least: what a network moves well at once.
const PIECE: usize = 1 << 20;

/// A step's sum, and what it needs.
pub struct Reduction<B: Device> {
    ranks: Collective,
    /// Elements of the gradient.
    len: usize,
    /// Does each rank get the sums of its own slice alone?
    scattered: bool,
    /// From the top down: a layer, and the elements that are final once backward has passed it.
    pieces: Vec<(usize, Range<usize>)>,
    /// Pieces handed over in this step.
    handed: usize,
    behind: Option<Behind>,
    /// Orders the queues of sums and of kernels.
    event: B::Event,
    /// Is this batch the step's last?
    last_batch: bool,
    /// Are the cells that were loaded last its last part?
    last_part: bool,
}

impl<B: Device> Reduction<B> {
    /// Over a gradient of this layout; with `overlaps` behind the backward pass, as far as that is possible.
    pub fn new(
        dev: &B,
        ranks: &Collective,
        layout: &Layout,
        scattered: bool,
        overlaps: bool,
    ) -> Result<Reduction<B>> {
        let starts = match overlaps && !ranks.is_single() {
            true => layer_starts(layout),
            false => Vec::new(),
        };
        Ok(Reduction {
            ranks: ranks.clone(),
            len: layout.len(),
            scattered,
            pieces: pieces(&starts, layout.decayed().end, PIECE),
            handed: 0,
            behind: None,
            event: dev.event(Queue::Compute)?,
            last_batch: false,
            last_part: false,
        })
    }

    /// A batch of the step begins.
    pub fn batch(&mut self, is_last: bool) {
        self.last_batch = is_last;
    }

    /// A part of it is loaded.
    pub fn part(&mut self, is_last: bool) {
        self.last_part = is_last;
    }

    /// The layer down to which backward goes from layer `top` before it calls [`Reduction::passed`].
    pub fn stop_below(&self, top: usize) -> usize {
        if !(self.last_batch && self.last_part) {
            return 0;
        }
        self.pieces.iter().map(|(layer, _)| *layer).find(|layer| *layer < top).unwrap_or(0)
    }

    /// Backward has passed `layer`: of `grads`, what is final is handed over where this is the step's last backward pass.
    pub fn passed(&mut self, dev: &B, grads: &mut B::Buf<f32>, layer: usize) -> Result<()> {
        match self.last_batch && self.last_part {
            true => self.hand_over(dev, grads, layer),
            false => Ok(()),
        }
    }

    fn hand_over(&mut self, dev: &B, grads: &mut B::Buf<f32>, layer: usize) -> Result<()> {
        while let Some((_, range)) = self.pieces.get(self.handed).filter(|(lowest, _)| *lowest >= layer) {
            let piece = self.piece(range.clone());
            self.handed += 1;
            if dev.queues_sums(&self.ranks) {
                dev.record(&mut self.event, Queue::Compute)?;
                dev.wait(&self.event, Queue::Sums)?;
                dev.sum(&self.ranks, grads, &piece, Queue::Sums)?;
                continue;
            }
            let values = dev.read_part_later(grads, piece.range.clone())?;
            let behind = match &mut self.behind {
                Some(behind) => behind,
                none => none.insert(Behind::begin(&self.ranks)?),
            };
            behind.add(piece, values);
        }
        Ok(())
    }

    /// The rest of the sum, when all gradients are final: afterwards `grads` holds the sums of all ranks, or of the own slice.
    ///
    /// # Errors
    /// What the ranks or the device report.
    pub fn finish(&mut self, dev: &B, grads: &mut B::Buf<f32>) -> Result<()> {
        if self.ranks.is_single() {
            return Ok(());
        }
        self.hand_over(dev, grads, 0)?;
        if let Some(behind) = &mut self.behind {
            for (piece, sums) in behind.take()? {
                dev.write_part(grads, piece.range.start, &sums)?;
            }
        } else if self.handed > 0 {
            dev.record(&mut self.event, Queue::Sums)?;
            dev.wait(&self.event, Queue::Compute)?;
        }
        let first = self.pieces.last().map_or(self.len, |(_, range)| range.start);
        let last = self.pieces.first().map_or(self.len, |(_, range)| range.end);
        for range in [0..first, last..self.len] {
            dev.sum(&self.ranks, grads, &self.piece(range), Queue::Compute)?;
        }
        self.handed = 0;
        Ok(())
    }

    fn piece(&self, range: Range<usize>) -> Piece {
        match self.scattered {
            true => self.ranks.scattered_piece(range, self.len),
            false => self.ranks.piece(range),
        }
    }
}

/// Where the matrices of each layer begin. Above them lie those of the head alone.
fn layer_starts(layout: &Layout) -> Vec<usize> {
    let mut starts: Vec<(usize, usize)> = Vec::new();
    for (parameter, range) in layout.list().into_iter().filter(|(p, _)| p.decay) {
        let layer =
            parameter.name.strip_prefix("layer.").and_then(|name| name.split('.').next()?.parse().ok());
        let Some(layer) = layer else { continue };
        if starts.last().is_none_or(|(before, _)| *before != layer) {
            starts.push((layer, range.start));
        }
    }
    starts.into_iter().map(|(_, start)| start).collect()
}

/// Cuts the elements from the first layer's to `end` into runs of whole layers, at least `least` elements each but for the last.
fn pieces(starts: &[usize], end: usize, least: usize) -> Vec<(usize, Range<usize>)> {
    let (mut pieces, mut above) = (Vec::new(), end);
    for (layer, start) in starts.iter().enumerate().rev() {
        if layer == 0 || above - start >= least {
            pieces.push((layer, *start..above));
            above = *start;
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::threads;
    use crate::cpu::Cpu;
    use crate::model::ModelConfig;
    use crate::model::config::{PRESETS, Vocabulary};
    use std::time::Duration;

    fn config() -> ModelConfig {
        ModelConfig { layers: 3, ..PRESETS[0].config(101, Vocabulary::default()) }
    }

    #[test]
    fn pieces_are_whole_layers_from_the_top() {
        let starts = [100, 110, 120, 130];
        assert_eq!(pieces(&starts, 145, 1), [(3, 130..145), (2, 120..130), (1, 110..120), (0, 100..110)]);
        assert_eq!(pieces(&starts, 145, 20), [(2, 120..145), (0, 100..120)]);
        assert_eq!(pieces(&starts, 145, 1000), [(0, 100..145)]);
        assert!(pieces(&[], 145, 1).is_empty());
    }

    /// Three ranks over a gradient whose upper layers become final first; one rank has no cells, one takes all layers at once.
    #[test]
    fn pieces_in_any_state_of_the_backward_pass_are_the_whole_sum() {
        let layout = Layout::network(&config());
        let len = layout.len();
        let value = |i: usize, rank: usize| ((i * 7 + rank * 13) % 1000) as f32 * 1.1e-3 - 0.3;
        let gradient = |rank: usize| (0..len).map(|i| value(i, rank)).collect::<Vec<f32>>();
        let sum = |i: usize| (0..3).map(|r| value(i, r) as f64).sum::<f64>() as f32;
        for scattered in [false, true] {
            let one = |ranks: Collective| {
                let mut reduction = Reduction::new(&Cpu, &ranks, &layout, scattered, true).unwrap();
                reduction.pieces = pieces(&layer_starts(&layout), layout.decayed().end, 1);
                let mut buf = Cpu.upload(&gradient(ranks.rank())).unwrap();
                for step in 0..2 {
                    Cpu.write(&mut buf, &gradient(ranks.rank())).unwrap();
                    reduction.batch(true);
                    reduction.part(ranks.rank() < 2);
                    let mut top = [3, 1, 3][ranks.rank()];
                    while top > 0 {
                        let bottom = reduction.stop_below(top);
                        reduction.passed(&Cpu, &mut buf, bottom).unwrap();
                        assert_eq!(reduction.handed, if ranks.rank() < 2 { 3 - bottom } else { 0 });
                        top = bottom;
                    }
                    reduction.finish(&Cpu, &mut buf).unwrap();
                    let own = if scattered { ranks.slice(len, ranks.rank()) } else { 0..len };
                    let same = own.clone().all(|i| buf[i].to_bits() == sum(i).to_bits());
                    assert!(same, "step {step}, rank {}, scattered {scattered}", ranks.rank());
                }
            };
            std::thread::scope(|scope| {
                let ranks = threads::ranks(3, Duration::from_secs(60));
                ranks.into_iter().for_each(|ranks| drop(scope.spawn(move || one(ranks))));
            });
        }
    }

    #[test]
    fn above_the_first_layer_lie_matrices_of_layers_and_head_alone() {
        let layout = Layout::network(&config());
        let starts = layer_starts(&layout);
        assert_eq!(starts.len(), config().layers);
        let name_at = |at: &usize| {
            let part = layout.list().into_iter().find(|(_, range)| range.start == *at);
            part.unwrap().0.name.clone()
        };
        assert!(starts.iter().enumerate().all(|(i, at)| name_at(at) == format!("layer.{i}.qkv_weight")));
        let above = layout.list().into_iter().filter(|(p, range)| p.decay && range.start >= starts[0]);
        assert!(above.map(|(p, _)| &p.name).all(|n| n.starts_with("layer.") || n.starts_with("head.")));
    }
}
