//! The order of cells in training: seeded, resumable at any cell.
//!
//! Epoch e is one list, a function of (seed, e) alone: a permutation of the cells, or, class-aware, as many draws
//! with replacement, where class k comes up with probability ∝ n_k^½ (`sqrt`) or ∝ 1 (`uniform`) and a cell of it equally. Cells
//! without a label keep their natural share. The state to save is two numbers, and a resumed run sees the same cells whatever the
//! batch size was.
//!
//! Up to [`LISTED`] cells the permutation is a Fisher–Yates shuffle, drawn from all there are and made once per epoch. Beyond, it is
//! computed index by index (`permutation`), a window at a time, and whole corpora are kept as a range: memory and the time to start
//! or resume do not grow with the corpus. [`CellOrder::Blocks`] is always computed.

use super::permutation::{BlockOrder, Permutation};
use super::splits::TrainingCells;
use crate::digest::hex;
use crate::error::{Code, Error, Result};
use crate::rng::{Philox, site, stream_block};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::ops::Range;
use std::sync::Arc;

/// Up to so many cells an epoch is one list in memory, 4 bytes a cell.
pub const LISTED: usize = 1 << 20;
/// Cells that [`Sampler::upcoming`] shows at least, unless the epoch ends before: more than any batch holds.
const AHEAD: usize = 1 << 16;

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

/// In which order the cells of an epoch come, where each comes once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CellOrder {
    /// A permutation of all cells.
    #[default]
    Random,
    /// Runs of [`CellOrder::BLOCK`] neighbours in random order, mixed within groups of [`BlockOrder::GROUP`] runs: for storage
    /// that is slow at random reads.
    Blocks,
}

impl CellOrder {
    /// Cells in a run: about 256 KiB of tokens.
    pub const BLOCK: u64 = 128;

    fn is_random(&self) -> bool {
        *self == CellOrder::Random
    }
}

/// The cells drawn from.
#[derive(Debug, Clone)]
enum Cells {
    Range(Range<u32>),
    List(Arc<[u32]>),
}

impl Cells {
    fn len(&self) -> usize {
        match self {
            Cells::Range(r) => r.len(),
            Cells::List(l) => l.len(),
        }
    }
    #[inline]
    fn get(&self, i: u64) -> u32 {
        match self {
            Cells::Range(r) => r.start + i as u32,
            Cells::List(l) => l[i as usize],
        }
    }
}

/// How the cells of an epoch are computed.
#[derive(Debug, Clone)]
enum Order {
    Random(Permutation),
    Blocks(BlockOrder),
    Drawn,
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
    /// Order of the cells.
    #[serde(default, skip_serializing_if = "CellOrder::is_random")]
    pub order: CellOrder,
}

/// Draws cells of the training split.
#[derive(Debug, Clone)]
pub struct Sampler {
    state: SamplerState,
    cells: Cells,
    /// Class-aware: cells by class with the upper end of the class's share of 2⁶⁴. Empty for a permutation.
    groups: Arc<[(u64, Vec<u32>)]>,
    rank: usize,
    world: usize,
    /// The present epoch's order, where it is computed.
    computed: Option<Order>,
    /// This rank's cells from position `window_first` on: of the whole epoch, or the next ones. Empty = not made yet.
    window: Vec<u32>,
    window_first: usize,
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

    /// Draws from a run of cells, each once per epoch, in memory that does not depend on how many they are.
    pub fn of_range(cells: Range<u32>, seed: u64) -> Result<Self> {
        if cells.len() <= LISTED {
            return Self::of_cells(cells.collect(), seed);
        }
        let sha = range_digest(&cells);
        Self::of(Cells::Range(cells), Vec::new(), Sampling::None, seed, sha)
    }

    fn new(
        cells: Vec<u32>,
        groups: Vec<(u64, Vec<u32>)>,
        sampling: Sampling,
        seed: u64,
        sha: Sha256,
    ) -> Result<Self> {
        match run_of(&cells).filter(|_| cells.len() > LISTED && sampling == Sampling::None) {
            Some(run) => {
                let sha = range_digest(&run);
                Self::of(Cells::Range(run), groups, sampling, seed, sha)
            }
            None => Self::of(Cells::List(cells.into()), groups, sampling, seed, sha),
        }
    }

    fn of(
        cells: Cells,
        groups: Vec<(u64, Vec<u32>)>,
        sampling: Sampling,
        seed: u64,
        sha: Sha256,
    ) -> Result<Self> {
        if cells.len() == 0 {
            return Err(Error::new(Code::NoCells, "there are no cells to draw from")
                .wanted("at least one training cell")
                .next("check --split, --holdout and --exclude-label"));
        }
        let cells_digest = hex(&sha.finalize());
        let state =
            SamplerState { epoch: 0, position: 0, seed, sampling, cells_digest, order: CellOrder::Random };
        let groups = groups.into();
        Ok(Sampler {
            state,
            cells,
            groups,
            rank: 0,
            world: 1,
            computed: None,
            window: Vec::new(),
            window_first: 0,
        })
    }

    /// The same cells in another order.
    ///
    /// # Errors
    /// Usage: class-aware draws, which have no order of blocks.
    pub fn ordered(mut self, order: CellOrder) -> Result<Self> {
        if order == CellOrder::Blocks && self.state.sampling != Sampling::None {
            return Err(Error::new(Code::SettingConflict, "class-aware sampling draws single cells")
                .found("batch.order = blocks")
                .next("leave batch.order or batch.sampling out"));
        }
        self.state.order = order;
        self.forget();
        Ok(self)
    }

    /// The window and the order are of another epoch or rank.
    fn forget(&mut self) {
        self.window.clear();
        self.window_first = 0;
        self.computed = None;
    }

    /// This process draws every `world`-th cell, from the `rank`-th on; a remainder that does not go round is left out of the
    /// epoch. Needs at least `world` cells.
    pub fn for_rank(mut self, rank: usize, world: usize) -> Result<Self> {
        if rank >= world || self.cells.len() < world {
            return Err(Error::new(Code::RankNumbers, "the cells cannot be dealt out to so many ranks")
                .found(format!("rank {rank} of {world}, {} cells", self.cells.len())));
        }
        (self.rank, self.world) = (rank, world);
        self.forget();
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

    /// Epochs finished.
    pub fn epoch(&self) -> u64 {
        self.state.epoch
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
        self.forget();
        self.state = state.clone();
        Ok(())
    }

    /// The cells of the present epoch that are next: all that are still to come, or at least 65,536 of them; never empty.
    pub fn upcoming(&mut self) -> &[u32] {
        let (at, all) = (self.state.position as usize, self.epoch_len());
        let end = self.window_first + self.window.len();
        if end < all && (self.window.is_empty() || end < at + AHEAD) {
            if self.listed() {
                self.window = self.order_of(self.state.epoch);
            } else {
                // What was drawn goes; as much again is computed beyond what must be shown.
                self.window.drain(..at.saturating_sub(self.window_first).min(self.window.len()));
                self.window_first = at;
                let mut order = self.computed.take().unwrap_or_else(|| self.computed_order(self.state.epoch));
                let from = at + self.window.len();
                let next = (from..(at + 2 * AHEAD).min(all)).map(|i| self.computed_cell(&mut order, i));
                let next: Vec<u32> = next.collect();
                self.window.extend(next);
                self.computed = Some(order);
            }
        }
        &self.window[at - self.window_first..]
    }

    /// Marks `n` upcoming cells as drawn.
    pub fn advance(&mut self, n: usize) {
        self.state.position += n as u64;
        debug_assert!(self.state.position as usize <= self.epoch_len());
        if self.state.position as usize >= self.epoch_len() {
            self.state.position = 0;
            self.state.epoch += 1;
            self.forget();
        }
    }

    /// A sampler of the same cells at the start of `epoch`.
    pub fn at_epoch(&self, epoch: u64) -> Self {
        let state = SamplerState { epoch, position: 0, ..self.state.clone() };
        Sampler {
            state,
            cells: self.cells.clone(),
            groups: self.groups.clone(),
            rank: self.rank,
            world: self.world,
            computed: None,
            window: Vec::new(),
            window_first: 0,
        }
    }

    fn listed(&self) -> bool {
        self.cells.len() <= LISTED && self.state.order == CellOrder::Random
    }

    fn computed_order(&self, epoch: u64) -> Order {
        let (n, seed, step) = (self.cells.len() as u64, self.state.seed, epoch as u32);
        match self.state.order {
            _ if !self.groups.is_empty() => Order::Drawn,
            CellOrder::Random => Order::Random(Permutation::new(n, seed, step, 0)),
            CellOrder::Blocks => Order::Blocks(BlockOrder::new(n, CellOrder::BLOCK, seed, step)),
        }
    }

    /// The cell at this rank's position `i`.
    #[inline]
    fn computed_cell(&self, order: &mut Order, i: usize) -> u32 {
        let i = (i * self.world + self.rank) as u64;
        match order {
            Order::Random(p) => self.cells.get(p.at(i)),
            Order::Blocks(b) => self.cells.get(b.at(i)),
            Order::Drawn => self.draw(stream_block(self.state.seed, self.state.epoch as u32, site::ORDER, i)),
        }
    }

    /// The whole list of `epoch`: 4 bytes a cell.
    pub fn order_of(&self, epoch: u64) -> Vec<u32> {
        if !self.listed() {
            let other = self.at_epoch(epoch);
            let mut order = other.computed_order(epoch);
            return (0..self.epoch_len()).map(|i| other.computed_cell(&mut order, i)).collect();
        }
        let (seed, step) = (self.state.seed, epoch as u32);
        let cells = self.cells.len() as u64;
        let mut all: Vec<u32> = if self.groups.is_empty() {
            let mut all: Vec<u32> = (0..cells).map(|i| self.cells.get(i)).collect();
            Philox::new(seed, step, site::ORDER).shuffle(&mut all);
            all
        } else {
            (0..cells).map(|i| self.draw(stream_block(seed, step, site::ORDER, i))).collect()
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

/// Names a run of cells without listing them.
fn range_digest(cells: &Range<u32>) -> Sha256 {
    let mut sha = Sha256::new();
    sha.update(format!("cells {}..{}", cells.start, cells.end));
    sha
}

/// The cells as a range, where they are one.
fn run_of(cells: &[u32]) -> Option<Range<u32>> {
    let (&first, &last) = (cells.first()?, cells.last()?);
    let run = last.checked_sub(first)? as usize + 1 == cells.len() && cells.windows(2).all(|w| w[0] < w[1]);
    Some(first..last.checked_add(1)?).filter(|_| run)
}
