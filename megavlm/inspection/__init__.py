"""Pages with samples: of data (`megavlm data inspect`), and those that `megavlm score` finds most surprising.

Their templates lie beside those of all pages, in `report/`.
"""
