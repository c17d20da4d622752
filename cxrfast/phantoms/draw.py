"""A chest phantom's pixels: anatomy, the fourteen signs, and the grain of a film.

Promises: the same case gives the same pixels; every sign is where a radiologist would look for it and is still to be
seen at 64 pixels; nothing but the drawing tells the findings (no marks, no corner codes). Array arithmetic keeps to
+, -, x, / and square roots, which every processor rounds alike, so that a seed means the same film everywhere.
Left out: realism. These films teach a pipeline, not a radiologist.

Coordinates: the film is [0, 1] x [0, 1], x to the viewer's right (the patient's left), y down. Grey 0 is air, 1 bone.
Side -1 is the patient's right lung (viewer's left), +1 the left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

GRID = 384  # anatomy is drawn on this grid, then enlarged; its sharpest edges are as soft as a real film's
_DRAWERS: dict[str, Callable[[Chest], None]] = {}  # filled by @_sign, in the order in which signs are drawn


@dataclass(frozen=True)
class Case:
    """What a film shows. Two films of one ``body_seed`` are the same person."""

    body_seed: tuple[int, ...]
    film_seed: tuple[int, ...]
    age: float  # years
    sex: str  # "M" or "F"
    view: str  # "PA" or "AP"
    signs: frozenset[str]  # classes to draw (what is there, which label noise may not say)


def draw_film(case: Case, size: int = 1024) -> np.ndarray:
    """The film of a case: uint8 (size, size)."""
    chest = Chest(case)
    chest.draw_soft_tissue()
    for name, draw in _DRAWERS.items():
        if name in case.signs:
            draw(chest)
    chest.draw_bones()
    return _expose(chest, size)


def _ramp(t: np.ndarray) -> np.ndarray:
    """0 below 0, 1 above 1, smooth between."""
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def _bump(q: np.ndarray) -> np.ndarray:
    """(1 - q)^2 inside the unit ball given by the squared radius q, 0 outside: a soft blob."""
    t = np.maximum(1 - q, 0)
    return t * t


class Chest:
    """The grey image under construction and the shapes that signs refer to. Arrays are float32 (GRID, GRID)."""

    def __init__(self, case: Case) -> None:
        """Pose and proportions; those that a sign changes (heart, domes) take it into account from the start."""
        self.case = case
        self.body = np.random.default_rng(case.body_seed)
        self.film = np.random.default_rng(case.film_seed)
        body, film = self.body, self.film
        self.sick = case.signs.__contains__
        axis = (np.arange(GRID, dtype=np.float32) + 0.5) / GRID
        male, ap, child = case.sex == "M", case.view == "AP", case.age < 14
        # one person's frame, then how this film was taken
        self.scale = (1.0 if male else 0.95) * (0.9 if child else 1) * body.uniform(0.97, 1.03)
        zoom = film.uniform(0.98, 1.02)
        turn = film.uniform(-0.025, 0.025)
        shift_x, shift_y = film.uniform(-0.012, 0.012, 2).tolist()
        x0 = (axis[None, :] - (0.5 + shift_x)) * zoom
        y0 = (axis[:, None] - (0.5 + shift_y)) * zoom
        self.x = x0 + turn * y0  # (GRID, GRID), 0 on the midline
        self.y = y0 - turn * x0 + 0.5
        self.ax = np.abs(self.x)
        self.heart_width = (
            0.118
            * body.uniform(0.95, 1.05)
            * (1.08 if ap else 1)
            * (1.5 if self.sick("Cardiomegaly") else 1)
            * (0.85 if self.sick("Emphysema") else 1)
        )
        volume = -0.02 if ap else 0.0
        volume += 0.065 if self.sick("Emphysema") else 0
        volume -= 0.02 if self.sick("Fibrosis") else 0
        self.dome_y = {-1: 0.695 + volume, 1: 0.715 + volume}
        self.dome_curve = 0.35 if self.sick("Emphysema") else 1.9
        self.atelectatic_side = -1 if film.random() < 0.8 else 1
        if self.sick("Atelectasis"):
            self.dome_y[self.atelectatic_side] -= 0.07
        self.grey = np.zeros((GRID, GRID), np.float32)
        self.lung: dict[int, np.ndarray] = {}

    # ---- shapes ----

    def ellipse(self, cx: float, cy: float, a: float, b: float, soft: float = 0.01, slope: float = 0.0) -> np.ndarray:
        """1 inside the ellipse about (cx, cy), falling to 0 over ``soft``; ``slope`` shears it (dy per dx)."""
        q = np.sqrt(self.q(cx, cy, a, b, slope))
        return _ramp((1 - q) * (min(a, b) / soft) + 0.5)

    def q(self, cx: float, cy: float, a: float, b: float, slope: float = 0.0) -> np.ndarray:
        """Squared radius in units of the half axes a and b."""
        dx = self.x - cx
        dy = self.y - cy - slope * dx
        dx *= 1 / a
        dy *= 1 / b
        return dx * dx + dy * dy

    def blob(self, cx: float, cy: float, a: float, b: float, slope: float = 0.0) -> np.ndarray:
        """A soft blob, 1 at its centre."""
        return _bump(self.q(cx, cy, a, b, slope))

    def mix(self, target: float, alpha: np.ndarray) -> None:
        """Move the grey towards ``target`` by ``alpha``."""
        self.grey += (target - self.grey) * alpha

    def lines(self, paths: list[list[tuple[float, float]]], widths: list[float], soft: float) -> np.ndarray:
        """Polylines given in film coordinates about the midline, 1 on the line; widths and ``soft`` in grid pixels."""
        plate = Image.new("L", (GRID, GRID))
        pen = ImageDraw.Draw(plate)
        for path, width in zip(paths, widths, strict=True):
            pen.line([((x + 0.5) * GRID, y * GRID) for x, y in path], fill=255, width=max(1, round(width)))
        return np.asarray(plate.filter(ImageFilter.BoxBlur(soft)), np.float32) / 255

    # ---- anatomy ----

    def draw_soft_tissue(self) -> None:
        """Everything under the bones: body, lungs, the middle of the chest, vessels."""
        self._draw_body()
        self._draw_lungs()
        self._draw_middle()
        self._draw_vessels()

    def _draw_body(self) -> None:
        """The outline: shoulders that slope from the neck, flanks, and a woman's breasts."""
        y, ax, male = self.y, self.ax, self.case.sex == "M"
        shoulder = 0.07 + np.maximum(ax - 0.1, 0) * (0.42 if male else 0.5)
        flank = (0.475 if male else 0.445) * self.scale + _ramp((0.36 - y) / 0.3)  # above, the arms
        torso = _ramp((y - shoulder) / 0.03) * _ramp((flank - ax) / 0.03)
        neck = _ramp((0.1 - ax) / 0.03) * _ramp((0.3 - y) / 0.1)
        self.skin = np.maximum(torso, neck)
        depth = 1 - np.minimum(ax / 0.55, 1) ** 2
        self.grey = self.skin * (0.48 + 0.2 * depth) - 0.01
        fold = self.body.uniform(0.68, 0.74)
        if not male and self.case.age > 13:
            for side in (-1, 1):
                self.grey += 0.1 * self.ellipse(side * 0.27, fold, 0.17, 0.14, 0.03) * self.skin

    def _draw_lungs(self) -> None:
        """Two columns that taper to the apex and end on the domes of the diaphragm; below them the abdomen."""
        x, y = self.x, self.y
        taper = _ramp((y - 0.1) / 0.36)
        half_width = (0.085 + 0.085 * taper) * self.scale
        centre = 0.135 + 0.065 * taper
        dy = ((y - 0.53) / 0.405) ** 2
        for side in (-1, 1):
            dx = (x * side - centre) / half_width
            column = _ramp((1 - np.sqrt(dx * dx + dy * dy * dy)) * 14 + 0.5)
            dome = self.dome_y[side] + self.dome_curve * (x * side - 0.16) ** 2
            self.lung[side] = column * _ramp((dome - y) / 0.014 + 0.5)
        self.lungs = self.lung[-1] + self.lung[1]
        air = 0.27 if self.case.view == "PA" else 0.31
        self.mix(0.15 if self.sick("Emphysema") else air, self.lungs)
        self.mix(0.82, _ramp((y - 0.72) / 0.16) * self.skin * (1 - self.lungs) * 0.8)

    def _draw_middle(self) -> None:
        """Mediastinum, aortic knob (larger with age), heart, trachea, and the stomach's bubble in some."""
        x, y = self.x, self.y
        # a collapsed lung draws the middle over to its side
        pull = 0.03 * self.atelectatic_side if self.sick("Atelectasis") else 0.0
        width = 0.052 + 0.02 * _ramp((y - 0.3) / 0.3)
        middle = _ramp((width - np.abs(x - pull)) / 0.018 + 0.5) * self.skin
        self.mix(0.66, middle * _ramp((0.84 - y) / 0.12))
        knob = 0.024 + 0.012 * min(max(self.case.age - 30, 0), 50) / 50
        self.mix(0.66, self.ellipse(0.052 + pull, 0.3, knob, 0.035, 0.015))
        self.heart = self.ellipse(0.35 * self.heart_width + pull, 0.61, self.heart_width, 0.125, 0.018, 0.25)
        self.mix(0.68, self.heart * _ramp((0.78 - y) / 0.04))
        trachea = _ramp((0.014 - np.abs(x - 0.6 * pull)) / 0.008 + 0.5)
        self.grey -= 0.09 * trachea * _ramp((0.34 - y) / 0.06)
        if self.body.random() < 0.5:
            self.grey -= 0.22 * self.ellipse(0.2, self.dome_y[1] + 0.07, 0.05, 0.025, 0.012)

    def _draw_vessels(self) -> None:
        """Branches from the hilum to the periphery, thinner and fainter as they go."""
        rng = self.body
        paths, widths = [], []
        for side in (-1, 1):
            for angle in np.linspace(-1.25, 1.35, 9) + rng.uniform(-0.1, 0.1, 9):
                px, py, heading = 0.06, 0.45, float(angle)
                width = 3.2
                while width > 1.0:
                    step = 0.035
                    nx, ny = px + step * math.cos(heading), py + step * math.sin(heading)
                    paths.append([(side * px, py), (side * nx, ny)])
                    widths.append(width)
                    px, py, heading, width = nx, ny, heading + float(rng.uniform(-0.3, 0.3)), width - 0.4
        tree = self.lines(paths, widths, 1.2)
        hila = self.blob(-0.075, 0.45, 0.05, 0.085) + self.blob(0.085, 0.43, 0.05, 0.08)
        self.grey += (0.13 * tree + 0.16 * hila) * self.lungs

    def draw_bones(self) -> None:
        """Ribs, spine, clavicles and shoulder blades, over everything that is soft."""
        x, y, ax = self.x, self.y, self.ax
        old = max(self.case.age - 60, 0) / 40
        chest = np.maximum(self.lungs, _ramp((0.41 * self.scale - ax) / 0.03))
        chest = chest * _ramp((y - 0.1) / 0.06) * _ramp((0.86 - y) / 0.1)
        out = ax - 0.17
        # the back ribs arch and fall to the side; the front ribs, fainter, fall to the middle
        for bend, fall, strength, spacing in ((-1.5, -0.12, 0.075, 0.078), (0.9, 0.45, 0.03, 0.082)):
            level = y + bend * out * out + fall * out
            phase = level / spacing
            phase = np.abs(phase - np.floor(phase) - 0.5) * 2  # 0 mid-rib, 1 between ribs
            rib = _ramp((0.46 - phase) * 7 + 0.5)
            edge = rib * (1 - rib) * 4
            self.grey += chest * (strength * (1 - 0.3 * old)) * (rib + 0.35 * edge)
        spine = _ramp((0.036 - ax) / 0.01 + 0.5)
        disc = y / 0.052
        disc = _ramp(np.abs(disc - np.floor(disc) - 0.5) * 5 - 0.2)
        self.grey += spine * (0.07 + 0.045 * disc)
        for side in (-1, 1):
            s = x * side
            along = _ramp((s - 0.04) / 0.02) * _ramp((0.36 - s) / 0.03)
            bar = np.abs(y - 0.185 + (s - 0.05) * 0.24)
            bar = _ramp((0.013 - bar) / 0.006 + 0.5)
            self.grey += 0.1 * along * bar * self.skin
            blade = 0.345 if self.case.view == "AP" else 0.4
            self.grey += 0.07 * self.skin * self.ellipse(side * blade, 0.29, 0.055, 0.13, 0.015, 0.3 * side)


def _expose(chest: Chest, size: int) -> np.ndarray:
    """Enlarge, add the grain and the marker, and turn grey into the film's 8 bits."""
    rng = chest.film
    gain, offset = rng.uniform(0.97, 1.03), rng.uniform(-0.015, 0.015)
    plate = Image.fromarray(chest.grey).resize((size, size), Image.Resampling.BICUBIC)
    film = np.array(plate)
    film *= 245 * gain
    film += 245 * offset
    film += _grain(rng, size)
    pixels = Image.fromarray(np.clip(film + 0.5, 0, 255).astype(np.uint8))
    _stamp_marker(pixels, rng)
    return np.asarray(pixels)


GRAIN = ((1, 1.0), (2, 1.0), (4, 1.0))  # octave in pixels, strength in grey levels
WHITE = 0.8  # the part of the first octave that no optics blurred


def _grain(rng: np.random.Generator, size: int) -> np.ndarray:
    """float32 (size, size) noise in grey levels: quantum noise as a scanner's optics blur it, over tissue texture.

    Three octaves of blurred white noise and a little unblurred: their sum falls off with frequency as the spectrum of
    the real films does. The strengths were chosen for NIH's file size and mix of row filters. A quarter of the film is
    drawn and mirrored four ways, because noise is most of the work; deflate's window (32 rows) never sees it twice.
    """
    height = -(-size // 4)
    band = np.zeros((height, size), np.float32)
    for octave, strength in GRAIN:
        white = rng.standard_normal((-(-height // octave) + 2, -(-size // octave) + 2), dtype=np.float32)
        soft = white[1:-1] * 2
        soft += white[:-2]
        soft += white[2:]
        across = soft[:, 1:-1] * 2
        across += soft[:, :-2]
        across += soft[:, 2:]
        across *= strength / 6  # 6 is the norm of the kernel [1 2 1] x [1 2 1]
        if octave == 1:
            across += white[1:-1, 1:-1] * WHITE
        else:
            across = np.asarray(Image.fromarray(across).resize((size, height), Image.Resampling.BICUBIC))
        band += across
    band *= rng.uniform(0.75, 1.3)  # the dose differs from film to film
    return np.concatenate([band, band[:, ::-1], band[::-1], band[::-1, ::-1]])[:size]


def _stamp_marker(pixels: Image.Image, rng: np.random.Generator) -> None:
    """The radiographer's L, on the patient's left shoulder corner, whatever the film shows."""
    size = pixels.width
    x, y = (rng.uniform(0.88, 0.92) * size, rng.uniform(0.04, 0.08) * size)
    long, thick = 0.035 * size, max(1, round(0.007 * size))
    ImageDraw.Draw(pixels).line([(x, y), (x, y + long), (x + 0.6 * long, y + long)], fill=235, width=thick)


# ---- the fourteen signs: each changes the chest between soft tissue and bone ----


def _sign(name: str) -> Callable[[Callable[[Chest], None]], Callable[[Chest], None]]:
    def add(draw: Callable[[Chest], None]) -> Callable[[Chest], None]:
        _DRAWERS[name] = draw
        return draw

    return add


def _usual_side(chest: Chest, usual: int, share: float = 0.8) -> int:
    return usual if chest.film.random() < share else -usual


@_sign("Emphysema")
def _draw_emphysema(chest: Chest) -> None:
    """Low flat diaphragms, dark wide lungs and a narrow heart are shaped in Chest; here the bullae at the apices."""
    for side in (-1, 1):
        for _ in range(2):
            cx = side * chest.film.uniform(0.12, 0.2)
            spot = chest.ellipse(cx, chest.film.uniform(0.24, 0.34), 0.045, 0.045, 0.01)
            chest.mix(0.08, spot * chest.lung[side] * 0.6)


@_sign("Cardiomegaly")
def _draw_cardiomegaly(chest: Chest) -> None:
    """The heart was drawn half as wide again; its left border is firm against the lung."""
    chest.mix(0.74, chest.heart * chest.lungs * 0.5)


@_sign("Edema")
def _draw_edema(chest: Chest) -> None:
    """Bat's wings: haze around both hila that leaves the periphery free, and septal lines above the angles."""
    for side in (-1, 1):
        wing = chest.blob(side * 0.13, 0.45, 0.15, 0.25)
        chest.mix(0.72, np.minimum(wing * 2, 1) * chest.lung[side] * 0.85)
    paths = []
    for side in (-1, 1):
        for y in np.arange(0.56, 0.68, 0.018):
            paths.append([(side * 0.27, float(y)), (side * 0.33, float(y))])
    septa = chest.lines(paths, [1.5] * len(paths), 0.8)
    chest.grey += 0.16 * septa * chest.lungs


@_sign("Infiltration")
def _draw_infiltration(chest: Chest) -> None:
    """Many small, ill-defined, patchy densities in both mid and lower zones."""
    for side in (-1, 1):
        haze = np.zeros_like(chest.grey)
        for _ in range(7):
            cx, cy = side * chest.film.uniform(0.1, 0.29), chest.film.uniform(0.46, 0.66)
            r = chest.film.uniform(0.03, 0.055)
            haze = np.maximum(haze, chest.blob(cx, cy, r, r))
        chest.mix(0.66, haze * chest.lung[side] * 0.8)


@_sign("Fibrosis")
def _draw_fibrosis(chest: Chest) -> None:
    """Honeycombing: a coarse net of bright walls about dark cells at both bases and along the chest wall."""
    paths = []
    for side in (-1, 1):
        for row in range(7):
            for column in range(9):
                cx = side * (0.07 + 0.032 * (column + 0.5 * (row % 2)))
                cy = 0.52 + 0.028 * row
                jx, jy = chest.film.uniform(-0.004, 0.004, 2).tolist()
                ring = [
                    (cx + jx + 0.0155 * math.cos(t), cy + jy + 0.0155 * math.sin(t))
                    for t in np.linspace(0, 2 * np.pi, 7)
                ]
                paths.append(ring)
    net = chest.lines(paths, [2.4] * len(paths), 0.8)
    zone = _ramp((chest.y - 0.5) / 0.06)
    chest.mix(0.85, net * zone * chest.lungs * 0.8)


@_sign("Consolidation")
def _draw_consolidation(chest: Chest) -> None:
    """An upper lobe filled down to its fissure, with the bronchi left as dark branches (air bronchogram)."""
    side = _usual_side(chest, -1)
    edge = chest.film.uniform(0.37, 0.4)
    lobe = _ramp((edge - chest.y) / 0.012) * chest.lung[side]
    chest.mix(0.66, lobe * 0.85)
    paths = []
    for angle in (-1.3, -0.9, -0.5):
        end = (side * (0.07 + 0.16 * math.cos(angle)), 0.4 + 0.16 * math.sin(angle))
        paths.append([(side * 0.07, 0.4), end])
    chest.grey -= 0.2 * chest.lines(paths, [4.0] * 3, 1.0) * lobe


@_sign("Pneumonia")
def _draw_pneumonia(chest: Chest) -> None:
    """A lower lobe's fluffy filling that wipes out the heart's border beside it."""
    side = _usual_side(chest, 1)
    patch = chest.blob(side * 0.2, 0.6, 0.17, 0.15)
    chest.mix(0.74, np.minimum(patch * 2.2, 1) * chest.lung[side] * 0.9)


@_sign("Atelectasis")
def _draw_atelectasis(chest: Chest) -> None:
    """Plates of collapsed lung above a raised diaphragm; the middle was drawn over to that side."""
    side = chest.atelectatic_side
    base = chest.dome_y[side]
    for rise in (0.05, 0.1):
        plate = chest.ellipse(
            side * 0.19, base - rise + chest.film.uniform(-0.008, 0.008), 0.13, 0.012, 0.01, side * -0.12
        )
        chest.mix(0.8, plate * chest.lung[side] * 0.9)


@_sign("Mass")
def _draw_mass(chest: Chest) -> None:
    """One large, sharply bounded, lobed disc."""
    side = _usual_side(chest, 1)
    cx, cy = side * chest.film.uniform(0.17, 0.21), chest.film.uniform(0.36, 0.44)
    disc = chest.ellipse(cx, cy, 0.066, 0.066, 0.012)
    lobe = chest.ellipse(cx + 0.035, cy + 0.035, 0.038, 0.038, 0.012)
    chest.mix(0.8, np.maximum(disc, lobe) * chest.lung[side] * 0.95)


@_sign("Nodule")
def _draw_nodule(chest: Chest) -> None:
    """A few small round discs, apart from each other."""
    spots = [(-1, 0.24, 0.36), (1, 0.25, 0.5), (-1, 0.16, 0.55), (1, 0.17, 0.27), (-1, 0.14, 0.27)]
    for index in chest.film.permutation(len(spots))[:4]:
        side, cx, cy = spots[index]
        jx, jy = chest.film.uniform(-0.02, 0.02, 2).tolist()
        disc = chest.ellipse(side * cx + jx, cy + jy, 0.022, 0.022, 0.01)
        chest.mix(0.85, disc * chest.lung[side] * 0.95)


@_sign("Pneumothorax")
def _draw_pneumothorax(chest: Chest) -> None:
    """Black air without vessels over the apex and side of a lung whose edge shows as a fine bright line."""
    side = _usual_side(chest, 1)
    q = np.sqrt(chest.q(side * 0.115, 0.5, 0.125, 0.285))
    air = _ramp((q - 1) * 14) * chest.lung[side] * _ramp((0.66 - chest.y) / 0.08)
    line = _ramp(1 - np.abs(q - 1) * 22) * chest.lung[side]
    chest.mix(0.03, air * 0.95)
    chest.grey += 0.25 * line * _ramp((0.66 - chest.y) / 0.08)


@_sign("Pleural_Thickening")
def _draw_pleural_thickening(chest: Chest) -> None:
    """A bright rind along the chest wall, and a cap over the apex."""
    side = _usual_side(chest, -1)
    s = chest.x * side
    wall = (0.3 * chest.scale) + 0.06 * _ramp((chest.y - 0.2) / 0.26)
    rind = _ramp((s - wall + 0.045) / 0.01) * _ramp((chest.y - 0.25) / 0.03)
    rind *= _ramp((0.6 - chest.y) / 0.03)
    chest.mix(0.85, rind * chest.lung[side] * 0.9)


@_sign("Effusion")
def _draw_effusion(chest: Chest) -> None:
    """Fluid fills a costophrenic angle; its level climbs the chest wall as a meniscus."""
    side = _usual_side(chest, 1)
    s = chest.x * side
    out = np.maximum(s - 0.1, 0)
    level = chest.film.uniform(0.6, 0.63) - 2.4 * out * out
    chest.mix(0.8, _ramp((chest.y - level) / 0.02) * chest.lung[side] * 0.95)


@_sign("Hernia")
def _draw_hernia(chest: Chest) -> None:
    """The stomach behind the heart: a round wall about air above a fluid level, on the midline over the diaphragm."""
    cx, cy = 0.02 + chest.film.uniform(-0.008, 0.008), 0.64
    sac = chest.ellipse(cx, cy, 0.078, 0.07, 0.012)
    chest.mix(0.88, sac)
    air = chest.ellipse(cx, cy, 0.062, 0.055, 0.01) * _ramp(((cy + 0.005) - chest.y) / 0.008)
    chest.mix(0.18, air)


SIGNS = tuple(_DRAWERS)
"""The classes that can be drawn, in the order in which they are."""
