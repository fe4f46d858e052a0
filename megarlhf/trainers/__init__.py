"""Training: supervised fine-tuning, reward models, PPO. A trainer reads as its algorithm, in order."""
