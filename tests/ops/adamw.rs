//! AdamW: its formula in f64, torch.optim.AdamW, no step on a bad norm, the rounded copy.

use crate::ActSample;
use crate::common::cases;
use crate::common::close::{assert_close, assert_same_bits, wide};
use crate::common::guarded::{input, poisoned};
use cellrefine::ops::{adamw, reduce};

on_every_backend!(A: follows_the_formula, rounding_copies_all_weights);
on_emulated!(A: follows_the_formula, rounding_copies_all_weights);
mutants!("adamw");
on_every_backend!(equals_torch);
on_emulated!(equals_torch);

fn follows_the_formula<B: adamw::AdamW<A>, A: ActSample>(dev: &B) {
    for len in [1usize, 17, 255, 40_000] {
        let range = len / 4..len;
        let (mut w, mut m, mut v) = (cases::normal::<f32>(1, len, 1.0), vec![0.0f32; len], vec![0.0f32; len]);
        let (mut w64, mut m64, mut v64) = (wide(&w), wide(&m), wide(&v));
        for step in 1..=3u32 {
            let grad = cases::normal::<f32>(10 + step as u64, len, 1.0);
            let norm: f64 = grad.iter().map(|g| (*g as f64).powi(2)).sum();
            let hyper = adamw::Hyper {
                learning_rate: 0.01,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.1,
                step,
                max_norm: if step == 2 { f32::INFINITY } else { 0.5 },
                norm_slot: 1,
            };
            let (mut w_buf, mut m_buf, mut v_buf) = (input(dev, &w), input(dev, &m), input(dev, &v));
            let (g_buf, mut copy) = (input(dev, &grad), poisoned::<B, A>(dev, len));
            let scalars = input(dev, &[f64::NAN, norm]);
            let state = adamw::State {
                weight: w_buf.buf_mut(),
                grad: g_buf.buf(),
                m: m_buf.buf_mut(),
                v: v_buf.buf_mut(),
                copy: Some(copy.buf_mut()),
                scalars: scalars.buf(),
            };
            adamw::step(dev, range.clone(), hyper, state).unwrap();
            let clip = (hyper.max_norm as f64 / (norm.sqrt() + 1e-6)).min(1.0);
            let (b1, b2) = (hyper.beta1 as f64, hyper.beta2 as f64);
            for i in range.clone() {
                let g = clip * grad[i] as f64;
                m64[i] = b1 * m64[i] + (1.0 - b1) * g;
                v64[i] = b2 * v64[i] + (1.0 - b2) * g * g;
                let (m_hat, v_hat) =
                    (m64[i] / (1.0 - b1.powi(step as i32)), v64[i] / (1.0 - b2.powi(step as i32)));
                let (lr, decay) = (hyper.learning_rate as f64, hyper.weight_decay as f64);
                w64[i] -= lr * (m_hat / (v_hat.sqrt() + hyper.eps as f64) + decay * w64[i]);
            }
            (w, m, v) = (w_buf.read(), m_buf.read(), v_buf.read());
            assert_close("weight", &w, &w64, 1e-6, 1e-5);
            assert_close("m", &m, &m64, 1e-7, 1e-5);
            assert_close("v", &v, &v64, 1e-9, 1e-4);
            let copied = copy.read();
            for i in 0..len {
                let want = if range.contains(&i) { A::from_f32(w[i]) } else { A::POISON };
                assert_same_bits("rounded copy", &copied[i..=i], &[want]);
            }
        }
        // A gradient norm that is not finite: nothing moves.
        for bad in [f64::NAN, f64::INFINITY] {
            let (mut w_buf, mut m_buf, mut v_buf) = (input(dev, &w), input(dev, &m), input(dev, &v));
            let (g_buf, scalars) = (input(dev, &vec![1.0f32; len]), input(dev, &[bad]));
            let hyper = adamw::Hyper {
                learning_rate: 0.01,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.1,
                step: 4,
                max_norm: 1.0,
                norm_slot: 0,
            };
            let state = adamw::State {
                weight: w_buf.buf_mut(),
                grad: g_buf.buf(),
                m: m_buf.buf_mut(),
                v: v_buf.buf_mut(),
                copy: None,
                scalars: scalars.buf(),
            };
            adamw::step::<A, B>(dev, 0..len, hyper, state).unwrap();
            assert_same_bits("weight after a bad step", &w_buf.read(), &w);
            assert_same_bits("m after a bad step", &m_buf.read(), &m);
            assert_same_bits("v after a bad step", &v_buf.read(), &v);
        }
    }
}

/// `round` copies everything after a load.
fn rounding_copies_all_weights<B: adamw::AdamW<A>, A: ActSample>(dev: &B) {
    let w = cases::normal::<f32>(1, 40_001, 1.0);
    let (w_buf, mut copy) = (input(dev, &w), poisoned::<B, A>(dev, w.len()));
    adamw::AdamW::<A>::round(dev, w_buf.buf(), copy.buf_mut()).unwrap();
    let want: Vec<A> = w.iter().map(|w| A::from_f32(*w)).collect();
    assert_same_bits("copy", &copy.read(), &want);
}

/// Five clipped steps against torch.optim.AdamW (scripts/golden/make_adamw.py).
fn equals_torch<B: adamw::AdamW<f32> + reduce::Reduce>(dev: &B) {
    let golden: serde_json::Value = serde_json::from_str(include_str!("../golden/adamw.json")).unwrap();
    let number = |name: &str| golden[name].as_f64().unwrap() as f32;
    let list =
        |v: &serde_json::Value| v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect::<Vec<_>>();
    let narrow = |v: &serde_json::Value| list(v).iter().map(|x| *x as f32).collect::<Vec<_>>();
    let start = narrow(&golden["start"]);
    let mut w = input(dev, &start);
    let (mut m, mut v) = (input(dev, &vec![0.0f32; start.len()]), input(dev, &vec![0.0f32; start.len()]));
    for (i, grad) in golden["grads"].as_array().unwrap().iter().enumerate() {
        let g = input(dev, &narrow(grad));
        let mut scalars = input(dev, &[0.0f64]);
        reduce::sum_squares(dev, g.buf(), start.len(), scalars.buf_mut(), 0).unwrap();
        let hyper = adamw::Hyper {
            learning_rate: number("learning_rate"),
            beta1: number("beta1"),
            beta2: number("beta2"),
            eps: number("eps"),
            weight_decay: number("weight_decay"),
            step: i as u32 + 1,
            max_norm: number("max_norm"),
            norm_slot: 0,
        };
        let state = adamw::State::<B, f32> {
            weight: w.buf_mut(),
            grad: g.buf(),
            m: m.buf_mut(),
            v: v.buf_mut(),
            copy: None,
            scalars: scalars.buf(),
        };
        adamw::step(dev, 0..start.len(), hyper, state).unwrap();
        assert_close(
            &format!("weights after step {}", i + 1),
            &w.read(),
            &list(&golden["weights"][i]),
            1e-7,
            1e-6,
        );
    }
    assert_close("m", &m.read(), &list(&golden["m"]), 1e-8, 1e-5);
    assert_close("v", &v.read(), &list(&golden["v"]), 1e-10, 1e-5);
}
