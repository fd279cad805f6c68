"""A few seconds of tests/load.py: no lost, wrong or crossed answers. Memory needs the long run."""

from tests import load


def test_many_clients_get_their_own_answers():
    seen = load.serve(clients=6, seconds=4, warm_up=1)
    assert seen["answered"] > 5
    assert (seen["wrong_answers"], seen["lost"], seen["other"]) == (0, 0, {})
    assert seen["different_requests"] > 5 and seen["p99_s"] < 60
