//! Every op of the network's body against its f64 oracle: both activation types, odd sizes, guard words round every buffer,
//! NaN in every output, the same bits for 1, 2 and 3 threads. One file per op, its bodies generic over the backend; a
//! backend joins by its lines in [`on_every_backend`].

#[path = "../common/mod.rs"]
mod common;

#[cfg(emulator)]
use cellrefine::cuda::{Arch, Cuda, Schedule};
use cellrefine::device::{Act, Dropout};
use common::guarded::Sample;

/// One test per body and backend, and per activation type where the op has one: `on_every_backend!(A: forward)` calls
/// `forward::<_, f32>(&backend)` and `forward::<_, bf16>(&backend)`, `on_every_backend!(sum)` calls `sum(&backend)`.
macro_rules! on_every_backend {
    (A: $($body:ident),* $(,)?) => {
        mod cpu_f32 {
            $(#[test] fn $body() { super::$body::<_, f32>(&cellrefine::cpu::Cpu); })*
        }
        mod cpu_bf16 {
            $(#[test] fn $body() { super::$body::<_, half::bf16>(&cellrefine::cpu::Cpu); })*
        }
    };
    ($($body:ident),* $(,)?) => {
        mod cpu {
            $(#[test] fn $body() { super::$body(&cellrefine::cpu::Cpu); })*
        }
    };
}

/// The same for the kernels of the CUDA backend: in the emulator, in its three schedules, and on a GPU ([`on_gpu`]).
#[cfg(emulator)]
macro_rules! on_emulated {
    (@ $schedule:ident, $act:ty: $($body:ident),*) => {
        $(#[test] fn $body() { super::$body::<_, $act>(&crate::emulated(cellrefine::cuda::Schedule::$schedule)); })*
    };
    (@ $schedule:ident: $($body:ident),*) => {
        $(#[test] fn $body() { super::$body(&crate::emulated(cellrefine::cuda::Schedule::$schedule)); })*
    };
    (A: $($body:ident),* $(,)?) => {
        on_gpu!(A: $($body),*);
        mod emulated_late_f32 { on_emulated!(@ Late, f32: $($body),*); }
        mod emulated_late_bf16 { on_emulated!(@ Late, half::bf16: $($body),*); }
        mod emulated_reversed_f32 { on_emulated!(@ Reversed, f32: $($body),*); }
        mod emulated_reversed_bf16 { on_emulated!(@ Reversed, half::bf16: $($body),*); }
        mod emulated_eager_f32 { on_emulated!(@ Eager, f32: $($body),*); }
        mod emulated_eager_bf16 { on_emulated!(@ Eager, half::bf16: $($body),*); }
    };
    ($($body:ident),* $(,)?) => {
        on_gpu!($($body),*);
        mod emulated_late { on_emulated!(@ Late: $($body),*); }
        mod emulated_reversed { on_emulated!(@ Reversed: $($body),*); }
        mod emulated_eager { on_emulated!(@ Eager: $($body),*); }
    };
}
/// The same for what a Hopper GPU takes kernels of its own for: bf16 alone.
#[cfg(emulator)]
macro_rules! on_hopper {
    (@ $schedule:ident: $($body:ident),*) => {
        $(#[test] fn $body() {
            super::$body::<_, half::bf16>(&crate::hopper(cellrefine::cuda::Schedule::$schedule));
        })*
    };
    ($($body:ident),* $(,)?) => {
        mod emulated_late_hopper { on_hopper!(@ Late: $($body),*); }
        mod emulated_reversed_hopper { on_hopper!(@ Reversed: $($body),*); }
        mod emulated_eager_hopper { on_hopper!(@ Eager: $($body),*); }
    };
}
/// `mutants!("layernorm")`: each fault of kernels/mutants/layernorm.toml fails a test of this module; without a fault, the
/// sanitizers find none either (ignored unless asked for: it takes a compiler with their libraries).
#[cfg(emulator)]
macro_rules! mutants {
    ($stem:literal) => {
        #[test]
        fn mutants_are_caught() {
            crate::common::mutants::each_is_caught($stem, &crate::common::mutants::prefix(module_path!()));
        }
        #[test]
        #[ignore = "runs every kernel again under ASan and UBSan: cargo test --release sanitizers -- --ignored"]
        fn sanitizers_are_silent() {
            crate::common::mutants::sanitizers_are_silent($stem, &crate::common::mutants::prefix(module_path!()));
        }
    };
}
#[cfg(not(emulator))]
macro_rules! mutants {
    ($stem:literal) => {};
}
#[cfg(not(emulator))]
macro_rules! on_emulated {
    ($($all:tt)*) => { on_gpu!($($all)*); };
}

/// The same bodies on a GPU: ignored unless asked for. `CELLREFINE_TEST_GPU=0 cargo test --release --test ops gpu -- --ignored`
/// runs them on GPU 0, `CELLREFINE_TEST_GPU=emulated` shows without one that they run at all.
macro_rules! on_gpu {
    (A: $($body:ident),* $(,)?) => {
        mod gpu_f32 {
            $(#[test] #[ignore = "needs a GPU"] fn $body() { super::$body::<_, f32>(crate::gpu()); })*
        }
        mod gpu_bf16 {
            $(#[test] #[ignore = "needs a GPU"] fn $body() { super::$body::<_, half::bf16>(crate::gpu()); })*
        }
    };
    ($($body:ident),* $(,)?) => {
        mod gpu {
            $(#[test] #[ignore = "needs a GPU"] fn $body() { super::$body(crate::gpu()); })*
        }
    };
}
#[cfg(not(emulator))]
macro_rules! on_hopper {
    ($($ignored:tt)*) => {};
}

mod adamw;
mod embed;
mod gene_attention;
mod gene_attention_sm90;
mod layernorm;
mod linear;
mod mask_tokens;
mod pool;
mod prototype_loss;
mod prototype_loss_sm90;
mod reduce;
mod rows;
mod unit_rows;

/// With the kernels that every GPU can run.
#[cfg(emulator)]
fn emulated(schedule: Schedule) -> Cuda {
    Cuda::emulated_gpu(schedule, Arch::Sm80).expect("the emulator opens")
}

/// With Hopper's own kernels where there are some.
#[cfg(emulator)]
fn hopper(schedule: Schedule) -> Cuda {
    Cuda::emulated_gpu(schedule, Arch::Sm90).expect("the emulator opens")
}

/// The GPU that CELLREFINE_TEST_GPU names, opened once.
fn gpu() -> &'static cellrefine::cuda::Cuda {
    static GPU: std::sync::OnceLock<cellrefine::cuda::Cuda> = std::sync::OnceLock::new();
    GPU.get_or_init(|| {
        let name = std::env::var("CELLREFINE_TEST_GPU").unwrap_or("0".into());
        #[cfg(emulator)]
        if name == "emulated" {
            return cellrefine::cuda::Cuda::emulated().expect("the emulator opens");
        }
        let ordinal = name.parse().expect("CELLREFINE_TEST_GPU is a GPU's number, or `emulated`");
        cellrefine::cuda::Cuda::open(ordinal).expect("the GPU opens")
    })
}

/// Activations that can be poisoned and guarded.
pub trait ActSample: Act + Sample {}
impl<A: Act + Sample> ActSample for A {}

/// Dropout of the tests that have some.
const DROPOUT: Dropout =
    Dropout { probability: 0.25, seed: 0xABCD_EF01_2345, step: 3, site: 5, first_row: 1000 };
