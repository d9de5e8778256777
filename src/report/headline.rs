//! The page's first sentence and its tiles: what changed, by how much, and whether the cells at hand can show it.

use super::html::{brief, escape, number};
use super::measure::{Measures, Pair};
use super::provenance::duration;
use super::run::Run;
use super::scores::{Measure, Scores, signed};

/// Measures that tell most of a stage, the first that both models have.
fn telling(pair: &Pair) -> [Measure; 3] {
    match pair.what {
        "refine" => {
            [Measure::MacroF1("knn"), Measure::MacroF1("linear_probe"), Measure::MacroF1("prototype")]
        }
        _ => [Measure::MacroF1("classifier"), Measure::MacroF1("linear_probe"), Measure::MacroF1("knn")],
    }
}

/// One to three sentences, as HTML.
pub fn sentence(runs: &[Run], measures: &Measures, scores: &Scores) -> String {
    let mut said: Vec<String> = Vec::new();
    for pair in measures.pairs.iter().take(3) {
        let Some(measure) = telling(pair).into_iter().find(|m| both(measures, scores, pair, *m).is_some())
        else {
            continue;
        };
        let Some((before, after)) = both(measures, scores, pair, measure) else { continue };
        let verdict = match scores.difference(measures, pair, measure) {
            Some((low, high)) if low > 0.0 || high < 0.0 => {
                let way = if low > 0.0 { "raised" } else { "lowered" };
                format!(
                    "{} {way} {} from {} to {} (95 % of the change: {} … {})",
                    capital(pair.what),
                    measure.name(),
                    number(Some(before), 3),
                    number(Some(after), 3),
                    signed(low, 2),
                    signed(high, 2)
                )
            }
            Some((low, high)) => format!(
                "{} shows no clear change of {}: {} before, {} after (95 % of the change: {} … {})",
                capital(pair.what),
                measure.name(),
                number(Some(before), 3),
                number(Some(after), 3),
                signed(low, 2),
                signed(high, 2)
            ),
            None => format!(
                "{}: {} {} before, {} after",
                capital(pair.what),
                measure.name(),
                number(Some(before), 3),
                number(Some(after), 3)
            ),
        };
        let found = both(measures, scores, pair, Measure::Recall(1)).filter(|_| pair.what == "refine");
        let found = found.map_or(String::new(), |(b, a)| {
            format!(
                "; the nearest prototype names {} % of the unseen cells rightly, {} % before",
                number(Some(100.0 * a), 0),
                number(Some(100.0 * b), 0)
            )
        });
        said.push(format!("{}{found}.", escape(&verdict)));
    }
    if said.is_empty() {
        for run in runs.iter().take(3) {
            let series = run.series("loss");
            let Some((first, last)) = series.first().zip(series.last()) else { continue };
            said.push(escape(&format!(
                "{}: loss {} to {} in {} steps, {}.",
                run.name,
                brief(first.1),
                brief(last.1),
                brief(last.0),
                duration(run.seconds())
            )));
        }
    }
    said.join(" ")
}

/// Before → after of a few measures of the first pair.
pub fn tiles(measures: &Measures, scores: &Scores) -> String {
    let Some(pair) =
        measures.pairs.iter().find(|p| telling(p).iter().any(|m| both(measures, scores, p, *m).is_some()))
    else {
        return String::new();
    };
    let wanted = match pair.what {
        "refine" => vec![
            Measure::Recall(1),
            Measure::MacroF1("knn"),
            Measure::MacroF1("linear_probe"),
            Measure::TailF1("knn"),
            Measure::Silhouette,
        ],
        _ => vec![
            Measure::MacroF1("classifier"),
            Measure::TailF1("classifier"),
            Measure::MacroF1("linear_probe"),
            Measure::MacroF1("knn"),
        ],
    };
    let tiles: String = wanted
        .into_iter()
        .filter_map(|m| Some((m, both(measures, scores, pair, m)?)))
        .map(|(m, (before, after))| {
            format!(
                "<div class=\"tile-card\"><b>{} → {}</b><span>{}</span></div>",
                number(Some(before), 2),
                number(Some(after), 2),
                escape(&m.name())
            )
        })
        .collect();
    format!("<div class=\"tiles\" aria-label=\"Before and after {}\">{tiles}</div>", pair.what)
}

fn both(measures: &Measures, scores: &Scores, pair: &Pair, measure: Measure) -> Option<(f64, f64)> {
    let of = |model| scores.get(measures, model, measure).map(|m| m.value);
    Some((of(pair.before)?, of(pair.after)?))
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |c| c.to_uppercase().chain(letters).collect())
}
