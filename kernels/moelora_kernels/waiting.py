"""How programs of one launch wait for each other, by counters in memory.

A GPU starts the programs of a launch in order. So a program may wait for those before it: they run,
or are done. The last program to leave, or the last of all, which waits until nobody looks at them
any more, makes the counters zero again for the next launch.
"""

import triton
import triton.language as tl


@triton.jit
def signal(counter_ptr, mask=None):
    """Say that what this program has stored may be read by others of the launch.

    There may be several counters, of which some are masked.
    """
    tl.debug_barrier()  # Stores of all threads come before the one that signals.
    tl.atomic_add(counter_ptr, 1, mask=mask, sem="release", scope="gpu")


@triton.jit
def count(counter_ptr):
    """As :func:`signal`, where nobody reads what this program has stored."""
    tl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu")


@triton.jit
def wait_for(counter_ptr, count):
    """Wait until ``count`` programs have signalled; what they stored may then be read."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < count:
        pass


@triton.jit
def leave(signals_ptr, PROGRAMS: tl.constexpr):
    """Whether this program is the last of ``PROGRAMS`` to get here."""
    return tl.atomic_add(signals_ptr, 1, sem="relaxed", scope="gpu") == PROGRAMS - 1


@triton.jit
def clear(signals_ptr, SIGNALS: tl.constexpr):
    """Make the counters ready for the next launch."""
    tl.store(signals_ptr + tl.arange(0, SIGNALS), tl.zeros([SIGNALS], tl.int32))
