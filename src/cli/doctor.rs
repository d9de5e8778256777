//! `cellrefine doctor`: what this build and this machine can do, read and not guessed, and what to do next.
//!
//! With `--device cuda` or `--device emulated` it is a check: what that device lacks becomes the error, exit code 4.

use super::{Global, Output};
use crate::backend::Choice;
use crate::cuda::{cublas, gpu, kernel_count};
use crate::error::{Code, Error, Result};
use serde_json::json;
use std::fmt::Write;

/// Flags of `doctor`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
With --device cuda or --device emulated, doctor fails (exit 4) and says what is missing when that device cannot be used.

Examples:
  cellrefine doctor
  cellrefine doctor --json
  cellrefine doctor --device cuda")]
pub struct Flags {}

pub fn run(global: &Global, _flags: &Flags) -> Result<Output> {
    let cuda = Cuda::look();
    match global.device {
        Choice::Cuda(ordinal) => cuda.usable(ordinal)?,
        Choice::Emulated if !EMULATOR => return Err(no_emulator()),
        _ => {}
    }
    let threads = rayon::current_num_threads();
    let simd: Vec<&str> = simd_features();
    let (total, available) = memory_bytes();
    let gigabytes = |bytes: Option<u64>| bytes.map(|b| (b as f64 / 1e7).round() / 100.0);
    let f32_path = if simd.contains(&"avx512f") {
        "AVX-512"
    } else if simd.contains(&"avx2") && simd.contains(&"fma") {
        "AVX2 + FMA"
    } else {
        "portable"
    };
    let bf16_path = if simd.contains(&"avx512bf16") { "AVX512_BF16" } else { "widened to f32" };

    let devices = cuda.devices();
    let gpu = devices.iter().find(|d| d.starts_with("cuda"));
    let simd_names = if simd.is_empty() { "none detected".to_string() } else { simd.join(" ") };
    let mut text = format!(
        "cellrefine {}, {} {}\n\nRuns here\n",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::ARCH,
        std::env::consts::OS
    );
    let mut line = |name: &str, what: &str| {
        let _ = writeln!(text, "  {name:<9}  {what}");
    };
    line("devices", &devices.join(", "));
    line("threads", &threads.to_string());
    line("SIMD", &simd_names);
    line("f32 path", f32_path);
    line("bf16 path", bf16_path);
    if let (Some(total), Some(available)) = (gigabytes(total), gigabytes(available)) {
        line("memory", &format!("{available} GB free of {total} GB"));
    }
    cuda.write(&mut text);
    let next = next_steps(gpu.map(String::as_str));
    let _ = writeln!(text, "\nNext");
    for (command, why) in &next {
        let _ = writeln!(text, "  {command:<62}  {why}");
    }
    let json = json!({"version": env!("CARGO_PKG_VERSION"), "arch": std::env::consts::ARCH, "os": std::env::consts::OS,
        "devices": devices, "cuda": cuda.to_json(), "threads": threads, "simd": simd, "f32_path": f32_path, "bf16_path": bf16_path,
        "memory_total_gb": gigabytes(total), "memory_available_gb": gigabytes(available),
        "next": next.iter().map(|(command, _)| command).collect::<Vec<_>>()});
    Ok(Output { text, json })
}

/// What somebody who has just installed the program does next: (command, why).
fn next_steps(gpu: Option<&str>) -> Vec<(String, &'static str)> {
    let mut steps = vec![
        ("cellrefine demo".into(), "the whole story on bundled cells, in minutes"),
        ("cellrefine vocab build cells.h5ad --out vocab.tsv".into(), "your own cells: first a vocabulary,"),
        (
            "cellrefine pack cells.h5ad --vocab vocab.tsv --out x.cells".into(),
            "then a corpus; `pretrain` and `refine` follow",
        ),
    ];
    match gpu {
        Some(gpu) => steps.push((
            format!("cellrefine bench kernels --device {gpu}"),
            "is this GPU as fast as it should be?",
        )),
        None => steps
            .push(("cellrefine doctor --device cuda".into(), "what a GPU would need, as an error to act on")),
    }
    steps
}

/// Was the emulator compiled in?
const EMULATOR: bool = cfg!(emulator);

fn no_emulator() -> Error {
    Error::new(Code::NoEmulator, "this build has no emulator")
        .found(format!("{} {}", std::env::consts::ARCH, std::env::consts::OS))
        .wanted("x86_64 or aarch64 Linux")
        .next("--device cpu")
}

/// The parts that a GPU run needs, each there or the error that says why not.
struct Cuda {
    /// nvcc's release and the architectures it compiled for; empty without nvcc.
    nvcc: &'static str,
    archs: &'static str,
    driver: Result<i32>,
    gpus: Result<usize>,
    cublas: Result<()>,
}

impl Cuda {
    fn look() -> Self {
        Cuda {
            nvcc: env!("BUILT_WITH_NVCC"),
            archs: env!("BUILT_FOR_ARCHS"),
            driver: gpu::driver_version(),
            gpus: gpu::count(),
            cublas: cublas::available(),
        }
    }

    /// The first thing that keeps GPU `ordinal` from being used.
    fn usable(&self, ordinal: usize) -> Result<()> {
        let gpus = gpu::available()?;
        self.cublas.clone()?;
        if ordinal >= gpus {
            return Err(Error::new(Code::NoSuchGpu, "no such GPU")
                .found(format!("cuda:{ordinal}"))
                .wanted(format!("cuda:0 to cuda:{}", gpus - 1)));
        }
        Ok(())
    }

    fn devices(&self) -> Vec<String> {
        let mut devices = vec!["cpu".to_string()];
        if EMULATOR {
            devices.push("emulated".into());
        }
        if self.cublas.is_ok() {
            devices.extend((0..self.gpus.clone().unwrap_or(0)).map(|i| format!("cuda:{i}")));
        }
        devices
    }

    /// (name, what is there or what is missing) of each part.
    fn parts(&self) -> [(&'static str, String); 5] {
        let missing = |e: &Error| {
            let found = e.found_text().map_or(String::new(), |found| format!(" ({found})"));
            let wanted = e.wanted_text().map_or(String::new(), |wanted| format!("; wanted: {wanted}"));
            let next = e.next_text().map_or(String::new(), |next| format!("; {next}"));
            format!("missing: {}{found}{wanted}{next}", e.what())
        };
        let kernels = format!("{} kernels", kernel_count());
        [
            ("emulator", if EMULATOR { kernels.clone() } else { missing(&no_emulator()) }),
            (
                "nvcc",
                if self.nvcc.is_empty() {
                    "missing when this was built; scripts/cuda-toolkit.sh installs one".into()
                } else {
                    format!("{}: {kernels} for {}", self.nvcc, self.archs)
                },
            ),
            (
                "driver",
                self.driver.as_ref().map_or_else(missing, |v| format!("CUDA {}.{}", v / 1000, v % 1000 / 10)),
            ),
            ("gpu", self.gpus.as_ref().map_or_else(missing, |n| format!("{n}"))),
            ("cublaslt", self.cublas.as_ref().map_or_else(missing, |()| "there".into())),
        ]
    }

    /// The parts; and, where one is missing, that nothing stops for it.
    fn write(&self, text: &mut String) {
        let usable = self.cublas.is_ok() && self.gpus.as_ref().is_ok_and(|n| *n > 0) && !self.nvcc.is_empty();
        let _ = writeln!(
            text,
            "\nGPU\n  {}",
            if usable {
                "everything is there"
            } else {
                "not usable yet; without one every command runs on the CPU"
            }
        );
        for (name, state) in self.parts() {
            let _ = writeln!(text, "  {name:<9}  {state}");
        }
    }

    fn to_json(&self) -> serde_json::Value {
        self.parts().into_iter().map(|(name, state)| (name.to_string(), json!(state))).collect()
    }
}

/// The instruction sets that the kernels look for.
fn simd_features() -> Vec<&'static str> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! probe {
            ($($name:tt),*) => { $(if is_x86_feature_detected!($name) { found.push($name); })* };
        }
        probe!("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512bf16");
    }
    #[cfg(target_arch = "aarch64")]
    found.push("neon");
    found
}

/// Total and available memory in bytes, where the system says (Linux).
fn memory_bytes() -> (Option<u64>, Option<u64>) {
    let Ok(info) = std::fs::read_to_string("/proc/meminfo") else { return (None, None) };
    let field = |name: &str| {
        let line = info.lines().find(|l| l.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kb| kb * 1024)
    };
    (field("MemTotal:"), field("MemAvailable:"))
}
