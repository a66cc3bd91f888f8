"""Encoded images to arrays of one size, with pillow; nothing here knows about data sets."""

import contextlib
import io
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from msjax.data._error import DataError


def pillow() -> ModuleType:
    """Returns pillow's Image module, or a DataError that says how to get it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            "decoding and resizing images needs pillow, which is not installed: pip install 'msjax[data]'"
        ) from error
    return Image


@contextlib.contextmanager
def decoding(what: str) -> Iterator[None]:
    """Makes one error, which names the image, of all that Pillow's readers raise for a damaged one."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # OSError, SyntaxError, ValueError, zlib.error, DecompressionBombError …
        detail = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{what} cannot be decoded: {detail}") from error


DECODER = 2
"""The version of `flatten`: raise it when an image gives other pixels. 1 took no notice of EXIF and transparency in
prepared sets, and cut 16 bits off at 255."""
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")


def decode(encoded: bytes, channels: int) -> Any:
    """A decoded PIL image of 8 bits, grey for one channel and RGB for three; see `flatten`."""
    try:
        image = pillow().open(io.BytesIO(encoded))
    except pillow().UnidentifiedImageError:
        raise DataError(f"it is no image that Pillow knows, and begins with {bytes(encoded[:16])!r}") from None
    return flatten(image, channels)


def decode_as(encoded: bytes, shape: tuple[int, int, int], image_size: int | None) -> np.ndarray:
    """uint8 (H, W, C) of `shape`: as the image is, or its shorter side resized to `image_size` and the middle kept.

    Raises:
        DataError: the image is of another size, and `image_size` is None.
    """
    image = decode(encoded, shape[2])
    if image_size is not None:
        image = resize_center_crop(image, image_size, image_size)
    pixels = to_array(image)
    if pixels.shape != shape:
        raise DataError(
            f"it has {pixels.shape[1]} x {pixels.shape[0]} pixels as it is seen, and the set says "
            f"{shape[1]} x {shape[0]}: give image_size"
        )
    return pixels


def upright(image: Any) -> Any:
    """As its EXIF orientation says that it is to be seen; as it is where EXIF data cannot be read."""
    pillow()
    from PIL import ImageOps

    image.load()  # here, where what is wrong with the pixels is not passed over
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data are no reason to do without the pixels
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


_ORIENTATION, _BITS_PER_SAMPLE = 0x0112, 258  # tags of EXIF and TIFF


def flatten(image: Any, channels: int | None = None) -> Any:
    """An upright image of 8 bits, grey for one channel and RGB for three; transparent pixels are laid over black.

    By default grey images have one channel, others three. Of more bits the upper 8 are left, as Pillow itself does it
    with colours of 16 bits: 65535 becomes 255.

    Raises:
        DataError: nothing says how bright its numbers are, as of 32 bits and floats.
    """
    bits, image = grey_bits(image), upright(image)  # which may leave nothing of the file but its pixels
    if channels is None:
        channels = 1 if image.mode in GREY_MODES else 3
    if bits:
        image = pillow().fromarray((np.asarray(image) >> (bits - 8)).clip(0, 255).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = pillow().alpha_composite(pillow().new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("L" if channels == 1 else "RGB")


def grey_bits(image: Any) -> int:
    """How many bits a grey value of more than 8 has, 0 of other images."""
    if image.mode in ("I", "F") and not (image.mode == "I" and image.format in ("PNG", "PPM")):  # these have 16 there
        raise DataError(f"images must have 8 or 16 bits a channel, got PIL's mode {image.mode}")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return 0
    tags = getattr(image, "tag_v2", {})
    return tags.get(_BITS_PER_SAMPLE, (16,))[0]


def to_array(image: Any) -> np.ndarray:
    """uint8 [H, W, C] of a PIL image."""
    x = np.asarray(image)
    return x[..., None] if x.ndim == 2 else x


def resize_center_crop(image: Any, crop: int, resize: int) -> Any:
    """Shorter side to `resize` (bilinear, antialiased), then the middle `crop` x `crop`, as torchvision does."""
    w, h = image.size
    short = min(w, h)
    if short != resize:
        w, h = (resize, resize * h // w) if w <= h else (resize * w // h, resize)
        image = image.resize((w, h), pillow().Resampling.BILINEAR)
    left, top = round((w - crop) / 2), round((h - crop) / 2)
    return image.crop((left, top, left + crop, top + crop)) if (w, h) != (crop, crop) else image


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, size, size, C] of images [N, H, W, C]: each one's shorter side to `size`, middle kept."""
    if images.shape[1:3] == (size, size):
        return images
    from_array = pillow().fromarray
    squeezed = images[..., 0] if images.shape[-1] == 1 else images
    return np.stack([to_array(resize_center_crop(from_array(x), size, size)) for x in squeezed])


def random_resized_crop(image: Any, size: int, rng: np.random.Generator) -> Any:
    """8..100 % of the area, aspect ratio 3/4..4/3, resized to `size` x `size`: torchvision's RandomResizedCrop."""
    w, h = image.size
    for _ in range(10):
        area = w * h * rng.uniform(0.08, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        cw, ch = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < cw <= w and 0 < ch <= h:
            left, top = int(rng.integers(w - cw + 1)), int(rng.integers(h - ch + 1))
            break
    else:  # the largest central crop of a permitted ratio
        cw, ch = min(w, round(h * 4 / 3)), min(h, round(w * 4 / 3))
        left, top = (w - cw) // 2, (h - ch) // 2
    box = (left, top, left + cw, top + ch)
    return image.resize((size, size), pillow().Resampling.BILINEAR, box=box)
