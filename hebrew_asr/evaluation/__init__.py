"""Models measured on sets: transcription, error rates, gates, results and their page.

Imports all rooms but training and rl.
"""
