"""Training of the models that something is measured on: language models from scratch, reward models on pairs, fields.

Every artefact is a directory in the format of `save_pretrained`, made once per setting and found again by a hash of it, and it
appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from vgf_llm.text import DifferentiableReward, VGFSampler
from vgf_llm.text.field import FEWEST_COMPARISONS, Comparison, fit_field
from vgf_llm.text.reward import mix_embeddings


Texts = TypeVar("Texts", bound=tuple[str, ...])

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
RECIPES = ("training.py", "preferences.py", "labels.py", "world.py")
HELD_OUT = 200  # comparisons of each reward model
COMPARISONS = "comparisons.json"  # beside a reward model: of those held out, the ones for `likelihood_worth`


def artefact(
    directory: Path,
    name: str,
    recipe: Any,
    make: Callable[[Path, Any], None],
    log: Callable[[str], None],
    rooms: Sequence[str] = ("data", "text"),
) -> Path:
    """`directory/name-hash`, made by `make(path, recipe)` if it is not there.

    The hash covers the recipe and the code that shapes the artefact: this file, its neighbours `RECIPES` and the `rooms` of the
    package. A change of either makes a new artefact.
    """
    package = Path(__file__).parents[1]
    files = [Path(__file__).with_name(name) for name in RECIPES]
    files += [file for room in rooms for file in sorted((package / room).glob("*.py"))]
    sources = b"".join(f.read_bytes() for f in files)
    digest = hashlib.sha256(repr(recipe).encode() + sources).hexdigest()[:12]
    path = directory / f"{name}-{digest}"
    if path.is_dir():
        return path
    log(f"training {name}")
    directory.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=directory))
    try:
        make(temporary, recipe)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word. Padding, BOS, EOS and unknown are tokens of their own."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *words])}, unk_token=SPECIAL[3]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        unk_token=SPECIAL[3],
        padding_side="left",
    )


def train_language_model(
    out: Path,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[tuple[str, str]],
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    context: int,
    steps: int,
    learning_rate: float,
    matrix_learning_rate: float,
    seed: int,
    name: str,
    batch_size: int = 16,
) -> None:
    """A GPT-NeoX model from scratch on (prompt, completion) pairs with TRL's SFTTrainer, saved to `out` with its tokenizer.

    Weight matrices are trained by Muon at `matrix_learning_rate`, everything else by AdamW at `learning_rate`: measured on the
    embedded data, the gold reward of samples is 0.42 after 2,000 steps, where AdamW alone stands at 0.33.
    """
    torch.manual_seed(seed)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=context,
            # Measured on this data: tied embeddings, a wide initialisation and rotary positions on half of each head leave
            # the plateau on which the prompt is ignored in a fraction of the steps.
            initializer_range=0.08,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(out),
            max_steps=steps,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            max_length=context,
            seed=seed,
            run_name=name,
            **_training(0.02),
        ),
        train_dataset=Dataset.from_list([{"prompt": p, "completion": " " + c} for p, c in _by_length(pairs, batch_size, seed)]),
        processing_class=tokenizer,
        optimizers=(_MuonAndAdamW(model, matrix_learning_rate, learning_rate), None),
    )
    trainer.train()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


class _MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the weight matrices and AdamW for embeddings, biases and norms, as one optimizer for a Trainer.

    Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon): Nesterov momentum 0.95, then the nearest orthogonal matrix. Not
    `torch.optim.Muon`, which computes in bfloat16: a CPU without instructions for it takes thirty times as long.
    """

    def __init__(self, model: PreTrainedModel, matrix_learning_rate: float, learning_rate: float) -> None:
        # A head with one output is a vector: there is no direction in it to make orthogonal.
        named = list(model.named_parameters())
        matrices = [p for n, p in named if p.ndim == 2 and min(p.shape) > 1 and "embed" not in n]
        others = [p for n, p in named if p.ndim != 2 or min(p.shape) == 1 or "embed" in n]
        super().__init__([{"params": matrices, "lr": matrix_learning_rate}], {"weight_decay": 0.01, "momentum": 0.95})
        self.adamw = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        # The scheduler sets learning rates here; the group is that of AdamW, not a copy.
        self.param_groups += self.adamw.param_groups

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        for matrix in group["params"]:
            state = self.state[matrix]
            velocity = state.setdefault("velocity", torch.zeros_like(matrix)).lerp_(matrix.grad, 1 - group["momentum"])
            direction = _orthogonal(matrix.grad.lerp(velocity, group["momentum"]))
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(direction, alpha=-group["lr"] * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5)
        self.adamw.step()


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T of the singular value decomposition U S V^T: five quintic Newton-Schulz iterations, Jordan's coefficients."""
    if matrix.shape[0] > matrix.shape[1]:
        return _orthogonal(matrix.T).T
    x = matrix / matrix.norm().clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def train_reward_model(
    out: Path,
    start: Path,
    pairs: Sequence[tuple[str, str, str]],
    *,
    learning_rate: float,
    seed: int,
    name: str,
    max_length: int,
    matrix_learning_rate: float | None = None,
    mixtures: tuple[Path, str] | None = None,
    held_out: int = HELD_OUT,
    batch_size: int = 16,
) -> None:
    """A Bradley-Terry reward model on (prompt, chosen, rejected) with TRL's RewardTrainer, one pass, starting from `start`, a
    language or a reward model. AdamW trains everything, or with `matrix_learning_rate` Muon the weight matrices.

    Beside it `calibration.json` holds mean and standard deviation of its score over held-out completions. With `mixtures`, a
    language model and the text every prompt ends with, training is flow-aware (`mix_embeddings`) on what follows that text.
    """
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1)
    # The score is read at the end-of-sequence token, which RewardTrainer appends.
    pairs = [*pairs[:held_out], *_by_length(pairs[held_out:], batch_size, seed)]
    rows = [{"chosen": f"{p} {c}", "rejected": f"{p} {r}"} for p, c, r in pairs]
    optimizer = None if matrix_learning_rate is None else _MuonAndAdamW(model, matrix_learning_rate, learning_rate)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=str(out),
            num_train_epochs=1,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            max_length=max_length,
            # Keeps scores around zero for every prompt: members can then be compared without an offset per prompt.
            center_rewards_coefficient=0.01,
            seed=seed,
            run_name=name,
            **_training(0.05),
        ),
        train_dataset=Dataset.from_list(rows[held_out:]),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
    if mixtures is not None:
        language_model, separator = mixtures
        ends = tokenizer(separator)["input_ids"][-1]
        special = torch.tensor(tokenizer.all_special_ids)

        def completions(ids: torch.Tensor) -> torch.Tensor:
            # Behind the first separator; the separator itself is not.
            behind = (ids == ends).cumsum(1).cumsum(1) > 1
            return behind & ~torch.isin(ids, special.to(ids.device))

        writer: PreTrainedModel = AutoModelForCausalLM.from_pretrained(language_model)
        writer.to(trainer.args.device)  # type: ignore[arg-type]
        mix_embeddings(model, writer, completions)
    trainer.train()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    texts = [row[side] for row in rows[:held_out] for side in ("chosen", "rejected")]
    scores = _scores(model.eval(), tokenizer, texts)
    (out / "calibration.json").write_text(json.dumps([float(scores.mean()), float(scores.std())]))


def ensemble(members: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> DifferentiableReward:
    """Reward models that `train_reward_model` has made as one reward, each with the calibration beside it."""
    calibration = [tuple(json.loads((member / "calibration.json").read_text())) for member in members]
    return DifferentiableReward(list(members), tokenizer, calibration=calibration)


def comparisons(members: Sequence[Path]) -> list[Comparison] | None:
    """What was kept of reward models that `labels.train_members` has made; None where it is too little to say anything."""
    kept = [cast(Comparison, tuple(pair)) for member in members for pair in json.loads((member / COMPARISONS).read_text())]
    return kept if len(kept) >= FEWEST_COMPARISONS else None


def trained_field(
    directory: Path,
    name: str,
    sampler: VGFSampler,
    members: Sequence[Path],
    prompts: Sequence[str],
    *,
    max_completion_length: int,
    num_samples: int = 8,
    seed: int = 0,
    log: Callable[[str], None],
) -> Path:
    """A gradient field of the sampler's reward, which is of these members; the seconds it took beside it."""

    def make(out: Path, recipe: object) -> None:
        started = time.perf_counter()
        field = fit_field(
            sampler, prompts, num_samples=num_samples, max_completion_length=max_completion_length, seed=seed, progress=True,
            comparisons=comparisons(members),
        )  # fmt: skip
        field.save_pretrained(out)
        (out / "seconds.json").write_text(json.dumps(time.perf_counter() - started))

    recipe = (tuple(prompts), num_samples, max_completion_length, seed, [member.name for member in members])
    return artefact(directory, f"field-{name}", recipe, make, log, ("data", "flow", "text"))


@torch.no_grad()
def _scores(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> torch.Tensor:
    encoded = tokenizer([t + " " + tokenizer.eos_token for t in texts], padding=True, return_tensors="pt")
    return model(**{k: encoded[k] for k in ("input_ids", "attention_mask")}).logits[:, 0].float()


def _by_length(rows: Sequence[Texts], batch_size: int, seed: int) -> list[Texts]:
    """The rows in batches of like length, the batches in random order.

    Trainer's own `group_by_length` goes from long to short again and again; at these learning rates a model follows that and
    ends with a taste for short texts.
    """
    rng = random.Random(seed)
    batches = []
    for start in range(0, len(rows), 50 * batch_size):
        window = sorted(rows[start : start + 50 * batch_size], key=lambda row: sum(len(text.split()) for text in row))
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    rng.shuffle(batches)
    return [row for batch in batches for row in batch]


def _training(warmup: float) -> dict:
    """What all trainers here share."""
    return {
        "lr_scheduler_type": "linear",
        "warmup_steps": warmup,
        # As `_by_length` has arranged them.
        "train_sampling_strategy": "sequential",
        "weight_decay": 0.01,
        "adam_beta2": 0.98,
        "optim": "adamw_torch_fused",
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "disable_tqdm": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
    }
