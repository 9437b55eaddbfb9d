"""Pictures on disk: their size, read from the header alone, and their pixels.

The size determines the number of tokens of a sample, so packing needs it long before any pixel is decoded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg, read_file

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted
from megavlm.media.decode import orientation, turned, upright_rgb, upright_size
from megavlm.media.files import File, Find, explained


@dataclass
class Picture:
    """A picture file. `source` ("file:line") is the sample that names it, for error messages."""

    file: File
    source: str

    def size(self) -> tuple[int, int]:
        """(height, width) as displayed, from the header. Raises UserError if the file is missing or no picture."""
        with explained(self.source, "picture", self.file), self._image() as image:
            return upright_size(image)

    def pixels(self) -> torch.Tensor:
        """The decoded picture, upright: uint8 [3, height, width], RGB; transparent pixels are on white.

        Raises UserError if it cannot be decoded completely, or if its size is not that of the header.
        """
        with explained(self.source, "picture", self.file):
            with self._image() as image:
                size, turn = upright_size(image), orientation(image)
                # Pillow reads all formats, but torchvision decodes JPEG three times as fast to the same pixels.
                pixels = None if image.format == "JPEG" else upright_rgb(image)
            if pixels is None:
                path = self.file.local_path
                data = read_file(path) if path else torch.frombuffer(bytearray(self.file.read()), dtype=torch.uint8)
                pixels = turned(decode_jpeg(data, ImageReadMode.RGB), turn)
            if pixels.shape[1:] != size:
                found = " x ".join(map(str, pixels.shape[1:]))
                raise ValueError(f"its header says {size[0]} x {size[1]} (height x width), but it has {found} pixels")
            return pixels

    @contextmanager
    def _image(self) -> Iterator[Image.Image]:
        with self.file.open() as stream:
            try:
                image = Image.open(stream)
            except UnidentifiedImageError as error:
                stream.seek(0)
                what = "neither a picture nor of a kind that Pillow reads" if stream.read(1) else "empty"
                raise ValueError(f"it is {what}") from error
            with image:
                if image.format == "EPS":  # decoding would run Ghostscript, if it is there, on a program from the file
                    raise ValueError("it is PostScript, which is a program; convert it to a picture")
                yield image


def find_picture(named: Any, find: Find, source: str) -> Picture:
    """The picture that a record names by a path."""
    if not isinstance(named, str):
        raise UserError(f"{source}: a picture must be a path, found {quoted(named)}")
    return Picture(find(named), source)
