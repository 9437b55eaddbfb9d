"""Sampled answers: the interface of engines and the built-in engine, which samples in the training weights."""
