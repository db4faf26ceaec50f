"""Corpora: from a folder, a manifest or the Hub to rows, and from a row to features.

Imports model, text and what is below them; knows nothing of checkpoints, training or evaluation.
"""
