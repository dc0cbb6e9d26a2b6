"""The table of PEFT methods that the tests on ranks walk is complete."""

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from ranks.peft.test_methods import METHODS

#: They need what a test of parallelism should not bring along: scikit-learn; saved adapters to mix.
NOT_TRIED = {"ADAMSS", "XLORA"}


def test_every_method_of_peft_is_in_the_table():
    known = {str(kind.value) for kind in PEFT_TYPE_TO_TUNER_MAPPING}
    assert known == METHODS.keys() | NOT_TRIED, "a new method of PEFT: add it here and see what becomes of it"
