"""The two Inceptions on files of the real form: torch-fidelity and clean-fid are the witnesses."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from terdit_cli.errors import EnvironmentProblem, InputFileError
from terdit_cli.evaluate import inception
from terdit_cli.evaluate.feature_network import Outputs
from terdit_cli.evaluate.features import FeatureExtractor, Features, _Workers, make_extractor
from terdit_cli.evaluate.metrics import inception_score, kernel_inception_distance
from terdit_cli.evaluate.weights import ADM, CLEAN, weights_sha256
from terdit_cli.system.torchvision_shim import import_vision

SIZES = [(1, 1), (28, 28), (256, 256), (40, 28), (1, 300), (310, 300)]  # [H, W]
Images = list[NDArray[np.uint8]]


def some_images(sizes: list[tuple[int, int]], seed: int = 0) -> Images:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]


def empty_network() -> Any:
    """torch-fidelity's architecture with random weights, made lively enough to tell images."""
    library = import_vision("torch_fidelity.feature_extractor_inceptionv3")

    class Empty(library.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            """Keep the random weights."""

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(0)
    network = Empty("empty", ["2048"], nothing)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.bias)  # so that logits with it are seen to be others
    return network


class StyleGanForm(nn.Module):
    """What inception-2015-12-05.pt is: `layers` and `output`, and four arguments."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(getattr(network, n) for n in inception._BLOCKS))
        self.layers.append(network.AvgPool)
        self.output = network.fc

    def forward(
        self,
        img: Tensor,
        return_features: bool = False,
        use_fp16: bool = False,
        no_output_bias: bool = False,
    ) -> Tensor:
        features = self.layers(img).flatten(1)
        if return_features:
            return features
        bias = None if no_output_bias else self.output.bias
        return nn.functional.linear(features, self.output.weight, bias).softmax(1)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("inception")
    network = empty_network()
    made = {"adm": folder / ADM.name, "clean": folder / CLEAN.name}
    torch.save(network.state_dict(), made["adm"])
    torch.jit.script(StyleGanForm(network).eval()).save(str(made["clean"]))
    yield made
    for path in made.values():  # 96 MB each, and pytest keeps the folders of three runs
        path.unlink()


@pytest.fixture(scope="session")
def adm(files: dict[str, Path]) -> FeatureExtractor:
    return make_extractor("adm", files["adm"])


@pytest.fixture(scope="session")
def clean(files: dict[str, Path]) -> FeatureExtractor:
    return make_extractor("clean", files["clean"])


@pytest.fixture(scope="session")
def witness(files: dict[str, Path]) -> Any:
    """torch-fidelity's own extractor with the same file, and what its 1x1 branch gives."""
    library = import_vision("torch_fidelity.feature_extractor_inceptionv3")
    network = library.FeatureExtractorInceptionV3(
        "witness", ["2048", "logits_unbiased"], str(files["adm"])
    )
    network.branches = []
    network.Mixed_6d.branch1x1.register_forward_hook(
        lambda _module, _input, output: network.branches.append(output.clone())
    )
    return network


# Sums of K products in another order differ by about sqrt(K) * 2^-24, K up to 9 * 2048: 8e-6.
ORDER_TOLERANCE = 1e-5
# exp() turns the logits' absolute error into a relative one, and they reach tens.
SOFTMAX_TOLERANCE = 1e-4


def equal(
    ours: NDArray[np.float32] | None,
    theirs: NDArray[np.float32],
    tolerance: float = ORDER_TOLERANCE,
) -> bool:
    assert ours is not None
    assert ours.shape == theirs.shape
    import sys

    print(np.abs(ours - theirs).max() / np.abs(theirs).max(), file=sys.stderr)
    return bool(np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max())


@pytest.mark.slow
def test_adm_equals_torch_fidelity(adm: FeatureExtractor, witness: Any) -> None:
    images = some_images(SIZES)
    features = adm(images)
    assert features.pool.dtype == np.float32
    assert features.spatial is not None
    assert features.logits is not None
    for index, image in enumerate(images):
        pool, logits = witness(torch.from_numpy(image).permute(2, 0, 1)[None])
        assert equal(features.pool[index], pool[0].numpy())
        assert equal(features.logits[index], logits[0].numpy())
        # TensorFlow's order: y, x, channel.
        branch = witness.branches.pop()[0].numpy()
        assert branch.shape == (192, 17, 17)
        spatial = [branch[c, y, x] for y in range(17) for x in range(17) for c in range(7)]
        assert equal(features.spatial[index], np.array(spatial, dtype=np.float32))
    assert not np.allclose(features.pool[1], features.pool[2])


class Tensors(torch.utils.data.Dataset[Tensor]):
    """Images as torch-fidelity takes them: uint8 [3, H, W]."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.images[index]).permute(2, 0, 1)


@pytest.mark.slow
def test_adm_gives_torch_fidelity_s_metrics(
    adm: FeatureExtractor, files: dict[str, Path], witness: Any
) -> None:
    """The library's whole way from images to numbers; one split, one subset: no chance in it."""
    fidelity = import_vision("torch_fidelity")
    fake = [image // (1 + 2 * i) for i, image in enumerate(some_images([(32, 32)] * 4))]
    real = [image // 2 for image in some_images([(32, 32)] * 4, seed=1)]
    theirs = fidelity.calculate_metrics(
        input1=Tensors(fake),
        input2=Tensors(real),
        isc=True,
        isc_splits=1,
        kid=True,
        kid_subsets=1,
        kid_subset_size=4,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,  # no worker processes
        feature_extractor_weights_path=str(files["adm"]),
    )
    ours = adm(fake)
    assert ours.logits is not None
    score = inception_score(ours.logits)
    distance = kernel_inception_distance(adm(real).pool, ours.pool, 1)
    # A random classifier hardly tells images apart: what it tells is what is above 1.
    assert score - 1 == pytest.approx(theirs["inception_score_mean"] - 1, rel=1e-3)
    biased = witness.fc.bias.numpy() + ours.logits
    assert inception_score(biased) - 1 != pytest.approx(score - 1, rel=2e-3)
    assert distance == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)


@pytest.mark.slow
def test_clean_equals_clean_fid(clean: FeatureExtractor, files: dict[str, Path]) -> None:
    images = some_images(SIZES[2:])
    wrapper = import_vision("cleanfid.inception_torchscript").InceptionV3W(
        str(files["clean"].parent), download=False, resize_inside=False
    )
    resize = import_vision("cleanfid.resize").build_resizer("clean")
    batch = torch.from_numpy(np.stack([resize(image) for image in images])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        theirs = wrapper(batch)
        logits = theirs @ wrapper.base.output.weight.T
        probabilities = wrapper.base((batch[:1] - 128) / 128, no_output_bias=True)
    features = clean(images)
    assert features.spatial is None
    assert features.logits is not None
    assert equal(features.pool, theirs.numpy())
    assert equal(features.logits, logits.numpy())
    softmax = torch.from_numpy(features.logits[:1]).softmax(1)
    assert equal(softmax.numpy(), probabilities.numpy(), SOFTMAX_TOLERANCE)


@pytest.mark.slow
def test_clean_and_adm_differ_by_the_resize(clean: FeatureExtractor, adm: FeatureExtractor) -> None:
    images = some_images([(299, 299), (256, 256)])
    ours, theirs = clean(images).pool, adm(images).pool
    assert equal(ours[0], theirs[0])
    assert np.abs(ours[1] - theirs[1]).max() > 0.01 * np.abs(theirs[1]).max()


def same_bits(first: Features, second: Features) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))
        for a, b in (
            (first.pool, second.pool),
            (first.spatial, second.spatial),
            (first.logits, second.logits),
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adm", "clean"])
def test_features_do_not_depend_on_the_batch(name: str, request: pytest.FixtureRequest) -> None:
    extractor: FeatureExtractor = request.getfixturevalue(name)
    images = some_images([(28, 28), (40, 28), (28, 28), (64, 64), (8, 9)])
    together = extractor(images)
    order = [3, 4, 0, 2, 1]
    shuffled = extractor([images[i] for i in order])
    alone = extractor([images[1]])
    assert together.pool.shape == (5, 2048)
    for row, i in enumerate(order):
        one = Features(
            *(
                None if v is None else v[i]
                for v in (together.pool, together.spatial, together.logits)
            )
        )
        other = Features(
            *(
                None if v is None else v[row]
                for v in (shuffled.pool, shuffled.spatial, shuffled.logits)
            )
        )
        assert same_bits(one, other)
    assert np.array_equal(alone.pool[0], together.pool[1])


@pytest.mark.slow
def test_features_do_not_depend_on_the_number_of_threads(adm: FeatureExtractor) -> None:
    images = some_images([(28, 28)] * 8)
    before = torch.get_num_threads()
    made = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            workers = _Workers(adm.device)
            made.append(FeatureExtractor(adm._network, adm.device, "fp32", workers)(images))
            assert torch.get_num_threads() == threads
            assert set(workers.pool.map(lambda _: torch.get_num_threads(), range(9))) == {1}
        finally:
            torch.set_num_threads(before)
    assert same_bits(*made)


def test_a_short_batch_is_filled_up_as_on_a_gpu(adm: FeatureExtractor) -> None:
    seen: list[torch.Size] = []
    network = adm._network

    def forward(batch: Tensor) -> Any:
        seen.append(batch.shape)
        return network.forward(batch)

    watched = FeatureExtractor(replace(network, forward=forward), adm.device, "fp32", adm._workers)
    assert watched(some_images([(9, 9)] * 5)).pool.shape == (5, 2048)
    assert seen == [torch.Size([4, 3, 299, 299])] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adm", "clean"])
def test_bf16_shares_the_weights_and_is_near(name: str, request: pytest.FixtureRequest) -> None:
    extractor: FeatureExtractor = request.getfixturevalue(name)
    images = some_images([(28, 28)] * 2)
    low = extractor.with_precision("bf16")
    exact, rounded = extractor(images), low(images)
    assert (low.precision, extractor.precision) == ("bf16", "fp32")
    assert low._network is extractor._network
    assert low.pipeline == extractor.pipeline
    assert rounded.pool.dtype == np.float32
    error = np.abs(rounded.pool - exact.pool).max() / np.abs(exact.pool).max()
    # bfloat16 keeps 8 bits: 2^-9 a rounding, and 20 layers of them.
    assert 0 < error < 20 * 2**-9
    assert same_bits(extractor(images), exact)


def test_what_the_extractors_say_of_themselves(
    adm: FeatureExtractor, clean: FeatureExtractor, files: dict[str, Path]
) -> None:
    assert (adm.dim, adm.spatial_dim, adm.classes) == (2048, 2023, 1008)
    assert (clean.dim, clean.spatial_dim, clean.classes) == (2048, None, 1008)
    assert (adm.distance_name, clean.distance_name) == ("FID", "FID")
    assert adm.pipeline.startswith("adm@")
    assert adm.pipeline.endswith("tensorflow bilinear 299")
    assert clean.pipeline.endswith("clean-fid bicubic 299")
    # Random weights are not the usual ones.
    assert str(files["adm"]) in adm.warnings[0]
    assert "6726825d" in adm.warnings[0]
    assert "f58cb9b6" in clean.warnings[0]


def test_the_old_format_of_torch_save(tmp_path: Path, files: dict[str, Path]) -> None:
    """Files of before torch 1.6 are no zips."""
    path = tmp_path / "old.pth"
    tensors = torch.load(files["adm"], weights_only=True)
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    library = import_vision("torch_fidelity.feature_extractor_inceptionv3")
    loaded = inception._load_adm(library, path).state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    path.unlink()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil-was-here"),))


def wrong_file(kind: str, path: Path, real: Path) -> None:
    if kind == "truncated":
        path.write_bytes(real.read_bytes()[:1_000_000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<!DOCTYPE html> not found")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Evil(), protocol=2))
    elif kind == "code":
        torch.save({"fc.weight": Evil()}, path)
    elif kind == "other":
        torch.save(nn.Linear(2, 2).state_dict(), path)
    elif kind == "list":
        torch.save([torch.zeros(1)], path)
    else:
        torch.save({"fc.weight": 3}, path)


def test_adm_says_what_is_missing(tmp_path: Path, files: dict[str, Path]) -> None:
    path = tmp_path / "w.pth"
    wrong_file("other", path, files["adm"])
    with pytest.raises(InputFileError, match=r"got Missing key.*Conv2d_1a_3x3"):
        make_extractor("adm", path)


KINDS = ["truncated", "empty", "text", "pickle", "code", "other", "list", "number"]


@pytest.mark.parametrize("kind", KINDS)
def test_adm_refuses_other_files(
    kind: str, tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    wrong_file(kind, path, files["adm"])
    with pytest.raises(InputFileError) as error:
        make_extractor("adm", path)
    text = str(error.value)
    assert "not the weights of torch-fidelity's Inception" in text
    assert str(path) in text
    assert ADM.url in text
    assert "\n" not in text
    assert not Path("evil-was-here").exists()


@pytest.mark.parametrize("wrong", range(3))
def test_features_that_are_not_finite(adm: FeatureExtractor, wrong: int) -> None:
    def forward(batch: Tensor) -> Outputs:
        sizes = (2048, 2023, 1008)
        outputs = [torch.zeros(len(batch), size) for size in sizes]
        outputs[wrong][0, -1] = float("nan")
        return Outputs(*outputs)

    broken = FeatureExtractor(
        replace(adm._network, forward=forward), adm.device, "fp32", adm._workers
    )
    with pytest.raises(InputFileError, match=r"not finite.*adm@"):
        broken(some_images([(28, 28)]))


def test_adm_without_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(inception, "import_vision", missing)
    with pytest.raises(EnvironmentProblem, match=r"torch_fidelity.*pip install torch-fidelity"):
        make_extractor("adm")


def test_clean_refuses_other_files(tmp_path: Path, files: dict[str, Path]) -> None:
    path = tmp_path / "net.pt"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    with pytest.raises(InputFileError, match=r"not the Inception network.*net\.pt.*nvidia\.com"):
        make_extractor("clean", path)
    for content in (b"", b"nothing", files["clean"].read_bytes()[:100_000]):
        path.write_bytes(content)
        with pytest.raises(InputFileError, match=r"not a TorchScript file.*net\.pt"):
            make_extractor("clean", path)
    with pytest.raises(InputFileError, match=r"not a TorchScript file.*get it from.*nvidia\.com"):
        make_extractor("clean", files["adm"])
    with (
        pytest.warns(UserWarning, match="TorchScript archive"),
        pytest.raises(InputFileError, match="not the weights of torch-fidelity's Inception"),
    ):
        make_extractor("adm", files["clean"])


def save_narrow(path: Path, layers: nn.Module) -> None:
    program = nn.Sequential()
    program.add_module("layers", layers)
    torch.jit.script(program).save(str(path))


def test_clean_with_layers_of_another_width(tmp_path: Path) -> None:
    path = tmp_path / "narrow.pt"
    save_narrow(path, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()))
    with pytest.raises(InputFileError, match=r"12 features, not 2048.*narrow\.pt"):
        make_extractor("clean", path)(some_images([(28, 28)]))


def test_clean_without_an_output_layer_has_no_logits(tmp_path: Path) -> None:
    path = tmp_path / "body.pt"
    save_narrow(path, nn.Sequential(nn.Flatten(2), nn.AdaptiveAvgPool2d((1, 2048)), nn.Flatten()))
    extractor = make_extractor("clean", path)
    assert extractor.classes is None
    assert extractor(some_images([(28, 28)])).logits is None


@pytest.mark.parametrize("name", ["adm", "clean"])
def test_found_in_the_cache(
    name: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in the cache must be the pinned one; that one brings no warning."""
    monkeypatch.setenv("TERDIT_CACHE", str(files[name].parent))
    with pytest.raises(InputFileError, match="in the cache are damaged"):
        make_extractor(name)
    pinned = replace(getattr(inception, name.upper()), sha256=weights_sha256(files[name]))
    monkeypatch.setattr(inception, name.upper(), pinned)
    extractor = make_extractor(name)
    assert extractor.warnings == ()
    assert f"{name}@{pinned.sha256[:8]}" in extractor.pipeline


@pytest.mark.parametrize("name", ["adm", "clean"])
def test_no_weights_and_no_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERDIT_CACHE", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    pinned = replace(getattr(inception, name.upper()), url="http://127.0.0.1:1/weights")
    monkeypatch.setattr(inception, name.upper(), pinned)
    with pytest.raises(EnvironmentProblem) as error:
        make_extractor(name)
    for part in (str(tmp_path / pinned.name), pinned.sha256, pinned.url, "--weights FILE"):
        assert part in str(error.value)
