"""Numbers against slow float64 references written from the formulas, on random shapes, masks, padding and dtypes.

`make test` tries a few cases of each, `make test-properties` 1,000 of each (PROPERTY_CASES says how many).
"""

import itertools
import math
import os
import random

import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.decoding import everywhere, hindsight_of, prompts_of
from vgf_llm.flow import (
    TransportBudget,
    best_of_n_curve,
    fidelity,
    mmd2,
    stein_direction,
    transport,
)
from vgf_llm.text import DifferentiableReward, VGFSampler, decode
from vgf_llm.text.decode import TokenTargets
from vgf_llm.trainer.targets import dpo_loss, leave_one_out, likelihood_loss, target_weights, tilt_loss


CASES = int(os.environ.get("PROPERTY_CASES", "15"))
case = given(st.integers(0, 2**31 - 1))
many = settings(max_examples=CASES)
TOKENIZER = tiny.tokenizer()
VOCAB, EOS = len(TOKENIZER), TOKENIZER.eos_token_id


def draw(seed):
    return random.Random(seed), torch.Generator().manual_seed(seed)


# ---- The flow -------------------------------------------------------------------------------------------------------


def slow_width(rows):
    """Median heuristic over the distances of different particles; of two middle ones the lower."""
    squares = sorted(float((a - b).square().sum()) for a, b in itertools.permutations(rows, 2))
    return math.sqrt(max(squares[(len(squares) - 1) // 2] / (2 * math.log(len(rows) + 1)), 1e-12)) if squares else 1e-6


def slow_stein(rows, scores, temperature, bandwidth):
    sigma = bandwidth if bandwidth is not None else slow_width(rows)
    result = []
    for x in rows:
        total = torch.zeros_like(x)
        for a, score in zip(rows, scores, strict=True):
            k = math.exp(-float((a - x).square().sum()) / (2 * sigma**2))
            total = total + (k * score / temperature + k * (x - a) / sigma**2 if temperature > 0 else k * score)
        result.append(total / len(rows))
    return result, sigma


@case
@many
def test_the_stein_direction(seed):
    rng, generator = draw(seed)
    B, N, F = rng.randint(1, 3), rng.randint(1, 6), rng.randint(1, 5)
    offset = rng.choice([0.0, 100.0])  # a cloud far from the origin: nothing may cancel
    x = torch.randn(B, N, F, generator=generator) + offset
    score = torch.randn(B, N, F, generator=generator)
    present = torch.rand(B, N, generator=generator) < 0.8
    temperature, bandwidth = rng.choice([0.0, 0.5, 2.0]), rng.choice([None, 0.7])
    x, score = x * present[..., None], score * present[..., None]
    phi, sigma = stein_direction(x, score, temperature, bandwidth, present)
    for b in range(B):
        rows = [x[b, n].double() for n in range(N) if present[b, n]]
        scores = [score[b, n].double() for n in range(N) if present[b, n]]
        if rows:
            expected, width = slow_stein(rows, scores, temperature, bandwidth)
            assert math.isclose(float(sigma[b]), width, rel_tol=1e-3)
            torch.testing.assert_close(phi[b][present[b]].double(), torch.stack(expected), rtol=2e-3, atol=2e-3)


def slow_transport(u, centre, budget, moves):
    """Particles [N][F] of one prompt under the value -|u - centre|^2 / 2, in loops."""
    start = [row.clone() for row in u]
    for _ in range(0 if budget.is_zero else budget.steps):
        score = [(centre - row) * m for row, m in zip(u, moves, strict=True)]
        norms = [float(s.norm()) for s in score]
        here = [bool(m.any()) for m in moves]
        if budget.normalize == "particle":
            score = [s / n if n > 0 else s * 0 for s, n in zip(score, norms, strict=True)]
        elif budget.normalize == "prompt":
            rms = math.sqrt(sum(n**2 for n in norms) / max(1, sum(here)))
            score = [s / rms if rms > 0 else s * 0 for s in score]
        if budget.coupling == "svgd":
            index = [i for i, h in enumerate(here) if h]
            if index:
                phi, _ = slow_stein(
                    [u[i] * moves[i] for i in index], [score[i] for i in index], budget.temperature, budget.bandwidth
                )
                score = [phi[index.index(i)] if h else torch.zeros_like(u[i]) for i, h in enumerate(here)]
        for i, s in enumerate(score):
            new = u[i] + budget.step_size * s * moves[i]
            if budget.max_displacement is not None and float((new - start[i]).norm()) > budget.max_displacement:
                new = start[i] + (new - start[i]) * budget.max_displacement / float((new - start[i]).norm())
            u[i] = torch.where(moves[i], new, start[i])
    return torch.stack(u)


@case
@many
def test_the_flow(seed):
    rng, generator = draw(seed)
    B, N, T, D = rng.randint(1, 3), rng.randint(1, 5), rng.randint(1, 3), rng.randint(1, 3)
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16])
    svgd = rng.random() < 0.5
    budget = TransportBudget(
        steps=rng.randint(0, 4), step_size=rng.choice([0.05, 0.3]), normalize=rng.choice(["none", "particle", "prompt"]),
        coupling="svgd" if svgd else "none", temperature=rng.choice([0.0, 0.7]) if svgd else 0.0,
        bandwidth=0.9 if svgd else None,  # the median may jump from one pair to another by a last bit
        max_displacement=rng.choice([None, 0.2]),
    )  # fmt: skip
    u = torch.randn(B, N, T, D, generator=generator).to(dtype)
    centre = torch.randn(T, D, generator=generator)
    mask = torch.rand(B, N, T, generator=generator) < 0.8

    def score_fn(particles, step):
        gap = centre.to(particles) - particles
        return -(gap.square() * 0.5).sum((2, 3)), gap

    moved = transport(u, score_fn, budget, mask=mask).particles
    assert moved.dtype == torch.promote_types(dtype, torch.float32)
    for b in range(B):
        wide = mask[b][..., None].expand(N, T, D).flatten(1)
        expected = slow_transport(
            [u[b, n].double().flatten() for n in range(N)], centre.double().flatten(), budget, [wide[n] for n in range(N)]
        )
        torch.testing.assert_close(moved[b].flatten(1).double(), expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(moved[b].flatten(1)[~wide], u[b].to(moved.dtype).flatten(1)[~wide])


@case
@many
def test_the_maximum_mean_discrepancy(seed):
    rng, generator = draw(seed)
    N, M, F, sigma = rng.randint(1, 6), rng.randint(1, 6), rng.randint(1, 4), rng.choice([0.3, 1.0, 5.0])
    x, y = torch.randn(1, N, F, generator=generator), torch.randn(1, M, F, generator=generator) + rng.choice([0, 3])

    def mean(a, b):
        return sum(math.exp(-float((p - q).double().square().sum()) / (2 * sigma**2)) for p in a for q in b) / (len(a) * len(b))

    expected = mean(x[0], x[0]) + mean(y[0], y[0]) - 2 * mean(x[0], y[0])
    assert math.isclose(float(mmd2(x, y, sigma)[0]), max(0.0, expected), abs_tol=1e-6)


# ---- Estimators -----------------------------------------------------------------------------------------------------


@case
@many
def test_best_of_n_is_the_mean_over_all_subsets(seed):
    rng, _ = draw(seed)
    N = rng.randint(1, 7)
    proxy = [rng.choice([rng.gauss(0, 1), 0.0, 1.0]) for _ in range(N)]  # ties among them
    gold = [rng.gauss(0, 10) for _ in range(N)]
    curve = best_of_n_curve(torch.tensor(proxy), torch.tensor(gold, dtype=torch.float64), range(1, N + 1))
    proxy = torch.tensor(proxy).tolist()  # as float32 sees them
    for n in range(1, N + 1):
        best = [gold[max(subset, key=lambda i: (proxy[i], -i))] for subset in itertools.combinations(range(N), n)]
        assert math.isclose(float(curve[n - 1]), sum(best) / len(best), rel_tol=1e-9, abs_tol=1e-9)


@case
@many
def test_fidelity_is_spearmans(seed):
    rng, _ = draw(seed)
    size = rng.randint(2, 12)
    a, b = ([rng.choice([0.0, 1.0, rng.gauss(0, 1)]) for _ in range(size)] for _ in range(2))
    ours = fidelity(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(ours)
    else:
        assert math.isclose(ours, scipy.stats.spearmanr(a, b).statistic, abs_tol=1e-9)


# ---- Decoding -------------------------------------------------------------------------------------------------------


def random_log_mu(rng, generator, *shape):
    """With tokens outside the support, as top-k leaves them, and with spikes."""
    logits = torch.randn(*shape, generator=generator) * rng.choice([0.3, 2.0, 15.0])
    dead = torch.rand(*shape, generator=generator) < rng.choice([0.0, 0.4])
    dead[..., 0] = False
    return logits.masked_fill(dead, -torch.inf).log_softmax(-1)


def slow_kl(log_mu, tilt):
    """Sum over positions of KL(q || mu) in float64; [T][K]."""
    total = 0.0
    for row, b in zip(log_mu.tolist(), tilt.tolist(), strict=True):
        alive = [(m, t) for m, t in zip(row, b, strict=True) if m > -math.inf]
        top = max(m + t for m, t in alive)
        log_z = top + math.log(math.fsum(math.exp(m + t - top) for m, t in alive))
        total += math.fsum(math.exp(m + t - log_z) * (t - log_z) for m, t in alive)
    return total


@case
@many
def test_the_scale_of_a_tilt_spends_the_budget(seed):
    rng, generator = draw(seed)
    R, T, K = rng.randint(1, 3), rng.randint(1, 5), rng.randint(2, 8)
    log_mu = random_log_mu(rng, generator, R, T, K)
    direction = torch.randn(R, T, K, generator=generator) * rng.choice([1e-3, 1.0, 1e3])
    mask = torch.rand(R, T, generator=generator) < 0.8
    budget = rng.choice([1e-3, 0.1, 1.0, 5.0])
    scale = decode.solve_scale(log_mu, direction, mask, budget)
    assert scale.isfinite().all() and (scale >= 0).all()
    for r in range(R):
        mu, d = log_mu[r][mask[r]].double(), direction[r][mask[r]].double()
        live = (mu.exp() * d.square()).sum(-1) - (mu.exp() * d).sum(-1).square()
        if len(mu) == 0 or float(live.clamp_min(0).sum()) < 1e-5 * float(d.square().max()):
            continue  # nothing to tilt, up to the rounding of float32
        spent = slow_kl(mu, float(scale[r]) * d)
        ceiling = float(-mu.masked_fill(~torch.nn.functional.one_hot(
            d.masked_fill(mu == -torch.inf, -torch.inf).argmax(-1), K).bool(), 0.0).sum())  # fmt: skip
        # Float32 finds the scale; where the best tokens together are worth less than the budget it spends what there is.
        assert spent <= budget * 1.02 + 1e-4
        assert spent >= min(budget, ceiling) * 0.95 - 1e-3


@case
@many
def test_a_tilt_costs_the_same_on_candidates_and_the_rest(seed):
    rng, generator = draw(seed)
    V = rng.randint(2, 12)
    K = rng.randint(1, V)
    log_mu = random_log_mu(rng, generator, 3, V)
    ids, coarse = decode.coarse(log_mu, K)
    assert ids.shape == (3, K) and coarse.shape == (3, K + 1)
    torch.testing.assert_close(coarse.exp().sum(-1), torch.ones(3))
    tilt = torch.randn(3, K, generator=generator).masked_fill(~log_mu.gather(-1, ids).isfinite(), 0.0)
    whole = torch.zeros(3, V).scatter(-1, ids, tilt)
    for r in range(3):
        fine = slow_kl(log_mu[r : r + 1].double(), whole[r : r + 1].double())
        rough = slow_kl(coarse[r : r + 1].double(), torch.nn.functional.pad(tilt[r : r + 1], (0, 1)).double())
        assert math.isclose(fine, rough, rel_tol=1e-3, abs_tol=1e-5)


@case
@many
def test_hindsight_noise_makes_the_token_that_was_said_win(seed):
    rng, generator = draw(seed)
    R, T, V = rng.randint(1, 3), rng.randint(1, 4), rng.randint(2, 40)
    log_mu = random_log_mu(rng, generator, R, T, V)
    ids = torch.distributions.Categorical(logits=log_mu).sample()
    keys = torch.randint(-(2**62), 2**62, (R,), generator=generator)
    noise = hindsight_of(log_mu, ids, keys)
    assert noise.shape == (R, T, V) and noise.isfinite().all()
    z = (log_mu + noise).double()
    said = z.gather(-1, ids[..., None])[..., 0]
    assert (z.max(-1).values <= said + 1e-4 * (1 + said.abs())).all()
    positions = torch.arange(T).expand(R, T)
    top = decode.gumbel(keys, decode.HINDSIGHT_TOP, positions, 1)[..., 0].double()
    u = decode.uniform(keys, decode.HINDSIGHT_REST, positions, V)
    for r, t, v in itertools.product(range(R), range(T), range(V)):
        if v == ids[r, t]:
            expected = float(top[r, t] - log_mu[r, t, v].double())
        else:
            expected = -math.log(math.exp(float(log_mu[r, t, v]) - float(top[r, t])) - math.log(float(u[r, t, v])))
        assert math.isclose(float(noise[r, t, v]), expected, rel_tol=1e-4, abs_tol=1e-4)


MODELS = {family: tiny.language_model(family, VOCAB, eos=EOS, seed=1) for family in ("llama", "gpt2")}


@case
@many
def test_decoding_again_is_decoding_in_float64(seed):
    """Under a tilt, with the noise of hindsight: token by token, one row at a time, no cache, no padding."""
    rng, generator = draw(seed)
    model = MODELS[rng.choice(list(MODELS))]
    base = decode.BaseDistribution(rng.choice([0.7, 1.0, 1.5]), rng.choice([0, 5]), rng.choice([1.0, 0.9]))
    B, N, T = rng.randint(1, 2), rng.randint(1, 3), rng.randint(1, 6)
    prompts = [[rng.randrange(5, VOCAB) for _ in range(rng.randint(1, 5))] for _ in range(B)]
    prefix = prompts_of(model, prompts, N, 0, rng.randint(0, 2))
    keys = decode.row_keys(seed, prompts, N)
    eos = torch.tensor([EOS])
    drawn = decode.sample(model, prefix, keys, base=base, max_new_tokens=T, eos_ids=eos, pad_id=0)
    length = int(drawn.mask.sum(1).max())
    tables = decode.read(model, prefix, drawn.ids[:, :length], drawn.mask[:, :length], base)
    log_mu, hind = tables.log_mu.clone(), hindsight_of(tables.log_mu, drawn.ids[:, :length], keys)
    tilt = torch.randn(B * N, length, VOCAB, generator=generator) * rng.choice([0.0, 0.5, 3.0])
    horizon = rng.choice([None, 0, 1])
    moved = decode.redecode(
        model, drawn.ids, drawn.mask, tables, everywhere(tilt), keys, base=base, eos_ids=eos, pad_id=0, horizon=horizon
    )
    assert log_mu.shape == (B * N, length, VOCAB)
    for r in range(B * N):
        own, ids, first, spent, close = prompts[r // N], [], None, 0.0, False
        old = drawn.ids[r][drawn.mask[r]].tolist()
        for t in range(T):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([own + ids])).logits[0, -1]
            mu = base.log_probs(logits)
            inside = t < len(old)
            noise = hind[r, t] if inside else decode.gumbel(keys[r : r + 1], decode.BEYOND, torch.tensor([t]), VOCAB)[0]
            holds = inside and (first is None or horizon is None or t <= first + horizon)
            b = tilt[r, t] if holds else torch.zeros(VOCAB)
            z = (mu + noise + b).double()
            token = int(z.argmax())
            if t < len(old) and first is None and b.abs().max() == 0:
                token = old[t]  # untilted it wins by construction, whatever rounding makes of two that are equal
            top = z.topk(2).values
            close = close or float(top[0] - top[1]) < 2e-3
            spent += slow_kl(mu[None].double(), b[None].double())
            if inside and first is None and token != old[t]:
                first = t
            ids.append(token)
            if token == EOS or (first is None and len(ids) == len(old)):
                break
        if close:  # two tokens as good as equal: rounding decides, and everything after it
            continue
        assert moved.ids[r][moved.mask[r]].tolist() == ids
        assert math.isclose(float(moved.kl[r]), spent, rel_tol=1e-2, abs_tol=1e-3)


# ---- Rewards --------------------------------------------------------------------------------------------------------


REWARDS = {family: tiny.reward_model(family, VOCAB) for family in ("llama", "opt", "gpt_neox")}
WRAPPED = {
    (family, dtype): DifferentiableReward(tiny.reward_model(family, VOCAB).to(dtype), TOKENIZER)
    for family in REWARDS
    for dtype in (torch.float32, torch.bfloat16)
}
DOUBLE = {family: tiny.reward_model(family, VOCAB).double() for family in REWARDS}


@case
@many
def test_the_score_is_that_of_the_last_token_under_any_padding(seed):
    rng, _ = draw(seed)
    family, dtype = rng.choice(list(WRAPPED))
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(1, 4))]
    completions = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))] for _ in prompts]
    pad = rng.randrange(VOCAB)  # any token: a mask says what counts
    prompt_ids, prompt_mask = tiny.pad_left(prompts, pad, extra=rng.randint(0, 3))
    ids, mask = tiny.pad_right(completions, pad, extra=rng.randint(0, 3))
    scores = WRAPPED[family, dtype].score_ids(prompt_ids, prompt_mask, ids, mask)
    for score, prompt, completion in zip(scores, prompts, completions, strict=True):
        model = DOUBLE[family]
        with torch.no_grad():
            hidden = getattr(model, model.base_model_prefix)(input_ids=torch.tensor([prompt + completion]))[0]
            expected = float(model.score(hidden[:, -1])[0, 0])
        tolerance = 1e-4 if dtype == torch.float32 else 0.15  # eight bits, two layers of width 16
        assert math.isclose(float(score), expected, rel_tol=tolerance, abs_tol=tolerance * 2)


# ---- Targets --------------------------------------------------------------------------------------------------------


@case
@many
def test_weights_and_advantages(seed):
    rng, generator = draw(seed)
    B, N = rng.randint(1, 3), rng.randint(2, 6)
    rewards = torch.randn(B, N, generator=generator) * rng.choice([1e-3, 1.0, 1e4])
    if rng.random() < 0.2:
        rewards[:] = rewards[0, 0]
    k, tau = rng.randint(1, N), rng.choice([None, 0.3, 1.0, 3.0])
    index, weights = target_weights(rewards, k, tau)
    advantages = leave_one_out(rewards)
    for b in range(B):
        row = [float(value) for value in rewards[b].double()]
        order = sorted(range(N), key=lambda i: (-row[i], i))[:k]
        assert index[b].tolist() == order
        mean = sum(row) / N
        std = math.sqrt(sum((value - mean) ** 2 for value in row) / N)
        raw = [math.exp((row[i] - max(row)) / (tau * std)) if tau is not None and std > 0 else 1.0 for i in order]
        for got, want in zip(weights[b].tolist(), raw, strict=True):
            assert math.isclose(got, want / sum(raw), rel_tol=1e-3, abs_tol=1e-5)
        for i in range(N):
            others = (sum(row) - row[i]) / (N - 1)
            assert math.isclose(float(advantages[b, i]), row[i] - others, rel_tol=1e-3, abs_tol=1e-5 * max(map(abs, row)))


@case
@many
def test_losses(seed):
    rng, generator = draw(seed)
    R, T, V = rng.randint(1, 3), rng.randint(1, 4), rng.randint(3, 9)
    K = rng.randint(1, V)
    log_pi = (torch.randn(R, T, V, generator=generator) * 2).log_softmax(-1)
    ids, _ = decode.coarse((torch.randn(R, T, V, generator=generator)).log_softmax(-1), K)
    log_q = torch.randn(R, T, K + 1, generator=generator)
    if K == V:
        log_q[..., -1] = -torch.inf
    log_q = log_q.log_softmax(-1)
    mask, weights = torch.rand(R, T, generator=generator) < 0.7, torch.rand(R, generator=generator)
    loss = tilt_loss(log_pi, TokenTargets(ids, log_q, torch.zeros(R, T)), mask, weights)
    for r in range(R):
        total = 0.0
        for t in range(T):
            pi = [math.exp(value) for value in log_pi[r, t].double().tolist()]
            inside = [pi[v] for v in ids[r, t].tolist()]
            rest = math.fsum(pi[v] for v in range(V) if v not in ids[r, t].tolist())
            for q, p in zip(log_q[r, t].double().exp().tolist(), [*inside, rest], strict=True):
                total += float(mask[r, t]) * (q * math.log(q / p) if q > 0 else 0.0)
        assert math.isclose(float(loss[r]), float(weights[r]) * total, rel_tol=1e-3, abs_tol=1e-4)
    ratios, beta = torch.randn(2 * R, generator=generator) * rng.choice([1.0, 300.0]), rng.choice([0.1, 1.0])
    for r, value in enumerate(dpo_loss(ratios, weights, beta).tolist()):
        margin = beta * float(ratios[2 * r].double() - ratios[2 * r + 1].double())
        expected = math.log1p(math.exp(-margin)) if margin > -30 else -margin
        assert math.isclose(value, float(weights[r]) * expected, rel_tol=1e-4, abs_tol=1e-5)
    assert torch.equal(likelihood_loss(ratios, ratios), -ratios * ratios)


# ---- The same again -------------------------------------------------------------------------------------------------


SAMPLERS = {
    size: VGFSampler(MODELS["llama"], tiny.reward_model("llama", VOCAB), TOKENIZER, flow_batch_size=size) for size in (1, 8, 64)
}


@case
@many
def test_a_run_again_is_the_same_to_the_last_bit_and_its_text_at_any_batch_size(seed):
    rng, _ = draw(seed)
    prompts = [" ".join(rng.choices(tiny.WORDS, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3))]
    budget = TransportBudget(steps=rng.randint(0, 2), step_size=0.5, kl_budget=rng.choice([0.5, 3.0]), rounds=rng.randint(1, 2))
    first, again, small, large = (SAMPLERS[size].sample(prompts, 3, budget, 5, seed=seed) for size in (8, 8, 1, 64))
    for name in ("rewards", "logprobs", "kl", "log_ratio"):
        assert torch.equal(getattr(first.transported, name), getattr(again.transported, name))
        for other in (small, large):
            torch.testing.assert_close(getattr(first.transported, name), getattr(other.transported, name), rtol=1e-3, atol=1e-3)
    assert first.transported.completion_ids == again.transported.completion_ids
    assert first.completions == small.completions == large.completions
