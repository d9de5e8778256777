#!/usr/bin/env python3
"""Two ranks of one run against two runs that know nothing of one another: what summing gradients costs.

    scripts/weak_scaling.py target/release/cellrefine [--mpi] [--preset gf-v1-10m] [--cells 16] [--steps 20] [--rounds 3]

Every rank and every lone run has one thread and --cells cells a step; the two ways take turns, and the medians are compared.
With --mpi the ranks are started by mpirun and speak over MPI (a build with `--features mpi`); without it, over sockets.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import tempfile

HERE = pathlib.Path(__file__).resolve().parent.parent
RANKS = 2


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("program")
    args.add_argument("--mpi", action="store_true")
    args.add_argument("--preset", default="gf-v1-10m")
    args.add_argument("--cells", type=int, default=16)
    args.add_argument("--steps", type=int, default=20)
    args.add_argument("--rounds", type=int, default=3)
    args = args.parse_args()
    program = str(pathlib.Path(args.program).resolve())
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory() as folder:
        start = lambda *words: subprocess.Popen([*map(str, words)], cwd=folder, env=os.environ | root, text=True,
                                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        cells = HERE / "data/pbmc700/pbmc700.h5ad"
        for words in (["vocab", "build", cells, "--out", "v.tsv"], ["pack", cells, "--vocab", "v.tsv", "--out", "x.cells"]):
            start(program, *words).communicate()
        number = iter(range(1000))
        train = lambda batch: ["pretrain", "--corpus", "x.cells", "--preset", args.preset, "--threads", 1, "--json", "--out",
                               f"run{next(number)}", "--set", f"train.steps={args.steps}", "--set", f"batch.cells={batch}"]

        def speed(processes):
            total = 0
            for process in processes:
                out, _ = process.communicate()
                if process.returncode:
                    raise SystemExit(f"{' '.join(process.args)} ended with {process.returncode}: {out}")
                total += json.loads(out)["cells_per_s"]
            return total

        launcher = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", RANKS, program] if args.mpi else [program, "launch", "-n", RANKS]
        alone, together = [], []
        for _ in range(args.rounds):
            alone.append(speed([start(program, *train(args.cells)) for _ in range(RANKS)]))
            more = ["--collective", "mpi"] if args.mpi else []
            together.append(speed([start(*launcher, *train(args.cells * RANKS), *more)]))
    a, t = statistics.median(alone), statistics.median(together)
    print(f"{RANKS} lone runs: {a:.2f} cells/s together ({', '.join(f'{x:.2f}' for x in alone)})")
    print(f"{RANKS} ranks over {'MPI' if args.mpi else 'sockets'}: {t:.2f} cells/s ({', '.join(f'{x:.2f}' for x in together)})")
    print(f"ratio of the medians: {t / a:.3f}")


if __name__ == "__main__":
    main()
