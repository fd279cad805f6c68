"""VGFTrainer: it learns, it is invariant to how the work is cut up, it resumes, and it refuses what cannot work."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests import tiny
from vgf_llm import TransportBudget, VGFSampler
from vgf_llm.text import DifferentiableReward
from vgf_llm.trainer.targets import target_weights
from vgf_llm.trainer.vgf_trainer import PhaseOrder, PhaseSampler


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def mean_reward(model, reward, tokenizer):
    """Of plain samples of the model, 64 per prompt, drawn with noise that training does not use."""
    sampler = VGFSampler(copy.deepcopy(model), reward, tokenizer, flow_batch_size=256)
    output = sampler.sample(["the food was", "a room", "and"], 64, TransportBudget(steps=0), 6, seed=10**9)
    return output.initial.rewards.mean().item()


# ---- It learns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_training_raises_the_reward_of_the_policy_itself(make_trainer, tokenizer, lora, adapters):
    trainer = make_trainer(
        max_steps=30, per_device_train_batch_size=8, peft_config=lora if adapters else None, flow_kl_budget=4.0
    )
    reward = tiny.counting_reward(tokenizer)
    initial = tiny.language_model("llama", len(tokenizer), eos=tokenizer.eos_token_id)
    before = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    frozen = {name: value.clone() for name, value in trainer.model.named_parameters() if not value.requires_grad}
    assert bool(frozen) == adapters
    trainer.train()

    now = dict(trainer.model.named_parameters())
    assert all(now[name].requires_grad for name in before), "sampling froze what is trained"
    unchanged = [name for name in before if torch.equal(before[name], now[name])]
    assert not unchanged
    assert all(torch.equal(frozen[name], now[name]) for name in frozen)

    policy = trainer.model.merge_and_unload() if adapters else trainer.model
    start, end = mean_reward(initial, reward, tokenizer), mean_reward(policy, reward, tokenizer)
    assert end > start + 0.5, (start, end)
    assert logged(trainer, "fit/log_ratio")[-1] > logged(trainer, "fit/log_ratio")[0] + 0.2


def test_transport_gives_better_targets_than_best_of_n_and_zero_steps_are_best_of_n(make_trainer, tokenizer):
    flowed, still = make_trainer(flow_kl_budget=4.0), make_trainer(flow_steps=0)
    flowed.train()
    still.train()
    assert logged(flowed, "flow/reward_gain")[0] > 0.3
    assert logged(still, "flow/reward_gain") == [0.0, 0.0]
    assert logged(flowed, "reward")[0] > logged(still, "reward")[0]
    assert logged(flowed, "flow/reward_initial") == pytest.approx(logged(still, "flow/reward_initial"))
    assert "flow/displacement_norm" not in still.state.log_history[0]

    rows = [still.train_dataset[index] for index in range(4)]
    (batch,) = still._make_micro_batches(rows, phase=0)
    sampler = VGFSampler(
        tiny.language_model("llama", len(tokenizer), eos=tokenizer.eos_token_id),
        tiny.counting_reward(tokenizer),
        tokenizer,
    )
    expected = sampler.sample(
        [row["prompt"] for row in rows],
        4,
        TransportBudget(steps=0),
        6,
        seed=[still._seed(place) for place in range(4)],
    )
    fitted = [ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]
    assert fitted == expected.completion_ids


# ---- The loss -------------------------------------------------------------------------------------------------------


def test_loss_is_the_weighted_likelihood_per_token(make_trainer):
    trainer = make_trainer(target="weighted", best_k=2, per_device_train_batch_size=4, temperature=0.7, top_k=10)
    (batch,) = trainer._make_micro_batches([{"prompt": "and"}, {"prompt": "the staff were nice but the"}], phase=0)
    numerator = denominator = 0.0
    for row in range(4):  # one by one and without padding
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        logits = trainer.model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1] / 0.7
        nll = torch.nn.functional.cross_entropy(logits, completion, reduction="sum")
        numerator += batch["weights"][row] * nll
        denominator += batch["weights"][row] * len(completion)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), numerator / denominator)
    torch.testing.assert_close(batch["weights"].view(2, 2).sum(1), torch.ones(2))


@pytest.mark.parametrize("family", tiny.LEARNED_POSITIONS)
def test_padding_on_the_left_does_not_shift_learned_positions(make_trainer, tokenizer, family):
    model = tiny.language_model(family, len(tokenizer), eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id)
    trainer = make_trainer(model=model, flow_steps=0)
    prompts = [{"prompt": "and"}, {"prompt": "the staff were nice but the"}, {"prompt": "a room"}, {"prompt": "nice"}]
    (batch,) = trainer._make_micro_batches(prompts, phase=0)
    for row in range(4):  # one by one and without padding
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        logits = trainer.model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        expected = -torch.nn.functional.cross_entropy(logits, completion, reduction="sum")
        torch.testing.assert_close(batch["base_logprobs"][row], expected, atol=1e-4, rtol=1e-4)


def test_weights_are_a_softmax_in_units_of_the_spread_within_the_prompt():
    rewards = torch.tensor([[0.0, 4.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    chosen, weight = target_weights(rewards, 3, 0.5)
    assert chosen.tolist() == [[1, 2, 3], [0, 1, 2]]  # of equal ones the first
    gap = 2.0 / (0.5 * math.sqrt(2.0))
    best = 1 / (1 + 2 * math.exp(-gap))
    torch.testing.assert_close(weight[0], torch.tensor([best, (1 - best) / 2, (1 - best) / 2]))
    torch.testing.assert_close(weight[1], torch.full((3,), 1 / 3))
    torch.testing.assert_close(target_weights(1000 * rewards - 7, 3, 0.5)[1], weight)
    assert target_weights(rewards[:, :1], 1, 1.0)[1].tolist() == [[1.0], [1.0]]


# ---- How the work is cut up -----------------------------------------------------------------------------------------


def test_gradient_accumulation_and_phases_change_nothing(make_trainer):
    cuts = [
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "flow_batch_size": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 8},
    ]
    # SGD: Adam would hide a wrong scale of the gradient. best_k=2: weights are not all 1.
    runs = [
        make_trainer(target="weighted", best_k=2, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, max_steps=4, **cut)
        for cut in cuts
    ]
    for run in runs:
        run.train()
    for run in runs[1:]:
        assert losses(run) == pytest.approx(losses(runs[0]), abs=2e-5)
        assert logged(run, "grad_norm") == pytest.approx(logged(runs[0], "grad_norm"), rel=1e-4)
        assert_same(weights(run.model), weights(runs[0].model), atol=1e-5, rtol=1e-4)
        for name in ("reward", "flow/kl", "flow/reward_gain", "completions/mean_length", "num_tokens"):
            assert logged(run, name) == pytest.approx(logged(runs[0], name))


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("at", [2, 3])
def test_four_steps_are_two_and_two_more(make_trainer, lora, tmp_path, at, adapters):
    # 8 prompts, 2 a step, phases of 2 steps: step 3 lies within a phase, steps 5 and 6 in the second epoch.
    settings = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "steps_per_generation": 4,
        "peft_config": lora if adapters else None,
    }  # fmt: skip
    whole = make_trainer(max_steps=6, **settings)
    whole.train()
    first = make_trainer(max_steps=at, save_strategy="steps", save_steps=at, **settings)
    first.train()
    second = make_trainer(max_steps=6, **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{at}"))
    assert losses(second) == losses(whole)
    assert logged(second, "num_tokens") == logged(whole, "num_tokens")
    assert_same(weights(second.model), weights(whole.model), atol=0, rtol=0)


def test_a_run_can_resume_in_the_second_epoch(make_trainer, tmp_path):
    whole = make_trainer(max_steps=4)  # two steps an epoch
    loader = whole.get_train_dataloader()
    orders = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        orders.append([row["index"] for rows in loader for row in rows])
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    whole.train()
    make_trainer(max_steps=3, save_strategy="steps", save_steps=3).train()
    second = make_trainer(max_steps=4)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert losses(second) == losses(whole)
    assert_same(weights(second.model), weights(whole.model), atol=0, rtol=0)


def test_epochs_have_their_own_order_and_leave_no_phase_unfinished():
    sampler = PhaseSampler(10, PhaseOrder(micro=2, steps=2, world=1, iterations=1), seed=0)
    first = list(sampler)
    assert len(first) == len(sampler) == 16
    assert first[:4] == first[4:8] and first[8:12] == first[12:]
    assert len(set(first)) == 8
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    again = PhaseSampler(10, PhaseOrder(micro=2, steps=2, world=1, iterations=1), seed=0)
    again.set_epoch(1)
    assert list(again) == second
    assert list(PhaseSampler(4, PhaseOrder(2, 1, 1, 1), seed=None)) == [0, 1, 2, 3]


def test_processes_share_every_optimizer_step_as_one_process_takes_it():
    one, two = PhaseOrder(micro=4, steps=3, world=1, iterations=1), PhaseOrder(micro=2, steps=3, world=2, iterations=1)
    assert one.size == two.size == 12
    for step in range(3):  # micro-batch by micro-batch, the same prompts
        together = [place for process in (0, 1) for place in two.places(5, process)[2 * step : 2 * step + 2]]
        assert together == one.places(5, 0)[4 * step : 4 * step + 4]
    assert two.deal(list("abcdefghijkl")) == list("abefijcdghkl")  # the first process's share, then the second's


def test_a_prompt_that_comes_again_gets_other_particles(make_trainer):
    dataset = Dataset.from_list([{"prompt": "the food was"}] * 4)
    trainer = make_trainer(train_dataset=dataset, max_completion_length=8)
    (first,), (second,) = (trainer._make_micro_batches(list(dataset), phase=phase) for phase in (0, 1))
    rows = [
        ids[mask.bool()].tolist()
        for b in (first, second)
        for ids, mask in zip(b["completion_ids"], b["completion_mask"], strict=True)
    ]
    assert len({tuple(row) for row in rows}) > 4
    other = make_trainer(train_dataset=dataset, max_completion_length=8, seed=1)
    assert other._make_micro_batches(list(dataset), phase=0)[0]["completion_ids"].tolist() != first["completion_ids"].tolist()


# ---- Reference and policy -------------------------------------------------------------------------------------------


def test_the_first_phase_of_the_policy_leaves_it_in_training_mode(make_trainer):
    trainer = make_trainer(particle_source="policy", max_steps=1)
    trainer.train()
    assert len(logged(trainer, "flow/reward_gain")) == 1  # metrics of training are logged in training mode


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_particles_come_from_the_model_as_it_was(make_trainer, lora, adapters):
    trainer = make_trainer(max_steps=4, peft_config=lora if adapters else None)
    rows = [trainer.train_dataset[index] for index in range(4)]
    (before,) = trainer._make_micro_batches(rows, phase=25)
    trainer.train()
    trainer.model.train()
    (after,) = trainer._make_micro_batches(rows, phase=25)
    assert trainer.model.training, "sampling left the policy in eval mode"
    assert torch.equal(before["completion_ids"], after["completion_ids"])
    torch.testing.assert_close(before["base_logprobs"], after["base_logprobs"])
    with torch.no_grad():
        moved = trainer._logprobs(trainer._log_pi(trainer.model, after), after) - after["base_logprobs"]
    assert moved.abs().max() > 0.01


def test_dropout_is_off_unless_it_is_wanted(make_trainer, tokenizer):
    def model():
        built = tiny.language_model("gpt2", len(tokenizer), eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id)
        for module in built.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        return built

    rates = []
    for disable in (True, False):
        trainer = make_trainer(model=model(), disable_dropout=disable)
        rates.append({module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)})
    assert rates == [{0.0}, {0.5}]


def test_checkpointed_activations_give_the_same_run(make_trainer, lora):
    plain, checkpointed = (make_trainer(activation_checkpointing=on, peft_config=lora) for on in (False, True))
    plain.train()
    checkpointed.train()
    assert checkpointed.model.get_base_model().is_activation_checkpointing
    assert losses(plain) == pytest.approx(losses(checkpointed))
    assert_same(weights(plain.model), weights(checkpointed.model), atol=1e-5, rtol=1e-4)


# ---- What goes in and comes out -------------------------------------------------------------------------------------


def test_chat_prompts_go_through_the_template(make_trainer, tokenizer):
    chats = Dataset.from_list([{"prompt": [{"role": "user", "content": "the food"}]}] * 4)
    texts = Dataset.from_list([{"prompt": "user the food assistant"}] * 4)
    chat, text = make_trainer(train_dataset=chats), make_trainer(train_dataset=texts)
    chat.train()
    text.train()
    (batch,) = chat._make_micro_batches(list(chats), phase=0)
    assert tokenizer.decode(batch["prompt_ids"][0]) == "user the food assistant"
    assert losses(chat) == losses(text)
    tokenizer.chat_template += "{{ after }}"
    told = make_trainer(train_dataset=chats, chat_template_kwargs='{"after": " was"}')
    (batch,) = told._make_micro_batches(list(chats), phase=0)
    assert tokenizer.decode(batch["prompt_ids"][0]) == "user the food assistant was"


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_paths_are_loaded_and_checkpoints_load_again(make_trainer, saved, lora, tmp_path, adapters):
    trainer = make_trainer(
        model=str(saved["lm"]), reward_funcs=str(saved["reward"]), processing_class=None, save_strategy="steps",
        save_steps=2, peft_config=lora if adapters else None, model_init_kwargs={"attn_implementation": "eager"},
    )  # fmt: skip
    assert trainer.model.config._attn_implementation == "eager"
    trainer.train()
    path = tmp_path / "run" / "checkpoint-2"
    if adapters:
        assert not (path / "model.safetensors").exists()
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved["lm"]), path)
    else:
        again = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, trainer.model.eval()(ids).logits)
        start = AutoModelForCausalLM.from_pretrained(saved["lm"])(ids).logits
    assert (again(ids).logits - start).abs().max() > 1e-3
    assert torch.load(path / "training_args.bin", weights_only=False).budget == trainer.args.budget


def test_evaluation_reports_flow_and_policy_under_the_name_of_the_data(make_trainer, prompts, tokenizer):
    # Three prompts in batches of two: the mean is over prompts and not over batches.
    trainer = make_trainer(eval_dataset=prompts.select(range(3)), per_device_eval_batch_size=2, max_steps=20, learning_rate=3e-3)
    first = trainer.evaluate()
    assert first["eval_kl"] == pytest.approx(0, abs=1e-4)
    assert first["eval_flow/reward_final"] >= first["eval_flow/reward_initial"]
    own = VGFSampler(
        tiny.language_model("llama", len(tokenizer), eos=tokenizer.eos_token_id),
        tiny.counting_reward(tokenizer),
        tokenizer,
    ).sample(prompts["prompt"][:3], 1, TransportBudget(steps=0), 6, seed=trainer._seed(-1))
    assert first["eval_reward"] == pytest.approx(own.rewards.mean().item())
    trainer.train()
    second = trainer.evaluate()
    assert second["eval_flow/reward_final"] == pytest.approx(first["eval_flow/reward_final"])  # the reference stands still
    assert abs(second["eval_kl"]) > 0.01
    assert second["eval_loss"] < first["eval_loss"]
    assert trainer.evaluate()["eval_kl"] == second["eval_kl"]  # nothing is left over from the evaluation before
    named = trainer.evaluate({"dev": prompts.select(range(2))})
    assert "eval_dev_reward" in named and "eval_dev_flow/kl" in named


def test_logs_are_means_over_prompts_of_named_quantities(make_trainer):
    trainer = make_trainer(max_steps=2, logging_steps=2, best_k=2)
    trainer.train()
    entry = trainer.state.log_history[0]
    for name in (
        "reward",
        "reward_std",
        "completions/mean_length",
        "completions/clipped_ratio",
        "step_time",
        "num_tokens",
    ):
        assert math.isfinite(entry[name]), name
    for name in ("reward_grad_norm", "displacement_norm", "token_change_rate", "accept_rate", "generations", "kl"):
        assert entry[f"flow/{name}"] > 0, name
    assert entry["flow/reward_gain"] == pytest.approx(entry["flow/reward_final"] - entry["flow/reward_initial"])
    assert entry["flow/displacement_norm"] <= 5 * 1.0 + 1e-4  # steps * step_size
    assert 1 <= entry["completions/mean_length"] <= 6


def test_completions_are_printed_when_asked_for(make_trainer, capsys):
    def table(trainer):
        trainer.train()
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("│", "┃"))]

    assert not table(make_trainer(max_steps=1))
    trainer = make_trainer(max_steps=1, log_completions=True, num_completions_to_print=2)
    heading, *rows = table(trainer)
    assert heading.split("┃")[1].strip() == "prompt"
    assert len(rows) == 2
    trainer._printed.append(("[/b]", "[unclosed", 0.5))  # must not be read as markup
    trainer.log({})
    assert "[/b]" in capsys.readouterr().out


def test_columns_beside_the_prompt_are_kept_or_removed(make_trainer):
    (rows,) = [next(iter(make_trainer().get_train_dataloader()))]
    assert set(rows[0]) == {"prompt", "index"}
    assert set(next(iter(make_trainer(remove_unused_columns=True).get_train_dataloader()))[0]) == {"prompt"}


def test_several_reward_models_are_an_ensemble(make_trainer, tokenizer):
    members = [tiny.reward_model("llama", len(tokenizer), seed=seed) for seed in (0, 1)]
    trainer = make_trainer(reward_funcs=[members], reward_kappa=2.0)
    (term,) = trainer.rewards.terms
    reward = term.reward
    assert len(reward.members) == 2 and reward.kappa == 2.0
    given = DifferentiableReward(members, tokenizer, kappa=0.1)
    assert make_trainer(reward_funcs=given).rewards.guide(ready=True) is given


# ---- What is refused ------------------------------------------------------------------------------------------------


def test_datasets_that_do_not_fit_are_refused(make_trainer, prompts):
    with pytest.raises(ValueError, match="no column 'prompt'.*'question'"):
        make_trainer(train_dataset=prompts.rename_column("prompt", "question"))
    with pytest.raises(ValueError, match="eval_dataset dev has no column 'prompt'"):
        make_trainer(eval_dataset={"dev": prompts.remove_columns("prompt")})
    with pytest.raises(ValueError, match="train_dataset is required"):
        make_trainer(train_dataset=None)
    with pytest.raises(TypeError, match="eval_dataset must be a datasets.Dataset"):
        make_trainer(eval_dataset=prompts.to_iterable_dataset())
    with pytest.raises(TypeError, match="got list"):
        make_trainer(train_dataset=list(prompts))
    with pytest.raises(ValueError, match="has 8 prompts, but one generation phase takes 12"):
        make_trainer(gradient_accumulation_steps=3)


def test_rewards_that_do_not_fit_are_refused(make_trainer, tokenizer, saved):
    with pytest.raises(ValueError, match="an ensemble needs the vocabulary of the policy"):
        make_trainer(reward_funcs=[[str(saved["reward"])]], reward_processing_classes=tiny.tokenizer(tiny.WORDS[::-1]))
    with pytest.raises(ValueError, match="another vocabulary"):
        make_trainer(reward_funcs=[[str(saved["other_reward"])]], processing_class=tiny.tokenizer())
    with pytest.raises(ValueError, match="reward_weights has 1 entries for 2 reward_funcs"):
        make_trainer(reward_funcs=[tiny.counting_reward(tokenizer)] * 2, reward_weights=[1.0])
    with pytest.raises(TypeError, match="functions stand beside it"):
        make_trainer(reward_funcs=[[tiny.counting_reward(tokenizer), len]])
    with pytest.raises(TypeError, match="reward_funcs holds a int"):
        make_trainer(reward_funcs=3)
    with pytest.raises(ValueError, match="empty list"):
        make_trainer(reward_funcs=[])
    with pytest.raises(ValueError, match="2 reward_processing_classes were given for 1 reward_funcs"):
        make_trainer(reward_processing_classes=[tokenizer, tokenizer])
    with pytest.raises(ValueError, match="reward_model_init_kwargs"):
        make_trainer(reward_model_init_kwargs={"dtype": "float32"})


def test_models_that_do_not_fit_are_refused(make_trainer, tokenizer, lora):
    def model():
        return tiny.language_model("llama", len(tokenizer), eos=tokenizer.eos_token_id)

    with pytest.raises(ValueError, match="PeftModel already"):
        make_trainer(model=get_peft_model(model(), lora), peft_config=lora)
    with pytest.raises(ValueError, match="bias='all'"):
        make_trainer(peft_config=LoraConfig(target_modules="all-linear", bias="all", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="model_init_kwargs"):
        make_trainer(model_init_kwargs={"dtype": "float32"})
    with pytest.raises(ValueError, match="processing_class is required"):
        make_trainer(model=model(), processing_class=None)
    with pytest.raises(ValueError, match="the adapters reach lm_head"):
        make_trainer(peft_config=LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    assert make_trainer(model=get_peft_model(model(), lora)).is_peft


def test_several_gpus_in_one_process_are_refused(make_trainer, monkeypatch):
    from vgf_llm import VGFConfig

    monkeypatch.setattr(VGFConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="2 GPUs.*accelerate launch"):
        make_trainer()


def test_a_quantized_policy_trains_its_adapters(make_trainer, saved, lora):
    """8 bits, which bitsandbytes has for CPUs as well."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantized = {"model": str(saved["lm"]), "quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    trainer = make_trainer(peft_config=lora, **quantized)
    layers = [module for module in trainer.model.modules() if isinstance(module, bitsandbytes.nn.Linear8bitLt)]
    before = [layer.weight.clone() for layer in layers]
    adapters = {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert len(layers) == 14 and adapters
    trainer.train()
    assert all(torch.equal(layer.weight, old) for layer, old in zip(layers, before, strict=True))
    assert any(not torch.equal(value, adapters[name]) for name, value in trainer.model.named_parameters() if name in adapters)
    # Adapters start at the reference; what is left is the rounding of activations, which depends on the batch.
    assert abs(next(entry["fit/log_ratio"] for entry in trainer.state.log_history if "fit/log_ratio" in entry)) < 0.5
    with pytest.raises(ValueError, match="quantized"):
        make_trainer(**quantized)
    with pytest.raises(ValueError, match="for loading a model from a path"):
        make_trainer(quantization_config=BitsAndBytesConfig(load_in_8bit=True))
