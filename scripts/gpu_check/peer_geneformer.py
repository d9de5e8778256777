"""A Hugging Face Geneformer as its users train it, beside our whole refine run: `BertForMaskedLM` of V1's size, cells grouped by
length and padded to the longest of their batch, 15 % masked by the collator, bf16 autocast, fused AdamW.

Ours does more in a step (teacher, prototypes, every term of the objective); the peer has no Trainer round it. Both train on cells of
the same lengths, in batches of as many cells, and are told in cells a second.
"""
import random

from peer_timing import Comparison, median

MASK, FIRST_GENE = 1, 2


def batches(lengths, size, seed):
    """Length-grouped order, as `LengthGroupedSampler`: sorted within mega-batches of 50 batches."""
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    mega = 50 * size
    order = [i for start in range(0, len(order), mega) for i in sorted(order[start : start + mega], key=lambda i: -lengths[i])]
    return [order[start : start + size] for start in range(0, len(order) - size + 1, size)]


def prepare(torch, device, lengths, size, preset, steps):
    """A call that trains on the next `steps` batches, and how many cells those hold."""
    from transformers import BertConfig, BertForMaskedLM

    layers, width, heads, ffn, context, vocab = preset
    config = BertConfig(vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=ffn,
                        max_position_embeddings=context, hidden_act="relu", hidden_dropout_prob=0.02, attention_probs_dropout_prob=0.02,
                        pad_token_id=0)
    model = BertForMaskedLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **({"fused": True} if device == "cuda" else {}))
    # As many cells as a few rounds need, lengths as ours.
    cells = [lengths[i % len(lengths)] for i in range(max(len(lengths), 4 * size))]
    genes = [torch.randint(FIRST_GENE, vocab, (n,)) for n in cells]
    order = batches(cells, size, 0)
    at = [0]

    def collate(rows):
        longest = max(len(genes[i]) for i in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for r, i in enumerate(rows):
            ids[r, : len(genes[i])] = genes[i]
        real = ids != 0
        chosen = real & (torch.rand(ids.shape) < 0.15)
        labels = torch.where(chosen, ids, -100)
        fate = torch.rand(ids.shape)
        ids = torch.where(chosen & (fate < 0.8), MASK, ids)
        ids = torch.where(chosen & (fate >= 0.9), torch.randint(FIRST_GENE, vocab, ids.shape), ids)
        return [x.to(device, non_blocking=True) for x in (ids, real.long(), labels)]

    def call():
        for _ in range(steps):
            ids, mask, labels = collate(order[at[0] % len(order)])
            at[0] += 1
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return loss

    if not call().item() < 1e4:
        raise ArithmeticError("its loss is not finite")
    return call, steps * size


def run(torch, ours, clock, rounds, dry_run, emit, time_left):
    device = "cuda" if clock.gpu else "cpu"
    size, steps = (4, 1) if dry_run else (32, 10)
    preset = (2, 128, 2, 256, 256, 300) if dry_run else (6, 256, 4, 512, 2048, 25_426)
    named = ["tiny", "--vocab", "300", "--tokens", "300", "--lengths", "lognormal:60,0.4"] if dry_run else ["gf-v1-10m", "--lengths", "lognormal:900,0.45"]
    c = Comparison("refine/hf_geneformer", f"{size} cells a step, V1 10M", unit="cells/s", engine="transformers BertForMaskedLM, length-grouped",
                   note="ours: bench step --mode refine, all terms; theirs: masked genes alone")
    try:
        if time_left() < 40 and not dry_run:
            raise TimeoutError("no time was left")
        call = cells = None
        for turn in range(rounds):
            report = ours.bench("step", "--mode", "refine", "--preset", *named, "--batch", str(size))
            if call is None:
                call, cells = prepare(torch, device, report["lengths"], size, preset, steps)
            ms = median(clock.samples(call, 3, cold=False))
            c.ours.append(report["cells_per_s"])
            c.peer.append(cells / ms * 1e3 if ms else None)
            c.clocks.append(None)
            if time_left() < 30:
                break
    except Exception as error:
        c.skip(error)
    emit(c)
