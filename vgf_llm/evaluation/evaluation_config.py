"""`EvaluationConfig`: every option of `vgf evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vgf_llm.flow import TransportBudget


@dataclass
class EvaluationConfig:
    """What is evaluated, on what, and how it is judged. Every field is an option and a YAML key of `vgf evaluate`."""

    model_name_or_path: str = field(default="", metadata={"help": "Base language model: a directory or a hub id."})
    reward_model_name_or_path: list[str] = field(
        default_factory=list,
        metadata={"help": "Reward model(s) that are followed and selected by (the proxy). Several are an ensemble."},
    )
    gold_reward_model_name_or_path: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Held-out reward model(s) that judge; may have another vocabulary. None of the proxy's may be among them."
        },
    )
    student_name_or_path: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Trained policies to measure beside the sampler, as DIR or NAME=DIR, with the base model's vocabulary."
        },
    )
    judge_lm_name_or_path: str | None = field(
        default=None, metadata={"help": "Language model that wrote none of the answers, for likelihood. Default: none."}
    )
    dataset_name: str = field(default="", metadata={"help": "JSONL file, directory or hub id with a column prompt."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_split: str = field(default="test", metadata={"help": "Split of a directory or hub id."})
    hh_transcripts: bool = field(default=False, metadata={"help": "The data set holds raw transcripts of Anthropic's HH-RLHF."})
    against: list[str] = field(
        default_factory=list,
        metadata={"help": "Columns of answers to compare with. Default: those of reference and chosen that the data has."},
    )
    max_prompts: int = field(default=128, metadata={"help": "The first so many prompts that fit; 0 takes all."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longer prompts, in tokens, are left out and counted. Default: what fits the context."}
    )
    output_dir: str = field(
        default="outputs/evaluation", metadata={"help": "Report, page, figures, judge's log, finished stages."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Seeds of the noise; every prompt is sampled with each. Three or more for figures to be reported."},
    )
    pool_size: int = field(
        default=32, metadata={"help": "Samples of the base model per prompt and seed, for best-of-n up to it."}
    )
    num_particles: int = field(default=8, metadata={"help": "N of VGF: the first N samples of the pool."})
    max_completion_length: int = field(default=64, metadata={"help": "T, in tokens."})
    flow_steps: int = field(default=5, metadata={"help": "Flow steps L of every budget but 0, which is always measured."})
    flow_step_size: float = field(default=0.1, metadata={"help": "Length of a step, in distances between two token embeddings."})
    flow_kl_budgets: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 4.0], metadata={"help": "Budgets to measure: nats that one decode may spend."}
    )
    flow_rounds: int = field(default=1, metadata={"help": "How often flow and decode alternate."})
    flow_horizon: int = field(default=0, metadata={"help": "Tokens a tilt outlives the first change; -1: to the end."})
    flow_movers: int | None = field(default=None, metadata={"help": "Best particles a round moves. Default: all."})
    flow_field: str | None = field(
        default=None, metadata={"help": "Folder of a learned gradient (vgf field), along which particles are drawn."}
    )
    flow_batch_size: int = field(default=32, metadata={"help": "Completions in memory at once; changes no result."})
    random_control: bool = field(
        default=True,
        metadata={"help": "Also move particles in random directions: what decoding again and verifying is worth alone."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Of the base model."})
    top_k: int = field(default=0, metadata={"help": "Of the base model; 0 keeps all tokens."})
    top_p: float = field(default=1.0, metadata={"help": "Of the base model; 1.0 keeps all tokens."})
    tie_margin: float = field(default=0.0, metadata={"help": "Gold rewards that differ by at most this are a tie."})
    judge_command: str | None = field(
        default=None,
        metadata={
            "help": "Judge that is a program and its words: reads {prompt, a, b} as JSON, prints A, B or tie. No shell runs it."
        },
    )
    judge_base_url: str | None = field(
        default=None, metadata={"help": "Judge behind an OpenAI-compatible endpoint; key in OPENAI_API_KEY."}
    )
    judge_model: str | None = field(default=None, metadata={"help": "The judge's model name at the endpoint."})
    judge_retries: int = field(
        default=2, metadata={"help": "Times a question is asked again after nonsense; then it is counted."}
    )
    judge_workers: int = field(default=4, metadata={"help": "Questions to the judge at once."})
    examples: int = field(default=12, metadata={"help": "Prompts shown side by side on the page."})
    title: str = field(default="Evaluation", metadata={"help": "Heading of the page, name of the task in tables."})

    def __post_init__(self) -> None:
        if shared := set(self.reward_model_name_or_path) & set(self.gold_reward_model_name_or_path):
            raise ValueError(f"{', '.join(sorted(shared))} is proxy and gold: what is optimised cannot judge itself")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds must be different numbers, at least one")
        lowest = {
            "num_particles": 1, "pool_size": self.num_particles, "max_prompts": 0, "flow_steps": 1, "flow_horizon": -1,
            "judge_retries": 0, "judge_workers": 1, "examples": 0, "tie_margin": 0.0,
        }  # fmt: skip
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if any(budget <= 0 for budget in self.flow_kl_budgets) or len(set(self.flow_kl_budgets)) != len(self.flow_kl_budgets):
            raise ValueError("flow_kl_budgets must be positive and different: budget 0 is always measured")
        if self.judge_command and self.judge_base_url:
            raise ValueError("give judge_command or judge_base_url, not both")
        if bool(self.judge_base_url) != bool(self.judge_model):
            raise ValueError("a judge behind an endpoint needs judge_base_url and judge_model")
        if len(set(self.students)) != len(self.student_name_or_path):
            raise ValueError("two students have the same name: give NAME=DIR")
        _ = [self.budget(kl) for kl in self.flow_kl_budgets]

    def check_complete(self, gold_is_known: bool = False) -> None:
        """Raises ValueError where something is missing. Not in `__post_init__`: an unknown key in a file is to be named first."""
        for name in ("model_name_or_path", "reward_model_name_or_path", "dataset_name"):
            if not getattr(self, name):
                raise ValueError(f"give --{name}")
        if not gold_is_known and not self.gold_reward_model_name_or_path:
            raise ValueError("give --gold_reward_model_name_or_path: a reward model that was not optimised has to judge")

    @property
    def students(self) -> dict[str, str]:
        """Path of every student by its name."""
        pairs = [entry.partition("=") if "=" in entry else (Path(entry).name, "", entry) for entry in self.student_name_or_path]
        return {name: path for name, _, path in pairs}

    def budget(self, kl_budget: float) -> TransportBudget:
        return TransportBudget(
            steps=self.flow_steps, step_size=self.flow_step_size, kl_budget=kl_budget, rounds=self.flow_rounds
        )  # fmt: skip
