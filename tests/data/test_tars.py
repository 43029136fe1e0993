"""Images in tar shards: patterns, order, classes, and tars made to do harm."""

from __future__ import annotations

import io
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from terdit_cli.data import patterns
from terdit_cli.data.patterns import is_pattern
from terdit_cli.data.sources import tars
from terdit_cli.data.sources.tars import TarFiles, match_shards, shards_in
from terdit_cli.errors import InputFileError, UsageError


def png(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def entry(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, content


def tar_bytes(*entries: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for member, content in entries:
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write(path: Path, *entries: tuple[tarfile.TarInfo, bytes], form: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(*entries, form=form))
    return path


def test_members_keep_the_order_of_the_shards(tmp_path: Path) -> None:
    write(tmp_path / "b.tar", entry("z.png", png(1)), entry("a.png", png(2)))
    write(tmp_path / "a.tar", entry("z.png", png(3)), entry("dir/", type=tarfile.DIRTYPE))
    (tmp_path / "._a.tar").write_bytes(b"x")
    (tmp_path / "c.tar").mkdir()
    shards = shards_in(tmp_path)
    assert [shard.name for shard in shards] == ["a.tar", "b.tar"]
    files = TarFiles(shards)
    assert files.names == ["a.tar/z.png", "b.tar/z.png", "b.tar/a.png"]
    assert files.members == ["z.png", "z.png", "a.png"]
    assert [files.read(name) for name in files.names] == [png(3), png(1), png(2)]
    assert files.labels is None
    assert match_shards(str(tmp_path / "b.tar")) == [tmp_path / "b.tar"]
    assert TarFiles([]).names == []


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_forms_of_tar_and_long_names(form: int, tmp_path: Path) -> None:
    names = ["./a.png", "/absolute//b.png", "d" * 90 + "/" + "e" * 90 + ".png", "n01/\u00e9.png"]
    path = write(tmp_path / "x.tar", *(entry(name, png()) for name in names), form=form)
    files = TarFiles([path])
    assert files.members == ["a.png", "absolute/b.png", names[2], names[3]]
    assert all(files.read(name) == png() for name in files.names)


def test_the_last_of_equal_names_counts(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.tar",
        *(entry(name, png(seed)) for seed, name in enumerate(["a.png", "b.png", "a.png"])),
    )
    files = TarFiles([path])
    assert files.members == ["a.png", "b.png"]
    assert files.read("x.tar/a.png") == png(2)


def test_shards_of_one_name_in_two_folders(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write(tmp_path / folder / "s.tar", entry("a.png", folder.encode()))
    files = TarFiles(match_shards(f"{tmp_path}/*/s.tar"))
    assert files.names == ["one/s.tar/a.png", "two/s.tar/a.png"]
    assert [files.read(name) for name in files.names] == [b"one", b"two"]


def test_hidden_members_and_names_that_lead_out_do_not_count(tmp_path: Path) -> None:
    names = ["../up.png", "a/../../b.png", ".git/c.png", "__MACOSX/d.png", "a/._e.png", "f.txt"]
    path = write(tmp_path / "x.tar", *(entry(name, png()) for name in [*names, "good.png"]))
    assert TarFiles([path]).members == ["good.png"]


def test_links_and_devices_are_images_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    kinds = {
        "hard.png": tarfile.LNKTYPE,
        "soft.png": tarfile.SYMTYPE,
        "pipe.png": tarfile.FIFOTYPE,
        "device.png": tarfile.CHRTYPE,
    }
    path = write(
        tmp_path / "x.tar",
        *(entry(name, type=kind, linkname="secret.png") for name, kind in kinds.items()),
    )
    files = TarFiles([path])
    assert files.members == list(kinds)
    for name in files.names:
        files.fingerprint(name)
        with pytest.raises(InputFileError, match=f"no regular file.*{name}"):
            files.read(name)


def test_sparse_members_cannot_be_read(tmp_path: Path) -> None:
    """Their bytes in the tar are a map and pieces: not the file."""
    sparse = entry("a.png", b"1\n0\n512\n".ljust(512, b"\0") + bytes(512))
    sparse[0].pax_headers = {
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.png",
        "GNU.sparse.realsize": "4096",
    }  # fmt: skip
    path = write(tmp_path / "x.tar", sparse)
    files = TarFiles([path])
    with pytest.raises(InputFileError, match=r"no regular file.*a\.png"):
        files.read(files.names[0])


@pytest.mark.parametrize("first", ["cls", "jpg"])
def test_classes_of_webdataset(first: str, tmp_path: Path) -> None:
    entries = []
    for number, label in enumerate([b"7", b"0\n", b"007", b"999"]):
        pair = [entry(f"d/{number}.cls", label), entry(f"d/{number}.x.jpg", b"jpg")]
        entries += pair if first == "cls" else pair[::-1]
    files = TarFiles([write(tmp_path / "a.tar", *entries)])
    assert files.members == [f"d/{number}.x.jpg" for number in range(4)]
    assert files.labels == [7, 0, 7, 999]
    # The same key in another shard is another image.
    write(tmp_path / "b.tar", entry("d/1.png", b"png"))
    assert TarFiles([tmp_path / "a.tar", tmp_path / "b.tar"]).labels is None


@pytest.mark.parametrize("label", [b"", b"cat", b"-1", b"1.5", b"9" * 19, b"1" + b" " * 100 + b"2"])
def test_labels_that_are_no_numbers_are_none(label: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", entry("1.cls", label), entry("1.png", png()))
    assert TarFiles([path]).labels is None
    alone = write(tmp_path / "b.tar", entry("1.cls", b"1"))
    assert (TarFiles([alone]).names, TarFiles([alone]).labels) == ([], None)


def test_patterns(tmp_path: Path) -> None:
    names = [f"s-{number:03d}.tar" for number in range(12)] + ["t-a.tar", "t-b.tar"]
    for name in names:
        write(tmp_path / name, entry("a.png", png()))

    def found(pattern: str) -> list[str]:
        return [path.name for path in match_shards(f"{tmp_path}/{pattern}")]

    assert found("s-{009..011}.tar") == names[9:12]
    assert found("s-{000..001}.tar") == names[:2]
    assert found("t-{b,a}.tar") == ["t-b.tar", "t-a.tar"]
    assert found("s-0{0..1}{0..1}.tar") == [names[place] for place in (0, 1, 10, 11)]
    assert found("s-*.tar") == names[:12]
    assert found("s-01?.tar") == names[10:12]
    assert found("{t,s}-*[a1].tar") == ["t-a.tar", "s-001.tar", "s-011.tar"]
    assert found("{s-000,s-00*}.tar") == names[:10]  # none twice
    assert is_pattern("s-{0..1}.tar")
    assert not is_pattern("s-0.tar")


@pytest.mark.parametrize(
    ("pattern", "got", "where"),
    [
        ("s-{0..2}.tar", "nothing there", "s-2.tar"),
        ("s-{1..0}.tar", "nothing there", "s-1..0.tar"),
        ("u-*.tar", "nothing there", "u-*.tar"),
        ("{x,s-0}.png", "another file", "x.png"),
        ("*", "another file", "x.png"),
    ],
)
def test_patterns_that_match_no_tar(pattern: str, got: str, where: str, tmp_path: Path) -> None:
    for name in ("s-0.tar", "s-1.tar"):
        write(tmp_path / name, entry("a.png", png()))
    (tmp_path / "x.png").write_bytes(png())
    with pytest.raises(InputFileError, match="tar of images not found") as caught:
        match_shards(f"{tmp_path}/{pattern}")
    for text in (f"got {got}", pattern, str(tmp_path / where), "Fix: check the pattern"):
        assert text in str(caught.value)


def test_patterns_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputFileError, match="nothing there"):
        match_shards(f"{tmp_path}/{{0..999999999}}{{0..999999999}}.tar")
    monkeypatch.setattr(patterns, "MAX_FILES", 3)
    for number in range(5):
        write(tmp_path / f"{number}.tar", entry("a.png", png()))
    with pytest.raises(UsageError, match=r"over 3 in .*\{0\.\.4\}\.tar.*Fix: check the range"):
        match_shards(f"{tmp_path}/{{0..4}}.tar")


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A header with any bytes where the size is, and a good checksum."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    block[:100] = name.ljust(100, b"\0")
    block[124:136] = size.ljust(12, b"\0")
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


GOOD = tar_bytes(entry("a.png", png()), entry("b.png", png(1)))
MIDDLE = GOOD.index(b"b.png")
END = bytes(1024)
HUGE = b"\x80" + (1 << 60).to_bytes(11, "big")  # in the base-256 form
NEGATIVE = b"\xff" * 10 + b"\xfe\x00"
HOSTILE = {
    "empty": (b"", "empty"),
    "text": (b"hello", "truncated"),
    "zeros then nothing": (bytes(100), "truncated"),
    "compressed": (b"\x1f\x8b\x08" + bytes(1000), "checksum"),
    "cut in a member": (GOOD[: MIDDLE + 520], "beyond the end"),
    "cut before a header": (GOOD[:MIDDLE], "no end mark"),
    "cut in a header": (GOOD[: MIDDLE + 100], "no end mark"),
    "damaged header": (GOOD[: MIDDLE + 2] + b"?" + GOOD[MIDDLE + 3 :], "no end mark"),
    "huge member": (header(b"a.png", HUGE) + END, "beyond the end"),
    "huge file beside": (header(b"a.bin", HUGE) + END, "beyond the end"),
    "huge pax header": (header(b"a", HUGE, b"x") + END, f"a header of {1 << 60} bytes"),
    "huge global header": (header(b"a", HUGE, b"g") + END, f"a header of {1 << 60} bytes"),
    "huge long name": (header(b"a", HUGE, b"L") + END, f"a header of {1 << 60} bytes"),
    "size below zero": (GOOD[:MIDDLE] + header(b"a.png", NEGATIVE) + END, ""),
    "pax size below zero": (GOOD[:MIDDLE] + header(b"a", NEGATIVE, b"x") + END, ""),
    "chain of headers": (header(b"a", b"0", b"x") * 3000 + END, ""),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_tars_are_refused(kind: str, tmp_path: Path) -> None:
    content, reason = HOSTILE[kind]
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(InputFileError, match="cannot read the tar of images") as caught:
        TarFiles([path])
    for text in (reason, str(path), "expected a whole, uncompressed tar", "Fix: copy"):
        assert text in str(caught.value)


def test_missing_tar(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"No such file.*gone\.tar"):
        TarFiles([tmp_path / "gone.tar"])


def test_large_member_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MAX_FILE_BYTES", 50)
    files = TarFiles([write(tmp_path / "x.tar", entry("a.png", bytes(51)))])
    with pytest.raises(InputFileError, match=r"51 bytes, over 50.*x\.tar/a\.png"):
        files.read("x.tar/a.png")


def test_tar_that_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", entry("a.png", png()), entry("b.png", png(1)))
    files = TarFiles([path])
    path.write_bytes(GOOD[: MIDDLE + 520])
    assert files.read("x.tar/a.png") == png()
    for use in (files.read, files.fingerprint):
        with pytest.raises(InputFileError, match=r"bytes of \d+.*x\.tar/b\.png"):
            use("x.tar/b.png")
    path.unlink()
    for use in (files.read, files.fingerprint):
        with pytest.raises(InputFileError, match=r"No such file.*x\.tar/a\.png"):
            use("x.tar/a.png")


@settings(max_examples=150, deadline=None)
@given(
    places=st.lists(st.integers(0, len(GOOD) - 1), min_size=1, max_size=3),
    value=st.integers(0, 255),
    cut=st.integers(0, 5 * len(GOOD)),
)
def test_damaged_tars_never_crash(
    places: list[int], value: int, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    damaged = bytearray(GOOD)
    for place in places:
        damaged[place] = value
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    path.write_bytes(damaged[:cut])
    with suppress(InputFileError):
        files = TarFiles([path])
        for name in files.names:
            files.read(name)
