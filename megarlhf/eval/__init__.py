"""Evaluation: what a policy and a reward model are worth, with intervals."""
