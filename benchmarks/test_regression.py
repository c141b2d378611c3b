"""`pytest benchmarks/`: the fused module over the reference, in time and memory, against the committed ratios.

Ratios, not seconds: they are of calls that take turns in one process, so that they hold on another machine.
`--benchmark-autosave` keeps the seconds, `--benchmark-compare` compares them with the last ones kept, and
`--save-ratios` measures the ratios anew, for which the machine must do nothing else: what else runs slows the
reference, which moves more memory, more than ours.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import cases, group, measure, providers
from benchmarks.cases import Problem

RATIOS = Path(__file__).parent / "results" / "ratios.json"
TIME_MARGIN = 1.5  # other processes, another CPU: the ratio moves; a lost fusion moves it further
MEMORY_MARGIN = 1.02  # every allocation is counted, whatever the machine does
ROUNDS = 7


@pytest.mark.parametrize("phase", cases.MODES)
def test_fused_over_reference(phase: str, benchmark, request: pytest.FixtureRequest) -> None:
    problem = Problem("dca", cases.SIZES["paper"], 1, torch.float32, phase == "train")
    inputs = providers.inputs_of(problem, cases.load_image(None), measure.device())
    mode = problem.modes[-1]
    calls = {
        name: group.call_of(providers.build(providers.PROVIDERS[name], problem, *inputs), mode)
        for name in ("reference", "torch")
    }
    for call in calls.values():
        call.prepare()
        call.run()
    *_, samples = measure.latency(calls, ROUNDS)
    # What else runs only ever adds to a time, so the lower end says most of the call.
    times = {name: np.percentile([time for time, _ in taken], 20) for name, taken in samples.items()}
    peaks = {}
    for name, call in calls.items():
        call.prepare()
        peaks[name] = measure.count_allocations(call.run)["counted_peak_mb"]
    ratios = {key: float(of["torch"] / of["reference"]) for key, of in (("time", times), ("memory", peaks))}

    benchmark.extra_info.update(ratios)
    benchmark.pedantic(calls["torch"].run, setup=calls["torch"].prepare, rounds=3)
    if request.config.getoption("--save-ratios"):
        known = json.loads(RATIOS.read_text()) if RATIOS.exists() else {}
        RATIOS.write_text(json.dumps(known | {phase: ratios}, indent=1, sort_keys=True) + "\n")
        return
    if not RATIOS.exists():
        pytest.skip("no ratios are committed: `pytest benchmarks/ --save-ratios` on a machine that does nothing else")
    known = json.loads(RATIOS.read_text())[phase]
    assert ratios["time"] <= TIME_MARGIN * known["time"]
    assert ratios["memory"] <= MEMORY_MARGIN * known["memory"]
