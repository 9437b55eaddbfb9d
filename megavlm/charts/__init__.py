"""Pieces of pages: axes, points, shares and timelines as SVG and HTML."""
