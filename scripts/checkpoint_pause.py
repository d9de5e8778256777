#!/usr/bin/env python3
"""How long a checkpoint holds a training step up: from the trace of a run that makes one every few steps.

    scripts/checkpoint_pause.py target/release/cellrefine [--preset gf-v1-10m] [--steps 24]

Prints the median time of a step without its checkpoint, the median of what the checkpoint adds to it, what of that is the
wait for an earlier one, and the share per step at one checkpoint in 200 steps.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile

HERE = pathlib.Path(__file__).resolve().parent.parent
EVERY = 4


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("program")
    args.add_argument("--preset", default="gf-v1-10m")
    args.add_argument("--steps", type=int, default=24)
    args = args.parse_args()
    program = str(pathlib.Path(args.program).resolve())
    with tempfile.TemporaryDirectory() as folder:
        run = lambda *words: subprocess.run([program, *map(str, words)], check=True, cwd=folder, stdout=subprocess.DEVNULL)
        cells = HERE / "data/pbmc700/pbmc700.h5ad"
        run("vocab", "build", cells, "--out", "v.tsv")
        run("pack", cells, "--vocab", "v.tsv", "--out", "x.cells")
        run("pretrain", "--corpus", "x.cells", "--out", "run", "--preset", args.preset, "--trace", "t.json",
            "--set", f"train.steps={args.steps}", "--set", f"train.checkpoint_every={EVERY}", "--set", "batch.cells=32")
        events = json.load(open(f"{folder}/t.json"))["traceEvents"]
        size = sum(f.stat().st_size for f in pathlib.Path(f"{folder}/run/checkpoints/step-{EVERY * (args.steps // EVERY)}").iterdir())
    of = lambda name: sorted((e["ts"], e["ts"] + e["dur"], e["tid"]) for e in events if e["name"] == name)
    steps, pauses, writes = of("step"), of("checkpoint"), of("checkpoint write")
    inside = lambda step: [p for p in pauses if p[2] == step[2] and step[0] <= p[0] and p[1] <= step[1]]
    # Ranges within ranges count once; the first step warms up, the last waits for its checkpoint on purpose.
    outer = lambda ranges: [r for r in ranges if not any(o is not r and o[0] <= r[0] and r[1] <= o[1] for o in ranges)]
    held = [(step, sum(p[1] - p[0] for p in outer(inside(step)))) for step in steps[1:-1]]
    plain = statistics.median((s[1] - s[0] - held_up) / 1e3 for s, held_up in held)
    pause = statistics.median(h / 1e3 for _, h in held if h > 0)
    print(f"checkpoint: {size / 1e6:.1f} MB, written behind the steps in {statistics.median(w[1] - w[0] for w in writes) / 1e3:.0f} ms")
    print(f"step: {plain:.1f} ms; a checkpoint adds {pause:.1f} ms, {100 * pause / plain:.1f} % of that step")
    print(f"one in 200 steps: {100 * pause / plain / 200:.3f} % of a step")


if __name__ == "__main__":
    main()
