//! `cellrefine watch`: a run as it goes, in the terminal. Where stdout is no terminal, one look in words.

use super::{Global, Output};
use crate::error::{Code, Error, Result};
use crate::report::html::brief;
use crate::report::status::{Follower, State};
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Block, Chart, Dataset, GraphType, LineGauge, Paragraph, Sparkline};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Flags of `watch`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
q or Esc leaves; the run goes on. The folder alone is read: watch from any terminal, or over a shared disk.

Examples:
  cellrefine watch runs/refined
  cellrefine watch runs/refined --once --json")]
pub struct Flags {
    /// Run folder, of a run that goes, is finished or was interrupted.
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// One look in words; so too where stdout is no terminal, and under --json.
    #[arg(long)]
    once: bool,
    /// Seconds between looks.
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    every: f64,
}

pub fn run(global: &Global, flags: &Flags) -> Result<Output> {
    if !(0.05..=3600.0).contains(&flags.every) {
        return Err(Error::new(Code::FlagValue, "--every is out of range")
            .found(flags.every)
            .wanted("0.05 to 3600 seconds"));
    }
    let mut run = Follower::new(&flags.run)?;
    if !flags.once && !global.json && std::io::stdout().is_terminal() {
        follow(&mut run, Duration::from_secs_f64(flags.every))?;
    }
    Ok(Output { text: run.status.to_text(), json: run.status.to_json() })
}

/// Draws until a key ends it.
fn follow(run: &mut Follower, every: Duration) -> Result<()> {
    let failed = |e: std::io::Error| Error::io("the terminal", "draw", &e);
    let colour = std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let mut terminal = ratatui::try_init().map_err(failed)?;
    let mut shown = || -> Result<()> {
        loop {
            terminal.draw(|frame| draw(frame, run, colour)).map_err(failed)?;
            let next = Instant::now() + every;
            loop {
                let left = next.saturating_duration_since(Instant::now());
                if !event::poll(left).map_err(failed)? {
                    break;
                }
                match event::read().map_err(failed)? {
                    Event::Key(key) if key.kind == KeyEventKind::Press => {
                        let interrupt =
                            key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
                        if interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                            return Ok(());
                        }
                    }
                    Event::Resize(..) => break,
                    _ => {}
                }
            }
            run.look()?;
        }
    };
    let outcome = shown();
    ratatui::restore();
    outcome
}

/// One frame, for any size of terminal.
pub fn draw(frame: &mut Frame, run: &Follower, colour: bool) {
    let paint = |c: Color| if colour { Style::new().fg(c) } else { Style::new() };
    let s = &run.status;
    let terms = s.terms();
    let rows = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Min(5),
        Constraint::Length(if frame.area().height >= 18 { 5 } else { 0 }),
        Constraint::Length(1),
    ]);
    let [head, gauge, middle, rate, foot] = rows.areas(frame.area());
    let tone = match s.state {
        State::Running => Color::Green,
        State::Finished => Color::Blue,
        State::Starting => Color::Yellow,
        State::Interrupted => Color::Red,
    };
    let strong = Style::new().add_modifier(Modifier::BOLD);
    let title = Line::from(vec![
        Span::styled(format!(" {} ", s.stage), strong),
        Span::raw(format!("{}  ", s.run.display())),
        Span::styled(s.line(), paint(tone)),
    ]);
    frame.render_widget(Paragraph::new(title), head);
    let share = s.share().unwrap_or(0.0);
    let label = s.share().map_or("steps unknown".into(), |share| format!("{:5.1} %", 100.0 * share));
    frame.render_widget(LineGauge::default().ratio(share).label(label).filled_style(paint(tone)), gauge);

    let side = if middle.width >= 60 { 30 } else { 0 };
    let [chart, table] = Layout::horizontal([Constraint::Min(20), Constraint::Length(side)]).areas(middle);
    curve(frame, chart, "loss", &run.series("loss"), paint(Color::Cyan));
    if side > 0 {
        let number = |field: &str| s.last[field].as_f64().map_or("–".to_string(), brief);
        let mut lines: Vec<Line> = Vec::new();
        let mut row = |name: &str, value: String, style: Style| {
            let name: String = name.chars().take(17).collect();
            lines.push(Line::from(vec![
                Span::styled(format!(" {name:<17}"), style),
                Span::raw(format!("{value:>9}")),
            ]));
        };
        row("loss", number("loss"), strong);
        terms.iter().for_each(|(name, value)| row(&format!("  {name}"), brief(*value), Style::new()));
        for (name, field) in [
            ("learning rate", "learning_rate"),
            ("gradient norm", "grad_norm"),
            ("cells/s", "cells_per_s"),
            ("tokens/s", "tokens_per_s"),
        ] {
            row(name, number(field), Style::new());
        }
        for (name, value) in &s.evaluation {
            row(&name[4..], value.as_f64().map_or("–".into(), brief), paint(Color::Yellow));
        }
        if s.last["bad_steps"].as_u64() > Some(0) {
            row("skipped steps", number("bad_steps"), paint(Color::Red));
        }
        frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" now ")), table);
    }
    if rate.height > 0 {
        let halves = Layout::horizontal([Constraint::Fill(1), Constraint::Fill(1)]);
        let [left, right] = halves.areas(rate);
        spark(frame, left, "cells/s", &run.series("cells_per_s"), paint(Color::Green));
        spark(frame, right, "gradient norm", &run.series("grad_norm"), paint(Color::Magenta));
    }
    frame.render_widget(Paragraph::new(format!(" {}   q quit", s.checkpoint_line())), foot);
}

fn curve(frame: &mut Frame, area: Rect, name: &str, points: &[(f64, f64)], style: Style) {
    let block = Block::bordered().title(format!(" {name} "));
    if points.len() < 2 {
        let text = if points.is_empty() { " no step is logged yet" } else { " one step is logged" };
        frame.render_widget(Paragraph::new(text).block(block), area);
        return;
    }
    let points = crate::report::svg::decimated(points, 4 * area.width.max(8) as usize);
    let ends = |of: fn(&(f64, f64)) -> f64| {
        points.iter().map(of).fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)))
    };
    let (first, last) = ends(|p| p.0);
    let (low, high) = ends(|p| p.1);
    let (low, high) = if high > low { (low, high) } else { (low - 0.5, high + 0.5) };
    let data =
        Dataset::default().marker(Marker::Braille).graph_type(GraphType::Line).style(style).data(&points);
    let x = Axis::default().bounds([first, last]).labels([brief(first), brief(last)]);
    let y = Axis::default().bounds([low, high]).labels([brief(low), brief((low + high) / 2.0), brief(high)]);
    frame.render_widget(Chart::new(vec![data]).x_axis(x).y_axis(y).block(block), area);
}

fn spark(frame: &mut Frame, area: Rect, name: &str, points: &[(f64, f64)], style: Style) {
    let room = area.width.saturating_sub(2) as usize;
    let shown = &points[points.len().saturating_sub(room)..];
    let most = shown.iter().map(|p| p.1).fold(f64::MIN_POSITIVE, f64::max);
    let bars: Vec<u64> = shown.iter().map(|p| (1000.0 * p.1 / most).max(0.0) as u64).collect();
    let last = shown.last().map_or("–".to_string(), |p| brief(p.1));
    let block = Block::bordered().title(format!(" {name} {last} "));
    frame.render_widget(Sparkline::default().data(&bars).max(1000).style(style).block(block), area);
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn screen(run: &Follower, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, run, true)).unwrap();
        let buffer = terminal.backend().buffer();
        let row = |y: u16| (0..width).map(|x| buffer[(x, y)].symbol().to_string()).collect::<String>();
        (0..height).map(|y| row(y).trim_end().to_string() + "\n").collect()
    }

    fn folder(steps: u64) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("settings.toml"), "seed = 0\n").unwrap();
        std::fs::write(dir.path().join("run.json"), "{\"stage\":\"refine\"}").unwrap();
        let lines: String = (1..=steps)
            .map(|s| {
                let loss = 3.0 / s as f64;
                format!(
                    "{{\"step\":{s},\"steps\":100,\"loss\":{loss},\"proto\":{loss},\"grad_norm\":2.5,\"learning_rate\":0.001,\"dt_ms\":1000,\
                     \"cells_per_s\":{},\"bad_steps\":1}}\n",
                    400 + s
                )
            })
            .collect();
        std::fs::write(dir.path().join("metrics.jsonl"), lines).unwrap();
        dir
    }

    #[test]
    fn a_running_run_shows_its_curve_its_pace_and_its_numbers() {
        let dir = folder(25);
        let _held = crate::train::folder::RunFolder::open(dir.path()).unwrap();
        let run = Follower::new(dir.path()).unwrap();
        let screen = screen(&run, 110, 30);
        for wanted in [
            "refine",
            "running, step 25 of 100 (25.0 %), about 1 min 15 s left",
            "25.0 %",
            "proto",
            "0.12",
            "cells/s 425",
            "skipped steps",
            "no checkpoint yet",
            "q quit",
        ] {
            assert!(screen.contains(wanted), "no {wanted:?} in\n{screen}");
        }
        // The loss falls: braille marks stand high at the left of the chart and low at its right.
        let marks = |from: usize, to: usize| -> Vec<usize> {
            let rows = screen.lines().enumerate();
            rows.filter(|(_, l)| {
                l.chars().skip(from).take(to - from).any(|c| ('\u{2801}'..='\u{28ff}').contains(&c))
            })
            .map(|(y, _)| y)
            .collect()
        };
        let (left, right) = (marks(8, 16), marks(60, 75));
        assert!(left.iter().min() < right.iter().min() && !right.is_empty(), "{left:?} {right:?}\n{screen}");
    }

    #[test]
    fn any_size_and_an_empty_log_are_drawn() {
        let dir = folder(0);
        let run = Follower::new(dir.path()).unwrap();
        assert!(screen(&run, 80, 24).contains("no step is logged yet"));
        let dir = folder(3);
        let run = Follower::new(dir.path()).unwrap();
        for (width, height) in [(1, 1), (5, 3), (20, 8), (40, 12), (79, 17), (300, 80)] {
            screen(&run, width, height);
        }
        assert!(screen(&run, 80, 24).contains("interrupted, step 3 of 100"));
    }
}
