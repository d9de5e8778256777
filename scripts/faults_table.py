#!/usr/bin/env python3
"""Turns the record that the tests of faults leave (FAULTS_REPORT) into the table of docs/reliability.md.

The promises stand here, in the order of the faults; a fault without a line of the record is an error, so no row can be there untried.
"""
import argparse
import datetime
import json
import os
import re
import sys

FAULTS = {
    "F1": ("killed while training or writing a checkpoint", "a checkpoint that verifies remains; continued, the run ends with the same bits"),
    "F2": ("killed while packing", "nothing under the final name; packed again, the corpus is the same to the byte"),
    "F3": ("SIGTERM, SIGINT, SIGUSR1, to one rank of several too", "all ranks checkpoint after the same step, exit 5, with the command that resumes; a second signal ends at once"),
    "F4": ("a rank dies or hangs", "the others end within the time-out, exit 4, naming rank, step and operation"),
    "F5": ("disk full, short writes", "old checkpoints stay; what was begun is gone; exit 4 with path and reason; a log alone costs no run"),
    "F6": ("EIO from any write, sync, rename, removal", "as F5; never success for what is not on the disk"),
    "F7": ("a corpus cut short", "refused when opened, exit 3; no SIGBUS"),
    "F8": ("a bit of a corpus flipped", "header and index: when opened; payload: when first read, or by `inspect --verify`"),
    "F9": ("a file shrunk while it is mapped", "exit 3 with its path"),
    "F10": ("a checkpoint or model damaged", "refused, never silently; `--resume=auto` takes the one before and says so"),
    "F11": ("resumed with other inputs, settings, number of ranks", "refused with both digests unless allowed by name"),
    "F12": ("NaN or infinity in a gradient", "the step is left out on all ranks, nothing moves; after `train.max_bad_steps` in a row exit 6 with cell ids"),
    "F13": ("a spike of the gradient norm or the loss", "warned, skipped or stopped as `train.spike_policy` says, the same after a resume"),
    "F14": ("out of memory", "no part of a step; exit 4 with the bytes and the setting that lowers them"),
    "F15": ("no driver, an old one, another GPU", "exit 4 with what was found and needed; never a panic"),
    "F16": ("two writers", "the second is refused at once, exit 4, with process, host and time; `--force-unlock` for a dead host's"),
    "F17": ("malformed .h5ad, 10x and MTX files", "exit 3 or the right cells; no panic, crash, hang; memory bounded"),
    "F18": ("malformed marker sets, vocabularies, tables, settings", "exit 3 with the line; no panic, crash, hang; memory bounded"),
    "F19": ("malformed safetensors and model folders", "refused before memory is taken"),
    "F20": ("malformed `.dataset` folders and Arrow files", "refused; never reads outside the folder"),
    "F21": ("paths and links that lead out", "refused, exit 3"),
    "F22": ("closed pipes, odd locales, clocks; nothing, one cell, one gene, one class", "works, or a clear error"),
    "F23": ("races and stray memory in kernels", "none"),
    "F24": ("repeats, other threads, chunks, company", "the same bits"),
    "F25": ("power lost", "as F1 and F2, whatever part of the unsynced is lost"),
}
# What no record can come from here.
APART = {"F23": "ASan and UBSan over the emulator, every kernel: `.ci/run`; compute-sanitizer: `scripts/gpu-check.sh`, not yet run on a GPU"}
BEGIN, END = "<!-- table: scripts/faults.sh -->", "<!-- end of table -->"


def rows(path):
    tried = {}
    for number, line in enumerate(open(path), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as e:
            sys.exit(f"{path}:{number}: {e}")
        tried.setdefault(entry["fault"], []).append(entry)
    unknown = set(tried) - set(FAULTS)
    missing = set(FAULTS) - set(tried) - set(APART)
    if unknown or missing:
        sys.exit(f"faults without a promise: {sorted(unknown)}; faults that nothing was tried of: {sorted(missing)}")
    for fault, (what, promise) in FAULTS.items():
        entries = sorted(tried.get(fault, []), key=lambda e: -e["cases"])
        by_what = {}
        for entry in entries:
            by_what[entry["what"]] = by_what.get(entry["what"], 0) + entry["cases"]
        said = [f"{text} ({cases:,})" for text, cases in by_what.items()]
        if len(said) > 6:
            said = said[:5] + [f"and {len(said) - 5} more kinds"]
        if fault in APART:
            said.append(APART[fault])
        cases, lost = (sum(e[k] for e in entries) for k in ("cases", "lost"))
        yield fault, what, promise, "; ".join(said).replace("|", "\\|"), cases, lost, bool(entries)


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("record")
    args.add_argument("--seconds", type=int, required=True)
    args.add_argument("--commit", required=True)
    args.add_argument("--write", required=True)
    args = args.parse_args()
    lines = ["| fault | what happens | promise | tried (cases) | cases | lost |", "|---|---|---|---|---|---|"]
    total = broken = 0
    for fault, what, promise, said, cases, lost, here in rows(args.record):
        total, broken = total + cases, broken + lost
        count = (f"{cases:,}", f"{lost:,}") if here else ("apart", "")
        lines.append(f"| {fault} | {what} | {promise} | {said} | {count[0]} | {count[1]} |")
    today = datetime.date.today().isoformat()
    head = f"{today}, commit {args.commit}, {os.cpu_count()} cores, {args.seconds // 60} min {args.seconds % 60} s: {total:,} cases, {broken:,} lost."
    text = open(args.write).read()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{args.write}: no place for the table between {BEGIN!r} and {END!r}")
    table = "\n".join([BEGIN, head, "", *lines, END])
    text = re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: table, text, flags=re.S)
    with open(args.write + ".tmp", "w") as out:
        out.write(text)
    os.replace(args.write + ".tmp", args.write)
    print(head)


if __name__ == "__main__":
    main()
