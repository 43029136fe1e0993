"""Images without labels, one after the other, for scoring: a folder tree, a zip or an .npz.

An .npz (key `arr_0` or `images`) is streamed image by image: 50,000 images never lie in memory,
and its declared size is checked before anything is read.

Shapes: N images, H and W pixels.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from terdit_cli.data.decode import MAX_PIXELS, decode_image, to_pixels
from terdit_cli.data.files import FolderFiles, ImageFiles, ZipFiles
from terdit_cli.errors import InputFileError

NPZ_KEYS = ("arr_0", "images")

NamedImage = tuple[str, NDArray[np.uint8]]


def count_images(path: Path) -> int:
    """Count the images in a folder tree, a zip or an .npz without decoding any.

    Raises:
        InputFileError: missing, empty, corrupt or of another kind.
    """
    if path.suffix.lower() == ".npz":
        return _npz_shape(path)[1][0]
    return len(_open_files(path).names)


def spread(total: int, n: int) -> list[int]:
    """Return `n` of `total` indices in order, one drawn from each of n equal stretches.

    So a set sorted by class keeps its classes in proportion, and so does one whose classes repeat
    with a period, where equal steps would hit one class only. Always the same for (total, n).
    """
    if n >= total:
        return list(range(total))
    bounds = [index * total // n for index in range(n + 1)]
    draws: list[int] = np.random.RandomState(0).randint(bounds[:-1], bounds[1:]).tolist()
    return draws


def read_images(
    path: Path, image_size: int | None = None, n: int | None = None
) -> Iterator[NamedImage]:
    """Iterate over (name, image uint8 [H, W, 3]) in a folder tree, a zip or an .npz.

    Files come in the order of their relative paths. `image_size` in pixels applies the training
    crop; None keeps each image's own size. `n` reads that many, evenly spread over the set.

    Raises:
        InputFileError: missing, empty, corrupt or of another kind (at the call); an unreadable
            image (when its turn comes).
    """
    if path.suffix.lower() == ".npz":
        return _iterate_npz(path, image_size, n, *_npz_shape(path))
    return _iterate_files(_open_files(path), image_size, n)


def _open_files(path: Path) -> ImageFiles:
    if not path.exists():
        raise InputFileError("images not found", where=path, fix="check the path")
    if path.is_dir():
        files: ImageFiles = FolderFiles(path)
    elif path.suffix.lower() == ".zip":
        files = ZipFiles(path)
    else:
        raise InputFileError(
            "not a collection of images",
            got=path.suffix or "a file without suffix",
            expected="a folder, .zip or .npz",
            where=path,
            fix="put the images into a folder or a zip",
        )
    if not files.names:
        raise InputFileError(
            "no images found",
            expected="JPEG, PNG, WebP, BMP, PPM or TIFF files",
            where=path,
            fix="give the folder or zip that holds the images",
        )
    return files


def _iterate_files(
    files: ImageFiles, image_size: int | None, n: int | None
) -> Iterator[NamedImage]:
    for index in spread(len(files.names), n or len(files.names)):
        name = files.names[index]
        yield name, to_pixels(decode_image(files.read(name), name), image_size)


def _npz_shape(path: Path) -> tuple[str, tuple[int, int, int]]:
    """Return (member, (N, H, W)) of the images in an .npz after checking type and size."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = set(archive.namelist())
            key = next((key for key in NPZ_KEYS if f"{key}.npy" in members), None)
            if key is None:
                raise _bad_npz(path, f"keys {', '.join(sorted(members)[:5]) or 'none'}")
            with archive.open(f"{key}.npy") as stream:
                shape, fortran_order, dtype = _npy_header(stream)
                header_bytes = stream.tell()
            declared = archive.getinfo(f"{key}.npy").file_size
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise _bad_npz(path, str(error) or type(error).__name__) from error
    if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        layout = " in Fortran order" if fortran_order else ""
        raise _bad_npz(path, f"{dtype} {list(shape)}{layout}")
    if shape[1] * shape[2] > MAX_PIXELS:
        raise _bad_npz(path, f"images of {shape[1]} x {shape[2]} pixels, over {MAX_PIXELS}")
    if declared != header_bytes + math.prod(shape):
        raise _bad_npz(path, f"{declared - header_bytes} bytes for shape {list(shape)}")
    return f"{key}.npy", (shape[0], shape[1], shape[2])


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"npy format version {version}")


def _iterate_npz(
    path: Path,
    image_size: int | None,
    n: int | None,
    member: str,
    shape: tuple[int, int, int],
) -> Iterator[NamedImage]:
    count, height, width = shape
    size = height * width * 3
    wanted = set(spread(count, n or count))
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
            _npy_header(stream)
            for index in range(count):
                values = stream.read(size)
                if len(values) != size:
                    raise _bad_npz(path, f"the end of the file in image {index} of {count}")
                if index not in wanted:
                    continue
                pixels = np.frombuffer(values, dtype=np.uint8).reshape(height, width, 3)
                name = f"{path.name}[{index}]"
                yield name, to_pixels(Image.fromarray(pixels), image_size)
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise _bad_npz(path, str(error) or type(error).__name__) from error


def _bad_npz(path: Path, got: str) -> InputFileError:
    return InputFileError(
        "cannot read images from the .npz",
        got=got,
        expected="a uint8 array [N, H, W, 3] under the key arr_0 or images",
        where=path,
        fix="save them with numpy.savez(path, images)",
    )
