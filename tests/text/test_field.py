"""The learned gradient estimates what a token is worth over all that may follow; particles move along it while they are drawn."""

import copy
import functools
import itertools
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from tests.text.test_sampler import BUDGET, EOS, LENGTH, PROMPTS, TOKENIZER, VOCAB, build, numbers_of, result_of
from vgf_llm.evaluation.controls import flip, random_direction
from vgf_llm.flow import TransportBudget
from vgf_llm.text import DifferentiableReward, VGFSampler, decode
from vgf_llm.text import field as field_module
from vgf_llm.text.field import HEADS, LIKELIHOOD_WEIGHT, GradientField, fit_field, gain, last_layers, likelihood_worth
from vgf_llm.text.prefix import left_pad, positions, stack


def fitted(sampler, **arguments):
    settings = {"num_samples": 32, "max_completion_length": LENGTH, "epochs": 6, "batch_size": 32, "learning_rate": 3e-3}
    return fit_field(sampler, PROMPTS * 4, **{**settings, **arguments})


COUNT = build(reward="count")
FIELD = fitted(COUNT, layers=0)


def exact_action_values(sampler, prompt, length):
    """E[R | x, y_1 = v] for every token v, by enumeration of all completions of `length` <= 3 tokens."""
    words = torch.cartesian_prod(*[torch.arange(VOCAB)] * length)
    prompt_ids = torch.tensor([sampler.encode([prompt], length)[0]]).expand(len(words), -1)
    prompt_mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    mask = decode.completion_mask(words, sampler.eos_ids)
    with torch.no_grad():
        logits = sampler.model(torch.cat([prompt_ids, words], 1)).logits[:, prompt_ids.shape[1] - 1 : -1, :VOCAB].double()
    log_mu = logits.log_softmax(-1).gather(-1, words[..., None])[..., 0]
    probability = log_mu[:, 1:].sum(1).exp()
    rewards = sampler.reward.score_ids(prompt_ids, prompt_mask, words, mask).double()
    return (probability * rewards).view(VOCAB, -1).sum(1), logits[:: VOCAB ** (length - 1), 0].softmax(-1)[0]


@pytest.mark.parametrize("layers", [0, 1])
def test_the_field_estimates_what_a_token_is_worth_over_all_that_may_follow(layers):
    sampler = build(reward=tiny.reward_model("llama", VOCAB, seed=5))
    field = fitted(sampler, layers=layers, num_samples=100, max_completion_length=3, epochs=8)
    share, ordered = [], []
    for prompt in PROMPTS:
        values, mu = exact_action_values(sampler, prompt, 3)
        exact = values - (mu * values).sum()
        ids, mask = left_pad(sampler.encode([prompt], 3), 0, torch.device("cpu"))
        nothing, there = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
        prefix = decode.read_prompts(sampler.model, ids, mask, field.depth)
        hidden = decode.read(sampler.model, prefix, nothing, there, sampler.base, field.depth).hidden
        gradient = field.gradients(field.read(ids, mask, prefix.hidden), nothing, there, hidden)[0, 0].double()
        table = sampler.reward.table.double()
        # Fitted to standardised rewards: the scale is left to least squares.
        learned = (table - mu @ table) @ gradient
        slope = (mu * exact * learned).sum() / (mu * learned.square()).sum()
        ordered.append(float(slope))
        share.append(1 - float((mu * (exact - slope * learned).square()).sum() / (mu * exact.square()).sum()))
    assert min(ordered) > 0
    # Of the variance of what the first token is worth.
    assert sum(share) / len(share) > 0.5


def test_what_follows_a_token_is_no_noise_to_it():
    # The count of a word is a sum of what its tokens add. With (V_t + A_t - R)^2 as the loss this was 0.936.
    assert float(FIELD.correlation) > 0.96


STEERED = build(reward="count", gradient_field=FIELD)
NATS = TransportBudget(kl_budget=2.0)


def mean_reward(sampler, budget, n=64, direction=None):
    return float(sampler.sample(PROMPTS, n, budget, LENGTH, 0, verify=False, direction=direction).transported.rewards.mean())


def test_particles_are_drawn_along_the_field_and_against_it_under_its_mirror_image():
    still = mean_reward(STEERED, TransportBudget(steps=0))
    little, much = (mean_reward(STEERED, replace(NATS, kl_budget=nats)) for nats in (0.4, 2.0))
    assert still + 0.1 < little and little + 0.2 < much
    assert mean_reward(STEERED, NATS, direction=flip) < still - 0.05
    assert abs(mean_reward(STEERED, NATS, direction=random_direction) - still) < 0.15


def slow(sampler, field, prompt, ids, scale, kl_budget):
    """log mu, KL and log ratio of one completion, token by token, by whole tables and without any cache."""
    prompt_ids = sampler.encode([prompt], LENGTH)[0]
    log_mu_of_all, nats, ratio = 0.0, 0.0, 0.0
    for t, token in enumerate(ids):
        before = torch.tensor([prompt_ids + ids[:t]])
        with torch.no_grad():
            log_mu = sampler.base.log_probs(sampler.model(before).logits[0, -1]).double()
            gradient = field.slope(field.backbone(before)[0][0, -1]).double()
        kept = log_mu.topk(min(sampler.candidates, VOCAB)).indices
        gain = sampler.reward.table[kept].double() @ gradient
        tilt = torch.zeros_like(log_mu)
        tilt[kept] = scale * (gain - (log_mu[kept].softmax(-1) * gain).sum())
        log_q = (log_mu + tilt).log_softmax(-1)
        cost = float((log_q.exp() * (log_q - log_mu)).sum())
        log_q, cost = (log_q, cost) if nats + cost <= kl_budget else (log_mu, 0.0)
        log_mu_of_all, nats, ratio = log_mu_of_all + float(log_mu[token]), nats + cost, ratio + float((log_q - log_mu)[token])
    return log_mu_of_all, nats, ratio


@pytest.mark.parametrize("candidates", [4, 64])
def test_candidates_are_weighed_alike_by_rows_of_the_table_and_by_all_of_it(candidates):
    torch.manual_seed(0)
    gradient, log_mu, table = torch.randn(5, 2, 6), torch.randn(5, 2, 9000).log_softmax(-1), torch.randn(9000, 6)
    ids = log_mu.topk(candidates, -1).indices
    rows = gain(gradient, log_mu, ids, table)
    compact, where = ids.unique(return_inverse=True)
    whole = gain(gradient, log_mu[..., compact], where, table[compact])
    torch.testing.assert_close(rows, whole)
    torch.testing.assert_close((log_mu.gather(-1, ids).softmax(-1) * rows).sum(-1), torch.zeros(5, 2))


@pytest.mark.parametrize("candidates", [4, 64])
def test_likelihood_and_nats_are_those_of_a_slow_reference(candidates):
    sampler = build(reward="count", gradient_field=FIELD, candidates=min(candidates, VOCAB))
    for kl_budget in (0.2, 3.0):
        drawn = sampler.sample(PROMPTS, 3, replace(NATS, kl_budget=kl_budget), LENGTH, 5).initial
        for b, prompt in enumerate(PROMPTS):
            for i, ids in enumerate(drawn.completion_ids[b]):
                expected = slow(sampler, FIELD, prompt, ids, FIELD.scale(kl_budget), kl_budget)
                found = (drawn.logprobs[b, i], drawn.kl[b, i], drawn.log_ratio[b, i])
                assert [float(x) for x in found] == pytest.approx(expected, abs=2e-4)


def test_the_first_token_has_the_tilted_distribution():
    kl_budget, n = 3.0, 3000
    drawn = STEERED.sample(PROMPTS[:1], n, replace(NATS, kl_budget=kl_budget), LENGTH, 1).initial
    counts = torch.bincount(torch.tensor([ids[0] for ids in drawn.completion_ids[0]]), minlength=VOCAB) / n
    expected = torch.tensor(
        [math.exp(sum(slow(STEERED, FIELD, PROMPTS[0], [v], FIELD.scale(kl_budget), kl_budget)[::2])) for v in range(VOCAB)]
    )
    assert float(expected.sum()) == pytest.approx(1, abs=1e-4)
    assert (counts - expected).abs().max() < 4 * 0.5 / math.sqrt(n)
    plain = STEERED.sample(PROMPTS[:1], n, TransportBudget(steps=0), LENGTH, 1).initial
    plain_counts = torch.bincount(torch.tensor([ids[0] for ids in plain.completion_ids[0]]), minlength=VOCAB) / n
    assert (plain_counts - expected).abs().max() > 0.1


@pytest.mark.parametrize("kl_budget", [0.1, 1.0, 4.0])
def test_no_completion_spends_more_than_the_budget_and_the_account_is_exact(kl_budget):
    drawn = STEERED.sample(PROMPTS, 200, replace(NATS, kl_budget=kl_budget), LENGTH, 0).initial
    assert drawn.kl.max() <= kl_budget * (1 + 1e-5)
    # Most of it is spent, and the log ratio of what was drawn has the same mean: an unbiased estimate of KL(q || mu).
    assert drawn.kl.mean() > 0.4 * kl_budget
    error = float((drawn.log_ratio - drawn.kl).std() / math.sqrt(drawn.kl.numel()))
    assert abs(float((drawn.log_ratio - drawn.kl).mean())) < 4 * error


def test_the_scale_grows_with_the_budget_and_is_none_without_a_direction():
    scales = [FIELD.scale(nats) for nats in (0.0, 0.01, 0.1, 1.0, 3.0)]
    assert scales[0] == 0.0 and all(a < b for a, b in itertools.pairwise(scales))
    untrained = GradientField(tiny.language_model("llama", VOCAB, eos=EOS).base_model, COUNT.reward.width)
    assert untrained.scale(2.0) == 0.0


def values_of(particles, field):
    return particles.rewards + field.likelihood_weight * particles.logprobs


@pytest.mark.parametrize("budget", [NATS, replace(NATS, rounds=3), TransportBudget.auto(12)])
def test_particles_are_kept_and_selected_by_reward_and_likelihood(budget):
    field = copy.deepcopy(FIELD)
    for weight in (0.0, 0.05, 1e4):
        field.likelihood_weight.fill_(weight)
        output = build(reward="count", gradient_field=field).sample(PROMPTS, 4, budget, LENGTH, 2)
        values = torch.cat([values_of(output.transported, field), values_of(output.initial, field)], 1)
        chosen = values.gather(1, output.selected[:, None])[:, 0]
        torch.testing.assert_close(chosen, values.amax(1))
        rewards = torch.cat([output.transported.rewards, output.initial.rewards], 1)
        torch.testing.assert_close(output.rewards, rewards.gather(1, output.selected[:, None])[:, 0])
        # None that was drawn first is better than one that was kept.
        assert (values[:, :4].sort(1).values >= values[:, 4:].sort(1).values).all()
    logprobs = torch.cat([output.transported.logprobs, output.initial.logprobs], 1)
    torch.testing.assert_close(logprobs.gather(1, output.selected[:, None])[:, 0], logprobs.amax(1))


@functools.cache
def finished():
    """Prompts, two samples of each that are texts and nothing else, and their rewards and likelihoods [pairs, 2]."""
    prompts = (PROMPTS * 2500)[:2500]
    drawn = COUNT.sample(prompts, 2, TransportBudget(steps=0), LENGTH, seed=range(len(prompts))).initial
    whole = [
        row
        for row, (texts, ids) in enumerate(zip(drawn.completions, drawn.completion_ids, strict=True))
        if [TOKENIZER(" " + t, add_special_tokens=False)["input_ids"] + [EOS] for t in texts] == ids
    ]
    return [(prompts[row], *drawn.completions[row]) for row in whole], drawn.rewards[whole], drawn.logprobs[whole]


def comparisons(a, b, times=1):
    """Of samples, labelled several times by a reward and a likelihood of the given weights."""
    samples, rewards, logprobs = finished()
    scores = a * rewards + b * logprobs
    chance = (scores[:, 0] - scores[:, 1]).sigmoid().repeat(times)
    chosen = torch.rand(len(chance), generator=torch.Generator().manual_seed(0)) < chance
    labelled = zip(samples * times, chosen.tolist(), strict=True)
    return [(p, f" {c}", f" {d}") if first else (p, f" {d}", f" {c}") for (p, c, d), first in labelled]


def test_what_likelihood_is_worth_is_found_from_comparisons(caplog):
    assert likelihood_worth(COUNT, comparisons(4.0, 0.5, 10)) == pytest.approx(0.125, rel=0.2)
    assert likelihood_worth(COUNT, comparisons(8.0, 0.5, 10), batch_size=7) == pytest.approx(0.0625, rel=0.2)
    assert likelihood_worth(COUNT, comparisons(4.0, -0.5)) == 0 and not caplog.records
    assert likelihood_worth(COUNT, comparisons(-10.0, 0.5)) == 0
    assert "the reward does not agree with the comparisons" in caplog.text


def test_what_likelihood_is_worth_is_in_units_of_the_reward():
    model, pairs = tiny.counting_reward(TOKENIZER), comparisons(4.0, 0.5)
    one, other = (
        likelihood_worth(build(reward=DifferentiableReward([model], TOKENIZER, calibration=[(0.0, std)])), pairs)
        for std in (1, 1e-4)
    )
    assert one > 0 and other == pytest.approx(1e4 * one, rel=1e-3)


def test_too_few_comparisons_are_refused():
    pairs = comparisons(1.0, 0.5)
    with pytest.raises(ValueError, match="49 comparisons count, .*: give at least 50"):
        likelihood_worth(COUNT, pairs[:49])
    with pytest.raises(ValueError, match="0 comparisons count"):
        likelihood_worth(COUNT, [])
    narrow = build(reward="count", top_k=1)  # which says next to nothing of that
    with pytest.raises(ValueError, match="that the base distribution can say"):
        likelihood_worth(narrow, pairs[:60])


def test_a_field_weighs_likelihood_by_comparisons_or_hardly():
    assert float(FIELD.likelihood_weight) == pytest.approx(LIKELIHOOD_WEIGHT * float(FIELD.spread))
    pairs = comparisons(1.0, 0.5)
    told = fitted(COUNT, epochs=1, num_samples=4, comparisons=pairs)
    assert float(told.likelihood_weight) == pytest.approx(likelihood_worth(COUNT, pairs))


def test_budget_zero_is_best_of_n_bit_for_bit():
    for zero in (TransportBudget(steps=0), TransportBudget(kl_budget=0.0)):
        ours, plain = STEERED.sample(PROMPTS, 5, zero, LENGTH, 4), COUNT.sample(PROMPTS, 5, zero, LENGTH, 4)
        assert ours.completion_ids == plain.completion_ids
        assert ours.initial.completion_ids == plain.initial.completion_ids
        assert torch.equal(ours.rewards, plain.rewards)


def test_rounds_draw_what_a_larger_n_would_have_and_keep_the_best():
    whole, twice = STEERED.sample(PROMPTS, 8, NATS, LENGTH, 2), STEERED.sample(PROMPTS, 4, replace(NATS, rounds=2), LENGTH, 2)
    assert [row[:4] for row in whole.initial.completion_ids] == twice.initial.completion_ids
    torch.testing.assert_close(twice.rewards, whole.rewards)
    torch.testing.assert_close(twice.transported.rewards.sort(1).values, whole.initial.rewards.sort(1).values[:, 4:])
    assert (whole.generations == 8).all() and (twice.generations > 6).all()
    few = build(reward="count", gradient_field=FIELD, movers=2).sample(PROMPTS, 4, replace(NATS, rounds=3), LENGTH, 2)
    torch.testing.assert_close(few.rewards, whole.rewards)


def test_given_particles_stay_and_moved_ones_are_drawn_beside_them():
    given = COUNT.sample(PROMPTS, 4, TransportBudget(steps=0), LENGTH, 9).initial
    output = STEERED.sample(PROMPTS, 4, NATS, LENGTH, 9, initial=given.completion_ids)
    assert output.initial.completion_ids == given.completion_ids
    torch.testing.assert_close(output.initial.rewards, given.rewards)
    before, after = values_of(output.initial, FIELD), values_of(output.transported, FIELD)
    assert (after.amax(1) >= before.amax(1) - 1e-5).all()
    assert (output.transported.kl > 0).any() and (output.generations > 4).all()


def test_a_budget_in_generations_starts_at_the_base_model_and_is_kept():
    output = STEERED.sample(PROMPTS, 4, TransportBudget.auto(12), LENGTH, 3)
    plain = COUNT.sample(PROMPTS, 4, TransportBudget(steps=0), LENGTH, 3)
    assert output.initial.completion_ids == plain.initial.completion_ids
    assert (values_of(output.transported, FIELD).amax(1) >= values_of(plain.initial, FIELD).amax(1)).all()
    assert (output.transported.kl > 0).any()
    assert (output.generations > 8).all() and (output.generations < 16).all()


def test_an_automatic_budget_along_a_worthless_field_is_best_of_as_many():
    output = STEERED.sample(PROMPTS, 4, TransportBudget.auto(12, 0.0), LENGTH, 3)
    assert (output.generations > 8).all() and (output.transported.kl < 0.01).all()


def test_no_gradient_of_the_reward_is_taken(monkeypatch):
    sampler = build(reward="count", gradient_field=FIELD)

    def refuse(*arguments):
        raise AssertionError("the reward was differentiated")

    monkeypatch.setattr(sampler.reward, "value_and_grad", refuse)
    output = sampler.sample(PROMPTS, 4, BUDGET, LENGTH, 0)
    assert output.transported.kl.min() > 0 and output.trace == []


def test_a_prompts_result_does_not_depend_on_the_rest_of_the_call():
    sampler = build(reward="count", gradient_field=FIELD, flow_batch_size=8)
    for budget in (BUDGET, TransportBudget.auto(9)):
        together = sampler.sample(PROMPTS, 4, budget, LENGTH, 3)
        for index in (0, 3, 5):
            alone = sampler.sample([PROMPTS[index]], 4, budget, LENGTH, 3)
            assert result_of(alone, 0) == result_of(together, index)
            torch.testing.assert_close(numbers_of(alone, 0), numbers_of(together, index), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients_are_the_same_with_and_without_a_cache_and_under_any_padding(family):
    torch.manual_seed(0)
    field = GradientField(tiny.language_model(family, VOCAB, eos=EOS).base_model, 6)
    torch.nn.init.normal_(field.slope.weight)
    ids, mask = left_pad([[5, 6, 7], [8], [9, 10]], 0, torch.device("cpu"))
    words = torch.tensor([[11, 12, 13], [5, 6, 0], [7, 0, 0]])
    inside = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    with torch.no_grad():
        direct = field(ids, mask, words, inside)[1]
    cached = field.gradients(field.read(ids, mask), words, inside)
    torch.testing.assert_close(cached[inside], direct[inside], atol=1e-4, rtol=1e-4)
    alone = field.gradients(field.read(torch.tensor([[8]]), torch.tensor([[True]])), words[1:2, :2], inside[1:2, :2])
    torch.testing.assert_close(alone[0], direct[1, :2], atol=1e-4, rtol=1e-4)


def test_before_it_has_seen_a_sample_nothing_moves():
    untrained = GradientField(tiny.language_model("llama", VOCAB, eos=EOS).base_model, COUNT.reward.width)
    sampler = build(reward="count", gradient_field=untrained)
    output = sampler.sample(PROMPTS[:2], 3, NATS, LENGTH, 0)
    assert output.completion_ids == COUNT.sample(PROMPTS[:2], 3, TransportBudget(steps=0), LENGTH, 0).completion_ids


def test_fitting_again_gives_the_same_field_and_leaves_sampler_and_random_state_alone():
    before, weights = torch.get_rng_state(), [p.clone() for p in COUNT.reward.parameters()]
    again = fitted(COUNT, layers=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(COUNT.reward.parameters(), weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), FIELD.parameters(), strict=True))
    assert not any(p.requires_grad for p in again.parameters())


def test_a_prompt_that_comes_again_has_other_completions(monkeypatch):
    seen = []
    sampler = build(reward="count")

    def watched(*arguments, **settings):
        seen.append(VGFSampler.sample(sampler, *arguments, **settings))
        return seen[-1]

    monkeypatch.setattr(sampler, "sample", watched)
    fit_field(sampler, PROMPTS[:1] * 3, num_samples=8, max_completion_length=LENGTH)
    first, second, third = seen[0].initial.completion_ids
    assert first != second and second != third and first != third


def test_agreement_is_correlation_and_least_squares_within_prompts():
    generator = torch.Generator().manual_seed(0)
    said = torch.randn(5, 40, generator=generator)
    noise = torch.randn(5, 40, generator=generator)
    # What differs between prompts is no merit of a direction.
    rewards = 0.3 * said + 0.1 * noise + 10 * torch.arange(5)[:, None]
    correlation, factor = field_module._agreement(said, rewards)
    flat = [(x - x.mean(1, keepdim=True)).flatten().double() for x in (said, rewards)]
    assert correlation == pytest.approx(float(torch.corrcoef(torch.stack(flat))[0, 1]))
    assert factor == pytest.approx(float(torch.linalg.lstsq(flat[0][:, None], flat[1][:, None]).solution))
    assert field_module._agreement(said, -rewards)[1] == 0.0
    assert field_module._agreement(said, torch.ones(5, 40)) == (0.0, 1.0)


def kept_of(monkeypatch, found):
    """The field of a fit whose checks find these, and its slopes at each of them."""
    slopes, said = [], field_module._said

    def watched(field, *arguments):
        slopes.append(field.slope.weight.detach().clone())
        return said(field, *arguments)

    pairs = iter(found)
    monkeypatch.setattr(field_module, "_said", watched)
    monkeypatch.setattr(field_module, "_agreement", lambda *given: next(pairs))
    return fitted(COUNT, epochs=2, batch_size=64), slopes


def test_the_weights_that_agree_best_with_held_out_prompts_are_kept_and_scaled(monkeypatch):
    found = [(0.1, 9.0), (0.2, 9.0), (0.6, 3.0), (0.5, 9.0), (0.6, 2.0), (0.4, 9.0), (0.3, 9.0), (0.2, 9.0)]
    field, slopes = kept_of(monkeypatch, found)
    assert len(slopes) == 8 and not torch.equal(slopes[4], slopes[2])
    torch.testing.assert_close(field.slope.weight, 2.0 * slopes[4])  # of equal ones the last
    assert float(field.correlation) == pytest.approx(0.6)


def test_a_direction_that_does_not_hold_moves_nothing_and_says_so(monkeypatch, caplog):
    field, _ = kept_of(monkeypatch, [(-0.1, 0.0)] * 8)
    assert "learned nothing that holds on held-out prompts" in caplog.text and field.scale(2.0) == 0.0
    steered = build(reward="count", gradient_field=field).sample(PROMPTS[:2], 3, NATS, LENGTH, 0)
    assert steered.completion_ids == COUNT.sample(PROMPTS[:2], 3, TransportBudget(steps=0), LENGTH, 0).completion_ids


@pytest.mark.parametrize(("prompts", "num_samples"), [(1, 8), (4, 1)])
def test_too_little_to_hold_anything_out_is_refused(prompts, num_samples):
    with pytest.raises(ValueError, match=rf"got {prompts} prompts and num_samples={num_samples}"):
        fit_field(COUNT, PROMPTS[:prompts], num_samples=num_samples, max_completion_length=LENGTH)


def test_a_field_is_saved_and_loaded(tmp_path):
    FIELD.save_pretrained(tmp_path)
    loaded = GradientField.from_pretrained(tmp_path)
    budget = TransportBudget(steps=1, kl_budget=2.0)
    first, second = (build(reward="count", gradient_field=f).sample(PROMPTS, 3, budget, LENGTH) for f in (FIELD, loaded))
    assert first.transported.completion_ids == second.transported.completion_ids


def test_files_that_are_no_field_are_refused(tmp_path):
    FIELD.save_pretrained(tmp_path / "whole")
    with pytest.raises(OSError, match=rf"holds no {HEADS}"):
        GradientField.from_pretrained(tmp_path)
    shutil.copytree(tmp_path / "whole", tmp_path / "other")
    save_file({"score.weight": torch.zeros(1, 16)}, str(tmp_path / "other" / HEADS))
    with pytest.raises(ValueError, match=r"has the weights \['score.weight'\]"):
        GradientField.from_pretrained(tmp_path / "other")
    wrong = {**FIELD.state_dict(), "slope.weight": torch.zeros(FIELD.width, 99), "depth": torch.tensor(0)}
    save_file({n: x.clone() for n, x in wrong.items() if not n.startswith("backbone")}, str(tmp_path / "other" / HEADS))
    with pytest.raises(ValueError, match=r"a model with 99 hidden units, .* the files are of two fields"):
        GradientField.from_pretrained(tmp_path / "other")
    (tmp_path / "other" / HEADS).write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"the file is broken or cut off"):
        GradientField.from_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    (tmp_path / "whole" / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(ValueError, match=r"sizes in its config.json"):
        GradientField.from_pretrained(tmp_path / "whole")


def test_a_field_of_another_reward_is_refused():
    ensemble = DifferentiableReward([tiny.reward_model("llama", VOCAB, seed=s) for s in range(2)], TOKENIZER)
    with pytest.raises(ValueError, match=r"gradient_field gives gradients of \d+ numbers, but the .* this reward have 32"):
        VGFSampler(COUNT.model, ensemble, TOKENIZER, gradient_field=FIELD)


def test_a_reward_that_says_the_same_of_everything_is_refused():
    sampler = build(reward="count")
    with torch.no_grad():
        for parameter in sampler.reward.parameters():
            parameter.zero_()
    with pytest.raises(ValueError, match=r"all 24 completions have the reward .*: there is no direction to learn"):
        fit_field(sampler, PROMPTS, num_samples=4, max_completion_length=LENGTH)


def test_a_loss_that_is_not_finite_ends_the_fit():
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        fitted(COUNT, learning_rate=1e30, num_samples=8)


def read(model, ids, mask, **arguments):
    return model(input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask, ids.shape[1]), **arguments)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_last_layers_go_on_where_the_others_of_a_model_end(family, tmp_path):
    """Whatever its family does to embeddings on the way to the first layer, under padding, and from a cache of its own."""
    whole = tiny.language_model(family, VOCAB, eos=EOS)
    part = last_layers(whole.base_model, 1)
    assert part.config.num_hidden_layers == 1 and whole.config.num_hidden_layers == 2
    assert len(stack(part)) == 1 and len(stack(whole.base_model)) == 2
    ids, mask = left_pad([[5, 6, 7, 8], [9, 10]], 0, torch.device("cpu"))
    field = GradientField(part, 6, depth=1)
    torch.nn.init.normal_(field.slope.weight, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = read(whole.base_model, ids, mask, output_hidden_states=True)
        prefix = decode.read_prompts(whole, ids, mask, depth=1)
        assert torch.equal(prefix.hidden[mask], found.hidden_states[1][mask])
        torch.testing.assert_close(field.read(ids, mask, prefix.hidden).logits, found[0][:, -1])
        words, inside = ids.flip(1), mask.flip(1)
        direct = read(whole.base_model, torch.cat([ids, words], 1), torch.cat([mask, inside], 1))[0][:, 3:-1]
        tables = decode.read(whole, prefix, words, inside, decode.BaseDistribution(), depth=1)
        gradients = field.gradients(field.read(ids, mask, prefix.hidden), words, inside, tables.hidden)
    torch.testing.assert_close(gradients[inside], field.slope(direct)[inside], atol=1e-4, rtol=1e-4)
    field.save_pretrained(tmp_path)
    loaded = GradientField.from_pretrained(tmp_path)
    assert loaded.depth == 1 and loaded.backbone.config.num_hidden_layers == 1
    again = loaded.gradients(loaded.read(ids, mask, prefix.hidden), words, inside, tables.hidden)
    assert torch.equal(again, gradients)


SHARED = fitted(COUNT)


def test_a_field_on_the_states_of_the_base_model_is_followed_too():
    assert SHARED.depth == 1 and len(stack(SHARED.backbone)) == 1
    assert float(SHARED.correlation) > 0.9
    sampler = build(reward="count", gradient_field=SHARED)
    still, moved = (mean_reward(sampler, b) for b in (TransportBudget(steps=0), NATS))
    assert moved > still + 0.3
    with pytest.raises(ValueError, match=r"layers must lie between 1 and 2, .* got 3"):
        fitted(COUNT, layers=3)


def test_the_base_model_is_left_as_it_is_by_a_field_that_shares_it():
    weights = {name: p.clone() for name, p in COUNT.model.named_parameters()}
    fitted(COUNT, epochs=1, num_samples=4)
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in COUNT.model.named_parameters())
    assert not any(module._forward_pre_hooks for module in COUNT.model.modules())


def test_a_quantized_model_has_no_layers_to_train():
    sampler = build(reward="count")
    packed = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    stack(sampler.model.base_model)[-1].register_parameter("packed", packed)
    with pytest.raises(ValueError, match="quantized, and cannot be trained: fit it to the base model without"):
        fitted(sampler)


def test_all_layers_of_its_own_share_nothing():
    field = fitted(COUNT, layers=2, epochs=1, num_samples=4)
    assert field.depth == 0 and len(stack(field.backbone)) == 2


def test_a_field_on_the_states_of_the_base_model_keeps_the_accounts():
    sampler = build(reward="count", gradient_field=SHARED, flow_batch_size=8)
    together = sampler.sample(PROMPTS, 4, NATS, LENGTH, 3)
    assert together.initial.kl.max() <= 2.0 * (1 + 1e-5)
    for index in (0, 3, 5):
        alone = sampler.sample([PROMPTS[index]], 4, NATS, LENGTH, 3)
        assert result_of(alone, 0) == result_of(together, index)
        torch.testing.assert_close(numbers_of(alone, 0), numbers_of(together, index), atol=2e-3, rtol=2e-3)
    prompts = left_pad(sampler.encode(PROMPTS[:1], LENGTH), 0, torch.device("cpu"))
    for ids, nats, ratio in zip(
        together.initial.completion_ids[0], together.initial.kl[0], together.initial.log_ratio[0], strict=True
    ):
        # Read again, all tokens at once: what they were drawn from is mu tilted along the field, while that can be paid for.
        words, inside = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)
        prefix = decode.read_prompts(sampler.model, *prompts, 1)
        tables = decode.read(sampler.model, prefix, words, inside, sampler.base, 1)
        gradient = SHARED.gradients(SHARED.read(*prompts, prefix.hidden), words, inside, tables.hidden)
        log_q = decode.tilted(tables.log_mu, SHARED.scale(2.0) * gradient @ sampler.reward.table.T)[0]
        spent, said = 0.0, 0.0
        for token, q, mu in zip(ids, log_q, tables.log_mu[0], strict=True):
            price = float(decode.kl(q, mu))
            if spent + price <= 2.0:
                spent, said = spent + price, said + float(q[token] - mu[token])
        assert (float(nats), float(ratio)) == pytest.approx((spent, said), abs=2e-3)


def test_a_field_on_the_states_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"reads the states behind 2 layers, 16 numbers each, but the model has 2 layers of 16"):
        build(reward="count", gradient_field=GradientField(SHARED.backbone, SHARED.width, depth=2))
