"""How a picture that Pillow has opened becomes upright 8-bit RGB: orientation, depth and transparency.

The table in docs/data.md says what each kind of picture becomes.
"""

import struct
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from PIL.TiffImagePlugin import TiffImageFile

# Pillow limits these for the whole process and has no argument for them. The size of pictures is limited by
# data.max_image_megapixels instead, and the texts of a PNG, which are not used, by what Pillow allows for all of them.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

_ORIENTATION, _WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC = 0x0112, 0x0100, 0x0101, 0x0102, 0x0106  # tags of TIFF and EXIF
# For each EXIF orientation: whether rows and columns are swapped, and what is flipped then (-2: up-down).
_TURNS: dict[int, tuple[bool, list[int]]] = {
    1: (False, []), 2: (False, [-1]), 3: (False, [-2, -1]), 4: (False, [-2]),
    5: (True, []), 6: (True, [-1]), 7: (True, [-2, -1]), 8: (True, [-2]),
}  # fmt: skip
# Pillow scales the pixels of these PNGs to 8 bits, but not the colour that stands for transparent pixels.
_KEY_SCALES = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
_FEWEST_SHADES = 16


def orientation(image: Image.Image) -> int:
    """The EXIF orientation (1 to 8), or that of the XMP data if EXIF has none; 1 if both are missing or broken."""
    try:
        # For a PNG without EXIF in front of its pixels, Pillow's own method decodes the whole picture (and closes it).
        stream = image.fp if image.format == "PNG" else None  # type: ignore[attr-defined]  # of ImageFile
        exif = image.getexif() if stream is None or _has_late_texts(stream) else Image.Image.getexif(image)
        found = exif.get(_ORIENTATION)
    except (KeyError, SyntaxError, TypeError, ValueError, struct.error):  # what Pillow raises for broken EXIF
        return 1
    return found if found in _TURNS else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) as displayed, without decoding."""
    width, height = image.size
    if isinstance(image, TiffImageFile):  # Pillow has already turned the size of some TIFFs
        width, height = image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]
    is_swapped, _ = _TURNS[orientation(image)]
    return (width, height) if is_swapped else (height, width)


def turned(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Turn pixels [..., height, width] upright, as stored with that EXIF orientation."""
    is_swapped, flipped = _TURNS[orientation]
    pixels = pixels.transpose(-2, -1) if is_swapped else pixels
    return pixels.flip(flipped) if flipped else pixels


def upright_rgb(image: Image.Image) -> torch.Tensor:
    """Decode the first frame: uint8 [3, height, width], RGB, upright, on white where it is transparent.

    Raises whatever Pillow raises, and ValueError if the values have no known range (see ``_gray8``).
    """
    # Pillow turns TIFFs itself as it decodes them.
    orient = 1 if isinstance(image, TiffImageFile) else orientation(image)
    if image.format == "PNG":
        _scale_key(image)
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        image = _gray8(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return turned(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1), orient)


def _gray8(image: Image.Image) -> Image.Image:
    """Scale gray values of more than 8 bits to 8 bits: mode L, or LA if one value stands for transparent pixels.

    Values up to 255 are kept. Greater ones lose their lower bits, and floats up to 1 are multiplied by 255. Raises
    ValueError for others, and where hardly any shades would be left, since a nearly black picture teaches nothing.
    """
    values: np.ndarray = np.asarray(image)
    gray: np.ndarray
    least, most = values.min().item(), values.max().item()
    bits = _bits(image)
    if image.mode == "F" and most <= 1:
        gray, shades = values * 255 + 0.5, 256.0
    elif bits and most > 255:
        gray, shades = values >> (bits - 8), (most + 1) / 2 ** (bits - 8)
    else:
        gray, shades = values, most + 1 if image.mode == "F" else 256.0
    if not (least >= 0 and most <= (2**bits - 1 if bits else 255) and shades >= _FEWEST_SHADES):
        what = "floats" if image.mode == "F" else f"{bits}-bit numbers" if bits else "signed or 32-bit numbers"
        raise ValueError(
            f"its pixels are {what} from {least:g} to {most:g}, whose brightness as 8-bit numbers is not known; "
            "scale them to 0 to 255 and save them with 8 bits"
        )
    gray = gray.astype(np.uint8)
    if isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0:  # 0 is white
        gray = 255 - gray
    scaled = Image.fromarray(gray)
    if (key := image.info.get("transparency")) is not None:
        scaled.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return scaled


def _bits(image: Image.Image) -> int | None:
    """Number of bits of unsigned gray values; None: they are signed, floats, or have 32 bits and no known range."""
    if image.mode == "I":
        return 16 if image.format == "PPM" else None  # Pillow scales the values of a PGM to 16 bits
    if image.mode == "F":
        return None
    return image.tag_v2.get(_BITS, (16,))[0] if isinstance(image, TiffImageFile) else 16


def _scale_key(image: Image.Image) -> None:
    """Scale the colour that stands for the transparent pixels of a PNG as Pillow scales the pixels."""
    tiles = image.tile  # type: ignore[attr-defined]  # of ImageFile; empty once the pixels are decoded
    scale, key = _KEY_SCALES.get(tiles[0].args) if tiles else None, image.info.get("transparency")
    if scale and key is not None:
        image.info["transparency"] = tuple(int(k * scale) for k in key) if isinstance(key, tuple) else int(key * scale)


def _has_late_texts(stream: BinaryIO) -> bool:
    """Whether a PNG has texts or EXIF behind its pixels, where Pillow sees them only once it has decoded the picture.

    Only the heads of the chunks are read, and the stream stays where it was.
    """
    place, is_late = stream.tell(), False
    stream.seek(8)
    try:
        while len(head := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            is_late |= kind == b"IDAT"
            if is_late and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            stream.seek(length + 4, 1)
        return False
    finally:
        stream.seek(place)
