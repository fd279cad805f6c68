"""Sampler and trainer on tiny models of every family that is promised: what differs between families must not show.

What stands out in each: embedding scale and soft caps (Gemma), windows shorter than the sequence (Mistral, Gemma), projections
between embeddings and layers, and learned positions (OPT), learned positions alone (GPT-2), parallel blocks and partly rotated
heads (GPT-NeoX, Phi), norms on queries and keys (Qwen3).
"""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests import tiny
from vgf_llm import VGFConfig, VGFTrainer
from vgf_llm.flow import TransportBudget
from vgf_llm.text import DifferentiableReward, VGFSampler, decode
from vgf_llm.text.field import SCALES, GradientField, last_layers
from vgf_llm.text.prefix import left_pad, positions
from vgf_llm.text.reward import mix_embeddings
from vgf_llm.text.value import ValueModel


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 48}
GROUPED = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1}
WINDOW = 4  # shorter than every prompt with its completion
GPT2 = {"n_positions": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FULL, SLIDING = "full_attention", "sliding_attention"
GEMMA = {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "layer_types": [SLIDING, FULL]}
OPT = {**SIZES, "ffn_dim": 24, "dropout": 0.0}
CONFIGS = {
    "llama": (LlamaConfig, {**GROUPED, "tie_word_embeddings": False}),
    "llama_tied": (LlamaConfig, {**GROUPED, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {**GROUPED, "tie_word_embeddings": False}),
    "qwen2_tied": (Qwen2Config, {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {**GROUPED, "head_dim": 8, "tie_word_embeddings": False}),
    "mistral": (MistralConfig, {**GROUPED, "sliding_window": WINDOW, "tie_word_embeddings": False}),
    "gemma2": (Gemma2Config, {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": (Gemma3TextConfig, GEMMA),
    "gpt2": (GPT2Config, {**GPT2, "tie_word_embeddings": True}),
    "gpt_neox": (GPTNeoXConfig, {**SIZES, "intermediate_size": 24, "tie_word_embeddings": False}),
    "opt": (OPTConfig, {**OPT, "word_embed_proj_dim": 16, "tie_word_embeddings": True}),
    "opt_projected": (OPTConfig, {**OPT, "word_embed_proj_dim": 8, "tie_word_embeddings": True}),
    "phi": (PhiConfig, {**SIZES, "intermediate_size": 24, "tie_word_embeddings": False}),
}
# Every family is judged by the reward model of another one, and every family is the judge once.
JUDGES = dict(zip(CONFIGS, [*list(CONFIGS)[5:], *list(CONFIGS)[:5]], strict=True))
# How texts begin and end.
ENDS = {"plain": {}, "pad_is_eos": {"pad": "<eos>"}, "bos": {"bos": True}}
PROMPTS = ["the food was", "good", "a bad room and the nice staff were", "but the nice staff"]
LENGTH = 8
ZERO = TransportBudget(steps=0)
BUDGET = TransportBudget(steps=2, step_size=0.5, kl_budget=2.0, rounds=2)


def make_tokenizer(end="plain"):
    options = dict(ENDS[end])
    bos = options.pop("bos", False)
    tokenizer = tiny.tokenizer(**options)
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        start = tokenizer.bos_token_id
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return tokenizer


def make_model(family, tokenizer, auto=AutoModelForCausalLM, seed=0):
    kind, settings = CONFIGS[family]
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(seed)
    config = kind(vocab_size=len(tokenizer) + 3, num_labels=1, **settings, **ids)  # padded, as published vocabularies are
    # Wide enough that tokens differ, not so wide that a norm's rounding shows.
    config.initializer_range = config.init_std = 0.3
    model = auto.from_config(config, attn_implementation="eager").eval()
    assert config.tie_word_embeddings == settings.get("tie_word_embeddings", True)
    return model


def make_sampler(family, tokenizer, **options):
    reward = make_model(JUDGES[family], tokenizer, AutoModelForSequenceClassification, seed=1)
    return VGFSampler(make_model(family, tokenizer), reward, tokenizer, **options)


def one_token_at_a_time(sampler, prompt, key):
    """The particle of one noise key, without cache, padding or batch."""
    ids = list(prompt)
    for position in range(LENGTH):
        logits = sampler.model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
        log_mu = sampler.base.log_probs(logits)
        noise = decode.gumbel(key[None], decode.SAMPLE, torch.tensor([position]), log_mu.shape[-1])
        ids.append(int((log_mu + noise).argmax(-1)))
        if ids[-1] in sampler.eos_ids:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_the_sampler_on_every_family(family, end):
    """Budget zero is best-of-N of the model's own samples; a budget moves them, whatever else is in the call."""
    tokenizer = make_tokenizer(end)
    sampler = make_sampler(family, tokenizer)
    zero = sampler.sample(PROMPTS, 4, ZERO, LENGTH, seed=1)
    for b, prompt in enumerate(sampler.encode(PROMPTS, LENGTH)):
        keys = decode.row_keys(1, [prompt], 4)
        own = [one_token_at_a_time(sampler, prompt, key) for key in keys]
        assert zero.initial.completion_ids[b] == zero.transported.completion_ids[b] == own
        best = int(zero.initial.rewards[b].argmax())
        assert zero.completion_ids[b] == own[best] and zero.rewards[b] == zero.initial.rewards[b, best]
    moved = sampler.sample(PROMPTS, 4, BUDGET, LENGTH, seed=1)
    assert moved.initial.completion_ids == zero.initial.completion_ids
    assert moved.transported.completion_ids != zero.initial.completion_ids
    assert (moved.rewards >= zero.rewards).all() and (moved.transported.rewards > zero.initial.rewards).any()
    for b, prompt in enumerate(PROMPTS):
        alone = sampler.sample([prompt], 4, BUDGET, LENGTH, seed=1)
        assert alone.transported.completion_ids[0] == moved.transported.completion_ids[b]
        torch.testing.assert_close(alone.transported.rewards[0], moved.transported.rewards[b], atol=1e-4, rtol=1e-4)
        # What one decode after the other added up is what a forward over the whole text says.
        for n, completion in enumerate(moved.transported.completion_ids[b]):
            ids = sampler.encode([prompt], LENGTH)[0]
            logits = sampler.model(input_ids=torch.tensor([ids + completion]), use_cache=False).logits[0, len(ids) - 1 : -1]
            said = sampler.base.log_probs(logits).gather(-1, torch.tensor(completion)[:, None]).sum()
            torch.testing.assert_close(moved.transported.logprobs[b, n], said, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_reward_of_every_family_is_one_number_for_ids_and_embeddings(family):
    tokenizer = make_tokenizer("pad_is_eos")
    model = make_model(family, tokenizer, AutoModelForSequenceClassification)
    reward = DifferentiableReward(model, tokenizer)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    completions = [tokenizer(text)["input_ids"] for text in ("nice", "poor food and the room", "was fine but a bad", "good")]
    prompt_ids, prompt_mask = tiny.pad_left(prompts, 0, extra=2)
    ids, mask = tiny.pad_right(completions, 0, extra=1)
    scores = reward.score_ids(prompt_ids, prompt_mask, ids, mask)
    values, gradient = reward.value_and_grad(prompt_ids, prompt_mask, reward.embed(ids), mask)
    torch.testing.assert_close(values, scores, atol=1e-4, rtol=1e-4)
    # One row, no padding: the model's own words.
    own = [model(input_ids=torch.tensor([p + c])).logits[0, 0].item() for p, c in zip(prompts, completions, strict=True)]
    torch.testing.assert_close(scores, torch.tensor(own), atol=1e-4, rtol=1e-4)
    assert gradient[mask].isfinite().all() and gradient[mask].abs().sum() > 0 and (gradient[~mask] == 0).all()
    # The unit of a step: two tokens drawn at random are 1 apart, wherever the family scales its embeddings.
    pairs = torch.cdist(reward.table, reward.table).square()
    torch.testing.assert_close(pairs.mean().sqrt(), torch.tensor(1.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_embeddings_mixed_in_training_lie_between_those_of_tokens(family):
    tokenizer = make_tokenizer()
    model, base = make_model(family, tokenizer, AutoModelForSequenceClassification), make_model(family, tokenizer)
    ids = torch.tensor([tokenizer("the food was nice and the room fine")["input_ids"]])
    plain, table = model.get_input_embeddings()(ids).detach(), model.get_input_embeddings()(torch.arange(len(tokenizer) + 3))
    handle = mix_embeddings(model.train(), base, lambda ids: torch.ones_like(ids, dtype=torch.bool))
    mixed = [model.get_input_embeddings()(ids).detach() for _ in range(20)]
    handle.remove()
    assert any(not torch.equal(plain, one) for one in mixed)
    low, high = table.min(0).values - 1e-5, table.max(0).values + 1e-5
    assert all(((one >= low) & (one <= high)).all() for one in mixed)
    with torch.no_grad():
        mean = base(input_ids=ids).logits[:, :-1].softmax(-1) @ table
    way, gone = mean - plain[:, 1:], mixed[0][:, 1:] - plain[:, 1:]
    share = (way * gone).sum(-1) / way.square().sum(-1)
    torch.testing.assert_close(gone, share[..., None] * way, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_field_on_the_states_of_every_family(family, tmp_path):
    """The last layer alone makes of the states before it what the whole model does, and particles are drawn along it."""
    tokenizer = make_tokenizer()
    sampler = make_sampler(family, tokenizer)
    whole = sampler.model.base_model
    GradientField(last_layers(whole, 1), sampler.reward.width, depth=1).save_pretrained(tmp_path)
    field = GradientField.from_pretrained(tmp_path)
    field.backbone.set_attn_implementation("eager")
    ids, mask = left_pad(sampler.encode(PROMPTS, LENGTH), tokenizer.pad_token_id, sampler.model.device)
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask, ids.shape[1]))[0][:, -1]
        prefix = decode.read_prompts(sampler.model, ids, mask, 1)
    torch.testing.assert_close(field.read(ids, mask, prefix.hidden).logits, expected, atol=1e-5, rtol=1e-5)
    torch.nn.init.normal_(field.slope.weight, generator=torch.Generator().manual_seed(0))
    field.nats.copy_(torch.tensor(SCALES).square())
    along = VGFSampler(sampler.model, sampler.reward, tokenizer, gradient_field=field)
    moved = along.sample(PROMPTS, 4, BUDGET, LENGTH, seed=1).initial
    assert moved.kl.max() > 0 and moved.kl.max() <= BUDGET.kl_budget * (1 + 1e-5)
    for b, prompt in enumerate(PROMPTS):
        alone = along.sample([prompt], 4, BUDGET, LENGTH, seed=1).initial
        assert alone.completion_ids[0] == moved.completion_ids[b]
        torch.testing.assert_close(alone.kl[0], moved.kl[b], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_value_model_learns_on_every_family(family):
    tokenizer = make_tokenizer()
    value = ValueModel(make_model(family, tokenizer), tokenizer, learning_rate=3e-3, batch_size=16)
    prompts = [tokenizer("the food was")["input_ids"]] * 32
    texts = [f"{a} and {b}" for a in ("good", "bad", "fine", "poor") for b in tiny.WORDS[:8]]
    completions = [tokenizer(text)["input_ids"] for text in texts]
    value.add(prompts, completions, [float(text.count("good")) for text in texts])
    first = value.fit(1)
    value.fit(25)
    assert value.fit(1) < 0.8 * first
    prompt_ids, prompt_mask = tiny.pad_left(prompts, 0)
    ids, mask = tiny.pad_right(completions, 0)
    _, gradient = value.value_and_grad(prompt_ids, prompt_mask, value.embed(ids), mask)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", CONFIGS)
def test_one_step_of_the_trainer_on_every_family(family, lora, tmp_path):
    """At the first step the policy is the reference: what the sampler added up by tokens is what the forward of the fit says."""
    tokenizer = make_tokenizer(list(ENDS)[list(CONFIGS).index(family) % len(ENDS)])
    model = make_model(family, tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reward = make_model(JUDGES[family], tokenizer, AutoModelForSequenceClassification, seed=1)
    args = VGFConfig(
        str(tmp_path), num_generations=4, max_completion_length=LENGTH, flow_step_size=0.5, target="weighted", best_k=2,
        learning_rate=1e-2, logging_steps=1, save_strategy="no", disable_tqdm=True, report_to="none", use_cpu=True,
        activation_checkpointing=False, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1,
        dataloader_pin_memory=False, max_grad_norm=1e6, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = VGFTrainer(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )
    trainer.train()
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert abs(log["fit/log_ratio"]) < 1e-3
    assert log["loss"] > 0 and 0 < log["grad_norm"] < 1e5
    trained = trainer.model.get_base_model() if lora else trainer.model
    reference = trainer._samplers["reference"].model
    changed = [name for name, value in trained.state_dict().items() if name in before and not torch.equal(value, before[name])]
    assert (changed == []) if lora else changed
    if not lora:
        assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    else:
        moved = [p for name, p in trainer.model.named_parameters() if "lora_B" in name and p.abs().sum() > 0]
        assert moved
    assert trained.config.tie_word_embeddings == (trained.get_output_embeddings().weight is trained.get_input_embeddings().weight)
