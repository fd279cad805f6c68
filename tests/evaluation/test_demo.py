import subprocess
import time

import pytest
import torch

from vgf_llm.evaluation import demo


def test_a_second_process_that_fails_ends_the_demonstration(tmp_path):
    threads = torch.get_num_threads()
    failed = pytest.raises(RuntimeError, match="works on nothing .* ended with status 1")
    with failed, demo._second_process(tmp_path, "quick", "nothing", time.time()):
        pass
    assert torch.get_num_threads() == threads


def test_the_second_process_does_not_outlive_a_failure_of_the_first(tmp_path, monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: started.append(popen(*args, **options)) or started[-1])
    with pytest.raises(ZeroDivisionError), demo._second_process(tmp_path, "quick", "tone", time.time()):
        raise ZeroDivisionError
    assert len(started) == 1 and started[0].poll() is not None


def test_a_scale_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="quick, default, full"):
        demo.run_demo(tmp_path, "huge")
