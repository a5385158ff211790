"""Random changes of training images by name, on the device and decided by a key.

What is drawn for an image depends on the key and on the image's position in its batch
alone, so that a batch that is divided among devices, or into micro-batches, is changed
as it would be in one piece.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from bn_jax.fields import AT_LEAST_1, NOT_NEGATIVE, ConfigError
from bn_jax.names import Table


class Augmentation(Protocol):
    """What changes images; hashable, and pure."""

    def __call__(self, key: Array, images: Array, *, first: int | Array = 0) -> Array:
        """Return changed images, for training.

        Args:
          key: decides the changes; another one for each step.
          images: `[N, H, W, C]`, of any dtype.
          first: position of the first image in its batch, where `images` is a part.

        Returns:
          Images `[N, side(H), side(W), C]` of the same dtype.
        """

    def centre(self, images: Array) -> Array:
        """Return images for evaluation, unchanged but for a crop.

        Args:
          images: `[N, H, W, C]`, of any dtype.

        Returns:
          Images `[N, side(H), side(W), C]` of the same dtype.
        """

    def side(self, pixels: int) -> int:
        """Return the height or width of a changed image, given that of the image."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse images of a shape `[H, W, C]` that cannot be changed so.

        Raises:
          ConfigError: if they cannot.
        """


@dataclasses.dataclass(frozen=True)
class Unchanged:
    """Leave images as they are."""

    def __call__(self, key: Array, images: Array, *, first: int | Array = 0) -> Array:
        """Return the images."""
        del key, first
        return images

    def centre(self, images: Array) -> Array:
        """Return the images."""
        return images

    def side(self, pixels: int) -> int:
        """Return the same number."""
        return pixels

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse nothing."""


@dataclasses.dataclass(frozen=True)
class CropAndFlip:
    """Take a random crop of each padded image, and mirror half of the crops.

    Evaluation sees the crop in the middle, which for crops of the image's size is the
    image itself.

    Attributes:
      padding: pixels of 0 on each of the four sides, before inputs are scaled.
      size: height and width of the crop; None for those of the image.
      flip: whether a crop is mirrored left to right with probability 1/2.

    References:
      He et al., 2015, "Deep residual learning for image recognition",
      arXiv:1512.03385, section 4.2.
    """

    padding: Annotated[int, NOT_NEGATIVE] = 4
    size: Annotated[int | None, AT_LEAST_1] = None
    flip: bool = True

    def __call__(self, key: Array, images: Array, *, first: int | Array = 0) -> Array:
        """Return random crops."""
        n, h, w, c = images.shape
        p, out_h, out_w = self.padding, self.side(h), self.side(w)

        def draw(position: Array) -> Array:
            return jax.random.bits(jax.random.fold_in(key, position), (3,), jnp.uint32)

        def crop(image: Array, top: Array, left: Array) -> Array:
            return lax.dynamic_slice(image, (top, left, 0), (out_h, out_w, c))

        # Remainders of 32 random bits are as good as uniform: they differ by 2**-32.
        drawn = jax.vmap(draw)(first + jnp.arange(n))
        counts = jnp.array([h + 2 * p - out_h + 1, w + 2 * p - out_w + 1, 2])
        top, left, flip = (drawn % counts.astype(jnp.uint32)).T.astype(jnp.int32)
        crops = jax.vmap(crop)(self._padded(images), top, left)
        if not self.flip:
            return crops
        return jnp.where(flip[:, None, None, None] == 1, crops[:, :, ::-1], crops)

    def centre(self, images: Array) -> Array:
        """Return the crops in the middle; of an odd rest, the lower right has more."""
        h, w = images.shape[1:3]
        out_h, out_w = self.side(h), self.side(w)
        if (out_h, out_w) == (h, w):
            return images
        top = (h + 2 * self.padding - out_h) // 2
        left = (w + 2 * self.padding - out_w) // 2
        return self._padded(images)[:, top : top + out_h, left : left + out_w]

    def side(self, pixels: int) -> int:
        """Return the crop's height or width, given that of the image."""
        return pixels if self.size is None else self.size

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse a crop that is larger than the padded image, or might miss the image.

        Raises:
          ConfigError: if it is.
        """
        h, w = shape[:2]
        most = min(h, w) + 2 * self.padding
        if self.size is not None and self.size > most:
            raise ConfigError(
                f"augment='crop_and_flip:size={self.size}' of images of {h} x {w} "
                f"pixels with padding={self.padding}; expected a size of at most {most}"
            )
        crop = min(self.side(h), self.side(w))
        if self.padding >= crop:
            raise ConfigError(
                f"augment='crop_and_flip:padding={self.padding}' with crops of {crop} "
                "pixels, which may see nothing of the image; expected less padding"
            )

    def _padded(self, images: Array) -> Array:
        p = self.padding
        return jnp.pad(images, ((0, 0), (p, p), (p, p), (0, 0)))


AUGMENTATIONS: Table[Augmentation] = Table(
    "augment", {"none": Unchanged, "crop_and_flip": CropAndFlip}
)
