#!/usr/bin/env python3
"""Writes tests/golden/hostile: .h5ad files that are valid HDF5 and mean harm, which only the HDF5 library itself can write.

    python scripts/golden/make_hostile_h5ad.py        (h5py 3.16)

link_loop           X and Y are soft links to each other
hard_loop           obs and X hold themselves, by hard links
external_link       X lies in another file
external_storage    X/data lies in /etc/hostname
huge_chunk          X is dense, one chunk of 2 GiB, nothing stored
gzip_bomb           500 KB of X/data and X/indices that unpack to 512 MiB
offsets_overflow    indptr of unsigned 64-bit numbers beyond 2^63
shape_overflow      a shape of 2^40 by 2^40
"""
import gzip
import pathlib
import tempfile

import h5py
import numpy as np

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests/golden/hostile"
GENES = [f"ENSG{g:011}" for g in range(1, 4)]


def frames(f):
    for slot, names in (("obs", ["a", "b"]), ("var", GENES)):
        group = f.create_group(slot)
        group.attrs["_index"] = "_index"
        group.create_dataset("_index", data=np.array(names, dtype=object), dtype=h5py.string_dtype())


def sparse(f, data=(2.0, 1.0, 5.0, 4.0), indices=(0, 2, 0, 1), indptr=(0, 2, 4), shape=(2, 3), **types):
    x = f.create_group("X")
    x.attrs["encoding-type"] = "csr_matrix"
    x.attrs["shape"] = np.array(shape, dtype=np.int64)
    x.create_dataset("data", data=np.asarray(data, dtype=np.float32))
    x.create_dataset("indices", data=np.asarray(indices, dtype=np.int32))
    x.create_dataset("indptr", data=np.asarray(indptr, dtype=types.get("indptr_type", np.int32)))
    return x


def link_loop(f):
    f["X"] = h5py.SoftLink("/Y")
    f["Y"] = h5py.SoftLink("/X")


def hard_loop(f):
    sparse(f)
    f["X/self"] = f["X"]
    f["obs/self"] = f["obs"]


def external_link(f):
    f["X"] = h5py.ExternalLink("/etc/hostname", "/X")


def external_storage(f):
    x = sparse(f)
    del x["data"]
    x.create_dataset("data", shape=(4,), dtype=np.float32, external=[("/etc/hostname", 0, 16)])


def huge_chunk(f):
    f.create_dataset("X", shape=(2, 3), maxshape=(None, None), chunks=(1 << 14, 1 << 15), dtype=np.float32)


def gzip_bomb(f):
    x = sparse(f, indptr=(0, 1 << 26, 1 << 26))
    for name, kind in (("data", np.float32), ("indices", np.int32)):
        del x[name]
        x.create_dataset(name, data=np.zeros(1 << 26, dtype=kind), chunks=(1 << 20,), compression="gzip", compression_opts=9)


def offsets_overflow(f):
    sparse(f, indptr=(0, 1 << 63, (1 << 63) + 4), indptr_type=np.uint64)


def shape_overflow(f):
    sparse(f, shape=(1 << 40, 1 << 40))


OUT.mkdir(exist_ok=True)
for make in (link_loop, hard_loop, external_link, external_storage, huge_chunk, gzip_bomb, offsets_overflow, shape_overflow):
    with tempfile.NamedTemporaryFile(suffix=".h5ad") as t:
        with h5py.File(t.name, "w", track_order=False) as f:
            frames(f)
            make(f)
        data = pathlib.Path(t.name).read_bytes()
    (OUT / f"{make.__name__}.h5ad.gz").write_bytes(gzip.compress(data, 9, mtime=0))
    print(make.__name__, len(data), (OUT / f"{make.__name__}.h5ad.gz").stat().st_size)
