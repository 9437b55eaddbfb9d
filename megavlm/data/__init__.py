"""The data pipeline: reads samples from files, renders them to tokens and packs them into rows."""
