"""Plain methods on the split of a run: what `docs/results.md` shows beside the encoder.

    python scripts/baselines.py cells.h5ad --label cell_type --split RUN/split.tsv --vocab V.tsv [--markers M.gmt] > baselines.json

| method | settings |
|---|---|
| logistic_regression | log1p(counts / total * 10,000); the 2,000 most variable genes of the training cells; C of 0.1, 1, 10 by macro-F1 on a quarter of the labelled training cells |
| logistic_regression_all | the same without choosing genes |
| knn_pca | kNN (15) on 50 principal components of those 2,000 genes, fitted on the training cells |
| marker_score_derived | no model: sets derived one versus rest on the labelled training cells, scored on rank tokens; each type's score over its best among the training cells; the highest wins |
| marker_score | the same with the sets of --markers |

`--split` is the `split.tsv` of a run folder: columns cell_id, part (train, val, test), label (empty for a training cell whose label is
hidden). Validation cells are left alone. Without it a stratified draw is made (--test, --seed). `--labels-per-class N` draws N
labelled cells a class from the training cells where the file names none. Genes are chosen, components fitted and scores scaled on all
training cells, labelled or not; nothing sees a test cell. Prints one JSON object: per method accuracy, macro_f1, head_f1, medium_f1,
tail_f1 (by share of the training cells), per_class, and recall_at where there are scores.

Needs numpy, scipy, scikit-learn, anndata.
"""
import argparse, json, sys, time
import numpy as np, scipy.sparse as sp


def parse():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("h5ad", help="raw counts in X")
    p.add_argument("--label", required=True)
    p.add_argument("--exclude", action="append", default=[], metavar="VALUE", help="label values left out (repeat)")
    p.add_argument("--split", metavar="FILE")
    p.add_argument("--test", type=float, default=0.33)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--labels-per-class", type=int, default=0, metavar="N")
    p.add_argument("--vocab", metavar="V.tsv", help="medians for the rank tokens of the marker scores")
    p.add_argument("--genes", metavar="COL", help="var column that holds the vocabulary's gene ids; default: the index or column that matches best")
    p.add_argument("--markers", metavar="M.gmt", help="marker sets by gene symbol or id")
    p.add_argument("--marker-map", metavar="FILE", help="TSV: label, set name")
    p.add_argument("--variable-genes", type=int, default=2000)
    p.add_argument("--components", type=int, default=50)
    p.add_argument("--neighbours", type=int, default=15)
    p.add_argument("--c", type=float, default=0.0, help="inverse L2 strength of the logistic regressions; default: chosen within the training cells")
    p.add_argument("--methods", default="", help="comma-separated; default: all that apply")
    return p.parse_args()


# ------------------------------------------------------------------------------------------------------------------ data
def load(a):
    import anndata
    data = anndata.read_h5ad(a.h5ad)
    if a.label not in data.obs:
        sys.exit(f"no obs column {a.label!r} in {a.h5ad}; there are {', '.join(data.obs.columns)}")
    label = data.obs[a.label]
    keep = label.notna().values & ~label.astype(str).isin(a.exclude).values
    x = sp.csr_matrix(data.X)[keep].astype(np.float64)
    if (x.data < 0).any() or (x.data != np.round(x.data)).any():
        sys.exit(f"{a.h5ad}:X holds no raw counts")
    classes, y = np.unique(label[keep].astype(str).values, return_inverse=True)
    return x, np.asarray(data.obs_names.astype(str))[keep], data.var, classes, y


def split(a, ids, y):
    """Row numbers of the training cells, of those whose labels count, and of the test cells."""
    rng = np.random.default_rng(a.seed)
    labelled = None
    if a.split:
        lines = [l.rstrip("\n").split("\t") for l in open(a.split, encoding="utf-8")]
        row = {c: i for i, c in enumerate(ids)}
        if len(row) != len(ids) or lines[0] != ["cell_id", "part", "label"]:
            sys.exit("cell ids repeat, or --split has other columns than cell_id, part, label")
        missing = [l[0] for l in lines[1:] if l[1] != "val" and l[2] and l[0] not in row]
        if missing:
            sys.exit(f"{len(missing)} cells of {a.split} are not in {a.h5ad} (first: {missing[0]}); is --exclude the run's?")
        part = lambda name, known=False: np.array([row[l[0]] for l in lines[1:] if l[1] == name and l[0] in row and (l[2] or not known)])
        train, labelled, test = part("train"), part("train", True), part("test")
    else:
        from sklearn.model_selection import train_test_split
        train, test = train_test_split(np.arange(len(y)), test_size=a.test, stratify=y, random_state=a.seed)
    if labelled is None:
        labelled = train
        if a.labels_per_class:
            pick = [rng.permutation(train[y[train] == c])[: a.labels_per_class] for c in np.unique(y[train])]
            labelled = np.concatenate(pick)
    return np.sort(train), np.sort(labelled), np.sort(test)


def text_columns(var):
    return [c for c in var.columns if var[c].dtype.kind not in "biufc"]


def lognorm(x):
    total = np.asarray(x.sum(1)).ravel()
    z = (sp.diags(1e4 / np.maximum(total, 1)) @ x).tocsr()
    z.data = np.log1p(z.data)
    return z


def moments(z):
    mean = np.asarray(z.mean(0)).ravel()
    return mean, np.maximum(np.asarray(z.multiply(z).mean(0)).ravel() - mean**2, 0)


def variable_genes(z, count):
    """Dispersion of the normalised counts, standardised within 20 bins of mean expression (Satija et al. 2015)."""
    e = z.copy()
    e.data = np.expm1(e.data)
    mean, var = moments(e)
    n = z.shape[0]
    dispersion = np.where(mean > 0, var * n / max(n - 1, 1) / np.maximum(mean, 1e-12), np.nan)
    with np.errstate(divide="ignore"):
        log_dispersion = np.log(dispersion)
    log_dispersion[~np.isfinite(log_dispersion)] = np.nan
    m = np.log1p(mean)
    bins = np.clip(np.digitize(m, np.linspace(m.min(), m.max() + 1e-9, 21)) - 1, 0, 19)
    score = np.full(len(m), -np.inf)
    for b in range(20):
        inside = (bins == b) & ~np.isnan(log_dispersion)
        if inside.sum() == 0:
            continue
        centre, spread = log_dispersion[inside].mean(), log_dispersion[inside].std(ddof=1) if inside.sum() > 1 else 0.0
        # A bin of one gene has no spread of its own: its score is 1, as in the original.
        score[inside] = (log_dispersion[inside] - centre) / spread if spread > 0 else 1.0
    return np.sort(np.argsort(-score, kind="stable")[:count])


def regression(c):
    from sklearn.linear_model import LogisticRegression
    return LogisticRegression(C=c, max_iter=500, tol=1e-3)


def choose_c(z, y, seed, candidates=(0.1, 1.0, 10.0)):
    """Highest macro-F1 on a stratified quarter of the labelled training cells; 1 where most classes have fewer than four."""
    from sklearn.metrics import f1_score
    counts = np.bincount(y)
    if np.median(counts[counts > 0]) < 4:
        return 1.0
    held = np.zeros(len(y), bool)
    rng = np.random.default_rng(seed)
    for c in np.unique(y):
        cells = np.flatnonzero(y == c)
        held[rng.permutation(cells)[: max(1, len(cells) // 4) if len(cells) > 1 else 0]] = True
    return max(candidates, key=lambda c: f1_score(y[held], regression(c).fit(z[~held], y[~held]).predict(z[held]), average="macro"))


# --------------------------------------------------------------------------------------------------------------- markers
def derive(z, y, classes, top=50):
    """One versus rest: Welch-like statistic times the class's share of the mean. -> [(genes, weights)] per class."""
    k = len(classes)
    n = np.bincount(y, minlength=k)
    mean, var, detected = np.zeros((k, z.shape[1])), np.zeros((k, z.shape[1])), np.zeros((k, z.shape[1]))
    for c in np.flatnonzero(n):
        mean[c], var[c] = moments(z[y == c])
        detected[c] = np.asarray((z[y == c] > 0).mean(0)).ravel()
    sets = []
    for c in range(k):
        rest = np.flatnonzero((np.arange(k) != c) & (n > 0))
        if n[c] == 0 or len(rest) == 0:
            sets.append((np.array([], int), np.array([])))
            continue
        w = n[rest] / n[rest].sum()
        mo = w @ mean[rest]
        vo = w @ (var[rest] + mean[rest] ** 2) - mo**2
        t = (mean[c] - mo) / np.sqrt((var[c] + 0.1) / n[c] + (vo + 0.01) / n[rest].sum())
        s = np.where((detected[c] >= 0.25) & (mean[c] > mo), t * mean[c] / (mean.sum(0) + 1e-6), 0)
        g = np.argsort(-s, kind="stable")[:top]
        g = g[s[g] > 0]
        sets.append((g, s[g] / s[g].sum() if len(g) else s[g]))
    return sets


def read_sets(a, var, classes):
    names = [np.asarray(var.index.astype(str))] + [var[c].astype(str).values for c in text_columns(var)]
    file = {}
    for line in open(a.markers, encoding="utf-8"):
        parts = line.rstrip("\r\n").split("\t")
        if len(parts) > 2:
            file[parts[0]] = parts[2:]
    genes = {g for s in file.values() for g in s}
    column = max(names, key=lambda n: len(genes & set(n)))
    index = {}
    for j, g in enumerate(column):
        index.setdefault(g, j)
    table = dict(l.rstrip("\r\n").split("\t")[:2] for l in open(a.marker_map) if "\t" in l) if a.marker_map else {}
    plain = lambda s: "".join(ch for ch in s.lower() if ch.isalnum())
    by_plain = {plain(k): k for k in file}
    chosen = []
    for c in classes:
        name = table.get(c) or by_plain.get(plain(c))
        if name not in file:
            sys.exit(f"no marker set for label {c!r} in {a.markers}; give --marker-map")
        chosen.append(sorted({index[g] for g in file[name] if g in index}))
    in_sets = np.bincount(np.concatenate([np.array(g, int) for g in chosen]), minlength=len(column))
    sets = []
    for g in chosen:
        w = np.log((1 + len(chosen)) / in_sets[g])
        sets.append((np.array(g, int), w / w.sum()))
    return sets


def rank_tokens(a, x, var):
    """Per cell the columns of its vocabulary genes, best rank first (at most 512 matter), and min(L, 512)."""
    median = {}
    for line in open(a.vocab, encoding="utf-8"):
        if not line.startswith(("#", "token\t")):
            f = line.rstrip("\n").split("\t")
            if not f[0].startswith("<"):
                median[f[0]] = float(f[2])
    bare = lambda n: [g.split(".")[0] if g.startswith("ENS") else g for g in n]
    columns = [a.genes] if a.genes else [None] + text_columns(var)
    names = max((bare(var.index.astype(str) if c is None else var[c].astype(str).values) for c in columns), key=lambda n: len(set(n) & set(median)))
    m = np.array([median.get(g, 0.0) for g in names])
    total = np.asarray(x.sum(1)).ravel()
    keep = np.flatnonzero(m > 0)
    s = x[:, keep].tocsr()
    s.sort_indices()
    cells = []
    for i in range(s.shape[0]):
        lo, hi = s.indptr[i], s.indptr[i + 1]
        g = keep[s.indices[lo:hi]]
        v = s.data[lo:hi] / total[i] * 10_000 / m[g]
        g, v = g[v > 0], v[v > 0]
        cells.append((g[np.argsort(-v, kind="stable")], len(v)))
    return cells


def marker_scores(cells, sets, columns):
    """u_ik = sum of a_kg max(0, 1 - rank / R), R = min(L, 512)."""
    weight = np.zeros((columns, len(sets)))
    for k, (g, w) in enumerate(sets):
        weight[g, k] = w
    u = np.zeros((len(cells), len(sets)))
    for i, (g, length) in enumerate(cells):
        r = min(length, 512)
        if r:
            u[i] = np.maximum(0, 1 - np.arange(r) / r) @ weight[g[:r]]
    return u


# ---------------------------------------------------------------------------------------------------------------- scores
def scores(truth, predicted, y_train, classes):
    from sklearn.metrics import accuracy_score, f1_score
    k = len(classes)
    f = f1_score(truth, predicted, labels=np.arange(k), average=None, zero_division=0)
    present = np.union1d(truth, predicted)
    share = np.bincount(y_train, minlength=k) / len(y_train)
    group = lambda mask: (lambda ix: float(f[ix].mean()) if len(ix) else None)([c for c in present if mask[c]])
    support = np.bincount(truth, minlength=k)
    return dict(accuracy=float(accuracy_score(truth, predicted)), macro_f1=float(f[present].mean()), head_f1=group(share >= 0.10),
                medium_f1=group((share < 0.10) & (share >= 0.02)), tail_f1=group(share < 0.02),
                per_class={str(classes[c]): dict(f1=float(f[c]), support=int(support[c])) for c in present})


def recall(s, y, ks=(1, 3, 5, 10)):
    order = np.argsort(-s, axis=1, kind="stable")
    hit = {k: (order[:, :k] == y[:, None]).any(1) for k in ks}
    return dict(recall_at={str(k): float(h.mean()) for k, h in hit.items()},
                macro_recall_at={str(k): float(np.mean([h[y == c].mean() for c in np.unique(y)])) for k, h in hit.items()})


def main():
    a = parse()
    from sklearn.decomposition import PCA
    from sklearn.neighbors import KNeighborsClassifier
    x, ids, var, classes, y = load(a)
    train, labelled, test = split(a, ids, y)
    z = lognorm(x)
    wanted = [m for m in a.methods.split(",") if m]
    doing = lambda name: not wanted or name in wanted
    out = {}

    def record(name, predicted, seconds, extra=None):
        # Head and tail are shares of all training cells, however few of them carry a label.
        out[name] = dict(scores(y[test], predicted, y[train], classes), **(extra or {}), seconds=round(seconds, 2))

    genes = variable_genes(z[train], a.variable_genes)
    for name, columns in (("logistic_regression", genes), ("logistic_regression_all", np.flatnonzero(np.asarray(x[train].sum(0)).ravel() > 0))):
        if doing(name):
            t = time.perf_counter()
            rows = lambda r: z[r][:, columns].toarray().astype(np.float32) if len(columns) <= 5000 else z[r][:, columns]
            known = rows(labelled)
            c = a.c or choose_c(known, y[labelled], a.seed)
            record(name, regression(c).fit(known, y[labelled]).predict(rows(test)), time.perf_counter() - t, dict(c=c))
    if doing("knn_pca"):
        t = time.perf_counter()
        dense = lambda rows: z[rows][:, genes].toarray()
        pca = PCA(min(a.components, len(train) - 1, len(genes)), svd_solver="randomized", random_state=a.seed).fit(dense(train))
        fit = KNeighborsClassifier(min(a.neighbours, len(labelled))).fit(pca.transform(dense(labelled)), y[labelled])
        record("knn_pca", fit.predict(pca.transform(dense(test))), time.perf_counter() - t)
    if a.vocab and (doing("marker_score_derived") or doing("marker_score")):
        cells = rank_tokens(a, x, var)
        todo = [("marker_score_derived", lambda: derive(z[labelled], y[labelled], classes))]
        if a.markers:
            todo.append(("marker_score", lambda: read_sets(a, var, classes)))
        for name, make in todo:
            if doing(name):
                t = time.perf_counter()
                u = marker_scores(cells, make(), x.shape[1])
                u = u / np.maximum(u[train].max(0), 1e-6)
                record(name, u[test].argmax(1), time.perf_counter() - t, recall(u[test], y[test]))
    json.dump(dict(h5ad=a.h5ad.split("/")[-1], label=a.label, cells=dict(train=len(train), labelled=len(labelled), test=len(test)),
                   thresholds=dict(head=0.10, tail=0.02), methods=out), sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
