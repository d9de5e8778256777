//! The loop: batches in, updates out, a record of every logged step, a checkpoint that can always be continued from.
//!
//! One loop for all stages; what differs is a [`Task`]. A step whose global gradient norm is not finite changes nothing: it is
//! skipped, counted and named, and after `train.max_bad_steps` in a row the run stops (exit 6). A norm far above those before it is
//! met as `train.spike_policy` says.
//!
//! The device is never waited for within a step. AdamW finds on the device whether a step is bad; the host hears of it while
//! the next step's gradients are queued already, before that step's update, which is the first to depend on the count of updates.
//! Logged steps, checkpoints and evaluations wait for the step that they end; `train.spike_policy = "skip"` waits in every step.

mod checkpoints;
mod resume;
mod settle;

use super::folder::RunFolder;
use super::inputs::Allowed;
use super::observer::{Flow, Observer};
use super::optimizer::{Group, LOSS_SLOT, squared_norm, update};
use super::record::{Meter, Writers};
use super::saver::Saver;
use super::schedule::Schedule;
use super::state::{Best, LoopState};
use super::summary::RunSummary;
use super::task::{Evaluation, Loss, Task};
use super::trunk::{Draw, Trunk, work};
use crate::config::{Settings, Stage};
use crate::corpus::{Batch, Loader, Packer, Sampler};
use crate::device::{Act, Later, Queue};
use crate::error::{Code, Error, Result};
use crate::model::checkpoint::{self, Pointer};
use crate::model::flops::Work;
use crate::ops::Backend;
use crate::trace;
use checkpoints::checkpoint_bytes;
use resume::restore;
use serde_json::Value;
use settle::Unsettled;
use std::path::PathBuf;
use std::time::Instant;

/// What a run is besides its network and its task.
pub struct Session<'a> {
    /// Stage.
    pub stage: Stage,
    /// Where it writes; locked.
    pub folder: RunFolder,
    /// Effective settings.
    pub settings: Settings,
    /// Digests of the inputs: a resumed run must meet the same.
    pub identity: Value,
    /// Model folder that the run started from, for the record of its adapters.
    pub start: Option<PathBuf>,
    /// Bytes of the vocabulary file, copied into every checkpoint.
    pub vocabulary: Option<Vec<u8>>,
    /// Checkpoint to continue from, already verified.
    pub resume: Option<PathBuf>,
    /// Inputs that may be others than those of the checkpoint.
    pub allow: Allowed,
    /// Command that continues the run, for the message after a signal.
    pub resume_command: Option<String>,
    /// Validation cells, already thinned; may be empty.
    pub validation: Vec<u32>,
    /// FLOP/s that this machine can reach, where it was measured.
    pub peak_flop_per_s: Option<f64>,
    /// Who watches.
    pub observer: &'a mut dyn Observer,
}

/// Steps of a run over `epoch_len` cells per epoch.
pub fn total_steps(settings: &Settings, epoch_len: usize) -> u64 {
    if settings.train.steps > 0 {
        return settings.train.steps;
    }
    let batches = epoch_len.div_ceil(settings.batch.cells) as f64 * settings.train.epochs;
    ((batches / settings.train.accumulate as f64).ceil() as u64).max(1)
}

/// Trains `task` on `trunk` until the last step, a signal or too many bad steps.
///
/// # Errors
/// Interrupted (exit 5) after a checkpoint; numerical (exit 6); what files and backends report.
pub fn run<B: Backend<A>, A: Act>(
    mut session: Session<'_>,
    trunk: &mut Trunk<B, A>,
    task: &mut dyn Task<B, A>,
    mut sampler: Sampler,
) -> Result<RunSummary> {
    let settings = session.settings.clone();
    if sampler.epoch_len() == 0 {
        return Err(Error::new(Code::NoCells, "no cell to train on")
            .next("look at --split, --labels-per-class and --exclude-label"));
    }
    let state = match session.resume.clone() {
        Some(place) => restore(&mut session, &place, trunk, task, &mut sampler)?,
        None => LoopState {
            step: 0,
            steps: total_steps(&settings, sampler.epoch_len()),
            updates: 0,
            bad_in_a_row: 0,
            bad_steps: 0,
            spikes: Default::default(),
            sampler: sampler.state(),
            best: None,
            seconds: 0.0,
        },
    };
    let ranks = trunk.ranks.clone();
    // Two: the newest is removed only when the next one stands.
    let bytes = 2 * checkpoint_bytes(trunk, task);
    ranks.lead(|| session.folder.check_space(bytes, "two checkpoints").map(|()| Vec::new()))?;
    let packer = Packer::sampled(trunk.corpus.clone(), sampler, trunk.options.clone())?;
    let packer = packer.for_rank(ranks.rank(), ranks.world());
    let loader = Loader::spawn(packer, settings.batch.ahead)?;
    session.observer.begin(session.stage, state.step, state.steps);
    let writers = match ranks.leads() {
        true => Some(Writers::open(session.folder.path(), state.step, state.steps)?),
        false => None,
    };
    let schedule = Schedule::of(&settings.optimizer, state.steps);
    let meter = Meter::new(session.peak_flop_per_s.map(|peak| peak * ranks.world() as f64));
    let mut run = Run {
        session,
        settings,
        trunk,
        task,
        state,
        loader,
        schedule,
        writers,
        meter,
        outcome: Outcome::default(),
        unsettled: None,
        saver: Saver::default(),
    };
    while run.state.step < run.state.steps {
        run.step()?;
    }
    run.session.observer.end();
    run.finish()
}

/// What the last logged step and evaluation said.
#[derive(Default)]
struct Outcome {
    loss: Loss,
    evaluation: Option<Evaluation>,
    published: Option<PathBuf>,
}

/// The loss of a logical batch, on its way from the device.
struct Unread {
    scalars: Later<f64>,
    cells: usize,
    masked: usize,
}

struct Run<'a, 'b, B: Backend<A>, A: Act> {
    session: Session<'a>,
    settings: Settings,
    trunk: &'b mut Trunk<B, A>,
    task: &'b mut dyn Task<B, A>,
    state: LoopState,
    loader: Loader,
    schedule: Schedule,
    /// Of the leading rank.
    writers: Option<Writers>,
    meter: Meter,
    outcome: Outcome,
    unsettled: Option<Unsettled>,
    /// Of the leading rank.
    saver: Saver,
}

impl<B: Backend<A>, A: Act> Run<'_, '_, B, A> {
    fn step(&mut self) -> Result<()> {
        let _range = trace::range("step");
        let started = Instant::now();
        let batches = self.next_batches()?;
        let step = self.state.step + 1;
        self.trunk.ranks.at_step(step);
        let train = &self.settings.train;
        let last = step == self.state.steps;
        let epoch_ends = self.loader.state().is_some_and(|s| s.epoch > self.state.sampler.epoch);
        let evaluates = !self.session.validation.is_empty()
            && (last
                || if train.eval_every > 0 { step.is_multiple_of(train.eval_every) } else { epoch_ends });
        let logs = last || evaluates || step == 1 || step.is_multiple_of(train.log_every);

        let (losses, work) = self.gradients(&batches, logs)?;
        if let Some(value) = self.session.observer.spikes(step) {
            self.inject(value)?;
        }
        let learning_rate = self.settings.optimizer.learning_rate * self.schedule.factor(step - 1);
        self.sum_over_ranks()?;
        let scalars = self.norm()?;
        self.settle(None)?;
        let cells: Vec<u32> = batches.iter().flat_map(|b| &b.whole.cells).copied().collect();
        let (scalars, skipped) = self.held_back(step, scalars)?;
        if !skipped {
            self.update(step)?;
        }
        self.unsettled = Some(Unsettled { step, scalars, cells, skipped });
        let loss = self.loss(losses)?;
        let norm = match logs {
            true => self.settle(loss.as_ref())?,
            false => None,
        };
        self.state.step = step;
        self.state.sampler = self.loader.state().unwrap_or_else(|| self.state.sampler.clone());
        let cells = batches.iter().map(|b| b.whole.cells.len()).sum();
        batches.into_iter().for_each(|batch| self.loader.recycle(batch));
        self.state.seconds += started.elapsed().as_secs_f64();
        self.meter.add(cells, work, self.trunk.config());

        if epoch_ends {
            self.task.epoch_ended(self.trunk)?;
        }
        let evaluation = match evaluates {
            true => Some(self.evaluate(step)?),
            false => None,
        };
        if loss.is_some() {
            self.meter.of_all(&self.trunk.ranks)?;
        }
        let record = loss.zip(norm).map(|(loss, norm)| {
            let epoch = self.state.sampler.epoch as f64;
            self.meter.record(
                step,
                epoch,
                loss,
                learning_rate,
                norm,
                [self.state.bad_steps, self.state.spikes.seen],
                evaluation.clone(),
            )
        });
        if let Some(record) = &record {
            self.outcome.loss = record.loss.clone();
            if let Some(Err(e)) = self.writers.as_mut().map(|writers| writers.write(record)) {
                // A full disk under the log is no reason to lose the training.
                self.session.observer.note(&format!("the run record could not be written: {e}"));
            }
        }
        // So does a checkpoint that could not be written: what it failed with is then the run's error.
        let stops =
            self.session.observer.step(step, record.as_ref()) == Flow::Stop || self.saver.has_failed();
        // A signal to one rank stops all of them after the same step.
        let stops = self.trunk.of_all_ranks(usize::from(stops))? > 0 && !last;
        let improved = self.improved(step, evaluation);
        let due = train_due(self.settings.train.checkpoint_every, step);
        if due || last || stops || improved {
            self.publish(step, improved)?;
        }
        if last || stops {
            self.saved()?;
        }
        if stops {
            return Err(self.interrupted(step));
        }
        Ok(())
    }

    fn next_batches(&mut self) -> Result<Vec<Batch>> {
        let _range = trace::range("batch wait");
        (0..self.settings.train.accumulate)
            .map(|_| self.loader.next_batch()?.ok_or_else(|| Error::bug("training ran out of batches")))
            .collect()
    }

    /// Gradients of the step's logical batches, summed; their losses, where they are logged, on their way.
    fn gradients(&mut self, batches: &[Batch], logs: bool) -> Result<(Vec<Unread>, Work)> {
        let trunk = &mut *self.trunk;
        trunk.dev.clear(trunk.grads.flat_mut())?;
        if let Some(own) = self.task.own() {
            trunk.dev.clear(own.grad)?;
        }
        let (seed, step) = (self.settings.seed, self.state.step as u32);
        let mut before = 0;
        let (mut losses, mut total) = (Vec::new(), Work::default());
        for (i, batch) in batches.iter().enumerate() {
            trunk.reduction.batch(i + 1 == batches.len());
            trunk.dev.clear(&mut trunk.scalars)?;
            let draw = Draw { seed, step, first_row: before + batch.whole.first_token as u64 };
            let masked = self.task.gradients(trunk, batch, draw, logs)?;
            if logs {
                let scalars = trunk.dev.read_later(&trunk.scalars)?;
                losses.push(Unread { scalars, cells: batch.whole.cells.len(), masked });
            }
            let work = work(trunk.config(), batch, masked);
            total.tokens += work.tokens;
            total.pairs += work.pairs;
            total.masked += work.masked;
            before += batch.whole.tokens as u64;
        }
        Ok((losses, total))
    }

    /// Their mean; `None` where they were not asked for.
    fn loss(&self, losses: Vec<Unread>) -> Result<Option<Loss>> {
        let _range = trace::range("device wait");
        let batches = losses.len();
        let mut mean = Loss::default();
        for Unread { scalars, cells, masked } in losses {
            let mut scalars = scalars()?;
            let mut shares = [scalars[LOSS_SLOT], masked as f64];
            self.trunk.ranks.sum(&mut shares)?;
            scalars[LOSS_SLOT] = shares[0];
            mean.add(&self.task.loss(&scalars, cells, shares[1] as usize));
        }
        mean.divide(batches);
        Ok((batches > 0).then_some(mean))
    }

    /// Sums the gradients over the ranks: those of the adapters where they learn instead of the weights.
    fn sum_over_ranks(&mut self) -> Result<()> {
        let trunk = &mut *self.trunk;
        let (dev, ranks) = (&trunk.dev, &trunk.ranks);
        match &mut trunk.adapters {
            Some(adapters) => {
                adapters.gradients(dev, trunk.grads.flat())?;
                let all = ranks.piece(0..adapters.layout().len());
                dev.sum(ranks, adapters.grad_mut(), &all, Queue::Compute)?;
            }
            None => trunk.reduction.finish(dev, trunk.grads.flat_mut())?,
        }
        match self.task.own() {
            Some(own) if !own.whole => dev.sum(ranks, own.grad, &ranks.piece(0..own.len), Queue::Compute),
            _ => Ok(()),
        }
    }

    /// The global gradient norm, left on the device, and on its way to the host.
    fn norm(&mut self) -> Result<Later<f64>> {
        let _range = trace::range("optimizer");
        let trunk = &mut *self.trunk;
        let own = self.task.own();
        let own = own.as_ref().map(|own| (&*own.grad, own.len));
        let network = match (&trunk.adapters, &trunk.shard) {
            (Some(adapters), _) => Some((adapters.grad(), adapters.layout().len())),
            (None, None) => Some((trunk.grads.flat(), trunk.params.layout().len())),
            (None, Some(shard)) => {
                shard.squared_norm::<A, B>(&trunk.dev, trunk.grads.flat(), &mut trunk.scalars)?;
                None
            }
        };
        squared_norm::<A, B>(&trunk.dev, [network, own], &mut trunk.scalars)?;
        trunk.dev.read_later(&trunk.scalars)
    }

    /// Clipping and AdamW; the device leaves everything as it is where the norm is not finite. Every step before is settled.
    fn update(&mut self, step: u64) -> Result<()> {
        let _range = trace::range("optimizer");
        let trunk = &mut *self.trunk;
        let (optimizer, accumulated) = (&self.settings.optimizer, self.settings.train.accumulate);
        let factor = self.schedule.factor(step - 1);
        let t = self.state.updates as u32 + 1;
        let learning_rate = optimizer.learning_rate * factor;
        let Trunk { dev, params, grads, moments, spans, adapters, scalars, shard, .. } = trunk;
        match adapters {
            Some(adapters) => {
                let when = (t, accumulated);
                adapters.update::<A>(dev, optimizer, learning_rate, when, moments, scalars)?;
                adapters.fold::<A>(dev, params)?;
            }
            None => {
                let network = params.update();
                let group = Group {
                    weight: network.weight,
                    copy: network.copy,
                    grad: grads.flat(),
                    moments,
                    spans,
                    learning_rate,
                };
                match shard {
                    Some(shard) => shard.update(dev, optimizer, t, accumulated, group, scalars)?,
                    None => update::<A, B>(dev, optimizer, t, accumulated, group, scalars)?,
                }
            }
        }
        if let Some(own) = self.task.own() {
            let group = Group {
                weight: own.weight,
                copy: None,
                grad: own.grad,
                moments: own.moments,
                spans: own.spans,
                learning_rate: own.learning_rate * factor,
            };
            update::<A, B>(dev, optimizer, t, accumulated, group, scalars)?;
        }
        Ok(())
    }

    fn evaluate(&mut self, step: u64) -> Result<Evaluation> {
        let _range = trace::range("evaluation");
        let cells = std::mem::take(&mut self.session.validation);
        let evaluation = self.task.evaluate(self.trunk, &cells);
        self.session.validation = cells;
        let evaluation = evaluation?;
        self.session.observer.note(&format!("step {step}: {} {:.4}", evaluation.measure, evaluation.value));
        self.outcome.evaluation = Some(evaluation.clone());
        self.meter.pause();
        Ok(evaluation)
    }

    /// Is this the best evaluation so far? Then it is remembered.
    fn improved(&mut self, step: u64, evaluation: Option<Evaluation>) -> bool {
        let Some(e) = evaluation.filter(|e| e.value.is_finite()) else { return false };
        if self.state.best.as_ref().is_some_and(|best| !e.beats(best.value)) {
            return false;
        }
        self.state.best = Some(Best { step, measure: e.measure.to_string(), value: e.value });
        true
    }

    fn interrupted(&mut self, step: u64) -> Error {
        self.session.observer.end();
        let command = self.session.resume_command.clone();
        let hint = command
            .unwrap_or_else(|| format!("--resume with --out {}", self.session.folder.path().display()));
        Error::new(Code::Checkpointed, format!("checkpointed at step {step}"))
            .at(self.session.folder.path().display())
            .next(format!("resume with: {hint}"))
    }

    fn finish(mut self) -> Result<RunSummary> {
        let out = self.session.folder.path().to_path_buf();
        // A run that was complete when it was resumed published nothing new.
        let checkpoint = match self.outcome.published.take() {
            Some(place) => place,
            None => checkpoint::pointed(&out, Pointer::Last)?.unwrap_or_else(|| out.clone()),
        };
        let (cells_per_s, tokens_per_s) = self.meter.overall();
        Ok(RunSummary {
            stage: self.session.stage,
            out,
            checkpoint,
            best: self.state.best,
            steps: self.state.step,
            bad_steps: self.state.bad_steps,
            spikes: self.state.spikes.seen,
            spikes_skipped: self.state.spikes.skipped,
            loss: self.outcome.loss,
            evaluation: self.outcome.evaluation,
            seconds: self.state.seconds,
            cells_per_s,
            tokens_per_s,
        })
    }
}

fn train_due(every: u64, step: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}
