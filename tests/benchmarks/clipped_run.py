"""What `skip_clipped` does in a run: how many pairs were clipped, how many did not run backward, and processor time.

    python tests/benchmarks/clipped_run.py --model outputs/quickstart/model --reference_losses outputs/quickstart/run/reference_losses

Trains a generalist on ready reference losses, by default those of the quickstart and with its settings, once with every value of
`--skip`. Processor time of one thread, of the training alone. Prints a line of JSON for each.
"""

import argparse
import json
import os
import statistics
import tempfile
import time


os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch  # noqa: E402
from peft import LoraConfig  # noqa: E402

from trl_ama import AMAConfig, AMATrainer, load_reference_losses  # noqa: E402


def train(options: argparse.Namespace, skip: str) -> dict:
    """Train once; what was clipped by quarters of the run, what was skipped, and how long it took."""
    args = AMAConfig(
        output_dir=tempfile.mkdtemp(),
        mixing="ama_s",
        skip_clipped=skip,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=10,
        max_length=options.max_length,
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        gradient_checkpointing=bool(options.checkpointing),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
    )
    trainer = AMATrainer(
        options.model,
        args=args,
        train_dataset=load_reference_losses(options.reference_losses)["train"],
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    clipped = []
    follow = trainer.mixture.finish_step

    def finish_step(accelerator):
        rows = torch.cat(trainer.mixture.recorder._micro_batches, dim=1)
        clipped.append((rows[3] <= 0).float().mean().item())
        return follow(accelerator)

    trainer.mixture.finish_step = finish_step
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    quarter = len(clipped) // 4
    return {
        "skip_clipped": skip,
        "gradient_checkpointing": bool(options.checkpointing),
        "steps": options.steps,
        "clipped_by_quarter": [round(statistics.mean(clipped[part * quarter :][:quarter]), 3) for part in range(4)],
        "skipped": trainer.clipped_pairs.skipped / (options.steps * options.batch_size),
        "seconds": round(seconds, 1),
        "last_loss": trainer.state.log_history[-2]["loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/quickstart/model")
    parser.add_argument("--reference_losses", default="outputs/quickstart/run/reference_losses")
    parser.add_argument("--skip", nargs="+", default=["false", "auto"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--checkpointing", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for skip in options.skip:
        print(json.dumps(train(options, skip)), flush=True)


if __name__ == "__main__":
    main()
