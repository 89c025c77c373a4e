"""Four spaces for one picture of 64 x 64 pixels: the pixels, and latents of f = 2, 4 and 8.

One UNet is made for all of them: the same blocks, the same attention levels, the same text. Only
the channels that go in and out differ, and the grid that it works on. The noise schedule is shifted
with the grid: a finer grid needs more noise before its picture is gone (Hoogeboom et al. 2023,
simple diffusion, equation 5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

SIDE = 64  # pixels along one side
TEXT_WIDTH = 128  # of emojiworld's text encoder, which all four share
LATENT_CHANNELS = 4
UNSHIFTED = 16  # the grid on which the cosine schedule stands as it is: that of f = 4
LOG_SNR = 9.2  # of the schedule's two ends; sigma goes from 0.01 to 100
TIMESTEPS = 1000


@dataclass(frozen=True)
class Space:
    """Where a denoiser works. `steps` are the training steps at which it is scored."""

    f: int
    steps: tuple[int, ...]

    @property
    def side(self) -> int:
        """The places along one side of the grid."""
        return SIDE // self.f

    @property
    def channels(self) -> int:
        return 3 if self.f == 1 else LATENT_CHANNELS

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, self.side, self.side)

    @property
    def attention_grids(self) -> list[int]:
        """The side of the grids on which the UNet attends."""
        return [self.side // 4]


# A step on pixels takes about as long as 3, 9 and 15 steps on these latents, on one CPU thread.
SPACES = {
    space.f: space
    for space in (
        Space(1, (125, 250, 500, 1000, 2000, 4000)),
        Space(2, (125, 250, 500, 1000, 2000, 4000)),
        Space(4, (125, 250, 500, 1000, 2000, 4000, 8000, 16000)),
        Space(8, (125, 250, 500, 1000, 2000, 4000, 8000)),
    )
}


def build_unet(space: Space) -> UNet2DConditionModel:
    """Return the denoiser: 3.9 million parameters, the same blocks in every space."""
    return UNet2DConditionModel(
        sample_size=space.side,
        in_channels=space.channels,
        out_channels=space.channels,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads, as it does for SD 1.x
        norm_num_groups=8,
    )


def build_autoencoder(space: Space) -> AutoencoderKL:
    """Return the autoencoder that halves a picture's sides log2(f) times."""
    halvings = int(math.log2(space.f))
    widths = (32, 64, 96, 96)[: halvings + 1]
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )


def signal_levels(side: int) -> torch.Tensor:
    """Return alpha_bar of every timestep for a grid of `side` places. *Shape:* (timestep,).

    It is the cosine schedule, its log SNR shifted by 2 log(16 / side). All schedules have the same
    two ends, so that none stops before the picture is gone, or begins where it is half gone.
    """
    shift = 2 * math.log(UNSHIFTED / side)
    first, last = (math.atan(math.exp((shift - end) / 2)) for end in (LOG_SNR, -LOG_SNR))
    angle = torch.linspace(first, last, TIMESTEPS, dtype=torch.float64)
    return torch.sigmoid(shift - 2 * angle.tan().log())


def build_scheduler(side: int) -> DDIMScheduler:
    """Return the scheduler of a grid: it predicts v (Salimans & Ho 2022)."""
    levels = signal_levels(side)
    before = torch.cat([torch.ones(1, dtype=levels.dtype), levels[:-1]])
    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        trained_betas=(1 - levels / before).tolist(),
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
