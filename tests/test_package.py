"""What `import vgf_llm` promises: a version, four names on demand, and nothing heavy until they are asked for."""

import subprocess
import sys
from importlib.metadata import version

import pytest

import vgf_llm


def modules_loaded_by(code: str) -> set[str]:
    """Top-level modules a fresh interpreter holds after `code`."""
    report = "import sys; print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_version_is_the_installed_one():
    assert vgf_llm.__version__ == version("vgf_llm")


def test_import_loads_nothing_heavy():
    assert modules_loaded_by("import vgf_llm").isdisjoint({"torch", "transformers", "trl", "datasets", "deepspeed"})


def test_data_loads_without_torch():
    assert modules_loaded_by("import vgf_llm.data.e2e").isdisjoint({"torch", "transformers", "trl"})


def test_sampler_and_budget_do_not_load_trl():
    assert "trl" not in modules_loaded_by("from vgf_llm import TransportBudget, VGFSampler")


@pytest.mark.parametrize("name", sorted(set(vgf_llm.__all__) - {"__version__"}))
def test_lazy_names_resolve_to_one_object(name):
    assert name in dir(vgf_llm)
    assert getattr(vgf_llm, name) is getattr(vgf_llm, name)
    assert getattr(vgf_llm, name).__name__ == name


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        _ = vgf_llm.Nonsense
