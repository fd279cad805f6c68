"""Tables of results in the docs say what the committed results say."""

import pytest

from benchmarks import tables


REPORT = {
    "rows": [
        {
            "task": task, "method": method, "num_particles": n, "generations": n, "reward_gold": n / 10, "reward_gold_low": 0,
            "reward_gold_high": 1, "reward_proxy": 1, "kl_nats": 2, "nll_base": 30, **more,
        }
        for task in ("tone", "content")
        for method, n, more in (
            ("best_of_n", 4, {"members": 3}), ("best_of_n", 8, {"members": 3}),
            ("vgf", 8, {"kl_budget": 1.0, "verified": False, "members": 1, "gold_over_best_of_n": 0.2,
                        "gold_over_best_of_n_low": -0.1, "gold_over_best_of_n_high": 0.3}),
        )
    ]
}  # fmt: skip


def test_a_table_shows_the_rows_that_were_asked_for():
    lines = tables.table(REPORT, "tone", ["best_of_n:8", "vgf:unverified,one"]).splitlines()
    assert len(lines) == 4
    assert lines[2] == "| best-of-8 | 8.0 | 0.80 [0.00, 1.00] | - | 1.00 | 2.00 | 30.0 |"
    assert lines[3].startswith("| VGF, 1 nat, unverified, 1 reward model | 8.0 |") and "+0.20 [-0.10, +0.30]" in lines[3]
    for absent in ("student_vgf", "vgf", "vgf:one", "best_of_n:16"):
        with pytest.raises(ValueError, match=f"no row of {absent} for tone"):
            tables.table(REPORT, "tone", ["best_of_n", absent])


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_every_table_is_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert tables.rendered(text) == text, "run python -m benchmarks.tables"
