//! Prototype similarity against marker overlap: a dot for each pair of types, before hollow and after filled.

use crate::report::html::{brief, number};
use crate::report::svg::{Scale, Svg};

/// A pair of types.
#[derive(Debug, Clone)]
pub struct PairOfTypes {
    /// Their names.
    pub names: (String, String),
    /// Weighted Jaccard index of their marker sets.
    pub overlap: f64,
    /// Cosine of their prototypes before, where there were some.
    pub before: Option<f64>,
    /// Cosine after.
    pub after: f64,
}

/// The chart.
pub fn scatter(pairs: &[PairOfTypes]) -> String {
    let (width, height) = (360.0, 250.0);
    let most = pairs.iter().map(|p| p.overlap).fold(0.05, f64::max);
    let x = Scale::round(0.0, most, 44.0, width - 14.0);
    let y = Scale::linear(-1.0, 1.0, height - 38.0, 14.0);
    let mut svg = Svg::new(width, height);
    for tick in [-1.0, -0.5, 0.0, 0.5, 1.0] {
        svg.line((44.0, y.at(tick)), (width - 14.0, y.at(tick)), if tick == 0.0 { "axis" } else { "grid" });
        svg.text(39.0, y.at(tick) + 3.2, "end", "tick", &brief(tick), 60.0);
    }
    for tick in x.ticks(5) {
        svg.text(x.at(tick), height - 24.0, "middle", "tick", &brief(tick), 60.0);
    }
    svg.text(width - 14.0, height - 8.0, "end", "tick faint", "marker overlap (weighted Jaccard)", 300.0);
    svg.text(4.0, 9.0, "start", "tick faint", "cosine of prototypes", 300.0);
    for p in pairs {
        let said = |when: &str, cosine: f64| {
            format!(
                "{} · {}\ncosine {when}: {}\noverlap of markers: {}",
                p.names.0,
                p.names.1,
                number(Some(cosine), 2),
                number(Some(p.overlap), 3)
            )
        };
        if let Some(before) = p.before {
            svg.dot(x.at(p.overlap), y.at(before), 3.0, "dot before", &said("before", before));
        }
        svg.dot(x.at(p.overlap), y.at(p.after), 3.0, "dot after", &said("after", p.after));
    }
    svg.finish("chart", &format!("Cosine against marker overlap of {} pairs of types", pairs.len()), "")
}

/// Pearson's correlation; `None` where one side does not vary.
pub fn correlation(points: impl Iterator<Item = (f64, f64)> + Clone) -> Option<f64> {
    let n = points.clone().count() as f64;
    let (mx, my) = points.clone().fold((0.0, 0.0), |(a, b), (x, y)| (a + x / n, b + y / n));
    let (mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0);
    for (x, y) in points {
        xx += (x - mx) * (x - mx);
        yy += (y - my) * (y - my);
        xy += (x - mx) * (y - my);
    }
    (xx > 1e-18 && yy > 1e-18).then(|| xy / (xx * yy).sqrt())
}

#[cfg(test)]
mod tests {
    #[test]
    fn correlation_of_a_line_is_one() {
        let line = [(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)];
        assert!((super::correlation(line.into_iter()).unwrap() - 1.0).abs() < 1e-12);
        assert_eq!(super::correlation([(1.0, 2.0), (1.0, 3.0)].into_iter()), None);
    }
}
