"""Targets and sources: formulas, that each of them learns, and that the KL cap holds."""

import math

import pytest
import torch
from datasets import Dataset

from tests import tiny
from vgf_llm import TransportBudget, VGFSampler
from vgf_llm.text.decode import TokenTargets
from vgf_llm.trainer.targets import dpo_loss, leave_one_out, likelihood_loss, residual_loss, tilt_loss


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def mean_reward(model, tokenizer):
    """Of plain samples of the model, 64 per prompt, drawn with noise that training does not use."""
    sampler = VGFSampler(model, tiny.counting_reward(tokenizer), tokenizer, flow_batch_size=256)
    output = sampler.sample(["the food was", "a room", "and"], 64, TransportBudget(steps=0), 6, seed=10**9)
    return output.initial.rewards.mean().item()


@pytest.mark.parametrize("source", ["reference", "policy"])
@pytest.mark.parametrize("target", ["sft", "weighted", "tilt", "dpo"])
def test_every_target_raises_the_reward_of_the_policy(make_trainer, tokenizer, target, source):
    trainer = make_trainer(
        target=target, particle_source=source, max_steps=30, flow_kl_budget=4.0, tilt_kl_cap=0.5,
        per_device_train_batch_size=8 if target in ("sft", "dpo") else 16,
        learning_rate=3e-2 if target == "dpo" else 1e-2, target_temperature=0.3, dpo_beta=0.5, policy_kl_cap=10.0,
    )  # fmt: skip
    start = mean_reward(tiny.language_model("llama", len(tokenizer), eos=tokenizer.eos_token_id), tokenizer)
    trainer.train()
    end = mean_reward(trainer.model, tokenizer)
    assert end > start + 0.25, (start, end)
    if target == "tilt":
        assert all(0 < kl <= 6 * 0.5 * 1.02 for kl in logged(trainer, "target/kl"))
    if target == "dpo":
        assert sum(logged(trainer, "fit/accuracy")[-10:]) / 10 > 0.6


@pytest.mark.parametrize("function", [False, True])
def test_a_policy_gradient_with_dense_targets_raises_the_reward_of_the_policy(make_trainer, tokenizer, function):
    def count_good(completions, **kwargs):
        return [float(completion.split().count("good")) for completion in completions]

    trainer = make_trainer(
        target="advantage", particle_source="policy", flow_steps=0, max_steps=30, per_device_train_batch_size=16,
        learning_rate=1e-2, policy_kl_cap=10.0, value_warmup_samples=64, reward_funcs=count_good if function else None,
    )  # fmt: skip
    start = mean_reward(tiny.language_model("llama", len(tokenizer), eos=tokenizer.eos_token_id), tokenizer)
    trainer.train()
    end = mean_reward(trainer.model, tokenizer)
    assert end > start + 0.25, (start, end)


def test_dense_targets_are_a_control_variate_of_the_policy_gradient():
    """Summed over every completion of one token, weighted by its probability: the gradient does not depend on the targets."""
    torch.manual_seed(0)
    V, K = 7, 3
    logits = torch.randn(V, dtype=torch.float64, requires_grad=True)
    rewards = torch.randn(V, dtype=torch.float64)
    log_pi = logits.log_softmax(-1)
    pi = log_pi.detach().exp()
    (expected,) = torch.autograd.grad(-(log_pi.exp() * rewards).sum(), logits, retain_graph=True)
    candidates = log_pi.detach().topk(K).indices
    for spread in (0.0, 1.0):  # 0: no tilt, where REINFORCE is left
        events = torch.cat([pi[candidates], (1 - pi[candidates].sum())[None]]).log()
        log_q = (events + spread * torch.randn(K + 1, dtype=torch.float64)).log_softmax(-1)
        targets = TokenTargets(candidates.expand(V, 1, K), log_q.expand(V, 1, K + 1), torch.zeros(V, 1))
        rows, mask = log_pi.expand(V, 1, V), torch.ones(V, 1)
        ids = torch.arange(V)[:, None]
        loss = tilt_loss(rows, targets, mask, pi) + residual_loss(rows, ids, targets, mask, rewards, pi)
        (gradient,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
        torch.testing.assert_close(gradient, expected)


def test_advantages_leave_the_particle_itself_out():
    rewards = torch.tensor([[1.0, 2.0, 6.0]])
    torch.testing.assert_close(leave_one_out(rewards), torch.tensor([[1 - 4.0, 2 - 3.5, 6 - 1.5]]))


def test_tilt_loss_is_the_divergence_over_candidates_and_the_rest():
    torch.manual_seed(0)
    log_pi = torch.randn(2, 3, 7).log_softmax(-1)
    ids = torch.randn(2, 3, 7).topk(4, -1).indices
    log_q = torch.randn(2, 3, 5).log_softmax(-1)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    weights = torch.tensor([0.25, 2.0])
    expected = torch.zeros(2)
    for r in range(2):
        for t in range(int(mask[r].sum())):
            p = log_pi[r, t].exp()
            inside = p[ids[r, t]]
            events = torch.cat([inside, (1 - inside.sum())[None]])
            q = log_q[r, t].exp()
            expected[r] += weights[r] * (q * (q / events).log()).sum()
    torch.testing.assert_close(tilt_loss(log_pi, TokenTargets(ids, log_q, torch.zeros(2, 3)), mask, weights), expected)


def test_a_policy_that_is_the_target_has_no_gradient():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 7, requires_grad=True)
    log_pi = logits.log_softmax(-1)
    ids = log_pi.topk(4, -1).indices
    inside = log_pi.gather(-1, ids)
    log_q = torch.cat([inside, (1 - inside.exp().sum(-1, keepdim=True)).log()], -1).detach()
    tilt_loss(log_pi, TokenTargets(ids, log_q, torch.zeros(2, 3)), torch.ones(2, 3), torch.ones(2)).sum().backward()
    assert logits.grad.abs().max() < 1e-5
    # All tokens are candidates: nothing is left for the rest, and nothing breaks.
    every = log_pi.detach().topk(7, -1)
    log_q = torch.cat([every.values, torch.full((2, 3, 1), -torch.inf)], -1)
    loss = tilt_loss(log_pi, TokenTargets(every.indices, log_q, torch.zeros(2, 3)), torch.ones(2, 3), torch.ones(2))
    assert loss.isfinite().all() and loss.abs().max() < 1e-4


def test_dpo_and_likelihood_losses():
    log_ratio, weights = torch.tensor([1.0, -1.0, 0.0, 2.0]), torch.tensor([1.0, 0.0])
    torch.testing.assert_close(dpo_loss(log_ratio, weights, 0.5), torch.tensor([-math.log(1 / (1 + math.exp(-1.0))), 0.0]))
    torch.testing.assert_close(likelihood_loss(torch.tensor([-2.0, -3.0]), torch.tensor([0.5, 0.0])), torch.tensor([1.0, 0.0]))


def test_dpo_pairs_the_transported_best_with_the_initial_worst(make_trainer, tokenizer):
    trainer = make_trainer(target="dpo", flow_kl_budget=4.0, per_device_train_batch_size=8)
    rows = [trainer.train_dataset[index] for index in range(4)]
    (batch,) = trainer._make_micro_batches(rows, phase=0)
    sampler = trainer._samplers["reference"]
    seeds = [trainer._seed(place) for place in range(4)]
    out = sampler.sample([row["prompt"] for row in rows], 4, trainer.args.budget, 6, seed=seeds)
    expected = []
    for b in range(4):
        expected.append(out.transported.completion_ids[b][int(out.transported.rewards[b].argmax())])
        expected.append(out.initial.completion_ids[b][int(out.initial.rewards[b].argmin())])
    fitted = [ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]
    assert fitted == expected
    # The policy still is the reference: the loss of a pair is log 2.
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), torch.tensor(math.log(2)))


def test_the_cap_keeps_a_policy_that_feeds_on_itself_near_the_reference(make_trainer):
    free, capped = (
        make_trainer(
            particle_source="policy", max_steps=50, flow_kl_budget=4.0, policy_kl_cap=cap, learning_rate=5e-3,
            per_device_train_batch_size=8,
        )
        for cap in (1e6, 1.0)
    )  # fmt: skip
    free.train()
    capped.train()
    assert max(logged(free, "kl")) > 2.0 and not any(logged(free, "pulled_back"))
    back = logged(capped, "pulled_back")
    assert 0 < sum(back) < len(back)
    assert max(logged(capped, "kl")) < max(logged(free, "kl"))
    assert sum(logged(capped, "kl")[-10:]) / 10 < 1.6  # noise of 32 samples, overshoot of a step
    assert all((kl > 1.0) == bool(pulled) for kl, pulled in zip(logged(capped, "kl"), back, strict=True))


def test_particles_of_the_policy_follow_it(make_trainer):
    trainer = make_trainer(particle_source="policy", flow_steps=0, max_steps=1, learning_rate=5e-2)
    rows = [trainer.train_dataset[index] for index in range(4)]
    (before,) = trainer._make_micro_batches(rows, phase=25)
    trainer.train()
    (after,) = trainer._make_micro_batches(rows, phase=25)
    assert before["completion_ids"].tolist() != after["completion_ids"].tolist()


def test_dense_targets_of_the_reference_stand_still_while_adapters_train(make_trainer, lora):
    trainer = make_trainer(target="tilt", best_k=1, peft_config=lora, learning_rate=5e-2)
    rows = [trainer.train_dataset[index] for index in range(4)]
    (before,) = trainer._make_micro_batches(rows, phase=25)
    trainer.train()
    (after,) = trainer._make_micro_batches(rows, phase=25)
    for name in ("target_ids", "target_log_q", "base_logprobs"):
        assert torch.equal(before[name], after[name]), name
    moved = trainer._logprobs(trainer._log_pi(trainer.model, after), after) - after["base_logprobs"]
    assert moved.abs().max() > 0.01


def test_truncated_completions_can_be_left_out(make_trainer, tokenizer):
    kept, masked = (make_trainer(mask_truncated_completions=on, num_generations=2, flow_steps=0) for on in (False, True))
    rows = [kept.train_dataset[index] for index in range(4)]
    (all_in,), (some_out,) = (trainer._make_micro_batches(rows, phase=0) for trainer in (kept, masked))
    cut = torch.tensor(
        [
            ids[mask.bool()][-1] != tokenizer.eos_token_id
            for ids, mask in zip(all_in["completion_ids"], all_in["completion_mask"], strict=True)
        ]
    )
    assert cut.any() and not cut.all()
    assert all_in["weights"].tolist() == [1.0] * 4
    assert some_out["weights"].tolist() == (~cut).float().tolist()
    assert some_out["num_items"] == all_in["completion_mask"].sum(1)[~cut].sum()
    nothing = make_trainer(mask_truncated_completions=True, max_completion_length=1, flow_steps=0, max_steps=1)
    nothing.train()  # a step without a completion is no division by zero
    assert math.isfinite(logged(nothing, "loss")[0])


def test_what_the_sampler_told_is_what_a_forward_says(make_trainer, monkeypatch):
    """Log-probabilities of the reference that are known already are not computed again, and are the same."""
    for settings in ({"target": "weighted"}, {"target": "tilt", "particle_source": "policy", "learning_rate": 1e-2}):
        trainer = make_trainer(per_device_train_batch_size=8, max_steps=2, flow_kl_budget=4.0, **settings)
        told = []
        collate = trainer._collate

        def compare(*arguments, collate=collate, told=told):
            told.append((collate(*arguments), collate(*arguments[:-1], {}), len(arguments[-1])))
            return told[-1][0]

        monkeypatch.setattr(trainer, "_collate", compare)
        trainer.train()
        for known, computed, count in told:
            assert count >= 4
            torch.testing.assert_close(known["base_logprobs"], computed["base_logprobs"], rtol=1e-4, atol=1e-4)


def test_only_the_best_particles_move_where_movers_are_few(make_trainer):
    for movers, most in ((1, 0.25), (None, 1.0)):
        trainer = make_trainer(flow_movers=movers, flow_kl_budget=8.0, max_steps=3)
        trainer.train()
        shares = logged(trainer, "flow/accept_rate")
        assert max(shares) <= most and max(shares) > 0
    assert max(shares) > 0.25


def test_iterations_fit_each_phase_several_times(make_trainer):
    trainer = make_trainer(num_iterations=3, max_steps=6, optim="sgd", learning_rate=1e-6)
    phases = []
    make = trainer._make_micro_batches
    trainer._make_micro_batches = lambda rows, phase: phases.append(phase) or make(rows, phase)
    trainer.train()
    assert phases == [0, 1]
    losses = logged(trainer, "loss")
    assert losses[:3] == pytest.approx([losses[0]] * 3, abs=1e-4) and losses[3] != pytest.approx(losses[0], abs=1e-3)


def test_streams_train_as_the_dataset_they_come_from(make_trainer, prompts):
    table = make_trainer(shuffle_dataset=False, max_steps=3)
    stream = make_trainer(train_dataset=prompts.to_iterable_dataset(), max_steps=3)
    table.train()
    stream.train()
    assert logged(stream, "loss") == logged(table, "loss")  # the third step is in the second epoch
    unnamed = Dataset.from_list([{"question": "a"}]).to_iterable_dataset()
    with pytest.raises(ValueError, match="has no column 'prompt'"):
        make_trainer(train_dataset=unnamed)
    with pytest.raises(ValueError, match="dataloader_num_workers must be 0"):
        make_trainer(train_dataset=prompts.to_iterable_dataset(), dataloader_num_workers=1)


def test_the_card_tells_budget_rewards_and_gain(make_trainer, prompts, tmp_path):
    trainer = make_trainer(eval_dataset=prompts.select(range(2)), eval_strategy="steps", eval_steps=1, flow_kl_budget=1.5)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "kl_budget=1.5" in card and "1 x SumOfEmbeddings" in card and "optimizer steps: 2" in card
    evaluated = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert f"| reward of the policy on the evaluation prompts | {evaluated[0]:.3f} | {evaluated[-1]:.3f} |" in card
    trainer.create_model_card(model_name="named")
    assert "# named" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
