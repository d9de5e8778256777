"""Runs the experiments behind docs/results.md and writes it: every number there comes from here.

    python scripts/results.py --data DIR --markers DIR --work DIR [--binary target/release/cellrefine]
        [--parts tune,core,few,donors,ablation] [--seeds 0,1,2] [--datasets baron,pbmc8k]

DIR of --data holds pbmc8k.h5ad and baron_pancreas.h5ad (docs/results.md says where they come from) and, in geneformer/, Geneformer V1's token
dictionary and medians; DIR of --markers the curated GMT files. Every step runs the program as a user would, with the commands written to
WORK/commands.sh, and its JSON output is kept in WORK, so an interrupted run continues and a finished one only prints its tables again.
Baselines (scripts/baselines.py) need scikit-learn and anndata.
"""
import argparse
import json
import os
import shlex
import shutil
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

CONTEXT = 128
SPLIT = ["--split", "train=0.67,test=0.33"]
# The same test cells; a quarter of the other cells chooses the settings (`tune`), so that no test cell does.
TUNING_SPLIT = ["--split", "train=0.5,val=0.17,test=0.33"]
PRETRAIN_EPOCHS, REFINE_EPOCHS, TUNE_EPOCHS = 6, 2, 4
# Chosen by `tune`: learning rates of fine-tuning without and after refine, weight of the masked-gene term in refine.
RATE, RATE_AFTER_REFINE, MLM = "2e-3", "1e-3", "0"
RATES, MLMS = ("2e-3", "1e-3", "5e-4"), ("0.5", "0")
TERMS = ["proto", "cell_cell", "structure", "anchor"]


def setting(*pairs):
    return [x for pair in pairs for x in ("--set", pair)]


class Lab:
    """Runs commands once and remembers what they printed."""

    def __init__(self, a):
        self.a, self.work = a, os.path.abspath(a.work)
        os.makedirs(self.work, exist_ok=True)

    def path(self, *parts):
        return os.path.join(self.work, *parts)

    def kept(self, name):
        return self.path("json", name.replace("/", "_") + ".json")

    def done(self, name):
        return os.path.exists(self.kept(name))

    def run(self, name, arguments, program=None):
        """The JSON that the command printed; from WORK/json/NAME.json where it ran before."""
        kept = self.kept(name)
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
    """Vocabulary and corpus of a data set; the curated marker file. -> (source, corpus, vocabulary, curated sets, label map)"""
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
    return source, corpus, vocab, curated, mapping


def absent_types(source, split):
    """Types that only the held-out value of --holdout has: nothing to learn them from, so they are left out for every method."""
    if "--holdout" not in split:
        return []
    import anndata
    column, value = split[split.index("--holdout") + 1].split("=")
    obs = anndata.read_h5ad(source, backed="r").obs
    kept = set(obs.cell_type[obs[column].astype(str) != value])
    return sorted(set(obs.cell_type.dropna()) - kept)


class Stages:
    """The four commands of one data set, split and seed."""

    def __init__(self, lab, tag, name, split, seed):
        self.lab, self.tag, self.name, self.split, self.seed = lab, tag, name, split, seed
        self.source, self.corpus, self.vocab, self.curated, self.map = prepare(lab, name)
        self.left_out = DATASETS[name]["exclude"] + absent_types(self.source, split)
        self.label = ["--label", "cell_type"] + [x for e in self.left_out for x in ("--exclude-label", e)]
        self.common = ["--corpus", self.corpus, "--seed", seed, *setting(f"batch.max_tokens={CONTEXT}")]
        self.derived = lab.path(f"{tag}-derived.gmt")
        lab.run(f"{tag}/markers", ["markers", "derive", "--corpus", self.corpus, *self.label, *split, "--seed", seed, "--out", self.derived])

    def out(self, arm):
        return self.lab.path("runs", f"{self.tag}-{arm}")

    def stage(self, command, arm, *flags):
        if not self.lab.done(f"{self.tag}/{arm}"):
            shutil.rmtree(self.out(arm), ignore_errors=True)  # of an interrupted run
        self.lab.run(f"{self.tag}/{arm}", [command, *self.common, *flags, "--out", self.out(arm)])
        return arm

    def pretrain(self):
        return self.stage("pretrain", "pretrained", *self.label, *self.split, "--preset", "tiny", *setting(f"train.epochs={PRETRAIN_EPOCHS}"))

    def refine(self, arm, start, *flags, markers=None, labels=True):
        # Without --label no cell's label is read; the split is the one that pretraining recorded.
        part = [*self.label, *self.split] if labels else []
        return self.stage("refine", arm, *part, "--checkpoint", self.out(start), *(markers or ["--markers", self.derived]),
                          *setting(f"train.epochs={REFINE_EPOCHS}", f"objective.mlm={MLM}"), *flags)

    def finetune(self, arm, start, epochs, rate, *flags):
        return self.stage("finetune", arm, *self.label, *self.split, "--checkpoint", self.out(start),
                          *setting(f"train.epochs={epochs}", f"optimizer.learning_rate={rate}"), *flags)

    def evaluate(self, arm, *flags, part="test", markers=None, kept=None):
        batch = DATASETS[self.name]["batch"]
        return self.lab.run(f"{self.tag}/eval-{kept or arm}", [
            "eval", "--corpus", self.corpus, "--checkpoint", self.out(arm), *self.label, *self.split, "--seed", self.seed, "--part", part,
            *(markers or ["--markers", self.derived]), *(["--batch-key", batch] if batch else []), *flags])["metrics"]

    def baselines(self, arm, *flags, kept="baselines"):
        return self.lab.run(f"{self.tag}/{kept}", [
            os.path.join(HERE, "baselines.py"), self.source, "--label", "cell_type", "--split", os.path.join(self.out(arm), "split.tsv"),
            *[x for e in self.left_out for x in ("--exclude", e)], *flags], program=[sys.executable])

    def curated_flags(self):
        return ["--markers", self.curated, "--marker-map", self.map]


def tune(lab, name, seed):
    """The grid that chose the settings, scored on validation cells. -> {arm: metrics}"""
    run = Stages(lab, f"tune-{name}-{seed}", name, TUNING_SPLIT, seed)
    run.pretrain()
    out = {}
    measure = lambda title, arm: out.update({title: run.evaluate(arm, part="val")})
    for mlm in MLMS:
        measure(f"refine, mlm {mlm}, frozen", run.refine(f"refined-{mlm}", "pretrained", *setting(f"objective.mlm={mlm}")))
    for rate in RATES:
        measure(f"fine-tune 6 at {rate}", run.finetune(f"tuned-{rate}", "pretrained", REFINE_EPOCHS + TUNE_EPOCHS, rate))
    for rate in RATES:
        measure(f"refine 2, mlm 0 → fine-tune 4 at {rate}", run.finetune(f"refined-0-tuned-{rate}", "refined-0", TUNE_EPOCHS, rate))
    return out


def chain(lab, tag, name, split, seed, control=True):
    """Pretrain, then every arm of the core table at equal compute. -> {arm: metrics}"""
    run = Stages(lab, tag, name, split, seed)
    run.pretrain()
    run.refine("refined", "pretrained")
    run.finetune("tuned", "pretrained", REFINE_EPOCHS + TUNE_EPOCHS, RATE)
    run.finetune("refined-tuned", "refined", TUNE_EPOCHS, RATE_AFTER_REFINE)
    arms = ["pretrained", "refined", "tuned", "refined-tuned"]
    if control:
        run.finetune("plain", "pretrained", REFINE_EPOCHS, RATE)
        arms.append(run.finetune("plain-tuned", "plain", TUNE_EPOCHS, RATE))
    out = {arm: run.evaluate(arm) for arm in arms}
    out["baselines"] = run.baselines("tuned", "--vocab", run.vocab, *run.curated_flags())
    return out


def few_labels(lab, name, seed, counts):
    """Few labels: curated sets, all training cells unlabelled but n a class. -> {n: {arm: metrics}}"""
    run = Stages(lab, f"{name}-{seed}", name, SPLIT, seed)
    curated = run.curated_flags()
    run.refine("label-free", "pretrained", markers=curated, labels=False)
    out = {}
    for n in counts:
        few = ["--labels-per-class", n]
        partly, tuned = f"partly-{n}", f"tuned-{n}"
        run.refine(partly, "pretrained", *few, markers=curated)
        # 100 steps whatever n: an epoch of a few cells would be no training at all.
        run.finetune(tuned, "pretrained", 1, RATE, *few, *setting("train.steps=100"))
        run.finetune(f"label-free-tuned-{n}", "label-free", 1, RATE_AFTER_REFINE, *few, *setting("train.steps=100"))
        out[n] = {arm: run.evaluate(start, *few, markers=curated, kept=f"{arm}-few-{n}")
                  for arm, start in (("pretrained", "pretrained"), ("label-free", "label-free"), ("partly", partly), ("tuned", tuned),
                                    ("label-free-tuned", f"label-free-tuned-{n}"))}
        out[n]["baselines"] = run.baselines(tuned, "--methods", "logistic_regression", kept=f"baselines-{n}")
    return out


def ablation(lab, name, seed):
    """Refine with one part off at a time, or the masked-gene term on. -> {arm: metrics}"""
    run = Stages(lab, f"{name}-{seed}", name, SPLIT, seed)
    arms = {f"without {term}": setting(f"objective.{term}=0") for term in TERMS}
    arms["without centring"] = setting("objective.center=false")
    arms["with masked genes (mlm .5)"] = setting("objective.mlm=0.5")
    arms["prototypes from label means, no markers"] = setting("objective.prototypes=labels", "objective.epsilon=0", "objective.structure=0")
    out = {}
    for title, flags in arms.items():
        arm = "ablate-" + "".join(c if c.isalnum() else "-" for c in title)
        out[title] = run.evaluate(run.refine(arm, "pretrained", *flags))
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


def scores(metrics, name):
    """accuracy, macro-F1, tail F1 of one predictor of eval."""
    m = metrics["methods"].get(name, {})
    return [m.get(f) for f in ("accuracy", "macro_f1", "tail_f1")]


def three(results, arm, name):
    return [mean_spread(column) for column in zip(*(scores(r[arm], name) for r in results))]


def core_tables(results):
    arms = [("pretrain → fine-tune 6", "tuned"), ("pretrain → balanced cross-entropy 2 → fine-tune 4", "plain-tuned"),
            ("pretrain → refine 2 → fine-tune 4", "refined-tuned")]
    arms = [(title, arm) for title, arm in arms if all(arm in r for r in results)]
    rows = [[title] + three(results, arm, "classifier") for title, arm in arms]
    rows += [[title + ", markers beside"] + three(results, arm, "classifier_markers") for title, arm in arms]
    rows += [["refine alone, nearest prototype"] + three(results, "refined", "prototype"),
             ["refine alone, nearest prototype, markers beside"] + three(results, "refined", "both")]
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


def frozen_rows(arms):
    """One row per arm {title: [metrics per seed]}, and the header."""
    fields = [("linear probe", lambda m: m["linear_probe_macro_f1"]), ("kNN", lambda m: m["knn_macro_f1"]),
              ("silhouette", lambda m: m["silhouette"]), ("recall@1", lambda m: zero_shot(m, True, 1)),
              ("recall@1, mean of classes", lambda m: zero_shot(m, False, 1))]
    return table([""] + [t for t, _ in fields], [[title] + [mean_spread([f(m) for m in runs]) for _, f in fields] for title, runs in arms.items()])


def by_arm(seeds):
    """{seed: {arm: metrics}} -> {arm: [metrics]}"""
    runs = list(seeds.values())
    return {arm: [r[arm] for r in runs] for arm in runs[0]}


def write_docs(lab, results):
    """WORK/results.md: the tables; docs/results.md quotes them with their reading."""
    parts = []
    for name, seeds in results["tune"].items():
        arms = by_arm(seeds)
        tuned = {t: runs for t, runs in arms.items() if "frozen" not in t}
        parts.append(f"### {name}: settings, on validation cells\n" + frozen_rows({t: r for t, r in arms.items() if t not in tuned}) + "\n" + table(
            ["", "accuracy", "macro-F1", "tail F1"],
            [[t] + [mean_spread(c) for c in zip(*(scores(m, "classifier") for m in runs))] for t, runs in tuned.items()]))
    for name in results["core"]:
        parts.append(f"### {name}\n" + core_tables(list(results["core"][name].values())))
    for name, seeds in results.get("few", {}).items():
        runs = list(seeds.values())
        rows = []
        arms = [("frozen pretrained + probe", lambda r: r["pretrained"]["linear_probe_macro_f1"]),
                ("label-free refine + probe", lambda r: r["label-free"]["linear_probe_macro_f1"]),
                ("partly labelled refine + probe", lambda r: r["partly"]["linear_probe_macro_f1"]),
                ("label-free refine, prototype and markers (no label used)", lambda r: scores(r["label-free"], "both")[1]),
                ("partly labelled refine, prototype and markers", lambda r: scores(r["partly"], "both")[1]),
                ("fine-tuning from pretrained", lambda r: scores(r["tuned"], "classifier")[1]),
                ("fine-tuning after label-free refine", lambda r: scores(r["label-free-tuned"], "classifier")[1]),
                ("fine-tuning from pretrained, markers beside", lambda r: scores(r["tuned"], "classifier_markers")[1]),
                ("fine-tuning after label-free refine, markers beside", lambda r: scores(r["label-free-tuned"], "classifier_markers")[1]),
                ("logistic regression, 2,000 variable genes", lambda r: method(r["baselines"], "logistic_regression", "macro_f1"))]
        counts = list(runs[0])
        for title, f in arms:
            rows.append([title] + [mean_spread([f(r[n]) for r in runs]) for n in counts])
        parts.append(f"### {name}: few labels, macro-F1\n" + table(["labels a class"] + [str(n) for n in counts], rows))
    if results.get("donors"):
        parts.append("### baron: leave one donor out (mean ± spread over donors)\n" + core_tables(list(results["donors"].values())))
    for name, arms in results.get("ablation", {}).items():
        parts.append(f"### {name}: refine with one part off\n" + frozen_rows(arms))
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
    p.add_argument("--parts", default="tune,core,few,donors,ablation")
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--few-seeds", default="0,1")
    p.add_argument("--ablation-seeds", default="0,1")
    p.add_argument("--labels", default="1,5,10,30")
    p.add_argument("--datasets", default="baron,pbmc8k")
    a = p.parse_args()
    lab, parts, names = Lab(a), a.parts.split(","), a.datasets.split(",")
    results = {"tune": {}, "core": {}, "few": {}, "donors": {}, "ablation": {}}
    seeds = list(map(int, a.seeds.split(",")))
    if "tune" in parts:
        for name in names:
            results["tune"][name] = {seed: tune(lab, name, seed) for seed in seeds[: 3 if name == "baron" else 1]}
        write_docs(lab, results)
    if set(parts) - {"tune"}:
        for name in names:
            results["core"][name] = {seed: chain(lab, f"{name}-{seed}", name, SPLIT, seed) for seed in seeds}
            write_docs(lab, results)
    if "few" in parts:
        for name in names:
            results["few"][name] = {seed: few_labels(lab, name, seed, list(map(int, a.labels.split(","))))
                                    for seed in map(int, a.few_seeds.split(","))}
            write_docs(lab, results)
    if "donors" in parts and "baron" in names:
        for donor in ("human1", "human2", "human3", "human4"):
            results["donors"][donor] = chain(lab, f"baron-{donor}", "baron", ["--holdout", f"donor={donor}"], 0, control=False)
        write_docs(lab, results)
    if "ablation" in parts:
        for name in names:
            chosen = {seed: ablation(lab, name, seed) for seed in map(int, a.ablation_seeds.split(","))}
            core = {seed: results["core"][name][seed] for seed in chosen}
            whole = {"before refine": [c["pretrained"] for c in core.values()], "refine as chosen": [c["refined"] for c in core.values()]}
            results["ablation"][name] = {**whole, **by_arm(chosen)}
    write_docs(lab, results)


if __name__ == "__main__":
    main()
