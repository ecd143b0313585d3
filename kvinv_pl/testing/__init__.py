"""The conformance kit: named checks that every attention variant, and every method, passes or says why not.

A variant of your own is checked by pytest in three lines, and by `kvinv check FILE:CLASS`:

    @pytest.mark.parametrize("trial", trials(MyVariant), ids=str)
    def test_my_variant_conforms(trial):
        trial()

A method to compare with is checked in the same way by `method_trials`, or in one call by `check_method`.
"""

from kvinv_pl.testing.check import Check, NonconformingError
from kvinv_pl.testing.checks import CHECKS
from kvinv_pl.testing.method_checks import METHOD_CHECKS
from kvinv_pl.testing.trials import Trial, check_method, check_variant, method_trials, report, trials

__all__ = [
    "CHECKS",
    "METHOD_CHECKS",
    "Check",
    "NonconformingError",
    "Trial",
    "check_method",
    "check_variant",
    "method_trials",
    "report",
    "trials",
]
