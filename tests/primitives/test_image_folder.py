import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewbits.primitives.image_folder import (
    ImageFiles,
    ImageTable,
    image_folder,
    image_list,
    square,
)


def picture(seed: int = 0, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def write(path: Path, pixels: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture() if pixels is None else pixels).save(path)
    return path


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    for number, name in enumerate(("cat/b.png", "cat/deep/a.PNG", "ant/z.bmp", "dog/x.jpg")):
        write(tmp_path / name, picture(number))
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    write(tmp_path / "dog" / ".hidden.png")
    write(tmp_path / ".cache" / "x.png")
    (tmp_path / "empty").mkdir()
    return tmp_path


# -- folders -------------------------------------------------------------------------------


def test_folders_are_classes_in_the_order_of_their_names(animals: Path) -> None:
    files = image_folder(animals)
    assert files.names == ("ant", "cat", "dog")
    found = [str(path.relative_to(animals)) for path in files.paths]
    assert found == ["ant/z.bmp", "cat/b.png", "cat/deep/a.PNG", "dog/x.jpg"]
    assert files.labels is not None
    assert files.labels.tolist() == [0, 1, 1, 2]
    assert len(files) == 4


def test_a_folder_of_images_has_no_labels(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        write(tmp_path / name)
    files = image_folder(str(tmp_path))
    assert [path.name for path in files.paths] == ["a.png", "b.png"]
    assert files.labels is None


def test_unusable_folders_are_refused(animals: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        image_folder(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no images"):
        image_folder(animals / "empty")
    write(animals / "beside.png")
    with pytest.raises(ValueError, match=r"beside its folders \(beside.png\)"):
        image_folder(animals)


# -- lists ---------------------------------------------------------------------------------


def test_a_list_names_images_and_their_labels(animals: Path) -> None:
    path = animals / "train.txt"
    path.write_text("cat/b.png 1 0 1\n\ndog/x.jpg 0 1 0\n")
    files = image_list(path)
    assert files.labels is not None
    assert files.labels.dtype == np.uint8
    assert files.labels.tolist() == [[1, 0, 1], [0, 1, 0]]
    assert files.paths == (animals / "cat/b.png", animals / "dog/x.jpg")
    path.write_text("b.png 1 0\n")
    assert image_list(path, animals / "cat").paths == (animals / "cat/b.png",)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "has no lines"),
        ("cat/b.png\n", "line 1: a path and 1 labels are needed, but there are 0"),
        ("cat/b.png 1 0\ndog/x.jpg 1\n", "line 2: a path and 2 labels are needed"),
        ("cat/b.png 1 2\n", "line 1: label '2' is not 0 or 1"),
        ("my cat.png 1\n", "label 'cat.png' is not 0 or 1"),
        ("cat/none.png 1\n", "line 1: there is no file"),
    ],
)
def test_unusable_lists_are_refused(animals: Path, text: str, complaint: str) -> None:
    (animals / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        image_list(animals / "list.txt")


def test_what_is_no_text_is_refused(animals: Path) -> None:
    for path in (animals / "cat/b.png", animals / "missing.txt", animals):
        with pytest.raises(ValueError, match="must be a text file"):
            image_list(path)


# -- pixels --------------------------------------------------------------------------------


def test_files_and_arrays_give_the_same_squares(tmp_path: Path) -> None:
    images = np.stack([picture(seed) for seed in range(5)])
    paths = tuple(write(tmp_path / f"{n}.png", image) for n, image in enumerate(images))
    rows = np.array([3, 0, 4])
    from_files = ImageFiles(paths).read(rows, 20)
    assert from_files.shape == (3, 20, 20, 3)
    assert from_files.dtype == np.uint8
    assert (from_files == ImageTable(images).read(rows, 20)).all()
    # Half the height is 20: the middle 40 of 60 columns, each pixel near the mean of four.
    middle = images[3][:, 10:50].reshape(20, 2, 20, 2, 3).mean(axis=(1, 3))
    assert np.abs(from_files[0] - middle).mean() < 20
    assert np.corrcoef(from_files[0].ravel(), middle.ravel())[0, 1] > 0.85


def test_images_of_the_right_size_are_taken_as_they_are() -> None:
    images = np.stack([picture(seed, 32, 32) for seed in range(4)])
    assert (ImageTable(images).read(np.array([2, 1]), 32) == images[[2, 1]]).all()
    assert (square(Image.fromarray(images[0]), 32) == images[0]).all()
    grey = images[..., 0]
    found = ImageTable(grey).read(np.array([3]), 32)
    assert (found == grey[[3], :, :, None]).all()
    assert found.shape == (1, 32, 32, 3)
    assert ImageTable(grey).read(np.array([0, 1]), 16).shape == (2, 16, 16, 3)


def test_every_usual_kind_of_file_is_read(tmp_path: Path) -> None:
    pixels = picture()
    image = Image.fromarray(pixels)
    kinds = {"1.png": "1", "l.png": "L", "la.png": "LA", "p.gif": "P", "rgba.png": "RGBA"}
    kinds |= {"cmyk.tif": "CMYK", "l.jpg": "L", "rgb.webp": "RGB"}
    for name, mode in kinds.items():
        image.convert(mode).save(tmp_path / name)
    files = ImageFiles(tuple(tmp_path / name for name in kinds))
    assert files.read(np.arange(len(kinds)), 24).shape == (len(kinds), 24, 24, 3)


def test_photographs_are_turned_as_the_camera_says(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # half a turn
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    found = ImageFiles((tmp_path / "turned.png",)).read(np.array([0]), 32)[0]
    assert (found == pixels[::-1]).all()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.png").read_bytes()
    (tmp_path / "short.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("hello")
    Image.fromarray(np.full((40, 40), 30000, dtype=np.uint16)).save(tmp_path / "deep.png")
    for name in ("short.png", "text.png", "deep.png", "gone.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image"):
            ImageFiles((tmp_path / name,)).read(np.array([0]), 32)


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"large\.png cannot be read as an image"):
        ImageFiles((path,)).read(np.array([0]), 32)


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        (np.zeros((3, 32, 32, 3), np.float32), "are uint8 from 0 to 255, not float32"),
        (np.zeros((32, 32), np.uint8), "are \\(n, height, width, 3\\)"),
        (np.zeros((3, 3, 32, 32), np.uint8), "are \\(n, height, width, 3\\)"),
        (np.zeros((0, 32, 32, 3), np.uint8), "no images"),
        (np.zeros((3, 0, 32), np.uint8), "no images"),
    ],
)
def test_arrays_that_are_no_images_are_refused(images: np.ndarray, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ImageTable(images)


def test_digests_tell_images_apart(tmp_path: Path) -> None:
    images = np.stack([picture(seed) for seed in range(3)])
    same, other = ImageTable(images.copy()), images.copy()
    other[2, 1, 1, 0] ^= 1
    assert ImageTable(images).digest() == same.digest() != ImageTable(other).digest()
    files = [ImageFiles((tmp_path / name,)).digest() for name in ("a.png", "b.png")]
    assert files[0] != files[1]
    assert os.fspath(tmp_path) not in files[0]
