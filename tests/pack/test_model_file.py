"""Which reader a path gets, and what is said when there is none."""

from __future__ import annotations

import pytest

from terdit_cli.commands import pack, ternarize
from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.hub.model_file import ModelFile
from terdit_cli.model.ternary import TernaryConfig
from terdit_cli.pack.read_checkpoint import CheckpointExport
from terdit_cli.pack.read_release import ReleasedFolder
from terdit_cli.pack.tdt import TdtFile


def test_each_kind_has_its_reader(tmp_path, tiny_config, make_ckpt, tiny_tdts, released_folder):
    run = tmp_path / "run"
    run.mkdir()
    ckpt = make_ckpt(run / "ckpt.pt", tiny_config)
    assert ModelFile.open(run).weights_file == ModelFile.open(ckpt).weights_file == ckpt
    assert ModelFile.open(run).kind == "checkpoint"
    assert ModelFile.open(tiny_tdts["t2"]).kind == "tdt"
    assert ModelFile.open(released_folder).kind == "release"
    kinds = {
        run: CheckpointExport,
        ckpt: CheckpointExport,
        tiny_tdts["t5"]: TdtFile,
        tiny_tdts["int8"]: TdtFile,
    }
    for path, kind in kinds.items():
        with ModelFile.open(path).exported() as model:
            assert isinstance(model, kind)
    with ModelFile.open(released_folder).exported(n_heads=4) as model:
        assert isinstance(model, ReleasedFolder)
    with ModelFile.open(run).exported("raw") as model:
        assert model.info.weights == "raw"


def test_paths_without_a_model(tmp_path):
    with pytest.raises(InputFileError, match=r"no such model: got .*absent.* Fix: check the path"):
        ModelFile.open(tmp_path / "absent").exported()
    with pytest.raises(InputFileError, match=r"no finished model.*Fix: give a run folder"):
        ModelFile.open(tmp_path).exported()
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(InputFileError, match=r"Fix: finish the run: .*--resume auto --out .*"):
        ModelFile.open(tmp_path).exported()


def test_full_precision_must_be_ternarized_first(tmp_path, tiny_config, make_ckpt):
    path = make_ckpt(tmp_path / "ckpt.pt", tiny_config, TernaryConfig(enabled=False))
    with pytest.raises(UsageError, match=r"full precision.*ckpt\.pt.*Fix: terdit ternarize .*"):
        ModelFile.open(path).exported()


def test_overrides_only_where_needed(tmp_path, tiny_config, make_ckpt, tiny_tdts):
    path = make_ckpt(tmp_path / "ckpt.pt", tiny_config)
    for source in (path, tiny_tdts["t2"]):
        with pytest.raises(UsageError, match=r"takes overrides: got n_heads=4 .*Fix: leave them"):
            ModelFile.open(source).exported(n_heads=4)


def test_raw_weights_are_those_of_a_checkpoint(tiny_tdts, released_folder):
    for source in (tiny_tdts["t2"], tiny_tdts["int8"], released_folder):
        with pytest.raises(UsageError, match=r"--raw is for checkpoints.*Fix: leave --raw out"):
            ModelFile.open(source).exported("raw")


def test_fields_with_the_names_of_arguments(released_folder, tmp_path):
    for name in ("path", "folder", "weights", "source", "output", "codec", "rest", "self"):
        with pytest.raises(UsageError, match=f"unknown model field: got '{name}'"):
            pack.run(released_folder, tmp_path / "m.tdt", overrides={name: 1})


def test_a_run_that_is_not_finished_has_its_checkpoints(tmp_path):
    step = tmp_path / "checkpoints" / "step-00000004"
    step.mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text("")
    (step / "manifest.json").write_text("{}")
    for path in (tmp_path, step):
        with pytest.raises(InputFileError, match=rf"Fix: .*terdit export {path} -o early"):
            ModelFile.open(path).exported()


@pytest.mark.parametrize("name", ["ckpt.pt", "other.pt"])
def test_an_output_takes_no_checkpoints_place(tmp_path, tiny_config, make_ckpt, name):
    run = tmp_path / "run"
    run.mkdir()
    path = make_ckpt(run / "ckpt.pt", tiny_config)
    before = path.read_bytes()
    for source in (run, path):
        for verb in (pack.run, ternarize.run):
            with pytest.raises(
                UsageError, match=r"output (is the input|has a checkpoint's suffix).*another"
            ):
                verb(source, run / name)
    assert path.read_bytes() == before
    assert [file.name for file in run.iterdir()] == ["ckpt.pt"]
