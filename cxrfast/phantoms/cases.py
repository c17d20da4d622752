"""Who is on a phantom film: patients, visits, findings and metadata, distributed after NIH's.

Promises: the same (images, seed) gives the same table; the rarest classes are raised to ``FLOOR``; every class occurs
on both sides of the paper's and of the official split (from about 100 films on); age, sex and view lean towards
the findings as they do in the v2020 CSV, so that they alone are worth little. Left out: pixels (draw.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from cxrfast.nih import CLASSES, NO_FINDING
from cxrfast.splits import in_paper_test

FLOOR = 0.06
"""The least share of films that a class has: NIH's Hernia (0.2 %) would be one film of 600."""

HEALTHY_PATIENTS = 0.45  # patients without any finding on any film
LASTING = 0.6  # share of a class's films that come from patients who have it for good
LEANING = 0.7  # of NIH's shifts in metadata: a film has more findings here, and their shifts add up
LABEL_NOISE = 0.02  # share of a class's findings that the label misses, and as many that it invents
FEWEST_FILMS = 4  # of a side of a split that is to hold every class
OFFICIAL_TEST_PATIENTS = 0.2  # NIH's 9 % of patients would be too few here; its share of films is 23 %


@dataclass(frozen=True)
class _Leaning:
    """How a finding goes with metadata in NIH's v2020 CSV."""

    share: float  # of all films
    age: float  # mean, years
    ap: float  # share of AP films
    male: float  # share of men


_NIH = {
    NO_FINDING: _Leaning(0.5384, 45.5, 0.35, 0.56),
    "Atelectasis": _Leaning(0.1031, 50.2, 0.50, 0.60),
    "Cardiomegaly": _Leaning(0.0248, 47.0, 0.44, 0.47),
    "Effusion": _Leaning(0.1188, 49.5, 0.51, 0.56),
    "Infiltration": _Leaning(0.1774, 46.0, 0.53, 0.57),
    "Mass": _Leaning(0.0516, 48.5, 0.38, 0.61),
    "Nodule": _Leaning(0.0565, 49.3, 0.34, 0.58),
    "Pneumonia": _Leaning(0.0128, 44.4, 0.56, 0.59),
    "Pneumothorax": _Leaning(0.0473, 46.3, 0.36, 0.51),
    "Consolidation": _Leaning(0.0416, 46.4, 0.67, 0.57),
    "Edema": _Leaning(0.0205, 45.1, 0.88, 0.52),
    "Emphysema": _Leaning(0.0224, 50.1, 0.40, 0.64),
    "Fibrosis": _Leaning(0.0150, 52.5, 0.16, 0.54),
    "Pleural_Thickening": _Leaning(0.0302, 50.2, 0.29, 0.60),
    "Hernia": _Leaning(0.0020, 63.0, 0.15, 0.42),
}
SHARES = np.array([max(FLOOR, _NIH[name].share) for name in CLASSES])
"""float64 (14,): the share of films that each class is drawn with."""

# (width, height, pixel spacing as v2020 prints it): the commonest scanners and their share
_SCANNERS = (
    (2500, 2048, "0.168", 0.33),
    (2992, 2991, "0.14300000000000002", 0.30),
    (3056, 2544, "0.139", 0.20),
    (2048, 2500, "0.171", 0.12),
    (2021, 2021, "0.19431099999999998", 0.05),
)

_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)


@dataclass(frozen=True)
class Cases:
    """N films of the set.

    Attributes:
        table: file str, patient int64, age int64 (years), sex, view, follow_up int64; ordered by patient and follow-up.
        signs: bool (N, 14), what is drawn.
        labels: bool (N, 14), what the CSV says.
        official_test: bool (N,), the film is in ``test_list.txt``.
        scanners: int64 (N,), rows of the original sizes.
    """

    table: pd.DataFrame
    signs: np.ndarray
    labels: np.ndarray
    official_test: np.ndarray
    scanners: np.ndarray

    def csv(self) -> str:
        """The metadata as v2020's CSV: LF, no trailing comma, ordered by patient and follow-up."""
        lines = [_HEADER]
        for row, labels, scanner in zip(self.table.itertuples(), self.labels, self.scanners, strict=True):
            named = "|".join(sorted(np.array(CLASSES)[labels])) or NO_FINDING
            width, height, spacing, _ = _SCANNERS[scanner]
            lines.append(
                f"{row.file},{named},{row.follow_up},{row.patient},{row.age},{row.sex},{row.view},"
                f"{width},{height},{spacing},{spacing}"
            )
        return "\n".join(lines) + "\n"

    def lists(self) -> tuple[str, str]:
        """The official lists, train and test; like NIH's, they do not end in a newline."""
        files = self.table["file"].to_numpy()
        return "\n".join(sorted(files[~self.official_test])), "\n".join(sorted(files[self.official_test]))


def make_cases(images: int, seed: int) -> Cases:
    """The cases of a phantom set of ``images`` films."""
    rng = np.random.default_rng((seed, 0))
    patient, follow_up = _visits(images, rng)
    num_patients = int(patient[-1])
    of = patient - 1
    signs = _findings(of, num_patients, rng)
    official_test_patient = rng.permutation(num_patients) < round(OFFICIAL_TEST_PATIENTS * num_patients)
    official_test = official_test_patient[of]
    missed = rng.random(signs.shape) < LABEL_NOISE
    paper_test = in_paper_test(patient)
    _fill_sides(signs, missed, [paper_test, ~paper_test, official_test, ~official_test], rng)
    labels = (signs & ~missed) | (rng.random(signs.shape) < LABEL_NOISE * SHARES)
    age, sex, view = _metadata(signs, of, follow_up, num_patients, rng)
    table = pd.DataFrame(
        {
            "file": [f"{p:08d}_{f:03d}.png" for p, f in zip(patient, follow_up, strict=True)],
            "patient": patient,
            "age": age,
            "sex": sex,
            "view": view,
            "follow_up": follow_up,
        }
    )
    scanners = rng.choice(len(_SCANNERS), images, p=[share for *_, share in _SCANNERS])
    return Cases(table, signs, labels, official_test, scanners)


def _visits(images: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """int64 (N,) patient from 1 and follow-up from 0; most patients come once, some often, as NIH's do."""
    counts: list[int] = []
    while sum(counts) < images:
        counts.append(int(min(rng.geometric(0.4), 12)))
    counts[-1] -= sum(counts) - images
    patient = np.repeat(np.arange(1, len(counts) + 1), counts)
    follow_up = np.concatenate([np.arange(count) for count in counts])
    return patient, follow_up


def _findings(of: np.ndarray, num_patients: int, rng: np.random.Generator) -> np.ndarray:
    """bool (N, 14). Per class, ``LASTING`` of its films are of patients who keep it, the others come and go."""
    among_sick = SHARES / (1 - HEALTHY_PATIENTS)
    sick = rng.random(num_patients) >= HEALTHY_PATIENTS
    lasting = rng.random((num_patients, len(CLASSES))) < among_sick * LASTING
    passing = rng.random((len(of), len(CLASSES))) < among_sick * (1 - LASTING)
    return (lasting[of] | passing) & sick[of][:, None]


def _fill_sides(signs: np.ndarray, missed: np.ndarray, sides: list[np.ndarray], rng: np.random.Generator) -> None:
    """Give each class nine tenths of its share on each side, at least two films (one on a small side).

    Changes ``signs`` in place. Only films whose label will not miss the sign count; those with the fewest findings get
    the missing ones. Sides of a few films stay as they are: filled, they would have no film without a finding.
    """
    crowded = signs.sum(axis=1) + rng.random(len(signs))
    for side in sides:
        if side.sum() < FEWEST_FILMS:
            continue
        for index, share in enumerate(SHARES):
            can = side & ~missed[:, index]
            wanted = max(1 if side.sum() < 20 else 2, round(0.9 * share * side.sum()))
            free = np.flatnonzero(can & ~signs[:, index])
            for row in free[np.argsort(crowded[free])][: max(0, wanted - int(signs[can, index].sum()))]:
                signs[row, index] = True
                crowded[row] += 1


def _metadata(
    signs: np.ndarray, of: np.ndarray, follow_up: np.ndarray, num_patients: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Age in years int64 (N,), sex "M"/"F" and view "PA"/"AP" (N,), each leaning as the findings do in NIH's set."""
    healthy = _NIH[NO_FINDING]
    ap_shift = LEANING * np.array([_logit(_NIH[name].ap) - _logit(healthy.ap) for name in CLASSES])
    male_shift = LEANING * np.array([_logit(_NIH[name].male) - _logit(healthy.male) for name in CLASSES])
    age_shift = LEANING * np.array([_NIH[name].age - healthy.age for name in CLASSES])
    films = np.bincount(of, minlength=num_patients)

    def per_patient(shift: np.ndarray) -> np.ndarray:
        return np.bincount(of, weights=signs @ shift, minlength=num_patients) / films

    view = np.where(rng.random(len(of)) < _sigmoid(_logit(healthy.ap) + signs @ ap_shift), "AP", "PA")
    sex = np.where(rng.random(num_patients) < _sigmoid(_logit(healthy.male) + per_patient(male_shift)), "M", "F")
    first_age = rng.normal(healthy.age - 2 + per_patient(age_shift), 15.0)
    years = follow_up * rng.uniform(0, 1.5, num_patients)[of]
    age = np.clip(np.round(first_age[of] + years), 2, 95).astype(np.int64)
    return age, sex[of], view


def _logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
