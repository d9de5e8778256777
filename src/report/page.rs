//! One self-contained page over runs: inline style, script, drawings and data; it asks the network for nothing, and its policy
//! (`Content-Security-Policy`) forbids it to.
//!
//! The same runs give the same bytes: no clock is read. What a section lacks, it says with the reason.

use super::charts::classes::long_tail;
use super::charts::curves;
use super::charts::kernels::{Bench, trace};
use super::charts::matrix::{Shade, chain, matrix};
use super::charts::perturbation;
use super::charts::scatter::{PairOfTypes, correlation, scatter};
use super::headline::{sentence, tiles};
use super::html::{base64, escape, folded_table, number, script_json};
use super::map::{CellSet, Plane, maps, quantised};
use super::measure::{Measures, Model, Options, Pair, measure};
use super::provenance::provenance;
use super::run::Run;
use super::scores::{Scores, classes};
use crate::device::Act;
use crate::disk;
use crate::error::{Code, Error, Result};
use crate::eval::rows::Rows;
use crate::eval::zero_shot::cosines;
use crate::ops::Backend;
use serde_json::{Value, json};
use std::path::Path;

/// Files beside the runs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Beside<'a> {
    /// JSON of `bench kernels`.
    pub bench: Option<&'a Path>,
    /// File of `--trace`.
    pub trace: Option<&'a Path>,
    /// Table of `perturb`.
    pub perturbations: Option<&'a Path>,
}

/// Measures `runs` and writes the page to `out`.
///
/// # Errors
/// What files, checkpoints and the disk report.
pub fn write<B: Backend<A>, A: Act>(
    dev: &B,
    runs: &[Run],
    beside: Beside,
    options: &Options,
    out: &Path,
    say: &dyn Fn(&str),
) -> Result<Measures> {
    let folder = out.parent().filter(|p| !p.as_os_str().is_empty());
    if let Some(folder) = folder.filter(|p| !p.is_dir()) {
        return Err(Error::new(Code::OutputName, "the page's folder is not there")
            .at(folder.display())
            .next(format!("mkdir -p {}", folder.display())));
    }
    let measures = measure::<B, A>(dev, runs, options, say)?;
    let html = page(runs, &measures, beside, options, say)?;
    disk::replace(out, html.as_bytes())?;
    Ok(measures)
}

/// The page over `runs`, measured.
///
/// # Errors
/// Input: files beside the runs that are not what they are named; embeddings that are not finite.
pub fn page(
    runs: &[Run],
    measures: &Measures,
    beside: Beside,
    options: &Options,
    say: &dyn Fn(&str),
) -> Result<String> {
    let scores = Scores::new(measures, options.seed);
    let mut sections: Vec<(&str, &str, String)> = Vec::new();
    sections.push(("scores", "Before and after", compared(measures, &scores)));
    if let Some(labels) = labels(measures) {
        sections.push(("labels", "Labels", labels));
    }
    let (sets, planes) = match options.records_only {
        true => Default::default(),
        false => maps(measures, options.map_cells, options.seed, say)?,
    };
    sections.push(("maps", "Maps", map_section(measures, &sets, &planes)));
    sections.push(("prototypes", "Prototypes", prototypes(measures)));
    if let Some(path) = beside.perturbations {
        sections.push(("perturbations", "Perturbations", perturbation::html(path)?));
    }
    let (panels, curve_data) = curves::curves(runs);
    let numbers = curves::numbers(runs);
    let legend = curves::legend(runs);
    sections.push((
        "curves",
        "Training",
        format!("{legend}<div class=\"grid-panels\">{panels}</div>{numbers}"),
    ));
    if beside.bench.is_some() || beside.trace.is_some() {
        let bench = beside.bench.map(Bench::read).transpose()?.map_or(String::new(), |b| b.html());
        let traced = beside.trace.map(trace).transpose()?.unwrap_or_default();
        sections.push(("kernels", "Kernels", bench + &traced));
    }
    sections.push(("settings", "Settings and origin", provenance(runs)));
    let data = data(runs, measures, &sets, &planes, curve_data);
    let names: Vec<&str> = runs.iter().map(|r| r.name.as_str()).collect();
    let title = names.join(", ");
    let nav: String =
        sections.iter().map(|(id, name, _)| format!("<li><a href=\"#{id}\">{name}</a></li>")).collect();
    let body: String = sections
        .iter()
        .map(|(id, name, html)| format!("<section id=\"{id}\" aria-labelledby=\"{id}-head\"><h2 id=\"{id}-head\">{name}</h2>{html}</section>"))
        .collect();
    Ok(format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
         img-src data:\">\n<link rel=\"icon\" href=\"data:,\">\n<title>{} – cellrefine report</title>\n<style>\n{}</style>\n</head>\n<body>\n\
         <header><div class=\"top\"><div><p class=\"kind\">cellrefine report</p><h1>{}</h1></div>\
         <button id=\"theme\" type=\"button\" hidden></button></div><p class=\"lead\">{}</p>{}</header>\n\
         <nav aria-label=\"Sections\"><ul>{nav}</ul></nav>\n<main>{body}</main>\n\
         <footer><p>Written by cellrefine {}. docs/report.md explains each section.</p></footer>\n\
         <div id=\"tip\" role=\"status\" hidden></div>\n<script type=\"application/json\" id=\"data\">{}</script>\n<script>\n{}</script>\n\
         </body>\n</html>\n",
        escape(&title),
        include_str!("style.css"),
        escape(&title),
        sentence(runs, measures, &scores),
        tiles(measures, &scores),
        env!("CARGO_PKG_VERSION"),
        script_json(&data),
        include_str!("page.js"),
    ))
}

/// The tables of all pairs, then F1 by class and confusion; single models where there is no pair.
fn compared(measures: &Measures, scores: &Scores) -> String {
    let mut out = String::new();
    let measured: Vec<usize> =
        (0..measures.models.len()).filter(|&i| measures.models[i].found.is_ok()).collect();
    for model in &measures.models {
        if let Err(why) = &model.found {
            out +=
                &format!("<p class=\"missing\">{} has no scores: {}.</p>", escape(&model.name), escape(why));
        }
    }
    let pairs: Vec<&Pair> = measures
        .pairs
        .iter()
        .filter(|p| measured.contains(&p.before) && measured.contains(&p.after))
        .collect();
    if let Some(Ok(e)) = measured.first().map(|&i| &measures.models[i].found) {
        let [train, val, test] = e.split.cells;
        out += &format!(
            "<p class=\"note\">Scored on {} labelled test cells; split: {} ({train} training, {val} validation, {test} test cells). \
             Small numbers are 95 % intervals: for F1 and accuracy by the bootstrap over the scored cells, drawn within each true class ({} draws, \
             seeded, the same draws for all); for recall@k Wilson's. A change in bold has an interval that leaves zero out. One split and one seed \
             stand behind all of it: intervals tell the spread over cells, not over runs.</p>",
            e.test_cells,
            escape(&split_words(&e.split_origin)),
            super::bootstrap::DRAWS
        );
    }
    for (i, pair) in pairs.iter().enumerate() {
        let (before, after) = (&measures.models[pair.before], &measures.models[pair.after]);
        out +=
            &format!("<h3>{}: {} → {}</h3>", capital(pair.what), escape(&before.name), escape(&after.name));
        out += &scores.pair_table(measures, pair);
        out += &scores.by_method(measures, Some(pair.before), pair.after, &format!("pair-{i}"));
    }
    if pairs.is_empty() {
        for &i in &measured {
            out += &format!("<h3>{}</h3>", escape(&measures.models[i].name));
            out += &scores.by_method(measures, None, i, &format!("model-{i}"));
        }
    }
    if measured.len() > 2 || (pairs.is_empty() && !measured.is_empty()) {
        out += "<h3>All checkpoints side by side</h3>";
        out += &scores.all_table(measures);
    }
    let notes: Vec<String> = measured
        .iter()
        .filter_map(|&i| Some((i, measures.models[i].found.as_ref().ok()?)))
        .flat_map(|(i, e)| e.notes.iter().map(move |n| (i, n)))
        .map(|(i, note)| {
            format!("<p class=\"note\">{}: {}.</p>", escape(&measures.models[i].name), escape(note))
        })
        .collect();
    out + &notes.concat()
}

/// Without the path, which stands among the facts.
fn split_words(origin: &str) -> String {
    if origin.starts_with("recorded in") { "as the run recorded it".into() } else { origin.to_string() }
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |c| c.to_uppercase().chain(letters).collect())
}

fn labels(measures: &Measures) -> Option<String> {
    let e = measures.models.iter().find_map(|m| m.found.as_ref().ok())?;
    let (classes, _) = classes(e);
    let count = |name: &str| classes.iter().filter(|c| c.group.name() == name).count();
    let head = ["class", "", "training cells", "scored cells"].map(String::from);
    let rows: Vec<Vec<String>> = classes
        .iter()
        .map(|c| vec![escape(&c.name), c.group.name().into(), c.train.to_string(), c.test.to_string()])
        .collect();
    Some(format!(
        "<p>{} classes: {} head (at least {} % of the training cells), {} medium, {} tail (below {} %).</p><ul class=\"legend\">\
         <li><span class=\"swatch back-head\"></span>head</li><li><span class=\"swatch back-medium\"></span>medium</li>\
         <li><span class=\"swatch back-tail\"></span>tail</li></ul><figure>{}<figcaption>Labelled training cells by class, on a logarithmic axis.\
         </figcaption></figure>{}",
        classes.len(),
        count("head"),
        100.0 * e.thresholds.head,
        count("medium"),
        count("tail"),
        100.0 * e.thresholds.tail,
        long_tail(&classes),
        folded_table("Labels as a table", &head, &rows)
    ))
}

fn map_section(measures: &Measures, sets: &[CellSet], planes: &[Plane]) -> String {
    if planes.is_empty() {
        let why = measures.models.iter().find_map(|m| m.found.as_ref().err());
        let why = why.map_or("there are fewer than four cells to draw", String::as_str);
        return format!("<p class=\"missing\">No map: {}.</p>", escape(why));
    }
    let mut out = format!(
        "<p class=\"note\">t-SNE (perplexity {}, {} steps) of 50 principal components of the centred unit embeddings, each map of its own; a map \
         after a stage is turned onto the one before it. Distances between clusters mean little. Point at a cell in one map to find it in the \
         others; with the keyboard, arrow keys walk through the cells.</p>",
        super::tsne::PERPLEXITY,
        super::tsne::STEPS
    );
    for (number, set) in sets.iter().enumerate() {
        let drawn: Vec<(usize, &Plane)> =
            planes.iter().enumerate().filter(|(_, p)| p.set == number).collect();
        if set.of > set.cells.len() {
            out += &format!(
                "<p class=\"note\">{} of {} cells are drawn: every cell of the tail classes, of the others a seeded sample in proportion.</p>",
                set.cells.len(),
                set.of
            );
        } else {
            let kind = if set.labelled { "scored " } else { "" };
            out += &format!("<p class=\"note\">All {} {kind}cells are drawn.</p>", set.cells.len());
        }
        if !set.labelled {
            out += "<p class=\"note\">No labels: colours are the nearest prototype's.</p>";
        }
        let chips: String = (0..set.classes.len())
            .filter(|k| set.class.contains(k))
            .map(|k| {
                let tail = if set.tail[k] { " class=\"tail-class\"" } else { "" };
                let of = set.class.iter().filter(|&&c| c == k).count();
                format!(
                    "<li><button type=\"button\" data-class=\"{k}\" aria-pressed=\"true\"{tail}><span class=\"swatch\" data-class=\"{k}\"></span>{} \
                     <span class=\"faint\">{of}{}</span></button></li>",
                    escape(&set.classes[k]),
                    if set.tail[k] { ", tail" } else { "" }
                )
            })
            .collect();
        let tail = if set.tail.contains(&true) {
            "<button type=\"button\" data-show=\"tail\">Tail only</button>"
        } else {
            ""
        };
        let figures: String = drawn
            .iter()
            .map(|(index, plane)| {
                let model = &measures.models[plane.model];
                format!(
                    "<figure><h3>{} <span class=\"faint\">{}</span></h3><canvas id=\"map-{index}\" tabindex=\"0\" role=\"img\" \
                     aria-label=\"Map of {} cells under {}\"></canvas><p class=\"unseen\" id=\"said-{index}\" aria-live=\"polite\"></p></figure>",
                    escape(&model.name),
                    escape(&model.stage),
                    set.cells.len(),
                    escape(&model.name)
                )
            })
            .collect();
        out += &format!(
            "<div class=\"maps\" id=\"maps-{number}\" hidden><div class=\"controls\"><button type=\"button\" data-show=\"all\">All classes</button>\
             <button type=\"button\" data-show=\"none\">None</button>{tail}</div><ul class=\"classes\" aria-label=\"Classes shown\">{chips}</ul>\
             <div class=\"pair\">{figures}</div></div>"
        );
        let mut head = vec!["class".to_string()];
        head.extend(drawn.iter().map(|(_, p)| escape(&measures.models[p.model].name)));
        let rows: Vec<Vec<String>> = (0..set.classes.len())
            .filter(|k| set.class.contains(k))
            .map(|k| {
                let mut row = vec![escape(&set.classes[k])];
                row.extend(drawn.iter().map(|(_, p)| number_or_dash(p.purity[k])));
                row
            })
            .collect();
        out += &folded_table(
            "The maps as a table: share of a cell's 15 nearest cells (in the components) that are of its class",
            &head,
            &rows,
        );
    }
    out
}

fn number_or_dash(value: f64) -> String {
    number(Some(value).filter(|v| v.is_finite()), 2)
}

/// Names, cosines and overlaps of one model's prototypes.
struct Similarity {
    names: Vec<String>,
    cosine: Vec<f64>,
    overlap: Option<Vec<f64>>,
}

fn similarity(model: &Model) -> Option<Similarity> {
    let s = &model.found.as_ref().ok()?.scored;
    let (vectors, centre) = s.prototypes.as_ref()?;
    let rows = Rows::new(vectors, s.width).ok()?;
    let cosine = cosines(rows, rows, centre).ok()?.iter().map(|&c| c as f64).collect();
    let overlap = s.sets.as_ref().filter(|sets| sets.len() == s.types.len());
    let overlap = overlap.map(|sets| sets.jaccard().iter().map(|&j| j as f64).collect());
    Some(Similarity { names: s.types.clone(), cosine, overlap })
}

fn prototypes(measures: &Measures) -> String {
    let pair = measures.pairs.iter().find(|p| p.what == "refine");
    let after = pair
        .map(|p| p.after)
        .or_else(|| (0..measures.models.len()).find(|&i| similarity(&measures.models[i]).is_some()));
    let Some((index, new)) = after.and_then(|i| Some((i, similarity(&measures.models[i])?))) else {
        return "<p class=\"missing\">No checkpoint here has prototypes, and no marker sets were at hand to make some (name a file with --markers).</p>".into();
    };
    let old = pair.and_then(|p| similarity(&measures.models[p.before])).filter(|old| old.names == new.names);
    let n = new.names.len();
    let order = chain(new.overlap.as_ref().unwrap_or(&new.cosine), &vec![1; n]);
    let names: Vec<String> = order.iter().map(|&k| new.names[k].clone()).collect();
    let heat = |values: &[f64], what: &str, shade: Shade, caption: String| {
        let value = |r: usize, c: usize| if r == c { f64::NAN } else { values[order[r] * n + order[c]] };
        let tip = |r: usize, c: usize| {
            format!("{} · {}\n{what}: {}", names[r], names[c], number(Some(value(r, c)), 3))
        };
        let drawn = matrix((&names, &names), value, tip, shade, ("", ""), &caption);
        format!("<figure>{drawn}<figcaption>{}</figcaption></figure>", escape(&caption))
    };
    let mut figures = String::new();
    let mut out = String::new();
    if let Some(overlap) = &new.overlap {
        let pairs: Vec<PairOfTypes> = (0..n)
            .flat_map(|i| (0..i).map(move |j| (i, j)))
            .map(|(i, j)| PairOfTypes {
                names: (new.names[i].clone(), new.names[j].clone()),
                overlap: overlap[i * n + j],
                before: old.as_ref().map(|o| o.cosine[i * n + j]),
                after: new.cosine[i * n + j],
            })
            .collect();
        let r = |of: &dyn Fn(&PairOfTypes) -> Option<f64>| {
            let points: Vec<(f64, f64)> = pairs.iter().filter_map(|p| Some((p.overlap, of(p)?))).collect();
            correlation(points.into_iter())
        };
        let (before, after) = (r(&|p| p.before), r(&|p| Some(p.after)));
        out += &format!(
            "<p>Types that share markers should have similar prototypes. Correlation of cosine and overlap over {} pairs of types: {}{}.</p>",
            pairs.len(),
            before.map_or(String::new(), |b| format!("{} before, ", number(Some(b), 2))),
            number(after, 2) + if before.is_some() { " after" } else { "" }
        );
        figures += &format!(
            "<figure>{}<figcaption>A dot for each pair of types. {}Filled: {}.</figcaption></figure>",
            scatter(&pairs),
            if old.is_some() { "Hollow: before refine. " } else { "" },
            escape(&measures.models[index].name)
        );
        figures +=
            &heat(overlap, "overlap", Shade::Share, "Overlap of marker sets (weighted Jaccard, in %)".into());
        let head = ["types", "marker overlap", "cosine before", "cosine after"].map(String::from);
        let mut sorted: Vec<&PairOfTypes> = pairs.iter().collect();
        sorted.sort_by(|a, b| b.overlap.total_cmp(&a.overlap).then(b.after.total_cmp(&a.after)));
        let rows: Vec<Vec<String>> = sorted
            .iter()
            .take(200)
            .map(|p| {
                let both = format!("{} · {}", escape(&p.names.0), escape(&p.names.1));
                vec![both, number(Some(p.overlap), 3), number(p.before, 3), number(Some(p.after), 3)]
            })
            .collect();
        let title =
            if pairs.len() > 200 { "The 200 pairs with most overlap as a table" } else { "Pairs as a table" };
        out += &format!("<div class=\"pair\">{figures}</div>{}", folded_table(title, &head, &rows));
        figures = String::new();
    }
    if let Some(old) = &old {
        figures += &heat(
            &old.cosine,
            "cosine",
            Shade::Signed,
            format!("Cosine of prototypes, {}", measures.models[pair.map_or(0, |p| p.before)].name),
        );
    }
    figures += &heat(
        &new.cosine,
        "cosine",
        Shade::Signed,
        format!("Cosine of prototypes, {}", measures.models[index].name),
    );
    format!("{out}<div class=\"pair\">{figures}</div>")
}

fn data(runs: &[Run], measures: &Measures, sets: &[CellSet], planes: &[Plane], curves: Value) -> Value {
    let words = |v: &[usize]| base64(&v.iter().flat_map(|&c| (c as u16).to_le_bytes()).collect::<Vec<u8>>());
    let sets: Vec<Value> = sets
        .iter()
        .map(|s| {
            let ids: Vec<String> = s.ids.iter().map(|id| id.replace('\n', " ")).collect();
            json!({"ids": ids.join("\n"), "classes": s.classes, "class": words(&s.class), "tail": s.tail, "labelled": s.labelled})
        })
        .collect();
    let planes: Vec<Value> = (planes.iter().enumerate())
        .map(|(i, p)| {
            let called = (!p.called.is_empty()).then(|| words(&p.called));
            json!({"index": i, "set": p.set, "model": measures.models[p.model].name, "at": base64(&quantised(&p.at)),
                "called": called, "names": p.called_names})
        })
        .collect();
    let names: Vec<&str> = runs.iter().map(|r| r.name.as_str()).collect();
    json!({"runs": names, "curves": curves, "sets": sets, "planes": planes})
}
