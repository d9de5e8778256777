//! What a frozen embedding is worth: the measures that train nothing but a probe, on one train/test split.
//!
//! | measure | on |
//! |---|---|
//! | linear probe | multinomial logistic regression, C = 0.1, standardised by the training rows |
//! | kNN | 15 neighbours among unit rows after subtracting the training mean |
//! | silhouette | cosine, test rows after subtracting the training mean |
//! | ARI, NMI | k-means with as many clusters as the test set has types, on the same rows |
//! | NC1 | within- over between-class scatter of the test rows as they are |

use super::clustering::{adjusted_rand_index, normalised_mutual_information};
use super::kmeans::{KMeans, kmeans};
use super::knn;
use super::metrics::{Classification, classification};
use super::probe::{Probe, ProbeSettings};
use super::rows::{Rows, centred_unit_rows};
use super::silhouette::{Metric, compact, nc1, silhouette};
use crate::error::Result;

/// Settings of [`frozen`].
#[derive(Debug, Clone, Copy)]
pub struct FrozenSettings {
    /// The linear probe.
    pub probe: ProbeSettings,
    /// Neighbours of kNN.
    pub neighbours: usize,
    /// Cells above which the silhouette is that of a seeded sample.
    pub silhouette_cells: usize,
    /// Cells above which k-means, and with it ARI and NMI, is skipped: ten restarts take their time.
    pub cluster_cells: usize,
    /// Seed of k-means and of the sample.
    pub seed: u64,
}

impl Default for FrozenSettings {
    fn default() -> Self {
        FrozenSettings {
            probe: ProbeSettings::default(),
            neighbours: 15,
            silhouette_cells: 5_000,
            cluster_cells: 200_000,
            seed: 0,
        }
    }
}

/// The measures; `None` where one does not apply.
#[derive(Debug, Clone)]
pub struct Frozen {
    /// Linear probe on the test rows.
    pub linear_probe: Classification,
    /// Classes the probe predicts, (test rows).
    pub linear_probe_predictions: Vec<usize>,
    /// False when the probe's iterations ran out.
    pub linear_probe_converged: bool,
    /// kNN on the test rows.
    pub knn: Classification,
    /// Classes that kNN votes for, (test rows).
    pub knn_predictions: Vec<usize>,
    /// Mean cosine silhouette of the types.
    pub silhouette: Option<f64>,
    /// Adjusted Rand index of k-means clusters and types.
    pub ari: Option<f64>,
    /// Normalised mutual information of k-means clusters and types.
    pub nmi: Option<f64>,
    /// tr(Σ_W)/tr(Σ_B).
    pub nc1: Option<f64>,
}

/// Measures `test` with `train` as the labelled reference. Classes lie below `classes`; both tables have one label a row.
pub fn frozen(
    train: Rows,
    train_labels: &[usize],
    test: Rows,
    test_labels: &[usize],
    classes: usize,
    settings: FrozenSettings,
) -> Result<Frozen> {
    let probe = Probe::fit(train, train_labels, settings.probe)?;
    let linear_probe_predictions = probe.predict(test)?;
    let centre = train.mean();
    let (train_unit, test_unit) = (centred_unit_rows(train, &centre), centred_unit_rows(test, &centre));
    let (train_unit, test_unit) =
        (Rows::new(&train_unit, train.width())?, Rows::new(&test_unit, test.width())?);
    let voted = knn::classify(train_unit, train_labels, test_unit, classes, settings.neighbours)?;
    let types = compact(test_labels).1.len();
    let clusters = if types > 1 && test.count() >= types && test.count() <= settings.cluster_cells {
        Some(kmeans(test_unit, KMeans::new(types, settings.seed))?.assignment)
    } else {
        None
    };
    let agreement = |score: fn(&[usize], &[usize]) -> Result<f64>| {
        clusters.as_ref().map(|c| score(test_labels, c)).transpose()
    };
    Ok(Frozen {
        linear_probe: classification(test_labels, &linear_probe_predictions, classes)?,
        linear_probe_predictions,
        linear_probe_converged: probe.converged,
        knn: classification(test_labels, &voted, classes)?,
        knn_predictions: voted,
        silhouette: silhouette(
            test_unit,
            test_labels,
            Metric::Cosine,
            settings.silhouette_cells,
            settings.seed,
        )?,
        ari: agreement(adjusted_rand_index)?,
        nmi: agreement(normalised_mutual_information)?,
        nc1: nc1(test, test_labels)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn separated_types_score_one_and_a_single_type_scores_what_applies() {
        let mut rng = crate::rng::Philox::new(2, 0, crate::rng::site::EVAL);
        let mut table = |n: usize| -> (Vec<f32>, Vec<usize>) {
            let labels: Vec<usize> = (0..n).map(|i| i % 3).collect();
            let row = |c: usize, rng: &mut crate::rng::Philox| {
                (0..4)
                    .map(|d| 50.0 + if d == c { 30.0 } else { 0.0 } + rng.normal() as f32)
                    .collect::<Vec<_>>()
            };
            (labels.iter().flat_map(|&c| row(c, &mut rng)).collect(), labels)
        };
        let ((train, y), (test, t)) = (table(90), table(60));
        let (train, test) = (Rows::new(&train, 4).unwrap(), Rows::new(&test, 4).unwrap());
        let f = frozen(train, &y, test, &t, 3, FrozenSettings::default()).unwrap();
        assert_eq!(
            (f.linear_probe.macro_f1, f.knn.macro_f1, f.ari, f.nmi.map(|x| x.round())),
            (1.0, 1.0, Some(1.0), Some(1.0))
        );
        assert!(f.silhouette.unwrap() > 0.9 && f.nc1.unwrap() < 0.05);
        let f = frozen(train, &[0; 90], test, &[0; 60], 1, FrozenSettings::default()).unwrap();
        assert_eq!(
            (f.linear_probe.accuracy, f.ari, f.nmi, f.silhouette, f.nc1),
            (1.0, None, None, None, None)
        );
    }

    #[test]
    fn equal_embeddings_score_the_majority_and_do_not_fail() {
        let (train, test) = (vec![1f32; 20], vec![1f32; 12]);
        let (train, test) = (Rows::new(&train, 2).unwrap(), Rows::new(&test, 2).unwrap());
        let y = [0, 0, 0, 0, 0, 0, 0, 1, 1, 1];
        let f = frozen(train, &y, test, &[0, 0, 0, 1, 1, 1], 2, FrozenSettings::default()).unwrap();
        assert_eq!((f.linear_probe.accuracy, f.knn.accuracy, f.silhouette), (0.5, 0.5, Some(0.0)));
    }
}
