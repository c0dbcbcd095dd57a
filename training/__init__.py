"""Builds the model that ships with Baton: corpus, tokenizer, training and evaluation.

Nothing under `baton/` imports this package; it is run by hand or by `make` to reproduce
`baton/models/tales`.
"""
