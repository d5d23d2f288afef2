"""Walks the scenes, draws them and says what they show: the work behind `fusedopt landscape`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path as File
from typing import Any

from rich.console import Console

import fusedopt as fo

from ..output_paths import claim_directory, claim_file
from ..progress import progress
from .claims import Claim
from .paths import Path
from .pictures import write_gif, write_png
from .scenes import SCENES, Scene


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A scene with its paths by label, what they bear out, and the pictures of them."""

    scene: Scene
    paths: dict[str, Path]
    claim: Claim
    files: tuple[File, ...]

    def record(self) -> dict[str, Any]:
        """Return the scene as plain values, with every point of every path."""
        scene = self.scene
        return {
            "name": scene.name,
            "title": scene.title.replace("\n", " "),
            "objective": repr(scene.objective),
            "claim": asdict(self.claim),
            "left_out": scene.left_out,
            "paths": {
                label: {
                    "rule": repr(path.run.rule),
                    "batch": path.run.batch,
                    "points": path.points.tolist(),
                    "last_loss": float(path.losses[-1]),
                }
                for label, path in self.paths.items()
            },
            "files": [str(file) for file in self.files],
        }


def choose(names: Sequence[str] | None) -> list[Scene]:
    """The scenes of these names; all without. ValueError for a name that no scene has."""
    for name in names or ():
        if name not in SCENES:
            raise ValueError(f"scene: expected one of {', '.join(SCENES)}, got {name!r}")
    return [SCENES[name] for name in names or SCENES]


def show(
    scenes: Sequence[Scene],
    out: File,
    console: Console,
    *,
    moving: bool = True,
    json_file: File | None = None,
) -> tuple[list[Shown], bool]:
    """Write NAME.png, and NAME.gif where `moving`, of each scene into the directory `out`.

    Prints what each shows. Returns the scenes that were finished, and whether all were: a
    KeyboardInterrupt ends the work and keeps these. Raises OSError, before any work, where a file
    cannot be written.
    """
    claim_directory("--out", out)
    if json_file is not None:
        claim_file("--json", json_file)
    done: list[Shown] = []
    bar = progress(console)
    try:
        with bar:
            task = bar.add_task("", total=len(scenes))
            for scene in scenes:
                bar.update(task, completed=len(done), description=scene.name)
                done.append(_show(scene, out, moving))
                _tell(console, done[-1])
    except KeyboardInterrupt:
        console.print(f"Interrupted after {len(done)} of {len(scenes)} scenes.")
    if json_file is not None:
        record = {"scenes": [shown.record() for shown in done], "machine": fo.info()}
        json_file.write_text(json.dumps(record) + "\n", encoding="ascii")
    return done, len(done) == len(scenes)


def _show(scene: Scene, out: File, moving: bool) -> Shown:
    paths = scene.walk()
    files = [out / f"{scene.name}.png"]
    write_png(scene, list(paths.values()), files[0])
    if moving:
        files.append(out / f"{scene.name}.gif")
        write_gif(scene, list(paths.values()), files[1])
    claim = scene.claim(paths, scene.objective)
    return Shown(scene=scene, paths=paths, claim=claim, files=tuple(files))


def _tell(console: Console, shown: Shown) -> None:
    scene, claim = shown.scene, shown.claim
    lines = [scene.title.replace("\n", " "), f"  {claim.text}"]
    if not claim.holds:
        lines.append("  NOT BORNE OUT by these numbers")
    if scene.left_out:
        lines.append(f"  left out: {scene.left_out}")
    lines.append(f"  {', '.join(str(file) for file in shown.files)}")
    for line in lines:
        console.print(line, markup=False, soft_wrap=not console.is_terminal)
