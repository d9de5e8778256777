//! A file that shrinks while it is mapped: the kernel answers a read beyond its end with SIGBUS, which would kill the process
//! without a word. This handler says which file it was, says what to do, and leaves with the exit code of bad input.
//!
//! Only faults inside a mapped shard are taken; any other SIGBUS goes to the handler that was there before. The handler runs in
//! signal context, so it reads a fixed table of atomics and calls `write` and `_exit`, nothing else.

use crate::error::Code;
use std::path::Path;
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering::*};

/// One mapped file. `text` is a leaked, complete message, so that the handler only has to write it.
struct Entry {
    start: AtomicUsize,
    end: AtomicUsize,
    text: AtomicPtr<String>,
}

/// More open shards than this are unguarded (they would still be checked on first touch).
const ENTRIES: usize = 4096;
static TABLE: [Entry; ENTRIES] = [const {
    Entry { start: AtomicUsize::new(0), end: AtomicUsize::new(0), text: AtomicPtr::new(std::ptr::null_mut()) }
}; ENTRIES];
static INSTALL: Once = Once::new();
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(std::ptr::null_mut());

/// Watches `len` bytes mapped at `start` from `path`.
pub(super) fn guard(start: usize, len: usize, path: &Path) {
    INSTALL.call_once(install);
    for entry in &TABLE {
        // `end` 1 marks an entry that is being filled.
        if entry.end.compare_exchange(0, 1, AcqRel, Relaxed).is_ok() {
            let text = format!(
                "error[{}]: the file changed while in use\n  where:  {}\n  found:  fewer bytes than when it was opened\n  \
                 try:    pack or copy the corpus again, and leave it alone while cellrefine reads it\n",
                Code::FileChanged,
                path.display()
            );
            // One message per entry and lifetime of the process: reusing the old allocation could pull it from under the handler.
            entry.text.store(Box::into_raw(Box::new(text)), Release);
            entry.start.store(start, Release);
            entry.end.store(start + len, Release);
            return;
        }
    }
}

/// Forgets the map at `start`.
pub(super) fn release(start: usize) {
    for entry in &TABLE {
        if entry.start.load(Acquire) == start && entry.end.load(Acquire) > 1 {
            entry.start.store(0, Release);
            entry.end.store(0, Release);
            return;
        }
    }
}

fn install() {
    // SAFETY: `sigaction` with a zeroed, then filled structure; the previous action is kept for `on_bus` to hand on to, and the
    // handler itself is async-signal-safe as described above.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_bus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        libc::sigemptyset(&mut action.sa_mask);
        let mut previous: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGBUS, &action, &mut previous) == 0 {
            PREVIOUS.store(Box::into_raw(Box::new(previous)), Release);
        }
    }
}

extern "C" fn on_bus(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid `info`; the table holds atomics only, and each message lives for ever.
    unsafe {
        let address = (*info).si_addr() as usize;
        for entry in &TABLE {
            let (start, end) = (entry.start.load(Acquire), entry.end.load(Acquire));
            if start != 0 && (start..end).contains(&address) {
                let text = entry.text.load(Acquire);
                if !text.is_null() {
                    let text: &String = &*text;
                    libc::write(2, text.as_ptr().cast(), text.len());
                }
                libc::_exit(3);
            }
        }
        // Not ours: put the previous action back and return, so that the fault happens again under it.
        let previous = PREVIOUS.load(Acquire);
        if !previous.is_null() {
            libc::sigaction(libc::SIGBUS, previous, std::ptr::null_mut());
        } else {
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
        }
    }
}
