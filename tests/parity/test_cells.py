"""Every cell of the table (`table`) equals one process: loss and gradients of one step at equal weights."""

import pytest

from parity.cells import assert_holds
from parity.table import CELLS


def marked(cell):
    marks = [pytest.mark.core] if cell.tier == "core" else []
    return pytest.param(cell, marks=[*marks, pytest.mark.both_ends] if cell.both_ends else marks, id=str(cell))


@pytest.mark.parametrize("cell", map(marked, CELLS))
def test_gradients_equal_one_process(cell):
    assert_holds(cell)
