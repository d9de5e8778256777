#!/usr/bin/env python3
"""The GPU's part of docs/results.md, from the newest file of docs/results/: goals, what was measured, and the kernels.

    python3 scripts/gpu_check/table.py [docs/results | gpu-….json]      prints Markdown
    python3 scripts/gpu_check/table.py --write docs/results.md          puts it between the two marks of that file
    python3 scripts/gpu_check/table.py --check docs/results.md          fails where the file says something else

Without such a file every row says "not yet measured on a GPU".
"""
import glob
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import schema  # noqa: E402

BEGIN, END = "<!-- gpu-check: begin -->", "<!-- gpu-check: end -->"
NOT_YET = "not yet measured on a GPU"
# (what, ratio's name, goal, stretch): the ratio has to reach the goal at its worst shape.
GOALS = [
    ("attention forward against SDPA's default", "attention_forward/sdpa_default", 1.5, None),
    ("attention forward against cuDNN", "attention_forward/cudnn", 1.15, None),
    ("attention backward, deterministic, against SDPA's default", "attention_backward/sdpa_default", 1.7, None),
    ("attention backward, deterministic, against cuDNN", "attention_backward/cudnn", 1.1, None),
    ("real lengths against SDPA padded to the context, forward and backward", "padded_sdpa", 4.0, 6.0),
    ("`marker-sparse` against FlexAttention with the same mask", "marker_sparse/flex", 1.5, 2.0),
    ("prototype loss, forward and backward, against torch.compile", "prototype_loss/compile", 2.0, 3.0),
    ("prototype loss, 256 × 100, against eager", "prototype_loss/eager", 4.0, None),
    ("whole refine run against a Hugging Face Geneformer loop, cells/s", "refine/hf_geneformer", 3.0, 6.0),
]
# (preset, goal, stretch): share of the measured matmul rate.
STEPS = [("gf-v1-10m", 0.40, 0.50), ("gf-v2-104m", 0.50, 0.60), ("gf-v2-316m", 0.55, 0.65)]
# Kernels that only move memory: share of the measured copy bandwidth.
MOVERS = ("layernorm", "embed", "pool", "adamw")



def rate(name, shape, field="tflop_per_s"):
    """A number of the V2 row of `name` whose shape holds `shape`."""
    def of(report):
        rows = [k for k in report["kernels"] if k["name"] == name and shape in k["shape"] and k.get("preset") == "gf-v2-104m"]
        return rows[0][field] if rows else None

    return of


def tax(report):
    """How much slower a FLOP is on real lengths than on cells of 2,048 tokens, whose Σ len² ÷ Σ len is nearest, in percent."""
    real, equal = (rate("gene_attention_forward", shape)(report) for shape in (" up to ", " of 2048, dense"))
    return None if not real or not equal else 100 * (1 - real / equal)


def small_loss(report):
    """Both passes at 256 × 100 from a graph, microseconds."""
    passes = [rate(f"prototype_loss_{d}", "256x100x256", "graph_ms")(report) for d in ("forward", "backward")]
    return None if None in passes else 1e3 * sum(passes)


# (what, of the report, goal, stretch, is more better?, unit)
ABSOLUTES = [
    ("attention forward, cells of 2,048, 12 × 64", rate("gene_attention_forward", " of 2048, dense"), 460, 550, True, "TFLOP/s"),
    ("attention backward, cells of 2,048, 12 × 64", rate("gene_attention_backward", " of 2048, dense"), 430, 510, True, "TFLOP/s"),
    ("variable-length tax, forward", tax, 3, 1, False, "%"),
    ("prototype loss, 256 × 100, both passes in a graph", small_loss, 10, 6, False, "µs"),
]


def times(value):
    return f"{value:g}×"


def markdown(report):
    """The tables; `report` is None where there is none."""
    lines = []
    if report is None:
        lines.append(f"No GPU has run this yet: each row says \"{NOT_YET}\". `scripts/gpu-check.sh` makes the file that fills them.")
    else:
        lines.append(f"{report['device']}, driver {report['driver']}, commit {report['commit']}, {report['date']}.")
    lines += ["", "| ratio, one run on one GPU | goal | stretch | measured | shapes |", "|---|---|---|---|---|"]
    rows = report["ratios"] if report else []
    for what, name, goal, stretch in GOALS:
        mine = [r for r in rows if r["name"] == name]
        measured = [r for r in mine if r["ratio"] is not None]
        if measured:
            low, high = min(r["ratio"] for r in measured), max(r["ratio"] for r in measured)
            said = f"**{low:.2f}×**" + (f" to {high:.2f}×" if len(measured) > 1 else "") + ("" if low >= goal else ", missed")
            shapes = "; ".join(f"{r['shape']} {r['ratio']:.2f}×" for r in measured)
        else:
            said, shapes = NOT_YET, "; ".join(dict.fromkeys(r["skipped"] for r in mine if r.get("skipped"))) if report else ""
        lines.append(f"| {what} | ≥ {times(goal)} | {times(stretch) if stretch else '–'} | {said} | {shapes or '–'} |")
    lines += ["", "| number | goal | stretch | measured |", "|---|---|---|---|"]
    for what, of, goal, stretch, more, unit in ABSOLUTES:
        value, sign = of(report) if report else None, "≥" if more else "≤"
        met = value is not None and (value >= goal if more else value <= goal)
        said = NOT_YET if value is None else f"**{value:.3g} {unit}**" + ("" if met else ", missed")
        lines.append(f"| {what} | {sign} {goal} {unit} | {stretch} | {said} |")
    lines += ["", "| training step, bf16, share of the measured matmul rate | goal | stretch | measured | ms |", "|---|---|---|---|---|"]
    steps = {s.get("preset"): s for s in (report or {}).get("steps", []) if s.get("mode") == "train"}
    for preset, goal, stretch in STEPS:
        step = steps.get(preset, {})
        share, ms = step.get("fraction_of_peak"), step.get("ms_median")
        said = NOT_YET if share is None else f"**{100 * share:.1f} %**" + ("" if share >= goal else ", missed")
        lines.append(f"| `{preset}` | ≥ {100 * goal:.0f} % | {100 * stretch:.0f} % | {said} | {'–' if ms is None else f'{ms:g}'} |")
    lines += ["", "| kernel that moves memory, share of copy bandwidth | goal | measured |", "|---|---|---|"]
    for mover in MOVERS:
        of = [k["fraction_of_peak"] for k in (report or {}).get("kernels", []) if k["name"].startswith(mover) and k["fraction_of_peak"] is not None]
        said = NOT_YET if not of else f"{100 * min(of):.0f} to {100 * max(of):.0f} %" + ("" if min(of) >= 0.85 else ", missed")
        lines.append(f"| {mover} | ≥ 85 % | {said} |")
    if report:
        lines += ["", "| check | | |", "|---|---|---|"]
        lines += [f"| {c['name']} | {'passed' if c['ok'] else 'not run' if c['ok'] is None else '**failed**'} | {c['detail']} |" for c in report["checks"]]
        timed = [k for k in report["kernels"] if k["ms_median"] is not None]
        if timed:
            lines += ["", "| kernel | shape | ms | TFLOP/s | GB/s | of the floor |", "|---|---|---|---|---|---|"]
            for k in timed:
                number = lambda field: "–" if k[field] is None else f"{k[field]:g}"
                share = "–" if k["fraction_of_peak"] is None else f"{100 * k['fraction_of_peak']:.0f} %"
                lines.append(f"| {k['name']} | {k['shape']} | {number('ms_median')} | {number('tflop_per_s')} | {number('gb_per_s')} | {share} |")
    return "\n".join(lines) + "\n"


def newest(place):
    """The report of a file, or the newest of a folder; None where there is none."""
    if os.path.isfile(place):
        return schema.read(place)
    # The day is in the name; a dry run is no measurement.
    reports = [schema.read(f) for f in sorted(glob.glob(os.path.join(place, "gpu-2*.json")))]
    reports = [r for r in reports if not r.get("dry_run")]
    return reports[-1] if reports else None


def between_marks(text, table):
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:begin]}\n{table}{text[end:]}"


def main(arguments):
    results = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "docs", "results")
    if arguments and arguments[0] in ("--write", "--check"):
        path = arguments[1]
        with open(path, encoding="utf-8") as file:
            text = file.read()
        wanted = between_marks(text, markdown(newest(arguments[2] if len(arguments) > 2 else results)))
        if arguments[0] == "--check":
            if text != wanted:
                sys.exit(f"{path} does not say what docs/results/ holds: python3 scripts/gpu_check/table.py --write {path}")
        else:
            with open(path, "w", encoding="utf-8") as file:
                file.write(wanted)
        return
    sys.stdout.write(markdown(newest(arguments[0] if arguments else results)))


if __name__ == "__main__":
    main(sys.argv[1:])
