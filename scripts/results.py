"""Runs the experiments behind docs/results.md and writes it: every number there comes from here.

    python scripts/results.py --data DIR --markers DIR --work DIR [--binary target/release/cellrefine]
        [--parts core,few,donors,ablation,table] [--seeds 0,1,2] [--datasets baron,pbmc8k]

DIR of --data holds pbmc8k.h5ad and baron_pancreas.h5ad (docs/results.md says where they come from) and, in geneformer/, Geneformer V1's token
dictionary and medians; DIR of --markers the curated GMT files. Every step runs the program as a user would, with the commands written to
WORK/commands.sh, and its JSON output is kept in WORK, so an interrupted run continues. `table` only writes docs from what WORK holds.
Baselines (scripts/baselines.py) need scikit-learn and anndata.
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))

DATASETS = {
    "pbmc8k": dict(file="pbmc8k.h5ad", exclude=["Other"], batch=None),
    "baron": dict(file="baron_pancreas.h5ad", exclude=[], batch="donor"),
}
# Curated sets: label -> (GMT file, set name).
PANGLAO = "PanglaoDB_27_Mar_2020.gmt"
CURATED = {
    "baron": {
        "acinar": (PANGLAO, "Pancreas|Acinar cells"), "alpha": (PANGLAO, "Pancreas|Alpha cells"),
        "beta": (PANGLAO, "Pancreas|Beta cells"), "delta": (PANGLAO, "Pancreas|Delta cells"),
        "ductal": (PANGLAO, "Pancreas|Ductal cells"), "epsilon": (PANGLAO, "Pancreas|Epsilon cells"),
        "gamma": (PANGLAO, "Pancreas|Gamma (PP) cells"), "activated_stellate": (PANGLAO, "Connective tissue|Fibroblasts"),
        "quiescent_stellate": (PANGLAO, "Pancreas|Pancreatic stellate cells"),
        "endothelial": (PANGLAO, "Vasculature|Endothelial cells"), "macrophage": (PANGLAO, "Immune system|Macrophages"),
        "mast": (PANGLAO, "Immune system|Mast cells"), "schwann": (PANGLAO, "Pancreas|Peri-islet Schwann cells"),
        "t_cell": (PANGLAO, "Immune system|T cells")},
    "pbmc8k": {
        "B cells": ("Pegasus.gmt", "immune|B cell"), "CD14+ Monocytes": ("Pegasus.gmt", "immune|CD14+ Monocyte"),
        "CD4 T cells": ("Pegasus.gmt", "immune|CD4 Naive T cell"), "CD8 T cells": ("scMayoMap.gmt", "blood|CD8 T cell"),
        "Dendritic Cells": ("Pegasus.gmt", "immune|CD1C+ dendritic cell"),
        "FCGR3A+ Monocytes": ("Pegasus.gmt", "immune|CD16+ Monocyte"),
        "Megakaryocytes": ("Pegasus.gmt", "immune|Platelet"), "NK cells": ("Pegasus.gmt", "immune|Natural killer cell")}}

# Chosen on a validation part of the training cells (seed 100); see docs/results.md.
CONTEXT = 128
PRETRAIN = ["--set", "train.epochs=6"]
REFINE_EPOCHS, TUNE_EPOCHS = 2, 4
TERMS = ["proto", "mlm", "cell_cell", "structure", "anchor"]


class Lab:
    """Runs commands once and remembers what they printed."""

    def __init__(self, a):
        self.a, self.work = a, os.path.abspath(a.work)
        os.makedirs(self.work, exist_ok=True)

    def path(self, *parts):
        return os.path.join(self.work, *parts)

    def run(self, name, arguments, program=None):
        """The JSON that the command printed; from WORK/json/NAME.json where it ran before."""
        kept = self.path("json", name.replace("/", "_") + ".json")
        if os.path.exists(kept):
            return json.load(open(kept))
        os.makedirs(os.path.dirname(kept), exist_ok=True)
        command = [self.a.binary, "--json", "--quiet"] if program is None else program
        command = command + [str(x) for x in arguments]
        with open(self.path("commands.sh"), "a") as f:
            f.write(f"# {name}\n{shlex.join(command)}\n")
        start = time.time()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{name} failed ({done.returncode}): {shlex.join(command)}\n{done.stderr}{done.stdout[-2000:]}")
        result = json.loads(done.stdout)
        result["_seconds"] = round(time.time() - start, 1)
        json.dump(result, open(kept + ".part", "w"))
        os.replace(kept + ".part", kept)
        print(f"{name}: {result['_seconds']} s", flush=True)
        return result


def prepare(lab, name):
    """Vocabulary and corpus of a data set; the curated marker file. -> (corpus, label flags, curated, map)"""
    spec = DATASETS[name]
    vocab, corpus = lab.path("v1.tsv"), lab.path(name + ".cells")
    geneformer = os.path.join(lab.a.data, "geneformer")
    if not os.path.exists(vocab):
        symbols = os.path.join(lab.a.data, "genemap", "human_symbol_ensembl.tsv.gz")
        lab.run("vocab", ["vocab", "convert", os.path.join(geneformer, "token_dictionary_v1.tsv"),
                          os.path.join(geneformer, "gene_median_v1.tsv"), "--symbols", symbols, "--out", vocab])
    source = os.path.join(lab.a.data, "scrna", spec["file"])
    if not os.path.exists(corpus):
        lab.run(f"pack/{name}", ["pack", source, "--vocab", vocab, "--out", corpus])
    curated, mapping = lab.path(name + "-curated.gmt"), lab.path(name + "-curated.tsv")
    sets = {}
    for label, (file, wanted) in CURATED[name].items():
        for line in open(os.path.join(lab.a.markers, file), encoding="utf-8"):
            if line.split("\t")[0] == wanted:
                sets[label] = line
    with open(curated, "w") as f:
        f.writelines(line if line.endswith("\n") else line + "\n" for line in dict.fromkeys(sets.values()))
    with open(mapping, "w") as f:
        f.write("label\tset\n")
        f.writelines(f"{label}\t{line.split(chr(9))[0]}\n" for label, line in sets.items())
    label = ["--label", "cell_type"] + [x for e in spec["exclude"] for x in ("--exclude-label", e)]
    return source, corpus, vocab, label, curated, mapping


def chain(lab, tag, name, split, seed):
    """Pretrain, then every arm of the core table at equal compute. -> {arm: metrics}"""
    source, corpus, vocab, label, curated, mapping = prepare(lab, name)
    runs = lambda arm: lab.path("runs", f"{tag}-{arm}")
    common = ["--corpus", corpus, "--seed", seed, "--set", f"batch.max_tokens={CONTEXT}"]
    derived = lab.path(f"{tag}-derived.gmt")
    pretrained = runs("pretrained")
    lab.run(f"{tag}/markers", ["markers", "derive", "--corpus", corpus, *label, *split, "--seed", seed, "--out", derived])
    lab.run(f"{tag}/pretrained", ["pretrain", *common, *label, *split, "--preset", "tiny", *PRETRAIN, "--out", pretrained])
    refined = runs("refined")
    lab.run(f"{tag}/refined", ["refine", *common, *label, *split, "--checkpoint", pretrained, "--markers", derived,
                               "--set", f"train.epochs={REFINE_EPOCHS}", "--out", refined])
    tune = lambda arm, start, epochs: lab.run(
        f"{tag}/{arm}", ["finetune", *common, *label, *split, "--checkpoint", start, "--set", f"train.epochs={epochs}", "--out", runs(arm)])
    tune("tuned", pretrained, REFINE_EPOCHS + TUNE_EPOCHS)
    tune("refined-tuned", refined, TUNE_EPOCHS)
    tune("plain", pretrained, REFINE_EPOCHS)
    tune("plain-tuned", runs("plain"), TUNE_EPOCHS)
    batch = ["--batch-key", DATASETS[name]["batch"]] if DATASETS[name]["batch"] else []
    cells = lab.path(f"{tag}-split.json")
    out = {}
    for arm in ("pretrained", "refined", "tuned", "refined-tuned", "plain-tuned"):
        out[arm] = lab.run(f"{tag}/eval-{arm}", ["eval", "--corpus", corpus, "--checkpoint", runs(arm), *label, *split, "--seed", seed,
                                                "--markers", derived, *batch, "--split-out", cells])["metrics"]
    out["baselines"] = lab.run(f"{tag}/baselines", [
        os.path.join(HERE, "baselines.py"), source, "--label", "cell_type", "--split", cells, "--vocab", vocab, "--markers", curated,
        "--marker-map", mapping], program=[sys.executable])
    return out


def few_labels(lab, name, seed, counts):
    """Few labels: the curated sets, all training cells unlabelled but n a class. -> {n: {arm: metrics}}"""
    tag = f"{name}-{seed}"
    split = ["--split", "train=0.67,test=0.33"]
    source, corpus, vocab, label, curated, mapping = prepare(lab, name)
    common = ["--corpus", corpus, "--seed", seed, "--set", f"batch.max_tokens={CONTEXT}"]
    pretrained, free = lab.path("runs", f"{tag}-pretrained"), lab.path("runs", f"{tag}-label-free")
    markers = ["--markers", curated, "--marker-map", mapping]
    # Label-free: no cell's label is read; the flags name the column for the split alone.
    lab.run(f"{tag}/label-free", ["refine", *common, *label, *split, "--labels-per-class", 0, "--checkpoint", pretrained, *markers,
                                  "--set", f"train.epochs={REFINE_EPOCHS}", "--out", free])
    out = {}
    for n in counts:
        some = ["--labels-per-class", n]
        partly, tuned = lab.path("runs", f"{tag}-partly-{n}"), lab.path("runs", f"{tag}-tuned-{n}")
        lab.run(f"{tag}/partly-{n}", ["refine", *common, *label, *split, *some, "--checkpoint", pretrained, *markers,
                                      "--set", f"train.epochs={REFINE_EPOCHS}", "--out", partly])
        lab.run(f"{tag}/tuned-{n}", ["finetune", *common, *label, *split, *some, "--checkpoint", pretrained,
                                     "--set", "train.steps=100", "--out", tuned])
        cells = lab.path(f"{tag}-split-{n}.json")
        out[n] = {}
        for arm, run in (("pretrained", pretrained), ("label-free", free), ("partly", partly), ("tuned", tuned)):
            out[n][arm] = lab.run(f"{tag}/eval-{arm}-{n}", ["eval", "--corpus", corpus, "--checkpoint", run, *label, *split, *some,
                                                           "--seed", seed, *markers, "--split-out", cells])["metrics"]
        out[n]["baselines"] = lab.run(f"{tag}/baselines-{n}", [
            os.path.join(HERE, "baselines.py"), source, "--label", "cell_type", "--split", cells, "--vocab", vocab, "--markers", curated,
            "--marker-map", mapping, "--methods", "logistic_regression"], program=[sys.executable])
    return out


def ablation(lab, name, seed):
    """Refine with one term off at a time (and without centring). -> {arm: metrics}"""
    tag = f"{name}-{seed}"
    split = ["--split", "train=0.67,test=0.33"]
    source, corpus, vocab, label, curated, mapping = prepare(lab, name)
    derived, pretrained = lab.path(f"{tag}-derived.gmt"), lab.path("runs", f"{tag}-pretrained")
    out = {"all terms": lab.run(f"{tag}/eval-refined", [])["metrics"]}
    for term in TERMS + ["center"]:
        run = lab.path("runs", f"{tag}-without-{term}")
        off = f"objective.{term}=" + ("false" if term == "center" else "0")
        lab.run(f"{tag}/without-{term}", ["refine", "--corpus", corpus, "--seed", seed, "--set", f"batch.max_tokens={CONTEXT}", *label, *split,
                                          "--checkpoint", pretrained, "--markers", derived, "--set", f"train.epochs={REFINE_EPOCHS}",
                                          "--set", off, "--out", run])
        out[f"without {term}"] = lab.run(f"{tag}/eval-without-{term}", ["eval", "--corpus", corpus, "--checkpoint", run, *label, *split,
                                                                       "--seed", seed, "--markers", derived])["metrics"]
    return out
