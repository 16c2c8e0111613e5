"""Every suite on a profile that knows none of the usual methods: names mean nothing to the code."""

import pytest

from latlib.config.profile import Profile, load_profile
from latlib.experiment.run import SUITES, Run


@pytest.mark.slow
def test_a_profile_of_two_methods_runs_every_suite(tmp_path):
    smoke = load_profile("smoke").model_dump(exclude={"roles"})
    rerouted = {"objective": "rerouting", "attack.steps": 0}
    methods = {"guarded": {"attack.steps": 0}, "rerouted": rerouted}
    changes = {
        "methods": methods,
        "roles": {"undefended": "guarded"},
        "seeds": [0],
        "sweep": {"variants": {"slow": {"lr": 1.0e-3}}},
    }
    run = Run(Profile.model_validate({**smoke, **changes}), tmp_path)
    assert run.profile.main == "rerouted"
    run.measure([(("guarded", 0), suite) for suite in SUITES if suite != "variant"])
    run.measure([(("rerouted", 0, "slow"), "variant")])
    table = run.outcomes()
    assert set(table["method"]) == {"guarded", "rerouted"}
    assert set(table["source"]) == {
        "",
        "base",
        "guarded",
        "rerouted",
        "random",
        "shuffled",
        "nothing",
    }
