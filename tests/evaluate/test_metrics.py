"""The metrics against numbers that other people's code computed from the same features.

Recorded ones (tests/golden/metrics.json) and, where they are installed, the libraries themselves.
Each computes in float64 from the same arrays, so what differs is the order of the operations.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray

from terdit_cli.evaluate import metrics
from terdit_cli.evaluate.metrics import (
    frechet_distance,
    frechet_distance_of_samples,
    inception_score,
    inception_scores,
    kernel_inception_distance,
    kernel_inception_distances,
    kernel_inception_standard_error,
    precision_recall,
)
from terdit_cli.system.torchvision_shim import import_vision

GOLDEN = Path(__file__).parents[1] / "golden"
TAGS = ("d64", "d256")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((GOLDEN / "metrics.json").read_text())


@pytest.fixture(scope="module")
def arrays() -> dict[str, NDArray[np.float64]]:
    with np.load(GOLDEN / "metrics.npz", allow_pickle=False) as values:
        return {name: values[name].astype(np.float64) for name in values.files}


def gaussian(features: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return features.mean(axis=0), np.cov(features, rowvar=False)


@pytest.mark.parametrize("tag", TAGS)
def test_frechet_distance_matches_clean_fid(expected: Any, arrays: Any, tag: str) -> None:
    real, fake = arrays[f"{tag}.real"], arrays[f"{tag}.fake"]
    ours = frechet_distance(*gaussian(real), *gaussian(fake))
    assert ours == pytest.approx(expected["fid"][tag]["clean_fid"], rel=1e-9)
    assert ours == pytest.approx(frechet_distance(*gaussian(fake), *gaussian(real)), rel=1e-9)
    assert frechet_distance(*gaussian(real), *gaussian(real)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_with_fewer_samples_than_features() -> None:
    """tr (S1 S2)^1/2 is the nuclear norm of A B^T / sqrt((n-1)(m-1)) for centred features A, B."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(30, 200)), 0.3 + 2 * random.normal(size=(25, 200))
    centred = [x - x.mean(axis=0) for x in (a, b)]
    nuclear = np.linalg.norm(centred[0] @ centred[1].T, "nuc") / np.sqrt(29 * 24)
    gap = a.mean(axis=0) - b.mean(axis=0)
    traces = sum((x**2).sum() / (len(x) - 1) for x in centred)
    by_hand = gap @ gap + traces - 2 * nuclear
    assert frechet_distance(*gaussian(a), *gaussian(b)) == pytest.approx(by_hand, rel=1e-6)


def test_frechet_distance_of_known_gaussians() -> None:
    """Diagonal covariances commute: the distance is |m|^2 + sum (sqrt(a) - sqrt(b))^2."""
    a, b, gap = np.array([1.0, 4.0, 0.0]), np.array([9.0, 0.25, 2.0]), np.array([1.0, -2.0, 0.5])
    by_hand = gap @ gap + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    ours = frechet_distance(np.zeros(3), np.diag(a), gap, np.diag(b))
    assert ours == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((np.zeros(2), np.eye(3), np.zeros(2), np.eye(2)), "shapes"),
        ((np.zeros(2), np.eye(2), np.zeros(3), np.eye(3)), "shapes"),
        ((np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), np.zeros(2), np.eye(2)), "symmetric"),
        ((np.array([np.nan, 0]), np.eye(2), np.zeros(2), np.eye(2)), "finite"),
        ((np.zeros(2), np.full((2, 2), np.inf), np.zeros(2), np.eye(2)), "finite"),
    ],
)
def test_frechet_distance_refuses(arguments: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        frechet_distance(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize(
    ("seed", "subsets", "size"), [(0, 100, 1000), (123, 20, 300)], ids=["default", "small"]
)
def test_kid_matches_clean_fid(
    expected: Any, arrays: Any, tag: str, seed: int, subsets: int, size: int
) -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state must not move
    ours = kernel_inception_distance(
        arrays[f"{tag}.real"], arrays[f"{tag}.fake"], subsets, size, seed
    )
    name = f"seed{seed}_subsets{subsets}_max{size}"
    assert ours == pytest.approx(expected["kid"][tag][name], rel=1e-9, abs=1e-15)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


@pytest.mark.parametrize("block", [7, 2048])
@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("k", [3, 5])
def test_precision_recall_match_guided_diffusion(
    expected: Any, arrays: Any, tag: str, k: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "BLOCK_ROWS", block if tag == "d64" else 300)
    precision, recall = precision_recall(arrays[f"{tag}.real"], arrays[f"{tag}.fake"], k)
    recorded = expected["precision_recall"][tag][f"k{k}"]
    assert (precision, recall) == (recorded["precision"], recorded["recall"])


@pytest.mark.parametrize(
    ("tag", "split"), [("c50", 5000), ("c50", 200), ("c200", 5000), ("c200", 125)]
)
def test_inception_score_matches_guided_diffusion(
    expected: Any, arrays: Any, tag: str, split: int
) -> None:
    ours = inception_score(arrays[f"{tag}.logits"], split)
    assert ours == pytest.approx(expected["inception_score"][tag][f"split{split}"], rel=1e-9)


def test_scores_refuse_too_few_samples() -> None:
    with pytest.raises(ValueError, match="expected"):
        kernel_inception_distance(np.zeros((1, 4)), np.zeros((5, 4)))
    with pytest.raises(ValueError, match="expected"):
        precision_recall(np.zeros((3, 4)), np.zeros((9, 4)), k=3)
    with pytest.raises(ValueError, match="shape"):
        inception_score(np.zeros(5))


@pytest.mark.parametrize(("n", "m"), [(20, 30), (20, 400), (30, 30)])
def test_frechet_distance_keeps_its_digits_with_fewer_samples_than_features(n: int, m: int) -> None:
    """An empty direction of a covariance must not add the square root of its rounding error."""
    random = np.random.default_rng(3)
    a, b = 50 * random.normal(size=(n, 200)) ** 2, 50 * random.normal(size=(m, 200)) ** 2
    centred = [(x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    nuclear = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    gap = a.mean(axis=0) - b.mean(axis=0)
    traces = sum((x**2).sum() for x in centred)
    by_hand = gap @ gap + traces - 2 * nuclear
    assert frechet_distance(*gaussian(a), *gaussian(b)) == pytest.approx(by_hand, rel=1e-12)
    # All eigenvalues in the range are kept to about 200 * 2^-53 of the trace.
    assert abs(frechet_distance(*gaussian(a), *gaussian(a))) < 1e-12 * traces


def test_inception_score_with_a_class_that_underflows() -> None:
    assert inception_score(np.array([[0.0, -800.0], [0.0, -800.0]])) == 1


def test_kid_refuses_subsets_too_small_for_an_estimate() -> None:
    with pytest.raises(ValueError, match="expected >= 1 of >= 2"):
        kernel_inception_distance(np.eye(4), np.eye(4), max_subset_size=1)
    with pytest.raises(ValueError, match="expected >= 1 of >= 2"):
        kernel_inception_distance(np.eye(4), np.eye(4), num_subsets=0)


def witness(name: str) -> Any:
    """Import a module of another library, or skip where it is not installed."""
    if importlib.util.find_spec(name.split(".")[0]) is None:
        pytest.skip(f"{name} is not installed")
    return import_vision(name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:cleanfid.fid")
@pytest.mark.parametrize("tag", TAGS)
def test_frechet_distance_and_kid_of_clean_fid(arrays: Any, tag: str) -> None:
    """sqrtm takes a root of the whole product: 1e-9 of the distance. KID: 1e-12 of a kernel ~1."""
    theirs = witness("cleanfid.fid")
    real, fake = arrays[f"{tag}.real"], arrays[f"{tag}.fake"]
    moments = *gaussian(real), *gaussian(fake)
    if "disp" in inspect.signature(scipy.linalg.sqrtm).parameters:  # scipy 1.18 has it no more
        expected = theirs.frechet_distance(*moments)
        assert frechet_distance(*moments) == pytest.approx(expected, rel=1e-9)
    state = np.random.get_state()  # noqa: NPY002 - theirs draws from the global one
    np.random.seed(7)  # noqa: NPY002
    expected = theirs.kernel_distance(real, fake, num_subsets=10, max_subset_size=200)
    np.random.set_state(state)  # noqa: NPY002
    ours = kernel_inception_distance(real, fake, 10, 200, seed=7)
    assert ours == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("tag", TAGS)
def test_all_scores_of_torch_fidelity(arrays: Any, tag: str) -> None:
    real, fake = (torch.from_numpy(arrays[f"{tag}.{side}"]) for side in ("real", "fake"))
    fid = witness("torch_fidelity.metric_fid")
    theirs = fid.fid_statistics_to_metric(
        fid.fid_features_to_statistics(fake), fid.fid_features_to_statistics(real), verbose=False
    )
    ours = frechet_distance(*gaussian(real.numpy()), *gaussian(fake.numpy()))
    # Its eigenvalues are those of the product, which is not symmetric.
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)

    # Its first input is the generated one: subsets are drawn in clean-fid's order.
    kid = witness("torch_fidelity.metric_kid").kid_features_to_metric(
        fake, real, kid_subsets=10, kid_subset_size=200, rng_seed=7, verbose=False
    )
    subsets = kernel_inception_distances(real.numpy(), fake.numpy(), 10, 200, seed=7)
    mean, std = kid["kernel_inception_distance_mean"], kid["kernel_inception_distance_std"]
    assert subsets.mean() == pytest.approx(mean, rel=1e-9, abs=1e-12)
    assert subsets.std() == pytest.approx(std, rel=1e-9, abs=1e-12)

    prc = witness("torch_fidelity.metric_prc").prc_features_to_metric(
        fake, real, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=True, verbose=False
    )
    # Shares of counted samples; torch averages them in float32.
    both = precision_recall(real.numpy(), fake.numpy())
    assert both == pytest.approx((prc["precision"], prc["recall"]), abs=1e-7)


@pytest.mark.parametrize(("tag", "splits"), [("c50", 4), ("c200", 5)])
def test_inception_score_of_torch_fidelity(arrays: Any, tag: str, splits: int) -> None:
    logits = arrays[f"{tag}.logits"]
    theirs = witness("torch_fidelity.metric_isc").isc_features_to_metric(
        torch.from_numpy(logits), splits=splits, shuffle=False
    )
    scores = inception_scores(logits, len(logits) // splits)
    assert len(scores) == splits
    assert scores.mean() == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert scores.std() == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def test_a_shorter_last_split_counts_as_one(arrays: Any) -> None:
    logits = arrays["c50.logits"]
    scores = inception_scores(logits, 300)
    assert len(scores) == 3
    assert scores[2] == pytest.approx(inception_score(logits[600:]), rel=1e-15)
    assert inception_score(logits, 300) == scores.mean()


def shaped(random: Any, n: int, dim: int, decades: float) -> NDArray[np.float64]:
    """Draw correlated samples whose covariance has eigenvalues over so many decades."""
    mix = np.linalg.qr(random.normal(size=(dim, dim)))[0]
    return random.normal(size=(n, dim)) * 10 ** np.linspace(0, -decades / 2, dim) @ mix


@pytest.mark.parametrize("decades", [0, 4, 8, 12, 16])
@pytest.mark.parametrize(("n", "m"), [(400, 400), (400, 30), (30, 400), (61, 61), (30, 20)])
def test_frechet_distance_whatever_the_rank(decades: float, n: int, m: int) -> None:
    """Against singular values, which lose no digits, for any condition and rank of 60 features.

    Measured: 2e-13 of the distance at worst, where the condition is 1e16.
    """
    random = np.random.default_rng(n + m)
    a, b = shaped(random, n, 60, decades), 0.1 + 1.3 * shaped(random, m, 60, decades)
    centred = [(x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    nuclear = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    gap = a.mean(axis=0) - b.mean(axis=0)
    traces = sum((x**2).sum() for x in centred)
    by_hand = gap @ gap + traces - 2 * nuclear
    ours = frechet_distance(*gaussian(a), *gaussian(b))
    assert ours == pytest.approx(by_hand, abs=1e-11 * traces)
    assert frechet_distance_of_samples(a, b) == pytest.approx(by_hand, abs=1e-11 * traces)
    assert frechet_distance(*gaussian(a), *gaussian(a)) < 1e-11 * traces
    assert frechet_distance_of_samples(a, a) < 1e-11 * traces
    assert 0 <= frechet_distance(*gaussian(b), *gaussian(b)) < 1e-11 * traces


@pytest.mark.parametrize("small", [1e-2, 1e-3, 1e-4, 3e-5, 1e-5, 1e-7])
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_frechet_distance_of_features_that_hardly_vary(small: float, share: float) -> None:
    """The exact way and the fast way: what is estimated, 1e-10 of the traces, is an upper bound."""
    random = np.random.default_rng(0)
    scale = np.where(random.random(100) < share, small, 1)
    a, b = scale * random.normal(size=(500, 100)), scale * random.normal(size=(500, 100))
    b = 0.1 + 1.3 * (b + 0.3 * scale * random.normal(size=(500, 1)))
    roots = [np.linalg.qr((x - x.mean(axis=0)) / np.sqrt(499), mode="r") for x in (a, b)]
    nuclear = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    gap = a.mean(axis=0) - b.mean(axis=0)
    traces = sum((root**2).sum() for root in roots)
    by_hand = gap @ gap + traces - 2 * nuclear
    ours = frechet_distance(*gaussian(a), *gaussian(b))
    assert ours == pytest.approx(by_hand, abs=2e-10 * traces)
    assert ours == pytest.approx(by_hand, rel=1e-9)
    assert frechet_distance(*gaussian(a), *gaussian(a)) < 2e-10 * traces


@pytest.mark.parametrize(("n", "m"), [(5, 9), (9, 40), (40, 9), (12, 13), (40, 50)])
def test_frechet_distance_of_samples_is_that_of_their_moments(n: int, m: int) -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(n, 12)).astype(np.float32), 2 + random.normal(size=(m, 12))
    expected = frechet_distance(*gaussian(a.astype(float)), *gaussian(b))
    assert frechet_distance_of_samples(a, b) == pytest.approx(expected, rel=1e-11)
    one = frechet_distance_of_samples(a[:, :1], b[:, :1])
    by_hand = (a[:, 0].mean() - b[:, 0].mean()) ** 2
    by_hand += (a[:, 0].astype(float).std(ddof=1) - b[:, 0].std(ddof=1)) ** 2
    assert one == pytest.approx(by_hand, rel=1e-6)  # float32 means


def test_frechet_distance_of_constant_features() -> None:
    """No variance is a Gaussian too, a point: the distance is |gap|^2 + the other's variance."""
    zero, eye, gap = np.zeros((4, 4)), np.eye(4), np.full(4, 0.5)
    assert frechet_distance(np.zeros(4), zero, gap, zero) == 1
    assert frechet_distance(np.zeros(4), zero, gap, eye) == pytest.approx(5, rel=1e-15)
    assert frechet_distance(np.zeros(4), eye, gap, zero) == pytest.approx(5, rel=1e-15)
    assert frechet_distance_of_samples(np.zeros((3, 4)), np.full((7, 4), 0.5)) == 1
    # One feature of many that does not vary.
    random = np.random.default_rng(0)
    a, b = random.normal(size=(90, 5)), random.normal(size=(80, 5))
    a[:, 2] = b[:, 2] = 3.25
    rest = [0, 1, 3, 4]
    expected = frechet_distance(*gaussian(a[:, rest]), *gaussian(b[:, rest]))
    assert frechet_distance(*gaussian(a), *gaussian(b)) == pytest.approx(expected, rel=1e-12)


def test_duplicates_weigh_as_the_samples_they_are() -> None:
    """Each image twice: the same mean, and a covariance smaller by (2n - 2) / (2n - 1) ..."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(30, 40)), random.normal(size=(20, 40))
    twice = np.concatenate([b, b])
    mean, covariance = gaussian(b)
    expected = frechet_distance(*gaussian(a), mean, covariance * (19 / 20) / (39 / 40))
    assert frechet_distance_of_samples(a, twice) == pytest.approx(expected, rel=1e-11)
    assert frechet_distance(*gaussian(a), *gaussian(twice)) == pytest.approx(expected, rel=1e-11)


def test_precision_and_recall_of_equal_samples() -> None:
    """Copies are at distance 0 whatever |x|^2 + |y|^2 - 2 x.y rounds to."""
    random = np.random.default_rng(0)
    a = 100 + random.normal(size=(40, 30)) / 7
    assert precision_recall(a, a) == (1, 1)
    # More than k copies of each: every radius is 0, and still each covers its copies ...
    copies = np.repeat(a[:5], 6, axis=0)
    assert precision_recall(copies, copies[::-1]) == (1, 1)
    assert precision_recall(copies, a[:5].repeat(4, axis=0).astype(np.float64)) == (1, 1)
    # ... and nothing else.
    other = copies.copy()
    other[:6] += 1e-3
    assert precision_recall(copies, other) == (24 / 30, 24 / 30)
    constant = np.full((6, 3), 0.1)
    assert precision_recall(constant, constant) == (1, 1)
    assert precision_recall(constant, constant + 1) == (0, 0)
    assert precision_recall(np.zeros((6, 3)), np.negative(np.zeros((6, 3)))) == (1, 1)


@pytest.mark.parametrize("block", [3, 4, 64])
def test_a_point_on_the_border_is_covered(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points on a lattice: distances are exact, and many are equal to the radius."""
    monkeypatch.setattr(metrics, "BLOCK_ROWS", block)
    line = np.arange(7.0)[:, None] @ np.ones((1, 2))
    # The radius of k = 2 is 2 steps at the ends, 1 step inside.
    beyond = np.array([[-2.0], [-3.0], [8.0], [8.5], [3.0]]) @ np.ones((1, 2))
    assert precision_recall(line, beyond, k=2)[0] == 3 / 5


def test_precision_and_recall_by_hand() -> None:
    random = np.random.default_rng(1)
    real, fake = random.normal(size=(35, 4)), 0.7 * random.normal(size=(23, 4))

    def distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        return ((a[:, None] - b[None]) ** 2).sum(axis=2)

    real_radii, fake_radii = (np.sort(distances(x, x), axis=1)[:, 3] for x in (real, fake))
    precision = (distances(fake, real) <= real_radii).any(axis=1).mean()
    recall = (distances(real, fake) <= fake_radii).any(axis=1).mean()
    assert precision_recall(real, fake) == (precision, recall)


def test_the_standard_error_of_kid_is_that_of_the_distributions() -> None:
    """Over many pairs of sets the KID scatters by its standard error, however subsets overlap."""
    random = np.random.default_rng(0)
    for n, size, subsets in ((200, 40, 20), (100, 60, 30), (400, 20, 10)):
        values, errors = [], []
        for seed in range(150):
            real, fake = random.normal(size=(2, n, 6))
            distances = kernel_inception_distances(real, 0.4 + 1.2 * fake, subsets, size, seed)
            error = kernel_inception_standard_error(distances, size, n)
            assert error is not None
            values.append(distances.mean())
            errors.append(error)
        # A standard deviation of 150 is known to 6 %; the distance is an average to first order.
        assert 0.75 < np.sqrt(np.mean(np.square(errors))) / np.std(values) < 1.35


def test_the_standard_error_of_kid_that_cannot_be_known() -> None:
    assert kernel_inception_standard_error(np.array([1.0, 2.0]), 1000, 1000) is None
    assert kernel_inception_standard_error(np.array([1.0, 2.0]), 1000, 300) is None
    assert kernel_inception_standard_error(np.array([1.0]), 10, 300) is None
    error = kernel_inception_standard_error(np.array([1.0, 3.0]), 10, 40)
    assert error == pytest.approx(np.sqrt(2) * np.sqrt(1 / 2 + 1 / 3))


@pytest.mark.parametrize("score", [precision_recall, kernel_inception_distance])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_named_by_its_row(
    score: Any, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "BLOCK_ROWS", 4)
    good = np.random.default_rng(0).normal(size=(12, 3))
    features = good.astype(np.float32)
    features[9, 1] = features[11, 0] = bad
    with pytest.raises(ValueError, match=r"fake holds numbers that are not finite.* row 9"):
        score(good, features)
    with pytest.raises(ValueError, match=r"real holds numbers that are not finite.* row 9"):
        score(features, good)
    with pytest.raises(ValueError, match="row 9"):
        inception_score(features)
    with pytest.raises(ValueError, match="row 9"):
        frechet_distance_of_samples(good, features)


@pytest.mark.parametrize(
    "score", [precision_recall, kernel_inception_distance, frechet_distance_of_samples]
)
def test_one_image_and_other_features_are_refused(score: Any) -> None:
    nine = np.random.default_rng(0).normal(size=(9, 3))
    for real, fake in ((nine, nine[:1]), (nine[:1], nine), (nine, nine[:, :2])):
        with pytest.raises(ValueError, match=r"expected \[N >= \d, D\]"):
            score(real, fake)
    for empty in (np.empty((0, 3)), np.empty((3, 0)), np.zeros(3)):
        with pytest.raises(ValueError, match=r"expected \[N, D\]"):
            score(nine, empty)


def test_counts_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="k is 0"):
        precision_recall(np.zeros((9, 2)), np.zeros((9, 2)), k=0)
    with pytest.raises(ValueError, match="splits of 0"):
        inception_score(np.zeros((9, 2)), split_size=0)


def test_memory_mapped_float32_gives_the_same_and_is_not_converted_whole(
    arrays: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {side: tmp_path / f"{side}.npy" for side in ("real", "fake")}
    for side, path in paths.items():
        np.save(path, arrays[f"d256.{side}"].astype(np.float32))
    real, fake = (np.load(path, mmap_mode="r") for path in paths.values())
    whole = arrays["d256.real"], arrays["d256.fake"]
    monkeypatch.setattr(metrics, "BLOCK_ROWS", 64)
    assert precision_recall(real, fake) == precision_recall(*whole)
    assert kernel_inception_distance(real, fake, 5, 100) == kernel_inception_distance(
        *whole, 5, 100
    )
    # Blocks of 64 x 256 and of 64 x 64 in float64 are 160 kB; the reals would be 2 MB.
    tracemalloc.start()
    kernel_inception_distance(real, fake, 2, 20)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 400_000


def test_views_and_foreign_bytes_are_taken_as_they_are(arrays: Any) -> None:
    real, fake = arrays["d64.real"], arrays["d64.fake"]
    for view in (fake[::-1].copy()[::-1], fake.astype(">f8"), np.asfortranarray(fake)):
        assert precision_recall(real, view) == precision_recall(real, fake)
        assert inception_score(view) == pytest.approx(inception_score(fake), rel=1e-14)
        assert kernel_inception_distance(real, view, 3, 50) == pytest.approx(
            kernel_inception_distance(real, fake, 3, 50), rel=1e-12
        )
        ours = frechet_distance(*gaussian(real), *gaussian(view))
        assert ours == pytest.approx(frechet_distance(*gaussian(real), *gaussian(fake)), rel=1e-12)
    integers = np.random.default_rng(0).integers(0, 9, size=(2, 40, 5))
    assert precision_recall(*integers) == precision_recall(*integers.astype(float))
