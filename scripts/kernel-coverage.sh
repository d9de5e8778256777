#!/usr/bin/env bash
# Which lines of kernels/*.cu and *.cuh no test executes. The emulator's sources are compiled once more with gcov's counters into a
# shared object, and the op tests run with it in place of the built-in kernels, in all schedules.
#
#   scripts/kernel-coverage.sh            every test of tests/ops, tests/cuda and tests/emulated
#   scripts/kernel-coverage.sh layernorm  those of a name alone
#
# Prints each line that no test reaches, and fails when there is one; "partly" marks lines of which every compiled form has a branch
# that no test takes (an upper bound: one form may take what another does not). Refusals of the emulator itself are not counted:
# tests/emulator.rs provokes those. Needs g++ and gcov.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" - "$@" <<'PYTHON'
import collections, concurrent.futures, json, os, pathlib, re, subprocess, sys, tempfile

COMPILE = ["g++", "-std=c++17", "-O1", "--coverage", "-fprofile-update=atomic", "-fPIC", "-fno-strict-aliasing", "-w", "-I", "kernels"]
KERNELS = pathlib.Path("kernels").resolve()
# These build kernels of their own.
SKIPPED = ["mutants", "of_the_", "sanitizers"]


def built():
    """The test programs, and where the build left the emulator's sources."""
    command = ["cargo", "test", "--release", "--no-run", "--message-format=json-render-diagnostics"]
    for test in ("ops", "cuda", "emulated"):
        command += ["--test", test]
    programs, out = [], None
    for line in subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines():
        message = json.loads(line)
        if message["reason"] == "compiler-artifact" and message.get("executable") and "test" in message["target"]["kind"]:
            programs.append(message["executable"])
        elif message["reason"] == "build-script-executed" and pathlib.Path(message["out_dir"], "emulator").is_dir():
            out = pathlib.Path(message["out_dir"], "emulator")
    return programs, out


def main():
    programs, out = built()
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = [KERNELS / f"emulator/{name}.cpp" for name in ("cuda_host", "fiber", "hopper")]
        sources += [s for s in sorted(out.glob("*.cpp")) if (KERNELS / f"{s.stem.rsplit('_', 1)[0]}.cu").exists()]
        objects = [f"{folder}/{s.stem}.o" for s in sources]
        jobs = [pool.submit(subprocess.run, COMPILE + ["-c", str(s), "-o", o], check=True) for s, o in zip(sources, objects)]
        [job.result() for job in jobs]
        library = f"{folder}/kernels.so"
        subprocess.run(["g++", "-shared", "--coverage", "-o", library] + objects, check=True)
        skips = [word for name in SKIPPED for word in ("--skip", name)]
        for program in programs:
            environment = dict(os.environ, CELLREFINE_EMULATOR_LIBRARY=library)
            subprocess.run([program, "--quiet"] + skips + sys.argv[1:], env=environment, check=True, stdout=sys.stderr)

        forms = collections.defaultdict(lambda: collections.defaultdict(list))
        for data in pathlib.Path(folder).glob("*.gcda"):
            report = subprocess.run(["gcov", "--json-format", "--stdout", data.name], cwd=folder, check=True,
                                    stdout=subprocess.PIPE, text=True).stdout
            for line in report.splitlines():
                found = json.loads(line)
                for file in found["files"]:
                    path = pathlib.Path(found["current_working_directory"], file["file"]).resolve()
                    if path.parent == KERNELS:
                        for entry in file["lines"]:
                            forms[path.name][entry["line_number"]].append((entry["count"], entry["unexecuted_block"]))
    lines = missed = 0
    for name, table in sorted(forms.items()):
        text = (KERNELS / name).read_text().splitlines()
        for number, found in sorted(table.items()):
            if re.search(r"cuhost::fault|CHECK_ALIGNED16", text[number - 1]):
                continue
            lines += 1
            unreached = not any(count for count, _ in found)
            missed += unreached
            if unreached or all(partly for _, partly in found):
                print(f"{'' if unreached else 'partly: '}kernels/{name}:{number}: {text[number - 1].strip()}")
    print(f"{lines} lines of {len(forms)} files, {missed} without a test")
    sys.exit(1 if missed or not lines else 0)


main()
PYTHON
