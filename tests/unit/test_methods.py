"""Methods as compositions: what opd asks of the services and the learner, and which options it refuses."""

import pytest

from tutorloop.cluster.methods import compose
from tutorloop.contracts.config import Config, parse_config
from tutorloop.contracts.errors import ConfigError


def config(signal: str = "exact", method: str = "opd", **options: object) -> Config:
    return parse_config(
        {
            "method": method,
            "method_options": options,
            "output_dir": "x",
            "steps": 1,
            "prompts_per_step": 1,
            "student": {"model": "s"},
            "teacher": {"model": "t", "signal": signal},
            "data": {"path": "d"},
        }
    )


@pytest.mark.parametrize(
    ("signal", "options", "asks", "support", "term"),
    [
        ("sampled", {}, "sampled", 0, "policy_gradient"),
        ("topk", {"top_k": 5}, "topk", 0, "topk_divergence"),
        ("topk", {"top_k": 5, "support": "student"}, "given", 5, "topk_divergence"),
        ("exact", {"direction": "forward"}, "hidden", 0, "exact_divergence"),
    ],
)
def test_opd_in_three_strengths(signal: str, options: dict, asks: str, support: int, term: str) -> None:
    composition = compose(config(signal, **options))
    assert composition.scoring.signal == asks
    assert composition.sampling.topk_support == support
    assert [t.name for t in composition.terms] == [term]


@pytest.mark.parametrize(
    ("signal", "options"),
    [("exact", {"top_k": 4}), ("sampled", {"direction": "forward"}), ("topk", {"importance_clip": 1.0})],
)
def test_an_option_that_the_signal_does_not_use_is_refused(signal: str, options: dict) -> None:
    with pytest.raises(ConfigError, match="uses"):
        compose(config(signal, **options))


def test_unknown_method_and_unknown_option_name_what_is_known() -> None:
    with pytest.raises(ConfigError, match="did you mean opd"):
        compose(config(method="odp"))
    with pytest.raises(ConfigError, match="importance_clip"):
        compose(config("sampled", importance_clpi=2))
