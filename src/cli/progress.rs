//! Progress on stderr: a bar on a terminal, otherwise one line every few seconds.

use super::complain;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Counts work done. Safe to share between threads.
pub struct Progress {
    bar: ProgressBar,
    what: String,
    /// Work that was done before this began.
    start: AtomicU64,
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
            "{prefix} [{bar:24}] {human_pos}/{human_len} {per_sec}, {eta} left  {wide_msg}"
        } else {
            "{prefix} {spinner} {human_pos} {per_sec}  {wide_msg}"
        };
        bar.set_style(
            ProgressStyle::with_template(template).expect("a valid template").progress_chars("=> "),
        );
        bar.set_prefix(what.to_string());
        let next_line = (talks && !terminal).then(|| Mutex::new(Instant::now() + LINE_EVERY));
        Progress { bar, what: what.to_string(), start: AtomicU64::new(0), next_line }
    }

    /// A progress that shows nothing: for library use and tests.
    pub fn silent() -> Self {
        Self::new("", None, false, false)
    }

    /// The first `n` units were done before: they say nothing of the pace.
    pub fn start_at(&self, n: u64) {
        self.bar.set_position(n);
        self.bar.reset_eta();
        self.start.store(n, Relaxed);
    }

    /// Adds `n` units of finished work.
    pub fn add(&self, n: u64) {
        self.bar.inc(n);
        self.line();
    }

    /// Replaces the text behind the bar, cut where the terminal ends.
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
            // Work that was there from the start (a resumed run) is no measure of the pace.
            let pace = (done - self.start.load(Relaxed).min(done)) as f64 / seconds.max(1e-9);
            let left =
                self.bar.length().map(|n| n.saturating_sub(done) as f64 / pace).filter(|s| s.is_finite());
            let left = left.map(|s| format!(", about {s:.0} s left")).unwrap_or_default();
            let message = self.bar.message();
            let says = if message.is_empty() { String::new() } else { format!("; {message}") };
            complain(format_args!("{}: {done}{of} after {seconds:.0} s{left}{says}", self.what));
        }
    }

    /// Clears the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
