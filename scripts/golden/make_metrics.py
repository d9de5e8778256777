"""Golden values of the evaluation measures, from scikit-learn and from numpy transcriptions of scib's and LISI's formulas.

    python scripts/golden/make_metrics.py            writes tests/golden/metrics.json

Needs numpy, scipy and scikit-learn (made with 1.9). Inputs are rounded to three decimals, so that the file holds them
exactly and both sides start from the same f32 numbers.
"""
import json, os
import numpy as np, sklearn
from scipy.special import logsumexp
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (accuracy_score, adjusted_rand_score, confusion_matrix, normalized_mutual_info_score,
                             precision_recall_fscore_support, silhouette_samples, silhouette_score)
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.preprocessing import StandardScaler

rng = np.random.default_rng(20240601)
flat = lambda a: [float(v) for v in np.asarray(a, dtype=np.float64).ravel()]
ints = lambda a: [int(v) for v in np.asarray(a).ravel()]


def table(n, d, k, spread, offset=3.0):
    """n rows around k centres, far from the origin, as the embeddings of a post-LN encoder are."""
    centres = rng.normal(size=(k, d)) * spread
    y = np.concatenate([np.arange(k), rng.choice(k, n - k, p=np.arange(k, 0, -1) / (k * (k + 1) / 2))])
    x = np.round(offset + centres[y] + rng.normal(size=(n, d)), 3).astype(np.float32)
    return x, y


def classification():
    cases = []
    for truth, predicted, k in [
        (rng.integers(0, 5, 60), rng.integers(0, 5, 60), 5),
        (np.array([0, 0, 1, 1, 2]), np.array([0, 3, 1, 3, 3]), 6),       # 3 never true, 2 never predicted, 4 and 5 absent
        (np.array([2]), np.array([2]), 3),                               # one cell
        (np.zeros(4, int), np.zeros(4, int), 1),                         # one class
        (np.array([0, 0, 0]), np.array([1, 1, 1]), 2),                   # nothing right
    ]:
        labels = np.unique(np.concatenate([truth, predicted]))
        p, r, f, s = precision_recall_fscore_support(truth, predicted, labels=labels, zero_division=0)
        cases.append(dict(truth=ints(truth), predicted=ints(predicted), classes=k, labels=ints(labels), precision=flat(p), recall=flat(r),
                          f1=flat(f), support=ints(s), accuracy=float(accuracy_score(truth, predicted)), macro_f1=float(f.mean()),
                          confusion=ints(confusion_matrix(truth, predicted, labels=np.arange(k)))))
    return cases


def partitions():
    cases = []
    for a, b in [
        (rng.integers(0, 4, 50), rng.integers(0, 6, 50)),
        (np.repeat(np.arange(5), 7), np.repeat(np.arange(5), 7)[::-1]),
        (np.arange(9), np.arange(9) // 2),
        (np.zeros(6, int), np.arange(6)),
        (np.array([3]), np.array([1])),
        (np.r_[np.zeros(40, int), 1], np.r_[np.zeros(39, int), 1, 1]),
    ]:
        cases.append(dict(a=ints(a), b=ints(b), ari=float(adjusted_rand_score(a, b)), nmi=float(normalized_mutual_info_score(a, b))))
    return cases


def clusters():
    x, y = table(90, 4, 4, 4.0)
    m = KMeans(4, n_init=10, random_state=0).fit(x.astype(np.float64))
    return dict(x=flat(x), width=4, labels=ints(m.labels_), inertia=float(m.inertia_))


def silhouettes():
    x, y = table(75, 3, 4, 1.5)
    y[-1] = 7                                                            # a class of one cell
    out = dict(x=flat(x), width=3, y=ints(y))
    for metric in ("cosine", "euclidean"):
        out[metric] = flat(silhouette_samples(x.astype(np.float64), y, metric=metric))
        out[metric + "_mean"] = float(silhouette_score(x.astype(np.float64), y, metric=metric))
    within = sum(((x[y == c].astype(np.float64) - x[y == c].astype(np.float64).mean(0)) ** 2).sum() for c in np.unique(y))
    total = ((x.astype(np.float64) - x.astype(np.float64).mean(0)) ** 2).sum()
    out["nc1"] = float(within / (total - within))
    return out


def probes():
    """The optimum itself: tol far below what predictions need, so that no solver's stopping rule is in the numbers."""
    cases = []
    for k, c, balanced in [(4, 0.1, False), (4, 1.0, True), (2, 0.1, False), (2, 0.5, True)]:
        x, y = table(120, 5, k, 1.0)
        t, _ = table(40, 5, k, 1.0)
        x[:, 4] = 2.5 if k == 4 and not balanced else x[:, 4]            # a constant column
        scaler = StandardScaler().fit(x.astype(np.float64))
        fit = LogisticRegression(C=c, tol=1e-12, max_iter=100_000, class_weight="balanced" if balanced else None)
        fit.fit(scaler.transform(x.astype(np.float64)), y)
        z = scaler.transform(t.astype(np.float64))
        logits = z @ fit.coef_.T + fit.intercept_
        if k == 2:                                                       # one logit: log-odds of class 1
            logits = np.c_[-logits / 2, logits / 2]
        cases.append(dict(x=flat(x), width=5, y=ints(y), test=flat(t), c=c, balanced=balanced, coef=flat(fit.coef_), intercept=flat(fit.intercept_),
                          predictions=ints(fit.predict(z)), log_probability=flat(logits - logsumexp(logits, axis=1, keepdims=True))))
    return cases


def neighbours():
    x, y = table(80, 4, 5, 0.8)
    t, _ = table(50, 4, 5, 0.8)
    out = dict(x=flat(x), width=4, y=ints(y), test=flat(t), classes=5, cases=[])
    m = x.astype(np.float64).mean(0)
    unit = lambda a: (lambda b: b / np.linalg.norm(b, axis=1, keepdims=True))(a.astype(np.float64) - m)
    for k in (1, 4, 15, 80):
        fit = KNeighborsClassifier(k, algorithm="brute").fit(unit(x), y)
        out["cases"].append(dict(k=k, predictions=ints(fit.predict(unit(t))), nearest=ints(fit.kneighbors(unit(t), return_distance=False))))
    return out


def perplexity_weights(d, perplexity, tol=1e-5):
    """The bisection of compute_simpson in LISI (Korsunsky et al. 2019): weights exp(-beta d) of the distances as they are."""
    beta, lo, hi, target = 1.0, -np.inf, np.inf, np.log(perplexity)
    for _ in range(51):
        p = np.exp(-d * beta)
        h = np.log(p.sum()) + beta * (d * p).sum() / p.sum()
        if abs(h - target) < tol:
            break
        if h > target:
            lo = beta
            beta = (beta + hi) / 2 if np.isfinite(hi) else beta * 2
        else:
            hi = beta
            beta = (beta + lo) / 2 if np.isfinite(lo) else beta / 2
    return p / p.sum()


def mixing():
    x, y = table(150, 3, 3, 2.0)
    b = rng.integers(0, 3, 150)
    b[y == 2] = 0                                                        # a type within one batch: left out of batch-ASW
    x = np.round(x + 0.6 * np.eye(3)[b], 3).astype(np.float32)
    x64 = x.astype(np.float64)
    per_type = []
    for c in np.unique(y):                                               # scib.metrics.silhouette_batch
        cells = y == c
        if len(np.unique(b[cells])) in (1, cells.sum()):
            continue
        per_type.append(np.mean(1 - np.abs(silhouette_samples(x64[cells], b[cells], metric="euclidean"))))
    perplexity = 20
    d, i = NearestNeighbors(n_neighbors=3 * perplexity, algorithm="brute").fit(x64).kneighbors(x64)
    d, i = d[:, 1:], i[:, 1:]                                            # the cell itself
    lisi = []
    for row, index in zip(d, i):
        w = perplexity_weights(row, perplexity)
        lisi.append(1 / sum(w[b[index] == k].sum() ** 2 for k in range(3)))
    return dict(x=flat(x), width=3, y=ints(y), batch=ints(b), batch_asw=float(np.mean(per_type)), perplexity=perplexity, lisi=flat(lisi))


def recall():
    s = np.round(rng.normal(size=(40, 6)), 2).astype(np.float32)
    y = rng.integers(0, 5, 40)                                           # class 5 has no cell
    order = np.argsort(-s, axis=1, kind="stable")
    out = dict(scores=flat(s), columns=6, y=ints(y), k=[1, 3, 5, 10], micro=[], macro=[])
    for k in out["k"]:
        hit = (order[:, :k] == y[:, None]).any(1)
        out["micro"].append(float(hit.mean()))
        out["macro"].append(float(np.mean([hit[y == c].mean() for c in np.unique(y)])))
    return out


golden = dict(made_with=f"scikit-learn {sklearn.__version__}, numpy {np.__version__}", classification=classification(), partitions=partitions(),
              clusters=clusters(), silhouettes=silhouettes(), probes=probes(), neighbours=neighbours(), mixing=mixing(), recall=recall())
path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "tests", "golden", "metrics.json")
shorten = lambda v: [shorten(x) for x in v] if isinstance(v, list) else {k: shorten(x) for k, x in v.items()} if isinstance(v, dict) \
    else float(f"{v:.12g}") if isinstance(v, float) else v
os.makedirs(os.path.dirname(path), exist_ok=True)
with open(path, "w") as f:
    f.write("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(shorten(v), separators=(',', ':'))}" for k, v in golden.items()) + "\n}\n")
print(os.path.getsize(path), "bytes")
