"""`--only_tasks`: what such a run does and leaves alone. That several at once are safe is tested in `test_processes.py`."""

import pytest
from whole_runs import SIZES, recipe_fixture  # noqa: F401 - fixtures

from trl_ama import AMAError, run_pipeline
from trl_ama.common.files import read_json


@pytest.fixture
def quick(recipe, tmp_path):
    """Parses the recipe with one step of each training."""

    def build(*flags):
        return recipe(tmp_path / "run", "--max_steps", 1, "--specialist_args", "{max_steps: 1}", *flags)

    return build


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_part_of_the_run(quick, tmp_path, capsys):
    assert run_pipeline(*quick("--only_tasks", "sort")) is None
    folder = tmp_path / "run"
    assert names(folder / "specialists") == names(folder / "reference_losses") == ["sort"]
    assert names(folder) == ["reference_losses", "specialists"]  # no page, no results
    assert (
        read_json(folder / "reference_losses" / "sort" / "fingerprint.json")["order"] == 1
    )  # its place in the recipe
    said = capsys.readouterr().out
    assert "specialist        sort" in said and "specialist        list" not in said and "generalist  " not in said
    assert (
        "only_tasks was ['sort'], so there is no generalist; reference losses are still missing of ['list', 'brief']"
        in said
    )

    # The generalist waits for nobody, and says what is missing
    with pytest.raises(
        AMAError, match=r"Task 'list' has no specialist in .* \(nor have \['brief'\]\); found \['sort'\]"
    ):
        run_pipeline(*quick(), stages=("train",))
    run_pipeline(*quick("--only_tasks", "list", "brief"), stages=("specialists",))
    assert "still missing of ['list', 'brief']" in capsys.readouterr().out
    with pytest.raises(
        AMAError, match=r"Task 'list' has no reference losses \(nor have \['brief'\]\); found \['sort'\]"
    ):
        run_pipeline(*quick(), stages=("train", "eval"))
    run_pipeline(*quick("--only_tasks", "brief", "list"), stages=("losses",))
    assert "only_tasks was ['list', 'brief']; all reference losses are there" in capsys.readouterr().out
    run_pipeline(*quick(), stages=("train",))
    assert (folder / "generalists" / "ama_s" / "adapter_model.safetensors").is_file()


def test_shards_of_other_tasks_stay(quick, tmp_path):
    """Another job may be in the middle of them."""
    shard = tmp_path / "run" / "reference_losses" / ".list.shards" / "000-00000-abc.parquet"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"of another job")
    run_pipeline(*quick("--only_tasks", "sort"))
    run_pipeline(*quick("--only_tasks", "sort"))
    assert shard.read_bytes() == b"of another job"


def test_what_is_refused(quick):
    with pytest.raises(AMAError, match=r"only_tasks names 'sorting', but the recipe's tasks are \['list', .*'sort'"):
        run_pipeline(*quick("--only_tasks", "list", "sorting"))
    with pytest.raises(AMAError, match=r"only_tasks \['list'\] chooses .* this command makes neither.* Leave it out"):
        run_pipeline(*quick("--only_tasks", "list"), stages=("eval",))
    with pytest.raises(AMAError, match=r"Task 'list' has no specialist in .*; found \[\]"):
        run_pipeline(*quick("--only_tasks", "list"), stages=("losses",))


def test_as_yaml_and_flags_give_it(quick):
    assert quick("--only_tasks", "a", "b")[0].only_tasks == ["a", "b"]
    assert quick()[0].only_tasks == []
    assert type(quick()[0])(only_tasks="list").only_tasks == ["list"]
    assert set(SIZES) == {"list", "sort", "brief"}
