"""Reinforcement learning: batches of sampled and judged answers, the policy objective, and the steps that learn."""
