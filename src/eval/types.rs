//! What speaks for each type without a classifier: prototypes and marker sets over the same types.

use super::cells::Cells;
use super::class_names::column_of;
use super::embed::Embedder;
use super::prototypes::{Prototypes, make_prototypes};
use super::request::Request;
use super::rows::Rows;
use super::zero_shot::{MarkerScale, cosines};
use crate::device::Act;
use crate::error::Result;
use crate::genes::marker_score::marker_scores;
use crate::genes::markers::MarkerSets;
use crate::objective::StoredPrototypes;
use crate::ops::Backend;

pub(super) struct Types {
    /// Names of the types: those of the checkpoint's prototypes, else the classes of the label column.
    pub names: Vec<String>,
    /// (label, set name), as the user's table joins them.
    map: Option<Vec<(String, String)>>,
    /// (cells, P) scaled marker scores of the test cells.
    pub markers: Option<Vec<f32>>,
    /// (cells, P) cosines of the test cells.
    pub cosines: Option<Vec<f32>>,
    /// Where the prototypes came from.
    pub origin: Option<&'static str>,
    /// The prototypes (P, D) and their centre (D).
    pub prototypes: Option<(Vec<f32>, Vec<f32>)>,
    /// The marker sets, in the order of the names.
    pub sets: Option<MarkerSets>,
}

impl Types {
    /// Reads or makes prototypes, reads marker sets, and scores the test cells on both. `train` and `test` are the embedded
    /// rows of `cells`.
    pub fn gather<B: Backend<A>, A: Act>(
        request: &Request,
        cells: &Cells,
        embedder: &mut Embedder<B, A>,
        train: Rows,
        test: Rows,
        notes: &mut Vec<String>,
    ) -> Result<Self> {
        let (corpus, width) = (&request.corpus, embedder.width());
        let mut stored =
            StoredPrototypes::read(embedder.folder(), width)?.filter(|_| request.prototypes.is_none());
        if stored.as_ref().is_some_and(|s| s.layer != embedder.layer() || s.pooling != embedder.pooling()) {
            notes.push("the checkpoint's prototypes belong to another layer or pooling: left out".into());
            stored = None;
        }
        let names = stored.as_ref().map_or_else(|| cells.labels.classes.clone(), |s| s.names.clone());
        let (mut map, mut sets) = (None, None::<MarkerSets>);
        if let Some(choice) = &request.markers {
            let (raw, table) = choice.load(corpus)?;
            let unmatched = choice.allow_unmatched || stored.is_some();
            sets = Some(raw.for_labels(&names, table.as_deref(), unmatched)?);
            map = table;
        }
        let (mut train_scores, mut markers) = (None, None);
        if let Some(sets) = &sets {
            let known = marker_scores(corpus, &cells.split.train, sets)?;
            let mut asked = marker_scores(corpus, &cells.test, sets)?;
            MarkerScale::fit(&known, sets.len()).apply(&mut asked);
            (train_scores, markers) = (Some(known), Some(asked));
        }
        let prototypes = match stored {
            Some(s) => Some(Prototypes { vectors: s.vectors, centre: s.centre, origin: "checkpoint" }),
            None => make_prototypes(
                request,
                embedder,
                train,
                &names,
                sets.as_ref(),
                train_scores.as_deref(),
                &cells.known_classes(),
            )?,
        };
        let cosines = prototypes
            .as_ref()
            .map(|p| cosines(test, Rows::new(&p.vectors, width)?, &p.centre))
            .transpose()?;
        let origin = prototypes.as_ref().map(|p| p.origin);
        let prototypes = prototypes.map(|p| (p.vectors, p.centre));
        Ok(Types { names, map, markers, cosines, origin, prototypes, sets })
    }

    /// Which type each of `labels` is.
    pub fn columns(&self, labels: &[String]) -> Vec<Option<usize>> {
        labels.iter().map(|l| column_of(l, &self.names, self.map.as_deref())).collect()
    }
}
