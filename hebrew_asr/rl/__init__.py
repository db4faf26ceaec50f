"""Reinforcement learning on the error rate: rollouts, rewards, losses.

Imports all rooms but training and evaluation.
"""
