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
SPLIT = ["--split", "train=0.67,test=0.33"]
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
    out = {}
    for arm in ("pretrained", "refined", "tuned", "refined-tuned", "plain-tuned"):
        out[arm] = lab.run(f"{tag}/eval-{arm}", ["eval", "--corpus", corpus, "--checkpoint", runs(arm), *label, *split, "--seed", seed,
                                                "--markers", derived, *batch])["metrics"]
    out["baselines"] = lab.run(f"{tag}/baselines", [
        os.path.join(HERE, "baselines.py"), source, "--label", "cell_type", "--split", os.path.join(runs("tuned"), "split.tsv"), "--vocab", vocab,
        "--markers", curated, "--marker-map", mapping, *[x for e in DATASETS[name]["exclude"] for x in ("--exclude", e)]],
        program=[sys.executable])
    return out


def few_labels(lab, name, seed, counts):
    """Few labels: curated sets, all training cells unlabelled but n a class. -> {n: {arm: metrics}}"""
    tag = f"{name}-{seed}"
    source, corpus, vocab, label, curated, mapping = prepare(lab, name)
    common = ["--corpus", corpus, "--seed", seed, "--set", f"batch.max_tokens={CONTEXT}"]
    pretrained, free = lab.path("runs", f"{tag}-pretrained"), lab.path("runs", f"{tag}-label-free")
    markers = ["--markers", curated, "--marker-map", mapping]
    # Without --label no cell's label is read; the split is the one that pretraining recorded.
    lab.run(f"{tag}/label-free", ["refine", *common, "--checkpoint", pretrained, *markers, "--set", f"train.epochs={REFINE_EPOCHS}",
                                  "--out", free])
    out = {}
    for n in counts:
        some = [*label, *SPLIT, "--labels-per-class", n]
        partly, tuned = lab.path("runs", f"{tag}-partly-{n}"), lab.path("runs", f"{tag}-tuned-{n}")
        lab.run(f"{tag}/partly-{n}", ["refine", *common, *some, "--checkpoint", pretrained, *markers,
                                      "--set", f"train.epochs={REFINE_EPOCHS}", "--out", partly])
        lab.run(f"{tag}/tuned-{n}", ["finetune", *common, *some, "--checkpoint", pretrained, "--set", "train.steps=100", "--out", tuned])
        evaluate = lambda arm, run: lab.run(f"{tag}/eval-{arm}-{n}", ["eval", "--corpus", corpus, "--checkpoint", run, *some, "--seed", seed,
                                                                     *markers])["metrics"]
        out[n] = {arm: evaluate(arm, run) for arm, run in
                  (("pretrained", pretrained), ("label-free", free), ("partly", partly), ("tuned", tuned))}
        out[n]["baselines"] = lab.run(f"{tag}/baselines-{n}", [
            os.path.join(HERE, "baselines.py"), source, "--label", "cell_type", "--split", os.path.join(tuned, "split.tsv"),
            "--methods", "logistic_regression", *[x for e in DATASETS[name]["exclude"] for x in ("--exclude", e)]], program=[sys.executable])
    return out


def ablation(lab, name, seed):
    """Refine with one term off at a time, and without centring. -> {arm: metrics}"""
    tag = f"{name}-{seed}"
    source, corpus, vocab, label, curated, mapping = prepare(lab, name)
    derived, pretrained = lab.path(f"{tag}-derived.gmt"), lab.path("runs", f"{tag}-pretrained")
    out = {}
    for term in TERMS + ["center"]:
        run = lab.path("runs", f"{tag}-without-{term}")
        off = f"objective.{term}=" + ("false" if term == "center" else "0")
        lab.run(f"{tag}/without-{term}", ["refine", "--corpus", corpus, "--seed", seed, "--set", f"batch.max_tokens={CONTEXT}", *label, *SPLIT,
                                          "--checkpoint", pretrained, "--markers", derived, "--set", f"train.epochs={REFINE_EPOCHS}",
                                          "--set", off, "--out", run])
        out[f"without {term}"] = lab.run(f"{tag}/eval-without-{term}", [
            "eval", "--corpus", corpus, "--checkpoint", run, *label, *SPLIT, "--seed", seed, "--markers", derived])["metrics"]
    return out


# ----------------------------------------------------------------------------------------------------------------- tables
def mean_spread(values):
    values = [v for v in values if v is not None]
    if not values:
        return "–"
    mean = sum(values) / len(values)
    spread = (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)) ** 0.5
    return f"{mean:.3f} ± {spread:.3f}" if len(values) > 1 else f"{mean:.3f}"


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def zero_shot(metrics, micro, k):
    scores = metrics.get("zero_shot", {}).get("prototype")
    return scores and scores["recall_at" if micro else "macro_recall_at"].get(str(k))


def method(baselines, name, field):
    return baselines.get("methods", baselines).get(name, {}).get(field)


def core_tables(results):
    arms = [("pretrain → fine-tune 6", "tuned"), ("pretrain → balanced cross-entropy 2 → fine-tune 4", "plain-tuned"),
            ("pretrain → refine 2 → fine-tune 4", "refined-tuned")]
    rows = [[title] + [mean_spread([r[arm][f] for r in results]) for f in ("accuracy", "macro_f1", "tail_f1")] for title, arm in arms]
    plain = [("logistic regression, 2,000 variable genes", "logistic_regression"), ("kNN (15) on 50 PCs", "knn_pca"),
             ("marker score, derived sets, no model", "marker_score_derived"), ("marker score, curated sets, no model", "marker_score")]
    rows += [[title] + [mean_spread([method(r["baselines"], name, f) for r in results]) for f in ("accuracy", "macro_f1", "tail_f1")]
             for title, name in plain]
    text = table(["fine-tuned, class-balanced, equal compute", "accuracy", "macro-F1", "tail F1"], rows) + "\n"
    measures = [("linear probe macro-F1", lambda m: m["linear_probe_macro_f1"]), ("kNN macro-F1", lambda m: m["knn_macro_f1"]),
                ("silhouette", lambda m: m["silhouette"]), ("ARI", lambda m: m["ari"]), ("NMI", lambda m: m["nmi"]),
                ("nearest prototype recall@1", lambda m: zero_shot(m, True, 1)), ("recall@3", lambda m: zero_shot(m, True, 3)),
                ("recall@1, mean of classes", lambda m: zero_shot(m, False, 1)), ("recall@3, mean of classes", lambda m: zero_shot(m, False, 3))]
    rows = [[title] + [mean_spread([f(r[arm]) for r in results]) for arm in ("pretrained", "refined")] for title, f in measures]
    return text + table(["frozen embedding", "before refine", "after refine"], rows)


def write_docs(lab, results):
    """WORK/results.md: the tables; docs/results.md quotes them with their reading."""
    parts = []
    for name in results["core"]:
        parts.append(f"### {name}\n" + core_tables(list(results["core"][name].values())))
    for name, seeds in results.get("few", {}).items():
        runs = list(seeds.values())
        rows = []
        arms = [("frozen pretrained + probe", lambda r: r["pretrained"]["linear_probe_macro_f1"]),
                ("label-free refine + probe", lambda r: r["label-free"]["linear_probe_macro_f1"]),
                ("partly labelled refine + probe", lambda r: r["partly"]["linear_probe_macro_f1"]),
                ("partly labelled refine, nearest prototype", lambda r: r["partly"]["methods"].get("prototype", {}).get("macro_f1")),
                ("fine-tuning from pretrained", lambda r: r["tuned"]["macro_f1"]),
                ("logistic regression, 2,000 variable genes", lambda r: method(r["baselines"], "logistic_regression", "macro_f1"))]
        counts = list(runs[0])
        for title, f in arms:
            rows.append([title] + [mean_spread([f(r[n]) for r in runs]) for n in counts])
        parts.append(f"### {name}: few labels, macro-F1\n" + table(["labels a class"] + [str(n) for n in counts], rows))
    if results.get("donors"):
        parts.append("### baron: leave one donor out (mean ± spread over donors)\n" + core_tables(list(results["donors"].values())))
    for name, arms in results.get("ablation", {}).items():
        fields = [("linear probe", lambda m: m["linear_probe_macro_f1"]), ("kNN", lambda m: m["knn_macro_f1"]),
                  ("silhouette", lambda m: m["silhouette"]), ("recall@1", lambda m: zero_shot(m, True, 1)),
                  ("recall@1, mean of classes", lambda m: zero_shot(m, False, 1))]
        rows = [[arm] + [mean_spread([f(m)]) for _, f in fields] for arm, m in arms.items()]
        parts.append(f"### {name}: refine with one part off (seed 0)\n" + table([""] + [t for t, _ in fields], rows))
    text = "\n".join(parts)
    open(lab.path("results.md"), "w").write(text)
    json.dump(results, open(lab.path("results.json"), "w"), indent=1)
    print(text)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True)
    p.add_argument("--markers", required=True)
    p.add_argument("--work", required=True)
    p.add_argument("--binary", default="target/release/cellrefine")
    p.add_argument("--parts", default="core,few,donors,ablation")
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--few-seeds", default="0,1")
    p.add_argument("--labels", default="1,5,10,30")
    p.add_argument("--datasets", default="baron,pbmc8k")
    a = p.parse_args()
    lab, parts, names = Lab(a), a.parts.split(","), a.datasets.split(",")
    results = {"core": {}, "few": {}, "donors": {}, "ablation": {}}
    for name in names:
        results["core"][name] = {seed: chain(lab, f"{name}-{seed}", name, SPLIT, seed) for seed in map(int, a.seeds.split(","))}
    write_docs(lab, results)
    if "ablation" in parts:
        for name in names:
            whole = {"all terms": results["core"][name][0]["refined"], "before refine": results["core"][name][0]["pretrained"]}
            results["ablation"][name] = {**whole, **ablation(lab, name, 0)}
    if "few" in parts:
        for name in names:
            results["few"][name] = {seed: few_labels(lab, name, seed, list(map(int, a.labels.split(","))))
                                    for seed in map(int, a.few_seeds.split(","))}
    if "donors" in parts and "baron" in names:
        for donor in ("human1", "human2", "human3", "human4"):
            results["donors"][donor] = chain(lab, f"baron-{donor}", "baron", ["--holdout", f"donor={donor}"], 0)
    write_docs(lab, results)


if __name__ == "__main__":
    main()
