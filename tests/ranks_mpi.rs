//! Ranks that mpirun starts: the conformance suite, one process's loss. Needs the feature `mpi` and an mpirun:
//! `cargo test --release --features mpi --test ranks_mpi`.
#![cfg(feature = "mpi")]

#[path = "common/conformance.rs"]
mod conformance;
#[path = "common/typed_cells.rs"]
mod typed_cells;

use cellrefine::collective::launch::{Carrier, Flags, Launch};
use cellrefine::report::jsonl;
use std::path::Path;
use std::process::{Command, Output};

/// `mpirun -n ranks program args`, as root and on few cores too.
fn mpirun(ranks: usize, program: &Path) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "-n", &ranks.to_string()]).arg(program);
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    // Containers: no ssh, which mpirun looks for even on one machine, and no reading of another process's memory.
    command.env("OMPI_MCA_plm", "isolated").env("OMPI_MCA_btl_vader_single_copy_mechanism", "none");
    command
}

fn succeeds(out: &Output) {
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{}\n{text}", String::from_utf8_lossy(&out.stdout));
}

/// One rank of [`mpi_conforms`], which starts this very test under mpirun.
#[test]
#[ignore = "a rank of mpi_conforms"]
fn rank_of_the_suite() {
    let flags = Flags { carrier: Carrier::Mpi, ..Flags::default() };
    let launch = Launch::discover(&flags, |name| std::env::var(name).ok()).unwrap();
    let all = launch.connect().unwrap();
    assert!(all.world() > 1);
    conformance::conformance(&all);
}

#[test]
fn mpi_conforms() {
    for ranks in [2, 4] {
        let mut command = mpirun(ranks, &std::env::current_exe().unwrap());
        succeeds(&command.args(["--ignored", "--exact", "rank_of_the_suite"]).output().unwrap());
    }
}

#[test]
fn two_and_four_ranks_are_one_process_with_the_same_bits_at_every_repeat() {
    let dir = tempfile::tempdir().unwrap();
    let corpus = typed_cells::write(dir.path(), "x.cells", &[60, 30, 12], 0.0);
    let program = Path::new(env!("CARGO_BIN_EXE_cellrefine"));
    let run = |out: &str, mut command: Command, more: &[&str]| {
        let place = dir.path().join(out);
        command.args(["pretrain", "--preset", "tiny", "--threads", "1", "--quiet", "--corpus"]).arg(&corpus);
        let sizes = ["model.layers=1", "model.width=16", "model.ffn=32", "batch.cells=8"];
        for setting in sizes.iter().chain(&["train.log_every=1", "train.steps=5"]) {
            command.args(["--set", setting]);
        }
        succeeds(&command.arg("--out").arg(&place).args(more).output().unwrap());
        place
    };
    let numbers = |place: &Path| -> Vec<(f64, f64)> {
        let lines = jsonl::read(&place.join("metrics.jsonl")).unwrap();
        lines.iter().map(|l| (l["loss"].as_f64().unwrap(), l["grad_norm"].as_f64().unwrap())).collect()
    };
    let one = numbers(&run("one", Command::new(program), &[]));
    for ranks in [2, 4] {
        let over_mpi = |out: &str| run(out, mpirun(ranks, program), &["--collective", "mpi"]);
        let (a, b) = (over_mpi(&format!("a{ranks}")), over_mpi(&format!("b{ranks}")));
        let close = |(x, y): (&(f64, f64), &(f64, f64)), tolerance: f64| {
            (x.0 - y.0).abs() <= tolerance * x.0 && (x.1 - y.1).abs() <= tolerance * x.1
        };
        assert!(close((&one[0], &numbers(&a)[0]), 1e-6), "{one:?} {:?}", numbers(&a));
        assert!(one.iter().zip(&numbers(&a)).all(|pair| close(pair, 2e-4)));
        let weights =
            |place: &Path| std::fs::read(place.join("checkpoints/step-5/model.safetensors")).unwrap();
        assert!(weights(&a) == weights(&b), "{ranks} ranks, a repeat");
    }
}
