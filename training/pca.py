"""The latent space of the embedded model: a principal component analysis of patches of 16x16 pixels x 4 frames.

Latents need no trained encoder this way: encoding is one matrix product, and decoders are trained to invert it. The
strides are those of Wan 2.2's autoencoder, and so is the first latent frame: it holds the first video frame alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

Array = np.ndarray
SPATIAL_STRIDE, TEMPORAL_STRIDE = 16, 4


def group_frames(frames: Array) -> Array:
    """[T, ...] with T = 4k + 1 -> [k + 1, 4, ...]; the first group is the first frame four times.

    Raises:
        ValueError: T is not one more than a multiple of the temporal stride.
    """
    if len(frames) % TEMPORAL_STRIDE != 1:
        raise ValueError(f"a clip needs 4k + 1 frames, not {len(frames)}")
    padded = np.concatenate([np.repeat(frames[:1], TEMPORAL_STRIDE - 1, axis=0), frames])
    return padded.reshape(-1, TEMPORAL_STRIDE, *frames.shape[1:])


def to_patches(frames: Array) -> Array:
    """uint8 or 0..1 float frames [T, H, W, 3] -> patches [F, H/16 * W/16, P] in -1..1, in the order time, y, x, rgb."""
    values = frames.astype(np.float32) / (127.5 if frames.dtype == np.uint8 else 0.5) - 1.0
    groups = group_frames(values)
    count, _, height, width, _ = groups.shape
    s = SPATIAL_STRIDE
    cut = groups.reshape(count, TEMPORAL_STRIDE, height // s, s, width // s, s, 3)
    return cut.transpose(0, 2, 4, 1, 3, 5, 6).reshape(count, (height // s) * (width // s), -1)


def from_patches(patches: Array, height: int, width: int) -> Array:
    """Inverse of `to_patches`: float frames [T, H, W, 3], about 0..1, not clipped."""
    s, count = SPATIAL_STRIDE, len(patches)
    cut = patches.reshape(count, height // s, width // s, TEMPORAL_STRIDE, s, s, 3).transpose(0, 3, 1, 4, 2, 5, 6)
    return cut.reshape(count * TEMPORAL_STRIDE, height, width, 3)[TEMPORAL_STRIDE - 1 :] * 0.5 + 0.5


def mask_patches(mask: Array) -> Array:
    """Subject mask [T, H, W] in 0..1 -> its mean over each latent patch, [F, H/16, W/16]."""
    count, height, width = mask.shape
    s = SPATIAL_STRIDE
    cells = mask.reshape(count, height // s, s, width // s, s).mean(axis=(2, 4))
    return group_frames(cells).mean(axis=1)


@dataclass(frozen=True)
class PatchPCA:
    """Linear encoder and decoder between frames and latents.

    Attributes:
        mean: [P], the mean patch.
        components: [C, P], orthonormal rows.
        scale: [C], factor of each latent channel.
    """

    mean: Array
    components: Array
    scale: Array

    @property
    def channels(self) -> int:
        return len(self.components)

    @classmethod
    def fit(cls, patches: Array, weights: Array, channels: int) -> PatchPCA:
        """Fit to patches [N, P], each counted with its weight [N].

        Latents are whitened and then multiplied by the root of their standard deviation: strong components, which hold
        the layout, carry more of a training loss than weak ones, which hold texture. Their mean variance is one.
        """
        mean = patches.mean(axis=0, dtype=np.float64).astype(np.float32)
        centred = patches - mean
        covariance = (centred * weights[:, None]).T @ centred / weights.sum()
        values, vectors = np.linalg.eigh(covariance.astype(np.float64))
        components = vectors[:, ::-1][:, :channels].T
        # The sign of an eigenvector is arbitrary: the largest entry is made positive so that fits can be compared.
        largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
        components = (components * np.sign(largest)).astype(np.float32)
        deviation = np.sqrt(values[::-1][:channels])
        scale = (1.0 / np.sqrt(deviation)).astype(np.float32)
        variance = ((centred @ components.T) * scale).var(axis=0).mean()
        return cls(mean, components, (scale / np.sqrt(variance)).astype(np.float32))

    def encode(self, frames: Array) -> Array:
        """Frames [T, H, W, 3], uint8 or float in 0..1 -> latents float32 [F, C, H/16, W/16]."""
        _, height, width, _ = frames.shape
        latents = ((to_patches(frames) - self.mean) @ self.components.T) * self.scale
        shape = (len(latents), height // SPATIAL_STRIDE, width // SPATIAL_STRIDE, self.channels)
        return latents.reshape(shape).transpose(0, 3, 1, 2)

    def decode(self, latents: Array) -> Array:
        """Latents [F, C, h, w] -> frames float32 [T, 16h, 16w, 3] clipped to 0..1."""
        count, channels, h, w = latents.shape
        flat = latents.astype(np.float32).transpose(0, 2, 3, 1).reshape(count, h * w, channels)
        patches = (flat / self.scale) @ self.components + self.mean
        return np.clip(from_patches(patches, h * SPATIAL_STRIDE, w * SPATIAL_STRIDE), 0.0, 1.0)

    def save(self, path: Path) -> None:
        np.savez(path, mean=self.mean, components=self.components, scale=self.scale)

    @classmethod
    def load(cls, path: Path) -> PatchPCA:
        with np.load(path) as stored:
            return cls(stored["mean"], stored["components"], stored["scale"])


def psnr(frames: Array, reference: Array, weights: Array | None = None) -> float:
    """Peak signal-to-noise ratio in dB of float frames [..., 3] in 0..1, `weights` [...] counting pixels unequally."""
    error = ((frames - reference) ** 2).mean(axis=-1)
    return float(-10 * np.log10(max(float(np.average(error, weights=weights)), 1e-12)))


def write_pca(pca: PatchPCA, path: Path) -> None:
    """Write a fit as safetensors, the form in which it ships."""
    values = {entry.name: np.asarray(getattr(pca, entry.name)) for entry in fields(pca)}
    # safetensors writes an array's memory as it lies, whatever its order says.
    save_file({name: np.array(value, order="C") for name, value in values.items()}, path)


def read_pca(path: Path) -> PatchPCA:
    """What `write_pca` wrote."""
    return PatchPCA(**{name: value if value.ndim else value.item() for name, value in load_file(path).items()})
