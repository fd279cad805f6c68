import pytest
import torch

from tests import tiny
from vgf_llm.evaluation.training import _MuonAndAdamW, artefact, word_tokenizer


def test_an_artefact_is_made_once_per_recipe(tmp_path):
    made = []

    def make(path, recipe):
        made.append(recipe)
        (path / "weights").write_text(str(recipe))

    first = artefact(tmp_path, "model", 1, make, lambda message: None)
    assert artefact(tmp_path, "model", 1, make, lambda message: None) == first
    other = artefact(tmp_path, "model", 2, make, lambda message: None)
    assert made == [1, 2]
    assert other != first
    assert (first / "weights").read_text() == "1"


def test_an_artefact_that_fails_leaves_nothing(tmp_path):
    def make(path, recipe):
        (path / "weights").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        artefact(tmp_path, "model", 1, make, lambda message: None)
    assert list(tmp_path.iterdir()) == []


def test_the_word_tokenizer_returns_the_words_and_survives_saving(tmp_path):
    made = word_tokenizer(["the", "soup", "was", "superb", "."])
    made.save_pretrained(tmp_path)
    loaded = type(made).from_pretrained(tmp_path)
    for one in (made, loaded):
        ids = one("the soup was superb .")["input_ids"]
        assert len(ids) == 5
        assert one.unk_token_id not in ids
        assert one.decode(ids) == "the soup was superb ."
        assert one("spaghetti")["input_ids"] == [one.unk_token_id]
    assert made.pad_token_id != made.eos_token_id


def test_matrices_take_the_steps_of_muon_and_all_else_those_of_adamw():
    """Beside `torch.optim.Muon`, which computes in bfloat16."""
    ours, theirs = tiny.language_model("llama", 20, seed=0), tiny.language_model("llama", 20, seed=0)
    optimizer = _MuonAndAdamW(ours, 0.02, 0.01)
    matrices = [p for n, p in theirs.named_parameters() if p.ndim == 2 and "embed" not in n]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01)
    adamw = torch.optim.AdamW(
        [p for n, p in theirs.named_parameters() if p.ndim == 1 or "embed" in n], lr=0.01, betas=(0.9, 0.98), weight_decay=0.01
    )
    ids = torch.arange(12).view(2, 6)
    for _ in range(3):
        for model in (ours, theirs):
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
        for some in (optimizer, muon, adamw):
            some.step()
    start = tiny.language_model("llama", 20, seed=0).state_dict()
    for name, weight in ours.state_dict().items():
        moved, expected = weight - start[name], theirs.state_dict()[name] - start[name]
        assert expected.norm() > 0, name
        # Rounding to eight bits is 11 % of the step of a matrix whose gradient has few directions.
        assert (moved - expected).norm() < 0.15 * expected.norm(), name


def test_the_head_of_a_reward_model_is_no_matrix():
    model = tiny.reward_model("gpt_neox", 20, seed=0)
    optimizer = _MuonAndAdamW(model, 0.02, 0.01)
    by_muon = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert id(model.score.weight) not in by_muon and by_muon
    in_all = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(in_all) == sorted(id(p) for p in model.parameters())
