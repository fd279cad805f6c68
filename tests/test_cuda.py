"""On a GPU: the sampler says what it says on a CPU, graphs say what plain decoding says, trainers take their steps."""

import math

import pytest
import torch
from datasets import Dataset

from tests import tiny
from vgf_llm import TransportBudget, VGFConfig, VGFSampler, VGFTrainer
from vgf_llm.control import AgentConfig, ReplayBuffer, VGFAgent
from vgf_llm.control.training import UpdateLoop
from vgf_llm.text import replay
from vgf_llm.text.field import fit_field


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

GPU = "cuda"
PROMPTS = ["the food was", "good", "a bad room and the nice staff were", "but the nice staff"]
BUDGET = TransportBudget(steps=2, step_size=0.5, kl_budget=2.0, rounds=3)


@pytest.fixture
def tokenizer():
    return tiny.tokenizer()


def make_sampler(tokenizer, family="llama", device=GPU, attention="sdpa", **options):
    ids = {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    model = tiny.language_model(family, 21, positions=256, **ids).to(device)
    model.set_attn_implementation(attention)
    reward = tiny.reward_model("gpt_neox", 21, positions=256, pad=ids["pad"]).to(device)
    return VGFSampler(model, reward, tokenizer, **options)


def texts(output):
    return [output.initial.completion_ids, output.transported.completion_ids]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_graphs_say_what_plain_decoding_and_the_cpu_say(tokenizer, family, monkeypatch):
    """In float32, with completions longer than what one graph looks at."""
    monkeypatch.setattr(replay, "SLOTS", 16)
    graphs, plain, cpu = (
        make_sampler(tokenizer, family, device, attention)
        for device, attention in ((GPU, "sdpa"), (GPU, "eager"), ("cpu", "sdpa"))
    )
    assert [replay.fits(s.model) for s in (graphs, plain, cpu)] == [True, False, False]
    found = [s.sample(PROMPTS, 4, BUDGET, 100, seed=1) for s in (graphs, plain, cpu)]
    assert texts(found[0]) == texts(found[1]) == texts(found[2])
    assert found[0].transported.completion_ids != found[0].initial.completion_ids
    for name in ("rewards", "kl", "logprobs"):
        for other in found[1:]:
            ours, theirs = getattr(found[0].transported, name).cpu(), getattr(other.transported, name).cpu()
            torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)


def test_a_prompt_does_not_depend_on_the_others(tokenizer):
    sampler = make_sampler(tokenizer)
    together = sampler.sample(PROMPTS, 4, BUDGET, 40, seed=1)
    for b, prompt in enumerate(PROMPTS):
        alone = sampler.sample([prompt], 4, BUDGET, 40, seed=1)
        assert alone.transported.completion_ids[0] == together.transported.completion_ids[b]


@pytest.mark.parametrize("layers", [None, 1])
def test_a_field_is_fitted_and_followed(tokenizer, layers):
    sampler = make_sampler(tokenizer)
    field = fit_field(sampler, PROMPTS * 8, layers=layers, max_completion_length=12, epochs=1)
    along = make_sampler(tokenizer, gradient_field=field)
    moved = along.sample(PROMPTS, 8, BUDGET, 12, seed=1, dense=True)
    assert moved.initial.kl.max() > 0 and moved.drawn_from.log_q.isfinite().all()
    plain = make_sampler(tokenizer, attention="eager", gradient_field=field)
    again = plain.sample(PROMPTS, 8, BUDGET, 12, seed=1, dense=True)
    # The field's own model decides too whether graphs are taken: both answers are the same.
    assert texts(moved) == texts(again)


@pytest.mark.parametrize("target", ["sft", "weighted", "tilt"])
def test_a_trainer_takes_its_steps(tokenizer, tmp_path, target):
    args = VGFConfig(
        output_dir=str(tmp_path), target=target, max_steps=3, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=12, flow_step_size=1.0, learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to="none",
    )  # fmt: skip
    model = tiny.language_model("llama", len(tokenizer), eos=tokenizer.eos_token_id)
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = VGFTrainer(
        model=model,
        reward_funcs=tiny.counting_reward(tokenizer),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.accelerator.device.type == GPU
    assert all(not torch.equal(before[name], value.cpu()) for name, value in trainer.model.named_parameters())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)


def test_updates_of_control_that_are_replayed_are_the_updates():
    config = AgentConfig(hidden=(32, 32), batch_size=16, num_particles=3, flow_matching_steps=2)
    draw = torch.Generator().manual_seed(0)
    columns = {
        "obs": torch.randn(200, 3, generator=draw), "actions": 2 * torch.rand(200, 2, generator=draw) - 1,
        "rewards": torch.randn(200, generator=draw), "next_obs": torch.randn(200, 3, generator=draw),
        "discounts": torch.full((200,), 0.99),
    }  # fmt: skip
    weights = []
    for graph in (False, True):
        agent = VGFAgent(3, 2, config, device=GPU)
        UpdateLoop(agent, ReplayBuffer(columns, device=GPU), graph=graph).run(12)
        weights.append(agent.critic.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-4, rtol=1e-3)
