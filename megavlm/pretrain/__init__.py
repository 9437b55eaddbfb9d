"""The four pretraining stages."""
