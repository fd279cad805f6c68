"""Figures of a report (rows as in `report`): PNG, one column of panels per task, legends below the data.

Colours are those of Okabe and Ito, told apart by colour-blind readers; markers tell the same by shape. Figures are
drawn by Agg without pyplot, so the caller's backend and open figures stay as they are.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .report import METHOD_NAMES, Row, by_task, write_atomically


BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY, DARK = "#777777", "#333333"
# Of VGF at several settings: one colour and marker each.
_SETTINGS = ((VERMILION, "o"), (GREEN, "s"), (PURPLE, "D"), (ORANGE, "^"), (SKY, "v"), (DARK, "X"))
_STUDENTS = {
    "student_best_of_n": ("student of best-of-n", BLUE, "*"),
    "student_vgf": ("student of VGF", VERMILION, "P"),
    "vgf_auto": ("VGF, automatic budget", ORANGE, "X"),
}
_CONTROLS = {"vgf_random": "x", "vgf_flip": "v", "vgf_shuffle": "D"}
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
# What tells the series of a figure apart (RM: reward model). Steps and rounds do not: budget 0 is the first point of its series.
_SETTING_NAMES: dict[str, Callable[[Any], str]] = {
    "gradient": lambda gradient: f"{gradient} gradient",
    "num_particles": lambda n: f"N={n:g}",
    "members": lambda m: f"{m:g} RM{'s' if m != 1 else ''}",
    "verified": lambda verified: "" if verified else "unverified",
}


def plot_frontier(rows: Sequence[Row], path: str | Path) -> None:
    """Gold reward against KL from the base model in nats: the best-of-n curve, VGF, its controls and the students.

    Rows without `kl_nats` or `reward_gold` are left out. Bars are the 95 % intervals.

    Raises:
        ValueError: nothing to draw, or a row without task or method.
        OSError: the file cannot be written.
    """
    with matplotlib.rc_context(_STYLE):
        tasks = _tasks(rows, ("kl_nats", "reward_gold"))
        figure, axes = _panels(len(tasks), 1, "Gold reward per nat of KL from the base model")
        for (ax,), (task, of_task) in zip(axes, tasks.items(), strict=True):
            curve = _best_of_n(ax, of_task, "kl_nats", "best-of-n (number: n)")
            _moved(ax, of_task, "kl_nats")
            ax.set(title=task, xlabel="KL from the base model (nats)", ylabel="gold reward")
            ax.margins(x=0.06, y=0.12)
            _annotate_n(ax, curve)
        _legend(figure, axes)
        _save(figure, path)


def plot_generations(rows: Sequence[Row], path: str | Path) -> None:
    """Gold reward against what it costs: base-model generations per prompt, on a log2 axis.

    Rows without `generations` or `reward_gold` are left out. Bars are the 95 % intervals.

    Raises:
        ValueError: nothing to draw, generations that are not positive, or a row without task or method.
        OSError: the file cannot be written.
    """
    with matplotlib.rc_context(_STYLE):
        tasks = _tasks(rows, ("generations", "reward_gold"))
        if any(row["generations"] <= 0 for of_task in tasks.values() for row in of_task):
            raise ValueError("generations must be positive: the base model writes at least one completion")
        figure, axes = _panels(len(tasks), 1, "Gold reward per generation of the base model")
        for (ax,), (task, of_task) in zip(axes, tasks.items(), strict=True):
            for row in _of(of_task, "base")[:1]:
                ax.axhline(row["reward_gold"], color=GREY, linestyle=":", linewidth=1.4, label="base")
            _best_of_n(ax, of_task, "generations", "best-of-n")
            _moved(ax, of_task, "generations", joined=False)
            ax.set(title=task, xlabel="generations per prompt (log scale)", ylabel="gold reward")
            ax.set_xscale("log", base=2)
            _plain_log2(ax, [row["generations"] for row in of_task])
            ax.margins(y=0.12)
        _legend(figure, axes)
        _save(figure, path)


def plot_budget(rows: Sequence[Row], path: str | Path) -> None:
    """Proxy and gold reward of VGF against the KL budget of a decode, stacked, with the budget where gold is highest.

    Takes the rows of method "vgf" with `kl_budget`, `reward_proxy` and `reward_gold`; a budget of 0 (nothing moves) is
    a horizontal line. Where gold turns over while proxy still rises, the reward model is being over-optimised. A
    dashed line marks the best budget of each setting.

    Raises:
        ValueError: nothing to draw, a negative budget, or a row without task or method.
        OSError: the file cannot be written.
    """
    with matplotlib.rc_context(_STYLE):
        tasks = _tasks([row for row in rows if row.get("method", "vgf") == "vgf"], ("kl_budget", "reward_proxy", "reward_gold"))
        if any(row["kl_budget"] < 0 for of_task in tasks.values() for row in of_task):
            raise ValueError("kl_budget must not be negative")
        figure, axes = _panels(len(tasks), 2, "Proxy and gold reward as the KL budget grows")
        for (above, below), (task, of_task) in zip(axes, tasks.items(), strict=True):
            moving = [row for row in of_task if row["kl_budget"] > 0]
            for row in [row for row in of_task if row["kl_budget"] == 0][:1]:
                for ax, key in ((above, "reward_proxy"), (below, "reward_gold")):
                    ax.axhline(row[key], color=GREY, linestyle=":", linewidth=1.4, label="budget 0 (best-of-n)")
            peaks = []
            for index, (name, series) in enumerate(_settings(moving)):
                colour, marker = _SETTINGS[index % len(_SETTINGS)]
                series = _sorted(series, "kl_budget")
                label = f"VGF {name}".strip()
                _line(above, series, "kl_budget", label, colour, marker, y="reward_proxy")
                _line(below, series, "kl_budget", label, colour, marker, band=True)
                if len(series) == 1:  # no curve, no peak
                    continue
                best = max(series, key=lambda row: row["reward_gold"])
                peaks.append((best["kl_budget"], colour, best is series[-1]))
            for ax in (above, below):
                for budget, colour, _ in peaks:
                    ax.axvline(budget, color=colour, linestyle="--", linewidth=1.2, alpha=0.8)
                if moving:
                    ax.set_xscale("log", base=2)
                    _plain_log2(ax, [row["kl_budget"] for row in moving])
                ax.margins(y=0.12)
            said = " and ".join(f"{budget:g}" for budget in sorted({budget for budget, *_ in peaks}))
            edge = " (largest tried)" if peaks and all(last for *_, last in peaks) else ""
            unit = "nat" if said == "1" else "nats"
            above.set(title=f"{task}\ngold is highest at {said} {unit}{edge}" if peaks else task)
            above.set_ylabel("proxy reward")
            below.set(xlabel="KL budget of a decode (nats per completion, log scale)", ylabel="gold reward")
            above.tick_params(labelbottom=False)
        _legend(figure, axes)
        _save(figure, path)


def plot_diagnosis(report: dict[str, Any], path: str | Path) -> None:
    """The report of `vgf diagnose` as a row of panels: fidelity, where in the text, gain per nat, the end of the text.

    Raises:
        OSError: the file cannot be written.
    """
    names = {"fixed": ("rest kept", BLUE), "regenerated": ("rest written anew", VERMILION)}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(17, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(textwrap.fill(report["recommendation"]["sentence"], 150), fontsize=11)
        where, position, entropy, gain, end = axes = figure.subplots(1, 5)
        places = list(dict.fromkeys(row["at"] for row in report["fidelity"]))
        by = {(row["suffix"], row["at"]): row for row in report["fidelity"]}
        for ax, title, ticks, rows in (
            (where, "gradient taken at", places, {s: [by[s, at] for at in places] for s in names}),
            (position, "third of the text", ["first", "middle", "last"], report["by_position"]),
            (entropy, "entropy of the base model", ["low", "middle", "high"], report["by_entropy"]),
        ):
            for shift, (suffix, (label, colour)) in zip((-0.12, 0.12), names.items(), strict=True):
                seen = [(x, row) for x, row in enumerate(rows[suffix]) if row["value"] is not None]
                value, low, high = ([row[key] for _, row in seen] for key in ("value", "low", "high"))
                bars = [[max(0.0, v - edge) for v, edge in zip(value, low, strict=True)]]
                bars.append([max(0.0, edge - v) for v, edge in zip(value, high, strict=True)])
                ax.errorbar([x + shift for x, _ in seen], value, bars, fmt="o", color=colour, capsize=3, label=label)
            ax.axhline(0, color=GREY, linewidth=1)
            ax.set(title=title, xlim=(-0.5, len(ticks) - 0.5))
            ax.set_xticks(range(len(ticks)), ticks)
        shared = [limit for ax in (where, position, entropy) for limit in ax.get_ylim()]
        for ax in (where, position, entropy):
            ax.set_ylim(min(shared), max(shared))
        where.set_ylabel("rank correlation of\npredicted and true change")
        for direction, colour, marker in (("gradient", VERMILION, "o"), ("field", GREEN, "s"), ("random", GREY, "x")):
            points = [g for g in report["gain"] if g["direction"] == direction]
            if not points:
                continue
            bars = [[g["gain"] - g["gain_low"] for g in points], [g["gain_high"] - g["gain"] for g in points]]
            label = {"random": "random direction", "field": "along the field"}.get(direction, direction)
            gain.errorbar(
                [g["kl"] for g in points], [g["gain"] for g in points], bars, color=colour, marker=marker, capsize=3, label=label
            )
        most = max(g["kl"] for g in report["gain"])
        steps = [most * k / 50 for k in range(51)]
        gain.plot(steps, [math.sqrt(2 * x) for x in steps], color=DARK, linestyle="--", label="ideal, √(2 KL)")
        gain.axhline(0, color=GREY, linewidth=1)
        gain.set(title="one decode", xlabel="KL spent (nats)", ylabel="gain of the reward (its std)")
        measured = report["end"]
        end.bar([-0.2, 0.8], [measured["gradient_share"], measured["swap"]], 0.4, color=VERMILION, label="at the end")
        end.bar([0.2, 1.2], [measured["even_share"], measured["swap_elsewhere"]], 0.4, color=SKY, label="evenly, elsewhere")
        end.set(title="end of the text")
        end.set_xticks([0, 1], ["share of\ngradient norm", "another word,\nstd of reward"])
        _legend(figure, [axes])
        _save(figure, path)


def plot_overoptimisation(rows: Sequence[Row], path: str | Path) -> None:
    """Gold reward against the proxy that was optimised: what a unit of proxy is worth, by each way to get it.

    A curve that bends down has been optimised too far (Gao et al. 2023). Rows without both rewards are left out.

    Raises:
        ValueError: nothing to draw, or a row without task or method.
        OSError: the file cannot be written.
    """
    with matplotlib.rc_context(_STYLE):
        tasks = _tasks(rows, ("reward_proxy", "reward_gold"))
        figure, axes = _panels(len(tasks), 1, "Over-optimisation: gold reward against proxy")
        for (ax,), (task, of_task) in zip(axes, tasks.items(), strict=True):
            curve = _best_of_n(ax, of_task, "reward_proxy", "best-of-n (number: n)")
            _moved(ax, of_task, "reward_proxy")
            ax.set(title=task, xlabel="proxy reward (optimised)", ylabel="gold reward (held out)")
            ax.margins(x=0.06, y=0.12)
            _annotate_n(ax, curve, "reward_proxy")
        _legend(figure, axes)
        _save(figure, path)


def plot_wins(rows: Sequence[Row], path: str | Path) -> None:
    """Win rate of every row in percent with its 95 % interval, one panel per judge and opponent; ties count half.

    Best-of-n is drawn at the n of the other rows and at the largest alone. Rows without `wins` are left out.

    Raises:
        ValueError: nothing to draw.
        OSError: the file cannot be written.
    """
    rows = [row for row in rows if row.get("wins")]
    sizes = [row["num_particles"] for row in rows if row["method"] == "best_of_n"]
    kept = {max(sizes, default=0), *(row["num_particles"] for row in rows if row["method"] == "vgf")}
    rows = [row for row in rows if not row["method"].startswith("best_of_n") or row["num_particles"] in kept]
    pairs = list(dict.fromkeys((judge, against) for row in rows for judge, found in row["wins"].items() for against in found))
    if not pairs:
        raise ValueError("no row has wins: nothing to draw")
    names = [_row_name(row) for row in rows]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(6.4, 2.2 + 3.2 * len(pairs)), 1.4 + 0.36 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle("Win rate, ties counted half", fontsize=13)
        axes = figure.subplots(1, len(pairs), squeeze=False, sharey=True)[0]
        for ax, (judge, against) in zip(axes, pairs, strict=True):
            ax.axvline(50, color=GREY, linestyle=":", linewidth=1.4)
            for y, row in enumerate(rows):
                found = row["wins"].get(judge, {}).get(against, {})
                if found.get("rate") is None:
                    continue
                rate, low, high = (100 * found[key] for key in ("rate", "low", "high"))
                colour = {
                    "vgf": VERMILION,
                    "vgf_random": GREY,
                    "base": BLUE,
                    "best_of_n": BLUE,
                    "best_of_n_likelihood": BLUE,
                }.get(row["method"], GREEN)
                ax.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="round")
                ax.plot([rate], [y], "o", color=colour, markersize=6)
            ax.set(title=f"{judge}: against {against}", xlabel="wins (%)", yticks=range(len(rows)), yticklabels=names)
            ax.set_xlim(0, 100)
        axes[0].invert_yaxis()
        _save(figure, path)


def _row_name(row: Row) -> str:
    name = METHOD_NAMES.get(row["method"], row["method"])
    if row["method"].startswith("best_of_n"):
        return f"best-of-{row['num_particles']:g}" + (", likelihood counts" if row["method"] == "best_of_n_likelihood" else "")
    if row.get("kl_budget") == 0:
        return f"VGF, L = 0 (N={row['num_particles']:g})"
    return (
        f"{name}, {row['kl_budget']:g} nat{'s' if row['kl_budget'] != 1 else ''}"
        if row.get("kl_budget") is not None
        else str(name)
    )


def _tasks(rows: Sequence[Row], needed: Sequence[str]) -> dict[str, list[Row]]:
    """Rows that hold what is drawn, by task."""
    kept = {
        task: [row for row in of_task if all(row.get(key) is not None for key in needed)]
        for task, of_task in by_task(rows).items()
    }
    kept = {task: of_task for task, of_task in kept.items() if of_task}
    if not kept:
        raise ValueError(f"no row has all of {', '.join(needed)}: nothing to draw")
    return kept


def _of(rows: Sequence[Row], *methods: str) -> list[Row]:
    return [row for row in rows if row["method"] in methods]


def _sorted(rows: Sequence[Row], key: str) -> list[Row]:
    return sorted(rows, key=lambda row: row[key])


def _settings(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows that share their settings, named by the settings that differ between series, and by N always."""
    varied = [
        key
        for key in _SETTING_NAMES
        if key == "num_particles" and any(row.get(key) is not None for row in rows)
        or len({row.get(key) for row in rows}) > 1
    ]  # fmt: skip
    series: dict[str, list[Row]] = {}
    for row in rows:
        said = [_SETTING_NAMES[key](row[key]) for key in varied if row.get(key) is not None]
        series.setdefault(", ".join(filter(None, said)), []).append(row)
    return list(series.items())


def _best_of_n(ax: Axes, rows: Sequence[Row], x: str, label: str) -> list[Row]:
    """One curve for every number of reward models, the largest with its band; that one is returned. Selected by likelihood too it
    is dashed."""
    of_members: dict[Any, list[Row]] = {}
    for row in _sorted(_of(rows, "base", "best_of_n"), x):
        of_members.setdefault(row.get("members"), []).append(row)
    ranked = sorted(of_members.items(), key=lambda item: item[0] or 0, reverse=True)
    for index, (members, curve) in enumerate(ranked):
        name = label if len(ranked) == 1 else f"{label}, {_SETTING_NAMES['members'](members)}"
        _line(ax, curve, x, name, BLUE if index == 0 else SKY, "o", band=index == 0)
    if ranked:
        most = [row for row in _of(rows, "best_of_n_likelihood") if row.get("members") == ranked[0][0]]
        points = [(row[x], row["reward_gold"]) for row in _sorted(most, x)]
        if points:
            ax.plot(*zip(*points, strict=True), color=BLUE, linestyle="--", linewidth=1.4, label="best-of-n, likelihood counts")
    return ranked[0][1] if ranked else []


def _moved(ax: Axes, rows: Sequence[Row], x: str, joined: bool = True) -> None:
    """VGF at each setting (its points joined or not), its controls, the students."""
    for index, (name, series) in enumerate(_settings(_of(rows, "vgf"))):
        colour, marker = _SETTINGS[index % len(_SETTINGS)]
        _line(ax, _sorted(series, x), x, f"VGF {name}".strip(), colour, marker, joined=joined)
    for method, marker in _CONTROLS.items():
        style: dict[str, Any] = {"color": GREY, "linestyle": "none", "markersize": 6, "linewidth": 1}
        _points(ax, _of(rows, method), x, f"control: {METHOD_NAMES[method]}", marker=marker, **style)
    for method, (name, colour, marker) in (_STUDENTS | _named_students(rows)).items():
        style = {
            "color": colour,
            "linestyle": "none",
            "markersize": 14 if marker == "*" else 10,
            "markeredgecolor": "black",
            "zorder": 4,
        }
        _points(ax, _of(rows, method), x, name, marker=marker, **style)


def _named_students(rows: Sequence[Row]) -> dict[str, tuple[str, str, str]]:
    """Policies of the user, method `student: NAME`."""
    names = dict.fromkeys(row["method"] for row in rows if row["method"].startswith("student: "))
    colours = (SKY, ORANGE, PURPLE, GREEN, BLUE, VERMILION)
    return {name: (name, colours[i % len(colours)], "P") for i, name in enumerate(names)}


def _line(
    ax: Axes,
    rows: Sequence[Row],
    x: str,
    label: str,
    colour: str,
    marker: str,
    *,
    y: str = "reward_gold",
    band: bool = False,
    joined: bool = True,
) -> None:
    """Points in the order given, joined or not, their intervals as bars or as a band."""
    style: dict[str, Any] = {
        "color": colour,
        "marker": marker,
        "markersize": 5 if band else 7,
        "linewidth": 1.6,
        "zorder": 3,
    }
    if not joined:
        style |= {"linestyle": "none", "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.6}
    _points(ax, rows, x, label, y=y, band=band, **style)


def _points(ax: Axes, rows: Sequence[Row], x: str, label: str, y: str = "reward_gold", band: bool = False, **style: Any) -> None:
    if not rows:
        return
    xs, ys = [float(row[x]) for row in rows], [float(row[y]) for row in rows]
    low, high = ([_edge(row, y, side) for row in rows] for side in ("low", "high"))
    if band and len(rows) > 1:
        ax.fill_between(xs, low, high, color=style["color"], alpha=0.15, linewidth=0)
        ax.plot(xs, ys, label=label, **style)
    else:
        # An interval of a bootstrap need not hold its mean where prompts are few.
        below = [max(0.0, v - edge) for v, edge in zip(ys, low, strict=True)]
        over = [max(0.0, edge - v) for v, edge in zip(ys, high, strict=True)]
        ax.errorbar(xs, ys, yerr=[below, over], elinewidth=1.2, capsize=0, label=label, **style)


def _edge(row: Row, y: str, side: str) -> float:
    edge = row.get(f"{y}_{side}")
    return float(row[y] if edge is None else edge)


def _panels(columns: int, per_column: int, title: str) -> tuple[Figure, list[list[Axes]]]:
    """A figure and its axes [column][row]."""
    width = max(6.4, 5.2 * columns)
    figure = Figure(figsize=(width, 4.8 if per_column == 1 else 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    grid = figure.subplots(per_column, columns, squeeze=False)
    return figure, [[grid[r][c] for r in range(per_column)] for c in range(columns)]


def _legend(figure: Figure, axes: Sequence[Sequence[Axes]]) -> None:
    """One legend of all panels below them, each label once."""
    handles: dict[str, Any] = {}
    for ax in (ax for column in axes for ax in column):
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    # A legend does not shrink to its figure: as many columns as the longest label leaves room for, at 0.085 inches a letter.
    widest = 0.7 + 0.075 * max(map(len, handles), default=0)
    columns = max(1, min(len(handles), int(figure.get_figwidth() // widest)))
    # The panels keep their height, however long it gets.
    figure.set_figheight(figure.get_figheight() + 0.21 * max(0, math.ceil(len(handles) / columns) - 3))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns)


def _annotate_n(ax: Axes, curve: Sequence[Row], x: str = "kl_nats") -> None:
    """n under the points of best-of-n, the largest first, where it does not run into the number beside it."""
    place: Callable[[Any], Any] = ax.transData.transform
    taken: float = math.inf
    for row in reversed([row for row in curve if row["method"] == "best_of_n" and row.get("num_particles")]):
        at = (float(row[x]), float(row["reward_gold"]))
        across = float(place(at)[0]) * 72 / ax.figure.dpi
        if taken - across < 16:
            continue
        taken = across
        ax.annotate(
            f"{row['num_particles']:g}",
            at,
            xytext=(5, -7),
            textcoords="offset points",
            ha="left",
            va="top",
            fontsize=8.5,
            color=BLUE,
            bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
        )


def _plain_log2(ax: Axes, values: Sequence[float]) -> None:
    """Powers of two as plain numbers, few enough not to touch."""
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    step = max(1, math.ceil((high - low) / 8))
    ax.xaxis.set_major_locator(FixedLocator([2.0**k for k in range(low, high + 1, step)]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _save(figure: Figure, path: str | Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(path, buffer.getvalue())
