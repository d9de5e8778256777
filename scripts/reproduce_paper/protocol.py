"""The evaluation protocol of CellRefine (arXiv 2605.07938), run through the program as a user would: docs/paper.md explains it.

Per data set and seed, on a stratified split of 67 % to train and 33 % to test:

    before   checkpoint ------------> fine-tune            (LangCell's protocol)
    after    checkpoint -> refine --> fine-tune            (the same, from the refined weights)

and, nothing trained on top, what refine does to the frozen embedding: zero-shot recall@k by nearest prototype, kNN and linear probe
on tail classes. With --out-of-domain A:B the checkpoint refined on A labels the cells of B, of which it has seen none.

Every command is appended to OUT/commands.sh, its JSON kept in OUT/json: finished parts are not run again.
"""
import argparse
import csv
import hashlib
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
SPLIT = "train=0.67,test=0.33"
# LangCell's fine-tuning of cell identity: batch 16, 20 epochs, 5e-5 falling linearly after 500 steps, weight decay .001, plain loss.
BATCH, EPOCHS, RATE, WARMUP_STEPS, DECAY = 16, 20, 5e-5, 500, 1e-3
RECALLS = ("1", "3", "5", "10")


def arguments():
    p = argparse.ArgumentParser(prog="reproduce-paper.sh", description="CellRefine's evaluation over your data sets.")
    p.add_argument("data", nargs="+", metavar="[NAME=]DATA.h5ad", help="raw counts; NAME as in the paper prints the published value beside")
    p.add_argument("--checkpoint", required=True, help="Geneformer (Hugging Face folder), LangCell's encoder, or a run of this program")
    p.add_argument("--vocab", help="vocabulary of the checkpoint, from `cellrefine vocab convert` [default: vocab.tsv in the checkpoint]")
    p.add_argument("--label", default="cell_type", help="obs column of cell types [cell_type]")
    p.add_argument("--exclude-label", action="append", default=[], help="label value to leave out, such as Unknown (may be repeated)")
    p.add_argument("--markers", action="append", default=[], metavar="[NAME=]M.gmt",
                   help="marker sets, of one data set or of all [default: derived from the training cells]")
    p.add_argument("--marker-map", action="append", default=[], metavar="[NAME=]MAP.tsv", help="label and set name, where names differ")
    p.add_argument("--out-of-domain", action="append", default=[], metavar="A:B", help="refine on A, label B (may be repeated)")
    p.add_argument("--out", default="paper", help="folder of everything that is written [paper]")
    p.add_argument("--seeds", default="0,1,2", help="seeds of split and training [0,1,2]")
    p.add_argument("--epochs", type=float, default=EPOCHS, help="epochs of fine-tuning [20, as LangCell]")
    p.add_argument("--rate", type=float, default=RATE, help="learning rate of fine-tuning [5e-5, as LangCell]; small encoders want 2e-3")
    p.add_argument("--refine-set", action="append", default=[], metavar="A.B=C", help="a setting of refine (may be repeated)")
    p.add_argument("--set", action="append", default=[], metavar="A.B=C", help="a setting of every stage, such as batch.max_tokens=2048")
    p.add_argument("--device", default="auto")
    return p.parse_args()


def stop(message):
    sys.exit(f"error: {message}")


def named(texts, what):
    """NAME=PATH or PATH -> {name: path}; a PATH alone is named by its file."""
    found = {}
    for text in texts:
        name, _, path = text.rpartition("=")
        path = os.path.abspath(path)
        if not os.path.isfile(path):
            stop(f"no such {what}: {path}")
        name = name or pathlib.Path(path).stem
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            stop(f"a name is made of letters, digits, dot, dash and underscore: {name!r}")
        if name in found:
            stop(f"two files are called {name}: say NAME=PATH")
        found[name] = path
    return found


def for_set(texts, name):
    """Of NAME=PATH and PATH the one that speaks of `name`: its own before the common one."""
    own = [t.split("=", 1)[1] for t in texts if t.startswith(name + "=")]
    common = [t for t in texts if "=" not in t]
    chosen = (own or common)[-1:]
    return os.path.abspath(chosen[0]) if chosen else None


def pairs(settings):
    return [x for setting in settings for x in ("--set", setting)]


class Lab:
    """Runs each command once, under a name, and remembers what it printed."""

    def __init__(self, out, device):
        self.out, self.device = pathlib.Path(out).resolve(), device
        self.program = os.environ.get("CELLREFINE", "cellrefine")
        self.made = {}  # output -> key of the run that made it
        (self.out / "json").mkdir(parents=True, exist_ok=True)

    def run(self, name, command, *flags, writes=None):
        """JSON of a command. Its key is its flags and the keys of what it reads: another setting anywhere before is another run. `writes`
        is made anew where it is half done."""
        flags = [str(f) for f in flags]
        read = [f + ("" if f == str(writes) else self.made.get(f, "")) for f in flags]
        key = hashlib.sha256("\0".join([command, *read]).encode()).hexdigest()[:10]
        if writes is not None:
            self.made[str(writes)] = key
        kept = self.out / "json" / f"{name}-{key}.json"
        if kept.exists():
            return json.loads(kept.read_text())
        if writes is not None:
            target = pathlib.Path(writes)
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        line = [self.program, *command.split(), "--json", "--quiet", "--device", self.device, *flags]
        with open(self.out / "commands.sh", "a") as log:
            log.write(f"# {name}\n{shlex.join(line)}\n")
        start = time.time()
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode != 0:
            print(done.stderr.strip(), file=sys.stderr)
            stop(f"{name} failed with exit code {done.returncode}; the command is the last one in {self.out / 'commands.sh'}")
        result = json.loads(done.stdout)
        kept.with_suffix(".part").write_text(json.dumps(result))
        kept.with_suffix(".part").replace(kept)
        print(f"{name}: {time.time() - start:.0f} s", file=sys.stderr, flush=True)
        return result


class DataSet:
    """A corpus with its marker sets, and the arms trained on it."""

    def __init__(self, lab, a, name, path, vocab):
        self.lab, self.a, self.name = lab, a, name
        self.corpus = lab.out / f"{name}.cells"
        lab.run(f"{name}-pack", "pack", path, "--vocab", vocab, "--obs", a.label, "--out", self.corpus, writes=self.corpus)
        column = next(c for c in lab.run(f"{name}-inspect", "inspect", self.corpus)["columns"] if c["name"] == a.label)
        if column["kind"] != "categorical":
            stop(f"{a.label} of {name} is no column of names")
        # A class of one cell cannot stand on both sides of a split.
        self.single = [c for c, n in column["categories"].items() if n == 1 and c not in a.exclude_label]
        excluded = {*a.exclude_label, *self.single}
        self.classes = {c: n for c, n in column["categories"].items() if n and c not in excluded}
        if len(self.classes) < 2:
            stop(f"{name} has {len(self.classes)} classes in {a.label}")
        self.label = ["--label", a.label] + [x for e in sorted(excluded & column["categories"].keys()) for x in ("--exclude-label", e)]
        # Cells are cut for evaluation where training cut them.
        self.context = [x for setting in a.set if setting.startswith("batch.max_tokens=") for x in ("--max-tokens", setting.split("=")[1])][-2:]
        self.shared = ["--corpus", self.corpus, *self.label, *pairs(a.set)]

    def markers(self, seed):
        """Flags of the marker sets: the user's, or one versus rest over the training cells of this seed."""
        given, table = for_set(self.a.markers, self.name), for_set(self.a.marker_map, self.name)
        if given:
            return ["--markers", given, "--allow-unmatched", *(["--marker-map", table] if table else [])]
        out = self.lab.out / f"{self.name}-{seed}.gmt"
        self.lab.run(f"{self.name}-{seed}-markers", "markers derive", "--corpus", self.corpus, *self.label, "--split", SPLIT,
                     "--seed", seed, "--out", out, writes=out)
        return ["--markers", out, "--allow-unmatched"]

    def refined(self, seed):
        out = self.lab.out / "runs" / f"{self.name}-{seed}-refined"
        self.lab.run(f"{self.name}-{seed}-refine", "refine", *self.shared, "--split", SPLIT, "--seed", seed, "--checkpoint", self.a.checkpoint,
                     *self.markers(seed), *pairs(self.a.refine_set), "--out", out, writes=out)
        return out

    def finetuned(self, seed, arm, start):
        train = 0.67 * sum(self.classes.values())
        steps = max(1, math.ceil(train / BATCH) * self.a.epochs)
        settings = [f"optimizer.learning_rate={self.a.rate}", "optimizer.schedule=linear", f"optimizer.weight_decay={DECAY}",
                    f"optimizer.warmup={min(0.5, WARMUP_STEPS / steps):.4f}", f"batch.cells={BATCH}", f"train.epochs={self.a.epochs}",
                    "finetune.class_weights=none"]
        out = self.lab.out / "runs" / f"{self.name}-{seed}-{arm}"
        self.lab.run(f"{self.name}-{seed}-{arm}", "finetune", *self.shared, "--split", SPLIT, "--seed", seed, "--checkpoint", start,
                     *pairs(settings), "--out", out, writes=out)
        return out

    def measured(self, seed, arm, checkpoint):
        """`eval` on the test cells of this seed's split."""
        return self.lab.run(f"{self.name}-{seed}-eval-{arm}", "eval", "--corpus", self.corpus, *self.label, "--split", SPLIT, "--seed", seed,
                            "--checkpoint", checkpoint, *self.context, *self.markers(seed))["metrics"]


def zero_shot(lab, a, source, target, seed):
    """Recall@k on all cells of `target` whose type `source` has: of the checkpoint as it is, and refined on `source`."""
    shared = [c for c in target.classes if c in source.classes]
    if len(shared) < 2:
        stop(f"{source.name} and {target.name} share {len(shared)} labels of {a.label}: give them the same names")
    left_out = [x for c in target.classes if c not in source.classes for x in ("--exclude-label", c)]
    # Hardly any cell of the target goes to the part that probes train on; prototypes and their centre are the source's.
    flags = ["--corpus", target.corpus, *target.label, *left_out, "--split", "train=0.02,test=0.98", "--seed", seed, *target.context,
             *source.markers(seed)]
    name = f"{source.name}-{seed}-on-{target.name}"
    return {"cells": sum(target.classes[c] for c in shared), "types": len(shared),
            "before": lab.run(f"{name}-before", "eval", *flags, "--checkpoint", a.checkpoint)["metrics"],
            "after": lab.run(f"{name}-after", "eval", *flags, "--checkpoint", source.refined(seed))["metrics"]}


def mean(values):
    values = [v for v in values if v is not None]
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def published():
    rows = csv.DictReader((l for l in open(HERE / "published.tsv") if not l.startswith("#")), delimiter="\t")
    return {n: float(r["macro_f1"]) / 100 for r in rows for n in (r["name"], *(r["also"] or "").split()) if n}


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(x) for x in line) + " |" for line in lines)


def left_out(sets):
    alone = [f"{c} ({name})" for name, d in sets.items() for c in d.single]
    return f"Left out, with one cell each: {', '.join(alone)}." if alone else ""


def main():
    a = arguments()
    data = named(a.data, "data set")
    a.checkpoint = os.path.abspath(a.checkpoint)
    candidates = [a.vocab] if a.vocab else [os.path.join(a.checkpoint, "vocab.tsv"), os.path.join(a.checkpoint, "checkpoints/last/vocab.tsv"),
                                           *sorted(map(str, pathlib.Path(a.checkpoint).glob("checkpoints/step-*/vocab.tsv")))]
    vocab = next((os.path.abspath(v) for v in candidates if os.path.isfile(v)), None)
    if vocab is None:
        stop("--vocab V.tsv: the checkpoint's own tokens and medians\n  try: cellrefine vocab convert token_dictionary.pkl gene_median.pkl --out V.tsv")
    pairs_of_sets = [p.split(":") for p in a.out_of_domain]
    for pair in pairs_of_sets:
        if len(pair) != 2 or any(n not in data for n in pair):
            stop(f"--out-of-domain {':'.join(pair)}: wanted A:B with A and B of {', '.join(data)}")
    seeds = [int(s) for s in a.seeds.split(",")]
    lab = Lab(a.out, a.device)
    sets = {name: DataSet(lab, a, name, path, vocab) for name, path in data.items()}
    known = published()
    identity, frozen, shifted, record = [], [], [], {}
    for name, d in sets.items():
        arms = {arm: [] for arm in ("before", "after", "frozen before", "frozen after")}
        for seed in seeds:
            refined = d.refined(seed)
            arms["before"].append(d.measured(seed, "before", d.finetuned(seed, "before", a.checkpoint)))
            arms["after"].append(d.measured(seed, "after", d.finetuned(seed, "after", refined)))
            # The checkpoint has no prototypes: they are made from the marker sets, with its own weights.
            arms["frozen before"].append(d.measured(seed, "frozen-before", a.checkpoint))
            arms["frozen after"].append(d.measured(seed, "frozen-after", refined))
        column = lambda arm, key: mean([m.get(key) for m in arms[arm]])
        paper = known.get(name.lower())
        identity.append([name, sum(d.classes.values()), len(d.classes), column("before", "accuracy"), column("after", "accuracy"),
                         column("before", "macro_f1"), column("after", "macro_f1"), column("before", "tail_f1"), column("after", "tail_f1"),
                         "–" if paper is None else f"{paper:.2f}"])
        for arm in ("frozen before", "frozen after"):
            recall = [mean([(m.get("recall_at") or {}).get(k) for m in arms[arm]]) for k in RECALLS]
            frozen.append([name, arm.split()[1], *recall, mean([(m.get("macro_recall_at") or {}).get("1") for m in arms[arm]]),
                           *(mean([m["methods"].get(method, {}).get(key) for m in arms[arm]])
                             for method in ("linear_probe", "knn") for key in ("macro_f1", "tail_f1")), column(arm, "silhouette")])
        record[name] = arms
    for first, second in pairs_of_sets:
        runs = [zero_shot(lab, a, sets[first], sets[second], seed) for seed in seeds]
        for arm in ("before", "after"):
            recall = [mean([(r[arm].get("recall_at") or {}).get(k) for r in runs]) for k in RECALLS]
            shifted.append([f"{first} → {second}", arm, runs[0]["cells"], runs[0]["types"], *recall,
                            mean([(r[arm].get("macro_recall_at") or {}).get("1") for r in runs])])
        record[f"{first}:{second}"] = runs
    recalls = [f"recall@{k}" for k in RECALLS]
    text = f"""# CellRefine's protocol on {', '.join(sets)}

Checkpoint {a.checkpoint}; split {SPLIT}, stratified; seeds {a.seeds}: mean ± standard deviation over them.
Fine-tuning: batch {BATCH}, {a.epochs:g} epochs, learning rate {a.rate:g}, linear after {WARMUP_STEPS} steps, weight decay {DECAY:g}.
Commands: commands.sh; all measures: results.json. Published: the paper's macro-F1 as listed on the web, of an unnamed backbone.

## On-domain cell identity: fine-tuned without and after refine, test cells
{table(["data set", "cells", "types", "accuracy", "after refine", "macro-F1", "after refine", "tail F1", "after refine", "published macro-F1"], identity)}

## The embedding itself, nothing trained on top: nearest prototype, and the tail
{table(["data set", "refine", *recalls, "macro recall@1", "linear probe macro-F1", "tail F1", "kNN macro-F1", "tail F1", "silhouette"], frozen)}

Tail: types below 2 % of the training cells. {left_out(sets)}
"""
    if shifted:
        text += f"""
## Out of domain: the first data set's prototypes label the cells of the second
{table(["from → to", "refine", "cells", "types", *recalls, "macro recall@1"], shifted)}
"""
    for file, content in (("table.md", text), ("results.json", json.dumps(record, indent=1))):
        (lab.out / f".{file}.part").write_text(content)
        (lab.out / f".{file}.part").replace(lab.out / file)
    print(text)


if __name__ == "__main__":
    main()
