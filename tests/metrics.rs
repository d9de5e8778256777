//! The evaluation measures against golden values made with scikit-learn and with numpy transcriptions of scib's and LISI's
//! formulas (`scripts/golden/make_metrics.py`).

use cellrefine::eval::clustering::{adjusted_rand_index, normalised_mutual_information};
use cellrefine::eval::kmeans::{KMeans, kmeans};
use cellrefine::eval::metrics::{classification, confusion, recall_at};
use cellrefine::eval::mixing::{batch_asw, lisi};
use cellrefine::eval::probe::{Probe, ProbeSettings};
use cellrefine::eval::rows::centred_unit_rows;
use cellrefine::eval::silhouette::{Metric, nc1, silhouette, silhouette_samples};
use cellrefine::eval::{Rows, knn};
use serde_json::Value;

fn golden() -> Value {
    serde_json::from_str(include_str!("golden/metrics.json")).unwrap()
}
fn doubles(v: &Value) -> Vec<f64> {
    v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}
fn floats(v: &Value) -> Vec<f32> {
    doubles(v).into_iter().map(|x| x as f32).collect()
}
fn integers(v: &Value) -> Vec<usize> {
    v.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as usize).collect()
}
fn width(v: &Value) -> usize {
    v["width"].as_u64().unwrap() as usize
}

#[track_caller]
fn close(got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst <= tolerance && got.iter().all(|x| x.is_finite()), "off by {worst}");
}

#[test]
fn classification_equals_sklearn() {
    for case in golden()["classification"].as_array().unwrap() {
        let (truth, predicted) = (integers(&case["truth"]), integers(&case["predicted"]));
        let classes = case["classes"].as_u64().unwrap() as usize;
        let got = classification(&truth, &predicted, classes).unwrap();
        let column = |f: fn(&cellrefine::eval::metrics::ClassScore) -> f64| {
            got.per_class.iter().map(f).collect::<Vec<_>>()
        };
        assert_eq!(got.per_class.iter().map(|c| c.class).collect::<Vec<_>>(), integers(&case["labels"]));
        assert_eq!(got.per_class.iter().map(|c| c.support).collect::<Vec<_>>(), integers(&case["support"]));
        close(&column(|c| c.f1), &doubles(&case["f1"]), 1e-11);
        close(&column(|c| c.precision), &doubles(&case["precision"]), 1e-11);
        close(&column(|c| c.recall), &doubles(&case["recall"]), 1e-11);
        let want = [case["accuracy"].as_f64().unwrap(), case["macro_f1"].as_f64().unwrap()];
        close(&[got.accuracy, got.macro_f1], &want, 1e-11);
        let counts: Vec<usize> =
            confusion(&truth, &predicted, classes).unwrap().into_iter().map(|c| c as usize).collect();
        assert_eq!(counts, integers(&case["confusion"]));
    }
}

#[test]
fn partition_scores_equal_sklearn() {
    for case in golden()["partitions"].as_array().unwrap() {
        let (a, b) = (integers(&case["a"]), integers(&case["b"]));
        let got = [adjusted_rand_index(&a, &b).unwrap(), normalised_mutual_information(&a, &b).unwrap()];
        close(&got, &[case["ari"].as_f64().unwrap(), case["nmi"].as_f64().unwrap()], 1e-11);
    }
}

#[test]
fn k_means_reaches_the_inertia_of_sklearn() {
    let case = &golden()["clusters"];
    let x = floats(&case["x"]);
    let got = kmeans(Rows::new(&x, width(case)).unwrap(), KMeans::new(4, 3)).unwrap();
    let want = case["inertia"].as_f64().unwrap();
    assert!((got.inertia - want).abs() < 1e-6 * want, "{} against {want}", got.inertia);
    assert_eq!(adjusted_rand_index(&got.assignment, &integers(&case["labels"])).unwrap(), 1.0);
}

#[test]
fn silhouettes_and_nc1_equal_sklearn_and_numpy() {
    let case = &golden()["silhouettes"];
    let (x, y) = (floats(&case["x"]), integers(&case["y"]));
    let rows = Rows::new(&x, width(case)).unwrap();
    for (metric, name, tolerance) in
        [(Metric::Cosine, "cosine", 2e-5), (Metric::Euclidean, "euclidean", 1e-9)]
    {
        // Cosine distances of these rows, far from the origin, are small differences of f32 unit rows.
        let got = silhouette_samples(rows, &y, metric).unwrap().unwrap();
        close(&got, &doubles(&case[name]), tolerance);
        let mean = silhouette(rows, &y, metric, y.len(), 0).unwrap().unwrap();
        close(&[mean], &[case[format!("{name}_mean")].as_f64().unwrap()], tolerance);
    }
    close(&[nc1(rows, &y).unwrap().unwrap()], &[case["nc1"].as_f64().unwrap()], 1e-10);
}

#[test]
fn the_linear_probe_finds_the_optimum_of_sklearn() {
    for case in golden()["probes"].as_array().unwrap() {
        let (x, y, test) = (floats(&case["x"]), integers(&case["y"]), floats(&case["test"]));
        let d = width(case);
        let settings = ProbeSettings {
            c: case["c"].as_f64().unwrap(),
            balanced: case["balanced"].as_bool().unwrap(),
            iterations: 2000,
            tolerance: 1e-10,
        };
        let probe = Probe::fit(Rows::new(&x, d).unwrap(), &y, settings).unwrap();
        assert!(probe.converged);
        let (coef, intercept) = if probe.classes.len() == 2 {
            // scikit-learn keeps one row for two classes: the difference of ours.
            let w: Vec<f64> = (0..d).map(|j| probe.weight[d + j] - probe.weight[j]).collect();
            (w, vec![probe.bias[1] - probe.bias[0]])
        } else {
            (probe.weight.clone(), probe.bias.clone())
        };
        close(&coef, &doubles(&case["coef"]), 2e-6);
        close(&intercept, &doubles(&case["intercept"]), 2e-6);
        let test = Rows::new(&test, d).unwrap();
        assert_eq!(probe.predict(test).unwrap(), integers(&case["predictions"]));
        let k = probe.classes.len();
        let mut log_probability = probe.logits(test).unwrap();
        for row in log_probability.chunks_exact_mut(k) {
            let sum: f64 = row.iter().map(|l| l.exp()).sum();
            row.iter_mut().for_each(|l| *l -= sum.ln());
        }
        close(&log_probability, &doubles(&case["log_probability"]), 1e-5);
        // The default stopping rule is loose, but not so loose that a prediction changes.
        let quick = Probe::fit(
            Rows::new(&x, d).unwrap(),
            &y,
            ProbeSettings { c: settings.c, balanced: settings.balanced, ..Default::default() },
        );
        assert_eq!(quick.unwrap().predict(test).unwrap(), integers(&case["predictions"]));
    }
}

#[test]
fn neighbours_and_votes_equal_sklearn() {
    let case = &golden()["neighbours"];
    let (x, y, test, d) = (floats(&case["x"]), integers(&case["y"]), floats(&case["test"]), width(case));
    let centre = Rows::new(&x, d).unwrap().mean();
    let unit = |v: &[f32]| centred_unit_rows(Rows::new(v, d).unwrap(), &centre);
    let (train, test) = (unit(&x), unit(&test));
    let (train, test) = (Rows::new(&train, d).unwrap(), Rows::new(&test, d).unwrap());
    for sub in case["cases"].as_array().unwrap() {
        let k = sub["k"].as_u64().unwrap() as usize;
        let near = knn::nearest(train, test, k, false).unwrap();
        let near: Vec<usize> = near.index.iter().map(|&i| i as usize).collect();
        assert_eq!(near, integers(&sub["nearest"]), "k = {k}");
        assert_eq!(knn::classify(train, &y, test, 5, k).unwrap(), integers(&sub["predictions"]), "k = {k}");
    }
}

#[test]
fn mixing_equals_the_formulas_of_scib_and_lisi() {
    let case = &golden()["mixing"];
    let (x, y, batch) = (floats(&case["x"]), integers(&case["y"]), integers(&case["batch"]));
    let rows = Rows::new(&x, width(case)).unwrap();
    let asw = batch_asw(rows, &y, &batch).unwrap().unwrap();
    close(&[asw], &[case["batch_asw"].as_f64().unwrap()], 1e-9);
    let got = lisi(rows, &batch, case["perplexity"].as_u64().unwrap() as usize).unwrap();
    // Both bisections stop within 1e-5 of the target entropy.
    close(&got, &doubles(&case["lisi"]), 1e-4);
}

#[test]
fn recall_equals_numpy() {
    let case = &golden()["recall"];
    let scores = floats(&case["scores"]);
    let truth: Vec<Option<usize>> = integers(&case["y"]).into_iter().map(Some).collect();
    let got = recall_at(&scores, 6, &truth, &integers(&case["k"])).unwrap().unwrap();
    close(&got.micro, &doubles(&case["micro"]), 1e-11);
    close(&got.macro_, &doubles(&case["macro"]), 1e-11);
}
