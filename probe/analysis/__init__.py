"""Attention maps, guidance and paths of latents as numbers. xarray in and out, never torch.

maps         maps on one grid, tokens merged to words and phrases, normalisations
averages     many steps, layers, heads and grids as few: the global map, maps by noise level
heads        what single heads do: shape, mass, overlap, ranking, contribution
masks        masks from maps, and how well they agree with the truth
pictures     how much two pictures are alike: PSNR and SSIM
guidance     the prediction at any guidance scale, and what the prompt changes in it
recomputed   maps computed from queries and keys when they are read
trajectories paths of latents over the steps: PCA beside random walks, UMAP, neighbours kept
"""

from __future__ import annotations

from probe.analysis.averages import by_sigma, combined
from probe.analysis.guidance import guidance_curves, guided
from probe.analysis.heads import (
    by_kind,
    contribution,
    head_statistics,
    overlap,
    ranked_heads,
    token_kinds,
)
from probe.analysis.maps import (
    against_others,
    content_words,
    normalised,
    occurring_in,
    on_grid,
    phrase,
    probabilities,
    word_maps,
)
from probe.analysis.masks import (
    area_threshold,
    argmax_masks,
    average_precision,
    interval,
    iou,
    mean_iou,
    pixel_accuracy,
    threshold,
)
from probe.analysis.pictures import psnr, ssim
from probe.analysis.trajectories import (
    aligned_map,
    pca,
    preservation,
    random_walks,
    umap_map,
)

__all__ = [
    "against_others",
    "aligned_map",
    "area_threshold",
    "argmax_masks",
    "average_precision",
    "by_kind",
    "by_sigma",
    "combined",
    "content_words",
    "contribution",
    "guidance_curves",
    "guided",
    "head_statistics",
    "interval",
    "iou",
    "mean_iou",
    "normalised",
    "occurring_in",
    "on_grid",
    "overlap",
    "pca",
    "phrase",
    "pixel_accuracy",
    "preservation",
    "probabilities",
    "psnr",
    "random_walks",
    "ranked_heads",
    "ssim",
    "threshold",
    "token_kinds",
    "umap_map",
    "word_maps",
]
