"""Settings of Gaussian diffusion: a schedule, the ends of log SNR and a decoder.

A vector x is noised by z_t = a(t) x + sigma(t) eps with standard normal eps, and
SNR = (a / sigma)^2.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, final

import torch
from pydantic import Field, model_validator

from ddiff import (
    ArgumentError,
    ComponentConfig,
    CosineVP,
    Flow,
    GaussianDecoder,
    GaussianProcess,
    GaussianSchedule,
    GridDecoder,
    LinearBetaVP,
    PositiveFloat,
    SigmoidVP,
    VectorDecoder,
    ZeroTerminal,
)

# Beyond 30 the noise is below 3e-7 data units, and x + noise loses the digits of the noise.
LogSnr = Annotated[float, Field(ge=-30.0, le=30.0)]
# Beyond 10 almost all noise is added within a tenth of the time.
Span = Annotated[float, Field(gt=0.0, le=10.0)]
# Limits of the largest magnitude of values on a grid. The noise of the process has deviation 1.
SMALLEST_RANGE = 0.5
LARGEST_RANGE = 4.0
# Keys that belong to one schedule, and their defaults.
LINEAR_KEYS = ("smallest_beta", "largest_beta")
SMALLEST_BETA = 0.1
LARGEST_BETA = 20.0
SPAN = 3.0


@final
class GaussianDiffusion:
    """Component that builds a `GaussianProcess` for vectors of a given width."""

    states = frozenset({"vectors"})

    class Config(ComponentConfig):
        schedule: Literal["cosine", "flow", "linear", "sigmoid"] = "cosine"
        """a and sigma: cos and sin of pi t / 2, 1 - t and t, a linear noise rate, or a sigmoid."""
        zero_terminal: bool = False
        """Whether a linear schedule is shifted and scaled so that SNR(1) = 0."""
        smallest_beta: PositiveFloat | None = None
        """Noise rate of the linear schedule at t = 0; None is 0.1."""
        largest_beta: PositiveFloat | None = None
        """Noise rate of the linear schedule at t = 1; None is 20."""
        span: Span | None = None
        """Largest argument of the logistic function of the sigmoid schedule; None is 3."""
        largest_log_snr: LogSnr = 10.0
        """log SNR at t = 0; the decoder covers the information beyond it."""
        smallest_log_snr: LogSnr | None = None
        """log SNR at t = 1; None is the end of the schedule."""
        decoder: Literal["gaussian", "grid"] = "gaussian"
        """Distribution of the data given the state at t = 0: a density, or values on a grid."""
        values: tuple[float, ...] = ()
        """Values of one number of the data for the grid decoder, at least two."""

        @model_validator(mode="after")
        def _check_keys(self) -> GaussianDiffusion.Config:
            linear = [key for key in LINEAR_KEYS if getattr(self, key) is not None]
            if self.zero_terminal:
                linear.append("zero_terminal")
            if linear and self.schedule != "linear":
                raise ValueError(
                    f'{", ".join(linear)} can only be given if schedule = "linear"; '
                    f'got schedule = "{self.schedule}"'
                )
            if self.span is not None and self.schedule != "sigmoid":
                raise ValueError(
                    'span can only be given if schedule = "sigmoid"; '
                    f'got schedule = "{self.schedule}"'
                )
            if bool(self.values) != (self.decoder == "grid"):
                raise ValueError(
                    'values must be given if and only if decoder = "grid"; '
                    f'got decoder = "{self.decoder}" and {len(self.values)} values'
                )
            largest = max((abs(value) for value in self.values), default=1.0)
            if not SMALLEST_RANGE <= largest <= LARGEST_RANGE:
                raise ValueError(
                    f"the largest magnitude of values must be between {SMALLEST_RANGE} and "
                    f"{LARGEST_RANGE}, since the noise has deviation 1; got {largest:g}. Scale the "
                    "data set and values to [-1, 1]: x becomes 2 (x - low) / (high - low) - 1"
                )
            return self

    @classmethod
    def build(cls, config: Config, *, width: int | None) -> GaussianProcess:
        if width is None:
            raise ArgumentError(
                "The process gaussian is for vectors and needs their width, but it was given to a "
                "field of tokens. Use a process of tokens, such as mdlm, or give the field vectors."
            )
        return GaussianProcess(
            _build_schedule(config),
            width,
            config.largest_log_snr,
            config.smallest_log_snr,
            _build_decoder(config),
        )

    formulas: ClassVar[str] = """
        state       z_t = a(t) x + sigma(t) eps
        density     -1/2 SNR'(t) |x - x_hat|^2  summed over the d numbers, in nats per unit of t
        closing     KL( N(a x, sigma^2) || N(0, 1) ) at t = 1; 0 if SNR(1) = 0
        decoding    -ln p(x | z_0), with p Gaussian or on a grid of values
        step        z_s ~ N( a_s x_hat + sigma_s (a_t sigma_s)/(a_s sigma_t) eps_hat,
                    sigma_s^2 (1 - SNR_t/SNR_s) )

        x, z_t      clean vector of d numbers, and noisy vector at time t
        eps         standard normal noise; eps_hat = (z_t - a_t x_hat) / sigma_t
        x_hat       predicted mean of x
        SNR         (a / sigma)^2, the signal-to-noise ratio
        """

    example_settings: ClassVar[tuple[dict[str, Any], ...]] = (
        {"schedule": "cosine"},
        {"schedule": "flow"},
        {"schedule": "linear"},
        {"schedule": "linear", "zero_terminal": True},
        {"schedule": "sigmoid"},
        {"schedule": "sigmoid", "span": 6.0, "smallest_log_snr": -9.0},
        {"schedule": "cosine", "largest_log_snr": 30.0, "smallest_log_snr": -30.0},
        {"schedule": "flow", "largest_log_snr": 30.0},
        {"decoder": "grid", "values": (-1.5, -0.5, 0.5, 1.5)},
    )

    @classmethod
    def examples(cls) -> list[GaussianProcess]:
        widths = (2, 3, 2, 1, 2, 1, 2, 1, 1)
        return [
            cls.build(cls.Config.model_validate(keys), width=width)
            for keys, width in zip(cls.example_settings, widths, strict=True)
        ]


def _build_schedule(config: GaussianDiffusion.Config) -> GaussianSchedule:
    if config.schedule == "cosine":
        return CosineVP()
    if config.schedule == "flow":
        return Flow()
    if config.schedule == "sigmoid":
        return SigmoidVP(SPAN if config.span is None else config.span)
    smallest = SMALLEST_BETA if config.smallest_beta is None else config.smallest_beta
    largest = LARGEST_BETA if config.largest_beta is None else config.largest_beta
    linear = LinearBetaVP(smallest, largest)
    return ZeroTerminal(linear) if config.zero_terminal else linear


def _build_decoder(config: GaussianDiffusion.Config) -> VectorDecoder:
    if config.decoder == "grid":
        return GridDecoder(torch.tensor(config.values, dtype=torch.float64))
    return GaussianDecoder()
