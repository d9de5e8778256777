#!/usr/bin/env python3
"""PyTorch beside `cellrefine` on one GPU, in turn, in one sitting: the rows `ratios` of gpu-….json.

    python3 peers.py --ours bin/cellrefine --out peers.json [--device cuda] [--rounds 3] [--limit 200] [--dry-run]

A round runs ours in a process of its own and then each peer; a ratio is the median over rounds. What is absent (torch, a backend of
it, a GPU) becomes a row that says so: every name of the schema is always there. The file is written again after every family.
"""
import argparse
import json
import os
import platform
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import schema  # noqa: E402
from peer_timing import Clock, Comparison, Ours, reason  # noqa: E402


def versions(torch):
    found = {"python": platform.python_version()}
    if torch is not None:
        found["torch"] = torch.__version__
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    for name in ("transformers", "triton"):
        try:
            found[name] = __import__(name).__version__
        except Exception:
            pass
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ours", required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--device", default="cuda")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--samples", type=int, default=7, help="of a peer in a round")
    p.add_argument("--warm-up", type=float, default=0.3, help="seconds before every timing")
    p.add_argument("--limit", type=float, default=200, help="seconds for all of it")
    p.add_argument("--dry-run", action="store_true", help="tiny shapes, nothing timed, PyTorch on the CPU where it is there")
    a = p.parse_args()
    if a.dry_run:
        a.rounds = 1
    begin = time.monotonic()
    done = {}

    def write():
        missing = [Comparison(name, "–").skip(why.get(name.split("/")[0], "not reached")).row() for name in schema.RATIOS if name not in done]
        ratios = [row for rows in done.values() for row in rows] + missing
        with open(a.out + ".part", "w", encoding="utf-8") as file:
            json.dump({"versions": found, "seconds": round(time.monotonic() - begin, 1), "ratios": ratios}, file, indent=1)
        os.replace(a.out + ".part", a.out)

    def emit(comparison):
        row = comparison.row()
        if a.dry_run and row["ratio"] is None and not comparison.skipped:
            row["skipped"] = "a dry run times nothing"
        done.setdefault(comparison.name, []).append(row)

    why, torch, found = {}, None, {}
    try:
        import torch
    except Exception as error:
        why = {name.split("/")[0]: f"no PyTorch ({reason(error)})" for name in schema.RATIOS}
    found = versions(torch)
    write()
    if torch is None:
        return
    if not a.dry_run and not torch.cuda.is_available():
        why = {name.split("/")[0]: "PyTorch sees no GPU" for name in schema.RATIOS}
        write()
        return
    torch.manual_seed(0)
    import peer_attention
    import peer_geneformer
    import peer_loss

    clock = Clock(torch, a.warm_up)
    ours = Ours(a.ours, a.device, a.dry_run, a.warm_up)
    # Each family has its share of the time, and what the ones before left.
    families = [
        (0.55, ("attention_forward", "attention_backward", "padded_sdpa", "marker_sparse"),
         lambda left: peer_attention.run(torch, ours, clock, a.rounds, a.samples, a.dry_run, emit, left)),
        (0.80, ("prototype_loss",), lambda left: peer_loss.run(torch, ours, clock, a.rounds, a.samples, a.dry_run, emit, left)),
        (1.00, ("refine",), lambda left: peer_geneformer.run(torch, ours, clock, a.rounds, a.dry_run, emit, left)),
    ]
    for share, names, run in families:
        print(f"peers: {', '.join(names)}", file=sys.stderr, flush=True)
        try:
            run(lambda share=share: begin + share * a.limit - time.monotonic())
        except Exception as error:  # one family that fails does not stop the next
            why.update({name: reason(error) for name in names})
        write()


if __name__ == "__main__":
    main()
