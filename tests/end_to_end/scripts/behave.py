"""Cases that end in every way, for the processes of a benchmark. Imports nothing that takes time."""

import os
import time


def behave(case: dict) -> dict:
    """End as the case's name says."""
    if case["name"] == "raises":
        raise ValueError("as it was told")
    if case["name"] == "dies":
        os._exit(7)
    if case["name"] == "hangs":
        time.sleep(100)
    return {"rank": os.environ.get("RANK"), "world": os.environ.get("WORLD_SIZE")}
