"""Pictures and videos of many kinds, cut out of the photographs of installed packages and written to files."""

import random
from collections.abc import Callable
from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import av
import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_images

COLOURED = (
    *("astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field", "immunohistochemistry"),
    *("china", "flower"),
)
GREY = ("camera", "coins", "page", "text", "moon", "brick", "cell")
SHAPES = (
    (190, 1), (380, 2), (30, 30), (17, 5), (1, 1), (2, 300), (5, 900), (33, 1100), (15, 47), (1500, 40), (32, 4000),
    (4000, 32), (4000, 21), (31, 33), (49, 16),
)  # fmt: skip
LARGE = ((4000, 2600), (4000, 3000), (2800, 4000), (4000, 1000), (700, 4000), (4000, 400))


class Files:
    """Writes pictures and videos under names of their own, and gives the names."""

    def __init__(self, draw: random.Random, folder: Path, prefix: str):
        self.draw, self.folder, self.prefix, self.count = draw, folder, prefix, 0

    def _new(self, suffix: str) -> str:
        self.count += 1
        return f"{self.prefix}-{self.count}.{suffix}"

    def _side(self, least: int = 30, most: int = 500) -> int:
        return round(least * (most / least) ** self.draw.random())

    def crop(self, width: int, height: int, names: tuple[str, ...] = COLOURED) -> Image.Image:
        """Part of a photograph, or the whole, at this size."""
        draw, photograph = self.draw, _photograph(self.draw.choice(names))
        left, upper = draw.randrange(photograph.width // 2), draw.randrange(photograph.height // 2)
        right, lower = draw.randrange(left + 20, photograph.width), draw.randrange(upper + 20, photograph.height)
        part = (left, upper, right, lower) if draw.random() < 0.8 else None
        return photograph.resize((width, height), Image.Resampling.BILINEAR, part)

    def save(self, picture: Image.Image, suffix: str, **options) -> str:
        """Write it to a new file; its name."""
        name = self._new(suffix)
        picture.save(self.folder / name, **options)
        return name

    def picture(self) -> str:
        """Of a common kind and moderate size."""
        picture = self.crop(self._side(), self._side())
        suffix = self.draw.choice(("jpg", "jpg", "png", "webp"))
        return self.save(picture, suffix, **({"quality": self.draw.choice((30, 75, 95))} if suffix != "png" else {}))

    def shape(self) -> str:
        """Of an extreme aspect ratio, or tiny."""
        width, height = self.draw.choice(SHAPES)
        suffix = self.draw.choice(("jpg", "png", "webp"))
        return self.save(self.crop(width, height), suffix)

    def large(self, number: int) -> str:
        """Up to 4,000 pixels wide; most are of a tenth of that."""
        width, height = LARGE[number] if number < len(LARGE) else (self._side(600, 1600), self._side(300, 1200))
        suffix = self.draw.choice(("jpg", "jpg", "webp", "png")) if width * height < 3e6 else "jpg"
        options = {"compress_level": 1} if suffix == "png" else {"quality": 85, "method": 0}
        return self.save(self.crop(width, height), suffix, **options)

    def format(self, number: int) -> str:
        """Of each format and colour model in turn."""
        make = _FORMATS[(3 * number + self.count) % len(_FORMATS)]
        return make(self, self.draw, self._side(30, 200), self._side(30, 200))

    def video(self) -> str:
        frames, suffix = self.draw.choice((2, 3, 4, 5, 7, 12, 23, 40, 61)), self.draw.choice(("mp4", "mp4", "webm"))
        codec = self.draw.choice(("libvpx", "libvpx-vp9") if suffix == "webm" else ("mpeg4", "libx264"))
        rate = self.draw.choice((1, 2, 3, 8, 10, 24, Fraction(30000, 1001), Fraction(25, 2)))
        width, height = self.draw.choice(((64, 64), (96, 64), (130, 98), (160, 40), (32, 170), (200, 150)))
        name = self._new(suffix)
        with av.open(str(self.folder / name), "w") as container:
            stream = container.add_stream(codec, rate=rate)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            scene, left, upper = np.asarray(_photograph("coffee")), self.draw.randrange(100), self.draw.randrange(200)
            for number in range(frames):
                view = scene[upper : upper + height, left + 4 * number : left + 4 * number + width]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(view), format="rgb24")))
            container.mux(stream.encode())
        return name

    def frames(self) -> list[str] | dict:
        """A list of frames of one size, often with their rate."""
        count, width, height = self.draw.choice((2, 3, 4, 5, 6, 9, 16)), self._side(30, 250), self._side(30, 250)
        suffix = self.draw.choice(("jpg", "png", "webp"))
        names = [self.save(self.crop(width, height), suffix) for _ in range(count)]
        rate = self.draw.choice((None, None, 1, 2.0, 4, 0.5, 29.97, 30))
        return self.draw.choice((names, {"frames": names})) if rate is None else {"frames": names, "fps": rate}


def _turned(files: Files, draw: random.Random, width: int, height: int, orientation: int) -> str:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return files.save(files.crop(width, height), draw.choice(("jpg", "jpg", "png", "webp")), exif=exif)


def _jpeg(files: Files, draw: random.Random, width: int, height: int) -> str:
    picture = files.crop(width, height)
    return files.save(picture, "jpg", quality=draw.choice((1, 50, 90, 100)), subsampling=draw.choice((0, 1, 2)),
                       progressive=draw.random() < 0.5)  # fmt: skip


def _alpha(files: Files, draw: random.Random, width: int, height: int, suffix: str) -> str:
    picture = files.crop(width, height).convert("RGBA")
    picture.putalpha(_photograph("moon").resize((width, height)))
    return files.save(picture, suffix)


def _grey(files: Files, draw: random.Random, width: int, height: int, suffix: str) -> str:
    return files.save(files.crop(width, height, GREY), suffix)


def _palette(files: Files, draw: random.Random, width: int, height: int) -> str:
    picture = files.crop(width, height).quantize(draw.choice((2, 16, 256)))
    return files.save(picture, draw.choice(("png", "gif")), **draw.choice(({}, {"transparency": 1})))


def _animated(files: Files, draw: random.Random, width: int, height: int) -> str:
    first, *others = (files.crop(width, height) for _ in range(3))
    return files.save(first, draw.choice(("gif", "webp", "png")), save_all=True, append_images=others)


_FORMATS: tuple[Callable[..., str], ...] = (
    *(partial(_turned, orientation=orientation) for orientation in range(1, 9)),
    _jpeg,
    _jpeg,
    *(partial(_alpha, suffix=suffix) for suffix in ("png", "webp")),
    *(partial(_grey, suffix=suffix) for suffix in ("png", "jpg", "gif")),
    _palette,
    _animated,
    lambda files, draw, width, height: files.save(files.crop(width, height).convert("CMYK"), "jpg"),
    lambda files, draw, width, height: files.save(files.crop(width, height, GREY).convert("1"), "png"),
    lambda files, draw, width, height: files.save(files.crop(width, height, GREY).convert("LA"), "png"),
    lambda files, draw, width, height: files.save(files.crop(width, height), "webp", lossless=True),
    lambda files, draw, width, height: files.save(files.crop(width, height), draw.choice(("bmp", "tiff"))),
)


@cache
def _photograph(name: str) -> Image.Image:
    if name in ("china", "flower"):
        return Image.fromarray(load_sample_images().images[name == "flower"])
    return Image.fromarray(getattr(skimage.data, name)())
