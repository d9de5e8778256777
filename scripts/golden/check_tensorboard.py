#!/usr/bin/env python3
"""TensorBoard's own reader and writer against ours.

    scripts/golden/check_tensorboard.py --make tests/golden/tensorboard.bin tests/golden/tensorboard.json
    scripts/golden/check_tensorboard.py --read RUN

--make writes the records of tests/tensorboard.rs by TensorBoard's protocol buffers and record writer (needs tensorboard, 2.21.0 made
the committed files), and what its event reader makes of them. --read opens the event files of a run folder by TensorBoard's event
multiplexer and compares every scalar with metrics.jsonl.
"""
import argparse
import glob
import io
import json
import os
import sys
import tempfile

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter

# (step, wall time, [(tag, value)]): negative, large, tiny and non-finite numbers, a step beyond 32 bits, a tag beyond ASCII.
STEPS = [
    (301, 1795360779.25, [("loss", 0.25), ("learning_rate", 1e-3)]),
    (302, 1795360780.5, [("loss", -3.5e8), ("grad_norm", 1e-30), ("β", 0.1)]),
    (5_000_000_000, 1795360781.0, [("loss", float("inf"))]),
]
START = 1795360778.0


def make(binary, expected):
    out = io.BytesIO()
    writer = RecordWriter(out)

    def write(event):
        writer.write(event.SerializeToString(deterministic=True))

    write(Event(wall_time=START, file_version="brain.Event:2"))
    write(Event(wall_time=START, step=300, session_log=SessionLog(status=SessionLog.START)))
    for step, wall_time, scalars in STEPS:
        event = Event(wall_time=wall_time, step=step)
        for tag, value in scalars:
            event.summary.value.add(tag=tag, simple_value=value)
        write(event)
    with open(binary, "wb") as file:
        file.write(out.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "events.out.tfevents.1.x.1.300"), "wb") as file:
            file.write(out.getvalue())
        read = scalars_of(folder)
    with open(expected, "w") as file:
        json.dump(read, file, indent=1, sort_keys=True)
        file.write("\n")


def scalars_of(folder):
    events = EventAccumulator(folder, size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [[e.step, e.wall_time, e.value if e.value == e.value and abs(e.value) != float("inf") else str(e.value)]
                  for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read(run):
    assert glob.glob(os.path.join(run, "events.out.tfevents.*")), "no event file"
    ours = [json.loads(line) for line in open(os.path.join(run, "metrics.jsonl"))]
    theirs, compared = scalars_of(run), 0
    for tag, points in theirs.items():
        lines = {line["step"]: line[tag] for line in ours if line.get(tag) is not None}
        assert {p[0] for p in points} >= set(lines), f"{tag}: steps differ"
        for step, _, value in points:
            if step in lines:
                wanted = lines[step]
                assert abs(value - wanted) <= 1e-6 * abs(wanted) + 1e-38, f"{tag} at step {step}: {value} and {wanted}"
                compared += 1
    assert "loss" in theirs and compared > 0
    print(f"{compared} scalars of {len(theirs)} tags agree")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--make", nargs=2, metavar=("BINARY", "JSON"))
    parser.add_argument("--read", metavar="RUN")
    arguments = parser.parse_args()
    if arguments.make:
        make(*arguments.make)
    elif arguments.read:
        read(arguments.read)
    else:
        parser.print_help()
        sys.exit(2)
