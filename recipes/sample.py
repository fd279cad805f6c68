"""What the flow does to the completions of a prompt: every particle before and after, and the two selections.

    python recipes/sample.py my-sft-model my-reward-model --prompt "the food was"
    python recipes/sample.py my-sft-model my-reward-model-0 my-reward-model-1 --prompt "the food was" --rounds 3

For many prompts and JSONL output there is `vgf sample`.
"""

import argparse

from vgf_llm import TransportBudget, VGFSampler


parser = argparse.ArgumentParser(description="Show the particles of one prompt before and after transport.")
parser.add_argument("model", help="causal language model: a path or hub id")
parser.add_argument("reward_model", nargs="+", help="sequence-classification model(s) with the same vocabulary")
parser.add_argument("--prompt", required=True)
parser.add_argument("--num-particles", type=int, default=8)
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--kl-budget", type=float, default=2.0, help="nats that one decode may spend")
parser.add_argument("--rounds", type=int, default=1)
parser.add_argument("--max-completion-length", type=int, default=64)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

sampler = VGFSampler(args.model, args.reward_model)
output = sampler.sample(
    [args.prompt],
    num_particles=args.num_particles,
    budget=TransportBudget(steps=args.steps, kl_budget=args.kl_budget, rounds=args.rounds),
    max_completion_length=args.max_completion_length,
    seed=args.seed,
)

before, after = output.initial, output.transported
for index in range(args.num_particles):
    print(f"{before.rewards[0, index]:8.3f}           {before.completions[0][index]}")
    if after.completion_ids[0][index] != before.completion_ids[0][index]:
        spent = f"{after.kl[0, index]:.2f} nats"
        print(f"{after.rewards[0, index]:8.3f} {spent:>9} {after.completions[0][index]}")

best = int(before.rewards[0].argmax())
print(f"\nbest of {args.num_particles}: {before.rewards[0, best]:.3f}  {before.completions[0][best]}")
print(f"transported: {output.rewards[0]:.3f}  {output.completions[0]}")
print(f"completions decoded: {output.generations[0]:.1f}")
