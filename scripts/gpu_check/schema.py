"""What a file `gpu-YYYYMMDD-COMMIT.json` holds, and whether one does.

`checks` say what is right, `kernels` how fast each is, `ratios` how much faster than PyTorch (above 1 = we are). Numbers may be
null where nothing was measured; names may not be missing.
"""
import json
import re
import sys

# Every check and every ratio of a run, whether it could be made or not.
CHECKS = [
    "doctor", "oracle", "emulator", "determinism", "sanitizer/memcheck", "sanitizer/racecheck", "sanitizer/initcheck",
    "sanitizer/synccheck", "bench_kernels", "bench_step", "peers",
]
RATIOS = [
    "attention_forward/sdpa_default", "attention_forward/cudnn", "attention_backward/sdpa_default", "attention_backward/cudnn",
    "padded_sdpa", "marker_sparse/flex", "prototype_loss/compile", "prototype_loss/eager", "refine/hf_geneformer",
]
KERNEL_NUMBERS = ["ms_median", "gb_per_s", "tflop_per_s", "fraction_of_peak"]
RATIO_NUMBERS = ["ours", "peer", "ratio"]


def faults(report):
    """Everything that is wrong with a report, as a list of sentences."""
    found = []

    def want(condition, what):
        if not condition:
            found.append(what)

    def texts(row, fields, where):
        for field in fields:
            want(isinstance(row.get(field), str) and row[field], f"{where}: no text in `{field}`")

    def numbers(row, fields, where):
        for field in fields:
            value = row.get(field, "absent")
            plain = isinstance(value, (int, float)) and not isinstance(value, bool)
            want(value is None or (plain and value == value and value >= 0), f"{where}: `{field}` is {value!r}, not a number or null")

    if not isinstance(report, dict):
        return ["not an object"]
    texts(report, ["date", "commit", "device", "driver"], "report")
    want(re.fullmatch(r"\d{4}-\d\d-\d\d", str(report.get("date"))), f"`date` is {report.get('date')!r}, not a day")
    for name in ("checks", "kernels", "ratios"):
        want(isinstance(report.get(name), list) and report[name], f"no `{name}`")
    for row in report.get("checks") or []:
        where = f"check {row.get('name')}"
        texts(row, ["name"], where)
        want(row.get("ok") in (True, False, None), f"{where}: `ok` is {row.get('ok')!r}")
        want(isinstance(row.get("detail"), str), f"{where}: no text in `detail`")
    for row in report.get("kernels") or []:
        where = f"kernel {row.get('name')} {row.get('shape')}"
        texts(row, ["name", "shape"], where)
        numbers(row, KERNEL_NUMBERS, where)
    for row in report.get("ratios") or []:
        where = f"ratio {row.get('name')} {row.get('shape')}"
        texts(row, ["name", "shape", "unit"], where)
        numbers(row, RATIO_NUMBERS, where)
        if row.get("ratio") is None:
            want(isinstance(row.get("skipped"), str) and row["skipped"], f"{where}: neither a ratio nor why there is none")
    for kind, wanted in (("checks", CHECKS), ("ratios", RATIOS)):
        names = [row.get("name") for row in report.get(kind) or []]
        for name in wanted:
            want(name in names, f"no row `{name}` among `{kind}`")
    return found


def read(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


if __name__ == "__main__":
    wrong = faults(read(sys.argv[1]))
    print("\n".join(wrong) or f"{sys.argv[1]}: as it should be")
    sys.exit(1 if wrong else 0)
