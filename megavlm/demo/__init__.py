"""The demo: real pictures, a tiny Qwen3-VL made on the spot, and the commands that train it."""
