"""What figures look like: no two lines of a drawing alike, told apart by the colour-blind and in
grey, every letter large enough and inside its figure."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from synthetic_grid import METHODS, grid, of_config, result

from fedmllm.bench.grid import load_grid
from fedmllm.report import figures, grid_figures, load_results
from fedmllm.report.arms import Board, boards
from fedmllm.report.grid_figures import arm_styles, draw_radar, drawn, strategies
from fedmllm.report.grid_page import _every_figure, board_figures
from fedmllm.scenarios import SETTINGS

ROOT = Path(__file__).resolve().parent.parent
GRIDS = ROOT / "experiments" / "grids"


@cache
def real_grid(name: str) -> list[dict]:
    """Results as one task and seed of a ready grid would give; nothing was run. Of the settings of
    `strategies` one a scenario."""
    only = ["dataset=memes", "seed=0"]
    only += ["setting=aligned-a0.5,missing-b0.5,cross-i5t5,hybrid-p0.7"] * (name == "strategies")
    found = load_grid(GRIDS / f"{name}.yaml", only=only)
    return [of_config(cell.config.model_dump(mode="json")) for cell in found.cells]


def board_of(name: str) -> Board:
    ((board,), problems) = boards(real_grid(name))
    assert problems == []
    return board


@cache
def drawings(name: str) -> list:
    return list(board_figures(board_of(name)))


def looks(ax) -> list[tuple[str, str, str]]:
    """Colour, marker and dash of every line of data; the web of a radar and axes have neither. The
    open mark of a test at the end is no line: it stands at the end of its arm's."""
    lines = [x for x in ax.get_lines() if x.get_zorder() > 0 and x.get_linestyle() != "None"]
    return [(str(x.get_color()), str(x.get_marker()), str(x.get_linestyle())) for x in lines]


# -- no two alike ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "least"), [("mini", 18), ("strategies", 15)])
def test_no_two_lines_of_a_drawing_look_alike(name: str, least: int) -> None:
    """Not even without their colours."""
    assert len(board_of(name).arms) >= least
    seen = set()
    for drawing in drawings(name):
        for ax in axes_of(drawing.figure):
            if drawing.kind in ("radar", "curves", "communication"):
                seen.add(drawing.kind)
                found = looks(ax)
                assert len(found) > 1, drawing.name
                assert len(set(found)) == len(found), drawing.name
                if drawing.kind != "communication":  # whose legend names methods
                    assert {(x.colour, x.dash) for x in drawing.legend.values()} >= {
                        (colour, dash) for colour, _, dash in found
                    }
                grey = [look[1:] for look in found]
                assert len(set(grey)) == len(grey), drawing.name
        styles = list(drawing.legend.values())
        assert len(set(styles)) == len(styles), drawing.name
    assert seen == {"radar", "curves", "communication"}


def axes_of(figure) -> list:
    return [ax for part in (figure, *figure.subfigs) for ax in part.axes]


def test_every_arm_is_in_a_figure_of_each_kind() -> None:
    board = board_of("strategies")
    for chosen in strategies(board):
        own = {a.label for a in board.arms if grid_figures.strategy(a) == chosen}
        assert own <= {a.label for a in drawn(board, "both", chosen)}
    names = [d.name for d in drawings("strategies")]
    assert len(names) == len(set(names))
    (cost,) = (d.figure for d in drawings("strategies") if d.kind == "communication")
    assert len(cost.axes) == len(strategies(board))


def test_a_strategy_that_only_baselines_have_gets_no_figure() -> None:
    """In `mini` the prompt alone is tried on what is not federated."""
    board = board_of("mini")
    assert "Centralised + prompt" in {arm.label for arm in board.arms}
    assert strategies(board) == ["", "prompt + regularisation"]
    alone = replace(board, arms=tuple(a for a in board.arms if a.topology != "federated"))
    assert strategies(alone) == ["", "prompt"]


def test_a_method_keeps_its_colour_and_marker_whatever_the_strategy() -> None:
    styles = arm_styles(board_of("strategies"))
    fedavg = {(s.colour, s.marker) for label, s in styles.items() if label.startswith("FedAvg")}
    fedadam = {(s.colour, s.marker) for label, s in styles.items() if label.startswith("FedAdam")}
    assert len(fedavg) == len(fedadam) == 1
    assert fedavg != fedadam
    assert styles["FedAvg"].dash == "-"
    assert {s.dash for label, s in styles.items() if " + " in label} == {"--"}


# -- colours -----------------------------------------------------------------------------------

# Machado, Oliveira and Fernandes, A Physiologically-based Model for Simulation of Color Vision
# Deficiency, IEEE TVCG 15 (2009): severity 1.0, on linear RGB
SIGHTS = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
}
# sRGB to XYZ and its white point (IEC 61966-2-1); XYZ to CIE L*a*b* (CIE 15)
XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
WHITE = (0.95047, 1.0, 1.08883)


def lab(colour: str, sight: str = "all cones") -> tuple[float, float, float]:
    """L*, a*, b* of ``#rrggbb`` as it is seen."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    seen = [min(1.0, max(0.0, dot(row, linear))) for row in SIGHTS[sight]]
    x, y, z = (curve(dot(row, seen) / white) for row, white in zip(XYZ, WHITE, strict=True))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def dot(a, b) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def curve(t: float) -> float:
    return t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116


def test_the_colour_arithmetic() -> None:
    """White, black and sRGB's red and green as published (Lab of D65)."""
    assert lab("#ffffff") == pytest.approx((100, 0, 0), abs=0.02)
    assert lab("#000000") == pytest.approx((0, 0, 0), abs=0.02)
    assert lab("#ff0000") == pytest.approx((53.24, 80.09, 67.20), abs=0.02)
    assert lab("#00ff00") == pytest.approx((87.73, -86.18, 83.18), abs=0.02)
    red, green = lab("#ff0000", "deuteranopia"), lab("#00a000", "deuteranopia")
    assert math.dist(lab("#ff0000"), lab("#00a000")) > 2 * math.dist(red, green)


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize(
    ("what", "colours", "least"),
    [
        ("runs", figures.RUN_COLOURS, 15),
        ("runs and references", (*figures.RUN_COLOURS, figures.MUTED, figures.INK), 12),
        ("modalities", [colour for _, colour in figures.HOLDING_STYLES.values()], 25),
        ("conditions", [colour for colour, _ in figures.CONDITION_STYLES.values()], 15),
        ("scenarios", [colour for colour, _ in grid_figures.SCENARIO_STYLES.values()], 15),
        ("classes", [colour for colour, _ in figures.CLASS_STYLES], 15),
    ],
)
def test_colours_are_apart_for_the_colour_blind(sight, what, colours, least) -> None:
    """By CIE 1976 distance; a difference of about 2.3 is just seen."""
    for a, b in itertools.combinations(colours, 2):
        assert math.dist(lab(a, sight), lab(b, sight)) >= least, (what, a, b)


def test_areas_are_apart_in_grey() -> None:
    """By lightness, or by their hatching; lines have markers and dashes."""
    held = [(colour, "") for _, colour in figures.HOLDING_STYLES.values()]
    for areas, least in ((held, 11), (figures.CLASS_STYLES, 8)):
        for (a, hatch), (b, other) in itertools.combinations(areas, 2):
            assert hatch != other or abs(lab(a)[0] - lab(b)[0]) >= least, (a, b)
    conditions = [marker for _, marker in figures.CONDITION_STYLES.values()]
    scenarios = [marker for _, marker in grid_figures.SCENARIO_STYLES.values()]
    assert len(set(conditions)) == len(conditions)
    assert len(set(scenarios)) == len(scenarios)


# -- letters -----------------------------------------------------------------------------------


def texts(figure, monkeypatch) -> list[Text]:
    """Every text that is drawn, after its figure is laid out."""
    found: dict[int, Text] = {}
    draw = Text.draw

    def watched(self, *arguments, **named):
        if self.get_visible() and self.get_text().strip():
            found[id(self)] = self
        return draw(self, *arguments, **named)

    monkeypatch.setattr(Text, "draw", watched)
    FigureCanvasAgg(figure).draw()
    monkeypatch.undo()
    return list(found.values())


@cache
def all_figures(which: str):
    if which == "demo":
        found = load_results([ROOT / "results" / "demo"])[0]
    else:
        found = [run for run in real_grid(which) if which != "mini" or few(run)]
    return dict(_every_figure(found))


def few(run: dict) -> bool:
    """Of `mini` what shows each figure once: the others differ by their numbers."""
    return run["config"]["prompt"] == "plain"


@pytest.mark.parametrize("which", ["mini", "demo"])
def test_letters_are_large_enough_and_inside_their_figure(which: str, monkeypatch) -> None:
    for name, figure in all_figures(which).items():
        wide = figure.get_size_inches()[0]
        assert wide <= figures.PAGE, name
        assert wide == figures.COLUMN or "radar" not in name
        box = figure.bbox
        for text in texts(figure, monkeypatch):
            assert text.get_fontsize() >= figures.SMALLEST, (name, text.get_text())
            own = text.get_window_extent()
            inside = box.x0 - 1 <= own.x0 and own.x1 <= box.x1 + 1
            assert inside, (name, text.get_text())
            assert box.y0 - 1 <= own.y0, (name, text.get_text())
            assert own.y1 <= box.y1 + 1, (name, text.get_text())


def test_no_letters_of_a_radar_touch(monkeypatch) -> None:
    (figure,) = (f for name, f in all_figures("mini").items() if "radar" in name)
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure, monkeypatch)]
    assert sum(name.replace("\n", "-") in SETTINGS for name, _ in boxes) == 12
    for (a, one), (b, other) in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), (a, b)


# -- the radar ---------------------------------------------------------------------------------


def radar(results: list[dict], chosen: str = "") -> tuple[dict, list]:
    """The legend's names with their styles, and the polygons in the same order."""
    ((board,), _) = boards(results)
    ax = axes_of(figures.draw_panels([(draw_radar, (board, "both", chosen))]))[0]
    legend = grid_figures.legend(board, drawn(board, "both", chosen), chosen)
    return legend, [line for line in ax.get_lines() if line.get_zorder() > 0], ax


def test_the_radar_draws_twelve_settings_and_breaks_where_one_is_missing() -> None:
    whole = grid(seeds=1, prompts=("plain",))
    legend, polygons, ax = radar(whole)
    assert len(legend) == len(polygons) == len(METHODS)
    assert all(len(line.get_xdata()) == 13 for line in polygons)  # closed
    assert all(math.isfinite(x) for line in polygons for x in line.get_xdata())
    assert not [t for t in ax.texts if "breaks" in t.get_text()]

    gone = [r for r in whole if not r["name"].startswith("memes-cross-i5t5-fedyogi")]
    legend, polygons, ax = radar(gone)
    assert len(legend) == len(polygons) == len(METHODS)
    place, at = list(SETTINGS).index("cross-i5t5"), list(legend).index("FedYogi")
    for i, line in enumerate(polygons):
        holes = [k for k, x in enumerate(line.get_xdata()) if math.isnan(x)]
        assert holes == ([place] if i == at else []), list(legend)[i]
    assert [t for t in ax.texts if "breaks where its arm was not run" in t.get_text()]


def test_a_radar_names_no_arm_that_it_cannot_draw() -> None:
    made = grid(seeds=1, prompts=("plain",))
    for run in made:
        if "fedyogi" in run["name"]:
            run["metrics"] = {"image_withheld": {"n": 300, "auc": 0.6}}
    legend, polygons, _ = radar(made)
    assert "FedYogi" not in legend
    assert len(legend) == len(polygons) == len(METHODS) - 1


def test_a_polygon_ends_where_the_numbers_say() -> None:
    """Three settings, half of the way from the middle to the top, and three quarters of another."""
    three = ("aligned-a0.5", "missing-b0.5", "cross-i5t5")
    values = {"aligned-a0.5": 0.7, "missing-b0.5": 0.6, "cross-i5t5": 0.8}
    _, (line,), _ = radar([result("fedavg", s, 0, value=values[s]) for s in three])
    rings = grid_figures._rings(0.6, 0.8)
    assert (rings[0], rings[-1]) == (0.5, 0.9)
    assert line.get_ydata()[0] == pytest.approx(0.5)
    assert line.get_xdata()[0] == pytest.approx(0)
    assert math.hypot(line.get_xdata()[2], line.get_ydata()[2]) == pytest.approx(0.75)


# -- communication -----------------------------------------------------------------------------


def cost(results: list[dict]):
    ((board,), _) = boards(results)
    ax = axes_of(figures.draw_panels([(grid_figures.draw_cost, (board, "both", ""))]))[0]
    return ax, [line for line in ax.get_lines() if line.get_zorder() > 0]


def test_the_metric_against_bytes_is_of_the_settings_that_all_have() -> None:
    """FedYogi lacks the setting in which all are bad; it must not look better for it."""
    three = ("aligned-a0.5", "missing-b0.5", "cross-i5t5")
    values = dict(zip(three, (0.9, 0.7, 0.5), strict=True))
    results = [result("fedavg", s, 0, value=values[s]) for s in three]
    results += [result("fedyogi", s, 0, value=values[s]) for s in three[:2]]
    ax, found = cost(results)
    ends = [line.get_ydata()[-1] for line in found if line.get_linestyle() == "None"]
    assert ends == [pytest.approx(0.8)] * 2  # the open marks of the tests at the end
    fedavg, fedyogi = (line for line in found if line.get_linestyle() != "None")
    assert list(fedavg.get_ydata()) == list(fedyogi.get_ydata())
    assert "2 of 3 settings" in ax.get_title(loc="left")
    ax, found = cost(results[:3])
    assert found[-1].get_ydata()[-1] == pytest.approx(0.7)
    assert "settings" not in ax.get_title(loc="left")


def test_a_run_that_was_measured_only_at_its_end_is_a_point() -> None:
    (run,) = [result("fedavg", "aligned-a0.5", 0, value=0.9)]
    for line in run["history"]:
        line["metrics"] = None
    _, (point,) = cost([run])
    assert list(point.get_xdata()) == [pytest.approx(4.8)]  # six rounds of 0.4 MB up and down
    assert list(point.get_ydata()) == [0.9]
