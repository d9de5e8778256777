//! The machine, signals and numbers.

use super::{Code, Explanation, code};

pub(super) const TABLE: &[Explanation] = &[
    code(
        Code::OutOfMemory,
        "out of memory",
        "The device refused an allocation. All memory of a step is taken before the first one, so that this comes at the \
         start of a run.",
        &[
            "Lower `batch.tokens`, `batch.cells` or `batch.max_tokens`.",
            "`cellrefine plan` prints what a run needs, buffer by buffer.",
        ],
    ),
    code(
        Code::DiskFull,
        "the disk is full",
        "No space is left, or a quota or file-size limit is reached. What was half written is removed; finished files and \
         checkpoints are untouched.",
        &[
            "Make room, then run the command again; training continues with `--resume=auto`.",
            "`df -h`, `quota -s`, `ulimit -f`.",
        ],
    ),
    code(
        Code::FileSystem,
        "the file system failed",
        "An operation on a file failed for a reason outside the file: an I/O error, a stale network mount, too many open \
         files. The system's own words are in the message.",
        &[
            "`dmesg` and the storage's logs; try again once it is sound.",
            "Training continues with `--resume=auto`.",
        ],
    ),
    code(
        Code::AnotherWriter,
        "another process is writing there",
        "Two writers in one folder would mix their files. The message says which process has it, on which host and since when.",
        &[
            "Wait for it, stop it, or choose another `--out`.",
            "Where it was killed on another host, `--force-unlock`: its name stays behind, and this host cannot see that it ended.",
        ],
    ),
    code(
        Code::NoThread,
        "the system gives no further thread",
        "A limit on processes or memory of this user or container is reached.",
        &["`ulimit -u`, the container's pids limit; `--threads N` needs fewer."],
    ),
    code(
        Code::WriteFailed,
        "an output cannot be written",
        "The library that writes this form failed underneath, most likely for want of space.",
        &["`df -h` the folder of `--out`, and run the command again."],
    ),
    code(
        Code::TransposeMemory,
        "the matrix is too large to turn in memory",
        "It is stored by genes (CSC). Packing needs it by cells, and turning it needs more memory than is allowed.",
        &["`--memory` allows more.", "Write it by cells: `adata.X = adata.X.tocsr()`, then `write_h5ad`."],
    ),
    code(
        Code::NoGpuCode,
        "this build holds no GPU code",
        "nvcc was not there when the program was built, so that it has the CPU and the emulator alone.",
        &["`scripts/cuda-toolkit.sh` brings nvcc; build again.", "`--device cpu`."],
    ),
    code(
        Code::NoSuchGpu,
        "no such GPU",
        "The driver lists no GPU, none new enough (compute capability 8.0), or none with this number.",
        &["`nvidia-smi -L`; look at `CUDA_VISIBLE_DEVICES`.", "`cellrefine doctor` prints what is seen."],
    ),
    code(
        Code::GpuDriver,
        "no NVIDIA driver, or one too old",
        "The kernels need a driver for CUDA 13 (r580 or later); it is absent or older. In a container it comes from the host.",
        &["Update the driver; start the container with `--gpus all`.", "`--device cpu`."],
    ),
    code(
        Code::GpuFailed,
        "the GPU or its library failed",
        "A call to the driver or to cuBLASLt returned an error. After it nothing on the device is trusted, and no checkpoint \
         is written from it.",
        &[
            "`dmesg | grep -i xid` tells hardware errors from others.",
            "Start again with `--resume=auto`, on another GPU if it comes back.",
        ],
    ),
    code(
        Code::NoCublas,
        "cuBLASLt is missing",
        "Matrix products on the GPU use `libcublasLt.so.13`, which cannot be loaded.",
        &["Install the cuBLAS of CUDA 13, or put its folder on `LD_LIBRARY_PATH`."],
    ),
    code(
        Code::NoEmulator,
        "this build has no emulator",
        "The emulator runs the CUDA kernels as host code, and is built on Linux for x86_64 and aarch64.",
        &["`--device cpu`."],
    ),
    code(
        Code::SlowerThanBefore,
        "slower than the earlier report",
        "`bench --compare` was asked to fail where a case lost more time than is allowed.",
        &["Repeat it on an idle machine; the message lists the cases."],
    ),
    code(
        Code::RankConnection,
        "the ranks cannot reach each other",
        "A connection between ranks could not be made, or carries what no rank sends.",
        &[
            "All ranks need the same `--master HOST:PORT`, a port that is free, and no firewall between.",
            "All ranks must run the same version.",
        ],
    ),
    code(
        Code::RankLate,
        "a rank did not come in time",
        "A rank waited at a collective operation longer than `--rank-timeout`; the message names rank, host, step and \
         operation. The others stop, so that no machine stays held for nothing.",
        &[
            "Look at that rank's own log: it hung, was killed, or is slower than the timeout allows.",
            "Start all ranks again with `--resume=auto`.",
        ],
    ),
    code(
        Code::RankLost,
        "a rank stopped",
        "Another rank ended with an error or was killed, and this one stops with it.",
        &["That rank's own message says why.", "Start all ranks again with `--resume=auto`."],
    ),
    code(
        Code::RanksDiffer,
        "the ranks hold different weights",
        "Weights are compared over all ranks and must be equal to the bit. One machine computes differently: another kind of \
         processor or GPU, another version, or a hardware fault.",
        &[
            "Use equal machines and one version.",
            "Start again from the checkpoint before, with `--resume=auto`.",
        ],
    ),
    code(
        Code::Checkpointed,
        "stopped by a signal, with a checkpoint",
        "SIGTERM, SIGINT or SIGUSR1 came. The step was finished and a checkpoint written; nothing is lost.",
        &["Continue with the command that the message prints."],
    ),
    code(
        Code::LossNotFinite,
        "training left the finite numbers",
        "Loss or gradients were NaN or infinite several steps in a row. Those steps changed no weight; the last checkpoint \
         is from before.",
        &[
            "Lower `optimizer.learning_rate`, or lengthen the warm-up.",
            "`--set train.precision=f32`, if bf16 overflows.",
            "The message names the cells of the step: look at them with `cellrefine inspect`.",
        ],
    ),
    code(
        Code::EmbeddingOverflow,
        "the frozen encoder's embedding is not usable",
        "A training cell's vector from the frozen encoder is not finite or has no length, so that nothing can be anchored to it.",
        &["Look where the checkpoint came from; score it with `cellrefine eval` first."],
    ),
    code(
        Code::KernelWrong,
        "a kernel's result is wrong",
        "`bench` compares each kernel with a second way of computing the same, and they differ beyond rounding.",
        &["Do not train on this device; send in the output together with `cellrefine doctor`."],
    ),
    code(
        Code::TrainingSpike,
        "the gradient norm or the loss spiked",
        "It lies further above those of the last 128 steps than `train.spike_z` standard deviations, and \
         `train.spike_policy` is `stop`. No checkpoint is written of it: the last one is from before. The message has z, and \
         names the file with the cells of the step.",
        &[
            "Go on without the step: `--resume --allow-settings --set train.spike_policy=skip`.",
            "Go on more carefully: `--resume --allow-settings --set optimizer.learning_rate=…`, with a lower one.",
            "Look at the cells that the message names: `cellrefine inspect`.",
        ],
    ),
];
