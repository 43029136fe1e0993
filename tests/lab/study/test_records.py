"""Records: whole or absent, and good for as long as what they depend on is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from terdit_cli.errors import InputFileError
from terdit_cli.lab.study.records import Probe, current, differences, model_asked, read, save
from terdit_cli.lab.study.spec import Study, load_study


def probe(**changes: object) -> Probe:
    values: dict[str, object] = {
        "asked": {"recipe": {"seed": 0}}, "command": "c", "machine": "m", "date": "d",
        "seconds": 1.0, "accuracy": 0.5, "per_class": {"a": 0.5}, "trained_on": 9, "held_out": 1,
    }  # fmt: skip
    return Probe.model_validate(values | changes)


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "probe.json"
    assert read(path, Probe) is None
    record = probe(per_class={"a": float("inf")})
    save(path, record)
    assert read(path, Probe) == record
    assert [file.name for file in path.parent.iterdir()] == ["probe.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2}', '{"version": 1, "x": 1}'])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "probe.json"
    path.write_text(text)
    with pytest.raises(InputFileError, match=r"not a probe of a study.*probe\.json.*delete it"):
        read(path, Probe)


def test_a_record_is_made_again_where_what_it_depends_on_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "probe.json"
    save(path, probe(asked={"recipe": {"seed": 0}, "n": 5}))
    assert current(path, Probe, {"recipe": {"seed": 0}, "n": 5}) is not None
    assert current(path, Probe, {"recipe": {"seed": 1}, "n": 5}) is None
    assert current(path, Probe, {"recipe": {"seed": 0}, "n": 6}) is None


def test_a_field_that_did_not_exist_then_counts_as_its_default(study: Study) -> None:
    new = model_asked(study, study.variant("ternary"), 0)
    old = {"recipe": {**new["recipe"], "ternary": dict(new["recipe"]["ternary"])}}
    del old["recipe"]["ternary"]["alpha_init"]  # "absmean", its default
    assert differences(old, new) == []
    del old["recipe"]["ternary"]["ste_clip"]  # None, its default
    assert differences(old, new) == []
    clipped = {"recipe": new["recipe"] | {"ternary": new["recipe"]["ternary"] | {"ste_clip": 2.5}}}
    assert differences(old, clipped) == ["recipe.ternary.ste_clip"]
    del old["recipe"]["ternary"]["granularity"]  # "tensor", which is not
    assert differences(old, new) == ["recipe.ternary.granularity"]
    nested = model_asked(study, study.variant("packed"), 0)
    assert differences({**nested, "of": old}, nested) == ["of.recipe.ternary.granularity"]
    old["recipe"]["gone"] = 1
    assert "recipe.gone" in differences(old, new)


def test_full_precision_does_not_depend_on_how_ternary_would_be(study_file: Path) -> None:
    plain, rows = (load_study(study_file, words) for words in ([], ["ternary.granularity=row"]))
    for name, found in (("baseline", []), ("ternary", ["recipe.ternary.granularity"])):
        asked = [model_asked(study, plain.variant(name), 0) for study in (plain, rows)]
        assert differences(*asked) == found
    norm = load_study(study_file, ["ternary.adaln_norm=true"])
    asked = [model_asked(study, plain.variant("baseline"), 0) for study in (plain, norm)]
    assert differences(*asked) == ["recipe.ternary.adaln_norm"]


def test_where_the_data_lie_and_how_a_run_is_logged_change_no_model(study_file: Path) -> None:
    plain, moved = (
        load_study(study_file, words)
        for words in ([], ["data.workers=9", "logging.every=3", "checkpoint.every=7"])
    )
    variant = plain.variant("ternary")
    assert model_asked(plain, variant, 0) == model_asked(moved, variant, 0)
    other = load_study(study_file, ["optim.lr=1e-5"])
    asked = [model_asked(s, variant, 0) for s in (plain, other)]
    assert differences(*asked) == ["recipe.optim.lr"]
