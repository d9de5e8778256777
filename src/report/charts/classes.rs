//! The labels' long tail, and F1 by class before and after with intervals: horizontal, one row a class, names at the left.

use crate::report::html::{brief, number};
use crate::report::svg::{Scale, Svg};

const WIDTH: f64 = 360.0;
const ROW: f64 = 19.0;
/// Room for names.
const NAMES: f64 = 140.0;

/// How often a class occurs in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Share at or above the head's threshold.
    Head,
    /// Between.
    Medium,
    /// Share below the tail's threshold.
    Tail,
}

impl Group {
    /// As in CSS classes and text.
    pub fn name(self) -> &'static str {
        match self {
            Group::Head => "head",
            Group::Medium => "medium",
            Group::Tail => "tail",
        }
    }
}

/// One class of the label column.
#[derive(Debug, Clone)]
pub struct Class {
    /// Its name.
    pub name: String,
    /// Cells in training.
    pub train: usize,
    /// Cells scored.
    pub test: usize,
    /// Head, medium or tail.
    pub group: Group,
}

/// Training cells by class, most first, on a logarithmic axis.
pub fn long_tail(classes: &[Class]) -> String {
    let height = 18.0 + ROW * classes.len() as f64 + 22.0;
    let most = classes.iter().map(|c| c.train).max().unwrap_or(1).max(10) as f64;
    let x = Scale::log(0.7, most * 1.05, NAMES, WIDTH - 44.0);
    let mut svg = Svg::new(WIDTH, height);
    for tick in x.ticks(5) {
        svg.line((x.at(tick), 12.0), (x.at(tick), height - 22.0), "grid");
        svg.text(x.at(tick), height - 9.0, "middle", "tick", &brief(tick), 60.0);
    }
    svg.text(WIDTH - 2.0, height - 9.0, "end", "tick faint", "cells", 60.0);
    let all = classes.iter().map(|c| c.train).sum::<usize>().max(1) as f64;
    for (i, class) in classes.iter().enumerate() {
        let y = 14.0 + ROW * i as f64;
        svg.text(NAMES - 6.0, y + 12.5, "end", "name", &class.name, NAMES - 10.0);
        let tip = format!(
            "{}\n{} training cells ({} %), {} scored\n{}",
            class.name,
            class.train,
            number(Some(100.0 * class.train as f64 / all), 1),
            class.test,
            class.group.name()
        );
        let end = x.at(class.train as f64);
        svg.rect(
            (NAMES, y + 2.0, (end - NAMES).max(1.0), ROW - 5.0),
            &format!("bar {}", class.group.name()),
            "",
            &tip,
        );
        svg.text(end + 4.0, y + 12.5, "start", "value", &class.train.to_string(), 60.0);
    }
    svg.finish("chart", &format!("Training cells of {} classes, head, medium and tail", classes.len()), "")
}

/// F1 of one class with its interval.
#[derive(Debug, Clone, Copy)]
pub struct Scored {
    /// F1.
    pub f1: f64,
    /// 95 %.
    pub interval: (f64, f64),
}

/// F1 before (hollow) and after (filled) by class, whiskers for the intervals.
pub fn by_class(
    classes: &[Class],
    before: Option<&[Scored]>,
    after: &[Scored],
    names: (&str, &str),
) -> String {
    let height = 18.0 + ROW * classes.len() as f64 + 22.0;
    let x = Scale::linear(0.0, 1.0, NAMES, WIDTH - 12.0);
    let mut svg = Svg::new(WIDTH, height);
    for tick in [0.0, 0.25, 0.5, 0.75, 1.0] {
        svg.line((x.at(tick), 12.0), (x.at(tick), height - 22.0), "grid");
        svg.text(x.at(tick), height - 9.0, "middle", "tick", &brief(tick), 60.0);
    }
    for (i, class) in classes.iter().enumerate() {
        let y = 14.0 + ROW * i as f64 + ROW / 2.0;
        svg.text(NAMES - 10.0, y + 3.2, "end", "name", &class.name, NAMES - 12.0);
        svg.rect(
            (NAMES - 7.0, y - 6.0, 3.0, 12.0),
            &format!("bar {}", class.group.name()),
            "",
            class.group.name(),
        );
        let said = |name: &str, s: &Scored| {
            let (low, high) = s.interval;
            format!(
                "{}\n{name}: F1 {} ({} – {})\n{} test cells, {} in training",
                class.name,
                number(Some(s.f1), 3),
                number(Some(low), 2),
                number(Some(high), 2),
                class.test,
                class.train
            )
        };
        if let Some(before) = before {
            let b = before[i];
            svg.line((x.at(b.f1), y), (x.at(after[i].f1), y), "link");
            svg.line((x.at(b.interval.0), y - 3.5), (x.at(b.interval.1), y - 3.5), "whisker before");
            svg.dot(x.at(b.f1), y - 3.5, 3.4, "dot before", &said(names.0, &b));
        }
        let (a, y) = (after[i], if before.is_some() { y + 3.5 } else { y });
        svg.line((x.at(a.interval.0), y), (x.at(a.interval.1), y), "whisker after");
        svg.dot(x.at(a.f1), y, 3.6, "dot after", &said(names.1, &a));
    }
    svg.finish("chart", &format!("F1 of {} classes, {} and {}", classes.len(), names.0, names.1), "")
}
