//! F16: one writer to a run folder, and one to a corpus. The second is refused at once, with the first's process, host and time; what a
//! killed writer of another host left is taken over by name alone.

use super::faults::report;
use super::place::*;
use super::typed_cells;
use cellrefine::corpus::{CorpusOptions, CorpusWriter, VocabIdentity};
use cellrefine::error::Code;
use std::path::Path;

const ENDLESS: &str = "pretrain --corpus x.cells --preset tiny --out run --set model.layers=1 --set model.width=16 \
    --set model.ffn=32 --set batch.cells=8 --set train.log_every=1 --set train.steps=1000000 --set train.checkpoint_every=5";

/// As a writer of another host leaves it that was killed.
fn left_elsewhere(file: &Path) {
    let text = r#"{"process":4711,"host":"node17","since":"2026-01-02 03:04 UTC"}"#;
    std::fs::write(file, text).unwrap();
}

#[test]
fn a_second_writer_of_a_run_is_refused() {
    let place = Place::new();
    let mut lost = Lost::default();
    let first = place.command(ENDLESS).spawn().unwrap();
    place.wait_for("run", 12);
    for more in ["", "--resume", "--resume=auto", "--resume --force-unlock"] {
        let out = place.run(&format!("{ENDLESS} {more}"));
        let said = text(&out.stderr);
        // Without --resume a folder with a run in it would be refused all the same: for that, and by another code.
        let named = format!("process {} on ", first.id());
        let holds = out.status.code() == Some(4)
            && [&named, " since 20", "CR0804"].iter().all(|part| said.contains(part));
        lost.unless(holds, || format!("{more:?}: {:?} {said}", out.status.code()));
    }
    // The first has noticed nothing, and ends in order.
    signal(&first, libc::SIGTERM);
    let out = first.wait_with_output().unwrap();
    lost.unless(out.status.code() == Some(5), || format!("the first: {}", text(&out.stderr)));
    let lock = place.root.join("run/.lock");
    lost.unless(std::fs::read(&lock).unwrap().is_empty(), || "an orderly end leaves its name".into());

    let last = std::fs::read_to_string(place.root.join("run/last")).unwrap();
    left_elsewhere(&lock);
    let resume = "--resume --allow-settings --set train.steps=1";
    let words = format!("{ENDLESS} {resume}");
    let out = place.run(&words);
    let said = text(&out.stderr);
    let parts = ["process 4711 on node17 since 2026-01-02 03:04 UTC", "--force-unlock", "CR0804"];
    let holds = out.status.code() == Some(4) && parts.iter().all(|part| said.contains(part));
    lost.unless(holds, || format!("of another host: {said}"));
    let same = std::fs::read_to_string(place.root.join("run/last")).unwrap() == last;
    lost.unless(same, || "a refused writer wrote".into());
    let out = place.run(&format!("{words} --force-unlock"));
    lost.unless(out.status.success(), || format!("forced: {}", text(&out.stderr)));

    // A writer of this host that was killed leaves its name, and a free lock.
    let second = place.command(&ENDLESS.replace("--out run", "--out killed")).spawn().unwrap();
    // Step 10 has waited for the checkpoint of step 5.
    place.wait_for("killed", 12);
    signal(&second, libc::SIGKILL);
    second.wait_with_output().unwrap();
    let named = std::fs::read_to_string(place.root.join("killed/.lock")).unwrap();
    lost.unless(named.contains("\"process\""), || format!("a killed writer left {named:?}"));
    let words = ENDLESS.replace("--out run", "--out killed");
    let out = place.run(&format!("{words} {resume}"));
    lost.unless(out.status.success(), || format!("after a kill: {}", text(&out.stderr)));
    report("F16", "a second writer of a run folder, alive, killed here, killed on another host", 7, &lost.0);
}

#[test]
fn a_second_writer_of_a_corpus_is_refused() {
    let place = Place::new();
    let mut lost = Lost::default();
    let target = place.root.join("y.cells");
    let vocab = typed_cells::vocab(3, 0.0);
    let options = || CorpusOptions {
        vocab: VocabIdentity { digest: vocab.digest().into(), len: vocab.len() },
        vocab_file: Some(vocab.to_tsv(&[]).into_bytes()),
        values: false,
        shard_cells: 0,
        obs: Vec::new(),
        provenance: serde_json::Value::Null,
    };
    let first = CorpusWriter::create(&target, options()).unwrap();
    let e = CorpusWriter::create(&target, options()).map(drop).unwrap_err();
    let me = format!("process {} on ", std::process::id());
    let holds =
        e.code() == Code::AnotherWriter && e.to_string().contains(&me) && e.to_string().contains(" since 20");
    lost.unless(holds, || format!("in this process: {e}"));
    for more in ["", " --force-unlock"] {
        let out = place.run(&format!("merge x.cells x.cells --out y.cells{more}"));
        let said = text(&out.stderr);
        lost.unless(out.status.code() == Some(4) && said.contains(&me), || format!("merge{more}: {said}"));
    }
    drop(first);
    lost.unless(!place.root.join(".y.cells.partial").exists(), || "an unfinished corpus stays".into());

    std::fs::create_dir(place.root.join(".y.cells.partial")).unwrap();
    left_elsewhere(&place.root.join(".y.cells.partial/writer.lock"));
    std::fs::write(place.root.join(".y.cells.partial/gene.spool"), b"half").unwrap();
    let part = typed_cells::write(&place.root, "z.cells", &[9, 9, 9], 0.0);
    let merge = format!("merge {} --out y.cells", part.display());
    let out = place.run(&merge);
    let said = text(&out.stderr);
    let holds = out.status.code() == Some(4)
        && said.contains("process 4711 on node17")
        && said.contains("--force-unlock");
    lost.unless(holds, || format!("of another host: {said}"));
    lost.unless(place.root.join(".y.cells.partial/gene.spool").exists(), || "its files were removed".into());
    let out = place.run(&format!("{merge} --force-unlock"));
    lost.unless(out.status.success() && target.exists(), || format!("forced: {}", text(&out.stderr)));
    lost.unless(!target.join("writer.lock").exists(), || "a finished corpus has a lock file".into());
    report("F16", "a second writer of a corpus, alive or killed on another host", 5, &lost.0);
}
