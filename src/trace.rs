//! Named ranges of time: a Chrome trace of a run (`--trace FILE`, for Perfetto), and NVTX ranges of the same names on a GPU.
//!
//! [`range`] opens a range that ends when its value is dropped. With nobody listening it is one load of a static. A range is time
//! on the host: on a GPU, from the first launch that was queued in it to the last; `nsys` puts the device's time beside the NVTX
//! ranges.

use crate::disk::Pending;
use crate::error::{Error, Result};
use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Who listens.
static LISTENERS: AtomicU8 = AtomicU8::new(0);
const RECORDING: u8 = 1;
const NVTX: u8 = 2;

/// Ranges that a trace holds: 40 MB of them. A long run is traced from its first step until then.
const MOST: usize = 1_000_000;

static RECORD: Mutex<Option<Record>> = Mutex::new(None);

struct Record {
    began: Instant,
    ranges: Vec<Closed>,
    /// Ranges for which there was no room.
    left_out: u64,
}

struct Closed {
    name: &'static str,
    thread: u32,
    start: Duration,
    length: Duration,
}

fn record() -> std::sync::MutexGuard<'static, Option<Record>> {
    // A panic elsewhere leaves whole ranges.
    RECORD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An open range; it ends with this value.
#[must_use = "the range ends when this is dropped"]
pub struct Range {
    name: &'static str,
    start: Option<Instant>,
    nvtx: bool,
}

/// Opens a range.
#[inline]
pub fn range(name: &'static str) -> Range {
    match LISTENERS.load(Ordering::Relaxed) {
        0 => Range { name, start: None, nvtx: false },
        listeners => open(name, listeners),
    }
}

#[cold]
fn open(name: &'static str, listeners: u8) -> Range {
    let nvtx = listeners & NVTX != 0;
    if nvtx {
        nvtx::push(name);
    }
    Range { name, start: (listeners & RECORDING != 0).then(Instant::now), nvtx }
}

impl Drop for Range {
    #[inline]
    fn drop(&mut self) {
        if self.start.is_some() || self.nvtx {
            close(self);
        }
    }
}

#[cold]
fn close(range: &Range) {
    if range.nvtx {
        nvtx::pop();
    }
    let Some(start) = range.start else { return };
    let length = start.elapsed();
    if let Some(record) = record().as_mut() {
        if record.ranges.len() == MOST {
            record.left_out += 1;
            return;
        }
        let start = start.saturating_duration_since(record.began);
        record.ranges.push(Closed { name: range.name, thread: thread(), start, length });
    }
}

/// A small number for the current thread.
fn thread() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    thread_local!(static NUMBER: u32 = NEXT.fetch_add(1, Ordering::Relaxed));
    NUMBER.with(|n| *n)
}

/// A trace being recorded; written when it is finished, or dropped: a run that fails or is interrupted leaves one too.
pub struct Trace {
    /// Until it is written.
    file: Option<Pending>,
}

impl Trace {
    /// Records from here on. One trace at a time.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn start(path: &Path) -> Result<Self> {
        let file = Some(Pending::create(path)?);
        let mut record = record();
        if record.is_some() {
            return Err(Error::bug("a second trace at a time"));
        }
        *record = Some(Record { began: Instant::now(), ranges: Vec::new(), left_out: 0 });
        LISTENERS.fetch_or(RECORDING, Ordering::Relaxed);
        Ok(Trace { file })
    }

    /// Writes the file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(mut self) -> Result<()> {
        self.write()
    }

    fn write(&mut self) -> Result<()> {
        let Some(mut file) = self.file.take() else { return Ok(()) };
        LISTENERS.fetch_and(!RECORDING, Ordering::Relaxed);
        let Some(record) = record().take() else { return Ok(()) };
        let micros = |d: Duration| d.as_nanos() as f64 / 1e3;
        let mut text = format!(
            "{{\"displayTimeUnit\":\"ms\",\"otherData\":{{\"program\":\"cellrefine {}\",\"ranges_left_out\":{}}},\
             \"traceEvents\":[\n",
            env!("CARGO_PKG_VERSION"),
            record.left_out
        );
        for (i, r) in record.ranges.iter().enumerate() {
            let comma = if i == 0 { "" } else { ",\n" };
            // A write to a string does not fail; names are this crate's own and need no escapes.
            let _ = write!(
                text,
                "{comma}{{\"name\":\"{}\",\"ph\":\"X\",\"pid\":1,\"tid\":{},\"ts\":{},\"dur\":{}}}",
                r.name,
                r.thread,
                micros(r.start),
                micros(r.length)
            );
            file.write(text.as_bytes())?;
            text.clear();
        }
        text.push_str("\n]}\n");
        file.write(text.as_bytes())?;
        file.publish()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // The failure of the run itself is what is reported.
        let _ = self.write();
    }
}

/// Sends ranges to NVTX from here on, where its library is found; called when a GPU is opened. Not yet confirmed on a GPU.
pub fn to_nvtx() {
    if nvtx::available() {
        LISTENERS.fetch_or(NVTX, Ordering::Relaxed);
    }
}

/// Two functions of NVTX, loaded by name: without the library there are no ranges, and nothing else is missing.
mod nvtx {
    use std::ffi::{CStr, CString, c_char, c_int, c_void};
    use std::mem::transmute;
    use std::sync::OnceLock;

    /// NVTX 2 of the toolkits before CUDA 13, and the shared form of NVTX 3.
    const LIBRARIES: [&CStr; 3] = [c"libnvToolsExt.so.1", c"libnvtx3interop.so.1", c"libnvtx3interop.so"];

    type Push = unsafe extern "C" fn(*const c_char) -> c_int;
    type Pop = unsafe extern "C" fn() -> c_int;

    struct Functions {
        push: Push,
        pop: Pop,
    }

    static FUNCTIONS: OnceLock<Option<Functions>> = OnceLock::new();

    fn functions() -> Option<&'static Functions> {
        FUNCTIONS.get_or_init(|| LIBRARIES.into_iter().find_map(load)).as_ref()
    }

    #[cfg(unix)]
    fn load(name: &CStr) -> Option<Functions> {
        // SAFETY: a C string; NVIDIA's library is found by the loader's own rules, and stays loaded.
        let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if library.is_null() {
            return None;
        }
        // SAFETY: a live handle and C strings.
        let find = |symbol: &CStr| unsafe { libc::dlsym(library, symbol.as_ptr()) };
        let (push, pop) = (find(c"nvtxRangePushA"), find(c"nvtxRangePop"));
        if push.is_null() || pop.is_null() {
            return None;
        }
        // SAFETY: the types that NVTX documents for these names.
        let (push, pop) =
            unsafe { (transmute::<*mut c_void, Push>(push), transmute::<*mut c_void, Pop>(pop)) };
        Some(Functions { push, pop })
    }

    #[cfg(not(unix))]
    fn load(_name: &CStr) -> Option<Functions> {
        None
    }

    pub fn available() -> bool {
        functions().is_some()
    }

    pub fn push(name: &str) {
        if let (Some(f), Ok(name)) = (functions(), CString::new(name)) {
            // SAFETY: a C string, which NVTX copies.
            unsafe { (f.push)(name.as_ptr()) };
        }
    }

    pub fn pop() {
        if let Some(f) = functions() {
            // SAFETY: no arguments.
            unsafe { (f.pop)() };
        }
    }

    #[cfg(all(test, unix))]
    mod tests {
        use super::*;
        use std::process::Command;

        /// A library of the same two names, compiled here, sees both calls; a missing one, or one without the names, is none.
        #[test]
        fn the_library_is_found_or_done_without() {
            assert!(load(c"libno-such-nvtx.so").is_none());
            let folder = tempfile::tempdir().unwrap();
            let library = |name: &str, source: &str| {
                let (code, object) = (folder.path().join("code.c"), folder.path().join(name));
                std::fs::write(&code, source).unwrap();
                let mut command = Command::new(std::env::var("CC").unwrap_or("cc".into()));
                let built = command.args(["-shared", "-fPIC", "-o"]).arg(&object).arg(&code).status();
                built
                    .is_ok_and(|s| s.success())
                    .then(|| CString::new(object.into_os_string().into_encoded_bytes()).unwrap())
            };
            let source = "static int depth; int nvtxRangePushA(const char* name) { return name[0] == 'x' ? depth++ : -9; }\n\
                          int nvtxRangePop(void) { return --depth; }\n";
            let Some(complete) = library("complete.so", source) else {
                eprintln!("skipped: no C compiler");
                return;
            };
            assert!(load(&library("empty.so", "int nothing;\n").unwrap()).is_none());
            let f = load(&complete).unwrap();
            // SAFETY: the functions compiled above.
            let calls = unsafe { [(f.push)(c"x".as_ptr()), (f.push)(c"x".as_ptr()), (f.pop)(), (f.pop)()] };
            assert_eq!(calls, [0, 1, 1, 0]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The only test that records in this process: a trace is global to it.
    #[test]
    fn ranges_are_written_with_their_times_and_only_while_a_trace_is_open() {
        drop(range("before"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.json");
        let trace = Trace::start(&path).unwrap();
        assert!(Trace::start(&folder.path().join("second.json")).is_err());
        {
            let _outer = range("outer-of-this-test");
            drop(range("inner-of-this-test"));
            std::thread::sleep(Duration::from_millis(3));
        }
        trace.finish().unwrap();
        drop(range("after"));
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let find = |name: &str| {
            let events = json["traceEvents"].as_array().unwrap();
            events.iter().find(|e| e["name"] == name).map(|e| {
                assert_eq!(e["ph"], "X");
                (e["ts"].as_f64().unwrap(), e["dur"].as_f64().unwrap(), e["tid"].as_u64().unwrap())
            })
        };
        let (outer, inner) = (find("outer-of-this-test").unwrap(), find("inner-of-this-test").unwrap());
        assert!(outer.1 >= 3000.0 && outer.0 <= inner.0 && inner.0 + inner.1 <= outer.0 + outer.1);
        assert_eq!(outer.2, inner.2);
        assert!(find("before").is_none() && find("after").is_none());
        assert_eq!(
            Trace::start(&folder.path().join("no/such/folder.json")).err().unwrap().kind().exit_code(),
            3
        );
    }
}
