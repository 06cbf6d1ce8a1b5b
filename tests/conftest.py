"""How much the property tests look at: hundreds of random federations, or thousands."""

from hypothesis import HealthCheck, Phase, settings

for name, examples in (("usual", 200), ("thorough", 2500)):
    settings.register_profile(
        name,
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        phases=set(Phase) - {Phase.explain},
    )
settings.load_profile("usual")
