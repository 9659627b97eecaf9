"""What the demo trains on and with: small labelled pictures, and a network of two layers in numpy.

The pictures are PPM files (P6) of 64 to 96 pixels a side. Each class has a pattern of its own under noise, so a network
that sees the right bytes with the right labels learns, and one that does not stays at chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

GRID = 8
FEATURES = GRID * GRID * 3
_HIDDEN = 64
_LEARNING_RATE = 0.2
_NOISE = 60.0

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Picture:
    """One generated file."""

    key: str
    label: int
    content: bytes


def pictures(rng: np.random.Generator, classes: int, per_class: int) -> Iterator[Picture]:
    """Generate all pictures, class by class, as ``train/class_00/00000.ppm``."""
    patterns = rng.uniform(118, 138, size=(classes, GRID, GRID, 3))
    for label in range(classes):
        for number in range(per_class):
            side = GRID * int(rng.integers(8, 13))
            scaled = patterns[label].repeat(side // GRID, axis=0).repeat(side // GRID, axis=1)
            pixels = np.clip(scaled + rng.normal(0, _NOISE, scaled.shape), 0, 255).astype(np.uint8)
            content = f"P6 {side} {side} 255\n".encode() + pixels.tobytes()
            yield Picture(f"train/class_{label:02d}/{number:05d}.ppm", label, content)


def features(content: bytes) -> Floats:
    """Decode a picture and average it down to a grid of 8 x 8 colours around zero."""
    head, _, raw = content.partition(b"\n")
    width, height = (int(part) for part in head.split()[1:3])
    pixels = np.frombuffer(raw, dtype=np.uint8).reshape(GRID, height // GRID, GRID, width // GRID, 3)
    averaged: Floats = (pixels.mean(axis=(1, 3), dtype=np.float32).reshape(FEATURES) - 128) / 64
    return averaged


class Network:
    """Softmax over one hidden layer, trained by plain gradient descent."""

    def __init__(self, rng: np.random.Generator, classes: int) -> None:
        self._first = rng.normal(0, FEATURES**-0.5, (FEATURES, _HIDDEN)).astype(np.float32)
        self._second = rng.normal(0, _HIDDEN**-0.5, (_HIDDEN, classes)).astype(np.float32)

    def train(self, batch: Floats, labels: npt.NDArray[np.int64]) -> tuple[float, int]:
        """Make one step; return the loss before it (mean) and how many labels were guessed right."""
        hidden = np.maximum(batch @ self._first, 0)
        scores = hidden @ self._second
        scores -= scores.max(axis=1, keepdims=True)
        share = np.exp(scores)
        share /= share.sum(axis=1, keepdims=True)
        rows = np.arange(len(labels))
        loss = float(-np.log(share[rows, labels] + 1e-9).mean())
        right = int((share.argmax(axis=1) == labels).sum())
        share[rows, labels] -= 1
        share /= len(labels)
        back = (share @ self._second.T) * (hidden > 0)
        self._second -= _LEARNING_RATE * (hidden.T @ share)
        self._first -= _LEARNING_RATE * (batch.T @ back)
        return loss, right
