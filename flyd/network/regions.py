"""Fly's region codes, where they are, and which of some regions is nearest.

Owns the table of known regions and the order of nearness that the edge, the names and
placement share. Pure. A host may name a region that is not in the table (a region is
only a label); it has no distance, so it comes last. Knows nothing of hosts or health.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import asin, cos, radians, sin, sqrt

from flyd.model import Value

EARTH_RADIUS_KM = 6371.0


class Region(Value, frozen=True, kw_only=True):
    """A place where hosts may stand. The code is that of the nearest large airport."""

    code: str
    city: str
    latitude: float
    longitude: float


def _region(code: str, city: str, latitude: float, longitude: float) -> tuple[str, Region]:
    return code, Region(code=code, city=city, latitude=latitude, longitude=longitude)


REGIONS: dict[str, Region] = dict(
    (
        _region("ams", "Amsterdam, Netherlands", 52.37, 4.90),
        _region("arn", "Stockholm, Sweden", 59.65, 17.92),
        _region("atl", "Atlanta, Georgia (US)", 33.64, -84.43),
        _region("bog", "Bogotá, Colombia", 4.70, -74.15),
        _region("bom", "Mumbai, India", 19.09, 72.87),
        _region("bos", "Boston, Massachusetts (US)", 42.37, -71.02),
        _region("cdg", "Paris, France", 48.86, 2.35),
        _region("den", "Denver, Colorado (US)", 39.74, -104.98),
        _region("dfw", "Dallas, Texas (US)", 32.78, -96.81),
        _region("ewr", "Secaucus, NJ (US)", 40.79, -74.06),
        _region("eze", "Ezeiza, Argentina", -34.82, -58.54),
        _region("fra", "Frankfurt, Germany", 50.12, 8.68),
        _region("gdl", "Guadalajara, Mexico", 20.52, -103.31),
        _region("gig", "Rio de Janeiro, Brazil", -22.81, -43.25),
        _region("gru", "São Paulo, Brazil", -23.55, -46.63),
        _region("hkg", "Hong Kong", 22.25, 114.20),
        _region("iad", "Ashburn, Virginia (US)", 39.02, -77.46),
        _region("jnb", "Johannesburg, South Africa", -26.14, 28.20),
        _region("lax", "Los Angeles, California (US)", 33.94, -118.41),
        _region("lhr", "London, United Kingdom", 51.52, -0.18),
        _region("mad", "Madrid, Spain", 40.44, -3.82),
        _region("mia", "Miami, Florida (US)", 25.79, -80.22),
        _region("nrt", "Tokyo, Japan", 35.62, 139.74),
        _region("ord", "Chicago, Illinois (US)", 41.89, -87.61),
        _region("otp", "Bucharest, Romania", 44.43, 26.10),
        _region("phx", "Phoenix, Arizona (US)", 33.42, -112.01),
        _region("qro", "Querétaro, Mexico", 20.62, -100.19),
        _region("scl", "Santiago, Chile", -33.37, -70.64),
        _region("sea", "Seattle, Washington (US)", 47.61, -122.33),
        _region("sin", "Singapore", 1.30, 103.80),
        _region("sjc", "San Jose, California (US)", 37.35, -121.90),
        _region("syd", "Sydney, Australia", -33.87, 151.19),
        _region("waw", "Warsaw, Poland", 52.17, 20.97),
        _region("yul", "Montreal, Canada", 45.49, -73.76),
        _region("yyz", "Toronto, Canada", 43.64, -79.38),
    )
)


def distance_km(one: Region, other: Region) -> float:
    """The great-circle distance between two regions."""
    latitude, other_latitude = radians(one.latitude), radians(other.latitude)
    half_north = sin((other_latitude - latitude) / 2)
    half_east = sin(radians(other.longitude - one.longitude) / 2)
    haversine = half_north**2 + cos(latitude) * cos(other_latitude) * half_east**2
    return 2 * EARTH_RADIUS_KM * asin(min(1.0, sqrt(haversine)))


def nearest_first(origin: str, regions: Iterable[str]) -> tuple[str, ...]:
    """The given regions by distance from `origin`, each once.

    `origin` itself is first if it is among them; codes that are not in the table are
    last, in alphabetical order (all of them, where `origin` is such a code).
    """
    here = REGIONS.get(origin)

    def nearness(code: str) -> tuple[bool, bool, float, str]:
        there = REGIONS.get(code)
        if here is None or there is None:
            return code != origin, True, 0.0, code
        return code != origin, False, distance_km(here, there), code

    return tuple(sorted(set(regions), key=nearness))
