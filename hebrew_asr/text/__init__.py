"""Text without audio: how targets are written, how transcripts are scored, classes of errors, intervals, HTML parts.

Imports files and errors only, and no torch.
"""
