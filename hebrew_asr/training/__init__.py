"""A run: its batches, folder, resumption, log, report and plan.

Imports all rooms but evaluation and rl. The trainer itself is in train_hebrew_asr_enhanced.py.
"""
