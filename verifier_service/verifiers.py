"""The verifiers by kind. A new verifier is one file, two lines here and one test.

Each is imported where it is made: the process that makes one of them needs neither sympy nor the libraries of others.
"""

from collections.abc import Mapping

from ..contracts.errors import ConfigError
from ..contracts.protocols import Verifier
from ..contracts.sections import THINKING
from ..contracts.verifier_config import KINDS
from ..contracts.verifier_config import Verifier as Config
from .any_gold import AnyGoldVerifier


def make_verifier(
    config: Config,
    functions: Mapping[str, bytes] | None = None,
    api_key: str = "",
    thinking: tuple[str, str] = THINKING,
) -> Verifier:
    """The verifier of a recipe's section, with its rewards.

    `functions`: reward functions of one's own by their kinds, pickled by `load_function`; those that it lacks are
    loaded here. `api_key` is for the servers of kind http. No answer is read between the marks `thinking`. Raises
    ConfigError.
    """
    main = _main(config, functions or {}, api_key, thinking)
    if main.needs_gold:
        main = AnyGoldVerifier(main)
    if not config.rewards and config.weight == 1.0:
        return main
    from .composite import CompositeVerifier

    own = [_own(reward.kind, 1.0, functions or {}) if ":" in reward.kind else None for reward in config.rewards]
    return CompositeVerifier(main, config.weight, list(zip(config.rewards, own, strict=True)))


def _main(config: Config, functions: Mapping[str, bytes], api_key: str, thinking: tuple[str, str]) -> Verifier:
    match config.kind:
        case "math":
            from .math import MathVerifier

            return MathVerifier(config.answers, config.marker, thinking)
        case "exact":
            from .exact import ExactVerifier

            return ExactVerifier(config.answers, config.marker, thinking)
        case "numeric":
            from .numeric import NumericVerifier

            return NumericVerifier(config.answers, config.marker, config.tolerance, thinking)
        case "reasoning_gym":
            from .reasoning_gym_verifier import ReasoningGymVerifier

            return ReasoningGymVerifier(config.pass_score, config.answers, config.marker, thinking)
        case "http":
            from .http_verifier import HttpVerifier

            return HttpVerifier(config.urls, api_key, config.timeout_seconds, config.pass_score)
        case kind if ":" in kind:
            return _own(kind, config.pass_score, functions)
    raise ConfigError("verifier.kind names a verifier", config.kind, f"known: {', '.join(KINDS)}, MODULE:FUNCTION")


def _own(kind: str, pass_score: float, functions: Mapping[str, bytes]) -> Verifier:
    from .function_verifier import FunctionVerifier, load_function

    return FunctionVerifier(functions.get(kind) or load_function(kind), pass_score)
