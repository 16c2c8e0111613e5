"""Every figure is drawn from evidence, says in words what it shows, and becomes a PNG that is not
empty.
"""

import io
import re
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from PIL import Image
from synthetic import attacked, evidence, known

from latlib.report import eps_grid, figures, plots, refusal_tables, robustness_tables
from latlib.report.evidence import Evidence, MissingError, display_name
from latlib.report.stats import Interval, sizes
from latlib.report.tables import named

FIGURES = (
    figures.security_curve,
    figures.encodings_bars,
    figures.training_curves,
    figures.spike_figure,
    figures.variance_by_site,
    refusal_tables.ablation_matrix,
    refusal_tables.site_sweep,
    refusal_tables.variance_bars,
    figures.eps_sweep,
    figures.main_figure,
)


@pytest.fixture(scope="module")
def run():
    return evidence(True)


@pytest.mark.parametrize("draw", FIGURES, ids=lambda f: f.__name__)
def test_a_figure_has_words_labels_and_pixels(run, draw, tmp_path):
    figure, alt, caption = draw(run)
    assert len(alt.split()) > 8 and any(c.isdigit() for c in alt) and "nan" not in alt
    for ax in figure.axes:
        assert ax.get_title() and ax.get_xlabel(), "a panel without title or axis label"
    image = Image.open(plots.save(figure, tmp_path / "figures" / "f.png"))
    assert image.size[0] > 400 and len(np.unique(np.asarray(image.convert("L")))) > 10
    assert (tmp_path / "figures" / "f.png").stat().st_size < 150_000 and not plt.fignum_exists(
        figure.number
    )


@pytest.mark.parametrize("draw", FIGURES, ids=lambda f: f.__name__)
def test_a_figure_says_how_many_seeds_it_is_of(run, draw):
    figure, _, caption = draw(run)
    assert re.search(r"\d seeds?\.$", caption), caption
    if draw is not figures.training_curves:
        assert re.search(r"\bn = \d", caption), caption
    plt.close(figure)


def test_every_method_that_was_asked_is_drawn_compared_or_not(run):
    """A profile may compare methods for their directions and attack others."""
    roles = run.profile.roles.model_copy(update={"compared": ("ssft", "at")})
    e = replace(run, profile=run.profile.model_copy(update={"roles": roles}))
    whole = figures.main_figure(e)
    latent, encoded, _ = whole.figure.axes[:3]
    for panel in (latent, encoded):
        drawn = " ".join(panel.get_legend_handles_labels()[1])
        assert re.search(r"\bLAT\b", drawn.replace("LAT's", "")), drawn
    without = replace(e, outcomes=e.outcomes[e.outcomes["method"] != "at"])
    drawn = figures.encodings_bars(without)
    assert [ax.get_title() for ax in drawn.figure.axes] == ["base", "SSFT", "LAT"]
    plt.close("all")


def test_panels_say_their_own_sizes_where_they_differ(run):
    of_one, of_three = (Interval(0.5, 0.4, 0.6, n=200 * k, seeds=k) for k in (1, 3))
    figure, axes = plots.axes_of(2)
    plots.size_panels({axes[0, 0]: [of_one], axes[0, 1]: [of_one]})
    assert [ax.get_title() for ax in figure.axes] == ["", ""]
    plots.size_panels({axes[0, 0]: [of_one], axes[0, 1]: [of_three]})
    assert [ax.get_title()[1:] for ax in figure.axes] == ["n = 200, 1 seed", "n = 600, 3 seeds"]
    plt.close(figure)
    whole = figures.main_figure(run).figure  # the README shows it without its caption
    assert all(re.search(r"\d seeds?$", ax.get_title()) for ax in whole.axes)
    plt.close(whole)


HEAT_MAPS = {
    refusal_tables.ablation_matrix: lambda: evidence(True),
    robustness_tables.heat_map: attacked,
    robustness_tables.transfer_matrix: attacked,
    eps_grid.eps_and_kl: lambda: known(0.8, 0.4),
}


@pytest.mark.parametrize("draw", HEAT_MAPS, ids=lambda f: f.__name__)
def test_numbers_in_cells_can_be_read(draw):
    """A contrast of 4.5 between each number and its cell."""
    figure = draw(HEAT_MAPS[draw]()).figure
    contrasts = []
    for ax in figure.axes:
        (image,) = ax.images
        behind = image.to_rgba(image.get_array())
        for text in ax.texts:
            x, y = text.get_position()
            sides = sorted(map(luminance, (to_rgb(text.get_color()), behind[int(y), int(x)])))
            contrasts.append((sides[1] + 0.05) / (sides[0] + 0.05))
    assert len(contrasts) > 8 and min(contrasts) >= 4.5
    plt.close(figure)


def luminance(colour):
    """Of WCAG."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_sizes_are_given_as_ranges_where_they_differ():
    of_one = Interval(0.5, 0.4, 0.6, n=200, seeds=1)
    of_three = Interval(0.5, 0.4, 0.6, n=600, seeds=3)
    grid = pd.DataFrame({"at": [of_one, None], "lat": [of_three, of_three]})
    assert sizes(grid) == "n = 200 to 600, 1 to 3 seeds"
    assert sizes(grid["lat"]) == "n = 600, 3 seeds" and sizes([of_one]) == "n = 200, 1 seed"
    assert plots.counted("ASR", grid["lat"]) == "ASR. n = 600 (prompts × seeds), 3 seeds."
    assert plots.counted("ASR", [Interval(0.5, 0.4, 0.6)]) == "ASR."


def test_harmless_answers_do_not_look_like_jailbreaks(run):
    for prompts, word in (("harmful", "complied"), ("twin", "answered")):
        figure, alt, caption = figures.encodings_bars(run, prompts=prompts)
        names = figure.axes[0].get_legend_handles_labels()[1]
        assert word in names and word in alt
        colours = {
            to_hex(bars.patches[0].get_facecolor()) for bars in figure.axes[0].containers[:3]
        }
        assert (plots.ORANGE.lower() in colours) == (prompts == "harmful")
        plt.close(figure)


def test_the_words_carry_the_numbers_of_the_table(run):
    alt = refusal_tables.ablation_matrix(run).alt
    complied, refused = alt.split("Refused: ")
    assert "SSFT: SSFT 60 %, AT 20 %, LAT 100 %, nothing 0 %" in complied
    assert "LAT: SSFT 100 %, AT 80 %, LAT 0 %, nothing 100 %" in refused


def test_a_method_has_one_name_for_readers():
    names = {
        "lat": "LAT",
        "lat-untargeted": "LAT-untargeted",
        "base": "base",
        "rr": "RR",
        "lat-eps0": "LAT-eps0",
    }
    assert {method: display_name(method) for method in names} == names
    table = pd.DataFrame({"vector": ["at"], "attack": ["pgd"]}, pd.Index(["lat"], name="target"))
    shown = named(table)
    assert shown.index.tolist() == ["LAT"] and shown.iloc[0].tolist() == ["AT", "pgd"]
    wide = pd.DataFrame([[1]], ["pgd"], pd.Index(["lat"], name="method"))
    assert list(named(wide)) == ["LAT"] and list(named(wide).index) == ["pgd"]


def test_shown_figures_carry_their_alternative_text(run, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    figure, alt, caption = figures.security_curve(run)
    numbers = {}
    monkeypatch.setattr(plots, "_numbers", numbers)
    plots.show(figure, alt, caption)
    data, metadata = shown[0]._repr_mimebundle_() if shown[0].embed else (None, None)
    assert metadata["image/png"]["alt"] == alt and data["image/png"]
    assert 400 < metadata["image/png"]["width"] < 1100  # as wide as a page, in its dots
    assert shown[1].data == f"**Figure 1.** {caption}"
    plots.show(*figures.encodings_bars(run))
    plots.show(*figures.security_curve(run))  # once more
    numbers = [one.data.split(" ")[1] for one in shown[1::2]]
    assert numbers == ["1.**", "2.**", "1.**"]
    with pytest.raises(ValueError, match="say in a sentence"):
        plots.show(figure, "figure 1")


def test_missing_results_are_named(run, capsys, tmp_path):
    with pytest.raises(MissingError, match="run notebook 04"):
        figures.variance_by_site(Evidence(run.profile, run.outcomes))
    with pytest.raises(MissingError, match="no training curve"):
        figures.spike_figure(Evidence(run.profile, run.outcomes))
    nothing = Evidence(run.profile, run.outcomes.iloc[:0])
    figures.show_measured(nothing, refusal_tables.ablation_matrix)
    figures.save_main_figure(nothing, tmp_path / "main.png")
    said = capsys.readouterr().out
    assert "ablation_matrix is not shown: no outcome" in said and "main.png is not written" in said
    assert not plt.get_fignums() and not list(tmp_path.iterdir())


def test_methods_and_outcomes_differ_in_more_than_colour():
    looks = plots.looks("abcdefg").values()
    assert len({(look["marker"], str(look["linestyle"])) for look in looks}) == len(looks) == 8
    assert len({hatch for _, hatch in plots.OUTCOMES.values()}) == len(plots.OUTCOMES)
    image = Image.open(io.BytesIO(plots.png_of(figures.security_curve(evidence(False)).figure)))
    assert image.mode == "P"
