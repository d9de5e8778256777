//! Malformed inputs (F7 to F10 and F17 to F21 of docs/reliability.md): every kind of file that the program reads, cut, flipped and
//! mutated with fixed seeds. Whatever a file holds, reading it ends in cells or in one clear error of bad input: no panic, no
//! crash, no hang, no memory beyond what a file of its size may take. Damage to a corpus or a checkpoint is never read as data.
//!
//! `cargo test` reads a selection, `FAULTS=all` all of it. A mutant that was lost is named by kind, plan and number.

mod batches;
#[path = "../common/faults.rs"]
mod faults;
mod hostile;
mod kinds;
mod mutate;
mod shrink;

use batches::{Plan, try_mutants};
use faults::{cases, report};
use kinds::{KINDS, Kind};

#[global_allocator]
static ALLOCATOR: batches::Counting = batches::Counting;

/// What a child process runs; nothing in a run of its own.
#[test]
fn child() {
    batches::child();
}

/// The targets of cargo-fuzz and the kinds here are one list.
#[test]
fn every_kind_has_its_fuzz_target() {
    let fuzz = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let manifest = std::fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
    let targets = manifest.matches("fuzz_targets/").count();
    assert_eq!(targets, KINDS.len());
    for kind in KINDS {
        let path = format!("fuzz_targets/{}.rs", kind.name);
        let target = std::fs::read_to_string(fuzz.join(&path)).unwrap_or_else(|e| panic!("{path}: {e}"));
        assert!(manifest.contains(&format!("name = \"{}\"\npath = \"{path}\"", kind.name)), "{}", kind.name);
        assert!(target.contains(&format!("read_damaged(\"{}\", bytes)", kind.name)), "{path}");
    }
}

/// Damages `kind` by `plan` up to `most` times, and records it as `fault`.
fn hold(kind: &Kind, fault: &str, plan: Plan, most: usize) {
    let start = std::time::Instant::now();
    let outcome = try_mutants(kind, plan, most);
    eprintln!(
        "{fault:<4} {:<20} {plan:?}: {} tried, {} refused, {} lost, {:.1} MB at most, {:.1} s",
        kind.name,
        outcome.tried,
        outcome.refused,
        outcome.lost.len(),
        outcome.peak_bytes as f64 / 1e6,
        start.elapsed().as_secs_f64()
    );
    let what = match plan {
        Plan::Cuts => format!("{} cut short", kind.name),
        Plan::Flips => format!("one bit of {} flipped", kind.name),
        Plan::Mutants => format!("{} mutated", kind.name),
        Plan::Hostile => format!("hostile {}", kind.name),
    };
    report(fault, &what, outcome.tried, &outcome.lost);
    assert!(
        outcome.refused > 0 || kind.name == "resume_auto",
        "{}: no mutant was refused, so nothing is tested",
        kind.name
    );
}

/// Mutants of the kinds of one row; all of them are tried before the first loss is told.
fn mutate_all(fault: &str) {
    let mut lost = Vec::new();
    for kind in KINDS.iter().filter(|k| k.fault == fault) {
        let most = if kind.heavy { cases(8, 300) } else { cases(60, 2_000) };
        for (plan, most) in [(Plan::Mutants, most), (Plan::Hostile, usize::MAX)] {
            let held = std::panic::catch_unwind(|| hold(kind, fault, plan, most));
            lost.extend(held.err().map(|_| kind.name));
        }
    }
    assert!(lost.is_empty(), "{fault}: lost mutants of {lost:?}");
}

#[test]
fn f7_a_corpus_that_is_cut_short_is_refused() {
    for kind in KINDS.iter().filter(|k| k.fault == "F8") {
        hold(kind, "F7", Plan::Cuts, cases(150, usize::MAX));
    }
}

#[test]
fn f8_no_flipped_bit_of_a_corpus_is_read_as_data() {
    for kind in KINDS.iter().filter(|k| k.fault == "F8") {
        hold(kind, "F8", Plan::Flips, cases(150, 3_000));
    }
    mutate_all("F8");
}

#[test]
fn f9_a_file_that_shrinks_while_it_is_mapped_ends_with_words() {
    let (tried, lost) = shrink::try_all(cases(2, 12));
    report(
        "F9",
        "a shard cut short or emptied while cells, batches or checksums of it are read",
        tried,
        &lost,
    );
}

#[test]
fn f10_no_damaged_checkpoint_is_resumed() {
    for kind in KINDS.iter().filter(|k| k.fault == "F10") {
        for plan in [Plan::Cuts, Plan::Flips] {
            hold(kind, "F10", plan, if kind.heavy { cases(6, 150) } else { cases(80, 1_500) });
        }
    }
    mutate_all("F10");
}

#[test]
fn f17_malformed_cells() {
    mutate_all("F17");
}

#[test]
fn f18_malformed_text() {
    mutate_all("F18");
}

#[test]
fn f19_malformed_tensors() {
    mutate_all("F19");
}

#[test]
fn f20_malformed_arrow() {
    mutate_all("F20");
}

#[test]
fn f21_names_that_lead_out() {
    mutate_all("F21");
}
