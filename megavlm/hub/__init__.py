"""What makes an exported folder complete for others: the model card and the configuration of generation."""
