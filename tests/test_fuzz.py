"""A short run of tests/fuzz.py; docs/reliability.md says what the long one did."""

import json

import pytest

from tests import fuzz


@pytest.mark.parametrize(("target", "executions"), [("transcripts", 20_000), ("config", 60)])
def test_random_input_is_parsed_or_refused(capsys, target, executions):
    assert fuzz.main([target, "--executions", str(executions)]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["executions"] == executions and 0 < said["accepted"] < executions
