//! The order of cells in training: seeded, resumable at any cell.
//!
//! Epoch e is one list, a function of (seed, e) alone: a Fisher–Yates permutation of the cells, or, class-aware, as many draws
//! with replacement, where class k comes up with probability ∝ n_k^½ (`sqrt`) or ∝ 1 (`uniform`) and a cell of it equally. Cells
//! without a label keep their natural share. The list is made once per epoch (4 bytes a cell), so the state to save is two
//! numbers, and a resumed run sees the same cells whatever the batch size was.

use super::format::hex;
use super::splits::TrainingCells;
use crate::error::{Code, Error, Result};
use crate::rng::{Philox, site, stream_block};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// How often each class is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sampling {
    /// Every cell once per epoch, in a fresh permutation.
    #[default]
    None,
    /// Classes in proportion to √n, with replacement.
    Sqrt,
    /// Classes equally, with replacement.
    Uniform,
}

/// Where a sampler stands. Small: the order itself is a function of (seed, epoch).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplerState {
    /// Epochs finished.
    pub epoch: u64,
    /// Cells drawn in this epoch.
    pub position: u64,
    /// Seed of the order.
    pub seed: u64,
    /// Class sampling.
    pub sampling: Sampling,
    /// Digest of the cells and labels drawn from.
    pub cells_digest: String,
}

/// Draws cells of the training split.
#[derive(Debug, Clone)]
pub struct Sampler {
    state: SamplerState,
    cells: Vec<u32>,
    /// Class-aware: cells by class with the upper end of the class's share of 2⁶⁴. Empty for a permutation.
    groups: Vec<(u64, Vec<u32>)>,
    rank: usize,
    world: usize,
    /// This rank's list for the present epoch; empty = not made yet.
    order: Vec<u32>,
}

impl Sampler {
    /// Draws from `training`; needs labels unless `sampling` is `None`.
    pub fn over(training: &TrainingCells<'_>, sampling: Sampling, seed: u64) -> Result<Self> {
        let cells = training.cells().to_vec();
        if sampling == Sampling::None {
            return Self::of_cells(cells, seed);
        }
        if training.labels().is_empty() {
            return Err(Error::new(Code::LabelsNeeded, "class-aware sampling needs labels")
                .found("no label column")
                .next("add --label COLUMN, or leave the sampling at `none`"));
        }
        let mut by_class = vec![Vec::new(); training.classes().len()];
        let mut unlabelled = Vec::new();
        for (&cell, &label) in cells.iter().zip(training.labels()) {
            match usize::try_from(label) {
                Ok(class) => by_class[class].push(cell),
                Err(_) => unlabelled.push(cell),
            }
        }
        let labelled = (cells.len() - unlabelled.len()) as f64;
        let weight = |n: usize| match (n, sampling) {
            (0, _) => 0.0,
            (_, Sampling::Sqrt) => (n as f64).sqrt(),
            _ => 1.0,
        };
        let total: f64 = by_class.iter().map(|c| weight(c.len())).sum();
        let mut groups: Vec<(f64, Vec<u32>)> = Vec::new();
        let mut end = 0.0;
        for class in by_class.into_iter().filter(|c| !c.is_empty()) {
            end += weight(class.len()) / total * labelled / cells.len() as f64;
            groups.push((end, class));
        }
        if !unlabelled.is_empty() {
            groups.push((1.0, unlabelled));
        }
        let mut sha = digest(&cells);
        sha.update(bytemuck::cast_slice::<i32, u8>(training.labels()));
        let last = groups.len().saturating_sub(1);
        let share = |(i, (end, cells)): (usize, (f64, Vec<u32>))| {
            // The last group takes what rounding left.
            (if i == last { u64::MAX } else { (end * 2f64.powi(64)) as u64 }, cells)
        };
        Self::new(cells, groups.into_iter().enumerate().map(share).collect(), sampling, seed, sha)
    }

    /// Draws from `cells` without labels, each once per epoch.
    pub fn of_cells(cells: Vec<u32>, seed: u64) -> Result<Self> {
        let sha = digest(&cells);
        Self::new(cells, Vec::new(), Sampling::None, seed, sha)
    }

    fn new(
        cells: Vec<u32>,
        groups: Vec<(u64, Vec<u32>)>,
        sampling: Sampling,
        seed: u64,
        sha: Sha256,
    ) -> Result<Self> {
        if cells.is_empty() {
            return Err(Error::new(Code::NoCells, "there are no cells to draw from")
                .wanted("at least one training cell")
                .next("check --split, --holdout and --exclude-label"));
        }
        let cells_digest = hex(&sha.finalize());
        let state = SamplerState { epoch: 0, position: 0, seed, sampling, cells_digest };
        Ok(Sampler { state, cells, groups, rank: 0, world: 1, order: Vec::new() })
    }

    /// This process draws every `world`-th cell, from the `rank`-th on; a remainder that does not go round is left out of the
    /// epoch. Needs at least `world` cells.
    pub fn for_rank(mut self, rank: usize, world: usize) -> Result<Self> {
        if rank >= world || self.cells.len() < world {
            return Err(Error::new(Code::RankNumbers, "the cells cannot be dealt out to so many ranks")
                .found(format!("rank {rank} of {world}, {} cells", self.cells.len())));
        }
        (self.rank, self.world) = (rank, world);
        self.order.clear();
        Ok(self)
    }

    /// Cells drawn per epoch (by this rank).
    pub fn epoch_len(&self) -> usize {
        self.cells.len() / self.world
    }

    /// Where it stands.
    pub fn state(&self) -> SamplerState {
        self.state.clone()
    }

    /// Continues from `state`; refuses the state of another seed, sampling or set of cells.
    pub fn restore(&mut self, state: &SamplerState) -> Result<()> {
        let fits = SamplerState { epoch: state.epoch, position: state.position, ..self.state.clone() }
            == *state
            && (state.position as usize) < self.epoch_len();
        if !fits {
            return Err(Error::new(
                Code::SamplerPosition,
                "the saved position belongs to other cells, another seed or another sampling",
            )
            .found(serde_json::to_string(state).unwrap_or_default())
            .wanted(serde_json::to_string(&self.state).unwrap_or_default())
            .next("resume with the corpus, split, seed and sampling of the run"));
        }
        if self.state.epoch != state.epoch {
            self.order.clear();
        }
        self.state = state.clone();
        Ok(())
    }

    /// The cells of the present epoch that are still to come; never empty.
    pub fn upcoming(&mut self) -> &[u32] {
        if self.order.is_empty() {
            self.order = self.order_of(self.state.epoch);
        }
        &self.order[self.state.position as usize..]
    }

    /// Marks `n` upcoming cells as drawn.
    pub fn advance(&mut self, n: usize) {
        self.state.position += n as u64;
        debug_assert!(self.state.position as usize <= self.epoch_len());
        if self.state.position as usize >= self.epoch_len() {
            self.state.position = 0;
            self.state.epoch += 1;
            self.order.clear();
        }
    }

    /// The whole list of `epoch`.
    pub fn order_of(&self, epoch: u64) -> Vec<u32> {
        let (seed, step) = (self.state.seed, epoch as u32);
        let mut all = if self.groups.is_empty() {
            let mut all = self.cells.clone();
            Philox::new(seed, step, site::ORDER).shuffle(&mut all);
            all
        } else {
            (0..self.cells.len() as u64)
                .map(|i| self.draw(stream_block(seed, step, site::ORDER, i)))
                .collect()
        };
        if self.world > 1 {
            let mine = all.iter().copied().skip(self.rank).step_by(self.world);
            all = mine.take(self.epoch_len()).collect();
        }
        all
    }

    /// One draw with replacement from 128 random bits: half choose the class, half the cell (the bias of the scaled product is
    /// below n/2⁶⁴).
    fn draw(&self, words: [u32; 4]) -> u32 {
        let [class, cell] = [0, 2].map(|i| words[i] as u64 | (words[i + 1] as u64) << 32);
        let at = self.groups.partition_point(|(end, _)| *end <= class).min(self.groups.len() - 1);
        let cells = &self.groups[at].1;
        cells[((cell as u128 * cells.len() as u128) >> 64) as usize]
    }
}

fn digest(cells: &[u32]) -> Sha256 {
    let mut sha = Sha256::new();
    sha.update((cells.len() as u64).to_le_bytes());
    sha.update(bytemuck::cast_slice::<u32, u8>(cells));
    sha
}
