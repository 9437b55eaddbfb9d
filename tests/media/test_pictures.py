"""Pictures of every kind: their sizes from the header, and their pixels as transformers' or computed by hand."""

import itertools
import struct
import zlib

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageCms, PngImagePlugin
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from megavlm.base.errors import UserError
from megavlm.media.files import File, in_folder
from megavlm.media.pictures import Picture

COLOUR = Image.fromarray(skimage.data.chelsea()).resize((48, 32))
GREY = COLOUR.convert("L")
SHADES = np.array(GREY)
FADED = COLOUR.copy()  # transparent from left to right
FADED.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 48).astype(np.uint8), (32, 1))))
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'
LAB = ImageCms.profileToProfile(COLOUR, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
AVIF = ["avif"] if ".avif" in Image.registered_extensions() else []

# Kinds of files that transformers reads as it should: name, picture, options of Image.save.
KINDS = {
    "plain.jpg": (COLOUR, {}),
    "progressive.jpg": (COLOUR, {"progressive": True}),
    "grey.jpg": (GREY, {}),
    "as-rgb.jpg": (COLOUR, {"keep_rgb": True}),
    "cmyk.jpg": (COLOUR.convert("CMYK"), {}),
    "two.mpo": (COLOUR, {"save_all": True}),
    "one-bit.png": (GREY.convert("1"), {}),
    "grey.png": (GREY, {}),
    "palette.png": (COLOUR.quantize(200), {}),
    "palette-key.png": (COLOUR.quantize(8), {"transparency": 3}),
    "palette-alpha.png": (FADED.quantize(50), {}),
    "key.png": (COLOUR, {"transparency": COLOUR.getpixel((5, 5))}),
    "grey-alpha.png": (FADED.convert("LA"), {}),
    "alpha.png": (FADED, {}),
    "animated.png": (FADED, {"save_all": True}),
    "alpha.webp": (FADED, {"lossless": True}),
    "animated.webp": (COLOUR, {"save_all": True}),
    "animated.gif": (COLOUR.quantize(16), {"save_all": True, "transparency": 2}),
    "alpha.tiff": (FADED, {"compression": "tiff_lzw"}),
    "cmyk.tiff": (COLOUR.convert("CMYK"), {}),
    "two.tiff": (COLOUR, {"save_all": True}),
    "alpha.jp2": (FADED, {}),
    "plain.bmp": (COLOUR, {}),
    "alpha.ico": (FADED, {"sizes": [(48, 32)]}),
    "plain.ppm": (COLOUR, {}),
    "alpha.tga": (FADED, {}),
    "run-lengths.tga": (COLOUR, {"compression": "tga_rle"}),
    "ycbcr.tiff": (COLOUR.convert("YCbCr"), {}),
    "jpeg.tiff": (COLOUR, {"compression": "jpeg"}),
    "lab.tiff": (LAB, {}),
    "palette.blp": (COLOUR.quantize(200), {"blp_version": "BLP2"}),
    "alpha.dds": (FADED, {}),
    "plain.dib": (COLOUR, {}),
    "alpha.icns": (FADED, {}),
    "one-bit.msp": (GREY.convert("1"), {}),
    "palette.pcx": (COLOUR.quantize(200), {}),
    "alpha.qoi": (FADED, {}),
    "alpha.sgi": (FADED, {}),
    "one-bit.xbm": (GREY.convert("1"), {}),
    **({"alpha.avif": (FADED, {})} if AVIF else {}),
}


def opened(path) -> tuple[tuple[int, int], np.ndarray]:
    """Our size and pixels [height, width, 3]; they agree."""
    picture = Picture(File(str(path)), "here:1")
    pixels = picture.pixels().permute(1, 2, 0).numpy()
    assert picture.size() == pixels.shape[:2]
    assert pixels.dtype == np.uint8
    return picture.size(), pixels


def png(bits: int, colour: int, pixels: np.ndarray, *chunks: tuple[bytes, bytes], late=(), size=None) -> bytes:
    """A PNG of depths that Pillow does not write; `late` chunks stand behind the pixels. pixels: bytes of the rows."""
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    width, height = size or (48, 32)
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    parts = [header, *chunks, (b"IDAT", zlib.compress(rows)), *late, (b"IEND", b"")]
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
              for kind, data in parts)  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("name", KINDS)
def test_a_picture_has_the_pixels_that_transformers_gives(name, tmp_path):
    """Transparent ones those of convert_to_rgb, which paints on white; load_image paints on what lies beneath."""
    image, options = KINDS[name]
    others = {"append_images": [COLOUR.rotate(90), COLOUR.rotate(180)]} if "save_all" in options else {}
    image.copy().save(tmp_path / name, **options, **others)
    with Image.open(tmp_path / name) as again:
        expected = convert_to_rgb(again, return_numpy=True)
        if not again.has_transparency_data:
            np.testing.assert_array_equal(expected, np.array(load_image(str(tmp_path / name))))
    size, pixels = opened(tmp_path / name)
    assert size == ((1024, 1024) if name.endswith("icns") else (32, 48))  # Pillow writes icons in sizes of its own
    np.testing.assert_array_equal(pixels, expected)


def test_the_colours_of_lab_are_those_of_the_picture(tmp_path):
    LAB.save(tmp_path / "lab.tiff")
    np.testing.assert_allclose(opened(tmp_path / "lab.tiff")[1], np.array(COLOUR), atol=6)  # LAB has steps of its own


@pytest.mark.parametrize(
    ("suffix", "told"), [*itertools.product(["jpg", "png", "webp", "tiff", *AVIF], ["exif", "xmp"])]
)
def test_every_orientation_is_turned_upright_once(suffix, told, tmp_path):
    stored = {orientation: tmp_path / f"{orientation}.{suffix}" for orientation in range(1, 9)}
    for orientation, path in stored.items():
        xmp, exif = XMP % orientation, Image.Exif()
        exif[0x0112] = orientation
        texts = PngImagePlugin.PngInfo()
        texts.add_itxt("XML:com.adobe.xmp", xmp)
        as_xmp = {"png": {"pnginfo": texts}, "tiff": {"tiffinfo": {700: xmp.encode()}}}
        options = {"exif": exif} if told == "exif" else as_xmp.get(suffix, {"xmp": xmp.encode()})
        COLOUR.save(path, **options)
    unturned = opened(stored[1])[1]
    for orientation, path in stored.items():
        size, pixels = opened(path)
        assert size == ((48, 32) if orientation > 4 else (32, 48))
        np.testing.assert_array_equal(pixels, np.array(load_image(str(path))))
        if suffix != "avif":  # whose files of other orientations differ by a few shades
            np.testing.assert_array_equal(pixels, BY_HAND[orientation](unturned))


BY_HAND = {
    1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1), 6: lambda p: np.rot90(p, -1), 7: lambda p: p.swapaxes(0, 1)[::-1, ::-1],
    8: lambda p: np.rot90(p),
}  # fmt: skip


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def test_orientation_is_found_wherever_it_stands(tmp_path, renderer):
    """In a JPEG behind XMP data, in a PNG behind the pixels; broken EXIF data turn nothing. No sample fails by it."""
    COLOUR.save(tmp_path / "plain.jpg")
    COLOUR.save(tmp_path / "exif.jpg", exif=_exif(6))
    plain, data = opened(tmp_path / "plain.jpg")[1], (tmp_path / "exif.jpg").read_bytes()
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x/>"
    (tmp_path / "behind.jpg").write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + data[2:])
    COLOUR.save(tmp_path / "broken.jpg", exif=b"Exif\0\0nothing of use")
    rows = np.array(COLOUR).reshape(32, -1)
    (tmp_path / "late.png").write_bytes(png(8, 2, rows, late=[(b"eXIf", _exif(6)[6:])]))
    COLOUR.save(tmp_path / "xmp.jpg", xmp=(XMP % 6).encode())
    COLOUR.save(tmp_path / "turned.tiff", exif=_exif(6))

    np.testing.assert_array_equal(opened(tmp_path / "behind.jpg")[1], np.rot90(plain, -1))
    np.testing.assert_array_equal(opened(tmp_path / "broken.jpg")[1], plain)
    np.testing.assert_array_equal(opened(tmp_path / "late.png")[1], np.rot90(COLOUR, -1))
    names = ["behind.jpg", "broken.jpg", "late.png", "xmp.jpg", "turned.tiff"]
    renderer.encode({"text": "<image>" * len(names), "images": names}, in_folder(tmp_path), "here:1", kind="pretrain")


HIGH = SHADES.astype(np.uint16) * 256 + (255 - SHADES)  # of 16 bits, the lower 8 of which differ from the upper ones
DEEP = {
    "16-bit.png": lambda path: Image.fromarray(HIGH).save(path),
    "16-bit.tiff": lambda path: Image.fromarray(HIGH).save(path),
    "16-bit-lzw.tiff": lambda path: Image.fromarray(HIGH).save(path, compression="tiff_lzw"),
    "16-bit-big-endian.tiff": lambda path: Image.fromarray(HIGH.astype(">u2")).save(path),
    "16-bit-white-is-0.tiff": lambda path: Image.fromarray(65535 - HIGH).save(path, tiffinfo={262: 0}),
    "16-bit.jp2": lambda path: Image.fromarray(HIGH).save(path),
    "16-bit.pgm": lambda path: Image.fromarray(HIGH.astype(np.int32)).save(path),
    "8-bit-values-in-16.png": lambda path: Image.fromarray(SHADES.astype(np.uint16)).save(path),
    "8-bit-values-in-32.tiff": lambda path: Image.fromarray(SHADES.astype(np.int32)).save(path),
    "float-to-1.tiff": lambda path: Image.fromarray(SHADES / np.float32(255)).save(path),
    "float-to-255.tiff": lambda path: Image.fromarray(SHADES.astype(np.float32)).save(path),
    "float-to-255.spider": lambda path: Image.fromarray(SHADES.astype(np.float32)).save(path, "SPIDER"),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_become_the_shades_of_8_bits_not_one_colour(name, tmp_path):
    DEEP[name](tmp_path / name)
    np.testing.assert_array_equal(opened(tmp_path / name)[1], np.array(GREY.convert("RGB")))


def test_one_transparent_colour_at_depths_that_pillow_does_not_write(tmp_path):
    """The colour is given at the depth of the file, the pixels are 8-bit: 4-bit gray, 16-bit gray and 16-bit RGB."""
    four = SHADES // 17
    key = int(four[3, 4])
    (tmp_path / "4.png").write_bytes(png(4, 0, four[:, ::2] << 4 | four[:, 1::2], (b"tRNS", struct.pack(">H", key))))
    expected = np.where(four == key, 255, four * 17)
    np.testing.assert_array_equal(opened(tmp_path / "4.png")[1], np.stack([expected] * 3, -1))

    key = int(HIGH[3, 4])
    (tmp_path / "16.png").write_bytes(png(16, 0, HIGH.astype(">u2"), (b"tRNS", struct.pack(">H", key))))
    expected = np.where(key == HIGH, 255, SHADES)
    np.testing.assert_array_equal(opened(tmp_path / "16.png")[1], np.stack([expected] * 3, -1))

    colours = np.array(COLOUR).astype(">u2") * 256 + 7  # the lower 8 bits differ from the upper ones
    key = colours[3, 4]
    (tmp_path / "48.png").write_bytes(
        png(16, 2, colours.reshape(32, -1).astype(">u2"), (b"tRNS", key.astype(">u2").tobytes()))
    )
    is_clear = (colours == key).all(-1, keepdims=True)
    np.testing.assert_array_equal(opened(tmp_path / "48.png")[1], np.where(is_clear, 255, np.array(COLOUR)))


def _saved(values: np.ndarray, suffix: str):
    return lambda path: Image.fromarray(values).save(path, suffix)


UNREADABLE = {
    "of 32 bits": (
        _saved(HIGH.astype(np.int32), "tiff"),
        r"32-bit numbers from \d+ to \d+.*save them with 8",
    ),
    "negative": (_saved(SHADES.astype(np.int32) - 99, "tiff"), "signed or 32-bit numbers from -"),
    "float": (_saved(SHADES * np.float32(9), "tiff"), "floats from"),
    "float of hardly any shades": (_saved(SHADES / np.float32(30), "tiff"), "floats from"),
    "not a number": (
        _saved(np.where(SHADES > 99, np.nan, SHADES).astype(np.float32), "tiff"),
        "from nan to nan",
    ),
    "12 bits in 16": (_saved(SHADES.astype(np.uint16) * 16, "png"), "16-bit numbers from"),
    "folder": (lambda path: path.mkdir(), "directory"),
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "web page": (lambda path: path.write_text("<html>Not found</html>"), "it is neither a picture"),
    "no pixels": (
        lambda path: path.write_bytes(png(8, 0, SHADES, size=(0, 32))),
        "it is neither a picture",
    ),
    "PostScript": (lambda path: COLOUR.save(path, "eps"), "PostScript"),
    "PDF": (lambda path: COLOUR.save(path, "pdf"), "it is neither a picture"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_picture_is_refused_by_name(kind, tmp_path):
    write, said = UNREADABLE[kind]
    write(tmp_path / "picture")
    with pytest.raises(UserError, match=f"here:1: picture .*/picture cannot be read: .*{said}"):
        opened(tmp_path / "picture")


@pytest.mark.parametrize("suffix", ["jpg", "progressive.jpg", "png", "webp", "gif", "tiff", "bmp", "jp2", *AVIF])
def test_a_truncated_file_is_refused_by_name(suffix, tmp_path):
    COLOUR.save(tmp_path / f"whole.{suffix}", **{"progressive": True} if suffix.startswith("progressive") else {})
    data = (tmp_path / f"whole.{suffix}").read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for kept in (len(data) * 3 // 4, 20, 3):
        path.write_bytes(data[:kept])
        with pytest.raises(UserError, match=rf"here:1: picture .*/cut\.{suffix} cannot be read: \w"):
            Picture(File(str(path)), "here:1").pixels()


def test_large_pictures_are_a_matter_of_a_setting(tmp_path, make_renderer):
    """A header of 200 million pixels is enough; Pillow's own limit says that it is an attack."""
    (tmp_path / "large.png").write_bytes(png(8, 0, SHADES, size=(20_000, 10_000)))
    COLOUR.save(tmp_path / "small.png")
    place = make_renderer().vision.place_picture
    assert place(Picture(File(str(tmp_path / "large.png")), "here:1")).size == (10_000, 20_000)

    exact, less = (make_renderer(max_image_megapixels=most) for most in (0.001536, 0.0015))
    picture, video = {"text": "<image>", "images": ["small.png"]}, {"text": "<video>", "videos": [["small.png"] * 2]}
    for record, what in ((picture, "picture"), (video, "video")):
        exact.draft(record, in_folder(tmp_path), "here:1", kind="pretrain")
        with pytest.raises(UserError, match=rf"{what} .*small\.png.* 48 x 32 .* data\.max_image_megapixels = 0\.0015"):
            less.draft(record, in_folder(tmp_path), "here:1", kind="pretrain")


def test_long_texts_in_a_png_do_not_matter(tmp_path):
    texts = PngImagePlugin.PngInfo()
    for n in range(3):
        texts.add_text(f"settings {n}", "x" * 3_000_000, zip=True)
    COLOUR.save(tmp_path / "texts.png", pnginfo=texts)
    np.testing.assert_array_equal(opened(tmp_path / "texts.png")[1], np.array(COLOUR))


def test_the_size_of_a_png_costs_no_decoding(tmp_path, monkeypatch):
    COLOUR.save(tmp_path / "plain.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: pytest.fail("the pixels were decoded"))
    assert Picture(File(str(tmp_path / "plain.png")), "here:1").size() == (32, 48)


def test_a_box_on_a_turned_tiff_counts_the_pixels_that_a_viewer_shows(tmp_path, renderer):
    COLOUR.resize((124, 128)).save(tmp_path / "turned.tiff", exif=_exif(6))  # shown 128 wide and 124 high
    record = {
        "messages": [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "<box>"}],
        "images": ["turned.tiff"],
        "boxes": [[0, 0, 128, 124]],
    }
    draft = renderer.draft(record, in_folder(tmp_path), "here:1", kind="tune")
    assert "[0, 0, 1000, 1000]" in renderer.tokenizer.decode(draft.token_ids)
