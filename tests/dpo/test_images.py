"""Pairs about images in `AMATrainer`: TRL's own trainer on the same raw rows says what is right."""

import numpy as np
import pytest
from tiny_runs import QUICK
from vision_model import (  # noqa: F401 - fixtures
    make_vision_rows,
    processor_fixture,
    trl_logps,
    vision_dir_fixture,
)


QUICK = {
    **QUICK,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "max_steps": 3,
    "seed": 7,
    "per_device_eval_batch_size": 4,
}


@pytest.fixture(scope="module")
def specialists(vision_dir, tmp_path_factory):
    """Adapters of two tasks that are no mere copies of the base, in folders."""
    import torch
    from peft import get_peft_model
    from transformers import LlavaForConditionalGeneration

    folders = {}
    for seed, task in enumerate(("name", "end")):
        torch.manual_seed(seed)
        model = get_peft_model(
            LlavaForConditionalGeneration.from_pretrained(vision_dir), _lora(init_lora_weights=False)
        )
        folders[task] = str(tmp_path_factory.mktemp(task))
        model.save_pretrained(folders[task])
    return folders


def _lora(**settings):
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)


def _rows(parts: bool = False, column: str = "images"):
    return [
        {**row, "task": task}
        for task, count in (("name", 7), ("end", 5))
        for row in make_vision_rows(task, count, parts=parts, column=column)
    ]


def _ama(vision_dir, rows, folder, specialists=None, peft_config=None, **arguments):
    from datasets import Dataset

    from trl_ama import AMAConfig, AMATrainer

    return AMATrainer(
        model=vision_dir,
        args=AMAConfig(**{**QUICK, "output_dir": str(folder), **arguments}),
        train_dataset=rows if isinstance(rows, Dataset) else Dataset.from_list(rows),
        specialists=specialists,
        peft_config=peft_config,
    )


def _dpo(vision_dir, rows, folder, peft_config=None, **arguments):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{name: value for name, value in row.items() if name != "task"} for row in rows]
    return DPOTrainer(
        model=vision_dir,
        args=DPOConfig(**{**QUICK, "output_dir": str(folder), **arguments}),
        train_dataset=Dataset.from_list(rows),
        peft_config=peft_config,
    )


def _losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("parts", "column"), [(True, "images"), (False, "image")])
def test_specialists_score_what_trl_scores(vision_dir, specialists, tmp_path, parts, column):
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    rows = _rows(parts, column)
    trainer = _ama(
        vision_dir, rows, tmp_path, specialists, mixing="ama_s", per_device_eval_batch_size=3, peft_config=_lora()
    )
    plain = _dpo(vision_dir, rows, tmp_path)
    columns = {
        name: np.array(trainer.train_dataset[name]) for name in trainer.train_dataset.column_names if "logps" in name
    }
    reference = trl_logps(plain, plain.ref_model, rows)
    np.testing.assert_allclose(columns["ref_chosen_logps"], reference[:, 0], rtol=1e-5)
    np.testing.assert_allclose(columns["ref_rejected_logps"], reference[:, 1], rtol=1e-5)
    tasks = np.array([row["task"] for row in rows])
    for task, folder in specialists.items():
        model = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(vision_dir), folder)
        expected = trl_logps(plain, model, rows)[tasks == task]
        np.testing.assert_allclose(columns["specialist_chosen_logps"][tasks == task], expected[:, 0], rtol=1e-5)
        np.testing.assert_allclose(columns["specialist_rejected_logps"][tasks == task], expected[:, 1], rtol=1e-5)
        assert np.abs(expected - reference[tasks == task]).max() > 0.1  # it is not the base that was scored
    trainer.train()
    assert trainer.state.global_step == 3
    assert np.isfinite(_losses(trainer)).all()


def test_scoring_keeps_one_model_in_memory(vision_dir, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig

    from trl_ama.dpo.pair_trainer import ScoringTrainer
    from trl_ama.dpo.scoring import score_pairs

    rows = make_vision_rows("name", 5)
    args = DPOConfig(**{**QUICK, "output_dir": str(tmp_path), "per_device_eval_batch_size": 2})
    trainer = ScoringTrainer(model=vision_dir, args=args, train_dataset=Dataset.from_list(rows))
    assert trainer.ref_model is None
    scores = score_pairs(trainer, trainer.model, trainer.train_dataset, "Scoring")
    plain = _dpo(vision_dir, rows, tmp_path)
    expected = trl_logps(plain, plain.ref_model, rows)
    np.testing.assert_allclose(scores["chosen_logps"], expected[:, 0], rtol=1e-5)
    np.testing.assert_allclose(scores["rejected_logps"], expected[:, 1], rtol=1e-5)
    assert scores["chosen_tokens"].tolist() == [3] * 5 and scores["rejected_tokens"].tolist() == [4] * 5


def test_images_decide_the_log_probs(vision_dir, specialists, tmp_path):
    rows = _rows()
    images = [row["images"] for row in rows]
    swapped = [{**row, "images": images[::-1][number]} for number, row in enumerate(rows)]
    found = [
        np.array(_ama(vision_dir, given, tmp_path, specialists, peft_config=_lora()).train_dataset["ref_chosen_logps"])
        for given in (rows, swapped)
    ]
    assert np.abs(found[0] - found[1]).max() > 0.1


@pytest.mark.parametrize("peft", [True, False])
def test_proportional_trains_as_dpo_does(vision_dir, tmp_path, peft):
    from datasets import Dataset

    rows = [{**row, "task": "name"} for row in make_vision_rows("name", 20)]
    peft_config = _lora if peft else lambda: None
    plain = _dpo(vision_dir, rows, tmp_path / "dpo", peft_config=peft_config())
    plain.train()
    scorer = _dpo(vision_dir, rows, tmp_path / "scorer")
    logps = trl_logps(scorer, scorer.ref_model, rows)
    data = Dataset.from_list(rows)
    ours = _ama(vision_dir, data, tmp_path / "ama", mixing="proportional", peft_config=peft_config())
    ours.train()
    assert _losses(ours) == _losses(plain)
    assert _losses(ours)[0] != _losses(ours)[2]
    # With the reference's log-probs in the data, no second model stays in memory and the numbers are the same
    for number, column in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
        data = data.add_column(column, logps[:, number].astype(np.float32))
    ours = _ama(vision_dir, data, tmp_path / "joined", mixing="proportional", peft_config=peft_config())
    assert ours.ref_model is None
    ours.train()
    np.testing.assert_allclose(_losses(ours), _losses(plain), rtol=1e-5)


def test_wrong_reference_is_told_of(vision_dir, tmp_path, caplog):
    from datasets import Dataset

    rows = [{**row, "task": "name"} for row in make_vision_rows("name", 8)]
    data = Dataset.from_list(rows)
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        data = data.add_column(column, np.full(len(data), -30, dtype=np.float32))
    _ama(vision_dir, data, tmp_path, mixing="proportional", max_steps=1).train()
    assert "differ from those of the untrained policy" in caplog.text


def test_fast_path_is_off_and_says_why(vision_dir, tmp_path, caplog):
    from trl_ama import AMAError

    rows = [{**row, "task": "name"} for row in make_vision_rows("name", 8)]
    trainer = _ama(vision_dir, rows, tmp_path, mixing="proportional", max_steps=1)
    trainer.train()
    assert trainer.prefix_sharing.taken["fast"] == 0
    assert "off for LlavaForConditionalGeneration: it is a multimodal model" in caplog.text
    with pytest.raises(AMAError, match="multimodal model"):
        _ama(vision_dir, rows, tmp_path, mixing="proportional", prefix_sharing=True).train()
