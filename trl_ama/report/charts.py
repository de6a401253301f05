"""Curves over training steps as coordinates of an SVG: thinned out, scaled, with ticks. No text becomes markup here."""

import math
from typing import Any

import numpy as np


# In units of the SVG's view box: a pixel each on a wide screen, less on a narrow one
WIDTH, HEIGHT = 480, 220
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 10, 44
MARKS = ("circle", "square", "triangle", "diamond", "cross", "plus", "wedge")
DASHES = 5  # patterns in report.css
COLOURS = 8  # there too


def kept_rows(steps: np.ndarray, values: np.ndarray, most: int) -> np.ndarray:
    """At most `most` rows that show the course of all curves: largest triangles (Steinarsson 2013), summed over the curves.

    Args:
        steps (`np.ndarray`): Ascending. # (N,)
        values (`np.ndarray`): One column a curve; NaN where it has no value. # (N, k)
        most (`int`): At least 3.
    """
    count = len(steps)
    if count <= most:
        return np.arange(count)
    filled = values.copy()
    for curve in filled.T:  # without a value a curve goes on as it was
        known = np.flatnonzero(~np.isnan(curve))
        if len(known):
            curve[:] = curve[known[np.clip(np.searchsorted(known, np.arange(count), side="right") - 1, 0, None)]]
        else:
            curve[:] = 0.0
    span = np.ptp(filled, axis=0)
    filled /= np.where(span > 0, span, 1.0)
    steps = np.asarray(steps, dtype=np.float64)
    edges = np.linspace(1, count - 1, most - 1).astype(int)
    chosen = [0]
    for begin, end, after in zip(edges, edges[1:], [*edges[2:], count], strict=False):
        x, y = steps[chosen[-1]], filled[chosen[-1]]
        across = (x - steps[end:after].mean()) * (filled[begin:end] - y)
        along = (x - steps[begin:end])[:, None] * (filled[end:after].mean(axis=0) - y)
        chosen.append(int(begin + np.abs(across - along).sum(axis=1).argmax()))
    return np.array([*chosen, count - 1])


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    if not high > low:
        high = low + 1.0
    rough = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def value_range(curves: list[list[float | None]]) -> tuple[float, float]:
    """Smallest and largest value of several curves, zero included."""
    known = [value for curve in curves for value in curve if value is not None]
    return min([0.0, *known]), max([0.0, *known])


def chart(
    name: str,
    title: str,
    label: str,
    series: list[tuple[str, int, list[int], list[float | None]]],
    limits: tuple[float, float],
    most: int,
) -> dict[str, Any]:
    """One chart.

    Args:
        name (`str`): Becomes its id in the page; letters, digits and dashes.
        title (`str`): What it shows.
        label (`str`): What its values are.
        series (`list[tuple]`): Name, number of its style, steps and values of each curve.
        limits (`tuple[float, float]`): The smallest and largest value that must fit.
        most (`int`): Points of a curve.

    Returns:
        `dict` for the template, with `data` for its script and `table` for those who cannot see it.
    """
    steps = sorted({step for _, _, own, _ in series for step in own})
    row_of = {step: row for row, step in enumerate(steps)}
    values = np.full((len(steps), len(series)), np.nan)
    for column, (_, _, own, curve) in enumerate(series):
        for step, value in zip(own, curve, strict=True):
            if value is not None:
                values[row_of[step], column] = value
    rows = kept_rows(np.asarray(steps, dtype=np.float64), values, most)
    steps, values = [steps[row] for row in rows], values[rows]
    across = nice_ticks(min(steps), max(steps), 5)
    across = [tick for tick in across if steps[0] <= tick <= steps[-1] and tick == int(tick)] or [steps[0]]
    up = nice_ticks(*limits)
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def x(step: float) -> float:
        return round(LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - up[0]) / (up[-1] - up[0]) * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    for column, (curve, style, _, _) in enumerate(series):
        points = [(x(step), y(value)) for step, value in zip(steps, values[:, column], strict=True) if value == value]
        # Markers at places of its own, so that equal curves show each other
        spread = max(len(points) // 6, 1)
        marked = points[(column * spread // max(len(series), 1)) :: spread] if len(points) > 1 else points
        path = "M" + "L".join(f"{a:g},{b:g}" for a, b in points)
        lines.append({"name": curve, **look(style), "path": path, "marks": marked})
    shown = sorted(set(np.linspace(0, len(steps) - 1, min(len(steps), 9)).astype(int).tolist()))
    return {
        "id": name,
        "title": title,
        "label": label,
        "x_ticks": [(x(tick), f"{tick:,.0f}") for tick in across],
        "y_ticks": [(y(tick), f"{tick:g}") for tick in up],
        "lines": lines,
        "table": [(steps[row], [_plain(value) for value in values[row]]) for row in shown],
        "data": {
            "names": [curve for curve, _, _, _ in series],
            "steps": steps,
            "range": [first, last],
            "values": [[None if value != value else float(f"{value:.4g}") for value in column] for column in values.T],
        },
    }


def look(style: int) -> dict[str, Any]:
    """Colour, dashes and marker of a curve; all three, so that no one needs to tell colours apart."""
    return {"colour": style % COLOURS, "dash": style % DASHES, "mark": MARKS[style % len(MARKS)]}


def _plain(value: float) -> float | None:
    return None if value != value else float(value)
