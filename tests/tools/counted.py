"""`python -m tests.tools.counted`: how many functions the calls that `benchmarks host` times call, as JSON.

Of Python and of C, whatever else the machine does: a time beside other tests is off by more than what it is to show.
"""

import json
import sys
from collections.abc import Callable
from types import FrameType

import torch

from benchmarks import cases, host
from benchmarks.offline import stand_in


def functions(call: Callable[[], object]) -> int:
    """How many functions a call calls."""
    count = 0

    def see(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    for _ in range(3):  # the first call compiles, the second one makes the plan that the third one goes by
        call()
    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count - 1  # the one that ends the count


def main() -> None:
    found = []
    for mode in host.CALLS:
        with torch.set_grad_enabled(mode == "train"):
            with stand_in.standing_in(host.TARGET, record=False):
                kernels = host.of_kernels(mode, cases.SIZES["tiny"], torch.float32, 1)
                found += [(mode, what, functions(call)) for what, call in kernels.calls.items()]
            found += [(mode, what, functions(call)) for what, call in host.of_torch(mode).calls.items()]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
