//! Progress on stderr: a bar on a terminal, otherwise one line every few seconds.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Counts work done. Safe to share between threads.
pub struct Progress {
    bar: ProgressBar,
    what: String,
    /// When to print the next plain line; `None` on a terminal or when silent.
    next_line: Option<Mutex<Instant>>,
}

const LINE_EVERY: Duration = Duration::from_secs(5);

impl Progress {
    pub(super) fn new(what: &str, total: Option<u64>, talks: bool, terminal: bool) -> Self {
        let target =
            if talks && terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(total, target);
        let template = if total.is_some() {
            "{msg} [{bar:30}] {human_pos}/{human_len} {per_sec} {eta}"
        } else {
            "{msg} {spinner} {human_pos} {per_sec}"
        };
        bar.set_style(
            ProgressStyle::with_template(template).expect("a valid template").progress_chars("=> "),
        );
        bar.set_message(what.to_string());
        let next_line = (talks && !terminal).then(|| Mutex::new(Instant::now() + LINE_EVERY));
        Progress { bar, what: what.to_string(), next_line }
    }

    /// A progress that shows nothing: for library use and tests.
    pub fn silent() -> Self {
        Self::new("", None, false, false)
    }

    /// Adds `n` units of finished work.
    pub fn add(&self, n: u64) {
        self.bar.inc(n);
        self.line();
    }

    /// Replaces the text in front of the bar.
    pub fn say(&self, text: &str) {
        self.bar.set_message(text.to_string());
    }

    /// Prints through `print` without tearing the bar.
    pub fn above(&self, print: impl FnOnce()) {
        self.bar.suspend(print);
    }

    fn line(&self) {
        let Some(next) = &self.next_line else { return };
        let Ok(mut next) = next.try_lock() else { return };
        if Instant::now() >= *next {
            *next = Instant::now() + LINE_EVERY;
            let (done, seconds) = (self.bar.position(), self.bar.elapsed().as_secs_f64());
            let of = self.bar.length().map(|n| format!("/{n}")).unwrap_or_default();
            let message = self.bar.message();
            let what = if message.is_empty() { &self.what } else { &message };
            eprintln!("{what}: {done}{of} after {seconds:.0} s");
        }
    }

    /// Clears the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
