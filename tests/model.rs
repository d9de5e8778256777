//! The whole network: finite differences, independence of how cells are packed and split, types, threads, checkpoints.

mod common;

use cellrefine::cpu::Cpu;
use cellrefine::device::{Act, Device};
use cellrefine::model::checkpoint::{self, LoadOptions, Pointer};
use cellrefine::model::heads;
use cellrefine::model::ledger::Ledger;
use cellrefine::model::snapshot::Snapshot;
use cellrefine::model::{Activations, Capacity, DeviceBatch, Encoder, ModelConfig, Parameters, Pass};
use cellrefine::ops::gene_attention::Pattern;
use cellrefine::ops::pool::Pooling;
use common::close::assert_same_bits;
use common::network::{Cells, MASKING, Rig, small_config};
use half::bf16;

const TRAIN: Pass = Pass::Train { seed: 5, step: 2, view: 1 };
const LENGTHS: [usize; 5] = [7, 24, 3, 11, 16];
const CAPACITY: Capacity = Capacity { tokens: 70, cells: 6 };

/// All options at once: values, marker-sparse attention, special tokens.
fn full_config() -> ModelConfig {
    let mut config = small_config();
    config.value_bins = 6;
    config.attention = Pattern::MarkerSparse { window: 3 };
    config.globals = (0..config.vocab as u32).step_by(7).collect();
    config
}

/// Per tensor, the derivative of the loss along the gradient itself is the gradient's norm. Dropout is on: the same bits are
/// drawn at every evaluation.
#[test]
fn gradients_are_finite_differences() {
    let config = full_config();
    let mut rig = Rig::<f32>::random(&config, CAPACITY);
    let cells = Cells::random(&config, &LENGTHS, 1);
    rig.upload(&cells);
    let masked = rig.mask();
    assert!(masked > 8);
    rig.masked_loss(TRAIN, 1.0, true);
    let layout: Vec<(String, std::ops::Range<usize>)> =
        rig.params.layout().list().into_iter().map(|(p, r)| (p.name.clone(), r.clone())).collect();
    let weights = rig.params.master().flat().to_vec();
    for (name, range) in layout {
        let gradient: Vec<f32> = rig.grads.flat()[range.clone()].to_vec();
        let norm = gradient.iter().map(|g| (*g as f64).powi(2)).sum::<f64>().sqrt();
        assert!(norm > 1e-3, "{name}: gradient norm {norm}");
        // A loss of about 100 in f32 is known to about 1e-4: move it by about 0.1.
        let step = (0.05 / norm).min(0.02);
        let mut loss_at = |sign: f64| {
            let mut moved = weights.clone();
            for (w, g) in moved[range.clone()].iter_mut().zip(&gradient) {
                *w += (sign * step * *g as f64 / norm) as f32;
            }
            rig.params.write_with(&Cpu, |dev, master, _| dev.write(master.flat_mut(), &moved)).unwrap();
            rig.masked_loss(TRAIN, 1.0, false)
        };
        let slope = (loss_at(1.0) - loss_at(-1.0)) / (2.0 * step);
        let error = (slope - norm).abs() / norm;
        assert!(error < 0.02, "{name}: slope {slope}, gradient norm {norm}");
    }
}

/// The same through pooling, at every depth, by both rules.
#[test]
fn pooled_gradients_are_finite_differences() {
    let config = full_config();
    let cells = Cells::random(&config, &LENGTHS, 2);
    for (depth, pooling) in [(2, Pooling::Mean), (1, Pooling::Cls), (0, Pooling::Mean)] {
        let mut rig = Rig::<f32>::random(&config, CAPACITY);
        rig.upload(&cells);
        let values = cells.len() * config.width;
        let projection: Vec<f32> = (0..values).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
        let dh = Cpu.upload(&projection).unwrap();
        let mut h = Cpu.zeros::<f32>(values).unwrap();
        let mut loss = |rig: &mut Rig<f32>| {
            let input = rig.batch.input();
            rig.encoder.forward(rig.params.network(), input, &mut rig.acts, TRAIN, depth).unwrap();
            heads::pool(&Cpu, &config, pooling, &rig.batch, &rig.acts, depth, &mut h).unwrap();
            h.iter().zip(&projection).map(|(h, p)| *h as f64 * *p as f64).sum::<f64>()
        };
        loss(&mut rig);
        heads::pool_backward(&Cpu, &config, pooling, &rig.batch, &dh, &mut rig.acts).unwrap();
        let Rig { encoder, params, grads, acts, batch, .. } = &mut rig;
        encoder.backward(params.network(), batch.input(), acts, TRAIN, depth, grads.named_mut()).unwrap();

        let gradient = rig.grads.flat().to_vec();
        let norm = gradient.iter().map(|g| (*g as f64).powi(2)).sum::<f64>().sqrt();
        let weights = rig.params.master().flat().to_vec();
        let step = 2e-3;
        let mut loss_at = |sign: f64| {
            let moved: Vec<f32> = weights
                .iter()
                .zip(&gradient)
                .map(|(w, g)| *w + (sign * step * *g as f64 / norm) as f32)
                .collect();
            rig.params.write_with(&Cpu, |dev, master, _| dev.write(master.flat_mut(), &moved)).unwrap();
            loss(&mut rig)
        };
        let slope = (loss_at(1.0) - loss_at(-1.0)) / (2.0 * step);
        assert!((slope / norm - 1.0).abs() < 0.02, "depth {depth}: slope {slope}, gradient norm {norm}");
        let beyond = rig.gradient(if depth < 2 { "layer.1.up_weight" } else { "head.dense_weight" });
        assert!(beyond.iter().all(|g| *g == 0.0), "gradient beyond depth {depth}");
    }
}

fn rows_do_not_depend_on_the_batch<A: Act>()
where
    Cpu: cellrefine::ops::Backend<A>,
{
    let config = full_config();
    let mut rig = Rig::<A>::random(&config, CAPACITY);
    let cells = Cells::random(&config, &LENGTHS, 3);
    rig.upload(&cells);
    let packed = rig.hidden(Pass::Eval, 2);
    for cell in 0..cells.len() {
        rig.upload(&cells.part(cell..cell + 1));
        let rows = cells.cell_start[cell] as usize * config.width
            ..cells.cell_start[cell + 1] as usize * config.width;
        assert_same_bits(&format!("cell {cell}"), &rig.hidden(Pass::Eval, 2), &packed[rows]);
    }
}

#[test]
fn a_cell_has_the_same_bits_alone_and_in_company() {
    rows_do_not_depend_on_the_batch::<f32>();
    rows_do_not_depend_on_the_batch::<bf16>();
}

#[test]
fn evaluation_buffers_give_what_training_buffers_give() {
    let config = full_config();
    let mut rig = Rig::<f32>::random(&config, CAPACITY);
    let cells = Cells::random(&config, &LENGTHS, 4);
    rig.upload(&cells);
    for depth in 0..=2 {
        let want = rig.hidden(Pass::Eval, depth);
        let mut acts =
            Activations::<Cpu, f32>::evaluation(&mut Ledger::new(&Cpu), &config, CAPACITY).unwrap();
        rig.encoder.forward(rig.params.network(), rig.batch.input(), &mut acts, Pass::Eval, depth).unwrap();
        assert_same_bits(&format!("depth {depth}"), &acts.hidden(depth)[..want.len()], &want);
        let e = rig.encoder.backward(
            rig.params.network(),
            rig.batch.input(),
            &mut acts,
            Pass::Eval,
            depth,
            rig.grads.named_mut(),
        );
        assert!(e.is_err(), "backward over evaluation buffers");
    }
}

/// Layers that are run again before their backward give the same gradients, bit for bit, whatever dropout draws.
#[test]
fn recomputed_layers_give_the_same_bits() {
    let config = full_config();
    let cells = Cells::random(&config, &LENGTHS, 4);
    let pass = Pass::Train { seed: 5, step: 2, view: 0 };
    let run = |recompute: bool| {
        let mut rig = Rig::<f32>::random(&config, CAPACITY);
        rig.acts = Activations::training(&mut Ledger::new(&Cpu), &config, CAPACITY, recompute).unwrap();
        rig.upload(&cells);
        rig.mask();
        let loss = rig.masked_loss(pass, 1.0, true);
        (loss, rig.grads.flat().to_vec())
    };
    let ((kept_loss, kept), (loss, recomputed)) = (run(false), run(true));
    assert_eq!(loss.to_bits(), kept_loss.to_bits());
    assert!(kept.iter().any(|g| *g != 0.0));
    assert_same_bits("gradients", &recomputed, &kept);
}

/// A logical batch in one piece and in two: equal dropout and masking bits, so equal losses and states, and gradients that
/// differ only by the order of their sums.
#[test]
fn micro_batches_add_up_to_the_batch() {
    let config = full_config();
    let cells = Cells::random(&config, &LENGTHS, 5);
    let mut whole = Rig::<f32>::random(&config, CAPACITY);
    whole.upload(&cells);
    let masked = whole.mask();
    assert_eq!(MASKING.count(&config, &cells.gene, 0), masked);
    let scale = 1.0 / masked as f32;
    let want_loss = whole.masked_loss(TRAIN, scale, true);
    let want_hidden = whole.hidden(TRAIN, 2);

    let mut split = Rig::<f32>::random(&config, CAPACITY);
    let (mut loss, mut hidden, mut count) = (0.0, Vec::new(), 0);
    for range in [0..2, 2..5] {
        let part = cells.part(range.clone());
        split.upload(&part);
        split.batch.first_row = cells.cell_start[range.start] as u64;
        assert_eq!(MASKING.count(&config, &part.gene, split.batch.first_row), split.mask());
        count += split.head.masked();
        loss += split.masked_loss(TRAIN, scale, true);
        hidden.extend(split.hidden(TRAIN, 2));
    }
    assert_eq!(count, masked);
    assert_same_bits("hidden states under dropout", &hidden, &want_hidden);
    assert!((loss - want_loss).abs() < 1e-4 * want_loss.abs(), "{loss} {want_loss}");
    let largest = whole.grads.flat().iter().fold(0.0f32, |m, g| m.max(g.abs()));
    for (i, (a, b)) in split.grads.flat().iter().zip(whole.grads.flat().iter()).enumerate() {
        assert!((a - b).abs() <= 1e-5 * largest, "gradient {i}: {a} in parts, {b} in one");
    }
}

#[test]
fn views_and_steps_draw_different_dropout() {
    let config = full_config();
    let mut rig = Rig::<f32>::random(&config, CAPACITY);
    rig.upload(&Cells::random(&config, &LENGTHS, 6));
    let pass = |step, view| Pass::Train { seed: 5, step, view };
    let a = rig.hidden(pass(1, 0), 2);
    assert_same_bits("again", &rig.hidden(pass(1, 0), 2), &a);
    assert_ne!(rig.hidden(pass(1, 1), 2), a);
    assert_ne!(rig.hidden(pass(2, 0), 2), a);
    assert_ne!(rig.hidden(Pass::Eval, 2), a);
}

#[test]
fn bf16_is_near_f32() {
    let config = full_config();
    let cells = Cells::random(&config, &LENGTHS, 7);
    let mut full = Rig::<f32>::random(&config, CAPACITY);
    let mut half = Rig::<bf16>::random(&config, CAPACITY);
    full.upload(&cells);
    half.upload(&cells);
    let (a, b) = (full.hidden(Pass::Eval, 2), half.hidden(Pass::Eval, 2));
    let error: f64 = a.iter().zip(&b).map(|(a, b)| (*a as f64 - b.to_f32() as f64).powi(2)).sum();
    let size: f64 = a.iter().map(|a| (*a as f64).powi(2)).sum();
    assert!((error / size).sqrt() < 0.02, "relative error {}", (error / size).sqrt());
    assert_eq!((full.mask(), half.mask()), (full.head.masked(), full.head.masked()));
    let (a, b) = (full.masked_loss(TRAIN, 0.1, true), half.masked_loss(TRAIN, 0.1, true));
    assert!((a / b - 1.0).abs() < 0.02, "{a} {b}");
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| *x as f64 * *y as f64).sum::<f64>();
    let (x, y) = (full.grads.flat(), half.grads.flat());
    let cosine = dot(x, y) / (dot(x, x) * dot(y, y)).sqrt();
    assert!(cosine > 0.99, "cosine of the gradients {cosine}");
}

#[test]
fn threads_do_not_change_a_bit() {
    let config = full_config();
    let cells = Cells::random(&config, &LENGTHS, 8);
    let run = |threads: usize| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let mut rig = Rig::<f32>::random(&config, CAPACITY);
            rig.upload(&cells);
            rig.mask();
            let loss = rig.masked_loss(TRAIN, 1.0, true);
            (loss.to_bits(), rig.grads.flat().to_vec())
        })
    };
    let (one, two) = (run(1), run(3));
    assert_eq!(one.0, two.0);
    assert_same_bits("gradients", &two.1, &one.1);
}

fn save(folder: &std::path::Path, config: &ModelConfig, params: &Parameters<Cpu, f32>) {
    let vocabulary = Some(&b"# a vocabulary\n"[..]);
    let snapshot = Snapshot::of_model(&Cpu, config, params.layout(), params.master(), vocabulary).unwrap();
    snapshot.publish(folder).unwrap();
}

#[test]
fn a_checkpoint_comes_back_bit_for_bit_and_by_pointer() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let config = full_config();
    let params = Parameters::<Cpu, f32>::random(&Cpu, &config, 9).unwrap();
    save(&run.join("checkpoints/step-3"), &config, &params);
    assert!(checkpoint::resolve(&run).is_err(), "no pointer yet");
    checkpoint::point(&run, Pointer::Last, "step-3").unwrap();
    let folder = checkpoint::resolve(&run).unwrap();
    assert_eq!(folder, run.join("checkpoints/step-3"));
    let (c, p) = checkpoint::load::<Cpu, f32>(&Cpu, &folder, LoadOptions::default()).unwrap();
    assert_eq!(c, config);
    assert_same_bits("weights", p.master().flat(), params.master().flat());
    // Written again over itself: replaced, nothing left beside it.
    save(&folder, &config, &p);
    assert_eq!(std::fs::read_dir(run.join("checkpoints")).unwrap().count(), 1);
    let about = checkpoint::describe(&run).unwrap();
    assert_eq!(about["parameters"], params.layout().parameters());
    // A failed write leaves the old folder and nothing else.
    let failed = checkpoint::publish(&folder, |_| {
        Err(cellrefine::error::Error::new(cellrefine::error::Code::DiskFull, "disk full"))
    });
    assert!(failed.is_err() && folder.join("config.json").is_file());
    assert_eq!(std::fs::read_dir(run.join("checkpoints")).unwrap().count(), 1);
}

#[test]
fn a_rank_only_checkpoint_takes_values_on_request_and_computes_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("ranks");
    let ranks = small_config();
    let params = Parameters::<Cpu, f32>::random(&Cpu, &ranks, 9).unwrap();
    save(&folder, &ranks, &params);
    let (config, with_values) =
        checkpoint::load::<Cpu, f32>(&Cpu, &folder, LoadOptions { value_bins: Some(8) }).unwrap();
    assert_eq!(config.value_bins, 8);
    let cells = Cells::random(&ranks, &LENGTHS, 10);
    let mut a = Rig::new(&ranks, params, CAPACITY);
    let mut b = Rig::new(&config, with_values, CAPACITY);
    a.upload(&cells);
    b.upload(&cells);
    assert_same_bits("hidden states", &b.hidden(Pass::Eval, 2), &a.hidden(Pass::Eval, 2));
}

#[test]
fn a_checkpoint_that_does_not_fit_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model");
    let config = small_config();
    save(&folder, &config, &Parameters::<Cpu, f32>::random(&Cpu, &config, 9).unwrap());
    let refused = || {
        let e = checkpoint::load::<Cpu, f32>(&Cpu, &folder, LoadOptions::default()).err().expect("refused");
        assert_eq!(e.kind().exit_code(), 3, "{e}");
        e.to_string()
    };
    let write_config = |c: &ModelConfig| {
        std::fs::write(folder.join("config.json"), c.to_json().to_string()).unwrap();
    };
    let mut other = config.clone();
    other.layers = 3;
    write_config(&other);
    assert!(refused().contains("missing bert.encoder.layer.2."));
    other.layers = 1;
    write_config(&other);
    assert!(refused().contains("unexpected bert.encoder.layer.1."));
    other = config.clone();
    other.positions = 25;
    write_config(&other);
    assert!(refused().contains("position_embeddings.weight is [24, 64], not [25, 64]"));
    write_config(&config);
    let weights = folder.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 1]).unwrap();
    assert!(refused().contains("truncated"));
    std::fs::remove_file(&weights).unwrap();
    std::fs::write(folder.join("pytorch_model.bin"), b"x").unwrap();
    assert!(refused().contains("safe_serialization"));
    std::fs::write(folder.join("config.json"), b"{").unwrap();
    assert!(refused().contains("not valid JSON"));
    let e = checkpoint::resolve(&dir.path().join("nowhere")).unwrap_err();
    assert_eq!(e.kind().exit_code(), 3);
    assert!(checkpoint::resolve(dir.path()).unwrap_err().to_string().contains("model"));
}

#[test]
fn a_batch_beyond_the_buffers_is_an_error() {
    let config = small_config();
    let small = Capacity { tokens: 4, cells: 1 };
    let mut acts = Activations::<Cpu, f32>::evaluation(&mut Ledger::new(&Cpu), &config, small).unwrap();
    let params = Parameters::<Cpu, f32>::random(&Cpu, &config, 1).unwrap();
    let mut batch = DeviceBatch::new(&Cpu, &config, CAPACITY).unwrap();
    let cells = Cells::random(&config, &[7], 1);
    batch.upload_cells(&Cpu, &config, &cells.gene, &cells.cell_start, None).unwrap();
    let encoder = Encoder::new(Cpu, config);
    let e = encoder.forward(params.network(), batch.input(), &mut acts, Pass::Eval, 2).unwrap_err();
    assert!(e.to_string().contains("does not fit"));
}
