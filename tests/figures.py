"""Reads charts back: pixels -> values, by the ticks that are drawn."""

import re
import xml.etree.ElementTree as ET

import numpy as np

NUMBER = r"-?\d+(?:\.\d+)?"


def parsed(figure):
    return ET.fromstring(figure.strip())


def letters(figure):
    """(text, x, y, anchor) of every text."""
    return [
        (
            t.text or "",
            float(t.get("x")),
            float(t.get("y")),
            t.get("anchor") or t.get("text-anchor"),
        )
        for t in parsed(figure).iter("text")
    ]


def lines_of(figure):
    """Points of every line, the diagonal left out."""
    return [
        np.array([[float(v) for v in p.split(",")] for p in line.get("points").split()])
        for line in parsed(figure).iter("polyline")
        if line.get("stroke-dasharray") is None
    ]


def value(text):
    return float(text.replace(",", "").replace("M", "e6"))


def read_x(figure, pixels, log=False):
    """Values of pixels, by the ticks below the plot."""
    at = [(value(t), x) for t, x, _, anchor in letters(figure) if anchor == "middle"]
    return between(at, pixels, log)


def read_y(figure, pixels):
    at = [
        (value(t), y - 4)
        for t, x, y, anchor in letters(figure)
        if anchor == "end" and x == 40 and re.fullmatch(r"[-\d.,eM]+", t)
    ]
    return between(at, pixels)


def between(at, pixels, log=False):
    assert len(at) >= 2
    values, places = map(np.array, zip(*at, strict=True))
    slope, start = np.polyfit(places, np.log(values) if log else values, 1)
    found = start + slope * np.asarray(pixels)
    return np.exp(found) if log else found
