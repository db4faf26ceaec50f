"""The model: what trains, prompts and packing, attention and loss, loading and generation, costs.

Imports processes, files and errors.
"""
