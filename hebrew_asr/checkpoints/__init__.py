"""Weights on disk and on the Hub: written whole, verified, averaged, uploaded, described.

Imports model and what is below it; knows nothing of corpora or of training.
"""
