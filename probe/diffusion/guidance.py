"""Guidance: how the predictions of the branches become the one that the scheduler takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def guide(
    uncond: torch.Tensor, cond: torch.Tensor, guidance_scale: float, guidance_rescale: float = 0.0
) -> torch.Tensor:
    """Return uncond + guidance_scale * (cond - uncond), rescaled: classifier-free guidance.

    Ho & Salimans 2022 (w = guidance_scale - 1); the rescale is that of Lin et al. 2023, section
    3.4. The order of operations is diffusers', so that bits agree. *Shape:* all (image, channel,
    y, x).
    """
    guided = uncond + guidance_scale * (cond - uncond)
    if guidance_rescale > 0.0:
        dims = list(range(1, cond.ndim))
        rescaled = guided * (cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
        guided = guidance_rescale * rescaled + (1 - guidance_rescale) * guided
    return guided


def guided(
    branches: Mapping[str, torch.Tensor], guidance_scale: float, guidance_rescale: float = 0.0
) -> torch.Tensor:
    """Return what the scheduler takes: `guide` of both branches, or the conditional one alone."""
    if "uncond" not in branches:
        return branches["cond"]
    return guide(branches["uncond"], branches["cond"], guidance_scale, guidance_rescale)


def rule_of(guidance_scale: float) -> str:
    """Return the rule's name, one of `probe.format.dimensions.GUIDANCE_RULES`."""
    return "classifier_free" if guidance_scale > 1 else "none"
