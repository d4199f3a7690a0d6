"""Stand-ins for ray.serve.metrics that remember what was counted."""


class Kinds:
    """Stands in for ray.serve.metrics: the sum, the last value or the observations of each metric and its tags."""

    def __init__(self):
        self.values = {}
        for kind in ("Counter", "Gauge", "Histogram"):
            setattr(
                self, kind,
                lambda name, description, tag_keys, kind=kind, **options: Kind(self.values, kind, name, tag_keys),
            )

    def of(self, name, *tags):
        return self.values.get((name, tuple(sorted(tags))))


class Kind:
    def __init__(self, values, kind, name, tag_keys):
        self.values, self.name, self.tag_keys = values, name, set(tag_keys)
        setattr(
            self, {"Counter": "inc", "Gauge": "set", "Histogram": "observe"}[kind], getattr(self, f"_{kind.lower()}")
        )

    def _key(self, tags):
        assert set(tags or {}) == self.tag_keys, f"{self.name} takes the tags {self.tag_keys}"
        assert all(isinstance(value, str) for value in (tags or {}).values())
        return self.name, tuple(sorted((tags or {}).items()))

    def _counter(self, value=1, tags=None):
        assert value > 0, "Ray's counters refuse anything else"
        self.values[self._key(tags)] = self.values.get(self._key(tags), 0) + value

    def _gauge(self, value, tags=None):
        self.values[self._key(tags)] = value

    def _histogram(self, value, tags=None):
        self.values.setdefault(self._key(tags), []).append(value)
