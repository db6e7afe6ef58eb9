"""A trace of some training steps (--profile), and the kernels that take longest in them."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity

from gpt2.base.text import counted

logger = logging.getLogger(__name__)

SETTLING_STEPS = 3
"""steps before the profiler starts: kernels are compiled, and the allocator fills its cache"""
WARM_UP_STEPS = 2
"""steps with the profiler whose records are thrown away: its own first ones are slow"""
LISTED_KERNELS = 10


class StepProfiler:
    """Records `steps` steps of a process, a few after its first, with `torch.profiler`.

    Its failures are warnings: it never ends a run, nor changes its numbers.
    """

    def __init__(self, steps: int, folder: Path, device: torch.device, first_step: int) -> None:
        """The trace goes to `folder`. `first_step` is the number of steps done before this
        process."""
        self._steps, self._folder, self._on_cuda = steps, folder, device.type == "cuda"
        self._before = first_step + SETTLING_STEPS + WARM_UP_STEPS
        self._done = 0
        activities = [ProfilerActivity.CPU]
        if self._on_cuda:
            activities.append(ProfilerActivity.CUDA)
        self._profiler: torch.profiler.profile | None = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(
                wait=SETTLING_STEPS, warmup=WARM_UP_STEPS, active=steps, repeat=1
            ),
            acc_events=True,  # or torch warns that only those of the last cycle are kept
        )
        with self._given_up_on_error():
            self._profiler.start()

    def step(self) -> None:
        """To be called after each step."""
        if self._profiler is None:
            return
        self._done += 1
        if self._recorded == self._steps:
            self.close()
            return
        with self._given_up_on_error():
            self._profiler.step()

    @property
    def _recorded(self) -> int:
        """Recorded steps."""
        return self._done - SETTLING_STEPS - WARM_UP_STEPS

    def close(self) -> None:
        """Writes what is recorded, also if the run ends before all of its steps are."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        with self._given_up_on_error():
            profiler.stop()
            if self._recorded > 0:
                self._write(profiler)
            else:
                logger.warning(
                    "no profile: --profile records from step %d on, and the run ended after %s",
                    self._before + 1,
                    counted(self._done, "step"),
                )

    @contextlib.contextmanager
    def _given_up_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception:  # a full disk, a profiler that does not match the driver
            self._profiler = None
            logger.warning("no profile:", exc_info=True)

    def _write(self, profiler: torch.profiler.profile) -> None:
        first, last = self._before + 1, self._before + self._recorded
        path = self._folder / f"steps_{first}-{last}.pt.trace.json.gz"  # as TensorBoard expects
        self._folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        logger.info("Profile of steps %d to %d: %s", first, last, path)
        for line in longest_kernels(profiler.key_averages(), self._recorded, self._on_cuda):
            logger.info("  - %s", line)


def longest_kernels(events: list[FunctionEventAvg], steps: int, on_cuda: bool) -> list[str]:
    """One line for each of the LISTED_KERNELS that take longest: on CUDA the kernels by their time
    on the device, on a CPU the operators by the time that they themselves take."""

    def time_us(event: FunctionEventAvg) -> float:
        return float(event.self_device_time_total if on_cuda else event.self_cpu_time_total)

    kernels = [
        event
        for event in events
        if (event.device_type.name == "CUDA") == on_cuda
        and not event.is_user_annotation  # names of whole regions, such as a step
    ]
    total_us = sum(map(time_us, kernels)) or 1
    return [
        f"{time_us(event) / steps / 1000:.3f} ms a step, {time_us(event) / total_us:.1%}, "
        f"{event.count / steps:.4g} calls: {event.key}"
        for event in sorted(kernels, key=time_us, reverse=True)[:LISTED_KERNELS]
    ]
