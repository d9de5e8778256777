//! A network that learns can memorise a few cells: forward, backward, gradient norm, clipping and AdamW in one loop.

mod common;

use cellrefine::cpu::Cpu;
use cellrefine::device::{Act, Device};
use cellrefine::model::{Capacity, Pass, Store};
use cellrefine::ops::{Backend, adamw, reduce};
use common::network::{Cells, Rig, small_config};
use half::bf16;

/// Loss per masked gene before and after `steps` steps on four cells, the masking held still.
fn train<A: Act>(steps: u32) -> (f64, f64)
where
    Cpu: Backend<A>,
{
    let mut config = small_config();
    config.initializer_range = 0.02;
    let capacity = Capacity { tokens: 96, cells: 4 };
    let mut rig = Rig::<A>::random(&config, capacity);
    let cells = Cells::random(&config, &[24, 20, 17, 24], 21);
    rig.upload(&cells);
    let masked = rig.mask();
    let scale = 1.0 / masked as f32;
    let mut m = Store::<Cpu, f32>::zeros(&Cpu, rig.params.layout()).unwrap();
    let mut v = Store::<Cpu, f32>::zeros(&Cpu, rig.params.layout()).unwrap();
    let mut scalars = Cpu.zeros::<f64>(1).unwrap();
    let first = rig.masked_loss(Pass::Eval, scale, false) / masked as f64;
    for step in 1..=steps {
        Cpu.clear(rig.grads.flat_mut()).unwrap();
        rig.masked_loss(Pass::Train { seed: 1, step, view: 0 }, scale, true);
        let len = rig.params.layout().len();
        reduce::sum_squares(&Cpu, rig.grads.flat(), len, &mut scalars, 0).unwrap();
        let update = rig.params.update();
        let ranges = [(update.layout.decayed(), 0.01), (update.layout.undecayed(), 0.0)];
        let mut copy = update.copy;
        for (range, weight_decay) in ranges {
            let hyper = adamw::Hyper {
                learning_rate: 2e-3,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay,
                step,
                max_norm: 1.0,
                norm_slot: 0,
            };
            let state = adamw::State {
                weight: update.weight,
                grad: rig.grads.flat(),
                m: m.flat_mut(),
                v: v.flat_mut(),
                copy: copy.as_deref_mut(),
                scalars: &scalars,
            };
            adamw::step::<A, Cpu>(&Cpu, range, hyper, state).unwrap();
        }
    }
    (first, rig.masked_loss(Pass::Eval, scale, false) / masked as f64)
}

#[test]
fn four_cells_are_memorised() {
    let (before, after) = train::<f32>(200);
    assert!((3.3..4.3).contains(&before), "an untrained network knows nothing: ln 44 = 3.8, not {before}");
    assert!(after < 0.05, "loss {after} after 200 steps, {before} before");
}

#[test]
fn in_bf16_too() {
    let (before, after) = train::<bf16>(200);
    assert!(before > 3.3 && after < 0.1, "{before} -> {after}");
}
