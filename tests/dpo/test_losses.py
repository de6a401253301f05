"""Per-pair losses: their mean is TRL's loss on the same batch; hand-worked values; what has no per-pair meaning."""

import copy
import inspect
import itertools
import math
import re

import pytest
import torch
from peft import LoraConfig
from tiny_models import make_model
from tiny_pairs import make_dataset
from trl import DPOConfig, DPOTrainer

from trl_ama.common.errors import AMAError
from trl_ama.dpo.losses import (
    PAIR_LOSSES,
    PairLogProbs,
    PreferenceLossConfig,
    excess_losses,
    pair_losses,
    sequence_logps,
    untrained_loss,
)
from trl_ama.dpo.pair_batches import RecordedForward


F_DIVERGENCES = ["forward_kl", "js_divergence", "alpha_divergence"]
# `DPOTrainer` allows other divergences for these only
WITH_F_DIVERGENCE = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"]
USES_LABEL_SMOOTHING = ["exo_pair", "robust"]


# ---- Against TRL ----


@pytest.fixture(scope="module")
def trainer(tokenizer, tmp_path_factory):
    """One `DPOTrainer` whose loss settings the tests vary; its adapter is far from the base."""
    args = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("dpo")),
        per_device_train_batch_size=6,
        max_length=64,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = DPOTrainer(
        model=make_model(len(tokenizer)),
        args=args,
        train_dataset=make_dataset({"list": 2, "sort": 2, "brief": 2}, labelled=False),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    torch.manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    trainer.model.train()
    return trainer


@pytest.fixture(scope="module")
def batch(trainer):
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in range(6)]))


def configure(trainer, config: PreferenceLossConfig, ld_alpha=None) -> None:
    """Give the trainer the loss settings that `DPOTrainer.__init__` would have taken from its arguments."""
    trainer.loss_types, trainer.loss_weights = config.loss_type, config.loss_weights
    trainer.beta, trainer.label_smoothing = config.beta, config.label_smoothing
    trainer.f_divergence_type = config.f_divergence_type
    trainer.f_alpha_divergence_coef = config.f_alpha_divergence_coef
    trainer.args.discopop_tau = config.discopop_tau
    trainer.ld_alpha = ld_alpha


def both_losses(trainer, batch, config, ld_alpha=None) -> tuple[torch.Tensor, torch.Tensor]:
    """TRL's loss of the batch, a scalar, and ours of each pair, from the same forward pass of the policy."""
    configure(trainer, config, ld_alpha)
    forward = RecordedForward(trainer.model)
    theirs = trainer.compute_loss(forward, dict(batch))
    mask = batch["completion_mask"]
    chosen, rejected = sequence_logps(forward.outputs.log_probs, mask, ld_alpha)
    with torch.no_grad():
        reference = sequence_logps(base_outputs(trainer, batch).log_probs, mask, ld_alpha)
    return theirs, pair_losses(PairLogProbs(chosen, rejected, *reference, *mask.sum(dim=1).chunk(2)), config)


def base_outputs(trainer, batch):
    """The base model under its adapter."""
    with trainer.model.disable_adapter():
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return trainer.model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)


def assert_equal_to_trl(trainer, batch, config, ld_alpha=None):
    theirs, ours = both_losses(trainer, batch, config, ld_alpha)
    assert ours.shape == (6,)
    assert ours.std() > 1e-3  # pairs differ, so a mean over the wrong thing would show
    torch.testing.assert_close(ours.mean(), theirs, rtol=2e-6, atol=1e-6)


def smoothing_of(loss_type: str) -> float:
    return 0.1 if loss_type in USES_LABEL_SMOOTHING else 0.0


def test_the_policy_is_far_from_its_reference(trainer, batch):
    """Else all losses would be those of an untrained policy, and equal for the wrong reasons."""
    theirs, _ = both_losses(trainer, batch, PreferenceLossConfig(["sigmoid"], beta=0.5))
    assert abs(theirs.item() - math.log(2)) > 0.1


def test_every_loss_of_trl_is_supported_or_refused_with_a_reason():
    known = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))
    assert len(known) > 10
    assert known == {*PAIR_LOSSES, "aot", "aot_unpaired", "sft"}


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("loss_type", list(PAIR_LOSSES))
def test_mean_is_trls_loss(trainer, batch, loss_type, beta):
    config = PreferenceLossConfig([loss_type], beta=beta, label_smoothing=smoothing_of(loss_type))
    assert_equal_to_trl(trainer, batch, config)


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing"),
    [("robust", 0.0), ("robust", 0.05), ("robust", 0.3), ("exo_pair", 0.05), ("exo_pair", 0.3)],  # exo_pair needs some
)
def test_mean_is_trls_loss_with_label_smoothing(trainer, batch, loss_type, label_smoothing):
    config = PreferenceLossConfig([loss_type], beta=0.5, label_smoothing=label_smoothing)
    assert_equal_to_trl(trainer, batch, config)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "nca_pair"])
def test_label_smoothing_leaves_the_losses_alone_that_trl_does_not_smooth(trainer, batch, loss_type):
    smooth = PreferenceLossConfig([loss_type], beta=0.5, label_smoothing=0.2)
    assert_equal_to_trl(trainer, batch, smooth)
    plain = both_losses(trainer, batch, PreferenceLossConfig([loss_type], beta=0.5))[1]
    torch.testing.assert_close(both_losses(trainer, batch, smooth)[1], plain)


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
@pytest.mark.parametrize("loss_type", WITH_F_DIVERGENCE)
def test_mean_is_trls_loss_with_f_divergences(trainer, batch, loss_type, divergence):
    config = PreferenceLossConfig(
        [loss_type], beta=0.02, label_smoothing=smoothing_of(loss_type), f_divergence_type=divergence
    )
    assert_equal_to_trl(trainer, batch, config)
    plain = PreferenceLossConfig([loss_type], beta=0.02, label_smoothing=smoothing_of(loss_type))
    difference = both_losses(trainer, batch, config)[1] - both_losses(trainer, batch, plain)[1]
    assert difference.abs().max() > 1e-3  # the divergence does something


@pytest.mark.parametrize("coefficient", [0.2, 1.0, 1.0 + 1e-7, 2.0])
def test_mean_is_trls_loss_along_the_alpha_divergences(trainer, batch, coefficient):
    settings = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": coefficient}
    assert_equal_to_trl(trainer, batch, PreferenceLossConfig(["sigmoid"], beta=0.02, **settings))


def test_alpha_divergence_survives_large_logratios():
    # (exp(−0.5·(−400)) − 1)/(−0.5) would overflow float32; TRL clamps the exponent at 80
    logps = torch.tensor([-400.0]), torch.tensor([0.0])
    zero, one = torch.zeros(1), torch.ones(1)
    config = PreferenceLossConfig(["sigmoid"], beta=1e-30, f_divergence_type="alpha_divergence")
    loss = pair_losses(PairLogProbs(*logps, zero, zero, one, one), config)
    # margin = −2·(e^80 − 1) = −1.108e35, times β: −1.108e5, and −logσ of it: 1.108e5
    torch.testing.assert_close(loss, torch.tensor([2 * math.exp(80) * 1e-30]))


@pytest.mark.parametrize("ld_alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "apo_down"])
def test_mean_is_trls_loss_with_ld_alpha(trainer, batch, loss_type, ld_alpha):
    assert_equal_to_trl(trainer, batch, PreferenceLossConfig([loss_type], beta=0.3), ld_alpha)


@pytest.mark.parametrize("divergence", ["reverse_kl", "js_divergence"])
def test_mean_is_trls_loss_with_everything_at_once(trainer, batch, divergence):
    config = PreferenceLossConfig(
        ["robust", "ipo", "discopop"], [0.5, 0.01, 2.0], 0.2, 0.1, divergence, discopop_tau=0.3
    )
    assert_equal_to_trl(trainer, batch, config, ld_alpha=0.4)


@pytest.mark.parametrize("pair", list(itertools.combinations(PAIR_LOSSES, 2))[::7])
def test_mean_is_trls_loss_for_weighted_sums(trainer, batch, pair):
    assert_equal_to_trl(trainer, batch, PreferenceLossConfig(list(pair), [0.8, 0.3], 0.5, 0.1))


def test_weights_default_to_one(trainer, batch):
    config = PreferenceLossConfig(["sigmoid", "apo_zero"], beta=0.5)
    assert config.loss_weights == [1.0, 1.0]
    assert_equal_to_trl(trainer, batch, config)


def test_settings_come_from_the_trainers_arguments(trainer):
    args = copy.copy(trainer.args)  # building another would reset Accelerate's state under the trainer
    args.loss_type, args.loss_weights, args.beta = ["sigmoid", "robust"], [0.4, 0.6], 0.3
    args.label_smoothing, args.f_divergence_type, args.f_alpha_divergence_coef = 0.2, "js_divergence", 0.7
    args.discopop_tau = 0.11
    assert PreferenceLossConfig.from_args(args) == PreferenceLossConfig(
        ["sigmoid", "robust"], [0.4, 0.6], 0.3, 0.2, "js_divergence", 0.7, 0.11
    )


# ---- Sequence log-probs ----


@pytest.mark.parametrize("ld_alpha", [None, 0.0, 0.5])
def test_sequence_logps_are_those_of_the_logits(trainer, batch, ld_alpha):
    """Without TRL's fused head, masks or sums: log-softmax of the logits, token by token."""
    trainer.ld_alpha = None
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = trainer.model(**inputs, use_cache=False).logits
        fused = trainer.model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs
    by_row = []
    for row in range(12):
        ids, completion = batch["input_ids"][row], batch["completion_mask"][row]
        by_row.append(
            [
                torch.log_softmax(logits[row, position - 1], dim=-1)[ids[position]].item()
                for position in range(1, len(ids))
                if completion[position]
            ]
        )
    expected = []
    for row in range(12):
        shared = min(len(by_row[row]), len(by_row[(row + 6) % 12]))
        tail = 1.0 if ld_alpha is None else ld_alpha
        expected.append(sum(by_row[row][:shared]) + tail * sum(by_row[row][shared:]))
    assert len({len(tokens) for tokens in by_row}) > 2  # answers of several lengths
    chosen, rejected = sequence_logps(fused, batch["completion_mask"], ld_alpha)
    torch.testing.assert_close(torch.cat([chosen, rejected]), torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_sequence_logps_hand_worked():
    # One pair, L = 5: the chosen answer has 3 tokens, the rejected one 1
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 0, 0]])
    logps = torch.tensor([[0.0, -1.0, -2.0, -4.0], [0.0, -8.0, 0.0, 0.0]])
    for ld_alpha, chosen in ((None, -7.0), (1.0, -7.0), (0.5, -4.0), (0.0, -1.0)):
        ours = sequence_logps(logps, mask, ld_alpha)
        assert [value.item() for value in ours] == [chosen, -8.0]
    # Two virtual tokens in front, as prompt tuning has them: what stands before the real tokens does not count
    padded = torch.cat([torch.full((2, 2), -100.0), logps], dim=1)
    assert [value.item() for value in sequence_logps(padded, mask)] == [-7.0, -8.0]


def test_sequence_logps_are_summed_in_float32():
    # In bfloat16 the sum stops growing at 256: 256 + 1 rounds to 256
    logps = torch.full((2, 1000), -1.0, dtype=torch.bfloat16)
    chosen, rejected = sequence_logps(logps, torch.ones(2, 1001, dtype=torch.long))
    assert chosen.dtype == torch.float32 and chosen.item() == rejected.item() == -1000.0


# ---- Hand-worked values ----


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("sigmoid", math.log(2)),
        ("sigmoid_norm", math.log(2)),
        ("hinge", 1.0),
        ("ipo", 25.0),  # (1 / (2·0.1))²
        ("exo_pair", 0.5108256),  # −ln 2 − ½ ln(0.1·0.9)
        ("nca_pair", 1.3862944),  # (1 + ½ + ½) ln 2
        ("robust", math.log(2)),  # (0.9 − 0.1) ln 2 / 0.8
        ("bco_pair", 1.3862944),  # 2 ln 2
        ("sppo_hard", 50.0),  # 2 · (0.5 / 0.1)²
        ("apo_zero", 1.0),  # 1 − ½ + ½
        ("apo_down", 1.0),  # ½ + 1 − ½
        ("discopop", 0.8465736),  # ½ ln 2 + ½ e⁰
    ],
)
def test_untrained_loss(loss_type, expected):
    config = PreferenceLossConfig([loss_type], beta=0.1, label_smoothing=0.1)
    assert untrained_loss(config) == pytest.approx(expected, rel=1e-5)


def test_untrained_loss_of_a_weighted_sum():
    # 0.5·ln 2 + 2·25
    assert untrained_loss(PreferenceLossConfig(["sigmoid", "ipo"], [0.5, 2.0])) == pytest.approx(50.3465736)


@pytest.mark.parametrize("divergence", ["reverse_kl", *F_DIVERGENCES])
def test_untrained_loss_is_ln_2_under_every_divergence(divergence):
    config = PreferenceLossConfig(["sigmoid"], beta=0.3, f_divergence_type=divergence)
    assert untrained_loss(config) == pytest.approx(math.log(2), rel=1e-6)


def hand_pair(chosen_logratio=2.0, rejected_logratio=-1.0) -> PairLogProbs:
    """Log-ratios 2 and −1, over 4 and 2 tokens."""
    values = (chosen_logratio - 10, rejected_logratio - 20, -10.0, -20.0, 4.0, 2.0)
    return PairLogProbs(*(torch.tensor([value], dtype=torch.float64) for value in values))


# β = 0.5: margin 3, β·margin 1.5, σ(1.5) = 0.8175745, −ln σ(1.5) = 0.2014133
@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("sigmoid", 0.2014133),
        ("hinge", 0.0),
        ("ipo", 0.0),  # token means: 2/4 − (−1/2) = 1 = 1/(2β)
        ("sigmoid_norm", 0.4740770),  # −ln σ(0.5·1)
        ("nca_pair", 1.2069310),  # −ln σ(1) − ½ ln σ(−1) − ½ ln σ(0.5) = 0.3132617 + 0.6566308 + 0.2370385
        ("bco_pair", 0.7873387),  # −ln σ(1) − ln σ(0.5)
        ("sppo_hard", 1.0),  # (2 − 1)² + (−1 + 1)²
        ("apo_zero", 0.6464820),  # 1 − σ(1) + σ(−0.5) = 1 − 0.7310586 + 0.3775407
        ("apo_down", 0.9134841),  # σ(1) + 1 − σ(1.5)
        ("robust", 0.0139133),  # (0.9·0.2014133 − 0.1·1.7014133) / 0.8
        ("exo_pair", 0.0311388),  # σ(1.5)(ln σ(1.5) − ln 0.9) + σ(−1.5)(ln σ(−1.5) − ln 0.1)
    ],
)
def test_losses_hand_worked(loss_type, expected):
    config = PreferenceLossConfig([loss_type], beta=0.5, label_smoothing=0.1)
    assert pair_losses(hand_pair(), config).item() == pytest.approx(expected, abs=2e-7)


def test_excess_is_clipped_per_pair_only_when_asked():
    losses, references = torch.tensor([1.0, 0.3]), torch.tensor([0.4, 0.5])
    torch.testing.assert_close(excess_losses(losses, references, "pair"), torch.tensor([0.6, 0.0]))
    for clip in ("task", "none"):
        torch.testing.assert_close(excess_losses(losses, references, clip), torch.tensor([0.6, -0.2]))


def test_a_clipped_pair_sends_no_gradient():
    losses = torch.tensor([1.0, 0.3], requires_grad=True)
    excess_losses(losses, torch.tensor([0.4, 0.5]), "pair").sum().backward()
    assert losses.grad.tolist() == [1.0, 0.0]


# ---- Gradient ----


def test_gradient_is_trls(trainer, batch):
    config = PreferenceLossConfig(["sigmoid", "ipo"], [1.0, 0.01], beta=0.3)
    theirs, ours = both_losses(trainer, batch, config)
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(theirs, parameters, retain_graph=True)
    gradients = torch.autograd.grad(ours.mean(), parameters)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-4
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss_type", list(PAIR_LOSSES))
def test_gradients_agree_with_differences(loss_type):
    config = PreferenceLossConfig([loss_type], beta=0.3, label_smoothing=0.1)
    pair = hand_pair(0.7, -0.4)
    pair.chosen.requires_grad_(), pair.rejected.requires_grad_()
    gradients = torch.autograd.grad(pair_losses(pair, config).sum(), [pair.chosen, pair.rejected])
    for position, gradient in enumerate(gradients):
        logratios = [[0.7, -0.4], [0.7, -0.4]]
        logratios[0][position] += 1e-5
        logratios[1][position] -= 1e-5
        up, down = (pair_losses(hand_pair(*both), config).item() for both in logratios)
        assert gradient.item() == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-7)
        assert abs(gradient.item()) > 1e-3


# ---- Refusals ----


@pytest.mark.parametrize(
    ("loss_type", "reason"),
    [("aot", "sorts log-ratios"), ("aot_unpaired", "sorts log-ratios"), ("sft", "averages over the batch's tokens")],
)
def test_losses_without_a_per_pair_meaning_are_refused_with_the_reason(loss_type, reason):
    with pytest.raises(AMAError, match=f"'{loss_type}' has no per-pair meaning .*{reason}.*DPOTrainer"):
        PreferenceLossConfig(["sigmoid", loss_type])


def test_an_unknown_loss_is_refused_with_the_nearest():
    with pytest.raises(AMAError, match="Unknown loss_type 'sigmoidd'.*Did you mean 'sigmoid'"):
        PreferenceLossConfig(["sigmoidd"])


def test_an_unknown_divergence_is_refused():
    config = PreferenceLossConfig(["sigmoid"], f_divergence_type="jensen")
    with pytest.raises(AMAError, match="Unknown f_divergence_type 'jensen'.*'js_divergence'"):
        untrained_loss(config)


def test_weights_that_do_not_match_the_losses_are_refused():
    with pytest.raises(ValueError):
        untrained_loss(PreferenceLossConfig(["sigmoid", "ipo"], [1.0]))
