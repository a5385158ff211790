"""Figures of runs that lack something; warnings of matplotlib are errors here."""

import itertools
import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from bn_jax import plots
from bn_jax.plots import style
from bn_jax.plots.judged import LOOKS

ROW = {"epoch": 1, "loss": 2.0, "train_accuracy": 0.5, "test_accuracy": 0.25}
ORANGE = tuple(bytes.fromhex(style.ORANGE[1:]))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written, to be looked at."""
    figures = []
    save = style.save

    def kept(figure, path):
        save(figure, path)
        FigureCanvasAgg(figure).draw()
        figures.append(figure)

    monkeypatch.setattr(style, "save", kept)
    return figures


def colours_of(path):
    """How many pixels of an image have a colour."""
    with Image.open(path) as image:
        found = image.convert("RGB").getcolors(10**6)
    return {colour: count for count, colour in found}


def labels_of(axis):
    return [label for label in axis.get_ticklabels() if label.get_text()]


@pytest.mark.parametrize("exact", [0.5, None])
def test_curves_are_drawn_with_or_without_exact_statistics(exact, tmp_path):
    found = {"test_accuracy_exact": exact, "data_source": "images"}
    title = "lenet, norm batch_norm, rate 1, " * 5
    plots.curves([ROW], found, tmp_path / "curves.png", title=title)
    orange = colours_of(tmp_path / "curves.png").get(ORANGE, 0)
    assert (orange > 20) == (exact is not None)


FOUND = {"test_accuracy_exact": None, "data_source": "images"}
VALIDATED = {**ROW, "validation_loss": 1.5, "validation_accuracy": 0.375}


def test_curves_have_validation_scores_where_there_are_some(drawn, tmp_path):
    for row in (ROW, VALIDATED):
        plots.curves([row], FOUND, tmp_path / "curves.png")
    without, with_them = (figure.axes[0] for figure in drawn)
    lines = {line.get_label(): line.get_ydata().tolist() for line in with_them.lines}
    assert lines == {
        "train loss [nats]": [2.0],
        "validation loss [nats] (moving averages)": [1.5],
        "train accuracy": [0.5],
        "validation accuracy (moving averages)": [0.375],
        "test accuracy (moving averages)": [0.25],
    }
    assert [line.get_label() for line in without.lines] == [
        label for label in lines if "validation" not in label
    ]


@pytest.mark.parametrize(
    ("losses", "top"),
    [
        ([1.5, 1.0], 2.1),  # the training loss and a twentieth
        ([3.0, 1.0], 3.15),
        ([200.0, 1.0], 4.0),  # twice the training loss, and no more
        ([float("inf"), 1.0], 2.1),
        ([None, 1.0], 2.1),
    ],
)
def test_validation_losses_far_above_the_others_do_not_flatten_them(
    losses, top, drawn, tmp_path
):
    rows = [
        {**VALIDATED, "epoch": i, "validation_loss": v} for i, v in enumerate(losses)
    ]
    plots.curves(rows, FOUND, tmp_path / "curves.png")
    assert drawn[0].axes[0].get_ylim() == pytest.approx((0, top))


def test_validation_losses_beyond_the_figure_are_triangles_at_its_edge(drawn, tmp_path):
    rows = [
        {**VALIDATED, "epoch": i, "validation_loss": v}
        for i, v in enumerate([200.0, math.inf, None, 1.0], 1)
    ]
    plots.curves(rows, FOUND, tmp_path / "curves.png")
    (marks,) = (line for line in drawn[0].axes[0].lines if line.get_marker() == "^")
    assert marks.get_xydata().tolist() == [[1, 4.0], [2, 4.0]]
    assert not marks.get_clip_on()


@pytest.mark.parametrize("num_epochs", [1, 2, 10])
def test_epochs_are_whole_numbers_and_no_mark_hides_another(
    num_epochs, drawn, tmp_path
):
    rows = [{**VALIDATED, "epoch": i} for i in range(1, num_epochs + 1)]
    source = "Fashion-MNIST, 6,000 + 1,000 images, the sample embedded in bn_jax"
    found = {
        "test_accuracy_exact": 1.0,
        "data_source": f"{source}, the last 500 of training for validation",
    }
    plots.curves(rows, found, tmp_path / "curves.png", title="lenet")
    plots.members_by_epoch(
        {"one": [{"loss": [1.0] * num_epochs, "test_accuracy": [0.5] * num_epochs}]},
        tmp_path / "members.png",
    )
    for figure in drawn:
        axes = figure.axes[0]
        low, high = axes.get_xlim()
        ticks = [float(t) for t in axes.get_xticks() if low <= t <= high]
        assert ticks and all(t.is_integer() and t >= 1 for t in ticks)
    axes = drawn[0].axes[0]
    star, dot = (
        axes.transData.transform(line.get_xydata()[-1])
        for line in (axes.lines[-1], axes.lines[0])
    )
    assert star[0] - dot[0] > 11 * drawn[0].dpi / 72 / 2  # half of a star
    assert axes.get_ylim()[1] > 1.0  # so that an accuracy of 1 is drawn whole
    whole = drawn[0].get_window_extent()
    assert drawn[0]._suptitle.get_text().count("\n") == 1
    for part in (drawn[0]._suptitle, *drawn[0].legends):
        extent = part.get_window_extent()
        assert not extent.overlaps(axes.get_window_extent())
        assert extent.x0 >= 0 and extent.x1 <= whole.x1


def test_layers_with_gamma_or_beta_alone_are_drawn(tmp_path):
    layers = {"scale": {"gamma": [1.0, 2.0]}, "centre": {"beta": [0.5]}, "neither": {}}
    plots.gamma_beta(layers, tmp_path / "gamma_beta.png")
    many = {f"{name}{i}": layers[name] for i in range(9) for name in layers}
    only = {f"scale{i}": layers["scale"] for i in range(9)}
    for several in (many, only):
        plots.gamma_beta(several, tmp_path / "gamma_beta.png")
    assert (tmp_path / "gamma_beta.png").exists()


def resnet(blocks):
    """Gamma and beta of the norms of a ResNet, in the order of results.json."""
    rng = np.random.default_rng(0)
    names = ["stem_norm"] + [
        f"stage{stage}_block{block}/norm{i}"
        for stage in (1, 2, 3)
        for block in range(1, blocks + 1)
        for i in (1, 2)
    ]
    return {
        name: {
            "gamma": rng.normal(1, 0.2, 16).tolist(),
            "beta": rng.normal(0, 0.2, 16).tolist(),
        }
        for name in sorted(names)
    }


LENET = {f"norm{i}": {"gamma": [0.5, 2.0], "beta": [0.0, 0.25]} for i in range(1, 5)}
LONG = {f"{i}{'/layers' * 20}/norm": LENET["norm1"] for i in range(8)}


@pytest.mark.parametrize(
    "layers",
    [LENET, LONG, resnet(3), resnet(18)],
    ids=["lenet", "long names", "resnet-20", "resnet-110"],
)
def test_gamma_and_beta_can_be_read_at_900_pixels(layers, drawn, tmp_path):
    plots.gamma_beta(layers, tmp_path / "gamma_beta.png")
    with Image.open(tmp_path / "gamma_beta.png") as image:
        assert image.width == 900
        assert image.height <= 900
    (figure,) = drawn
    page = figure.bbox
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label for label in labels_of(axis) if label.get_visible()]
            boxes = [label.get_window_extent() for label in labels]
            assert all(label.get_fontsize() >= 7 for label in labels)
            assert all(page.x0 <= box.x0 and page.y0 <= box.y0 for box in boxes)
            pairs = itertools.combinations(boxes, 2)
            assert not any(one.overlaps(other) for one, other in pairs)
        # The panels have most of the page.
        assert axes.get_window_extent().width > 0.25 * page.width


def test_dots_of_layers_are_medians_quartiles_and_extremes(drawn, tmp_path):
    layers = {f"norm{i}": {"gamma": [1.0, 5.0, 2.0, 4.0, 3.0]} for i in range(9)}
    plots.gamma_beta(layers, tmp_path / "gamma_beta.png")
    gamma = drawn[0].axes[0]
    thin, thick = (lines.get_segments() for lines in gamma.collections)
    assert thin[8].tolist() == [[8, 1], [8, 5]]
    assert thick[8].tolist() == [[8, 2], [8, 4]]
    assert gamma.lines[-1].get_ydata().tolist() == [3.0] * 9


@pytest.mark.parametrize("count", [3, 12])
def test_layers_are_drawn_in_the_order_of_their_numbers_or_as_given(
    count, drawn, tmp_path
):
    values = {"gamma": [1.0], "beta": [0.0]}
    names = [f"conv{n}" for n in (1, 2, 10, *range(11, 8 + count))]
    backwards = names[::-1]
    for given in (sorted(names), backwards):
        plots.gamma_beta({name: values for name in given}, tmp_path / "drawn.png")
    for figure, expected in zip(drawn, (names, backwards), strict=True):
        axis = figure.axes[0].yaxis if count == 3 else figure.axes[1].xaxis
        got = [label.get_text().partition(" ")[0] for label in labels_of(axis)]
        assert got == expected


@pytest.mark.parametrize("labels", [[""], ["norm=a", "norm=b"]])
def test_members_of_a_sweep_are_drawn_even_if_there_is_one(labels, tmp_path):
    row = {"loss": [2.0, None], "test_accuracy": [0.5, None]}
    longer = {"loss": [2.0, 1.0, 0.5], "test_accuracy": [0.5, 0.6, 0.7]}
    groups = {label: [row, longer][: i + 1] for i, label in enumerate(labels)}
    plots.members_by_epoch(groups, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").exists()
    none = {"loss": [None], "test_accuracy": [None]}  # diverged in the first epoch
    plots.members_by_epoch({label: [none] for label in labels}, tmp_path / "none.png")
    assert (tmp_path / "none.png").exists()


def test_members_whose_lines_coincide_are_all_seen(drawn, tmp_path):
    row = {"loss": [2.0, 1.0], "test_accuracy": [0.5, 0.6]}
    plots.members_by_epoch({"a": [row], "b": [row]}, tmp_path / "sweep.png")
    below, above = drawn[0].axes[0].lines
    assert below.get_linewidth() >= above.get_linewidth() + 2
    assert below.get_markersize() >= above.get_markersize() + 2


def test_members_of_a_sweep_are_drawn_with_their_validation_accuracy(drawn, tmp_path):
    row = {"loss": [2.0], "test_accuracy": [0.5]}
    validated = {**row, "validation_accuracy": [0.25]}
    for groups in ({"": [row]}, {"a": [validated], "b": [row]}):
        plots.members_by_epoch(groups, tmp_path / "sweep.png")
    without, with_it = ([axes.get_ylabel() for axes in f.axes] for f in drawn)
    assert without == ["training loss [nats]", "test accuracy"]
    assert with_it == [without[0], "validation accuracy", without[1]]
    line, nothing = drawn[1].axes[1].lines
    assert line.get_ydata().tolist() == [0.25]
    assert len(nothing.get_ydata()) == 0
    assert [f.get_suptitle() for f in drawn] == ["1 member", "2 members"]


INF = float("inf")
CLAIMS = {
    "supported": plots.Judged("it is below 1", 0.5, 0.25, 0.75, -INF, 1.0, "supported"),
    "refuted": plots.Judged("it is above 0 " * 20, -0.5, -INF, -0.2, 0, INF, "refuted"),
    "undecided": plots.Judged("it is between", 1.0, 1.0, 1.0, 1.0, 2.0, "undecided"),
}


@pytest.mark.parametrize("outcome", CLAIMS)
def test_claim_is_drawn_in_the_colour_of_its_outcome(outcome, tmp_path):
    plots.claims([CLAIMS[outcome]], "note", tmp_path / "claims.png")
    image = Image.open(tmp_path / "claims.png").convert("RGB")
    colours = {pixel: count for count, pixel in image.getcolors(10**6)}
    expected = tuple(bytes.fromhex(LOOKS[outcome][0][1:]))
    assert colours[expected] > 100
    for other in CLAIMS.keys() - {outcome, "undecided"}:
        assert tuple(bytes.fromhex(LOOKS[other][0][1:])) not in colours


def test_claims_are_drawn_one_above_the_other(tmp_path):
    plots.claims([*CLAIMS.values()], "note", tmp_path / "claims.png")
    plots.claims([CLAIMS["supported"]], "note", tmp_path / "claim.png")
    heights = []
    for name in ("claims.png", "claim.png"):
        with Image.open(tmp_path / name) as image:
            heights.append(image.height)
    assert heights[0] > 2 * heights[1]


def test_verdicts_that_are_no_results_are_marked(drawn, tmp_path):
    paths = [tmp_path / "result.png", tmp_path / "try.png"]
    claim = [CLAIMS["supported"]]
    plots.claims(claim, "note", paths[0])
    plots.claims(claim, "note", paths[1], caution="A try of 2 seeds: no result")
    assert drawn[0].get_suptitle() == "note"
    assert drawn[1].get_suptitle() == "A try of 2 seeds: no result\nnote"
    orange = [colours_of(path).get(ORANGE, 0) for path in paths]
    assert orange[0] == 0
    assert orange[1] > 100
