"""The conventions of NIH ChestX-ray14: classes, spellings, metadata generations, official lists, published totals."""

from __future__ import annotations

CLASSES: tuple[str, ...] = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
"""The 14 findings in the paper's order; every label column, target and AUC follows it."""
