"""The package behind the commands: fine-tuning and evaluation of Qwen3-ASR for Hebrew.

Its rooms stand on one another: training, evaluation and rl on checkpoints and data, those on model and text, all on
processes, command_line, files and errors. Nothing here imports a script.
"""
