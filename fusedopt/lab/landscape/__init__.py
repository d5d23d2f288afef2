"""Paths of the rules over losses of two weights: the work behind `fusedopt landscape`."""

from __future__ import annotations

from .claims import Claim
from .paths import Path, Run, walk
from .scenes import SCENES, Scene
from .show import Shown, choose, show

__all__ = ["SCENES", "Claim", "Path", "Run", "Scene", "Shown", "choose", "show", "walk"]
