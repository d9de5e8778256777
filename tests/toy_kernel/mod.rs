//! `docs/kernels.md` followed once, for an op that nobody needs: what it takes to add a kernel, with the four files side by side.
//!
//! `rms_scale.cu` goes through the same reader of signatures, the same generated launch function, the same emulator and, where
//! nvcc is, the same fatbin as `kernels/*.cu`. All of it exists in this crate's own test build alone.

// The harness of the op tests, which says `cellrefine` for this crate.
#[path = "../common/cases.rs"]
#[allow(dead_code)]
mod cases;
#[path = "../common/close.rs"]
#[allow(dead_code)]
mod close;
#[path = "../common/guarded.rs"]
mod guarded;
#[cfg(emulator)]
#[path = "../common/mutants.rs"]
#[allow(dead_code)]
mod mutants;

/// In the product: `src/ops/x.rs`.
mod op {
    use crate::device::{Act, Device};
    use crate::error::Result;
    use crate::ops::check_all;

    /// Sizes of one call.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct Dims {
        /// N.
        pub rows: usize,
        /// D.
        pub width: usize,
        /// Added to the mean square.
        pub eps: f32,
    }

    /// A backend's rms_scale.
    pub trait RmsScale<A: Act>: Device {
        /// y (N, D) is set from x (N, D) and weight (D).
        fn rms_scale(
            &self,
            dims: Dims,
            x: &Self::Buf<A>,
            weight: Option<&Self::Buf<A>>,
            y: &mut Self::Buf<A>,
        ) -> Result<()>;
    }

    /// `y = x · weight / sqrt(mean_D(x²) + eps)`, with checked shapes.
    pub fn rms_scale<A: Act, B: RmsScale<A>>(
        dev: &B,
        dims: Dims,
        x: &B::Buf<A>,
        weight: Option<&B::Buf<A>>,
        y: &mut B::Buf<A>,
    ) -> Result<()> {
        let elements = dims.rows * dims.width;
        check_all!("rms_scale", x: x, elements; y: y, elements);
        if let Some(weight) = weight {
            check_all!("rms_scale", weight: weight, dims.width);
        }
        dev.rms_scale(dims, x, weight, y)
    }
}

/// In the product: `src/cpu/x.rs`, with rayon and SIMD.
mod cpu {
    use super::op::{Dims, RmsScale};
    use crate::cpu::Cpu;
    use crate::device::{Act, Device};
    use crate::error::Result;

    impl<A: Act> RmsScale<A> for Cpu {
        fn rms_scale(
            &self,
            dims: Dims,
            x: &Self::Buf<A>,
            weight: Option<&Self::Buf<A>>,
            y: &mut Self::Buf<A>,
        ) -> Result<()> {
            let x = self.download(x)?;
            let weight = weight.map(|w| self.download(w)).transpose()?;
            let mut out = Vec::with_capacity(x.len());
            for row in x[..dims.rows * dims.width].chunks_exact(dims.width) {
                let squares: f32 = row.iter().map(|x| x.to_f32() * x.to_f32()).sum();
                let factor = 1.0 / (squares / dims.width as f32 + dims.eps).sqrt();
                out.extend(row.iter().enumerate().map(|(c, x)| {
                    A::from_f32(x.to_f32() * factor * weight.as_ref().map_or(1.0, |w| w[c].to_f32()))
                }));
            }
            self.write(y, &out)
        }
    }
}

/// In the product: `src/cuda/x.rs`.
mod cuda {
    use super::op::{Dims, RmsScale};
    use crate::cuda::functions::rms_scale;
    use crate::cuda::{Cuda, Grid};
    use crate::device::Act;
    use crate::error::Result;

    /// WARPS of `rms_scale.cu`.
    const WARPS: usize = 4;

    impl<A: Act> RmsScale<A> for Cuda {
        fn rms_scale(
            &self,
            dims: Dims,
            x: &Self::Buf<A>,
            weight: Option<&Self::Buf<A>>,
            y: &mut Self::Buf<A>,
        ) -> Result<()> {
            let grid = Grid::line(dims.rows.div_ceil(WARPS), 32 * WARPS as u32);
            rms_scale(self, grid, x, weight, y, dims.rows as i32, dims.width as i32, dims.eps)
        }
    }
}

/// In the product: `tests/ops/x.rs`, with `on_every_backend!`, `on_emulated!` and `mutants!`.
mod tests {
    use super::close::{assert_rounded, assert_same_bits, wide};
    use super::guarded::{Sample, input, poisoned};
    use super::{cases, op};
    use crate::cpu::Cpu;
    use crate::device::Act;
    use half::bf16;

    fn scales_rows<B: op::RmsScale<A>, A: Act + Sample>(dev: &B) {
        for (rows, width) in cases::rows_by_widths() {
            for weighted in [true, false] {
                let dims = op::Dims { rows, width, eps: 0.01 };
                let (x, weight) =
                    (cases::normal::<A>(1, rows * width, 0.3), cases::normal::<A>(2, width, 1.0));
                let (x_buf, weight_buf) = (input(dev, &x), input(dev, &weight));
                let [one, two, three] = cases::by_threads(|| {
                    let mut y = poisoned::<B, A>(dev, rows * width);
                    let weight = weighted.then_some(weight_buf.buf());
                    op::rms_scale(dev, dims, x_buf.buf(), weight, y.buf_mut()).unwrap();
                    y.read()
                });
                let (x, weight) = (wide(&x), wide(&weight));
                let want: Vec<f64> = (0..rows * width)
                    .map(|i| {
                        let row = &x[i / width * width..][..width];
                        let mean = row.iter().map(|x| x * x).sum::<f64>() / width as f64;
                        let factor = if weighted { weight[i % width] } else { 1.0 };
                        x[i] * factor / (mean + dims.eps as f64).sqrt()
                    })
                    .collect();
                assert_rounded(&format!("{dims:?} weighted {weighted}"), &one, &want, 1e-6);
                assert_same_bits("by threads", &two, &one);
                assert_same_bits("by threads", &three, &one);
            }
        }
    }

    #[test]
    fn on_the_cpu() {
        scales_rows::<_, f32>(&Cpu);
        scales_rows::<_, bf16>(&Cpu);
    }

    #[cfg(emulator)]
    mod emulated {
        use crate::cuda::{Cuda, Schedule};
        use half::bf16;

        fn both(schedule: Schedule) {
            let dev = Cuda::emulated_with(schedule).unwrap();
            super::scales_rows::<_, f32>(&dev);
            super::scales_rows::<_, bf16>(&dev);
        }
        #[test]
        fn emulated_late() {
            both(Schedule::Late);
        }
        #[test]
        fn emulated_reversed() {
            both(Schedule::Reversed);
        }
        #[test]
        fn emulated_eager() {
            both(Schedule::Eager);
        }
        #[test]
        fn mutants_are_caught() {
            use super::super::mutants::{each_is_caught_in, prefix};
            each_is_caught_in("tests/toy_kernel", "tests/toy_kernel", "rms_scale", &prefix(module_path!()));
        }
    }
}
