"""The demo: real pictures, a tiny Qwen3-VL with random weights, and the commands that train it."""
