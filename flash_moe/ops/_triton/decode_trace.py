"""What every program of one launch did: the kernel's own records, read back and put in words.

A record is three int64: a task's place in the table, or a wait; when it began and ended on the GPU's global timer. The
first of a program has the number of the others, and no times.
"""

import torch
from torch import Tensor

from flash_moe.ops._triton.decode_records import DISPATCH, DOORBELL, WORDS
from flash_moe.schedule.decode import Schedule
from flash_moe.schedule.trace import TaskSpan, Trace, WaitSpan

# Of one program, with the first, which counts them; later ones are counted only.
MAX_RECORDS = 2048


def make_records(num_programs: int, device: torch.device) -> Tensor:
    return torch.zeros(num_programs, MAX_RECORDS, WORDS.value, dtype=torch.int64, device=device)


def fill_trace(trace: Trace, records: Tensor, slots: Tensor, schedule: Schedule, policy: str) -> None:
    """Wait for the device, then write all records; ``slots [G, E]`` has each program's expert by slot."""
    found, experts, sizes = records.cpu(), slots.cpu(), schedule.sizes
    letters = {"T": sizes.T, "H": sizes.H, "I": sizes.I, "E": sizes.E, "K": sizes.K}
    trace.begin(policy, "GPU", schedule.num_programs, letters)
    trace.num_lost = int((found[:, 0, 0] - (found.shape[1] - 1)).clamp(min=0).sum())
    starts = found[..., 1][found[..., 2] > 0]
    origin = int(starts.min()) if len(starts) else 0
    for program, mine in enumerate(found):
        for what, start, end in mine[mine[:, 2] > 0].tolist():
            if what >= 0 or what == DISPATCH.value:
                trace.tasks.append(_task(program, what, start - origin, end - origin, experts[program], schedule))
            else:
                name = "an order" if what == DOORBELL.value else schedule.counter_name(-1 - what)
                trace.waits.append(WaitSpan(program, name, start - origin, end - origin))


def _task(program: int, place: int, start: int, end: int, experts: Tensor, schedule: Schedule) -> TaskSpan:
    if place < 0:
        return TaskSpan(program, "dispatch", start, end)
    task = schedule.tasks[place]
    expert = int(experts[task.slot]) if task.slot >= 0 else None
    nbytes = schedule.cost(place).nbytes
    return TaskSpan(program, task.kind.name.lower(), start, end, place, expert, (task.begin, task.end), nbytes)
