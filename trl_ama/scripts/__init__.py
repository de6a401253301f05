"""Scripts that `accelerate launch` can run; each is one command of the CLI."""

COMMANDS = {
    "ama": "Run AutoMixAlign: specialists, reference losses, mixed training, evaluation",
    "ama-specialists": "Train (or pull) one specialist per task",
    "ama-losses": "Compute the specialists' reference losses",
    "ama-eval": "Evaluate the generalists on held-out pairs",
    "ama-check": "Look at the pairs of every task: as the model sees them, what is dropped, leaks, duplicates",
    "ama-plan": "Say what a run will need, without reading any weights: memory by stage, steps, tokens, cost",
    "ama-merge": "Merge a generalist, or any adapter, into a full checkpoint",
    "ama-report": "Write the page of a run, or one that compares several; needs no model",
}
