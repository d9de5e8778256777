//! Marker-gene sets as tokens with weights: a_kg ≥ 0, Σ_g a_kg = 1 for each type k.
//!
//! Weights are the file's own, or specificity: a_kg ∝ ln((1 + P) / n_g), n_g = how many of the P chosen sets hold g, so that a
//! marker shared by many types says little. They are computed over the chosen sets alone: a file with a thousand tissues does not
//! decide what is specific among eight blood cell types. A label meets a set by name, case and punctuation aside, but a sign is a
//! letter: `CD16+` is never `CD16-`.

use super::markers_file::RawSets;
use super::vocab::Vocab;
use crate::disk;
use crate::error::{Code, Error, Result};
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

/// One set per type k. Genes by falling weight, equal weights by token.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MarkerSets {
    /// Name of the type (the class name where sets were met with labels).
    pub names: Vec<String>,
    /// (token, weight) per set; empty for a class that was allowed to have no set.
    pub sets: Vec<Vec<(u32, f32)>>,
}

/// Given weights whose sum is this near 1 are taken as they are, so that what was written reads back equal.
const SUM_TOLERANCE: f64 = 1e-5;

impl MarkerSets {
    /// Normalises and orders sets. Where a set has weights of its own they count; the others get specificity weights.
    fn weigh(names: Vec<String>, sets: Vec<Vec<(u32, Option<f32>)>>) -> Self {
        let mut holders: HashMap<u32, f64> = HashMap::new();
        for (token, _) in sets.iter().flatten() {
            *holders.entry(*token).or_default() += 1.0;
        }
        let filled = sets.iter().filter(|s| !s.is_empty()).count() as f64;
        let weigh = |set: Vec<(u32, Option<f32>)>| {
            let idf = |token: &u32| ((1.0 + filled) / holders[token]).ln();
            let raw = set.iter().map(|(t, w)| (*t, w.map_or_else(|| idf(t), f64::from)));
            let mut genes: Vec<(u32, f64)> = raw.filter(|(_, w)| *w > 0.0).collect();
            genes.sort_by_key(|g| g.0);
            let sum: f64 = genes.iter().map(|g| g.1).sum();
            let scale = if (sum - 1.0).abs() <= SUM_TOLERANCE { 1.0 } else { 1.0 / sum };
            let mut genes: Vec<(u32, f32)> =
                genes.into_iter().map(|(t, w)| (t, (w * scale) as f32)).collect();
            genes.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            genes
        };
        MarkerSets { names, sets: sets.into_iter().map(weigh).collect() }
    }

    /// Sets with raw weights of any scale (≥ 0), normalised: what `markers derive` makes.
    pub fn from_weights(names: Vec<String>, sets: Vec<Vec<(u32, f32)>>) -> Self {
        Self::weigh(
            names,
            sets.into_iter().map(|s| s.into_iter().map(|(t, w)| (t, Some(w))).collect()).collect(),
        )
    }

    /// Number of sets P.
    pub fn len(&self) -> usize {
        self.names.len()
    }
    /// No sets?
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Every gene of any set, ascending.
    pub fn genes(&self) -> Vec<u32> {
        let genes: BTreeSet<u32> = self.sets.iter().flatten().map(|(token, _)| *token).collect();
        genes.into_iter().collect()
    }

    /// Weighted Jaccard J_kl = Σ_g min(a_kg, a_lg) / Σ_g max(a_kg, a_lg), row-major (P, P); 1 on the diagonal, 0 against an empty
    /// set.
    pub fn jaccard(&self) -> Vec<f32> {
        let by_token: Vec<HashMap<u32, f64>> =
            self.sets.iter().map(|s| s.iter().map(|&(t, w)| (t, w as f64)).collect()).collect();
        let mass: Vec<f64> = self.sets.iter().map(|s| s.iter().map(|g| g.1 as f64).sum()).collect();
        let p = self.len();
        let mut j = vec![0.0; p * p];
        for k in 0..p {
            j[k * p + k] = 1.0;
            for l in 0..k {
                // Σ max = Σ a_k + Σ a_l − Σ min.
                let both: f64 = self.sets[k]
                    .iter()
                    .filter_map(|(t, w)| by_token[l].get(t).map(|v| v.min(*w as f64)))
                    .sum();
                let union = mass[k] + mass[l] - both;
                let value = if union > 0.0 { (both / union) as f32 } else { 0.0 };
                (j[k * p + l], j[l * p + k]) = (value, value);
            }
        }
        j
    }

    /// Writes a GMT with weights (`GENE,WEIGHT`, genes by token name), read back equal. Empty sets are left out. `describe` gives
    /// each set's description column.
    pub fn write_gmt(&self, path: &Path, vocab: &Vocab, describe: impl Fn(usize) -> String) -> Result<()> {
        let mut text = String::new();
        for (k, (name, set)) in
            self.names.iter().zip(&self.sets).enumerate().filter(|(_, (_, s))| !s.is_empty())
        {
            if name.contains(['\t', '\n', '\r'])
                || name.starts_with('#')
                || name.trim() != name
                || name.is_empty()
            {
                return Err(Error::new(Code::MarkerSets, "a class name cannot be the name of a marker set")
                    .found(format!("{name:?}"))
                    .wanted("one line without tabs, no # in front, no spaces around"));
            }
            text += &format!("{name}\t{}", describe(k).replace(['\t', '\n', '\r'], " "));
            for (token, weight) in set {
                text += &format!("\t{},{weight}", vocab.token(*token));
            }
            text.push('\n');
        }
        disk::replace(path, text.as_bytes())
    }
}

impl RawSets {
    /// Sets for `classes`, in their order, weighted over these sets alone. A class meets the set of its name; `map`
    /// (label, set name) goes before names. A class without a usable set is an error that lists the nearest names, unless
    /// `allow_unmatched`: then its set is empty.
    pub fn for_labels(
        &self,
        classes: &[String],
        map: Option<&[(String, String)]>,
        allow_unmatched: bool,
    ) -> Result<MarkerSets> {
        let matched = self.match_labels(classes, map)?;
        let mut problems = Vec::new();
        let mut sets = Vec::with_capacity(classes.len());
        for (class, found) in classes.iter().zip(&matched) {
            let genes = found.map_or(&[][..], |s| &self.sets[s].genes);
            if genes.is_empty() {
                problems.push(match found {
                    Some(s) => {
                        format!("{class:?}: set {:?} has no gene of the vocabulary", self.sets[*s].name)
                    }
                    None => format!("{class:?}: nearest {}", self.nearest(class)),
                });
            }
            sets.push(genes.to_vec());
        }
        if problems.len() == classes.len() || (!allow_unmatched && !problems.is_empty()) {
            return Err(Error::new(Code::MarkerLabels, "labels without a usable marker set")
                .at(self.path.display())
                .found(problems.join("; "))
                .wanted("a set for every label, by its name, case and punctuation aside")
                .next("name them in a table label<TAB>set: --marker-map FILE (or --allow-unmatched to go on without)"));
        }
        Ok(MarkerSets::weigh(classes.to_vec(), sets))
    }

    /// All usable sets, weighted over all of them.
    pub fn all(&self) -> Result<MarkerSets> {
        let usable = self.sets.iter().filter(|s| !s.genes.is_empty());
        let (names, sets): (Vec<_>, Vec<_>) = usable.map(|s| (s.name.clone(), s.genes.clone())).unzip();
        if names.is_empty() {
            return Err(Error::new(Code::MarkerGenesUnknown, "no marker set has a gene of the vocabulary")
                .at(self.path.display()));
        }
        Ok(MarkerSets::weigh(names, sets))
    }

    /// The set of each class, if it has one.
    pub fn match_labels(
        &self,
        classes: &[String],
        map: Option<&[(String, String)]>,
    ) -> Result<Vec<Option<usize>>> {
        let exact: HashMap<&str, usize> =
            self.sets.iter().enumerate().map(|(i, s)| (s.name.as_str(), i)).collect();
        let mut loose: HashMap<String, Vec<usize>> = HashMap::new();
        for (i, set) in self.sets.iter().enumerate() {
            loose.entry(canonical(&set.name)).or_default().push(i);
        }
        classes
            .iter()
            .map(|class| {
                if let Some((_, set)) = map.unwrap_or_default().iter().find(|(label, _)| label == class) {
                    return match exact.get(set.as_str()) {
                        Some(&i) => Ok(Some(i)),
                        None => Err(Error::new(
                            Code::MarkerMap,
                            format!("the marker map names a set that does not exist: {set:?}"),
                        )
                        .at(self.path.display())
                        .found(format!("for label {class:?}; nearest {}", self.nearest(set)))
                        .next("write the set's name as it stands in the marker file")),
                    };
                }
                if let Some(&i) = exact.get(class.as_str()) {
                    return Ok(Some(i));
                }
                match loose.get(&canonical(class)).map(Vec::as_slice) {
                    None | Some([]) => Ok(None),
                    Some([one]) => Ok(Some(*one)),
                    Some(several) => {
                        let names: Vec<String> =
                            several.iter().map(|&i| format!("{:?}", self.sets[i].name)).collect();
                        Err(Error::new(Code::MarkerMap, format!("label {class:?} fits several marker sets"))
                            .at(self.path.display())
                            .found(names.join(", "))
                            .next("choose one in a table label<TAB>set: --marker-map FILE"))
                    }
                }
            })
            .collect()
    }

    /// The three sets whose names are most like `label`, by shared pairs of letters: word order and a tissue in front matter
    /// little.
    pub fn nearest(&self, label: &str) -> String {
        let wanted = pairs(label);
        let mut scored: Vec<(f64, &str)> = (self.sets.iter())
            .map(|s| {
                let own = pairs(&s.name);
                let both = wanted.iter().filter(|p| own.contains(p)).count();
                (2.0 * both as f64 / (wanted.len() + own.len()).max(1) as f64, s.name.as_str())
            })
            .collect();
        scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
        let names: Vec<String> = scored.iter().take(3).map(|(_, name)| format!("{name:?}")).collect();
        names.join(", ")
    }
}

/// Lower-case letters and digits, with `+`, and `-` where it is a sign (after a letter or digit, before none).
fn canonical(name: &str) -> String {
    let chars: Vec<char> = name.chars().collect();
    let mut out = String::new();
    for (i, &c) in chars.iter().enumerate() {
        let before = i > 0 && chars[i - 1].is_alphanumeric();
        let after = chars.get(i + 1).is_some_and(|c| c.is_alphanumeric());
        match c {
            '+' => out.push('+'),
            '-' | '\u{2212}' | '\u{2013}' if before && !after => out.push('-'),
            c if c.is_alphanumeric() => out.extend(c.to_lowercase()),
            _ => {}
        }
    }
    out
}

fn pairs(name: &str) -> Vec<(char, char)> {
    let c: Vec<char> = name.to_lowercase().chars().filter(|c| c.is_alphanumeric() || *c == '+').collect();
    c.windows(2).map(|w| (w[0], w[1])).collect()
}

/// Reads `--marker-map`: `label<TAB>set name`, one a line; `#` and blank lines are passed over.
pub fn read_marker_map(path: &Path) -> Result<Vec<(String, String)>> {
    let text = super::mapping::read_text(path)?;
    let mut map: Vec<(String, String)> = Vec::new();
    for (n, line) in text.lines().enumerate() {
        let line = line.trim_end_matches('\r');
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let place = format!("{}:{}", path.display(), n + 1);
        let (label, set) = line.split_once('\t').unwrap_or((line, ""));
        let (label, set) = (label.trim(), set.trim());
        if label.is_empty() || set.is_empty() {
            return Err(Error::new(Code::MarkerMap, "a row of the marker map lacks its label or its set")
                .at(place)
                .found(format!("{:?}", super::vocab::clip(line, 60)))
                .wanted("label<TAB>set name"));
        }
        if map.iter().any(|(l, _)| l == label) {
            return Err(
                Error::new(Code::MarkerMap, format!("the marker map names label {label:?} twice")).at(place)
            );
        }
        map.push((label.into(), set.into()));
    }
    if map.is_empty() {
        return Err(Error::new(Code::MarkerMap, "the marker map is empty")
            .at(path.display())
            .wanted("lines of label<TAB>set name"));
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sign_is_a_letter_and_a_dash_is_not() {
        assert_eq!(canonical("CD14+ Monocytes"), canonical("cd14+_monocytes"));
        assert_ne!(canonical("CD16+ NK cells"), canonical("CD16- NK cells"));
        assert_ne!(canonical("CD16 NK cells"), canonical("CD16- NK cells"));
        assert_eq!(canonical("gamma-delta T"), canonical("Gamma delta T"));
        assert_eq!(canonical("Pancreas|Acinar cells"), "pancreasacinarcells");
    }

    #[test]
    fn weights_sum_to_one_and_survive_a_second_normalisation() {
        let sets = vec![
            vec![(3, 0.1), (5, 0.7), (2, 0.1)],
            Vec::new(),
            (0..50).map(|t| (t, 1.0 / (t + 3) as f32)).collect(),
        ];
        let names = vec!["a".to_string(), "b".into(), "c".into()];
        let m = MarkerSets::from_weights(names.clone(), sets);
        assert_eq!(m.sets[0].iter().map(|g| g.0).collect::<Vec<_>>(), [5, 2, 3]);
        for set in m.sets.iter().filter(|s| !s.is_empty()) {
            assert!((set.iter().map(|g| g.1 as f64).sum::<f64>() - 1.0).abs() < 1e-6);
        }
        assert_eq!(MarkerSets::from_weights(names, m.sets.clone()), m);
    }
}
