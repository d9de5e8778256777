//! Square tables of shares as tiles: confusion of classes, similarity of prototypes. Rows and columns share one order, in which
//! what is confused stands near.

use crate::report::html::number;
use crate::report::svg::Svg;

const WIDTH: f64 = 360.0;

/// What tiles mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shade {
    /// 0 … 1: the surface to the accent.
    Share,
    /// −1 … 1: two hues about the surface.
    Signed,
    /// The same for shares of a greatest value: tiles bear no number.
    Relative,
}

/// An order of `n` things in which each follows the nearest of those left, from the largest on: `near` is (n, n) and symmetric.
pub fn chain(near: &[f64], size: &[usize]) -> Vec<usize> {
    let n = size.len();
    let mut left: Vec<usize> = (0..n).collect();
    let mut order: Vec<usize> = Vec::with_capacity(n);
    while !left.is_empty() {
        let best = match order.last() {
            None => left.iter().copied().max_by(|&a, &b| size[a].cmp(&size[b]).then(b.cmp(&a))),
            Some(&last) => left.iter().copied().max_by(|&a, &b| {
                let of = |i: usize| near[last * n + i];
                of(a).total_cmp(&of(b)).then(size[a].cmp(&size[b])).then(b.cmp(&a))
            }),
        };
        let Some(best) = best else { break };
        left.retain(|&i| i != best);
        order.push(best);
    }
    order
}

/// A (rows, columns) table of `value`s under `names`; `tip` says what a tile says. Tiles whose value rounds to nothing are not drawn.
pub fn matrix(
    names: (&[String], &[String]),
    value: impl Fn(usize, usize) -> f64,
    tip: impl Fn(usize, usize) -> String,
    shade: Shade,
    axes: (&str, &str),
    label: &str,
) -> String {
    let (rows, columns) = names;
    let most = rows.len().max(columns.len()).max(1);
    let left = if most > 20 { 88.0 } else { 112.0 };
    let tile = ((WIDTH - left - 2.0) / columns.len().max(1) as f64).min(34.0);
    let bottom = left - 20.0;
    let height = 16.0 + tile * rows.len() as f64 + bottom;
    let class = match most {
        0..=12 => "name",
        13..=20 => "name small",
        _ => "name tiny",
    };
    let middle = match most {
        0..=12 => 3.2,
        13..=20 => 2.8,
        _ => 2.2,
    };
    let mut svg = Svg::new(WIDTH, height);
    svg.text(left, 10.0, "start", "tick faint", axes.1, 200.0);
    svg.text(left - 5.0, 10.0, "end", "tick faint", axes.0, left);
    svg.rect((left, 16.0, tile * columns.len() as f64, tile * rows.len() as f64), "ground", "", "");
    for (r, name) in rows.iter().enumerate() {
        let y = 16.0 + tile * r as f64;
        svg.text(left - 5.0, y + tile / 2.0 + middle, "end", class, name, left - 7.0);
        for c in 0..columns.len() {
            let v = value(r, c);
            if !v.is_finite() || v.abs() < 0.005 {
                continue;
            }
            let hue = match shade {
                Shade::Signed | Shade::Relative if v < 0.0 => "tile cold",
                _ => "tile warm",
            };
            let opacity = format!("fill-opacity:{:.2}", v.abs().min(1.0));
            svg.rect((left + tile * c as f64, y, tile - 0.6, tile - 0.6), hue, &opacity, &tip(r, c));
            if tile >= 20.0 && shade != Shade::Relative {
                let ink = if v.abs() > 0.55 { "in-tile light" } else { "in-tile" };
                let text =
                    if shade == Shade::Share { format!("{:.0}", 100.0 * v) } else { number(Some(v), 1) };
                svg.text(left + tile * (c as f64 + 0.5), y + tile / 2.0 + 3.0, "middle", ink, &text, 60.0);
            }
        }
    }
    let foot = 16.0 + tile * rows.len() as f64 + 5.0;
    for (c, name) in columns.iter().enumerate() {
        svg.upright(left + tile * (c as f64 + 0.5) + middle, foot, "end", class, name, bottom - 6.0);
    }
    svg.finish("chart matrix", label, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_in_the_chain_are_those_that_are_confused() {
        let near = [0.0, 0.1, 0.9, 0.0, 0.1, 0.0, 0.0, 0.8, 0.9, 0.0, 0.0, 0.2, 0.0, 0.8, 0.2, 0.0];
        assert_eq!(chain(&near, &[1, 9, 3, 3]), [1, 3, 2, 0]);
        assert!(chain(&[], &[]).is_empty());
    }
}
