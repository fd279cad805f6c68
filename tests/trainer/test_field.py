"""Training along a learned gradient: particles of the reference move while they are drawn, everything else is as without it."""

import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.trainer.test_docs import PAGE
from tests.trainer.test_vgf_trainer import assert_same, logged, losses, mean_reward, weights
from vgf_llm import TransportBudget, VGFConfig, VGFSampler, VGFTrainer
from vgf_llm.text import DifferentiableReward, decode
from vgf_llm.text.field import HEADS, GradientField, fit_field
from vgf_llm.trainer import vgf_trainer
from vgf_llm.trainer.phases import PhaseOrder


# Of what compares a particle with what it was before it moved.
COMPARED = ("flow/reward_initial", "flow/reward_gain", "flow/accept_rate", "flow/token_change_rate")


def reference(tokenizer: PreTrainedTokenizerFast):
    return tiny.language_model("llama", len(tokenizer), eos=tokenizer.eos_token_id)


def fitted(folder, **changes):
    tokenizer = tiny.tokenizer(chat=True)
    sampler = VGFSampler(reference(tokenizer), tiny.counting_reward(tokenizer), tokenizer, flow_batch_size=512)
    settings = {"num_samples": 64, "max_completion_length": 6, "epochs": 6, "batch_size": 32, "learning_rate": 3e-3}
    fit_field(sampler, ["the food was", "a room", "and", "nice", "poor a"], **settings | changes).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    """Folder of a field of the world of conftest.py, a model of its own."""
    return fitted(tmp_path_factory.mktemp("field"), layers=0)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The same on the states of the reference."""
    return fitted(tmp_path_factory.mktemp("shared"))


def first_phase(trainer, count=4, phase=0):
    """Completions that the first prompts are fitted to, and the micro-batch."""
    rows = [trainer.train_dataset[index] for index in range(count)]
    (batch,) = trainer._make_micro_batches(rows, phase)
    pairs = zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs], batch


# ---- What it does ---------------------------------------------------------------------------------------------------


def test_fitted_completions_are_better_than_the_best_of_as_many(make_trainer, field):
    moved, still = (make_trainer(flow_field=folder, flow_steps=1 if folder else 0, max_steps=6) for folder in (field, None))
    moved.train()
    still.train()
    gains = [a - b for a, b in zip(logged(moved, "reward"), logged(still, "reward"), strict=True)]
    assert sum(gains) / len(gains) > 0.5
    assert logged(moved, "flow/generations") == [4.0] * 6
    assert all(0.5 < kl <= 2.0 * (1 + 1e-5) for kl in logged(moved, "flow/kl"))


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("target", ["sft", "weighted", "tilt", "dpo", "advantage"])
def test_training_raises_the_reward_without_a_gradient_of_it(make_trainer, tokenizer, lora, field, monkeypatch, target, adapters):
    def refuse(*arguments):
        raise AssertionError("the reward was differentiated")

    monkeypatch.setattr(DifferentiableReward, "value_and_grad", refuse)
    own = {"particle_source": "policy", "flow_steps": 0} if target == "advantage" else {}
    trainer = make_trainer(
        flow_field=field, target=target, peft_config=lora if adapters else None, max_steps=30, dpo_beta=0.5,
        per_device_train_batch_size=8 if target in ("sft", "dpo") else 16, learning_rate=3e-2 if target == "dpo" else 1e-2, **own,
    )  # fmt: skip
    before = [parameter.clone() for parameter in trainer._field.parameters()]
    trainer.train()
    policy = trainer.model.merge_and_unload() if adapters else trainer.model
    reward = tiny.counting_reward(tokenizer)
    start, end = mean_reward(reference(tokenizer), reward, tokenizer), mean_reward(policy, reward, tokenizer)
    assert end > start + 0.4, (start, end)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer._field.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in trainer._field.parameters())


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("zero", [{"flow_steps": 0}, {"flow_kl_budget": 0.0}])
def test_without_a_budget_a_field_changes_no_bit(make_trainer, prompts, lora, field, zero, adapters):
    runs = [
        make_trainer(flow_field=folder, peft_config=lora if adapters else None, eval_dataset=prompts.select(range(3)), **zero)
        for folder in (field, None)
    ]
    for run in runs:
        run.train()
        run.evaluate()
    clock = ("second", "runtime", "step_time", "train_")
    ours, plain = (
        [{k: v for k, v in entry.items() if not any(word in k for word in clock)} for entry in run.state.log_history]
        for run in runs
    )
    assert ours == plain and set(COMPARED) < set(ours[0])
    assert_same(weights(runs[0].model), weights(runs[1].model), atol=0, rtol=0)


def test_rounds_draw_as_many_again_and_keep_the_best(make_trainer, field):
    once, thrice, few = (
        make_trainer(flow_field=field, flow_rounds=rounds, flow_movers=movers)
        for rounds, movers in ((1, None), (3, None), (3, 2))
    )
    for trainer in (once, thrice, few):
        trainer.train()
    assert logged(once, "reward")[0] < logged(few, "reward")[0] + 1e-6 <= logged(thrice, "reward")[0] + 2e-6
    assert logged(once, "flow/reward_final")[0] < logged(thrice, "flow/reward_final")[0]
    assert logged(thrice, "flow/generations")[0] > logged(few, "flow/generations")[0] > logged(once, "flow/generations")[0]


def test_dpo_pairs_the_best_with_the_worst_of_the_first_round_both_moved(make_trainer, field):
    trainer = make_trainer(target="dpo", flow_field=field, flow_rounds=2, per_device_train_batch_size=8)
    pairs, _ = first_phase(trainer)
    rows = [trainer.train_dataset[index]["prompt"] for index in range(4)]
    seeds = [trainer._seed(place) for place in range(4)]
    out = trainer._samplers["reference"].sample(rows, 4, trainer.args.budget, 6, seed=seeds)
    assert (out.initial.kl > 0).all()
    expected = []
    for b in range(4):
        expected.append(out.transported.completion_ids[b][int(out.transported.rewards[b].argmax())])
        expected.append(out.initial.completion_ids[b][int(out.initial.rewards[b].argmin())])
    assert pairs == expected


@pytest.mark.parametrize("budget", [0.3, 2.0])
@pytest.mark.parametrize("which", ["field", "shared"])
def test_dense_targets_are_what_particles_were_drawn_from(make_trainer, request, which, budget):
    """Also where the budget of a completion runs out before its end."""
    folder = request.getfixturevalue(which)
    trainer = make_trainer(target="tilt", flow_field=folder, flow_kl_budget=budget, per_device_train_batch_size=16)
    _, batch = first_phase(trainer)
    rows = [trainer.train_dataset[index]["prompt"] for index in range(4)]
    seeds = [trainer._seed(place) for place in range(4)]
    out = trainer._samplers["reference"].sample(rows, 4, trainer.args.budget, 6, seed=seeds).transported
    order = out.rewards.sort(dim=1, descending=True, stable=True).indices
    torch.testing.assert_close(batch["target_kl"].sum(1), out.kl.gather(1, order).flatten())
    assert (batch["target_kl"].sum(1) <= budget * (1 + 1e-5)).all()
    said = batch["target_ids"] == batch["completion_ids"][..., None]
    assert said.any(-1)[batch["completion_mask"].bool()].all()  # the whole vocabulary are candidates
    log_q = (batch["target_log_q"][..., :-1].masked_fill(~said, 0.0).sum(-1) * batch["completion_mask"]).sum(1)
    torch.testing.assert_close(log_q - batch["base_logprobs"], out.log_ratio.gather(1, order).flatten(), atol=1e-4, rtol=1e-4)
    # Read again, all tokens at once, both models say the same: mu, or what the field makes of it while it can be paid for.
    sampler, mask = trainer._samplers["reference"], batch["completion_mask"].bool()
    prompts = batch["prompt_ids"], batch["prompt_mask"].bool()
    prefix = decode.read_prompts(sampler.model, *prompts, sampler.field.depth)
    tables = decode.read(sampler.model, prefix, batch["completion_ids"], mask, sampler.base, sampler.field.depth)
    log_mu, along = tables.log_mu, sampler.field.read(*prompts, prefix.hidden)
    gradient = sampler.field.gradients(along, batch["completion_ids"], mask, tables.hidden)
    tilted = decode.tilted(log_mu, sampler.field.scale(budget) * gradient @ sampler.reward.table.T)
    off = [(batch["target_log_q"][..., :-1] - x.gather(-1, batch["target_ids"])).abs().amax(-1)[mask] for x in (tilted, log_mu)]
    assert torch.minimum(*off).max() < 1e-4
    assert (off[0] > 1e-2).any() and (off[1] > 1e-2).any()


def test_dense_targets_do_not_depend_on_the_batch(make_trainer, field):
    sampler = make_trainer(target="tilt", flow_field=field, per_device_train_batch_size=16)._samplers["reference"]
    prompts, budget = ["the food was", "nice", "poor a"], TransportBudget(kl_budget=1.0)
    whole = sampler.sample(prompts, 4, budget, 6, dense=True)
    assert sampler.sample(prompts, 4, budget, 6).drawn_from is None
    sampler.flow_batch_size = 4  # a prompt at a time
    for part in (sampler.sample(prompts, 4, budget, 6, dense=True), sampler.sample(prompts[:1], 4, budget, 6, dense=True)):
        for name, value in vars(part.drawn_from).items():
            torch.testing.assert_close(value, getattr(whole.drawn_from, name)[: len(value)], atol=1e-5, rtol=1e-4)


def test_dense_targets_leave_to_particles_what_selection_adds(make_trainer, field):
    """The mean over particles of both parts has the gradient of `weighted`, for which a target stands where a token stood."""
    batches = {}
    for temperature in (0.5, 100.0):
        trainer = make_trainer(target="tilt", flow_field=field, target_temperature=temperature, per_device_train_batch_size=16)
        _, batches[temperature] = first_phase(trainer)
    sharp, flat = (batches[temperature]["selection"].view(4, 4) for temperature in (0.5, 100.0))
    torch.testing.assert_close(sharp.sum(1), torch.zeros(4), atol=1e-5, rtol=0)
    assert (sharp.diff(dim=1) <= 1e-6).all() and sharp[:, 0].max() > 2 and flat.abs().max() < 0.05
    weighted = make_trainer(target="weighted", flow_field=field, target_temperature=0.5, per_device_train_batch_size=16)
    _, likelihood = first_phase(weighted)
    torch.testing.assert_close((1 + sharp) / 4, likelihood["weights"].view(4, 4))
    # Where the policy is q, the dense part pulls nowhere: what is left is the pull of selection.
    batch = batches[0.5]
    log_q = torch.full((*batch["completion_ids"].shape, len(trainer.processing_class)), -torch.inf)
    log_pi = log_q.scatter(-1, batch["target_ids"], batch["target_log_q"][..., :-1]).log_softmax(-1)
    losses = trainer._losses(log_pi, trainer._logprobs(log_pi, batch), batch)
    expected = -batch["weights"] * batch["selection"] * trainer._logprobs(log_pi, batch)
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)


def test_a_field_takes_the_place_of_the_gradient_in_dense_targets(make_trainer, field):
    """Of the reference's samples and of the policy's: the tokens that count gain, as far as the cap of a token goes."""
    settings = {"flow_steps": 0, "per_device_train_batch_size": 16, "tilt_kl_cap": 0.2, "target_temperature": 0.05}
    for source, target in (("reference", "tilt"), ("policy", "tilt"), ("policy", "advantage")):
        along, without = (
            make_trainer(target=target, particle_source=source, flow_field=folder, **settings) for folder in (field, None)
        )
        (texts, batch), (same, other) = first_phase(along), first_phase(without)
        assert texts == same and not torch.allclose(batch["target_log_q"], other["target_log_q"])
        good = along.processing_class.convert_tokens_to_ids("good")
        inside, spent = batch["completion_mask"].bool(), batch["target_kl"]
        torch.testing.assert_close(spent[inside], torch.full_like(spent[inside], 0.2), atol=1e-2, rtol=0)
        before = along._log_pi(along._samplers["reference"].model, batch).detach()
        q = batch["target_log_q"][..., :-1].masked_fill(batch["target_ids"] != good, -torch.inf).logsumexp(-1)
        assert q.exp()[inside].mean() > 2 * before[..., good].exp()[inside].mean()


def test_evaluation_moves_particles_of_the_reference_and_no_sample_of_the_policy(make_trainer, prompts, tokenizer, field):
    settings = {"eval_dataset": prompts.select(range(3)), "num_generations_eval": 2, "per_device_eval_batch_size": 2}
    trainer = make_trainer(flow_field=field, max_steps=10, **settings)
    first = trainer.evaluate()
    assert first["eval_kl"] == pytest.approx(0, abs=1e-4)
    texts = prompts["prompt"][:3]
    plain = VGFSampler(reference(tokenizer), tiny.counting_reward(tokenizer), tokenizer)
    own = plain.sample(texts, 1, TransportBudget(steps=0), 6, seed=trainer._seed(-1))
    assert first["eval_reward"] == pytest.approx(own.rewards.mean().item())
    moved = trainer._samplers["reference"].sample(texts, 2, trainer.args.budget, 6, seed=trainer._seed(-1)).transported
    assert first["eval_flow/reward_final"] == pytest.approx(moved.rewards.mean().item())
    assert first["eval_flow/kl"] == pytest.approx(moved.kl.mean().item()) and moved.kl.min() > 0
    assert first["eval_flow/generations"] == 2
    trainer.train()
    second = trainer.evaluate()
    assert second["eval_flow/reward_final"] == pytest.approx(first["eval_flow/reward_final"])  # the reference stands still
    assert second["eval_reward"] > first["eval_reward"] and second["eval_kl"] > 0.01
    assert trainer._samplers["reference"].field is trainer._field and trainer._samplers["policy"].field is None


def test_what_compares_with_before_is_absent_and_what_is_logged_is_explained(make_trainer, field):
    trainer = make_trainer(flow_field=field, flow_rounds=2)
    trainer.train()
    names = set(trainer.state.log_history[0])
    assert {"flow/reward_final", "flow/kl", "flow/generations", "reward", "reward_std"} < names
    gradients = {"flow/fidelity", "flow/gain_predicted", "flow/reward_grad_norm", "flow/displacement_norm"}
    assert not names & (set(COMPARED) | gradients)
    page = PAGE.read_text(encoding="utf-8")
    named = {re.sub(r"^rewards/.*/", "rewards/<name>/", name) for name in names}
    assert not {name for name in named if f"`{name}`" not in page} - {"grad_norm", "learning_rate", "epoch", "step"}


def test_the_card_names_the_field(make_trainer, field, tmp_path):
    shutil.copytree(field, tmp_path / "field-of-good")
    trainer = make_trainer(flow_field=str(tmp_path / "field-of-good"), max_steps=1)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "- particles drawn along the learned gradient field-of-good\n" in card and str(tmp_path) not in card
    assert "reward of particles before transport" not in card and "reward of particles after transport" in card


# ---- How the work is cut up -----------------------------------------------------------------------------------------


def test_particles_do_not_depend_on_the_number_of_processes(make_trainer, field, monkeypatch):
    one, _ = first_phase(make_trainer(flow_field=field, flow_rounds=2))
    trainer = make_trainer(flow_field=field, flow_rounds=2, per_device_train_batch_size=2)
    monkeypatch.setattr(VGFTrainer, "_order", PhaseOrder(micro=2, steps=1, world=2, iterations=1))
    two = []
    for process in (0, 1):
        monkeypatch.setattr(VGFConfig, "process_index", property(lambda self, process=process: process))
        rows = [trainer.train_dataset[place] for place in trainer._order.places(0, process)]
        (batch,) = trainer._make_micro_batches(rows, 0)
        pairs = zip(batch["completion_ids"], batch["completion_mask"], strict=True)
        two += [ids[mask.bool()].tolist() for ids, mask in pairs]
    assert two == one


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_four_steps_are_two_and_two_more_also_from_a_folder_that_moved(make_trainer, lora, field, tmp_path, adapters):
    settings = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "flow_rounds": 2,
        "peft_config": lora if adapters else None,
    }  # fmt: skip
    whole = make_trainer(max_steps=4, flow_field=field, **settings)
    whole.train()
    make_trainer(max_steps=2, save_strategy="steps", save_steps=2, flow_field=field, **settings).train()
    shutil.copytree(field, tmp_path / "moved")
    second = make_trainer(max_steps=4, flow_field=str(tmp_path / "moved"), **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(second) == losses(whole) and len(losses(whole)) == 4
    assert_same(weights(second.model), weights(whole.model), atol=0, rtol=0)


def test_a_checkpoint_of_another_field_is_refused_also_from_the_same_folder(make_trainer, field, tmp_path):
    folder = tmp_path / "field"
    shutil.copytree(field, folder)
    make_trainer(flow_field=str(folder), max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(ValueError, match=r"other settings: flow_field \('sha256 [0-9a-f]+' there, None here\)"):
        make_trainer().train(resume_from_checkpoint=checkpoint)
    fitted(folder, epochs=1)
    with pytest.raises(ValueError, match=r"other settings: flow_field \('sha256 [0-9a-f]+' there, 'sha256 [0-9a-f]+' here\)"):
        make_trainer(flow_field=str(folder)).train(resume_from_checkpoint=checkpoint)


def test_a_field_is_loaded_whole_whatever_the_engine(make_trainer, field, monkeypatch):
    """FSDP would leave the weights of all processes but one out, ZeRO-3 (in tests/distributed) load parts of them."""
    load = GradientField.from_pretrained
    seen = []

    def watched(folder):
        seen.append(os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"])
        return load(folder)

    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr(GradientField, "from_pretrained", watched)
    make_trainer(flow_field=field)
    assert seen == ["false"]


# ---- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sft", "tilt"])
def test_a_field_is_taken_by_targets_that_move_no_particle(tmp_path, target):
    """Those that do are refused in test_vgf_config.py."""
    settings = {"output_dir": str(tmp_path), "flow_field": "field", "target": target, "flow_steps": 0}
    VGFConfig(**settings, particle_source="policy")
    VGFConfig(**settings, flow_rounds=2)


def test_a_field_on_the_states_of_the_reference_does_not_judge_samples_of_the_policy(make_trainer, shared):
    with pytest.raises(ValueError, match=r"reads the states of the reference, but particle_source='policy' draws from another"):
        make_trainer(target="advantage", particle_source="policy", flow_steps=0, flow_field=shared)


def test_folders_that_hold_no_field_are_refused_before_the_policy_is_loaded(make_trainer, field, tmp_path, monkeypatch):
    monkeypatch.setattr(vgf_trainer, "_load_policy", lambda *a: pytest.fail("the policy was loaded first"))
    with pytest.raises(OSError, match=rf"nowhere holds no {HEADS}: give a folder that"):
        make_trainer(flow_field=str(tmp_path / "nowhere"))
    shutil.copytree(field, tmp_path / "broken")
    heads = (tmp_path / "broken" / HEADS).read_bytes()
    (tmp_path / "broken" / HEADS).write_bytes(heads[: len(heads) // 2])
    with pytest.raises(ValueError, match="broken.*the file is broken or cut off"):
        make_trainer(flow_field=str(tmp_path / "broken"))
    shutil.copytree(field, tmp_path / "no backbone")
    (tmp_path / "no backbone" / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no backbone"):
        make_trainer(flow_field=str(tmp_path / "no backbone"))


def test_fields_and_rewards_that_do_not_fit_each_other_are_refused(make_trainer, tokenizer, field, tmp_path):
    def count_good(completions, **kwargs):
        return [float(completion.split().count("good")) for completion in completions]

    for rewards in (count_good, [tiny.counting_reward(tokenizer), count_good]):
        with pytest.raises(ValueError, match=r"flow_field replaces the gradient of the rewards, but count_good has none"):
            make_trainer(flow_field=field, reward_funcs=rewards)
    ensemble = [tiny.reward_model("llama", len(tokenizer), seed=seed) for seed in (0, 1)]
    with pytest.raises(ValueError, match=rf"flow_field .* gives gradients of {len(tokenizer)} numbers, but .* reward have 32"):
        make_trainer(flow_field=field, reward_funcs=[ensemble])
    larger = tiny.tokenizer((*tiny.WORDS, "more"), chat=True)
    GradientField(reference(tokenizer).base_model, 16).save_pretrained(tmp_path / "smaller")
    with pytest.raises(ValueError, match=rf"flow_field .* reads {len(tokenizer)} tokens, but the policy has {len(larger)}"):
        make_trainer(
            flow_field=str(tmp_path / "smaller"), model=reference(larger), processing_class=larger,
            reward_funcs=tiny.reward_model("llama", len(larger)),
        )  # fmt: skip


def test_every_process_has_the_same_field_or_an_error(tokenizer, field, tmp_path, monkeypatch):
    args = SimpleNamespace(flow_field=field, world_size=2, process_index=0, reward_weights=None, reward_model_init_kwargs=None)
    rewards = SimpleNamespace(black_box=[], guide=lambda ready: SimpleNamespace(width=len(tokenizer)))
    monkeypatch.setattr(vgf_trainer, "gather_object", lambda mine: mine * 2)
    assert vgf_trainer._load_field(rewards, tokenizer, args)[0] is not None
    monkeypatch.setattr(vgf_trainer, "gather_object", lambda mine: [*mine, mine[0] and "sha256 of another"])
    with pytest.raises(ValueError, match="is not the same on every process"):
        vgf_trainer._load_field(rewards, tokenizer, args)
    # The second process does not find the folder.
    monkeypatch.setattr(vgf_trainer, "gather_object", lambda mine: [*mine, "process 1: OSError: field holds nothing"])
    with pytest.raises(RuntimeError, match="^process 1: OSError: field holds nothing$"):
        vgf_trainer._load_field(rewards, tokenizer, args)
