"""Figures: files that open, what is drawn in them, and what is refused."""

import math
import os

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from vgf_llm.evaluation import plots
from vgf_llm.flow import best_of_n_kl


def row(method, n, kl, gold, generations=None, **extra):
    return {
        "task": "e2e",
        "method": method,
        "num_particles": n,
        "generations": n if generations is None else generations,
        "reward_proxy": 2 * gold,
        "reward_gold": gold,
        "reward_gold_low": gold - 0.03,
        "reward_gold_high": gold + 0.03,
        "kl_nats": kl,
    } | extra


def rows():
    result = [row("base", 1, 0.0, 0.5)]
    result += [row("best_of_n", n, best_of_n_kl(n), 0.5 + 0.1 * math.log(n)) for n in (2, 4, 8, 16, 32)]
    for budget, gold in ((1, 0.7), (2, 0.8), (4, 0.9), (8, 0.75)):
        result.append(row("vgf", 4, 1 + budget, gold, 9.5, kl_budget=budget, reward_proxy=budget))
    result.append(row("vgf_random", 4, 2.0, 0.6, 9.0))
    result.append(row("student_best_of_n", 1, 1.5, 0.6))
    result.append(row("student_vgf", 1, 2.5, 0.7))
    return result


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were saved."""
    figures = []
    save = Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


ALL = (plots.plot_frontier, plots.plot_generations, plots.plot_budget)


@pytest.mark.parametrize("plot", ALL)
def test_a_png_and_nothing_else_and_the_settings_of_the_caller_stay(plot, tmp_path, drawn):
    before = dict(matplotlib.rcParams)
    both = rows() + [r | {"task": "reviews"} for r in rows()]
    plot(both, tmp_path / "sub" / "a.png")
    assert os.listdir(tmp_path / "sub") == ["a.png"]
    image = imread(tmp_path / "sub" / "a.png")
    assert image.shape[0] > 600 and image.shape[1] > 900 and image.std() > 0.05
    titles = [ax.get_title().split("\n")[0] for ax in drawn[0].axes]
    assert [title for title in titles if title] == ["e2e", "reviews"]
    assert all(ax.get_ylabel() for ax in drawn[0].axes)
    assert dict(matplotlib.rcParams) == before


def labels(figure):
    return {text.get_text() for legend in figure.legends for text in legend.get_texts()}


def test_the_frontier_shows_every_method_and_names_n(tmp_path, drawn):
    plots.plot_frontier(rows(), tmp_path / "a.png")
    assert labels(drawn[0]) == {
        "best-of-n (number: n)",
        "VGF N=4",
        "control: VGF random",
        "student of best-of-n",
        "student of VGF",
    }
    ax = drawn[0].axes[0]
    assert {"8", "16", "32"} <= {text.get_text() for text in ax.texts} <= {"2", "4", "8", "16", "32"}
    renderer = drawn[0].canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in ax.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    low, high = ax.get_xlim()
    assert low <= 0 and high >= 9
    legend = drawn[0].legends[0].get_window_extent(renderer)
    assert not legend.overlaps(ax.get_window_extent(renderer))


def test_generations_are_on_a_log_axis_with_plain_numbers(tmp_path, drawn):
    plots.plot_generations(rows(), tmp_path / "a.png")
    ax = drawn[0].axes[0]
    assert ax.get_xscale() == "log"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "4", "8", "16", "32"]
    assert "base" in labels(drawn[0])
    with pytest.raises(ValueError, match="generations must be positive"):
        plots.plot_generations([row("vgf", 4, 1.0, 0.5, 0)], tmp_path / "b.png")


def test_the_budget_figure_says_where_gold_turns_over(tmp_path, drawn):
    plots.plot_budget([*rows(), row("vgf", 4, 0.6, 0.6, kl_budget=0, reward_proxy=0.4)], tmp_path / "a.png")
    above, below = drawn[0].axes
    assert "gold is highest at 4 nats" in above.get_title() and "largest" not in above.get_title()
    assert labels(drawn[0]) == {"VGF N=4", "budget 0 (best-of-n)"}
    for ax in (above, below):
        assert any(list(line.get_xdata()) == [4, 4] for line in ax.lines)
    plots.plot_budget([r for r in rows() if r.get("kl_budget", 0) < 8], tmp_path / "b.png")
    assert "at 4 nats (largest tried)" in drawn[1].axes[0].get_title()
    with pytest.raises(ValueError, match="negative"):
        plots.plot_budget([row("vgf", 4, 1.0, 0.5, kl_budget=-1.0)], tmp_path / "c.png")


def test_series_are_told_apart_by_the_settings_that_differ(tmp_path, drawn):
    more = [row("vgf", 4, 3.0, 0.8, kl_budget=2, members=m, verified=v) for m in (1, 4) for v in (True, False)]
    plots.plot_budget(more, tmp_path / "a.png")
    assert "VGF N=4, 4 RMs, unverified" in labels(drawn[0]) and len(labels(drawn[0])) == 4


@pytest.mark.parametrize("plot", ALL)
def test_nothing_to_draw_is_an_error_and_incomplete_rows_are_left_out(plot, tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot([], tmp_path / "a.png")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot([{"task": "e2e", "method": "vgf", "reward_gold": None}], tmp_path / "a.png")
    assert os.listdir(tmp_path) == []
    plot([*rows(), {"task": "other", "method": "base"}], tmp_path / "a.png")
