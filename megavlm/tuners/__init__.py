"""Ways to tune a model with less memory than all its weights under Adam take."""
