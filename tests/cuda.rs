//! The CUDA backend around its kernels: buffers, recorded work, and what is said where a GPU, its driver or its code is missing.

use assert_cmd::Command;
use std::path::Path;

#[cfg(emulator)]
mod emulated {
    use cellrefine::cuda::{Cuda, Schedule};
    use cellrefine::device::{Device, Dropout, Len, Queue};
    use cellrefine::error::Result;
    use cellrefine::model::config::{PRESETS, Vocabulary};
    use cellrefine::model::{Capacity, DeviceBatch};
    use cellrefine::ops::{layernorm, linear, reduce};

    const ROWS: usize = 37;
    const WIDTH: usize = 24;

    #[test]
    fn buffers_are_zeroed_and_parts_share_memory() {
        let dev = Cuda::emulated().unwrap();
        let mut buf = dev.zeros::<f32>(100).unwrap();
        assert_eq!(dev.download(&buf).unwrap(), vec![0.0; 100]);
        dev.write(&mut buf, &[1.0, 2.0]).unwrap();
        // SAFETY: the part is read while nothing else is used.
        let part = unsafe { dev.part(&buf, 1..3) };
        assert_eq!((part.len(), dev.download(&part).unwrap()), (2, vec![2.0, 0.0]));
        let mut copy = dev.zeros::<f32>(2).unwrap();
        dev.copy(&part, &mut copy, 2).unwrap();
        dev.clear(&mut buf).unwrap();
        assert_eq!(dev.download(&copy).unwrap(), [2.0, 0.0]);
        drop(buf);
        assert_eq!(dev.download(&part).unwrap(), [0.0, 0.0], "a part keeps its memory");
        assert!(dev.write(&mut copy, &[0.0; 3]).is_err() && dev.read(&copy, &mut [0.0; 3]).is_err());
        assert!(dev.zeros::<f64>(0).unwrap().is_empty());
        assert_eq!(dev.zeros::<f64>(usize::MAX / 64).err().unwrap().kind().exit_code(), 4);
    }

    /// Events are all that orders the two queues: what one forgets to wait for is an error, however the copies are timed.
    #[test]
    fn uploads_beside_the_work_keep_to_their_events() {
        for schedule in Schedule::ALL {
            let dev = Cuda::emulated_with(schedule).unwrap();
            let mut buf = dev.zeros::<f32>(4).unwrap();
            let mut other = dev.zeros::<f32>(4).unwrap();
            let refused = |r: Result<()>| r.err().map(|e| e.to_string()).unwrap_or_default();
            // The zeroing is work that has to be over.
            let e = refused(dev.write_beside(&mut buf, &[1.0; 4]));
            assert!(e.contains("queued work may still use"), "{e}");
            let mut read = dev.event(Queue::Compute).unwrap();
            dev.wait(&read, Queue::Copies).unwrap();
            dev.write_beside(&mut buf, &[1.0; 4]).unwrap();
            let filled = dev.event(Queue::Copies).unwrap();
            let e = refused(dev.copy(&buf, &mut other, 4));
            assert!(e.contains("whose upload it has not waited for"), "{e}");
            // A second upload behind the event is not covered by it.
            let mut third = dev.zeros::<f32>(1).unwrap();
            dev.wait(&dev.event(Queue::Compute).unwrap(), Queue::Copies).unwrap();
            dev.write_beside(&mut third, &[3.0]).unwrap();
            dev.wait(&filled, Queue::Compute).unwrap();
            assert!(!refused(dev.read(&third, &mut [0.0])).is_empty());
            dev.copy(&buf, &mut other, 4).unwrap();
            assert_eq!(dev.download(&other).unwrap(), [1.0; 4], "{schedule:?}");
            // The copy read the buffer: the next upload waits for it.
            dev.wait(&read, Queue::Copies).unwrap();
            assert!(!refused(dev.write_beside(&mut buf, &[2.0])).is_empty(), "an event of before the work");
            dev.record(&mut read, Queue::Compute).unwrap();
            dev.wait(&read, Queue::Copies).unwrap();
            dev.write_beside(&mut buf, &[2.0]).unwrap();
            dev.wait(&dev.event(Queue::Copies).unwrap(), Queue::Compute).unwrap();
            assert_eq!(dev.download(&buf).unwrap(), [2.0, 1.0, 1.0, 1.0]);
            assert_eq!(dev.download(&third).unwrap(), [3.0]);
            // Memory that goes takes its uploads along.
            dev.write_beside(&mut third, &[4.0]).unwrap_err();
            dev.wait(&dev.event(Queue::Compute).unwrap(), Queue::Copies).unwrap();
            dev.write_beside(&mut third, &[4.0]).unwrap();
            drop(third);
            dev.wait(&dev.event(Queue::Copies).unwrap(), Queue::Compute).unwrap();
        }
    }

    #[test]
    fn the_next_batch_comes_in_beside_the_work_on_this_one() {
        let dev = Cuda::emulated().unwrap();
        let config = PRESETS[0].config(20, Vocabulary::default());
        let batch = || DeviceBatch::new(&dev, &config, Capacity { tokens: 8, cells: 2 }).unwrap();
        let (mut this, mut next) = (batch(), batch());
        let mut read = dev.zeros::<u32>(8).unwrap();
        this.upload_cells(&dev, &config, &[5, 6, 7], &[0, 3], None).unwrap();
        dev.copy(&this.gene, &mut read, 8).unwrap();
        this.retire(&dev).unwrap();
        next.fill(&dev, &config, &[8, 9], &[0, 2], None).unwrap();
        // That upload did not wait for the work on `this`: another one, to `this` itself, would come too early.
        assert!(dev.write_beside(&mut this.gene, &[0]).is_err());
        dev.copy(&next.gene, &mut read, 2).unwrap();
        this.fill(&dev, &config, &[4], &[0, 1], None).unwrap();
        dev.copy(&this.gene, &mut read, 1).unwrap();
        assert_eq!(dev.download(&read).unwrap()[..3], [4, 9, 7]);
    }

    #[test]
    fn a_later_read_is_of_its_own_moment() {
        let dev = Cuda::emulated().unwrap();
        let mut buf = dev.upload(&[1.0f64, 2.0]).unwrap();
        let before = dev.read_later(&buf).unwrap();
        dev.write(&mut buf, &[3.0]).unwrap();
        let after = dev.read_later(&buf).unwrap();
        drop(buf);
        assert_eq!((after().unwrap(), before().unwrap()), (vec![3.0, 2.0], vec![1.0, 2.0]));
    }

    /// A small step: product, LayerNorm with a gradient through workspace, sum, clear and copy.
    struct Step {
        dev: Cuda,
        x: cellrefine::cuda::Buf<f32>,
        weight: cellrefine::cuda::Buf<f32>,
        y: cellrefine::cuda::Buf<f32>,
        normal: cellrefine::cuda::Buf<f32>,
        stat: [cellrefine::cuda::Buf<f32>; 2],
        dx: cellrefine::cuda::Buf<f32>,
        grad: [cellrefine::cuda::Buf<f32>; 2],
        scalars: cellrefine::cuda::Buf<f64>,
    }

    impl Step {
        fn new() -> Self {
            let dev = Cuda::emulated().unwrap();
            let zeros = |n| dev.zeros::<f32>(n).unwrap();
            let x: Vec<f32> = (0..ROWS * WIDTH).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
            let weight: Vec<f32> = (0..WIDTH * WIDTH).map(|i| ((i * 53) % 97) as f32 / 48.0 - 1.0).collect();
            Step {
                x: dev.upload(&x).unwrap(),
                weight: dev.upload(&weight).unwrap(),
                y: zeros(ROWS * WIDTH),
                normal: zeros(ROWS * WIDTH),
                stat: [zeros(ROWS), zeros(ROWS)],
                dx: zeros(ROWS * WIDTH),
                grad: [zeros(WIDTH), zeros(WIDTH)],
                scalars: dev.zeros(1).unwrap(),
                dev,
            }
        }

        fn run(&mut self) -> Result<()> {
            let dev = &self.dev;
            let dims = linear::Dims { rows: ROWS, inputs: WIDTH, outputs: WIDTH };
            let input = linear::In {
                x: &self.x,
                weight: &self.weight,
                bias: None,
                activation: linear::Activation::None,
            };
            linear::forward(dev, dims, input, &mut self.y)?;
            let dims = layernorm::Dims { rows: ROWS, width: WIDTH, eps: 1e-5 };
            let [mean, rstd] = &mut self.stat;
            let input = layernorm::In {
                residual: None,
                weight: &self.weight,
                bias: &self.weight,
                dropout: Dropout { probability: 0.1, seed: 1, step: 2, site: 3, first_row: 0 },
            };
            let out = layernorm::Out { x_then_sum: &mut self.y, y: &mut self.normal, mean, rstd };
            layernorm::forward(dev, dims, input, out)?;
            let [dweight, dbias] = &mut self.grad;
            dev.clear(dweight)?;
            let input = layernorm::BackwardIn {
                dy: &self.normal,
                sum: &self.y,
                mean: &self.stat[0],
                rstd: &self.stat[1],
                weight: &self.weight,
                dropout: Dropout::NONE,
                relu_input: false,
            };
            let grads = layernorm::Gradients { dx: &mut self.dx, dresidual: None, dweight, dbias };
            layernorm::backward(dev, dims, input, grads)?;
            dev.copy(&self.dx, &mut self.normal, WIDTH)?;
            reduce::sum_squares(dev, &self.normal, ROWS * WIDTH, &mut self.scalars, 0)
        }

        /// dweight, dbias, and the sum.
        fn results(&self) -> (Vec<f32>, Vec<f32>, f64) {
            let get = |b| self.dev.download::<f32>(b).unwrap();
            (get(&self.grad[0]), get(&self.grad[1]), self.dev.download(&self.scalars).unwrap()[0])
        }
    }

    #[test]
    fn recorded_work_runs_when_it_is_replayed_and_as_often() {
        let mut direct = Step::new();
        direct.run().unwrap();
        let once = direct.results();
        direct.run().unwrap();
        let twice = direct.results();
        assert_ne!(once.1, twice.1, "dbias accumulates");

        let mut recorded = Step::new();
        recorded.run().unwrap(); // the workspace grows
        let dev = recorded.dev.clone();
        let graph = dev.capture(|| recorded.run()).unwrap();
        assert_eq!(recorded.results(), once, "recording ran something");
        graph.replay().unwrap();
        assert_eq!(recorded.results(), twice);
        direct.run().unwrap();
        graph.replay().unwrap();
        assert_eq!(recorded.results(), direct.results());
    }

    #[test]
    fn what_a_recording_cannot_hold_is_refused() {
        let mut step = Step::new();
        let dev = step.dev.clone();
        let e = dev.capture(|| step.run()).err().expect("the workspace would grow");
        assert!(e.to_string().contains("an allocation while work is being recorded"), "{e}");
        let e = dev.capture(|| dev.download(&step.x).map(|_| ())).err().expect("a download");
        assert!(e.to_string().contains("a copy to the host"), "{e}");
        let e = dev.capture(|| dev.write(&mut step.x, &[1.0])).err().expect("an upload");
        assert!(e.to_string().contains("a copy from the host"), "{e}");
        let event = dev.event(Queue::Copies).unwrap();
        let e = dev.capture(|| dev.wait(&event, Queue::Compute)).err().expect("a wait");
        assert!(e.to_string().contains("a wait for another queue"), "{e}");
        let e = dev.capture(|| dev.write_beside(&mut step.x, &[1.0])).err().expect("an upload beside");
        assert!(e.to_string().contains("a copy from the host"), "{e}");
        let e = dev.capture(|| dev.capture(|| Ok(())).map(|_| ())).err().expect("two recordings");
        assert!(e.to_string().contains("a second recording"), "{e}");
        step.run().unwrap();
    }

    #[test]
    fn other_threads_run_while_one_records() {
        let mut step = Step::new();
        let dev = step.dev.clone();
        let graph = dev
            .capture(|| std::thread::scope(|s| s.spawn(|| dev.write(&mut step.x, &[7.0])).join().unwrap()));
        graph.unwrap().replay().unwrap();
        assert_eq!(dev.download(&step.x).unwrap()[0], 7.0);
    }
}

/// `cellrefine` where `libraries` comes first in the search for shared objects.
fn doctor(libraries: &Path, arguments: &[&str]) -> (i32, String) {
    let output = Command::cargo_bin("cellrefine")
        .unwrap()
        .arg("doctor")
        .args(arguments)
        .env("LD_LIBRARY_PATH", libraries)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].map(|o| String::from_utf8(o).unwrap()).concat();
    (output.status.code().expect("no signal"), text)
}

/// A libcuda of that version whose cuInit returns `init`, and that sees `devices` GPUs; `None` without a C compiler.
fn driver(version: i32, init: i32, devices: i32) -> Option<tempfile::TempDir> {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("cuda.c");
    let text = format!(
        "int cuInit(unsigned flags) {{ return {init}; }}\n\
         int cuDriverGetVersion(int* version) {{ *version = {version}; return 0; }}\n\
         int cuDeviceGetCount(int* count) {{ *count = {devices}; return 0; }}\n"
    );
    std::fs::write(&source, text).unwrap();
    let mut command = std::process::Command::new("cc");
    command.args(["-shared", "-fPIC", "-o"]).arg(folder.path().join("libcuda.so")).arg(&source);
    match command.status() {
        Ok(status) => {
            assert!(status.success());
            Some(folder)
        }
        Err(_) => {
            eprintln!("skipped: no C compiler");
            None
        }
    }
}

/// What doctor says and that it goes on; what `--device cuda` says and that it stops with 4, whatever this build holds.
#[track_caller]
fn says(folder: &Path, want: &str) {
    let (code, text) = doctor(folder, &[]);
    assert!(code == 0 && text.contains(want), "{code}: {text}");
    let (code, text) = doctor(folder, &["--device", "cuda"]);
    let no_code = text.contains("this build holds no GPU code");
    assert!(code == 4 && (no_code || text.contains(want)), "{code}: {text}");
    assert!(!text.contains("panicked"), "{text}");
}

#[test]
fn an_old_driver_is_named() {
    if let Some(folder) = driver(12080, 0, 1) {
        says(folder.path(), "the NVIDIA driver is too old");
        assert!(doctor(folder.path(), &[]).1.contains("CUDA 12.8"));
    }
}

#[test]
fn a_driver_without_gpu_is_named() {
    if let Some(folder) = driver(13000, 100, 0) {
        says(folder.path(), "no NVIDIA GPU");
    }
    if let Some(folder) = driver(13000, 0, 0) {
        says(folder.path(), "no NVIDIA GPU");
    }
}

#[test]
fn a_driver_that_fails_is_named_with_its_number() {
    if let Some(folder) = driver(13000, 803, 0) {
        says(folder.path(), "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803)");
    }
}

/// Only where this machine has no driver of its own.
#[test]
fn a_missing_driver_is_named() {
    let folder = tempfile::tempdir().unwrap();
    if doctor(folder.path(), &[]).1.contains("libcuda.so.1 cannot be loaded") {
        says(folder.path(), "no NVIDIA driver");
    }
}
