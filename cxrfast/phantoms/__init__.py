"""Synthetic chest films in NIH ChestX-ray14's own layout, CSV and file encoding: no download to start with.

`generate` writes the set; `cases` decides who has what, `draw` makes the pixels, `png` the files. Nothing here is a
patient, and no result on phantoms says anything about patients.
"""
