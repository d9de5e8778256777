"""PyTorch's attention beside ours: scaled_dot_product_attention as it chooses, by flash and by cuDNN, on cells of one length; on
cells of real lengths padded to the context and packed; FlexAttention for the marker-sparse pattern.

Ours is `gene_attention` on packed cells throughout. Each peer gets its inputs laid out as it likes best, before the clock starts, and
its output is held against f32 attention of a few cells."""
import contextlib

from peer_timing import Comparison, median, rows

TOLERANCE = 0.05


class Cells:
    """Random packed q, k, v and do, [N, H, K]."""

    def __init__(self, torch, lengths, heads, width, device):
        self.torch, self.lengths, self.heads, self.width, self.device = torch, lengths, heads, width, device
        shape = (sum(lengths), heads, width)
        self.packed = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4)]
        ends = torch.tensor([0] + lengths).cumsum(0)
        self.starts = ends.to(device, torch.int32)

    def reference(self, mask=None):
        """f32 attention of the first and the last cell: [(token range, output)]."""
        ends = self.starts.tolist()
        found = []
        for cell in {0, len(self.lengths) - 1}:
            tokens = slice(ends[cell], ends[cell + 1])
            q, k, v = (x[tokens].float().transpose(0, 1) for x in self.packed[:3])
            scores = q @ k.transpose(1, 2) / self.width**0.5
            if mask is not None:
                scores = scores.masked_fill(~mask(ends[cell], ends[cell + 1]), float("-inf"))
            found.append((tokens, (scores.softmax(-1) @ v).transpose(0, 1)))
        return found


class Peer:
    """Inputs as the peer likes them, its call, and how its output is packed again."""

    def __init__(self, inputs, gradient, call, pack):
        self.inputs, self.gradient, self.call, self.pack = [x.detach().requires_grad_() for x in inputs], gradient, call, pack

    def directions(self, torch):
        """(forward, backward) as calls without arguments."""
        def forward():
            with torch.no_grad():
                return self.call(*self.inputs)

        output = self.call(*self.inputs)
        return forward, lambda: torch.autograd.grad(output, self.inputs, self.gradient, retain_graph=True)

    def error(self, torch, reference):
        with torch.no_grad():
            output = self.pack(self.call(*self.inputs)).float()
        return max((output[tokens] - wanted).abs().max().item() for tokens, wanted in reference)


def equal(cells, backend=None):
    """[C, H, L, K], no mask: every cell has one length."""
    torch = cells.torch
    sdpa = torch.nn.functional.scaled_dot_product_attention
    count, length = len(cells.lengths), cells.lengths[0]
    lay = lambda x: x.view(count, length, cells.heads, cells.width).transpose(1, 2).contiguous()

    def call(q, k, v):
        with chosen(torch, backend):
            return sdpa(q, k, v)

    *inputs, gradient = (lay(x) for x in cells.packed)
    return Peer(inputs, gradient, call, lambda o: o.transpose(1, 2).reshape(-1, cells.heads, cells.width))


def chosen(torch, backend):
    if backend is None:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, backend))


def padded(cells, context):
    """[C, H, context, K] and a mask of the keys."""
    torch = cells.torch
    count = len(cells.lengths)
    real = torch.arange(context)[None] < torch.tensor(cells.lengths)[:, None]
    real = real.to(cells.device)
    mask = real[:, None, None, :]

    def lay(x):
        wide = torch.zeros(count, context, cells.heads, cells.width, device=x.device, dtype=x.dtype)
        wide[real] = x
        return wide.transpose(1, 2).contiguous()

    sdpa = torch.nn.functional.scaled_dot_product_attention
    *inputs, gradient = (lay(x) for x in cells.packed)
    return Peer(inputs, gradient, lambda q, k, v: sdpa(q, k, v, attn_mask=mask), lambda o: o.transpose(1, 2)[real])


def nested(cells):
    """Jagged nested tensors: what SDPA takes for cells of different lengths."""
    torch = cells.torch
    sdpa = torch.nn.functional.scaled_dot_product_attention
    offsets = cells.starts.to(torch.int64)

    def call(*packed):
        jagged = [torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=min(cells.lengths), max_seqlen=max(cells.lengths))
                  .transpose(1, 2) for x in packed]
        return sdpa(*jagged).transpose(1, 2).values()

    *inputs, gradient = cells.packed
    return Peer(inputs, gradient, call, lambda o: o)


def varlen(cells):
    """PyTorch's own variable-length flash attention."""
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = cells.starts, max(cells.lengths)
    *inputs, gradient = cells.packed
    return Peer(inputs, gradient, lambda q, k, v: varlen_attn(q, k, v, starts, starts, longest, longest), lambda o: o)


def flash3(cells):
    """FlashAttention-3, where its package is there."""
    from flash_attn_interface import flash_attn_varlen_func

    starts, longest = cells.starts, max(cells.lengths)

    def call(q, k, v):
        output = flash_attn_varlen_func(q, k, v, starts, starts, longest, longest)
        return output[0] if isinstance(output, tuple) else output

    *inputs, gradient = cells.packed
    return Peer(inputs, gradient, call, lambda o: o)


def flex(cells, window, every=40):
    """Every `every`-th token attends to and is attended by all of its cell, others within `window`."""
    torch = cells.torch
    import torch._functorch.config as functorch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # The graph is kept between timed backward passes.
    functorch.donated_buffer = False
    tokens = sum(cells.lengths)
    cell = torch.repeat_interleave(torch.arange(len(cells.lengths)), torch.tensor(cells.lengths)).to(cells.device)

    def pair(batch, head, i, j):
        near = (i % every == 0) | (j % every == 0) | ((i - j).abs() <= window)
        return (cell[i] == cell[j]) & near

    gpu = cells.device == "cuda"
    mask = create_block_mask(pair, None, None, tokens, tokens, device=cells.device, _compile=gpu)
    attend = torch.compile(flex_attention) if gpu else flex_attention
    lay = lambda x: x.transpose(0, 1)[None].contiguous()
    *inputs, gradient = (lay(x) for x in cells.packed)
    return Peer(inputs, gradient, lambda q, k, v: attend(q, k, v, block_mask=mask), lambda o: o[0].transpose(0, 1))


def sparse_mask(torch, device, window, every=40):
    def mask(start, end):
        i = torch.arange(start, end, device=device)
        near = (i[:, None] - i[None]).abs() <= window
        return near | (i[:, None] % every == 0) | (i[None] % every == 0)

    return mask


class Job:
    """One peer at one of our shapes: a comparison per direction, or one of both directions together."""

    def __init__(self, names, preset, shape, sparse, engine, make):
        self.preset, self.shape, self.sparse, self.make = preset, shape, sparse, make
        self.comparisons = [Comparison(name, preset, engine=engine) for name in names]
        self.calls = None

    def ours(self, report):
        """Our rows, by direction."""
        fits = lambda r: self.shape in r["shape"] and ("marker-sparse" in r["shape"]) == self.sparse
        found = {d: [r for r in rows(report, f"gene_attention_{d}", "") if fits(r)] for d in ("forward", "backward")}
        return {d: found[d][0] for d in found}

    def prepare(self, torch, cells, mask):
        peer = self.make(cells)
        # The reference is of the very numbers that the peer was given.
        cells.packed = [peer.pack(x.detach()) for x in peer.inputs]
        error = peer.error(torch, cells.reference(mask))
        for c in self.comparisons:
            c.max_err = error
        if not error < TOLERANCE:
            raise ArithmeticError(f"its result is {error:.3g} from f32 attention")
        self.calls = peer.directions(torch)

    def round(self, report, clock, samples):
        ours = self.ours(report)
        peer = dict(zip(("forward", "backward"), (median(clock.samples(call, samples)) for call in self.calls)))
        clocks = (ours["forward"].get("sm_mhz"), clock.sm_mhz())
        mine = {d: ours[d]["ms_median"] for d in ours}
        for c in self.comparisons:
            if len(self.comparisons) == 2:
                direction = "forward" if "forward" in c.name else "backward"
                one, other = mine[direction], peer[direction]
            else:
                one, other = (sum(x.values()) if None not in x.values() else None for x in (mine, peer))
            c.ours.append(one)
            c.peer.append(other)
            c.clocks.append(clocks)


def run(torch, ours, clock, rounds, samples, dry_run, emit, time_left):
    """Every comparison of attention; a round is ours once and then every peer. `emit` gets them at the end."""
    device = "cuda" if clock.gpu else "cpu"
    heads = {"V2": (2, 64) if dry_run else (12, 64), "V1": (2, 64) if dry_run else (4, 64)}
    context = {"V2": 256 if dry_run else 4096, "V1": 256 if dry_run else 2048}
    lengths = [65] if dry_run else [2048, 4096]
    tokens = 300 if dry_run else 32768

    def report(preset):
        named = ["tiny", "--vocab", "300"] if dry_run else ["gf-v2-104m" if preset == "V2" else "gf-v1-10m"]
        mixture = "60,0.4" if dry_run else "1204,0.6" if preset == "V2" else "900,0.45"
        flags = ["--preset", *named, "--tokens", str(tokens), "--sweep", "--lengths", f"lognormal:{mixture}", "--only", " up to "]
        if preset == "V2":
            flags += [f for length in lengths for f in ("--only", f" of {length},")]
        return ours.bench("kernels", *flags)

    first = {preset: report(preset) for preset in ("V2", "V1")}
    mixture = {preset: first[preset]["lengths"] for preset in first}
    both = lambda kind: ("attention_forward/" + kind, "attention_backward/" + kind)
    jobs = []  # (job, its cells, mask of the pairs that attend)
    for length in lengths:
        count = next(int(r["shape"].split(", ")[1].split(" ")[0]) for r in first["V2"]["kernels"] if f" of {length}, dense" in r["shape"])
        for kind, backend in (("sdpa_default", None), ("flash", "FLASH_ATTENTION"), ("cudnn", "CUDNN_ATTENTION")):
            engine = f"scaled_dot_product_attention, {backend or 'as it chooses'}"
            job = Job(both(kind), "V2", f" of {length},", False, engine, lambda c, backend=backend: equal(c, backend))
            jobs.append((job, [length] * count, None))
    for preset in ("V2", "V1"):
        engine = f"scaled_dot_product_attention padded to {context[preset]}, keys masked"
        job = Job(("padded_sdpa",), preset, " up to ", False, engine, lambda c, preset=preset: padded(c, context[preset]))
        jobs.append((job, mixture[preset], None))
    for kind, make in (("nested", nested), ("varlen_flash", varlen), ("flash3", flash3)):
        jobs.append((Job(both(kind), "V2", " up to ", False, kind, make), mixture["V2"], None))
    sparse = [r["shape"] for r in first["V2"]["kernels"] if "marker-sparse" in r["shape"] and " up to " in r["shape"]]
    window = int(sparse[0].split("marker-sparse ")[1].split(",")[0])
    job = Job(("marker_sparse/flex",), "V2", " up to ", True, "FlexAttention, compiled", lambda c: flex(c, window))
    jobs.append((job, mixture["V2"], sparse_mask(torch, device, window)))

    def attempt(job, do):
        try:
            if time_left() < 15:
                raise TimeoutError("no time was left")
            do()
        except Exception as error:  # a peer that is absent or fails is a row that says so
            job.calls = None
            for c in job.comparisons:
                c.skip(error)

    for job, cells, mask in jobs:
        for c in job.comparisons:
            c.shape = job.ours(first[job.preset])["forward"]["shape"]
        attempt(job, lambda: job.prepare(torch, Cells(torch, cells, *heads[job.preset], device), mask))
    for turn in range(rounds):
        if turn and time_left() < 30:
            break
        mine = first if turn == 0 else {preset: report(preset) for preset in first}
        for job, _, _ in jobs:
            if job.calls:
                attempt(job, lambda: job.round(mine[job.preset], clock, samples))
    for job, _, _ in jobs:
        for c in job.comparisons:
            emit(c)
