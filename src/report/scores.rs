//! Scores with intervals: before and after as tables, F1 by class, confusion. Every number is one of `eval`; the intervals are those of
//! [`bootstrap`].

use super::bootstrap::{self, Draws, Interval, interval, wilson};
use super::charts::classes::{Class, Group, Scored, by_class};
use super::charts::matrix::{Shade, chain, matrix};
use super::html::{escape, folded_table, number, table};
use super::measure::{Measures, Pair};
use crate::eval::metrics::{Classification, confusion, group_f1};
use crate::eval::summary::Evaluation;

/// Methods in the order of the page, with their names for people.
const METHODS: [(&str, &str); 7] = [
    ("classifier", "classifier"),
    ("classifier_markers", "classifier with markers"),
    ("prototype", "nearest prototype"),
    ("both", "prototype and markers"),
    ("linear_probe", "linear probe"),
    ("knn", "kNN"),
    ("markers", "markers alone"),
];

/// A method's name for people.
pub fn method_name(method: &str) -> &str {
    METHODS.iter().find(|(m, _)| *m == method).map_or(method, |(_, name)| name)
}

/// One method of one model.
struct Method {
    name: &'static str,
    score: Classification,
    draws: Draws,
    tail_f1: Option<f64>,
}

/// The scores of all models; `None` where one was not measured.
pub struct Scores {
    of: Vec<Option<Vec<Method>>>,
}

/// A measure of one model: value and interval.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    /// The value.
    pub value: f64,
    /// 95 %, where one is computed.
    pub interval: Option<Interval>,
}

/// What the tables hold: a method's score, a share found, or a property of the embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Measure {
    /// Macro-F1 of a method.
    MacroF1(&'static str),
    /// Mean F1 of the tail classes by a method.
    TailF1(&'static str),
    /// Accuracy of a method.
    Accuracy(&'static str),
    /// recall@k by prototypes, over cells.
    Recall(usize),
    /// recall@1 by prototypes, mean over classes.
    MacroRecall,
    /// Silhouette.
    Silhouette,
    /// Adjusted Rand index.
    Ari,
    /// Normalised mutual information.
    Nmi,
}

impl Measure {
    /// For people.
    pub fn name(self) -> String {
        match self {
            Measure::MacroF1(m) => format!("{} macro-F1", method_name(m)),
            Measure::TailF1(m) => format!("{} tail F1", method_name(m)),
            Measure::Accuracy(m) => format!("{} accuracy", method_name(m)),
            Measure::Recall(k) => format!("zero-shot recall@{k}"),
            Measure::MacroRecall => "zero-shot recall@1, class mean".into(),
            Measure::Silhouette => "silhouette".into(),
            Measure::Ari => "ARI of k-means".into(),
            Measure::Nmi => "NMI of k-means".into(),
        }
    }

    /// Those of a table, in its order.
    pub fn all() -> Vec<Measure> {
        let mut all = Vec::new();
        for (method, _) in METHODS {
            if method != "markers" {
                all.extend([Measure::MacroF1(method), Measure::TailF1(method)]);
            }
            if method == "classifier" {
                all.push(Measure::Accuracy(method));
            }
        }
        all.extend([1, 3, 5, 10].map(Measure::Recall));
        all.extend([Measure::MacroRecall, Measure::Silhouette, Measure::Ari, Measure::Nmi]);
        all
    }
}

impl Scores {
    /// Draws the intervals: models scored on the same cells see the same draws.
    pub fn new(measures: &Measures, seed: u64) -> Scores {
        let found = |i: usize| measures.models[i].found.as_ref().ok();
        let mut of: Vec<Option<Vec<Method>>> = (0..measures.models.len()).map(|_| None).collect();
        for first in 0..measures.models.len() {
            let Some(base) = found(first).filter(|_| of[first].is_none()) else { continue };
            let group: Vec<usize> = (first..measures.models.len())
                .filter(|&i| {
                    found(i).is_some_and(|e| {
                        e.scored.cells == base.scored.cells && e.scored.truth == base.scored.truth
                    })
                })
                .collect();
            let classes = group.iter().filter_map(|&i| found(i)).map(|e| e.classes.len()).max().unwrap_or(0);
            let called: Vec<&[usize]> = (group.iter().filter_map(|&i| found(i)))
                .flat_map(|e| e.scored.called.iter().map(|(_, c)| c.as_slice()))
                .collect();
            let mut draws =
                bootstrap::draws(&base.scored.truth, &called, classes, &super::map::tail(base), seed)
                    .into_iter();
            for &i in &group {
                let Some(e) = found(i) else { continue };
                let methods = e.scored.called.iter().filter_map(|(name, _)| {
                    let score = e.methods.iter().find(|(n, _)| n == name)?.1.clone();
                    let tail_f1 = group_f1(&score, &e.train_counts, e.thresholds).tail;
                    Some(Method { name, score, draws: draws.next()?, tail_f1 })
                });
                of[i] = Some(methods.collect());
            }
        }
        Scores { of }
    }

    fn method(&self, model: usize, name: &str) -> Option<&Method> {
        self.of[model].as_ref()?.iter().find(|m| m.name == name)
    }

    /// One measure of one model.
    pub fn get(&self, measures: &Measures, model: usize, measure: Measure) -> Option<Measured> {
        let e = measures.models[model].found.as_ref().ok()?;
        let method = |name: &str| self.method(model, name);
        let plain = |value: Option<f64>| value.map(|value| Measured { value, interval: None });
        let drawn =
            |value: f64, draws: &[f64]| Measured { value, interval: Some(interval(draws.iter().copied())) };
        let recall = || e.recall.iter().find(|(ev, _)| ev.name() == "prototype").map(|(_, r)| r);
        match measure {
            Measure::MacroF1(m) => method(m).map(|m| drawn(m.score.macro_f1, &m.draws.macro_f1)),
            Measure::Accuracy(m) => method(m).map(|m| drawn(m.score.accuracy, &m.draws.accuracy)),
            Measure::TailF1(m) => method(m).and_then(|m| Some(drawn(m.tail_f1?, &m.draws.tail_f1))),
            Measure::Recall(k) => {
                let r = recall()?;
                let value = r.micro[r.k.iter().position(|have| *have == k)?];
                Some(Measured { value, interval: Some(wilson(value, r.cells)) })
            }
            Measure::MacroRecall => plain(recall().map(|r| r.macro_[0])),
            Measure::Silhouette => plain(e.frozen.silhouette),
            Measure::Ari => plain(e.frozen.ari),
            Measure::Nmi => plain(e.frozen.nmi),
        }
    }

    /// The interval of a paired difference, where the measure is drawn and both saw the same cells.
    pub fn difference(&self, measures: &Measures, pair: &Pair, measure: Measure) -> Option<Interval> {
        let e = |i: usize| measures.models[i].found.as_ref().ok();
        if e(pair.before)?.scored.cells != e(pair.after)?.scored.cells {
            return None;
        }
        let (name, of): (_, fn(&Draws) -> &[f64]) = match measure {
            Measure::MacroF1(m) => (m, |d| &d.macro_f1),
            Measure::TailF1(m) => (m, |d| &d.tail_f1),
            Measure::Accuracy(m) => (m, |d| &d.accuracy),
            _ => return None,
        };
        let (before, after) = (self.method(pair.before, name)?, self.method(pair.after, name)?);
        Some(bootstrap::difference(of(&before.draws), of(&after.draws))).filter(|i| i.0.is_finite())
    }

    /// Before, after and the difference, for every measure that both have.
    pub fn pair_table(&self, measures: &Measures, pair: &Pair) -> String {
        let name = |i: usize| escape(&measures.models[i].name);
        let head = [
            "".into(),
            format!("before<br><small>{}</small>", name(pair.before)),
            format!("after<br><small>{}</small>", name(pair.after)),
            "change".into(),
            "95 % of the change".into(),
        ];
        let rows: Vec<Vec<String>> = Measure::all()
            .into_iter()
            .filter_map(|m| {
                Some((m, self.get(measures, pair.before, m)?, self.get(measures, pair.after, m)?))
            })
            .map(|(m, before, after)| {
                let difference = self.difference(measures, pair, m);
                let shown = difference
                    .map_or("–".into(), |(low, high)| format!("{} … {}", signed(low, 3), signed(high, 3)));
                let change = signed(after.value - before.value, 3);
                let sure = difference.is_some_and(|(low, high)| low > 0.0 || high < 0.0);
                let change = if sure { format!("<b>{change}</b>") } else { change };
                vec![escape(&m.name()), cell(before), cell(after), change, shown]
            })
            .collect();
        table("numbers", &format!("Before and after {}", pair.what), &head, &rows)
    }

    /// Every measure of every model, side by side.
    pub fn all_table(&self, measures: &Measures) -> String {
        let shown: Vec<usize> =
            (0..measures.models.len()).filter(|&i| measures.models[i].found.is_ok()).collect();
        let mut head = vec![String::new()];
        head.extend(shown.iter().map(|&i| {
            let m = &measures.models[i];
            format!("{}<br><small>{}</small>", escape(&m.name), escape(&m.stage))
        }));
        let rows: Vec<Vec<String>> = Measure::all()
            .into_iter()
            .filter_map(|m| {
                let found: Vec<Option<Measured>> = shown.iter().map(|&i| self.get(measures, i, m)).collect();
                found.iter().any(Option::is_some).then(|| {
                    let mut row = vec![escape(&m.name())];
                    row.extend(found.into_iter().map(|f| f.map_or("–".into(), cell)));
                    row
                })
            })
            .collect();
        table("numbers", "Scores of all checkpoints", &head, &rows)
    }

    /// F1 by class and confusion of each method that the models share, the after's own first; `key` names the choice.
    pub fn by_method(&self, measures: &Measures, before: Option<usize>, after: usize, key: &str) -> String {
        let Ok(e) = &measures.models[after].found else { return String::new() };
        let (classes, order) = classes(e);
        let mut methods: Vec<&str> =
            METHODS.iter().map(|(m, _)| *m).filter(|m| self.method(after, m).is_some()).collect();
        methods.retain(|m| before.is_none_or(|b| self.method(b, m).is_some()));
        let own = e.predictor;
        methods.sort_by_key(|m| *m != own);
        let options: Vec<String> =
            methods.iter().map(|m| format!("<option value=\"{m}\">{}</option>", method_name(m))).collect();
        let mut out = format!(
            "<div class=\"controls\" hidden><label>Labels called by <select data-views=\"{key}\">{}</select></label></div>",
            options.concat()
        );
        for (i, method) in methods.iter().enumerate() {
            let (hidden, drawn) = (if i == 0 { "" } else { " hidden" }, self.method(after, method));
            let Some(drawn) = drawn else { continue };
            let scored = |m: &Method| -> Vec<Scored> { order.iter().map(|&c| scored(m, c)).collect() };
            let old = before.and_then(|b| self.method(b, method));
            let names = (
                before.map_or("", |b| measures.models[b].name.as_str()),
                measures.models[after].name.as_str(),
            );
            let (old_scored, new_scored) = (old.map(scored), scored(drawn));
            let chart = by_class(&classes, old_scored.as_deref(), &new_scored, names);
            out += &format!(
                "<div data-view=\"{key} {method}\"{hidden}><figure>{chart}<figcaption>F1 by class, {}, classes with most training cells first. \
                 {}Lines are 95 % intervals.</figcaption></figure>{}{}</div>",
                method_name(method),
                if old.is_some() { "Hollow: before; filled: after. " } else { "" },
                class_table(&classes, old_scored.as_deref(), &new_scored),
                self.confusions(measures, before, after, method)
            );
        }
        out
    }

    /// Confusion of both models, in one order.
    fn confusions(&self, measures: &Measures, before: Option<usize>, after: usize, method: &str) -> String {
        let counts = |model: usize| -> Option<(Vec<u64>, &Evaluation)> {
            let e = measures.models[model].found.as_ref().ok()?;
            let (_, called) = e.scored.called.iter().find(|(name, _)| *name == method)?;
            Some((confusion(&e.scored.truth, called, e.classes.len()).ok()?, e))
        };
        let Some((new, e)) = counts(after) else { return String::new() };
        let labels = e.train_counts.len();
        let near_of = before.and_then(counts).unwrap_or_else(|| (new.clone(), e));
        let near: Vec<f64> = (0..labels * labels)
            .map(|i| {
                let share = |(counts, e): &(Vec<u64>, &Evaluation), a: usize, b: usize| {
                    let n = e.classes.len();
                    counts[a * n + b] as f64 / counts[a * n..(a + 1) * n].iter().sum::<u64>().max(1) as f64
                };
                share(&near_of, i / labels, i % labels) + share(&near_of, i % labels, i / labels)
            })
            .collect();
        let order: Vec<usize> = chain(&near, &e.train_counts)
            .into_iter()
            .filter(|&c| e.scored.truth.contains(&c) || e.train_counts[c] > 0)
            .collect();
        let figures: Vec<String> = [before, Some(after)]
            .into_iter()
            .flatten()
            .filter_map(|model| {
                let (counts, e) = counts(model)?;
                let n = e.classes.len();
                let others: Vec<usize> =
                    (labels..n).filter(|c| (0..n).any(|r| counts[r * n + c] > 0)).collect();
                let columns: Vec<usize> = order.iter().copied().chain(others).collect();
                let total = |r: usize| counts[r * n..(r + 1) * n].iter().sum::<u64>();
                let share = |r: usize, c: usize| {
                    counts[order[r] * n + columns[c]] as f64 / total(order[r]).max(1) as f64
                };
                let tip = |r: usize, c: usize| {
                    format!(
                        "{}\ncalled {}\n{} of {} cells ({} %)",
                        e.classes[order[r]],
                        e.classes[columns[c]],
                        counts[order[r] * n + columns[c]],
                        total(order[r]),
                        number(Some(100.0 * share(r, c)), 1)
                    )
                };
                let name =
                    |of: &[usize]| -> Vec<String> { of.iter().map(|&c| e.classes[c].clone()).collect() };
                let model = &measures.models[model].name;
                let label = format!("Confusion matrix of {model} by {}", method_name(method));
                let drawn = matrix(
                    (&name(&order), &name(&columns)),
                    share,
                    tip,
                    Shade::Share,
                    ("true", "called →"),
                    &label,
                );
                let head: Vec<String> = std::iter::once(String::new())
                    .chain(columns.iter().map(|&c| escape(&e.classes[c])))
                    .collect();
                let rows: Vec<Vec<String>> = order
                    .iter()
                    .map(|&r| {
                        std::iter::once(escape(&e.classes[r]))
                            .chain(columns.iter().map(|&c| counts[r * n + c].to_string()))
                            .collect()
                    })
                    .collect();
                Some(format!(
                    "<figure><h4 class=\"kind\">{}</h4>{drawn}{}</figure>",
                    escape(model),
                    folded_table(&format!("Counts of {model}"), &head, &rows)
                ))
            })
            .collect();
        format!(
            "<h3>Confusion</h3><p class=\"note\">Rows are true classes, and each row sums to 100 %. Rows and columns share one order, in which \
             each class follows the one it is most confused with{}.</p><div class=\"pair\">{}</div>",
            if before.is_some() { " before" } else { "" },
            figures.concat()
        )
    }
}

fn scored(m: &Method, class: usize) -> Scored {
    let f1 = m.score.per_class.iter().find(|c| c.class == class).map_or(0.0, |c| c.f1);
    Scored { f1, interval: interval(m.draws.f1[class].iter().copied()) }
}

/// The scored classes with most training cells first, and their indices.
pub fn classes(e: &Evaluation) -> (Vec<Class>, Vec<usize>) {
    let total = e.train_counts.iter().sum::<usize>().max(1) as f64;
    let mut order: Vec<usize> = (0..e.train_counts.len()).collect();
    order.sort_by(|&a, &b| e.train_counts[b].cmp(&e.train_counts[a]).then(e.classes[a].cmp(&e.classes[b])));
    let class = |&c: &usize| {
        let share = e.train_counts[c] as f64 / total;
        let group = match () {
            () if share >= e.thresholds.head => Group::Head,
            () if share >= e.thresholds.tail => Group::Medium,
            () => Group::Tail,
        };
        let test = e.scored.truth.iter().filter(|&&t| t == c).count();
        Class { name: e.classes[c].clone(), train: e.train_counts[c], test, group }
    };
    (order.iter().map(class).collect(), order)
}

fn class_table(classes: &[Class], before: Option<&[Scored]>, after: &[Scored]) -> String {
    let mut head = vec!["class".to_string(), "".into(), "training".into(), "scored".into()];
    if before.is_some() {
        head.push("F1 before".into());
    }
    head.push(if before.is_some() { "F1 after".into() } else { "F1".to_string() });
    let shown = |s: &Scored| cell(Measured { value: s.f1, interval: Some(s.interval) });
    let rows: Vec<Vec<String>> = (classes.iter().enumerate())
        .map(|(i, c)| {
            let mut row =
                vec![escape(&c.name), c.group.name().into(), c.train.to_string(), c.test.to_string()];
            row.extend(before.map(|b| shown(&b[i])));
            row.push(shown(&after[i]));
            row
        })
        .collect();
    folded_table("F1 by class as a table", &head, &rows)
}

/// A value with its interval beside it, or below it where the page is narrow.
pub fn cell(m: Measured) -> String {
    let interval = m.interval.filter(|i| i.0.is_finite()).map_or(String::new(), |(low, high)| {
        format!(" <small>{} – {}</small>", number(Some(low), 2), number(Some(high), 2))
    });
    format!("{}{interval}", number(Some(m.value), 3))
}

/// A number with its sign.
pub fn signed(value: f64, digits: usize) -> String {
    let text = number(Some(value), digits);
    if value >= 0.0 { format!("+{text}") } else { text }
}
