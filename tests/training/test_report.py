"""Tables and pictures of what was measured."""

import json
from pathlib import Path

import numpy as np
import pytest

from happyhorse.training.evaluate import SHUFFLED, film_path, make_prompts
from happyhorse.training.measure import write_render
from happyhorse.training.report import contact_sheet, summary, table, write_report, write_summary

FIGURES = {
    "text": {"bounce": {"colour": 1.0, "sync": 0.9, "sync" + SHUFFLED: 0.3}},
    "image": {"head": {"kept": 0.5}},
}


def test_the_report_has_ceiling_and_chance_beside_each_figure(tmp_path: Path) -> None:
    write_report(tmp_path / "pony.json", FIGURES, {"text": {"bounce": {"colour": 0.75}}})
    written = json.loads((tmp_path / "pony.json").read_text())
    assert written == {"figures": FIGURES, "ceilings": {"text": {"bounce": {"colour": 0.75}}}}
    lines = (tmp_path / "pony.md").read_text().splitlines()
    assert "| text | bounce | colour | 1.00 | 0.75 | 0.17 |" in lines
    assert "| text | bounce | sync | 0.90 |  | 0.30 |" in lines
    assert "| image | head | kept | 0.50 |  | 0.25 |" in lines
    assert not any(SHUFFLED in line for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pony.json", "pony.md"]


def test_a_table_without_ceilings_leaves_them_empty() -> None:
    assert "| text | head | voice | 0.75 |  | 0.50 |" in table({"text": {"head": {"voice": 0.75}}})


def test_a_summary_has_a_column_for_each_way_of_making_films(tmp_path: Path) -> None:
    found = {"8 steps": FIGURES, "4 steps": {"text": {"bounce": {"colour": 0.5}}}}
    lines = summary(found).splitlines()
    assert lines[0] == "| given | world | figure | 8 steps | 4 steps |"
    assert "| text | bounce | colour | 1.00 | 0.50 |" in lines
    assert "| image | head | kept | 0.50 |  |" in lines
    write_summary(tmp_path / "summary.json", found)
    assert json.loads((tmp_path / "summary.json").read_text()) == found
    assert (tmp_path / "summary.md").read_text() == summary(found)


def test_a_report_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_report(tmp_path / "pony.json", FIGURES)
    assert not list(tmp_path.iterdir())


def test_a_contact_sheet_has_a_row_for_every_film(tmp_path: Path) -> None:
    films = {}
    for world in ("bounce", "head"):
        (prompt,) = make_prompts(world, "text", tmp_path, 1)
        films[world] = film_path(tmp_path, "text", world, 0)
        write_render(prompt, films[world])
    one, two = contact_sheet({"bounce": films["bounce"]}), contact_sheet(films)
    assert two.size == (one.width, 2 * one.height)
    assert np.asarray(two)[one.height :].std() > 20
