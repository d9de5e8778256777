#!/usr/bin/env python3
"""Times `cellrefine bench step` beside the same encoder in PyTorch, in turn, in one sitting.

    python scripts/beside_torch.py --out docs/results/cpu-DATE.json --h5ad pbmc8k.h5ad

Writes every run as JSON and prints the table of docs/results.md: medians over rounds, their ratio, and the smallest and largest ratio
of a round (ours and torch's runs of one round follow one another). Needs torch; sizes are those of the preset gf-v1-10m.

The peer: embeddings (gene, position, type), post-LN layers over `scaled_dot_product_attention`, one product for Q, K and V, ReLU,
AdamW with fused=True; dropout 0; training back-propagates a fixed random projection of the output, as `bench step` does.
"""
import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

VOCAB, WIDTH, LAYERS, HEADS, FFN = 25426, 256, 6, 4, 512
# (mode, activation type, tokens a cell, is it a slow row?)
ROWS = [("fwd", "f32", 512, False), ("train", "f32", 512, False), ("fwd", "bf16", 512, False),
        ("fwd", "f32", 2048, True), ("train", "f32", 2048, True)]


def torch_step(mode, dtype, seq, batch, threads, seconds):
    """One JSON object: milliseconds of a step of the peer; run in a process of its own."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    torch.manual_seed(0)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.up, self.down = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-12), nn.LayerNorm(WIDTH, eps=1e-12)

        def forward(self, x):
            q, k, v = self.qkv(x).view(batch, seq, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
            x = self.norm1(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, seq, WIDTH)))
            return self.norm2(x + self.down(F.relu(self.up(x))))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.gene, self.position, self.kind = nn.Embedding(VOCAB, WIDTH), nn.Embedding(seq, WIDTH), nn.Embedding(1, WIDTH)
            self.norm = nn.LayerNorm(WIDTH, eps=1e-12)
            self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

        def forward(self, gene, position):
            x = self.norm(self.gene(gene) + self.position(position) + self.kind.weight[0])
            for layer in self.layers:
                x = layer(x)
            return x

    act = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    encoder = Encoder().to(act)
    gene = torch.randint(0, VOCAB, (batch, seq))
    position = torch.arange(seq).expand(batch, seq)
    if mode == "fwd":
        def step():
            with torch.inference_mode():
                encoder(gene, position)
    else:
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-4, fused=True)
        projection = torch.randn(batch, seq, WIDTH, dtype=act)

        def step():
            optimizer.zero_grad(set_to_none=True)
            (encoder(gene, position) * projection).sum().backward()
            optimizer.step()

    step(), step()
    times, begin = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    return {"engine": f"torch {torch.__version__}", "mode": mode, "dtype": dtype, "seq": seq, "batch": batch, "threads": threads,
            "ms_median": round(statistics.median(times), 2), "ms_min": round(min(times), 2), "ms_max": round(max(times), 2), "runs": len(times)}


def run(command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def cpu_name():
    for line in open("/proc/cpuinfo") if os.path.exists("/proc/cpuinfo") else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--binary", default="target/release/cellrefine")
    p.add_argument("--out", help="every run, as JSON")
    p.add_argument("--h5ad", help="a file to pack, three times")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--seconds", type=float, default=4.0, help="of samples, each run")
    p.add_argument("--rounds", type=int, default=9, help="at 512 tokens; a third of it at 2,048")
    p.add_argument("--worker", nargs=3, metavar=("MODE", "DTYPE", "SEQ"), help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.worker:
        mode, dtype, seq = a.worker
        print(json.dumps(torch_step(mode, dtype, int(seq), a.batch, a.threads, a.seconds)))
        return

    sizes = ["--batch", a.batch, "--threads", a.threads, "--seconds", a.seconds]
    record = {"date": str(datetime.date.today()), "processor": cpu_name(), "threads": a.threads, "rounds": [], "loader": [], "pack": []}
    for round_ in range(a.rounds):
        for mode, dtype, seq, slow in ROWS:
            if slow and round_ % 3:
                continue
            ours = run([a.binary, "bench", "step", "--preset", "gf-v1-10m", "--seq", seq, "--mode", mode, "--dtype", dtype, "--json", "--quiet", *sizes])
            torch = run([sys.executable, __file__, "--worker", mode, dtype, seq, *sizes])
            record["rounds"].append({"ours": ours, "torch": torch})
            print(f"round {round_ + 1}: {mode} {dtype} {seq}: {ours['ms_median']:.0f} ms, torch {torch['ms_median']:.0f} ms", file=sys.stderr)
    for _ in range(3):
        record["loader"].append(run([a.binary, "bench", "loader", "--json", "--quiet"]))
        if a.h5ad:
            with tempfile.TemporaryDirectory() as folder:
                run([a.binary, "vocab", "build", a.h5ad, "--out", f"{folder}/v.tsv", "--json", "--quiet"])
                start = time.perf_counter()
                command = [a.binary, "pack", a.h5ad, "--vocab", f"{folder}/v.tsv", "--out", f"{folder}/c.cells", "--json", "--quiet"]
                child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
                _, status, usage = os.wait4(child.pid, 0)
                if status:
                    sys.exit(f"{' '.join(command)} failed")
                record["pack"].append({"seconds": round(time.perf_counter() - start, 3), "peak_memory_mb": round(usage.ru_maxrss / 1024, 1)})

    print("| | ours, ms | torch, ms | torch ÷ ours | of single rounds | rounds | share of peak |\n|---|---|---|---|---|---|---|")
    for mode, dtype, seq, _ in ROWS:
        pairs = [(r["ours"], r["torch"]) for r in record["rounds"] if (r["ours"]["mode"], r["ours"]["dtype"], r["ours"]["seq"]) == (mode, dtype, seq)]
        ours, torch = (statistics.median(p[i]["ms_median"] for p in pairs) for i in (0, 1))
        single = [t["ms_median"] / o["ms_median"] for o, t in pairs]
        peak = statistics.median(o["fraction_of_peak"] for o, _ in pairs)
        print(f"| {mode}, {dtype}, {a.batch} × {seq} | {ours:,.0f} | {torch:,.0f} | **{torch / ours:.2f}×** | {min(single):.2f}–{max(single):.2f} "
              f"| {len(pairs)} | {peak:.0%} |")
    rate = sorted(x["cells_per_s"] / 1e6 for x in record["loader"])
    print(f"\nloader: {rate[len(rate) // 2]:.2f} M cells/s ({', '.join(f'{x:.2f}' for x in rate)})")
    if record["pack"]:
        print(f"pack: {statistics.median(x['seconds'] for x in record['pack']):.2f} s, {max(x['peak_memory_mb'] for x in record['pack']):.0f} MB")
    if a.out:
        with open(a.out, "w") as file:
            json.dump(record, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
