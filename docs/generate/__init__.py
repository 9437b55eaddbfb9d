"""Writers of the pages and pictures under docs/ that come from the code; `python -m docs.generate` runs all of them."""
