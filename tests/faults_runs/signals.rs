//! F3 and F4: a signal to one rank checkpoints all of them at the same step; a rank that dies or freezes ends the others, is named, and
//! leaves no half checkpoint.

use super::faults::{cases, report};
use super::place::*;
use cellrefine::rng::Philox;
use cellrefine::train::folder::verify;
use cellrefine::train::{Resume, RunInputs, stages};
use std::process::{Child, ExitStatus};
use std::time::Duration;

const RUN: &str = "pretrain --corpus x.cells --preset tiny --label cell_type --split train=0.6,val=0.2,test=0.2 --threads 1 \
    --set model.layers=1 --set model.width=16 --set model.ffn=32 --set batch.cells=8 --set train.log_every=1 \
    --set train.eval_every=1000 --set train.steps=1000000 --set optimizer.schedule=constant --set optimizer.warmup=0";

/// All `world` ranks of a run into `out`.
fn start(place: &Place, out: &str, world: usize, timeout: u32, more: &str) -> Vec<Child> {
    let master = free_address();
    let rank = |rank| {
        let ranks = format!("--rank {rank} --world {world} --master {master} --rank-timeout {timeout}");
        place.command(&format!("{RUN} --out {out} {ranks} {more}")).spawn().unwrap()
    };
    (0..world).map(rank).collect()
}

/// (exit status, stderr) of each.
fn wait(ranks: Vec<Child>) -> Vec<(ExitStatus, String)> {
    ranks
        .into_iter()
        .map(|rank| {
            let out = rank.wait_with_output().unwrap();
            (out.status, text(&out.stderr))
        })
        .collect()
}

/// The step of `last`, where every checkpoint of the run is whole and nothing half-written is there.
fn newest(place: &Place, out: &str) -> Result<u64, String> {
    let folder = place.root.join(out).join("checkpoints");
    let mut newest = 0;
    for entry in std::fs::read_dir(&folder).map_err(|e| e.to_string())? {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        match name.strip_prefix("step-").and_then(|step| step.parse::<u64>().ok()) {
            Some(step) => {
                verify(&path).map_err(|e| e.to_string())?;
                newest = newest.max(step);
            }
            // A killed leader's unfinished one is hidden, and goes when the run goes on.
            None if name.starts_with('.') => {}
            None => return Err(format!("what is {name}?")),
        }
    }
    Ok(newest)
}

#[test]
fn a_signal_to_one_rank_of_four_checkpoints_all_at_one_step() {
    let place = Place::new();
    let mut lost = Lost::default();
    let signals = [("TERM", libc::SIGTERM), ("INT", libc::SIGINT), ("USR1", libc::SIGUSR1)];
    let all: Vec<_> = signals.iter().flat_map(|s| [2, 0, 1, 3].map(|rank| (*s, rank))).collect();
    let few = [(signals[0], 3), (signals[1], 0), (signals[2], 2)];
    let chosen = if cases(0, 1) == 1 { all } else { few.into() };
    for ((name, number), rank) in &chosen {
        let out = format!("{name}-{rank}");
        let ranks = start(&place, &out, 4, 60, "");
        place.wait_for(&out, 3);
        signal(&ranks[*rank], *number);
        let ended = wait(ranks);
        let codes: Vec<_> = ended.iter().map(|(status, _)| status.code()).collect();
        lost.unless(codes == [Some(5); 4], || format!("{out}: {codes:?} {:?}", ended[*rank].1));
        let step = newest(&place, &out).unwrap_or_else(|e| {
            lost.0.push(format!("{out}: {e}"));
            0
        });
        // One rank speaks; all of them stopped after this step, or the sums of the next would have failed.
        let said = &ended[0].1;
        let named = said.contains(&format!("checkpointed at step {step}"))
            && said.contains("resume with: cellrefine pretrain")
            && said.contains("--resume");
        lost.unless(named && step > 0, || format!("{out}: step {step}, {said}"));
        let silent = ended[1..].iter().all(|(_, said)| !said.contains("error"));
        lost.unless(silent, || format!("{out}: {ended:?}"));
        let lines = std::fs::read_to_string(place.root.join(&out).join("metrics.jsonl")).unwrap();
        lost.unless(lines.lines().count() as u64 == step, || format!("{out}: logged beyond step {step}"));
    }
    report(
        "F3",
        "TERM, INT or USR1 to one rank of four: one checkpoint, exit 5, how to go on",
        chosen.len(),
        &lost.0,
    );
}

#[test]
fn the_command_that_the_message_gives_goes_on() {
    let place = Place::new();
    let mut lost = Lost::default();
    let mut words = format!("{RUN} --out run");
    let mut step = 0;
    for turn in 0..3 {
        let child = place.command(&words).spawn().unwrap();
        place.wait_for("run", step as usize + 3);
        signal(&child, [libc::SIGTERM, libc::SIGUSR1, libc::SIGINT][turn]);
        let (status, said) = wait(vec![child]).remove(0);
        let next = newest(&place, "run").unwrap_or(0);
        lost.unless(status.code() == Some(5) && next > step, || format!("turn {turn}: {status} {said}"));
        let Some(command) = said.split("resume with: cellrefine ").nth(1) else {
            lost.0.push(format!("turn {turn}: no command in {said}"));
            break;
        };
        (words, step) = (command.lines().next().unwrap().to_string(), next);
    }
    report("F3", "the command in the message resumes, and can be stopped again", 3, &lost.0);
}

#[test]
fn a_second_signal_stops_at_once() {
    let place = Place::new();
    let mut lost = Lost::default();
    // One step of a hundred thousand batches: the first signal waits for its end, which is far off.
    let words = format!("{RUN} --out run --set train.accumulate=100000");
    for second in [libc::SIGTERM, libc::SIGINT] {
        let _ = std::fs::remove_dir_all(place.root.join("run"));
        let mut child = place.command(&words).spawn().unwrap();
        let patience = std::time::Instant::now() + Duration::from_secs(120);
        while !place.root.join("run/settings.toml").exists() {
            assert!(std::time::Instant::now() < patience, "the run does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        signal(&child, libc::SIGTERM);
        std::thread::sleep(Duration::from_millis(200));
        let waits = child.try_wait().unwrap();
        lost.unless(waits.is_none(), || format!("the first signal ended it within the step: {waits:?}"));
        signal(&child, second);
        let (status, said) = wait(vec![child]).remove(0);
        lost.unless(status.code() == Some(128 + second), || format!("{status} {said}"));
    }
    report("F3", "a second signal ends the process within its step", 2, &lost.0);
}

#[test]
fn a_killed_rank_ends_the_others_and_what_is_left_resumes_to_the_same_bits() {
    let place = Place::new();
    let mut lost = Lost::default();
    let mut random = Philox::new(20_261_123, 0, 4);
    let tried = cases(2, 12);
    for case in 0..tried {
        let (out, victim) = (format!("kill-{case}"), random.below(3) as usize);
        let mut ranks = start(&place, &out, 3, 60, "--set train.checkpoint_every=2");
        // From step 4 on, which has waited for the checkpoint of step 2.
        place.wait_for(&out, 5 + random.below(8) as usize);
        std::thread::sleep(Duration::from_millis(random.below(15)));
        signal(&ranks[victim], libc::SIGKILL);
        ranks.remove(victim).wait().unwrap();
        let ended = wait(ranks);
        for (status, said) in &ended {
            let named =
                ["error[CR0832]", "rank ", "of step", "--resume"].iter().all(|part| said.contains(part));
            lost.unless(status.code() == Some(4) && named, || {
                format!("{out}, rank {victim}: {status} {said}")
            });
        }
        // A rank may see another end, which has seen the first, before it sees that itself.
        let first = format!("rank {victim} ");
        let named = ended.iter().any(|(_, said)| said.contains(&first));
        lost.unless(named, || format!("{out}, rank {victim}: {ended:?}"));
        let step = match newest(&place, &out) {
            Ok(step) if step > 0 => step,
            other => {
                lost.0.push(format!("{out}: {other:?}"));
                continue;
            }
        };
        // Two steps more, resumed, and the same run without a kill.
        let set = [
            "train.steps=1000000",
            "optimizer.schedule=constant",
            "optimizer.warmup=0",
            "train.checkpoint_every=2",
        ];
        let end = |_| Script { stops: vec![step + 2], ..Script::default() };
        let resumed = RunInputs { resume: Resume::Last, ..place.inputs(&out, &set) };
        let unbroken = place.inputs(&format!("{out}-unbroken"), &set);
        for inputs in [&resumed, &unbroken] {
            ranks_until(inputs, end, &mut lost);
        }
        let [a, b] = [&resumed, &unbroken].map(|inputs| tensors(&checkpoint(&inputs.out, step + 2)));
        lost.unless(a == b, || format!("{out}: other bits at step {}", step + 2));
    }
    report(
        "F4",
        "kill -9 of a rank of three at a random moment: the others name it, and the run resumes to the same bits",
        tried,
        &lost.0,
    );
}

fn ranks_until(inputs: &RunInputs, end: impl Fn(usize) -> Script + Sync, lost: &mut Lost) {
    for (rank, (outcome, _)) in ranks(3, stages::pretrain, inputs, end).into_iter().enumerate() {
        let code = outcome.as_ref().map_err(|e| e.kind().exit_code());
        lost.unless(matches!(code, Err(5)), || format!("{}, rank {rank}: {outcome:?}", inputs.out.display()));
    }
}

#[test]
fn a_frozen_rank_ends_the_others_after_the_time_out() {
    let place = Place::new();
    let mut lost = Lost::default();
    let tried = cases(1, 3);
    for frozen in 0..tried {
        let out = format!("frozen-{frozen}");
        let mut ranks = start(&place, &out, 3, 2, "");
        place.wait_for(&out, 3);
        signal(&ranks[frozen], libc::SIGSTOP);
        let mut child = ranks.remove(frozen);
        for (status, said) in wait(ranks) {
            let parts = [&format!("rank {frozen}"), "within 2 s", "of step", "--rank-timeout"];
            let named = parts.iter().all(|part| said.contains(*part));
            lost.unless(status.code() == Some(4) && named, || format!("{out}: {status} {said}"));
        }
        signal(&child, libc::SIGKILL);
        child.wait().unwrap();
        let verified = newest(&place, &out);
        lost.unless(verified.is_ok(), || format!("{out}: {verified:?}"));
    }
    report("F4", "SIGSTOP of a rank of three: the others end after the time-out and name it", tried, &lost.0);
}
