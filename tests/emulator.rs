//! The emulator of CUDA's execution model (`kernels/emulator/`), by small kernels of its own (`tests/emulator/cases.cpp`): what
//! shuffles, barriers, copies and matrix instructions do, and that every fault is reported with its place instead of passing.
#![cfg(emulator)]

use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

/// The program of cases; `None` where no C++ compiler is.
static CASES: LazyLock<Option<tempfile::TempDir>> = LazyLock::new(|| {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let compiler = std::env::var("CXX").unwrap_or("c++".into());
    if !Command::new(&compiler).arg("--version").output().is_ok_and(|o| o.status.success()) {
        eprintln!("skipped: no C++ compiler (CXX or c++)");
        return None;
    }
    let mut command = Command::new(compiler);
    command.args(["-std=c++17", "-O1", "-fno-strict-aliasing", "-fstack-clash-protection", "-w", "-I"]);
    command.arg(root.join("kernels")).arg(root.join("tests/emulator/cases.cpp"));
    for source in ["cuda_host.cpp", "fiber.cpp", "hopper.cpp"] {
        command.arg(root.join("kernels/emulator").join(source));
    }
    let output = command.arg("-o").arg(folder.path().join("cases")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(folder)
});

/// What case `name` prints under each schedule: late, reversed, eager.
fn run(name: &str) -> Option<[String; 3]> {
    let folder = CASES.as_ref()?;
    Some(["0", "1", "2"].map(|schedule| {
        let output = Command::new(folder.path().join("cases")).args([name, schedule]).output().unwrap();
        assert!(output.status.success(), "{name}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_string()
    }))
}

#[track_caller]
fn prints(name: &str, want: [&str; 3]) {
    if let Some(got) = run(name) {
        assert_eq!(got, want, "{name}");
    }
}

#[track_caller]
fn reports(name: &str, parts: &[&str]) {
    for got in run(name).into_iter().flatten() {
        for part in parts {
            assert!(got.contains(part), "{name}: wanted {part:?} in: {got}");
        }
    }
}

#[test]
fn collectives_atomics_and_barriers_follow_cuda() {
    prints("exchange", ["0 1"; 3]);
    prints("atomics", ["7255 0"; 3]);
    prints("early_exit", ["41 0"; 3]);
    prints("votes", ["86110 0"; 3]);
    prints("two_teams", ["0 0"; 3]);
}

#[test]
fn shared_memory_is_poisoned_before_each_block() {
    prints("poison", ["0 0"; 3]);
}

#[test]
fn matrix_fragments_multiply_as_matrices() {
    prints("matrices", ["0 0"; 3]);
}

#[test]
fn schedules_differ_in_when_copies_land_and_who_goes_first() {
    prints("copies", ["13 0", "13 0", "14 0"]);
    prints("order", ["64 0", "64 64", "64 0"]);
}

#[test]
fn waits_that_cannot_end_are_reported_with_their_places() {
    reports(
        "deadlock",
        &["deadlock in block (", "threads 0..15 wait at cases.cpp:", "(__syncwarp)", "threads 16..31 wait"],
    );
    reports("two_barriers", &["cases.cpp:", "threads already wait at another one, cases.cpp:"]);
    reports(
        "missing_team",
        &["deadlock in block (", "threads 0..63 wait at cases.cpp:", "(bar.sync)", "have returned"],
    );
}

#[test]
fn misaligned_accesses_are_reported() {
    reports("misaligned", &["16-byte access", "is not aligned"]);
    reports("misaligned_copy", &["cases.cpp:", "cp.async", "misaligned: 8 bytes"]);
    reports("misaligned_matrix", &["cases.cpp:", "ldmatrix", "is not aligned to 16 bytes"]);
}

#[test]
fn misused_collectives_are_reported() {
    reports("half_a_warp_of_mma", &["cases.cpp:", "mma", "lanes ffff0000 of the warp take part, not all 32"]);
    reports("absent_lane", &["shuffle", "reads lane 20, which takes no part"]);
    reports("wrong_mask", &["is not in its own mask 000000f0"]);
    reports("overlapping_masks", &["deadlock in block (", "(__shfl_sync)"]);
    reports("mixed_collectives", &["of the same mask wait at another collective"]);
}

#[test]
fn accesses_outside_are_reported_and_do_not_end_the_process() {
    reports("outside", &["thread (37,0,0)", "access outside every buffer", "address 0x10"]);
    reports("stack", &["stack overflow", "local variables exceed 64 KB"]);
    reports("overrun", &["wrote past the end of a SHARED array of 120 bytes"]);
    reports("dynamic_overrun", &["wrote past the end of its 1000 bytes of dynamic shared memory"]);
    reports("dynamic_outside", &["thread (255,0,0)", "dynamic shared memory: byte 1024 of 1024"]);
}

#[test]
fn launches_that_a_gpu_refuses_are_refused() {
    reports("bounds", &["__launch_bounds__"]);
    reports("large_block", &["1 to 1024 threads"]);
    reports("large_grid", &["grid is too large"]);
    reports("large_shared", &["227 KB"]);
}

#[test]
fn what_hopper_adds_does_what_it_says() {
    // 1: nothing has landed before the wait (late); 2: it has (eager).
    prints("boxes", ["1 0", "1 0", "2 0"]);
    prints("products", ["15 0"; 3]);
    prints("round_robin", ["20 0"; 3]);
}

#[test]
fn misuse_of_what_hopper_adds_is_reported() {
    reports("wrong_phase", &["deadlock in block (", "(mbarrier.try_wait)"]);
    reports("bytes_that_never_land", &["deadlock in block (", "(mbarrier.try_wait)"]);
    reports(
        "too_many_arrivals",
        &["hopper_cases.h:", "one arrival more than the 1 of the phase", "misses 16 bytes"],
    );
    reports("no_mbarrier", &["hopper_cases.h:", "no mbarrier was initialized at"]);
    reports("no_fence", &["hopper_cases.h:", "no wgmma_fence since the last wgmma_wait"]);
    reports("beyond_shared", &["hopper_cases.h:", "of 8192 bytes of dynamic shared memory"]);
    reports("left_in_flight", &["a wgmma: the thread returns while it is in flight"]);
    reports("box_off_its_boundary", &["hopper_cases.h:", "not at a 1024-byte boundary"]);
    reports("waits_alone", &["deadlock in block (", "(wait_until)"]);
    reports("waits_for_a_block_to_come", &["blocks wait for one another in cooperative launches alone"]);
    reports("too_many_residents", &["more blocks of a cooperative launch than fit side by side"]);
}
