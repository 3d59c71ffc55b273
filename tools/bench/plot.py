"""The roofline plot of a report: arithmetic intensity against TFLOPS, the machine's ceilings, ours and the peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.bench.peers import OURS

FORMATS = (".svg", ".png")
MARKERS = ("o", "s", "^", "D", "v")


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the plot to `path`. ValueError for an ending other than .svg and .png; needs matplotlib (extra `demo`)."""
    if path.suffix not in FORMATS:
        raise ValueError(f"--plot {path}: ending {path.suffix!r}, supported {' '.join(FORMATS)}")
    # The object interface: no pyplot, so no global state and no display.
    from matplotlib.figure import Figure

    ceilings, rows = report["ceilings"], report["rows"]
    stream_tb = max(ceilings["copy_gbs"], ceilings["read_gbs"]) / 1e3
    peak = ceilings["matmul_tflops"]
    intensities = [row["flops"] / row["bytes"] for row in rows]
    left, right = min([*intensities, peak / stream_tb]) / 2, max([*intensities, peak / stream_tb]) * 2
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    knee = peak / stream_tb
    axes.plot([left, knee, right], [left * stream_tb, peak, peak], color="black", linewidth=1.5)
    axes.annotate(f"{stream_tb:.2f} TB/s", (left, left * stream_tb), xytext=(6, 28), textcoords="offset points")
    label = f"{peak:.0f} TFLOPS bf16 matmul"
    axes.annotate(label, (right, peak), xytext=(-4, 5), textcoords="offset points", ha="right")
    for i, name in enumerate(x["name"] for x in report["implementations"]):
        points = [(x, row["results"][name]["tflops"]) for x, row in zip(intensities, rows) if name in row["results"]]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.scatter(xs, ys, marker=MARKERS[i % len(MARKERS)], s=34, alpha=0.8 if name == OURS else 0.5, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.set_xlim(left, right)
    axes.set_xlabel("arithmetic intensity, FLOP per byte of K, Q and O")
    axes.set_ylabel("TFLOPS")
    axes.set_title(f"MLA decode on {report['machine']['device']}, {report['date'][:10]}")
    axes.grid(which="major", alpha=0.3)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
