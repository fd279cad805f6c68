"""What benchmarks/ablations.py compares: its moves by their contracts, its differences by hand."""

from dataclasses import replace

import pytest
import torch

from benchmarks import cells, ensembles, labels, moves
from tests import tiny
from vgf_llm.evaluation.labels import Labels
from vgf_llm.flow import TransportBudget, best_of_n_curve
from vgf_llm.text import VGFSampler, decode


TOKENIZER = tiny.tokenizer()
VOCAB, EOS = len(TOKENIZER), TOKENIZER.eos_token_id
PROMPTS = ["the food was", "good", "a bad room and the staff"]
BUDGET = TransportBudget(steps=2, step_size=0.3, kl_budget=1.0, rounds=3)
LENGTH = 7


def build(tokenizer=TOKENIZER, reward=None, **options):
    model = tiny.language_model("llama", len(tokenizer), eos=tokenizer.eos_token_id, seed=3)
    return VGFSampler(model, tiny.reward_model("llama", len(tokenizer)) if reward is None else reward, tokenizer, **options)


def last(run):
    return list(run)[-1]


@pytest.mark.parametrize("horizon", [0, None])
def test_the_loop_is_that_of_the_sampler(horizon):
    sampler = build(horizon=horizon, movers=2, likelihood_weight=0.1)
    out = sampler.sample(PROMPTS, 4, BUDGET, LENGTH, seed=5)
    chains = moves.Chains(sampler, PROMPTS, 4, LENGTH, [5] * 3)
    now, cost = last(chains.run(moves.embeddings(BUDGET), moves.rises(0.1), BUDGET.rounds, movers=2))
    texts = [[TOKENIZER.decode(i[m], skip_special_tokens=True) for i, m in zip(now.text.ids, now.text.mask, strict=True)]]
    assert texts[0] == [text for row in out.transported.completions for text in row]
    assert texts[0] != [text for row in out.initial.completions for text in row]
    torch.testing.assert_close(now.rewards.view(3, 4), out.transported.rewards)
    torch.testing.assert_close(now.text.log_ratio.view(3, 4), out.transported.log_ratio)
    drawn = chains.initial.text.mask.sum(1).view(3, 4).float().mean(1)
    torch.testing.assert_close(cost.view(3, 4).sum(1) / drawn, out.generations)


def all_texts(vocab, eos, length):
    """Every text a model can write: closed by the end of sequence, or as long as it may be."""
    closed, open_ = [], [()]
    for _ in range(length):
        longer = [text + (token,) for text in open_ for token in range(vocab)]
        closed += [text for text in longer if text[-1] == eos]
        open_ = [text for text in longer if text[-1] != eos]
    return closed + open_


@pytest.mark.parametrize("gradient", [True, False])
def test_edits_by_metropolis_hastings_leave_their_target_as_it_is(gradient):
    """Chains that begin in mu exp(R / alpha), known by enumeration, stay in it; without the odds they do not."""
    tokenizer, length, count, nats = tiny.tokenizer(("a", "b")), 3, 1500, 1.5
    sampler = build(tokenizer, candidates=4)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    texts = all_texts(len(tokenizer), eos, length)
    ids = torch.tensor([list(t) + [pad] * (length - len(t)) for t in texts])
    mask = decode.completion_mask(ids, sampler.eos_ids)
    whole = moves.Chains(sampler, ["a"], len(texts), length, [0])
    text, _ = moves._as_decoded(sampler, whole.initial, ids, mask)
    assert text.logprobs.exp().sum() == pytest.approx(1, abs=1e-4)
    rewards = whole._score(whole.initial, text)
    mu = text.logprobs.exp()
    unit = ((mu * rewards**2).sum() - (mu * rewards).sum() ** 2).sqrt()
    law = (text.logprobs + rewards / (unit / (2 * nats) ** 0.5)).softmax(0)
    assert (law - mu).abs().sum() / 2 > 0.3

    def surprise(accept):
        """Chi-square of where chains are after a few rounds, in standard deviations above its mean under the target."""
        chains = moves.Chains(sampler, ["a"], count, length, [1])
        start = torch.multinomial(law, count, replacement=True, generator=torch.Generator().manual_seed(0))
        begun = decode.Decoded(*(getattr(text, f)[start] for f in text.__dataclass_fields__))
        chains.initial = replace(chains.initial, text=begun, rewards=rewards[start], unit=unit.expand(count))
        now, _ = last(chains.run(moves.single_site(gradient, nats), accept, rounds=3, movers=count))
        assert (now.text.ids != begun.ids).any(1).float().mean() > 0.3
        index = {t: k for k, t in enumerate(texts)}
        where = torch.tensor([index[tuple(i[m].tolist())] for i, m in zip(now.text.ids, now.text.mask, strict=True)])
        seen, expected = torch.bincount(where, minlength=len(texts)).double(), law.double() * count
        often = expected >= 5
        seen, expected = (torch.cat([x[often], x[~often].sum()[None]]) for x in (seen, expected))
        degrees = len(seen) - 1
        return float((((seen - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5)

    def without_odds(rows, moved, rewards):
        return moves.metropolis(nats)(rows, replace(moved, odds=torch.zeros_like(moved.odds)), rewards)

    assert abs(surprise(moves.metropolis(nats))) < 4
    assert surprise(without_odds) > 7


def test_an_edit_keeps_what_stands_before_it():
    sampler = build()
    rows = moves.Chains(sampler, PROMPTS, 4, LENGTH, [2] * 3).initial
    place = (rows.text.mask.sum(1) - 1).clamp(max=2)
    token = torch.full_like(place, 7)
    ids, mask, drawn = moves.rewritten(sampler, rows, place, token)
    for r, at in enumerate(place.tolist()):
        assert ids[r, :at].tolist() == rows.text.ids[r, :at].tolist() and ids[r, at] == 7
    assert (drawn == mask.sum(1) - place - 1).all() and (drawn > 0).any()
    ended = moves.rewritten(sampler, rows, place, torch.full_like(place, EOS))
    assert (ended[1].sum(1) == place + 1).all() and not ended[2].any()


@pytest.mark.parametrize("move", [moves.embeddings, moves.hidden_states, moves.nearest_token])
def test_every_flow_climbs(move):
    """One move, taken whatever it gives, of a reward that counts words."""
    sampler = build(reward=tiny.counting_reward(TOKENIZER), horizon=None)
    chains = moves.Chains(sampler, PROMPTS, 16, LENGTH, [0] * 3)
    budget = TransportBudget(steps=2, step_size=2.0, kl_budget=2.0)
    now, _ = last(chains.run(move(budget), moves.always, 1, movers=16))
    assert now.rewards.mean() > chains.initial.rewards.mean() + 0.1


def test_pooled_repulsion_drives_apart_and_is_as_large_as_the_gradient():
    embeds, mask = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0)), torch.ones(6, 4, dtype=torch.bool)
    mask[1, 2:] = False
    gradient = torch.randn_like(embeds) * torch.tensor([1.0, 1, 1, 7, 7, 7])[:, None, None]
    away = moves.pooled_repulsion(embeds, gradient, mask, particles=3)
    size = away.flatten(1).norm(dim=1).view(2, 3).square().mean(1)
    torch.testing.assert_close(size, gradient.flatten(1).norm(dim=1).view(2, 3).square().mean(1))
    assert (away[1, 2:] == 0).all()

    def spread(x):
        mean = ((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).view(2, 3, -1)
        return (mean - mean.mean(1, keepdim=True)).square().sum((1, 2))

    assert (spread(embeds + 0.01 * away) > spread(embeds)).all()
    same = embeds[:1].expand(3, -1, -1)
    assert (moves.pooled_repulsion(same, gradient[:3], mask[2:5], particles=3) == 0).all()


def pool(prompts=12, size=32):
    generator = torch.Generator().manual_seed(0)
    proxy = torch.randn(prompts, size, generator=generator)
    gold = proxy + torch.randn(prompts, size, generator=generator)
    return {"proxy": proxy.tolist(), "gold": gold.tolist(), "nll_base": gold.tolist(), "seconds": 32.0}


def test_best_of_n_is_level_with_itself():
    drawn = pool()
    curve = {k: best_of_n_curve(torch.tensor(drawn["proxy"]), torch.tensor(drawn[k]), [8])[:, 0] for k in ("proxy", "gold")}
    cell = {"proxy": curve["proxy"].tolist(), "gold": curve["gold"].tolist(), "generations": [8.0] * 12, "seconds": 4.0}
    over, equal = cells.over_best_of_n(cell, drawn, 0.5), cells.at_equal_proxy(cell, drawn)
    assert over["equal_n"] == 8 and over["gold_over_best_of_n"] == pytest.approx(0, abs=1e-6)
    assert over["equal_n_in_equal_time"] == 4 and over["gold_over_best_of_n_in_equal_time"] > 0
    assert equal["equal_proxy_n"] == pytest.approx(8, abs=1e-3)
    assert equal["over_at_equal_proxy"] == pytest.approx(0, abs=1e-3)
    unit = float(torch.tensor(drawn["gold"]).var(1).mean().sqrt())
    worse = cells.at_equal_proxy(cell | {"gold": [g - unit for g in cell["gold"]]}, drawn)
    assert worse["over_at_equal_proxy_high"] == pytest.approx(-1, abs=1e-3)
    assert cells.at_equal_proxy(cell | {"proxy": [9.0] * 12}, drawn)["over_at_equal_proxy"] is None


def test_a_cell_that_is_there_is_not_measured_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(cells, "measure", lambda world, variant, seeds: calls.append(variant) or {"7": {"gold": [1.0]}})
    world = cells.World("t", tmp_path, [], None, None, 8, horizon=0, work=tmp_path, seen=list)
    absent = cells.Cells(world, [0], 8, tmp_path, make=False)
    assert absent.of(cells.REFERENCE) is None
    present = cells.Cells(world, [0], 8, tmp_path)
    for variant in (cells.REFERENCE, replace(cells.REFERENCE, horizon=0), cells.REFERENCE):
        assert present.of(variant) == {"7": {"gold": [1.0]}}
    present.of(replace(cells.REFERENCE, horizon=None))
    assert len(calls) == 2 and absent.of(cells.REFERENCE) is not None


def test_reward_models_on_labels_as_given_are_trained_once_whatever_the_size_of_the_ensemble(tmp_path):
    trainings = []

    def train(at, pairs, member):
        trainings.append((pairs, member))
        (at / "weights").write_text("")

    world = cells.World("t", tmp_path, [], lambda p, c: 0.0, list, 8, horizon=0, work=tmp_path, seen=list)
    pairs = [[("prompt", f"of {member}", "worse")] for member in range(4)]
    given = Labels(lambda member: pairs[member], 0, lambda member: [], [], lambda p, c: 0.0, 0.5, 8, train)
    one, three, four = (ensembles.of_size(labels.Task(world, given), size) for size in ensembles.SIZES)
    assert [w.name for w in (one, three, four)] == ["t_1", "t_given", "t_4"]
    assert one.rewards == three.rewards[:1] and four.rewards[:3] == three.rewards
    assert [path.name.rpartition("-")[0] for path in four.rewards] == [f"reward-t-{k}" for k in range(4)]
    assert all(path.parent == tmp_path / "t_given" and (path / "weights").is_file() for path in four.rewards)
    assert trainings == [(pairs[k], k) for k in range(4)]
