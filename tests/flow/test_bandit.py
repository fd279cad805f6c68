import importlib.util
from pathlib import Path

import pytest


SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "bandit.py"


@pytest.fixture(scope="module")
def bandit():
    spec = importlib.util.spec_from_file_location("bandit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_inverted_u(bandit, seed):
    result = bandit.run(seed)
    curve = {point["steps"]: point for point in result["curve"]}
    assert curve[0]["true"] == result["best_of_10"]
    assert result["behaviour"] < result["best_of_10"] < result["best_of_200"]
    assert curve[5]["true"] > result["best_of_200"] + 0.1
    assert curve[40]["true"] < curve[5]["true"] - 0.4
    assert curve[40]["learned_all"] > curve[5]["learned_all"] > curve[0]["learned_all"]
    assert result["spread_by_temperature"]["1.0"] > result["spread_by_temperature"]["0.05"]
    assert result["tuned"]["share_of_best"] >= 0.95
    assert result["tuned"]["steps"] in (4, 5)
