//! `cellrefine doctor`: what this build and this machine can do, read and not guessed.

use super::{Global, Output};
use crate::error::Result;
use serde_json::json;
use std::fmt::Write;

/// Flags of `doctor`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  cellrefine doctor\n  cellrefine doctor --json")]
pub struct Flags {}

pub fn run(_global: &Global, _flags: &Flags) -> Result<Output> {
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

    let mut text = String::new();
    let _ = writeln!(text, "cellrefine {}", env!("CARGO_PKG_VERSION"));
    let _ = writeln!(text, "  build      {} {}", std::env::consts::ARCH, std::env::consts::OS);
    let _ = writeln!(text, "  devices    cpu");
    let _ = writeln!(text, "  threads    {threads}");
    let _ = writeln!(
        text,
        "  SIMD       {}",
        if simd.is_empty() { "none detected".into() } else { simd.join(" ") }
    );
    let _ = writeln!(text, "  f32 path   {f32_path}");
    let _ = writeln!(text, "  bf16 path  {bf16_path}");
    if let (Some(total), Some(available)) = (gigabytes(total), gigabytes(available)) {
        let _ = writeln!(text, "  memory     {available} GB free of {total} GB");
    }
    let json = json!({"version": env!("CARGO_PKG_VERSION"), "arch": std::env::consts::ARCH, "os": std::env::consts::OS,
        "devices": ["cpu"], "threads": threads, "simd": simd, "f32_path": f32_path, "bf16_path": bf16_path,
        "memory_total_gb": gigabytes(total), "memory_available_gb": gigabytes(available)});
    Ok(Output { text, json })
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
