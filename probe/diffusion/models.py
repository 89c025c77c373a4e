"""Old names of `probe.diffusion.sd`, until every caller imports from there."""

from probe.diffusion.family import Conditioning
from probe.diffusion.parts import count_not_finite, to_uint8
from probe.diffusion.sd import StableDiffusion

__all__ = ["Conditioning", "StableDiffusion", "count_not_finite", "to_uint8"]
