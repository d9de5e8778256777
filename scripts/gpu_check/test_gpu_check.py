"""python3 -m unittest discover -s scripts/gpu_check: the schema finds faults, the table says what the report says."""
import copy
import os
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import schema  # noqa: E402
import table  # noqa: E402
from peer_geneformer import batches  # noqa: E402
from peer_timing import Comparison  # noqa: E402


def report():
    ratio = lambda name: {"name": name, "shape": "16 cells of 2048", "ours": 1.0, "peer": 2.0, "ratio": 2.0, "unit": "ms"}
    kernel = {"name": "adamw", "shape": "100", "ms_median": 0.5, "gb_per_s": 4000.0, "tflop_per_s": 0.0, "fraction_of_peak": 0.93}
    return {
        "date": "2026-11-23", "commit": "abc1234", "device": "NVIDIA H200", "driver": "580.1 (CUDA 13.0)",
        "checks": [{"name": name, "ok": True, "detail": ""} for name in schema.CHECKS], "kernels": [kernel],
        "ratios": [ratio(name) for name in schema.RATIOS],
        "steps": [{"preset": "gf-v1-10m", "mode": "train", "fraction_of_peak": 0.41, "ms_median": 7.5}],
    }


class Schema(unittest.TestCase):
    def test_a_whole_report_has_no_fault(self):
        self.assertEqual(schema.faults(report()), [])

    def test_every_missing_name_is_told(self):
        for kind, names in (("checks", schema.CHECKS), ("ratios", schema.RATIOS)):
            for name in names:
                less = report()
                less[kind] = [row for row in less[kind] if row["name"] != name]
                self.assertTrue(any(name in fault for fault in schema.faults(less)), name)

    def test_values_of_the_wrong_kind_are_told(self):
        def changed(change):
            wrong = copy.deepcopy(report())
            change(wrong)
            return schema.faults(wrong)

        self.assertTrue(changed(lambda r: r.update(date="today")))
        self.assertTrue(changed(lambda r: r.pop("driver")))
        self.assertTrue(changed(lambda r: r.update(kernels=[])))
        self.assertTrue(changed(lambda r: r["kernels"][0].pop("tflop_per_s")))
        self.assertTrue(changed(lambda r: r["kernels"][0].update(ms_median=float("nan"))))
        self.assertTrue(changed(lambda r: r["ratios"][0].update(ratio="2")))
        self.assertTrue(changed(lambda r: r["ratios"][0].update(ratio=None)), "no ratio and no reason")
        self.assertTrue(changed(lambda r: r["checks"][0].update(ok="yes")))
        self.assertEqual(changed(lambda r: r["ratios"][0].update(ratio=None, skipped="no cuDNN")), [])
        self.assertTrue(schema.faults([]))


class Table(unittest.TestCase):
    def test_without_a_report_every_row_says_so(self):
        rows = [line for line in table.markdown(None).splitlines() if line.startswith("| ") and "goal" not in line]
        self.assertEqual(len(rows), len(table.GOALS) + len(table.ABSOLUTES) + len(table.STEPS) + len(table.MOVERS))
        self.assertTrue(all(table.NOT_YET in row for row in rows))

    def test_every_ratio_of_the_schema_has_a_goal(self):
        self.assertEqual({goal[1] for goal in table.GOALS}, set(schema.RATIOS))

    def test_goals_are_held_against_the_worst_shape(self):
        r = report()
        r["ratios"].append({**r["ratios"][0], "shape": "mixture", "ratio": 1.2})
        r["ratios"][1].update(ratio=None, skipped="no cuDNN")
        lines = table.markdown(r).splitlines()
        first = next(line for line in lines if "SDPA's default" in line)
        self.assertIn("**1.20×** to 2.00×, missed", first)
        self.assertIn("mixture 1.20×", first)
        second = next(line for line in lines if "forward against cuDNN" in line)
        self.assertTrue(table.NOT_YET in second and "no cuDNN" in second)
        self.assertTrue(any("gf-v1-10m" in line and "**41.0 %**" in line and "missed" not in line for line in lines))
        self.assertTrue(any(line.startswith("| adamw | ≥ 85 % | 93 to 93 %") for line in lines))
        self.assertTrue(any(line.startswith("| adamw | 100 | 0.5 | 0 | 4000 | 93 %") for line in lines))

    def test_absolute_numbers_come_from_the_rows_of_v2(self):
        r = report()
        row = lambda name, shape, tflop, graph=None, preset="gf-v2-104m": {
            "name": name, "shape": shape, "ms_median": 1.0, "gb_per_s": 1.0, "tflop_per_s": tflop, "fraction_of_peak": 0.5, "graph_ms": graph, "preset": preset}
        r["kernels"] += [
            row("gene_attention_forward", "1 tokens, 16 cells of 2048, dense, 12x64", 400, preset="gf-v1-10m"),
            row("gene_attention_forward", "1 tokens, 16 cells of 2048, dense, 12x64", 500),
            row("gene_attention_forward", "1 tokens, 21 cells up to 4096, dense, 12x64", 490),
            row("prototype_loss_forward", "256x100x256", 1, 0.004), row("prototype_loss_backward", "256x100x256", 1, 0.009),
        ]
        text = table.markdown(r)
        self.assertIn("≥ 460 TFLOP/s | 550 | **500 TFLOP/s** |", text)
        self.assertIn("≤ 3 % | 1 | **2 %** |", text)
        self.assertIn("**13 µs**, missed", text)
        self.assertIn("≥ 430 TFLOP/s | 510 | not yet measured on a GPU |", text)

    def test_the_newest_measurement_counts_and_a_dry_run_does_not(self):
        import json

        with tempfile.TemporaryDirectory() as folder:
            self.assertIsNone(table.newest(folder))
            for name, commit, dry in (("gpu-20261123-b.json", "b", False), ("gpu-20261122-c.json", "c", False), ("gpu-20261124-d.json", "d", True)):
                with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                    json.dump({**report(), "commit": commit, "dry_run": dry}, file)
            self.assertEqual(table.newest(folder)["commit"], "b")

    def test_only_what_is_between_the_marks_changes(self):
        text = f"above\n{table.BEGIN}\nold\n{table.END}\nbelow\n"
        self.assertEqual(table.between_marks(text, "new\n"), f"above\n{table.BEGIN}\nnew\n{table.END}\nbelow\n")


class Peers(unittest.TestCase):
    def test_ratios_are_ours_over_theirs_the_right_way_round(self):
        c = Comparison("a", "b")
        c.ours, c.peer, c.clocks = [1.0, 1.0, 4.0], [2.0, 3.0, 4.0], [(1980.0, 1970.0), None, (1980.0, 1700.0)]
        row = c.row()
        self.assertEqual((row["ratio"], row["rounds_left_out"], row["rounds"]), (2.5, 1, [2.0, 3.0]))
        rate = Comparison("a", "b", unit="cells/s")
        rate.ours, rate.peer = [300.0], [100.0]
        self.assertEqual(rate.row()["ratio"], 3.0)

    def test_what_was_not_timed_says_why(self):
        c = Comparison("a", "b").skip(ValueError("no kernel\nmore"))
        self.assertEqual((c.row()["ratio"], c.row()["skipped"]), (None, "ValueError: no kernel"))
        apart = Comparison("a", "b")
        apart.ours, apart.peer, apart.clocks = [1.0], [2.0], [(1980.0, 1000.0)]
        self.assertIn("clocks", apart.row()["skipped"])

    def test_batches_are_grouped_by_length(self):
        lengths = [i % 97 + 1 for i in range(1000)]
        grouped = batches(lengths, 8, 0)
        self.assertEqual(len(grouped), 125)
        self.assertEqual(len({i for batch in grouped for i in batch}), 1000)
        spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in grouped) / len(grouped)
        self.assertLess(spread, 5)


if __name__ == "__main__":
    unittest.main()
