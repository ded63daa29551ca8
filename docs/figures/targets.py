"""Draws docs/figures/targets.png: what the target of every token looks like, lambda-return against Monte-Carlo.

The values are those of a critic half-way through training on two made-up solutions of 60 tokens that share a prompt
and a stretch of tool output (masked): it has noticed, at token 42, where the second one goes wrong. The targets
are computed by the operators themselves.

    python docs/figures/targets.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from lambda_return_ext import compute_lambda_return

T, PROMPT, TOOL, END, MISTAKE = 72, 8, range(26, 33), 68, 42
BLUE, ORANGE, GREY = "#2a6fbb", "#d9730d", "#8a8f98"


def main() -> None:
    """Compute both targets of both solutions and save the figure beside this file."""
    position = torch.arange(T, dtype=torch.float32)
    wiggle = 0.03 * torch.sin(position * 0.9) + 0.02 * torch.sin(position * 2.3)
    right = 0.5 + 0.25 * torch.sigmoid((position - 44) / 6) + wiggle
    wrong = 0.5 + 0.04 * torch.sigmoid((position - 20) / 4) - 0.36 * torch.sigmoid((position - MISTAKE) / 1.2) + wiggle
    values, rewards = torch.stack([right, wrong]), torch.tensor([1.0, 0.0])
    mask = torch.zeros(2, T, dtype=torch.bool)
    mask[:, PROMPT:END] = True
    mask[:, TOOL.start : TOOL.stop] = False
    targets = compute_lambda_return(values, rewards, mask, gamma=1.0, lam=0.95)
    monte_carlo = compute_lambda_return(values, rewards, mask, gamma=1.0, lam=1.0)

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
    titles = ("a right solution, R = 1", "a wrong solution, R = 0: the mistake is at token 42")
    for row, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        nan = torch.full((T,), float("nan"))
        for x, style in (
            (values[row], {"color": GREY, "lw": 1.4, "label": "the critic's value V"}),
            (monte_carlo[row], {"color": ORANGE, "lw": 2, "ls": "--", "label": "Monte-Carlo target"}),
            (targets[row], {"color": BLUE, "lw": 2.4, "label": "$\\lambda$-return target, $\\lambda$ = 0.95"}),
        ):
            axis.plot(position, torch.where(mask[row], x, nan), **style)
        for start, stop, name in ((0, PROMPT, "prompt"), (TOOL.start, TOOL.stop, "tool\noutput"), (END, T, "pad")):
            axis.axvspan(start - 0.5, stop - 0.5, color=GREY, alpha=0.18, lw=0)
            axis.text((start + stop - 1) / 2, 0.5, name, ha="center", va="center", fontsize=8, rotation=90)
        if row:
            axis.axvline(MISTAKE, color="#b3261e", lw=1, ls=":")
        axis.set(title=title, xlabel="token", xlim=(-0.5, T - 0.5), ylim=(-0.06, 1.06))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("value")
    axes[0].legend(loc="lower right", bbox_to_anchor=(0.94, 0.02), frameon=False, fontsize=9)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
