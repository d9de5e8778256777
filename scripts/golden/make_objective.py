"""Golden values of the refine objective: the same terms written with torch and differentiated by autograd.

    python scripts/golden/make_objective.py          # writes tests/golden/objective.json

Needs numpy and torch (any version). Each case holds its inputs, so that the test draws nothing itself. All in f64.
"""

import json
import pathlib

import numpy as np
import torch
import torch.nn.functional as F

torch.set_default_dtype(torch.float64)
CELLS, WIDTH, TYPES, TABLE = 12, 6, 4, 20


def effective_number_weights(n, beta):
    if not beta:
        return torch.ones(len(n))
    n = np.maximum(n, 1)
    w = (1 - beta) / (1 - beta**n)
    return torch.tensor(w / w.mean())


def refine_loss(c, h, q, batch):
    """The terms on cell vectors; returns them unweighted, and their weighted sum."""
    teacher = torch.tensor(c["teacher"])
    labels, scores = np.array(c["labels"]), torch.tensor(c["scores"])
    start, jaccard = torch.tensor(c["prototypes"]), torch.tensor(c["jaccard"])
    o = c["objective"]
    center = teacher.mean(0) if o["center"] else torch.zeros(WIDTH)
    unit = lambda x: F.normalize(x - center, dim=-1)

    soft = torch.softmax(scores / o["tau_marker"], 1)
    labelled = torch.tensor(labels >= 0)
    hot = F.one_hot(torch.tensor(np.maximum(labels, 0)), TYPES).double()
    target = torch.where(labelled[:, None], hot, soft)
    guess = target.argmax(1)
    kept = labelled | (target.max(1).values >= o["confidence"])
    n = np.bincount(guess[kept].numpy(), minlength=TYPES)
    weight = effective_number_weights(n, o["beta"])
    margin = o["margin"] * np.maximum(n, 1) ** -0.25 / (np.maximum(n, 1) ** -0.25).max()
    bias = o["logit_adjustment"] * torch.log(torch.tensor(np.maximum(n, 1) / np.maximum(n, 1).sum()))
    overlap = torch.softmax(jaccard / o["tau_overlap"] - 1e9 * torch.eye(TYPES), 1)

    y, ok, hot = guess[batch], kept[batch], target[batch]
    z, p, z0, p0 = unit(h), unit(q), unit(teacher[batch]), unit(start)
    terms = {}

    t = (1 - o["epsilon"] - o["delta"]) * hot + o["epsilon"] * (hot @ overlap)
    t = t + o["delta"] * torch.softmax(z0 @ p0.T / o["tau"], 1)
    s = (z @ p.T - torch.tensor(margin) * F.one_hot(y, TYPES)) / o["tau"] + bias
    w = weight[y] * ok
    terms["proto"] = (w * (torch.logsumexp(s, 1) - (t * s).sum(1))).sum() / w.sum().clamp(min=1e-6)

    size = len(batch)
    s = z @ z.T / o["tau_cell"]
    eye = torch.eye(size, dtype=torch.bool)
    positive = (y[:, None] == y[None]) & ~eye & ok[:, None] & ok[None]
    in_batch = torch.bincount(y, minlength=TYPES)[y].double()
    balanced = s - torch.log((in_batch[None] - positive.double()).clamp(min=1))
    log_p = s - torch.logsumexp(balanced.masked_fill(eye, -1e9), 1, keepdim=True)
    has = positive.any(1)
    terms["cell_cell"] = -((log_p * positive).sum(1)[has] / positive.sum(1)[has]).sum() / size

    wanted = o["overlap_low"] + (o["overlap_high"] - o["overlap_low"]) * jaccard
    terms["structure"] = ((p @ p.T - wanted)[~torch.eye(TYPES, dtype=torch.bool)] ** 2).mean()
    terms["anchor"] = (1 - (z * z0).sum(1)).mean() + o["prototype_anchor"] * (1 - (p * p0).sum(1)).mean()
    return terms, sum(o[k] * v for k, v in terms.items())


def case(name, seed, labels, **objective):
    rng = np.random.default_rng(seed)
    round4 = lambda x: np.round(x, 4).tolist()
    overlap = rng.uniform(0, 0.6, (TYPES, TYPES))
    overlap = (overlap + overlap.T) / 2
    np.fill_diagonal(overlap, 1)
    mean = rng.normal(0, 2, WIDTH)
    c = dict(
        name=name,
        labels=[int(x) for x in labels(rng)],
        scores=round4(rng.normal(0, 1.5, (TABLE, TYPES))),
        # Multiples of 1/64, exact in half precision: the product keeps the teacher's table in f16.
        teacher=(np.round((mean + rng.normal(0, 1, (TABLE, WIDTH))) * 64) / 64).tolist(),
        prototypes=round4(mean + rng.normal(0, 1, (TYPES, WIDTH))),
        jaccard=round4(overlap),
        batch=[int(x) for x in rng.choice(TABLE, CELLS, replace=False)],
        h=round4(mean + rng.normal(0, 1, (CELLS, WIDTH))),
        q=round4(mean + rng.normal(0, 1, (TYPES, WIDTH))),
    )
    o = dict(proto=1.0, cell_cell=0.3, structure=0.1, anchor=0.1, tau=0.07, tau_cell=0.1, epsilon=0.05, delta=0.2,
             tau_overlap=0.1, beta=0.999, margin=0.0, logit_adjustment=0.0, tau_marker=1.0, confidence=0.5,
             overlap_low=0.0, overlap_high=0.8, prototype_anchor=1.0, center=True)
    c["objective"] = o | objective | dict(target_entries=TYPES)
    h, q = (torch.tensor(c[k], requires_grad=True) for k in "hq")
    terms, total = refine_loss(c, h, q, torch.tensor(c["batch"]))
    total.backward()
    c["losses"] = {k: v.item() for k, v in terms.items()} | dict(total=total.item())
    c["dh"], c["dq"] = h.grad.tolist(), q.grad.tolist()
    return c


cases = [
    case("labelled, defaults", 0, lambda r: r.integers(0, TYPES, TABLE)),
    case("label-free, defaults", 1, lambda r: np.full(TABLE, -1)),
    case("partly labelled, every option", 2, lambda r: np.where(r.random(TABLE) < 0.4, r.integers(0, TYPES, TABLE), -1),
         proto=0.7, cell_cell=0.5, structure=2.0, anchor=0.4, tau=0.2, tau_cell=0.3, epsilon=0.1, delta=0.3, beta=0.9,
         margin=0.2, logit_adjustment=1.0, tau_marker=0.5, confidence=0.6, overlap_low=-0.1, prototype_anchor=0.5),
    case("labelled, not centred", 3, lambda r: r.integers(0, TYPES, TABLE), center=False),
]
out = pathlib.Path(__file__).resolve().parents[2] / "tests/golden/objective.json"
out.write_text(json.dumps(cases, indent=None, separators=(",", ":")) + "\n")
print(out, out.stat().st_size, "bytes", [c["losses"] for c in cases])
