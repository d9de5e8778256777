"""The prototype loss in PyTorch, eager and compiled, beside ours: unit rows in bf16, logits in f32, temperature, a margin on the label's
column; loss and both gradients.

    loss = Σ_i κ_i (logsumexp_k s_ik - s_iy),   s_ik = (z_i · p_k - m [k = y_i]) / τ
"""
from peer_timing import Comparison, median, rows

SCALE, MARGIN = 1 / 0.07, 0.2
# (name, engine, rows, columns, width, compile mode): the large sizes for torch.compile, the small one where launches count.
CASES = [
    ("prototype_loss/compile", "torch.compile", 4096, 10_000, 256, "default"),
    ("prototype_loss/compile", "torch.compile", 8192, 100_000, 256, "default"),
    ("prototype_loss/compile_small", "torch.compile, reduce-overhead", 256, 100, 256, "reduce-overhead"),
    ("prototype_loss/eager", "eager", 256, 100, 256, None),
    ("prototype_loss/eager_large", "eager", 4096, 10_000, 256, None),
]
DRY_CASES = [
    ("prototype_loss/compile", "torch.compile", 33, 70, 32, "default"),
    ("prototype_loss/eager", "eager", 9, 5, 32, None),
]


def loss_of(torch):
    def loss(z, p, label, weight):
        logits = (z @ p.t()).float()
        logits = logits.scatter_add(1, label[:, None], torch.full_like(label[:, None], -MARGIN, dtype=torch.float32)) * SCALE
        picked = logits.gather(1, label[:, None])[:, 0]
        return (weight * (torch.logsumexp(logits, 1) - picked)).sum()

    return loss


def prepare(torch, device, size, mode):
    """A call that makes the loss and both gradients; its loss is held against f64 first."""
    count, columns, width = size
    unit = torch.nn.functional.normalize
    z = unit(torch.randn(count, width, device=device), dim=1).bfloat16().requires_grad_()
    p = unit(torch.randn(columns, width, device=device), dim=1).bfloat16().requires_grad_()
    label = torch.randint(0, columns, (count,), device=device)
    weight = torch.full((count,), 1 / count, device=device)
    eager = loss_of(torch)
    call = eager if mode is None or device == "cpu" else torch.compile(eager, mode=mode)

    def step():
        value = call(z, p, label, weight)
        return value, torch.autograd.grad(value, (z, p))

    some = slice(0, min(count, 512))
    with torch.no_grad():
        logits = z[some].double() @ p.double().t()
        logits[torch.arange(logits.shape[0]), label[some]] -= MARGIN
        logits *= SCALE
        wanted = (torch.logsumexp(logits, 1) - logits[torch.arange(logits.shape[0]), label[some]]).mean()
        got = eager(z[some], p, label[some], torch.full_like(weight[some], 1 / logits.shape[0]))
    # bf16 logits before they are widened: a third digit at a scale of 14.
    error = abs(got.item() - wanted.item()) / abs(wanted.item())
    if not error < 0.02:
        raise ArithmeticError(f"its loss is {error:.3g} from f64")
    return step, error


def run(torch, ours, clock, rounds, samples, dry_run, emit, time_left):
    device = "cuda" if clock.gpu else "cpu"
    cases = DRY_CASES if dry_run else CASES
    jobs = []
    for name, engine, *size, mode in cases:
        c = Comparison(name, "x".join(map(str, size)), engine=engine)
        step = None
        try:
            if time_left() < 15:
                raise TimeoutError("no time was left")
            step, c.max_err = prepare(torch, device, size, mode)
        except Exception as error:
            c.skip(error)
        jobs.append((c, step))
    preset = ["tiny", "--vocab", "300"] if dry_run else ["gf-v1-10m"]
    shapes = [f for shape in dict.fromkeys(c.shape for c, _ in jobs) for f in ("--only", f"ward {shape}")]
    for turn in range(rounds):
        if turn and time_left() < 20:
            break
        report = ours.bench("kernels", "--preset", *preset, "--sweep", "--lengths", "lognormal:60,0.4", "--tokens", "300", *shapes)
        for c, step in jobs:
            if step is None:
                continue
            mine = [rows(report, f"prototype_loss_{d}", c.shape)[0] for d in ("forward", "backward")]
            # A few launches' work is timed in a graph, as a training step would replay it; the peer's is what reduce-overhead does.
            small = all(r.get("graph_ms") for r in mine)
            each = [r["graph_ms"] if small else r["ms_median"] for r in mine]
            c.note = "ours replayed from a graph, both passes; not with a cold cache" if small else ""
            try:
                theirs = median(clock.samples(step, samples, cold=not small))
            except Exception as error:
                c.skip(error)
                continue
            c.ours.append(sum(each) if None not in each else None)
            c.peer.append(theirs)
            c.clocks.append((mine[0].get("sm_mhz"), clock.sm_mhz()))
    for c, _ in jobs:
        emit(c)
