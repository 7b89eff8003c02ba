"""Figures as they were saved."""

import pytest
from matplotlib.figure import Figure


@pytest.fixture(name="saved")
def fixture_saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, in their final layout."""
    figures: list[Figure] = []
    save = Figure.savefig

    def look(self: Figure, *args: object, **kwargs: object) -> None:
        save(self, *args, **kwargs)
        figures.append(self)

    monkeypatch.setattr(Figure, "savefig", look)
    return figures
