"""Training losses of fields of vectors as recipe components."""

from __future__ import annotations

from typing import Annotated, Any, Literal, final

from pydantic import Field

from ddiff import (
    ArgumentError,
    ComponentConfig,
    FieldProcess,
    GaussianProcess,
    MinSnr,
    OutputMse,
    PositiveFloat,
    SigmoidWeighted,
)

# Beyond 30 in log SNR, the factor is 0 or 1 for every process.
Bias = Annotated[float, Field(ge=-30.0, le=30.0)]


@final
class OutputError:
    """Training loss of vectors: squared error of an output of the network, at uniform times."""

    states = frozenset({"vectors"})

    class Config(ComponentConfig):
        output: Literal["eps", "x0", "v", "u"] = "v"
        """Compared output, usually that of the head: noise "eps", clean vector "x0", "v", or flow
        velocity "u"."""

    @staticmethod
    def build(config: Config, *, process: FieldProcess) -> OutputMse:
        require_vectors("output_mse", process).check_output(config.output)
        return OutputMse(config.output)


@final
class MinSignalToNoise:
    """Training loss of vectors: squared error of the clean vector, with weight min(SNR, gamma)."""

    states = frozenset({"vectors"})

    class Config(ComponentConfig):
        gamma: PositiveFloat = 5.0
        """Largest weight."""

    @staticmethod
    def build(config: Config, *, process: FieldProcess) -> MinSnr:
        require_vectors("min_snr", process)
        return MinSnr(config.gamma)


@final
class Sigmoid:
    """Training loss of vectors: the NELBO times sigmoid(bias - log SNR), for less weight at t = 0.

    SNR is the signal-to-noise ratio.
    """

    states = frozenset({"vectors"})

    class Config(ComponentConfig):
        bias: Bias = 0.0
        """log SNR at which the weight is half that of the NELBO."""

    @staticmethod
    def build(config: Config, *, process: FieldProcess) -> SigmoidWeighted:
        require_vectors("sigmoid", process)
        return SigmoidWeighted(config.bias)


def require_vectors(name: str, process: Any) -> GaussianProcess:
    """Return the process if it is a process of vectors. Raises ArgumentError for other ones."""
    if not isinstance(process, GaussianProcess):
        raise ArgumentError(
            f'loss = "{name}" is for vectors under a Gaussian process; got '
            f'{type(process).__name__}. Use loss = "elbo" or "clip" for tokens.'
        )
    return process
