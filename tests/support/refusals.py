"""Bad input is refused with the values and a way out."""

import pytest


def refused(error, *words):
    "The block raises `error`, and its message holds all `words`."

    class Check:
        def __enter__(self):
            self.context = pytest.raises(error)
            self.caught = self.context.__enter__()

        def __exit__(self, *exc):
            done = self.context.__exit__(*exc)
            missing = [word for word in words if word not in str(self.caught.value)]
            assert not missing, f"{missing} not in: {self.caught.value}"
            return done

    return Check()
