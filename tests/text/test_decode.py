"""Counter noise, the base distribution, sampling, and re-decoding, each against a slow reference of its own."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.decoding import everywhere, hindsight_of, prompts_of
from vgf_llm.text import decode
from vgf_llm.text.decode import BaseDistribution


PLAIN = BaseDistribution()
STREAMS = (decode.SAMPLE, decode.HINDSIGHT_TOP, decode.HINDSIGHT_REST, decode.BEYOND, decode.CONTROL)
NO_EOS = torch.tensor([10**6])


# Two tests of fit


def chi_square(observed, expected):
    """p-value of counts against expected counts."""
    observed, expected = torch.as_tensor(observed).double(), torch.as_tensor(expected).double()
    statistic = ((observed - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2))


def is_gumbel(values):
    """p-value of a Kolmogorov-Smirnov test against the standard Gumbel law (asymptotic, an upper bound)."""
    below = torch.exp(-torch.exp(-values.double().sort().values))
    n = len(values)
    steps = torch.arange(n, dtype=torch.float64) / n
    distance = float(torch.maximum((below - steps).abs(), (steps + 1 / n - below).abs()).max())
    return 2 * math.exp(-2 * n * distance**2)


# Counter noise


def grid(keys, positions, size, stream=decode.SAMPLE):
    """Uniform numbers [R, T, size]."""
    return decode.uniform(keys, stream, torch.arange(positions).expand(len(keys), positions), size)


@pytest.mark.parametrize("stream", STREAMS)
def test_noise_is_uniform_and_its_gumbel_form_has_the_right_moments(stream):
    keys = decode.row_keys(3, [[1, 2], [7]], 50)
    u = grid(keys, 40, 100, stream).flatten()
    assert 0 < u.min() and u.max() < 1
    n = len(u)
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    assert chi_square(torch.histc(u, 512, 0, 1), torch.full((512,), n / 512)) > 1e-4
    # The low bits are as good as the high ones.
    low = (u * 2.0**44) % 1
    assert chi_square(torch.histc(low, 128, 0, 1), torch.full((128,), n / 128)) > 1e-4
    g = decode.gumbel(keys, stream, torch.arange(40).expand(100, 40), 100).flatten()
    assert g.dtype == torch.float32 and g.isfinite().all()
    assert abs(g.double().mean() - 0.5772157) < 5 * math.pi / math.sqrt(6 * n)
    assert abs(g.double().var() - math.pi**2 / 6) < 0.02
    assert is_gumbel(g) > 1e-4


def test_logarithms_of_the_noise_are_finite_at_both_ends_of_the_counter(monkeypatch):
    for word in (0, -1):
        monkeypatch.setattr(decode, "_mix", lambda x, word=word: torch.full_like(x, word))
        g = decode.gumbel(torch.zeros(1, dtype=torch.int64), decode.SAMPLE, torch.zeros(1, dtype=torch.int64), 3)
        assert g.isfinite().all()


def test_noise_depends_on_nothing_but_its_coordinates():
    keys = decode.row_keys(0, [[1], [2], [3]], 4)
    whole = grid(keys, 7, 11)
    order = torch.randperm(12)
    assert torch.equal(grid(keys[order], 7, 11), whole[order])
    assert torch.equal(grid(keys[5:6], 7, 11), whole[5:6])
    assert torch.equal(grid(keys, 7, 5), whole[..., :5])
    positions = torch.randint(7, (12,))
    assert torch.equal(decode.uniform(keys, decode.SAMPLE, positions, 11), whole[torch.arange(12), positions])


def test_noise_is_the_same_on_every_machine_and_in_every_version():
    keys = decode.row_keys(7, [[5, 6]], 2)
    assert keys.tolist() == [-1893509001852657755, -7546223645615726897]
    u = decode.uniform(keys, decode.BEYOND, torch.tensor([0, 3]), 2)
    assert u.flatten().tolist() == [0.716352067844411, 0.45289649799409004, 0.5728453681216757, 0.8209449743825038]


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_streams_positions_particles_tokens_rounds_and_seeds_are_uncorrelated():
    keys = decode.row_keys(0, [[1, 2, 3]], 101)
    u = grid(keys, 21, 101)
    pairs = {
        "positions": (u[:, 1:], u[:, :-1]),
        "particles": (u[1:], u[:-1]),
        "tokens": (u[..., 1:], u[..., :-1]),
        "position t, token v + 1 and position t + 1, token v": (u[:, :-1, 1:], u[:, 1:, :-1]),
        "rounds": (u, grid(keys + 1, 21, 101)),
        "seeds": (u, grid(decode.row_keys(1, [[1, 2, 3]], 101), 21, 101)),
        "prompts": (u, grid(decode.row_keys(0, [[1, 2, 4]], 101), 21, 101)),
    }
    pairs |= {f"streams 0 and {s}": (u, grid(keys, 21, 101, s)) for s in STREAMS[1:]}
    for name, (a, b) in pairs.items():
        assert abs(correlation(a, b)) < 5 / math.sqrt(a.numel()), name


def test_no_number_of_the_noise_occurs_twice():
    keys = torch.cat([decode.row_keys(seed, [[1], [2]], 8) for seed in range(2)])
    keys = torch.cat([keys, keys + 1])
    u = torch.stack([grid(keys, 16, 64, stream) for stream in STREAMS]).flatten()
    # 52 bits: the chance of one accidental pair among these is below 1e-5.
    assert len(u.unique()) == len(u)


def test_row_keys_differ_in_seed_prompt_and_particle_and_can_be_continued():
    prompts = [[i, j] for i in range(20) for j in range(20)] + [[i] for i in range(20)] + [[]]
    keys = torch.cat([decode.row_keys(seed, prompts, 16) for seed in range(3)])
    assert len(keys.unique()) == len(keys)
    assert torch.equal(decode.row_keys(0, [[4, 2]], 8)[3:], decode.row_keys(0, [[4, 2]], 5, start=3))
    together = decode.row_keys(0, [[1], [2, 3]], 4)
    assert torch.equal(together, torch.cat([decode.row_keys(0, [[1]], 4), decode.row_keys(0, [[2, 3]], 4)]))


# The base distribution


def reference_log_probs(logits, temperature, top_k, top_p, vocab_size=None):
    """log mu of one row of logits, as a list of float64."""
    logits = [float(x) / temperature for x in logits.tolist()[:vocab_size]]
    order = sorted(range(len(logits)), key=lambda v: -logits[v])
    kept = order[:top_k] if top_k else order
    top = logits[order[0]]
    total = sum(math.exp(logits[v] - top) for v in kept)
    nucleus, mass = [], 0.0
    for v in kept:
        if mass < top_p or top_p == 1:
            nucleus.append(v)
        mass += math.exp(logits[v] - top) / total
    total = math.log(sum(math.exp(logits[v] - top) for v in nucleus)) + top
    return [logits[v] - total if v in nucleus else -math.inf for v in range(len(logits))]


@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.99, 1.0]),
    vocab_size=st.sampled_from([None, 1, 7, 12]),
)
@settings(max_examples=150)
def test_log_probs_agree_with_a_slow_float64_reference(seed, temperature, top_k, top_p, vocab_size):
    logits = 3 * torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(seed))
    base = BaseDistribution(temperature, top_k, top_p, vocab_size)
    result = base.log_probs(logits)
    expected = torch.tensor(
        [[reference_log_probs(row, temperature, top_k, top_p, vocab_size) for row in rows] for rows in logits]
    )
    assert torch.equal(result == -torch.inf, expected == -torch.inf)
    torch.testing.assert_close(result.exp(), expected.exp(), atol=1e-5, rtol=1e-5, check_dtype=False)
    torch.testing.assert_close(result.exp().sum(-1), torch.ones(2, 3))


def test_log_probs_are_float32_from_half_precision_logits_and_leave_them_alone():
    logits = torch.randn(4, 9).bfloat16()
    before = logits.clone()
    result = BaseDistribution(0.5, 4, 0.9).log_probs(logits)
    assert result.dtype == torch.float32 and torch.equal(logits, before)
    torch.testing.assert_close(result.exp().sum(-1), torch.ones(4))


def test_top_k_one_is_greedy():
    logits = torch.randn(50, 9)
    assert torch.equal(BaseDistribution(top_k=1).log_probs(logits).exp().argmax(-1), logits.argmax(-1))
    assert (BaseDistribution(top_k=1).log_probs(logits) > -torch.inf).sum() == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive.*top_k=1"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": math.nan}, "temperature must be positive"),
        ({"top_k": -1}, "top_k must not be negative.*0 keeps all"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\].*1.0 keeps all"),
        ({"top_p": 1.5}, "top_p must lie in"),
        ({"top_p": math.nan}, "top_p must lie in"),
    ],
)
def test_base_distribution_rejects_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        BaseDistribution(**arguments)


# Slow references: one row at a time, no padding, no cache, one full forward per token


@torch.no_grad()
def next_log_mu(model, tokens, base):
    logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
    return base.log_probs(logits)


def noise_at(key, stream, position, vocab):
    return decode.gumbel(torch.tensor([key]), stream, torch.tensor([position]), vocab)[0]


def slow_sample(model, prompt, key, base, length, eos):
    tokens, logprob = [], 0.0
    while len(tokens) < length and (not tokens or tokens[-1] not in eos):
        log_mu = next_log_mu(model, prompt + tokens, base)
        tokens.append(int((log_mu + noise_at(key, decode.SAMPLE, len(tokens), len(log_mu))).argmax()))
        logprob += float(log_mu[tokens[-1]])
    return tokens, logprob


def slow_redecode(model, prompt, old, key, base, length, eos, tilt, horizon):
    """Tokens, log mu, KL, log ratio and the number of new tokens of one completion decoded again, step by step."""
    tables = torch.stack([next_log_mu(model, prompt + old[:t], base) for t in range(len(old))])
    noise = hindsight_of(tables[None], torch.tensor([old]), torch.tensor([key]))[0]
    tokens, changed, logprob, spent, log_ratio = [], None, 0.0, 0.0, 0.0
    while len(tokens) < length and (not tokens or tokens[-1] not in eos):
        t = len(tokens)
        log_mu = next_log_mu(model, prompt + tokens, base)
        known = t < len(old)
        holds = known and (changed is None or horizon is None or t <= changed + horizon)
        b = tilt[t] if holds else torch.zeros_like(log_mu)
        z = noise[t] if known else noise_at(key, decode.BEYOND, t, len(log_mu))
        token = int((log_mu + b + z).argmax())
        log_q = (log_mu + b).double().log_softmax(-1)
        support = log_mu > -torch.inf
        spent += float((log_q.exp() * (log_q - log_mu))[support].sum())
        logprob += float(log_mu[token])
        log_ratio += float(log_q[token] - log_mu[token])
        tokens.append(token)
        if changed is None and (not known or token != old[t]):
            changed = t
    new_tokens = 0 if changed is None else len(tokens) - changed - 1
    return tokens, logprob, spent, log_ratio, new_tokens


def draw_prompts(rng, vocab, count):
    return [[rng.randrange(vocab) for _ in range(rng.randint(1, 6))] for _ in range(count)]


def random_base(rng, vocab):
    return BaseDistribution(
        rng.choice([0.7, 1.0, 1.6]), rng.choice([0, 0, vocab // 2]), rng.choice([1.0, 1.0, 0.9]), vocab_size=vocab
    )


def rows_of(decoded):
    return [ids[mask].tolist() for ids, mask in zip(decoded.ids, decoded.mask, strict=True)]


VOCAB, LENGTH = 9, 6
MODELS = {family: tiny.language_model(family, VOCAB + 2, seed=5) for family in tiny.FAMILIES}
# pad == eos, pad != eos, several end-of-sequence tokens
ENDINGS = [(0, [0]), (1, [0]), (1, [0, 4]), (0, [0, 4])]


def draw(model, prompts, keys, base, eos, pad, extra=0, length=LENGTH):
    prefix = prompts_of(model, prompts, len(keys) // len(prompts), pad, extra)
    return decode.sample(model, prefix, keys, base=base, max_new_tokens=length, eos_ids=torch.tensor(eos), pad_id=pad)


def redecode(model, prompts, n, decoded, tilt_fn, keys, base, eos, pad, extra=0, horizon=None, lookahead=4):
    """`tilt_fn(tables)` makes the tilt: values for every token, or a `Tilt`. Returns the result and the tilt."""
    width = int(decoded.mask.sum(1).max())
    prefix = prompts_of(model, prompts, n, pad, extra)
    tables = decode.read(model, prefix, decoded.ids[:, :width], decoded.mask[:, :width], base)
    tilt = tilt_fn(tables)
    again = decode.redecode(
        model, decoded.ids, decoded.mask, tables, tilt if isinstance(tilt, decode.Tilt) else everywhere(tilt), keys,
        base=base, eos_ids=torch.tensor(eos), pad_id=pad, horizon=horizon, lookahead=lookahead,
    )  # fmt: skip
    return again, tilt


# Sampling


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("pad", "eos"), ENDINGS)
def test_sample_equals_step_by_step_decoding_token_for_token(family, pad, eos):
    rng = random.Random(f"{family} {pad} {eos}")
    model = MODELS[family]
    for extra in (0, 3):
        prompts, base, n = draw_prompts(rng, VOCAB, 3), random_base(rng, VOCAB), 2
        keys = decode.row_keys(rng.randrange(100), prompts, n)
        drawn = draw(model, prompts, keys, base, eos, pad, extra)
        for r, tokens in enumerate(rows_of(drawn)):
            expected, logprob = slow_sample(model, prompts[r // n], int(keys[r]), base, LENGTH, eos)
            assert tokens == expected
            assert drawn.logprobs[r] == pytest.approx(logprob, abs=1e-4)
        assert (drawn.ids[~drawn.mask] == pad).all()
        assert torch.equal(drawn.new_tokens, drawn.mask.sum(1))
        assert (drawn.kl == 0).all() and (drawn.log_ratio == 0).all()


@given(case=st.integers(0, 10**9))
@settings(max_examples=40)
def test_a_sample_does_not_depend_on_padding_batch_mates_or_their_number(case):
    rng = random.Random(case)
    model = MODELS[rng.choice(tiny.FAMILIES)]
    pad, eos = rng.choice(ENDINGS)
    prompts, base, n = draw_prompts(rng, VOCAB, rng.randint(2, 5)), random_base(rng, VOCAB), rng.randint(1, 4)
    seed = rng.randrange(1000)
    together = rows_of(draw(model, prompts, decode.row_keys(seed, prompts, n), base, eos, pad, rng.randint(0, 4)))
    b = rng.randrange(len(prompts))
    alone = rows_of(draw(model, [prompts[b]], decode.row_keys(seed, [prompts[b]], n + 2), base, eos, pad))
    assert alone[:n] == together[b * n : b * n + n]


def test_a_completion_ends_with_the_first_end_of_sequence_token_or_at_the_limit():
    prompts = [[2, 3]]
    drawn = draw(MODELS["llama"], prompts, decode.row_keys(0, prompts, 300), PLAIN, [0, 4], 0)
    rows = rows_of(drawn)
    assert all(not set(row[:-1]) & {0, 4} for row in rows)
    assert all(row[-1] in (0, 4) or len(row) == LENGTH for row in rows)
    # All three endings occur, so the test says something.
    assert {row[-1] for row in rows} >= {0, 4} and any(row[-1] not in (0, 4) for row in rows)


def test_completion_mask_stops_after_the_first_end_of_sequence_token_even_where_padding_equals_it():
    ids = torch.tensor([[5, 0, 0, 0], [0, 0, 0, 0], [5, 6, 7, 8], [4, 5, 0, 0]])
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert decode.completion_mask(ids, torch.tensor([0, 4])).int().tolist() == expected


# The law of what is decoded


def exact_law(model, prompt, length, vocab, base, tilt=None):
    """Probability of every sequence of tokens, the end-of-sequence token playing no role."""
    law = {}
    for sequence in itertools.product(range(vocab), repeat=length):
        law[sequence] = 0.0
    rows = {}
    for depth in range(length):
        for prefix in itertools.product(range(vocab), repeat=depth):
            log_mu = next_log_mu(model, [*prompt, *prefix], base).double()
            rows[prefix] = (log_mu if tilt is None else log_mu + tilt[depth]).log_softmax(-1)
    for sequence in law:
        law[sequence] = math.exp(sum(float(rows[sequence[:t]][sequence[t]]) for t in range(length)))
    assert sum(law.values()) == pytest.approx(1)
    return law


def fits(rows, law):
    """p-value of a chi-square test; sequences expected fewer than five times are counted together."""
    counts = dict.fromkeys(law, 0)
    for row in rows:
        counts[tuple(row)] += 1
    common = [s for s in law if law[s] * len(rows) >= 5]
    observed = [counts[s] for s in common] + [len(rows) - sum(counts[s] for s in common)]
    expected = [law[s] * len(rows) for s in common]
    rest = len(rows) - sum(expected)
    if rest < 1e-6 * len(rows):
        assert observed[-1] == 0
        return chi_square(observed[:-1], expected)
    return chi_square(observed, [*expected, rest])


LAW_LM = tiny.language_model("llama", 6, seed=11)
LAWS = [PLAIN, BaseDistribution(temperature=0.6), BaseDistribution(top_k=3), BaseDistribution(top_p=0.7)]


@pytest.mark.parametrize("base", LAWS, ids=repr)
def test_samples_follow_the_base_distribution(base):
    prompts = [[2, 5]]
    drawn = draw(LAW_LM, prompts, decode.row_keys(1, prompts, 12000), base, [99], 0, length=3)
    law = exact_law(LAW_LM, prompts[0], 3, 6, base)
    assert fits(rows_of(drawn), law) > 1e-3
    # The same test tells a neighbouring distribution apart.
    assert fits(rows_of(drawn), exact_law(LAW_LM, prompts[0], 3, 6, BaseDistribution(temperature=1.15))) < 1e-6


@pytest.mark.parametrize("base", [LAWS[0], LAWS[2]], ids=repr)
def test_a_tilt_that_knows_nothing_of_the_old_tokens_gives_exactly_the_tilted_law(base):
    prompts, n = [[2, 5]], 12000
    keys = decode.row_keys(2, prompts, n)
    drawn = draw(LAW_LM, prompts, keys, base, [99], 0, length=3)
    fixed = 1.2 * torch.randn(3, 6, generator=torch.Generator().manual_seed(8))
    again, _ = redecode(
        LAW_LM, prompts, n, drawn, lambda t: fixed.expand(n, 3, 6).clone(), keys + 1, base, [99], 0
    )  # fmt: skip
    assert fits(rows_of(again), exact_law(LAW_LM, prompts[0], 3, 6, base, fixed)) > 1e-3
    assert fits(rows_of(again), exact_law(LAW_LM, prompts[0], 3, 6, base)) < 1e-6
    # Along such a path the log ratio is an unbiased estimate of the KL, whose exact value is known.
    difference = (again.log_ratio - again.kl).double()
    assert abs(difference.mean()) < 5 * difference.std() / math.sqrt(n)
    q, mu = exact_law(LAW_LM, prompts[0], 3, 6, base, fixed), exact_law(LAW_LM, prompts[0], 3, 6, base)
    exact = sum(q[s] * math.log(q[s] / mu[s]) for s in q if q[s] > 0)
    assert abs(again.kl.double().mean() - exact) < 5 * again.kl.double().std() / math.sqrt(n) + 1e-6


@pytest.mark.parametrize("base", [LAWS[0], LAWS[2]], ids=repr)
def test_a_tilt_of_some_tokens_gives_exactly_the_law_of_the_same_tilt_of_all(base):
    """Tokens without tilt take part as one event; which of them wins is drawn apart."""
    prompts, n = [[2, 5]], 12000
    keys = decode.row_keys(5, prompts, n)
    drawn = draw(LAW_LM, prompts, keys, base, [99], 0, length=3)
    some = torch.tensor([[1, 4], [0, 2], [5, 3]])
    values = torch.tensor([[-2.0, 1.0], [0.7, -3.0], [-1.0, -1.5]])
    fixed = torch.zeros(3, 6).scatter(-1, some, values)
    again, _ = redecode(
        LAW_LM, prompts, n, drawn, lambda t: decode.Tilt(some.expand(n, 3, 2), values.expand(n, 3, 2)), keys + 1, base, [99], 0
    )
    assert fits(rows_of(again), exact_law(LAW_LM, prompts[0], 3, 6, base, fixed)) > 1e-3
    difference = (again.log_ratio - again.kl).double()
    assert abs(difference.mean()) < 5 * difference.std() / math.sqrt(n)
    q, mu = exact_law(LAW_LM, prompts[0], 3, 6, base, fixed), exact_law(LAW_LM, prompts[0], 3, 6, base)
    exact = sum(q[s] * math.log(q[s] / mu[s]) for s in q if q[s] > 0)
    assert abs(again.kl.double().mean() - exact) < 5 * again.kl.double().std() / math.sqrt(n) + 1e-6


def test_what_an_earlier_round_said_stays_at_tilt_zero_too():
    """A round infers noise for what the last one said as if mu had said it, under keys of its own."""
    prompts, n = [[2, 5]], 500
    keys = decode.row_keys(3, prompts, n)
    state = draw(LAW_LM, prompts, keys, PLAIN, [0], 0, length=5)
    for index in range(4):
        push = torch.randn(n, 5, 6, generator=torch.Generator().manual_seed(index))
        moved, _ = redecode(
            LAW_LM, prompts, n, state, lambda t, p=push: p[:, : t.log_mu.shape[1]], keys + 2 * index + 1, PLAIN, [0], 0
        )
        still, _ = redecode(LAW_LM, prompts, n, moved, lambda t: torch.zeros_like(t.log_mu), keys + 2 * index + 2, PLAIN, [0], 0)
        assert torch.equal(still.ids, moved.ids) and not torch.equal(moved.ids, state.ids)
        state = moved


# Hindsight noise


@given(case=st.integers(0, 10**6), sharp=st.sampled_from([0.0, 1.0, 8.0]))
@settings(max_examples=60)
def test_the_old_token_wins_under_hindsight_noise(case, sharp):
    generator = torch.Generator().manual_seed(case)
    log_mu = (sharp * torch.randn(50, 4, 12, generator=generator)).log_softmax(-1)
    ids = torch.randint(12, (50, 4), generator=generator)
    noise = hindsight_of(log_mu, ids, torch.arange(50) + case)
    assert noise.isfinite().all()
    assert torch.equal((log_mu + noise).argmax(-1), ids)


def test_hindsight_noise_of_tokens_drawn_from_mu_is_standard_gumbel_and_independent():
    n, vocab = 40000, 5
    log_mu = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf]).log_softmax(-1)
    keys = decode.row_keys(4, [[1]], n)
    tokens = (log_mu + decode.gumbel(keys, decode.SAMPLE, torch.zeros(n, dtype=torch.int64), vocab)).argmax(-1)
    noise = hindsight_of(log_mu.expand(n, 1, vocab), tokens[:, None], keys + 1)[:, 0]
    assert is_gumbel(noise[:, 4]) > 1e-4
    for v in range(vocab):
        assert is_gumbel(noise[:, v]) > 1e-4, v
    off_diagonal = torch.corrcoef(noise.T) - torch.eye(vocab)
    assert off_diagonal.abs().max() < 5 / math.sqrt(n)
    # Given the token it is not standard Gumbel: the posterior knows who won.
    assert noise[tokens == 3, 3].mean() > 2


# Re-decoding


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tilt_zero_returns_the_completions_bit_for_bit(family):
    rng = random.Random(family)
    model = MODELS[family]
    for _ in range(12):
        pad, eos = rng.choice(ENDINGS)
        prompts, base, n = draw_prompts(rng, VOCAB, rng.randint(1, 4)), random_base(rng, VOCAB), rng.randint(1, 6)
        keys = decode.row_keys(rng.randrange(100), prompts, n)
        drawn = draw(model, prompts, keys, base, eos, pad)
        for index in range(3):
            again, _ = redecode(
                model, prompts, n, drawn, lambda t: torch.zeros_like(t.log_mu), keys + index, base, eos, pad,
                extra=rng.randint(0, 3), horizon=rng.choice([None, 0, 2]),
            )  # fmt: skip
            assert torch.equal(again.ids, drawn.ids) and torch.equal(again.mask, drawn.mask)
            torch.testing.assert_close(again.logprobs, drawn.logprobs, atol=1e-4, rtol=1e-4)
            assert (again.new_tokens == 0).all()
            assert again.kl.abs().max() < 1e-5 and (again.log_ratio.abs().max() < 1e-5)


@pytest.mark.parametrize("u", [1 - 2.0**-53, 2.0**-53])
def test_tilt_zero_returns_the_completions_even_under_the_most_extreme_noise(u, monkeypatch):
    """Every other token then ends up within rounding of the winner, as it does about once in 10^6 tokens by chance."""
    plain = decode.uniform

    def extreme(keys, stream, positions, size):
        drawn = plain(keys, stream, positions, size)
        rest = torch.as_tensor(stream) == decode.HINDSIGHT_REST
        return torch.where(rest[..., None] if rest.ndim else rest, u, drawn)

    prompts, model = [[2, 3], [5]], MODELS["llama"]
    keys = decode.row_keys(0, prompts, 200)
    drawn = draw(model, prompts, keys, PLAIN, [0], 1)
    monkeypatch.setattr(decode, "uniform", extreme)
    again, _ = redecode(model, prompts, 200, drawn, lambda t: torch.zeros_like(t.log_mu), keys, PLAIN, [0], 1)
    assert torch.equal(again.ids, drawn.ids)


@pytest.mark.parametrize("horizon", [None, 0])
def test_a_token_at_the_edge_of_the_support_may_leave_it_after_it_was_said(horizon):
    """A parallel forward rounds otherwise than a step with cache: the last of the top k may fall out of it."""
    prompts, n = [[2, 3, 4], [5], [7, 1]], 100
    model, keys = MODELS["llama"], decode.row_keys(0, prompts, n)
    drawn = draw(model, prompts, keys, PLAIN, [0], 1)

    def push(tables, amount):
        for t in (0, 2):
            said = drawn.ids[::2, t, None]
            tables.log_mu[::2, t] = tables.log_mu[::2, t].scatter(-1, said, -torch.inf).log_softmax(-1)
        return amount * torch.randn(tables.log_mu.shape)

    still, _ = redecode(model, prompts, n, drawn, lambda t: push(t, 0.0), keys + 1, PLAIN, [0], 1, horizon=horizon)
    assert torch.equal(still.ids, drawn.ids) and still.log_ratio.abs().max() < 1e-5 and still.kl.abs().max() < 1e-5
    moved, _ = redecode(model, prompts, n, drawn, lambda t: push(t, 0.5), keys + 1, PLAIN, [0], 1, horizon=horizon)
    assert not torch.equal(moved.ids, drawn.ids)
    assert moved.kl.isfinite().all() and moved.log_ratio.isfinite().all()
    # Beyond the first change the token is judged by the model again, not held there by infinite noise.
    again = [r for r, (a, b) in enumerate(zip(drawn.ids.tolist(), moved.ids.tolist(), strict=True)) if a[:2] != b[:2]]
    forced = [r for r in again if r % 2 == 0 and moved.mask[r, 2] and drawn.mask[r, 2]]
    assert len(forced) > 10 and not all(moved.ids[r, 2] == drawn.ids[r, 2] for r in forced)


@pytest.mark.parametrize("horizon", [None, 0, 2])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_redecode_equals_step_by_step_decoding_under_the_same_noise(family, horizon):
    rng = random.Random(f"{family} {horizon}")
    model, changed, unchanged = MODELS[family], 0, 0
    for case in range(5):
        pad, eos = ENDINGS[case % len(ENDINGS)]
        prompts, base, n = draw_prompts(rng, VOCAB, 3), random_base(rng, VOCAB), 3
        keys = decode.row_keys(rng.randrange(100), prompts, n)
        drawn = draw(model, prompts, keys, base, eos, pad)
        strength = rng.choice([0.2, 0.7, 2.0])
        generator = torch.Generator().manual_seed(rng.randrange(1000))
        again, tilt = redecode(
            model, prompts, n, drawn, lambda t, s=strength, g=generator: s * torch.randn(t.log_mu.shape, generator=g),
            keys + 1, base, eos, pad, extra=rng.randint(0, 3), horizon=horizon,
        )  # fmt: skip
        old, new = rows_of(drawn), rows_of(again)
        assert (again.ids[~again.mask] == pad).all()
        for r in range(len(new)):
            tokens, logprob, spent, log_ratio, new_tokens = slow_redecode(
                model, prompts[r // n], old[r], int(keys[r]) + 1, base, LENGTH, eos, tilt[r], horizon
            )
            assert new[r] == tokens
            assert again.logprobs[r] == pytest.approx(logprob, abs=2e-4)
            assert again.kl[r] == pytest.approx(spent, abs=2e-4)
            assert again.log_ratio[r] == pytest.approx(log_ratio, abs=2e-4)
            assert again.new_tokens[r] == new_tokens
            changed, unchanged = changed + (tokens != old[r]), unchanged + (tokens == old[r])
    assert changed > 2 and unchanged > 2


@given(case=st.integers(0, 10**9))
@settings(max_examples=30)
def test_a_moved_completion_does_not_depend_on_its_batch_mates(case):
    rng = random.Random(case)
    model = MODELS[rng.choice(tiny.FAMILIES)]
    pad, eos = rng.choice(ENDINGS)
    prompts, base, n = draw_prompts(rng, VOCAB, 4), random_base(rng, VOCAB), 2
    horizon = rng.choice([None, 0, 1])
    keys = decode.row_keys(rng.randrange(100), prompts, n)
    push = 1.5 * torch.randn(len(keys), LENGTH, VOCAB, generator=torch.Generator().manual_seed(case))
    b = rng.randrange(4)
    mine = slice(b * n, b * n + n)

    def moved(prompts, keys, push, extra):
        drawn = draw(model, prompts, keys, base, eos, pad, extra)
        again, _ = redecode(
            model, prompts, n, drawn, lambda t: push[:, : t.log_mu.shape[1]], keys + 1, base, eos, pad, extra, horizon
        )
        return rows_of(again)

    assert moved([prompts[b]], keys[mine], push[mine], 0) == moved(prompts, keys, push, rng.randint(0, 3))[mine]


@given(case=st.integers(0, 10**9))
@settings(max_examples=40)
def test_looking_ahead_along_the_old_text_changes_nothing_but_the_number_of_forwards(case):
    rng = random.Random(case)
    model = MODELS[rng.choice(tiny.FAMILIES)]
    pad, eos = rng.choice(ENDINGS)
    prompts, base, n = draw_prompts(rng, VOCAB, 3), random_base(rng, VOCAB), 3
    keys = decode.row_keys(rng.randrange(100), prompts, n)
    drawn = draw(model, prompts, keys, base, eos, pad, length=12)
    push = rng.choice([0.5, 2.0]) * torch.randn(len(keys), 12, VOCAB, generator=torch.Generator().manual_seed(case))
    horizon, forwards = rng.choice([None, 0, 2]), []
    plain = decode._forward

    def counted(*args, **kwargs):
        forwards[-1] += 1
        return plain(*args, **kwargs)

    decode._forward = counted
    try:
        results = []
        for lookahead in (1, 2, 4, 30):
            forwards.append(0)
            again, _ = redecode(
                model, prompts, n, drawn, lambda t: push[:, : t.log_mu.shape[1]], keys + 1, base, eos, pad,
                rng.randint(0, 2), horizon, lookahead,
            )  # fmt: skip
            results.append(again)
    finally:
        decode._forward = plain
    for again in results[1:]:
        assert rows_of(again) == rows_of(results[0]) and torch.equal(again.new_tokens, results[0].new_tokens)
        for field in ("logprobs", "kl", "log_ratio"):
            torch.testing.assert_close(getattr(again, field), getattr(results[0], field), atol=1e-4, rtol=1e-4)
    assert forwards[0] >= forwards[1] >= forwards[2] >= forwards[3]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_old_text_that_is_said_again_costs_one_forward_per_block(family):
    """One token is forced, and all that follows it stays: the draft is right throughout."""
    model = MODELS[family]
    prompts, keys = [[2, 3]], decode.row_keys(0, [[2, 3]], 1)
    drawn = draw(model, prompts, keys, PLAIN, [99], 1, length=33)

    def again(lookahead):
        stuck = torch.zeros(1, 33, VOCAB + 2)
        stuck[0, 0, (drawn.ids[0, 0] + 1) % VOCAB] = 1e4
        stuck[0, torch.arange(1, 33), drawn.ids[0, 1:]] = 1e4
        counts, plain = [0], decode._forward

        def counted(*args, **kwargs):
            counts[0] += 1
            return plain(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode, "_forward", counted)
            moved, _ = redecode(model, prompts, 1, drawn, lambda t: stuck, keys, PLAIN, [99], 1, lookahead=lookahead)
        assert moved.ids[0, 1:].tolist() == drawn.ids[0, 1:].tolist() and moved.ids[0, 0] != drawn.ids[0, 0]
        return counts[0] - 3  # the prompt, the old text, and the token that changed

    assert again(1) == 31 and again(8) == 4


def test_an_overwhelming_tilt_towards_the_end_of_sequence_token_cuts_and_away_from_it_prolongs():
    prompts, n = [[2, 3]], 60
    keys = decode.row_keys(0, prompts, n)
    drawn = draw(MODELS["gpt2"], prompts, keys, PLAIN, [0], 1)

    def towards_eos(tables, amount):
        tilt = torch.zeros_like(tables.log_mu)
        tilt[..., 0] = amount
        return tilt

    cut, _ = redecode(MODELS["gpt2"], prompts, n, drawn, lambda t: towards_eos(t, 1e4), keys + 1, PLAIN, [0], 1, horizon=None)
    assert all(row == [0] for row in rows_of(cut)) and (cut.new_tokens == 0).all()
    grown, _ = redecode(MODELS["gpt2"], prompts, n, drawn, lambda t: towards_eos(t, -1e4), keys + 1, PLAIN, [0], 1, horizon=None)
    old, new = rows_of(drawn), rows_of(grown)
    ended = [r for r in range(n) if old[r][-1] == 0]
    assert ended and all(new[r][: len(old[r]) - 1] == old[r][:-1] and new[r][len(old[r]) - 1] != 0 for r in ended)
    assert all(new[r] == old[r] for r in range(n) if old[r][-1] != 0)


# The scale of a tilt


def spent(log_mu, tilt, mask):
    """sum_t KL(q_t || mu_t) per row in float64."""
    log_mu, tilt = log_mu.double(), tilt.double()
    log_q = (log_mu + tilt).log_softmax(-1)
    return ((log_q.exp() * (log_q - log_mu)).nan_to_num() * mask[..., None]).sum((1, 2))


def ceiling(log_mu, direction, mask):
    """The KL that the best token, or mu among the best ones, costs at every position."""
    reachable = direction.masked_fill(log_mu == -torch.inf, -torch.inf)
    best = reachable == reachable.amax(-1, keepdim=True)
    return -(log_mu.masked_fill(~best, -torch.inf).logsumexp(-1) * mask).double().sum(-1)


@given(
    case=st.integers(0, 10**6),
    sharp=st.sampled_from([0.5, 2.0, 5.0]),
    share=st.sampled_from([0.003, 0.05, 0.3, 0.6]),
    sparse=st.booleans(),
    uneven=st.booleans(),
)
@settings(max_examples=150)
def test_the_scale_spends_the_budget_within_one_percent(case, sharp, share, sparse, uneven):
    generator = torch.Generator().manual_seed(case)
    log_mu = (sharp * torch.randn(8, 5, 16, generator=generator)).log_softmax(-1)
    direction = torch.randn(8, 5, 16, generator=generator)
    if sparse:  # a single token at a single position, often one that mu hardly says
        direction = direction * (torch.rand(8, 80, generator=generator).argsort(1) == 0).view(8, 5, 16)
        direction = direction.abs()
    if uneven:
        direction = direction * 10 ** (3 * torch.rand(8, 5, 1, generator=generator) - 1.5)
    mask = torch.rand(8, 5, generator=generator) > 0.3
    mask[:, 0] = True
    limit = ceiling(log_mu, direction, mask)
    for r in range(8):
        row = slice(r, r + 1)
        budget = share * float(limit[r])
        if not ((direction[r] != 0) & mask[r, :, None]).any() or budget < 1e-4:
            continue
        scale = decode.solve_scale(log_mu[row], direction[row], mask[row], budget)
        found = float(spent(log_mu[row], scale[:, None, None] * direction[row], mask[row]))
        assert found == pytest.approx(budget, rel=0.01)


def test_the_scale_grows_with_the_budget_and_ignores_the_unit_of_the_direction():
    log_mu, direction = (2 * torch.randn(20, 4, 9)).log_softmax(-1), torch.randn(20, 4, 9)
    mask = torch.rand(20, 4) > 0.2
    mask[:, 0] = True
    scales = [decode.solve_scale(log_mu, direction, mask, budget) for budget in (0.01, 0.1, 0.3, 1.0)]
    assert all((a < b).all() for a, b in itertools.pairwise(scales))
    for unit in (1e-9, 100, 1e9):
        torch.testing.assert_close(decode.solve_scale(log_mu, unit * direction, mask, 0.3) * unit, scales[2])


@pytest.mark.parametrize("candidates", [1, 3, 9, 20])
def test_all_but_the_candidates_are_one_event_without_a_change_of_kl(candidates):
    for support in (0, 4):
        log_mu = BaseDistribution(top_k=support).log_probs(2 * torch.randn(20, 4, 9))
        ids, coarse = decode.coarse(log_mu, candidates)
        torch.testing.assert_close(coarse.exp().sum(-1), torch.ones(20, 4))
        assert ids.shape[-1] == coarse.shape[-1] - 1 == min(candidates, 9)
        gain = torch.randn(ids.shape).masked_fill(log_mu.gather(-1, ids) == -torch.inf, 0.0)
        direction = torch.zeros_like(log_mu).scatter(-1, ids, gain)
        padded = torch.nn.functional.pad(gain, (0, 1))
        whole, part = (decode.kl(decode.tilted(p, t), p) for p, t in ((log_mu, direction), (coarse, padded)))
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-4)
        if candidates >= 9:
            assert (coarse[..., -1] < -60).all()


def test_a_row_without_direction_gets_scale_zero_and_its_neighbours_are_unmoved():
    log_mu, direction = torch.randn(3, 4, 9).log_softmax(-1), torch.randn(3, 4, 9)
    direction[1] = 0
    mask = torch.ones(3, 4, dtype=torch.bool)
    scale = decode.solve_scale(log_mu, direction, mask, 0.5)
    assert scale[1] == 0 and (scale[[0, 2]] > 0).all()
    outside = direction.clone()
    mask[1], outside[1] = False, 5.0
    assert decode.solve_scale(log_mu, outside, mask, 0.5)[1] == 0
    assert torch.equal(decode.solve_scale(log_mu[[0]], direction[[0]], mask[[0]], 0.5), scale[[0]])


def test_a_budget_beyond_reach_gives_a_finite_scale_that_spends_nearly_all_there_is():
    log_mu, direction = torch.randn(6, 2, 4).log_softmax(-1), torch.randn(6, 2, 4)
    mask = torch.ones(6, 2, dtype=torch.bool)
    scale = decode.solve_scale(log_mu, direction, mask, 1e3)
    assert scale.isfinite().all()
    assert (spent(log_mu, scale[:, None, None] * direction, mask) > 0.9 * ceiling(log_mu, direction, mask)).all()


def test_the_scale_counts_only_tokens_within_the_support():
    log_mu = BaseDistribution(top_k=3).log_probs(torch.randn(5, 3, 9))
    direction = torch.randn(5, 3, 9)
    mask = torch.ones(5, 3, dtype=torch.bool)
    scale = decode.solve_scale(log_mu, direction, mask, 0.2)
    outside = torch.where(log_mu == -torch.inf, 50.0, direction)
    torch.testing.assert_close(decode.solve_scale(log_mu, outside, mask, 0.2), scale)
    reached = spent(log_mu, scale[:, None, None] * direction, mask)
    torch.testing.assert_close(reached, torch.full_like(reached, 0.2), rtol=0.01, atol=0)


def test_kl_and_tilted_agree_with_their_definitions():
    log_mu = BaseDistribution(top_k=4).log_probs(torch.randn(3, 7, 9))
    log_q = decode.tilted(log_mu, torch.randn(3, 7, 9))
    torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(3, 7))
    q, mu = log_q.exp(), log_mu.exp()
    expected = torch.where(q > 0, q * (q / mu).log(), 0.0).sum(-1)
    torch.testing.assert_close(decode.kl(log_q, log_mu), expected)
    assert decode.kl(log_mu, log_mu).abs().max() < 1e-6
