//! Roofline and time by kernel, from the JSON of `bench kernels` (or of scripts/gpu-check.sh) and from a `--trace` file.
//!
//! ```text
//! intensity = FLOP / byte, both as counted;   roof(intensity) = min(peak FLOP/s, intensity · copy bytes/s)
//! ```

use crate::error::{Code, Error, Result};
use crate::report::html::{brief, escape, folded_table, number};
use crate::report::svg::{Scale, Svg};
use crate::whole_file;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Largest JSON file that is read: a trace holds at most a million ranges.
const MOST_BYTES: u64 = 256 << 20;

/// A timed kernel.
#[derive(Debug, Clone, PartialEq)]
pub struct Kernel {
    name: String,
    shape: String,
    ms: f64,
    gb_per_s: f64,
    tflop_per_s: f64,
    fraction: Option<f64>,
}

/// A bench file.
#[derive(Debug, Clone, PartialEq)]
pub struct Bench {
    /// The machine, in words.
    pub device: String,
    kernels: Vec<Kernel>,
    peak_tflop_per_s: Option<f64>,
    copy_gb_per_s: Option<f64>,
}

/// Reads a JSON object.
///
/// # Errors
/// Input: too large, not JSON.
pub fn read_json(path: &Path) -> Result<Value> {
    let text = whole_file::read(path, "read the file", MOST_BYTES)?;
    serde_json::from_slice(&text).map_err(|e| {
        Error::new(Code::NotJson, "the file is not JSON").at(path.display()).found(e.to_string())
    })
}

impl Bench {
    /// From the object in `path`.
    ///
    /// # Errors
    /// Input: no list of kernels in it.
    pub fn read(path: &Path) -> Result<Bench> {
        let json = read_json(path)?;
        let rows = json["kernels"].as_array().ok_or_else(|| {
            Error::new(Code::ChartData, "no kernels in the bench file")
                .at(path.display())
                .wanted("the JSON of `cellrefine bench kernels --out FILE` or of scripts/gpu-check.sh")
        })?;
        let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_string);
        let kernels = rows.iter().filter_map(|row| {
            Some(Kernel {
                name: row["name"].as_str()?.to_string(),
                shape: row["shape"].as_str().unwrap_or_default().to_string(),
                ms: row["ms_median"].as_f64()?,
                gb_per_s: row["gb_per_s"].as_f64().unwrap_or(0.0),
                tflop_per_s: row["tflop_per_s"].as_f64().unwrap_or(0.0),
                fraction: row["fraction_of_peak"].as_f64(),
            })
        });
        let peak =
            [&json["peak_gflop_per_s"], &json["peak_bf16"]["gflop_per_s"], &json["peak_f32"]["gflop_per_s"]];
        Ok(Bench {
            device: text(&json["device"]),
            kernels: kernels.collect(),
            peak_tflop_per_s: peak.iter().find_map(|p| p.as_f64()).map(|g| g / 1e3),
            copy_gb_per_s: json["copy_gb_per_s"].as_f64(),
        })
    }

    /// Roofline, bars and table.
    pub fn html(&self) -> String {
        if self.kernels.is_empty() {
            return "<p class=\"missing\">The bench file has no timed kernel (on the emulator nothing is timed).</p>".into();
        }
        let mut rows: Vec<&Kernel> = self.kernels.iter().collect();
        rows.sort_by(|a, b| b.ms.total_cmp(&a.ms).then(a.name.cmp(&b.name)));
        let head = ["kernel", "shape", "ms", "TFLOP/s", "GB/s", "% of ceiling"].map(String::from);
        let table: Vec<Vec<String>> = rows
            .iter()
            .map(|k| {
                vec![
                    escape(&k.name),
                    escape(&k.shape),
                    brief(k.ms),
                    brief(k.tflop_per_s),
                    brief(k.gb_per_s),
                    number(k.fraction.map(|f| 100.0 * f), 0),
                ]
            })
            .collect();
        let bars: Vec<(String, f64, String)> = rows
            .iter()
            .map(|k| {
                let tip = format!(
                    "{}\n{}\n{} ms, {} % of its ceiling",
                    k.name,
                    k.shape,
                    brief(k.ms),
                    number(k.fraction.map(|f| 100.0 * f), 0)
                );
                (k.name.clone(), k.ms, tip)
            })
            .collect();
        format!(
            "<div class=\"pair\"><figure>{}<figcaption>Roofline on {}: each dot a kernel, at the arithmetic intensity that was counted. \
             The roof is the peak and the copy rate measured in the same run.</figcaption></figure><figure>{}<figcaption>Milliseconds of one \
             call, the longest first.</figcaption></figure></div>{}",
            self.roofline(),
            escape(&self.device),
            time_bars(&bars, "ms"),
            folded_table("Numbers of the kernels", &head, &table)
        )
    }

    fn roofline(&self) -> String {
        let (width, height) = (360.0, 260.0);
        let points: Vec<(&Kernel, f64)> = (self.kernels.iter())
            .filter(|k| k.gb_per_s > 0.0 && k.tflop_per_s > 0.0)
            .map(|k| (k, 1e3 * k.tflop_per_s / k.gb_per_s))
            .collect();
        let ends = |of: &dyn Fn(&(&Kernel, f64)) -> f64| {
            points.iter().map(of).fold((f64::INFINITY, 0f64), |(a, b), v| (a.min(v), b.max(v)))
        };
        let (low, high) = ends(&|p| p.1);
        let (slow, fast) = ends(&|p| p.0.tflop_per_s);
        if points.is_empty() {
            return "<p class=\"missing\">No kernel of the file counts both FLOPs and bytes.</p>".into();
        }
        let ridge =
            self.peak_tflop_per_s.zip(self.copy_gb_per_s.filter(|c| *c > 0.0)).map(|(p, c)| 1e3 * p / c);
        let decade = |v: f64, up: bool| 10f64.powf(if up { v.log10().ceil() } else { v.log10().floor() });
        let (low, high) = ridge.map_or((low, high), |r| (low.min(r / 2.0), high.max(2.0 * r)));
        let x = Scale::log(decade(low, false), decade(high, true), 44.0, width - 14.0);
        let top = self.peak_tflop_per_s.unwrap_or(fast).max(fast);
        let y = Scale::log(decade(slow, false), decade(top * 1.3, true), height - 38.0, 16.0);
        let mut svg = Svg::new(width, height);
        for tick in x.ticks(7) {
            svg.line((x.at(tick), 16.0), (x.at(tick), height - 38.0), "grid");
            svg.text(x.at(tick), height - 24.0, "middle", "tick", &brief(tick), 60.0);
        }
        for tick in y.ticks(6) {
            svg.line((44.0, y.at(tick)), (width - 14.0, y.at(tick)), "grid");
            svg.text(39.0, y.at(tick) + 3.2, "end", "tick", &brief(tick), 60.0);
        }
        svg.text(width - 14.0, height - 8.0, "end", "tick faint", "FLOP per byte", 200.0);
        svg.text(4.0, 9.0, "start", "tick faint", "TFLOP/s", 200.0);
        if let (Some(peak), Some(copy), Some(ridge)) = (self.peak_tflop_per_s, self.copy_gb_per_s, ridge) {
            let left = decade(low, false).max(decade(slow, false) * 1e3 / copy);
            let roof = [(left, left * copy / 1e3), (ridge, peak), (decade(high, true), peak)];
            svg.path(&roof.map(|(i, t)| (x.at(i), y.at(t))), "roof");
        }
        for (k, intensity) in &points {
            let tip = format!(
                "{}\n{}\n{} TFLOP/s, {} GB/s\n{} % of its ceiling",
                k.name,
                k.shape,
                brief(k.tflop_per_s),
                brief(k.gb_per_s),
                number(k.fraction.map(|f| 100.0 * f), 0)
            );
            svg.dot(x.at(*intensity), y.at(k.tflop_per_s), 4.0, "dot after", &tip);
        }
        svg.finish("chart", &format!("Roofline of {} kernels", points.len()), "")
    }
}

/// The longest bars; what is behind them is one bar.
const BARS: usize = 16;

fn time_bars(rows: &[(String, f64, String)], unit: &str) -> String {
    let (mut shown, rest) = (rows[..rows.len().min(BARS)].to_vec(), &rows[rows.len().min(BARS)..]);
    if !rest.is_empty() {
        let sum = rest.iter().map(|r| r.1).sum();
        shown.push((
            format!("{} others", rest.len()),
            sum,
            format!("{} others\n{} {unit} together", rest.len(), brief(sum)),
        ));
    }
    let (width, row, names) = (360.0, 19.0, 138.0);
    let most = shown.iter().map(|r| r.1).fold(f64::MIN_POSITIVE, f64::max);
    let x = Scale::linear(0.0, most, names, width - 48.0);
    let mut svg = Svg::new(width, 6.0 + row * shown.len() as f64);
    for (i, (name, value, tip)) in shown.iter().enumerate() {
        let y = 2.0 + row * i as f64;
        svg.text(names - 6.0, y + 12.5, "end", "name", name, names - 10.0);
        svg.rect((names, y + 2.0, (x.at(*value) - names).max(1.0), row - 5.0), "bar accent", "", tip);
        svg.text(x.at(*value) + 4.0, y + 12.5, "start", "value", &brief(*value), 60.0);
    }
    svg.finish("chart", &format!("{unit} by name, {} rows", shown.len()), "")
}

/// Own time of each name in a Chrome trace: its ranges' time without that of the ranges within them.
///
/// # Errors
/// Input: not a trace.
pub fn trace(path: &Path) -> Result<String> {
    let json = read_json(path)?;
    let events = json["traceEvents"].as_array().or_else(|| json.as_array()).ok_or_else(|| {
        Error::new(Code::ChartData, "no events in the trace file")
            .at(path.display())
            .wanted("the file of --trace, a Chrome trace")
    })?;
    let mut threads: BTreeMap<u64, Vec<(f64, f64, &str)>> = BTreeMap::new();
    for event in events.iter().filter(|e| e["ph"] == "X") {
        let (Some(ts), Some(dur), Some(name)) =
            (event["ts"].as_f64(), event["dur"].as_f64(), event["name"].as_str())
        else {
            continue;
        };
        threads.entry(event["tid"].as_u64().unwrap_or(0)).or_default().push((ts, dur, name));
    }
    let own = own_times(threads.into_values());
    if own.is_empty() {
        return Ok("<p class=\"missing\">The trace holds no complete range.</p>".into());
    }
    let all: f64 = own.iter().map(|r| r.1).sum();
    let bars: Vec<(String, f64, String)> = own
        .iter()
        .map(|(name, us, n)| {
            let share = number(Some(100.0 * us / all.max(1e-12)), 1);
            (
                name.clone(),
                us / 1e3,
                format!("{name}\n{} ms in {n} ranges\n{share} % of the traced time", brief(us / 1e3)),
            )
        })
        .collect();
    let rows: Vec<Vec<String>> = own
        .iter()
        .map(|(name, us, n)| {
            vec![escape(name), brief(us / 1e3), n.to_string(), number(Some(100.0 * us / all.max(1e-12)), 1)]
        })
        .collect();
    let head = ["range", "own ms", "times", "% of all"].map(String::from);
    Ok(format!(
        "<figure>{}<figcaption>Own time by range in the trace, in milliseconds: the time of ranges within a range is not its own.\
         </figcaption></figure>{}",
        time_bars(&bars, "ms"),
        folded_table("Numbers of the trace", &head, &rows)
    ))
}

/// (name, own time, times) by falling time.
fn own_times<'a>(threads: impl Iterator<Item = Vec<(f64, f64, &'a str)>>) -> Vec<(String, f64, u64)> {
    let mut own: BTreeMap<&str, (f64, u64)> = BTreeMap::new();
    for mut ranges in threads {
        // Outer before inner where both start at once.
        ranges.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)));
        let mut open: Vec<(f64, &str)> = Vec::new();
        for (start, length, name) in ranges {
            while open.last().is_some_and(|(end, _)| *end <= start) {
                open.pop();
            }
            if let Some((_, outer)) = open.last() {
                own.entry(outer).or_default().0 -= length;
            }
            let entry = own.entry(name).or_default();
            *entry = (entry.0 + length, entry.1 + 1);
            open.push((start + length, name));
        }
    }
    let mut all: Vec<(String, f64, u64)> =
        own.into_iter().map(|(name, (time, n))| (name.to_string(), time.max(0.0), n)).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_time_leaves_out_what_lies_within() {
        let ranges = vec![
            (0.0, 10.0, "step"),
            (1.0, 4.0, "forward"),
            (2.0, 1.0, "norm"),
            (5.0, 5.0, "backward"),
            (10.0, 2.0, "step"),
        ];
        let own = own_times([ranges].into_iter());
        let of = |n: &str| own.iter().find(|o| o.0 == n).map(|o| (o.1, o.2)).unwrap();
        assert_eq!(
            (of("step"), of("forward"), of("norm"), of("backward")),
            ((3.0, 2), (3.0, 1), (1.0, 1), (5.0, 1))
        );
    }

    #[test]
    fn files_that_are_no_bench_and_no_trace_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.json");
        for text in ["", "{", "[1]", "{\"kernels\": 3}", "\u{0}\u{1}"] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(Bench::read(&file).unwrap_err().kind().exit_code(), 3, "{text:?}");
        }
        std::fs::write(&file, "{\"a\": 1}").unwrap();
        assert_eq!(trace(&file).unwrap_err().kind().exit_code(), 3);
        std::fs::write(&file, "{\"kernels\": [{\"name\": \"<b>\", \"ms_median\": null}, {}]}").unwrap();
        assert!(Bench::read(&file).unwrap().html().contains("no timed kernel"));
    }
}
