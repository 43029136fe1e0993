"""Reference statistics: ours and other tools' files, what does not fit, and hostile files."""

from __future__ import annotations

import errno
import io
import zipfile
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terdit_cli.errors import EnvironmentProblem, InputFileError, UsageError
from terdit_cli.evaluate import reference_set as references
from terdit_cli.evaluate.reference_set import (
    Reference,
    holds_images,
    is_statistics_file,
    load_reference,
    save_reference,
)

ADM = "adm@0123456789ab tensorflow bilinear 299"


def a_reference(**changes: object) -> Reference:
    samples = np.random.default_rng(1).normal(size=(9, 7))
    covariance = np.cov(samples, rowvar=False)
    full = Reference(
        mean=samples[:, :4].mean(axis=0),
        covariance=covariance[:4, :4],
        spatial_mean=samples[:, 4:].mean(axis=0),
        spatial_covariance=covariance[4:, 4:],
        features=samples[:, :4].astype(np.float32),
        count=9,
        pipeline=ADM,
        images_sha256="ab" * 32,
    )
    return replace(full, **changes)  # type: ignore[arg-type]


def assert_equal(loaded: Reference, expected: Reference) -> None:
    for field in fields(Reference):
        ours, theirs = getattr(loaded, field.name), getattr(expected, field.name)
        if isinstance(theirs, np.ndarray):
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs)
        else:
            assert ours == theirs


NOTHING_ELSE = dict.fromkeys(
    ("spatial_mean", "spatial_covariance", "features", "count", "pipeline", "images_sha256")
)


@pytest.mark.parametrize("missing", [[], ["features"], list(NOTHING_ELSE)])
def test_round_trip(missing: list[str], tmp_path: Path) -> None:
    expected, path = a_reference(**dict.fromkeys(missing)), tmp_path / "new" / "ref.npz"
    save_reference(path, expected)
    assert [file.name for file in path.parent.iterdir()] == ["ref.npz"]
    assert is_statistics_file(path)
    assert not holds_images(path)
    assert_equal(load_reference(path), expected)


def test_saved_twice_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        save_reference(tmp_path / name, a_reference())
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_reference_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ref.npz"
    save_reference(path, a_reference())
    with pytest.raises(EnvironmentProblem, match=r"cannot write.*ref\.npz/x\.npz"):
        save_reference(path / "x.npz", a_reference())

    def full_disk(file: IO[bytes], **arrays: object) -> None:
        file.write(b"PK")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(EnvironmentProblem, match=r"No space left.*ref\.npz"):
        save_reference(path, a_reference(count=8))
    assert [file.name for file in tmp_path.iterdir()] == ["ref.npz"]
    assert_equal(load_reference(path), a_reference())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pytorch_fid_s_and_clean_fid_s_files(dtype: type, tmp_path: Path) -> None:
    expected, path = a_reference(**NOTHING_ELSE), tmp_path / "cifar10_stats.npz"
    np.savez(path, mu=expected.mean.astype(dtype), sigma=expected.covariance.astype(dtype))
    loaded = load_reference(path)
    assert loaded.mean.dtype == loaded.covariance.dtype == np.float64
    assert np.array_equal(loaded.mean, expected.mean.astype(dtype))
    assert_equal(replace(loaded, mean=expected.mean, covariance=expected.covariance), expected)
    loaded.require_pipeline("anything", path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_adm_s_batches(save: object, tmp_path: Path) -> None:
    """Statistics of all images beside some of the images, which stay a set of their own."""
    full, path = a_reference(), tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    moments = {"mu": full.mean, "sigma": full.covariance}
    spatial = {"mu_s": full.spatial_mean, "sigma_s": full.spatial_covariance}
    assert callable(save)
    save(path, arr_0=np.zeros((3, 8, 8, 3), np.uint8), **moments, **spatial)
    assert is_statistics_file(path)
    assert holds_images(path)
    loaded = load_reference(path)
    unsaid = dict.fromkeys(("features", "count", "pipeline", "images_sha256"))
    assert_equal(loaded, replace(full, **unsaid))  # type: ignore[arg-type]
    loaded.require_pipeline(ADM, path)
    with pytest.raises(UsageError) as caught:
        loaded.require_pipeline("clean@012345678 clean-fid bicubic 299", path)
    for text in ("got adm, by its spatial statistics", "expected clean@012345678", str(path)):
        assert text in str(caught.value)


def test_images_are_no_statistics(tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", np.zeros((3, 8, 8, 3), np.uint8))
    (tmp_path / "broken.npz").write_bytes(b"PK\5\6")
    np.savez(tmp_path / "x.NPZ.npz", mu=np.zeros(1), sigma=np.eye(1))
    (tmp_path / "x.NPZ.npz").rename(tmp_path / "x.NPZ")
    assert not is_statistics_file(tmp_path / "samples.npz")
    assert holds_images(tmp_path / "samples.npz")
    for name in ("broken.npz", "gone.npz", ""):
        assert not is_statistics_file(tmp_path / name)
    assert not holds_images(tmp_path / "broken.npz")
    assert is_statistics_file(tmp_path / "x.NPZ")


def test_another_pipeline_is_an_error_that_names_both() -> None:
    a_reference().require_pipeline(ADM, "ref.npz")
    with pytest.raises(UsageError) as caught:
        a_reference().require_pipeline("clean@1 x", "ref.npz")
    for text in (f"got {ADM}", "expected clean@1 x", "ref.npz", "Fix: use its features with --f"):
        assert text in str(caught.value)
    assert caught.value.exit_code == 2


def test_another_number_of_features_is_an_error() -> None:
    a_reference().require_dim(4, "ref.npz", 3)
    a_reference().require_dim(4, "ref.npz")
    a_reference(**NOTHING_ELSE).require_dim(4, "ref.npz", 3)
    for dims, kind, got in (((5, 3), "features", 4), ((4, 2023), "spatial features", 3)):
        with pytest.raises(UsageError) as caught:
            a_reference().require_dim(dims[0], "ref.npz", dims[1])
        expected = dims[0] if kind == "features" else dims[1]
        for text in (f"number of {kind}: got {got}, expected {expected} (ref.npz)", "Fix: make"):
            assert text in str(caught.value)
        assert caught.value.exit_code == 2


def npz(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def good(**changes: object) -> bytes:
    """A whole file of ours with some entries replaced."""
    arrays = {
        "mu": np.zeros(3),
        "sigma": np.eye(3),
        "mu_s": np.zeros(2),
        "sigma_s": np.eye(2),
        "features": np.zeros((5, 3), np.float32),
        "n": np.int64(5),
        "pipeline": np.array("net"),
        "format": np.int64(2),
    }
    return npz(**{name: value for name, value in (arrays | changes).items() if value is not None})


def lying(name: str, shape: str, content: bytes = bytes(16), compression: int = 0) -> bytes:
    """An .npz with an array that promises more numbers than there are."""
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    prefix = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(f"{name}.npy", prefix + header + content)
        for other, values in {"mu": np.zeros(2), "sigma": np.eye(2)}.items():
            if other != name:
                with archive.open(f"{other}.npy", "w") as stream:
                    np.save(stream, values)
    return buffer.getvalue()


def header_bomb() -> bytes:
    """A header that says it is 32 MB long, of spaces that pack to nothing."""
    length = 1 << 25
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        start = b"\x93NUMPY\x02\x00" + length.to_bytes(4, "little")
        archive.writestr("mu.npy", start + b" " * length)
        archive.writestr("sigma.npy", b"")
    return buffer.getvalue()


def patched(offsets: dict[int, int]) -> bytes:
    """A good file with bytes replaced in the central directory, counted from its start."""
    data = bytearray(good())
    start = data.index(b"PK\x01\x02")
    for offset, value in offsets.items():
        data[start + offset] = value
    return bytes(data)


def damaged_stream() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, mu=np.arange(300.0), sigma=np.eye(300))
    data = bytearray(buffer.getvalue())
    data[60:90] = bytes(30)
    return bytes(data)


PICKLE = np.array([{}], dtype=object)
NEVER = "pickled objects, which are never loaded"
MANY = 1 << 50
HOSTILE = {
    "empty": (b"", "not a zip"),
    "text": (b"mu = 0", "not a zip"),
    "truncated": (good()[: len(good()) // 2], "not a zip"),
    "flipped": (good()[:60] + bytes([good()[60] ^ 0xFF]) + good()[61:], ""),
    "no sigma": (npz(mu=np.zeros(3)), "sigma.npy"),
    "no mu_s": (good(mu_s=None), "mu_s.npy"),
    "no sigma_s": (good(sigma_s=None), "sigma_s.npy"),
    "other shape": (good(sigma=np.eye(4)), "mu [3] and sigma [4, 4] do not fit"),
    "other spatial shape": (good(mu_s=np.zeros(3)), "mu_s [3] and sigma_s [2, 2] do not fit"),
    "no vector": (good(mu=np.zeros((3, 3))), "mu [3, 3], expected [D] with D up to 16384"),
    "too many": (good(mu=np.zeros(16385)), "mu [16385], expected [D]"),
    "no features": (good(mu=np.zeros(0), sigma=np.zeros((0, 0))), "mu [0], expected"),
    "nan": (good(mu=np.array([0, np.nan, 0])), "numbers that are not finite"),
    "infinite": (good(sigma=np.diag([1, np.inf, 1])), "numbers that are not finite"),
    "spatial nan": (good(mu_s=np.full(2, np.nan)), "numbers that are not finite"),
    "not symmetric": (good(sigma=np.triu(np.ones((3, 3)))), "sigma is not symmetric"),
    "negative variances": (good(sigma=-np.eye(3)), "sigma has negative variances"),
    "text array": (good(mu=np.array("zero")), "mu is <U4 []"),
    "complex": (good(sigma=np.eye(3) * 1j), "sigma is complex128 [3, 3]"),
    "pickled mu": (good(mu=PICKLE), f"mu holds {NEVER}"),
    "pickled sigma_s": (good(sigma_s=PICKLE), f"sigma_s holds {NEVER}"),
    "pickled pipeline": (good(pipeline=PICKLE), f"pipeline holds {NEVER}"),
    "pickled features": (good(features=PICKLE), f"features holds {NEVER}"),
    "features of float64": (good(features=np.zeros((5, 3))), "expected float32 [R, 3]"),
    "features of another width": (
        good(features=np.zeros((5, 4), np.float32)),
        "features float32 [5, 4], expected float32 [R, 3]",
    ),
    "features of none": (good(features=np.zeros((0, 3), np.float32)), "float32 [0, 3]"),
    "features nan": (good(features=np.full((5, 3), np.nan, np.float32)), "features that are not"),
    "more features than images": (good(n=np.int64(4)), "n = 4, expected at least 5"),
    "huge mu": (lying("mu", f"({MANY},)"), f"mu declares {8 * MANY} bytes"),
    "long mu": (lying("mu", "(16384,)"), "mu declares 131072 bytes in a file of"),
    "huge sigma": (lying("sigma", f"({MANY}, {MANY})"), f"sigma declares {8 * MANY**2} bytes"),
    "below zero": (lying("mu", "(-2,)"), "mu declares -16 bytes"),
    "huge features": (lying("features", f"({MANY}, 2)"), f"declares {16 * MANY} bytes"),
    "huge n": (lying("n", f"({MANY},)"), "n is float64"),
    "packed zeros": (lying("mu", "(16384,)", bytes(1 << 20), 8), "mu declares 131072 bytes"),
    "header bomb": (header_bomb(), "EOF: reading array header"),
    "code for a shape": (lying("mu", "__import__('os').abort()"), ""),
    "n infinite": (good(n=np.inf), "n is float64 []"),
    "n negative": (good(n=np.int64(-5)), "n = -5"),
    "n of one": (good(n=np.int64(1), features=None), "n = 1, expected at least 2"),
    "many n": (good(n=np.arange(3)), "n int64 [3], expected one value"),
    "many pipelines": (good(pipeline=np.array(["a", "b"])), "pipeline <U1 [2], expected one value"),
    "long pipeline": (good(pipeline=np.array("x" * 17_000)), "pipeline <U17000 [], expected"),
    "number for a pipeline": (good(pipeline=np.int64(3)), "pipeline is int64 []"),
    "newer format": (good(format=np.int64(3)), "format 3, newer than 2"),
    "encrypted": (patched({8: 1}), "encrypted"),
    "unknown compression": (patched({10: 97}), "not supported"),
    "newer zip": (patched({6: 255}), "zip file version"),
    "broken directory": (patched({0: 0}), "magic number"),
    "damaged stream": (damaged_stream(), ""),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_damaged_and_hostile_files_are_refused(tmp_path: Path, kind: str) -> None:
    content, reason = HOSTILE[kind]
    path = tmp_path / "ref.npz"
    path.write_bytes(content)
    with pytest.raises(InputFileError, match=r"the reference statistics cannot be read") as caught:
        load_reference(path)
    for text in (reason, str(path), "expected an .npz with mu [D] and sigma [D, D]", "Fix: make"):
        assert text in str(caught.value)
    is_statistics_file(path)  # must not raise either
    holds_images(path)


def test_features_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "_LARGEST_FEATURES", 59)
    (tmp_path / "ref.npz").write_bytes(good())
    with pytest.raises(InputFileError, match=r"features \[5, 3\], over 59 bytes"):
        load_reference(tmp_path / "ref.npz")


def test_what_is_refused_was_good_before(tmp_path: Path) -> None:
    path = tmp_path / "ref.npz"
    for content in (good(), patched({}), good(features=None, mu_s=None, sigma_s=None)):
        path.write_bytes(content)
        assert load_reference(path).count == 5


def test_missing_reference(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"No such file.*gone\.npz"):
        load_reference(tmp_path / "gone.npz")


@settings(max_examples=150, deadline=None)
@given(
    places=st.lists(st.integers(0, 10_000), min_size=1, max_size=3),
    value=st.integers(0, 255),
    cut=st.integers(0, 40_000),
)
def test_damaged_files_never_crash(
    places: list[int], value: int, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    damaged = bytearray(good())
    for place in places:
        damaged[place % len(damaged)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(damaged[:cut])
    with suppress(InputFileError):
        assert load_reference(path).mean.shape == (3,)
    is_statistics_file(path)
