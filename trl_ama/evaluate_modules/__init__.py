"""Metrics in the shape that `evaluate` loads and the Hub hosts: a folder each, with its script, card and demo.

`formula.py` in each folder is the only implementation: the script beside it, which `evaluate` copies into its cache
together with it, wraps it, and [`trl_ama.metrics`] calls it without importing `evaluate`. The folders have no
`__init__.py`, because each is what a Space holds.
"""
