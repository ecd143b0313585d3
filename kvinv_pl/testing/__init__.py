"""The conformance kit: named checks that every attention variant passes, or says why it does not.

A variant of your own is checked by pytest in three lines, and by `kvinv check FILE:CLASS`:

    @pytest.mark.parametrize("trial", trials(MyVariant), ids=str)
    def test_my_variant_conforms(trial):
        trial()
"""

from kvinv_pl.testing.check import Check, NonconformingError
from kvinv_pl.testing.checks import CHECKS
from kvinv_pl.testing.trials import Trial, check_variant, report, trials

__all__ = ["CHECKS", "Check", "NonconformingError", "Trial", "check_variant", "report", "trials"]
