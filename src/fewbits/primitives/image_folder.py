"""Images as square arrays of one size, read batch by batch from files or from an array.

Files are found in a folder with a folder per class, or named by a list of paths with 0/1 labels.
Pillow reads them. No paper names in here.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Files in a folder that count as images."""
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
"""Pillow's modes with up to 8 bits a channel."""


@dataclass(frozen=True)
class ImageFiles:
    """Images in files, none of which is open.

    Attributes
    ----------
    paths : of the files; row i of everything is `paths[i]`.
    labels : (n,) int64 class of each, (n, c) uint8 indicators of c classes, or None.
    names : of the classes, where they have names.
    """

    paths: tuple[Path, ...]
    labels: np.ndarray | None = None
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, rows: np.ndarray, side: int) -> np.ndarray:
        """(b, side, side, 3) uint8 of these rows; see `square`.

        Raises
        ------
        ValueError
            A file that is no image, is damaged, or has more than 8 bits a channel.
        """
        with ThreadPoolExecutor() as pool:
            return np.stack(list(pool.map(lambda row: read_file(self.paths[row], side), rows)))

    def digest(self) -> str:
        """SHA-256 of the paths: what tells these images from others, without reading them."""
        return hashlib.sha256("\0".join(map(str, self.paths)).encode()).hexdigest()


@dataclass(frozen=True)
class ImageTable:
    """Images (n, h, w, 3) or grey (n, h, w), uint8, in one array, which may be mapped."""

    images: np.ndarray

    def __post_init__(self) -> None:
        shape, dtype = self.images.shape, self.images.dtype
        if dtype != np.uint8:
            raise ValueError(f"images are uint8 from 0 to 255, not {dtype}; convert them")
        if not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
            raise ValueError(f"images are (n, height, width, 3) or (n, height, width), not {shape}")
        if 0 in shape:
            raise ValueError(f"there are no images in an array of shape {shape}")

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: np.ndarray, side: int) -> np.ndarray:
        """(b, side, side, 3) uint8 of these rows; see `square`."""
        image: Any = pillow()
        chosen = self.images[rows]
        if chosen.shape[1:3] != (side, side):
            chosen = np.stack([square(image.fromarray(one), side) for one in chosen])
        return chosen if chosen.ndim == 4 else np.repeat(chosen[..., None], 3, axis=3)

    def digest(self) -> str:
        """SHA-256 of the images."""
        result = hashlib.sha256(str(self.images.shape).encode())
        for image in self.images:
            result.update(np.ascontiguousarray(image).data)
        return result.hexdigest()


# -- finding files -------------------------------------------------------------------------


def image_folder(folder: str | Path) -> ImageFiles:
    """All images in a folder: of the classes that its folders are, or without labels.

    A class has the name of a folder directly in `folder`, and all images in and below that. Where
    there are no such folders, the images directly in `folder` are taken, which then have no
    labels. Names that begin with a dot are left out, and so are files with other endings than
    `ENDINGS`. Sorted by class, then by path.

    Raises
    ------
    ValueError
        No such folder, no images, or images both beside and within folders.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one that holds a folder per class")
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    direct = [path for path in inside if is_image(path)]
    classes = {path.name: images_below(path) for path in inside if path.is_dir()}
    classes = {name: paths for name, paths in classes.items() if paths}
    if direct and classes:
        raise ValueError(
            f"{folder} has images beside its folders ({direct[0].name}); move each into a class"
        )
    if direct:
        return ImageFiles(tuple(direct))
    if not classes:
        raise ValueError(f"{folder} holds no images; they end in {', '.join(ENDINGS)}")
    counts = [len(paths) for paths in classes.values()]
    labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    files = tuple(path for paths in classes.values() for path in paths)
    return ImageFiles(files, labels, tuple(classes))


def is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and path.is_file()


def images_below(folder: Path) -> list[Path]:
    """Sorted paths of all images in and below a folder, hidden ones left out."""
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(where) / name for name in files if not name.startswith(".")]
        found += [path for path in paths if is_image(path)]
    return sorted(found)


def image_list(path: str | Path, root: str | Path | None = None) -> ImageFiles:
    """The images that the lines of a text file name: ``path l1 l2 …``, each label 0 or 1.

    Parameters
    ----------
    path : a UTF-8 text file. Paths in it have no spaces; empty lines are skipped.
    root : folder that paths begin from; that of the text file by default.

    Returns
    -------
    `ImageFiles` whose labels are (n, c) uint8. Where every line has exactly one 1 they may be
    given as classes: ``labels.argmax(axis=1)``.

    Raises
    ------
    ValueError
        Not a text file, no lines, a label other than 0 and 1, lines of different lengths, or a
        file that is not there.
    """
    path = Path(path)
    folder = path.parent if root is None else Path(root)
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: it must be a text file ({error})") from None
    pieces = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
    if not pieces:
        raise ValueError(f"{path} has no lines; each is: path label label …")
    width = len(pieces[0][1])
    for number, words in pieces:
        if len(words) < 2 or len(words) != width:
            raise ValueError(
                f"{path}, line {number}: a path and {max(width - 1, 1)} labels are needed, "
                f"but there are {len(words) - 1}"
            )
        if not set(words[1:]) <= {"0", "1"}:
            wrong = next(word for word in words[1:] if word not in ("0", "1"))
            raise ValueError(f"{path}, line {number}: label {wrong!r} is not 0 or 1")
        if not (folder / words[0]).is_file():
            raise ValueError(f"{path}, line {number}: there is no file {folder / words[0]}")
    labels = np.array([words[1:] for _, words in pieces]).astype(np.uint8)
    return ImageFiles(tuple(folder / words[0] for _, words in pieces), labels)


# -- reading files -------------------------------------------------------------------------


def read_file(path: Path, side: int) -> np.ndarray:
    """(side, side, 3) uint8 of the image in a file, turned as its camera says."""
    image: Any = pillow()
    from PIL import ImageOps

    try:
        with image.open(path) as opened:
            if opened.mode not in MODES:
                raise ValueError(f"mode {opened.mode} has more than 8 bits; convert it first")
            # A large JPEG is decoded at the least sufficient eighths of its size.
            opened.draft("RGB", (side, side))
            return square(ImageOps.exif_transpose(opened), side)
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read as an image ({reason})") from None


def square(image: Any, side: int) -> np.ndarray:
    """(side, side, 3) uint8: the centre square of an image, scaled with smoothing."""
    from PIL import ImageOps

    fitted = ImageOps.fit(image.convert("RGB"), (side, side), method=pillow().Resampling.BILINEAR)
    return np.asarray(fitted)


def pillow() -> Any:
    from PIL import Image

    return Image
