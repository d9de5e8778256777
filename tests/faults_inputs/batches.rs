//! Mutants are read in child processes of this very test, a batch in each, so that one that aborts, overflows its stack, hangs or
//! eats the memory is seen, named, and passed over.
//!
//! A child says each mutant's number before it reads it. Silence for longer than [`PATIENCE`] is a hang; a death names its
//! mutant by the last number. Memory is counted by the allocator of this test, which refuses what goes beyond the limit.

use super::hostile::{self, Damage};
use super::kinds::{self, Kind};
use super::mutate;
use cellrefine::error::Error;
use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{BufRead, BufReader, Write};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc;
use std::time::Duration;

/// A mutant that is read for so long hangs.
const PATIENCE: Duration = Duration::from_secs(30);
/// A reader may take so much, and so many times the bytes of the sample besides.
const MOST_BYTES: usize = 256 << 20;
const TIMES_THE_SAMPLE: usize = 64;
/// What a child is to do: kind, plan, first and last number, folder of the sample.
const ORDER: &str = "CELLREFINE_MUTANTS";
/// Name of the test that a child runs.
pub const CHILD: &str = "child";

/// Counts what is allocated, and refuses what goes beyond [`LIMIT`].
pub struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

fn takes(bytes: usize) -> bool {
    let live = LIVE.fetch_add(bytes, Relaxed) + bytes;
    if live > LIMIT.load(Relaxed) {
        LIVE.fetch_sub(bytes, Relaxed);
        return false;
    }
    PEAK.fetch_max(live, Relaxed);
    true
}

// SAFETY: every call is handed on to the system's allocator, or refused with a null pointer; only numbers are kept.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's own promise.
        if takes(layout.size()) { unsafe { System.alloc(layout) } } else { std::ptr::null_mut() }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's own promise.
        if takes(layout.size()) { unsafe { System.alloc_zeroed(layout) } } else { std::ptr::null_mut() }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's own promise.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if size > layout.size() && !takes(size - layout.size()) {
            return std::ptr::null_mut();
        }
        if size < layout.size() {
            LIVE.fetch_sub(layout.size() - size, Relaxed);
        }
        // SAFETY: the caller's own promise.
        unsafe { System.realloc(at, layout, size) }
    }
}

/// How a kind's files are damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// Cut at the places of [`mutate::cuts`].
    Cuts,
    /// One bit flipped, evenly over all bytes.
    Flips,
    /// [`mutate::mutant`].
    Mutants,
    /// [`hostile::cases`].
    Hostile,
}

/// What came of a batch.
#[derive(Debug, Default)]
pub struct Outcome {
    pub tried: usize,
    pub refused: usize,
    pub lost: Vec<String>,
    pub peak_bytes: usize,
}

/// A folder for samples, in memory where the machine has such a place: thousands of copies are made of them.
pub fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        tempfile::tempdir_in(memory).or_else(|_| tempfile::tempdir())
    } else {
        tempfile::tempdir()
    }
    .unwrap()
}

/// How many mutants a plan has for each file of the sample; `None` where there is no end.
fn numbers(kind: &Kind, plan: Plan, sample: &Path) -> Option<Vec<usize>> {
    let bytes = |file: &&str| {
        std::fs::read(sample.join(file)).unwrap_or_else(|e| panic!("{}: {file}: {e}", kind.name))
    };
    match plan {
        Plan::Cuts => Some(kind.damaged.iter().map(|file| mutate::cuts(&bytes(file)).len()).collect()),
        Plan::Flips => Some(kind.damaged.iter().map(|file| bytes(file).len()).collect()),
        Plan::Hostile => Some(vec![hostile::cases(kind, sample).len()]),
        Plan::Mutants => None,
    }
}

/// Reads up to `most` mutants of a kind, evenly chosen where the plan has more.
pub fn try_mutants(kind: &Kind, plan: Plan, most: usize) -> Outcome {
    let folder = scratch();
    let sample = folder.path().join("sample");
    std::fs::create_dir(&sample).unwrap();
    (kind.make)(&sample);
    let all: usize = numbers(kind, plan, &sample).map_or(most, |n| n.iter().sum::<usize>());
    let step = all.div_ceil(most.max(1)).max(1);
    let mut outcome = Outcome::default();
    let mut first = 0;
    while first < all {
        first = batch(kind, plan, (first, all, step), folder.path(), &mut outcome);
    }
    outcome
}

/// One child; returns the number to go on with.
fn batch(
    kind: &Kind,
    plan: Plan,
    (first, all, step): (usize, usize, usize),
    folder: &Path,
    outcome: &mut Outcome,
) -> usize {
    let order = format!("{} {plan:?} {first} {all} {step} {}", kind.name, folder.display());
    let said = folder.join("stderr");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([CHILD, "--exact", "--nocapture", "--test-threads=1"])
        .env(ORDER, order)
        .env("RAYON_NUM_THREADS", "2")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(std::fs::File::create(&said).unwrap())
        .spawn()
        .unwrap();
    let (send, lines) = mpsc::channel();
    let stdout = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if send.send(line).is_err() {
                return;
            }
        }
    });
    let (mut now, mut ended) = (None, false);
    let name = |n: usize| format!("{} {plan:?} {n}", kind.name);
    let verdict = loop {
        match lines.recv_timeout(PATIENCE) {
            Ok(line) => {
                let mut words = line.splitn(3, ' ');
                let what = words.next().unwrap_or_default();
                let number = words.next().and_then(|n| n.parse::<usize>().ok());
                let rest = words.next().unwrap_or_default();
                match (what, number) {
                    ("at", Some(n)) => now = Some(n),
                    ("took", _) => outcome.tried += 1,
                    ("refused", _) => {
                        (outcome.tried, outcome.refused) = (outcome.tried + 1, outcome.refused + 1)
                    }
                    ("lost", Some(n)) => {
                        outcome.tried += 1;
                        outcome.lost.push(format!("{}: {rest}", name(n)));
                    }
                    ("peak", Some(bytes)) => outcome.peak_bytes = outcome.peak_bytes.max(bytes),
                    ("end", _) => ended = true,
                    _ => {}
                }
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let _ = child.kill();
                break format!("nothing for {} seconds: a hang", PATIENCE.as_secs());
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break String::new(),
        }
    };
    let status = child.wait().unwrap();
    let _ = reader.join();
    if ended {
        return all;
    }
    let words = String::from_utf8_lossy(&std::fs::read(&said).unwrap()).into_owned();
    let last: Vec<&str> = words.lines().rev().take(3).collect();
    let Some(n) = now else { panic!("{}: the child did not start: {status}\n{words}", kind.name) };
    outcome.tried += 1;
    outcome.lost.push(format!("{}: {verdict} {status}: {}", name(n), last.join(" | ")));
    n + step
}

/// The child's part: reads its mutants and says how each went. Returns at once where there is no order.
pub fn child() {
    let Ok(order) = std::env::var(ORDER) else { return };
    let words: Vec<&str> = order.splitn(6, ' ').collect();
    let kind = kinds::named(words[0]);
    let plan = match words[1] {
        "Cuts" => Plan::Cuts,
        "Flips" => Plan::Flips,
        "Hostile" => Plan::Hostile,
        _ => Plan::Mutants,
    };
    let number = |n: usize| words[n].parse::<usize>().unwrap();
    // SAFETY: two limits of this process; a dump of memory per crash is of no use to anyone.
    unsafe { libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 }) };
    let folder = PathBuf::from(words[5]);
    let (sample, place) = (folder.join("sample"), folder.join("read"));
    let files: Vec<Vec<u8>> = kind.damaged.iter().map(|f| std::fs::read(sample.join(f)).unwrap()).collect();
    let read = || {
        let _ = std::fs::remove_dir_all(&place);
        kinds::copy(&sample, &place);
    };
    let bytes: usize = files.iter().map(Vec::len).sum();
    let lens = numbers(kind, plan, &sample);
    let mut cases = if plan == Plan::Hostile { hostile::cases(kind, &sample) } else { Vec::new() };
    let stdout = std::io::stdout();
    let say = |text: String| {
        let mut out = stdout.lock();
        let _ = out.write_all(format!("{text}\n").as_bytes());
        let _ = out.flush();
    };
    // Libtest has begun a line of its own.
    say(String::new());
    read();
    let sound = (kind.read)(&place).unwrap_or_else(|e| panic!("{}: the sample is not sound: {e}", kind.name));
    // Panics of a dependency that a reader turns into an error are none; those of the crate itself are, caught or not.
    static OURS: Mutex<Vec<String>> = Mutex::new(Vec::new());
    std::panic::set_hook(Box::new(|info| {
        let ours = info.location().is_none_or(|l| !l.file().starts_with('/'));
        if ours {
            OURS.lock().unwrap().push(info.to_string().replace('\n', " "));
        }
    }));
    LIMIT.store(LIVE.load(Relaxed) + MOST_BYTES + TIMES_THE_SAMPLE * bytes, Relaxed);
    let mut most = 0;
    for n in (number(2)..number(3)).step_by(number(4)) {
        say(format!("at {n}"));
        read();
        let case = match cases.get_mut(n) {
            Some(case) => std::mem::take(case),
            None => damage(kind, plan, n, &files, lens.as_deref()),
        };
        let file = case.file;
        let same = matches!(&case.damage, Damage::Bytes(bytes) if *bytes == files[file]);
        case.damage.place(&place.join(kind.damaged[file]));
        let (what, refused) = (case.what, case.refused);
        drop(case.damage);
        let before = LIVE.load(Relaxed);
        PEAK.store(before, Relaxed);
        let found = std::panic::catch_unwind(AssertUnwindSafe(|| (kind.read)(&place)));
        most = most.max(PEAK.load(Relaxed).saturating_sub(before));
        let panics = std::mem::take(&mut *OURS.lock().unwrap());
        let file = if what.is_empty() { kind.damaged[file] } else { &what };
        say(match found {
            Err(_) => format!("lost {n} {file}: a panic: {}", panics.join("; ")),
            Ok(_) if !panics.is_empty() => format!("lost {n} {file}: a panic within: {}", panics.join("; ")),
            Ok(Ok(found)) if kind.sealed && !same && found != sound => {
                format!("lost {n} {file}: damage was read as data")
            }
            Ok(Ok(_)) if refused => format!("lost {n} {file}: taken"),
            Ok(Ok(_)) => format!("took {n}"),
            Ok(Err(e)) if !kinds::is_refusal(kind, &e) => {
                format!("lost {n} {file}: exit {}: {}", e.kind().exit_code(), one_line(&e))
            }
            Ok(Err(e)) if e.place().is_none() => {
                format!("lost {n} {file}: an error without a place: {}", one_line(&e))
            }
            Ok(Err(_)) => format!("refused {n}"),
        });
    }
    say(format!("peak {most}"));
    say("end".into());
}

/// The `n`-th damage of a plan.
fn damage(kind: &Kind, plan: Plan, n: usize, files: &[Vec<u8>], lens: Option<&[usize]>) -> hostile::Case {
    let case = |file, bytes| hostile::Case { file, damage: Damage::Bytes(bytes), ..hostile::Case::default() };
    let Some(lens) = lens else {
        let file = n % files.len();
        return case(file, mutate::mutant(&files[file], n as u32, mutate::seed(kind)));
    };
    let (mut file, mut at) = (0, n);
    while at >= lens[file] {
        at -= lens[file];
        file += 1;
    }
    let mut mutant = files[file].clone();
    match plan {
        Plan::Cuts => mutant.truncate(mutate::cuts(&files[file])[at]),
        _ => mutant[at] ^= 1 << (n % 8),
    }
    case(file, mutant)
}

fn one_line(e: &Error) -> String {
    format!("{} {}", e.code(), e.to_string().replace('\n', " "))
}
