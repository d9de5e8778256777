//! Training curves as small multiples: one panel a quantity, one line a run, the same colours throughout.

use crate::report::html::{brief, escape, folded_table};
use crate::report::run::Run;
use crate::report::svg::{Scale, Svg, decimated};
use serde_json::{Value, json};

/// Points of a line: beyond what a panel has pixels for.
const POINTS: usize = 400;
const WIDTH: f64 = 340.0;
const HEIGHT: f64 = 170.0;
/// Left, right, top and bottom margins.
const MARGIN: (f64, f64, f64, f64) = (46.0, 12.0, 24.0, 26.0);

/// The panels, and the data that their hover reads.
pub fn curves(runs: &[Run]) -> (String, Value) {
    let mut fields: Vec<(String, String)> = vec![("loss".into(), "loss".into())];
    let mut terms: Vec<String> = Vec::new();
    for term in runs.iter().flat_map(Run::terms) {
        if !terms.contains(&term) {
            terms.push(term);
        }
    }
    fields.extend(terms.into_iter().map(|t| (t.clone(), format!("loss term: {}", t.replace('_', "–")))));
    for (field, title) in [
        ("val_loss", "validation loss"),
        ("val_macro_f1", "validation macro-F1"),
        ("learning_rate", "learning rate"),
        ("grad_norm", "gradient norm"),
        ("cells_per_s", "cells per second"),
        ("tokens_per_s", "tokens per second"),
    ] {
        fields.push((field.into(), title.into()));
    }
    let (mut html, mut data) = (String::new(), Vec::new());
    for (field, title) in fields {
        let lines: Vec<(usize, Vec<(f64, f64)>)> = (runs.iter().enumerate())
            .map(|(i, run)| (i, decimated(&run.series(&field), POINTS)))
            .filter(|(_, points)| !points.is_empty())
            .collect();
        if lines.is_empty() {
            continue;
        }
        html += &panel(&title, &lines, runs, data.len());
        let series: Vec<Value> = lines
            .iter()
            .map(|(i, points)| {
                let round = |v: f64| format!("{v:.4e}").parse::<f64>().unwrap_or(v);
                json!({"run": i, "x": points.iter().map(|p| p.0).collect::<Vec<_>>(),
                    "y": points.iter().map(|p| round(p.1)).collect::<Vec<_>>()})
            })
            .collect();
        data.push(json!({"title": title, "series": series}));
    }
    (html, Value::Array(data))
}

fn panel(title: &str, lines: &[(usize, Vec<(f64, f64)>)], runs: &[Run], index: usize) -> String {
    let (left, right, top, bottom) = MARGIN;
    let all = || lines.iter().flat_map(|(_, points)| points);
    let ends = |of: fn(&(f64, f64)) -> f64| {
        all().map(of).fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)))
    };
    let (first, last) = ends(|p| p.0);
    let (low, high) = ends(|p| p.1);
    // A floor at zero where the values come near it; loss is read in its own range.
    let low = if low > 0.0 && low < 0.4 * high { 0.0 } else { low };
    let x = Scale::linear(first.min(last - 1.0), last, left, WIDTH - right);
    let y = Scale::round(low, high, HEIGHT - bottom, top);
    let mut svg = Svg::new(WIDTH, HEIGHT);
    for tick in y.ticks(4) {
        svg.line((left, y.at(tick)), (WIDTH - right, y.at(tick)), "grid");
        svg.text(left - 5.0, y.at(tick) + 3.2, "end", "tick", &brief(tick), 60.0);
    }
    for tick in x.ticks(4) {
        svg.text(x.at(tick), HEIGHT - bottom + 14.0, "middle", "tick", &brief(tick), 60.0);
    }
    svg.text(WIDTH - right, HEIGHT - 1.0, "end", "tick faint", "step", 60.0);
    svg.line((left, HEIGHT - bottom), (WIDTH - right, HEIGHT - bottom), "axis");
    svg.text(left - 40.0, 12.0, "start", "panel-title", title, WIDTH);
    for (run, points) in lines {
        let places: Vec<(f64, f64)> = points.iter().map(|p| (x.at(p.0), y.at(p.1))).collect();
        match places.as_slice() {
            [only] => svg.dot(only.0, only.1, 3.0, &format!("fill-run-{}", run % 8), ""),
            _ => svg.path(&places, &format!("curve run-{}", run % 8)),
        }
    }
    let told: Vec<String> = lines
        .iter()
        .filter_map(|(run, points)| Some((run, points.first()?, points.last()?)))
        .map(|(run, a, b)| format!("{}: {} to {}", runs[*run].name, brief(a.1), brief(b.1)))
        .collect();
    let frame = format!(
        "data-curve=\"{index}\" data-frame=\"{left} {} {} {}\"",
        WIDTH - right,
        first.min(last - 1.0),
        last
    );
    svg.finish("panel", &format!("{title} by step. {}", told.join("; ")), &frame)
}

/// The legend of the runs, which all panels share.
pub fn legend(runs: &[Run]) -> String {
    let items: Vec<String> = runs
        .iter()
        .enumerate()
        .map(|(i, run)| {
            format!(
                "<li><span class=\"swatch back-run-{}\"></span>{} <span class=\"faint\">{}</span></li>",
                i % 8,
                escape(&run.name),
                escape(run.stage())
            )
        })
        .collect();
    format!("<ul class=\"legend\">{}</ul>", items.concat())
}

/// The numbers of the curves, thinned to a page of rows.
pub fn numbers(runs: &[Run]) -> String {
    let mut out = String::new();
    for run in runs {
        let mut fields = vec!["loss".to_string()];
        fields.extend(run.terms());
        fields.extend(["learning_rate".to_string(), "grad_norm".into(), "cells_per_s".into()]);
        let mut head = vec!["step".to_string()];
        head.extend(fields.iter().map(|f| escape(&f.replace('_', " "))));
        let every = run.steps.len().div_ceil(25).max(1);
        let rows: Vec<Vec<String>> = (run.steps.iter().enumerate())
            .filter(|(i, _)| i % every == 0 || i + 1 == run.steps.len())
            .map(|(_, line)| {
                let mut row = vec![line["step"].to_string()];
                row.extend(fields.iter().map(|f| line[f.as_str()].as_f64().map_or("–".into(), brief)));
                row
            })
            .collect();
        out += &folded_table(&format!("Numbers of {}", run.name), &head, &rows);
    }
    out
}
