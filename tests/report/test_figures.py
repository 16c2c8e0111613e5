"""Every figure is drawn from evidence, says in words what it shows, and becomes a PNG that is not
empty.
"""

import io
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from synthetic import evidence

from latlib.report import figures, plots, refusal_tables
from latlib.report.evidence import Evidence, MissingError
from latlib.report.stats import Interval, sizes

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
    figure, alt = draw(run)
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
    figure, _ = draw(run)
    for ax in figure.axes:
        texts = [ax.get_title(), *(text.get_text() for text in ax.get_yticklabels())]
        if draw is figures.training_curves:
            texts = figure.axes[0].get_legend_handles_labels()[1]
        assert any(re.search(r"seeds \d|(\d|one) seeds?\b", text) for text in texts), texts
    plt.close(figure)


def test_sizes_are_given_as_ranges_where_they_differ():
    of_one = Interval(0.5, 0.4, 0.6, n=200, seeds=1)
    of_three = Interval(0.5, 0.4, 0.6, n=600, seeds=3)
    grid = pd.DataFrame({"at": [of_one, None], "lat": [of_three, of_three]})
    assert sizes(grid) == "n 200 to 600, seeds 1 to 3"
    assert sizes(grid["lat"]) == "n 600, seeds 3"


def test_harmless_answers_do_not_look_like_jailbreaks(run):
    for prompts, word in (("harmful", "complied"), ("twin", "answered")):
        figure, alt = figures.encodings_bars(run, prompts=prompts)
        names = figure.axes[0].get_legend_handles_labels()[1]
        assert word in names and word in alt
        colours = {
            to_hex(bars.patches[0].get_facecolor()) for bars in figure.axes[0].containers[:3]
        }
        assert (plots.ORANGE.lower() in colours) == (prompts == "harmful")
        plt.close(figure)


def test_the_words_carry_the_numbers_of_the_table(run):
    _, alt = refusal_tables.ablation_matrix(run)
    complied, refused = alt.split("Refused: ")
    assert "ssft: ssft 60 %, at 20 %, lat 100 %, nothing 0 %" in complied
    assert "lat: ssft 100 %, at 80 %, lat 0 %, nothing 100 %" in refused


def test_shown_figures_carry_their_alternative_text(run, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    figure, alt = figures.security_curve(run)
    plots.show(figure, alt)
    data, metadata = shown[0]._repr_mimebundle_() if shown[0].embed else (None, None)
    assert metadata["image/png"]["alt"] == alt and data["image/png"]
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
    image = Image.open(io.BytesIO(plots.png_of(figures.security_curve(evidence(False))[0])))
    assert image.mode == "P"
