#!/usr/bin/env bash
# What the compiler made of each kernel, per activation type and architecture, without a GPU: registers, spills, stack, static
# shared memory, theoretical occupancy, and counts of the instructions that matter. Writes docs/sass.md.
#
#   scripts/sass-report.sh           writes docs/sass.md, and fails when a rule is broken
#   scripts/sass-report.sh --check   writes nothing; also fails when a kernel takes more registers than docs/sass.md says
#
# Rules: no spill, no stack, no local memory; tensor-core instructions in every kernel whose source multiplies by mma, HGMMA where it
# does so by wgmma, UTMALDG in every kernel that takes a TensorMap; no complaint of ptxas about wgmma or setmaxnreg (C75xx: products in
# sequence, registers left as they were); a 16-byte global access in every kernel that is not listed below as too small to need one.
# Files named *_sm90.cu are compiled for sm_90a and for bf16 alone.
# Needs scripts/cuda-toolkit.sh --sass.
set -euo pipefail
cd "$(dirname "$0")/.."
export NVCC=${NVCC:-.cuda/nvidia/cu13/bin/nvcc} CUOBJDUMP=${CUOBJDUMP:-.sass/nvidia/cu13/bin/cuobjdump}
for program in "$NVCC" "$CUOBJDUMP"; do
  [[ -x $(command -v "$program") ]] || { echo "no $program; run scripts/cuda-toolkit.sh --sass" >&2; exit 4; }
done
PATH=$PWD/.sass/nvidia/cu13/bin:$PATH exec "${PYTHON:-python3}" - "$@" <<'PYTHON'
import concurrent.futures, os, pathlib, re, subprocess, sys, tempfile

ARCHS = {"sm_80": "compute_80", "sm_90a": "compute_90a"}
ACTS = ["f32", "bf16"]
REPORT = pathlib.Path("docs/sass.md")
# Kernels that move a few kilobytes, or whose accesses are scattered by their task: no 16-byte access wanted.
SMALL = pathlib.Path("kernels/sass-small.txt").read_text().split()
# Kernels beside those of a file that multiply by wgmma: sums and what is prepared.
PLAIN = ["gene_attention_dq_sm90", "gene_attention_stats_sm90"]
COUNTED = {
    "HMMA": r"\bHMMA", "HGMMA": r"\bHGMMA", "UTMALDG": r"\bUTMALDG", "MUFU": r"\bMUFU", "16-byte": r"\b(LDG|STG|LDGSTS)\S*\.128",
    "global": r"\b(LDG|STG|LDGSTS)\b", "LDSM": r"\bLDSM", "local": r"\b(LDL|STL)\b",
}


def signature_files():
    for path in sorted(pathlib.Path("kernels").glob("*.cu")):
        text = path.read_text()
        hopper = path.stem.endswith("_sm90")
        acts = ACTS[1:] if hopper else ACTS if re.search(r"__global__[^{]*\bact_t\b", text) else ACTS[:1]
        threads, boxes = dict(), set()
        for match in re.finditer(r'extern "C" __global__ void (?:__launch_bounds__\((\w+)[^)]*\) )?(\w+)\(', text):
            bound = match[1] or "1024"
            define = re.search(rf"#define {bound} (\d+)", sources(path))
            if "TensorMap" in text[match.end():text.index(") {", match.end())]:
                boxes.add(match[2])
            threads[match[2]] = int(define[1] if define else bound) if (define or bound.isdigit()) else 0
        yield path, acts, [arch for arch in ARCHS if arch == "sm_90a" or not hopper], boxes, threads


def compile_and_read(path, act, arch, folder):
    cubin = f"{folder}/{path.stem}_{act}_{arch}.cubin"
    command = [os.environ["NVCC"], "-O3", "-std=c++17", "-cubin", "-Xptxas", "-v", f"-DACT_{act.upper()}", "-I", "kernels",
               "-gencode", f"arch={ARCHS[arch]},code={arch}", str(path), "-o", cubin]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    kernels, name = {}, None
    complaints = [line for line in done.stderr.splitlines() if re.search(r"\(C75\d\d\)", line)]
    for line in done.stderr.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            name = found[1]
            kernels[name] = {"stack": 0, "spill": 0, "shared": 0}
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            # A function that is not inlined reports its own frame after the entry's.
            kernels[name]["stack"] += int(found[1])
            kernels[name]["spill"] += int(found[2]) + int(found[3])
        elif found := re.search(r"Used (\d+) registers", line):
            kernels[name]["registers"] = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[name]["shared"] = int(shared[1]) if shared else 0
    sass = subprocess.run([os.environ["CUOBJDUMP"], "-sass", cubin], capture_output=True, text=True, check=True).stdout
    for part in re.split(r"Function : ", sass)[1:]:
        name = part.split()[0]
        for what, pattern in COUNTED.items():
            kernels[name][what] = len(re.findall(pattern, part))
    return [(path.stem, act, arch, name, k) for name, k in kernels.items()], complaints


def occupancy(k, threads):
    """Share of an SM's 2048 threads, by registers and static shared memory alone."""
    if not threads:
        return None
    warps = -(-threads // 32)
    per_warp = -(-k["registers"] * 32 // 256) * 256
    blocks = min(65536 // (per_warp * warps), 2048 // threads, 32)
    if k["shared"]:
        blocks = min(blocks, (164 << 10) // (k["shared"] + 1024))
    return 100 * blocks * threads // 2048


def main():
    check = "--check" in sys.argv[1:]
    files = list(signature_files())
    bounds = {name: threads for *_, table in files for name, threads in table.items()}
    using = lambda what: {path.stem for path, *_ in files if re.search(what, sources(path))}
    multiplies, by_warpgroup = using(r"\bmma_\w+\("), using(r"\bwgmma_(shared|fragment)\b")
    by_box = set().union(*(boxes for *_, boxes, _ in files))
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compile_and_read, path, act, arch, folder) for path, acts, archs, *_ in files for act in acts
                for arch in archs]
        rows = [row for job in jobs for row in job.result()[0]]
        broken = [complaint for job in jobs for complaint in job.result()[1]]

    table = ["| file | act | arch | kernel | threads | registers | occupancy % | shared | spill | stack | HMMA | HGMMA | UTMALDG | LDSM | MUFU | "
             "16-byte / global | LDL, STL |", "|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for stem, act, arch, name, k in rows:
        place = f"{stem}.cu {name} ({act}, {arch})"
        if k["spill"] or k["stack"] or k["local"]:
            broken.append(f"{place}: {k['spill']} bytes spilled, {k['stack']} bytes of stack, {k['local']} local accesses")
        if stem in multiplies and act == "bf16" and not (k["HMMA"] + k["HGMMA"]) and name not in SMALL:
            broken.append(f"{place}: no tensor-core instruction")
        if stem in by_warpgroup and not k["HGMMA"] and name not in SMALL + PLAIN:
            broken.append(f"{place}: no HGMMA")
        if name in by_box and not k["UTMALDG"]:
            broken.append(f"{place}: no UTMALDG")
        if not k["16-byte"] and name not in SMALL:
            broken.append(f"{place}: no 16-byte global access")
        share = occupancy(k, bounds.get(name, 0))
        table.append(f"| {stem} | {act} | {arch} | {name} | {bounds.get(name) or ''} | {k['registers']} | "
                     f"{'' if share is None else share} | {k['shared']} | {k['spill']} | {k['stack']} | {k['HMMA']} | {k['HGMMA']} | "
                     f"{k['UTMALDG']} | {k['LDSM']} | {k['MUFU']} | {k['16-byte']} / {k['global']} | {k['local']} |")

    if check:
        budget = {}
        for line in REPORT.read_text().splitlines():
            cells = [c.strip() for c in line.split("|")[1:-1]]
            if len(cells) > 5 and cells[5].isdigit():
                budget[tuple(cells[:4])] = int(cells[5])
        for stem, act, arch, name, k in rows:
            allowed = budget.get((stem, act, arch, name))
            if allowed is None:
                broken.append(f"{stem}.cu {name} ({act}, {arch}): not in {REPORT}; run scripts/sass-report.sh")
            elif k["registers"] > allowed:
                broken.append(f"{stem}.cu {name} ({act}, {arch}): {k['registers']} registers, {allowed} in {REPORT}")
    else:
        version = subprocess.run([os.environ["NVCC"], "--version"], capture_output=True, text=True).stdout
        release = re.search(r"V([\d.]+)", version)[1]
        REPORT.write_text("\n".join([
            "# What nvcc makes of the kernels", "",
            f"Written by `scripts/sass-report.sh` with nvcc {release}; `--check` holds the register counts as budgets. Static facts only:",
            "no kernel here has been timed. Occupancy counts registers and static shared memory, not dynamic; `16-byte / global` is of",
            "all global loads and stores (asynchronous copies included).", ""] + table) + "\n")
    for line in broken:
        print(line, file=sys.stderr)
    print(f"{len(rows)} kernels compiled, {len(broken)} rules broken")
    sys.exit(1 if broken else 0)


def sources(path):
    """A kernel file with the headers of its own that it includes."""
    text = path.read_text()
    for header in re.findall(r'#include "(\w+\.cuh)"', text):
        if header not in ("common.cuh", "ptx.cuh", "ptx_sm90.cuh"):
            text += sources(path.parent / header)
    return text


main()
PYTHON
