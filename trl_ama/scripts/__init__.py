"""Scripts that `accelerate launch` can run; each is one command of the CLI."""
