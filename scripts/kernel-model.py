#!/usr/bin/env python3
"""What the kernels should take on one H200, from counts alone: instructions of the hot loops (SASS), FLOPs, bytes.

    scripts/cuda-toolkit.sh --sass && scripts/kernel-model.py          # prints both tables of docs/performance.md
    scripts/kernel-model.py --write                                    # and puts them there

No number here was measured by this project. A measurement tests it: docs/performance.md says what each model leaves out, and
which way a miss would point.
"""
import collections
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
NVCC = os.environ.get("NVCC", str(ROOT / ".cuda/nvidia/cu13/bin/nvcc"))
CUOBJDUMP = os.environ.get("CUOBJDUMP", str(ROOT / ".sass/nvidia/cu13/bin/cuobjdump"))
PAGE = ROOT / "docs/performance.md"

# One H200 SXM: multiprocessors; clock under load (GHz); what a large bf16 product and a large copy reach, as published and measured
# by others (docs/performance.md, "Ceilings").
SMS, CLOCK, MATMUL, COPY = 132, 1.755, 790e12, 4.3e12
# Per multiprocessor quarter and clock: one instruction; four exponentials, so a warp's takes 8 clocks; 1024 bf16 FLOP.
SPECIAL_CLOCKS = 8
LAUNCH = 3e-6

# kernel: (file, consumers of a block, FLOPs that count for one consumer and turn of the loop, what a turn is)
PAIRS = 64 * 128
LOOPS = {
    "gene_attention_forward_sm90": ("gene_attention_sm90", 3, 4 * 64 * PAIRS, "64 queries × 128 keys"),
    "gene_attention_forward_dropout_sm90": ("gene_attention_sm90", 2, 4 * 64 * PAIRS, "64 queries × 128 keys"),
    "gene_attention_forward_sparse_sm90": ("gene_attention_sm90", 2, 4 * 64 * PAIRS, "64 queries × 128 keys"),
    "gene_attention_backward_sm90": ("gene_attention_backward_sm90", 2, 10 * 64 * PAIRS, "64 keys × 128 queries"),
    "gene_attention_backward_dropout_sm90": ("gene_attention_backward_sm90", 2, 10 * 64 * PAIRS, "64 keys × 128 queries"),
    "gene_attention_backward_sparse_sm90": ("gene_attention_backward_sm90", 2, 10 * 64 * PAIRS, "64 keys × 128 queries"),
}


def instructions(stem, folder):
    """{kernel: [(address, text)]} of one file."""
    cubin = f"{folder}/{stem}.cubin"
    command = [NVCC, "-O3", "-std=c++17", "-cubin", "-DACT_BF16", "-I", str(ROOT / "kernels"), "-gencode",
               "arch=compute_90a,code=sm_90a", str(ROOT / f"kernels/{stem}.cu"), "-o", cubin]
    subprocess.run(command, check=True)
    environment = dict(os.environ, PATH=f"{pathlib.Path(CUOBJDUMP).parent}:{os.environ['PATH']}")
    sass = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True, env=environment).stdout
    found = {}
    for part in sass.split("Function : ")[1:]:
        lines = (re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", line) for line in part.splitlines())
        found[part.split()[0]] = [(int(m[1], 16), m[2]) for m in lines if m]
    return found


def opcode(text):
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def branch(address, text):
    target = re.search(r"\bBRA\S*\s+(?:\S+,\s*)?0x([0-9a-f]+)", text)
    return int(target[1], 16) if target and "BRA" in opcode(text) else None


def hot_loop(code, draws, sparse):
    """The smallest loop with half of the products or more, less what a branch skips in the common case: the mask of a cell's last
    tile (the marker-sparse kernels mask most tiles, and keep it), and in the marker-sparse kernels the draws of dropout."""
    loops, products = [], sum("HGMMA" in t for _, t in code)
    for address, text in code:
        target = branch(address, text)
        if target is not None and target < address:
            body = [(a, t) for a, t in code if target <= a <= address]
            if 2 * sum("HGMMA" in t for _, t in body) >= products > 0:
                loops.append(body)
    if not loops:
        return None
    body = min(loops, key=len)
    skipped = set()
    for address, text in body:
        target = branch(address, text)
        if target is None or target <= address or target > body[-1][0]:
            continue
        region = [(a, t) for a, t in body if address < a < target]
        kinds = [opcode(t).split(".")[0] for _, t in region]
        mask, philox = kinds.count("FSEL") >= 32, any("IMAD.HI" in opcode(t) or "IMAD.WIDE" in opcode(t) for _, t in region)
        if "HGMMA" not in kinds and "MUFU" not in kinds and (
                mask and not philox and not sparse or philox and not draws and len(region) > 100):
            skipped |= {a for a, _ in region}
    return [t for a, t in body if a not in skipped]


def counted(body):
    kinds = collections.Counter(opcode(t).split(".")[0] for t in body)
    shapes = [int(n) for t in body for n in re.findall(r"HGMMA\.64x(\d+)x16", t)]
    return {"tensor": sum(n // 2 for n in shapes), "special": SPECIAL_CLOCKS * kinds["MUFU"], "issue": len(body),
            "products": len(shapes), "MUFU": kinds["MUFU"]}


def loops():
    rows = ["| kernel | a turn of a consumer | tensor | special | issue | limit, TFLOP/s | no overlap, TFLOP/s | predicted | measured |",
            "|---|---|--:|--:|--:|--:|--:|--:|---|"]
    with tempfile.TemporaryDirectory() as folder:
        code = {stem: instructions(stem, folder) for stem in sorted({l[0] for l in LOOPS.values()})}
    for name, (stem, consumers, flop, turn) in LOOPS.items():
        if (body := hot_loop(code[stem][name], "dropout" in name, "sparse" in name)) is None:
            sys.exit(f"{name}: no loop with wgmma products")
        c = counted(body)
        most = max(c["tensor"], c["special"], c["issue"])
        none = c["tensor"] + max(c["special"], c["issue"])

        def rate(clocks):
            return SMS * flop / clocks * CLOCK * 1e9 / 1e12

        limit, serial = rate(most), rate(none)
        low, high = 0.9 * min(serial, MATMUL / 1e12), min(2 / (1 / limit + 1 / serial), MATMUL / 1e12) * MATMUL / 989e12
        low, high = min(low, high), max(low, high)
        rows.append(f"| {name} | {turn} | {c['tensor']} | {c['special']} | {c['issue']} | {limit:.0f} | {serial:.0f} | "
                    f"{low:.0f}–{high:.0f} | not yet measured on a GPU |")
    return rows


# name: layers, D, F, H, V, tokens of a cell
PRESETS = {"gf-v1-10m": (6, 256, 512, 4, 25426, 900), "gf-v2-104m": (12, 768, 3072, 12, 20275, 1442),
           "gf-v2-316m": (18, 1152, 4608, 18, 20275, 1442)}
# Rates that the step's model takes for attention: the lower ends of the table above, forward and backward.
FORWARD, BACKWARD = 420e12, 430e12


def step():
    """A training step (masked genes on 15 % of the tokens, no recomputation): the sum of its kernels, each at its own limit."""
    rows = ["| preset | tokens, cells | products | attention | LayerNorm, embed, masks | head | AdamW | launches | step, ms | "
            "share of 790 TFLOP/s | measured |", "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|"]
    for name, (layers, d, f, h, v, length) in PRESETS.items():
        cells = max(1, 65536 // length)
        n = cells * length
        pairs = cells * length * length
        masked = 0.15 * n

        def product(m, k, o, passes):
            """A linear layer: forward, backward to the input, backward to the weight."""
            bytes_ = 2.0 * (m * k + m * o + k * o)
            return passes * max(2.0 * m * k * o / (0.9 * MATMUL), bytes_ / COPY)

        linear = layers * sum(product(n, k, o, 3) for k, o in [(d, 3 * d), (d, d), (d, f), (f, d)])
        attention = layers * (4.0 * d * pairs / FORWARD + 10.0 * d * pairs / BACKWARD + (8 + 12) * n * d / COPY)
        # Two LayerNorms a layer, 4 arrays forward and 4 backward; bias gradients and ReLU masks 3 arrays of F; embed 6 arrays.
        rest = (layers * (2 * 8 * 2.0 * n * d + 3 * 2.0 * n * f) + 6 * 2.0 * n * d) / COPY
        head = product(masked, d, d, 3) + 4 * 2.0 * masked * d * v / (0.62 * MATMUL)
        parameters = layers * (4 * d * d + 2 * d * f) + v * d
        adamw = 30.0 * parameters / COPY
        launches = (layers * 26 + 30) * 1e-6
        total = linear + attention + rest + head + adamw + launches
        flop = 3 * (2.0 * n * layers * (4 * d * d + 2 * d * f) + 4.0 * d * layers * pairs + 2.0 * masked * (d * d + d * v))
        cell = lambda x: f"{1e3 * x:.2f}"
        rows.append(f"| {name} | {n:,}, {cells} × {length} | {cell(linear)} | {cell(attention)} | {cell(rest)} | {cell(head)} | "
                    f"{cell(adamw)} | {cell(launches)} | {cell(total)} | {100 * flop / total / MATMUL:.0f} % | not yet measured on a GPU |")
    return rows


def main():
    tables = {"loops": loops(), "step": step()}
    for name, rows in tables.items():
        print("\n".join(rows) + "\n")
        if "--write" in sys.argv[1:]:
            text = PAGE.read_text()
            start, end = f"<!-- {name}: scripts/kernel-model.py --write -->", f"<!-- end of {name} -->"
            before, after = text.split(start)[0], text.split(end)[1]
            PAGE.write_text(before + start + "\n" + "\n".join(rows) + "\n" + end + after)


if __name__ == "__main__":
    main()
