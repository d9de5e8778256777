//! F11: a run resumes with what it was started with. Other inputs are refused by name, with both digests, and what may be others
//! after all is allowed by name: then a position among the cells is never carried over to others.

use super::faults::report;
use super::place::*;
use super::typed_cells;
use cellrefine::corpus::Corpus;
use cellrefine::error::{Code, Error};
use cellrefine::train::{Allowed, Resume, RunInputs, RunSummary, SplitFlags, stages};
use std::path::Path;

const ALL: Allowed = Allowed { corpus: true, vocabulary: true, settings: true };

/// A run of 12 steps that was stopped after the fifth, in the first epoch.
fn stopped(place: &Place, out: &str, stage: Stage, inputs: RunInputs) -> RunInputs {
    let mut script = Script { stops: vec![5], ..Script::default() };
    let e = stage(&inputs, &mut script).unwrap_err();
    assert_eq!(e.code(), Code::Checkpointed, "{out}: {e}");
    assert!(inputs.out.starts_with(&place.root));
    RunInputs { resume: Resume::Last, ..inputs }
}

fn go(stage: Stage, inputs: &RunInputs) -> (Result<RunSummary, Error>, Vec<String>) {
    let mut script = Script::default();
    (stage(inputs, &mut script), script.notes)
}

/// A copy of the run, so that every case starts from the same.
fn copy(inputs: &RunInputs, name: &str) -> RunInputs {
    let out = inputs.out.with_file_name(name);
    let status = std::process::Command::new("cp").arg("-r").arg(&inputs.out).arg(&out).status().unwrap();
    assert!(status.success());
    RunInputs { out, ..inputs.clone() }
}

fn digest(corpus: &Path) -> String {
    Corpus::open(corpus).unwrap().digest().to_string()
}

#[test]
fn other_inputs_are_refused_by_name_with_both_digests() {
    let place = Place::new();
    let mut lost = Lost::default();
    let mut tried = 0;
    let run = stopped(&place, "run", stages::pretrain, place.inputs("run", &["train.steps=12"]));
    let tune = stopped(&place, "tune", stages::finetune, place.later("tune", &["train.steps=12"]));
    let refined = stopped(&place, "refined", refine, place.later("refined", &["train.steps=12"]));
    let more = typed_cells::write(&place.root, "more.cells", &[61, 30, 12], 0.0);
    let salted = typed_cells::write(&place.root, "salted.cells", &[60, 30, 12], 0.5);
    let wider = typed_cells::write(&place.root, "wider.cells", &[40, 30, 12, 9], 0.0);
    let [ours, others] = [digest(&place.corpus), digest(&more)];
    let vocabularies = [0.0, 0.5].map(|salt| typed_cells::vocab(3, salt).digest().to_string());
    let corpus = |of: &RunInputs, path: &Path, allow| RunInputs { corpus: path.into(), allow, ..of.clone() };
    let set = |of: &RunInputs, text: &str, allow| {
        let mut inputs = RunInputs { allow, ..of.clone() };
        inputs.sources.set.push(text.into());
        inputs
    };
    let divided = |of: &RunInputs, change: &dyn Fn(&mut SplitFlags)| {
        let mut inputs = RunInputs { allow: ALL, ..of.clone() };
        change(&mut inputs.split);
        inputs
    };
    let none = Allowed::default();
    let cells = Allowed { corpus: true, ..none };
    let cases: Vec<(&str, Stage, RunInputs, Vec<&str>)> = vec![
        (
            "corpus",
            stages::pretrain,
            corpus(&run, &more, none),
            vec![&ours, &others, "--allow-corpus", "another corpus"],
        ),
        (
            "corpus of a classifier",
            stages::finetune,
            corpus(&tune, &more, none),
            vec![&ours, &others, "--allow-corpus"],
        ),
        ("corpus of a refine run", refine, corpus(&refined, &more, none), vec![&ours, &others]),
        (
            "corpus of a refine run, allowed",
            refine,
            corpus(&refined, &more, ALL),
            vec!["--checkpoint", "refined"],
        ),
        (
            "vocabulary",
            stages::pretrain,
            corpus(&run, &salted, none),
            vec!["--allow-corpus --allow-vocabulary"],
        ),
        (
            "vocabulary, corpus allowed",
            stages::pretrain,
            corpus(&run, &salted, cells),
            vec![&vocabularies[0], &vocabularies[1], "--allow-vocabulary"],
        ),
        (
            "a longer vocabulary, all allowed",
            stages::pretrain,
            corpus(&run, &wider, ALL),
            vec!["vocabulary", "66", "74"],
        ),
        ("other classes, all allowed", stages::finetune, corpus(&tune, &wider, ALL), vec!["66", "74"]),
        (
            "rate",
            stages::pretrain,
            set(&run, "optimizer.learning_rate=0.5", none),
            vec!["optimizer.learning_rate", "--allow-settings"],
        ),
        (
            "width, all allowed",
            stages::pretrain,
            set(&run, "model.width=32", ALL),
            vec!["model.width", "16", "32"],
        ),
        ("adapters, all allowed", stages::finetune, set(&tune, "lora.rank=2", ALL), vec!["lora.rank"]),
        ("steps", stages::pretrain, set(&run, "train.steps=20", none), vec!["train.steps", "12", "20"]),
        ("spikes", stages::pretrain, set(&run, "train.spike_policy=skip", none), vec!["train.spike_policy"]),
        (
            "label",
            stages::finetune,
            divided(&tune, &|s| s.label = Some("donor".into())),
            vec!["--label", "donor"],
        ),
        ("no label", refine, divided(&refined, &|s| s.label = None), vec!["label", "cell_type"]),
        (
            "split",
            stages::pretrain,
            divided(&run, &|s| s.split = Some("train=0.5,test=0.5".into())),
            vec!["--split", "0.5", "0.6"],
        ),
        (
            "fewer labels",
            stages::finetune,
            divided(&tune, &|s| s.labels_per_class = Some(3)),
            vec!["--labels-per-class", "3"],
        ),
    ];
    for (name, stage, inputs, parts) in cases {
        let before = tensors(&checkpoint(&inputs.out, 5));
        let (outcome, _) = go(stage, &inputs);
        tried += 1;
        match outcome {
            Ok(summary) => lost.0.push(format!("{name}: went on to step {}", summary.steps)),
            Err(e) => {
                let text = e.to_string();
                let codes = [Code::ResumeOther, Code::CheckpointVocabulary];
                let named = codes.contains(&e.code()) && parts.iter().all(|part| text.contains(part));
                lost.unless(named && e.kind().exit_code() == 3, || format!("{name}: {} {text}", e.code()));
            }
        }
        let untouched = tensors(&checkpoint(&inputs.out, 5)) == before;
        lost.unless(untouched, || format!("{name}: the checkpoint changed"));
    }
    // What is refused does no harm: the run itself goes on.
    for (stage, inputs) in [(stages::pretrain as Stage, &run), (stages::finetune, &tune), (refine, &refined)]
    {
        let (outcome, _) = go(stage, inputs);
        lost.unless(outcome.as_ref().is_ok_and(|s| s.steps == 12), || format!("{outcome:?}"));
    }
    report(
        "F11",
        "resumed with another corpus, vocabulary, setting or label: refused, both digests named",
        tried,
        &lost.0,
    );
}

#[test]
fn what_is_allowed_by_name_goes_on_and_no_position_is_carried_over() {
    let place = Place::new();
    let mut lost = Lost::default();
    let set = ["train.steps=12", "train.checkpoint_every=1", "train.keep=20", "train.eval_every=4"];
    let run = stopped(&place, "run", stages::pretrain, place.inputs("run", &set));
    let more = typed_cells::write(&place.root, "more.cells", &[61, 33, 12], 0.0);
    let salted = typed_cells::write(&place.root, "salted.cells", &[60, 30, 12], 0.5);
    let fresh = stages::pretrain(
        &RunInputs { corpus: more.clone(), ..place.inputs("fresh", &set) },
        &mut Script::default(),
    );
    let fresh = fresh.unwrap().out;

    let cells = Allowed { corpus: true, ..Allowed::default() };
    let inputs = RunInputs { corpus: more.clone(), allow: cells, ..copy(&run, "cells") };
    let (outcome, notes) = go(stages::pretrain, &inputs);
    lost.unless(outcome.as_ref().is_ok_and(|s| s.steps == 12), || format!("corpus: {outcome:?}"));
    let said = notes.iter().any(|n| n.contains("another corpus") && n.contains("first epoch"));
    lost.unless(said, || format!("corpus: {notes:?}"));
    for k in 1..=7 {
        // Step 5 + k draws what a new run's step k draws.
        let [here, there] =
            [checkpoint(&inputs.out, 5 + k), checkpoint(&fresh, k)].map(|c| state(&c)["sampler"].clone());
        lost.unless(here == there, || format!("corpus: {here} after {k} steps, {there} in a new run"));
    }
    let split = |run: &Path| std::fs::read_to_string(run.join("split.json")).unwrap();
    lost.unless(split(&inputs.out) == split(&fresh), || "corpus: the run folder has the old split".into());
    // From here on this is the run's corpus.
    let back = RunInputs { corpus: place.corpus.clone(), allow: Allowed::default(), ..inputs.clone() };
    lost.unless(go(stages::pretrain, &back).0.is_err(), || "corpus: the old one is taken again".into());
    let again = RunInputs { allow: Allowed::default(), ..inputs };
    lost.unless(go(stages::pretrain, &again).0.is_ok(), || "corpus: the new one is refused".into());

    let both = Allowed { vocabulary: true, ..cells };
    let inputs = RunInputs { corpus: salted, allow: both, ..copy(&run, "vocabulary") };
    let (outcome, _) = go(stages::pretrain, &inputs);
    lost.unless(outcome.as_ref().is_ok_and(|s| s.steps == 12), || format!("vocabulary: {outcome:?}"));
    let written = std::fs::read(checkpoint(&inputs.out, 12).join("vocab.tsv")).unwrap();
    lost.unless(written == std::fs::read(inputs.corpus.join("vocab.tsv")).unwrap(), || {
        "the old vocab.tsv".into()
    });

    let settings = Allowed { settings: true, ..Allowed::default() };
    for (name, text, steps) in [
        ("longer", "train.steps=20", 20),
        ("rate", "optimizer.learning_rate=0.5", 12),
        ("drawn", "batch.sampling=sqrt", 12),
    ] {
        let mut inputs = RunInputs { allow: settings, ..copy(&run, name) };
        inputs.sources.set.push(text.into());
        let (outcome, notes) = go(stages::pretrain, &inputs);
        lost.unless(outcome.as_ref().is_ok_and(|s| s.steps == steps), || format!("{text}: {outcome:?}"));
        let setting = text.split('=').next().unwrap();
        lost.unless(notes.iter().any(|n| n.contains(setting)), || format!("{text}: {notes:?}"));
        let saved = std::fs::read_to_string(inputs.out.join("settings.toml")).unwrap();
        let (section, key) = text.split_once('.').unwrap();
        let table: toml::Table = saved.parse().unwrap();
        let (key, value) = key.split_once('=').unwrap();
        let value_saved = table[section][key].to_string();
        lost.unless(value_saved.trim_matches('"') == value, || format!("{text}: saved as {value_saved}"));
        let (outcome, _) = go(stages::pretrain, &RunInputs { allow: Allowed::default(), ..inputs });
        lost.unless(outcome.is_ok(), || format!("{text}: refused when resumed again: {outcome:?}"));
    }
    // The number of ranks may change, and is said.
    for (rank, (outcome, script)) in
        ranks(2, stages::pretrain, &copy(&run, "two"), |_| Script::default()).into_iter().enumerate()
    {
        let said = script.notes.iter().any(|n| n.contains("started by 1 ranks, continued by 2"));
        lost.unless(outcome.is_ok() && said, || format!("rank {rank} of 2: {outcome:?} {:?}", script.notes));
    }
    report(
        "F11",
        "allowed by name: goes on, says so, draws another corpus from its first epoch on",
        6,
        &lost.0,
    );
}

#[test]
fn the_flags_need_resume_and_reach_the_run() {
    let place = Place::new();
    let mut lost = Lost::default();
    let small = "--set model.layers=1 --set model.width=16 --set model.ffn=32 --set batch.cells=8";
    let words = |corpus: &str| format!("pretrain --corpus {corpus} --preset tiny --out run {small}");
    typed_cells::write(&place.root, "more.cells", &[61, 30, 12], 0.0);
    typed_cells::write(&place.root, "salted.cells", &[60, 30, 12], 0.5);
    for (words, code, part) in [
        (format!("{} --set train.steps=2", words("x.cells")), 0, ""),
        (format!("{} --allow-corpus", words("x.cells")), 2, "--resume"),
        (format!("{} --resume --set train.steps=4", words("x.cells")), 3, "--allow-settings"),
        (format!("{} --resume --allow-settings --set train.steps=4", words("x.cells")), 0, "4 steps"),
        (format!("{} --resume", words("more.cells")), 3, "--allow-corpus"),
        (format!("{} --resume --allow-corpus", words("salted.cells")), 3, "--allow-vocabulary"),
        (
            format!("{} --resume --allow-corpus --allow-vocabulary", words("salted.cells")),
            0,
            "another corpus",
        ),
        (format!("{} --resume --allow-corpus", words("more.cells")), 0, "another corpus"),
    ] {
        let out = place.run(&words);
        let said = text(&out.stderr);
        let holds = out.status.code() == Some(code) && said.contains(part);
        lost.unless(holds, || format!("{words}: {:?} {said}", out.status.code()));
    }
    report("F11", "the flags by which other inputs are allowed, through the program", 8, &lost.0);
}
