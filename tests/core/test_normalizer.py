"""Normalizers: moments of the encoded data, inverses, volumes and refusals."""

from __future__ import annotations

import pytest
import torch

from ddiff.core.gaussian import GaussianDecoder
from ddiff.core.normalizer import (
    IdentityNormalizer,
    MeanStdNormalizer,
    Normalizer,
    PcaNormalizer,
)
from ddiff.errors import ArgumentError


def correlated(count: int = 500, width: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return 1e3 + 0.05 * noise @ mixing


NORMALIZERS: dict[str, Normalizer] = {
    "mean and std": MeanStdNormalizer.fit(correlated().split(37)),
    "all components": PcaNormalizer.fit(correlated().split(37), 4),
}


@pytest.mark.parametrize("name", list(NORMALIZERS))
def test_normalizer_gives_mean_0_and_variance_1(name: str) -> None:
    z = NORMALIZERS[name].encode(correlated())
    torch.testing.assert_close(z.mean(0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(
        z.var(0, unbiased=False), torch.ones(4, dtype=torch.float64), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("name", list(NORMALIZERS))
def test_normalizer_decode_inverts_encode(name: str) -> None:
    x = correlated()
    torch.testing.assert_close(NORMALIZERS[name].decode(NORMALIZERS[name].encode(x)), x)


@pytest.mark.parametrize("name", list(NORMALIZERS))
def test_normalized_nll_plus_log_volume_is_the_nll_in_data_units(name: str) -> None:
    """-ln p(x) of x = decode(z) is -ln p(z) plus ln |det decode|, by finite differences."""
    normalizer = NORMALIZERS[name]
    zero = torch.zeros(1, 4, dtype=torch.float64)
    columns = normalizer.decode(torch.eye(4, dtype=torch.float64)) - normalizer.decode(zero)
    log_det = float(torch.linalg.slogdet(columns).logabsdet)
    assert normalizer.log_volume == pytest.approx(log_det, abs=1e-9)
    # The density of a normal vector, whose covariance in data units is columns^T columns.
    z = normalizer.encode(correlated())[:5]
    nll = GaussianDecoder().nll(z, torch.zeros_like(z), torch.ones(5, dtype=torch.float64))
    data = torch.distributions.MultivariateNormal(normalizer.decode(zero)[0], columns.T @ columns)
    expected = -data.log_prob(normalizer.decode(z))
    torch.testing.assert_close(nll + normalizer.log_volume, expected, rtol=1e-6, atol=1e-6)


def test_normalizer_is_fitted_on_arrays_as_on_tensors() -> None:
    x = correlated()
    fitted = MeanStdNormalizer.fit([x.numpy()])
    assert torch.equal(fitted.encode(x), MeanStdNormalizer.fit([x]).encode(x))


def test_pca_of_fewer_components_keeps_the_largest_variances_and_has_no_density() -> None:
    x = correlated()
    pca = PcaNormalizer.fit([x], 2)
    assert pca.log_volume is None
    restored = pca.decode(pca.encode(x))
    lost = (restored - x).square().sum(-1).mean()
    variances = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    torch.testing.assert_close(lost, variances[:2].sum(), rtol=1e-6, atol=0)


def test_identity_normalizer_has_no_tensors_and_keeps_vectors() -> None:
    normalizer = IdentityNormalizer(4)
    assert normalizer.tensors() == {}
    assert torch.equal(normalizer.encode(correlated()), correlated())


@pytest.mark.parametrize("normalizer", NORMALIZERS.values())
def test_normalizer_is_rebuilt_from_its_tensors(normalizer: Normalizer) -> None:
    rebuilt = type(normalizer)(**normalizer.tensors())
    assert torch.equal(rebuilt.encode(correlated()), normalizer.encode(correlated()))


def test_normalizer_refuses_constant_dimensions_nan_and_too_few_vectors() -> None:
    x = correlated()
    constant = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], -1)
    with pytest.raises(ArgumentError, match="1 are constant"):
        MeanStdNormalizer.fit([constant])
    with pytest.raises(ArgumentError, match="vary in 4 dimensions only"):
        PcaNormalizer.fit([constant], 5)
    with pytest.raises(ArgumentError, match="must be finite"):
        MeanStdNormalizer.fit([torch.full((2, 3), torch.nan)])
    with pytest.raises(ArgumentError, match="at least two vectors"):
        MeanStdNormalizer.fit([x[:1]])
