"""Streaming statistics against numpy, and reference files, good and hostile."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.evaluate.statistics import (
    FeatureStatistics,
    is_statistics_file,
    load_reference,
    save_reference,
)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 17), min_size=1, max_size=6),
    dim=st.integers(1, 9),
    offset=st.sampled_from([0.0, 1.0, 1e6]),
    seed=st.integers(0, 2**31),
)
def test_any_batching_gives_numpy_s_mean_and_covariance(
    sizes: list[int], dim: int, offset: float, seed: int
) -> None:
    data = np.random.default_rng(seed).normal(size=(sum(sizes) + 2, dim)) + offset
    stream, other = FeatureStatistics(dim), FeatureStatistics(dim)
    start = 0
    for size in [*sizes, 2]:
        (other if size % 3 == 0 else stream).update(data[start : start + size])
        start += size
    stream.merge(other)
    assert stream.count == len(data)
    # Centring numbers of size 1e6 in float64 leaves 1e6 * 2^-53 = 1e-10 of each.
    assert np.allclose(stream.mean, data.mean(axis=0), rtol=1e-12, atol=1e-12)
    covariance = np.cov(data, rowvar=False).reshape(dim, dim)
    assert np.allclose(stream.covariance, covariance, rtol=1e-9, atol=1e-8)


def test_keeps_a_uniform_sample_that_does_not_depend_on_batches() -> None:
    data = np.arange(3000, dtype=np.float32)[:, None]
    kept = []
    for size in (1, 7, 3000):
        stream = FeatureStatistics(1, keep=300)
        for start in range(0, len(data), size):
            stream.update(data[start : start + size])
        kept.append(stream.kept)
    assert all(np.array_equal(kept[0], other) for other in kept)
    assert kept[0].shape == (300, 1)
    assert len(np.unique(kept[0])) == 300
    # Uniform on 0..2999: the mean of 300 has deviation 866 / sqrt(300) = 50; 5 of them.
    assert abs(kept[0].mean() - 1499.5) < 250


def test_keeps_everything_in_order_when_it_fits() -> None:
    data = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    stream, other = FeatureStatistics(3, keep=10), FeatureStatistics(3, keep=10)
    stream.update(data[:4])
    other.update(data[4:])
    stream.merge(other)
    assert np.array_equal(stream.kept, data)
    assert FeatureStatistics(3).kept.shape == (0, 3)


def test_merged_samples_have_the_shares_of_their_streams() -> None:
    large, small = FeatureStatistics(1, keep=200), FeatureStatistics(1, keep=200)
    large.update(np.zeros((3000, 1)))
    small.update(np.ones((1000, 1)))
    large.merge(small)
    assert large.kept.shape == (200, 1)
    # Hypergeometric: mean 1/4, deviation sqrt(0.25 * 0.75 / 200) = 0.031; 5 of them.
    assert abs(large.kept.mean() - 0.25) < 0.155
    with pytest.raises(ValueError, match="kept"):
        large.merge(FeatureStatistics(1))


def test_refuses_other_widths_and_numbers_that_are_not_finite() -> None:
    stream = FeatureStatistics(3)
    with pytest.raises(ValueError, match="shape"):
        stream.update(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="finite"):
        stream.update(np.full((1, 3), np.nan))
    with pytest.raises(ValueError, match="2 samples"):
        _ = stream.covariance


def a_reference() -> FeatureStatistics:
    stream = FeatureStatistics(4)
    stream.update(np.random.default_rng(1).normal(size=(9, 4)))
    return stream


def test_reference_round_trip(tmp_path: Path) -> None:
    stream, path = a_reference(), tmp_path / "new" / "ref.npz"
    save_reference(path, stream, "net@1 resize")
    assert is_statistics_file(path)
    loaded = load_reference(path)
    assert np.array_equal(loaded.mean, stream.mean)
    assert np.array_equal(loaded.covariance, stream.covariance)
    assert (loaded.count, loaded.pipeline) == (9, "net@1 resize")
    loaded.require_pipeline("net@1 resize", path)
    with pytest.raises(UsageError, match=r"got net@1 resize, expected other.*--features"):
        loaded.require_pipeline("other", path)


def test_other_tools_files_name_no_pipeline(tmp_path: Path) -> None:
    path = tmp_path / "fid_stats.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(2), sigma_s=np.eye(2))
    loaded = load_reference(path)
    assert (loaded.count, loaded.pipeline) == (None, None)
    loaded.require_pipeline("anything", path)


def npz(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def lying_npy(declared: int, name: str = "mu") -> bytes:
    """An .npz with a header that promises more numbers than there are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({declared},), }}"
        header += " " * (-(len(header) + 11) % 64) + "\n"
        prefix = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
        archive.writestr(f"{name}.npy", prefix + header.encode() + bytes(16))
        for other, values in {"mu": np.zeros(2), "sigma": np.eye(2)}.items():
            if other != name:
                with archive.open(f"{other}.npy", "w") as stream:
                    np.save(stream, values)
    return buffer.getvalue()


def patched(offsets: dict[int, int]) -> bytes:
    """A good file with bytes replaced in the central directory, counted from its start."""
    data = bytearray(GOOD)
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


GOOD = npz(mu=np.zeros(3), sigma=np.eye(3))
HOSTILE = {
    "empty": b"",
    "text": b"mu = 0",
    "truncated": GOOD[: len(GOOD) // 2],
    "flipped": GOOD[:60] + bytes([GOOD[60] ^ 0xFF]) + GOOD[61:],
    "no sigma": npz(mu=np.zeros(3)),
    "other shape": npz(mu=np.zeros(3), sigma=np.eye(4)),
    "no matrix": npz(mu=np.zeros((3, 3)), sigma=np.eye(3)),
    "nan": npz(mu=np.array([np.nan]), sigma=np.eye(1)),
    "not symmetric": npz(mu=np.zeros(2), sigma=np.array([[1.0, 1.0], [0.0, 1.0]])),
    "text array": npz(mu=np.array("zero"), sigma=np.eye(3)),
    "pickle": npz(mu=np.array([{}], dtype=object), sigma=np.eye(1)),
    "huge": lying_npy(1 << 50),
    "huge n": lying_npy(1 << 50, "n"),
    "huge pipeline": lying_npy(1 << 50, "pipeline"),
    "n infinite": npz(mu=np.zeros(3), sigma=np.eye(3), n=np.inf),
    "n negative": npz(mu=np.zeros(3), sigma=np.eye(3), n=-5),
    "complex": npz(mu=np.zeros(3), sigma=np.eye(3) * 1j),
    "no features": npz(mu=np.zeros(0), sigma=np.zeros((0, 0))),
    "negative variances": npz(mu=np.zeros(3), sigma=-np.eye(3)),
    "encrypted": patched({8: 1}),
    "unknown compression": patched({10: 97}),
    "broken directory": patched({0: 0}),
    "damaged stream": damaged_stream(),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_damaged_references_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "ref.npz"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(InputFileError, match=r"ref\.npz.*--save-reference"):
        load_reference(path)
    is_statistics_file(path)  # must not raise either


def test_missing_reference(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"gone\.npz"):
        load_reference(tmp_path / "gone.npz")
