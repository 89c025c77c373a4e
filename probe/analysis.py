"""What can be computed from maps once they are recorded: pure functions of arrays, without torch and without files.

Inside: `probabilities` (stored maps to numbers), `resize` (maps to another grid), `word_maps` (tokens merged to words).
"""

from __future__ import annotations

import numpy as np
import xarray as xr


def probabilities(stored: np.ndarray) -> np.ndarray:
    """Stored maps as float32 probabilities: floats as they are, uint8 as `sqrt_u8` codes, p = (code / 255)^2."""
    if stored.dtype == np.uint8:
        return np.square(stored.astype(np.float32) / 255)
    return stored.astype(np.float32)


def maps_of(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The maps that a layer's two sides make: softmax over tokens of key . query, in float32.

    *Shape:* query (branch, image, layer, head, key_feature, y, x), key (branch, token, layer, head, key_feature) ->
    (token, branch, image, layer, head, y, x).
    """
    rows = np.ascontiguousarray(key.transpose(0, 2, 3, 1, 4), dtype=np.float32)[:, None]  # (branch, 1, layer, head, token, feature)
    logits = rows @ query.astype(np.float32).reshape(*query.shape[:5], -1)
    logits -= logits.max(axis=-2, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=-2, keepdims=True)
    return np.moveaxis(logits.reshape(*logits.shape[:-1], *query.shape[-2:]), 4, 0)


def resize(maps: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Bilinear interpolation of the last two axes to `grid`, pixel centres aligned (torch's align_corners=False).

    Weights sum to one, so that maps that sum to one over tokens still do.
    """
    rows, columns = _weights(maps.shape[-2], grid[0]), _weights(maps.shape[-1], grid[1])
    return np.asarray(rows @ maps @ columns.T, dtype=np.float32)


def _weights(source: int, target: int) -> np.ndarray:
    """The (target, source) matrix of one axis."""
    at = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, source - 1)
    matrix = np.zeros((target, source), np.float32)
    np.add.at(matrix, (np.arange(target), low), 1 - (at - low))
    np.add.at(matrix, (np.arange(target), high), at - low)
    return matrix


def word_maps(maps: xr.DataArray, words: np.ndarray, numbers: np.ndarray) -> xr.DataArray:
    """Token maps merged to words, each word the sum of its tokens. Repeated words stay apart.

    *Shape:* (token, ...) -> (word, ...). `words` and `numbers` tell of each token which word it belongs to, by text
    and by place in the prompt; tokens without a word (BOS, EOS, punctuation, `rest`: number -1) are left out.
    """
    present = sorted({int(number) for number in numbers if number >= 0})
    plain = maps.reset_coords(drop=True)
    axis = plain.get_axis_num("token")
    merged = [plain.values.take(np.flatnonzero(numbers == number), axis=axis).sum(axis=axis, keepdims=True) for number in present]
    names = [str(words[np.flatnonzero(numbers == number)[0]]) for number in present]
    values = np.concatenate(merged, axis=axis) if merged else plain.values.take([], axis=axis)
    coords = {name: value for name, value in plain.coords.items() if "token" not in value.dims}
    return xr.DataArray(values, dims=["word" if d == "token" else str(d) for d in plain.dims], coords=coords, name=maps.name).assign_coords(
        word=names
    )
