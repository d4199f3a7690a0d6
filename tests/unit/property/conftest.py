"""How many examples each property gets: 200, always the same ones; with --hypothesis-profile=nightly 10,000 fresh ones.
"""

from hypothesis import HealthCheck, settings

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile(
    "default", max_examples=200, derandomize=True, database=None, deadline=None, suppress_health_check=SLOW
)
settings.register_profile("nightly", max_examples=10_000, deadline=None, suppress_health_check=SLOW)
settings.load_profile("default")
