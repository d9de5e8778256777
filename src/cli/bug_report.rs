//! The report file of a fault of the program: what a developer needs to find it, and nothing of the user's data.
//!
//! A hook keeps the last panic with its stack instead of printing it: some panics are expected (the Arrow library answers
//! damaged files with them) and become errors with a place. Only one that ends the program, or an error of kind `Bug`, is
//! written to a file. It holds the command line, `CELLREFINE_*` variables, versions and facts about the machine; no contents
//! of files and no other environment.

use crate::error::{Code, Error};
use std::backtrace::Backtrace;
use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

static LAST: Mutex<Option<Panic>> = Mutex::new(None);

struct Panic {
    message: String,
    place: String,
    thread: String,
    stack: String,
}

/// Keeps panics from here on; with `RUST_BACKTRACE` set they are printed as well.
pub(super) fn install() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if std::env::var_os("RUST_BACKTRACE").is_some_and(|v| v != "0") {
            before(info);
        }
        let payload = info.payload();
        let message = payload
            .downcast_ref::<&str>()
            .map(|s| s.to_string())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "a panic without a message".into());
        let panic = Panic {
            message,
            place: info.location().map_or_else(|| "an unknown place".into(), |l| l.to_string()),
            thread: std::thread::current().name().unwrap_or("without a name").to_string(),
            stack: Backtrace::force_capture().to_string(),
        };
        *LAST.lock().unwrap_or_else(|e| e.into_inner()) = Some(panic);
    }));
}

/// The error of a panic that has reached `main`.
pub(super) fn panicked() -> Error {
    let last = LAST.lock().unwrap_or_else(|e| e.into_inner());
    let found = last
        .as_ref()
        .map_or_else(|| "a panic that left no trace".to_string(), |p| format!("{} ({})", p.message, p.place));
    Error::new(Code::Panicked, "this is a bug in cellrefine").found(found)
}

/// Writes the report of `error` and names it in the error that is returned; where no file can be written, the report goes to
/// stderr.
pub(super) fn report(error: Error) -> Error {
    let text = text(&error);
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let name = format!("cellrefine-bug-{seconds}-{}.txt", std::process::id());
    let folders = [Ok(std::env::temp_dir()), std::env::current_dir()];
    let written = folders.into_iter().flatten().map(|f| f.join(&name)).find(|path| write(path, &text));
    let error = match error.code() {
        Code::Panicked => error,
        _ => error.wanted("this never to happen: it is a bug in cellrefine"),
    };
    match written {
        Some(path) => error.at(format!("report file {}", path.display())).next(
            "send in the report file: it holds the command line and facts about the machine, none of your data",
        ),
        None => {
            super::complain(&text);
            error.next("send in the lines above: they hold the command line and facts about the machine")
        }
    }
}

/// A new file; never over one that is there, nor through a link.
fn write(path: &PathBuf, text: &str) -> bool {
    use std::io::Write;
    std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .and_then(|mut f| f.write_all(text.as_bytes()))
        .is_ok()
}

fn text(error: &Error) -> String {
    let mut out = format!(
        "cellrefine {} on {} {}: a fault of the program\n\nerror[{}]: {error}\n",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::ARCH,
        std::env::consts::OS,
        error.code()
    );
    let words: Vec<String> = std::env::args_os().map(|a| format!("{a:?}")).collect();
    let _ = writeln!(out, "\ncommand line: {}", words.join(" "));
    for (name, value) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CELLREFINE_") {
            let _ = writeln!(out, "environment: {}={value:?}", name.to_string_lossy());
        }
    }
    let _ = writeln!(out, "built: nvcc {:?}, emulator {}", env!("BUILT_WITH_NVCC"), cfg!(emulator));
    let _ = writeln!(out, "threads: {}", rayon::current_num_threads());
    if let Ok(memory) = std::fs::read_to_string("/proc/meminfo") {
        memory.lines().take(3).for_each(|line| {
            let _ = writeln!(out, "{line}");
        });
    }
    if let Ok(kernel) = std::fs::read_to_string("/proc/version") {
        let _ = writeln!(out, "kernel: {}", kernel.trim());
    }
    if let Some(p) = &*LAST.lock().unwrap_or_else(|e| e.into_inner()) {
        let _ = writeln!(
            out,
            "\npanic: {}\nplace: {}\nthread: {}\n\nstack:\n{}",
            p.message, p.place, p.thread, p.stack
        );
    }
    out
}
