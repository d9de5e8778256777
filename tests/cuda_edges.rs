//! The edges of the CUDA backend, in the emulator: what its kernels cannot take, calls with nothing to do, gradients that are not asked
//! for, kernels that fail.
#![cfg(emulator)]

use cellrefine::cuda::Cuda;
use cellrefine::device::{Device, Dropout};
use cellrefine::ops::{adamw, embed, layernorm, mask_tokens, prototype_loss, rows, structure};

/// Each op names what is too large for its kernels; nothing is launched.
#[test]
fn widths_beyond_the_kernels_are_refused() {
    let dev = Cuda::emulated().unwrap();
    let width = 12_296;
    let zeros = |n| dev.zeros::<f32>(n).unwrap();
    let (x, mut a, mut b, [mut c, mut d]) = (zeros(width), zeros(width), zeros(width), [zeros(1), zeros(1)]);
    let dims = layernorm::Dims { rows: 1, width, eps: 1e-5 };
    let read = layernorm::In { residual: None, weight: &x, bias: &x, dropout: Dropout::NONE };
    let out = layernorm::Out { x_then_sum: &mut a, y: &mut b, mean: &mut c, rstd: &mut d };
    let e = layernorm::forward(&dev, dims, read, out).unwrap_err();
    assert!(e.to_string().contains("too wide for the LayerNorm kernels"), "{e}");
    let dims = structure::Dims { prototypes: 1, width, c0: 0.0, c1: 1.0, scale: 1.0 };
    let e = structure::forward_backward(&dev, dims, &x, &x, &mut c, &mut a).unwrap_err();
    assert!(e.to_string().contains("too wide for the structure kernel"), "{e}");
    let dims = prototype_loss::Dims { rows: 1, columns: 1, width, gradient_scale: 1.0, bias_in_target: true };
    let e = prototype_loss::lse(&dev, dims, &x, &x, 1.0, &mut c).unwrap_err();
    assert!(e.to_string().contains("too wide for the softmax loss kernels"), "{e}");
}

/// A kernel that leaves its buffers ends as an error that says where and by how much, and the device goes on.
#[test]
fn a_kernel_that_fails_is_reported() {
    let dev = Cuda::emulated().unwrap();
    let dims = rows::Dims { rows: 4, gathered: 1, width: 16 };
    let (x, mut y) = (dev.zeros::<f32>(4 * 16).unwrap(), dev.zeros::<f32>(16).unwrap());
    let mut gather = |index: u32| {
        let index = dev.upload(&[index]).unwrap();
        rows::gather(&dev, dims, &x, &index, &mut y)
    };
    let e = gather(4).unwrap_err().to_string();
    assert!(
        e.contains("kernels/rows.cu: rows_gather (f32)") && e.contains("past the end of one of 256"),
        "{e}"
    );
    let e = gather(1 << 29).unwrap_err().to_string();
    assert!(e.contains("rows_gather") && e.contains("addresses inside a buffer"), "{e}");
    gather(3).unwrap();
    assert_eq!(dev.zeros::<f64>(usize::MAX / 4).err().unwrap().kind().exit_code(), 4);
}

/// Each gradient of the columns is the same whichever others are asked for.
#[test]
fn column_gradients_do_without_one_another() {
    let dev = Cuda::emulated().unwrap();
    let (rows, columns, width) = (9, 5, 8);
    let some = |n: usize, by: usize| {
        let x: Vec<f32> = (0..n).map(|i| ((i * by) % 23) as f32 / 11.0 - 1.0).collect();
        dev.upload(&x).unwrap()
    };
    let (z, column, scale) = (some(rows * width, 7), some(columns * width, 5), some(columns, 3));
    let weight = dev.upload(&vec![0.5f32; rows]).unwrap();
    let target = dev.upload(&(0..rows as i32).map(|i| i % columns as i32).collect::<Vec<_>>()).unwrap();
    let lse = some(rows, 2);
    let dims = prototype_loss::Dims { rows, columns, width, gradient_scale: 1.0, bias_in_target: true };
    let backward = |with_bias: bool, with_scale: bool| {
        let target = prototype_loss::Target::Sparse {
            entries: 1,
            column: &target,
            mass: None,
            mix: None,
            teacher: None,
        };
        let input = prototype_loss::In {
            z: &z,
            column: &column,
            scale: Some(&scale),
            bias: None,
            margin: None,
            row_weight: &weight,
            target,
        };
        let zeros = |n| dev.zeros::<f32>(n).unwrap();
        let (mut dcolumn, mut dbias, mut dscale) = (zeros(columns * width), zeros(columns), zeros(columns));
        let grads = prototype_loss::ColumnGradients {
            column: &mut dcolumn,
            bias: with_bias.then_some(&mut dbias),
            scale: with_scale.then_some(&mut dscale),
        };
        prototype_loss::backward(&dev, dims, input, &lse, grads).unwrap();
        [dcolumn, dbias, dscale].map(|b| dev.download(&b).unwrap())
    };
    let [dcolumn, dbias, dscale] = backward(true, true);
    assert!([&dcolumn, &dbias, &dscale].iter().all(|g| g.iter().any(|x| x.abs() > 1e-3)));
    let none = vec![0.0; columns];
    for (with_bias, with_scale) in [(true, false), (false, true), (false, false)] {
        let pick = |with: bool, g: &Vec<f32>| if with { g.clone() } else { none.clone() };
        let want = [dcolumn.clone(), pick(with_bias, &dbias), pick(with_scale, &dscale)];
        assert_eq!(backward(with_bias, with_scale), want, "bias {with_bias}, scale {with_scale}");
    }
}

/// A part without tokens, a batch without cells, a range without parameters: nothing is launched, nothing is touched.
#[test]
fn empty_calls_touch_nothing() {
    let dev = Cuda::emulated().unwrap();
    let ones = || dev.upload(&[1.0f32; 8]).unwrap();
    let (x, [mut a, mut b, mut c, mut d, mut e]) = (ones(), [(); 5].map(|()| ones()));
    let dims = layernorm::Dims { rows: 0, width: 8, eps: 1e-5 };
    let read = layernorm::In { residual: None, weight: &x, bias: &x, dropout: Dropout::NONE };
    let out = layernorm::Out { x_then_sum: &mut a, y: &mut b, mean: &mut c, rstd: &mut d };
    layernorm::forward(&dev, dims, read, out).unwrap();
    let read = layernorm::BackwardIn {
        dy: &x,
        sum: &x,
        mean: &x,
        rstd: &x,
        weight: &x,
        dropout: Dropout::NONE,
        relu_input: false,
    };
    let grads = layernorm::Gradients { dx: &mut a, dresidual: None, dweight: &mut b, dbias: &mut c };
    layernorm::backward(&dev, dims, read, grads).unwrap();

    let none = dev.zeros::<u32>(1).unwrap();
    let dims = embed::Dims { tokens: 0, width: 8, vocab: 1, positions: 1, value_bins: 0, eps: 1e-5 };
    let two = dev.upload(&[1.0f32; 16]).unwrap();
    let tables = || embed::Tables {
        gene: &none,
        position: &none,
        value_bin: None,
        word: &x,
        position_table: &x,
        type_table: &two,
        value_table: None,
        weight: &x,
        bias: &x,
        dropout: Dropout::NONE,
    };
    embed::forward(&dev, dims, tables(), embed::Out { x: &mut a, mean: &mut b, rstd: &mut c }).unwrap();
    let mut dtype = dev.upload(&[1.0f32; 16]).unwrap();
    let grads = embed::Gradients {
        word: &mut a,
        position_table: &mut b,
        type_table: &mut dtype,
        value_table: None,
        weight: &mut c,
        bias: &mut d,
    };
    let read = embed::BackwardIn { dx: &x, mean: &x, rstd: &x };
    embed::backward(&dev, dims, tables(), read, grads).unwrap();

    let dims = mask_tokens::Dims {
        tokens: 0,
        vocab: 9,
        first_gene: 2,
        mask_id: 1,
        probability: 0.5,
        mask_share: 1.0,
        random_share: 0.0,
        seed: 1,
        step: 1,
        first_row: 0,
    };
    let (mut gene, mut index, mut place) =
        (dev.upload(&[7u32]).unwrap(), dev.upload(&[7u32]).unwrap(), dev.upload(&[7i32]).unwrap());
    let out = mask_tokens::Out { gene: &mut gene, index: &mut index, target: &mut place };
    mask_tokens::mask(&dev, dims, &none, out).unwrap();
    assert_eq!((dev.download(&gene).unwrap()[0], dev.download(&index).unwrap()[0]), (7, 7));

    let hyper = adamw::Hyper {
        learning_rate: 1.0,
        beta1: 0.9,
        beta2: 0.9,
        eps: 1e-8,
        weight_decay: 1.0,
        step: 1,
        max_norm: 1.0,
        norm_slot: 0,
    };
    let scalars = dev.zeros::<f64>(1).unwrap();
    let state =
        adamw::State { weight: &mut a, grad: &x, m: &mut b, v: &mut c, copy: None, scalars: &scalars };
    adamw::step::<f32, Cuda>(&dev, 3..3, hyper, state).unwrap();

    let dims =
        prototype_loss::Dims { rows: 0, columns: 1, width: 8, gradient_scale: 1.0, bias_in_target: true };
    let target = dev.zeros::<i32>(1).unwrap();
    let input = || prototype_loss::In {
        z: &x,
        column: &x,
        scale: None,
        bias: None,
        margin: None,
        row_weight: &x,
        target: prototype_loss::Target::Sparse {
            entries: 1,
            column: &target,
            mass: None,
            mix: None,
            teacher: None,
        },
    };
    let out = prototype_loss::Out { loss: &mut a, lse: &mut b, dz: &mut c, accumulate_dz: false };
    prototype_loss::forward(&dev, dims, input(), out).unwrap();
    let grads = prototype_loss::ColumnGradients { column: &mut d, bias: Some(&mut e), scale: None };
    prototype_loss::backward(&dev, dims, input(), &x, grads).unwrap();
    for buf in [&a, &b, &c, &d, &e] {
        assert_eq!(dev.download(buf).unwrap(), [1.0; 8]);
    }
    assert_eq!(dev.download(&dtype).unwrap(), [1.0; 16]);
}

#[test]
fn the_emulators_settings_are_checked() {
    let run = |name: &str, value: &str| {
        let mut command = assert_cmd::Command::new(env!("CARGO_BIN_EXE_cellrefine"));
        command.args(["bench", "step", "--device", "emulated", "--preset", "tiny"]).env(name, value);
        let out = command.output().unwrap();
        (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let (code, text) = run("CELLREFINE_EMULATOR_SCHEDULE", "sooner");
    assert!(code == Some(2) && text.contains("late, reversed or eager"), "{code:?} {text}");
    let (code, text) = run("CELLREFINE_EMULATOR_LIBRARY", "/no/such/kernels.so");
    assert!(code == Some(3) && text.contains("/no/such/kernels.so"), "{code:?} {text}");
}
