"""Images in an .npz, read one by one: 50,000 of them never lie in memory.

Keys `arr_0` or `images` (uint8 [N, H, W, 3]), and `arr_1` or `labels` (integers [N]) where they are
there, as ADM's and DiT's samplers write them. The declared size is checked before anything is
read, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import io
import math
import struct
import threading
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from terdit_cli.data.decode import MAX_PIXELS
from terdit_cli.data.image_set import ImageSet, numbered
from terdit_cli.data.sources.zips import ZIP_ERRORS
from terdit_cli.errors import InputFileError
from terdit_cli.system.memory import parsing

IMAGE_KEYS, LABEL_KEYS = ("arr_0", "images"), ("arr_1", "labels")
_MAX_HEADER = 1 << 16  # bytes of an array's header; numpy itself takes 10,000
_DEFLATE_RATIO = 1033  # deflate packs no tighter: a larger size is a lie
_BROKEN = (*ZIP_ERRORS, TypeError, tokenize.TokenError)


class NpzImages:
    """N images of one size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = {member.filename: member for member in archive.infolist()}
                key = next((key for key in map(_member, IMAGE_KEYS) if key in members), None)
                if key is None:
                    raise self._bad(f"keys {', '.join(sorted(members)[:5]) or 'none'}")
                shape, fortran_order, dtype, header = _read_header(archive, members[key])
                if dtype.hasobject:
                    raise self._bad("pickled objects, which are never loaded")
        except _BROKEN as error:
            raise self._bad(str(error) or type(error).__name__) from error
        if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
            layout = " in Fortran order" if fortran_order else ""
            raise self._bad(f"{dtype} {list(shape)}{layout}")
        self.count, self.height, self.width = shape[:3]
        if self.height * self.width > MAX_PIXELS:
            raise self._bad(f"images of {shape[1]} x {shape[2]} pixels, over {MAX_PIXELS}")
        self._member = member = members[key]
        self._stored = member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1
        self._check_packed(member)
        if member.file_size != len(header) + math.prod(shape):
            raise self._bad(f"{member.file_size - len(header)} bytes for shape {list(shape)}")
        self._start = len(header)  # of the images in the member
        self._crc, self._checked = zlib.crc32(header), 0  # of that many images so far
        self._stream: IO[bytes] | None = None
        self._lock = threading.Lock()
        labels = next((key for key in map(_member, LABEL_KEYS) if key in members), None)
        self.labels = None if labels is None else self._read_labels(members[labels])

    def _check_packed(self, member: zipfile.ZipInfo) -> None:
        """Refuse a member that declares more bytes than the file can hold."""
        packed = min(member.compress_size, self.path.stat().st_size)
        stored = member.compress_type == zipfile.ZIP_STORED
        if member.file_size > packed * (1 if stored else _DEFLATE_RATIO):
            raise self._bad(f"{member.file_size} bytes packed into {packed}")

    def _read_labels(self, member: zipfile.ZipInfo) -> NDArray[np.int64]:
        self._check_packed(member)
        try:
            with zipfile.ZipFile(self.path) as archive:
                shape, _, dtype, header = _read_header(archive, member)
                if dtype.kind not in "iu" or shape != (self.count,):
                    raise self._bad(f"labels {dtype} {list(shape)} for {self.count} images")
                size = self.count * dtype.itemsize
                if member.file_size != len(header) + size:
                    got = f"{member.file_size - len(header)} bytes for {self.count} labels {dtype}"
                    raise self._bad(got)
                with archive.open(member) as stream:
                    stream.seek(len(header))
                    content = stream.read(size)
        except _BROKEN as error:
            raise self._bad(str(error) or type(error).__name__) from error
        return np.frombuffer(content, dtype=dtype, count=self.count).astype(np.int64)

    @property
    def is_compressed(self) -> bool:
        """Whether reading image i means unpacking all before it."""
        return not self._stored

    def sha256(self) -> str:
        """Return a hash of the shape and of the checksum that the archive holds of the pixels."""
        facts = f"{self.count}x{self.height}x{self.width} {self._member.CRC:08x}"
        return hashlib.sha256(facts.encode()).hexdigest()

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return image `index`, uint8 [H, W, 3]; of a compressed file quickest in ascending order.

        The archive's checksum is compared once all images were read in order. Safe to call from
        several threads.

        Raises:
            InputFileError: the file is damaged or ends too early.
        """
        with self._lock:
            return self._read(index)

    def _read(self, index: int) -> NDArray[np.uint8]:
        size = self.height * self.width * 3
        try:
            if self._stream is None:
                self._stream = self._open()
            self._stream.seek(self._start + index * size)
            content = self._stream.read(size)
        except _BROKEN as error:
            raise self._bad(str(error) or type(error).__name__) from error
        if len(content) != size:
            raise self._bad(f"the end of the file in image {index} of {self.count}")
        if index == self._checked:
            self._crc = zlib.crc32(content, self._crc)
            self._checked += 1
            if self._checked == self.count and self._crc != self._member.CRC:
                raise self._bad("pixels with another checksum than was stored")
        return np.frombuffer(content, dtype=np.uint8).reshape(self.height, self.width, 3)

    def _open(self) -> IO[bytes]:
        """Open the images' member for seeking and reading.

        Of a stored one the bytes in the archive: zipfile seeks by reading, up to Python 3.11.
        """
        if not self._stored:
            return zipfile.ZipFile(self.path).open(self._member)
        return _Stored(self.path, self._member.header_offset)

    def _bad(self, got: str) -> InputFileError:
        return InputFileError(
            "cannot read images from the .npz",
            got=got,
            expected="a uint8 array [N, H, W, 3] under the key arr_0 or images",
            where=self.path,
            fix="save them with numpy.savez(path, images)",
        )


class _Stored(io.BufferedReader):
    """The content of a stored member of an archive, from its place 0 on."""

    def __init__(self, path: Path, header_offset: int) -> None:
        super().__init__(io.FileIO(path))
        super().seek(header_offset)
        name, extra = struct.unpack("<26xHH", super().read(30))  # a local file header's lengths
        self._content = header_offset + 30 + name + extra

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return super().seek(self._content + offset, whence)


def _member(key: str) -> str:
    return f"{key}.npy"


def _read_header(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> tuple[tuple[int, ...], bool, np.dtype, bytes]:
    """Return the shape, order and type that an array declares, and the bytes that do so."""
    with archive.open(member) as stream:
        content = io.BytesIO(stream.read(_MAX_HEADER))
    version = np.lib.format.read_magic(content)
    with parsing():
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(content)
        elif version == (2, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(content)
        else:
            raise ValueError(f"npy format version {version}")
    return shape, fortran_order, dtype, content.getvalue()[: content.tell()]


def open_npz(path: Path, with_classes: bool) -> ImageSet:
    """Open the images of an .npz; its classes are its labels.

    Raises:
        InputFileError: not such a file, or no labels where classes are needed.
    """
    if not path.is_file():
        got = "a folder" if path.is_dir() else "nothing there"
        raise InputFileError(".npz not found", got=got, where=path, fix="check the path")
    images = NpzImages(path)
    class_names: list[str] = []
    classes = None
    if images.labels is not None:
        class_names, classes = numbered(images.labels)
    elif with_classes:
        raise InputFileError(
            "no training images with classes",
            got="an .npz without labels",
            expected=f"integers [{images.count}] under {' or '.join(LABEL_KEYS)}",
            where=path,
            fix="save them with numpy.savez(path, images, labels)",
        )

    def fingerprint(index: int) -> str:
        return f"{index} {images.sha256()}"

    return ImageSet(
        str(path),
        [f"{path.name} image {index}" for index in range(images.count)],
        lambda index: (Image.fromarray(images.read(index)), "RGB"),
        fingerprint,
        class_names,
        classes,
        sequential=images.is_compressed,
    )
