//! Where a result comes from: settings, inputs by digest, split, versions, dates, and what the run cost.

use super::html::{brief, day, escape, folded_table, number, table};
use super::run::Run;
use serde_json::Value;

/// Facts of each run side by side, then every setting that some run has, those that differ first.
pub fn provenance(runs: &[Run]) -> String {
    let mut head = vec![String::new()];
    head.extend(runs.iter().map(|r| escape(&r.name)));
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut fact = |name: &str, of: &dyn Fn(&Run) -> Option<String>| {
        let found: Vec<Option<String>> = runs.iter().map(of).collect();
        if found.iter().any(Option::is_some) {
            let mut row = vec![name.to_string()];
            row.extend(found.into_iter().map(|f| f.unwrap_or_else(|| "–".into())));
            rows.push(row);
        }
    };
    let text = |v: &Value| v.as_str().map(escape);
    let digest = |v: &Value| {
        v.as_str().map(|d| {
            format!(
                "<code title=\"{}\">{}</code>",
                escape(d),
                escape(&d.chars().take(12).collect::<String>())
            )
        })
    };
    let time = |run: &Run, last: bool| {
        let line = if last { run.steps.last() } else { run.steps.first() };
        line.and_then(|l| l["time"].as_f64()).map(day)
    };
    fact("stage", &|r| text(&r.record["stage"]));
    fact("folder", &|r| Some(format!("<code>{}</code>", escape(&r.path.display().to_string()))));
    fact("started from", &|r| r.record["checkpoint"].as_str().map(|p| format!("<code>{}</code>", escape(p))));
    fact("preset", &|r| text(&r.record["preset"]));
    fact("corpus", &|r| r.record["corpus"].as_str().map(|p| format!("<code>{}</code>", escape(p))));
    fact("corpus digest", &|r| digest(&r.record["inputs"]["corpus"]));
    fact("vocabulary digest", &|r| digest(&r.record["inputs"]["vocabulary"]));
    fact("marker sets digest", &|r| digest(&r.record["inputs"]["markers"]));
    fact("split digest", &|r| digest(&r.split["sha256"]));
    fact("split", &|r| split(&r.split));
    fact("label column", &|r| text(&r.record["label"]));
    fact("seed", &|r| r.settings.get("seed").map(|s| escape(&s.to_string())));
    fact("weights", &|r| {
        let (step, _, manifest) = r.checkpoint.as_ref()?;
        let weights = digest(&manifest["files"]["model.safetensors"]["sha256"]).unwrap_or_else(|| "–".into());
        Some(format!("{weights} of step {step}"))
    });
    fact("cellrefine", &|r| text(&r.record["version"]));
    fact("device", &|r| text(&r.record["device"]));
    fact("first step logged", &|r| time(r, false));
    fact("last step logged", &|r| time(r, true));
    fact("steps", &|r| Some(r.last()["step"].to_string()).filter(|s| s != "null"));
    fact("training time", &|r| Some(duration(r.seconds())).filter(|_| r.seconds() > 0.0));
    fact("cells, tokens seen", &|r| Some(format!("{}, {}", brief(r.sum("cells")), brief(r.sum("tokens")))));
    fact("cells per second", &|r| Some(brief(r.sum("cells") / r.seconds())).filter(|_| r.seconds() > 0.0));
    fact("peak memory", &|r| {
        let most = r.steps.iter().filter_map(|l| l["host_memory_bytes"].as_f64()).fold(0.0, f64::max);
        (most > 0.0).then(|| format!("{} MB", number(Some(most / 1e6), 0)))
    });
    fact("skipped steps", &|r| r.last()["bad_steps"].as_u64().map(|n| n.to_string()));
    let facts = table("words", "Facts of the runs", &head, &rows);
    let (differing, equal) = settings(runs);
    let mut out = facts;
    if !differing.is_empty() {
        out += "<h3>Settings that differ</h3>";
        out += &table("words", "Settings that differ", &head, &differing);
    }
    if !equal.is_empty() {
        let title = if runs.len() > 1 { "Settings that all runs share" } else { "All settings" };
        out += &folded_table(title, &head, &equal);
    }
    out
}

/// Rows of settings: those that are not equal in all runs, and those that are.
fn settings(runs: &[Run]) -> (Vec<Vec<String>>, Vec<Vec<String>>) {
    let mut names: Vec<String> = Vec::new();
    let flat: Vec<Vec<(String, String)>> = runs.iter().map(|r| flatten(&r.settings, "")).collect();
    for (name, _) in flat.iter().flatten() {
        if !names.contains(name) {
            names.push(name.clone());
        }
    }
    let row = |name: &String| -> Vec<String> {
        let value = |f: &Vec<(String, String)>| {
            f.iter().find(|(n, _)| n == name).map_or("–".into(), |(_, v)| escape(v))
        };
        std::iter::once(format!("<code>{}</code>", escape(name))).chain(flat.iter().map(value)).collect()
    };
    names.iter().map(row).partition(|row| row[1..].windows(2).any(|w| w[0] != w[1]))
}

fn flatten(settings: &toml::Table, prefix: &str) -> Vec<(String, String)> {
    let mut out = Vec::new();
    for (name, value) in settings {
        let name = format!("{prefix}{name}");
        match value {
            toml::Value::Table(inner) => out.extend(flatten(inner, &format!("{name}."))),
            toml::Value::String(text) => out.push((name, text.clone())),
            toml::Value::Float(x) => out.push((name, if *x == 0.0 { "0".into() } else { x.to_string() })),
            other => out.push((name, other.to_string())),
        }
    }
    out
}

fn split(split: &Value) -> Option<String> {
    let cells: Vec<u64> = split["cells"].as_array()?.iter().filter_map(Value::as_u64).collect();
    let [train, val, test] = cells.as_slice() else { return None };
    let label =
        split["spec"]["label"].as_str().map_or(String::new(), |l| format!(", stratified by {}", escape(l)));
    Some(format!("{train} train, {val} validation, {test} test{label}"))
}

/// 1 h 02 min, 3 min 10 s, 4.2 s.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if !s.is_finite() => "–".into(),
        s if s < 60.0 => format!("{s:.1} s"),
        s if s < 3600.0 => format!("{:.0} min {:02.0} s", (s / 60.0).floor(), (s % 60.0).floor()),
        s => format!("{:.0} h {:02.0} min", (s / 3600.0).floor(), (s % 3600.0 / 60.0).floor()),
    }
}
