//! F13: a gradient norm far above those before it is named with its z, and met as `train.spike_policy` says; a run that was stopped
//! at any step decides the same as one that never was.

use super::faults::{cases, report};
use super::place::*;
use cellrefine::error::Code;
use cellrefine::train::{Resume, RunInputs, stages};

/// Behind the 128 steps that fill the window: two spikes in a row, and one after.
const SPIKES: [(u64, f32); 3] = [(133, 1e4), (134, 3e3), (139, 2e4)];
const STEPS: &str = "train.steps=143";

/// Notes of spikes.
fn said(script: &Script) -> Vec<String> {
    script.notes.iter().filter(|note| note.contains("a spike: ")).cloned().collect()
}

/// Whole and stopped after `stops`: the outcomes of the last call by rank, and all that was said on rank 0.
fn trained(
    place: &Place,
    stage: Stage,
    world: usize,
    inputs: &RunInputs,
    stops: &[u64],
    lost: &mut Lost,
) -> (Vec<Outcome>, Vec<String>) {
    let _ = place;
    let (mut inputs, mut notes) = (inputs.clone(), Vec::new());
    for stop in stops {
        let script = |_| Script { stops: vec![*stop], injects: SPIKES.into(), ..Script::default() };
        for (rank, (outcome, script)) in ranks(world, stage, &inputs, script).into_iter().enumerate() {
            let code = outcome.as_ref().map_err(|e| e.code());
            lost.unless(code == Err(Code::Checkpointed), || {
                format!("rank {rank}, stopped at {stop}: {outcome:?}")
            });
            if rank == 0 {
                notes.extend(said(&script));
            }
        }
        inputs.resume = Resume::Last;
    }
    let script = |_| Script { injects: SPIKES.into(), ..Script::default() };
    let outcomes = ranks(world, stage, &inputs, script);
    notes.extend(said(&outcomes[0].1));
    (outcomes, notes)
}

#[test]
fn spikes_are_met_by_policy_and_a_resumed_run_decides_the_same() {
    let place = Place::new();
    let mut lost = Lost::default();
    let mut tried = 0;
    // Where a run is stopped: as the window fills, right before, between and right behind spikes.
    let stops: [&[u64]; 4] = [&[134], &[127, 133], &[128, 132, 139], &[140]];
    for policy in ["warn", "skip", "stop"] {
        for world in [1, 2] {
            for (i, stops) in [&[][..]].into_iter().chain(stops.into_iter().take(cases(1, 4))).enumerate() {
                let quiet = if i % 2 == 0 { "train.log_every=1" } else { "train.log_every=1000" };
                let policy_set = format!("train.spike_policy={policy}");
                let out = format!("{policy}-{world}-{i}");
                let set = [STEPS, &policy_set, quiet, "batch.tokens=64"];
                let inputs = place.inputs(&out, &set);
                // The stop comes at the first spike, before any later stop is reached.
                let reached = match policy {
                    "stop" => stops.iter().copied().filter(|stop| *stop < 133).collect(),
                    _ => stops.to_vec(),
                };
                let (outcomes, notes) =
                    trained(&place, stages::pretrain, world, &inputs, &reached, &mut lost);
                tried += 1;
                let case = format!("{policy}, {world} ranks, stopped at {reached:?}");
                if policy == "stop" {
                    for (rank, (outcome, _)) in outcomes.iter().enumerate() {
                        let Err(e) = outcome else {
                            lost.0.push(format!("{case}: rank {rank} went on"));
                            continue;
                        };
                        let text = e.to_string();
                        let named = ["step 133", "z = ", "--resume", "spike_policy=skip"];
                        let holds = e.code() == Code::TrainingSpike
                            && e.kind().exit_code() == 6
                            && named.iter().all(|part| text.contains(part));
                        lost.unless(holds, || format!("{case}: rank {rank} says {text}"));
                    }
                    let newest = reached.last().map(|step| checkpoint(&inputs.out, *step));
                    let there: Vec<_> = std::fs::read_dir(inputs.out.join("checkpoints")).unwrap().collect();
                    lost.unless(there.len() == reached.len().min(2), || format!("{case}: wrote {there:?}"));
                    lost.unless(newest.is_none_or(|place| place.exists()), || {
                        format!("{case}: lost its last")
                    });
                    let dump =
                        std::fs::read_to_string(inputs.out.join("spike-step-133.json")).unwrap_or_default();
                    lost.unless(dump.contains("\"cell"), || format!("{case}: no cells in {dump:?}"));
                    continue;
                }
                for (rank, (outcome, _)) in outcomes.iter().enumerate() {
                    let counts = outcome.as_ref().map(|s| (s.steps, s.spikes, s.spikes_skipped));
                    let skipped = if policy == "skip" { 3 } else { 0 };
                    let holds = matches!(counts, Ok((143, 3, n)) if n == skipped);
                    lost.unless(holds, || format!("{case}: rank {rank}: {outcome:?}"));
                }
                let named = notes.len() == 3
                    && notes.iter().zip(SPIKES).all(|(note, (step, _))| {
                        note.contains(&format!("step {step}:")) && note.contains("z = ")
                    });
                lost.unless(named, || format!("{case}: said {notes:?}"));
                let whole = checkpoint(&place.root.join(format!("{policy}-{world}-0")), 143);
                let this = checkpoint(&inputs.out, 143);
                lost.unless(tensors(&whole) == tensors(&this), || {
                    format!("{case}: other weights or moments")
                });
                // With other steps logged another number of losses is known.
                let window = |place| state(place)["spikes"]["norms"].clone();
                lost.unless(window(&whole) == window(&this), || format!("{case}: another window"));
            }
        }
    }
    report(
        "F13",
        "spikes injected, by policy, on 1 and 2 ranks, stopped and resumed: equal bits",
        tried,
        &lost.0,
    );
}

#[test]
fn a_skipped_spike_leaves_everything_as_it_was_and_other_stages_know_it_too() {
    let place = Place::new();
    let mut lost = Lost::default();
    let set = [STEPS, "train.spike_policy=skip", "train.checkpoint_every=1", "train.keep=20"];
    let stages: [(&str, Stage, &[&str]); 4] = [
        ("pretrain", stages::pretrain, &[]),
        ("refine", refine, &[]),
        ("finetune", stages::finetune, &["train.accumulate=2"]),
        ("adapted", refine, &["lora.rank=2"]),
    ];
    let tried = cases(2, 4);
    for (name, stage, more) in stages.into_iter().take(tried) {
        let set = [&set[..], more].concat();
        let inputs = if name == "pretrain" { place.inputs(name, &set) } else { place.later(name, &set) };
        let mut script = Script { injects: SPIKES.into(), ..Script::default() };
        let summary = stage(&inputs, &mut script);
        lost.unless(summary.as_ref().is_ok_and(|s| s.spikes_skipped == 3), || format!("{name}: {summary:?}"));
        let at = |step| tensors(&checkpoint(&inputs.out, step));
        for step in 131..=143u64 {
            let skips = SPIKES.iter().any(|(spike, _)| *spike == step);
            lost.unless((at(step) == at(step - 1)) == skips, || format!("{name}: step {step}"));
        }
    }
    report(
        "F13",
        "a skipped spike leaves weights and moments alone, and only it does, by stage",
        tried,
        &lost.0,
    );
}

#[test]
fn a_run_stopped_by_a_spike_goes_on_without_that_step() {
    let place = Place::new();
    let mut lost = Lost::default();
    let run = |more: &[&str], resume, allow: bool| {
        let set = [&[STEPS, "train.checkpoint_every=50"], more].concat();
        let mut inputs = RunInputs { resume, ..place.inputs("run", &set) };
        inputs.allow.settings = allow;
        stages::pretrain(&inputs, &mut Script { injects: SPIKES.into(), ..Script::default() })
    };
    let stopped = run(&["train.spike_policy=stop"], Resume::No, false);
    lost.unless(matches!(&stopped, Err(e) if e.code() == Code::TrainingSpike), || format!("{stopped:?}"));
    let again = run(&["train.spike_policy=stop"], Resume::Last, false);
    lost.unless(matches!(&again, Err(e) if e.code() == Code::TrainingSpike), || format!("{again:?}"));
    let refused = run(&["train.spike_policy=skip"], Resume::Last, false);
    lost.unless(matches!(&refused, Err(e) if e.code() == Code::ResumeOther), || format!("{refused:?}"));
    let on = run(&["train.spike_policy=skip"], Resume::Last, true);
    lost.unless(matches!(&on, Ok(s) if (s.steps, s.spikes_skipped) == (143, 3)), || format!("{on:?}"));
    report("F13", "the stop repeats on resuming, and the way on that its message names goes on", 4, &lost.0);
}

#[test]
fn no_spike_is_seen_where_none_was_made_and_none_where_it_is_off() {
    let place = Place::new();
    let mut lost = Lost::default();
    for (out, z, injects) in [("calm", "train.spike_z=9", &[][..]), ("off", "train.spike_z=0", &SPIKES[..])] {
        let inputs = place.inputs(out, &[STEPS, z, "train.spike_policy=stop"]);
        let mut script = Script { injects: injects.into(), ..Script::default() };
        let summary = stages::pretrain(&inputs, &mut script);
        lost.unless(matches!(&summary, Ok(s) if s.spikes == 0), || format!("{out}: {summary:?}"));
    }
    report("F13", "no spike where none was injected, and none under train.spike_z = 0", 2, &lost.0);
}
