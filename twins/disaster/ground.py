"""Says how hard the ground shakes, and how far it spreads, at each site in each shock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator
from scipy.spatial import cKDTree

from federation.twin import Vector
from twins.regions import region_rows

Matrix = NDArray[np.float64]

PGA_PGV_CORRELATION = 0.73
"""Of the residuals of ln PGA and ln PGV at one site (Bradley, BSSA 102 (2012), from memory)."""

SUSCEPTIBILITY = np.array(
    [
        # threshold g, slope 1/g, intercept, share of the map unit
        [0.09, 9.09, 0.82, 0.25],  # very high
        [0.12, 7.67, 0.92, 0.20],  # high
        [0.15, 6.67, 1.00, 0.10],  # moderate
        [0.21, 5.57, 1.18, 0.05],  # low
        [0.26, 4.16, 1.08, 0.02],  # very low
    ]
)
"""Hazus' classes of liquefaction susceptibility, as tabulated in the OpenQuake manual."""

SPREADING_CAP = 4.0
"""Hazus' curve of lateral spreading ends where PGA is four times the threshold."""


def lateral_spreading_in(pga_g: Vector, magnitude: float, threshold_g: Vector) -> Vector:
    r"""Permanent ground deformation in inches where the soil does liquefy (Hazus).

    With :math:`x = \min(PGA / threshold, 4)`, :math:`E[PGD] = K_\Delta f(x)`,

    .. math::
        f(x) = 0,\ 12 x - 12,\ 18 x - 24,\ 70 x - 180 \quad (x < 1, 2, 3, 4), \qquad
        K_\Delta = 0.0086 M^3 - 0.0914 M^2 + 0.4698 M - 0.9835
    """
    x = np.minimum(pga_g / threshold_g, SPREADING_CAP)
    inches = np.select([x < 1, x < 2, x < 3], [0.0 * x, 12 * x - 12, 18 * x - 24], 70 * x - 180)
    m = magnitude
    return np.asarray(inches * (0.0086 * m**3 - 0.0914 * m**2 + 0.4698 * m - 0.9835))


def liquefied_share(
    pga_g: Vector, magnitude: float, susceptibility: NDArray[np.int64], water_depth_ft: float
) -> Vector:
    r"""The chance that a place liquefies (Hazus): :math:`P(liq|PGA)\, P_{ml} / (K_M K_W)`.

    .. math::
        K_M = 0.0027 M^3 - 0.0267 M^2 - 0.2055 M + 2.9188, \qquad K_W = 0.022\, d_W + 0.93
    """
    _, slope, intercept, mapped = SUSCEPTIBILITY[susceptibility].T
    m = magnitude
    k_m = 0.0027 * m**3 - 0.0267 * m**2 - 0.2055 * m + 2.9188
    k_w = 0.022 * water_depth_ft + 0.93
    return np.asarray(np.clip(slope * pga_g - intercept, 0.0, 1.0) * mapped / (k_m * k_w))


@dataclass(frozen=True, slots=True)
class Shaking:
    """What one shock does to the ground at every site."""

    magnitude: float
    pga_g: Vector
    pgv_cm_s: Vector
    pgd_in: Vector
    liquefied: Vector


@dataclass(frozen=True, slots=True)
class GroundMotion:
    """The median ground motion of the possible mainshocks at a set of sites.

    `pga_g` and `pgv_cm_s` are fields x sites. `pga_per_magnitude` and `pgv_per_magnitude`
    say by how much ln PGA and ln PGV grow per unit of magnitude at an unchanged distance:
    fitted to the fields of the source that has most of them. The stored fields hold no
    residuals: PGV is smooth to the fourth digit, and PGA has an uncorrelated noise of 1.4 per
    cent, alike for all magnitudes of a source, as a mean over a thousand draws leaves.
    """

    names: tuple[str, ...]
    magnitudes: Vector
    weights: Vector
    pga_g: Matrix
    pgv_cm_s: Matrix
    susceptibility: NDArray[np.int64]
    pga_per_magnitude: float
    pgv_per_magnitude: float

    def choose_field(self, uniform: float) -> int:
        """The field that a uniform number between 0 and 1 falls on, by weight."""
        edges = np.cumsum(self.weights) / self.weights.sum()
        return min(int(np.searchsorted(edges, uniform, side="right")), len(self.weights) - 1)

    def shake(
        self,
        field: int,
        magnitude: float,
        factor: float,
        residual_pga: Vector,
        residual_pgv: Vector,
        pga_per_magnitude: float,
        water_depth_ft: float,
        liquefaction_factor: float,
    ) -> Shaking:
        """A shock of `magnitude` with the pattern of a field.

        ln PGA = ln(factor PGA_field) + s (M - M_field) + residual, likewise PGV with the
        fitted slope; spreading and liquefaction follow from PGA and M.
        """
        change = magnitude - float(self.magnitudes[field])
        pga = factor * self.pga_g[field] * np.exp(pga_per_magnitude * change + residual_pga)
        pgv = factor * self.pgv_cm_s[field] * np.exp(self.pgv_per_magnitude * change + residual_pgv)
        threshold = SUSCEPTIBILITY[self.susceptibility, 0]
        return Shaking(
            magnitude,
            pga,
            pgv,
            lateral_spreading_in(pga, magnitude, threshold),
            np.minimum(
                liquefaction_factor
                * liquefied_share(pga, magnitude, self.susceptibility, water_depth_ft),
                1.0,
            ),
        )


def read_ground_motion(region: str, lon_deg: Vector, lat_deg: Vector) -> GroundMotion:
    """The fields of a region at the given sites: linear between the grid's points, nearest
    outside of it. The class of soil is that of the nearest point.
    """
    fields = region_rows(region, "ground_motion_fields.csv")
    grid = region_rows(region, "ground_motion.csv")
    names = tuple(row["field"] for row in fields)
    magnitudes = np.array([float(row["magnitude"]) for row in fields])
    points = np.array([[float(row["lon_deg"]), float(row["lat_deg"])] for row in grid])
    columns = [f"{quantity}_{name}" for quantity in ("pga_g", "pgv_cm_s") for name in names]
    values = np.array([[float(row[column]) for column in columns] for row in grid])
    spread = np.array([[float(row[f"pgd_in_{name}"]) for name in names] for row in grid])
    # degrees of longitude are shorter: distances want the same length both ways
    scale = np.array([np.cos(np.radians(points[:, 1].mean())), 1.0])
    sites = np.column_stack([lon_deg, lat_deg])
    inside = LinearNDInterpolator(points * scale, values)(sites * scale)
    outside = NearestNDInterpolator(points * scale, values)(sites * scale)
    at_sites = np.where(np.isnan(inside), outside, inside).T
    pga_slope, pgv_slope = (
        _growth_per_magnitude(part, magnitudes, [row["source"] for row in fields])
        for part in np.split(np.log(values), 2, axis=1)
    )
    soil = _susceptibility(values[:, : len(names)], spread, magnitudes)
    return GroundMotion(
        names,
        magnitudes,
        np.array([float(row["weight"]) for row in fields]),
        at_sites[: len(names)],
        at_sites[len(names) :],
        soil[cKDTree(points * scale).query(sites * scale)[1]],
        pga_slope,
        pgv_slope,
    )


def _growth_per_magnitude(log_values: Matrix, magnitudes: Vector, sources: Sequence[str]) -> float:
    """Least-squares slope of the mean log over magnitude, in the source with most fields."""
    source = max(dict.fromkeys(sources), key=sources.count)
    same = np.array([s == source for s in sources])
    x = magnitudes[same] - magnitudes[same].mean()
    return float((x * log_values[:, same].mean(axis=0)).sum() / (x**2).sum())


def _susceptibility(pga_g: Matrix, pgd_in: Matrix, magnitudes: Vector) -> NDArray[np.int64]:
    """The class of soil of each grid point: the one whose spreading fits the stored fields."""
    misfit = np.stack(
        [
            sum(
                np.abs(lateral_spreading_in(pga_g[:, k], float(m), threshold) - pgd_in[:, k])
                for k, m in enumerate(magnitudes)
            )
            for threshold in SUSCEPTIBILITY[:, 0]
        ]
    )
    return np.asarray(misfit.argmin(axis=0), dtype=np.int64)


def correlation_factor(lon_deg: Vector, lat_deg: Vector, range_km: float) -> Matrix:
    r"""Lower triangle L with L L' = C, :math:`C_{ij} = \exp(-3 h_{ij} / range)`.

    Jayaram and Baker (2009): the correlation of within-event residuals falls with the
    distance h between sites. The places must differ. Plain column operations, not LAPACK,
    so that the last bit does not depend on the number of threads.
    """
    km = 6371.0 * np.radians(np.column_stack([lon_deg, lat_deg]))
    km[:, 0] *= np.cos(np.radians(lat_deg.mean()))
    apart = np.sqrt(((km[:, None, :] - km[None, :, :]) ** 2).sum(axis=2))
    rest = np.exp(-3.0 * apart / range_km)
    factor = np.zeros_like(rest)
    for j in range(len(rest)):
        column = rest[j:, j] / np.sqrt(rest[j, j])
        factor[j:, j] = column
        rest[j + 1 :, j + 1 :] -= np.multiply.outer(column[1:], column[1:])
    return np.asarray(factor)


def residuals(
    factor: Matrix,
    normals: Matrix,
    events: Vector,
    within_sigma: float,
    between_sigma: float,
) -> tuple[Vector, Vector]:
    """The residuals of ln PGA and ln PGV of one shock at every place.

    `normals` (2 x places) and `events` (2) are independent standard normal numbers; PGV
    takes part of its own from PGA (`PGA_PGV_CORRELATION`).
    """
    rho = PGA_PGV_CORRELATION
    rest = np.sqrt(1.0 - rho**2)
    # einsum without BLAS: the same bits for any number of threads
    local = np.einsum("ij,kj->ki", factor, normals)
    pga = within_sigma * local[0] + between_sigma * events[0]
    pgv = within_sigma * (rho * local[0] + rest * local[1]) + between_sigma * (
        rho * events[0] + rest * events[1]
    )
    return pga, pgv
