"""Pictures of the committed results, into docs/images/.

Each picture is drawn from files under benchmarks/results alone, with goals and limits from
goals.py, and carries the digest of those files: a test tells when it is older than they are. What
was not measured is left out and named. Needs matplotlib (the extra `bench`) and no GPU.

  times.png      what a task, a delta and a hot swap take, beside limits, goals and peers
  bandwidth.png  appends and restores beside the bus and the driver's copies
  engine.png     decode and prefill of a real engine, and the cost of a token by its context
  recovery.png   from a kill to the next token
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

from drawing import COLOURS, frame, label_at, length, save_picture, say_time, styled
from goals import BY_KEY, KEYS, SLOPE_KEY, Goal

from concordia.testing.command import Parser, folder, run_command

ROOT: Final = pathlib.Path(__file__).parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"
IMAGES: Final = ROOT / "docs" / "images"
DEVICE: Final = "device_runtime_h200.json"
SOAKS: Final = ("soak_h200.json", "soak_h200_latest.json", "soak_tp2_h200.json")
TIMES: Final = (
    *("submit", "ring_round_trip", "delta_write_set", "delta_scan_burst", "delta_scan_4cta"),
    "hot_swap_pause",
)
RATIOS: Final = ("decode_ratio", "decode_p99_ratio", "prefill_ratio")
PEERS: Final = {
    "launch_and_sync": "launch + sync",
    "host_scan_pinned_all_cores": "host scan, all cores",
    "host_scan_pageable_one_thread": "host scan, one thread",
    "restart_recompiled": "restart, recompiled",
    "restart_from_cache": "restart, cached code",
    "copy_engine": "copy engine, 64 MiB",
    "copy_engine_64kib_pieces": "copy engine, 64 KiB",
    "naive_memcpy_pageable": "cudaMemcpy, pageable",
    "naive_memcpy_registered": "cudaMemcpy, registered",
    "copy_engine_pieces": "copy engine, each piece",
    "copy_engine_one_piece": "copy engine, one piece",
    "copy_of_each_step": "copy of each step",
    "recompute": "recompute",
    "driver_checkpoint": "driver's checkpoint, 16 GiB",
    "driver_restore": "driver's restore, 16 GiB",
}
Figures = dict[str, dict[str, Any]]
Results = dict[str, Any]  # the contents of result files, by name


def times(results: Results) -> Any:
    """One row a figure, on a logarithmic axis."""
    figures: Figures = results[DEVICE]["figures"]
    keys = [key for key in TIMES if key in figures]
    if not keys:
        return None
    picture, axes = frame(11, 1.4 + 0.95 * len(keys))
    axes.set_xscale("log")
    axes.set_xlim(0.03, 3e6)
    for row, key in enumerate(keys):
        _time_row(axes, row, BY_KEY[key], figures[key])
    axes.set_ylim(len(keys) - 0.4, -0.7)
    axes.set_yticks(range(len(keys)), [BY_KEY[key].what for key in keys])
    axes.set_xticks([10**n for n in range(-1, 7)], [say_time(10.0**n) for n in range(-1, 7)])
    axes.set_title("What the device runtime takes", loc="left")
    axes.text(1, 1.02, "shorter is better", transform=axes.transAxes, ha="right", color="#666")
    _legend(axes, "goal: left of the edge")
    return picture


def _time_row(axes: Any, row: int, goal: Goal, found: dict[str, Any]) -> None:
    ours, start = found["median"], axes.get_xlim()[0]
    axes.barh(row, goal.must - start, left=start, height=0.34, color=COLOURS["goal"], zorder=1)
    if goal.limit is not None:
        ends = [row - 0.17, row + 0.17]
        axes.plot([goal.limit] * 2, ends, color=COLOURS["limit"], lw=2, zorder=3)
    others = {PEERS.get(name, name): value for name, value in found["peer"].items()}
    if goal.paper is not None:
        others["paper"] = goal.paper
    for name, value in others.items():
        kind = "paper" if name == "paper" else "peer"
        axes.scatter(value, row, marker="D", s=42, color=COLOURS[kind], zorder=4, lw=0)
        said = name if name == "paper" else f"{name}\n{say_time(value)}"
        label_at(axes, said, (value, row), 12, size=8.5, colour=COLOURS[kind])
    axes.plot([found["min"], found["p95"]], [row, row], color=COLOURS["ours"], lw=3, zorder=5)
    axes.scatter(ours, row, s=95, color=COLOURS["ours"], zorder=6, lw=1.2, edgecolor="white")
    label_at(axes, say_time(ours), (ours, row), -12, size=11, colour=COLOURS["ours"], weight="bold")


def bandwidth(results: Results) -> Any:
    """Bars for append and restore, a line for the bus."""
    figures: Figures = results[DEVICE]["figures"]
    groups = {
        "append": {f"{n} CTA{'s' * (n > 1)}": f"append_bandwidth_{n}cta" for n in (1, 4, 8)},
        "restore": {
            "both": "restore_bandwidth",
            "2 MiB, pieces": "restore_bandwidth_2mib",
            "64 KiB, pieces": "restore_bandwidth_64kib",
        },
    }
    groups = {
        name: {label: key for label, key in bars.items() if key in figures}
        for name, bars in groups.items()
        if f"{name}_bandwidth" in figures
    }
    if not groups:
        return None
    picture, axes = frame(11, 5.6)
    at, ticks = 0.0, []
    for name, bars in groups.items():
        goal, head = BY_KEY[f"{name}_bandwidth"], figures[f"{name}_bandwidth"]
        start = at
        rows = [(label, figures[key]["median"], "ours") for label, key in bars.items()]
        rows += [(PEERS.get(peer, peer), value, "peer") for peer, value in head["peer"].items()]
        for label, value, kind in rows:
            axes.bar(at, value, width=0.74, color=COLOURS[kind], zorder=2)
            style = {"size": 11, "colour": COLOURS[kind], "weight": "bold"}
            top = value if value < goal.must - 5 else max(value, goal.limit or 0)
            label_at(axes, f"{value:.1f}", (at, top), 5, **style)
            ticks.append((at, label.replace(", ", "\n")))
            at += 1
        ends = [start - 0.5, at - 0.5]
        axes.plot(ends, [goal.limit] * 2, color=COLOURS["limit"], lw=1.6, zorder=3)
        axes.plot(ends, [goal.must] * 2, color=COLOURS["reached"], lw=1.6, ls="--", zorder=3)
        said = f"{name}: goal {goal.must:.0f} (dashed), limit {goal.limit:.0f} GB/s"
        axes.text(start - 0.45, 66.5, said, fontsize=11, weight="bold", va="top")
        at += 0.6
    axes.set_ylim(0, 67)
    axes.set_xlim(-0.6, at - 1)
    axes.set_xticks([x for x, _ in ticks], [label for _, label in ticks], fontsize=8.5)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("GB/s")
    axes.set_title("Over PCIe gen5 x16, one H200", loc="left")
    axes.text(1, 1.02, "higher is better", transform=axes.transAxes, ha="right", color="#666")
    return picture


def engine(results: Results) -> Any:
    """Ratios with their intervals, and the cost of a token by context."""
    figures: Figures = results[DEVICE]["figures"]
    keys = [key for key in RATIOS if key in figures]
    slope = figures.get(SLOPE_KEY)
    if not keys and slope is None:
        return None
    if slope is None:
        picture, left = frame(11, 4.0)
    else:
        picture, (left, right) = frame(11, 4.6, columns=2)
        _slope(right, slope)
    left.axvline(1, color=COLOURS["limit"], lw=1.6, zorder=1)
    for row, key in enumerate(keys):
        goal = BY_KEY[key]
        left.plot(
            [goal.must] * 2, [row - 0.36, row + 0.36], color=COLOURS["reached"], lw=1.6, ls="--"
        )
        names = {"ours": key, "peer": f"copy_{key}"}
        for shift, (kind, name) in zip((-0.14, 0.2), names.items(), strict=True):
            if name in figures:
                _ratio(left, row + shift, figures[name], kind)
    left.set_ylim(len(keys) - 0.4, -0.6)
    left.set_yticks(range(len(keys)), [BY_KEY[key].what for key in keys])
    left.set_title("With protection / without", loc="left")
    left.margins(x=0.12)
    left.grid(axis="y", visible=False)
    left.scatter([], [], color=COLOURS["ours"], s=70, label="Concordia")
    if any(f"copy_{key}" in figures for key in keys):
        left.scatter([], [], color=COLOURS["peer"], s=70, label=PEERS["copy_of_each_step"])
    left.plot([], [], color=COLOURS["reached"], lw=1.6, ls="--", label="goal")
    left.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.08), fontsize=9)
    return picture


def _ratio(axes: Any, row: float, found: dict[str, Any], kind: str) -> None:
    axes.plot(found["interval_95"], [row, row], color=COLOURS[kind], lw=4, alpha=0.4)
    axes.scatter(found["median"], row, s=70, color=COLOURS[kind], zorder=5, edgecolor="white")
    style = {"size": 10, "colour": COLOURS[kind], "weight": "bold"}
    label_at(axes, f"{found['median']:.3f}", (found["median"], row), 6, **style)


def _slope(axes: Any, found: dict[str, Any]) -> None:
    axes.set_title("Cost of a token by context", loc="left")
    contexts = [int(context) for context in found["by_context"]]
    spent = [row["cost_us"] for row in found["by_context"].values()]
    axes.plot(contexts, spent, "o-", color=COLOURS["ours"], lw=2, ms=8, label="Concordia")
    for name, label, style in (
        ("computed_device_scan", "scan by the GPU (computed)", "--"),
        ("computed_host_scan_pinned_all_cores", "scan by the host (computed)", ":"),
    ):
        if name in found["peer"]:
            line = [found["peer"][name] * context / 1024 for context in contexts]
            axes.plot(contexts, line, style, color=COLOURS["peer"], lw=2, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("symlog", linthresh=100)
    axes.set_ylim(bottom=min(-50, 1.5 * min(spent)))
    axes.set_xticks(contexts, [length(context) for context in contexts])
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("µs per token")
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def recovery(results: Results) -> Any:
    """From the kill to the next token: ours, the peers, the soaks."""
    figures: Figures = results[DEVICE]["figures"]
    rows: list[tuple[str, float, float, str]] = []  # label, median, largest, kind
    goal, ours = BY_KEY["recovery_next_token"], figures.get("recovery_next_token")
    if ours is not None:
        rows.append(("8B, 64K tokens of KV", ours["median"], ours.get("max", ours["p95"]), "ours"))
        rows += [(PEERS.get(name, name), v, v, "peer") for name, v in ours["peer"].items()]
        rows.append(("paper", goal.paper or 0, goal.paper or 0, "paper"))
    for file in SOAKS:
        if file in results:
            soak = results[file]
            ranks = ", two H200" if soak["tensor_parallel_size"] == 2 else ""
            found = soak["pause_beside_ready_standby_s"]
            label = f"soak, {soak['faults_injected']} faults{ranks}"
            rows.append((label, found["median"], found["max"], "ours"))
    if not rows:
        return None
    picture, axes = frame(11, 1.6 + 0.5 * len(rows))
    axes.set_xscale("log")
    axes.set_xlim(0.03, max(20, *(2.5 * largest for _, _, largest, _ in rows)))
    axes.axvspan(0.03, goal.must, color=COLOURS["goal"], zorder=0, lw=0)
    if ours is not None:
        axes.plot([goal.limit] * 2, [-0.5, 0.34], color=COLOURS["limit"], lw=2, zorder=4)
        axes.text(goal.limit * 1.03, -0.4, "limit: 8 GiB over the bus", fontsize=9)
    for row, (_, median, largest, kind) in enumerate(rows):
        axes.barh(row, median - 0.03, left=0.03, height=0.5, color=COLOURS[kind], zorder=2)
        axes.plot([median, largest], [row, row], color=COLOURS[kind], lw=2, zorder=3)
        said = say_time(median * 1e6)
        if largest > median:
            said += f", at most {say_time(largest * 1e6)}"
        axes.text(largest * 1.06, row, said, va="center", fontsize=10, color=COLOURS[kind],
            weight="bold", zorder=4)  # fmt: skip
    axes.set_ylim(len(rows) - 0.4, -0.9)
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    ticks = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
    axes.set_xticks(ticks, [say_time(t * 1e6) for t in ticks])
    axes.minorticks_off()
    axes.set_title("From SIGKILL to the next token", loc="left")
    axes.text(1, 1.02, "shaded: the goal", transform=axes.transAxes, ha="right", color="#666")
    return picture


def _legend(axes: Any, goal: str) -> None:
    for kind, label in (("ours", "Concordia (line: min to p95)"), ("peer", "measured peer")):
        axes.scatter(
            [], [], color=COLOURS[kind], marker="o" if kind == "ours" else "D", label=label
        )
    axes.scatter([], [], color=COLOURS["paper"], marker="D", label="published")
    axes.plot([], [], color=COLOURS["limit"], lw=2, label="limit of the hardware")
    axes.bar(1, 0, color=COLOURS["goal"], label=goal)
    axes.legend(
        frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.44, -0.09), fontsize=9
    )


PICTURES: Final[dict[str, tuple[Callable[[Results], Any], tuple[str, ...]]]] = {
    "times.png": (times, (DEVICE,)),
    "bandwidth.png": (bandwidth, (DEVICE,)),
    "engine.png": (engine, (DEVICE,)),
    "recovery.png": (recovery, (DEVICE, *SOAKS)),
}


def read(folder: pathlib.Path) -> Results:
    """What the pictures are drawn from; raises OSError or ValueError without the main file."""
    soaks = [file for file in SOAKS if (folder / file).exists()]
    return {file: json.loads((folder / file).read_text()) for file in (DEVICE, *soaks)}


def digest(results: Results, files: Sequence[str]) -> str:
    """Names what a picture was drawn from: the figures, not when they were written down."""
    found = hashlib.sha256()
    for file in files:
        if file in results:
            kept = results[file]["figures"] if file == DEVICE else results[file]
            found.update(file.encode() + json.dumps(kept, sort_keys=True).encode())
    return found.hexdigest()


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(PICTURES), default=list(PICTURES))
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder")
    parser.add_argument("--output", type=folder, default=IMAGES, help="folder")
    options = parser.parse_args(arguments)
    try:
        results = read(options.results)
        missing = [key for key in KEYS if key not in results[DEVICE]["figures"]]
    except (OSError, ValueError, KeyError) as error:
        print(f"plot: no figures in {options.results / DEVICE}: {error!r}", file=sys.stderr)
        return 2
    if missing:
        print(f"plot: not measured: {', '.join(missing)}", file=sys.stderr)
    try:
        with styled():
            for name in options.only:
                draw, files = PICTURES[name]
                save_picture(draw(results), options.output / name, digest(results, files))
    except ImportError as error:
        print(f"plot: {error}: install the extra 'bench' (pip install '.[bench]')", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main)
