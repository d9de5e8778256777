//! Inline SVG: a canvas in user units that scales with the page, scales with round ticks, marks that carry their own tooltip.
//!
//! Colours are CSS variables of the page, so one drawing serves the light and the dark theme. A mark's `data-tip` is what the page's
//! script shows at hover; the numbers stand in a table beside each chart for those who cannot hover.

use super::html::escape;
use std::fmt::Write;

/// A drawing of `width` × `height` user units.
pub struct Svg {
    body: String,
    width: f64,
    height: f64,
}

impl Svg {
    /// An empty one.
    pub fn new(width: f64, height: f64) -> Self {
        Svg { body: String::new(), width, height }
    }

    /// Text; `class` says size and colour, `anchor` is start, middle or end. What does not fit into `room` is cut, whole in its tooltip.
    pub fn text(&mut self, x: f64, y: f64, anchor: &str, class: &str, text: &str, room: f64) {
        let shown = fitted(text, room, size_of(class));
        let tip = if shown != text { format!(" data-tip=\"{}\"", escape(text)) } else { String::new() };
        let _ = write!(
            self.body,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"{anchor}\" class=\"{class}\"{tip}>{}</text>",
            short(x),
            short(y),
            escape(&shown)
        );
    }

    /// Text turned by 90°, reading upwards to its end at (x, y) or from its start there.
    pub fn upright(&mut self, x: f64, y: f64, anchor: &str, class: &str, text: &str, room: f64) {
        let shown = fitted(text, room, size_of(class));
        let tip = if shown != text { format!(" data-tip=\"{}\"", escape(text)) } else { String::new() };
        let _ = write!(
            self.body,
            "<text transform=\"translate({} {}) rotate(-90)\" text-anchor=\"{anchor}\" class=\"{class}\"{tip}>{}</text>",
            short(x),
            short(y),
            escape(&shown)
        );
    }

    /// A line.
    pub fn line(&mut self, from: (f64, f64), to: (f64, f64), class: &str) {
        let _ = write!(
            self.body,
            "<line x1=\"{}\" y1=\"{}\" x2=\"{}\" y2=\"{}\" class=\"{class}\"/>",
            short(from.0),
            short(from.1),
            short(to.0),
            short(to.1)
        );
    }

    /// A rectangle (x, y, width, height) with its tooltip; `style` may hold a fill.
    pub fn rect(&mut self, at: (f64, f64, f64, f64), class: &str, style: &str, tip: &str) {
        let _ = write!(
            self.body,
            "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" class=\"{class}\"{}{}/>",
            short(at.0),
            short(at.1),
            short(at.2.max(0.0)),
            short(at.3.max(0.0)),
            attribute("style", style),
            attribute("data-tip", tip)
        );
    }

    /// A dot with its tooltip.
    pub fn dot(&mut self, x: f64, y: f64, radius: f64, class: &str, tip: &str) {
        let _ = write!(
            self.body,
            "<circle cx=\"{}\" cy=\"{}\" r=\"{}\" class=\"{class}\"{}/>",
            short(x),
            short(y),
            short(radius),
            attribute("data-tip", tip)
        );
    }

    /// A line through points.
    pub fn path(&mut self, points: &[(f64, f64)], class: &str) {
        let mut d = String::new();
        for (i, (x, y)) in points.iter().enumerate() {
            let _ = write!(d, "{}{} {}", if i == 0 { "M" } else { "L" }, short(*x), short(*y));
        }
        let _ = write!(self.body, "<path d=\"{d}\" class=\"{class}\"/>");
    }

    /// The element; `label` is what a screen reader says, `attributes` go to the element as they stand.
    pub fn finish(self, class: &str, label: &str, attributes: &str) -> String {
        format!(
            "<svg class=\"{class}\" viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\" {attributes}>{}</svg>",
            short(self.width),
            short(self.height),
            escape(label),
            self.body
        )
    }
}

/// Font size of a class, as in style.css.
fn size_of(class: &str) -> f64 {
    let sized = [
        ("tiny", 6.6),
        ("small", 8.4),
        ("in-tile", 8.6),
        ("tick", 9.5),
        ("value", 9.5),
        ("name", 10.0),
        ("panel-title", 11.5),
    ];
    sized.into_iter().find(|(name, _)| class.split(' ').any(|c| c == *name)).map_or(10.5, |(_, size)| size)
}

/// Width of a letter in units of the font's size, in the widest of the page's fonts (DejaVu Sans).
fn letter_width(c: char) -> f64 {
    match c {
        'i' | 'j' | 'l' | 'I' | '.' | ',' | ':' | ';' | '|' | '\'' | ' ' | '!' => 0.33,
        '/' | '(' | ')' | '-' | 'f' | 't' | 'r' | '[' | ']' => 0.42,
        'm' | 'w' | 'M' | 'W' | '…' | '%' | '@' => 0.99,
        '+' | '−' | '<' | '>' | '=' => 0.84,
        c if c.is_uppercase() => 0.75,
        c if c.is_ascii() => 0.64,
        c if (c as u32) < 0x2e80 => 0.70,
        _ => 1.0,
    }
}

/// `text`, or as much of it as `room` holds at `size`, with an ellipsis.
pub fn fitted(text: &str, room: f64, size: f64) -> String {
    let width = |text: &str| text.chars().map(letter_width).sum::<f64>() * size;
    if width(text) <= room {
        return text.to_string();
    }
    let mut left = room - letter_width('…') * size;
    let kept: String = text
        .chars()
        .take_while(|c| {
            left -= letter_width(*c) * size;
            left >= 0.0
        })
        .collect();
    kept.trim_end().to_string() + "…"
}

fn attribute(name: &str, value: &str) -> String {
    if value.is_empty() { String::new() } else { format!(" {name}=\"{}\"", escape(value)) }
}

/// At most one digit behind the point: a tenth of a unit is below a pixel.
pub fn short(value: f64) -> String {
    let rounded = (value * 10.0).round() / 10.0;
    if rounded.fract() == 0.0 { format!("{rounded:.0}") } else { format!("{rounded:.1}") }
}

/// From values to places on an axis.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    log: bool,
}

impl Scale {
    /// A linear axis from `from` to `to` over `low..=high`, opened a little where they are equal.
    pub fn linear(low: f64, high: f64, from: f64, to: f64) -> Self {
        let (low, high) = if high > low { (low, high) } else { (low - 0.5, low + 0.5) };
        Scale { low, high, from, to, log: false }
    }

    /// The same, widened to round ends.
    pub fn round(low: f64, high: f64, from: f64, to: f64) -> Self {
        let s = Scale::linear(low, high, from, to);
        let step = step(s.high - s.low, 4);
        Scale { low: (s.low / step + 1e-9).floor() * step, high: (s.high / step - 1e-9).ceil() * step, ..s }
    }

    /// A logarithmic axis; both ends above 0.
    pub fn log(low: f64, high: f64, from: f64, to: f64) -> Self {
        let low = low.max(f64::MIN_POSITIVE);
        let high = if high > low { high } else { low * 10.0 };
        Scale { low, high, from, to, log: true }
    }

    /// The place of `value`, never beyond the axis.
    pub fn at(&self, value: f64) -> f64 {
        let share = match self.log {
            true => (value.max(self.low) / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        };
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }

    /// Round values on the axis, about `most` of them.
    pub fn ticks(&self, most: usize) -> Vec<f64> {
        if self.log {
            let (a, b) = (self.low.log10().ceil() as i32, self.high.log10().floor() as i32);
            let every = ((b - a + 1).max(1) as usize).div_ceil(most).max(1);
            return (a..=b).step_by(every).map(|e| 10f64.powi(e)).collect();
        }
        let step = step(self.high - self.low, most);
        let first = (self.low / step - 1e-9).ceil() as i64;
        let last = (self.high / step + 1e-9).floor() as i64;
        (first..=last).take(50).map(|i| i as f64 * step).collect()
    }
}

/// 1, 2 or 5 times a power of ten, so that a range has at most about `most` of it.
fn step(range: f64, most: usize) -> f64 {
    let rough = (range / most.max(1) as f64).max(f64::MIN_POSITIVE);
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= rough * 0.999).unwrap_or(10.0 * power)
}

/// At most `most` points of a series that keep what the eye sees: first and last, and of each stretch its lowest and highest.
pub fn decimated(points: &[(f64, f64)], most: usize) -> Vec<(f64, f64)> {
    if points.len() <= most {
        return points.to_vec();
    }
    let inner = &points[1..points.len() - 1];
    let buckets = (most.saturating_sub(2) / 2).max(1);
    let mut kept = vec![points[0]];
    for b in 0..buckets {
        let stretch = &inner[b * inner.len() / buckets..(b + 1) * inner.len() / buckets];
        let low = (0..stretch.len()).min_by(|&i, &j| stretch[i].1.total_cmp(&stretch[j].1));
        let high = (0..stretch.len()).max_by(|&i, &j| stretch[i].1.total_cmp(&stretch[j].1));
        if let (Some(low), Some(high)) = (low, high) {
            kept.push(stretch[low.min(high)]);
            if low != high {
                kept.push(stretch[low.max(high)]);
            }
        }
    }
    kept.push(points[points.len() - 1]);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_lie_on_the_axis() {
        assert_eq!(
            Scale::linear(0.0, 1.0, 0.0, 100.0).ticks(5),
            [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
        );
        assert_eq!(Scale::linear(-3.0, 7.0, 0.0, 1.0).ticks(4), [0.0, 5.0]);
        assert_eq!(Scale::log(1.0, 1e4, 0.0, 1.0).ticks(9), [1.0, 10.0, 100.0, 1000.0, 10000.0]);
        let s = Scale::round(0.13, 0.87, 0.0, 10.0);
        assert_eq!((s.at(0.0), s.at(1.0), s.at(7.0)), (0.0, 10.0, 10.0));
        for (low, high) in [(5.0, 5.0), (0.0, 1e-300), (-1e300, 1e300), (0.0, f64::MIN_POSITIVE)] {
            assert!(Scale::linear(low, high, 0.0, 1.0).ticks(5).len() <= 50);
        }
    }

    #[test]
    fn text_is_cut_to_its_room() {
        assert_eq!(fitted("CD4+/CD45RA+/CD25- Naive T", 400.0, 10.0), "CD4+/CD45RA+/CD25- Naive T");
        let cut = fitted("CD4+/CD45RA+/CD25- Naive T", 80.0, 10.0);
        assert!(cut.ends_with('…') && (8..14).contains(&cut.chars().count()), "{cut}");
        assert_eq!((fitted("", 10.0, 10.0), fitted("abc", 0.0, 10.0)), (String::new(), "…".into()));
    }

    #[test]
    fn decimation_keeps_ends_and_spikes() {
        let mut points: Vec<(f64, f64)> = (0..10_000).map(|i| (i as f64, (i as f64 / 500.0).sin())).collect();
        points[4321].1 = 99.0;
        let kept = decimated(&points, 300);
        assert!(kept.len() <= 300 && kept.contains(&(4321.0, 99.0)));
        assert_eq!((kept[0], kept[kept.len() - 1]), (points[0], points[9999]));
        assert!(kept.windows(2).all(|w| w[0].0 < w[1].0));
    }
}
