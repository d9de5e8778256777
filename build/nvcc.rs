//! GPU code: one fatbin per kernel file and activation type, where nvcc can be found.

use crate::cache::{Job, digest};
use crate::generate::File;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Environment variables that decide which nvcc runs and what it makes.
pub const VARIABLES: [&str; 4] = ["NVCC", "CUDA_HOME", "CUDA_PATH", "CELLREFINE_CUDA_ARCHS"];

/// What a fatbin holds unless CELLREFINE_CUDA_ARCHS says otherwise: machine code for A100 and H100/H200 (`a`: with wgmma and
/// TMA), and PTX that newer GPUs compile when they load it.
const DEFAULT_ARCHS: &str = "sm_80 sm_90a compute_80";

pub struct Nvcc {
    program: PathBuf,
    version: String,
    archs: String,
}

/// What a Hopper file is compiled for; its instructions exist nowhere else.
const HOPPER: &str = "sm_90a";

/// The first of `$NVCC`, `$CUDA_HOME`, `$CUDA_PATH`, `.cuda/` (scripts/cuda-toolkit.sh), PATH and /usr/local/cuda that answers.
pub fn find(root: &Path) -> Option<Nvcc> {
    let mut candidates: Vec<PathBuf> = env::var_os("NVCC").map(PathBuf::from).into_iter().collect();
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        candidates.extend(env::var_os(variable).map(|home| PathBuf::from(home).join("bin/nvcc")));
    }
    candidates.push(root.join(".cuda/nvidia/cu13/bin/nvcc"));
    candidates.push("nvcc".into());
    candidates.push("/usr/local/cuda/bin/nvcc".into());
    let archs = env::var("CELLREFINE_CUDA_ARCHS").unwrap_or_else(|_| DEFAULT_ARCHS.into());
    candidates.into_iter().find_map(|program| {
        let output = Command::new(&program).arg("--version").output().ok().filter(|o| o.status.success())?;
        let version = String::from_utf8_lossy(&output.stdout).into_owned();
        Some(Nvcc { program, version, archs: archs.clone() })
    })
}

impl Nvcc {
    /// The release, as `13.0`.
    pub fn release(&self) -> &str {
        self.version.split("release ").nth(1).and_then(|r| r.split(',').next()).unwrap_or("unknown")
    }

    fn archs(&self) -> impl Iterator<Item = &str> {
        self.archs.split([' ', ',']).filter(|a| !a.is_empty())
    }

    /// Is there code for this file? A Hopper file has none where sm_90a was not asked for.
    pub fn compiles(&self, file: &File) -> bool {
        !file.hopper || self.archs().any(|arch| arch == HOPPER)
    }

    /// One compilation per file and activation type.
    ///
    /// # Errors
    /// An architecture that cannot be read.
    pub fn jobs(
        &self,
        files: &[File],
        kernels: &Path,
        headers: u64,
        out: &Path,
    ) -> Result<(Vec<Job>, String), String> {
        let mut targets: Vec<[String; 2]> = Vec::new();
        for arch in self.archs() {
            let (virtual_arch, number) = match arch.split_once('_') {
                Some(("sm", n)) => (format!("compute_{n}"), n),
                Some(("compute", n)) => (arch.to_string(), n),
                _ => return Err(format!("CELLREFINE_CUDA_ARCHS: `{arch}` is neither sm_NN nor compute_NN")),
            };
            if number.is_empty() || !number.chars().next().is_some_and(|c| c.is_ascii_digit()) {
                return Err(format!("CELLREFINE_CUDA_ARCHS: `{arch}` has no number"));
            }
            targets.push([arch.into(), format!("-gencode=arch={virtual_arch},code={arch}")]);
        }
        let mut jobs = Vec::new();
        for file in files.iter().filter(|f| self.compiles(f)) {
            let source = file.source.clone();
            let text = std::fs::read_to_string(&source).map_err(|e| format!("{}: {e}", source.display()))?;
            for act in file.acts() {
                let output = out.join(format!("{}_{act}.fatbin", file.stem));
                let mut command = Command::new(&self.program);
                command.args(["-O3", "-std=c++17", "-fatbin"]);
                let wanted = targets.iter().filter(|[arch, _]| !file.hopper || arch == HOPPER);
                command
                    .args(wanted.map(|[_, flag]| flag))
                    .arg(format!("-DACT_{}", act.to_uppercase()))
                    .arg("-I")
                    .arg(kernels);
                command.arg(&source).arg("-o").arg(&output);
                let key =
                    digest([format!("{command:?}"), self.version.clone(), text.clone(), headers.to_string()]);
                jobs.push(Job { command, output, key, source: source.clone() });
            }
        }
        Ok((jobs, self.archs.clone()))
    }
}
