"""Times PyTorch the way `cellrefine bench` times kernels: single calls between two events, each after a write of twice the L2 cache
that is not timed. On a CPU (a dry run) every function is called once and nothing is timed."""
import json
import os
import statistics
import subprocess
import tempfile
import time

SAMPLE_MS = 2.0
MOST_CALLS = 256


class Clock:
    """The GPU's clock and its state; without a GPU, none."""

    def __init__(self, torch, warm_up_s):
        self.torch, self.warm_up_s = torch, warm_up_s
        self.gpu = torch.cuda.is_available()
        self.flush = None
        self.sensors = None
        if self.gpu:
            l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or (64 << 20)
            self.flush = torch.empty(2 * l2, dtype=torch.uint8, device="cuda")
            try:
                import pynvml

                pynvml.nvmlInit()
                self.sensors = (pynvml, pynvml.nvmlDeviceGetHandleByIndex(0))
            except Exception:
                pass

    def sm_mhz(self):
        if not self.sensors:
            return None
        nvml, handle = self.sensors
        return float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))

    def _sample(self, call, calls, cold):
        events = []
        for _ in range(calls):
            if cold:
                self.flush.zero_()
            begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        self.torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in events) / calls

    def samples(self, call, count, cold=True):
        """`count` samples, milliseconds of a call; none without a GPU."""
        call()
        if not self.gpu:
            return []
        self.torch.cuda.synchronize()
        begin = time.perf_counter()
        while time.perf_counter() - begin < self.warm_up_s:
            call()
            self.torch.cuda.synchronize()
        once = self._sample(call, 3, cold)
        calls = max(1, min(MOST_CALLS, int(SAMPLE_MS / max(once, 1e-4)) + 1))
        return [self._sample(call, calls, cold) for _ in range(count)]


class Ours:
    """`cellrefine bench` in a process of its own, asked for a few rows."""

    def __init__(self, program, device, dry_run, warm_up_s):
        self.program, self.device, self.dry_run, self.warm_up_s = program, device, dry_run, warm_up_s

    def bench(self, what, *flags, limit_s=120):
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "report.json")
            quick = ["--quick"] if self.dry_run else []
            command = [self.program, "bench", what, "--device", self.device, "--dtype", "bf16", "--quiet", "--json", "--out", out,
                       "--warm-up", str(self.warm_up_s), *quick, *flags]
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
            if not os.path.exists(out):
                raise RuntimeError(f"{' '.join(command[1:])}: {done.stderr.strip()[-300:]}")
            with open(out, encoding="utf-8") as file:
                report = json.load(file)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command[1:])}: {done.stderr.strip()[-300:]}")
            return report


def rows(report, name, shape, dtype="bf16"):
    """The rows of a report of kernels whose name is `name` and whose shape holds `shape`."""
    return [r for r in report["kernels"] if r["name"] == name and shape in r["shape"] and r["dtype"] == dtype]


def median(values):
    values = [v for v in values if v is not None]
    return statistics.median(values) if values else None


class Comparison:
    """One row of `ratios`: rounds of ours and theirs in turn."""

    def __init__(self, name, shape, unit="ms", engine="", note=""):
        self.name, self.shape, self.unit, self.engine, self.note = name, shape, unit, engine, note
        self.ours, self.peer, self.clocks = [], [], []
        self.max_err = None
        self.skipped = None

    def skip(self, why):
        self.skipped = self.skipped or (why if isinstance(why, str) else reason(why))
        return self

    def row(self):
        # A round whose clocks were more than 2 % apart is no comparison.
        kept = [(o, p) for (o, p, c) in zip(self.ours, self.peer, self.clocks + [None] * len(self.ours))
                if o and p and not (c and c[0] and c[1] and abs(c[0] / c[1] - 1) > 0.02)]
        ratios = [o / p if self.unit.endswith("/s") else p / o for o, p in kept]
        ours, peer, ratio = median([o for o, _ in kept] or self.ours), median([p for _, p in kept] or self.peer), median(ratios)
        row = {"name": self.name, "shape": self.shape, "ours": ours, "peer": peer, "ratio": ratio, "unit": self.unit,
               "engine": self.engine, "rounds": ratios, "rounds_left_out": len(self.ours) - len(kept), "max_err": self.max_err}
        if self.note:
            row["note"] = self.note
        if ratio is None:
            row["skipped"] = self.skipped or ("clocks more than 2 % apart in every round" if self.ours and self.peer else "not timed")
        return row


def reason(error):
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"
