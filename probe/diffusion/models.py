"""Old names of `probe.diffusion.sd`, until every caller imports from there."""

from probe.diffusion.sd import Conditioning, StableDiffusion, count_not_finite, to_uint8

__all__ = ["Conditioning", "StableDiffusion", "count_not_finite", "to_uint8"]
