"""Pictures on disk: their size, read from the header alone, and their pixels.

The size determines the number of tokens of a sample, so packing needs it long before any pixel is decoded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_jpeg, read_file

from megavlm.base.errors import UserError
from megavlm.media.files import File, Find, explained

_EXIF_ORIENTATION = 0x0112
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


@dataclass
class Picture:
    """A picture file. `source` ("file:line") is the sample that names it, for error messages."""

    file: File
    source: str

    def size(self) -> tuple[int, int]:
        """(height, width) as displayed, from the header. Raises UserError if the file is missing or unreadable."""
        with explained(self.source, "picture", self.file), self._image() as image:
            width, height = image.size
            is_transposed = image.getexif().get(_EXIF_ORIENTATION) in _TRANSPOSED
        return (width, height) if is_transposed else (height, width)

    def pixels(self) -> torch.Tensor:
        """The decoded picture, upright: uint8 [3, height, width], RGB. Raises UserError if it cannot be decoded."""
        with explained(self.source, "picture", self.file):
            with self._image() as image:
                if image.format != "JPEG":  # PIL reads all formats, but torchvision decodes JPEG three times as fast
                    image = ImageOps.exif_transpose(image).convert("RGB")
                    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
            path = self.file.local_path
            data = read_file(path) if path else torch.frombuffer(bytearray(self.file.read()), dtype=torch.uint8)
            return decode_jpeg(data, ImageReadMode.RGB, apply_exif_orientation=True)

    @contextmanager
    def _image(self) -> Iterator[Image.Image]:
        with self.file.open() as stream, Image.open(stream) as image:
            yield image


def find_picture(named: Any, find: Find, source: str) -> Picture:
    """The picture that a record names by a path."""
    if not isinstance(named, str):
        raise UserError(f"{source}: a picture must be a path, found {str(named)[:200]}")
    return Picture(find(named), source)
