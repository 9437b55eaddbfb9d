"""Pictures that are part of the scikit-image and scikit-learn packages, with captions.

They are read from the installed packages and never downloaded. The larger pictures that scikit-image can download are
not used.
"""

from importlib.resources import files

from PIL import Image

SKIMAGE, SKLEARN = "skimage.data", "sklearn.datasets.images"

# name -> (package, file, captions)
PHOTOGRAPHS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "astronaut": (SKIMAGE, "astronaut.png", (
        "A smiling astronaut in an orange suit in front of a flag and a model of the space shuttle.",
        "Portrait of a woman in an orange space suit with her white helmet beside her.",
    )),
    "bricks": (SKIMAGE, "brick.png", (
        "A wall of long grey bricks, seen from the front.",
        "Grey bricks with light joints in a regular pattern.",
    )),
    "cameraman": (SKIMAGE, "camera.png", (
        "A man in a dark coat looks through a camera on a tripod.",
        "Black and white photograph of a cameraman on a lawn with towers behind him.",
    )),
    "cell": (SKIMAGE, "cell.png", (
        "A single bright cell with a dark rim under the microscope.",
        "A round cell on a grey background.",
    )),
    "cat": (SKIMAGE, "chelsea.png", (
        "The face of a ginger tabby cat with green eyes.",
        "A cat with brown stripes and white whiskers looks past the camera.",
    )),
    "coffee": (SKIMAGE, "coffee.png", (
        "A cup of coffee on a red saucer with a spoon, on a wooden table.",
        "An espresso in a white and red cup.",
    )),
    "coins": (SKIMAGE, "coins.png", (
        "Twenty-four old coins in four rows on a dark ground.",
        "Rows of round Greek coins.",
    )),
    "colour wheel": (SKIMAGE, "color.png", (
        "A wheel of all colours on black: red at the top, green at the left and blue at the right.",
        "A disc of rainbow colours with a white centre.",
    )),
    "grass": (SKIMAGE, "grass.png", (
        "Blades of grass from above, in grey.",
        "A lawn seen from close by.",
    )),
    "gravel": (SKIMAGE, "gravel.png", (
        "Small stones of a gravel path, in grey.",
        "Gravel seen from above.",
    )),
    "horse": (SKIMAGE, "horse.png", (
        "The black outline of a standing horse on white.",
        "Silhouette of a horse that looks to the right.",
    )),
    "galaxies": (SKIMAGE, "hubble_deep_field.jpg", (
        "Many small and distant galaxies on a black sky.",
        "A deep view of space with thousands of galaxies.",
    )),
    "tissue": (SKIMAGE, "ihc.png", (
        "Stained tissue under the microscope: brown glands and blue nuclei.",
        "A microscope picture of cells, stained brown and blue.",
    )),
    "moon": (SKIMAGE, "moon.png", (
        "The surface of the moon with craters and hills.",
        "Grey craters on the moon.",
    )),
    "motorcycle": (SKIMAGE, "motorcycle_left.png", (
        "A red motorcycle in a garage with shelves behind it.",
        "A motorcycle with a black seat parked indoors.",
    )),
    "page": (SKIMAGE, "page.png", (
        "A printed page of a book about the segmentation of pictures.",
        "A page of text with uneven light.",
    )),
    "retina": (SKIMAGE, "retina.jpg", (
        "The red retina of an eye with its blood vessels.",
        "Photograph of the back of an eye.",
    )),
    "rocket": (SKIMAGE, "rocket.jpg", (
        "A rocket on its launch pad between tall towers at dusk.",
        "A lit rocket before the start, under a blue evening sky.",
    )),
    "handwriting": (SKIMAGE, "text.png", (
        "Handwritten formulas on a sheet of lined paper, seen at an angle.",
        "Letters and formulas in black ink.",
    )),
    "pavilion": (SKLEARN, "china.jpg", (
        "A Chinese tower with three green and red roofs above a lake, under a blue sky.",
        "An old pavilion among trees beside the water.",
    )),
    "flower": (SKLEARN, "flower.jpg", (
        "An orange dahlia in full bloom before dark green leaves.",
        "A large round flower with many petals.",
    )),
}  # fmt: skip


def load_photograph(name: str, longest_edge: int) -> Image.Image:
    """The RGB photograph `name`, with its longer edge reduced to `longest_edge` pixels and a white background."""
    package, file, _ = PHOTOGRAPHS[name]
    with files(package).joinpath(file).open("rb") as stream:
        picture: Image.Image = Image.open(stream)
        picture.load()
    if picture.mode == "RGBA":
        ground = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(ground, picture)
    picture = picture.convert("RGB")
    picture.thumbnail((longest_edge, longest_edge), Image.Resampling.LANCZOS)
    return picture
