import re
import runpy
from pathlib import Path

import torch


PAGE = Path(__file__).resolve().parents[2] / "docs" / "flow.md"


def test_the_example_of_the_page_runs_and_improves(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    torch.manual_seed(0)
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    names = runpy.run_path(str(script))
    best_before = names["value"](names["particles"]).amax(1)
    assert names["chosen"].shape == (4, 2)
    assert (names["value"](names["chosen"]) > best_before).all()
