//! The network against `transformers`' BertForMaskedLM: a checkpoint it saved, cells it ran padded in float64, and every
//! hidden state, logit and parameter gradient it found (`scripts/golden/make_parity.py`). Ours are packed, in f32.

mod common;

use cellrefine::cpu::Cpu;
use cellrefine::model::snapshot::Snapshot;
use cellrefine::model::tensors::TensorFile;
use cellrefine::model::{Capacity, Pass, checkpoint};
use common::close::assert_close;
use common::network::{Cells, Rig};
use half::f16;
use std::path::PathBuf;

fn golden() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/parity"))
}

fn integers(file: &TensorFile, name: &str) -> Vec<i32> {
    file.bytes(name).unwrap().as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect()
}

fn floats(file: &TensorFile, name: &str) -> Vec<f64> {
    let shape = file.info(name).unwrap_or_else(|| panic!("{name}")).shape.clone();
    file.floats(name, &shape).unwrap().into_iter().map(f64::from).collect()
}

/// Within 1e-4 of the tensor's largest element, or of `floor` where that is larger.
#[track_caller]
fn assert_near(name: &str, got: &[f32], want: &[f64], floor: f64) {
    let largest = want.iter().fold(floor, |m, w| m.max(w.abs()));
    assert_close(name, got, want, 1e-4 * largest, 0.0);
}

fn rig_and_expected() -> (Rig<f32>, TensorFile) {
    let expected = TensorFile::open(&golden().join("expected.safetensors")).unwrap();
    let (config, params) = checkpoint::load::<Cpu, f32>(&Cpu, &golden(), Default::default()).unwrap();
    let gene: Vec<u32> = integers(&expected, "input_ids").iter().map(|x| *x as u32).collect();
    let cell_start: Vec<u32> = integers(&expected, "cell_start").iter().map(|x| *x as u32).collect();
    let cells = Cells { value: vec![f16::ZERO; gene.len()], gene, cell_start };
    let mut rig = Rig::new(&config, params, Capacity { tokens: cells.tokens() + 3, cells: cells.len() });
    rig.upload(&cells);
    (rig, expected)
}

#[test]
fn hidden_states_of_every_layer() {
    let (mut rig, expected) = rig_and_expected();
    for depth in 0..=2 {
        let name = format!("hidden.{depth}");
        let hidden = rig.hidden(Pass::Eval, depth);
        assert_near(&name, &hidden, &floats(&expected, &name), 0.0);
    }
}

#[test]
fn masked_gene_loss_and_every_gradient() {
    let (mut rig, expected) = rig_and_expected();
    let gene: Vec<u32> = integers(&expected, "input_ids").iter().map(|x| *x as u32).collect();
    let index: Vec<u32> = integers(&expected, "masked_index").iter().map(|x| *x as u32).collect();
    let target = integers(&expected, "target");
    rig.head.given(&Cpu, &gene, &index, &target).unwrap();
    let masked = index.len();
    let loss = rig.masked_loss(Pass::Eval, 1.0 / masked as f32, true);
    assert_near("loss", &[(loss / masked as f64) as f32], &floats(&expected, "loss"), 0.0);

    // The logits are never stored: each row's loss is what they say it is.
    let logits = floats(&expected, "logits");
    for (m, row) in logits.chunks(rig.encoder.config.vocab).enumerate() {
        let largest = row.iter().copied().fold(f64::MIN, f64::max);
        let lse = largest + row.iter().map(|x| (x - largest).exp()).sum::<f64>().ln();
        let want = lse - row[target[m] as usize];
        assert_near("loss of a masked token", &[rig.head.loss()[m]], &[want], 1.0);
    }

    let largest = expected
        .names()
        .iter()
        .filter(|n| n.starts_with("grad."))
        .flat_map(|n| floats(&expected, n))
        .fold(0.0f64, |m, x| m.max(x.abs()));
    let layout = rig.params.layout().list();
    let mut compared = 0;
    for (parameter, range) in layout {
        let gradient = &rig.grads.flat()[range.clone()];
        let part = gradient.len() / parameter.stored_as.len();
        for (got, name) in gradient.chunks(part).zip(&parameter.stored_as) {
            // Keys may shift by any constant without effect: the true gradient of their bias is zero, hence the floor.
            assert_near(name, got, &floats(&expected, &format!("grad.{name}")), 1e-3 * largest);
            compared += 1;
        }
    }
    assert_eq!(compared, expected.names().iter().filter(|n| n.starts_with("grad.")).count());
}

/// Leaves the golden model, as this program writes it, in cargo's folder for test files, where
/// `scripts/golden/check_hf_roundtrip.py` looks at it with `transformers`; here it must hold the same tensors.
#[test]
fn written_again_the_checkpoint_has_the_same_tensors() {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("hf-roundtrip");
    let (config, params) = checkpoint::load::<Cpu, f32>(&Cpu, &golden(), Default::default()).unwrap();
    let snapshot = Snapshot::of_model(&Cpu, &config, params.layout(), params.master(), None).unwrap();
    snapshot.publish(&folder).unwrap();
    let ours = TensorFile::open(&folder.join("model.safetensors")).unwrap();
    let theirs = TensorFile::open(&golden().join("model.safetensors")).unwrap();
    assert_eq!(ours.names(), theirs.names());
    assert_eq!(ours.metadata()["format"], "pt");
    for name in ours.names() {
        assert_eq!(floats(&ours, &name), floats(&theirs, &name), "{name}");
    }
}
