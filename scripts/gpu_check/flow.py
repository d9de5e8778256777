"""The flow of gpu-check.sh: correctness first, then speed, then PyTorch beside it; one JSON and one Markdown file.

Every stage has a limit of its own and never more than what is left of the whole. The report is written again after every stage, so
that whatever ends the run early leaves what was found before.
"""
import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import schema  # noqa: E402
import table  # noqa: E402

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Preset and flags of `bench step`.
STEPS = [
    ("gf-v1-10m", "lognormal:900,0.45", 65_536),
    ("gf-v2-104m", "lognormal:1204,0.6", 32_768),
    ("gf-v2-316m", "lognormal:1204,0.6", 32_768),
]


class Flow:
    def __init__(self, a):
        self.a, self.begin = a, time.monotonic()
        self.device = "emulated" if a.dry_run else a.device
        self.report = {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"), "commit": commit(a.root),
            "device": "unknown", "driver": "unknown", "dry_run": a.dry_run, "checks": [], "kernels": [], "steps": [], "ratios": [],
        }
        day = self.report["date"].replace("-", "")
        self.path = os.path.join(a.out, f"gpu-{'dry-run' if a.dry_run else day + '-' + self.report['commit']}.json")

    def left(self):
        return self.a.budget - (time.monotonic() - self.begin)

    def check(self, name, ok, detail):
        self.report["checks"] = [c for c in self.report["checks"] if c["name"] != name]
        self.report["checks"].append({"name": name, "ok": ok, "detail": " ".join(detail.split())[:600]})
        said = {True: "ok", False: "FAILED", None: "not run"}[ok]
        print(f"[{time.monotonic() - self.begin:5.0f} s] {name}: {said}. {detail.strip()[:300]}", file=sys.stderr, flush=True)
        self.write()

    def write(self):
        """With a row for everything that is not there yet."""
        named = {c["name"] for c in self.report["checks"]}
        ratios = {r["name"] for r in self.report["ratios"]}
        whole = dict(self.report)
        whole["checks"] = self.report["checks"] + [{"name": n, "ok": None, "detail": "not reached"} for n in schema.CHECKS if n not in named]
        whole["ratios"] = self.report["ratios"] + [
            {"name": n, "shape": "–", "ours": None, "peer": None, "ratio": None, "unit": "ms", "skipped": "not reached"}
            for n in schema.RATIOS if n not in ratios]
        with open(self.path + ".part", "w", encoding="utf-8") as file:
            json.dump(whole, file, indent=1)
            file.write("\n")
        os.replace(self.path + ".part", self.path)
        with open(self.path[:-5] + ".md", "w", encoding="utf-8") as file:
            file.write(table.markdown(whole))
        return whole

    def run(self, command, limit_s, environment=None):
        """(exit code or None where it ran out of time, stdout, stderr)."""
        limit = min(limit_s, self.left())
        if limit < 3:
            return None, "", "no time was left"
        env = {**os.environ, **(environment or {})}
        # A process group of its own: what it started ends with it.
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True) as p:
            try:
                out, err = p.communicate(timeout=limit)
                return p.returncode, out, err
            except subprocess.TimeoutExpired:
                os.killpg(p.pid, 9)
                out, err = p.communicate()
                return None, out, f"{err}\nstopped after {limit:.0f} s"

    def bench(self, limit_s, what, *flags):
        """(report or None, exit code, stderr) of `cellrefine bench`."""
        out = os.path.join(self.a.out, "bench.part.json")
        if os.path.exists(out):
            os.remove(out)
        command = [self.a.program, "bench", what, "--device", self.device, "--out", out, *map(str, flags)]
        code, _, err = self.run(command, limit_s)
        if not os.path.exists(out):
            return None, code, err
        report = schema.read(out)
        os.remove(out)
        return report, code, err

    def stage(self, name, do):
        try:
            do(name)
        except Exception as error:  # a stage that breaks is a failed check, and the next one runs
            self.check(name, False, f"{type(error).__name__}: {error}")

    # ---- the stages -------------------------------------------------------------------------------------------------

    def doctor(self, name):
        code, out, err = self.run([self.a.program, "doctor", "--json", "--device", self.device], 60)
        if code:
            return self.check(name, False, err)
        found = json.loads(out)
        self.report["device"] = self.device
        self.report["driver"] = "none: emulated" if self.a.dry_run else found["cuda"]["driver"]
        self.check(name, True, "; ".join(f"{k} {v}" for k, v in found["cuda"].items()))

    def oracle(self, name):
        """Every op's tests on the GPU: f64 oracles, odd sizes, guard words, poison."""
        if not os.path.exists(self.a.tests):
            return self.check(name, None, f"no {self.a.tests}: it comes with the bundle")
        some = ["reduce::gpu", "pool::gpu"] if self.a.dry_run else ["gpu"]
        where = {"CELLREFINE_TEST_GPU": "emulated" if self.a.dry_run else self.device.split(":")[-1].replace("cuda", "0")}
        code, out, err = self.run([self.a.tests, *some, "--ignored", "--test-threads", "4"], 120, where)
        # Each failing test names its element; the summary is the last line that says "test result".
        failed = [line.split()[1] for line in out.splitlines() if line.startswith("test ") and line.endswith("FAILED")]
        summary = [line for line in out.splitlines() if line.startswith("test result")]
        ran = bool(summary) and " 0 passed" not in summary[-1]
        wrong = [line.strip() for line in out.splitlines() if "the oracle says" in line or "panicked" in line]
        self.check(name, code == 0 and ran, f"{summary[-1] if summary else err[-300:]} {' '.join(failed[:8])} {' '.join(wrong[:3])}")

    def agreement(self, name, *flags):
        """Rows of tiny kernels that are right, and as `flags` want them; in both types."""
        said, ok = [], True
        for dtype in ("f32", "bf16"):
            report, code, err = self.bench(60, "kernels", "--preset", "tiny", "--vocab", 300, "--quick", "--untimed", "--dtype", dtype, *flags)
            rows = (report or {}).get("kernels", [])
            wrong = [f"{r['name']} {r['shape']}: {r['why']}" for r in rows if not r["ok"]]
            ok = ok and code == 0 and bool(rows) and not wrong
            worst = max((r.get("against_err") or 0.0 for r in rows), default=0.0)
            said.append(f"{dtype}: {len(rows)} kernels" + (f", {worst:.1e} of the largest apart at most" if worst else "") + "".join(f"; {w}" for w in wrong[:4]))
            if code != 0 and not wrong:
                said.append(err[-300:])
        self.check(name, ok, ", ".join(said))

    def sanitizer(self, name):
        tool = name.split("/")[1]
        found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if self.a.dry_run or not os.path.exists(found):
            return self.check(name, None, "a dry run has no GPU" if self.a.dry_run else "compute-sanitizer is not there")
        command = [found, "--tool", tool, "--error-exitcode", "9", "--print-limit", "5", self.a.program, "bench", "kernels", "--device",
                   self.device, "--dtype", "bf16", "--preset", "tiny", "--vocab", "300", "--quick", "--sweep", "--lengths", "lognormal:40,0.5",
                   "--tokens", "120", "--untimed"]
        code, out, err = self.run(command, 40)
        lines = [line for line in (out + err).splitlines() if line.startswith("=========")]
        self.check(name, code == 0, " ".join(lines[-4:]) or err[-300:])

    def kernels(self, name):
        presets = ["tiny"] if self.a.dry_run else ["gf-v1-10m", "gf-v2-104m"]
        tiny = ["--vocab", 300, "--lengths", "lognormal:40,0.5", "--tokens", 120, "--quick", "--sweep"] if self.a.dry_run else ["--warm-up", 0.2]
        said, ok = [], True
        for preset in presets:
            report, code, err = self.bench(100, "kernels", "--preset", preset, "--dtype", "bf16", *tiny)
            if report is None:
                ok, said = False, said + [f"{preset}: {err[-300:]}"]
                continue
            wrong = [f"{r['name']} {r['shape']}: {r['why']}" for r in report["kernels"] if not r["ok"]]
            ok = ok and code == 0 and bool(report["kernels"])
            self.report["kernels"] += [{**r, "preset": preset} for r in report["kernels"]]
            self.keep(report)
            said.append(f"{preset}: {len(report['kernels'])} rows" + "".join(f"; {w}" for w in wrong))
        self.check(name, ok, ", ".join(said))

    def keep(self, report):
        """The ceilings and the conditions of the run."""
        facts = report.get("conditions") or {}
        if facts.get("name"):
            self.report["device"] = f"{facts['name']} ({facts['multiprocessors']} SMs)"
            self.report["driver"] = f"{facts.get('driver') or 'unknown'} (CUDA {facts['cuda']})"
        for field in ("peak_gflop_per_s", "peak_source", "copy_gb_per_s", "conditions"):
            if report.get(field) is not None:
                self.report[field] = report[field]

    def steps(self, name):
        said, ok = [], True
        for preset, lengths, tokens in [("tiny", "lognormal:40,0.5", 120)] if self.a.dry_run else STEPS:
            quick = ["--vocab", 300, "--quick"] if self.a.dry_run else ["--seconds", 2]
            flags = ["--preset", preset, "--mode", "train", "--head", "mlm", "--dtype", "bf16", "--lengths", lengths, "--tokens", tokens, *quick]
            report, code, err = self.bench(50, "step", *flags)
            if report is None or code:
                ok, said = False, said + [f"{preset}: {err[-300:]}"]
                continue
            self.report["steps"].append(report)
            share = report["fraction_of_peak"]
            said.append(f"{preset}: " + ("not timed" if share is None else f"{report['ms_median']} ms, {100 * share:.1f} % of the matmul rate"))
        self.check(name, ok, ", ".join(said))

    def peers(self, name):
        out = os.path.join(self.a.out, "peers.part.json")
        limit = max(20.0, min(220.0, self.left() - 5))
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "peers.py")
        command = [sys.executable, script, "--ours", self.a.program, "--device", self.device, "--out", out, "--limit", str(limit - 15)]
        code, _, err = self.run(command + (["--dry-run"] if self.a.dry_run else []), limit)
        if not os.path.exists(out):
            return self.check(name, False, err[-400:])
        found = schema.read(out)
        os.remove(out)
        self.report["ratios"] = found["ratios"]
        self.report["versions"] = found["versions"]
        made = sum(r["ratio"] is not None for r in found["ratios"])
        skipped = dict.fromkeys(r["skipped"] for r in found["ratios"] if r.get("skipped"))
        self.check(name, code == 0, f"{made} of {len(found['ratios'])} rows; " + "; ".join(skipped) + ("" if code == 0 else err[-300:]))

    def all(self):
        self.stage("doctor", self.doctor)
        usable = self.report["checks"][0]["ok"]
        if usable:
            mixture = ["--lengths", "lognormal:40,0.5", "--tokens", 120, "--sweep"]
            second = "cpu" if self.a.dry_run else "emulated"
            self.stage("oracle", self.oracle)
            self.stage("emulator", lambda name: self.agreement(name, "--against", second, *mixture))
            self.stage("determinism", lambda name: self.agreement(name, "--repeat", 1 if self.a.dry_run else 29, *mixture))
            for tool in TOOLS:
                self.stage(f"sanitizer/{tool}", self.sanitizer)
            self.stage("bench_kernels", self.kernels)
            self.stage("bench_step", self.steps)
            self.stage("peers", self.peers)
        whole = self.write()
        for kind in ("kernels",):
            if not whole[kind]:
                # The schema wants a row: one that says that there is none.
                self.report[kind] = [{"name": "none", "shape": "–", **dict.fromkeys(schema.KERNEL_NUMBERS)}]
                whole = self.write()
        return whole


def commit(root):
    """Of the bundle, or of the repository."""
    try:
        with open(os.path.join(root, "COMMIT"), encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        done = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        return done.stdout.strip() or "unknown"


def main():
    p = argparse.ArgumentParser(prog="gpu-check.sh", description=__doc__.split("\n")[0])
    p.add_argument("--root", required=True, help=argparse.SUPPRESS)
    p.add_argument("--dry-run", action="store_true", help="the same flow on the emulator, tiny, nothing timed")
    p.add_argument("--device", default="cuda:0")
    p.add_argument("--out", default=".", help="folder of the report")
    p.add_argument("--budget", type=float, default=585, help="seconds for everything")
    p.add_argument("--program", help="cellrefine (default: the bundle's, or target/release/cellrefine)")
    p.add_argument("--tests", help="the compiled tests of the ops (default: the bundle's)")
    a = p.parse_args()
    bundled = os.path.join(a.root, "bin", "cellrefine")
    a.program = a.program or (bundled if os.path.exists(bundled) else os.path.join(a.root, "target", "release", "cellrefine"))
    a.tests = a.tests or os.path.join(a.root, "bin", "ops")
    if not os.path.exists(a.program):
        sys.exit(f"no {a.program}: scripts/gpu-check.sh --bundle DIR, or cargo build --release")
    os.makedirs(a.out, exist_ok=True)
    flow = Flow(a)
    whole = flow.all()
    wrong = schema.faults(whole)
    failed = [c["name"] for c in whole["checks"] if c["ok"] is False]
    print(table.markdown(whole))
    print(f"{flow.path}: {len(failed)} checks failed{': ' + ', '.join(failed) if failed else ''}; {time.monotonic() - flow.begin:.0f} s")
    if wrong:
        print("the report is not as it should be: " + "; ".join(wrong), file=sys.stderr)
    sys.exit(1 if wrong or failed else 0)


if __name__ == "__main__":
    main()
