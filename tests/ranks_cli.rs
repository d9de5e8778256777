//! Ranks as processes: started by `launch`, by flags or by another launcher's variables; killed, frozen, signalled.

#[path = "common/typed_cells.rs"]
mod typed_cells;

use cellrefine::report::jsonl;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const SMALL: &str = "--preset tiny --set model.layers=1 --set model.width=16 --set model.ffn=32 --set batch.cells=8 \
    --set train.log_every=1 --threads 1";

struct Place {
    _dir: tempfile::TempDir,
    root: PathBuf,
}

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_path_buf();
        typed_cells::write(&root, "x.cells", &[60, 30, 12], 0.0);
        Place { _dir: dir, root }
    }

    /// The program with `words`, `@` standing for the folder; no launcher's variables but `env`.
    fn command(&self, words: &str, env: &[(&str, &str)]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cellrefine"));
        let root = self.root.display().to_string();
        command.args(words.split_whitespace().map(|word| word.replace('@', &format!("{root}/"))));
        for (name, _) in std::env::vars().filter(|(name, _)| {
            ["RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI_", "CELLREFINE_"]
                .iter()
                .any(|start| name.starts_with(start))
        }) {
            command.env_remove(name);
        }
        command.envs(env.iter().copied()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, words: &str, env: &[(&str, &str)]) -> Output {
        self.command(words, env).output().unwrap()
    }

    /// Rank `rank` of `world` of an endless pretraining into `out`.
    fn rank(&self, rank: usize, world: usize, master: &str, more: &str) -> Child {
        let words = format!(
            "pretrain --corpus @x.cells --out @run {SMALL} --set train.steps=1000000 --rank {rank} --world {world} --master {master} {more}"
        );
        self.command(&words, &[]).spawn().unwrap()
    }

    /// Waits until the run in `out` has logged `lines` steps.
    fn wait_for(&self, out: &str, lines: usize) {
        let log = self.root.join(out).join("metrics.jsonl");
        let patience = Instant::now() + Duration::from_secs(120);
        while std::fs::read_to_string(&log).map_or(0, |text| text.lines().count()) < lines {
            assert!(Instant::now() < patience, "the run does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

fn signal(child: &Child, signal: i32) {
    // SAFETY: a signal to our own child, which has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}

fn losses(out: &Path) -> Vec<f64> {
    let lines = jsonl::read(&out.join("metrics.jsonl")).unwrap();
    lines.iter().map(|line| line["loss"].as_f64().unwrap()).collect()
}

fn close(a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    assert!((a[0] - b[0]).abs() <= 1e-6 * a[0], "{a:?} {b:?}");
    assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 2e-4 * a), "{a:?} {b:?}");
}

#[test]
fn launched_ranks_train_as_one_process_and_speak_with_one_voice() {
    let place = Place::new();
    let words =
        |out: &str| format!("pretrain --corpus @x.cells --out @{out} {SMALL} --set train.steps=6 --json");
    let one = place.run(&words("one"), &[]);
    assert!(one.status.success(), "{}", text(&one.stderr));
    let two = place.run(&format!("launch -n 2 {}", words("two")), &[]);
    assert!(two.status.success(), "{}", text(&two.stderr));
    close(&losses(&place.root.join("one")), &losses(&place.root.join("two")));
    // One JSON object, one set of notes.
    let summary: serde_json::Value = serde_json::from_slice(&two.stdout).unwrap();
    assert_eq!(summary["steps"], 6);
    assert_eq!(text(&two.stderr).matches("cells: ").count(), 1, "{}", text(&two.stderr));
    // torchrun's variables do the same without `launch`.
    let master = free_address();
    let (host, port) = master.split_once(':').unwrap();
    let ranks: Vec<Child> = ["0", "1", "2"]
        .map(|rank| {
            let env = [("RANK", rank), ("WORLD_SIZE", "3"), ("MASTER_ADDR", host), ("MASTER_PORT", port)];
            place.command(&words("three"), &env).spawn().unwrap()
        })
        .into();
    for rank in ranks {
        let out = rank.wait_with_output().unwrap();
        assert!(out.status.success(), "{}", text(&out.stderr));
    }
    close(&losses(&place.root.join("one")), &losses(&place.root.join("three")));
}

#[test]
fn a_killed_rank_ends_the_others_at_once_and_is_named() {
    let place = Place::new();
    let master = free_address();
    let mut ranks: Vec<Child> =
        (0..3).map(|rank| place.rank(rank, 3, &master, "--set train.checkpoint_every=2")).collect();
    place.wait_for("run", 4);
    signal(&ranks[1], libc::SIGKILL);
    let started = Instant::now();
    ranks.remove(1).wait().unwrap();
    for rank in ranks {
        let out = rank.wait_with_output().unwrap();
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(4), "{said}");
        assert!(said.contains("rank 1") && said.contains("of step") && said.contains("--resume"), "{said}");
    }
    assert!(started.elapsed() < Duration::from_secs(60), "long before the time-out of 600 s");
    // What is left resumes.
    let resumed = place.run(
        &format!("pretrain --corpus @x.cells --out @run {SMALL} --set train.steps=1000000 --resume --rank-timeout 0"),
        &[],
    );
    assert_eq!(resumed.status.code(), Some(2), "{}", text(&resumed.stderr));
    assert!(place.root.join("run/last").is_file());
    let verified = place.run("inspect @run", &[]);
    assert!(verified.status.success(), "{}", text(&verified.stderr));
}

#[test]
fn a_frozen_rank_ends_the_others_after_the_time_out() {
    let place = Place::new();
    let master = free_address();
    let ranks: Vec<Child> = (0..2).map(|rank| place.rank(rank, 2, &master, "--rank-timeout 3")).collect();
    place.wait_for("run", 3);
    signal(&ranks[1], libc::SIGSTOP);
    let mut ranks = ranks.into_iter();
    let out = ranks.next().unwrap().wait_with_output().unwrap();
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(4), "{said}");
    assert!(
        said.contains("rank 1") && said.contains("within 3 s") && said.contains("--rank-timeout"),
        "{said}"
    );
    let mut frozen = ranks.next().unwrap();
    signal(&frozen, libc::SIGKILL);
    frozen.wait().unwrap();
}

#[test]
fn a_signal_to_the_launcher_checkpoints_all_ranks() {
    let place = Place::new();
    let words =
        format!("launch -n 2 pretrain --corpus @x.cells --out @run {SMALL} --set train.steps=1000000");
    let launcher = place.command(&words, &[]).spawn().unwrap();
    place.wait_for("run", 3);
    signal(&launcher, libc::SIGTERM);
    let out = launcher.wait_with_output().unwrap();
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(5), "{said}");
    assert_eq!(said.matches("checkpointed at step").count(), 1, "{said}");
    assert!(place.root.join("run/last").is_file());
}

#[test]
fn what_cannot_start_says_why() {
    let place = Place::new();
    let words = format!("pretrain --corpus @x.cells --out @run {SMALL} --set train.steps=2");
    let fails = |words: &str, env: &[(&str, &str)], code: i32, parts: &[&str]| {
        let out = place.run(words, env);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{said}");
        assert!(parts.iter().all(|part| said.contains(part)), "{said}");
    };
    fails(&words, &[("RANK", "0")], 2, &["RANK", "WORLD_SIZE"]);
    fails(&words, &[("RANK", "0"), ("WORLD_SIZE", "2")], 2, &["--master"]);
    fails(&format!("{words} --rank 0"), &[], 2, &["--world"]);
    let alone = format!("{words} --rank 0 --world 2 --rank-timeout 0.3 --master {}", free_address());
    fails(&alone, &[], 4, &["rank 1 did not come"]);
    fails(&format!("launch --json -n 2 {words}"), &[], 2, &["behind the command"]);
    fails("launch -n 0 pretrain", &[], 2, &["0"]);
    // The cause that one rank has is the exit code of all.
    fails("launch -n 2 pretrain --corpus @none.cells --preset tiny --out @bad", &[], 3, &["none.cells"]);
}
