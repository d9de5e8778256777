//! Which backend runs: `--device` parsed once, picked once per command.
//!
//! Everything above the boundary is generic over `B: Backend<A>`: each pair of backend and activation type is compiled apart and
//! no call goes through a table. [`on_backend!`](crate::on_backend) is the one place where names become types.

use crate::cpu::Cpu;
use crate::cuda::Cuda;
use crate::error::{Code, Error, Result};

/// What `--device` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// The CPU; it is what every build has.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU by its number.
    Cuda(usize),
    /// The CUDA kernels on the CPU, for tests.
    Emulated,
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Choice::Auto => write!(f, "auto"),
            Choice::Cpu => write!(f, "cpu"),
            Choice::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Choice::Emulated => write!(f, "emulated"),
        }
    }
}

impl std::str::FromStr for Choice {
    type Err = Error;

    /// `auto`, `cpu`, `cuda`, `cuda:N` or `emulated`.
    fn from_str(name: &str) -> Result<Self> {
        match (name, name.strip_prefix("cuda:").map(str::parse)) {
            ("auto", _) => Ok(Choice::Auto),
            ("cpu", _) => Ok(Choice::Cpu),
            ("cuda", _) => Ok(Choice::Cuda(0)),
            ("emulated", _) => Ok(Choice::Emulated),
            (_, Some(Ok(ordinal))) => Ok(Choice::Cuda(ordinal)),
            _ => Err(Error::new(Code::DeviceUnknown, "no such device")
                .at("--device")
                .found(name)
                .wanted("auto, cpu, cuda, cuda:N or emulated")
                .next("cellrefine doctor says what this build and machine can do")),
        }
    }
}

/// An open backend.
pub enum Open {
    /// The CPU.
    Cpu(Cpu),
    /// A GPU, or the emulator of one.
    Cuda(Cuda),
}

impl Choice {
    /// Opens the backend.
    ///
    /// # Errors
    /// Environment (4): the build or the machine lacks what the device needs.
    pub fn open(self) -> Result<Open> {
        match self {
            Choice::Auto | Choice::Cpu => Ok(Open::Cpu(Cpu)),
            Choice::Cuda(ordinal) => Cuda::open(ordinal).map(Open::Cuda),
            #[cfg(emulator)]
            Choice::Emulated => Cuda::emulated().map(Open::Cuda),
            #[cfg(not(emulator))]
            Choice::Emulated => {
                Err(Error::new(Code::NoEmulator, "this build has no emulator of CUDA kernels")
                    .found(self)
                    .wanted("Linux on x86-64 or aarch64")
                    .next("--device cpu"))
            }
        }
    }
}

/// Runs an expression on the chosen backend at the chosen precision, with the two as types:
/// `on_backend!(choice, precision, |dev: B, A| step::<B, A>(dev))`. The value is the expression's; opening may fail with `?`.
#[macro_export]
macro_rules! on_backend {
    (@ $device:ty, $open:ident, $precision:expr, |$dev:ident: $backend:ident, $act:ident| $body:expr) => {{
        type $backend = $device;
        let $dev = &$open;
        match $precision {
            $crate::config::Precision::F32 => {
                type $act = f32;
                $body
            }
            $crate::config::Precision::Bf16 => {
                type $act = half::bf16;
                $body
            }
        }
    }};
    ($choice:expr, $precision:expr, |$dev:ident: $backend:ident, $act:ident| $body:expr) => {
        match $choice.open()? {
            $crate::backend::Open::Cpu(open) => {
                $crate::on_backend!(@ $crate::cpu::Cpu, open, $precision, |$dev: $backend, $act| $body)
            }
            $crate::backend::Open::Cuda(open) => {
                $crate::on_backend!(@ $crate::cuda::Cuda, open, $precision, |$dev: $backend, $act| $body)
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_and_unknown_ones_refused_with_the_choices() {
        for name in ["auto", "cpu", "cuda:0", "cuda:13", "emulated"] {
            assert_eq!(name.parse::<Choice>().unwrap().to_string(), name);
        }
        assert_eq!("cuda".parse::<Choice>().unwrap(), Choice::Cuda(0));
        for name in ["gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", ""] {
            let e = name.parse::<Choice>().unwrap_err();
            assert!(e.kind().exit_code() == 2 && e.to_string().contains("cuda:N"), "{e}");
        }
    }
}
