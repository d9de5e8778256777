//! Splits, sampling and batches: statistics, exact resume at any point, equality with naive packing, and no leak.

#[path = "common/cells.rs"]
mod cells;

use cellrefine::corpus::splits::SplitRule;
use cellrefine::corpus::*;
use cellrefine::error::Kind;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::Arc;

/// A corpus of `n` cells under `dir`; labels as in `cells::cells`.
fn corpus(dir: &tempfile::TempDir, n: usize, vocab: u32, values: bool) -> (Arc<Corpus>, Vec<cells::Cell>) {
    let path = dir.path().join("x.cells");
    let mut made = cells::cells(n, vocab, 40, 7);
    made.iter_mut().filter(|c| c.gene.is_empty()).for_each(|c| {
        c.gene = vec![5];
        c.value = vec![half::f16::ONE];
    });
    cells::write(&path, &made, cells::options(vocab as usize, values, 64));
    (Arc::new(Corpus::open(&path).unwrap()), made)
}

fn fractions(train: f64, val: f64, test: f64, seed: u64) -> SplitSpec {
    SplitSpec {
        rule: SplitRule::Fractions { train, val, test },
        label: Some("cell_type".into()),
        exclude: Vec::new(),
        labels_per_class: None,
        seed,
    }
}

fn options(cells: usize, tokens: usize, max_tokens: usize) -> BatchOptions {
    BatchOptions { cells, tokens, max_tokens, cls: None, eos: None, values: false }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// No cell is in two parts, whatever the fractions, the seed and the labels; strata keep their share; the draw of a class
    /// does not depend on what is left out.
    #[test]
    fn splits_never_leak(seed in any::<u64>(), train in 0.2f64..0.8, with_val in any::<bool>(), exclude in any::<bool>()) {
        let dir = tempfile::tempdir().unwrap();
        let (corpus, made) = corpus(&dir, 300, 50, false);
        let val = if with_val { (1.0 - train) / 2.0 } else { 0.0 };
        let mut spec = fractions(train, val, 1.0 - train - val, seed);
        let whole = Split::make(&corpus, &spec).unwrap();
        if exclude {
            spec.exclude = vec!["type b".into()];
        }
        let split = Split::make(&corpus, &spec).unwrap();
        let mut seen = BTreeSet::new();
        for part in [&split.train, &split.val, &split.test] {
            prop_assert!(part.windows(2).all(|w| w[0] < w[1]));
            for &cell in part {
                prop_assert!(seen.insert(cell), "cell {} is in two parts", cell);
                prop_assert!(!exclude || made[cell as usize].label.as_deref() != Some("type b"));
            }
        }
        let kept = made.iter().filter(|c| !exclude || c.label.as_deref() != Some("type b")).count();
        prop_assert_eq!(seen.len(), kept);
        if exclude {
            let rest: Vec<u32> = whole.train.iter().copied().filter(|c| seen.contains(c)).collect();
            prop_assert_eq!(&split.train, &rest);
        }
        for (class, n) in split.training().counts().iter().enumerate() {
            let labels = split.labels.as_ref().unwrap();
            let all = labels.codes.iter().filter(|&&c| c == class as i32).count() as f64;
            prop_assert!((*n as f64 - train * all).abs() <= 1.0, "class {} has {} of {}", class, n, all);
            prop_assert!(split.test.iter().any(|&c| labels.codes[c as usize] == class as i32));
        }
        // What is fitted sees training cells alone.
        let training = split.training();
        prop_assert_eq!(training.cells(), &split.train[..]);
        prop_assert!(training.labelled().cells().iter().all(|c| split.train.binary_search(c).is_ok()));
    }
}

#[test]
fn a_recorded_split_comes_back_or_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (corpus, made) = corpus(&dir, 200, 50, false);
    let mut spec = fractions(0.6, 0.1, 0.3, 3);
    spec.labels_per_class = Some(4);
    let split = Split::make(&corpus, &spec).unwrap();
    let text = serde_json::to_string(&split.record()).unwrap();
    let record: splits::SplitRecord = serde_json::from_str(&text).unwrap();
    assert_eq!(Split::restore(&corpus, &record).unwrap(), split);
    let mut other = record.clone();
    other.spec.seed = 4;
    assert_eq!(Split::restore(&corpus, &other).unwrap_err().kind(), Kind::Input);
    other = record.clone();
    other.corpus_digest = "other".into();
    assert!(Split::restore(&corpus, &other).unwrap_err().what().contains("another corpus"));

    let path = dir.path().join("split.tsv");
    split.write_tsv(&corpus, &path).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let rows: Vec<Vec<&str>> = text.lines().skip(1).map(|l| l.split('\t').collect()).collect();
    assert_eq!(rows.len(), 200);
    assert_eq!(rows.iter().filter(|r| r[1] == "train" && !r[2].is_empty()).count(), 12);
    for (row, cell) in rows.iter().zip(&made) {
        assert_eq!(row[0], cell.id);
        assert!(row[1] == "train" || row[2] == cell.label.as_deref().unwrap_or(""));
    }
}

#[test]
fn few_labels_are_nested_and_hide_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let (corpus, _) = corpus(&dir, 300, 50, false);
    let chosen = |n: usize| {
        let mut spec = fractions(0.67, 0.0, 0.33, 9);
        spec.labels_per_class = Some(n);
        let split = Split::make(&corpus, &spec).unwrap();
        let training = split.training();
        assert_eq!(training.counts(), vec![n as u64; 3]);
        assert_eq!(training.cells().len(), split.train.len());
        assert_eq!(training.labels().iter().filter(|l| **l >= 0).count(), 3 * n);
        training.labelled().cells().to_vec()
    };
    let (five, ten) = (chosen(5), chosen(10));
    assert!(five.iter().all(|c| ten.contains(c)));
}

#[test]
fn held_out_values_stay_out_and_mistakes_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (corpus, made) = corpus(&dir, 200, 50, false);
    let spec = |rule, label: &str| SplitSpec {
        rule,
        label: Some(label.into()),
        exclude: Vec::new(),
        labels_per_class: None,
        seed: 1,
    };
    let hold = |value: &str, val| SplitRule::Holdout { column: "cell_type".into(), value: value.into(), val };
    let split = Split::make(&corpus, &spec(hold("type c", 0.2), "cell_type")).unwrap();
    assert!(split.test.iter().all(|&c| made[c as usize].label.as_deref() == Some("type c")));
    let label = |c: &u32| made[*c as usize].label.as_deref();
    assert!(split.train.iter().chain(&split.val).all(|c| ["type a", "type b"].map(Some).contains(&label(c))));
    assert!(!split.val.is_empty());

    let refused = |spec: &SplitSpec, words: &[&str]| {
        let e = Split::make(&corpus, spec).unwrap_err();
        assert_eq!(e.kind(), Kind::Input, "{e}");
        assert!(words.iter().all(|w| e.to_string().contains(w)), "{e}");
    };
    refused(&spec(hold("type d", 0.0), "cell_type"), &["type d", "type a, type b, type c", "did you mean"]);
    refused(&spec(SplitRule::All, "celltype"), &["celltype", "cell_type, score"]);
    refused(&spec(SplitRule::All, "score"), &["numeric"]);
    let mut one = spec(SplitRule::All, "cell_type");
    one.exclude = vec!["type a".into(), "type b".into()];
    refused(&one, &["at least two classes", "only \"type c\""]);
    one.exclude = vec!["type z".into()];
    refused(&one, &["type z"]);
    one.exclude = vec!["type a".into(), "type b".into(), "type c".into()];
    refused(&one, &["no labelled cell"]);
}

#[test]
fn a_class_with_one_cell_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.cells");
    let mut made = cells::cells(60, 50, 20, 7);
    made[3].label = Some("lonely".into());
    cells::write(&path, &made, cells::options(50, false, 0));
    let corpus = Corpus::open(&path).unwrap();
    let mut spec = fractions(0.67, 0.0, 0.33, 1);
    let e = Split::make(&corpus, &spec).unwrap_err();
    assert_eq!(e.kind(), Kind::Input);
    assert!(e.to_string().contains("\"lonely\"") && e.to_string().contains("--exclude-label"), "{e}");
    spec.exclude = vec!["lonely".into()];
    assert!(Split::make(&corpus, &spec).unwrap().train.iter().all(|&c| c != 3));
    spec = SplitSpec { rule: SplitRule::All, exclude: Vec::new(), ..spec };
    assert!(Split::make(&corpus, &spec).is_ok(), "without a test side one cell is enough");
}

#[test]
fn an_epoch_is_a_permutation_and_epochs_differ() {
    let of = |seed| Sampler::of_cells((100..1100).collect(), seed).unwrap();
    let s = of(5);
    let (first, second) = (s.order_of(0), s.order_of(1));
    for order in [&first, &second] {
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (100..1100).collect::<Vec<u32>>());
    }
    assert!(first != second && first != of(6).order_of(0) && first == of(5).order_of(0));
    // Each cell is as likely in the first tenth as anywhere: 200 epochs, expected 20 of each, deviation √18.
    let mut early = vec![0u32; 1100];
    for epoch in 0..200 {
        s.order_of(epoch)[..100].iter().for_each(|&c| early[c as usize] += 1);
    }
    let chi2: f64 = early[100..].iter().map(|&n| (n as f64 - 20.0).powi(2) / 18.0).sum();
    assert!((850.0..1150.0).contains(&chi2), "chi-squared {chi2} of 1000");
    let ranks: Vec<Vec<u32>> = (0..3).map(|r| of(5).for_rank(r, 3).unwrap().order_of(0)).collect();
    assert!(ranks.iter().all(|r| r.len() == 333));
    assert!((0..999).all(|i| ranks[i % 3][i / 3] == first[i]));
    assert!(of(5).for_rank(3, 3).is_err() && of(5).for_rank(0, 2000).is_err());
    assert_eq!(Sampler::of_cells(Vec::new(), 1).unwrap_err().kind(), Kind::Input);
}

#[test]
fn class_aware_draws_follow_the_classes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.cells");
    let mut made = cells::cells(1000, 50, 5, 7);
    for (i, c) in made.iter_mut().enumerate() {
        c.label = match i {
            0..640 => Some("large".into()),
            640..800 => Some("middle".into()),
            800..810 => Some("rare".into()),
            _ => None,
        };
    }
    cells::write(&path, &made, cells::options(50, false, 0));
    let corpus = Corpus::open(&path).unwrap();
    let spec = SplitSpec { rule: SplitRule::All, ..fractions(1.0, 0.0, 0.0, 1) };
    let split = Split::make(&corpus, &spec).unwrap();
    for (sampling, weight) in
        [(Sampling::Sqrt, [640f64.sqrt(), 160f64.sqrt(), 10f64.sqrt()]), (Sampling::Uniform, [1.0; 3])]
    {
        let s = Sampler::over(&split.training(), sampling, 11).unwrap();
        let mut drawn = vec![0u32; 1000];
        for epoch in 0..50 {
            s.order_of(epoch).iter().for_each(|&c| drawn[c as usize] += 1);
        }
        let of = |r: std::ops::Range<usize>| drawn[r].iter().sum::<u32>() as f64 / 50_000.0;
        let total: f64 = weight.iter().sum();
        for (range, share) in [(0..640, weight[0]), (640..800, weight[1]), (800..810, weight[2])] {
            let wanted = 0.81 * share / total;
            let deviation = (wanted * (1.0 - wanted) / 50_000.0).sqrt();
            assert!(
                (of(range.clone()) - wanted).abs() < 4.0 * deviation,
                "{sampling:?} {range:?}: {}",
                of(range.clone())
            );
        }
        assert!((of(810..1000) - 0.19).abs() < 0.008, "cells without a label keep their share");
        let mean = of(800..810) * 5_000.0;
        assert!(
            drawn[800..810].iter().all(|&n| (n as f64 - mean).abs() < 5.0 * mean.sqrt()),
            "cells of a class equally"
        );
    }
    let blind = Split::make(&corpus, &SplitSpec { label: None, ..spec }).unwrap();
    assert_eq!(Sampler::over(&blind.training(), Sampling::Sqrt, 1).unwrap_err().kind(), Kind::Usage);
}

/// The same batches from a fresh process that starts at any saved position, with or without the loader's thread.
#[test]
fn resume_is_exact_at_every_batch() {
    let dir = tempfile::tempdir().unwrap();
    let (corpus, _) = corpus(&dir, 150, 50, false);
    let split = Split::make(&corpus, &fractions(0.8, 0.0, 0.2, 2)).unwrap();
    for sampling in [Sampling::None, Sampling::Sqrt] {
        let packer = |state: Option<&SamplerState>| {
            let mut s = Sampler::over(&split.training(), sampling, 21).unwrap();
            state.iter().for_each(|state| s.restore(state).unwrap());
            Packer::sampled(corpus.clone(), s, options(8, 200, 40)).unwrap()
        };
        let take = |mut p: Packer, n: usize| -> Vec<Batch> {
            (0..n)
                .map(|_| {
                    let mut b = Batch::default();
                    assert!(p.fill(&mut b).unwrap());
                    b
                })
                .collect()
        };
        let whole = take(packer(None), 60);
        assert!(whole.iter().any(|b| b.after.as_ref().unwrap().epoch == 2), "three epochs are crossed");
        for at in 0..50 {
            let state = whole[at].after.clone();
            let text = serde_json::to_string(&state).unwrap();
            let state: Option<SamplerState> = serde_json::from_str(&text).unwrap();
            let rest = take(packer(state.as_ref()), 5);
            for (a, b) in rest.iter().zip(&whole[at + 1..]) {
                assert!(a.cells == b.cells && a.gene == b.gene && a.after == b.after, "after batch {at}");
            }
        }
        // The loader runs ahead, its state does not.
        let mut loader = Loader::spawn(packer(None), 3).unwrap();
        assert_eq!(loader.state().unwrap().position, 0);
        for batch in &whole[..20] {
            let got = loader.next_batch().unwrap().unwrap();
            assert!(got.cells == batch.cells && got.gene == batch.gene);
            assert_eq!(loader.state(), batch.after);
            loader.recycle(got);
        }
        drop(loader);
    }
    let mut s = Sampler::over(&split.training(), Sampling::None, 21).unwrap();
    let state = s.state();
    for (what, other) in [
        ("seed", SamplerState { seed: 22, ..state.clone() }),
        ("sampling", SamplerState { sampling: Sampling::Sqrt, ..state.clone() }),
        ("cells", SamplerState { cells_digest: "x".into(), ..state.clone() }),
        ("position", SamplerState { position: 10_000, ..state.clone() }),
    ] {
        assert_eq!(s.restore(&other).unwrap_err().kind(), Kind::Input, "{what}");
    }
}

/// Cells, tokens, cell starts, values.
type Packed = (Vec<u32>, Vec<u32>, Vec<u32>, Vec<f32>);

/// What the packer does, without any of its tricks.
fn naive(corpus: &Corpus, cells: &[u32], o: &BatchOptions) -> Vec<Packed> {
    let mut batches = Vec::new();
    let mut open = (Vec::new(), Vec::new(), vec![0u32], Vec::new());
    for &cell in cells {
        let genes = corpus.genes(cell as usize).unwrap().to_vec();
        let values = corpus.values(cell as usize).unwrap();
        let room = o.max_tokens - o.cls.iter().count() - o.eos.iter().count();
        let kept = genes.len().min(room);
        let sentence: Vec<u32> =
            o.cls.into_iter().chain(genes[..kept].iter().copied()).chain(o.eos).collect();
        if open.0.len() == o.cells || open.1.len() + sentence.len() > o.tokens {
            batches.push(std::mem::replace(&mut open, (Vec::new(), Vec::new(), vec![0], Vec::new())));
        }
        open.0.push(cell);
        open.1.extend(sentence);
        open.2.push(open.1.len() as u32);
        if o.values {
            open.3.extend(o.cls.map(|_| 0.0));
            open.3.extend(values.unwrap()[..kept].iter().map(|v| v.to_f32()));
            open.3.extend(o.eos.map(|_| 0.0));
        }
    }
    if !open.0.is_empty() {
        batches.push(open);
    }
    batches
}

#[test]
fn batches_equal_naive_packing() {
    for (vocab, values) in [(50, true), (70_000, true), (50, false)] {
        let dir = tempfile::tempdir().unwrap();
        let (corpus, _) = corpus(&dir, 200, vocab, values);
        let order: Vec<u32> = (0..200).map(|i| i * 77 % 200).collect();
        for (cells, tokens, max_tokens, cls, eos) in [
            (8, 10_000, 64, None, None),
            (1, 50, 50, Some(1), None),
            (64, 100, 20, Some(1), Some(2)),
            (200, 100_000, 3, Some(1), Some(2)),
            (7, 41, 41, None, Some(2)),
        ] {
            let o = BatchOptions { cells, tokens, max_tokens, cls, eos, values };
            let mut packer = Packer::in_order(corpus.clone(), order.clone(), o.clone()).unwrap();
            let wanted = naive(&corpus, &order, &o);
            assert_eq!(packer.batches_in_epoch(0), wanted.len());
            let mut loader =
                Loader::spawn(Packer::in_order(corpus.clone(), order.clone(), o.clone()).unwrap(), 2)
                    .unwrap();
            // A buffer that held something else before.
            let mut batch =
                Batch { gene: Tokens::U32(vec![9; 5]), value: vec![half::f16::NAN; 3], ..Batch::default() };
            let mut wide = Vec::new();
            for w in &wanted {
                assert!(packer.fill(&mut batch).unwrap());
                batch.gene.widen_into(&mut wide);
                assert_eq!((&batch.cells, &wide, &batch.cell_start), (&w.0, &w.1, &w.2));
                assert_eq!(batch.value.iter().map(|v| v.to_f32()).collect::<Vec<_>>(), w.3);
                assert_eq!(batch.max_len as u32, w.2.windows(2).map(|p| p[1] - p[0]).max().unwrap());
                assert!(batch.max_len <= max_tokens && batch.tokens() <= tokens && batch.len() <= cells);
                let mut position = Vec::new();
                batch.positions_into(&mut position);
                assert!(
                    w.2.windows(2)
                        .all(|p| position[p[0] as usize] == 0
                            && position[p[1] as usize - 1] == p[1] - p[0] - 1)
                );
                let threaded = loader.next_batch().unwrap().unwrap();
                assert!(threaded.gene == batch.gene && threaded.cells == batch.cells);
                loader.recycle(threaded);
            }
            assert!(!packer.fill(&mut batch).unwrap());
            assert!(loader.next_batch().unwrap().is_none() && loader.next_batch().unwrap().is_none());
        }
    }
}

#[test]
fn an_epoch_ends_with_its_own_batch() {
    let dir = tempfile::tempdir().unwrap();
    let (corpus, _) = corpus(&dir, 100, 50, false);
    let sampler = Sampler::of_cells((0..100).collect(), 4).unwrap();
    let mut packer = Packer::sampled(corpus.clone(), sampler.clone(), options(32, 4096, 64)).unwrap();
    let mut batch = Batch::default();
    for epoch in 0..3u64 {
        let n = packer.batches_in_epoch(epoch);
        assert_eq!(n, 4);
        let mut seen = Vec::new();
        for _ in 0..n {
            packer.fill(&mut batch).unwrap();
            seen.extend_from_slice(&batch.cells);
        }
        assert_eq!(seen, sampler.order_of(epoch));
        assert_eq!(batch.after.as_ref().map(|s| (s.epoch, s.position)), Some((epoch + 1, 0)));
    }
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (corpus, _) = corpus(&dir, 10, 50, false);
    let good = options(4, 100, 20);
    let refused = |o: BatchOptions, kind: Kind, words: &str| {
        let e = Packer::in_order(corpus.clone(), vec![0], o).unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
        assert!(e.to_string().contains(words), "{e}");
    };
    refused(BatchOptions { cells: 0, ..good.clone() }, Kind::Usage, "batch.cells");
    refused(BatchOptions { tokens: 19, ..good.clone() }, Kind::Usage, "batch.tokens");
    refused(
        BatchOptions { max_tokens: 2, cls: Some(0), eos: Some(1), ..good.clone() },
        Kind::Usage,
        "batch.max_tokens",
    );
    refused(BatchOptions { cls: Some(50), ..good.clone() }, Kind::Input, "vocabulary");
    refused(BatchOptions { values: true, ..good.clone() }, Kind::Input, "--values");

    let path = dir.path().join("empty.cells");
    let mut made = cells::cells(3, 50, 20, 7);
    made[1].gene.clear();
    cells::write(&path, &made, cells::options(50, false, 0));
    let empty = Arc::new(Corpus::open(&path).unwrap());
    let mut packer = Packer::in_order(empty.clone(), vec![0, 1, 2], good.clone()).unwrap();
    let e = packer.fill(&mut Batch::default()).unwrap_err();
    assert!(e.to_string().contains("cell-1-") && e.to_string().contains("--empty-cells"), "{e}");
    let cls = BatchOptions { cls: Some(1), ..good };
    assert!(Packer::in_order(empty, vec![0, 1, 2], cls).unwrap().fill(&mut Batch::default()).unwrap());
}

/// A block that goes bad under the loader comes out as an error, and the thread ends.
#[test]
fn the_loader_hands_on_a_damaged_block() {
    let dir = tempfile::tempdir().unwrap();
    let (corpus, _) = corpus(&dir, 100, 50, false);
    let shard = corpus.path().join("shard-00001.safetensors");
    drop(corpus);
    let mut bytes = std::fs::read(&shard).unwrap();
    let at = 4096 + 2048;
    bytes[at] ^= 1;
    std::fs::write(&shard, &bytes).unwrap();
    let opened = Corpus::open(shard.parent().unwrap());
    let Ok(corpus) = opened else { return assert_eq!(opened.unwrap_err().kind(), Kind::Input) };
    let packer = Packer::in_order(Arc::new(corpus), (0..100).collect(), options(8, 1000, 64)).unwrap();
    let mut loader = Loader::spawn(packer, 2).unwrap();
    let error = loop {
        match loader.next_batch() {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the damage went unnoticed"),
            Err(e) => break e,
        }
    };
    assert!(error.to_string().contains("shard-00001"));
    assert!(loader.next_batch().unwrap().is_none());
}
