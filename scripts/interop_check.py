"""Round trips with the programs of this field, live: what they write is read, what is written they read, and nothing changes on the way.

    python scripts/interop_check.py [--cellrefine target/release/cellrefine] [--transformers] [--h5ad FILE --tokens FILE --medians FILE]

Always: 10x HDF5 and MTX beside scanpy's readers, `.dataset` folders both ways with `datasets`, dictionaries with Python's pickle.
--transformers adds model folders both ways (needs torch and transformers). --h5ad with a token dictionary and medians compares the
tokens of a file of your own with Geneformer's rule (scripts/golden/check_tokens.py). Wheels: anndata, scanpy, h5py, scipy, datasets.
"""

import argparse
import gzip
import json
import pathlib
import pickle
import shutil
import subprocess
import sys
import tempfile
import warnings

import anndata
import datasets
import h5py
import numpy as np
import scanpy
import scipy.io
import scipy.sparse as sp

warnings.filterwarnings("ignore")
datasets.disable_progress_bars()
HERE = pathlib.Path(__file__).resolve().parent
DATA = HERE.parent / "data/pbmc700/pbmc700.h5ad"

parser = argparse.ArgumentParser()
parser.add_argument("--cellrefine", default=str(HERE.parent / "target/release/cellrefine"))
parser.add_argument("--transformers", action="store_true")
parser.add_argument("--h5ad")
parser.add_argument("--tokens")
parser.add_argument("--medians")
args = parser.parse_args()


def run(*words, fails=None):
    done = subprocess.run([args.cellrefine, *map(str, words), "--json", "--quiet"], capture_output=True, text=True)
    if fails is not None:
        assert done.returncode == fails, (words, done.returncode, done.stderr)
        return done.stderr
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return json.loads(done.stdout)


def cells(corpus):
    found = run("inspect", corpus, "--cells", 10**9)
    return found["tokens"], found["cell_ids"]


def said(what):
    print("ok:", what, flush=True)


def tenx(folder, vocab, want):
    """Cell Ranger's forms of the same counts, each read by scanpy first."""
    data = anndata.read_h5ad(DATA)
    counts = sp.csc_matrix(data.X.astype("int32")).T.tocsc()
    ids = list(data.var["ensembl_id"] if "ensembl_id" in data.var else data.var_names)
    symbols = [str(s) for s in (data.var["gene_symbol"] if "gene_symbol" in data.var else data.var_names)]
    barcodes = list(data.obs_names)
    text = lambda values: np.array([v.encode() for v in values])
    for version in (2, 3):
        path = folder / f"v{version}.h5"
        with h5py.File(path, "w") as f:
            g = f.create_group("matrix" if version == 3 else "GRCh38")
            for name, values in (("data", counts.data), ("indices", counts.indices), ("indptr", counts.indptr), ("shape", np.array(counts.shape))):
                g.create_dataset(name, data=values)
            g.create_dataset("barcodes", data=text(barcodes))
            if version == 3:
                features = g.create_group("features")
                for name, values in (("id", ids), ("name", symbols), ("feature_type", ["Gene Expression"] * len(ids)), ("genome", ["GRCh38"] * len(ids))):
                    features.create_dataset(name, data=text(values))
            else:
                g.create_dataset("genes", data=text(ids))
                g.create_dataset("gene_names", data=text(symbols))
        read = scanpy.read_10x_h5(path)
        assert (read.X != counts.T).nnz == 0 and list(read.var["gene_ids"]) == ids
        run("pack", path, "--vocab", vocab, "--out", folder / f"v{version}.cells")
        assert cells(folder / f"v{version}.cells") == want
        said(f"10x HDF5 version {version}: scanpy reads it, packing gives the cells of the .h5ad")
    trio = folder / "mtx"
    trio.mkdir()
    scipy.io.mmwrite(trio / "matrix.mtx", counts, field="integer")
    (trio / "barcodes.tsv").write_text("\n".join(barcodes) + "\n")
    (trio / "features.tsv").write_text("".join(f"{i}\t{s}\tGene Expression\n" for i, s in zip(ids, symbols)))
    for file in list(trio.iterdir()):
        (trio / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    read = scanpy.read_10x_mtx(trio, var_names="gene_ids")
    assert (read.X != counts.T).nnz == 0
    run("pack", trio, "--vocab", vocab, "--out", folder / "mtx.cells")
    assert cells(folder / "mtx.cells") == want
    said("10x MTX: scanpy reads it, packing gives the cells of the .h5ad")


def dataset(folder, vocab, packed, want):
    run("export", folder / "a.cells", "--out", folder / "a.dataset")
    loaded = datasets.load_from_disk(str(folder / "a.dataset"))
    about = run("inspect", folder / "a.cells")
    cls, eos = about["specials"]["cls"], about["specials"]["eos"]
    around = lambda tokens: ([cls] if cls is not None else []) + tokens + ([eos] if eos is not None else [])
    assert loaded["input_ids"][:] == [around(t) for t in want[0]] and loaded["cell_id"][:] == want[1]
    assert loaded["length"][:] == [len(t) for t in loaded["input_ids"][:]]
    obs = anndata.read_h5ad(DATA).obs
    for column in about["columns"]:
        if column["kind"] == "categorical":
            assert loaded[column["name"]][:] == [str(v) for v in obs[column["name"]]], column["name"]
    said(f"datasets {datasets.__version__} opens our folder: tokens, lengths, names and obs columns are the corpus's")
    for name, changed in (
        ("as it is", loaded),
        ("int32 in three files", loaded.cast_column("input_ids", datasets.List(datasets.Value("int32")))),
        ("large lists", loaded.cast_column("input_ids", datasets.LargeList(datasets.Value("int64")))),
    ):
        path = folder / f"{name.replace(' ', '-')}.dataset"
        changed.save_to_disk(str(path), num_shards=3 if "three" in name else 1)
        again = run("pack", path, "--vocab", vocab, "--out", path.with_suffix(".cells"))
        assert again["digest"] == packed["digest"], name
        said(f"saved by datasets ({name}) and packed again: the digest of the corpus is the same")
    rows = loaded.select(range(50)).filter(lambda row: row["length"] > 0)
    rows.save_to_disk(str(folder / "part.dataset"))
    part = run("pack", folder / "part.dataset", "--vocab", vocab, "--out", folder / "part.cells")
    assert part["cells"] == len(rows)


def dictionaries(folder, vocab):
    tokens, medians = {}, {}
    for line in vocab.read_text().splitlines():
        if not line.startswith(("#", "token\t")):
            name, token, median = line.split("\t")[:3]
            tokens[name], medians[name] = int(token), float(median)
    medians = {g: m for g, m in medians.items() if not g.startswith("<")}
    # As Geneformer's V1 ships them: numpy scalars.
    (folder / "t.pkl").write_bytes(pickle.dumps({k: np.int16(v) for k, v in tokens.items()}))
    (folder / "m.pkl").write_bytes(pickle.dumps({k: np.float64(v) for k, v in medians.items()}))
    run("vocab", "convert", folder / "t.pkl", folder / "m.pkl", "--out", folder / "converted.tsv")
    assert run("inspect", folder / "converted.tsv")["digest"] == run("inspect", vocab)["digest"]
    said("pickled dictionaries with numpy scalars give the vocabulary's digest")
    return tokens, medians


def model(folder, vocab, tokens, medians):
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokens), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=1024, hidden_act="relu", pad_token_id=0,
    )
    hf = BertForMaskedLM(config).eval()
    hf.save_pretrained(folder / "hf-sharded", max_shard_size="100KB")
    assert len(list((folder / "hf-sharded").glob("*.safetensors"))) > 1
    hf.save_pretrained(folder / "hf-whole")
    shutil.copy(vocab, folder / "hf-whole/vocab.tsv")
    ids = torch.tensor([[2, 10, 11, 12, 3], [2, 20, 21, 22, 3]])
    for name in ("hf-sharded", "hf-whole"):
        out = folder / f"{name}-exported"
        run("export", folder / name, "--out", out)
        again, info = BertForMaskedLM.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            assert torch.equal(again.eval()(ids).logits, hf(ids).logits)
        said(f"{name}: exported, opened by transformers with no key amiss, logits equal bit for bit")
    out = folder / "hf-whole-exported"
    for file, wanted in (("token_dictionary", tokens), ("gene_median_dictionary", medians)):
        assert pickle.loads((out / f"{file}.pkl").read_bytes()) == wanted == json.loads((out / f"{file}.json").read_text())
    said("token_dictionary and gene_median_dictionary: pickle and JSON hold the vocabulary")
    encoder, info = BertModel.from_pretrained(out, add_pooling_layer=False, output_loading_info=True)
    assert not info["missing_keys"] and all(k.startswith("cls.") for k in info["unexpected_keys"]), info
    # An encoder alone, as LangCell's: names without `bert.`, a pooler.
    lone = BertModel(config).eval()
    lone.load_state_dict(hf.bert.state_dict(), strict=False)
    lone.save_pretrained(folder / "encoder")
    assert run("inspect", folder / "encoder")["masked_gene_head"].startswith("none")
    run("embed", "--corpus", folder / "a.cells", "--checkpoint", folder / "encoder", "--out", folder / "e.npy", "--layer", 0, "--pool", "cls", "--device", "cpu")
    found = np.load(folder / "e.npy")
    rows = datasets.load_from_disk(str(folder / "a.dataset"))["input_ids"][:8]
    with torch.no_grad():
        wanted = np.stack([lone(torch.tensor([r])).last_hidden_state[0, 0].numpy() for r in rows])
    assert np.abs(found[:8] - wanted).max() < 1e-4, np.abs(found[:8] - wanted).max()
    said("a BertModel saved alone is read, and embeds as transformers does")
    binary = folder / "bin"
    binary.mkdir()
    shutil.copy(folder / "hf-whole/config.json", binary)
    torch.save(hf.state_dict(), binary / "pytorch_model.bin")
    refusal = run("export", binary, "--out", folder / "never", fails=3)
    assert "safe_serialization" in refusal and not (folder / "never").exists()
    # The remedy in the message works.
    line = next(l for l in refusal.splitlines() if "python -c" in l)
    code = line.split("python -c ", 1)[1].strip().strip('"')
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    run("export", binary, "--out", folder / "converted-model")
    said("pytorch_model.bin is refused, and the line that the message gives converts it")


with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    vocab = folder / "V.tsv"
    run("vocab", "build", DATA, "--out", vocab)
    packed = run("pack", DATA, "--vocab", vocab, "--out", folder / "a.cells")
    want = cells(folder / "a.cells")
    tenx(folder, vocab, want)
    dataset(folder, vocab, packed, want)
    tokens, medians = dictionaries(folder, vocab)
    if args.transformers:
        model(folder, vocab, tokens, medians)
    if args.h5ad:
        run("vocab", "convert", args.tokens, *([args.medians] if args.medians else []), "--out", folder / "own.tsv")
        run("pack", args.h5ad, "--vocab", folder / "own.tsv", "--out", folder / "own.cells", "--min-gene-match", 0.2)
        subprocess.run([sys.executable, HERE / "golden/check_tokens.py", args.h5ad, folder / "own.tsv", folder / "own.cells"], check=True)
        said("tokens of the given file are Geneformer's")
print("all round trips hold")
